/* attn.c - attention over pages: the same bits whether a row is prefilled, decoded or trained on,
 * on every path.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/kernels/kt.h"

enum { SEQS = 4, LAYERS = 2, LAYER = 1, SLOT_PAGES = 5 };
/* lengths 1, 33, 0, 97 */
static const int32_t seq_start[SEQS + 1] = { 0, 1, 34, 34, 131 };
enum { ROWS = 131 };

static const struct { int heads, kv_heads, dim;
} shape[] = {
    { 1, 1, 2 },  { 3, 1, 6 },  { 5, 2, 10 }, { 7, 1, 34 },  { 6, 2, 32 },
    { 9, 3, 64 }, { 7, 1, 64 }, { 3, 3, 80 }, { 6, 1, 128 },
};
/* q and y, pages: all mixes that a path may hand on to another */
static const struct { enum kern_type q, pages;
} mix[] = {
    { KERN_F32, KERN_F32 }, { KERN_BF16, KERN_BF16 }, { KERN_F32, KERN_BF16 }, { KERN_BF16, KERN_F32 },
};

struct bench {
    struct kern_kv kv;
    int heads;
    enum kern_type type;                 /* of q, y and the k put into the pages */
    void *q;
    void *k_in;
    float *v, *dy;
    int32_t *slots, *pos;
    size_t q_size, kv_size, pages_bytes;
};

/* Pages of all slots are shuffled and full of NaN where nothing was put. */
static struct bench bench_mixed(struct kt *t, int heads, int kv_heads, int dim, enum kern_type type,
                                enum kern_type pages_type, double v_scale) {
    struct bench b = { .heads = heads, .type = type };
    int pages = SEQS * SLOT_PAGES;
    int32_t *table = kt_new(t, (size_t)pages * 4);
    for (int i = 0; i < pages; i++) table[i] = i * 7 % pages;
    b.q_size = (size_t)(ROWS * heads * dim), b.kv_size = (size_t)(ROWS * kv_heads * dim);
    b.pages_bytes = kt_bytes(pages_type, (size_t)(pages * LAYERS * 2 * kv_heads * 32 * dim));
    b.kv = (struct kern_kv){ kt_p(kt_new(t, b.pages_bytes)), pages_type,  LAYERS, kv_heads, dim,
                             kt_p(table),                    SLOT_PAGES };
    memset(b.kv.pages.p, 0xff, b.pages_bytes);
    b.q = kt_typed(t, type, b.q_size, 1.0);
    b.k_in = kt_typed(t, type, b.kv_size, 1.0);
    b.v = kt_f32(t, b.kv_size, v_scale);
    b.dy = kt_f32(t, b.q_size, 1.0);
    b.slots = kt_new(t, ROWS * 4), b.pos = kt_new(t, ROWS * 4);
    for (int s = 0; s < SEQS; s++)
        for (int r = seq_start[s]; r < seq_start[s + 1]; r++)
            b.slots[r] = s, b.pos[r] = r - seq_start[s];
    return b;
}
static struct bench bench_make(struct kt *t, int heads, int kv_heads, int dim,
                               enum kern_type type) {
    return bench_mixed(t, heads, kv_heads, dim, type, type, 1.0);
}

/* Each path on each pool, but ref, which knows no threads, once. */
#define EACH_ONCE(t, k)                                                                            \
    KT_EACH(t, k)                                                                                  \
    if (strcmp(k->name, "ref") || k->pool == (t)->pool[0])

static struct kern_attn attn_of(const struct bench *b, void *y, float *lse) {
    return (struct kern_attn){ kt_p(b->q), b->type,        b->kv,
                               LAYER,      kt_p(b->slots), kt_p(b->pos),
                               kt_p(y),    b->type,        kt_p(lse),
                               ROWS,       b->heads,       1.0f / sqrtf((float)b->kv.head_dim),
                               NULL,       { NULL } };
}

