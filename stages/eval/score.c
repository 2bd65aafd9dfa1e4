/* score.c - see score.h. Order: telling a score, the three ways to come to one.
 * SPDX-License-Identifier: Apache-2.0 */
#include "stages/eval/score.h"

#include <dirent.h>
#include <errno.h>

#include "lib/base/fs.h"
#include "lib/base/log.h"
#include "lib/wire/tape.h"

/* Where a score goes: the port, the log of a run, or stdout when a person asked; who names the
 * policy, "" = by its step. */
static int tell_score(struct stage *s, const struct rec *score, const char *who) {
    struct str line;
    str_init(&line);
    tally_line(&line, &score->score, who);
    if (who && !s->link[PORT_SCORE]) fputs(line.s, stdout);
    else log_info("%.*s", (int)line.len - 1, line.s);
    str_release(&line);
    struct link *l = s->link[PORT_SCORE];
    return l && link_send(l, score, NULL, 1000, &s->err) < 0 ? -1 : 0;
}

int score_again(struct stage *s) {
    const struct eval_conf *c = s->conf;
    char url[FS_PATH_MAX + 8];
    snprintf(url, sizeof url, "%s%s", strchr(c->answers, ':') || !strcmp(c->answers, "-") ? "" :
             str_ends(c->answers, ".tape") ? "tape:" : "file:", c->answers);
    struct link_opts o = { .name = "answers", .kind = LINK_KIND_PULL, .expected = REC_ANSWER };
    struct link *l;
    struct tally_set set = { 0 };
    struct rec r;
    int got;
    if (link_open(&l, url, &o, &s->err) < 0) return -1;
    while ((got = link_recv(l, &r, NULL, 500, &s->err)) >= 0 && got != LINK_END &&
           !stage_stopping(s)) {
        if (got != LINK_RECORD) continue;
        tally_add(&set, &r.answer, (enum task_rule)c->rule);
        rec_release(&r);
    }
    link_close(&l);
    if (got >= 0 && !set.n) got = err_set(&s->err, "'%s' holds no answers", c->answers);
    struct str lines;
    str_init(&lines);
    for (int i = 0; got >= 0 && i < set.n; i++) {
        tally_score(&r, &set.t[i], (enum task_rule)c->rule);
        rec_to_json(&lines, &r);
        got = tell_score(s, &r, "");
    }
    /* inside a pipeline the launcher shows scores.jsonl */
    if (got >= 0 && *c->shared.run.dir) {
        char path[FS_PATH_MAX];
        fs_join(path, sizeof path, c->shared.run.dir, "scores.jsonl");
        got = fs_replace(path, lines.s, lines.len, &s->err);
    }
    str_release(&lines);
    tally_release(&set);
    return got < 0 ? -1 : 0;
}

/* The learner's note about the adapter in `dir`, where a run left one beside it: which step,
 * trained under which treatment. */
static bool find_mark(const char *dir, int64_t version, struct rec *mark) {
    char parent[FS_PATH_MAX], path[FS_PATH_MAX];
    bool found = false;
    fs_join(parent, sizeof parent, dir, "..");
    DIR *d = opendir(parent);
    for (struct dirent *entry; d && !found && (entry = readdir(d));) {
        struct str text;
        if (!str_starts(entry->d_name, "at-") || !str_ends(entry->d_name, ".json")) continue;
        str_init(&text);
        fs_join(path, sizeof path, parent, entry->d_name);
        if (fs_read(&text, path, 1 << 20, NULL) == 0 &&
            rec_from_json(mark, text.s, text.len, REC_ADAPTER, path, NULL) == 0) {
            found = mark->adapter.version == version;
            if (!found) rec_release(mark);
        }
        str_release(&text);
    }
    if (d) closedir(d);
    return found;
}

/* eval.noise = trained: the settings must be those that the adapter was trained with, AQN's targets
 * and all. */
static int check_trained(struct stage *s, const struct rec_adapter *a, bool marked,
                         const struct examiner *x) {
    const char *hash = examiner_treatment(x);
    if (!marked)
        return err_code(&s->err, EXIT_CONFIG,
                        "eval.noise = trained, but no run left a note beside adapter '%s' that "
                        "says how it was trained (at-NNNNNN.json)", a->path);
    if (strcmp(a->treatment.hash, hash) != 0)
        return err_code(&s->err, EXIT_CONFIG,
                        "adapter '%s' was trained under treatment %s (noise '%s'), this "
                        "configuration gives %s (noise '%s'; AQN, formats or adapter shape may "
                        "differ too): take the run's own, -c RUN/conf/eval.conf", a->path,
                        a->treatment.hash, a->treatment.ops, hash, examiner_ops(x));
    return 0;
}

