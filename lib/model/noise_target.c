/* noise_target.c - see noise_target.h. Order: multipliers of the layers, names, the two together.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/noise_target.h"

#include <math.h>

#include "lib/base/str.h"
#include "lib/model/noise_ops.h"
#include "lib/model/select.h"

/* ---- layers ---- */

int64_t noise_target_switch(const struct noise_target_text *x, int64_t steps) {
    if (!*x->zone_middle || x->zone_early == x->zone_late) return -1;
    /* a product such as .7 * 10 must not end below the step that it means */
    return (int64_t)floor(x->zone_switch * (double)steps + 1e-9);
}

static int zone_times(float *times, const struct noise_target_text *x, int64_t done, int64_t steps,
                      int layers, struct err *e) {
    const int64_t change = noise_target_switch(x, steps);
    const double middle = change >= 0 && done >= change ? x->zone_late : x->zone_early;
    const struct select_list list[] = { { x->zone_edge, "noise.aqn.zone_edge", 1 },
                                        { x->zone_middle, "noise.aqn.zone_middle", middle } };
    if (*x->layers)
        return err_more(e, EXIT_CONFIG,
                        "noise.aqn.layers and zones are both set: zones stand in for the "
                        "multipliers of layers; unset noise.aqn.layers, or zone_edge and "
                        "zone_middle");
    return select_lists(times, list, COUNT_OF(list), layers, x->others, e);
}

static int list_of_layers(float *times, const struct noise_target_text *x, int layers,
                          struct err *e) {
    if (select_layers(times, x->layers, layers, x->others, "noise.aqn.layers", e) < 0) return -1;
    bool all_one = x->others == 1;
    for (int i = 0; i < layers; i++) all_one &= times[i] == 1;
    if (!all_one) return 0;
    return err_more(e, EXIT_CONFIG,
                    "noise.aqn.layers = %s gives every layer the multiplier 1: set "
                    "noise.aqn.others = 0 to leave the other layers out",
                    x->layers);
}

static int layer_times(float *times, const struct noise_target_text *x, int64_t done, int64_t steps,
                       int layers, struct err *e) {
    if (*x->zone_edge || *x->zone_middle) return zone_times(times, x, done, steps, layers, e);
    if (*x->layers) return list_of_layers(times, x, layers, e);
    for (int i = 0; i < layers; i++) times[i] = 1;
    if (x->others == 1) return 0;
    return err_more(e, EXIT_CONFIG,
                    "noise.aqn.others = %g, but neither noise.aqn.layers nor zones name layers: "
                    "it would do nothing",
                    x->others);
}

/* ---- names ---- */

static int mark_one(float *at, float value, const char *pattern, enum noise_module m, int layer) {
    if (*at == value || !noise_module_hit(pattern, m, layer)) return 0;
    *at = value;
    return 1;
}

/* Sets to `value` what the pattern names; how many were not `value` already. */
static int mark_pattern(struct noise_target *t, const char *pattern, float value, int layers) {
    int hits = mark_one(&t->norm[2 * layers], value, pattern, NOISE_MODULE_NORM_FINAL, 0);
    for (int l = 0; l < layers; l++) {
        hits += mark_one(&t->norm[2 * l], value, pattern, NOISE_MODULE_NORM_IN, l);
        hits += mark_one(&t->norm[2 * l + 1], value, pattern, NOISE_MODULE_NORM_POST, l);
        for (enum proj p = 0; p < PROJ_COUNT; p++)
            hits += mark_one(&t->linear[l][p], value, pattern, (enum noise_module)p, l);
    }
    return hits;
}

static int mark(struct noise_target *t, const char *list, float value, const char *key,
                const struct model_conf *c, struct err *e) {
    static const char *const known[] = {
        "norms",     "linears",         "input_layernorm", "post_attention_layernorm",
        "norm",      "q_proj",          "k_proj",          "v_proj",
        "o_proj",    "gate_proj",       "up_proj",         "down_proj",
    };
    char word[SELECT_NAME_MAX];
    int rc = 0, words = 0;
    for (; select_word(&list, word); words++) {
        const char *pattern = strcmp(word, "norms") == 0     ? "rmsnorm"
                              : strcmp(word, "linears") == 0 ? "linear"
                                                             : word;
        if (mark_pattern(t, pattern, value, c->layers)) continue;
        const char *near = str_nearest(word, known, COUNT_OF(known));
        const bool guess = near && strcmp(near, word) != 0;
        rc = err_more(e, EXIT_CONFIG,
                      "%s: '%s' names %s of this model of %d layers%s%s%s; names: norms, "
                      "linears, input_layernorm, post_attention_layernorm, norm, q_proj, "
                      "k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, layers.0.q_proj",
                      key, word, value > 0 ? "no weight, or no further one" : "no target",
                      c->layers, guess ? ", did you mean '" : "", guess ? near : "",
                      guess ? "'" : "");
    }
    if (words || value == 0) return rc;
    return err_more(e, EXIT_CONFIG, "%s is empty: name norms, linears or modules", key);
}

/* ---- both ---- */

int noise_target_make(struct noise_target *t, const struct noise_target_text *x, int64_t done,
                      int64_t steps, const struct model_conf *c, struct err *e) {
    float times[MODEL_LAYERS_MAX];
    *t = (struct noise_target){ 0 };
    int rc = layer_times(times, x, done, steps, c->layers, e);
    if (mark(t, x->targets, 1, "noise.aqn.targets", c, e) < 0) rc = -1;
    if (rc == 0) rc = mark(t, x->exclude, 0, "noise.aqn.exclude", c, e);
    if (rc < 0) return rc;
    for (int i = 0; i < 2 * c->layers + 1; i++) {
        t->norm[i] *= i < 2 * c->layers ? times[i / 2] : (float)x->others;
        t->norms += t->norm[i] > 0;
        t->elements += t->norm[i] > 0 ? c->dim : 0;
    }
    for (int i = 0; i < c->layers; i++)
        for (enum proj p = 0; p < PROJ_COUNT; p++) {
            int out, in;
            model_proj_shape(c, p, &out, &in);
            t->linear[i][p] *= times[i];
            t->linears += t->linear[i][p] > 0;
            t->elements += t->linear[i][p] > 0 ? (int64_t)out * in : 0;
        }
    if (t->elements > 0) return 0;
    return err_more(e, EXIT_CONFIG,
                    "noise.aqn: no weight is left to hit: every target is excluded or in a layer "
                    "whose multiplier is 0");
}
