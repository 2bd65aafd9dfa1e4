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
 * ticket says. v is all zero at first, and keeps its memory (noise_view_renew). */
int treatment_view(struct noise_view *v, const struct model *m, const struct shared *c,
                   int64_t step, double sigma, uint64_t seed, int64_t version, struct err *e);

/* Noise on operations and modules for a model of this shape; texts are lent by c. in_eval: as if
 * noise.ops.eval (but for noise that has no forward) and noise.modules.eval were yes. EXIT_CONFIG
 * on what means nothing. */
int treatment_plan(struct noise_plan *p, const struct shared *c, const struct model_conf *m,
                   bool in_eval, struct err *e);
/* Bytes of noise on weights of modules, for a stage that computes these phases. */
size_t treatment_bytes(const struct shared *c, const struct model_conf *m, bool in_eval,
                       enum noise_phase from, enum noise_phase to);
/* What acts in a phase after `step` completed steps, as scores name it: "none", or "ops ...;
 * modules ...; aqn 0.01 on norms" (aqn_target_text). Appends. */
void treatment_text(struct str *out, const struct noise_plan *p, const struct shared *c,
                    const struct model_conf *m, enum noise_phase phase, int64_t step,
                    double sigma);

/* Whose draws they were; fixed: of type systematic. */
struct treatment_seeds { uint64_t seed, fixed; };
/* What groups and scores carry: compact JSON of what was measured in a phase, of the AQN draw
 * (NULL = none) and of the seeds, as texts; "" where nothing was intended. The caller frees it. */
char *treatment_evidence(const struct noise_plan *p, enum noise_phase phase,
                         const struct noise_evidence *measured, const struct noise_view *aqn,
                         struct treatment_seeds seeds);
/* Adds the counts of such a text from another process. The draw for the weights of a module is the
 * same in all of them and counts once. -1 as noise_evidence_read. */
int treatment_evidence_add(struct noise_evidence *to, const struct noise_plan *p,
                           enum noise_phase phase, const char *text, struct err *e);
/* The text of a sum: counts from measured, all else as `part`, one of its parts, has it. */
char *treatment_evidence_sum(const struct noise_plan *p, enum noise_phase phase,
                             const struct noise_evidence *measured, const char *part);
/* noise_evidence_check; a contradiction is EXIT_CONFIG, because a restart would meet it again. */
int treatment_check(const struct noise_plan *p, enum noise_phase phase,
                    const struct noise_evidence *measured, struct err *e);
#endif
