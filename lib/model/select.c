/* select.c - see select.h. Order: names, layers.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/select.h"

#include <ctype.h>
#include <math.h>

#include "lib/base/str.h"

/* ---- names ---- */

/* Length of the part at text, up to a dot or the end. */
static size_t part(const char *text) { return strcspn(text, "."); }

static bool part_matches(const char *pattern, size_t n, const char *name, size_t name_n) {
    if (n == name_n && memcmp(pattern, name, n) == 0) return true;
    char *end;
    if (!isdigit((unsigned char)*pattern) || !isdigit((unsigned char)*name)) return false;
    const long first = strtol(pattern, &end, 10), number = strtol(name, NULL, 10);
    if (*end != '-' || !isdigit((unsigned char)end[1])) return false;
    const long last = strtol(end + 1, &end, 10);
    return end == pattern + n && first <= number && number <= last;
}

bool select_name(const char *pattern, const char *name) {
    if (!*pattern) return false;
    while (*pattern && *name) {
        const size_t n = part(pattern), name_n = part(name);
        if (part_matches(pattern, n, name, name_n)) pattern += n + (pattern[n] == '.');
        name += name_n + (name[name_n] == '.');
    }
    return !*pattern;
}

bool select_word(const char **list, char word[SELECT_NAME_MAX]) {
    const char *at = *list + strspn(*list, ", \t");
    const size_t n = strcspn(at, ", \t");
    snprintf(word, SELECT_NAME_MAX, "%.*s", (int)(n < SELECT_NAME_MAX ? n : SELECT_NAME_MAX), at);
    *list = at + n;
    return n > 0;
}

void select_proj_name(char out[SELECT_NAME_MAX], int layer, enum proj p) {
    snprintf(out, SELECT_NAME_MAX, "model.layers.%d.%s.%s", layer,
             p <= PROJ_O ? "self_attn" : "mlp", model_proj_name[p]);
}

void select_norm_name(char out[SELECT_NAME_MAX], int index, int layers) {
    if (index == 2 * layers) snprintf(out, SELECT_NAME_MAX, "model.norm");
    else
        snprintf(out, SELECT_NAME_MAX, "model.layers.%d.%s", index / 2,
                 index % 2 ? "post_attention_layernorm" : "input_layernorm");
}

/* ---- layers ---- */

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

static int parse_list(struct list *l, const struct select_list *from, struct err *e) {
    const char *at = from->text;
    for (blanks(&at); *at; blanks(&at)) {
        const char *item = at;
        if (l->items == MODEL_LAYERS_MAX || !parse_item(l, &at) || (*at && *at != ','))
            return err_more(
                e, EXIT_CONFIG,
                "%s: cannot read '%s' as layers: write 0,3,14-17, or 14-17 of 28 to scale "
                "to the model's depth, or 0-13:0.5, 14-17:1.5 with multipliers",
                from->key, item);
        l->item[l->items - 1].times *= from->factor;
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

int select_lists(float times[MODEL_LAYERS_MAX], const struct select_list *list, int lists,
                 int layers, double others, struct err *e) {
    struct list l = { 0 };
    float source[MODEL_LAYERS_MAX];
    bool taken[MODEL_LAYERS_MAX] = { false };
    for (int i = 0; i < lists; i++)
        if (parse_list(&l, &list[i], e) < 0) return -1;
    const int of = l.of ? l.of : layers;
    if (!l.items) return err_more(e, EXIT_CONFIG, "%s names no layer", list->key);
    if (list_times(source, &l, of, list->key, e) < 0) return -1;
    for (int i = 0; i < layers; i++) {
        const int s = (2 * i + 1) * of / (2 * layers);
        times[i] = source[s];
        taken[s] = true;
    }
    for (const struct item *i = l.item; i < l.item + l.items; i++) {
        bool held = false;
        for (int s = i->first; s <= i->last; s++) held |= taken[s];
        const int middle = (i->first + i->last + 1) * layers / (2 * of);
        if (!held && isnan(times[middle])) times[middle] = (float)i->times;
    }
    for (int i = 0; i < layers; i++)
        if (isnan(times[i])) times[i] = (float)others;
    return 0;
}

int select_layers(float times[MODEL_LAYERS_MAX], const char *text, int layers, double others,
                  const char *key, struct err *e) {
    const struct select_list list = { text, key, 1 };
    if (*text && strcmp(text, "all") != 0)
        return select_lists(times, &list, 1, layers, others, e);
    for (int i = 0; i < layers; i++) times[i] = 1;
    return 0;
}

const char *select_layers_text(char *out, size_t bytes, const float *times, int layers) {
    size_t n = 0;
    *out = 0;
    for (int i = 0; i < layers && n < bytes; i++) {
        const int first = i;
        if (times[i] == 0) continue;
        while (i + 1 < layers && times[i + 1] != 0) i++;
        n += (size_t)snprintf(out + n, bytes - n, first < i ? "%s%d-%d" : "%s%d", n ? "," : "",
                              first, i);
    }
    return out;
}
