/* attn_noise.c - noise inside attention: every path has the reference's bits and sums in any batch;
 * values and gradients are those of a second text in double.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/kernels/kt.h"

enum { SEQS = 3, LAYERS = 2, LAYER = 1, SLOT_PAGES = 4, ROWS = 112, SUMS = KERN_NOISE_SUMS };
/* lengths 1, 34, 77 */
static const int32_t seq_start[SEQS + 1] = { 0, 1, 35, ROWS };
static const struct { int heads, kv_heads, dim; } shape[] = {
    { 1, 1, 2 }, { 5, 2, 10 }, { 6, 2, 32 }, { 7, 1, 64 }, { 2, 2, 128 },
};
#define EACH_ONCE(t, k)                                                                            \
    KT_EACH(t, k)                                                                                  \
    if (strcmp(k->name, "ref") || k->pool == (t)->pool[0])

struct bench {
    struct kern_kv kv;
    int heads;
    enum kern_type type;
    void *q;
    float *dy;
    int32_t *slots, *pos;
    uint32_t *id;
    size_t q_size, kv_size;
};
static struct bench bench_make(struct kt *t, int heads, int kv_heads, int dim,
                               enum kern_type type) {
    struct bench b = { .heads = heads, .type = type };
    const int pages = SEQS * SLOT_PAGES;
    int32_t *table = kt_new(t, (size_t)pages * 4);
    for (int i = 0; i < pages; i++) table[i] = i * 5 % pages;
    b.q_size = (size_t)(ROWS * heads * dim), b.kv_size = (size_t)(ROWS * kv_heads * dim);
    size_t bytes = kt_bytes(type, (size_t)(pages * LAYERS * 2 * kv_heads * 32 * dim));
    b.kv = (struct kern_kv){ kt_p(kt_new(t, bytes)), type, LAYERS, kv_heads, dim, kt_p(table),
                             SLOT_PAGES };
    memset(b.kv.pages.p, 0xff, bytes);                       /* NaN where nothing was put */
    b.q = kt_typed(t, type, b.q_size, 1.0);
    b.dy = kt_f32(t, b.q_size, 1.0);
    b.slots = kt_new(t, ROWS * 4), b.pos = kt_new(t, ROWS * 4), b.id = kt_new(t, ROWS * 8);
    for (int s = 0; s < SEQS; s++)
        for (int r = seq_start[s]; r < seq_start[s + 1]; r++) {
            b.slots[r] = s, b.pos[r] = r - seq_start[s];
            b.id[2 * r] = 90u + (uint32_t)s, b.id[2 * r + 1] = b.pos[r] < 5 ? 0xffffu : 2u;
        }
    struct kern_kv_put put = { b.kv, LAYER, kt_p(kt_typed(t, type, b.kv_size, 1.0)), type,
                               kt_p(kt_f32(t, b.kv_size, 1.0)), kt_p(b.slots), kt_p(b.pos), ROWS };
    t->ref.kv_put(&t->ref, &put);
    return b;
}
/* All types on two shapes, Gaussian noise and the dead zone on the others. */
static bool skipped(size_t s, enum kern_noise_type type) {
    return s != 1 && s != 2 && type != KERN_NOISE_RELATIVE_GAUSSIAN && type != KERN_NOISE_DEADZONE;
}
static struct kern_attn attn_of(const struct bench *b, void *y, float *lse,
                                const struct kern_attn_noise *noise) {
    return (struct kern_attn){ kt_p(b->q), b->type, b->kv, LAYER, kt_p(b->slots), kt_p(b->pos),
                               kt_p(y), b->type, kt_p(lse), ROWS, b->heads,
                               1.0f / sqrtf((float)b->kv.head_dim), noise, { NULL } };
}
struct grads { float *dq, *dk, *dv; };
static struct kern_attn_bwd bwd_of(const struct bench *b, const void *y, const float *lse,
                                   struct grads g, const struct kern_attn_noise *noise) {
    return (struct kern_attn_bwd){ kt_p(b->q), b->type, b->kv, LAYER, kt_p(b->slots), kt_p(y),
                                   b->type, kt_p(lse), kt_p(b->dy), kt_p(g.dq), kt_p(g.dk),
                                   kt_p(g.dv), seq_start, SEQS, b->heads,
                                   attn_of(b, NULL, NULL, NULL).scale, noise, { NULL } };
}

