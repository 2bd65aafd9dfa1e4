/* treatment.c - see treatment.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/stage/treatment.h"

#include "lib/model/net.h"
#include "lib/stage/aqn.h"

double treatment_sigma(const struct shared *c, int64_t step) {
    const struct noise_schedule s = aqn_schedule(c);
    return noise_schedule_at(&s, step);
}

int treatment_view(struct noise_view *v, const struct model *m, const struct shared *c,
                   int64_t step, double sigma, uint64_t seed, int64_t version, struct err *e) {
    struct noise_target t;
    if (sigma > 0 && aqn_target(&t, c, step, &m->conf, e) < 0) return -1;
    return noise_view_renew(v, m, &t, sigma, seed, (uint64_t)version, e);
}

/* Types of noise.modules.type, in the order of its choices. */
static const int module_type[] = { KERN_NOISE_OFF, KERN_NOISE_RELATIVE_GAUSSIAN,
                                   KERN_NOISE_ABSOLUTE_GAUSSIAN, KERN_NOISE_BIAS,
                                   KERN_NOISE_DEADZONE, KERN_NOISE_FP8 };

int treatment_plan(struct noise_plan *p, const struct shared *c, const struct model_conf *m,
                   bool in_eval, struct err *e) {
    const struct noise_text ops = {
        .type = c->ops.type,
        .scale = c->ops.scale,
        .rate = c->ops.rate,
        .names = c->ops.ops,
        .exclude = "",
        .layers = c->ops.layers,
        .forward = c->ops.direction != SHARED_DIRECTION_BACKWARD,
        .backward = c->ops.direction != SHARED_DIRECTION_FORWARD,
        .phase = { c->ops.rollout, c->ops.logprob, c->ops.update,
                   c->ops.eval || (in_eval && c->ops.direction != SHARED_DIRECTION_BACKWARD) },
        .bf16 = c->ops.dtype == 1
    };
    const struct noise_text modules = {
        .type = module_type[c->modules.type],
        .scale = c->modules.scale,
        .names = c->modules.targets,
        .exclude = c->modules.exclude,
        .layers = c->modules.layers,
        .forward = true,
        .phase = { c->modules.rollout, c->modules.logprob, c->modules.update,
                   c->modules.eval || in_eval },
        .bf16 = c->modules.dtype == 1,
        .point = (enum noise_point)c->modules.at
    };
    return noise_plan_make(p, &ops, &modules, m, e);
}

size_t treatment_bytes(const struct shared *c, const struct model_conf *m, bool in_eval,
                       enum noise_phase from, enum noise_phase to) {
    struct noise_plan p;
    if (treatment_plan(&p, c, m, in_eval, NULL) < 0) return 0;
    for (enum noise_phase i = from; i <= to; i++)
        if (p.module_text.type && p.module_text.phase[i])
            return net_plan_weights(m, (enum model_quant)c->quant.weights, &p);
    return 0;
}

static void keep_phase(struct noise_text *t, enum noise_phase phase) {
    for (int i = 0; i < NOISE_PHASE_COUNT; i++) t->phase[i] &= i == (int)phase;
    t->backward &= phase == NOISE_PHASE_UPDATE;
    if (!t->phase[phase]) t->type = KERN_NOISE_OFF;
}

void treatment_text(struct str *out, const struct noise_plan *p, const struct shared *c,
                    const struct model_conf *m, enum noise_phase phase, int64_t step,
                    double sigma) {
    struct noise_plan here = *p;
    const bool on = noise_plan_on(p, phase);
    keep_phase(&here.op_text, phase);
    keep_phase(&here.module_text, phase);
    if (on || sigma <= 0) noise_plan_text(&here, out);
    if (sigma <= 0) return;
    str_printf(out, "%saqn %.9g on ", on ? "; " : "", sigma);
    aqn_target_text(c, m, step, out);
}

/* By layer, the final norm last; four digits are enough to see a multiplier. */
static json_t *aqn_layers(const struct noise_view *v) {
    json_t *layers = json_array();
    for (int l = 0; l <= v->layers; l++) {
        char text[32];
        snprintf(text, sizeof text, "%.4g", (double)v->layer_rms[l]);
        json_array_append_new(layers, json_real(strtod(text, NULL)));
    }
    return layers;
}

static json_t *aqn_evidence(const struct noise_view *v) {
    const double n = v->elements ? (double)v->elements : 1;
    return json_pack("{s:f, s:f, s:I, s:f, s:f, s:f, s:f, s:o}", "intended", v->sigma, "realised",
                     v->realised, "elements", (json_int_t)v->elements, "changed",
                     (double)v->changed / n, "changed_bf16", (double)v->changed_bf16 / n,
                     "weight_rms", v->weight_rms, "strength", v->strength, "layers",
                     aqn_layers(v));
}

/* Counts of o, a measured object, and what it says besides; takes both. */
static char *evidence_text(json_t *o, json_t *besides) {
    if (json_object_size(o) || json_object_get(besides, "aqn")) json_object_update(o, besides);
    char *text = json_object_size(o) ? json_dumps(o, JSON_COMPACT | JSON_REAL_PRECISION(9))
                                     : mem_dup("");
    json_decref(besides);
    json_decref(o);
    return text;
}

static void set_seed(json_t *o, const char *name, uint64_t seed) {
    char text[32];
    snprintf(text, sizeof text, "%llu", (unsigned long long)seed);
    json_object_set_new(o, name, json_string(text));
}

char *treatment_evidence(const struct noise_plan *p, enum noise_phase phase,
                         const struct noise_evidence *measured, const struct noise_view *aqn,
                         struct treatment_seeds seeds) {
    json_t *besides = json_object();
    set_seed(besides, "seed", seeds.seed);
    if (p->op_text.type == KERN_NOISE_SYSTEMATIC) set_seed(besides, "fixed_seed", seeds.fixed);
    if (aqn && aqn->sigma > 0) json_object_set_new(besides, "aqn", aqn_evidence(aqn));
    return evidence_text(noise_evidence_json(p, phase, measured), besides);
}

char *treatment_evidence_sum(const struct noise_plan *p, enum noise_phase phase,
                             const struct noise_evidence *measured, const char *part) {
    json_t *besides = json_object(), *o = *part ? json_loads(part, 0, NULL) : NULL;
    static const char *const kept[] = { "seed", "fixed_seed", "aqn" };
    for (size_t i = 0; i < COUNT_OF(kept); i++)
        if (json_object_get(o, kept[i]))
            json_object_set(besides, kept[i], json_object_get(o, kept[i]));
    json_decref(o);
    return evidence_text(noise_evidence_json(p, phase, measured), besides);
}

int treatment_evidence_add(struct noise_evidence *to, const struct noise_plan *p,
                           enum noise_phase phase, const char *text, struct err *e) {
    struct noise_evidence got;
    json_t *o = *text ? json_loads(text, 0, NULL) : NULL;
    const int rc = noise_evidence_read(&got, p, phase, o, e);
    json_decref(o);
    if (rc < 0) return -1;
    const bool drawn_once = p->module_text.type && p->module_text.point == NOISE_POINT_WEIGHT;
    for (int m = 0; m < NOISE_MODULE_COUNT && drawn_once; m++)
        if (to->module[m].elements)
            got.module[m] = (struct noise_tally){ .sites = got.module[m].sites };
    noise_evidence_add(to, &got);
    return 0;
}

int treatment_check(const struct noise_plan *p, enum noise_phase phase,
                    const struct noise_evidence *measured, struct err *e) {
    if (noise_evidence_check(p, phase, measured, e) == 0) return 0;
    e->code = EXIT_CONFIG;
    return -1;
}
