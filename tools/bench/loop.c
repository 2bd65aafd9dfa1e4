/* loop.c - the real pipeline, and what its stages take alone.
 *
 * A short run of four processes gives seconds a step (metrics.jsonl). Then the learner alone trains
 * on the run's journal, and a rollout alone makes the run's tickets again, with the same adapters
 * and noise. turns = the run's step / (rollout alone + learner alone): what taking turns costs. The
 * first step is left out everywhere: it pays for starting.
 * Order: the run, alone, parts.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tools/bench/bench.h"

#include <unistd.h>

#include "lib/base/clock.h"
#include "lib/base/fs.h"
#include "lib/wire/tape.h"
#include "tools/bench/child.h"

enum { STEPS_MAX = 12, PATH_ROOM = 1200 };

struct loop {
    struct bench *b;
    const char *pipe;                    /* pipelines/NAME */
    const char *set[24];                 /* settings beside the common ones */
    int sets, steps;
    char dir[64], run[96], log[96];
    double step[STEPS_MAX], tokens;      /* of the run: seconds; tokens of an answer */
    double learner[STEPS_MAX];           /* alone, of each step */
    double rollout;                      /* alone, of steps 2 .. */
};

/* ---- the run ---- */

/* Seconds of each step of a run, and of its waiting for groups; tokens of an answer in the mean. */
static int read_metrics(const char *run, int steps, double *step, double *gather, double *tokens,
                        struct err *e) {
    char path[PATH_ROOM];
    struct str text;
    str_init(&text);
    snprintf(path, sizeof path, "%s/metrics.jsonl", run);
    int rc = fs_read(&text, path, 64 << 20, e), n = 0;
    for (char *at = text.s; rc == 0 && at && *at && n < steps; n++) {
        char *end = strchr(at, '\n');
        json_t *o = json_parse(at, end ? (size_t)(end - at) : strlen(at), path, e);
        if (!o || json_need_num(o, "timing_s/step", &step[n], path, e) < 0 ||
            json_need_num(o, "timing_s/gen", &gather[n], path, e) < 0)
            rc = -1;
        double mean = 0;
        if (rc == 0 && json_may_num(o, "response_length/mean", &mean, path, e) < 0) rc = -1;
        *tokens += mean / steps;
        json_decref(o);
        at = end ? end + 1 : NULL;
    }
    if (rc == 0 && n != steps)
        rc = err_set(e, "'%s' has %d lines instead of %d", path, n, steps);
    str_release(&text);
    return rc;
}

static int run_pipeline(struct loop *l, struct err *e) {
    struct bench *b = l->b;
    char program[PATH_ROOM], file[PATH_ROOM], runs[96], steps[32], threads[32], kernels[64];
    char stages[40];
    double gather[STEPS_MAX];
    struct child_args a = { 0 };
    snprintf(program, sizeof program, "%s/qerl-pipe", b->bin);
    snprintf(file, sizeof file, "%s/pipelines/%s", b->root, l->pipe);
    snprintf(runs, sizeof runs, "run.runs_dir=%s", l->dir);
    snprintf(steps, sizeof steps, "run.steps=%d", l->steps);
    snprintf(stages, sizeof stages, "noise.aqn.stages=%d", l->steps);
    snprintf(threads, sizeof threads, "run.threads=%d", b->threads);
    snprintf(kernels, sizeof kernels, "run.kernels=%s", b->kern.name);
    /* every step is scored, on one question, because adapters of scored steps are kept */
    const char *const common[] = { runs, steps, stages, threads, kernels, "run.name=bench",
                                   "run.score_every=1", "filter.metric=off",
                                   "eval.questions=1" };
    child_arg(&a, program);
    child_arg(&a, file);
    for (size_t i = 0; i < COUNT_OF(common); i++)
        child_arg(&a, "--set"), child_arg(&a, common[i]);
    for (int i = 0; i < l->sets; i++) child_arg(&a, "--set"), child_arg(&a, l->set[i]);
    snprintf(l->run, sizeof l->run, "%s/bench-0001", l->dir);
    if (child_run(&a, l->log, e) < 0) return -1;
    return read_metrics(l->run, l->steps, l->step, gather, &l->tokens, e);
}

/* ---- alone ---- */