Test(kv_put, same_pages_and_nothing_else) {
    struct kt t;
    kt_open(&t);
    for (size_t s = 0; s < COUNT_OF(shape); s++)
        /* pages f32 or bf16; k f32 or bf16 */
        for (int type = 0; type < 4; type++) {
            struct bench b = bench_make(&t, shape[s].heads, shape[s].kv_heads, shape[s].dim,
                                        type & 1 ? KERN_BF16 : KERN_F32);
            enum kern_type kt = type & 2 ? KERN_BF16 : KERN_F32;
            struct kern_kv_put a = { b.kv,        LAYER,     kt_p(kt_typed(&t, kt, b.kv_size, 1.0)),
                                     kt,          kt_p(b.v), kt_p(b.slots),
                                     kt_p(b.pos), ROWS };
            t.ref.kv_put(&t.ref, &a);
            size_t at = cpu_kv_at(&b.kv, LAYER, 3, 40, 0, 1, 0);
            float v = b.v[(seq_start[3] + 40) * b.kv.kv_heads * b.kv.head_dim];
            cr_assert(kt_get(b.kv.pages.p, b.kv.type, at) ==
                      (b.kv.type == KERN_F32 ? v : bf16_to_f32(f32_to_bf16(v))));
            KT_EACH(&t, k) {
                char *got = kt_new(&t, b.pages_bytes);
                memset(got, 0xff, b.pages_bytes);
                a.kv.pages = kt_p(got);
                k->kv_put(k, &a);
                KT_SAME(k, got, (char *)b.kv.pages.p, b.pages_bytes, "kv_put dim %d", shape[s].dim);
            }
            kt_drop(&t);
        }
    kt_close(&t);
}

static double kv_get(const struct bench *b, int r, int j, int h, int is_v, int i) {
    return (double)kt_get(b->kv.pages.p, b->kv.type,
                          cpu_kv_at(&b->kv, LAYER, b->slots[r], j, h, is_v, i));
}

/* softmax(q K / sqrt d) V of one query in double, and the same of |V|; returns the log of the sum. */
static double attn_double(const struct bench *b, int r, int h, const double *q, double *y,
                          double *weight) {
    int dim = b->kv.head_dim, kvh = h * b->kv.kv_heads / b->heads, keys = b->pos[r] + 1;
    double p[256], most = -1e300, sum = 0.0;
    for (int j = 0; j < keys; j++) {
        p[j] = 0.0;
        for (int i = 0; i < dim; i++)
            p[j] += q[i] * kv_get(b, r, j, kvh, 0, i) / sqrt(dim);
        if (p[j] > most) most = p[j];
    }
    for (int j = 0; j < keys; j++) sum += p[j] = exp(p[j] - most);
    for (int i = 0; i < dim; i++) y[i] = weight[i] = 0.0;
    for (int j = 0; j < keys; j++)
        for (int i = 0; i < dim; i++) {
            double v = kv_get(b, r, j, kvh, 1, i);
            y[i] += p[j] / sum * v;
            weight[i] += p[j] / sum * fabs(v);
        }
    return most + log(sum);
}

static void put(struct kt *t, const struct bench *b) {
    struct kern_kv_put a = { b->kv,      LAYER,          kt_p(b->k_in), b->type,
                             kt_p(b->v), kt_p(b->slots), kt_p(b->pos),  ROWS };
    t->ref.kv_put(&t->ref, &a);
}

/* Rounding p to bf16 moves it by up to 2^-8 of itself, rounding y does so once more; in f32 p
 * inherits the scores' error: some 2^-24 of head_dim products of size ~1. */
