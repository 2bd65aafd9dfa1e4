/* quant.c - rows rounded to a 4-bit format and back: against the packing of weights, against the
 * earlier system's formulas and their vectors, every path the same bits.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/quant.h"

#include "lib/model/quant.h"
#include "tests/kernels/kt.h"

enum { ROWS = 19, DIM_MAX = 1100 };

static const struct {
    enum kern_format format;
    bool seed;
} kinds[] = { { KERN_FORMAT_MXFP4, false }, { KERN_FORMAT_MXFP4, true },
              { KERN_FORMAT_NVFP4, false }, { KERN_FORMAT_NVFP4, true } };

/* One row through lib/model's own packing. Rows end blocks: zeros that fill the last one change
 * neither its scale nor the row's. */
static void by_packing(const float *x, int dim, enum kern_format format, bool seed, float *y) {
    static float in[DIM_MAX], out[DIM_MAX];
    static uint8_t codes[DIM_MAX], scales[DIM_MAX / 16 + 1];
    const enum model_rounding r = seed ? MODEL_ROUNDING_SEED : MODEL_ROUNDING_OCP;
    const int padded = (dim + 31) / 32 * 32;
    struct err e = { 0 };
    float most = 0;
    cr_assert_leq(padded, DIM_MAX);
    for (int i = 0; i < padded; i++) {
        in[i] = i < dim ? x[i] : 0;
        most = fmaxf(most, fabsf(in[i]));
    }
    if (format == KERN_FORMAT_MXFP4) {
        cr_assert_eq(quant_mxfp4(in, 1, padded, r, codes, scales, NULL, &e), 0, "%s", e.text);
        quant_mxfp4_back(codes, scales, 1, padded, out);
    } else {
        const float t = quant_nvfp4_tensor_scale(most, r);
        cr_assert_eq(quant_nvfp4(in, 1, padded, r, t, codes, scales, NULL, &e), 0, "%s", e.text);
        quant_nvfp4_back(codes, scales, t, 1, padded, out);
    }
    memcpy(y, out, (size_t)dim * sizeof *y);
}

/* Values of very different sizes within a row: empty blocks, ties, signed zeros, subnormals. */
static void *awkward(struct kt *t, enum kern_type type, int rows, int dim, bool seed) {
    void *x = kt_new(t, kt_bytes(type, (size_t)rows * (size_t)dim));
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < dim; i++) {
            double v = kt_normal(t);
            if (r % 4 == 1) v = ldexp(v, -(i / 16 % 9) * 3);
            if (r % 4 == 2) v = (double)pack_e2m1[(int)(kt_unit(t) * 16)] + (i & 1 ? .25 : 0);
            if (r % 4 == 3) v = ldexp(v, i / 32 % 2 ? -140 : seed ? 6 : 90);
            if (r == 4 || (r == 5 && i / 16 % 2)) v = i & 1 ? 0 : -0.0;
            cpu_put(kt_p(x), type, (size_t)r * (size_t)dim + (size_t)i, (float)v);
        }
    return x;
}

Test(quant, same_bits_as_the_packing,
     .description = "each row of each path is what packing that row as a weight gives; in place; "
                    "rows one by one") {
    struct kt t;
    kt_open(&t);
    for (int d = 0; kt_dims[d]; d++)
        for (int i = 0; i < 8; i++) {
            const int dim = kt_dims[d] > DIM_MAX - 32 ? DIM_MAX - 33 : kt_dims[d];
            const enum kern_type type = i & 1 ? KERN_BF16 : KERN_F32;
            const size_t n = (size_t)ROWS * (size_t)dim, bytes = kt_bytes(type, n);
            const bool seed = kinds[i / 2].seed;
            void *x = awkward(&t, type, ROWS, dim, seed), *want = kt_new(&t, bytes);
            for (int r = 0; r < ROWS; r++) {
                static float row[DIM_MAX], back[DIM_MAX];
                const size_t at = (size_t)r * (size_t)dim;
                for (int j = 0; j < dim; j++) row[j] = kt_get(x, type, at + (size_t)j);
                by_packing(row, dim, kinds[i / 2].format, seed, back);
                for (int j = 0; j < dim; j++) cpu_put(kt_p(want), type, at + (size_t)j, back[j]);
            }
            struct kern_quant_rows a = { .x = kt_p(x), .type = type, .rows = ROWS, .dim = dim,
                                         .format = kinds[i / 2].format, .seed = seed };
            KT_EACH(&t, k) {
                char *got = kt_new(&t, bytes);
                a.y = kt_p(got);
                k->quant_rows(k, &a);
                KT_SAME(k, got, (char *)want, bytes, "quant_rows dim %d kind %d", dim, i);
                char *same = kt_copy(&t, x, bytes);
                struct kern_quant_rows b = a;
                b.rows = 1;
                for (int r = ROWS - 1; r >= 0; r--) {
                    b.x = b.y = kt_p(same + kt_bytes(type, (size_t)r * (size_t)dim));
                    k->quant_rows(k, &b);
                }
                KT_SAME(k, same, (char *)want, bytes, "in place dim %d kind %d", dim, i);
            }
            kt_drop(&t);
        }
    kt_close(&t);
}

