/* attn.h - attention over paged keys and values, forward and backward, a page and a block of
 * queries at a time.
 *
 * A query is one (row, head). Queries of a kv head are numbered row by row; neighbours that read
 * the same page, heads of a row, rows of a slot or slots that share a prompt, take it unpacked
 * once. All multiplying is mul.h's; between two products a page's scores are [query][32] floats.
 * The forward owns (rows, kv head), the backward (sequence, kv head): every sum is one part's own.
 * Noise, where asked for, acts on those floats in place.
 * Order: block of queries, forward, backward.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_SIMD_ATTN_H
#define QERL_SIMD_ATTN_H
#include "kernels/simd/mul.h"
#include "kernels/simd/noise.h"

enum { ATTN_QUERIES = 128, ATTN_ROWS = ATTN_QUERIES + MUL_ROWS };   /* of a block; of its memory */
_Static_assert((int)KERN_PAGE == (int)MUL_K, "a page is one block of the tile order");

/* Takes `count` elements of scratch at base + *used, 64-byte aligned; base NULL only counts. */
INLINE void *carve(char *base, size_t *used, size_t count, size_t size) {
    void *at = base ? base + *used : NULL;
    *used += (count * size + 63) / 64 * 64;
    return at;
}

/* Asks for memory that is read soon: rows and pages lie apart, which no prefetcher foresees. */
INLINE void ahead(const void *from, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) _mm_prefetch((const char *)from + i, _MM_HINT_T0);
}

/* The page of K as 32 k = dims, columns = positions: [2][k_blocks] blocks. Meanwhile the first
 * half of `next`, also a page, is asked for, a piece a block: a core waits that asks for all. */
INLINE void keys_get(mul_t *to, const struct kern_kv *kv, size_t at, int panels,
                     const uint8_t *next) {
    const size_t size = kv->type == KERN_F32 ? 4 : 2;
    const int dim = kv->head_dim;
    const size_t piece = (size_t)(KERN_PAGE * MUL_K / 4) * size;
    for (int c = 0; c < panels; c++)
        for (int i = 0; i < dim; i += MUL_K, to += MUL_RHS, next += next ? piece : 0) {
            if (next) ahead(next, piece);
            const struct mul_source s = {
                (char *)kv->pages.p + (at + (size_t)(i * KERN_PAGE + c * 32)) * size, kv->type,
                KERN_PAGE, 1.0f, false
            };
            rhs_pairs(to, &s, dim - i < MUL_K ? dim - i : MUL_K, MUL_COLS);
        }
}
/* n positions of the page of V, k = positions, columns = dims: [panels] blocks. */
INLINE void values_get(mul_t *to, const struct kern_kv *kv, size_t at, int n,
                       const uint8_t *next) {
    const size_t size = kv->type == KERN_F32 ? 4 : 2;
    const size_t piece = (size_t)(KERN_PAGE * MUL_COLS / 2) * size;
    for (int i = 0; i < kv->head_dim; i += MUL_COLS, to += MUL_RHS, next += next ? piece : 0) {
        if (next) ahead(next, piece);
        const struct mul_source s = { (char *)kv->pages.p + (at + (size_t)(i * 2)) * size,
                                      kv->type, (size_t)kv->head_dim, 1.0f, false };
        rhs_pairs(to, &s, n, v_left(i, kv->head_dim));
    }
}

/* A block of neighbouring queries and its scratch. */
struct attn_block {
    const struct kern_attn *a;
    int kvh, group, first, count;                            /* query 0 is `first` of all rows' */
    int dim, panels, k_blocks;
    mul_t *q, *p, *rhs;                  /* lhs [rows][k_blocks], lhs [rows], blocks of one page */
    float *s, *o;                        /* [rows][32], [rows][panels * 16] */
    int keys[ATTN_QUERIES];
    const int32_t *table[ATTN_QUERIES];  /* the slot's pages */
    /* Queries [i, end) that read the page at hand at the same place; fewest and most keys seen. */
    struct attn_run { int i, end, least, most; } run[ATTN_QUERIES];
    int runs;
    float m[ATTN_QUERIES], l[ATTN_QUERIES], fix[ATTN_QUERIES];
    float edge[ATTN_QUERIES];                                /* of type deadzone on scores */
    struct noise scores, probs;                              /* with noise */
};
static size_t attn_plan(struct attn_block *b, char *base) {
    const size_t ld = (size_t)b->panels * 16, k_blocks = (size_t)b->k_blocks;
    size_t used = 0, blocks = 2 * k_blocks > (size_t)b->panels ? 2 * k_blocks : (size_t)b->panels;
    b->q = carve(base, &used, ATTN_ROWS * k_blocks * MUL_LHS, sizeof(mul_t));
    b->p = carve(base, &used, ATTN_ROWS * MUL_LHS, sizeof(mul_t));
    b->rhs = carve(base, &used, blocks * MUL_RHS, sizeof(mul_t));
    b->s = carve(base, &used, ATTN_ROWS * KERN_PAGE, sizeof(float));
    b->o = carve(base, &used, ATTN_ROWS * ld, sizeof(float));
    return used;
}
INLINE int attn_row(const struct attn_block *b, int i) { return (b->first + i) / b->group; }
INLINE size_t attn_head(const struct attn_block *b, int i) {
    return (size_t)attn_row(b, i) * (size_t)b->a->heads +
           (size_t)(b->kvh * b->group + (b->first + i) % b->group);
}
/* How many keys of the page from `at` query i sees. */
INLINE int attn_seen(const struct attn_block *b, int i, int at) {
    const int n = b->keys[i] - at;
    return n < 0 ? 0 : n < KERN_PAGE ? n : KERN_PAGE;
}

