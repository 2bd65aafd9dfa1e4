/* book.c - see book.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "stages/eval/book.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include "lib/base/fs.h"
#include "lib/base/json.h"
#include "lib/base/log.h"
#include "lib/wire/tape.h"

struct shown { int64_t step; char *noise, *id, *question, *gold, *text; bool right; };
struct scored { int64_t step; char *noise; };
struct book {
    const struct eval_conf *c;
    struct tape *tape;
    struct tally_set answered;
    char scores_path[FS_PATH_MAX];
    struct scored *scored;
    int scores;
    struct shown *shown;
    int showns;
};

static void note_answer(struct book *b, const struct rec_answer *a) {
    tally_add(&b->answered, a, (enum task_rule)b->c->rule);
    const char *colon = strrchr(a->question_id, ':');
    int64_t q;
    if (a->k != 0 || !colon || !str_to_i64(colon + 1, &q) || q >= b->c->shown) return;
    b->shown = mem_grow(b->shown, (size_t)(b->showns + 1) * sizeof *b->shown);
    b->shown[b->showns++] = (struct shown){ a->step,
                                            mem_dup(a->noise),
                                            mem_dup(a->question_id),
                                            mem_dup(a->question),
                                            mem_dup(a->answer),
                                            mem_dup(a->text),
                                            task_right((enum task_rule)b->c->rule, a->text,
                                                       a->answer, NULL) };
}

static void note_score(struct book *b, int64_t step, const char *noise) {
    b->scored = mem_grow(b->scored, (size_t)(b->scores + 1) * sizeof *b->scored);
    b->scored[b->scores++] = (struct scored){ step, mem_dup(noise ? noise : "none") };
}

static int read_scores(struct book *b, struct err *e) {
    struct str old, whole;
    str_init(&old);
    str_init(&whole);
    int rc = 0;
    if (fs_exists(b->scores_path) && (rc = fs_read(&old, b->scores_path, 1 << 30, e)) == 0) {
        for (char *p = old.s; *p;) {
            char *end = strchr(p, '\n');
            json_t *o = end ? json_loadb(p, (size_t)(end - p), 0, NULL) : NULL;
            /* a torn last line: its score is made again from the answers */
            if (!o) break;
            note_score(b, json_integer_value(json_object_get(o, "step")),
                       json_string_value(json_object_get(o, "noise")));
            json_decref(o);
            str_add(&whole, p, (size_t)(end - p) + 1);
            p = end + 1;
        }
        if (whole.len != old.len)
            rc = fs_replace(b->scores_path, whole.s ? whole.s : "", whole.len, e);
    }
    str_release(&old);
    str_release(&whole);
    return rc;
}

struct last { int64_t step, n; uint64_t at; char *noise; };          /* batch of the tape */

/* Where the tape's last batch begins, and what it is. Batches are contiguous, so only the last can
 * be incomplete. */
static int find_last(struct book *b, struct last *last, struct err *e) {
    struct rec r;
    int got;
    for (uint64_t frame = 0; (got = tape_read(b->tape, &r, e)) == 1; frame++) {
        const struct rec_answer *a = &r.answer;
        if (r.type == REC_ANSWER &&
            (!last->n || a->step != last->step || strcmp(a->noise, last->noise) != 0)) {
            free(last->noise);
            *last = (struct last){ .step = a->step, .at = frame, .noise = mem_dup(a->noise) };
        }
        last->n += r.type == REC_ANSWER;
        rec_release(&r);
    }
    return got;
}

/* Cuts off a last batch that is not whole. */
static int cut_last(struct book *b, int64_t per_batch, struct err *e) {
    struct last last = { 0 };
    int rc = find_last(b, &last, e);
    if (rc == 0 && last.n && last.n < per_batch) {
        log_info("%lld answers of step %lld (noise %s) are not a whole score: asking again",
                 (long long)last.n, (long long)last.step, last.noise);
        rc = tape_truncate(b->tape, last.at, e);
    }
    free(last.noise);
    return rc;
}

static int read_answers(struct book *b, const char *path, int64_t per_batch, struct err *e) {
    struct rec r;
    int got;
    if (tape_append_open(&b->tape, path, e) < 0 || cut_last(b, per_batch, e) < 0) return -1;
    tape_close(&b->tape);
    if (tape_append_open(&b->tape, path, e) < 0) return -1;
    while ((got = tape_read(b->tape, &r, e)) == 1) {
        if (r.type == REC_ANSWER) note_answer(b, &r.answer);
        rec_release(&r);
    }
    return got;
}

