/* treatment.h - what is done to the arithmetic, from the settings to what is applied: the same
 * functions for rollout, learner and evaluator, so that they cannot disagree.
 *
 * Knows: which settings shape which kind of noise. Does not know: how it is drawn or measured
 * (lib/model), when a phase begins (the stages).
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_TREATMENT_H
#define QERL_TREATMENT_H
#include "lib/model/noise.h"
#include "lib/model/noise_ops.h"
#include "lib/stage/shared.h"

/* AQN's intended size after `step` completed steps; 0 = none. */
double treatment_sigma(const struct shared *c, int64_t step);
/* One draw of AQN for the weights of m: sigma is that of treatment_sigma, or what a hand-written
 * ticket says. */
int treatment_view(struct noise_view *v, const struct model *m, const struct shared *c,
                   int64_t step, double sigma, uint64_t seed, int64_t version, struct err *e);

/* Noise on operations and modules for a model of this shape; texts are lent by c. in_eval: as if
 * noise.ops.eval and noise.modules.eval were yes. EXIT_CONFIG on what means nothing. */
int treatment_plan(struct noise_plan *p, const struct shared *c, const struct model_conf *m,
                   bool in_eval, struct err *e);
/* Bytes of noise on weights of modules, for a stage that computes these phases. */
size_t treatment_bytes(const struct shared *c, const struct model_conf *m, bool in_eval,
                       enum noise_phase from, enum noise_phase to);
/* What acts in a phase, as scores name it: "none", or "ops ...; modules ...; aqn 0.01". Appends. */
void treatment_text(struct str *out, const struct noise_plan *p, enum noise_phase phase,
                    double sigma);

/* What groups and scores carry: compact JSON of what was measured in a phase and of the AQN draw
 * (NULL = none), "" where nothing was intended. The caller frees it. */
char *treatment_evidence(const struct noise_plan *p, enum noise_phase phase,
                         const struct noise_evidence *measured, const struct noise_view *aqn);
/* Such a text from another process: -1 where something that p intends in this phase is not in it
 * with at least one site. */
int treatment_evidence_check(const struct noise_plan *p, enum noise_phase phase, const char *text,
                             struct err *e);
#endif
