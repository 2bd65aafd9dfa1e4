/* attn.c - the reference for attention over paged keys and values, forward and backward.
 *
 * Knows: the page layout through cpu_kv_at and the order of every sum; one query vector at a time,
 * in the backward one page of keys at a time; where noise acts.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cpu.h"

void ref_kv_put(struct kern *k, const struct kern_kv_put *a) {
    (void)k;
    const struct kern_kv *kv = &a->kv;
    const int32_t *slots = a->slots.p, *pos = a->pos.p;
    for (int r = 0; r < a->rows; r++)
        for (int h = 0; h < kv->kv_heads; h++) {
            size_t from = ((size_t)r * (size_t)kv->kv_heads + (size_t)h) * (size_t)kv->head_dim;
            for (int i = 0; i < kv->head_dim; i++) {
                cpu_put(kv->pages, kv->type, cpu_kv_at(kv, a->layer, slots[r], pos[r], h, 0, i),
                        cpu_get(a->k, a->k_type, from + (size_t)i));
                cpu_put(kv->pages, kv->type, cpu_kv_at(kv, a->layer, slots[r], pos[r], h, 1, i),
                        ((const float *)a->v.p)[from + (size_t)i]);
            }
        }
}

static void row_get(float *to, kptr from, enum kern_type t, size_t at, int n) {
    for (int i = 0; i < n; i++) to[i] = cpu_get(from, t, at + (size_t)i);
}
/* n positions from `pos`, a page's at most, as rows of head_dim floats; zero beyond n. */
static void page_get(float *to, const struct kern_kv *kv, int layer, int slot, int pos, int h,
                     int is_v, int n) {
    int dim = kv->head_dim;
    memset(to + n * dim, 0, (size_t)((KERN_PAGE - n) * dim) * sizeof *to);
    for (int j = 0; j < n; j++)
        for (int i = 0; i < dim; i++)
            to[j * dim + i] = cpu_get(kv->pages, kv->type,
                                      cpu_kv_at(kv, layer, slot, pos + j, h, is_v, i));
}

/* Noise on a page's n values from key `at` of one row and head; l NULL: not counted. */
static void page_noise(const struct kern_noise *on, int row, int head, float edge, float *t,
                       int at, int n, struct kern_noise_lanes *l) {
    uint32_t counter[4];
    if (on->type == KERN_NOISE_OFF) return;
    kern_noise_counter(counter, on, row, (uint32_t)head);
    ref_noise_add(on, counter, edge, t, at, n, on->sums.p ? l : NULL);
}
static void above_zero(float *p, int n) {
    for (int j = 0; j < n; j++) p[j] = (0.0f > p[j] ? 0.0f : p[j]) + 0.0f;   /* no -0; NaN stays */
}

/* One query vector; q and o are buffers of head_dim floats, page of 32 * head_dim. */
struct one {
    const struct kern_attn *a;
    int row, head, kvh, slot, keys;
    float *q, *o, *page;
    float edge;                                              /* of type deadzone on scores */
    struct kern_noise_lanes scores, probs;
};

/* Scores of n keys from `at`, noise included. */
static void one_scores(struct one *b, float *p, int at, int n, bool noisy, bool count) {
    const struct kern_attn *a = b->a;
    int dim = a->kv.head_dim;
    page_get(b->page, &a->kv, a->layer, b->slot, at, b->kvh, 0, n);
    for (int j = 0; j < n; j++)
        p[j] = kern_dot_tile(0.0f, b->q, 1, b->page + j * dim, 1, (size_t)dim) * a->scale;
    if (noisy)
        page_noise(&a->noise->scores, b->row, b->head, b->edge, p, at, n,
                   count ? &b->scores : NULL);
}
/* Before the pages: the row's largest |score|, then its largest score, where a type needs it. */
static float one_peaks(struct one *b) {
    const struct kern_attn_noise *noise = b->a->noise;
    float p[KERN_PAGE], most = -INFINITY, size = 0.0f;
    for (int at = 0; at < b->keys && noise->scores.type == KERN_NOISE_DEADZONE; at += KERN_PAGE) {
        int n = b->keys - at < KERN_PAGE ? b->keys - at : KERN_PAGE;
        one_scores(b, p, at, n, false, false);
        for (int j = 0; j < n; j++) size = fabsf(p[j]) > size ? fabsf(p[j]) : size;
    }
    b->edge = kern_noise_edge(&noise->scores, size);
    for (int at = 0; at < b->keys && !kern_noise_relative(&noise->probs); at += KERN_PAGE) {
        int n = b->keys - at < KERN_PAGE ? b->keys - at : KERN_PAGE;
        one_scores(b, p, at, n, true, false);
        for (int j = 0; j < n; j++) most = p[j] > most ? p[j] : most;
    }
    return most;
}

