/* model_quant.c - both MXFP4 roundings: the specification's vectors, an independent nearest search,
 * the error they leave.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/quant.h"

#include <math.h>

#include "kernels/pack.h"
#include "lib/base/rng.h"
#include "tests/unit/model_files.h"

static void round_trip(const float *x, int out, int in, enum model_rounding r, float *back,
                       uint8_t *scales) {
    struct err e = { 0 };
    uint8_t *codes = mem_alloc((size_t)out * (size_t)in);
    cr_assert(quant_mxfp4(x, out, in, r, codes, scales, NULL, &e) == 0, "%s", e.text);
    quant_mxfp4_back(codes, scales, out, in, back);
    free(codes);
}

static void fill_normal(float *x, int n, uint64_t seed, double sigma) {
    uint32_t key[2];
    double g[4];
    rng_key(key, seed, RNG_PURPOSE_SHUFFLE, 0);
    for (int i = 0; i < n; i += 4) {
        rng_normal4(g, rng_philox((uint32_t[4]){ (uint32_t)i, 0, 0, 0 }, key));
        for (int k = 0; k < 4 && i + k < n; k++) x[i + k] = (float)(sigma * g[k]);
    }
}

/* The block's largest is 7.9, so the scale is 1. Pairs: value, OCP (ties to even), SEED (ties
 * away). */
static const float ties[][3] = {
    { 7.9f, 6, 6 },
    { 7, 6, 6 },
    { 6, 6, 6 },
    { 5, 4, 6 },
    { 4, 4, 4 },
    { 3.5f, 4, 4 },
    { 3, 3, 3 },
    { 2.5f, 2, 3 },
    { 2.25f, 2, 2 },
    { 2, 2, 2 },
    { 1.75f, 2, 2 },
    { 1.25f, 1, 1.5f },
    { 1, 1, 1 },
    { .75f, 1, 1 },
    { .5f, .5f, .5f },
    { .25f, 0, .5f },
    { .249f, 0, 0 },
    { .1f, 0, 0 },
    { -5, -4, -6 },
    { -2.5f, -2, -3 },
    { -.25f, 0, -.5f },
    { 5.001f, 6, 6 },
    { 4.999f, 4, 4 },
    { .251f, .5f, .5f },
    { .7499f, .5f, .5f },
    { 1.2501f, 1.5f, 1.5f },
    { 1.7499f, 1.5f, 1.5f },
    { 3.4999f, 3, 3 },
    { -0.f, 0, 0 },
    { 0, 0, 0 },
};

Test(model_quant, ties,
     .description = "the vectors of the study's page: ties to even, or away from zero") {
    float x[32] = { 0 }, back[32];
    uint8_t scale;
    for (size_t i = 0; i < COUNT_OF(ties); i++) x[i] = ties[i][0];
    for (int r = 0; r < 2; r++) {
        round_trip(x, 1, 32, (enum model_rounding)r, back, &scale);
        cr_expect_eq(scale, 127);
        for (size_t i = 0; i < COUNT_OF(ties); i++) {
            cr_expect_eq(back[i], ties[i][1 + r], "rounding %d: %g became %g", r, (double)x[i],
                         (double)back[i]);
            cr_expect(back[i] != 0 || !signbit(back[i]), "a zero must be +0");
        }
    }
}

Test(model_quant, seed_vectors, .description = "the seed's scale floor and its 1e-7 terms") {
    float back[32];
    uint8_t scale;
    float x[32] = { 1, .9f, .3f, .07f }, tiny[32] = { 1e-9f, 5e-9f }, zero[32] = { 0 };
    round_trip(x, 1, 32, MODEL_ROUNDING_SEED, back, &scale);
    cr_expect(scale == 125 && back[0] == 1 && back[1] == 1 && back[2] == .25f && back[3] == .125f &&
              back[4] == 0);
    round_trip(tiny, 1, 32, MODEL_ROUNDING_SEED, back, &scale);
    cr_expect(back[0] == 0 && back[1] == 0x1p-27f, "%g", (double)back[1]);          /* 7.45058e-9 */
    round_trip(zero, 1, 32, MODEL_ROUNDING_SEED, back, &scale);
    cr_expect(scale == 127 - 26 && back[0] == 0);
    float under[32] = { 1.99999988f }; /* within 1e-7 below 2: next scale */
    round_trip(under, 1, 32, MODEL_ROUNDING_SEED, back, &scale);
    cr_expect_eq(scale, 126);
    round_trip(under, 1, 32, MODEL_ROUNDING_OCP, back, &scale);
    cr_expect_eq(scale, 125);
}

/* Nearest grid value by search in double; among two equally near, the one whose code is even. */
static double nearest(double a) {
    int best = 0;
    for (int q = 1; q < 8; q++) {
        double d = fabs(a - (double)pack_e2m1[q]), b = fabs(a - (double)pack_e2m1[best]);
        if (d < b || (d == b && q % 2 == 0)) best = q;
    }
    return (double)pack_e2m1[best];
}

