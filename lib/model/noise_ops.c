/* noise_ops.c - a plan of noise from its configuration: names to sites, one canonical text, the
 * table of `check`. What was measured is judged in noise_evidence.c.
 *
 * Order: names, what means nothing, operations, modules, text, table.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/noise_ops.h"

#include <math.h>

#include "lib/model/select.h"

const char *const noise_phase_name[] = { "rollout", "logprob", "update", "eval" };
const char *const noise_type_name[] = { "off",        "relative_gaussian", "relative_uniform",
                                        "systematic", "sparse",            "deadzone",
                                        "absolute_gaussian", "systematic_bias", "fp8" };
_Static_assert(COUNT_OF(noise_phase_name) == NOISE_PHASE_COUNT, "a name for each phase");
_Static_assert(COUNT_OF(noise_type_name) == KERN_NOISE_TYPE_COUNT, "a name for each type");

/* ---- what means nothing ---- */

static bool any_phase(const struct noise_text *t) {
    for (int p = 0; p < NOISE_PHASE_COUNT; p++)
        if (t->phase[p]) return true;
    return false;
}

static bool type_relative(int type) {
    return type != KERN_NOISE_ABSOLUTE_GAUSSIAN && type != KERN_NOISE_BIAS &&
           type != KERN_NOISE_DEADZONE;
}

static int check_scale(const struct noise_text *t, const char *where, struct err *e) {
    int rc = 0;
    if (t->type == KERN_NOISE_FP8)
        return t->scale == 0 ? 0
               : err_more(e, EXIT_CONFIG, "%s.scale is %g: fp8 has no size of its own, its steps "
                          "are the format's; leave %s.scale out", where, t->scale, where);
    if (!(t->scale > 0) || !isfinite(t->scale))
        rc = err_more(e, EXIT_CONFIG, "%s.scale is %g: %s of that size is nothing; give a scale "
                      "above 0, or type = off", where, t->scale, noise_type_name[t->type]);
    /* the sum t + e is rounded to f32: below this not even its size would be what was asked for */
    else if (type_relative(t->type) && !t->bf16 && t->scale < 0x1p-23)
        rc = err_more(e, EXIT_CONFIG, "%s.scale is %g: relative noise below %.3g vanishes in f32",
                      where, t->scale, 0x1p-23);
    else if (t->type == KERN_NOISE_DEADZONE && t->scale >= 1)
        rc = err_more(e, EXIT_CONFIG, "%s.scale is %g: a dead zone of the largest value of a row "
                      "and more leaves nothing of it; give a scale below 1", where, t->scale);
    else if (t->type == KERN_NOISE_SPARSE && t->scale * sqrt(t->rate) > 1)
        rc = err_more(e, EXIT_CONFIG, "%s: sparse noise of scale %g at a rate of %g is larger than "
                      "what it is added to: nothing of the model would be left; lower one of them",
                      where, t->scale, t->rate);
    /* beside values of the size that a network has: not one element would change */
    else if (!type_relative(t->type) && t->scale > 0 && t->scale < 0x1p-40)
        rc = err_more(e, EXIT_CONFIG, "%s.scale is %g: %s noise below %.3g changes nothing", where,
                      t->scale, noise_type_name[t->type], 0x1p-40);
    return rc;
}

/* What holds for both sections. */
static int check_text(const struct noise_text *t, const char *where, struct err *e) {
    int rc = check_scale(t, where, e);
    /* the draw that decides has 24 bits */
    if (t->type == KERN_NOISE_SPARSE && t->rate > 0 && t->rate < 0x1p-24)
        rc = err_more(e, EXIT_CONFIG, "%s.rate is %g: below %.3g no element is ever hit", where,
                      t->rate, 0x1p-24);
    if (t->type == KERN_NOISE_SPARSE && !(t->rate > 0 && t->rate <= 1))
        rc = err_more(e, EXIT_CONFIG, "%s.rate is %g: sparse noise needs a share of elements "
                      "above 0 and up to 1", where, t->rate);
    if (!any_phase(t))
        rc = err_more(e, EXIT_CONFIG, "%s.type is %s, but no phase is on (rollout, logprob, "
                      "update, eval)", where, noise_type_name[t->type]);
    return rc;
}

