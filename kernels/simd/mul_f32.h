/* mul_f32.h - the multiplier of mul.h in single precision: AVX2 and AVX-512, any operands.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_SIMD_MUL_F32_H
#define QERL_SIMD_MUL_F32_H
#include "kernels/simd/mul.h"

typedef float mul_t;
enum { MUL_ROWS = 1, MUL_IS_BF16 = 0 };
/* element k of a row or column is k lanes in */
enum { MUL_STEPS = 16, MUL_STEP = 2, MUL_CHAIN = 1 };
MUL_RUN_ARGS(mul_t);

INLINE vf mul_x(const mul_t *x) { return v_set(*x); }
INLINE vf mul_w(const mul_t *w) { return v_load(w); }
INLINE vf mul_fma(vf x, vf w, vf sum) { return v_fma(x, w, sum); }
static void lhs_rows(mul_t *to, size_t to_row, size_t to_block, const struct mul_source *s,
                     int rows, int k) {
    const vf scale = v_set(s->scale);
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < (k + 31) / 32 * 32; i += 16) {
            const int n = i < k ? v_left(i, k) : 0;
            vf v = n ? v_get_n(s->from, s->type, (size_t)r * s->ld + (size_t)i, n) : v_zero();
            v = v_mul(scale, v);
            v_store(to + (size_t)r * to_row + (size_t)(i / 32) * to_block + i % 32,
                    s->round ? v_round(v) : v);
        }
}

static void rhs_record(mul_t *to, const uint8_t *record, enum kern_format format) {
    if (format == KERN_FORMAT_BF16) {
        for (int k = 0; k < KERN_IN_BLOCK; k++)
            v_store(to + k * 16, v_load_h((const uint16_t *)(const void *)record + k * 16));
    } else if (format == KERN_FORMAT_F32) {
        memcpy(to, record, 2048);
    } else {
        bool mx = format == KERN_FORMAT_MXFP4;
        const vf s0 = mx ? v_e8m0(record + 256) : v_e4m3(record + 256),
                 s1 = mx ? s0 : v_e4m3(record + 272);
        __typeof__(v_e2m1_table()) table = v_e2m1_table();
        for (int k = 0; k < 16; k++) v_store(to + k * 16, v_mul(v_e2m1(record + k * 8, table), s0));
        for (int k = 16; k < 32; k++)
            v_store(to + k * 16, v_mul(v_e2m1(record + k * 8, table), s1));
    }
}

static void rhs_record_t(mul_t *to, mul_t *to2, const uint8_t *a, const uint8_t *b,
                         enum kern_format format) {
    float flat[512];
    for (int half = 0; half < 2; half++) {
        if (half && !b) {
            memset(to + 256, 0, 256 * sizeof *to);
            memset(to2 + 256, 0, 256 * sizeof *to2);
            return;
        }
        rhs_record(flat, half ? b : a, format);
        for (int i = 0; i < 2; i++) {
            float *out = (i ? to2 : to) + half * 256;
            const float *in = flat + i * 256;
            v_transpose8(out, 16, in, 16);
            v_transpose8(out + 8, 16, in + 128, 16);
            v_transpose8(out + 128, 16, in + 8, 16);
            v_transpose8(out + 136, 16, in + 136, 16);
        }
    }
}

static void rhs_rows(mul_t *to, const struct mul_source *s, int k, int cols) {
    const vf scale = v_set(s->scale);
    for (int i = 0; i < MUL_K; i++) {
        vf v = i < k ? v_mul(scale, v_get_n(s->from, s->type, (size_t)i * s->ld, cols)) : v_zero();
        v_store(to + i * 16, s->round ? v_round(v) : v);
    }
}

/* k pairs of `cols` columns; a short row of pairs goes through memory. */
INLINE void pairs_put(mul_t *to, const struct mul_source *s, const enum kern_type type, int k,
                      int cols) {
    const size_t size = type == KERN_F32 ? 4 : 2;
    uint8_t part[128] = { 0 };
    for (int i = 0; i < k; i += 2) {
        vf pair[2];
        const void *from = (const uint8_t *)s->from + (size_t)i * s->ld * size;
        if (cols < MUL_COLS) from = memcpy(part, from, (size_t)cols * 2 * size);
        if (type == KERN_F32) v_pairs(from, pair);
        else v_pairs_h(from, pair);
        v_store(to + i * 16, pair[0]);
        v_store(to + (i + 1) * 16, pair[1]);
    }
    memset(to + k * 16, 0, (size_t)(MUL_K - k) * 16 * sizeof *to);
}
static void rhs_pairs(mul_t *to, const struct mul_source *s, int k, int cols) {
    if (s->type == KERN_F32) pairs_put(to, s, KERN_F32, k, cols);
    else pairs_put(to, s, KERN_BF16, k, cols);
}

static void rhs_pairs_t(mul_t *to, const struct mul_source *s, int k, int cols) {
    if (s->type == KERN_BF16 && k == MUL_K && cols == MUL_COLS) {
        float pair[MUL_K * 8];                     /* [k][8]: two columns of bf16 in each */
        for (int i = 0; i < MUL_K; i += 8)
            v_transpose8(pair + i * 8, 8, (const float *)s->from + i, s->ld);
        for (int i = 0; i < MUL_K; i++)
            v_store(to + i * 16, v_load_h((const uint16_t *)(const void *)(pair + i * 8)));
        return;
    }
    for (int i = 0; i < MUL_K; i++)
        for (int c = 0; c < MUL_COLS; c++)
            to[i * 16 + c] = i < k && c < cols
                                 ? cpu_get((kptr){ (void *)(uintptr_t)s->from }, s->type,
                                           ((size_t)(c / 2) * s->ld + (size_t)i) * 2 +
                                               (size_t)(c % 2))
                                 : 0.0f;
}

#include "kernels/simd/mul_tile.h"
#endif
