/* noise.c - the reference for noise on what an operation returns, and for silu by itself.
 *
 * Knows: rows, spans and their counters. One element's arithmetic is kernels/noise_math.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cpu.h"

void ref_silu(struct kern *k, const struct kern_silu *a) {
    (void)k;
    for (size_t i = 0; i < (size_t)a->rows * (size_t)a->dim; i++) {
        float x = cpu_get(a->x, a->x_type, i);
        ((float *)a->y.p)[i] = x * kern_sigmoidf(x);
    }
}

void ref_noise_add(const struct kern_noise *n, const uint32_t counter[4], float edge, float *t,
                   int first, int count, struct kern_noise_lanes *l) {
    float z[4] = { 0 };
    for (int i = first; i < first + count; i++) {
        const uint32_t c[4] = { counter[0], counter[1], counter[2],
                                counter[3] | (uint32_t)(i / 4) };
        if (i % 4 == 0) kern_noise_draw4(z, n, c);
        t[i - first] = kern_noise_add(n, t[i - first], z[i % 4], edge, i, l);
    }
    if (l) kern_noise_span(l);
}

static void perturb_row(const struct kern_perturb *a, int row, float *t,
                        struct kern_noise_lanes *l) {
    const struct kern_noise *n = &a->noise;
    const float *bias = a->bias.p, *mul = a->mul.p;
    const size_t from = (size_t)row * (size_t)a->x_ld, to = (size_t)row * (size_t)a->y_ld;
    uint32_t counter[4];
    float most = 0.0f;
    for (int i = 0; i < a->dim; i++) {
        t[i] = cpu_get(a->x, a->x_type, from + (size_t)i);
        most = fabsf(t[i]) > most ? fabsf(t[i]) : most;
    }
    kern_noise_counter(counter, n, row, 0);
    if (n->type != KERN_NOISE_OFF)
        ref_noise_add(n, counter, kern_noise_edge(n, most), t, 0, a->dim, n->sums.p ? l : NULL);
    for (int i = 0; i < a->dim; i++) {
        float y = t[i];
        if (a->delta) y -= cpu_get(a->x, a->x_type, from + (size_t)i);
        if (bias) y += bias[i];
        if (mul) y *= mul[(size_t)row * (size_t)a->dim + (size_t)i];
        if (a->accumulate) y += ((const float *)a->y.p)[to + (size_t)i];
        cpu_put(a->y, a->y_type, to + (size_t)i, y);
    }
}

void ref_perturb(struct kern *k, const struct kern_perturb *a) {
    (void)k;
    assert(a->dim <= KERN_NOISE_DIM_MAX && (!a->accumulate || a->y_type == KERN_F32));
    struct kern_noise_lanes lanes = { 0 };
    float *t = cpu_scratch((size_t)a->dim * sizeof *t);
    for (int r = 0; r < a->rows; r++) perturb_row(a, r, t, &lanes);
    cpu_noise_take(&a->noise, lanes.sum);
}
