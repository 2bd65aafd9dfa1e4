/* main.c - qerl-reward: scores answers. Keeps no state: it may be replicated, killed or fed from a
 * file at will.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/log.h"
#include "lib/base/stat.h"
#include "lib/stage/effect.h"
#include "lib/stage/shared.h"
#include "lib/task/task.h"
#include "stages/reward/score.h"

struct conf {
    struct shared shared;
    struct score_conf score;
};
enum port { PORT_TRAJ, PORT_GROUP };

static const struct stage_key keys[] = {
    { "reward.rule", KEY_CHOICE, offsetof(struct conf, score.rule), "strict", 0, 0,
      "strict|flexible|lm-strict|lm-flexible", "rule that decides whether an answer is right" },
    { "reward.format", KEY_NUM, offsetof(struct conf, score.format), "0", 0, 100, NULL,
      "reward for ending with \"#### number\", right or wrong; 0 = off" },
    { "reward.overlong_buffer", KEY_INT, offsetof(struct conf, score.overlong_buffer), "0", 0,
      1 << 20, NULL, "last tokens before sample.new_max over which the penalty grows; 0 = off" },
    { "reward.overlong_factor", KEY_NUM, offsetof(struct conf, score.overlong_factor), "1", 0, 100,
      NULL, "penalty at sample.new_max" },
    { 0 },
};
static const struct stage_key *const tables[] = { shared_sample_keys, keys, NULL };
static const struct stage_port ports[] = {
    { "traj", false, REC_NONE, LINK_KIND_PULL, true, true,
      "groups to score (traj), or answers of a score (answer)" },
    { "group", true, REC_NONE, LINK_KIND_PUSH, false, true, "the same with scores" },
    { 0 },
};
static bool no_buffer(const void *conf) {
    return ((const struct conf *)conf)->score.overlong_buffer == 0;
}
static bool no_penalty(const void *conf) {
    return ((const struct conf *)conf)->score.overlong_factor <= 0;
}
static const struct effect_rule rules[] = {
    { "reward.overlong_factor", no_buffer,
      "the penalty grows over reward.overlong_buffer = 0 tokens; set that above 0, or unset it" },
    { "reward.overlong_buffer", no_penalty,
      "reward.overlong_factor is 0, so nothing grows over it; set that above 0, or unset it" },
    { 0 },
};

static int check(void *conf, struct err *e) {
    const struct conf *c = conf;
    const int rc = effect_check(c, tables, rules, e);
    if (c->score.overlong_buffer <= c->shared.sample.new_max) return rc;
    return err_more(
        e, EXIT_CONFIG,
        "reward.overlong_buffer = %lld is longer than sample.new_max = %lld: every answer would be "
        "penalised",
        (long long)c->score.overlong_buffer, (long long)c->shared.sample.new_max);
}

static const struct stage_about about = {
    .name = "reward",
    .summary = "scores generated answers by GSM8K's rules; keeps no state",
    .examples = "  qerl-reward < traj.jsonl > group.jsonl\n"
                "  qerl-reward --set reward.rule=flexible --in "
                "traj=tape:runs/quickstart-0001/tape/answers.tape --out group=-\n",
    .keys = tables,
    .ports = ports,
    .conf_bytes = sizeof(struct conf), .check = check,
};

/* Offline, what the scores of a file of answers come to: a line for each scored step, for questions
 * repeat from step to step. */
struct count { char *run; int64_t step, version, n, right; };
struct counts { struct count *row; int rows; };

static void count_answer(struct counts *c, const struct rec_answer *a, bool right) {
    struct count *r = NULL;
    for (int i = 0; i < c->rows && !r; i++)
        if (c->row[i].step == a->step && c->row[i].version == a->version &&
            strcmp(c->row[i].run, a->run) == 0)
            r = &c->row[i];
    if (!r) {
        c->row = mem_grow(c->row, (size_t)(c->rows + 1) * sizeof *c->row);
        r = &c->row[c->rows++];
        *r = (struct count){ .run = mem_dup(a->run), .step = a->step, .version = a->version };
    }
    r->n++;
    r->right += right;
}

static void say_counts(struct counts *c, int rule) {
    for (int i = 0; i < c->rows; i++) {
        const struct count *r = &c->row[i];
        double low, high;
        stat_interval(r->right, r->n, &low, &high);
        log_info("run %s step %lld: %lld of %lld right under rule %s: %.2f %% [%.2f, %.2f]", r->run,
                 (long long)r->step, (long long)r->right, (long long)r->n, task_rule_name[rule],
                 100. * (double)r->right / (double)r->n, 100 * low, 100 * high);
        free(r->run);
    }
    free(c->row);
}

int main(int argc, char **argv) {
    struct stage s;
    stage_open(&s, argc, argv, &about);
    const struct conf *c = s.conf;
    struct counts counts = { 0 };
    stage_ready(&s);
    while (!stage_stopping(&s)) {
        struct rec r;
        s.waits_for = "traj";
        stage_beat(&s, "wait", NULL);
        int got = link_recv(s.link[PORT_TRAJ], &r, NULL, 500, &s.err);
        if (got < 0) stage_die(&s, EXIT_FAILED);
        if (got == LINK_END) break;
        if (got == LINK_EMPTY) continue;
        s.waits_for = "";
        if (r.type == REC_ANSWER)
            count_answer(&counts, &r.answer, score_answer(&r.answer, &c->score));
        else if (r.type == REC_TRAJ || r.type == REC_GROUP) score_group(&r, &c->score);
        else {
            err_set(&s.err,
                    "port 'traj': a record '%s' cannot be scored, only traj, group and answer",
                    rec_name[r.type]);
            stage_die(&s, EXIT_FAILED);
        }
        int sent;
        while ((sent = link_send(s.link[PORT_GROUP], &r, NULL, 500, &s.err)) == 1 &&
               !stage_stopping(&s)) {
            s.waits_for = "group";
            stage_beat(&s, "wait", NULL);
        }
        rec_release(&r);
        if (sent < 0) stage_die(&s, EXIT_FAILED);
        s.progress++;
    }
    say_counts(&counts, c->score.rule);
    return stage_close(&s, EXIT_DONE);
}
