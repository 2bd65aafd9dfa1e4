/* noise_target.c - see noise_target.h. Order: a list of layers, multipliers of all layers, names,
 * the two together.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/noise_target.h"

#include <ctype.h>
#include <math.h>

#include "lib/model/noise_names.h"

/* ---- a list of layers ---- */

struct item { int first, last; double times; };
struct list { struct item item[MODEL_LAYERS_MAX]; int items, of; };      /* of 0: as the model */

static bool number(const char **at, int *out) {
    char *end;
    if (!isdigit((unsigned char)**at)) return false;
    const long v = strtol(*at, &end, 10);
    *out = v < MODEL_LAYERS_MAX ? (int)v : MODEL_LAYERS_MAX;
    *at = end;
    return true;
}

static void blanks(const char **at) { *at += strspn(*at, " \t"); }

/* ":1.5" or "of 28", behind an item's layers in either order. */
static bool parse_tail(struct list *l, struct item *i, const char **at) {
    if (**at == ':') {
        char *end;
        i->times = strtod(*at + 1, &end);
        const bool read = end != *at + 1 && i->times >= 0 && i->times <= 1000;
        *at = end;
        return read;
    }
    int of;
    *at += strlen("of ");
    blanks(at);
    if (!number(at, &of) || of < 1 || of > MODEL_LAYERS_MAX || (l->of && l->of != of)) return false;
    l->of = of;
    return true;
}

static bool parse_item(struct list *l, const char **at) {
    struct item *i = &l->item[l->items++];
    i->times = 1;
    if (!number(at, &i->first)) return false;
    i->last = i->first;
    if (**at == '-') {
        (*at)++;
        if (!number(at, &i->last)) return false;
    }
    for (blanks(at); **at == ':' || strncmp(*at, "of ", 3) == 0; blanks(at))
        if (!parse_tail(l, i, at)) return false;
    return i->first <= i->last;
}

/* Appends the items of text, their multipliers times `factor`. */
static int parse_list(struct list *l, const char *text, double factor, const char *key,
                      struct err *e) {
    const char *at = text;
    for (blanks(&at); *at; blanks(&at)) {
        const char *item = at;
        if (l->items == MODEL_LAYERS_MAX || !parse_item(l, &at) || (*at && *at != ','))
            return err_more(
                e, EXIT_CONFIG,
                "%s: cannot read '%s' as layers: write 0,3,14-17, or 14-17 of 28 to scale "
                "to the model's depth, or 0-13:0.5, 14-17:1.5 with multipliers",
                key, item);
        l->item[l->items - 1].times *= factor;
        at += *at == ',';
    }
    return 0;
}

/* The multipliers in a model of the list's own depth; NAN where it names none. */
static int list_times(float *times, const struct list *l, int of, const char *key, struct err *e) {
    for (int i = 0; i < of; i++) times[i] = NAN;
    for (const struct item *i = l->item; i < l->item + l->items; i++) {
        if (i->last >= of)
            return err_more(e, EXIT_CONFIG, "%s: layer %d: %s %d layers, 0 to %d%s", key, i->last,
                            l->of ? "the list is for" : "the model has", of, of - 1,
                            l->of ? "" : "; 'of N' scales a list made for N layers");
        for (int s = i->first; s <= i->last; s++) {
            if (!isnan(times[s]))
                return err_more(e, EXIT_CONFIG, "%s: layer %d is named twice", key, s);
            times[s] = (float)i->times;
        }
    }
    return 0;
}

/* times[layer] of the list in this model; `others` for layers not named. Scaled, a layer takes
 * what stands at its relative depth; then an item has what else it touches (as noise_layers_parse
 * has it) and no other item took. */
static int scale_list(float *times, const struct list *l, int layers, double others,
                      const char *key, struct err *e) {
    float source[MODEL_LAYERS_MAX];
    const int of = l->of ? l->of : layers;
    if (list_times(source, l, of, key, e) < 0) return -1;
    for (int i = 0; i < layers; i++) times[i] = source[(2 * i + 1) * of / (2 * layers)];
    for (const struct item *i = l->item; i < l->item + l->items; i++)
        for (int t = i->first * layers / of; t < ((i->last + 1) * layers + of - 1) / of; t++)
            if (isnan(times[t])) times[t] = (float)i->times;
    for (int i = 0; i < layers; i++)
        if (isnan(times[i])) times[i] = (float)others;
    return 0;
}

/* ---- multipliers of all layers ---- */

int64_t noise_target_switch(const struct noise_target_text *x, int64_t steps) {
    if (!*x->zone_middle || x->zone_early == x->zone_late) return -1;
    /* a product such as .7 * 10 must not end below the step that it means */
    return (int64_t)floor(x->zone_switch * (double)steps + 1e-9);
}

static int zone_times(float *times, const struct noise_target_text *x, int64_t done, int64_t steps,
                      int layers, struct err *e) {
    struct list l = { 0 };
    const int64_t change = noise_target_switch(x, steps);
    const double middle = change >= 0 && done >= change ? x->zone_late : x->zone_early;
    if (*x->layers)
        return err_more(e, EXIT_CONFIG,
                        "noise.aqn.layers and zones are both set: zones stand in for the "
                        "multipliers of layers; unset noise.aqn.layers, or zone_edge and "
                        "zone_middle");
    if (parse_list(&l, x->zone_edge, 1, "noise.aqn.zone_edge", e) < 0 ||
        parse_list(&l, x->zone_middle, middle, "noise.aqn.zone_middle", e) < 0)
        return -1;
    return scale_list(times, &l, layers, x->others, "noise.aqn.zone_edge and zone_middle", e);
}

static int list_of_layers(float *times, const struct noise_target_text *x, int layers,
                          struct err *e) {
    struct list l = { 0 };
    if (parse_list(&l, x->layers, 1, "noise.aqn.layers", e) < 0 ||
        scale_list(times, &l, layers, x->others, "noise.aqn.layers", e) < 0)
        return -1;
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
    if (*at == value || !noise_pattern_hits(pattern, m, layer)) return 0;
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
    char word[NOISE_WORD_MAX];
    int rc = 0, words = 0;
    for (; noise_list_next(&list, word); words++) {
        const char *pattern = strcmp(word, "norms") == 0     ? "rmsnorm"
                              : strcmp(word, "linears") == 0 ? "linear"
                                                             : word;
        struct err unknown = { 0 };
        if (noise_pattern_check(pattern, c->layers, &unknown) < 0)
            rc = err_more(e, EXIT_CONFIG, "%s: %s", key, unknown.text);
        else if (!mark_pattern(t, pattern, value, c->layers))
            rc = err_more(e, EXIT_CONFIG, "%s: '%s' names %s", key, word,
                          value > 0 ? "nothing that AQN can hit and that is not named already"
                                    : "nothing that is a target");
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
