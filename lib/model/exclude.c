/* exclude.c - see exclude.h. Order: one pattern, what to say where it hits nothing, the list, the
 * set's name.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/exclude.h"

#include <ctype.h>

#include "lib/base/str.h"
#include "lib/model/select.h"

static int hit(struct model_exclude *x, const char *pattern, const struct model_conf *c) {
    char name[SELECT_NAME_MAX];
    int found = 0;
    for (int l = 0; l < c->layers; l++)
        for (enum proj p = 0; p < PROJ_COUNT; p++) {
            select_proj_name(name, l, p);
            if (!select_name(pattern, name)) continue;
            found++;
            x->count += !x->on[l][p];
            x->on[l][p] = true;
        }
    return found;
}

/* "layers.14-17.q_proj of 28" into the same pattern of each layer that takes one of them; how many
 * modules were hit, -1 where the layers make no sense. */
static int hit_scaled(struct model_exclude *x, const char *pattern, const char *of,
                      const struct model_conf *c, struct err *e) {
    float times[MODEL_LAYERS_MAX];
    char layers[SELECT_NAME_MAX], one[SELECT_NAME_MAX], key[2 * SELECT_NAME_MAX];
    int found = 0;
    const char *at = pattern;
    while (*at && !isdigit((unsigned char)*at)) {
        at += strcspn(at, ".");
        at += *at == '.';
    }
    const int n = (int)strcspn(at, ".");
    snprintf(layers, sizeof layers, "%.*s%s", n, at, of);
    snprintf(key, sizeof key, "pattern '%s%s'", pattern, of);
    if (select_layers(times, layers, c->layers, 0, key, e) < 0) return -1;
    for (int l = 0; l < c->layers; l++) {
        if (times[l] == 0) continue;
        snprintf(one, sizeof one, "%.*s%d%s", (int)(at - pattern), pattern, l, at + n);
        found += hit(x, one, c);
    }
    return found;
}

static int missed(const char *pattern, const struct model_conf *c, struct err *e) {
    static const char *const known[] = { "model",  "layers", "self_attn", "mlp",       "q_proj",
                                         "k_proj", "v_proj", "o_proj",    "gate_proj", "up_proj",
                                         "down_proj" };
    const char *near = NULL;
    char *text = mem_dup(pattern), *at = text;
    for (char *part; !near && (part = strsep(&at, "."));) {
        near = str_nearest(part, known, COUNT_OF(known));
        if (near && strcmp(near, part) == 0) near = NULL;
    }
    free(text);
    if (!strcmp(pattern, "lm_head") || !strcmp(pattern, "embed_tokens"))
        return err_more(e, EXIT_CONFIG, "pattern '%s': it is never quantised; leave it out",
                        pattern);
    return err_more(e, EXIT_CONFIG,
                    "pattern '%s' hits no module%s%s%s; there are layers.0 to layers.%d, each with "
                    "self_attn (q_proj, k_proj, v_proj, o_proj) and mlp (gate_proj, up_proj, "
                    "down_proj)",
                    pattern, near ? " (did you mean '" : "", near ? near : "", near ? "'?)" : "",
                    c->layers - 1);
}

static int add(struct model_exclude *x, char *pattern, const struct model_conf *c, struct err *e) {
    char of[SELECT_NAME_MAX];
    pattern += strspn(pattern, " \t");
    for (size_t n = strlen(pattern); n && strchr(" \t", pattern[n - 1]); n--) pattern[n - 1] = 0;
    if (!*pattern) return 0;
    char *scale = strstr(pattern, " of ");
    snprintf(of, sizeof of, "%s", scale ? scale : "");
    if (scale) *scale = 0;
    const int found = scale ? hit_scaled(x, pattern, of, c, e) : hit(x, pattern, c);
    return found < 0 ? -1 : found ? 0 : missed(pattern, c, e);
}

int model_exclude_make(struct model_exclude *x, const char *patterns, const struct model_conf *c,
                       struct err *e) {
    memset(x, 0, sizeof *x);
    if (!patterns || !*patterns) return 0;
    char *text = mem_dup(patterns), *at = text;
    int rc = 0;
    for (char *pattern; (pattern = strsep(&at, ","));)
        if (add(x, pattern, c, e) < 0) rc = -1;
    free(text);
    if (rc == 0 && x->count == c->layers * PROJ_COUNT)
        rc = err_more(e, EXIT_CONFIG,
                      "the patterns '%s' leave nothing quantised: take the format bf16 instead",
                      patterns);
    return rc;
}

void model_exclude_id(const struct model_exclude *x, char out[9]) {
    char hex[SHA256_HEX];
    *out = 0;
    if (!x->count) return;
    sha256_of(x->on, sizeof x->on, hex);
    snprintf(out, 9, "%.8s", hex);
}