Test(attn, near_double) {
    struct kt t;
    kt_open(&t);
    for (size_t s = 0; s < COUNT_OF(shape); s++)
        for (size_t x = 0; x < COUNT_OF(mix); x++) {
            struct bench b = bench_mixed(&t, shape[s].heads, shape[s].kv_heads, shape[s].dim,
                                         mix[x].q, mix[x].pages, 1.0);
            put(&t, &b);
            int dim = b.kv.head_dim;
            void *y = kt_new(&t, kt_bytes(b.type, b.q_size));
            float *lse = kt_new(&t, (size_t)(ROWS * b.heads) * 4);
            struct kern_attn a = attn_of(&b, y, lse);
            t.ref.attn(&t.ref, &a);
            for (int r = 0; r < ROWS; r += 5)
                for (int h = 0; h < b.heads; h++) {
                    double q[128], want[128], weight[128];
                    size_t at = (size_t)((r * b.heads + h) * dim);
                    for (int i = 0; i < dim; i++)
                        q[i] = (double)kt_get(b.q, b.type, at + (size_t)i);
                    KT_NEAR((double)lse[r * b.heads + h], attn_double(&b, r, h, q, want, weight),
                            2e-6, "lse dim %d", dim);
                    for (int i = 0; i < dim; i++)
                        KT_NEAR((double)kt_get(y, b.type, at + (size_t)i), want[i],
                                weight[i] * (4e-6 + (b.kv.type == KERN_BF16 ? 0x1p-8 : 0)) +
                                    (b.type == KERN_BF16 ? fabs(want[i]) * 0x1p-8 : 0),
                                "attn dim %d", dim);
                }
            kt_drop(&t);
        }
    kt_close(&t);
}

/* The rows of `order` (n of them) in one call of path k, back in their places. */
static void attn_rows(struct kern *k, const struct bench *b, const int *order, int n, char *y,
                      float *lse) {
    size_t row = kt_bytes(b->type, (size_t)(b->heads * b->kv.head_dim)), heads = (size_t)b->heads;
    char *q = malloc(row * (size_t)n), *out = malloc(row * (size_t)n);
    float *l = malloc(heads * 4 * (size_t)n);
    int32_t *slots = malloc(4 * (size_t)n), *pos = malloc(4 * (size_t)n);
    for (int i = 0; i < n; i++) {
        memcpy(q + (size_t)i * row, (const char *)b->q + (size_t)order[i] * row, row);
        slots[i] = b->slots[order[i]], pos[i] = b->pos[order[i]];
    }
    struct kern_attn a = attn_of(b, out, l);
    a.q = kt_p(q), a.slots = kt_p(slots), a.pos = kt_p(pos), a.rows = n;
    k->attn(k, &a);
    for (int i = 0; i < n; i++) {
        memcpy(y + (size_t)order[i] * row, out + (size_t)i * row, row);
        memcpy(lse + (size_t)order[i] * heads, l + (size_t)i * heads, heads * 4);
    }
    free(q), free(out), free(l), free(slots), free(pos);
}

