/* attn_long.c - attention of decoding and of whole sequences: long pasts, shared prompts, ragged rows. Every path has the
 * reference's bits, clean and noisy, whichever form a device takes for the shape.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/kernels/kt.h"

enum { LAYERS = 2, LAYER = 1, SUMS = KERN_NOISE_SUMS };
/* Rows of decoding: a group's rows share `shared` pages and each has 1 .. own pages of its own, the last one partly seen;
 * the first `apart` rows belong to no group. */
struct shape { int rows, heads, kv_heads, dim, slot_pages, apart, group, shared, own; };
static const struct shape clean[] = {
    { 1, 7, 1, 64, 40, 0, 1, 0, 39 },    /* more pages than a warp has lanes */
    { 1, 3, 1, 128, 9, 0, 1, 0, 9 },
    { 2, 2, 2, 80, 6, 0, 2, 3, 2 },
    { 7, 7, 1, 64, 7, 0, 7, 4, 2 },
    { 8, 14, 2, 64, 12, 0, 8, 9, 2 },    /* eight samples of a prompt */
    { 9, 5, 2, 10, 6, 1, 8, 4, 2 },      /* groups that lie askew to blocks; kv heads with 3 and 2 heads */
    { 16, 3, 3, 34, 5, 3, 8, 2, 2 },
    { 31, 6, 2, 32, 6, 2, 5, 3, 2 },
    { 33, 7, 1, 64, 5, 0, 33, 3, 1 },    /* more rows than one block takes together */
    { 110, 2, 1, 6, 5, 5, 100, 3, 1 },
    { 12, 2, 1, 260, 5, 1, 6, 2, 2 },    /* a head for which a block has fewer warps */
    { 9, 8, 1, 128, 1500, 1, 4, 1, 1 },  /* more memory than a device takes at once */
    { 20, 7, 1, 64, 4, 3, 8, 2, 2 },     /* short slots, and many rows: page after page */
    { 260, 2, 1, 10, 9, 4, 8, 5, 3 },
    { 258, 3, 2, 2, 40, 2, 128, 33, 2 },
};
static const struct shape noisy[] = {
    { 9, 5, 2, 10, 40, 1, 8, 33, 3 },
    { 20, 5, 2, 10, 4, 3, 8, 2, 2 },
    { 110, 1, 1, 6, 5, 5, 100, 1, 1 },   /* a row that two blocks took would be counted twice */
};
static const struct { enum kern_type q, pages; } mix[] = {
    { KERN_BF16, KERN_BF16 }, { KERN_F32, KERN_F32 }, { KERN_F32, KERN_BF16 },
};

#define EACH_ONCE(t, k)                                                                            \
    KT_EACH(t, k)                                                                                  \
    if (strcmp(k->name, "ref") || k->pool == (t)->pool[0])

struct bench {
    struct kern_kv kv;
    int rows, heads;
    enum kern_type type;
    void *q;
    int32_t *slots, *pos;
    uint32_t *id;
};

/* Numbers where some row sees a key, NaN elsewhere. */
static void fill(struct kt *t, const struct bench *b, int pages) {
    const int dim = b->kv.head_dim;
    int *seen = kt_new(t, (size_t)pages * sizeof *seen);
    const int32_t *table = b->kv.table.p;
    memset(seen, 0, (size_t)pages * sizeof *seen);
    for (int r = 0; r < b->rows; r++)
        for (int j = 0; j <= b->pos[r]; j++) {
            int *n = &seen[table[b->slots[r] * b->kv.slot_pages + j / 32]];
            if (*n < j % 32 + 1) *n = j % 32 + 1;
        }
    for (int p = 0; p < pages; p++)
        for (int h = 0; h < b->kv.kv_heads; h++)
            for (int j = 0; j < seen[p]; j++)
                for (int i = 0; i < dim; i++) {
                    const size_t key = (size_t)((i / 2 * 32 + j) * 2 + i % 2),
                                 value = (size_t)((j / 2 * dim + i) * 2 + j % 2);
                    cpu_put(b->kv.pages, b->kv.type, cpu_kv_in_page(&b->kv, LAYER, p, h, 0) + key,
                            (float)kt_normal(t));
                    cpu_put(b->kv.pages, b->kv.type, cpu_kv_in_page(&b->kv, LAYER, p, h, 1) + value,
                            (float)kt_normal(t));
                }
}