Test(quant, not_finite, .description = "a NaN or an infinity makes its row NaN, and no other") {
    enum { DIM = 83 };
    static const float bad[] = { NAN, -NAN, INFINITY, -INFINITY };
    struct kt t;
    kt_open(&t);
    for (size_t i = 0; i < COUNT_OF(kinds) * COUNT_OF(bad) * 2; i++) {
        const enum kern_type type = i & 1 ? KERN_BF16 : KERN_F32;
        const size_t kind = i / 2 % COUNT_OF(kinds), place[] = { 0, 31, 82 };
        const size_t bytes = kt_bytes(type, 5 * DIM);
        void *x = kt_typed(&t, type, 5 * DIM, 1), *clean = kt_new(&t, bytes),
             *ref = kt_new(&t, bytes);
        struct kern_quant_rows a = { .x = kt_p(x), .y = kt_p(clean), .type = type, .rows = 5,
                                     .dim = DIM, .format = kinds[kind].format,
                                     .seed = kinds[kind].seed };
        t.ref.quant_rows(&t.ref, &a);
        for (size_t r = 1; r < 4; r++)
            cpu_put(kt_p(x), type, r * DIM + place[r - 1], bad[i / 2 / COUNT_OF(kinds)]);
        a.y = kt_p(ref);
        t.ref.quant_rows(&t.ref, &a);
        cr_expect_eq(memcmp(ref, clean, kt_bytes(type, DIM)), 0, "the row before");
        cr_expect_eq(memcmp((char *)ref + kt_bytes(type, 4 * DIM),
                            (char *)clean + kt_bytes(type, 4 * DIM), kt_bytes(type, DIM)),
                     0, "the row after");
        for (size_t j = DIM; j < 4 * DIM; j++)
            cr_expect(isnan((double)kt_get(ref, type, j)), "element %zu is finite", j);
        KT_EACH(&t, k) {
            char *got = kt_new(&t, bytes);
            a.y = kt_p(got);
            k->quant_rows(k, &a);
            char *want = kt_copy(&t, ref, bytes);
            if (kt_slow(k)) kt_one_nan(want, type, 5 * DIM), kt_one_nan(got, type, 5 * DIM);
            KT_SAME(k, got, want, bytes, "rows that are not finite, kind %zu", kind);
        }
        kt_drop(&t);
    }
    kt_close(&t);
}

/* One row of `n` values through the reference. */
static void one_row(struct kt *t, const float *x, int n, size_t kind, float *y) {
    t->ref.quant_rows(&t->ref, &(struct kern_quant_rows){ .x = kt_p(x), .y = kt_p(y),
                                                          .type = KERN_F32, .rows = 1, .dim = n,
                                                          .format = kinds[kind].format,
                                                          .seed = kinds[kind].seed });
}

Test(quant, vectors_mxfp4,
     .description = "the study's MXFP4 vectors under its rounding, its scale floor, and ties to "
                    "even under OCP") {
    static const float seed[][2] = {
        { 7.9f, 6 },    { 7, 6 },     { 6, 6 },        { 5, 6 },       { 4, 4 },   { 3.5f, 4 },
        { 3, 3 },       { 2.5f, 3 },  { 2.25f, 2 },    { 2, 2 },       { 1.75f, 2 },
        { 1.25f, 1.5f }, { 1, 1 },    { .75f, 1 },     { .5f, .5f },   { .25f, .5f },
        { .249f, 0 },   { .1f, 0 },   { -5, -6 },      { -2.5f, -3 },  { -.25f, -.5f } };
    static const float even[][2] = { { 7.9f, 6 }, { 5, 4 }, { 3.5f, 4 }, { 2.5f, 2 }, { 1.75f, 2 },
                                     { 1.25f, 1 }, { .75f, 1 }, { .25f, 0 }, { -2.5f, -2 } };
    struct kt t;
    float x[32] = { 0 }, y[32];
    kt_open(&t);
    for (size_t i = 0; i < COUNT_OF(seed); i++) x[i] = seed[i][0];
    one_row(&t, x, 32, 1, y);
    for (size_t i = 0; i < COUNT_OF(seed); i++)
        cr_expect_eq(y[i], seed[i][1], "seed: %g gave %g", (double)x[i], (double)y[i]);
    for (size_t i = 0; i < 32; i++) x[i] = i < COUNT_OF(even) ? even[i][0] : 0;
    one_row(&t, x, 32, 0, y);
    for (size_t i = 0; i < COUNT_OF(even); i++)
        cr_expect_eq(y[i], even[i][1], "ocp: %g gave %g", (double)x[i], (double)y[i]);
    one_row(&t, (float[4]){ 1, .9f, .3f, .07f }, 4, 1, y);
    cr_expect(y[0] == 1 && y[1] == 1 && y[2] == .25f && y[3] == .125f);
    one_row(&t, (float[2]){ 1e-9f, 5e-9f }, 2, 1, y);
    cr_expect(y[0] == 0 && y[1] == 0x1p-27f, "the scale's floor: %g", (double)y[1]);
    kt_close(&t);
}