static void attn_runs(struct attn_block *b, int at) {
    const int page = at / KERN_PAGE;
    b->runs = 0;
    for (int i = 0; i < b->count;) {
        const int32_t *table = b->table[i];
        if (b->keys[i] <= at) {
            i++;
            continue;
        }
        struct attn_run r = { .i = i, .least = b->keys[i], .most = b->keys[i] };
        for (i++; i < b->count && b->keys[i] > at; i++) {
            if (b->table[i] != table && b->table[i][page] != table[page]) break;
            if (b->keys[i] < r.least) r.least = b->keys[i];
            if (b->keys[i] > r.most) r.most = b->keys[i];
        }
        r.end = i;
        r.least = r.least - at < KERN_PAGE ? r.least - at : KERN_PAGE;
        r.most = r.most - at < KERN_PAGE ? r.most - at : KERN_PAGE;
        b->run[b->runs++] = r;
    }
}
/* The run's K or V from position `at`; whoever multiplies one asks for what comes next. */
INLINE size_t attn_page(const struct attn_block *b, const struct attn_run *r, int at, int is_v) {
    const struct kern_kv *kv = &b->a->kv;
    return cpu_kv_in_page(kv, b->a->layer, b->table[r->i][at / KERN_PAGE], b->kvh, is_v);
}
INLINE const uint8_t *attn_memory(const struct kern_kv *kv, size_t page) {
    return (const uint8_t *)kv->pages.p + page * (kv->type == KERN_F32 ? 4 : 2);
}
/* The second half of a page, for the multiplier to ask for. */
INLINE struct mul_ahead attn_ahead(const struct kern_kv *kv, const uint8_t *page) {
    const size_t half = (size_t)(KERN_PAGE * kv->head_dim / 2) * (kv->type == KERN_F32 ? 4 : 2);
    return (struct mul_ahead){ page ? page + half : NULL, half, 0, page ? 1 : 0 };
}

static void attn_scores(struct attn_block *b, const struct attn_run *r, int at) {
    const struct kern_attn *a = b->a;
    const int panels = (r->most + 15) / 16;
    const size_t q_row = (size_t)b->k_blocks * MUL_LHS;
    const uint8_t *next = attn_memory(&a->kv, attn_page(b, r, at, 1));
    keys_get(b->rhs, &a->kv, attn_page(b, r, at, 0), panels, next);
    mul_run(&(struct mul){ .lhs = b->q + (size_t)r->i * q_row,
                           .lhs_row = q_row,
                           .lhs_block = MUL_LHS,
                           .rhs = b->rhs,
                           .rhs_panel = (size_t)b->k_blocks * MUL_RHS,
                           .rhs_block = MUL_RHS,
                           .acc = b->s + r->i * KERN_PAGE,
                           .acc_row = KERN_PAGE,
                           .acc_panel = 16,
                           .rows = r->end - r->i,
                           .panels = panels,
                           .blocks = b->k_blocks,
                           .ahead = attn_ahead(&a->kv, next) });
}

/* Queries [i, i + rows), sixteen at most, as the noise knows them. */
INLINE void attn_noise_pages(const struct attn_block *b, struct noise_page page[16], int i,
                             int rows, int at, const float *edge) {
    for (int r = 0; r < rows; r++)
        page[r] = (struct noise_page){ attn_row(b, i + r),
                                       b->kvh * b->group + (b->first + i + r) % b->group,
                                       attn_seen(b, i + r, at), edge ? edge[i + r] : 0.0f };
}
static void above_zero(float *p, int n) {                    /* no -0; a NaN stays */
    for (int i = 0; i < n; i += 16) v_store(p + i, v_add(v_max(v_zero(), v_load(p + i)), v_zero()));
}
static void attn_noisy_scores(struct attn_block *b, int from, int end, int at) {
    const vf scale = v_set(b->a->scale);
    struct noise_page page[16];
    for (float *s = b->s + from * KERN_PAGE; s < b->s + end * KERN_PAGE; s += 16)
        v_store(s, v_mul(v_load(s), scale));
    for (int i = from, rows; i < end; i += rows) {
        rows = v_left(i, end);
        attn_noise_pages(b, page, i, rows, at, b->edge);
        noise_pages(&b->scores, b->s + i * KERN_PAGE, page, rows, at);
    }
}
/* And the sums of probabilities. */
static void attn_noisy_probs(struct attn_block *b, int i, int rows, int at, vf x[16]) {
    float *s = b->s + i * KERN_PAGE, edge[ATTN_QUERIES];
    struct noise_page page[16];
    for (int r = i; r < i + rows; r++) edge[r] = kern_noise_edge(b->probs.n, 1.0f);
    attn_noise_pages(b, page, i, rows, at, edge);            /* p of the row's maximum is 1 */
    noise_pages(&b->probs, s, page, rows, at);
    above_zero(s, rows * KERN_PAGE);
    for (int r = 0; r < rows; r++) x[r] = v_add(v_load(s + r * 32), v_load(s + r * 32 + 16));
}

/* Scores of queries [i, i + rows), sixteen at most, to probabilities; m, l and fix of all of them
 * at once. A query that sees nothing keeps m and l. noisy: scores are scaled already. */