static int check_ops(struct noise_text *t, struct err *e) {
    int rc = check_text(t, "noise.ops", e);
    if (t->type >= KERN_NOISE_ABSOLUTE_GAUSSIAN)
        rc = err_more(e, EXIT_CONFIG, "noise.ops.type = %s is for modules; operations take "
                      "relative_gaussian, relative_uniform, systematic, sparse or deadzone",
                      noise_type_name[t->type]);
    if (!t->forward && !t->backward)
        rc = err_more(e, EXIT_CONFIG, "noise.ops.direction names neither forward nor backward");
    if (t->backward && t->type == KERN_NOISE_DEADZONE)
        rc = err_more(e, EXIT_CONFIG, "noise.ops: deadzone acts on results, not on gradients; set "
                      "direction = forward");
    if (t->backward && !t->phase[NOISE_PHASE_UPDATE])
        rc = err_more(e, EXIT_CONFIG, "noise.ops.direction has backward, but gradients are made in "
                      "the update only, and update = no");
    if (!t->forward && t->phase[NOISE_PHASE_EVAL])
        rc = err_more(e, EXIT_CONFIG, "noise.ops.eval = yes, but noise.ops.direction = backward: a "
                      "score has no backward pass, and would be clean; set one of the two");
    /* with nothing forward, the other phases are as clean as they would be without a plan */
    for (int p = 0; p < NOISE_PHASE_COUNT; p++)
        if (!t->forward && p != NOISE_PHASE_UPDATE) t->phase[p] = false;
    return rc;
}

static int check_modules(const struct noise_text *t, struct err *e) {
    int rc = check_text(t, "noise.modules", e);
    if (t->type > KERN_NOISE_RELATIVE_GAUSSIAN && t->type < KERN_NOISE_DEADZONE)
        rc = err_more(e, EXIT_CONFIG, "noise.modules.type = %s is for operations; modules take "
                      "relative_gaussian, absolute_gaussian, systematic_bias, deadzone or fp8",
                      noise_type_name[t->type]);
    if (t->point != NOISE_POINT_WEIGHT) return rc;
    if (t->type == KERN_NOISE_FP8)
        rc = err_more(e, EXIT_CONFIG, "noise.modules: fp8 on weights is not offered; set at = "
                      "input or output, or round weights with quant.weights");
    if (t->bf16)
        rc = err_more(e, EXIT_CONFIG, "noise.modules: noise on weights is made in f32 and rounded "
                      "once; at = weight takes dtype = f32");
    return rc;
}

/* Which layers; *whole: all of them. */
static int parse_layers(bool *on, bool *whole, const char *text, int layers, const char *key,
                        struct err *e) {
    float times[MODEL_LAYERS_MAX];
    if (strchr(text, ':'))
        return err_more(e, EXIT_CONFIG, "%s = %s: multipliers of layers are for noise.aqn", key,
                        text);
    if (select_layers(times, text, layers, 0, key, e) < 0) return -1;
    *whole = true;
    for (int l = 0; l < layers; l++) *whole = (on[l] = times[l] > 0) && *whole;
    return 0;
}

/* ---- operations ---- */

static int op_of(const char *word) {
    for (int op = 0; op < NOISE_OP_COUNT; op++)
        if (!strcmp(word, noise_op_name[op])) return op;
    return -1;
}