static void attn_one(struct one *b) {
    const struct kern_attn *a = b->a;
    const struct kern_kv *kv = &a->kv;
    const int dim = kv->head_dim;
    size_t ld = (size_t)dim, query = (size_t)b->row * (size_t)a->heads + (size_t)b->head;
    float *o = b->o, l = 0.0f;
    row_get(b->q, a->q, a->q_type, query * ld, dim);
    float m = a->noise ? one_peaks(b) : -INFINITY;
    for (int i = 0; i < dim; i++) o[i] = 0.0f;
    for (int t = 0; t < b->keys; t += KERN_PAGE) {
        int n = b->keys - t < KERN_PAGE ? b->keys - t : KERN_PAGE;
        float p[KERN_PAGE], most = m, lane[16] = { 0 };
        one_scores(b, p, t, n, a->noise != NULL, true);
        for (int j = 0; j < n; j++) most = p[j] > most ? p[j] : most;
        float fix = kern_expf(m - most);
        for (int j = 0; j < n; j++) p[j] = kern_expf(p[j] - most);
        if (a->noise) {                                      /* p of the row's maximum is 1 */
            page_noise(&a->noise->probs, b->row, b->head, kern_noise_edge(&a->noise->probs, 1.0f),
                       p, t, n, &b->probs);
            above_zero(p, n);
        }
        for (int j = 0; j < n; j++) {
            lane[j & 15] += p[j];
            p[j] = cpu_round(p[j], kv->type == KERN_BF16);
        }
        l = fmaf(l, fix, kern_fold16(lane));
        m = most;
        page_get(b->page, kv, a->layer, b->slot, t, b->kvh, 1, n);
        for (int i = 0; i < dim; i++) {
            o[i] *= fix;
            /* no -0 here: what unseen values add, 0 or -0, then changes nothing */
            if (fabsf(o[i]) < 0x1p-126f) o[i] = 0.0f;
            o[i] = kern_dot_tile(o[i], p, 1, b->page + i, ld, (size_t)n);
        }
    }
    float inv = 1.0f / l;
    for (int i = 0; i < dim; i++) cpu_put(a->y, a->y_type, query * ld + (size_t)i, o[i] * inv);
    if (a->lse.p) ((float *)a->lse.p)[query] = m + kern_logf(l);
    if (!a->noise || !a->peaks.p) return;
    ((float *)a->peaks.p)[2 * query] = b->edge;
    ((float *)a->peaks.p)[2 * query + 1] = m;
}

void ref_attn(struct kern *k, const struct kern_attn *a) {
    (void)k;
    int dim = a->kv.head_dim;
    float *buf = cpu_scratch((size_t)dim * (2 + KERN_PAGE) * sizeof *buf);
    struct one b = { .a = a, .q = buf, .o = buf + dim, .page = buf + 2 * dim };
    for (b.row = 0; b.row < a->rows; b.row++)
        for (b.head = 0; b.head < a->heads; b.head++) {
            b.kvh = (int)((int64_t)b.head * a->kv.kv_heads / a->heads);
            b.slot = ((const int32_t *)a->slots.p)[b.row];
            b.keys = ((const int32_t *)a->pos.p)[b.row] + 1;
            attn_one(&b);
        }
    if (!a->noise) return;
    cpu_noise_take(&a->noise->scores, b.scores.sum);
    cpu_noise_take(&a->noise->probs, b.probs.sum);
}

