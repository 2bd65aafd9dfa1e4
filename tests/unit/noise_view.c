/* noise_view.c - AQN: the schedule of spec dapo 17.7, one draw and its proof.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/unit/net_fixture.h"

#include <criterion/criterion.h>
#include <math.h>

static bool near(double got, double want) { return fabs(got - want) <= 1e-6 * fabs(want); }

static double noise_schedule(int64_t done, int64_t steps, int stages, double start, double end) {
    return noise_schedule_at(&(struct noise_schedule){ .start = start, .end = end, .stages = stages,
                                                       .steps = steps }, done);
}

static const struct { int64_t first, last; double small, large; } table[] = {
    { 0, 373, 0, 0 },
    { 374, 747, .01, .05 },
    { 748, 1120, .005623413252, .0281171 },
    { 1121, 1494, .00316227766, .0158114 },
    { 1495, 1867, .00177827941, .0088914 },
    { 1868, 2241, .001, .005 },
    { 2242, 2615, .0005623413252, .00281171 },
    { 2616, 2988, .000316227766, .00158114 },
    { 2989, 3362, .000177827941, .00088914 },
    { 3363, 3736, .0001, .0005 },
    { 3737, 9999, .0001, .0005 },
};

Test(noise_schedule, gives_both_tables_of_3736_steps_at_every_boundary) {
    for (size_t i = 0; i < COUNT_OF(table); i++) {
        const int64_t at[] = { table[i].first, (table[i].first + table[i].last) / 2,
                               table[i].last };
        for (int j = 0; j < 3; j++) {
            double small = noise_schedule(at[j], 3736, 10, .01, .0001),
                   large = noise_schedule(at[j], 3736, 10, .05, .0005);
            cr_expect(near(small, table[i].small), "step %lld: %.12g", (long long)at[j], small);
            cr_expect(fabs(large - table[i].large) <= 5e-6 * table[i].large, "step %lld: %.12g",
                      (long long)at[j], large);
        }
    }
}

Test(noise_schedule, short_runs_follow_the_integer_rule) {
    /* S = 200: changes at 20, 40, ..., 180 */
    for (int step = 0; step <= 220; step++) {
        const int j = step > 200 ? 10 : step / 20;
        const double want = j == 0 ? 0 : .01 * pow(.01, (j > 9 ? 8 : j - 1) / 8.);
        cr_expect(near(noise_schedule(step, 200, 10, .01, .0001), want), "step %d of 200", step);
    }
    static const int interval[] = { 0, 1, 2, 4, 5, 7, 8, 10 };        /* S = 7 */
    for (int step = 0; step <= 7; step++) {
        const int j = interval[step];
        const double want = j == 0 ? 0 : .01 * pow(.01, (j > 9 ? 8 : j - 1) / 8.);
        cr_expect(near(noise_schedule(step, 7, 10, .01, .0001), want), "step %d of 7", step);
    }
    /* j = 7, where dividing floats gives 6 */
    cr_expect(near(noise_schedule(9, 9, 7, .01, .0001), .0001));
    /* j = 6: trend[5], the last */
    cr_expect(near(noise_schedule(8, 9, 7, .01, .0001), .0001));
    cr_expect(near(noise_schedule(7, 9, 7, .01, .0001), .01 * pow(.01, .8)));
    cr_expect_eq(noise_schedule(4, 10, 2, .01, .0001), 0.);
    cr_expect_eq(noise_schedule(5, 10, 2, .01, .0001), .01);
    cr_expect_eq(noise_schedule(10, 10, 2, .01, .0001), .01);
    cr_expect_eq(noise_schedule(10, 10, 3, .01, .0001), .0001);
}

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