INLINE void attn_softmax16(struct attn_block *b, int i, const int rows, int at, const bool whole,
                           const bool noisy) {
    const vf scale = v_set(noisy ? 1.0f : b->a->scale), none = v_set(-INFINITY), zero = v_zero();
    float *s = b->s + i * KERN_PAGE;
    vf x[16];
    for (int r = 0; r < rows; r++) {
        vf lo = v_mul(v_load(s + r * 32), scale), hi = v_mul(v_load(s + r * 32 + 16), scale);
        if (!whole) {
            const int n = attn_seen(b, i + r, at);
            lo = v_pick(lo, none, n < 16 ? n : 16);
            hi = v_pick(hi, none, n < 16 ? 0 : n - 16);
        }
        x[r] = v_max(hi, v_max(lo, none));
    }
    for (int r = rows; r < 16; r++) x[r] = none;
    const vf m = v_load(b->m + i), most = v_max(v_most_all(x), m), fix = v_exp(v_sub(m, most));
    v_store(b->m + i, most);
    v_store(b->fix + i, fix);
    for (int r = 0; r < rows; r++) {
        const vf by = v_set(b->m[i + r]);
        vf lo = v_exp(v_sub(v_mul(v_load(s + r * 32), scale), by)),
           hi = v_exp(v_sub(v_mul(v_load(s + r * 32 + 16), scale), by));
        if (!whole) {
            const int n = attn_seen(b, i + r, at);
            lo = v_pick(lo, zero, n < 16 ? n : 16);
            hi = v_pick(hi, zero, n < 16 ? 0 : n - 16);
        }
        v_store(s + r * 32, lo);
        v_store(s + r * 32 + 16, hi);
        x[r] = v_add(lo, hi);
    }
    if (noisy) attn_noisy_probs(b, i, rows, at, x);
    for (int r = rows; r < 16; r++) x[r] = zero;
    v_store(b->l + i, v_fma(v_load(b->l + i), fix, v_fold_all(x)));
}
static void attn_softmax(struct attn_block *b, int from, int end, int at) {
    for (int i = from / 16 * 16; i < end; i += 16) {
        const int rows = v_left(i, b->count);
        int least = b->keys[i];
        for (int r = i + 1; r < i + rows; r++) least = b->keys[r] < least ? b->keys[r] : least;
        if (b->a->noise) attn_softmax16(b, i, rows, at, false, true);
        else if (rows == 16 && least >= at + KERN_PAGE) attn_softmax16(b, i, 16, at, true, false);
        else attn_softmax16(b, i, rows, at, false, false);
    }
}

/* Is a value of positions [from, end) of the page not finite? Pairs are looked at whole. */
static bool values_wild(const struct kern_kv *kv, size_t page, int from, int end) {
    const int dim = kv->head_dim;
    vf none = v_zero();
    for (int i = from / 2 * dim * 2; i < (end + 1) / 2 * dim * 2; i += 16) {
        const int n = v_left(i, (end + 1) / 2 * dim * 2);
        none = v_fma(v_get_n(kv->pages.p, kv->type, page + (size_t)i, n), v_zero(), none);
    }
    return v_fold(none) != 0.0f;
}

/* o = o fix + p V of queries [i, end), of which none sees more than n values. */
static void attn_values_of(struct attn_block *b, size_t page, int i, int end, int n,
                           const uint8_t *next) {
    const size_t ld = (size_t)b->panels * 16;
    values_get(b->rhs, &b->a->kv, page, n, next);
    for (int r = i; r < end; r++) {
        const vf fix = v_set(b->fix[r]);
        /* no -0 here: what unseen values add, 0 or -0, then changes nothing */
        for (float *o = b->o + (size_t)r * ld; o < b->o + (size_t)(r + 1) * ld; o += 16)
            v_store(o, v_flush(v_mul(v_load(o), fix)));
    }
    mul_run(&(struct mul){ .lhs = b->p + (size_t)i * MUL_LHS,
                           .lhs_row = MUL_LHS,
                           .lhs_block = MUL_LHS,
                           .rhs = b->rhs,
                           .rhs_panel = MUL_RHS,
                           .rhs_block = MUL_RHS,
                           .acc = b->o + (size_t)i * ld,
                           .acc_row = ld,
                           .acc_panel = 16,
                           .rows = end - i,
                           .panels = b->panels,
                           .blocks = 1,
                           .ahead = attn_ahead(&b->a->kv, next) });
}
static void attn_values(struct attn_block *b, const struct attn_run *r, int at) {
    const struct kern_attn *a = b->a;
    const size_t page = attn_page(b, r, at, 1);
    const uint8_t *next = b->keys[r->i] > at + KERN_PAGE
                              ? attn_memory(&a->kv, attn_page(b, r, at + KERN_PAGE, 0))
                              : NULL;
    if (r->least == r->most || !values_wild(&a->kv, page, r->least, r->most)) {
        attn_values_of(b, page, r->i, r->end, r->most, next);
        return;
    }
    /* 0 times what a query does not see would be NaN */
    for (int i = r->i; i < r->end; i++)
        attn_values_of(b, page, i, i + 1, attn_seen(b, i, at), NULL);
}

