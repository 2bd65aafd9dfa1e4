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
#include "lib/model/model.h"
#include "lib/model/noise_bf16.h"

enum noise_phase { NOISE_PHASE_ROLLOUT, NOISE_PHASE_LOGPROB, NOISE_PHASE_UPDATE, NOISE_PHASE_EVAL,
                   NOISE_PHASE_COUNT };
/* matmul: the seven projections, each with its adapter, before the bias. bmm: attention's scores
 * and values. head: the logits. */
enum noise_op { NOISE_OP_MATMUL, NOISE_OP_BMM, NOISE_OP_SOFTMAX, NOISE_OP_SILU, NOISE_OP_GELU,
                NOISE_OP_NORM, NOISE_OP_ROPE, NOISE_OP_HEAD, NOISE_OP_COUNT };
enum noise_direction { NOISE_FORWARD, NOISE_BACKWARD, NOISE_DIRECTION_COUNT };
/* modules by the names that model files give them; projections first, as in enum proj */
enum noise_module { NOISE_MODULE_Q, NOISE_MODULE_K, NOISE_MODULE_V, NOISE_MODULE_O,
                    NOISE_MODULE_GATE, NOISE_MODULE_UP, NOISE_MODULE_DOWN, NOISE_MODULE_NORM_IN,
                    NOISE_MODULE_NORM_POST, NOISE_MODULE_NORM_FINAL, NOISE_MODULE_HEAD,
                    NOISE_MODULE_COUNT };
enum noise_point { NOISE_POINT_INPUT, NOISE_POINT_OUTPUT, NOISE_POINT_WEIGHT };
extern const char *const noise_phase_name[], *const noise_op_name[], *const noise_type_name[],
    *const noise_module_name[];

/* Numbers of sites, part of every draw's counter (KERN_NOISE_SITE(layer, number)): never renumber.
 * Those that lie in no layer have layer 0. Forward, of operations: the projections are 0 .. 6 as in
 * enum proj. */
enum noise_site {
    NOISE_SITE_SCORES = 7, NOISE_SITE_VALUES, NOISE_SITE_PROBS, NOISE_SITE_SILU,
    NOISE_SITE_NORM_IN, NOISE_SITE_NORM_POST, NOISE_SITE_NORM_FINAL, NOISE_SITE_ROPE_Q,
    NOISE_SITE_ROPE_K, NOISE_SITE_HEAD,
    /* of modules: + enum noise_module */
    NOISE_SITE_MODULE_INPUT = 32, NOISE_SITE_MODULE_OUTPUT = 48, NOISE_SITE_MODULE_WEIGHT = 64,
    /* backward: gradients of inputs; DX_QKV and DX_MLP are the sums that q, k, v and gate, up
     * return */
    NOISE_SITE_DX_QKV = 128, NOISE_SITE_DX_O, NOISE_SITE_DX_MLP, NOISE_SITE_DX_DOWN,
    NOISE_SITE_DQ, NOISE_SITE_DK, NOISE_SITE_DV, NOISE_SITE_DPROBS, NOISE_SITE_DSCORES,
    NOISE_SITE_DGATE, NOISE_SITE_DNORM_IN, NOISE_SITE_DNORM_POST, NOISE_SITE_DNORM_FINAL,
    NOISE_SITE_ROPE_DQ, NOISE_SITE_ROPE_DK, NOISE_SITE_DHEAD,
    /* the accumulated gradient of the adapter: a layer's rows of NOISE_GRAD_ROW, what is left */
    NOISE_SITE_GRAD = 192, NOISE_SITE_GRAD_REST
};
enum { NOISE_GRAD_ROW = 4096 };

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
static inline bool noise_module_in_layer(enum noise_module m) {
    return m < NOISE_MODULE_NORM_FINAL;
}
/* Whether a pattern names a module: as select_name, and its last part may be "linear" (the seven
 * projections) or "rmsnorm" (the norms). */
bool noise_module_hit(const char *pattern, enum noise_module m, int layer);
/* EXIT_CONFIG with the valid names on a misspelt one, on layers the model has not, on a pattern
 * that hits nothing, on a combination that means nothing; all of them in one go. */
int noise_plan_make(struct noise_plan *p, const struct noise_text *ops,
                    const struct noise_text *modules, const struct model_conf *c, struct err *e);
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
/* The table of `check`: array of {"phase","kind":"op"|"module","name","direction","type",
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
 * tallies. {} when nothing was intended. "warning" where bf16 arithmetic realised nothing, and
 * where f32 is too coarse for an absolute size. */
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
 * warning in the JSON, because showing that is what the setting is for. */
int noise_evidence_check(const struct noise_plan *p, enum noise_phase phase,
                         const struct noise_evidence *ev, struct err *e);
#endif
