/* run.h - the learner's run: step after step, each committed before the next.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_LEARNER_RUN_H
#define QERL_LEARNER_RUN_H
#include "stages/learner/conf.h"

struct run;
/* loads model, data, newest checkpoint; NULL with s->err */
struct run *run_create(struct stage *s);
void run_destroy(struct run **r);
/* 1 = a step was completed, 0 = all steps are done, 2 = asked to stop, -1 = s->err. */
int run_step(struct run *r);
/* Last commit, goodbye to the rollouts. 0 or -1. */
int run_finish(struct run *r);
/* What `check` prints: steps, scored steps, sigma table, prompts, memory, notes. */
int run_plan(const struct learner_conf *c, json_t *out, struct err *e);
#endif
