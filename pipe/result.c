/* result.c - see result.h.
 *
 * Order: answers, metrics, the run, look-ups.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/result.h"

#include <math.h>

#include "lib/base/fs.h"
#include "lib/wire/tape.h"
#include "pipe/tail.h"

/* ---- answers ---- */

static int by_answer(const void *a, const void *b) {
    const struct mark *x = a, *y = b;
    if (x->step != y->step) return x->step < y->step ? -1 : 1;
    const int c = strcmp(x->question, y->question);
    return c ? c : (x->k > y->k) - (x->k < y->k);
}

static bool of_series(const struct rec_answer *a, const struct score *like) {
    const bool clean = !*a->noise || strcmp(a->noise, "none") == 0;
    return clean == score_is_clean(like) && strcmp(a->quant, like->quant) == 0 &&
           strcmp(a->split, like->split) == 0;
}

int marks_read(struct mark **out, int *n, const char *tape, const struct score *like,
               struct err *e) {
    const bool strict = strcmp(like->rule, "strict") == 0;
    struct tape *t;
    struct rec r;
    int got, room = 0;
    *out = NULL;
    *n = 0;
    /* an answer holds its score by these two rules only */
    if (!fs_exists(tape) || (!strict && strcmp(like->rule, "flexible") != 0)) return 0;
    if (tape_read_open(&t, tape, e) < 0) return -1;
    while ((got = tape_read(t, &r, e)) == 1) {
        const struct rec_answer *a = &r.answer;
        if (r.type == REC_ANSWER && of_series(a, like) && strlen(a->question_id) < QUESTION_BYTES) {
            if (*n == room) *out = mem_grow(*out, (size_t)(room = room ? 2 * room : 256) *
                                                      sizeof **out);
            struct mark *m = &(*out)[(*n)++];
            *m = (struct mark){ a->step, a->k, (strict ? a->strict : a->flexible) > .5, "" };
            snprintf(m->question, sizeof m->question, "%s", a->question_id);
        }
        rec_release(&r);
    }
    tape_close(&t);
    if (*n) qsort(*out, (size_t)*n, sizeof **out, by_answer);
    return got;
}

/* ---- metrics ---- */

static double metric(const json_t *o, const char *key) {
    const json_t *v = json_object_get(o, key);
    return json_is_number(v) ? json_number_value(v) : NAN;
}

static void read_points(struct result *r) {
    char path[FS_PATH_MAX];
    struct tail t;
    double tokens = 0;
    int updates = 0;
    r->point = mem_alloc(sizeof *r->point);
    r->point[0] = (struct point){ .reward = NAN };
    r->points = 1;
    fs_join(path, sizeof path, r->f.dir, "metrics.jsonl");
    tail_open(&t, path, false);
    while (tail_next(&t)) {
        json_t *o = json_loadb(t.line.s, t.line.len, 0, NULL);
        const int64_t step = json_integer_value(json_object_get(o, "step"));
        r->damaged += !o;
        if (o && step > 0) {
            /* without a step between nobody knows the tokens since the start */
            if (step != r->point[r->points - 1].step + 1) tokens = NAN;
            r->b_zeroed = json_number_value(json_object_get(o, "quant/adapter/b_zeroed"));
            updates += !json_is_false(json_object_get(o, "updated"));
            r->point = mem_grow(r->point, (size_t)(r->points + 1) * sizeof *r->point);
            tokens += metric(o, "perf/total_num_tokens");
            r->point[r->points++] = (struct point){ step, metric(o, "critic/rewards/mean"),
                                                    metric(o, "train/prompts_consumed"), tokens };
        }
        json_decref(o);
    }
    tail_close(&t);
    r->no_update = r->points > 1 && !updates;
}

/* ---- the run ---- */

/* The answers must be those that the scores were made of. */
static int check_marks(const struct result *r, struct err *e) {
    for (int i = 0; i < r->score_n && r->marks; i++) {
        int n, right = 0;
        const struct mark *m = result_marks(r, r->score[i].step, &n);
        for (int j = 0; j < n; j++) right += m[j].right;
        if (n != r->score[i].n || right != r->score[i].right)
            return err_set(e, "run '%s': tape/answers.tape has %d of %d right at step %lld, "
                              "scores.jsonl says %lld of %lld: one of them is not of this run",
                           r->f.id, right, n, (long long)r->score[i].step,
                           (long long)r->score[i].right, (long long)r->score[i].n);
    }
    return 0;
}