/* Runs and raw scores of the page from `at`. */
static void attn_page_scores(struct attn_block *b, int at) {
    attn_runs(b, at);
    const int from = b->run[0].i, end = b->run[b->runs - 1].end;
    memset(b->s + from * KERN_PAGE, 0, (size_t)((end - from) * KERN_PAGE) * sizeof *b->s);
    for (int i = 0; i < b->runs; i++) attn_scores(b, &b->run[i], at);
}

/* Before the pages: each query's largest |score|, then its largest score, where a type of noise
 * needs it. Nothing is counted here. */
static void attn_peaks(struct attn_block *b, int most) {
    struct noise scores = b->scores;
    float size[ATTN_QUERIES] = { 0 };
    for (int at = 0; at < most && scores.n->type == KERN_NOISE_DEADZONE; at += KERN_PAGE) {
        attn_page_scores(b, at);
        for (int i = b->run[0].i; i < b->count; i++)
            for (int j = 0; j < attn_seen(b, i, at); j++) {
                const float t = fabsf(b->s[i * KERN_PAGE + j] * b->a->scale);
                size[i] = t > size[i] ? t : size[i];
            }
    }
    for (int i = 0; i < b->count; i++) b->edge[i] = kern_noise_edge(scores.n, size[i]);
    for (int at = 0; at < most && !kern_noise_relative(b->probs.n); at += KERN_PAGE) {
        attn_page_scores(b, at);
        attn_noisy_scores(b, b->run[0].i, b->run[b->runs - 1].end, at);
        for (int i = b->run[0].i; i < b->count; i++)
            for (int j = 0; j < attn_seen(b, i, at); j++) {
                const float t = b->s[i * KERN_PAGE + j];
                b->m[i] = t > b->m[i] ? t : b->m[i];
            }
    }
    b->scores = scores;
}

static void attn_block(struct attn_block *b) {
    const struct kern_attn *a = b->a;
    const size_t ld = (size_t)b->panels * 16, q_row = (size_t)b->k_blocks * MUL_LHS,
                 dim = (size_t)b->dim, q_size = a->q_type == KERN_F32 ? 4 : 2;
    int most = 0;
    for (int i = 0; i < b->count; i += b->group)
        ahead((const char *)a->q.p + attn_head(b, i) * dim * q_size,
              (size_t)b->group * dim * q_size);
    for (int i = 0, n; i < b->count; i += n) {               /* a row's heads are neighbours */
        n = b->group - (b->first + i) % b->group;
        if (n > b->count - i) n = b->count - i;
        const struct mul_source q = { (char *)a->q.p + attn_head(b, i) * dim * q_size, a->q_type,
                                      dim, 1.0f, false };
        lhs_rows(b->q + (size_t)i * q_row, q_row, MUL_LHS, &q, n, b->dim);
        const int row = attn_row(b, i), keys = ((const int32_t *)a->pos.p)[row] + 1;
        const int32_t *table = (const int32_t *)a->kv.table.p +
                               (size_t)((const int32_t *)a->slots.p)[row] *
                                   (size_t)a->kv.slot_pages;
        for (int j = i; j < i + n; j++) b->keys[j] = keys, b->table[j] = table;
        if (keys > most) most = keys;
    }
    for (int i = 0; i < ATTN_QUERIES; i++) b->m[i] = -INFINITY, b->l[i] = 0.0f;
    memset(b->o, 0, (size_t)b->count * ld * sizeof *b->o);
    struct mul_source p = { b->s, KERN_F32, KERN_PAGE, 1.0f, a->kv.type == KERN_BF16 };
    if (a->noise) attn_peaks(b, most);
    for (int at = 0; at < most; at += KERN_PAGE) {
        attn_page_scores(b, at);
        const int from = b->run[0].i, end = b->run[b->runs - 1].end;
        if (a->noise) attn_noisy_scores(b, from, end, at);
        attn_softmax(b, from, end, at);
        p.from = b->s + from * KERN_PAGE;
        lhs_rows(b->p + from * MUL_LHS, MUL_LHS, MUL_LHS, &p, end - from, KERN_PAGE);
        for (int i = 0; i < b->runs; i++) attn_values(b, &b->run[i], at);
    }
    for (int i = 0; i < b->count; i++) {
        const size_t head = attn_head(b, i);
        const vf inv = v_set(1.0f / b->l[i]);
        for (int c = 0; c < b->dim; c += 16)
            v_put_n(a->y.p, a->y_type, head * dim + (size_t)c,
                    v_mul(v_load(b->o + (size_t)i * ld + c), inv), v_left(c, b->dim));
        if (a->lse.p) ((float *)a->lse.p)[head] = b->m[i] + kern_logf(b->l[i]);
        if (!a->noise || !a->peaks.p) continue;
        ((float *)a->peaks.p)[2 * head] = b->edge[i];
        ((float *)a->peaks.p)[2 * head + 1] = b->m[i];
    }
}

struct attn { const struct kern_attn *a; int block_rows, group; };
static void attn_part(void *arg, int part, int parts) {
    (void)parts;
    const struct attn *t = arg;
    const struct kern_kv *kv = &t->a->kv;
    const int row = part / kv->kv_heads * t->block_rows,
              rows = t->a->rows - row < t->block_rows ? t->a->rows - row : t->block_rows;
    struct attn_block b;
    b.a = t->a, b.kvh = part % kv->kv_heads, b.group = t->group, b.dim = kv->head_dim;
    b.panels = (b.dim + 15) / 16, b.k_blocks = (b.dim + MUL_K - 1) / MUL_K;
    attn_plan(&b, cpu_scratch(attn_plan(&b, NULL)));
    if (b.a->noise) noise_open(&b.scores, &b.a->noise->scores);
    if (b.a->noise) noise_open(&b.probs, &b.a->noise->probs);
    for (int i = 0; i < rows * t->group; i += ATTN_QUERIES) {
        b.first = row * t->group + i;
        b.count = rows * t->group - i < ATTN_QUERIES ? rows * t->group - i : ATTN_QUERIES;
        attn_block(&b);
    }
    if (b.a->noise) noise_close(&b.scores);
    if (b.a->noise) noise_close(&b.probs);
}

