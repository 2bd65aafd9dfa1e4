/* attn.h - attention over paged keys and values, forward and backward, a page and a block of
 * queries at a time.
 *
 * A query is one (row, head); the G query heads of a kv head and neighbouring rows of a slot form
 * blocks that share the page unpacked to f32. Scores are 16-lane dot products folded sixteen at a
 * time; all else is tile.h. The forward owns (rows, kv head), the backward (sequence, kv head):
 * every sum is a whole part's own. Order: block of queries, forward, backward.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_SIMD_ATTN_H
#define QERL_SIMD_ATTN_H
#include "kernels/simd/tile.h"

enum { ATTN_QUERIES = 64 };                                  /* of a block */

/* Vectors of head_dim floats live in rows of `ld`, the next multiple of 16, zero beyond. */
INLINE void vec_get(float *to, const void *from, enum kern_type type, size_t at, int dim) {
    for (int i = 0; i < dim; i += 16)
        v_store(to + i, v_get_n(from, type, at + (size_t)i, v_left(i, dim)));
}
INLINE void vec_put(void *to, enum kern_type type, size_t at, const float *from, int dim) {
    for (int i = 0; i < dim; i += 16)
        v_put_n(to, type, at + (size_t)i, v_load(from + i), v_left(i, dim));
}
INLINE void page_get(float *to, const struct kern_kv *kv, int layer, int slot, int pos, int h,
                     int is_v, int n, size_t ld) {
    size_t at = cpu_kv_at(kv, layer, slot, pos, h, is_v);
    for (int j = 0; j < n; j++)
        vec_get(to + (size_t)j * ld, kv->pages.p, kv->type, at + (size_t)(j * kv->head_dim),
                kv->head_dim);
    memset(to + (size_t)n * ld, 0, (size_t)(KERN_PAGE - n) * ld * sizeof *to);
}

/* Dot products of q with the 32 vectors of a page, as two vectors of 16. */
INLINE void dots_of(vf out[2], const float *q, const float *page, const int dim, const size_t ld) {
    for (int half = 0; half < 2; half++) {
        vf acc[16];
#pragma GCC unroll 16
        for (int j = 0; j < 16; j++) {
            const float *key = page + (size_t)(half * 16 + j) * ld;
            acc[j] = v_zero();
#pragma GCC unroll 8
            for (int i = 0; i < dim; i += 16)
                acc[j] = v_fma_n(v_load(q + i), v_load(key + i), acc[j], v_left(i, dim));
        }
        out[half] = v_fold_all(acc);
    }
}
static void dots(vf out[2], const float *q, const float *page, int dim, size_t ld) {
    if (dim == 64) dots_of(out, q, page, 64, 64);
    else if (dim == 128) dots_of(out, q, page, 128, 128);
    else dots_of(out, q, page, dim, ld);
}

struct attn {
    const struct kern_attn *a;
    /* rows of a part; query heads of a kv head */
    int block_rows, group;
};

/* Scores to probabilities of one query for n keys of a page; p has 32 elements, zero beyond n. */
INLINE void softmax_page(float *p, float *m, float *l, float *fix, const vf s[2], vf scale, int n) {
    vf none = v_set(-INFINITY), lo = v_mul(s[0], scale), hi = v_mul(s[1], scale);
    lo = v_pick(lo, none, n < 16 ? n : 16);
    hi = v_pick(hi, none, n < 16 ? 0 : n - 16);
    float most = v_fold_max(v_max(hi, v_max(lo, v_set(*m))));
    lo = v_pick(v_exp(v_sub(lo, v_set(most))), v_zero(), n < 16 ? n : 16);
    hi = v_pick(v_exp(v_sub(hi, v_set(most))), v_zero(), n < 16 ? 0 : n - 16);
    *fix = kern_expf(*m - most);
    *l = fmaf(*l, *fix, v_fold(v_add(lo, hi)));
    *m = most;
    v_store(p, lo);
    v_store(p + 16, hi);
}

/* Queries [q0, q0 + count) of a run of rows of one slot that starts at row `first`; query i is row
 * first + i / group. */
