/* noise_ops.h - noise on operations and on modules: which sites of a model are hit, in which phase
 * and direction, and what was measured there.
 *
 * Knows: the names a researcher uses, the sites that a model has, the expected counts, when a
 * measurement contradicts the intention. Does not know: how noise is drawn (kernels/noise.h), when
 * a phase begins (the stages). Ownership: a plan owns nothing but itself.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_NOISE_OPS_H
#define QERL_NOISE_OPS_H
#include "lib/base/json.h"
#include "lib/model/noise_bf16.h"
#include "lib/model/noise_site.h"

enum noise_phase { NOISE_PHASE_ROLLOUT, NOISE_PHASE_LOGPROB, NOISE_PHASE_UPDATE, NOISE_PHASE_EVAL,
                   NOISE_PHASE_COUNT };
extern const char *const noise_phase_name[], *const noise_type_name[];

/* As the configuration says it; texts are lent. */
struct noise_text {
    int type;                    /* enum kern_noise_type */
    double scale, rate;
    const char *names;           /* ops: "matmul, head" or "all"; modules: names or patterns */
    const char *exclude;         /* modules only */
    const char *layers;          /* as select_layers takes it, without multipliers */
    bool forward, backward, phase[NOISE_PHASE_COUNT], bf16;
    enum noise_point point;      /* modules only */
};

struct noise_plan {
    /* .type 0 = off; after noise_plan_make .phase holds those in which something happens */
    struct noise_text op_text, module_text;
    int layers;
    /* absent: asked for, not in this model */
    bool op[NOISE_OP_COUNT], op_absent[NOISE_OP_COUNT];
    bool op_layer[MODEL_LAYERS_MAX];
    /* all layers: then the final norm and the head, which lie in none, are hit too */
    bool op_whole;
    /* NORM_FINAL and HEAD: layer 0's entry */
    bool module[MODEL_LAYERS_MAX][NOISE_MODULE_COUNT];
    /* Applications in one pass through the whole network, one for each site: a pass over any number
     * of rows counts once. What the counters must show is passes * this. */
    int op_sites[NOISE_OP_COUNT][NOISE_DIRECTION_COUNT], module_sites[NOISE_MODULE_COUNT];
    struct noise_bf16 op_bf16, module_bf16;          /* with dtype = bf16 */
};
/* Whether a pattern names a module: as select_name, and its last part may be "linear" (the seven
 * projections) or "rmsnorm" (the norms). */
bool noise_module_hit(const char *pattern, enum noise_module m, int layer);
/* EXIT_CONFIG with the valid names on a misspelt one, on layers the model has not, on a pattern
 * that hits nothing, on a combination that means nothing; all of them in one go. */
int noise_plan_make(struct noise_plan *p, const struct noise_text *ops,
                    const struct noise_text *modules, const struct model_conf *c, struct err *e);
/* EXIT_CONFIG where a dead zone on the weights of norms alone, read from a model's files, would
 * change none of them; 0 where there is nothing to read. */
int noise_try_zone(const char *path, const struct model_conf *c, const struct noise_plan *p,
                   struct err *e);
static inline bool noise_plan_on(const struct noise_plan *p, enum noise_phase phase) {
    return (p->op_text.type && p->op_text.phase[phase]) ||
           (p->module_text.type && p->module_text.phase[phase]);
}
/* Whether an operation's noise acts in a phase and direction; the backward exists in the update. */
bool noise_plan_op_on(const struct noise_plan *p, enum noise_op op, enum noise_direction d,
                      enum noise_phase phase);
/* Whether the backward of attention needs what the forward left of its rows (kernels/noise.h) to
 * make the plan's noise again. */
bool noise_plan_peaks(const struct noise_plan *p);
/* What the configured size is called beside what came of it: "intended", the size that should be
 * measured; "threshold" of deadzone, where the data decide what it causes; NULL of fp8, which has
 * none. */