static void simd_attn(struct kern *k, const struct kern_attn *a) {
    if (a->rows <= 0) return;
    /* ragged groups: nobody has them, ref is right */
    if (a->heads % a->kv.kv_heads) {
        ref_attn(k, a);
        return;
    }
    if (MUL_IS_BF16 && (a->q_type != KERN_BF16 || a->kv.type != KERN_BF16)) {
        mul_wide().attn(k, a);
        return;
    }
    struct attn t = { a, 1, a->heads / a->kv.kv_heads };
    const int threads = cpu_threads(k),
              cuts = threads > 1 ? (threads * 2 + a->kv.kv_heads - 1) / a->kv.kv_heads : 1,
              spread = (a->rows + cuts - 1) / cuts, fit = ATTN_QUERIES / t.group;
    t.block_rows = spread < fit ? spread : fit;
    if (t.block_rows < 1) t.block_rows = 1;
    cpu_run(k, (a->rows + t.block_rows - 1) / t.block_rows * a->kv.kv_heads, attn_part, &t);
}

enum { BWD_BLOCKS = 4, BWD_QUERIES = BWD_BLOCKS * MUL_K };   /* queries at a time */

/* One sequence and kv head, and its scratch. The forms of q and dy are made once and serve every
 * page; those of a page serve every query. */
struct bwd {
    const struct kern_attn_bwd *a;
    int kvh, group, first, queries, len;
    int dim, panels, k_blocks, q_blocks;
    bool round;
    mul_t *q, *dy;                       /* lhs [queries][k_blocks] */
    mul_t *q_k, *dy_k;                   /* k = queries: rhs [q_blocks][panels] */
    mul_t *key, *val;                    /* k = dims: rhs [2][k_blocks] */
    mul_t *key_k;                        /* k = keys: rhs [panels] */
    mul_t *ds, *ds_t, *p_t;              /* lhs [BWD_QUERIES], lhs [32][BWD_BLOCKS] twice */
    float *p, *dp;                       /* [BWD_QUERIES][32]: scores and then p, dp and then ds */
    float *dq, *dk, *dv;                 /* [queries], [32], [32] of panels * 16 */
    float *delta, *lse, *some;           /* [queries] twice; 32 queries' vectors in a row */
    float *edge, *from, *times;          /* [queries]: of scores; p is exp(score - from) * times */
    struct noise scores, probs, dprobs, dscores;             /* with noise */
};
static size_t bwd_plan(struct bwd *b, char *base) {
    const size_t queries = (size_t)b->q_blocks * MUL_K + MUL_ROWS, k_blocks = (size_t)b->k_blocks,
                 panels = (size_t)b->panels, q_blocks = (size_t)b->q_blocks,
                 t_rows = KERN_PAGE + MUL_ROWS;
    size_t used = 0;
    b->q = carve(base, &used, queries * k_blocks * MUL_LHS, sizeof(mul_t));
    b->dy = carve(base, &used, queries * k_blocks * MUL_LHS, sizeof(mul_t));
    b->q_k = carve(base, &used, q_blocks * panels * MUL_RHS, sizeof(mul_t));
    b->dy_k = carve(base, &used, q_blocks * panels * MUL_RHS, sizeof(mul_t));
    b->key = carve(base, &used, 2 * k_blocks * MUL_RHS, sizeof(mul_t));
    b->val = carve(base, &used, 2 * k_blocks * MUL_RHS, sizeof(mul_t));
    b->key_k = carve(base, &used, panels * MUL_RHS, sizeof(mul_t));
    b->ds = carve(base, &used, (BWD_QUERIES + MUL_ROWS) * MUL_LHS, sizeof(mul_t));
    b->ds_t = carve(base, &used, t_rows * BWD_BLOCKS * MUL_LHS, sizeof(mul_t));
    b->p_t = carve(base, &used, t_rows * BWD_BLOCKS * MUL_LHS, sizeof(mul_t));
    b->p = carve(base, &used, BWD_QUERIES * KERN_PAGE, sizeof(float));
    b->dp = carve(base, &used, BWD_QUERIES * KERN_PAGE, sizeof(float));
    b->dq = carve(base, &used, queries * panels * 16, sizeof(float));
    b->dk = carve(base, &used, KERN_PAGE * panels * 16, sizeof(float));
    b->dv = carve(base, &used, KERN_PAGE * panels * 16, sizeof(float));
    b->delta = carve(base, &used, queries, sizeof(float));
    b->lse = carve(base, &used, queries, sizeof(float));
    b->some = carve(base, &used, MUL_K * (size_t)b->dim, sizeof(float));
    b->edge = carve(base, &used, queries, sizeof(float));
    b->from = carve(base, &used, queries, sizeof(float));
    b->times = carve(base, &used, queries, sizeof(float));
    return used;
}
INLINE size_t bwd_head(const struct bwd *b, int i) {
    return (size_t)(b->first + i / b->group) * (size_t)b->a->heads +
           (size_t)(b->kvh * b->group + i % b->group);
}