static void attn_block(const struct attn *t, int kvh, int first, int q0, int count, float *buf) {
    const struct kern_attn *a = t->a;
    const struct kern_kv *kv = &a->kv;
    const int32_t *pos = a->pos.p;
    int dim = kv->head_dim, slot = ((const int32_t *)a->slots.p)[first], panels = (dim + 15) / 16,
        keys[ATTN_QUERIES], most = 0;
    size_t ld = (size_t)panels * 16;
    float *q = buf, *o = q + ATTN_QUERIES * ld, *key = o + ATTN_QUERIES * ld,
          *val = key + KERN_PAGE * ld;
    float *p = val + KERN_PAGE * ld, m[ATTN_QUERIES], l[ATTN_QUERIES], fix;
    for (int i = 0; i < count; i++) {
        int row = first + (q0 + i) / t->group, h = kvh * t->group + (q0 + i) % t->group;
        vec_get(q + (size_t)i * ld, a->q.p, a->q_type,
                ((size_t)row * (size_t)a->heads + (size_t)h) * (size_t)dim, dim);
        keys[i] = pos[row] + 1;
        if (keys[i] > most) most = keys[i];
        m[i] = -INFINITY;
        l[i] = 0.0f;
    }
    memset(o, 0, (size_t)count * ld * sizeof *o);
    vf scale = v_set(a->scale);
    for (int at = 0; at < most; at += KERN_PAGE) {
        int here = most - at < KERN_PAGE ? most - at : KERN_PAGE;
        page_get(key, kv, a->layer, slot, at, kvh, 0, here, ld);
        page_get(val, kv, a->layer, slot, at, kvh, 1, here, ld);
        for (int i = 0; i < count; i++) {
            int n = keys[i] - at < KERN_PAGE ? keys[i] - at : KERN_PAGE;
            if (n <= 0) continue;
            vf s[2];
            dots(s, q + (size_t)i * ld, key, dim, ld);
            softmax_page(p + i * KERN_PAGE, &m[i], &l[i], &fix, s, scale, n);
            for (int c = 0; c < panels; c++) {
                float *to = o + (size_t)i * ld + c * 16;
                v_store(to, v_mul(v_load(to), v_set(fix)));
            }
        }
        for (int i = 0, end; i < count; i = end) { /* neighbours that see as many keys: one tile */
            int n = keys[i] - at < KERN_PAGE ? keys[i] - at : KERN_PAGE;
            for (end = i + 1; end < count; end++)
                if ((keys[end] - at < KERN_PAGE ? keys[end] - at : KERN_PAGE) != n) break;
            if (n > 0)
                tile_page((struct tile){ .x = p + i * KERN_PAGE,
                                         .w = val,
                                         .w_k = ld,
                                         .w_panel = 16,
                                         .acc = o + (size_t)i * ld,
                                         .acc_row = ld,
                                         .acc_panel = 16,
                                         .n = n },
                          end - i, panels);
        }
    }
    for (int i = 0; i < count; i++) {
        int row = first + (q0 + i) / t->group, h = kvh * t->group + (q0 + i) % t->group;
        size_t head = (size_t)row * (size_t)a->heads + (size_t)h;
        vf inv = v_set(1.0f / l[i]);
        for (int c = 0; c < dim; c += 16)
            v_put_n(a->y.p, a->y_type, head * (size_t)dim + (size_t)c,
                    v_mul(v_load(o + (size_t)i * ld + c), inv), v_left(c, dim));
        if (a->lse.p) ((float *)a->lse.p)[head] = m[i] + kern_logf(l[i]);
    }
}

static void attn_part(void *arg, int part, int parts) {
    (void)parts;
    const struct attn *t = arg;
    const struct kern_attn *a = t->a;
    const int32_t *slots = a->slots.p;
    size_t ld = ((size_t)a->kv.head_dim + 15) / 16 * 16;
    int kvh = part % a->kv.kv_heads, row = part / a->kv.kv_heads * t->block_rows;
    int end = a->rows - row < t->block_rows ? a->rows : row + t->block_rows;
    float *buf = cpu_scratch(
        (2 * ATTN_QUERIES * ld + 2 * KERN_PAGE * ld + ATTN_QUERIES * KERN_PAGE) * sizeof *buf);
    for (int next; row < end; row = next) {
        for (next = row + 1; next < end && slots[next] == slots[row]; next++) continue;
        int queries = (next - row) * t->group;
        for (int q = 0; q < queries; q += ATTN_QUERIES)
            attn_block(t, kvh, row, q, queries - q < ATTN_QUERIES ? queries - q : ATTN_QUERIES,
                       buf);
    }
}