/* The queries of one sequence and kv head: heads [head, head + group) of rows [first, first + len).
 */
struct bwd {
    const struct kern_attn_bwd *a;
    int kvh, head, group, first, len;
    bool round;
    float *q, *dy, *dq;                                      /* [len * group][dim] */
    float *key, *val;                                        /* [32][dim] */
    float *p, *ds;                                           /* [len * group][32] */
    float *delta;                                            /* [len * group] */
    struct kern_noise_lanes scores, probs, dprobs, dscores;
};
static size_t query_at(const struct bwd *b, int i) {
    return (size_t)(b->first + i / b->group) * (size_t)b->a->heads +
           (size_t)(b->head + i % b->group);
}

static void queries_get(struct bwd *b) {
    const struct kern_attn_bwd *a = b->a;
    int dim = a->kv.head_dim;
    for (int i = 0; i < b->len * b->group; i++) {
        size_t at = query_at(b, i) * (size_t)dim, to = (size_t)i * (size_t)dim;
        row_get(b->q + to, a->q, a->q_type, at, dim);
        row_get(b->dq + to, a->y, a->y_type, at, dim);       /* y, until dq begins */
        row_get(b->dy + to, a->dy, KERN_F32, at, dim);
        b->delta[i] = kern_dotf(b->dy + to, b->dq + to, dim);
        for (int c = 0; c < dim; c++) {
            b->dq[to + (size_t)c] = 0.0f;
            b->dy[to + (size_t)c] = cpu_round(b->dy[to + (size_t)c], b->round);
        }
    }
}

/* p and ds of query i against the page from key `at`, and dq's share. */
static void query_page(struct bwd *b, int i, int at) {
    const struct kern_attn_bwd *a = b->a;
    const struct kern_attn_noise *noise = a->noise;
    const int row = b->first + i / b->group, head = b->head + i % b->group,
              seen = i / b->group - at + 1, n = seen < 0 ? 0 : seen < KERN_PAGE ? seen : KERN_PAGE;
    const float lse = ((const float *)a->lse.p)[query_at(b, i)];
    const bool peaks = noise && a->peaks.p;
    const float edge = peaks ? ((const float *)a->peaks.p)[2 * query_at(b, i)] : 0.0f;
    const bool own = peaks && !kern_noise_relative(&noise->probs);
    const float from = own ? ((const float *)a->peaks.p)[2 * query_at(b, i) + 1] : lse;
    size_t dim = (size_t)a->kv.head_dim;
    const float *q = b->q + (size_t)i * dim, *dy = b->dy + (size_t)i * dim;
    float *p = b->p + i * KERN_PAGE, *ds = b->ds + i * KERN_PAGE, *dq = b->dq + (size_t)i * dim;
    for (int j = n; j < KERN_PAGE; j++) p[j] = ds[j] = 0.0f;
    for (int j = 0; j < n; j++) {
        p[j] = kern_dot_tile(0.0f, q, 1, b->key + (size_t)j * dim, 1, dim) * a->scale;
        ds[j] = kern_dot_tile(0.0f, dy, 1, b->val + (size_t)j * dim, 1, dim);
    }
    if (n && noise) page_noise(&noise->scores, row, head, edge, p, at, n, &b->scores);
    for (int j = 0; j < n; j++) p[j] = kern_expf(p[j] - from);
    if (n && noise) {
        page_noise(&noise->probs, row, head, kern_noise_edge(&noise->probs, 1.0f), p, at, n,
                   &b->probs);
        above_zero(p, n);
        for (int j = 0; j < n && own; j++) p[j] *= kern_expf(from - lse);
        page_noise(&noise->dprobs, row, head, 0.0f, ds, at, n, &b->dprobs);
    }
    for (int j = 0; j < n; j++) ds[j] = p[j] * (ds[j] - b->delta[i]) * a->scale;
    if (n && noise) page_noise(&noise->dscores, row, head, 0.0f, ds, at, n, &b->dscores);
    for (int j = 0; j < n; j++) {
        ds[j] = cpu_round(ds[j], b->round);
        p[j] = cpu_round(p[j], b->round);
    }
    for (size_t c = 0; c < dim && n; c++)
        dq[c] = kern_dot_tile(dq[c], ds, 1, b->key + c, dim, KERN_PAGE);
}