/* Scores and probabilities of types s and p, gradients too where the types are offered there; sums at
 * 4 places of SUMS. */
static struct kern_attn_noise noise_of(const struct bench *b, enum kern_noise_type s,
                                       enum kern_noise_type p, bool bf16, int64_t *sums) {
    struct kern_noise n[4];
    enum kern_noise_type type[4] = { s, p, p, s };
    for (int i = 2; i < 4; i++)
        if (type[i] >= KERN_NOISE_DEADZONE) type[i] = KERN_NOISE_RELATIVE_UNIFORM;
    for (uint32_t i = 0; i < 4; i++)
        n[i] = (struct kern_noise){ .type = type[i], .scale = 0.2f, .rate = 0.3f, .bf16 = bf16,
                                    .key = { 5, 6 }, .site = KERN_NOISE_SITE(LAYER, 11 + i),
                                    .id = kt_p(b->id), .pos = kt_p(b->pos),
                                    .sums = kt_p(sums + i * SUMS) };
    return (struct kern_attn_noise){ n[0], n[1], n[2], n[3] };
}
static void same_sums(const struct kern *k, const int64_t *got, const int64_t *want, const char *of,
                      int type) {
    for (int i = 0; i < 4 * SUMS; i++)
        cr_assert(got[i] == want[i], "%s with %d threads: %s, type %d, site %d, sum %d: %lld, ref "
                  "%lld", k->name, k->pool ? pool_threads(k->pool) : 1, of, type, i / SUMS,
                  i % SUMS, (long long)got[i], (long long)want[i]);
}

/* The rows of `order` (n of them) in one call, back in their places. */
static void attn_rows(struct kern *k, const struct bench *b, const struct kern_attn_noise *noise,
                      const int *order, int n, char *y) {
    const size_t row = kt_bytes(b->type, (size_t)(b->heads * b->kv.head_dim));
    struct bench c = *b;
    int32_t slots[ROWS], pos[ROWS];
    uint32_t id[ROWS * 2];
    char *q = malloc(row * (size_t)n), *out = malloc(row * (size_t)n);
    for (int i = 0; i < n; i++) {
        memcpy(q + (size_t)i * row, (const char *)b->q + (size_t)order[i] * row, row);
        slots[i] = b->slots[order[i]], pos[i] = b->pos[order[i]];
        id[2 * i] = b->id[2 * order[i]], id[2 * i + 1] = b->id[2 * order[i] + 1];
    }
    struct kern_attn_noise own = *noise;
    own.scores.id = own.probs.id = kt_p(id), own.scores.pos = own.probs.pos = kt_p(pos);
    c.q = q, c.slots = slots, c.pos = pos;
    struct kern_attn a = attn_of(&c, out, NULL, &own);
    a.rows = n;
    k->attn(k, &a);
    for (int i = 0; i < n; i++) memcpy(y + (size_t)order[i] * row, out + (size_t)i * row, row);
    free(q), free(out);
}