/* The answers of the scores that are compared. */
static int read_marks(struct result *r, const char *tape, struct err *e) {
    free(r->mark);
    r->mark = NULL;
    r->marks = 0;
    if (!r->score_n) return 0;
    if (marks_read(&r->mark, &r->marks, tape, r->score, e) < 0) return -1;
    return check_marks(r, e);
}

/* The series of scores that begins at `from`, and its answers. */
static int use_series(struct result *r, int from, struct err *e) {
    char path[FS_PATH_MAX];
    r->score = r->scores.v + from;
    r->score_n = scores_series_end(&r->scores, from) - from;
    fs_join(path, sizeof path, r->f.dir, "tape/answers.tape");
    return read_marks(r, path, e);
}

static int read_run(struct result *r, struct err *e) {
    char path[FS_PATH_MAX];
    fs_join(path, sizeof path, r->f.dir, "resolved.pipe");
    lang_read(&r->conf, path, NULL, 0);
    if (r->conf.errors) return err_set(e, "'%s' cannot be read: %s", path, r->conf.error[0].text);
    fs_join(path, sizeof path, r->f.dir, "manifest.json");
    r->manifest = json_parse_file(path, 1 << 22, e);
    if (!r->manifest) return -1;
    const char *seed = result_value(r, "run.seed");
    if (!seed || !str_to_i64(seed, &r->seed)) r->seed = 0;
    r->state = folder_state(&r->f, NULL, 0);
    scores_read(&r->scores, r->f.dir);
    read_points(r);
    return use_series(r, 0, e);
}

int result_use_noisy(struct result *r, struct err *e) {
    int i = 0;
    while (i < r->scores.n && score_is_clean(&r->scores.v[i])) i++;
    if (i == r->scores.n)
        return err_code(e, EXIT_USAGE, "run '%s' has no score under noise: it needs "
                        "eval.also_noisy = yes, or noise in its scores", r->f.id);
    return use_series(r, i, e);
}

int result_use_offline(struct result *r, const char *dir, struct err *e) {
    char path[FS_PATH_MAX];
    struct score one;
    struct str text;
    str_init(&text);
    fs_join(path, sizeof path, dir, "score.json");
    int rc = fs_read(&text, path, 1 << 20, e);
    if (rc == 0 && score_from_json(&one, text.s, text.len) < 0)
        rc = err_set(e, "'%s' is not a score", path);
    str_release(&text);
    if (rc < 0) return -1;
    scores_release(&r->scores);
    r->scores.v = mem_alloc(sizeof one);
    r->scores.v[0] = one;
    r->scores.n = 1;
    r->score = r->scores.v;
    r->score_n = 1;
    fs_join(path, sizeof path, dir, "answers.tape");
    return read_marks(r, path, e);
}

int result_read(struct result *r, const char *runs_dir, const char *word, struct err *e) {
    *r = (struct result){ .f.lock_fd = -1 };
    if (str_starts(word, "ref:")) return reference_read(r, word + 4, e);
    if (folder_find(&r->f, runs_dir, word, e) < 0) return -1;
    return read_run(r, e);
}

void result_release(struct result *r) {
    lang_release(&r->conf);
    json_decref(r->manifest);
    scores_release(&r->scores);
    str_release(&r->remarks);
    free(r->point);
    free(r->mark);
    *r = (struct result){ .f.lock_fd = -1 };
}

/* ---- look-ups ---- */

const char *result_value(const struct result *r, const char *key) {
    const struct lang_value *v = lang_get(&r->conf, key);
    return v ? v->text : NULL;
}

const char *result_file_sha256(const struct result *r, const char *role) {
    const json_t *files = json_object_get(r->manifest, "files");
    for (size_t i = 0; i < json_array_size(files); i++) {
        const json_t *f = json_array_get(files, i);
        const char *is = json_string_value(json_object_get(f, "role")),
                   *sha = json_string_value(json_object_get(f, "sha256"));
        if (is && sha && strcmp(is, role) == 0) return sha;
    }
    return "";
}

const struct point *result_point(const struct result *r, int64_t step) {
    for (int i = 0; i < r->points; i++)
        if (r->point[i].step == step) return &r->point[i];
    return NULL;
}

const struct score *result_score(const struct result *r, int64_t step) {
    for (int i = 0; i < r->score_n; i++)
        if (r->score[i].step == step) return &r->score[i];
    return NULL;
}

const struct mark *result_marks(const struct result *r, int64_t step, int *n) {
    int from = 0;
    while (from < r->marks && r->mark[from].step != step) from++;
    for (*n = 0; from + *n < r->marks && r->mark[from + *n].step == step;) ++*n;
    return r->mark + from;
}