Test(attn, same_bits_at_once_in_chunks_or_row_by_row_in_any_order) {
    struct kt t;
    kt_open(&t);
    for (size_t s = 0; s < COUNT_OF(shape); s++)
        for (size_t x = 0; x < COUNT_OF(mix); x++) {
            struct bench b = bench_mixed(&t, shape[s].heads, shape[s].kv_heads, shape[s].dim,
                                         mix[x].q, mix[x].pages, 1.0);
            put(&t, &b);
            size_t bytes = kt_bytes(b.type, b.q_size), lse_bytes = (size_t)(ROWS * b.heads) * 4;
            char *want = kt_new(&t, bytes), *got = kt_new(&t, bytes);
            float *lse = kt_new(&t, lse_bytes), *l = kt_new(&t, lse_bytes);
            struct kern_attn a = attn_of(&b, want, lse);
            t.ref.attn(&t.ref, &a);
            int order[ROWS];
            for (int i = 0; i < ROWS; i++) order[i] = i * 50 % ROWS; /* slots and positions mixed */
            EACH_ONCE(&t, k) {
                memset(got, 0, bytes);
                a = attn_of(&b, got, l);
                k->attn(k, &a);
                KT_SAME(k, got, want, bytes, "attn %d/%d heads of %d", b.heads, b.kv.kv_heads,
                        b.kv.head_dim);
                KT_SAME(k, l, lse, lse_bytes, "attn lse dim %d", b.kv.head_dim);
                if (!strcmp(k->name, "ref")) continue;       /* a row at a time is all it does */
                memset(got, 0, bytes);
                for (int r = 0; r < ROWS; r++) attn_rows(k, &b, &order[r], 1, got, l);
                KT_SAME(k, got, want, bytes, "attn row by row, heads of %d", b.kv.head_dim);
                memset(got, 0, bytes);
                for (int r = 0, n; r < ROWS; r += n) {
                    n = r % 3 * 11 + 5 < ROWS - r ? r % 3 * 11 + 5 : ROWS - r;
                    attn_rows(k, &b, order + r, n, got, l);
                }
                KT_SAME(k, got, want, bytes, "attn in chunks, heads of %d", b.kv.head_dim);
                KT_SAME(k, l, lse, lse_bytes, "attn lse in chunks, heads of %d", b.kv.head_dim);
            }
            kt_drop(&t);
        }
    kt_close(&t);
}

/* Four slots whose first `shared` pages are slot 3's, or copies of them: rows of a decode batch. */
Test(attn, same_bits_with_a_shared_page_or_a_copy_of_it) {
    struct kt t;
    kt_open(&t);
    for (size_t s = 0; s < COUNT_OF(shape); s++)
        for (int shared = 1; shared < 4; shared++) {
            struct bench b = bench_make(&t, shape[s].heads, shape[s].kv_heads, shape[s].dim,
                                        KERN_BF16);
            put(&t, &b);
            int32_t *table = b.kv.table.p;
            size_t page = b.pages_bytes / (SEQS * SLOT_PAGES), bytes = kt_bytes(b.type, b.q_size);
            for (int slot = 0; slot < 4; slot++)             /* the last page is everybody's own */
                for (int j = 0; j < 4; j++)
                    if (slot < 3)
                        memcpy((char *)b.kv.pages.p + (size_t)table[slot * SLOT_PAGES + j] * page,
                               (char *)b.kv.pages.p + (size_t)table[3 * SLOT_PAGES + j] * page,
                               page);
            for (int r = 0; r < ROWS; r++) b.slots[r] = r * 4 / ROWS, b.pos[r] = 96 - r * 7 % 40;
            char *want = kt_new(&t, bytes), *got = kt_new(&t, bytes);
            struct kern_attn a = attn_of(&b, want, NULL);
            t.ref.attn(&t.ref, &a);
            a.y = kt_p(got);
            EACH_ONCE(&t, k) {
                k->attn(k, &a);
                KT_SAME(k, got, want, bytes, "attn own copies, heads of %d", b.kv.head_dim);
            }
            for (int slot = 0; slot < 3; slot++)
                for (int j = 0; j < shared; j++)
                    table[slot * SLOT_PAGES + j] = table[3 * SLOT_PAGES + j];
            EACH_ONCE(&t, k) {
                k->attn(k, &a);
                KT_SAME(k, got, want, bytes, "attn %d shared pages, heads of %d", shared,
                        b.kv.head_dim);
            }
            kt_drop(&t);
        }
    kt_close(&t);
}

/* Values so small that products with p, and sums, fall below 2^-126; scores that jump by hundreds
 * from page to page, so that what came before is multiplied by 0. */