static void forward_case(struct kt *t, const struct bench *b, enum kern_noise_type s,
                         enum kern_noise_type p, bool bf16) {
    const size_t bytes = kt_bytes(b->type, b->q_size), lse_bytes = (size_t)(ROWS * b->heads) * 4;
    int64_t want_sums[4 * SUMS] = { 0 }, sums[4 * SUMS];
    struct kern_attn_noise noise = noise_of(b, s, p, bf16, want_sums);
    char *want = kt_new(t, bytes), *got = kt_new(t, bytes);
    float *lse = kt_new(t, lse_bytes), *l = kt_new(t, lse_bytes),
          *peaks = kt_new(t, 2 * lse_bytes), *top = kt_new(t, 2 * lse_bytes);
    struct kern_attn a = attn_of(b, want, lse, &noise);
    a.peaks = kt_p(peaks);
    t->ref.attn(&t->ref, &a);
    cr_assert(!s || want_sums[KERN_NOISE_ELEMENTS] == (1 + 34 * 35 / 2 + 77 * 78 / 2) * b->heads);
    cr_assert(!p || want_sums[SUMS] == (1 + 34 * 35 / 2 + 77 * 78 / 2) * b->heads);
    noise = noise_of(b, s, p, bf16, sums);
    int order[ROWS];
    for (int i = 0; i < ROWS; i++) order[i] = i * 51 % ROWS;
    EACH_ONCE(t, k) {
        memset(sums, 0, sizeof sums);
        a = attn_of(b, got, l, &noise);
        a.peaks = kt_p(top);
        k->attn(k, &a);
        KT_SAME(k, top, peaks, 2 * lse_bytes, "peaks %d %d, heads of %d", s, p, b->kv.head_dim);
        KT_SAME(k, got, want, bytes, "noisy attn %d %d, heads of %d", s, p, b->kv.head_dim);
        KT_SAME(k, l, lse, lse_bytes, "noisy lse %d %d, heads of %d", s, p, b->kv.head_dim);
        same_sums(k, sums, want_sums, "attn", (int)s);
        memset(sums, 0, sizeof sums);
        memset(got, 0, bytes);
        for (int r = 0, n; r < ROWS; r += n) {
            n = r % 3 * 11 + 1 < ROWS - r ? r % 3 * 11 + 1 : ROWS - r;
            attn_rows(k, b, &noise, order + r, n, got);
        }
        KT_SAME(k, got, want, bytes, "noisy attn in chunks %d %d", s, p);
        same_sums(k, sums, want_sums, "attn in chunks", (int)s);
    }
}

Test(attn_noise, same_bits_and_sums_in_any_batch) {
    struct kt t;
    kt_open(&t);
    for (size_t s = 0; s < COUNT_OF(shape); s++)
        for (enum kern_noise_type type = 1; type < KERN_NOISE_TYPE_COUNT; type++) {
            if (skipped(s, type)) continue;
            struct bench b = bench_make(&t, shape[s].heads, shape[s].kv_heads, shape[s].dim,
                                        (s + type) % 2 ? KERN_BF16 : KERN_F32);
            bool bf16 = (s + type) % 3 == 0;
            forward_case(&t, &b, type, type, bf16);
            if (s == 1) {                                    /* each alone */
                forward_case(&t, &b, type, KERN_NOISE_OFF, !bf16);
                forward_case(&t, &b, KERN_NOISE_OFF, type, !bf16);
            }
            kt_drop(&t);
        }
    kt_close(&t);
}

