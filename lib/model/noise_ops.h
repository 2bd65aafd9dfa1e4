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

enum noise_phase { NOISE_PHASE_ROLLOUT, NOISE_PHASE_LOGPROB, NOISE_PHASE_UPDATE, NOISE_PHASE_EVAL,
                   NOISE_PHASE_COUNT };
/* matmul: the seven projections, each with its adapter, before the bias. bmm: attention's scores and
 * values. head: the logits. */
enum noise_op { NOISE_OP_MATMUL, NOISE_OP_BMM, NOISE_OP_SOFTMAX, NOISE_OP_SILU, NOISE_OP_GELU,
                NOISE_OP_NORM, NOISE_OP_ROPE, NOISE_OP_HEAD, NOISE_OP_COUNT };
enum noise_direction { NOISE_FORWARD, NOISE_BACKWARD, NOISE_DIRECTION_COUNT };
enum noise_point { NOISE_POINT_INPUT, NOISE_POINT_OUTPUT, NOISE_POINT_WEIGHT };
/* modules by the names that model files give them */
enum noise_module { NOISE_MODULE_Q, NOISE_MODULE_K, NOISE_MODULE_V, NOISE_MODULE_O,
                    NOISE_MODULE_GATE, NOISE_MODULE_UP, NOISE_MODULE_DOWN, NOISE_MODULE_NORM_IN,
                    NOISE_MODULE_NORM_POST, NOISE_MODULE_NORM_FINAL, NOISE_MODULE_HEAD,
                    NOISE_MODULE_COUNT };
extern const char *const noise_phase_name[], *const noise_op_name[], *const noise_module_name[];

/* As the configuration says it; texts are lent. */
struct noise_text {
    int type;                    /* enum kern_noise_type */
    double scale, rate;
    const char *names;           /* ops: "matmul, head" or "all"; modules: names or patterns */
    const char *exclude;         /* modules only */
    const char *layers;          /* "all", "0,3,14-17", "14-17 of 28" (scaled to the model's depth) */
    bool forward, backward, phase[NOISE_PHASE_COUNT], bf16;
    enum noise_point point;      /* modules only */
};

struct noise_plan {
    struct noise_text op_text, module_text;          /* .type 0 = off */
    int layers;
    bool op[NOISE_OP_COUNT], op_absent[NOISE_OP_COUNT];      /* absent: asked for, not in this model */
    bool op_layer[MODEL_LAYERS_MAX];
    bool module[MODEL_LAYERS_MAX][NOISE_MODULE_COUNT];       /* NORM_FINAL and HEAD: layer 0's entry */
    /* Applications in one pass through the whole network, one for each site: a pass over any number
     * of rows counts once. What the counters must show is passes * this. */
    int op_sites[NOISE_OP_COUNT][NOISE_DIRECTION_COUNT], module_sites[NOISE_MODULE_COUNT];
};
/* EXIT_CONFIG with the valid names on a misspelt one, on layers the model has not, on a pattern that
 * hits nothing, on a combination that means nothing; all of them in one go. */
int noise_plan_make(struct noise_plan *p, const struct noise_text *ops,
                    const struct noise_text *modules, const struct model_conf *c, struct err *e);
static inline bool noise_plan_on(const struct noise_plan *p, enum noise_phase phase) {
    return (p->op_text.type && p->op_text.phase[phase]) ||
           (p->module_text.type && p->module_text.phase[phase]);
}
/* Canonical text for records and hashes, "none" when off: "ops relative_gaussian 0.05 matmul,head
 * forward+backward rollout,logprob,update; modules ..."; one form for one treatment. Appends. */
void noise_plan_text(const struct noise_plan *p, struct str *out);
/* The table of `check`: array of {"phase","kind":"op"|"module","name","direction","type","intended",
 * "sites"} and for absent ones "note". */
json_t *noise_plan_json(const struct noise_plan *p);

/* What was measured since the last take; relative sizes are of |t| (absolute types: of 1). */
struct noise_tally {
    int64_t sites;               /* applications */
    int64_t elements, measured, changed, changed_bf16;
    int64_t r, r2;               /* as KERN_NOISE_R, R2, in units of the intended scale */
};
struct noise_evidence {
    int64_t passes[NOISE_DIRECTION_COUNT];           /* through the whole network */
    struct noise_tally op[NOISE_OP_COUNT][NOISE_DIRECTION_COUNT], module[NOISE_MODULE_COUNT];
    struct noise_tally grad;     /* once on the accumulated gradient of the adapter */
};
void noise_evidence_add(struct noise_evidence *to, const struct noise_evidence *e);
double noise_tally_mean(const struct noise_tally *t, double scale);      /* of e / |t| */
double noise_tally_rms(const struct noise_tally *t, double scale);
/* Object "op/matmul/forward" -> {"intended","realised","mean","sites","elements","changed",
 * "changed_bf16"} (changed: shares), the same in metrics, records and scores; {} when nothing was
 * intended. */
json_t *noise_evidence_json(const struct noise_plan *p, enum noise_phase phase,
                            const struct noise_evidence *e);
/* -1 and the reason, where an intended treatment did not happen: no site visited, fewer than passes
 * * sites, nothing changed in f32, a realised size more than 6 standard errors off (rounding
 * included; not asked of bf16), or noise where none was intended. */
int noise_evidence_check(const struct noise_plan *p, enum noise_phase phase,
                         const struct noise_evidence *ev, struct err *e);
#endif