/* The adapter that eval.adapter names, with the note that its run left, if it did. */
static bool find_adapter(const struct eval_conf *c, struct rec *a, char folder[FS_PATH_MAX]) {
    snprintf(folder, FS_PATH_MAX, "%.1000s", c->adapter);
    for (size_t end = strlen(folder); end > 1 && folder[end - 1] == '/'; end--) folder[end - 1] = 0;
    const char *name = strrchr(folder, '/') ? strrchr(folder, '/') + 1 : folder;
    int64_t version = 0;
    const bool numbered = name[0] == 'v' && str_to_i64(name + 1 + strspn(name + 1, "0"), &version);
    if (numbered && find_mark(folder, version, a)) {
        free(a->adapter.path);
        a->adapter.path = mem_dup(c->adapter);
        return true;
    }
    rec_init(a, REC_ADAPTER);
    a->adapter = (struct rec_adapter){ .path = mem_dup(c->adapter),
                                       .sha256 = mem_dup(""),
                                       .version = version };
    return false;
}

/* The answers first: a folder with a score holds all it was made of. */
static int keep_once(const char *dir, const struct answers *got, const struct rec *score,
                     struct err *e) {
    char path[FS_PATH_MAX], part[FS_PATH_MAX];
    struct tape *t = NULL;
    struct str line;
    if (fs_mkdirs(dir, e) < 0) return -1;
    fs_join(path, sizeof path, dir, "answers.tape");
    fs_join(part, sizeof part, dir, "answers.part");
    remove(part);
    int rc = tape_append_open(&t, part, e);
    for (int64_t i = 0; rc == 0 && i < got->n; i++) rc = tape_append(t, &got->v[i], e);
    if (rc == 0) rc = tape_sync(t, e);
    tape_close(&t);
    if (rc == 0 && rename(part, path) < 0)
        rc = err_set(e, "cannot rename '%s': %s", part, strerror(errno));
    str_init(&line);
    rec_to_json(&line, score);
    fs_join(path, sizeof path, dir, "score.json");
    if (rc == 0) rc = fs_replace(path, line.s, line.len, e);
    str_release(&line);
    return rc;
}

static int tell_once(struct stage *s, struct examiner *x, const struct rec_adapter *a, bool marked,
                     const char *who, struct answers *got) {
    const enum task_rule rule = (enum task_rule)((const struct eval_conf *)s->conf)->rule;
    struct tally_set set = { 0 };
    struct rec score;
    for (int64_t i = 0; i < got->n; i++) tally_add(&set, &got->v[i].answer, rule);
    tally_score(&score, &set.t[0], rule);
    examiner_label(x, &score.score);
    score.score.evidence = got->evidence;
    if (marked) score.score.treatment_trained = a->treatment.hash;
    const char *keep = ((const struct eval_conf *)s->conf)->keep;
    int rc = *keep ? keep_once(keep, got, &score, &s->err) : 0;
    if (rc == 0) rc = tell_score(s, &score, who);
    tally_release(&set);
    return rc;
}

int score_once(struct stage *s, struct examiner *x) {
    const struct eval_conf *c = s->conf;
    const bool trained = c->noise == EVAL_NOISE_TRAINED;
    if (*c->adapter && !fs_is_dir(c->adapter))
        return err_code(
            &s->err, EXIT_ENV,
            "there is no adapter folder '%s': eval.adapter names one like RUN/adapters/v000040",
            c->adapter);
    char folder[FS_PATH_MAX], who[FS_PATH_MAX] = "base model";
    struct rec a;
    const bool marked = find_adapter(c, &a, folder);
    const char *name = strrchr(folder, '/') ? strrchr(folder, '/') + 1 : folder;
    if (*name)
        snprintf(who, sizeof who, marked ? "adapter %.200s of step %lld" : "adapter %.200s", name,
                 (long long)a.adapter.step);
    if (marked) examiner_warn(x, &a.adapter);
    const struct exam m = examiner_exam(x, &a.adapter, trained);
    struct answers got;
    int rc = trained ? check_trained(s, &a.adapter, marked, x) : 0;
    if (rc == 0 && (rc = examiner_ask(x, &m, &got)) == 0) {
        rc = tell_once(s, x, &a.adapter, marked, who, &got);
        answers_release(&got);
    }
    rec_release(&a);
    return rc < 0 ? -1 : 0;
}

enum { SCORES_MAX = 2 };                             /* of a step: clean, noisy */

struct step_scores {
    struct rec score[SCORES_MAX];
    char *evidence[SCORES_MAX];
    int n;
};

/* Answers that were asked for again are the kept ones, or what is measured is not theirs. */
static int same_answers(const struct tally *kept, const struct answers *got, enum task_rule rule,
                        struct err *e) {
    struct tally_set set = { 0 };
    for (int64_t i = 0; i < got->n; i++) tally_add(&set, &got->v[i].answer, rule);
    const bool same = set.n == 1 && set.t[0].n == kept->n && set.t[0].texts == kept->texts;
    tally_release(&set);
    return same ? 0
                : err_code(e, EXIT_CONFIG,
                           "step %lld, noise %s: asked again, the answers are not those kept in "
                           "tape/answers.tape: other settings, model, programs or kernels",
                           (long long)kept->step, kept->noise);
}

/* Answers of an exam, where they must be asked for: those that are kept need not be, but what was
 * measured of the noise is kept by the score alone, so a noisy one is measured again. 0, 1 asked to
 * stop, -1. */
