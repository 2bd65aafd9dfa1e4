/* rows.c - the reference for norms, activations, rotations and moves of rows.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cpu.h"

void ref_rmsnorm(struct kern *k, const struct kern_rmsnorm *a) {
    (void)k;
    const float *w = a->w.p, *dw = a->dw.p;
    for (int r = 0; r < a->rows; r++) {
        const float *x = (const float *)a->x.p + (size_t)r * (size_t)a->dim;
        float m = 1.0f / sqrtf(kern_dotf(x, x, a->dim) / (float)a->dim + a->eps);
        if (a->rstd.p) ((float *)a->rstd.p)[r] = m;
        for (int i = 0; i < a->dim; i++) {
            float g = dw ? w[i] + dw[i] : w[i];
            cpu_put(a->y, a->y_type, (size_t)r * (size_t)a->dim + (size_t)i, x[i] * m * g);
        }
    }
}

void ref_rmsnorm_bwd(struct kern *k, const struct kern_rmsnorm_bwd *a) {
    (void)k;
    const float *w = a->w.p, *dw = a->dw.p;
    for (int r = 0; r < a->rows; r++) {
        size_t at = (size_t)r * (size_t)a->dim;
        const float *x = (const float *)a->x.p + at, *dy = (const float *)a->dy.p + at;
        float *dx = (float *)a->dx.p + at, m = ((const float *)a->rstd.p)[r], lane[16] = { 0 };
        for (int i = 0; i < a->dim; i++) {
            float g = dy[i] * (dw ? w[i] + dw[i] : w[i]);
            lane[i & 15] = fmaf(g, x[i], lane[i & 15]);
        }
        float c = m * m * m * (kern_fold16(lane) / (float)a->dim);
        for (int i = 0; i < a->dim; i++) {
            float g = dy[i] * (dw ? w[i] + dw[i] : w[i]);
            dx[i] += fmaf(-c, x[i], m * g);
        }
    }
}

void ref_rope(struct kern *k, const struct kern_rope *a) {
    (void)k;
    const int32_t *pos = a->pos.p;
    int half = a->head_dim / 2;
    for (int r = 0; r < a->rows; r++) {
        const float *c = (const float *)a->cos.p + (size_t)pos[r] * (size_t)half;
        const float *s = (const float *)a->sin.p + (size_t)pos[r] * (size_t)half;
        for (int h = 0; h < a->heads; h++) {
            size_t at = ((size_t)r * (size_t)a->heads + (size_t)h) * (size_t)a->head_dim;
            const float *x = (const float *)a->x.p + at;
            for (int i = 0; i < half; i++) {
                float x0 = x[i], x1 = x[i + half], sn = a->inverse ? -s[i] : s[i];
                cpu_put(a->y, a->y_type, at + (size_t)i, fmaf(x0, c[i], -(x1 * sn)));
                cpu_put(a->y, a->y_type, at + (size_t)(i + half), fmaf(x1, c[i], x0 * sn));
            }
        }
    }
}

void ref_swiglu(struct kern *k, const struct kern_swiglu *a) {
    (void)k;
    const float *gate = a->gate.p, *up = a->up.p;
    for (size_t i = 0; i < (size_t)a->rows * (size_t)a->dim; i++) {
        cpu_put(a->y, a->y_type, i, gate[i] * kern_sigmoidf(gate[i]) * up[i]);
        if (!a->gate_kept.p) continue;
        cpu_put(a->gate_kept, a->y_type, i, gate[i]);
        cpu_put(a->up_kept, a->y_type, i, up[i]);
    }
}

void ref_swiglu_bwd(struct kern *k, const struct kern_swiglu_bwd *a) {
    (void)k;
    const float *dy = a->dy.p;
    for (size_t i = 0; i < (size_t)a->rows * (size_t)a->dim; i++) {
        float g = cpu_get(a->gate, a->type, i), u = cpu_get(a->up, a->type, i);
        float s = kern_sigmoidf(g);
        ((float *)a->dup.p)[i] = dy[i] * (g * s);
        ((float *)a->dgate.p)[i] = dy[i] * u * (s * fmaf(g, 1.0f - s, 1.0f));
    }
}

void ref_add(struct kern *k, const struct kern_add *a) {
    (void)k;
    float *x = a->x.p;
    const float *y = a->y.p;
    for (size_t i = 0; i < a->n; i++) x[i] += y[i];
}

void ref_gather(struct kern *k, const struct kern_gather *a) {
    (void)k;
    const int32_t *index = a->index.p;
    size_t bytes = (size_t)a->dim * (a->type == KERN_F32 ? 4 : 2);
    for (int r = 0; r < a->rows; r++)
        memcpy((char *)a->y.p + (size_t)r * bytes, (const char *)a->x.p + (size_t)index[r] * bytes,
               bytes);
}

void ref_scatter_add(struct kern *k, const struct kern_scatter_add *a) {
    (void)k;
    const int32_t *index = a->index.p;
    for (int r = 0; r < a->rows; r++) {
        float *x = (float *)a->x.p + (size_t)index[r] * (size_t)a->dim;
        const float *y = (const float *)a->y.p + (size_t)r * (size_t)a->dim;
        for (int i = 0; i < a->dim; i++) x[i] += y[i];
    }
}