static struct bench bench_new(struct kt *t, int rows, int heads, int slots, int slot_pages, int pages,
                              struct kern_kv kv, enum kern_type type) {
    struct bench b = { .kv = kv, .rows = rows, .heads = heads, .type = type };
    const size_t bytes = kt_bytes(kv.type, (size_t)(pages * LAYERS * 2 * kv.kv_heads * 32) * (size_t)kv.head_dim);
    b.kv.layers = LAYERS, b.kv.slot_pages = slot_pages;
    b.kv.pages = kt_p(kt_new(t, bytes));
    memset(b.kv.pages.p, 0xff, bytes);
    b.kv.table = kt_p(kt_new(t, (size_t)(slots * slot_pages) * 4));
    memset(b.kv.table.p, 0, (size_t)(slots * slot_pages) * 4);
    b.q = kt_typed(t, type, (size_t)(rows * heads) * (size_t)kv.head_dim, 1.0);
    b.slots = kt_new(t, (size_t)rows * 4), b.pos = kt_new(t, (size_t)rows * 4);
    b.id = kt_new(t, (size_t)rows * 8);
    for (int r = 0; r < rows; r++) b.id[2 * r] = 40u + (uint32_t)r / 3, b.id[2 * r + 1] = (uint32_t)r % 3;
    return b;
}

/* A row a slot. */
static struct bench decoding(struct kt *t, const struct shape *s, enum kern_type type, enum kern_type pages_type) {
    const int groups = s->apart + (s->rows - s->apart + s->group - 1) / s->group,
              pages = groups * s->shared + s->rows * s->own;
    struct bench b = bench_new(t, s->rows, s->heads, s->rows, s->slot_pages, pages,
                               (struct kern_kv){ .type = pages_type, .kv_heads = s->kv_heads, .head_dim = s->dim }, type);
    int32_t *table = b.kv.table.p;
    for (int r = 0; r < s->rows; r++) {
        const int g = r < s->apart ? r : s->apart + (r - s->apart) / s->group,
                  own = 1 + r * 29 % (32 * s->own - (s->rows == 1));
        b.slots[r] = (r + 1) % s->rows;
        b.pos[r] = 32 * s->shared + (s->rows == 1 ? 32 * s->own - 5 : own) - 1;
        for (int j = 0; j < s->shared; j++) table[b.slots[r] * s->slot_pages + j] = pages - 1 - (g * s->shared + j);
        for (int j = 0; j < s->own; j++) table[b.slots[r] * s->slot_pages + s->shared + j] = r * s->own + j;
    }
    fill(t, &b, pages);
    return b;
}
/* Neighbouring positions of one slot after a past, then of another: a piece of a prompt. The value of the first slot's last
 * position, which one row sees, is infinite: times 0 that would be a NaN. */
static struct bench prefilling(struct kt *t, int rows, int past, int slot_pages, enum kern_type type) {
    struct bench b = bench_new(t, rows, 7, 2, slot_pages, 2 * slot_pages,
                               (struct kern_kv){ .type = type, .kv_heads = 1, .head_dim = 32 }, type);
    for (int i = 0; i < 2 * slot_pages; i++) ((int32_t *)b.kv.table.p)[i] = 2 * slot_pages - 1 - i;
    for (int r = 0; r < rows; r++) b.slots[r] = r >= rows - 11, b.pos[r] = r < rows - 11 ? past + r : r - rows + 11;
    fill(t, &b, 2 * slot_pages);
    const int last = past + rows - 12;
    for (int i = 0; i < 32; i += 5) cpu_put(b.kv.pages, type, cpu_kv_at(&b.kv, LAYER, 0, last, 0, 1, i), INFINITY);
    return b;
}

static struct kern_noise noise_one(const struct bench *b, enum kern_noise_type type, uint32_t number, int64_t *sums) {
    return (struct kern_noise){ .type = type, .scale = 0.2f, .rate = 0.3f, .bf16 = b->type == KERN_BF16, .key = { 5, 6 },
                                .site = KERN_NOISE_SITE(LAYER, number), .id = kt_p(b->id), .pos = kt_p(b->pos),
                                .sums = kt_p(sums) };
}

