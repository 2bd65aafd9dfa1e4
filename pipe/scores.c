/* scores.c - see scores.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/scores.h"

#include "lib/base/fs.h"
#include "lib/base/hash.h"
#include "lib/base/stat.h"
#include "pipe/tail.h"

static void copy_field(const json_t *o, const char *key, char *out, size_t size) {
    const char *text = json_string_value(json_object_get(o, key));
    snprintf(out, size, "%s", text ? text : "");
}

/* One that is too long for its field ends in a hash of all of it: a cut label would be others'. */
static void copy_label(const json_t *o, const char *key, char *out, size_t size) {
    const char *text = json_string_value(json_object_get(o, key));
    char hex[SHA256_HEX];
    copy_field(o, key, out, size);
    if (!text || strlen(text) < size) return;
    sha256_of(text, strlen(text), hex);
    snprintf(out + size - 17, 17, "... #%.11s", hex);
}

int score_from_json(struct score *s, const char *line, size_t bytes) {
    struct err e = { 0 };
    json_t *o = json_parse(line, bytes, "scores.jsonl", &e);
    *s = (struct score){ .samples_per_question = 1 };
    if (!o) return -1;
    int rc = json_need_int(o, "step", &s->step, 0, INT64_MAX, "score", &e);
    if (rc == 0) rc = json_need_int(o, "n", &s->n, 0, INT64_MAX, "score", &e);
    if (rc == 0) rc = json_need_int(o, "right", &s->right, 0, INT64_MAX, "score", &e);
    json_may_int(o, "version", &s->version, INT64_MIN, INT64_MAX, "score", &e);
    json_may_int(o, "samples_per_question", &s->samples_per_question, 1, INT64_MAX, "score", &e);
    copy_field(o, "split", s->split, sizeof s->split);
    copy_field(o, "rule", s->rule, sizeof s->rule);
    copy_field(o, "quant", s->quant, sizeof s->quant);
    copy_label(o, "noise", s->noise, sizeof s->noise);
    copy_field(o, "adapter_sha256", s->adapter_sha256, sizeof s->adapter_sha256);
    copy_field(o, "model_sha256", s->model_sha256, sizeof s->model_sha256);
    copy_field(o, "data_sha256", s->data_sha256, sizeof s->data_sha256);
    stat_interval(s->right, s->n, &s->low, &s->high);
    json_decref(o);
    return rc;
}

bool score_is_clean(const struct score *s) { return !*s->noise || !strcmp(s->noise, "none"); }

const char *score_noise(const struct score *s) { return score_is_clean(s) ? "clean" : s->noise; }

double score_percent(const struct score *s) {
    return s->n ? 100.0 * (double)s->right / (double)s->n : 0;
}

/* The noise without what a schedule changes: AQN, which may be silent in some step. */
static void noise_kind(char *out, size_t size, const struct score *s) {
    snprintf(out, size, "%s", score_is_clean(s) ? "" : s->noise);
    char *aqn = strstr(out, "aqn ");
    if (aqn) *aqn = 0;
    if (aqn && aqn - out > 2) aqn[-2] = 0;
}

static int by_series(const struct score *x, const struct score *y) {
    char a[sizeof x->noise], b[sizeof y->noise];
    if (score_is_clean(x) != score_is_clean(y)) return score_is_clean(x) ? -1 : 1;
    int c = strcmp(x->split, y->split);
    if (!c) c = strcmp(x->rule, y->rule);
    if (!c) c = strcmp(x->quant, y->quant);
    noise_kind(a, sizeof a, x);
    noise_kind(b, sizeof b, y);
    return c ? c : strcmp(a, b);
}

bool score_same_series(const struct score *a, const struct score *b) {
    return by_series(a, b) == 0;
}

static int by_step(const void *a, const void *b) {
    const struct score *x = a, *y = b;
    const int c = by_series(x, y);
    return c ? c : x->step < y->step ? -1 : x->step > y->step;
}

void scores_read(struct scores *s, const char *run_dir) {
    char path[FS_PATH_MAX];
    struct tail t;
    struct score one;
    *s = (struct scores){ 0 };
    fs_join(path, sizeof path, run_dir, "scores.jsonl");
    tail_open(&t, path, false);
    while (tail_next(&t)) {
        if (score_from_json(&one, t.line.s, t.line.len) < 0) {
            s->damaged++;
            continue;
        }
        int at = s->n;
        for (int i = 0; i < s->n; i++)
            if (s->v[i].step == one.step && score_same_series(&s->v[i], &one)) at = i;
        if (at == s->n) s->v = mem_grow(s->v, (size_t)++s->n * sizeof *s->v);
        s->v[at] = one;
    }
    tail_close(&t);
    if (s->n) qsort(s->v, (size_t)s->n, sizeof *s->v, by_step);
}

void scores_release(struct scores *s) {
    free(s->v);
    *s = (struct scores){ 0 };
}

bool scores_has_step(const struct scores *s, int64_t step) {
    for (int i = 0; i < s->n; i++)
        if (s->v[i].step == step) return true;
    return false;
}

int scores_series_end(const struct scores *s, int from) {
    int end = from;
    while (end < s->n && score_same_series(&s->v[from], &s->v[end])) end++;
    return end;
}

void score_text(char *out, size_t size, const struct score *s) {
    snprintf(out, size, "%lld/%lld = %.1f %% [%.1f, %.1f] %s, %s, %s", (long long)s->right,
             (long long)s->n, score_percent(s), 100 * s->low, 100 * s->high, s->rule, s->quant,
             score_noise(s));
}