static int exam_answers(struct stage *s, struct examiner *x, struct book *b, const struct exam *m,
                        const char *noise, struct answers *got) {
    const struct tally *kept = book_answers(b, m->step, noise);
    const struct eval_conf *c = s->conf;
    if (kept && strcmp(noise, "none") == 0) return 0;
    if (kept)
        log_info("answers of step %lld are kept, but not what was measured of the noise: asking "
                 "again", (long long)m->step);
    const int rc = examiner_ask(x, m, got);
    if (rc != 0) return rc;
    return kept ? same_answers(kept, got, (enum task_rule)c->rule, &s->err)
                : book_keep_answers(b, got->v, got->n, &s->err);
}

/* Adds the score of one exam. 0, 1 asked to stop, -1. */
static int score_exam(struct stage *s, struct examiner *x, struct book *b, const struct exam *m,
                      const char *noise, struct step_scores *to) {
    const struct eval_conf *c = s->conf;
    struct answers got = { 0 };
    const int rc = exam_answers(s, x, b, m, noise, &got);
    if (rc != 0) {
        answers_release(&got);
        return rc;
    }
    struct rec *score = &to->score[to->n];
    tally_score(score, book_answers(b, m->step, noise), (enum task_rule)c->rule);
    examiner_label(x, &score->score);
    score->score.adapter_sha256 = (char *)(uintptr_t)m->sha256;
    score->score.evidence = to->evidence[to->n++] = mem_dup(got.evidence ? got.evidence : "");
    answers_release(&got);
    return 0;
}

/* Scores that the step still lacks: the one every step has, and with eval.also_noisy the noisy one
 * where any noise acts at this step. */
static int score_missing(struct stage *s, struct examiner *x, struct book *b,
                         const struct rec_adapter *a, struct step_scores *to) {
    const struct eval_conf *c = s->conf;
    struct str noise[SCORES_MAX];
    int rc = 0;
    for (int i = 0; i < SCORES_MAX; i++) str_init(&noise[i]);
    for (int i = 0; rc == 0 && i < (c->also_noisy ? 2 : 1); i++) {
        const struct exam m = examiner_exam(x, a, i == 1);
        exam_noise(&noise[i], x, &m);
        if (i == 1 && strcmp(noise[0].s, noise[1].s) == 0) continue;
        if (!book_has_score(b, m.step, noise[i].s)) rc = score_exam(s, x, b, &m, noise[i].s, to);
    }
    for (int i = 0; i < to->n; i++) to->score[i].score.treatment_trained = a->treatment.hash;
    for (int i = 0; i < SCORES_MAX; i++) str_release(&noise[i]);
    return rc;
}

/* The learner's note of a scored step: 1 read, 0 not there yet, -1. */
static int read_mark(struct stage *s, int64_t step, struct rec *mark) {
    const struct eval_conf *c = s->conf;
    char path[FS_PATH_MAX];
    struct str text;
    snprintf(path, sizeof path, "%s/adapters/at-%06lld.json", c->shared.run.dir, (long long)step);
    if (!fs_exists(path)) return 0;
    str_init(&text);
    int rc = fs_read(&text, path, 1 << 20, &s->err);
    if (rc == 0) rc = rec_from_json(mark, text.s, text.len, REC_ADAPTER, path, &s->err);
    str_release(&text);
    return rc < 0 ? -1 : 1;
}

/* 1 scored (or had its scores), 0 the learner is not there yet, 2 asked to stop, -1. */
static int score_step(struct stage *s, struct examiner *x, struct book *b, int64_t step) {
    struct step_scores made = { 0 };
    struct rec mark;
    int rc = read_mark(s, step, &mark);
    if (rc <= 0) return rc;
    rc = score_missing(s, x, b, &mark.adapter, &made);
    if (rc == 0 && made.n) {
        rc = book_keep_scores(b, made.score, made.n, &s->err);
        for (int i = 0; rc == 0 && i < made.n; i++) rc = tell_score(s, &made.score[i], NULL);
        if (rc == 0) rc = book_write_samples(b, &s->err);
    }
    for (int i = 0; i < made.n; i++) free(made.evidence[i]);
    rec_release(&mark);
    return rc < 0 ? -1 : rc == 1 ? 2 : 1;
}

int score_run(struct stage *s, struct examiner *x, struct book *b) {
    const struct shared *c = s->conf;
    /* a kill may have come between a score and its samples */
    if (book_write_samples(b, &s->err) < 0) return -1;
    for (int64_t step = 0; step <= c->run.steps;) {
        int rc = stage_stopping(s) ? 2 : score_step(s, x, b, step);
        if (rc < 0 || rc == 2) return rc < 0 ? -1 : 1;
        if (rc == 1) {
            s->step = step;
            for (step++; step <= c->run.steps && !shared_is_scored(c, step);) step++;
            continue;
        }
        struct rec bell;                             /* only wakes us: the file is the truth */
        s->waits_for = "adapter";
        stage_beat(s, "wait", NULL);
        if (link_recv(s->link[PORT_ADAPTER], &bell, NULL, 200, &s->err) == LINK_RECORD)
            rec_release(&bell);
        s->waits_for = "";
    }
    return 0;
}
