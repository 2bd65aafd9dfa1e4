/* quant.c - see quant.h. Order: whole tensors, what was lost. The arithmetic of a block is
 * kernels/quant.h's.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/quant.h"

#include <math.h>

#include "lib/base/str.h"

static float largest(const float *x, int n) {
    float amax = 0;
    for (int i = 0; i < n; i++) amax = fabsf(x[i]) > amax ? fabsf(x[i]) : amax;
    return amax;
}

float quant_nvfp4_tensor_scale(float amax, enum model_rounding r) {
    return quant_tensor_scale(amax, r == MODEL_ROUNDING_SEED);
}

/* Codes of a block; its scale. */
static uint8_t block_codes(const float *x, int n, enum kern_format format, enum model_rounding r,
                           float tensor_scale, uint8_t *code) {
    struct quant_block b;
    quant_block_fill(&b, format, r == MODEL_ROUNDING_SEED, largest(x, n), tensor_scale);
    for (int i = 0; i < n; i++) code[i] = quant_code(&b, x[i]);
    return b.scale;
}

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
            *scales = block_codes(values + at, n, KERN_FORMAT_MXFP4, r, 1, codes + at);
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
            *scales = block_codes(values + at, n, KERN_FORMAT_NVFP4, r, tensor_scale, codes + at);
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

static int round_row(float *x, int in, enum model_quant q, enum model_rounding r, float tensor,
                     uint8_t *codes, uint8_t *scales, struct quant_stats *stats, struct err *e) {
    if (q == MODEL_QUANT_MXFP4) {
        if (quant_mxfp4(x, 1, in, r, codes, scales, stats, e) < 0) return -1;
        quant_mxfp4_back(codes, scales, 1, in, x);
        return 0;
    }
    if (quant_nvfp4(x, 1, in, r, tensor, codes, scales, stats, e) < 0) return -1;
    quant_nvfp4_back(codes, scales, tensor, 1, in, x);
    return 0;
}

int quant_round(float *values, int out, int in, enum model_quant q, enum model_rounding r,
                struct quant_stats *stats, struct err *e) {
    assert(model_quant_rounds(q));
    if (check_finite(values, out, in, e) < 0) return -1;
    float amax = 0;
    for (int o = 0; o < out; o++)
        amax = fmaxf(amax, largest(values + (size_t)o * (size_t)in, in));
    const float tensor = quant_nvfp4_tensor_scale(amax, r);
    const size_t scales = ((size_t)in + QUANT_BLOCK_NVFP4 - 1) / QUANT_BLOCK_NVFP4;
    uint8_t *codes = mem_alloc((size_t)in + scales);
    int rc = 0;
    for (int o = 0; o < out && rc == 0; o++)
        rc = round_row(values + (size_t)o * (size_t)in, in, q, r, tensor, codes, codes + in, stats,
                       e);
    free(codes);
    return rc;
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
