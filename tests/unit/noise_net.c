/* noise_net.c - AQN inside the network: a net under a view computes what a net of the noisy weights computes,
 * forward and backward, and sigma 0 afterwards leaves no trace.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/unit/net_fixture.h"

#include <criterion/criterion.h>
#include <math.h>

#include "kernels/pack.h"
#include "lib/base/rng.h"

enum { SEQS = 3, TOKENS = 40, PROMPT = 12, SCORED = SEQS * (TOKENS - PROMPT) };
static const double sigma = .02;
static struct noise_target target;

/* fix_small_value with the noise of (5, 6) already in it */
static float noisy_value(const char *name, int layer, enum proj p, size_t i) {
    const struct model_conf c = fix_small_conf();
    const float w = fix_small_value(name, layer, p, i);
    float dw = 0;
    int norm = -1;
    if (!strcmp(name, "norm_final")) norm = 2 * c.layers;
    else if (!strcmp(name, "norm_in")) norm = 2 * layer;
    else if (!strcmp(name, "norm_post")) norm = 2 * layer + 1;
    if (norm >= 0 && target.norm[norm] > 0)
        noise_draw(&dw, i, 1, (double)target.norm[norm] * sigma, 5, 6, norm);
    if (strstr(name, "_proj") && target.linear[layer][p] > 0) {
        noise_draw(&dw, i, 1, (double)target.linear[layer][p] * sigma, 5, 6, noise_tensor_linear(&c, layer, p));
        dw = bf16_to_f32(f32_to_bf16(dw));
    }
    return w + dw;
}

static void loss(void *ud, int seq, int first, int count, const float *lp, const float *entropy, float *coef) {
    float *out = ud;
    (void)entropy;
    for (int i = 0; i < count; i++) {
        out[seq * (TOKENS - PROMPT) + first + i] = lp[i];
        coef[i] = (seq % 2 ? .03f : -.02f) * (1 + .01f * (float)(first + i));
    }
}

/* Log-probs and gradient of three texts. */
static void train(const struct model *m, const struct lora *l, const struct noise_view *v, float *lp, float *grad) {
    struct err e = { 0 };
    struct net *n;
    int32_t ids[SEQS][TOKENS];
    struct net_seq seq[SEQS];
    for (int s = 0; s < SEQS; s++) {
        for (int i = 0; i < TOKENS; i++) ids[s][i] = (int32_t)(rng_mix64((uint64_t)(s * 1000 + i)) % 61);
        seq[s] = (struct net_seq){ .ids = ids[s], .n = TOKENS, .prompt_n = PROMPT };
    }
    const struct net_opts o = { .rows_max = 200, .slots_max = 4, .positions_max = 64, .train = true, .lora = l->shape };
    cr_assert_eq(net_create(&n, m, &o, &e), 0, "%s", e.text);
    cr_assert_eq(net_adopt(n, l, v, &e), 0, "%s", e.text);
    memset(grad, 0, l->params * sizeof *grad);
    cr_assert_eq(net_train(n, seq, SEQS, 1, loss, lp, grad, &e), 0, "%s", e.text);
    float scored[SCORED];
    cr_assert_eq(net_logprobs(n, seq, SEQS, 1, scored, NULL, &e), 0, "%s", e.text);
    cr_expect(memcmp(scored, lp, sizeof scored) == 0, "training and scoring differ");
    net_destroy(&n);
}

static double distance(const float *a, const float *b, size_t n) {
    double d = 0, size = 0;
    for (size_t i = 0; i < n; i++) {
        const double x = (double)a[i] - (double)b[i];
        d += x * x;
        size += (double)b[i] * (double)b[i];
    }
    return sqrt(d / size);
}

static void aim(const char *targets) {
    const struct model_conf c = fix_small_conf();
    const struct noise_target_text x = { .targets = targets, .exclude = "", .layers = "0:0.5, 1:1, 2:1.5", .others = 1,
                                         .zone_edge = "", .zone_middle = "" };
    struct err e = { 0 };
    cr_assert_eq(noise_target_make(&target, &x, 0, 1, &c, &e), 0, "%s", e.text);
}