/* Both forms of queries [i, i + n) of q or dy: rows of lhs, k of rhs. */
static void bwd_forms(const struct bwd *b, mul_t *rows, mul_t *ks, kptr from, enum kern_type type,
                      bool round, int i, int n) {
    const size_t bytes = (size_t)b->dim * (type == KERN_F32 ? 4 : 2),
                 row = (size_t)b->k_blocks * MUL_LHS;
    for (int r = 0; r < n; r++)
        memcpy((char *)b->some + (size_t)r * bytes, (char *)from.p + bwd_head(b, i + r) * bytes,
               bytes);
    struct mul_source s = { b->some, type, (size_t)b->dim, 1.0f, round };
    lhs_rows(rows + (size_t)i * row, row, MUL_LHS, &s, n, b->dim);
    for (int c = 0; c < b->panels; c++) {
        s.from = (char *)b->some + (size_t)c * 16 * (type == KERN_F32 ? 4 : 2);
        rhs_rows(ks + (size_t)(i / MUL_K * b->panels + c) * MUL_RHS, &s, n,
                 v_left(c * 16, b->dim));
    }
}
static float bwd_delta(const struct bwd *b, size_t at) {
    const struct kern_attn_bwd *a = b->a;
    vf acc = v_zero();
    for (int c = 0; c < b->dim; c += 16) {
        const int n = v_left(c, b->dim);
        acc = v_fma_n(v_load_n((const float *)a->dy.p + at + c, n),
                      v_get_n(a->y.p, a->y_type, at + (size_t)c, n), acc, n);
    }
    return v_fold(acc);
}

/* What query r's noisy probabilities are made from. */
static void bwd_peaks(struct bwd *b, int r, const float *peaks) {
    const bool own = peaks && !kern_noise_relative(&b->a->noise->probs);
    b->edge[r] = peaks ? peaks[0] : 0.0f;
    b->from[r] = own ? peaks[1] : b->lse[r];
    b->times[r] = own ? kern_expf(peaks[1] - b->lse[r]) : 1.0f;
}
static void bwd_queries(struct bwd *b) {
    const struct kern_attn_bwd *a = b->a;
    const size_t dim = (size_t)b->dim, q_bytes = dim * (a->q_type == KERN_F32 ? 4 : 2),
                 y_bytes = dim * (a->y_type == KERN_F32 ? 4 : 2);
    for (int i = 0; i < b->queries; i += MUL_K) {
        const int n = b->queries - i < MUL_K ? b->queries - i : MUL_K;
        for (int r = i + MUL_K; r < i + 2 * MUL_K && r < b->queries; r++) {
            const size_t head = bwd_head(b, r);
            ahead((const char *)a->q.p + head * q_bytes, q_bytes);
            ahead((const char *)a->y.p + head * y_bytes, y_bytes);
            ahead((const float *)a->dy.p + head * dim, dim * sizeof(float));
        }
        bwd_forms(b, b->q, b->q_k, a->q, a->q_type, false, i, n);
        bwd_forms(b, b->dy, b->dy_k, a->dy, KERN_F32, b->round, i, n);
        for (int r = i; r < i + n; r++) {
            const size_t head = bwd_head(b, r);
            b->delta[r] = bwd_delta(b, head * dim);
            b->lse[r] = ((const float *)a->lse.p)[head];
            if (a->noise)
                bwd_peaks(b, r, a->peaks.p ? (const float *)a->peaks.p + 2 * head : NULL);
        }
    }
    memset(b->dq, 0, (size_t)b->queries * (size_t)b->panels * 16 * sizeof *b->dq);
}

static void bwd_page(struct bwd *b, int at, int n) {
    const struct kern_kv *kv = &b->a->kv;
    const size_t size = kv->type == KERN_F32 ? 4 : 2, dim = (size_t)kv->head_dim;
    const int slot = ((const int32_t *)b->a->slots.p)[b->first];
    const size_t k_at = cpu_kv_page(kv, b->a->layer, slot, at, b->kvh, 0),
                 v_at = cpu_kv_page(kv, b->a->layer, slot, at, b->kvh, 1);
    struct mul_source s = { NULL, kv->type, dim, 1.0f, false };
    keys_get(b->key, kv, k_at, 2, NULL);
    for (int c = 0; c < 2; c++)
        for (int k = 0; k < b->k_blocks; k++) {
            s.from = (char *)kv->pages.p + (v_at + (size_t)c * 16 * dim + (size_t)k * 64) * size;
            rhs_pairs_t(b->val + (c * b->k_blocks + k) * MUL_RHS, &s,
                        b->dim - k * MUL_K < MUL_K ? b->dim - k * MUL_K : MUL_K, MUL_COLS);
        }
    s.ld = KERN_PAGE;
    for (int c = 0; c < b->panels; c++) {
        s.from = (char *)kv->pages.p + (k_at + (size_t)c * 16 * KERN_PAGE) * size;
        rhs_pairs_t(b->key_k + c * MUL_RHS, &s, n, v_left(c * 16, b->dim));
    }
}

