/* main.c - qerl-eval: scores policies on the test questions, or kept answers without any policy.
 *
 * Three ways to work, chosen by what is given: eval.answers (score a file again), the adapter port
 * (score every announced step of a run until the last), or neither (score one adapter folder, or
 * the base model, once).
 * SPDX-License-Identifier: Apache-2.0 */
#include <dirent.h>

#include "lib/base/fs.h"
#include "lib/base/log.h"
#include "stages/eval/book.h"
#include "stages/eval/examiner.h"

#define AT(field) offsetof(struct eval_conf, field)
static const struct stage_key keys[] = {
    { "eval.adapter", KEY_TEXT, AT(adapter), "", 0, 0, NULL,
      "adapter folder to score once; empty = the base model" },
    { "eval.answers", KEY_TEXT, AT(answers), "", 0, 0, NULL,
      "tape or .jsonl of kept answers to score again without a model" },
    { "eval.rule", KEY_CHOICE, AT(rule), "strict", 0, 0, "strict|flexible|lm-strict|lm-flexible",
      "rule of the score" },
    { "eval.split", KEY_TEXT, AT(split), "test", 0, 0, NULL,
      "name of the split in scores and question ids" },
    { "eval.questions", KEY_INT, AT(questions), "0", 0, 1e7, NULL,
      "first questions only; 0 = all" },
    { "eval.samples", KEY_INT, AT(samples), "1", 1, 256, NULL, "answers per question" },
    { "eval.temperature", KEY_NUM, AT(temperature), "0", 0, 100, NULL, "0 = greedy" },
    { "eval.top_k", KEY_INT, AT(top_k), "0", 0, 1 << 20, NULL, "0 = off" },
    { "eval.top_p", KEY_NUM, AT(top_p), "1", 1e-6, 1, NULL, "1 = off" },
    { "eval.new_max", KEY_INT, AT(new_max), "0", 0, 1 << 20, NULL,
      "tokens of an answer at most; 0 = sample.new_max" },
    { "eval.rows", KEY_INT, AT(rows), "32", 1, 4096, NULL, "answers decoded together" },
    { "eval.also_noisy", KEY_BOOL, AT(also_noisy), "no", 0, 0, NULL,
      "a second, noisy score at each scored step: operators, modules and AQN of that step" },
    { "eval.noise", KEY_CHOICE, AT(noise), "clean", 0, 0, "clean|trained",
      "a single score: clean, or under the noise that the adapter was trained with" },
    { "eval.shown", KEY_INT, AT(shown), "5", 0, 1000, NULL, "questions shown in samples.md" },
    { 0 },
};
static const struct stage_key *const tables[] = { SHARED_POLICY_KEYS, keys, NULL };
static const struct stage_port ports[] = {
    { "adapter", false, REC_ADAPTER, LINK_KIND_SUB, false, false,
      "doorbell of the learner; the files under run.dir are the truth" },
    { "score", true, REC_SCORE, LINK_KIND_PUSH, false, false,
      "scores as records, besides scores.jsonl" },
    { 0 },
};

static int check(void *conf, struct err *e) {
    static const char *const later[] = { "eval.also_noisy", "eval.noise", NULL };
    int rc = shared_check(conf, e);
    return shared_refuse(conf, keys, later, e) < 0 ? -1 : rc;
}

static int plan(const void *conf, json_t *out, struct err *e) {
    const struct eval_conf *c = conf;
    struct lora_shape shape;
    struct model_conf m;
    json_t *files = json_array();
    json_object_set_new(out, "files", files);
    if (*c->answers) {
        shared_plan_file(files, c->answers, "answers",
                         "run a pipeline first, then --set eval.answers=RUN/tape/answers.tape");
        return 0;
    }
    const int known = policy_plan(out, &c->shared, c->also_noisy, &shape, &m, e);
    shared_plan_file(files, c->shared.data.test, "test", "tools/fetch gsm8k");
    if (known <= 0) return known;
    struct gen_opts o = examiner_gen_opts(c, &shape);
    const enum model_quant q = (enum model_quant)c->shared.quant.weights;
    return policy_plan_memory(out, &c->shared, &m, gen_plan(&m, q, &o), gen_plan_pages(&m, q, &o),
                              e);
}

static const struct stage_about about = {
    .name = "eval",
    .summary = "scores a model on test questions with n and a 95 % interval; scores kept answers "
               "again without a model",
    .examples = "  qerl-eval --set model.path=models/tiny --set data.test=models/tiny/test.jsonl "
                "--set eval.questions=100\n"
                "  qerl-eval --set model.path=models/tiny --set "
                "eval.adapter=runs/quickstart-0001/adapters/v000030 \\\n"
                "      --set data.test=models/tiny/test.jsonl\n"
                "  qerl-eval --set eval.answers=runs/quickstart-0001/tape/answers.tape --set "
                "eval.rule=flexible\n",
    .keys = tables,
    .ports = ports,
    .conf_bytes = sizeof(struct eval_conf),
    .check = check,
    .plan = plan,
};

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

