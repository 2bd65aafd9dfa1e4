/* selftest.c - the gradient test at the learner's start: passes on the embedded model in every format and on whatever
 * questions, finds each planted mistake.
 * SPDX-License-Identifier: Apache-2.0 */
#include "stages/learner/selftest.h"

#include <criterion/criterion.h>
#include <math.h>

#include "lib/base/log.h"

static struct policy policy;
static struct task_set questions;
static struct shared conf;

static void open_policy(int weights, int activations, int adapter) {
    static char tiny[] = "models/tiny", none[] = "", all[] = "all", norms[] = "norms",
                projections[] = "q,k,v,o,gate,up,down";
    struct err e = { 0 };
    struct shared c = { .run.threads = 1, .run.steps = 10, .model.path = tiny };
    if (!questions.n) cr_assert(task_load(&questions, "models/tiny/train.jsonl", "train", 0, &e) == 0, "%s", e.text);
    log_open("test", LOG_LEVEL_ERROR);
    c.model.packed_dir = c.model.chat = c.quant.exclude = none;
    c.ops.ops = c.ops.layers = c.modules.layers = all;
    c.modules.targets = c.modules.exclude = none;
    c.aqn.targets = norms;
    c.aqn.exclude = c.aqn.layers = c.aqn.zone_edge = c.aqn.zone_middle = none;
    c.aqn.others = 1;
    c.quant.weights = weights;
    c.quant.activations = activations;
    c.quant.adapter = adapter;
    c.lora.rank = 32;
    c.lora.alpha = 16;
    c.lora.targets = projections;
    conf = c;
    cr_assert(policy_open(&policy, &c, &e) == 0, "%s", e.text);
}

static int run(struct selftest *t, struct err *e) {
    struct selftest_window w[SELFTEST_WINDOWS];
    *e = (struct err){ 0 };
    cr_assert(selftest_windows(w, &policy, &conf, &questions, e) == 0, "%s", e->text);
    return selftest_run(t, &policy, w, e);
}

Test(selftest, right_gradients_pass_in_every_format, .timeout = 100) {
    static const int formats[][3] = { { MODEL_QUANT_MXFP4, 0, 0 }, { MODEL_QUANT_NVFP4, 0, 0 },
                                      { MODEL_QUANT_BF16, 0, 0 },  { MODEL_QUANT_F32, 0, 0 },
                                      { MODEL_QUANT_MXFP4, 1, 0 }, { MODEL_QUANT_BF16, 2, 0 },
                                      { MODEL_QUANT_MXFP4, 0, 1 }, { MODEL_QUANT_NVFP4, 2, 2 } };
    for (size_t i = 0; i < COUNT_OF(formats); i++) {
        struct selftest t;
        struct err e;
        open_policy(formats[i][0], formats[i][1], formats[i][2]);
        cr_expect(run(&t, &e) == 0, "format %zu: %s", i, e.text);
        const bool rounds = formats[i][1] || formats[i][2];
        cr_expect(t.tokens == SELFTEST_TOKENS && (t.layer >= 0) == rounds, "format %zu", i);
        cr_expect(rounds ? t.cosine > .3 && t.cosine < .9999 : t.cosine == 1, "format %zu: %g", i, t.cosine);
        if (formats[i][0] == MODEL_QUANT_F32)
            cr_expect(fabs(t.difference - 1) < .1, "without rounding the quotient is %g", t.difference);
        policy_close(&policy);
    }
}

/* The gradient test at learners started on other questions: `starts` learners, each with the eight that follow its own first. */
struct tally { int refused, unjudged, low, windows; double seconds; };
static struct tally start_many(int starts) {
    const struct task_set all = questions;
    struct tally sum = { 0 };
    cr_assert(all.n >= starts + SELFTEST_WINDOWS, "%d questions", all.n);
    for (int i = 0; i < starts; i++) {
        struct selftest t;
        struct err e;
        questions.q = all.q + (int64_t)i * (all.n - SELFTEST_WINDOWS) / starts;
        questions.n = SELFTEST_WINDOWS;
        sum.refused += run(&t, &e) < 0;
        sum.unjudged += !t.right;
        sum.low += t.cosine < SELFTEST_COSINE_LOW;
        sum.windows += t.windows;
        sum.seconds += t.seconds;
    }
    questions = all;
    return sum;
}