/* Products of queries [q0, q0 + count) with the page: lhs is q or dy, rhs key or val. */
static void bwd_scores(const struct bwd *b, float *acc, const mul_t *lhs, const mul_t *rhs, int q0,
                       int count) {
    const size_t row = (size_t)b->k_blocks * MUL_LHS;
    memset(acc, 0, (size_t)count * KERN_PAGE * sizeof *acc);
    mul_run(&(struct mul){ .lhs = lhs + (size_t)q0 * row,
                           .lhs_row = row,
                           .lhs_block = MUL_LHS,
                           .rhs = rhs,
                           .rhs_panel = (size_t)b->k_blocks * MUL_RHS,
                           .rhs_block = MUL_RHS,
                           .acc = acc,
                           .acc_row = KERN_PAGE,
                           .acc_panel = 16,
                           .rows = count,
                           .panels = 2,
                           .blocks = b->k_blocks });
}
/* dk or dv of the page's n keys: the columns of x ([query][32], p or ds) times q or dy. */
static void bwd_keys(const struct bwd *b, float *acc, mul_t *lhs, const float *x, const mul_t *rhs,
                     int q0, int count, int n) {
    const struct mul_source s = { x, KERN_F32, KERN_PAGE, 1.0f, b->round };
    const size_t ld = (size_t)b->panels * 16;
    lhs_cols(lhs, BWD_BLOCKS * MUL_LHS, MUL_LHS, &s, n, count);
    mul_run(&(struct mul){ .lhs = lhs,
                           .lhs_row = BWD_BLOCKS * MUL_LHS,
                           .lhs_block = MUL_LHS,
                           .rhs = rhs + (size_t)(q0 / MUL_K * b->panels) * MUL_RHS,
                           .rhs_panel = MUL_RHS,
                           .rhs_block = (size_t)b->panels * MUL_RHS,
                           .acc = acc,
                           .acc_row = ld,
                           .acc_panel = 16,
                           .rows = n,
                           .panels = b->panels,
                           .blocks = (count + MUL_K - 1) / MUL_K });
}

/* Products to p and ds, of queries [q0, q0 + count) and the page from `at`. */
static void bwd_softmax(struct bwd *b, int at, int q0, int count) {
    const vf scale = v_set(b->a->scale), zero = v_zero();
    for (int i = 0; i < count; i++) {
        const int row = (q0 + i) / b->group - at, seen = row < 0 ? 0 : row + 1;
        const vf lse = v_set(b->lse[q0 + i]), delta = v_set(b->delta[q0 + i]);
        for (int j = 0; j < KERN_PAGE; j += 16) {
            float *p_at = b->p + i * KERN_PAGE + j, *ds_at = b->dp + i * KERN_PAGE + j;
            vf p = v_exp(v_sub(v_mul(v_load(p_at), scale), lse)),
               ds = v_mul(v_mul(p, v_sub(v_load(ds_at), delta)), scale);
            if (seen < j + 16) {
                p = v_pick(p, zero, seen < j ? 0 : seen - j);
                ds = v_pick(ds, zero, seen < j ? 0 : seen - j);
            }
            v_store(p_at, p);
            v_store(ds_at, ds);
        }
    }
}
/* The same with noise, of queries [q, q + rows), sixteen at most; p and ds are theirs. */
static void bwd_noisy_softmax(struct bwd *b, float *p, float *ds, int at, int q, int rows) {
    const vf scale = v_set(b->a->scale);
    struct noise_page page[16];
    for (int i = 0; i < rows; i++) {
        const int row = (q + i) / b->group, seen = row - at + 1;
        page[i] = (struct noise_page){ b->first + row, b->kvh * b->group + (q + i) % b->group,
                                       seen < 0 ? 0 : seen < KERN_PAGE ? seen : KERN_PAGE,
                                       b->edge[q + i] };
    }
    for (int i = 0; i < rows * KERN_PAGE; i += 16) v_store(p + i, v_mul(v_load(p + i), scale));
    noise_pages(&b->scores, p, page, rows, at);
    for (int i = 0; i < rows * KERN_PAGE; i += 16)
        v_store(p + i, v_exp(v_sub(v_load(p + i), v_set(b->from[q + i / KERN_PAGE]))));
    for (int i = 0; i < rows; i++) page[i].edge = kern_noise_edge(b->probs.n, 1.0f);
    noise_pages(&b->probs, p, page, rows, at);
    above_zero(p, rows * KERN_PAGE);
    for (int i = 0; i < rows * KERN_PAGE; i += 16)
        v_store(p + i, v_mul(v_load(p + i), v_set(b->times[q + i / KERN_PAGE])));
    noise_pages(&b->dprobs, ds, page, rows, at);
    for (int i = 0; i < rows * KERN_PAGE; i += 16) {
        const vf d = v_sub(v_load(ds + i), v_set(b->delta[q + i / KERN_PAGE]));
        v_store(ds + i, v_mul(v_mul(v_load(p + i), d), scale));
    }
    noise_pages(&b->dscores, ds, page, rows, at);
    for (int i = 0; i < rows * KERN_PAGE; i += 16) {
        const int n = page[i / KERN_PAGE].n - i % KERN_PAGE;
        v_store(p + i, v_pick(v_load(p + i), v_zero(), n < 0 ? 0 : n < 16 ? n : 16));
        v_store(ds + i, v_pick(v_load(ds + i), v_zero(), n < 0 ? 0 : n < 16 ? n : 16));
    }
}