Test(attn, same_bits_where_products_vanish) {
    struct kt t;
    kt_open(&t);
    for (size_t s = 0; s < COUNT_OF(shape); s++)
        for (enum kern_type type = KERN_F32; type <= KERN_BF16; type++) {
            struct bench b = bench_mixed(&t, shape[s].heads, shape[s].kv_heads, shape[s].dim, type,
                                         type, 0x1p-124);
            for (size_t i = 0; i < b.kv_size; i++)
                cpu_put(kt_p(b.k_in), type, i,
                        kt_get(b.k_in, type, i) * (i / 32 % 64 == 5 ? 100.0f : 1.0f));
            put(&t, &b);
            size_t bytes = kt_bytes(type, b.q_size);
            char *want = kt_new(&t, bytes), *got = kt_new(&t, bytes);
            struct kern_attn a = attn_of(&b, want, NULL);
            t.ref.attn(&t.ref, &a);
            a.y = kt_p(got);
            EACH_ONCE(&t, k) {
                k->attn(k, &a);
                KT_SAME(k, got, want, bytes, "attn of tiny values, heads of %d", b.kv.head_dim);
            }
            kt_drop(&t);
        }
    kt_close(&t);
}

static bool row_is_nan(const struct bench *b, const void *y, int r) {
    size_t row = (size_t)(b->heads * b->kv.head_dim), nan = 0;
    for (size_t i = 0; i < row; i++) {
        float v = kt_get(y, b->type, (size_t)r * row + i);
        nan += v != v;
    }
    return nan == row;
}

/* A NaN at position 40 of sequence 3, in q, k or v: rows that do not see it keep their bits. */
Test(attn, a_nan_reaches_the_rows_that_see_it) {
    struct kt t;
    kt_open(&t);
    for (size_t s = 0; s < COUNT_OF(shape); s++)
        for (int what = 0; what < 6; what++) {
            enum kern_type type = what & 1 ? KERN_BF16 : KERN_F32;
            struct bench b = bench_make(&t, shape[s].heads, shape[s].kv_heads, shape[s].dim, type);
            int bad = seq_start[3] + 40;
            size_t bytes = kt_bytes(type, b.q_size), q_row = (size_t)(b.heads * b.kv.head_dim),
                   kv_row = (size_t)(b.kv.kv_heads * b.kv.head_dim);
            char *want = kt_new(&t, bytes), *got = kt_new(&t, bytes);
            put(&t, &b);
            struct kern_attn a = attn_of(&b, want, NULL);
            t.ref.attn(&t.ref, &a);
            for (size_t i = 0; i < q_row && what / 2 == 0; i++)
                cpu_put(kt_p(b.q), type, (size_t)bad * q_row + i, NAN);
            for (size_t i = 0; i < kv_row && what / 2 == 1; i++)
                cpu_put(kt_p(b.k_in), type, (size_t)bad * kv_row + i, NAN);
            for (size_t i = 0; i < kv_row && what / 2 == 2; i++)
                b.v[(size_t)bad * kv_row + i] = i % 2 ? NAN : INFINITY;
            put(&t, &b);
            a.y = kt_p(got);
            EACH_ONCE(&t, k) {
                k->attn(k, &a);
                for (int r = 0; r < ROWS; r++) {
                    bool sees = what / 2 == 0 ? r == bad : r >= bad;
                    size_t row = kt_bytes(type, q_row);
                    if (!sees)
                        KT_SAME(k, got + (size_t)r * row, want + (size_t)r * row, row,
                                "row %d beside a NaN, heads of %d", r, b.kv.head_dim);
                    else if (what / 2 < 2)
                        cr_assert(row_is_nan(&b, got, r), "%s: row %d", k->name, r);
                    else
                        for (size_t i = 0; i < q_row; i++)
                            cr_assert(!isfinite(kt_get(got, type, (size_t)r * q_row + i)),
                                      "%s: row %d", k->name, r);
                }
            }
            kt_drop(&t);
        }
    kt_close(&t);
}

