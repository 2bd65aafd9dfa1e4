/* noise_names.c - see noise_names.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/noise_names.h"

#include <ctype.h>

const char *const noise_module_name[] = {
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    "input_layernorm", "post_attention_layernorm", "norm", "lm_head",
};
/* what a part of a pattern may be, besides layers */
static const char *const words[] = {
    "linear", "rmsnorm", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
    "down_proj", "input_layernorm", "post_attention_layernorm", "norm", "lm_head", "self_attn",
    "mlp", "layers", "model",
};
_Static_assert(COUNT_OF(noise_module_name) == NOISE_MODULE_COUNT, "a name for each module");
_Static_assert((int)NOISE_MODULE_DOWN == (int)PROJ_DOWN, "projections come first, in enum order");

bool noise_list_next(const char **at, char word[NOISE_WORD_MAX]) {
    const char *p = *at;
    while (*p == ',' || isspace((unsigned char)*p)) p++;
    size_t n = strcspn(p, ",");
    *at = p + n;
    while (n && isspace((unsigned char)p[n - 1])) n--;
    snprintf(word, NOISE_WORD_MAX, "%.*s", (int)n, p);
    return n > 0;
}

/* "7" or "14-17" with first <= last */
static bool range(const char *text, int64_t *first, int64_t *last) {
    char low[NOISE_WORD_MAX];
    const char *dash = strchr(text, '-');
    snprintf(low, sizeof low, "%.*s", (int)strcspn(text, "-"), text);
    if (!str_to_i64(low, first) || *first < 0) return false;
    *last = *first;
    return !dash || (str_to_i64(dash + 1, last) && *last >= *first);
}

/* ---- layers ---- */

static int one_range(bool *on, const char *word, int64_t depth, int layers, struct err *e) {
    int64_t first, last;
    if (!range(word, &first, &last))
        return err_more(e, EXIT_CONFIG,
                        "layers: '%s' is no layer and no range; write all, 0,3,14-17 or 14-17 of "
                        "28", word);
    if (last >= depth)
        return err_more(e, EXIT_CONFIG, "layers: '%s' goes past layer %lld, the last of %lld", word,
                        (long long)depth - 1, (long long)depth);
    first = first * layers / depth;
    last = ((last + 1) * layers + depth - 1) / depth - 1;
    for (int64_t l = first; l <= last; l++) on[l] = true;
    return 0;
}

int noise_layers_parse(bool on[MODEL_LAYERS_MAX], const char *text, int layers, struct err *e) {
    char word[NOISE_WORD_MAX], *cut;
    const char *of = strstr(text, " of "), *at = text;
    int64_t depth = layers;
    int rc = 0, items = 0;
    memset(on, 0, MODEL_LAYERS_MAX * sizeof *on);
    if (of) {
        const char *p = of + 4;
        if (!noise_list_next(&p, word) || *p || !str_to_i64(word, &depth) || depth < 1)
            return err_more(e, EXIT_CONFIG, "layers: '%s' does not say of how many layers", text);
    }
    for (; noise_list_next(&at, word); items++) {
        if ((cut = strstr(word, " of "))) *cut = 0;          /* after the last item */
        if (!strcmp(word, "all")) memset(on, 1, (size_t)layers * sizeof *on);
        else if (one_range(on, word, depth, layers, e) < 0) rc = -1;
    }
    if (!items) rc = err_more(e, EXIT_CONFIG, "layers: no layer is named; 'all' means all of them");
    return rc;
}

void noise_layers_text(const bool *on, int layers, struct str *out) {
    int count = 0;
    for (int l = 0; l < layers; l++) count += on[l];
    if (count == layers) {
        str_puts(out, "all");
        return;
    }
    const char *comma = "";
    for (int l = 0; l < layers; l++) {
        if (!on[l]) continue;
        const int first = l;
        while (l + 1 < layers && on[l + 1]) l++;
        str_printf(out, "%s%d", comma, first);
        if (l > first) str_printf(out, "-%d", l);
        comma = ",";
    }
}

/* ---- modules ---- */

static bool module_is_norm(enum noise_module m) {
    return m >= NOISE_MODULE_NORM_IN && m <= NOISE_MODULE_NORM_FINAL;
}

/* Next part between dots; false at the end. */
static bool part_next(const char **at, char part[NOISE_WORD_MAX]) {
    const size_t n = strcspn(*at, ".");
    if (!n && !**at) return false;
    snprintf(part, NOISE_WORD_MAX, "%.*s", (int)n, *at);
    *at += n + ((*at)[n] == '.');
    return true;
}

static bool part_hits(const char *want, const char *part, bool last, enum noise_module m,
                      int layer) {
    int64_t from, to;
    if (!strcmp(want, part)) return true;
    if (last) return (!strcmp(want, "linear") && m <= NOISE_MODULE_DOWN) ||
                     (!strcmp(want, "rmsnorm") && module_is_norm(m));
    return isdigit((unsigned char)*part) && range(want, &from, &to) && layer >= from && layer <= to;
}

bool noise_pattern_hits(const char *pattern, enum noise_module m, int layer) {
    char name[NOISE_WORD_MAX], want[NOISE_WORD_MAX], part[NOISE_WORD_MAX];
    if (!noise_module_in_layer(m))
        snprintf(name, sizeof name, "%s%s", m == NOISE_MODULE_HEAD ? "" : "model.",
                 noise_module_name[m]);
    else
        snprintf(name, sizeof name, "model.layers.%d.%s%s", layer,
                 m <= NOISE_MODULE_O ? "self_attn." : m <= NOISE_MODULE_DOWN ? "mlp." : "",
                 noise_module_name[m]);
    const char *p = pattern, *n = name;
    if (!part_next(&p, want)) return false;
    while (part_next(&n, part)) {
        if (!part_hits(want, part, !*n, m, layer)) continue;
        if (!part_next(&p, want)) return true;
    }
    return false;
}

int noise_pattern_check(const char *pattern, int layers, struct err *e) {
    char part[NOISE_WORD_MAX];
    for (enum noise_module m = 0; m < NOISE_MODULE_COUNT; m++)
        for (int l = 0; l < layers; l++)
            if (noise_pattern_hits(pattern, m, l)) return 0;
    for (const char *p = pattern; part_next(&p, part);) {
        int64_t from, to;
        bool known = range(part, &from, &to);
        for (size_t i = 0; i < COUNT_OF(words); i++) known = known || !strcmp(part, words[i]);
        if (known) continue;
        const char *near = str_nearest(part, words, COUNT_OF(words));
        return err_more(e, EXIT_CONFIG,
                        "'%s' names no module of this model%s%s%s; names: linear, rmsnorm, q_proj, "
                        "k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, input_layernorm, "
                        "post_attention_layernorm, norm, lm_head, layers.N, layers.N.NAME",
                        pattern, near ? ", did you mean '" : "", near ? near : "", near ? "'" : "");
    }
    return err_more(e, EXIT_CONFIG, "'%s' hits nothing in a model of %d layers (0 to %d)", pattern,
                    layers, layers - 1);
}