static void backward_case(struct kt *t, const struct bench *b, enum kern_noise_type s,
                          enum kern_noise_type p, bool bf16) {
    int64_t want_sums[4 * SUMS] = { 0 }, sums[4 * SUMS];
    struct kern_attn_noise noise = noise_of(b, s, p, bf16, want_sums);
    void *y = kt_new(t, kt_bytes(b->type, b->q_size));
    float *lse = kt_new(t, (size_t)(ROWS * b->heads) * 4),
          *peaks = kt_new(t, (size_t)(ROWS * b->heads) * 8);
    struct grads want = { kt_new(t, b->q_size * 4), kt_new(t, b->kv_size * 4),
                          kt_new(t, b->kv_size * 4) },
                 got = { kt_new(t, b->q_size * 4), kt_new(t, b->kv_size * 4),
                         kt_new(t, b->kv_size * 4) };
    struct kern_attn f = attn_of(b, y, lse, &noise);
    f.peaks = kt_p(peaks);
    t->ref.attn(&t->ref, &f);
    int64_t forward[2 * SUMS];
    memcpy(forward, want_sums, sizeof forward);
    memset(want_sums, 0, sizeof want_sums);
    struct kern_attn_bwd a = bwd_of(b, y, lse, want, &noise);
    if (!kern_noise_backward(&noise, false)) a.peaks = kt_p(peaks);
    t->ref.attn_bwd(&t->ref, &a);
    for (int i = 0; i < 2 * SUMS; i += SUMS)                 /* of relative probabilities the sizes differ */
        cr_assert(want_sums[i + KERN_NOISE_CHANGED] == forward[i + KERN_NOISE_CHANGED] ||
                  (i && !a.peaks.p), "types %d %d: the backward hit others than the forward", s, p);
    noise = noise_of(b, s, p, bf16, sums);
    const kptr kept = a.peaks;
    a = bwd_of(b, y, lse, got, &noise);
    a.peaks = kept;
    EACH_ONCE(t, k) {
        memset(sums, 0, sizeof sums);
        for (int from = 0; from < SEQS; from += a.seqs) {                /* 1 and 2 of them */
            a.seqs = from ? SEQS - 1 : 1, a.seq_start = seq_start + from;
            k->attn_bwd(k, &a);
        }
        KT_SAME(k, got.dq, want.dq, b->q_size * 4, "noisy dq %d %d, heads of %d", s, p,
                b->kv.head_dim);
        KT_SAME(k, got.dk, want.dk, b->kv_size * 4, "noisy dk %d %d, heads of %d", s, p,
                b->kv.head_dim);
        KT_SAME(k, got.dv, want.dv, b->kv_size * 4, "noisy dv %d %d, heads of %d", s, p,
                b->kv.head_dim);
        same_sums(k, sums, want_sums, "attn_bwd", (int)s);
    }
}

Test(attn_noise, backward_has_the_same_bits_and_sums) {
    struct kt t;
    kt_open(&t);
    for (size_t s = 0; s < COUNT_OF(shape); s++)
        for (enum kern_noise_type type = 1; type < KERN_NOISE_TYPE_COUNT; type++) {
            if (skipped(s, type)) continue;
            struct bench b = bench_make(&t, shape[s].heads, shape[s].kv_heads, shape[s].dim,
                                        (s + type) % 2 ? KERN_BF16 : KERN_F32);
            bool bf16 = (s + type) % 3 == 0;
            backward_case(&t, &b, type, type, bf16);
            if (s == 1) backward_case(&t, &b, KERN_NOISE_ABSOLUTE_GAUSSIAN, type, bf16);
            if (s == 1) backward_case(&t, &b, type, KERN_NOISE_OFF, !bf16);
            if (s == 1) backward_case(&t, &b, KERN_NOISE_OFF, type, !bf16);
            kt_drop(&t);
        }
    kt_close(&t);
}

/* Off everywhere is clean, to the bit. */
Test(attn_noise, nothing_asked_is_clean) {
    struct kt t;
    kt_open(&t);
    struct bench b = bench_make(&t, 6, 2, 32, KERN_BF16);
    const size_t bytes = kt_bytes(b.type, b.q_size);
    int64_t sums[4 * SUMS] = { 0 };
    struct kern_attn_noise noise = noise_of(&b, KERN_NOISE_OFF, KERN_NOISE_OFF, true, sums);
    char *want = kt_new(&t, bytes), *got = kt_new(&t, bytes);
    struct kern_attn a = attn_of(&b, want, NULL, NULL);
    t.ref.attn(&t.ref, &a);
    a = attn_of(&b, got, NULL, &noise);
    EACH_ONCE(&t, k) {
        k->attn(k, &a);
        KT_SAME(k, got, want, bytes, "attn with noise off");
    }
    for (int i = 0; i < 4 * SUMS; i++) cr_assert(sums[i] == 0);
    kt_close(&t);
}