/* The n keys from `at` against queries [q0, q0 + count); q0 is a multiple of 32. */
static void bwd_block(struct bwd *b, int at, int n, int q0, int count) {
    const size_t ld = (size_t)b->panels * 16;
    bwd_scores(b, b->p, b->q, b->key, q0, count);
    bwd_scores(b, b->dp, b->dy, b->val, q0, count);
    if (!b->a->noise) bwd_softmax(b, at, q0, count);
    else
        for (int i = 0; i < count; i += 16)
            bwd_noisy_softmax(b, b->p + i * KERN_PAGE, b->dp + i * KERN_PAGE, at, q0 + i,
                              v_left(i, count));
    const struct mul_source s = { b->dp, KERN_F32, KERN_PAGE, 1.0f, b->round };
    const int blind = at * b->group > q0 ? at * b->group - q0 : 0;   /* see nothing of the page */
    lhs_rows(b->ds, MUL_LHS, MUL_LHS, &s, count, KERN_PAGE);
    mul_run(&(struct mul){ .lhs = b->ds + blind * MUL_LHS,
                           .lhs_row = MUL_LHS,
                           .lhs_block = MUL_LHS,
                           .rhs = b->key_k,
                           .rhs_panel = MUL_RHS,
                           .rhs_block = MUL_RHS,
                           .acc = b->dq + (size_t)(q0 + blind) * ld,
                           .acc_row = ld,
                           .acc_panel = 16,
                           .rows = count - blind,
                           .panels = b->panels,
                           .blocks = 1 });
    bwd_keys(b, b->dv, b->p_t, b->p, b->dy_k, q0, count, n);
    bwd_keys(b, b->dk, b->ds_t, b->dp, b->q_k, q0, count, n);
}

INLINE void bwd_put(float *to, const float *from, int dim) {
    for (int i = 0; i < dim; i += 16) v_store_n(to + i, v_load(from + i), v_left(i, dim));
}

static void bwd_noise(struct bwd *b, const struct kern_attn_noise *n, bool open) {
    if (!n) return;
    struct noise *s[] = { &b->scores, &b->probs, &b->dprobs, &b->dscores };
    const struct kern_noise *of[] = { &n->scores, &n->probs, &n->dprobs, &n->dscores };
    for (size_t i = 0; i < COUNT_OF(s); i++)
        if (open) noise_open(s[i], of[i]);
        else noise_close(s[i]);
}

static void attn_bwd_part(void *arg, int part, int parts) {
    (void)parts;
    const struct kern_attn_bwd *a = arg;
    const struct kern_kv *kv = &a->kv;
    const int32_t *start = a->seq_start + part / kv->kv_heads;
    const size_t dim = (size_t)kv->head_dim;
    struct bwd b = { .a = a,
                     .kvh = part % kv->kv_heads,
                     .group = a->heads / kv->kv_heads,
                     .first = start[0],
                     .len = start[1] - start[0],
                     .dim = kv->head_dim,
                     .panels = (kv->head_dim + 15) / 16,
                     .k_blocks = (kv->head_dim + MUL_K - 1) / MUL_K,
                     .round = kv->type == KERN_BF16 };
    if (b.len <= 0) return;
    b.queries = b.len * b.group;
    b.q_blocks = (b.queries + MUL_K - 1) / MUL_K;
    bwd_plan(&b, cpu_scratch(bwd_plan(&b, NULL)));
    bwd_noise(&b, a->noise, true);
    bwd_queries(&b);
    const size_t ld = (size_t)b.panels * 16;
    for (int at = 0; at < b.len; at += KERN_PAGE) {
        const int n = b.len - at < KERN_PAGE ? b.len - at : KERN_PAGE;
        bwd_page(&b, at, n);
        memset(b.dk, 0, KERN_PAGE * ld * sizeof *b.dk);
        memset(b.dv, 0, KERN_PAGE * ld * sizeof *b.dv);
        /* earlier blocks of 32 see nothing of the page: they would add 0 to 0 */
        for (int q = at * b.group / MUL_K * MUL_K; q < b.queries; q += BWD_QUERIES)
            bwd_block(&b, at, n, q, b.queries - q < BWD_QUERIES ? b.queries - q : BWD_QUERIES);
        for (int j = 0; j < n; j++) {
            const size_t to = ((size_t)(b.first + at + j) * (size_t)kv->kv_heads + (size_t)b.kvh) *
                              dim;
            bwd_put((float *)a->dk.p + to, b.dk + (size_t)j * ld, b.dim);
            bwd_put((float *)a->dv.p + to, b.dv + (size_t)j * ld, b.dim);
        }
    }
    for (int i = 0; i < b.queries; i++)
        bwd_put((float *)a->dq.p + bwd_head(&b, i) * dim, b.dq + (size_t)i * ld, b.dim);
    bwd_noise(&b, a->noise, false);
}

static void simd_attn_bwd(struct kern *k, const struct kern_attn_bwd *a) {
    assert(!a->noise || kern_noise_backward(a->noise, a->peaks.p));
    if (a->heads % a->kv.kv_heads) {
        ref_attn_bwd(k, a);
        return;
    }
    if (MUL_IS_BF16 && (a->q_type != KERN_BF16 || a->kv.type != KERN_BF16)) {
        mul_wide().attn_bwd(k, a);
        return;
    }
    struct kern_attn_bwd copy = *a;
    cpu_run(k, a->seqs * a->kv.kv_heads, attn_bwd_part, &copy);
}
#endif
