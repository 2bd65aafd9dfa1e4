/* noise_view.c - AQN: one draw and its proof.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/unit/net_fixture.h"

#include <criterion/criterion.h>
#include <math.h>

/* A wider toy, so that statistics mean something: 2 * 16 + 1 norms of 256 channels. */
static struct model_conf wide_conf(void) {
    struct model_conf c = fix_toy_conf();
    c.dim = 254, c.layers = 16, c.heads = 1, c.kv_heads = 1, c.head_dim = 2, c.ffn_dim = 2,
    c.vocab = 2;
    return c;
}

Test(noise_view, realises_the_sigma_that_was_intended) {
    struct fix f;
    struct err e = { 0 };
    struct model_conf c = wide_conf();
    fix_open(&f, "ref", 1, &c, MODEL_QUANT_F32, fix_small_value);
    static const double sigmas[] = { .05, .01, .001, .0001 };
    for (size_t i = 0; i < COUNT_OF(sigmas); i++) {
        struct noise_view v;
        cr_assert_eq(noise_view_open(&v, &f.model, NULL, sigmas[i], 1, i, &e), 0, "%s", e.text);
        cr_expect_eq(v.elements, 33 * 254);
        cr_expect_gt(v.changed, v.elements * 99 / 100);
        cr_expect(fabs(v.realised / sigmas[i] - 1) < .03, "sigma %g realised %g", sigmas[i],
                  v.realised);
        noise_view_close(&v);
    }
    fix_close(&f);
}

Test(noise_view, is_a_function_of_its_key_and_never_touches_the_weights) {
    struct fix f;
    struct err e = { 0 };
    struct model_conf c = wide_conf();
    fix_open(&f, "ref", 1, &c, MODEL_QUANT_F32, fix_small_value);
    enum { N = 33 * 254 };
    static float one[N], again[N], version[N], seed[N], before[254], after[254];
    struct {
        uint64_t seed, version;
        float *to;
    } draws[] = { { 1, 2, one }, { 1, 2, again }, { 1, 3, version }, { 2, 2, seed } };
    f.kern.download(&f.kern, before, f.model.layer[3].norm_post, sizeof before);
    for (size_t i = 0; i < COUNT_OF(draws); i++) {
        struct noise_view v;
        cr_assert_eq(noise_view_open(&v, &f.model, NULL, .01, draws[i].seed, draws[i].version, &e), 0,
                     "%s", e.text);
        f.kern.download(&f.kern, draws[i].to, v.dw, sizeof one);
        noise_view_close(&v);
        cr_expect_null(noise_view_dw(&v, 0, 254).p);
    }
    f.kern.download(&f.kern, after, f.model.layer[3].norm_post, sizeof after);
    cr_expect(memcmp(before, after, sizeof before) == 0);
    cr_expect(memcmp(one, again, sizeof one) == 0);
    cr_expect(memcmp(one, version, sizeof one) != 0);
    cr_expect(memcmp(one, seed, sizeof one) != 0);
    /* every norm has its own draw */
    cr_expect(memcmp(one, one + 254, 254 * sizeof(float)) != 0);
    fix_close(&f);
}

Test(noise_view, says_when_a_treatment_did_not_happen) {
    struct fix f;
    struct err e = { 0 };
    struct model_conf c = fix_toy_conf();
    struct noise_view v;
    fix_open(&f, "ref", 1, &c, MODEL_QUANT_F32, fix_small_value);
    cr_expect_eq(noise_view_open(&v, &f.model, NULL, 0, 1, 1, &e), 0);
    cr_expect(!v.dw.p && v.realised == 0 && v.changed == 0);
    cr_expect_eq(noise_view_open(&v, &f.model, NULL, 1e-12, 1, 1, &e), -1);
    cr_expect(strstr(e.text, "not one of"), "%s", e.text);
    cr_expect_null(v.dw.p);
    cr_expect_eq(noise_view_open(&v, &f.model, NULL, -1, 1, 1, &e), -1);
    cr_expect_eq(noise_view_open(&v, &f.model, NULL, (double)NAN, 1, 1, &e), -1);
    fix_close(&f);
}