/* Types s and p on scores and probabilities; OFF both: clean. */
static void same(struct kt *t, const struct bench *b, enum kern_noise_type s, enum kern_noise_type p) {
    const size_t queries = (size_t)(b->rows * b->heads), bytes = kt_bytes(b->type, queries * (size_t)b->kv.head_dim);
    int64_t want_sums[2 * SUMS] = { 0 }, sums[2 * SUMS];
    struct kern_attn_noise noise = { 0 };
    char *want = kt_new(t, bytes), *got = kt_new(t, bytes);
    float *lse = kt_new(t, queries * 4), *l = kt_new(t, queries * 4), *peaks = kt_new(t, queries * 8),
          *top = kt_new(t, queries * 8);
    struct kern_attn a = { kt_p(b->q), b->type, b->kv, LAYER, kt_p(b->slots), kt_p(b->pos), kt_p(want), b->type, kt_p(lse),
                           b->rows, b->heads, 1.0f / sqrtf((float)b->kv.head_dim), s || p ? &noise : NULL, kt_p(peaks) };
    noise.scores = noise_one(b, s, 11, want_sums), noise.probs = noise_one(b, p, 12, want_sums + SUMS);
    t->ref.attn(&t->ref, &a);
    for (size_t i = 0; i < queries; i++) cr_assert(isfinite(lse[i]), "query %zu sees what is not there", i);
    noise.scores.sums = kt_p(sums), noise.probs.sums = kt_p(sums + SUMS);
    a.y = kt_p(got), a.lse = kt_p(l), a.peaks = kt_p(top);
    EACH_ONCE(t, k) {
        memset(sums, 0, sizeof sums), memset(got, 0, bytes), memset(l, 0, queries * 4);
        k->attn(k, &a);
        KT_SAME(k, got, want, bytes, "%d rows, %d/%d heads of %d, %d pages, noise %d %d", b->rows, b->heads, b->kv.kv_heads,
                b->kv.head_dim, b->kv.slot_pages, s, p);
        KT_SAME(k, l, lse, queries * 4, "lse of %d rows, noise %d %d", b->rows, s, p);
        if (a.noise) KT_SAME(k, top, peaks, queries * 8, "peaks of %d rows, noise %d %d", b->rows, s, p);
        for (int i = 0; i < 2 * SUMS; i++)
            cr_assert(sums[i] == want_sums[i], "%s: noise %d %d, sum %d: %lld, ref %lld", k->name, s, p, i, (long long)sums[i],
                      (long long)want_sums[i]);
    }
    kt_drop(t);
}

Test(attn_long, same_bits_of_decoding_with_shared_prompts) {
    struct kt t;
    kt_open(&t);
    for (size_t s = 0; s < COUNT_OF(clean); s++)
        for (size_t x = 0; x < COUNT_OF(mix); x++) {
            if (x && x != 1 + s % 2) continue;
            struct bench b = decoding(&t, &clean[s], mix[x].q, mix[x].pages);
            same(&t, &b, KERN_NOISE_OFF, KERN_NOISE_OFF);
        }
    kt_close(&t);
}

/* Rows of one slot see its last page to different ends; the last 11 are another sequence's first. */
Test(attn_long, same_bits_of_a_piece_of_a_prompt) {
    struct kt t;
    kt_open(&t);
    for (enum kern_type type = KERN_F32; type <= KERN_BF16; type++) {
        struct bench b = prefilling(&t, 60, 90, 6, type);
        same(&t, &b, KERN_NOISE_OFF, KERN_NOISE_OFF);
        b = prefilling(&t, 61, 30, 4, type);
        same(&t, &b, KERN_NOISE_OFF, KERN_NOISE_OFF);
        b = prefilling(&t, 20, 90, 6, type);
        same(&t, &b, KERN_NOISE_DEADZONE, KERN_NOISE_RELATIVE_GAUSSIAN);
    }
    kt_close(&t);
}

Test(attn_long, same_bits_and_sums_with_noise) {
    struct kt t;
    kt_open(&t);
    for (size_t s = 0; s < COUNT_OF(noisy); s++)
        for (enum kern_noise_type type = 1; type < KERN_NOISE_TYPE_COUNT; type++)
            for (int which = 1; which < 4; which++) {        /* scores, probabilities, both */
                if (which < 3 && (s || type % 3)) continue;
                const enum kern_type store = type % 2 ? KERN_BF16 : KERN_F32;
                struct bench b = decoding(&t, &noisy[s], store, store);
                same(&t, &b, which & 1 ? type : KERN_NOISE_OFF, which & 2 ? type : KERN_NOISE_OFF);
            }
    kt_close(&t);
}
