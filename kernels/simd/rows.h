/* rows.h - norms, activations, rotations, moves of rows, AdamW: whatever works on one row or
 * element by itself.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_SIMD_ROWS_H
#define QERL_SIMD_ROWS_H
#include "kernels/simd/vec.h"

#define ROWS_OP(op, count, work)                                                                   \
    static void simd_##op(struct kern *k, const struct kern_##op *a) {                             \
        if ((count) > 0)                                                                           \
            cpu_run(k, parts_for(k, (size_t)(count), (size_t)(work)), op##_part,                   \
                    (void *)(uintptr_t)a);                                                         \
    }
#define ROWS_RANGE(type, count)                                                                    \
    const struct kern_##type *a = arg;                                                             \
    size_t row = part_at((size_t)(count), part, parts),                                            \
           end = part_at((size_t)(count), part + 1, parts)

static void embed_part(void *arg, int part, int parts) {
    ROWS_RANGE(embed, a->rows);
    const struct kern_weight *w = &a->w;
    size_t per_panel = ((size_t)w->in + KERN_IN_BLOCK - 1) / KERN_IN_BLOCK * 512;
    for (; row < end; row++) {
        int token = ((const int32_t *)a->tokens.p)[row];
        float *y = (float *)a->y.p + row * (size_t)w->in;
        size_t at = (size_t)(token / 16) * per_panel + (size_t)(token % 16);
        if (w->format == KERN_FORMAT_BF16)
            for (int i = 0; i < w->in; i++)
                y[i] = bf16_to_f32(((const uint16_t *)w->data.p)[at + (size_t)i * 16]) * w->scale;
        else
            for (int i = 0; i < w->in; i++)
                y[i] = pack_get(w->data.p, w->format, w->out, w->in, token, i) * w->scale;
    }
}
ROWS_OP(embed, a->rows, a->w.in * 4)

INLINE vf gain(const float *w, const float *dw, int i, int n) {
    return dw ? v_add(v_load_n(w + i, n), v_load_n(dw + i, n)) : v_load_n(w + i, n);
}

static void rmsnorm_part(void *arg, int part, int parts) {
    ROWS_RANGE(rmsnorm, a->rows);
    for (; row < end; row++) {
        const float *x = (const float *)a->x.p + row * (size_t)a->dim;
        vf acc = v_zero();
        for (int i = 0; i < a->dim; i += 16) {
            int n = v_left(i, a->dim);
            vf v = v_load_n(x + i, n);
            acc = v_fma_n(v, v, acc, n);
        }
        float m = 1.0f / sqrtf(v_fold(acc) / (float)a->dim + a->eps);
        if (a->rstd.p) ((float *)a->rstd.p)[row] = m;
        for (int i = 0; i < a->dim; i += 16) {
            int n = v_left(i, a->dim);
            vf v = v_mul(v_mul(v_load_n(x + i, n), v_set(m)), gain(a->w.p, a->dw.p, i, n));
            v_put_n(a->y.p, a->y_type, row * (size_t)a->dim + (size_t)i, v, n);
        }
    }
}
ROWS_OP(rmsnorm, a->rows, a->dim)

static void rmsnorm_bwd_part(void *arg, int part, int parts) {
    ROWS_RANGE(rmsnorm_bwd, a->rows);
    for (; row < end; row++) {
        const float *x = (const float *)a->x.p + row * (size_t)a->dim,
                    *dy = (const float *)a->dy.p + row * (size_t)a->dim;
        float *dx = (float *)a->dx.p + row * (size_t)a->dim, m = ((const float *)a->rstd.p)[row];
        vf acc = v_zero();
        for (int i = 0; i < a->dim; i += 16) {
            int n = v_left(i, a->dim);
            acc = v_fma_n(v_mul(v_load_n(dy + i, n), gain(a->w.p, a->dw.p, i, n)),
                          v_load_n(x + i, n), acc, n);
        }
        vf c = v_set(-(m * m * m * (v_fold(acc) / (float)a->dim)));
        for (int i = 0; i < a->dim; i += 16) {
            int n = v_left(i, a->dim);
            vf g = v_mul(v_load_n(dy + i, n), gain(a->w.p, a->dw.p, i, n));
            v_store_n(dx + i,
                      v_add(v_load_n(dx + i, n), v_fma(c, v_load_n(x + i, n), v_mul(v_set(m), g))),
                      n);
        }
    }
}
ROWS_OP(rmsnorm_bwd, a->rows, a->dim)

static void rope_part(void *arg, int part, int parts) {
    ROWS_RANGE(rope, a->rows);
    int half = a->head_dim / 2;
    for (; row < end; row++) {
        size_t at = (size_t)((const int32_t *)a->pos.p)[row] * (size_t)half;
        const float *cs = (const float *)a->cos.p + at, *sn = (const float *)a->sin.p + at;
        for (int i = 0; i < half; i += 16) {
            int n = v_left(i, half);
            vf c = v_load_n(cs + i, n), s = v_load_n(sn + i, n);
            if (a->inverse) s = v_neg(s);
            for (int h = 0; h < a->heads; h++) {
                size_t lo = (row * (size_t)a->heads + (size_t)h) * (size_t)a->head_dim + (size_t)i,
                       hi = lo + (size_t)half;
                vf x0 = v_load_n((const float *)a->x.p + lo, n),
                   x1 = v_load_n((const float *)a->x.p + hi, n);
                v_put_n(a->y.p, a->y_type, lo, v_fma(x0, c, v_neg(v_mul(x1, s))), n);
                v_put_n(a->y.p, a->y_type, hi, v_fma(x1, c, v_mul(x0, s)), n);
            }
        }
    }
}
ROWS_OP(rope, a->rows, a->heads * a->head_dim)

/* One head's k and v into its places of a page, 16 elements at a time: rounded as one vector, then
 * spread. page_k and page_v are where the position's element 0 goes. */