int book_open(struct book **out, const struct eval_conf *c, int64_t answers_per_step,
              struct err *e) {
    struct book *b = mem_alloc(sizeof *b);
    char path[FS_PATH_MAX];
    b->c = c;
    fs_join(b->scores_path, sizeof b->scores_path, c->shared.run.dir, "scores.jsonl");
    fs_join(path, sizeof path, c->shared.run.dir, "tape");
    int rc = fs_mkdirs(path, e);
    fs_join(path, sizeof path, c->shared.run.dir, "tape/answers.tape");
    if (rc < 0 || read_answers(b, path, answers_per_step, e) < 0 || read_scores(b, e) < 0) {
        book_close(&b);
        return -1;
    }
    *out = b;
    return 0;
}

void book_close(struct book **bp) {
    struct book *b = *bp;
    if (!b) return;
    tape_close(&b->tape);
    tally_release(&b->answered);
    for (int i = 0; i < b->showns; i++) {
        free(b->shown[i].noise);
        free(b->shown[i].id);
        free(b->shown[i].question);
        free(b->shown[i].gold);
        free(b->shown[i].text);
    }
    for (int i = 0; i < b->scores; i++) free(b->scored[i].noise);
    free(b->shown);
    free(b->scored);
    free(b);
    *bp = NULL;
}

bool book_has_score(const struct book *b, int64_t step, const char *noise) {
    for (int i = 0; i < b->scores; i++)
        if (b->scored[i].step == step && strcmp(b->scored[i].noise, noise) == 0) return true;
    return false;
}

const struct tally *book_answers(const struct book *b, int64_t step, const char *noise) {
    for (int i = 0; i < b->answered.n; i++)
        if (b->answered.t[i].step == step && strcmp(b->answered.t[i].noise, noise) == 0)
            return &b->answered.t[i];
    return NULL;
}

int book_keep_answers(struct book *b, const struct rec *answer, int64_t n, struct err *e) {
    for (int64_t i = 0; i < n; i++) {
        if (tape_append(b->tape, &answer[i], e) < 0) return -1;
        note_answer(b, &answer[i].answer);
    }
    return tape_sync(b->tape, e);
}

int book_keep_scores(struct book *b, const struct rec *score, int n, struct err *e) {
    struct str line;
    str_init(&line);
    for (int i = 0; i < n; i++) rec_to_json(&line, &score[i]);
    int fd = open(b->scores_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644), rc = 0;
    if (fd < 0 || write(fd, line.s, line.len) != (ssize_t)line.len || fsync(fd) < 0)
        rc = err_set(e, "cannot write '%s': %s", b->scores_path, strerror(errno));
    if (fd >= 0) close(fd);
    str_release(&line);
    for (int i = 0; rc == 0 && i < n; i++)
        note_score(b, score[i].score.step, score[i].score.noise);
    return rc;
}

int book_write_samples(struct book *b, struct err *e) {
    char path[FS_PATH_MAX];
    struct str md;
    str_init(&md);
    fs_join(path, sizeof path, b->c->shared.run.dir, "samples.md");
    str_printf(&md,
               "# What the model answers, step by step\n\nRun %s, rule %s. The first %lld test "
               "questions at every scored step; all "
               "answers are in tape/answers.tape.\n",
               b->c->shared.run.id, task_rule_name[b->c->rule], (long long)b->c->shown);
    for (int64_t q = 0; q < b->c->shown; q++) {
        bool headed = false;
        for (int i = 0; i < b->showns; i++) {
            const struct shown *x = &b->shown[i];
            int64_t index = -1;
            const char *colon = strrchr(x->id, ':');
            if (!colon || !str_to_i64(colon + 1, &index) || index != q) continue;
            if (!headed)
                str_printf(&md, "\n## %s\n\n%s\n\nRight answer: %s\n", x->id, x->question, x->gold);
            headed = true;
            str_printf(&md, "\nStep %lld, ", (long long)x->step);
            if (strcmp(x->noise, "none") != 0) str_printf(&md, "noise %s, ", x->noise);
            str_printf(&md, "%s:\n\n", x->right ? "right" : "wrong");
            str_puts(&md, "    ");
            for (const char *p = x->text; *p; p++) {
                str_add(&md, p, 1);
                if (*p == '\n') str_puts(&md, "    ");
            }
            str_puts(&md, "\n");
        }
    }
    int rc = fs_replace(path, md.s, md.len, e);
    str_release(&md);
    return rc;
}
