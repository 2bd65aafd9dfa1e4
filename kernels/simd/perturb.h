/* perturb.h - noise on what an operation returned, row by row, and silu by itself.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_SIMD_PERTURB_H
#define QERL_SIMD_PERTURB_H
#include "kernels/simd/noise.h"
#include "kernels/simd/rows.h"

static void silu_part(void *arg, int part, int parts) {
    ROWS_RANGE(silu, a->rows);
    const size_t last = end * (size_t)a->dim;
    for (size_t at = row * (size_t)a->dim; at < last; at += 16) {
        const int n = last - at < 16 ? (int)(last - at) : 16;
        const vf x = v_get_n(a->x.p, a->x_type, at, n);
        v_store_n((float *)a->y.p + at, v_mul(x, v_sigmoid(x)), n);
    }
}
ROWS_OP(silu, a->rows, a->dim * 4)

/* What follows the noise that made y of t: element i of the row, n of them. */
INLINE void perturb_put(const struct kern_perturb *a, size_t row, int i, vf t, vf y, int n) {
    const size_t to = row * (size_t)a->y_ld + (size_t)i;
    if (a->delta) y = v_sub(y, t);
    if (a->bias.p) y = v_add(y, v_load_n((const float *)a->bias.p + i, n));
    if (a->mul.p)
        y = v_mul(y, v_load_n((const float *)a->mul.p + row * (size_t)a->dim + i, n));
    if (a->accumulate) y = v_add(y, v_load_n((const float *)a->y.p + to, n));
    v_put_n(a->y.p, a->y_type, to, y, n);
}
static float perturb_most(const struct kern_perturb *a, size_t row) {
    vf most = v_zero();
    for (int i = 0; i < a->dim; i += 16)
        most = v_max(v_abs(v_get_n(a->x.p, a->x_type, row * (size_t)a->x_ld + (size_t)i,
                                   v_left(i, a->dim))), most);
    return v_fold_max(most);
}

INLINE void perturb_row(const struct kern_perturb *a, size_t row, struct noise *s,
                        const enum kern_noise_type type, const bool bf16) {
    uint32_t c[4];
    kern_noise_counter(c, s->n, (int)row, 0);
    const vu c0 = i_set(c[0]), c1 = i_set(c[1]), c2 = i_set(c[2]), c3 = i_set(c[3]),
             places = i_places(3);
    const vf edge = v_set(type == KERN_NOISE_DEADZONE
                              ? kern_noise_edge(s->n, perturb_most(a, row)) : 0.0f);
    const size_t from = row * (size_t)a->x_ld;
    struct noise_lanes l = noise_lanes();
    for (int i = 0; i < a->dim; i += NOISE_WIDE) {
        vf z[4];
        noise_draw(z, s, type, c0, c1, c2, i_or(c3, i_or(i_set((uint32_t)i / 4), places)));
        if (a->dim - i >= NOISE_WIDE)
            for (int j = 0; j < 4; j++) {
                const vf t = v_get_n(a->x.p, a->x_type, from + (size_t)(i + 16 * j), 16);
                perturb_put(a, row, i + 16 * j, t,
                            noise_add(s, type, bf16, t, z[j], edge, 16, &l), 16);
            }
        else
            for (int j = 0, at = i; at < a->dim; j++, at += 16) {
                const int n = v_left(at, a->dim);
                const vf t = v_get_n(a->x.p, a->x_type, from + (size_t)at, n);
                perturb_put(a, row, at, t, noise_add(s, type, bf16, t, z[j], edge, n, &l), n);
            }
    }
    if (s->n->sums.p) noise_span(s, &l, v_fold(l.r), v_fold(l.r2));
}

static void perturb_part(void *arg, int part, int parts) {
    ROWS_RANGE(perturb, a->rows);
    const enum kern_noise_type type = a->noise.type;
    struct noise s;
    noise_open(&s, &a->noise);
    for (; row < end; row++)
        if (type == KERN_NOISE_RELATIVE_GAUSSIAN && !a->noise.bf16)
            perturb_row(a, row, &s, KERN_NOISE_RELATIVE_GAUSSIAN, false);
        else if (type != KERN_NOISE_OFF) perturb_row(a, row, &s, type, a->noise.bf16);
        else
            for (int i = 0; i < a->dim; i += 16) {
                const int n = v_left(i, a->dim);
                const size_t from = row * (size_t)a->x_ld + (size_t)i;
                const vf t = v_get_n(a->x.p, a->x_type, from, n);
                perturb_put(a, row, i, t, t, n);
            }
    noise_close(&s);
}
ROWS_OP(perturb, a->rows, a->dim * 8)
#endif