static void simd_attn(struct kern *k, const struct kern_attn *a) {
    if (a->rows <= 0) return;
    /* ragged groups: nobody has them, ref is right */
    if (a->heads % a->kv.kv_heads) {
        ref_attn(k, a);
        return;
    }
    struct attn t = { a, 1, a->heads / a->kv.kv_heads };
    int fit = ATTN_QUERIES / t.group, spread = a->rows * a->kv.kv_heads / (cpu_threads(k) * 4);
    t.block_rows = spread < fit ? spread : fit;
    if (t.block_rows < 1) t.block_rows = 1;
    cpu_run(k, (a->rows + t.block_rows - 1) / t.block_rows * a->kv.kv_heads, attn_part, &t);
}

struct attn_bwd {
    const struct kern_attn_bwd *a;
    int group;
};
/* Scratch of one part; vectors in rows of ld. */
struct bwd {
    int kvh, first, len, dim, panels;
    size_t ld;
    float *q, *dy, *dq;                                      /* [ATTN_QUERIES][ld] */
    float *key, *val, *dk, *dv;                              /* [32][ld] */
    float *p, *ds;                                           /* [ATTN_QUERIES][32] */
    float *delta;                                            /* [len * group]: dy . y */
};

INLINE size_t bwd_query_at(const struct attn_bwd *t, const struct bwd *b, int query) {
    size_t row = (size_t)(b->first + query / t->group),
           h = (size_t)(b->kvh * t->group + query % t->group);
    return row * (size_t)t->a->heads + h;
}

/* dk, dv of the page's n keys from the block's queries [q0, q0 + count): key j starts with query
 * j's own row. */
static void bwd_keys(const struct attn_bwd *t, struct bwd *b, int at, int n, int q0, int count) {
    for (int j0 = 0; j0 < n; j0 += TILE_R) {
        int rows = n - j0 < TILE_R ? n - j0 : TILE_R;
        /* from here on, all keys of the tile are seen */
        int all = (at + j0 + rows - 1) * t->group - q0;
        if (all < 0) all = 0;
        if (all > count) all = count;
        /* last turn: the tile itself */
        for (int j = j0; j <= j0 + rows; j++) {
            bool whole = j == j0 + rows;
            int from = whole ? all : (at + j) * t->group - q0, to = whole ? count : all;
            if (from < 0) from = 0;
            if (from >= to) continue;
            size_t key = (size_t)(whole ? j0 : j);
            struct tile v = { .x = b->p + (size_t)from * KERN_PAGE + key,
                              .x_k = KERN_PAGE,
                              .w = b->dy + (size_t)from * b->ld,
                              .w_k = b->ld,
                              .w_panel = 16,
                              .acc = b->dv + key * b->ld,
                              .acc_row = b->ld,
                              .acc_panel = 16,
                              .n = to - from };
            tile_by_k(v, whole ? rows : 1, b->panels);
            v.x = b->ds + (size_t)from * KERN_PAGE + key;
            v.w = b->q + (size_t)from * b->ld;
            v.acc = b->dk + key * b->ld;
            tile_by_k(v, whole ? rows : 1, b->panels);
        }
    }
}

/* One page against one block of queries. */
static void bwd_block(const struct attn_bwd *t, struct bwd *b, int at, int n, int q0, int count) {
    const struct kern_attn_bwd *a = t->a;
    vf scale = v_set(a->scale);
    for (int i = 0; i < count; i++) {
        size_t head = bwd_query_at(t, b, q0 + i), from = head * (size_t)b->dim,
               row = (size_t)i * b->ld;
        vec_get(b->q + row, a->q.p, a->q_type, from, b->dim);
        vec_get(b->dy + row, a->dy.p, KERN_F32, from, b->dim);
        if (at == 0) memset(b->dq + row, 0, b->ld * sizeof(float));
        else vec_get(b->dq + row, a->dq.p, KERN_F32, from, b->dim);
        vf s[2], dp[2], lse = v_set(((const float *)a->lse.p)[head]),
                        delta = v_set(b->delta[q0 + i]);
        dots(s, b->q + row, b->key, b->dim, b->ld);
        dots(dp, b->dy + row, b->val, b->dim, b->ld);
        for (int half = 0; half < 2; half++) {
            vf p = v_exp(v_sub(v_mul(s[half], scale), lse));
            v_store(b->p + i * KERN_PAGE + half * 16, p);
            v_store(b->ds + i * KERN_PAGE + half * 16,
                    v_mul(v_mul(p, v_sub(dp[half], delta)), scale));
        }
    }
    for (int i = 0, end; i < count; i = end) {
        int keys = (q0 + i) / t->group - at + 1, step = t->group - (q0 + i) % t->group;
        /* all the rest see n keys, or one row's heads */
        end = keys >= n || i + step > count ? count : i + step;
        tile_page((struct tile){ .x = b->ds + i * KERN_PAGE,
                                 .w = b->key,
                                 .w_k = b->ld,
                                 .w_panel = 16,
                                 .acc = b->dq + (size_t)i * b->ld,
                                 .acc_row = b->ld,
                                 .acc_panel = 16,
                                 .n = keys < n ? keys : n },
                  end - i, b->panels);
    }
    for (int i = 0; i < count; i++)
        vec_put(a->dq.p, KERN_F32, bwd_query_at(t, b, q0 + i) * (size_t)b->dim,
                b->dq + (size_t)i * b->ld, b->dim);
    bwd_keys(t, b, at, n, q0, count);
}