struct grads { float *dq, *dk, *dv; };
static struct grads grads_new(struct kt *t, const struct bench *b) {
    return (struct grads){ kt_new(t, b->q_size * 4), kt_new(t, b->kv_size * 4),
                           kt_new(t, b->kv_size * 4) };
}
static struct kern_attn_bwd bwd_of(const struct bench *b, const void *y, const float *lse,
                                   struct grads g) {
    return (struct kern_attn_bwd){ kt_p(b->q),     b->type,    b->kv,      LAYER,
                                   kt_p(b->slots), kt_p(y),    b->type,    kt_p(lse),
                                   kt_p(b->dy),    kt_p(g.dq), kt_p(g.dk), kt_p(g.dv),
                                   seq_start,      SEQS,       b->heads,   attn_of(b, NULL, NULL).scale,
                                   NULL,           { NULL } };
}

Test(attn_bwd, same_bits_for_any_threads_and_split) {
    struct kt t;
    kt_open(&t);
    for (size_t s = 0; s < COUNT_OF(shape); s++)
        for (size_t x = 0; x < COUNT_OF(mix); x++) {
            struct bench b = bench_mixed(&t, shape[s].heads, shape[s].kv_heads, shape[s].dim,
                                         mix[x].q, mix[x].pages, 1.0);
            put(&t, &b);
            void *y = kt_new(&t, kt_bytes(b.type, b.q_size));
            float *lse = kt_new(&t, (size_t)(ROWS * b.heads) * 4);
            struct kern_attn f = attn_of(&b, y, lse);
            t.ref.attn(&t.ref, &f);
            struct grads want = grads_new(&t, &b), got = grads_new(&t, &b);
            struct kern_attn_bwd a = bwd_of(&b, y, lse, want);
            t.ref.attn_bwd(&t.ref, &a);
            a = bwd_of(&b, y, lse, got);
            EACH_ONCE(&t, k) {
                memset(got.dq, 0, b.q_size * 4);
                for (int from = 0; from < SEQS; from += a.seqs) {        /* 1 and 3 of them */
                    a.seqs = from ? SEQS - 1 : 1, a.seq_start = seq_start + from;
                    k->attn_bwd(k, &a);
                }
                KT_SAME(k, got.dq, want.dq, b.q_size * 4, "attn_bwd dq %d/%d heads of %d", b.heads,
                        b.kv.kv_heads, b.kv.head_dim);
                KT_SAME(k, got.dk, want.dk, b.kv_size * 4, "attn_bwd dk %d/%d heads of %d",
                        b.heads, b.kv.kv_heads, b.kv.head_dim);
                KT_SAME(k, got.dv, want.dv, b.kv_size * 4, "attn_bwd dv %d/%d heads of %d",
                        b.heads, b.kv.kv_heads, b.kv.head_dim);
            }
            kt_drop(&t);
        }
    kt_close(&t);
}

/* A NaN in dy, q or v of sequence 1 stays there: sequences 0 and 3 keep their bits. */
Test(attn_bwd, a_nan_stays_in_its_sequence) {
    struct kt t;
    kt_open(&t);
    for (int what = 0; what < 6; what++) {
        enum kern_type type = what & 1 ? KERN_BF16 : KERN_F32;
        struct bench b = bench_make(&t, 9, 3, 64, type);
        void *y = kt_new(&t, kt_bytes(type, b.q_size));
        float *lse = kt_new(&t, (size_t)(ROWS * b.heads) * 4);
        struct grads want = grads_new(&t, &b), got = grads_new(&t, &b);
        put(&t, &b);
        struct kern_attn f = attn_of(&b, y, lse);
        t.ref.attn(&t.ref, &f);
        struct kern_attn_bwd a = bwd_of(&b, y, lse, want);
        t.ref.attn_bwd(&t.ref, &a);
        size_t q_row = 9 * 64, kv_row = 3 * 64, bad = 20;
        if (what / 2 == 0) b.dy[bad * q_row + 70] = NAN;
        if (what / 2 == 1) cpu_put(kt_p(b.q), type, bad * q_row + 70, NAN);
        if (what / 2 == 2) b.v[bad * kv_row + 70] = NAN;
        put(&t, &b);
        t.ref.attn(&t.ref, &f);
        a = bwd_of(&b, y, lse, got);
        EACH_ONCE(&t, k) {
            k->attn_bwd(k, &a);
            bool nan = false;
            for (size_t i = 0; i < 33 * kv_row; i++) nan |= isnan(got.dk[kv_row + i]);
            cr_assert(nan, "%s: the NaN is lost", k->name);
            for (int part = 0; part < 2; part++) {
                size_t from = part ? 34 : 0, rows = part ? ROWS - 34 : 1;
                KT_SAME(k, got.dq + from * q_row, want.dq + from * q_row, rows * q_row * 4,
                        "dq of sequence %d beside a NaN", part * 3);
                KT_SAME(k, got.dk + from * kv_row, want.dk + from * kv_row, rows * kv_row * 4,
                        "dk of sequence %d beside a NaN", part * 3);
                KT_SAME(k, got.dv + from * kv_row, want.dv + from * kv_row, rows * kv_row * 4,
                        "dv of sequence %d beside a NaN", part * 3);
            }
        }
        kt_drop(&t);
    }
    kt_close(&t);
}