Test(model_quant, ocp_search,
     .description =
         "OCP agrees with a search over the grid, at all magnitudes and short last blocks") {
    enum { OUT = 7, IN = 75, BLOCKS = 3 };
    static const float size[] = { 1, 1e-3f, 0x1p-100f, 0x1p-130f, 0x1p-147f, 1e30f, 0x1p125f };
    float x[OUT * IN], back[OUT * IN];
    uint8_t scales[OUT * BLOCKS];
    for (size_t s = 0; s < COUNT_OF(size); s++) {
        fill_normal(x, OUT * IN, s, (double)size[s]);
        round_trip(x, OUT, IN, MODEL_ROUNDING_OCP, back, scales);
        for (int o = 0; o < OUT; o++)
            for (int b = 0; b < BLOCKS; b++) {
                double amax = 0;
                int from = b * 32, to = from + 32 < IN ? from + 32 : IN;
                for (int i = from; i < to; i++) amax = fmax(amax, fabs((double)x[o * IN + i]));
                double unit = amax > 0 ? fmax(exp2(floor(log2(amax)) - 2), 0x1p-127) : 0x1p-127;
                for (int i = from; i < to; i++) {
                    double v = (double)x[o * IN + i],
                           want = copysign(nearest(fabs(v) / unit) * unit, v);
                    cr_expect_eq((double)back[o * IN + i], want, "size %g: %g became %g, not %g",
                                 (double)size[s], v, (double)back[o * IN + i], want);
                }
            }
    }
}

Test(model_quant, twice, .description = "quantising twice is quantising once, in both roundings") {
    enum { N = 64 * 256 };
    float *x = mem_alloc(N * sizeof *x), *once = mem_alloc(N * sizeof *x),
          *twice = mem_alloc(N * sizeof *x);
    uint8_t *scales = mem_alloc(N / 32);
    fill_normal(x, N, 1, .02);
    for (int r = 0; r < 2; r++) {
        round_trip(x, 64, 256, (enum model_rounding)r, once, scales);
        round_trip(once, 64, 256, (enum model_rounding)r, twice, scales);
        cr_expect_arr_eq(once, twice, N * sizeof *x);
    }
    free(x), free(once), free(twice), free(scales);
}

/* Expected for MXFP4 on Gaussian values: 20-22 % mean relative error, SQNR 18.6-18.9 dB, 8-9 %
 * zeroed. */
Test(model_quant, gaussian, .description = "on Gaussian weights the error is the study's") {
    enum { OUT = 512, IN = 1024 };
    float *x = mem_alloc((size_t)OUT * IN * sizeof *x);
    uint8_t *codes = mem_alloc((size_t)OUT * IN), *scales = mem_alloc((size_t)OUT * IN / 32);
    fill_normal(x, OUT * IN, 7, .02);
    for (int r = 0; r < 2; r++) {
        struct quant_stats s = { 0 }, half = { 0 };
        struct err e = { 0 };
        cr_assert(quant_mxfp4(x, OUT, IN, (enum model_rounding)r, codes, scales, &s, &e) == 0);
        cr_expect(quant_relative_error(&s) > .20 && quant_relative_error(&s) < .22, "%g",
                  quant_relative_error(&s));
        cr_expect(quant_sqnr_db(&s) > 18.5 && quant_sqnr_db(&s) < 18.95, "%g", quant_sqnr_db(&s));
        cr_expect(quant_zeroed(&s) > .08 && quant_zeroed(&s) < .09, "%g", quant_zeroed(&s));
        cr_expect(quant_saturated(&s) > 0 && quant_saturated(&s) < .02, "%g", quant_saturated(&s));
        cr_assert(quant_mxfp4(x, OUT / 2, IN, (enum model_rounding)r, codes, scales, &half, &e) ==
                  0);
        struct quant_stats both = half;
        quant_stats_add(&both, &half);
        cr_expect(both.elements == s.elements && quant_sqnr_db(&both) == quant_sqnr_db(&half));
        fprintf(stderr,
                "gaussian, %s: relative error %.2f %%, SQNR %.2f dB, zeroed %.2f %%, saturated "
                "%.2f %%\n",
                r ? "seed" : "ocp", 100 * quant_relative_error(&s), quant_sqnr_db(&s),
                100 * quant_zeroed(&s), 100 * quant_saturated(&s));
    }
    free(x), free(codes), free(scales);
}

Test(model_quant, refuses,
     .description = "values that are not finite, and seed blocks over row ends") {
    float x[66] = { 0 };
    uint8_t codes[66], scales[6];
    struct err e = { 0 };
    x[40] = NAN;
    cr_expect_eq(quant_mxfp4(x, 2, 33, MODEL_ROUNDING_OCP, codes, scales, NULL, &e), -1);
    expect_err(&e, "the value at row 1, column 7 is not finite");
    x[40] = -INFINITY;
    cr_expect_eq(quant_mxfp4(x, 1, 64, MODEL_ROUNDING_SEED, codes, scales, NULL, &e), -1);
    expect_err(&e, "the value at row 0, column 40 is not finite");
    x[40] = 0;
    cr_expect_eq(quant_mxfp4(x, 2, 33, MODEL_ROUNDING_SEED, codes, scales, NULL, &e), -1);
    expect_err(
        &e,
        "seed rounding needs rows of a multiple of 32 values, not 33: its blocks would run over "
        "row ends (use the ocp "
        "rounding)");
}