INLINE void kv_put_head(const struct kern_kv_put *a, size_t from, size_t page_k, size_t page_v,
                        const enum kern_type type) {
    const size_t size = type == KERN_F32 ? 4 : 2, dim = (size_t)a->kv.head_dim;
    for (size_t i = 0; i < dim; i += 16) {
        uint8_t k[64], v[64], *to_k = (uint8_t *)a->kv.pages.p + (page_k + i * KERN_PAGE) * size,
                              *to_v = (uint8_t *)a->kv.pages.p + (page_v + i * 2) * size;
        const int n = v_left((int)i, (int)dim);
        v_put_n(k, type, 0, v_get_n(a->k.p, a->k_type, from + i, n), n);
        v_put_n(v, type, 0, v_get_n(a->v.p, KERN_F32, from + i, n), n);
        for (size_t c = 0; c < (size_t)n; c += 2)
            memcpy(to_k + c * KERN_PAGE * size, k + c * size, 2 * size);
        for (size_t c = 0; c < (size_t)n; c++) memcpy(to_v + c * 2 * size, v + c * size, size);
    }
}

static void kv_put_part(void *arg, int part, int parts) {
    ROWS_RANGE(kv_put, a->rows);
    const struct kern_kv *kv = &a->kv;
    for (; row < end; row++) {
        int slot = ((const int32_t *)a->slots.p)[row], pos = ((const int32_t *)a->pos.p)[row];
        for (int h = 0; h < kv->kv_heads; h++) {
            size_t from = (row * (size_t)kv->kv_heads + (size_t)h) * (size_t)kv->head_dim;
            size_t k = cpu_kv_at(kv, a->layer, slot, pos, h, 0, 0),
                   v = cpu_kv_at(kv, a->layer, slot, pos, h, 1, 0);
            if (kv->type == KERN_F32) kv_put_head(a, from, k, v, KERN_F32);
            else kv_put_head(a, from, k, v, KERN_BF16);
        }
    }
}
ROWS_OP(kv_put, a->rows, a->kv.kv_heads * a->kv.head_dim)

static void swiglu_part(void *arg, int part, int parts) {
    ROWS_RANGE(swiglu, a->rows);
    for (; row < end; row++) {
        size_t at = row * (size_t)a->dim;
        for (int i = 0; i < a->dim; i += 16, at += 16) {
            int n = v_left(i, a->dim);
            vf g = v_load_n((const float *)a->gate.p + at, n),
               u = v_load_n((const float *)a->up.p + at, n);
            v_put_n(a->y.p, a->y_type, at, v_mul(v_mul(g, v_sigmoid(g)), u), n);
            if (!a->gate_kept.p) continue;
            v_put_n(a->gate_kept.p, a->y_type, at, g, n);
            v_put_n(a->up_kept.p, a->y_type, at, u, n);
        }
    }
}
ROWS_OP(swiglu, a->rows, a->dim * 4)

