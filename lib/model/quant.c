/* quant.c - see quant.h. Order: MXFP4's two roundings of one block, NVFP4's, whole tensors, what
 * was lost.
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

static float largest(const float *x, int n) {
    float amax = 0;
    for (int i = 0; i < n; i++) amax = fabsf(x[i]) > amax ? fabsf(x[i]) : amax;
    return amax;
}

/* OCP: a = |x| / scale, exact since the scale is a power of two. The even neighbour of a tie has
 * mantissa bit 0, so the comparisons alternate between > and >=. */
static uint8_t block_ocp(const float *x, int n, uint8_t *code) {
    float amax = largest(x, n);
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
    float amax = largest(x, n);
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

/* --- NVFP4 --- */

/* Nearest E4M3 of a finite r >= 0, ties to even, at most 448. A mantissa that rounds to 16 eighths
 * carries into the exponent by itself; below 2^-6 the step stays 2^-9. */
static uint8_t e4m3_nearest(double r) {
    int k = 0;
    if (r <= 0 || r >= 448) return r > 0 ? 0x7e : 0;
    (void)frexp(r, &k);
    int e = k - 1 > -6 ? k - 1 : -6;
    return (uint8_t)((e + 6) * 8 + (int)rint(ldexp(r, 3 - e)));
}

/* OCP. unit and its products with the grid's midpoints are exact in double, and no quotient of two
 * floats lies so close to a midpoint that its rounding to double could cross or meet it. */
static uint8_t block_nv_ocp(const float *x, int n, float tensor_scale, uint8_t *code) {
    uint8_t scale = e4m3_nearest((double)largest(x, n) / (6 * (double)tensor_scale));
    double unit = (double)pack_e4m3(scale) * (double)tensor_scale;
    for (int i = 0; i < n; i++) {
        double a = unit > 0 ? fabs((double)x[i]) / unit : 0;
        int q = (a > .25) + (a >= .75) + (a > 1.25) + (a >= 1.75) + (a > 2.5) + (a >= 3.5) +
                (a > 5);
        code[i] = (uint8_t)(q | (x[i] < 0 && q ? 8 : 0));
    }
    return scale;
}

/* SEED, in f32 as the earlier system computed it. It added 1e-10 to the scale before dividing,
 * which changes no f32 of 2^-6 or more. 0x7f, its 480, is a NaN in E4M3. */
static uint8_t block_nv_seed(const float *x, int n, uint8_t *code) {
    float amax = largest(x, n), r = (amax > 1e-10f ? amax : 1e-10f) / 6;
    int e = (int)floorf(log2f(r));
    e = e < -6 ? -6 : e > 8 ? 8 : e;
    float eighths = rintf(8 * r * power2(-e));
    eighths = eighths < 8 ? 8 : eighths > 15 ? 15 : eighths;
    float scale = eighths * power2(e - 3);
    for (int i = 0; i < n; i++) {
        float a = fabsf(x[i]) / scale;
        int q = (a > .25f) + (a > .75f) + (a > 1.25f) + (a > 1.75f) + (a > 2.5f) + (a > 3.5f) +
                (a > 5.f);
        code[i] = (uint8_t)(q | (x[i] < 0 && q ? 8 : 0));
    }
    return (uint8_t)((e + 6) * 8 + (int)eighths);
}

float quant_nvfp4_tensor_scale(float amax, enum model_rounding r) {
    if (r == MODEL_ROUNDING_SEED || !(amax > 0)) return 1;
    float t = amax / (448 * 6);
    return t > 0x1p-126f ? t : 0x1p-126f;                 /* a normal f32 is as exact as the rest */
}

/* --- whole tensors --- */

/* unit: what code value 1 stands for */
static void block_stats(const float *x, int n, const uint8_t *code, double unit,
                        struct quant_stats *s) {
    for (int i = 0; i < n; i++) {
        double v = (double)x[i], d = (double)pack_e2m1[code[i]] * unit - v, a = fabs(v);
        s->relative_sum += fabs(d) / (a + 1e-10);
        s->x2_sum += v * v;
        s->d2_sum += d * d;
        s->zeroed += a > 1e-10 && (code[i] & 7) == 0;
        s->saturated += a > 6 * unit;
    }
    s->elements += (uint64_t)n;
}

int64_t quant_not_finite(const float *values, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        if (!isfinite(values[i])) return i;
    return -1;
}

static int check_finite(const float *values, int out, int in, struct err *e) {
    int64_t bad = quant_not_finite(values, (int64_t)out * in);
    if (bad < 0) return 0;
    return err_code(e, EXIT_ENV, "the value at row %lld, column %lld is not finite",
                    (long long)(bad / in), (long long)(bad % in));
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
    if (check_finite(values, out, in, e) < 0) return -1;
    for (int o = 0; o < out; o++)
        for (int i = 0; i < in; i += QUANT_BLOCK) {
            size_t at = (size_t)o * (size_t)in + (size_t)i;
            int n = in - i < QUANT_BLOCK ? in - i : QUANT_BLOCK;
            *scales = r == MODEL_ROUNDING_SEED ? block_seed(values + at, n, codes + at)
                                               : block_ocp(values + at, n, codes + at);
            if (stats) block_stats(values + at, n, codes + at, (double)pack_e8m0(*scales), stats);
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

int quant_nvfp4(const float *values, int out, int in, enum model_rounding r, float tensor_scale,
                uint8_t *codes, uint8_t *scales, struct quant_stats *stats, struct err *e) {
    assert(out > 0 && in > 0 && tensor_scale > 0);
    if (check_finite(values, out, in, e) < 0) return -1;
    for (int o = 0; o < out; o++)
        for (int i = 0; i < in; i += QUANT_BLOCK_NVFP4, scales++) {
            size_t at = (size_t)o * (size_t)in + (size_t)i;
            int n = in - i < QUANT_BLOCK_NVFP4 ? in - i : QUANT_BLOCK_NVFP4;
            *scales = r == MODEL_ROUNDING_SEED
                          ? block_nv_seed(values + at, n, codes + at)
                          : block_nv_ocp(values + at, n, tensor_scale, codes + at);
            if (*scales == 0x7f)
                return err_code(e, EXIT_ENV,
                                "the block at row %d, column %d needs a scale of 480 under seed "
                                "rounding, and E4M3 ends at 448 (use the ocp rounding)",
                                o, i);
            double unit = (double)pack_e4m3(*scales) * (double)tensor_scale;
            if (stats) block_stats(values + at, n, codes + at, unit, stats);
        }
    return 0;
}

void quant_nvfp4_back(const uint8_t *codes, const uint8_t *scales, float tensor_scale, int out,
                      int in, float *values) {
    int blocks = (in + QUANT_BLOCK_NVFP4 - 1) / QUANT_BLOCK_NVFP4;
    for (int o = 0; o < out; o++)
        for (int i = 0; i < in; i++) {
            size_t at = (size_t)o * (size_t)in + (size_t)i;
            uint8_t scale = scales[(size_t)o * (size_t)blocks + (size_t)(i / QUANT_BLOCK_NVFP4)];
            values[at] = pack_e2m1[codes[at] & 15] * pack_e4m3(scale) * tensor_scale;
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