static int score_again(struct stage *s) {
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

static int score_once(struct stage *s, struct examiner *x) {
    const struct eval_conf *c = s->conf;
    struct rec *answer, score;
    int64_t n;
    if (*c->adapter && !fs_is_dir(c->adapter))
        return err_code(
            &s->err, EXIT_ENV,
            "there is no adapter folder '%s': eval.adapter names one like RUN/adapters/v000040",
            c->adapter);
    char folder[FS_PATH_MAX], who[FS_PATH_MAX] = "base model";
    snprintf(folder, sizeof folder, "%.1000s", c->adapter);
    for (size_t end = strlen(folder); end > 1 && folder[end - 1] == '/'; end--) folder[end - 1] = 0;
    const char *name = strrchr(folder, '/') ? strrchr(folder, '/') + 1 : folder;
    struct rec mark;
    int64_t version = 0;
    bool numbered = name[0] == 'v' && str_to_i64(name + 1 + strspn(name + 1, "0"), &version);
    bool marked = numbered && find_mark(folder, version, &mark);
    int64_t step = marked ? mark.adapter.step : 0;
    if (*name)
        snprintf(who, sizeof who, marked ? "adapter %.200s of step %lld" : "adapter %.200s", name,
                 (long long)step);
    int rc = examiner_ask(x, c->adapter, marked ? mark.adapter.sha256 : "", version, step, &answer,
                          &n);
    if (rc != 0) {
        if (marked) rec_release(&mark);
        return rc < 0 ? -1 : 0;
    }
    struct tally_set set = { 0 };
    for (int64_t i = 0; i < n; i++) {
        tally_add(&set, &answer[i].answer, (enum task_rule)c->rule);
        rec_release(&answer[i]);
    }
    free(answer);
    tally_score(&score, &set.t[0], (enum task_rule)c->rule);
    examiner_label(x, &score.score);
    if (marked) score.score.treatment_trained = mark.adapter.treatment.hash;
    rc = tell_score(s, &score, who);
    tally_release(&set);
    if (marked) rec_release(&mark);
    return rc;
}

/* 1 scored (or had its score), 0 the learner is not there yet, 2 asked to stop, -1. */
static int score_step(struct stage *s, struct examiner *x, struct book *b, int64_t step) {
    const struct eval_conf *c = s->conf;
    char path[FS_PATH_MAX];
    struct rec mark, score, *answer;
    struct str text;
    int64_t n;
    int rc;
    if (book_has_score(b, step)) return 1;
    snprintf(path, sizeof path, "%s/adapters/at-%06lld.json", c->shared.run.dir, (long long)step);
    if (!fs_exists(path)) return 0;
    str_init(&text);
    rc = fs_read(&text, path, 1 << 20, &s->err);
    if (rc == 0) rc = rec_from_json(&mark, text.s, text.len, REC_ADAPTER, path, &s->err);
    str_release(&text);
    if (rc < 0) return -1;
    if (!book_answers(b, step)) {
        rc = examiner_ask(x, mark.adapter.path, mark.adapter.sha256, mark.adapter.version, step,
                          &answer, &n);
        if (rc == 0) {
            rc = book_keep_answers(b, answer, n, &s->err);
            for (int64_t i = 0; i < n; i++) rec_release(&answer[i]);
            free(answer);
        }
    }
    if (rc == 0) {
        tally_score(&score, book_answers(b, step), (enum task_rule)c->rule);
        examiner_label(x, &score.score);
        score.score.adapter_sha256 = mark.adapter.sha256;
        score.score.treatment_trained = mark.adapter.treatment.hash;
        rc = book_keep_score(b, &score, &s->err);
        if (rc == 0) rc = tell_score(s, &score, NULL);
        if (rc == 0) rc = book_write_samples(b, &s->err);
    }
    rec_release(&mark);
    return rc < 0 ? -1 : rc == 1 ? 2 : 1;
}

static int score_run(struct stage *s, struct examiner *x, struct book *b) {
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

int main(int argc, char **argv) {
    struct stage s;
    stage_open(&s, argc, argv, &about);
    const struct eval_conf *c = s.conf;
    int rc;
    if (*c->answers) {
        stage_ready(&s);
        if (score_again(&s) < 0) stage_die(&s, EXIT_FAILED);
        return stage_close(&s, EXIT_DONE);
    }
    struct examiner *x = examiner_create(&s);
    if (!x) stage_die(&s, EXIT_ENV);
    stage_ready(&s);
    if (!s.link[PORT_ADAPTER]) rc = score_once(&s, x);
    else {
        struct book *b;
        if (book_open(&b, c, examiner_answers(x), &s.err) < 0) stage_die(&s, EXIT_FAILED);
        rc = score_run(&s, x, b);
        book_close(&b);
    }
    if (rc < 0) stage_die(&s, EXIT_FAILED);
    examiner_destroy(&x);
    return stage_close(&s, rc == 0 ? EXIT_DONE : EXIT_FAILED);
}
