/* quant.h - rows as a 4-bit unit would read them: scales block by block as kernels/quant.h makes
 * them, values sixteen at a time.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_SIMD_QUANT_H
#define QERL_SIMD_QUANT_H
#include "kernels/quant.h"
#include "kernels/simd/rows.h"

/* The code's value climbs by these at each of its steps; adding +0 makes +0 of -0. */
INLINE vf quant_vec(vf x, const struct quant_block *b, float tensor) {
    static const float step[QUANT_STEPS] = { .5f, .5f, .5f, .5f, 1, 1, 2 };
    const vf by = v_set(b->by), a = b->divides ? v_div(v_abs(x), by) : v_mul(v_abs(x), by);
    vf y = v_zero();
    for (int i = 0; i < QUANT_STEPS; i++) y = v_climb(y, a, b->least[i], step[i]);
    y = v_mul(v_mul(y, v_set(b->unit)), v_set(tensor));
    return v_add(v_copysign(y, x), v_zero());
}

/* Largest magnitude of a row; NaN when it holds a value that is not finite. */
INLINE float quant_most(const struct kern_quant_rows *a, size_t at) {
    vf most = v_zero(), bad = v_zero();
    for (int i = 0; i < a->dim; i += 16) {
        const int n = v_left(i, a->dim);
        const vf x = v_get_n(a->x.p, a->type, at + (size_t)i, n);
        most = v_max(v_abs(x), most);
        bad = v_fma(x, v_zero(), bad);
    }
    const float b = v_fold(bad);
    return b == 0 ? v_fold_max(most) : NAN;
}

INLINE void quant_row_of(const struct kern_quant_rows *a, size_t at, enum kern_format format,
                         float tensor) {
    const int size = format == KERN_FORMAT_MXFP4 ? QUANT_BLOCK : QUANT_BLOCK_NVFP4;
    for (int first = 0; first < a->dim; first += size, at += (size_t)size) {
        const int left = a->dim - first, n = left < 16 ? left : 16;
        const int m = size == 16 || left <= 16 ? 0 : left < 32 ? left - 16 : 16;
        const vf x = v_get_n(a->x.p, a->type, at, n),
                 z = m ? v_get_n(a->x.p, a->type, at + 16, m) : v_zero();
        struct quant_block b;
        quant_block_fill(&b, format, a->seed, v_fold_max(v_max(v_abs(x), v_abs(z))), tensor);
        v_put_n(a->y.p, a->type, at, quant_vec(x, &b, tensor), n);
        if (m) v_put_n(a->y.p, a->type, at + 16, quant_vec(z, &b, tensor), m);
    }
}

static void quant_rows_part(void *arg, int part, int parts) {
    ROWS_RANGE(quant_rows, a->rows);
    for (; row < end; row++) {
        const size_t at = row * (size_t)a->dim;
        const float most = quant_most(a, at);
        if (most != most)
            for (int i = 0; i < a->dim; i += 16)
                v_put_n(a->y.p, a->type, at + (size_t)i, v_set(NAN), v_left(i, a->dim));
        else if (a->format == KERN_FORMAT_MXFP4) quant_row_of(a, at, KERN_FORMAT_MXFP4, 1);
        else quant_row_of(a, at, KERN_FORMAT_NVFP4, quant_tensor_scale(most, a->seed));
    }
}
ROWS_OP(quant_rows, a->rows, a->dim)
#endif