/* sum(dy . attention) of all rows in double, with the f32 pages as they are and q apart. */
static double whole_loss(const struct bench *b, const float *q_all) {
    int dim = b->kv.head_dim;
    double loss = 0.0, q[128], y[128], weight[128];
    for (int r = 0; r < ROWS; r++)
        for (int h = 0; h < b->heads; h++) {
            size_t at = (size_t)((r * b->heads + h) * dim);
            for (int i = 0; i < dim; i++) q[i] = (double)q_all[at + (size_t)i];
            attn_double(b, r, h, q, y, weight);
            for (int i = 0; i < dim; i++) loss += y[i] * (double)b->dy[at + (size_t)i];
        }
    return loss;
}
static double slope_of(const struct bench *b, const float *q, float *x) {
    float at = *x, h = 0x1p-7f;
    *x = at + h;
    double up = whole_loss(b, q), up_x = (double)*x;
    *x = at - h;
    double down = whole_loss(b, q), down_x = (double)*x;
    *x = at;
    return (up - down) / (up_x - down_x);
}

Test(attn_bwd, finite_differences) {
    struct kt t;
    kt_open(&t);
    struct bench b = bench_make(&t, 4, 2, 10, KERN_F32);
    put(&t, &b);
    float *y = kt_new(&t, b.q_size * 4), *lse = kt_new(&t, ROWS * 4 * 4);
    struct grads g = grads_new(&t, &b);
    struct kern_attn f = attn_of(&b, y, lse);
    t.ref.attn(&t.ref, &f);
    struct kern_attn_bwd a = bwd_of(&b, y, lse, g);
    t.ref.attn_bwd(&t.ref, &a);
    float *q = b.q, *pages = b.kv.pages.p;
    for (int turn = 0; turn < 60; turn++) {
        size_t at = (size_t)(kt_unit(&t) * (double)b.q_size),
               to = (size_t)(kt_unit(&t) * (double)b.kv_size);
        int r = (int)(to / 20), h = (int)(to / 10 % 2), i = (int)(to % 10);
        KT_NEAR((double)g.dq[at], slope_of(&b, q, q + at), 1e-3, "dq[%zu]", at);
        KT_NEAR((double)g.dk[to],
                slope_of(&b, q, pages + cpu_kv_at(&b.kv, LAYER, b.slots[r], b.pos[r], h, 0, i)),
                2e-3, "dk[%zu]", to);
        KT_NEAR((double)g.dv[to],
                slope_of(&b, q, pages + cpu_kv_at(&b.kv, LAYER, b.slots[r], b.pos[r], h, 1, i)),
                1e-3, "dv[%zu]", to);
    }
    kt_close(&t);
}
