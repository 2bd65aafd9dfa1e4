/* noise_target.c - see noise_target.h. Order: multipliers of the layers, names, the two together.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/noise_target.h"

#include <math.h>

#include "lib/base/str.h"
#include "lib/model/select.h"

/* ---- layers ---- */

static bool has_zones(const struct noise_target_text *x) {
    return *x->zone_edge || *x->zone_middle;
}

int64_t noise_target_switch(const struct noise_target_text *x, int64_t steps) {
    if (!*x->zone_middle || x->zone_early == x->zone_late) return -1;
    /* a product such as .7 * 10 must not end below the step that it means */
    return (int64_t)floor(x->zone_switch * (double)steps + 1e-9);
}

static int zone_times(float *times, const struct noise_target_text *x, int64_t done, int64_t steps,
                      int layers, struct err *e) {
    float middle[MODEL_LAYERS_MAX];
    const bool late = done >= (int64_t)floor(x->zone_switch * (double)steps + 1e-9);
    if (*x->layers)
        return err_more(
            e, EXIT_CONFIG,
            "noise.aqn.layers and noise.aqn.zone_edge or zone_middle are both set: zones "
            "stand in for the multipliers of layers; unset one");
    for (int i = 0; i < layers; i++) times[i] = middle[i] = NAN;
    if (*x->zone_edge &&
        select_layers(times, x->zone_edge, layers, (double)NAN, "noise.aqn.zone_edge", e) < 0)
        return -1;
    if (*x->zone_middle &&
        select_layers(middle, x->zone_middle, layers, (double)NAN, "noise.aqn.zone_middle", e) < 0)
        return -1;
    for (int i = 0; i < layers; i++) {
        if (!isnan(times[i]) && !isnan(middle[i]))
            return err_more(e, EXIT_CONFIG,
                            "noise.aqn: layer %d of %d is in zone_edge and in zone_middle", i,
                            layers);
        if (!isnan(middle[i])) times[i] = middle[i] * (float)(late ? x->zone_late : x->zone_early);
        else if (isnan(times[i])) times[i] = (float)x->others;
    }
    return 0;
}

static int layer_times(float *times, const struct noise_target_text *x, int64_t done, int64_t steps,
                       int layers, struct err *e) {
    if (has_zones(x)) return zone_times(times, x, done, steps, layers, e);
    if (select_layers(times, x->layers, layers, x->others, "noise.aqn.layers", e) < 0) return -1;
    if (!*x->layers) {
        if (x->others == 1) return 0;
        return err_more(
            e, EXIT_CONFIG,
            "noise.aqn.others = %g, but neither noise.aqn.layers nor zones name layers: "
            "it would do nothing",
            x->others);
    }
    bool all_one = x->others == 1;
    for (int i = 0; i < layers; i++) all_one &= times[i] == 1;
    if (!all_one) return 0;
    return err_more(
        e, EXIT_CONFIG,
        "noise.aqn.layers = %s gives every layer the multiplier 1: set noise.aqn.others = "
        "0 to leave the other layers out",
        x->layers);
}

/* ---- names ---- */

static bool word_hits(const char *word, const char *name, bool norm) {
    return strcmp(word, norm ? "norms" : "linears") == 0 || select_name(word, name);
}

/* Sets to `value` what the words of list name; EXIT_CONFIG for a word that hits nothing which is
 * not `value` already. */
static int mark(struct noise_target *t, const char *list, float value, const char *key,
                const struct model_conf *c, struct err *e) {
    char word[SELECT_NAME_MAX], name[SELECT_NAME_MAX];
    int rc = 0, words = 0;
    while (select_word(&list, word)) {
        int hits = 0;
        for (int i = 0; i < 2 * c->layers + 1; i++) {
            select_norm_name(name, i, c->layers);
            if (t->norm[i] == value || !word_hits(word, name, true)) continue;
            t->norm[i] = value;
            hits++;
        }
        for (int i = 0; i < c->layers * PROJ_COUNT; i++) {
            float *at = &t->linear[i / PROJ_COUNT][i % PROJ_COUNT];
            select_proj_name(name, i / PROJ_COUNT, (enum proj)(i % PROJ_COUNT));
            if (*at == value || !word_hits(word, name, false)) continue;
            *at = value;
            hits++;
        }
        words++;
        if (!hits)
            rc = err_more(
                e, EXIT_CONFIG,
                "%s: '%s' names nothing %s; give norms, linears, input_layernorm, "
                "post_attention_layernorm, norm (the last), q_proj, k_proj, v_proj, o_proj, "
                "gate_proj, up_proj, down_proj, or with a layer: layers.3.q_proj",
                key, word, value > 0 ? "of this model, or nothing more" : "that is a target");
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
