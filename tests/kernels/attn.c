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
    { 1, 1, 2 },  { 3, 1, 10 },  { 4, 2, 16 }, { 2, 2, 20 },  { 6, 2, 32 },
    { 9, 3, 64 }, { 14, 2, 64 }, { 7, 1, 34 }, { 4, 1, 128 }, { 3, 3, 80 },
};

struct bench {
    struct kern_kv kv;
    int heads;
    enum kern_type type;
    void *q;
    void *k_in;
    float *v, *dy;
    int32_t *slots, *pos;
    size_t q_size, kv_size, pages_bytes;
};

/* Pages of all slots are shuffled and full of NaN where nothing was put. */
static struct bench bench_make(struct kt *t, int heads, int kv_heads, int dim,
                               enum kern_type type) {
    struct bench b = { .heads = heads, .type = type };
    int pages = SEQS * SLOT_PAGES;
    int32_t *table = kt_new(t, (size_t)pages * 4);
    for (int i = 0; i < pages; i++) table[i] = i * 7 % pages;
    b.q_size = (size_t)(ROWS * heads * dim), b.kv_size = (size_t)(ROWS * kv_heads * dim);
    b.pages_bytes = kt_bytes(type, (size_t)(pages * LAYERS * 2 * kv_heads * 32 * dim));
    b.kv = (struct kern_kv){
        kt_p(kt_new(t, b.pages_bytes)), type, LAYERS, kv_heads, dim, kt_p(table), SLOT_PAGES
    };
    memset(b.kv.pages.p, 0xff, b.pages_bytes);
    b.q = kt_typed(t, type, b.q_size, 1.0);
    b.k_in = kt_typed(t, type, b.kv_size, 1.0);
    b.v = kt_f32(t, b.kv_size, 1.0);
    b.dy = kt_f32(t, b.q_size, 1.0);
    b.slots = kt_new(t, ROWS * 4), b.pos = kt_new(t, ROWS * 4);
    for (int s = 0; s < SEQS; s++)
        for (int r = seq_start[s]; r < seq_start[s + 1]; r++)
            b.slots[r] = s, b.pos[r] = r - seq_start[s];
    return b;
}

