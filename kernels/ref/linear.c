/* linear.c - the reference for products with packed weights: linear, linear_t, outer, embed.
 *
 * Knows: the record layout through pack_get; the order of summation is kern_dot_tile of math.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cpu.h"

/* Row o of the weight as f32 (without the tensor scale), in a buffer of w->in floats. */
static void weight_row(float *to, const struct kern_weight *w, int o) {
    for (int i = 0; i < w->in; i++) to[i] = pack_get(w->data.p, w->format, w->out, w->in, o, i);
}

void ref_embed(struct kern *k, const struct kern_embed *a) {
    (void)k;
    const int32_t *tokens = a->tokens.p;
    float *y = a->y.p;
    for (int r = 0; r < a->rows; r++)
        for (int i = 0; i < a->w.in; i++)
            y[(size_t)r * (size_t)a->w.in + (size_t)i] =
                pack_get(a->w.data.p, a->w.format, a->w.out, a->w.in, tokens[r], i) * a->w.scale;
}

static void rows_get(float *to, kptr from, enum kern_type type, size_t rows, size_t n, size_t ld) {
    for (size_t r = 0; r < rows; r++)
        for (size_t i = 0; i < n; i++) to[r * n + i] = cpu_get(from, type, r * ld + i);
}

static void linear_one(const struct kern_linear *a) {
    const float *bias = a->bias.p;
    const size_t rows = (size_t)a->rows, in = (size_t)a->w.in,
                 rank = a->b.out ? (size_t)a->b.in : 0;
    float *x = cpu_scratch((rows + 1) * (in + rank) * sizeof *x), *u = x + rows * in;
    float *w = u + rows * rank, *b = w + in, scale = a->scale * a->w.scale;
    rows_get(x, a->x, a->x_type, rows, in, (size_t)a->x_ld);
    rows_get(u, a->u, a->x_type, rows, rank, (size_t)a->u_ld);
    for (int o = 0; o < a->w.out; o++) {
        weight_row(w, &a->w, o);
        if (rank) weight_row(b, &a->b, o);
        for (size_t r = 0; r < rows; r++) {
            size_t at = r * (size_t)a->y_ld + (size_t)o;
            float v = kern_dot_tile(0.0f, x + r * in, 1, w, 1, in) * scale;
            if (bias) v += bias[o];
            if (a->accumulate) v += ((const float *)a->y.p)[at];
            if (rank) v += kern_dot_tile(0.0f, u + r * rank, 1, b, 1, rank);
            cpu_put(a->y, a->y_type, at, v);
        }
    }
}

void ref_linear(struct kern *k, const struct kern_linear *a, int n) {
    (void)k;
    for (int i = 0; i < n; i++) linear_one(&a[i]);
}

void ref_linear_t(struct kern *k, const struct kern_linear_t *a) {
    (void)k;
    const size_t in = (size_t)a->w.in, rows = (size_t)a->rows;
    float *acc = cpu_scratch((in * rows + 32 * in) * sizeof *acc), *w = acc + in * rows;
    float scale = a->scale * a->w.scale, dy[32];
    memset(acc, 0, in * rows * sizeof *acc);
    for (int o = 0; o < a->w.out; o += 32) {          /* one block of the tile order */
        int n = a->w.out - o < 32 ? a->w.out - o : 32;
        for (int i = 0; i < n; i++) weight_row(w + (size_t)i * in, &a->w, o + i);
        for (size_t r = 0; r < rows; r++) {
            for (int i = 0; i < n; i++)
                dy[i] = cpu_round(((const float *)a->dy.p)[r * (size_t)a->dy_ld + (size_t)(o + i)],
                                  a->round);
            float *to = acc + r * in;
            for (size_t i = 0; i < in; i++)
                to[i] = kern_dot_tile(to[i], dy, 1, w + i, in, (size_t)n);
        }
    }
    for (size_t r = 0; r < rows; r++)
        for (size_t i = 0; i < in; i++) {
            float *dx = (float *)a->dx.p + r * (size_t)a->dx_ld + i, v = acc[r * in + i] * scale;
            *dx = a->accumulate ? *dx + v : v;
        }
}

void ref_outer(struct kern *k, const struct kern_outer *a) {
    (void)k;
    const size_t m = (size_t)a->m, n = (size_t)a->n;
    for (int s = 0; s < a->seqs; s++) {
        const size_t first = (size_t)a->seq_start[s], rows = (size_t)a->seq_start[s + 1] - first;
        float *x = cpu_scratch(rows * (n + 1) * sizeof *x), *y = x + rows;
        const size_t b_at = first * (size_t)a->b_ld * (a->b_type == KERN_F32 ? 4 : 2);
        rows_get(y, kptr_at(a->b, b_at), a->b_type, rows, n, (size_t)a->b_ld);
        for (size_t i = 0; i < m; i++) {
            for (size_t r = 0; r < rows; r++)
                x[r] = cpu_round(
                    a->scale * ((const float *)a->a.p)[(first + r) * (size_t)a->a_ld + i],
                    a->round);
            for (size_t j = 0; j < n; j++)
                ((float *)a->g.p)[i * n + j] += kern_dot_tile(0.0f, x, 1, y + j, n, rows);
        }
    }
}