/* What a learner is started on is whatever its user has. */
Test(selftest, no_prompt_refuses_a_right_gradient, .timeout = 200) {
    enum { PROMPTS = 200 };
    static const int formats[][3] = { { MODEL_QUANT_F32, 0, 0 },   { MODEL_QUANT_BF16, 0, 0 },
                                      { MODEL_QUANT_MXFP4, 0, 0 }, { MODEL_QUANT_NVFP4, 0, 0 },
                                      { MODEL_QUANT_MXFP4, MODEL_QUANT_MXFP4, 0 },
                                      { MODEL_QUANT_NVFP4, MODEL_QUANT_NVFP4, 0 } };
    for (size_t f = 0; f < COUNT_OF(formats); f++) {
        open_policy(formats[f][0], formats[f][1], formats[f][2]);
        const struct tally sum = start_many(PROMPTS);
        policy_close(&policy);
        cr_expect(sum.refused == 0, "format %zu: %d of %d refused", f, sum.refused, PROMPTS);
        cr_expect(sum.unjudged <= PROMPTS / 50, "format %zu: %d of %d not judged", f, sum.unjudged, PROMPTS);
        cr_expect(sum.low <= PROMPTS / 20, "format %zu: %d of %d warned of", f, sum.low, PROMPTS);
        cr_expect(sum.seconds < PROMPTS, "format %zu: %g s a start", f, sum.seconds / PROMPTS);
    }
}

/* ---- planted mistakes ---- */

static int calls;
static struct kern real;

/* Twice the gradient of A and B. */
static void outer_twice(struct kern *k, const struct kern_outer *a) {
    real.outer(k, a);
    real.outer(k, a);
}
static void no_attention(struct kern *k, const struct kern_attn_bwd *a) {
    struct kern_attn_bwd wrong = *a;
    wrong.scale = -4 * a->scale;
    real.attn_bwd(k, &wrong);
}
static void norm_left_out(struct kern *k, const struct kern_rmsnorm_bwd *a) {
    struct kern_rmsnorm_bwd wrong = *a;
    wrong.w = (kptr){ a->x.p };
    real.rmsnorm_bwd(k, &wrong);
}
/* From call number `first` on: in lower layers. */
static int first;
static void outer_nothing(struct kern *k, const struct kern_outer *a) {
    if (calls++ < first) real.outer(k, a);
}
/* In every second gradient, that of rounded inputs: A and B of each projection. */
static int each;
static bool rounded_now(void) { return calls++ / (2 * each) % 2; }
static void outer_other_sign(struct kern *k, const struct kern_outer *a) {
    struct kern_outer wrong = *a;
    if (rounded_now()) wrong.scale = -a->scale;
    real.outer(k, &wrong);
}
static void outer_nothing_rounded(struct kern *k, const struct kern_outer *a) {
    if (!rounded_now()) real.outer(k, a);
}

/* In f32 at every start; where bf16 blurs the difference, at most of them. */
static void expect_found(const char *what, int least) {
    enum { STARTS = 20 };
    const struct tally sum = start_many(STARTS);
    cr_expect(sum.refused >= least, "%s: found at %d of %d starts", what, sum.refused, STARTS);
}

Test(selftest, planted_mistakes_are_found, .timeout = 100) {
    static const struct { int format, least; } on[] = { { MODEL_QUANT_F32, 20 }, { MODEL_QUANT_MXFP4, 15 } };
    struct selftest t;
    struct err e;
    for (size_t f = 0; f < COUNT_OF(on); f++) {
        open_policy(on[f].format, 0, 0);
        struct kern *k = &policy.kern;
        real = *k;
        cr_assert(run(&t, &e) == 0, "%s", e.text);
        k->outer = outer_twice;
        if (on[f].format == MODEL_QUANT_F32) {
            cr_expect(run(&t, &e) == -1 && e.code == EXIT_ENV && strstr(e.text, "gradient self-test on 16 tokens"), "%s", e.text);
            cr_expect(fabs(t.difference - .5) < .05 && t.windows == SELFTEST_WINDOWS, "twice the gradient gave %g", t.difference);
        }
        expect_found("twice the gradient", on[f].least);
        *k = real;
        /* all but the upper layers, which come first */
        k->outer = outer_nothing;
        calls = 0;
        first = 2 * PROJ_COUNT;
        cr_expect(run(&t, &e) == -1 && strstr(e.text, "the gradient of layer 0 has the norm 0"), "%s", e.text);
        *k = real;
        k->attn_bwd = no_attention;
        expect_found("attention", on[f].least);
        *k = real;
        k->rmsnorm_bwd = norm_left_out;
        expect_found("norm", on[f].least);
        *k = real;
        policy_close(&policy);
    }
}

Test(selftest, planted_mistakes_of_rounding_are_found, .timeout = 100) {
    struct selftest t;
    struct err e;
    open_policy(MODEL_QUANT_MXFP4, MODEL_QUANT_MXFP4, 0);
    struct kern *k = &policy.kern;
    real = *k;
    each = PROJ_COUNT * policy.model->conf.layers;
    k->outer = outer_other_sign;
    calls = 0;
    cr_expect(run(&t, &e) == 0 && t.cosine < -SELFTEST_COSINE_LOW, "the other sign has the cosine %g: %s", t.cosine, e.text);
    k->outer = outer_nothing_rounded;
    calls = 0;
    cr_expect(run(&t, &e) == -1 && strstr(e.text, "has the norm 0"), "%s", e.text);
    *k = real;
    cr_expect(run(&t, &e) == 0 && t.cosine > SELFTEST_COSINE_LOW, "%g %s", t.cosine, e.text);
    policy_close(&policy);
}
