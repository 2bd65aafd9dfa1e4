/* noise_sum.h - noise of a run as a whole: steps may be too small to show a rare kind of it, the
 * run may not.
 *
 * Knows: what a step adds, when the sum says that a treatment did not happen. Does not know: how it
 * was measured (lib/model), where the sum is kept between starts (ckpt.h).
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_NOISE_SUM_H
#define QERL_NOISE_SUM_H
#include "stages/learner/ckpt.h"

void noise_sum_add(struct progress *p, const struct noise_plan *plan, enum noise_phase phase,
                   const struct noise_evidence *ev);
/* At the end of the run. EXIT_CONFIG where a phase had noise that changed not one element. */
int noise_sum_check(const struct progress *p, const struct noise_plan *plan, struct err *e);
#endif