static void bwd_one(struct bwd *b) {
    const struct kern_attn_bwd *a = b->a;
    size_t dim = (size_t)a->kv.head_dim;
    int queries = b->len * b->group, slot = ((const int32_t *)a->slots.p)[b->first];
    queries_get(b);
    for (int at = 0; at < b->len; at += KERN_PAGE) {
        int n = b->len - at < KERN_PAGE ? b->len - at : KERN_PAGE;
        page_get(b->key, &a->kv, a->layer, slot, at, b->kvh, 0, n);
        page_get(b->val, &a->kv, a->layer, slot, at, b->kvh, 1, n);
        for (int i = 0; i < queries; i++) query_page(b, i, at);
        for (int j = 0; j < n; j++) {
            size_t to = ((size_t)(b->first + at + j) * (size_t)a->kv.kv_heads + (size_t)b->kvh) *
                        dim;
            for (size_t c = 0; c < dim; c++) {
                ((float *)a->dk.p)[to + c] = kern_dot_tile(0.0f, b->ds + j, KERN_PAGE, b->q + c,
                                                           dim, (size_t)queries);
                ((float *)a->dv.p)[to + c] = kern_dot_tile(0.0f, b->p + j, KERN_PAGE, b->dy + c,
                                                           dim, (size_t)queries);
            }
        }
    }
    for (int i = 0; i < queries; i++)
        memcpy((float *)a->dq.p + query_at(b, i) * dim, b->dq + (size_t)i * dim,
               dim * sizeof(float));
}

void ref_attn_bwd(struct kern *k, const struct kern_attn_bwd *a) {
    (void)k;
    assert(!a->noise || kern_noise_backward(a->noise, a->peaks.p));
    size_t dim = (size_t)a->kv.head_dim, page = KERN_PAGE * dim;
    int kv_heads = a->kv.kv_heads;
    for (int s = 0; s < a->seqs; s++)
        for (int h = 0; h < kv_heads; h++) {
            /* the heads that kern_attn gives to kv head h: from ceil(h * heads / kv_heads) on */
            int head = (int)(((int64_t)h * a->heads + kv_heads - 1) / kv_heads),
                end = (int)(((int64_t)(h + 1) * a->heads + kv_heads - 1) / kv_heads);
            struct bwd b = { .a = a,
                             .kvh = h,
                             .head = head,
                             .group = end - head,
                             .first = a->seq_start[s],
                             .len = a->seq_start[s + 1] - a->seq_start[s],
                             .round = a->kv.type == KERN_BF16 };
            if (b.len <= 0) continue;
            size_t queries = (size_t)(b.len * b.group), vecs = queries * dim;
            b.q = cpu_scratch((3 * vecs + 2 * page + queries * (2 * KERN_PAGE + 1)) *
                              sizeof(float));
            b.dy = b.q + vecs, b.dq = b.dy + vecs, b.key = b.dq + vecs, b.val = b.key + page;
            b.p = b.val + page, b.ds = b.p + queries * KERN_PAGE;
            b.delta = b.ds + queries * KERN_PAGE;
            bwd_one(&b);
            if (!a->noise) continue;
            cpu_noise_take(&a->noise->scores, b.scores.sum);
            cpu_noise_take(&a->noise->probs, b.probs.sum);
            cpu_noise_take(&a->noise->dprobs, b.dprobs.sum);
            cpu_noise_take(&a->noise->dscores, b.dscores.sum);
        }
}