static void attn_bwd_part(void *arg, int part, int parts) {
    (void)parts;
    const struct attn_bwd *t = arg;
    const struct kern_attn_bwd *a = t->a;
    const struct kern_kv *kv = &a->kv;
    struct bwd b = { .kvh = part % kv->kv_heads,
                     .first = a->seq_start[part / kv->kv_heads],
                     .dim = kv->head_dim };
    b.len = a->seq_start[part / kv->kv_heads + 1] - b.first;
    if (b.len <= 0) return;
    b.panels = (b.dim + 15) / 16;
    b.ld = (size_t)b.panels * 16;
    int queries = b.len * t->group, slot = ((const int32_t *)a->slots.p)[b.first];
    size_t many = ATTN_QUERIES * b.ld, page = KERN_PAGE * b.ld;
    float *buf = cpu_scratch(
        (3 * many + 4 * page + 2 * ATTN_QUERIES * KERN_PAGE + (size_t)queries) * sizeof *buf);
    b.q = buf, b.dy = b.q + many, b.dq = b.dy + many;
    b.key = b.dq + many, b.val = b.key + page, b.dk = b.val + page, b.dv = b.dk + page;
    b.p = b.dv + page, b.ds = b.p + ATTN_QUERIES * KERN_PAGE,
    b.delta = b.ds + ATTN_QUERIES * KERN_PAGE;
    for (int i = 0; i < queries; i++) {
        size_t from = bwd_query_at(t, &b, i) * (size_t)b.dim;
        vf acc = v_zero();
        for (int c = 0; c < b.dim; c += 16) {
            int n = v_left(c, b.dim);
            acc = v_fma_n(v_get_n(a->dy.p, KERN_F32, from + (size_t)c, n),
                          v_get_n(a->y.p, a->y_type, from + (size_t)c, n), acc, n);
        }
        b.delta[i] = v_fold(acc);
    }
    for (int at = 0; at < b.len; at += KERN_PAGE) {
        int n = b.len - at < KERN_PAGE ? b.len - at : KERN_PAGE;
        page_get(b.key, kv, a->layer, slot, at, b.kvh, 0, n, b.ld);
        page_get(b.val, kv, a->layer, slot, at, b.kvh, 1, n, b.ld);
        /* and dv, its neighbour */
        memset(b.dk, 0, 2 * page * sizeof *b.dk);
        for (int q = at * t->group; q < queries; q += ATTN_QUERIES)
            bwd_block(t, &b, at, n, q, queries - q < ATTN_QUERIES ? queries - q : ATTN_QUERIES);
        for (int j = 0; j < n; j++) {
            size_t to = ((size_t)(b.first + at + j) * (size_t)kv->kv_heads + (size_t)b.kvh) *
                        (size_t)b.dim;
            vec_put(a->dk.p, KERN_F32, to, b.dk + (size_t)j * b.ld, b.dim);
            vec_put(a->dv.p, KERN_F32, to, b.dv + (size_t)j * b.ld, b.dim);
        }
    }
}

static void simd_attn_bwd(struct kern *k, const struct kern_attn_bwd *a) {
    if (a->heads % a->kv.kv_heads) {
        ref_attn_bwd(k, a);
        return;
    }
    struct attn_bwd t = { a, a->heads / a->kv.kv_heads };
    cpu_run(k, a->seqs * a->kv.kv_heads, attn_bwd_part, &t);
}
#endif
