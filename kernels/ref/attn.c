/* attn.c - the reference for attention over paged keys and values, forward and backward.
 *
 * Knows: the page layout through cpu_kv_at and the order of every sum; one query vector at a time.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cpu.h"

void ref_kv_put(struct kern *k, const struct kern_kv_put *a) {
    (void)k;
    const struct kern_kv *kv = &a->kv;
    const int32_t *slots = a->slots.p, *pos = a->pos.p;
    for (int r = 0; r < a->rows; r++)
        for (int h = 0; h < kv->kv_heads; h++) {
            size_t from = ((size_t)r * (size_t)kv->kv_heads + (size_t)h) * (size_t)kv->head_dim;
            size_t to_k = cpu_kv_at(kv, a->layer, slots[r], pos[r], h, 0);
            size_t to_v = cpu_kv_at(kv, a->layer, slots[r], pos[r], h, 1);
            for (int i = 0; i < kv->head_dim; i++) {
                cpu_put(kv->pages, kv->type, to_k + (size_t)i,
                        cpu_get(a->k, a->k_type, from + (size_t)i));
                cpu_put(kv->pages, kv->type, to_v + (size_t)i,
                        ((const float *)a->v.p)[from + (size_t)i]);
            }
        }
}

static void row_get(float *to, kptr from, enum kern_type t, size_t at, int n) {
    for (int i = 0; i < n; i++) to[i] = cpu_get(from, t, at + (size_t)i);
}

/* One query vector; o, key and q are buffers of head_dim floats. */
static void attn_one(const struct kern_attn *a, int r, int h, float *q, float *key, float *o) {
    const struct kern_kv *kv = &a->kv;
    int dim = kv->head_dim, slot = ((const int32_t *)a->slots.p)[r],
        keys = ((const int32_t *)a->pos.p)[r] + 1;
    int kvh = (int)((int64_t)h * kv->kv_heads / a->heads);
    size_t at = ((size_t)r * (size_t)a->heads + (size_t)h) * (size_t)dim;
    float m = -INFINITY, l = 0.0f;
    row_get(q, a->q, a->q_type, at, dim);
    for (int i = 0; i < dim; i++) o[i] = 0.0f;
    for (int t = 0; t < keys; t += KERN_PAGE) {
        int n = keys - t < KERN_PAGE ? keys - t : KERN_PAGE;
        float p[KERN_PAGE], most = m, lane[16] = { 0 };
        for (int j = 0; j < n; j++) {
            row_get(key, kv->pages, kv->type, cpu_kv_at(kv, a->layer, slot, t + j, kvh, 0), dim);
            p[j] = kern_dotf(q, key, dim) * a->scale;
            most = p[j] > most ? p[j] : most;
        }
        float fix = kern_expf(m - most);
        for (int j = 0; j < n; j++) {
            p[j] = kern_expf(p[j] - most);
            lane[j & 15] += p[j];
        }
        l = fmaf(l, fix, kern_fold16(lane));
        m = most;
        for (int i = 0; i < dim; i++) o[i] *= fix;
        for (int j = 0; j < n; j++) {
            row_get(key, kv->pages, kv->type, cpu_kv_at(kv, a->layer, slot, t + j, kvh, 1), dim);
            for (int i = 0; i < dim; i++) o[i] = fmaf(p[j], key[i], o[i]);
        }
    }
    float inv = 1.0f / l;
    for (int i = 0; i < dim; i++) cpu_put(a->y, a->y_type, at + (size_t)i, o[i] * inv);
    if (a->lse.p) ((float *)a->lse.p)[(size_t)r * (size_t)a->heads + (size_t)h] = m + kern_logf(l);
}

void ref_attn(struct kern *k, const struct kern_attn *a) {
    (void)k;
    int dim = a->kv.head_dim;
    float *buf = cpu_scratch((size_t)dim * 3 * sizeof *buf);
    for (int r = 0; r < a->rows; r++)
        for (int h = 0; h < a->heads; h++) attn_one(a, r, h, buf, buf + dim, buf + 2 * dim);
}

/* Adds the share of query (row r, head h), which sees `keys` keys of the sequence that starts at
 * row `first`. */
static void attn_bwd_one(const struct kern_attn_bwd *a, int first, int r, int h, float *buf) {
    const struct kern_kv *kv = &a->kv;
    int dim = kv->head_dim, slot = ((const int32_t *)a->slots.p)[first], keys = r - first + 1;
    int kvh = (int)((int64_t)h * kv->kv_heads / a->heads);
    size_t at = ((size_t)r * (size_t)a->heads + (size_t)h) * (size_t)dim;
    float *q = buf, *y = buf + dim, *key = buf + 2 * dim, *val = buf + 3 * dim;
    const float *dy = (const float *)a->dy.p + at;
    float *dq = (float *)a->dq.p + at,
          lse = ((const float *)a->lse.p)[(size_t)r * (size_t)a->heads + (size_t)h];
    row_get(q, a->q, a->q_type, at, dim);
    row_get(y, a->y, a->y_type, at, dim);
    float delta = kern_dotf(dy, y, dim);
    for (int j = 0; j < keys; j++) {
        row_get(key, kv->pages, kv->type, cpu_kv_at(kv, a->layer, slot, j, kvh, 0), dim);
        row_get(val, kv->pages, kv->type, cpu_kv_at(kv, a->layer, slot, j, kvh, 1), dim);
        float p = kern_expf(kern_dotf(q, key, dim) * a->scale - lse);
        float ds = p * (kern_dotf(dy, val, dim) - delta) * a->scale;
        size_t to = ((size_t)(first + j) * (size_t)kv->kv_heads + (size_t)kvh) * (size_t)dim;
        float *dk = (float *)a->dk.p + to, *dv = (float *)a->dv.p + to;
        for (int i = 0; i < dim; i++) {
            dq[i] = fmaf(ds, key[i], dq[i]);
            dk[i] = fmaf(ds, q[i], dk[i]);
            dv[i] = fmaf(p, dy[i], dv[i]);
        }
    }
}

void ref_attn_bwd(struct kern *k, const struct kern_attn_bwd *a) {
    (void)k;
    if (a->seqs <= 0) return;
    size_t dim = (size_t)a->kv.head_dim, first = (size_t)a->seq_start[0],
           rows = (size_t)a->seq_start[a->seqs] - first;
    size_t q_row = (size_t)a->heads * dim, kv_row = (size_t)a->kv.kv_heads * dim;
    memset((float *)a->dq.p + first * q_row, 0, rows * q_row * sizeof(float));
    memset((float *)a->dk.p + first * kv_row, 0, rows * kv_row * sizeof(float));
    memset((float *)a->dv.p + first * kv_row, 0, rows * kv_row * sizeof(float));
    float *buf = cpu_scratch(dim * 4 * sizeof *buf);
    for (int s = 0; s < a->seqs; s++)
        for (int r = a->seq_start[s]; r < a->seq_start[s + 1]; r++)
            for (int h = 0; h < a->heads; h++) attn_bwd_one(a, a->seq_start[s], r, h, buf);
}