static int parse_ops(struct noise_plan *p, const char *names, struct err *e) {
    char word[SELECT_NAME_MAX];
    int rc = 0, present = 0;
    bool all = false;
    for (const char *at = names; select_word(&at, word);) {
        const int op = op_of(word);
        if (!strcmp(word, "all")) all = true;
        else if (op >= 0) p->op[op] = true;
        else {
            const char *near = str_nearest(word, noise_op_name, NOISE_OP_COUNT);
            rc = err_more(e, EXIT_CONFIG, "noise.ops.ops: unknown operation '%s'%s%s%s; "
                          "operations: matmul, bmm, softmax, silu, gelu, norm, rope, head, all",
                          word, near ? ", did you mean '" : "", near ? near : "", near ? "'" : "");
        }
    }
    if (p->op[NOISE_OP_HEAD] && !p->op_whole && !all)
        rc = err_more(e, EXIT_CONFIG, "noise.ops.ops: the head lies in no layer; with a list of "
                      "layers, leave it out");
    for (int op = 0; op < NOISE_OP_COUNT && all; op++)
        p->op[op] = op != NOISE_OP_HEAD || p->op_whole;
    /* both architectures that we read have silu in their place */
    p->op_absent[NOISE_OP_GELU] = p->op[NOISE_OP_GELU];
    p->op[NOISE_OP_GELU] = false;
    for (int op = 0; op < NOISE_OP_COUNT; op++) present += p->op[op];
    if (rc < 0 || present) return rc;
    return err_more(e, EXIT_CONFIG, p->op_absent[NOISE_OP_GELU]
                    ? "noise.ops.ops: gelu is not in this model, and nothing else was asked for"
                    : "noise.ops.ops names no operation; 'all' means all of them");
}

/* Of a site: applications in one pass. */
static int count_site(const struct noise_plan *p, const struct noise_site_about *site) {
    int n = 0;
    if (site->flags & NOISE_SITE_OF_GRAD) return 0;
    if (site->flags & NOISE_SITE_LAST) return p->op_whole;
    for (int l = site->flags & NOISE_SITE_ABOVE ? 1 : 0; l < p->layers; l++) n += p->op_layer[l];
    return n;
}

static void count_ops(struct noise_plan *p) {
    for (int i = 0; i < NOISE_SITE_COUNT; i++) {
        const struct noise_site_about *site = &noise_site_about[i];
        const enum noise_direction d = noise_site_direction(i);
        if (!site->name || !p->op[site->op]) continue;
        if (d == NOISE_FORWARD ? p->op_text.forward : p->op_text.backward)
            p->op_sites[site->op][d] += count_site(p, site);
    }
}

static int make_ops(struct noise_plan *p, struct err *e) {
    struct noise_text *t = &p->op_text;
    int rc = check_ops(t, e);
    if (parse_layers(p->op_layer, &p->op_whole, t->layers, p->layers, "noise.ops.layers", e) < 0)
        rc = -1;
    if (parse_ops(p, t->names, e) < 0) return -1;
    count_ops(p);
    if (t->bf16) p->op_bf16 = noise_bf16_of((enum kern_noise_type)t->type, t->scale);
    return rc;
}

/* ---- modules ---- */

bool noise_module_hit(const char *pattern, enum noise_module m, int layer) {
    char name[SELECT_NAME_MAX], above[SELECT_NAME_MAX];
    const char *dot = strrchr(pattern, '.'), *last = dot ? dot + 1 : pattern;
    if (m == NOISE_MODULE_HEAD) snprintf(name, sizeof name, "lm_head");
    else if (m <= NOISE_MODULE_DOWN) select_proj_name(name, layer, (enum proj)m);
    else if (m == NOISE_MODULE_NORM_FINAL) select_norm_name(name, 0, 0);
    else select_norm_name(name, 2 * layer + (m == NOISE_MODULE_NORM_POST), layer + 1);
    if (select_name(pattern, name)) return true;
    if (strcmp(last, m <= NOISE_MODULE_DOWN ? "linear" : "rmsnorm") != 0) return false;
    snprintf(above, sizeof above, "%.*s", dot ? (int)(dot - pattern) : 0, pattern);
    return m != NOISE_MODULE_HEAD && (!dot || select_name(above, name));
}