/* A row that sees one key: its lse is its score. Noisy, it is what perturb makes of the clean one
 * under the same names. */
Test(attn_noise, a_noisy_score_is_what_perturb_gives) {
    struct kt t;
    kt_open(&t);
    for (enum kern_noise_type type = 1; type < KERN_NOISE_TYPE_COUNT; type++) {
        struct bench b = bench_make(&t, 1, 1, 64, KERN_BF16);
        float clean[ROWS], noisy[ROWS], want[1];
        void *y = kt_new(&t, kt_bytes(b.type, b.q_size));
        int64_t sums[4 * SUMS] = { 0 };
        struct kern_attn_noise noise = noise_of(&b, type, KERN_NOISE_OFF, false, sums);
        struct kern_attn a = attn_of(&b, y, clean, NULL);
        t.ref.attn(&t.ref, &a);
        a = attn_of(&b, y, noisy, &noise);
        t.ref.attn(&t.ref, &a);
        for (int s = 0; s < SEQS; s++) {
            int r = seq_start[s];
            struct kern_perturb p = { .noise = noise.scores, .x = kt_p(clean + r), .x_ld = 1,
                                      .y = kt_p(want), .y_ld = 1, .rows = 1, .dim = 1 };
            p.noise.id = kt_p(b.id + 2 * r), p.noise.pos = kt_p(b.pos + r);
            t.ref.perturb(&t.ref, &p);
            cr_assert(noisy[r] == want[0], "type %d: %a, perturb %a", type, (double)noisy[r],
                      (double)want[0]);
        }
        kt_drop(&t);
    }
    kt_close(&t);
}

/* E4M3 as the earlier system made it. */
static double e4m3(double t) {
    const double size = fmin(fmax(fabs(t), 0x1p-6), 448.0), e = fmin(floor(log2(size)), 7.0);
    const double eighths = fmin(nearbyint((size / exp2(e) - 1.0) * 8.0), 7.0);
    return t == 0.0 ? t : copysign(exp2(e) * (1.0 + eighths / 8.0), t);
}
/* e of one element in double, by a text of its own. most: the row's largest |t|. */
static double term(const struct kern_noise *n, double t, double most, uint32_t prompt,
                   uint32_t sample, uint32_t head, uint32_t pos, uint32_t i) {
    const bool fixed = n->type == KERN_NOISE_SYSTEMATIC;
    const uint32_t c[4] = { fixed ? 0xffffffffu : prompt, (fixed ? 0xffffu : sample) + head * 65536u,
                            fixed ? 0xffffffffu : pos, n->site + i / 4 };
    const struct rng4 w = rng_philox(c, n->key);
    const uint32_t x = w.v[i % 4];
    const double sign = x % 2 ? -1.0 : 1.0, scale = (double)n->scale,
                 u = ((w.v[i % 4 / 2 * 2] >> 8) + 0.5) / 16777216.0,
                 v = ((w.v[i % 4 / 2 * 2 + 1] >> 8) + 0.5) / 16777216.0 * 2.0 * M_PI,
                 z = sqrt(-2.0 * log(u)) * (i % 2 ? sin(v) : cos(v));
    switch (n->type) {
    case KERN_NOISE_RELATIVE_GAUSSIAN: return scale * z * fabs(t);
    case KERN_NOISE_RELATIVE_UNIFORM:
        return scale * fabs(t) * sqrt(3.0) * (((x >> 8) + 0.5) / 8388608.0 - 1.0);
    case KERN_NOISE_SYSTEMATIC: return scale * sign * t;
    case KERN_NOISE_SPARSE:
        return (x >> 8) / 16777216.0 < (double)n->rate ? scale * sign * fabs(t) : 0.0;
    case KERN_NOISE_DEADZONE: return fabs(t) < scale * most ? -t : 0.0;
    case KERN_NOISE_ABSOLUTE_GAUSSIAN: return scale * z;
    case KERN_NOISE_BIAS: return t > 0.0 ? scale : t < 0.0 ? -scale : 0.0;
    case KERN_NOISE_FP8: return e4m3(t) - t;
    default: return 0.0;
    }
}
static double kv_at(const struct bench *b, int r, int j, int h, int is_v, int i) {
    return (double)kt_get(b->kv.pages.p, b->kv.type,
                          cpu_kv_at(&b->kv, LAYER, b->slots[r], j, h, is_v, i));
}