Test(quant, vectors_nvfp4,
     .description = "the scales that the study's NVFP4 takes: 6 of them where nothing saturates, "
                    "its missing carry, its floor and its 480") {
    static const struct { float most, scale; } v[] = {
        { 1, .171875f },       { 6, 1 },          { 5.9f, .9375f },      { 3, .5f }, { 7, 1.125f },
        { .12f, .01953125f }, { .1f, .017578125f }, { .05f, .015625f }, { .02f, .015625f },
        { 2688, 448 },         { 3000, 480 } };
    struct kt t;
    float x[16], y[16];
    kt_open(&t);
    for (size_t i = 0; i < COUNT_OF(v); i++) {
        /* half a scale is code 1 and shows the scale; the largest value sets it */
        for (int j = 0; j < 16; j++) x[j] = j ? -.5f * v[i].scale : v[i].most;
        one_row(&t, x, 16, 3, y);
        cr_expect_eq(y[1], -.5f * v[i].scale, "%g: %g, not scale %g", (double)v[i].most,
                     (double)y[1], (double)v[i].scale);
        x[1] = .25f * v[i].scale;                             /* a tie goes to the smaller */
        one_row(&t, x, 16, 3, y);
        cr_expect_eq(y[1], 0);
    }
    kt_close(&t);
}

/* What the earlier system computed for one element of a block whose scale is 1. */
static float seed_formula(float x) {
    const float a = fabsf(x), shifted = a + 1e-7f;
    const float p = shifted >= 4 ? 4.f : shifted >= 2 ? 2.f : 1.f;
    const float q = fminf(floorf(2 * a / p + .5f) * p / 2, 6);
    return copysignf(q, x) + 0;
}

Test(quant, seed_staircase,
     .description = "every float near a step, and a sweep between, comes out as the earlier "
                    "system's formula has it") {
    enum { NEAR = 3000 };
    static const float step[] = { .25f, .75f, 1.25f, 1.75f, 2, 2.5f, 3.5f, 4, 5, 6, 7.99f, .001f };
    struct quant_block b;
    quant_block_fill(&b, KERN_FORMAT_MXFP4, true, 7.9f, 1);
    cr_assert_eq(b.unit, 1);
    for (size_t i = 0; i < COUNT_OF(step); i++)
        for (int k = -NEAR; k <= NEAR; k++) {
            const float x = kern_float(kern_bits(step[i]) + (uint32_t)k);
            cr_assert_eq(pack_e2m1[quant_code(&b, x)], seed_formula(x), "%a", (double)x);
            cr_assert_eq(pack_e2m1[quant_code(&b, -x)], seed_formula(-x), "%a", (double)-x);
        }
    for (float x = 0; x < 8; x += 1.37e-5f)
        cr_assert_eq(pack_e2m1[quant_code(&b, x)], seed_formula(x), "%a", (double)x);
}

Test(quant, floor_log2, .description = "the exponent of the seed's roundings is that of a correctly rounded log2f, "
                                       "also just below a power of two where log2f rounds up to it") {
    for (int k = -126; k < 128; k++)
        for (int i = -200; i <= 200; i++) {
            if ((k == -126 && i < 0)) continue;
            const float x = kern_float(((uint32_t)(k + 127) << 23) + (uint32_t)i);
            cr_assert_eq(quant_floor_log2f(x), (int)floorf((float)log2((double)x)), "%a", (double)x);
        }
    cr_assert_eq(quant_floor_log2f(0x1.fffffep127f), 128);
}

Test(quant, twice_is_once, .description = "values on MXFP4's grid stay, under both roundings") {
    struct kt t;
    kt_open(&t);
    for (size_t kind = 0; kind < 2; kind++) {
        float *x = kt_f32(&t, 999, 3), *y = kt_new(&t, 999 * 4), *z = kt_new(&t, 999 * 4);
        one_row(&t, x, 999, kind, y);
        one_row(&t, y, 999, kind, z);
        KT_SAME(&t.ref, z, y, 999 * 4, "a second rounding");
        cr_expect_neq(memcmp(x, y, 999 * 4), 0, "nothing was rounded");
    }
    kt_close(&t);
}