static int learner_alone(struct loop *l, struct err *e) {
    char program[PATH_ROOM], conf[128], tape[128], dir[96], set[128];
    double gather[STEPS_MAX];
    struct child_args a = { 0 };
    snprintf(program, sizeof program, "%s/qerl-learner", l->b->bin);
    snprintf(conf, sizeof conf, "%s/conf/learner.conf", l->run);
    snprintf(tape, sizeof tape, "group=tape:%s/tape/groups.tape", l->run);
    snprintf(dir, sizeof dir, "%s/alone", l->dir);
    snprintf(set, sizeof set, "run.dir=%s", dir);
    const char *const v[] = { program, "-c", conf, "--in", tape, "--set", set };
    for (size_t i = 0; i < COUNT_OF(v); i++) child_arg(&a, v[i]);
    double tokens = 0;
    if (child_run(&a, l->log, e) < 0 ||
        read_metrics(dir, l->steps, l->learner, gather, &tokens, e) < 0)
        return -1;
    for (int i = 0; i < l->steps; i++) l->learner[i] -= gather[i];
    return 0;
}

/* The ticket that asked for a group, as a line of JSON. */
static void ticket_of(const struct loop *l, const struct rec_group *g, struct str *out) {
    char adapter[160] = "";
    struct rec t;
    rec_init(&t, REC_TICKET);
    if (g->adapter_sha256 && *g->adapter_sha256)
        snprintf(adapter, sizeof adapter, "%s/adapters/v%06lld", l->run, (long long)g->version);
    t.ticket = (struct rec_ticket){
        .run = g->run, .fence = g->fence, .step = g->step, .group = g->group,
        .question_id = g->question_id, .prompt = g->prompt, .prompt_ids = g->prompt_ids,
        .question = g->question, .answer = g->answer, .samples = g->samples,
        .new_max = g->new_max, .temperature = g->temperature, .top_p = g->top_p,
        .top_k = g->top_k, .seed = g->seed, .version = g->version, .adapter = adapter,
        .adapter_sha256 = g->adapter_sha256, .treatment = g->treatment
    };
    rec_to_json(out, &t);
}

/* Writes the run's tickets; *first = groups of the first step. */
static int write_tickets(struct loop *l, const char *path, int *first, int *all, struct err *e) {
    char from[128];
    struct tape *tape;
    struct str lines;
    struct rec r;
    int rc;
    snprintf(from, sizeof from, "%s/tape/groups.tape", l->run);
    if (tape_read_open(&tape, from, e) < 0) return -1;
    str_init(&lines);
    *first = *all = 0;
    while ((rc = tape_read(tape, &r, e)) == 1) {
        if (r.type == REC_GROUP) {
            ticket_of(l, &r.group, &lines);
            *first += r.group.step == 0;
            ++*all;
        }
        rec_release(&r);
    }
    tape_close(&tape);
    if (rc == 0) rc = fs_replace(path, lines.s ? lines.s : "", lines.len, e);
    str_release(&lines);
    return rc;
}

/* Seconds from the line that ends the first step to the last line. */
static double time_lines(int fd, int first, int all) {
    char part[1 << 16];
    double begun = 0, now = 0;
    int lines = 0;
    for (ssize_t n; (n = read(fd, part, sizeof part)) > 0;) {
        now = clock_seconds();
        for (ssize_t i = 0; i < n; i++)
            if (part[i] == '\n' && ++lines == first) begun = now;
    }
    return lines == all ? now - begun : -1;
}

static int rollout_alone(struct loop *l, struct err *e) {
    char program[PATH_ROOM], conf[128], tickets[96], in[128];
    struct child_args a = { 0 };
    int first, all, out, pid;
    snprintf(program, sizeof program, "%s/qerl-rollout", l->b->bin);
    snprintf(conf, sizeof conf, "%s/conf/rollout.conf", l->run);
    snprintf(tickets, sizeof tickets, "%s/tickets.jsonl", l->dir);
    snprintf(in, sizeof in, "ticket=file:%s", tickets);
    if (write_tickets(l, tickets, &first, &all, e) < 0) return -1;
    const char *const v[] = { program, "-c", conf, "--in", in, "--out", "traj=-" };
    for (size_t i = 0; i < COUNT_OF(v); i++) child_arg(&a, v[i]);
    if (child_start(&a, l->log, &out, &pid, e) < 0) return -1;
    l->rollout = time_lines(out, first, all);
    close(out);
    if (child_wait(pid, "qerl-rollout", l->log, e) < 0) return -1;
    return l->rollout < 0 ? err_set(e, "the rollout did not answer every ticket") : 0;
}

/* ---- parts ---- */