/* One query in double: noisy scores, then noisy probabilities, normalised; y; returns lse. */
static double noisy_double(const struct bench *b, const struct kern_attn_noise *n, int r, int h,
                           double *p, double *y) {
    const int dim = b->kv.head_dim, kvh = h * b->kv.kv_heads / b->heads, keys = b->pos[r] + 1;
    const uint32_t *id = b->id + 2 * r, head = (uint32_t)h, pos = (uint32_t)b->pos[r];
    double most = 0.0, top = -1e300, sum = 0.0;
    for (int j = 0; j < keys; j++) {
        p[j] = 0.0;
        for (int i = 0; i < dim; i++)
            p[j] += (double)kt_get(b->q, b->type, (size_t)((r * b->heads + h) * dim + i)) *
                    kv_at(b, r, j, kvh, 0, i) / sqrt(dim);
        if (fabs(p[j]) > most) most = fabs(p[j]);
    }
    for (int j = 0; j < keys; j++) {
        p[j] += term(&n->scores, p[j], most, id[0], id[1], head, pos, (uint32_t)j);
        if (p[j] > top) top = p[j];
    }
    for (int j = 0; j < keys; j++) {
        p[j] = exp(p[j] - top);
        p[j] += term(&n->probs, p[j], 1.0, id[0], id[1], head, pos, (uint32_t)j);
        if (p[j] < 0.0) p[j] = 0.0;
        sum += p[j];
    }
    for (int i = 0; i < dim; i++) y[i] = 0.0;
    for (int j = 0; j < keys; j++) {
        p[j] /= sum;
        for (int i = 0; i < dim; i++) y[i] += p[j] * kv_at(b, r, j, kvh, 1, i);
    }
    return top + log(sum);
}

/* A score at the edge of the dead zone may fall on either side: the seed has none. */
Test(attn_noise, forward_near_double) {
    struct kt t;
    kt_open(&t);
    for (enum kern_noise_type type = 1; type < KERN_NOISE_TYPE_COUNT; type++) {
        struct bench b = bench_make(&t, 5, 2, 10, KERN_F32);
        int64_t sums[4 * SUMS] = { 0 };
        struct kern_attn_noise noise = noise_of(&b, type, type, false, sums);
        float *y = kt_new(&t, b.q_size * 4), *lse = kt_new(&t, (size_t)(ROWS * b.heads) * 4);
        struct kern_attn a = attn_of(&b, y, lse, &noise);
        t.ref.attn(&t.ref, &a);
        for (int r = 0; r < ROWS; r += 3)
            for (int h = 0; h < b.heads; h++) {
                double p[ROWS], want[10], l = noisy_double(&b, &noise, r, h, p, want);
                KT_NEAR((double)lse[r * b.heads + h], l, 4e-6, "type %d, lse %d %d", type, r, h);
                for (int i = 0; i < 10; i++)
                    KT_NEAR((double)y[(r * b.heads + h) * 10 + i], want[i], 1e-5,
                            "type %d, y %d %d", type, r, h);
            }
        kt_drop(&t);
    }
    kt_close(&t);
}

