/* main.c - qerl-eval: scores policies on the test questions, or kept answers without any policy.
 *
 * Three ways to work, chosen by what is given: eval.answers (score a file again), the adapter port
 * (score every announced step of a run until the last), or neither (score one adapter folder, or
 * the base model, once).
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/ranks.h"
#include "lib/stage/aqn.h"
#include "lib/stage/effect.h"
#include "lib/stage/rank.h"
#include "stages/eval/score.h"

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
    { "eval.ranks", KEY_INT, AT(ranks), "0", 0, RANKS_MAX, NULL,
      "processes that share the questions of a score, each with its part of the cores or its GPU; "
      "0 = one for each GPU of the stage, on cores 1" },
    { "eval.rows", KEY_INT, AT(rows), "32", 1, 4096, NULL,
      "answers decoded together, in each rank" },
    { "eval.also_noisy", KEY_BOOL, AT(also_noisy), "no", 0, 0, NULL,
      "a second, noisy score at each scored step: operators, modules and AQN of that step" },
    { "eval.noise", KEY_CHOICE, AT(noise), "clean", 0, 0, "clean|trained",
      "a single score: clean, or under the noise that the adapter was trained with" },
    { "eval.device_seed", KEY_INT, AT(device_seed), "-1", -1, 9e18, NULL,
      "a single score: seed of the device, whose fixed bias noise.ops.type = systematic is; -1 = "
      "run.seed" },
    { "eval.keep", KEY_TEXT, AT(keep), "", 0, 0, NULL,
      "a single score: folder that gets its answers (answers.tape) and itself (score.json)" },
    { "eval.shown", KEY_INT, AT(shown), "5", 0, 1000, NULL, "questions shown in samples.md" },
    { 0 },
};
static const struct stage_key *const tables[] = { SHARED_POLICY_KEYS, shared_graphs_keys, keys,
                                                 NULL };
static const struct stage_port ports[] = {
    { "adapter", false, REC_ADAPTER, LINK_KIND_SUB, false, false,
      "doorbell of the learner; the files under run.dir are the truth" },
    { "score", true, REC_SCORE, LINK_KIND_PUSH, false, false,
      "scores as records, besides scores.jsonl" },
    { 0 },
};

static bool greedy(const void *conf) {
    return ((const struct eval_conf *)conf)->temperature <= 0;
}
/* Noise is drawn by sample too, so even greedy answers then differ. */
static bool equal_answers(const void *conf) {
    const struct eval_conf *c = conf;
    const struct shared *s = &c->shared;
    const bool asked = c->also_noisy || c->noise == EVAL_NOISE_TRAINED;
    return greedy(conf) && !(s->ops.type && (asked || s->ops.eval)) &&
           !(s->modules.type && (asked || s->modules.eval));
}
static bool scores_kept_answers(const void *conf) {
    return *((const struct eval_conf *)conf)->answers;
}
static bool without_policy_or_noise(const void *conf) {
    const struct eval_conf *c = conf;
    const struct shared *s = &c->shared;
    return *c->answers || (!s->ops.type && !s->modules.type && s->aqn.sigma_start <= 0 &&
                           s->aqn.sigma_end <= 0);
}
/* In a run the learner says which adapters are scored, every score is kept, and the device is the
 * one that it trains on. */
static bool in_run(const void *conf) {
    return stage_linked(PORT_ADAPTER) && !scores_kept_answers(conf);
}
static const char single[] = "it is of a single score, and this evaluator's adapter port is linked "
                             "to a run; unset it (eval.also_noisy asks for a second, noisy score)";
static const struct effect_rule rules[] = {
    { "eval.adapter", in_run, single },
    { "eval.keep", in_run, single },
    { "eval.noise", in_run, single },
    { "eval.device_seed", in_run, "a run is scored on the device that it trains on; unset it" },
    { "eval.adapter", scores_kept_answers,
      "eval.answers are scored as they are, without a model; unset one of the two" },
    { "eval.ranks", scores_kept_answers,
      "eval.answers are scored as they are, without a model; unset one of the two" },
    { "eval.keep", scores_kept_answers,
      "eval.answers are kept already; unset one of the two" },
    { "eval.noise", without_policy_or_noise,
      "there is no noise that an answer could be made under; unset it, or say which noise" },
    { "eval.top_k", greedy, "with eval.temperature = 0 answers are greedy; unset it" },
    { "eval.top_p", greedy, "with eval.temperature = 0 answers are greedy; unset it" },
    { "eval.samples", equal_answers,
      "with eval.temperature = 0 all answers to a question are the same; give eval.temperature, "
      "or unset it" },
    { 0 },
};

static int check(void *conf, struct err *e) {
    struct eval_conf *c = conf;
    const struct shared *s = &c->shared;
    int rc = effect_check_shared(s, e);
    if (effect_check(c, tables, rules, e) < 0 || aqn_check(s, e) < 0) rc = -1;
    if (c->ranks == 0) c->ranks = rank_default(s);
    if (rank_check(s, "eval.ranks", c->ranks, e) < 0) rc = -1;
    const bool ops = s->ops.type && s->ops.direction != SHARED_DIRECTION_BACKWARD,
               modules = s->modules.type;
    if (c->also_noisy && !ops && !modules && s->aqn.sigma_start <= 0 && s->aqn.sigma_end <= 0)
        rc = err_more(e, EXIT_CONFIG,
                      "eval.also_noisy = yes, but there is no noise that acts in a score%s: the "
                      "second would be as clean as the first",
                      s->ops.type ? " (noise.ops.direction = backward)" : "");
    if (c->also_noisy && ((s->ops.type && s->ops.eval) || (modules && s->modules.eval)))
        rc = err_more(e, EXIT_CONFIG,
                      "eval.also_noisy = yes and noise in every score (noise.ops.eval, "
                      "noise.modules.eval): there would be no clean one; set one of the two");
    return rc;
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
    json_object_set_new(out, "ranks", json_integer((json_int_t)c->ranks));
    json_object_set_new(out, "rank_cores", json_integer(rank_cores(&c->shared, (int)c->ranks)));
    json_t *notes = json_array();
    rank_note(notes, &c->shared, "eval.ranks", c->ranks);
    json_object_set_new(out, "notes", notes);
    const int known = policy_plan(out, &c->shared, c->also_noisy || c->noise == EVAL_NOISE_TRAINED,
                                  &shape, &m, e);
    shared_plan_file(files, c->shared.data.test, "test", "tools/fetch gsm8k");
    if (known <= 0) return known;
    struct gen_opts o = examiner_gen_opts(c, &shape);
    const enum model_quant q = (enum model_quant)c->shared.quant.weights;
    const bool noisy = c->also_noisy || c->noise == EVAL_NOISE_TRAINED;
    const size_t noise = (noisy ? aqn_bytes(&c->shared, &m) : 0) +
                         treatment_bytes(&c->shared, &m, noisy, NOISE_PHASE_EVAL,
                                         NOISE_PHASE_EVAL);
    return policy_plan_memory(out, &c->shared, &m, gen_plan(&m, q, &o) + noise,
                              gen_plan_pages(&m, q, &o), e);
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
    if (s.rank) rc = examiner_serve(x);
    else if (!s.link[PORT_ADAPTER]) rc = score_once(&s, x);
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
