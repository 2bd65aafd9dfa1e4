/* check.h - what the learner's settings may not say together, from the settings alone.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_LEARNER_CHECK_H
#define QERL_LEARNER_CHECK_H
#include "stages/learner/conf.h"

/* EXIT_CONFIG with a line for each combination that cannot work, and for each key that would be
 * without effect; tables are the learner's own. */
int learner_check(const struct learner_conf *c, const struct stage_key *const *tables,
                  struct err *e);
#endif