static void swiglu_bwd_part(void *arg, int part, int parts) {
    ROWS_RANGE(swiglu_bwd, a->rows);
    for (; row < end; row++) {
        size_t at = row * (size_t)a->dim;
        for (int i = 0; i < a->dim; i += 16, at += 16) {
            int n = v_left(i, a->dim);
            vf g = v_get_n(a->gate.p, a->type, at, n), u = v_get_n(a->up.p, a->type, at, n);
            vf s = v_sigmoid(g), d = v_load_n((const float *)a->dy.p + at, n), one = v_set(1.0f);
            v_store_n((float *)a->dup.p + at, v_mul(d, v_mul(g, s)), n);
            v_store_n((float *)a->dgate.p + at,
                      v_mul(v_mul(d, u), v_mul(s, v_fma(g, v_sub(one, s), one))), n);
        }
    }
}
ROWS_OP(swiglu_bwd, a->rows, a->dim * 4)

/* Flat arrays are shared out in strips of 1,024 elements. */
enum { STRIP = 1024 };

static void add_part(void *arg, int part, int parts) {
    ROWS_RANGE(add, (a->n + STRIP - 1) / STRIP);
    float *x = a->x.p;
    const float *y = a->y.p;
    size_t last = end * STRIP < a->n ? end * STRIP : a->n;
    for (size_t i = row * STRIP; i < last; i += 16) {
        int n = last - i < 16 ? (int)(last - i) : 16;
        v_store_n(x + i, v_add(v_load_n(x + i, n), v_load_n(y + i, n)), n);
    }
}
ROWS_OP(add, (a->n + STRIP - 1) / STRIP, STRIP)

static void adamw_part(void *arg, int part, int parts) {
    ROWS_RANGE(adamw, (a->n + STRIP - 1) / STRIP);
    float *p = a->p.p, *m = a->m.p, *v = a->v.p;
    const float *grad = a->g.p;
    vf decay = v_set(-(a->lr * a->wd)), c1 = v_set(1.0f - a->b1), c2 = v_set(1.0f - a->b2);
    vf b1 = v_set(a->b1), b2 = v_set(a->b2), rate = v_set(-a->lr), eps = v_set(a->eps);
    size_t last = end * STRIP < a->n ? end * STRIP : a->n;
    for (size_t i = row * STRIP; i < last; i += 16) {
        int n = last - i < 16 ? (int)(last - i) : 16;
        vf g = v_mul(v_load_n(grad + i, n), v_set(a->g_scale)), w = v_load_n(p + i, n),
           x = v_fma(decay, w, w);
        vf mi = v_fma(b1, v_load_n(m + i, n), v_mul(c1, g));
        vf vi = v_fma(b2, v_load_n(v + i, n), v_mul(v_mul(c2, g), g));
        vf down = v_add(v_sqrt(v_mul(vi, v_set(a->v_scale))), eps);
        v_store_n(m + i, mi, n);
        v_store_n(v + i, vi, n);
        v_store_n(p + i, v_fma(rate, v_div(v_mul(mi, v_set(a->m_scale)), down), x), n);
    }
}
ROWS_OP(adamw, (a->n + STRIP - 1) / STRIP, STRIP * 4)

static void gather_part(void *arg, int part, int parts) {
    ROWS_RANGE(gather, a->rows);
    size_t bytes = (size_t)a->dim * (a->type == KERN_F32 ? 4 : 2);
    for (; row < end; row++)
        memcpy((char *)a->y.p + row * bytes,
               (const char *)a->x.p + (size_t)((const int32_t *)a->index.p)[row] * bytes, bytes);
}
ROWS_OP(gather, a->rows, a->dim)

static void scatter_add_part(void *arg, int part, int parts) {
    ROWS_RANGE(scatter_add, a->rows);
    for (; row < end; row++) {
        float *x = (float *)a->x.p + (size_t)((const int32_t *)a->index.p)[row] * (size_t)a->dim;
        const float *y = (const float *)a->y.p + row * (size_t)a->dim;
        for (int i = 0; i < a->dim; i += 16) {
            int n = v_left(i, a->dim);
            v_store_n(x + i, v_add(v_load_n(x + i, n), v_load_n(y + i, n)), n);
        }
    }
}
ROWS_OP(scatter_add, a->rows, a->dim)
#endif
