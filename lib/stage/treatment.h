/* treatment.h - what is done to the arithmetic, from the settings to what is applied: the same
 * functions for rollout, learner and evaluator, so that they cannot disagree.
 *
 * Knows: which settings shape which kind of noise. Does not know: how it is drawn or measured
 * (lib/model), when a phase begins (the stages).
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_TREATMENT_H
#define QERL_TREATMENT_H
#include "lib/model/noise.h"
#include "lib/stage/shared.h"

/* AQN's intended size after `step` completed steps; 0 = none. */
double treatment_sigma(const struct shared *c, int64_t step);
/* One draw of AQN for the weights of m: sigma is that of treatment_sigma, or what a hand-written
 * ticket says. */
int treatment_view(struct noise_view *v, const struct model *m, const struct shared *c,
                   int64_t step, double sigma, uint64_t seed, int64_t version, struct err *e);
#endif