static int check_pattern(const char *pattern, int layers, struct err *e) {
    static const char *const words[] = { "linear", "rmsnorm", "q_proj", "k_proj", "v_proj",
                                         "o_proj", "gate_proj", "up_proj", "down_proj",
                                         "input_layernorm", "post_attention_layernorm", "norm",
                                         "lm_head", "layers" };
    const char *dot = strrchr(pattern, '.');
    for (int m = 0; m < NOISE_MODULE_COUNT; m++)
        for (int l = 0; l < layers; l++)
            if (noise_module_hit(pattern, m, l)) return 0;
    const char *near = str_nearest(dot ? dot + 1 : pattern, words, COUNT_OF(words));
    return err_more(e, EXIT_CONFIG, "'%s' names no module of this model of %d layers%s%s%s; names: "
                    "linear, rmsnorm, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, "
                    "down_proj, input_layernorm, post_attention_layernorm, norm, lm_head, "
                    "layers.0-%d, layers.0.q_proj", pattern, layers, near ? ", did you mean '" : "",
                    near ? near : "", near ? "'" : "", layers - 1);
}

/* Marks what the patterns of a list hit, in chosen layers; false where a pattern hit nothing
 * there. */
static int mark(struct noise_plan *p, const char *list, const bool *layer, bool whole, bool to,
                struct err *e) {
    char word[SELECT_NAME_MAX];
    int rc = 0, words = 0;
    for (const char *at = list; select_word(&at, word); words++) {
        int hits = 0;
        if (check_pattern(word, p->layers, e) < 0) {
            rc = -1;
            continue;
        }
        for (int l = 0; l < p->layers; l++)
            for (enum noise_module m = 0; m < NOISE_MODULE_COUNT; m++) {
                if (noise_module_in_layer(m) ? !layer[l] : l || !whole) continue;
                if (!noise_module_hit(word, m, l)) continue;
                hits += to || p->module[l][m];
                p->module[l][m] = to;
            }
        if (!hits && to)
            rc = err_more(e, EXIT_CONFIG, "noise.modules.targets: '%s' hits nothing in these "
                          "layers", word);
        if (!hits && !to && strcmp(word, "lm_head") != 0)          /* which is there by default */
            rc = err_more(e, EXIT_CONFIG, "noise.modules.exclude: '%s' would do nothing: it names "
                          "no target, or no further one, in these layers", word);
    }
    return words || !to ? rc : err_more(e, EXIT_CONFIG, "noise.modules.targets is empty");
}

static int make_modules(struct noise_plan *p, struct err *e) {
    const struct noise_text *t = &p->module_text;
    bool layer[MODEL_LAYERS_MAX], whole;
    int rc = check_modules(t, e), total = 0;
    if (t->bf16) p->module_bf16 = noise_bf16_of((enum kern_noise_type)t->type, t->scale);
    if (parse_layers(layer, &whole, t->layers, p->layers, "noise.modules.layers", e) < 0) return -1;
    if (mark(p, t->names, layer, whole, true, e) < 0) rc = -1;
    if (mark(p, t->exclude, layer, whole, false, e) < 0) rc = -1;
    for (int l = 0; l < p->layers; l++)
        for (int m = 0; m < NOISE_MODULE_COUNT; m++) {
            p->module_sites[m] += p->module[l][m];
            total += p->module[l][m];
        }
    if (rc == 0 && !total)
        rc = err_more(e, EXIT_CONFIG, "noise.modules: everything that targets name is excluded");
    return rc;
}

/* A size without a type would be noise that somebody believes in and nobody gets. Of size 0 is what
 * turns noise off, whatever else is said of it: a sweep's control. */
static int check_off(const struct noise_text *t, const char *where, struct err *e) {
    if (!t || !(t->scale > 0)) return 0;
    return err_more(e, EXIT_CONFIG, "%s.scale is %g, but %s.type is off: nothing would be noisy; "
                    "set %s.type, or %s.scale = 0", where, t->scale, where, where, where);
}

