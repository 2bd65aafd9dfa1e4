/* selftest.c - the gradient test at the learner's start: passes on the embedded model in every format,
 * finds each planted mistake.
 * SPDX-License-Identifier: Apache-2.0 */
#include "stages/learner/selftest.h"

#include <criterion/criterion.h>
#include <math.h>

#include "lib/base/log.h"

static struct policy policy;
static const int32_t ids[] = { 30, 311, 12, 45, 200, 9, 77, 401, 33, 250, 18, 99, 140, 61, 5, 320, 42, 8 };

static void open_policy(int weights, int activations, int adapter) {
    static char tiny[] = "models/tiny", none[] = "", all[] = "all", norms[] = "norms",
                projections[] = "q,k,v,o,gate,up,down";
    struct err e = { 0 };
    struct shared c = { .run.threads = 1, .run.steps = 10, .model.path = tiny };
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
    cr_assert(policy_open(&policy, &c, &e) == 0, "%s", e.text);
}

static int run(struct selftest *t, struct err *e) {
    *e = (struct err){ 0 };
    return selftest_run(t, &policy, ids, (int)(sizeof ids / sizeof *ids), e);
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
/* From call number `first` on: in lower layers, or in the second gradient, that of rounded inputs. */
static int first;
static void outer_other_sign(struct kern *k, const struct kern_outer *a) {
    struct kern_outer wrong = *a;
    if (calls++ >= first) wrong.scale = -a->scale;
    real.outer(k, &wrong);
}
static void outer_nothing(struct kern *k, const struct kern_outer *a) {
    if (calls++ < first) real.outer(k, a);
}

Test(selftest, planted_mistakes_are_found, .timeout = 100) {
    struct selftest t;
    struct err e;
    open_policy(MODEL_QUANT_MXFP4, 0, 0);
    struct kern *k = &policy.kern;
    real = *k;
    cr_assert(run(&t, &e) == 0, "%s", e.text);
    k->outer = outer_twice;
    cr_expect(run(&t, &e) == -1 && e.code == EXIT_ENV && strstr(e.text, "gradient self-test on 16 tokens"), "%s", e.text);
    cr_expect(t.difference < .7, "twice the gradient gave %g", t.difference);
    *k = real;
    /* all but the upper layers, which come first */
    k->outer = outer_nothing;
    calls = 0;
    first = 2 * PROJ_COUNT;
    cr_expect(run(&t, &e) == -1 && strstr(e.text, "the gradient of layer 0 has the norm 0"), "%s", e.text);
    *k = real;
    k->attn_bwd = no_attention;
    cr_expect(run(&t, &e) == -1, "attention: %g", t.difference);
    *k = real;
    k->rmsnorm_bwd = norm_left_out;
    cr_expect(run(&t, &e) == -1, "norm: %g", t.difference);
    *k = real;
    policy_close(&policy);
}

Test(selftest, planted_mistakes_of_rounding_are_found, .timeout = 100) {
    struct selftest t;
    struct err e;
    open_policy(MODEL_QUANT_MXFP4, MODEL_QUANT_MXFP4, 0);
    struct kern *k = &policy.kern;
    real = *k;
    first = 2 * PROJ_COUNT * policy.model->conf.layers;
    k->outer = outer_other_sign;
    calls = 0;
    cr_expect(run(&t, &e) == -1 && strstr(e.text, "straight-through gradient of layer"), "%s", e.text);
    k->outer = outer_nothing;
    calls = 0;
    cr_expect(run(&t, &e) == -1 && strstr(e.text, "has the norm 0"), "%s", e.text);
    *k = real;
    cr_expect(run(&t, &e) == 0, "%s", e.text);
    policy_close(&policy);
}