/* The gradients of one row's query and its shares of dk and dv, the noise held. */
static void backward_double(const struct bench *b, const struct kern_attn_noise *n, int r,
                            double *dq, double *dk, double *dv) {
    const int dim = b->kv.head_dim;
    for (int h = 0; h < b->heads; h++) {
        const int kvh = h * b->kv.kv_heads / b->heads, first = r - b->pos[r];
        const uint32_t *id = b->id + 2 * r, head = (uint32_t)h, pos = (uint32_t)b->pos[r];
        double p[ROWS], y[128], delta = 0.0;
        noisy_double(b, n, r, h, p, y);
        const float *dy = b->dy + (r * b->heads + h) * dim;
        for (int i = 0; i < dim; i++) delta += (double)dy[i] * y[i];
        for (int j = 0; j <= b->pos[r]; j++) {
            const size_t to = (size_t)(((first + j) * b->kv.kv_heads + kvh) * dim);
            double dp = 0.0;
            for (int i = 0; i < dim; i++) dp += (double)dy[i] * kv_at(b, r, j, kvh, 1, i);
            dp += term(&n->dprobs, dp, 0.0, id[0], id[1], head, pos, (uint32_t)j);
            double ds = p[j] * (dp - delta) / sqrt(dim);
            ds += term(&n->dscores, ds, 0.0, id[0], id[1], head, pos, (uint32_t)j);
            for (int i = 0; i < dim; i++) {
                dq[(r * b->heads + h) * dim + i] += ds * kv_at(b, r, j, kvh, 0, i);
                dk[to + (size_t)i] +=
                    ds * (double)kt_get(b->q, b->type, (size_t)((r * b->heads + h) * dim + i));
                dv[to + (size_t)i] += p[j] * (double)dy[i];
            }
        }
    }
}
Test(attn_noise, backward_near_double) {
    struct kt t;
    kt_open(&t);
    for (enum kern_noise_type type = 1; type < KERN_NOISE_TYPE_COUNT; type++) {
        struct bench b = bench_make(&t, 5, 2, 10, KERN_F32);
        int64_t sums[4 * SUMS] = { 0 };
        struct kern_attn_noise noise = noise_of(&b, type, type, false, sums);
        float *y = kt_new(&t, b.q_size * 4), *lse = kt_new(&t, (size_t)(ROWS * b.heads) * 4),
              *peaks = kt_new(&t, (size_t)(ROWS * b.heads) * 8);
        struct kern_attn f = attn_of(&b, y, lse, &noise);
        f.peaks = kt_p(peaks);
        t.ref.attn(&t.ref, &f);
        struct grads g = { kt_new(&t, b.q_size * 4), kt_new(&t, b.kv_size * 4),
                           kt_new(&t, b.kv_size * 4) };
        struct kern_attn_bwd a = bwd_of(&b, y, lse, g, &noise);
        a.peaks = kt_p(peaks);
        double *dq = kt_new(&t, b.q_size * 8), *dk = kt_new(&t, b.kv_size * 8),
               *dv = kt_new(&t, b.kv_size * 8);
        for (size_t i = 0; i < b.q_size; i++) dq[i] = 0.0;
        for (size_t i = 0; i < b.kv_size; i++) dk[i] = dv[i] = 0.0;
        t.ref.attn_bwd(&t.ref, &a);
        for (int r = 0; r < ROWS; r++) backward_double(&b, &noise, r, dq, dk, dv);
        for (size_t i = 0; i < b.q_size; i++)
            KT_NEAR((double)g.dq[i], dq[i], 2e-5, "type %d, dq[%zu]", type, i);
        for (size_t i = 0; i < b.kv_size; i++) {
            KT_NEAR((double)g.dk[i], dk[i], 2e-5, "type %d, dk[%zu]", type, i);
            KT_NEAR((double)g.dv[i], dv[i], 2e-5, "type %d, dv[%zu]", type, i);
        }
        kt_drop(&t);
    }
    kt_close(&t);
}