int noise_plan_make(struct noise_plan *p, const struct noise_text *ops,
                    const struct noise_text *modules, const struct model_conf *c, struct err *e) {
    *p = (struct noise_plan){ .layers = c->layers };
    int rc = 0;
    if (ops && ops->type) {
        p->op_text = *ops;
        if (make_ops(p, e) < 0) rc = -1;
    } else if (check_off(ops, "noise.ops", e) < 0) rc = -1;
    if (modules && modules->type) {
        p->module_text = *modules;
        p->module_text.forward = true;
        p->module_text.backward = false;
        if (make_modules(p, e) < 0) rc = -1;
    } else if (check_off(modules, "noise.modules", e) < 0) rc = -1;
    return rc;
}

bool noise_plan_op_on(const struct noise_plan *p, enum noise_op op, enum noise_direction d,
                      enum noise_phase phase) {
    return p->op_text.type && p->op_text.phase[phase] && p->op_sites[op][d] &&
           (d == NOISE_FORWARD || phase == NOISE_PHASE_UPDATE);
}

bool noise_plan_peaks(const struct noise_plan *p) {
    return p->op_text.type && !type_relative(p->op_text.type) && p->op_text.forward &&
           p->op_text.phase[NOISE_PHASE_UPDATE] && (p->op[NOISE_OP_BMM] || p->op[NOISE_OP_SOFTMAX]);
}

const char *noise_size_name(const struct noise_text *t) {
    return t->type == KERN_NOISE_FP8 ? NULL : t->type == KERN_NOISE_DEADZONE ? "threshold"
                                                                             : "intended";
}

double noise_intended(const struct noise_text *t) {
    return t->type == KERN_NOISE_SPARSE ? t->scale * sqrt(t->rate) : t->scale;
}

/* ---- text ---- */

static void text_phases(const struct noise_text *t, struct str *out) {
    const char *before = " ";
    for (int p = 0; p < NOISE_PHASE_COUNT; p++) {
        if (!t->phase[p]) continue;
        str_printf(out, "%s%s", before, noise_phase_name[p]);
        before = ",";
    }
}

static void text_head(const char *kind, const struct noise_text *t, struct str *out) {
    str_printf(out, "%s %s", kind, noise_type_name[t->type]);
    if (noise_size_name(t)) str_printf(out, " %.9g", t->scale);
    if (t->type == KERN_NOISE_SPARSE) str_printf(out, " rate %.9g", t->rate);
    if (t->bf16) str_puts(out, " bf16");
}

static void text_layers(const bool *on, int layers, struct str *out) {
    float times[MODEL_LAYERS_MAX];
    char text[8 * MODEL_LAYERS_MAX];
    for (int l = 0; l < layers; l++) times[l] = on[l];
    str_puts(out, select_layers_text(text, sizeof text, times, layers));
}

static void text_ops(const struct noise_plan *p, struct str *out) {
    const struct noise_text *t = &p->op_text;
    const char *before = " ";
    text_head("ops", t, out);
    for (int op = 0; op < NOISE_OP_COUNT; op++) {
        if (!p->op[op]) continue;
        str_printf(out, "%s%s", before, noise_op_name[op]);
        before = ",";
    }
    if (!p->op_whole) {
        str_puts(out, " layers ");
        text_layers(p->op_layer, p->layers, out);
    }
    str_printf(out, " %s%s%s", t->forward ? "forward" : "", t->forward && t->backward ? "+" : "",
               t->backward ? "backward" : "");
    text_phases(t, out);
}

/* Of module m: "0-3,7" where it is hit in some layers only. */
static void module_layers(const struct noise_plan *p, int m, struct str *out) {
    bool layer[MODEL_LAYERS_MAX];
    if (!noise_module_in_layer(m) || p->module_sites[m] == p->layers) return;
    for (int l = 0; l < p->layers; l++) layer[l] = p->module[l][m];
    text_layers(layer, p->layers, out);
}