static void show(const struct loop *l, const char *step_key, const char *turns_key) {
    char what[128];
    double alone = l->rollout, together = 0, step[STEPS_MAX];
    const int n = l->steps - 1;
    for (int i = 1; i < l->steps; i++) {
        alone += l->learner[i];
        together += step[i - 1] = l->step[i];
    }
    double ratio = together / alone;
    if (turns_key && bench_wants(l->b, turns_key)) {
        snprintf(what, sizeof what, "step %.3f s; rollout alone %.3f, learner alone %.3f",
                 together / n, l->rollout / n, (alone - l->rollout) / n);
        bench_report(l->b, turns_key, &(struct figure){ .unit = "x", .what = what,
                                                        .s = { ratio, ratio, ratio, 1 } });
    }
    if (step_key && bench_wants(l->b, step_key)) {
        snprintf(what, sizeof what, "2 x 8 answers of %.0f tokens in the mean", l->tokens);
        bench_report(l->b, step_key, &(struct figure){ .unit = "s", .what = what,
                                                       .s = spread_of(step, n) });
    }
}

static int loop_run(struct loop *l, const char *step_key, const char *turns_key, struct err *e) {
    bool wanted = (step_key && bench_wants(l->b, step_key)) || bench_wants(l->b, turns_key);
    if (!wanted) return 0;
    memcpy(l->dir, "/tmp/qerl-bench.XXXXXX", sizeof "/tmp/qerl-bench.XXXXXX");
    if (!mkdtemp(l->dir)) return err_code(e, EXIT_ENV, "cannot make a folder in /tmp");
    snprintf(l->log, sizeof l->log, "%s/log", l->dir);
    int rc = run_pipeline(l, e) < 0 || learner_alone(l, e) < 0 || rollout_alone(l, e) < 0 ? -1 : 0;
    if (rc == 0) show(l, step_key, turns_key);
    fs_remove_tree(l->dir, NULL);
    return rc;
}

int part_turns(struct bench *b, struct err *e) {
    char model[PATH_ROOM], train[PATH_ROOM], test[PATH_ROOM], packed[PATH_ROOM];
    struct loop l = { .b = b, .pipe = "quickstart.pipe", .steps = b->quick ? 3 : 7 };
    snprintf(model, sizeof model, "model.path=%s/models/tiny", b->root);
    snprintf(train, sizeof train, "data.train=%s/models/tiny/train.jsonl", b->root);
    snprintf(test, sizeof test, "data.test=%s/models/tiny/test.jsonl", b->root);
    snprintf(packed, sizeof packed, "model.packed_dir=%s/models/.packed", b->root);
    const char *const set[] = { model, train, test, packed };
    for (size_t i = 0; i < COUNT_OF(set); i++) l.set[l.sets++] = set[i];
    return loop_run(&l, NULL, "turns/tiny", e);
}

int part_pipeline(struct bench *b, struct err *e) {
    static const char step_key[] = "dapo/pipeline", turns_key[] = "turns/smollm2-135m";
    char model[PATH_ROOM], train[PATH_ROOM], test[PATH_ROOM], packed[PATH_ROOM];
    struct loop l = { .b = b, .pipe = "e6b_qerl.pipe", .steps = b->quick ? 3 : 4 };
    if (!bench_wants(b, step_key) && !bench_wants(b, turns_key)) return 0;
    snprintf(model, sizeof model, "%s/models/smollm2-135m-instruct", b->root);
    if (!b->data || !fs_exists(model)) {
        const char *why = b->data ? "not fetched: tools/fetch smollm2-135m-instruct"
                                  : "no questions: --data FILE names GSM8K's train.jsonl";
        if (bench_wants(b, step_key)) bench_absent(b, step_key, why);
        if (bench_wants(b, turns_key)) bench_absent(b, turns_key, why);
        return 0;
    }
    snprintf(model, sizeof model, "model.path=%s/models/smollm2-135m-instruct", b->root);
    snprintf(train, sizeof train, "data.train=%s", b->data);
    snprintf(test, sizeof test, "data.test=%s", b->data);
    snprintf(packed, sizeof packed, "model.packed_dir=%s/models/.packed", b->root);
    const char *const set[] = { model, train, test, packed, "sample.new_max=200",
                                "reward.overlong_buffer=64", "learner.batch=2",
                                "data.prompt_max=512" };
    for (size_t i = 0; i < COUNT_OF(set); i++) l.set[l.sets++] = set[i];
    return loop_run(&l, step_key, turns_key, e);
}