const char *noise_size_name(const struct noise_text *t);
/* That size: scale, for sparse scale * sqrt(rate). */
double noise_intended(const struct noise_text *t);
/* Canonical text for records and hashes, "none" when off: "ops relative_gaussian 0.05 matmul,head
 * forward+backward rollout,logprob,update; modules ..."; one form for one treatment. Appends. */
void noise_plan_text(const struct noise_plan *p, struct str *out);
/* "op/matmul/forward", kind op or module: what names a row of evidence wherever one stands. */
enum { NOISE_KEY_MAX = 64 };
void noise_key(char key[NOISE_KEY_MAX], const char *kind, const char *name, enum noise_direction d);
/* The table of `check`: array of {"phase","key","kind":"op"|"module","name","direction","type",
 * noise_size_name,"sites"}, the adapter's gradient as "lora_grad", "layers" where only some are
 * hit, and for absent ones "note". */
json_t *noise_plan_json(const struct noise_plan *p);

/* What was measured since the last take; relative sizes are of |t| (absolute types: of 1). */
struct noise_tally {
    int64_t sites;               /* applications */
    int64_t elements, measured, coarse, changed, changed_bf16;
    int64_t r, r2;               /* as KERN_NOISE_R, R2, in units of the intended scale */
};
struct noise_evidence {
    int64_t passes[NOISE_DIRECTION_COUNT];           /* through the whole network */
    int64_t wanted;              /* forward passes that wanted logits: only they meet final sites */
    /* Rows of forward passes, and the sum of squares of how often each was computed: samples of a
     * group share the draws of their prompt. */
    int64_t rows, rows_squared;
    int64_t updates;             /* gradients that taught something; the caller counts them */
    uint64_t weights_draw;       /* noise on weights: the draw whose tally is in here; 0 = none */
    struct noise_tally op[NOISE_OP_COUNT][NOISE_DIRECTION_COUNT], module[NOISE_MODULE_COUNT];
    struct noise_tally grad;     /* once on the accumulated gradient of the adapter */
};
void noise_evidence_add(struct noise_evidence *to, const struct noise_evidence *e);
/* What came to `before`, an earlier state of e; the draw for weights, made once, is in both. */
struct noise_evidence noise_evidence_since(const struct noise_evidence *e,
                                           const struct noise_evidence *before);
double noise_tally_mean(const struct noise_tally *t, double scale);      /* of e / |t| */
double noise_tally_rms(const struct noise_tally *t, double scale);
/* Object "op/matmul/forward" -> {noise_size_name,"realised","mean","sites","elements","changed",
 * "changed_bf16","sums"} (changed: shares; sums: the tally's members in their order), the same in
 * metrics, records and scores; also "op/lora_grad/backward", and "passes": the members before the
 * tallies. {} when nothing was intended. "warning" where nothing was realised, and where f32
 * is too coarse for an absolute size. */
json_t *noise_evidence_json(const struct noise_plan *p, enum noise_phase phase,
                            const struct noise_evidence *e);
/* The counts again out of such an object. -1 where it lacks something that was intended, or has
 * something that was not, or of another size. */
int noise_evidence_read(struct noise_evidence *to, const struct noise_plan *p,
                        enum noise_phase phase, const json_t *o, struct err *e);
/* -1 and the reason, where an intended treatment did not happen: no site visited, another number
 * than passes * sites, nothing changed, a realised size or a mean more than 6 standard errors off
 * (rounding included), changes that are no dead zone's or no E4M3's, or noise where none was
 * intended. Under dtype = bf16 a size may be 0 where bf16's steps leave nothing of it, which is a
 * warning in the JSON, because showing that is what the setting is for. Sparse noise and dead zones
 * may change none of few elements: each site alone is then not judged, a score as a whole is. */
int noise_evidence_check(const struct noise_plan *p, enum noise_phase phase,
                         const struct noise_evidence *ev, struct err *e);
/* Elements that noise on operations [0] and on modules [1] changed, for the sum over a run; -1:
 * none, though it was tried; 0 where it was not, and where bf16 may leave nothing. */
void noise_evidence_changed(int64_t changed[2], const struct noise_plan *p, enum noise_phase phase,
                            const struct noise_evidence *ev);
#endif