static struct kern_attn attn_of(const struct bench *b, void *y, float *lse) {
    return (struct kern_attn){ kt_p(b->q), b->type,        b->kv,
                               LAYER,      kt_p(b->slots), kt_p(b->pos),
                               kt_p(y),    b->type,        kt_p(lse),
                               ROWS,       b->heads,       1.0f / sqrtf((float)b->kv.head_dim) };
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

/* softmax(q K / sqrt d) V of one query in double; returns the log of the sum. */
static double attn_double(const struct bench *b, int r, int h, const double *q, double *y) {
    int dim = b->kv.head_dim, kvh = h * b->kv.kv_heads / b->heads, keys = b->pos[r] + 1;
    double p[256], most = -1e300, sum = 0.0;
    for (int j = 0; j < keys; j++) {
        p[j] = 0.0;
        for (int i = 0; i < dim; i++)
            p[j] += q[i] * kv_get(b, r, j, kvh, 0, i) / sqrt(dim);
        if (p[j] > most) most = p[j];
    }
    for (int j = 0; j < keys; j++) sum += p[j] = exp(p[j] - most);
    for (int i = 0; i < dim; i++) y[i] = 0.0;
    for (int j = 0; j < keys; j++) {
        for (int i = 0; i < dim; i++)
            y[i] += p[j] / sum * kv_get(b, r, j, kvh, 1, i);
    }
    return most + log(sum);
}

static void put(struct kt *t, const struct bench *b) {
    struct kern_kv_put a = { b->kv,      LAYER,          kt_p(b->k_in), b->type,
                             kt_p(b->v), kt_p(b->slots), kt_p(b->pos),  ROWS };
    t->ref.kv_put(&t->ref, &a);
}

Test(attn, same_bits_prefilled_or_decoded_and_near_double) {
    struct kt t;
    kt_open(&t);
    for (size_t s = 0; s < COUNT_OF(shape); s++)
        for (enum kern_type type = KERN_F32; type <= KERN_BF16; type++) {
            struct bench b = bench_make(&t, shape[s].heads, shape[s].kv_heads, shape[s].dim, type);
            put(&t, &b);
            size_t bytes = kt_bytes(type, b.q_size), lse_bytes = (size_t)(ROWS * b.heads) * 4,
                   row = (size_t)(b.heads * b.kv.head_dim);
            void *want = kt_new(&t, bytes);
            float *lse = kt_new(&t, lse_bytes);
            struct kern_attn a = attn_of(&b, want, lse);
            t.ref.attn(&t.ref, &a);
            for (int r = 0; r < ROWS; r += 5)
                for (int h = 0; h < b.heads; h++) {
                    double q[128], y[128];
                    size_t at = (size_t)r * row + (size_t)(h * b.kv.head_dim);
                    for (int i = 0; i < b.kv.head_dim; i++)
                        q[i] = (double)kt_get(b.q, type, at + (size_t)i);
                    KT_NEAR((double)lse[r * b.heads + h], attn_double(&b, r, h, q, y), 1e-5,
                            "lse dim %d", b.kv.head_dim);
                    for (int i = 0; i < b.kv.head_dim; i++)
                        KT_NEAR((double)kt_get(want, type, at + (size_t)i), y[i],
                                type == KERN_F32 ? 1e-5 : 0.01, "attn dim %d", b.kv.head_dim);
                }
            KT_EACH(&t, k) {
                char *got = kt_new(&t, bytes);
                float *l = kt_new(&t, lse_bytes);
                a = attn_of(&b, got, l);
                k->attn(k, &a);
                KT_SAME(k, got, (char *)want, bytes, "attn %d/%d heads of %d", b.heads,
                        b.kv.kv_heads, b.kv.head_dim);
                KT_SAME(k, l, lse, lse_bytes, "attn lse dim %d", b.kv.head_dim);
                memset(got, 0, bytes);
                a.lse = kt_p(NULL), a.rows = 1;
                /* decode, one row at a time */
                for (int r = 0; r < ROWS; r++) {
                    a.q = kptr_at(kt_p(b.q), kt_bytes(type, (size_t)r * row)),
                    a.y = kptr_at(kt_p(got), kt_bytes(type, (size_t)r * row));
                    a.slots = kt_p(b.slots + r), a.pos = kt_p(b.pos + r);
                    k->attn(k, &a);
                }
                KT_SAME(k, got, (char *)want, bytes, "attn row by row, heads of %d", b.kv.head_dim);
            }
            kt_drop(&t);
        }
    kt_close(&t);
}

Test(attn_bwd, same_bits_for_any_threads) {
    struct kt t;
    kt_open(&t);
    for (size_t s = 0; s < COUNT_OF(shape); s++)
        for (enum kern_type type = KERN_F32; type <= KERN_BF16; type++) {
            struct bench b = bench_make(&t, shape[s].heads, shape[s].kv_heads, shape[s].dim, type);
            put(&t, &b);
            void *y = kt_new(&t, kt_bytes(type, b.q_size));
            float *lse = kt_new(&t, (size_t)(ROWS * b.heads) * 4);
            float *dq = kt_new(&t, b.q_size * 4), *dk = kt_new(&t, b.kv_size * 4),
                  *dv = kt_new(&t, b.kv_size * 4);
            struct kern_attn f = attn_of(&b, y, lse);
            t.ref.attn(&t.ref, &f);
            struct kern_attn_bwd a = { kt_p(b.q),     type,     b.kv,     LAYER,
                                       kt_p(b.slots), kt_p(y),  type,     kt_p(lse),
                                       kt_p(b.dy),    kt_p(dq), kt_p(dk), kt_p(dv),
                                       seq_start,     SEQS,     b.heads,  f.scale };
            t.ref.attn_bwd(&t.ref, &a);
            KT_EACH(&t, k) {
                float *q2 = kt_new(&t, b.q_size * 4), *k2 = kt_new(&t, b.kv_size * 4),
                      *v2 = kt_new(&t, b.kv_size * 4);
                a.dq = kt_p(q2), a.dk = kt_p(k2), a.dv = kt_p(v2);
                k->attn_bwd(k, &a);
                KT_SAME(k, q2, dq, b.q_size * 4, "attn_bwd dq %d/%d heads of %d", b.heads,
                        b.kv.kv_heads, b.kv.head_dim);
                KT_SAME(k, k2, dk, b.kv_size * 4, "attn_bwd dk %d/%d heads of %d", b.heads,
                        b.kv.kv_heads, b.kv.head_dim);
                KT_SAME(k, v2, dv, b.kv_size * 4, "attn_bwd dv %d/%d heads of %d", b.heads,
                        b.kv.kv_heads, b.kv.head_dim);
            }
            kt_drop(&t);
        }
    kt_close(&t);
}

/* sum(dy . attention) of all rows in double, with the f32 pages as they are and q apart. */
static double whole_loss(const struct bench *b, const float *q_all) {
    int dim = b->kv.head_dim;
    double loss = 0.0, q[128], y[128];
    for (int r = 0; r < ROWS; r++)
        for (int h = 0; h < b->heads; h++) {
            size_t at = (size_t)((r * b->heads + h) * dim);
            for (int i = 0; i < dim; i++) q[i] = (double)q_all[at + (size_t)i];
            attn_double(b, r, h, q, y);
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
    float *dq = kt_new(&t, b.q_size * 4), *dk = kt_new(&t, b.kv_size * 4),
          *dv = kt_new(&t, b.kv_size * 4);
    struct kern_attn f = attn_of(&b, y, lse);
    t.ref.attn(&t.ref, &f);
    struct kern_attn_bwd a = { kt_p(b.q), KERN_F32,  b.kv,       LAYER,    kt_p(b.slots), kt_p(y),
                               KERN_F32,  kt_p(lse), kt_p(b.dy), kt_p(dq), kt_p(dk),      kt_p(dv),
                               seq_start, SEQS,      b.heads,    f.scale };
    t.ref.attn_bwd(&t.ref, &a);
    float *q = b.q, *pages = b.kv.pages.p;
    for (int turn = 0; turn < 60; turn++) {
        size_t at = (size_t)(kt_unit(&t) * (double)b.q_size),
               to = (size_t)(kt_unit(&t) * (double)b.kv_size);
        int r = (int)(to / 20), h = (int)(to / 10 % 2), i = (int)(to % 10);
        KT_NEAR((double)dq[at], slope_of(&b, q, q + at), 1e-3, "dq[%zu]", at);
        KT_NEAR((double)dk[to],
                slope_of(&b, q, pages + cpu_kv_at(&b.kv, LAYER, b.slots[r], b.pos[r], h, 0, i)),
                2e-3, "dk[%zu]", to);
        KT_NEAR((double)dv[to],
                slope_of(&b, q, pages + cpu_kv_at(&b.kv, LAYER, b.slots[r], b.pos[r], h, 1, i)),
                1e-3, "dv[%zu]", to);
    }
    kt_close(&t);
}