/* q_proj, or q_proj[0-3,7] where it is hit in some layers only */
static void text_modules(const struct noise_plan *p, struct str *out) {
    const char *before = " ";
    text_head("modules", &p->module_text, out);
    for (int m = 0; m < NOISE_MODULE_COUNT; m++) {
        struct str layers;
        if (!p->module_sites[m]) continue;
        str_init(&layers);
        module_layers(p, m, &layers);
        str_printf(out, layers.len ? "%s%s[%s]" : "%s%s", before, noise_module_name[m], layers.s);
        before = ",";
        str_release(&layers);
    }
    str_printf(out, " %s", noise_point_name[p->module_text.point]);
    text_phases(&p->module_text, out);
}

void noise_plan_text(const struct noise_plan *p, struct str *out) {
    if (p->op_text.type) text_ops(p, out);
    if (p->op_text.type && p->module_text.type) str_puts(out, "; ");
    if (p->module_text.type) text_modules(p, out);
    if (!p->op_text.type && !p->module_text.type) str_puts(out, "none");
}

/* ---- table ---- */

void noise_key(char key[NOISE_KEY_MAX], const char *kind, const char *name,
               enum noise_direction d) {
    snprintf(key, NOISE_KEY_MAX, "%s/%s/%s", kind, name, noise_direction_name[d]);
}

static void row(json_t *table, int phase, const char *kind, const char *name, int direction,
                const struct noise_text *t, int count, const char *layers) {
    char key[NOISE_KEY_MAX];
    json_t *o = json_object();
    noise_key(key, kind, name, (enum noise_direction)direction);
    json_object_set_new(o, "phase", json_string(noise_phase_name[phase]));
    json_object_set_new(o, "key", json_string(key));
    json_object_set_new(o, "kind", json_string(kind));
    json_object_set_new(o, "name", json_string(name));
    json_object_set_new(o, "direction", json_string(noise_direction_name[direction]));
    json_object_set_new(o, "type", json_string(noise_type_name[t->type]));
    if (noise_size_name(t))
        json_object_set_new(o, noise_size_name(t), json_real(noise_intended(t)));
    json_object_set_new(o, "sites", json_integer(count));
    if (*layers) json_object_set_new(o, "layers", json_string(layers));
    if (!count) json_object_set_new(o, "note", json_string("not in this model"));
    json_array_append_new(table, o);
}

json_t *noise_plan_json(const struct noise_plan *p) {
    json_t *table = json_array();
    const struct noise_text *t = &p->op_text, *m = &p->module_text;
    struct str layers;
    str_init(&layers);
    str_puts(&layers, "");
    if (!p->op_whole) text_layers(p->op_layer, p->layers, &layers);
    for (int phase = 0; phase < NOISE_PHASE_COUNT; phase++) {
        for (int d = 0; d < NOISE_DIRECTION_COUNT; d++)
            for (int op = 0; op < NOISE_OP_COUNT; op++)
                if (noise_plan_op_on(p, op, d, phase) ||
                    (p->op_absent[op] && t->phase[phase] && d == NOISE_FORWARD))
                    row(table, phase, "op", noise_op_name[op], d, t, p->op_sites[op][d], layers.s);
        if (noise_plan_op_on(p, NOISE_OP_MATMUL, NOISE_BACKWARD, phase))
            row(table, phase, "op", noise_site_about[NOISE_SITE_GRAD].name, NOISE_BACKWARD, t, 1,
                layers.s);
        for (int i = 0; i < NOISE_MODULE_COUNT && m->type && m->phase[phase]; i++) {
            struct str some;
            if (!p->module_sites[i]) continue;
            str_init(&some);
            str_puts(&some, "");
            module_layers(p, i, &some);
            row(table, phase, "module", noise_module_name[i], NOISE_FORWARD, m,
                p->module_sites[i], some.s);
            str_release(&some);
        }
    }
    str_release(&layers);
    return table;
}
