/* quant.c - see quant.h. Order: the two roundings of one block, whole tensors, what was lost.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/quant.h"

#include <math.h>

#include "kernels/pack.h"

/* Bit pattern of 2^k for a normal f32, -126 <= k <= 127. */
static float power2(int k) {
    union { uint32_t u; float f; } v = { (uint32_t)(k + 127) << 23 };
    return v.f;
}

/* floor(log2 x) of a positive finite f32, subnormals included. */
static int floor_log2(float x) {
    int k;
    (void)frexpf(x, &k);
    return k - 1;
}

/* OCP: a = |x| / scale, exact since the scale is a power of two. The even neighbour of a tie has
 * mantissa bit 0, so the comparisons alternate between > and >=. */
static uint8_t block_ocp(const float *x, int n, uint8_t *code) {
    float amax = 0;
    for (int i = 0; i < n; i++) amax = fabsf(x[i]) > amax ? fabsf(x[i]) : amax;
    int e = amax > 0 ? floor_log2(amax) - 2 : -127;
    if (e < -127) e = -127;
    float inverse = power2(-e);
    for (int i = 0; i < n; i++) {
        float a = fabsf(x[i]) * inverse;
        int q = (a > .25f) + (a >= .75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) + (a >= 3.5f) +
                (a > 5.f);
        code[i] = (uint8_t)(q | (x[i] < 0 && q ? 8 : 0));
    }
    return (uint8_t)(e + 127);
}

/* SEED: E = floor(log2(amax + 1e-7)) - 2 in f32 as the earlier system computed it; within a binade
 * p the half steps are floor(2 a / 2^p + .5), so ties go away from zero. E lies in -26 .. 125. */
static uint8_t block_seed(const float *x, int n, uint8_t *code) {
    /* index 2q on the grid 0 .5 1 1.5 2 3 4 6 */
    static const uint8_t nibble[13] = { 0, 1, 2, 3, 4, 0, 5, 0, 6, 0, 0, 0, 7 };
    float amax = 0;
    for (int i = 0; i < n; i++) amax = fabsf(x[i]) > amax ? fabsf(x[i]) : amax;
    int e = (int)floorf(log2f(amax + 1e-7f)) - 2;
    /* log2f of the largest floats rounds up to 128 */
    if (e > 125) e = 125;
    float inverse = power2(-e);
    for (int i = 0; i < n; i++) {
        float a = fabsf(x[i]) * inverse, shifted = a + 1e-7f;
        float p = shifted >= 4 ? 4.f : shifted >= 2 ? 2.f : 1.f;
        float q = floorf(2 * a / p + .5f) * p;              /* twice the value */
        if (q > 12) q = 12;
        uint8_t c = nibble[(int)q];
        code[i] = (uint8_t)(c | (x[i] < 0 && c ? 8 : 0));
    }
    return (uint8_t)(e + 127);
}

static void block_stats(const float *x, int n, const uint8_t *code, uint8_t scale,
                        struct quant_stats *s) {
    float unit = pack_e8m0(scale);
    for (int i = 0; i < n; i++) {
        double v = (double)x[i], d = (double)pack_e2m1[code[i]] * (double)unit - v, a = fabs(v);
        s->relative_sum += fabs(d) / (a + 1e-10);
        s->x2_sum += v * v;
        s->d2_sum += d * d;
        s->zeroed += a > 1e-10 && (code[i] & 7) == 0;
        s->saturated += a > 6 * (double)unit;
    }
    s->elements += (uint64_t)n;
}

/* --- whole tensors --- */

int64_t quant_not_finite(const float *values, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        if (!isfinite(values[i])) return i;
    return -1;
}

int quant_mxfp4(const float *values, int out, int in, enum model_rounding r, uint8_t *codes,
                uint8_t *scales, struct quant_stats *stats, struct err *e) {
    assert(out > 0 && in > 0);
    if (r == MODEL_ROUNDING_SEED && in % QUANT_BLOCK)
        return err_code(
            e, EXIT_ENV,
            "seed rounding needs rows of a multiple of 32 values, not %d: its blocks would run "
            "over row ends (use the ocp rounding)",
            in);
    int64_t bad = quant_not_finite(values, (int64_t)out * in);
    if (bad >= 0)
        return err_code(e, EXIT_ENV, "the value at row %lld, column %lld is not finite",
                        (long long)(bad / in), (long long)(bad % in));
    for (int o = 0; o < out; o++)
        for (int i = 0; i < in; i += QUANT_BLOCK) {
            size_t at = (size_t)o * (size_t)in + (size_t)i;
            int n = in - i < QUANT_BLOCK ? in - i : QUANT_BLOCK;
            *scales = r == MODEL_ROUNDING_SEED ? block_seed(values + at, n, codes + at)
                                               : block_ocp(values + at, n, codes + at);
            if (stats) block_stats(values + at, n, codes + at, *scales, stats);
            scales++;
        }
    return 0;
}

void quant_mxfp4_back(const uint8_t *codes, const uint8_t *scales, int out, int in, float *values) {
    int blocks = (in + QUANT_BLOCK - 1) / QUANT_BLOCK;
    for (int o = 0; o < out; o++)
        for (int i = 0; i < in; i++) {
            size_t at = (size_t)o * (size_t)in + (size_t)i;
            values[at] = pack_e2m1[codes[at] & 15] *
                         pack_e8m0(scales[(size_t)o * (size_t)blocks + (size_t)(i / QUANT_BLOCK)]);
        }
}

/* --- what was lost --- */

void quant_stats_add(struct quant_stats *to, const struct quant_stats *s) {
    to->elements += s->elements;
    to->zeroed += s->zeroed;
    to->saturated += s->saturated;
    to->relative_sum += s->relative_sum;
    to->x2_sum += s->x2_sum;
    to->d2_sum += s->d2_sum;
}

static double share(double part, uint64_t all) { return all ? part / (double)all : 0; }
double quant_relative_error(const struct quant_stats *s) {
    return share(s->relative_sum, s->elements);
}
double quant_zeroed(const struct quant_stats *s) { return share((double)s->zeroed, s->elements); }
double quant_saturated(const struct quant_stats *s) {
    return share((double)s->saturated, s->elements);
}
double quant_sqnr_db(const struct quant_stats *s) {
    return s->d2_sum > 0 ? 10 * log10(s->x2_sum / s->d2_sum) : INFINITY;
}