/* In f32 the two differ by rounding only: W x + dW x against (W + dW) x. */
Test(noise_net, a_view_is_the_model_of_the_noisy_weights_forward_and_backward) {
    static const char *const targets[] = { "norms", "linears", "norms, q_proj, o_proj, down_proj", "gate_proj, up_proj" };
    struct model_conf c = fix_small_conf();
    struct lora *l = fix_lora(&c, 4, 8, .2f, 7);
    float *g[3], lp[3][SCORED];
    for (int i = 0; i < 3; i++) g[i] = malloc(l->params * sizeof *g[i]);
    for (size_t k = 0; k < COUNT_OF(targets); k++) {
        struct fix clean, noisy;
        struct noise_view v;
        struct err e = { 0 };
        aim(targets[k]);
        fix_open(&clean, "ref", 2, &c, MODEL_QUANT_F32, fix_small_value);
        fix_open(&noisy, "ref", 2, &c, MODEL_QUANT_F32, noisy_value);
        cr_assert_eq(noise_view_open(&v, &clean.model, &target, sigma, 5, 6, &e), 0, "%s", e.text);
        train(&clean.model, l, &v, lp[0], g[0]);
        train(&noisy.model, l, NULL, lp[1], g[1]);
        train(&clean.model, l, NULL, lp[2], g[2]);
        cr_expect(distance(lp[0], lp[1], SCORED) < 2e-6, "%s: log-probs %g", targets[k], distance(lp[0], lp[1], SCORED));
        cr_expect(distance(g[0], g[1], l->params) < 2e-5, "%s: gradient %g", targets[k], distance(g[0], g[1], l->params));
        cr_expect(distance(lp[2], lp[1], SCORED) > 1e-3 && distance(g[2], g[1], l->params) > 1e-2, "%s: no noise", targets[k]);
        noise_view_close(&v);
        fix_close(&clean);
        fix_close(&noisy);
    }
    for (int i = 0; i < 3; i++) free(g[i]);
    lora_destroy(&l);
}

/* Whatever was adopted before, a net without noise has the bits of one that never knew any. */
Test(noise_net, sigma_zero_after_any_sequence_is_the_clean_model) {
    static const enum model_quant quants[] = { MODEL_QUANT_BF16, MODEL_QUANT_MXFP4, MODEL_QUANT_NVFP4 };
    static const char *const targets[] = { "norms", "norms, linears", "linears" };
    for (size_t q = 0; q < COUNT_OF(quants); q++) {
        struct model_conf c = fix_small_conf();
        struct lora *l = fix_lora(&c, 4, 8, .2f, 7);
        struct fix f;
        struct net *n;
        struct err e = { 0 };
        int32_t ids[TOKENS];
        float before[TOKENS], after[TOKENS], noisy[TOKENS];
        for (int i = 0; i < TOKENS; i++) ids[i] = (int32_t)(rng_mix64((uint64_t)i) % 61);
        const struct net_seq seq = { .ids = ids, .n = TOKENS, .prompt_n = PROMPT };
        const struct net_opts o = { .rows_max = 64, .slots_max = 2, .positions_max = 64, .lora = l->shape };
        fix_open(&f, "auto", 2, &c, quants[q], fix_small_value);
        cr_assert_eq(net_create(&n, &f.model, &o, &e), 0, "%s", e.text);
        cr_assert_eq(net_adopt(n, l, NULL, &e), 0);
        cr_assert_eq(net_logprobs(n, &seq, 1, 1, before, NULL, &e), 0, "%s", e.text);
        for (uint64_t version = 0; version < 6; version++) {
            struct noise_view v, empty = { .kern = &f.kern };
            aim(targets[version % 3]);
            cr_assert_eq(noise_view_open(&v, &f.model, &target, version == 4 ? 0 : sigma, 1, version, &e), 0, "%s", e.text);
            cr_assert_eq(net_adopt(n, version % 2 ? l : NULL, &v, &e), 0);
            cr_assert_eq(net_logprobs(n, &seq, 1, 1, noisy, NULL, &e), 0, "%s", e.text);
            if (version % 2) cr_expect(memcmp(noisy, before, (TOKENS - PROMPT) * sizeof *noisy) != 0);
            cr_assert_eq(net_adopt(n, l, version % 2 ? NULL : &empty, &e), 0);
            noise_view_close(&v);
            cr_assert_eq(net_logprobs(n, &seq, 1, 1, after, NULL, &e), 0, "%s", e.text);
            cr_expect(memcmp(before, after, (TOKENS - PROMPT) * sizeof *after) == 0, "quant %d, after version %llu",
                      (int)quants[q], (unsigned long long)version);
        }
        net_destroy(&n);
        lora_destroy(&l);
        fix_close(&f);
    }
}
