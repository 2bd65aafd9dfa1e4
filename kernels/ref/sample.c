/* sample.c - one draw from one row of logits; the same code for every CPU path, which lends its max
 * and its sum.
 *
 * Knows: temperature, top-k, top-p, and how a CDF is inverted so that the same u gives the same
 * token everywhere. Weights are e[i] = exp(z[i] - zmax), f32; masses of kept tokens are summed in
 * double. Order: greedy, statistics, cuts, inversion, log-probs. Logits that are not finite give
 * the largest one and a NaN lp.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cpu.h"

struct row {
    const float *logits;
    int vocab;
    float inv_temp, zmost;
};
static float weight(const struct row *r, int i) {
    return kern_expf(r->logits[i] * r->inv_temp - r->zmost);
}

static int first_of(const float *logits, int vocab, float value) {
    for (int i = 0; i < vocab; i++)
        if (logits[i] == value) return i;
    return 0;
}

/* The whole row: the block that holds u by the blocks' sums, then the token within it. */
static int draw_whole(const struct row *r, const float *blocks, int count, float u) {
    double mass = 0.0, seen = 0.0;
    for (int b = 0; b < count; b++) mass += (double)blocks[b];
    double want = (double)u * mass;
    int at = 0, last = 0;
    for (; at < count; at++) {
        if (blocks[at] > 0.0f) last = at;
        if (seen + (double)blocks[at] > want) break;
        seen += (double)blocks[at];
    }
    /* u * mass rounded up to the mass */
    if (at == count) {
        at = last;
        seen -= (double)blocks[last];
    }
    int end = r->vocab - at * CPU_BLOCK < CPU_BLOCK ? r->vocab : (at + 1) * CPU_BLOCK,
        token = at * CPU_BLOCK;
    for (int i = at * CPU_BLOCK; i < end; i++) {
        float e = weight(r, i);
        if (!(e > 0.0f)) continue;
        token = i; /* the last one with p > 0 if rounding passes the end */
        seen += (double)e;
        if (seen > want) break;
    }
    return token;
}

/* Candidates as sortable numbers: largest logit first, lower id first among equals. */
static uint64_t rank_key(float v, int id) {
    uint32_t u = kern_bits(v + 0.0f);                             /* -0 is 0 */
    u = u & 0x80000000u ? ~u : u | 0x80000000u;
    return (uint64_t)~u << 32 | (uint32_t)id;
}
static int key_cmp(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}
static int id_cmp(const void *a, const void *b) {
    uint32_t x = (uint32_t)*(const uint64_t *)a, y = (uint32_t)*(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

/* Moves the `count` least keys to the front, in no order (quickselect; keys are distinct). */
static void front_least(uint64_t *key, int n, int count) {
    int lo = 0, hi = n - 1;
    while (lo < hi) {
        uint64_t a = key[lo], b = key[lo + (hi - lo) / 2], c = key[hi];
        uint64_t pivot = a < b ? (b < c ? b : a < c ? c : a) : (a < c ? a : b < c ? c : b);
        int i = lo, j = hi;
        while (i <= j) {
            while (key[i] < pivot) i++;
            while (key[j] > pivot) j--;
            if (i > j) break;
            uint64_t t = key[i];
            key[i++] = key[j];
            key[j--] = t;
        }
        if (count <= j + 1) hi = j;
        else if (count > i) lo = i;
        else return;
        if (count == lo) return;
    }
}

/* How many of the n candidates in `key` (the n first of the whole row by rank; all = that is the
 * row) survive top-k and top-p, moved to the front by rank; -1 when the answer needs more
 * candidates. mass: of the whole row, read when top-k is off. */
static int keep(const struct row *r, const struct kern_sampler *s, uint64_t *key, int n, bool all,
                double mass) {
    int top_k = s->top_k > 0 && s->top_k < r->vocab ? s->top_k : 0, sorted = 0;
    if (top_k > n) return -1;
    if (top_k) {
        front_least(key, n, top_k);
        sorted = n = top_k;
        all = true;
        qsort(key, (size_t)n, sizeof *key, key_cmp);
        mass = 0.0;
        for (int i = 0; i < n; i++) mass += (double)weight(r, (int)(uint32_t)key[i]);
    }
    if (!(s->top_p < 1.0f)) return n;
    double want = (double)s->top_p * mass, seen = 0.0;
    for (int i = 0, more = 64; i < n; i++) {
        /* sort only as far as the mass asks for */
        if (i == sorted) {
            int take = n - i < more ? n - i : more;
            front_least(key + i, n - i, take);
            qsort(key + i, (size_t)take, sizeof *key, key_cmp);
            sorted = i + take;
            more *= 8;
        }
        seen += (double)weight(r, (int)(uint32_t)key[i]);
        if (seen >= want) return i + 1;
    }
    return all ? n : -1;
}

static int draw_cut(const struct row *r, const struct kern_sampler *s, double mass, float *lp) {
    /* candidates: so far below the largest z */
    static const float depth[] = { 6.0f, 14.0f, INFINITY };
    uint64_t *key = cpu_scratch((size_t)r->vocab * sizeof *key);
    int n = -1;
    for (int turn = 0; n < 0; turn++) {
        float least = r->zmost - depth[turn];
        int count = 0;
        for (int i = 0; i < r->vocab; i++)
            if (r->logits[i] * r->inv_temp >= least) key[count++] = rank_key(r->logits[i], i);
        n = keep(r, s, key, count, count == r->vocab, mass);
    }
    qsort(key, (size_t)n, sizeof *key, id_cmp);
    double kept = 0.0, seen = 0.0;
    for (int i = 0; i < n; i++) kept += (double)weight(r, (int)(uint32_t)key[i]);
    int token = (int)(uint32_t)key[0];
    for (int i = 0; i < n; i++) {
        int id = (int)(uint32_t)key[i];
        float e = weight(r, id);
        if (!(e > 0.0f)) continue;
        token = id;
        seen += (double)e;
        if (seen > (double)s->u * kept) break;
    }
    *lp = r->logits[token] * r->inv_temp - r->zmost - kern_logf((float)kept);
    return token;
}

void cpu_sample_row(const struct kern_sample *a, int row, cpu_row_most *most_of,
                    cpu_row_sum *sum_of) {
    const float *logits = (const float *)a->logits.p + (size_t)row * (size_t)a->vocab;
    const struct kern_sampler *s = (const struct kern_sampler *)a->sampler.p + row;
    float blocks[CPU_VOCAB_MAX / CPU_BLOCK], most = most_of(logits, a->vocab);
    int count = (a->vocab + CPU_BLOCK - 1) / CPU_BLOCK, token;
    assert(a->vocab > 0 && a->vocab <= CPU_VOCAB_MAX);
    bool greedy = !(s->temperature > 0.0f), cut = kern_sampler_cuts(s, a->vocab);
    assert(a->cuts || !cut);
    struct row r = { logits, a->vocab, greedy ? 1.0f : 1.0f / s->temperature, 0.0f };
    r.zmost = most * r.inv_temp;
    float sum = sum_of(logits, a->vocab, r.inv_temp, most, blocks, NULL),
          lse = r.zmost + kern_logf(sum);
    bool sound = lse - lse == 0.0f;                                       /* finite */
    float lp_cut = 0.0f;
    if (greedy || !sound) {
        token = first_of(logits, a->vocab, most);
    } else if (cut) {
        double mass = 0.0;
        for (int b = 0; b < count; b++) mass += (double)blocks[b];
        token = draw_cut(&r, s, mass, &lp_cut);
    } else {
        token = draw_whole(&r, blocks, count, s->u);
    }
    float lp = logits[token] * r.inv_temp - lse, lp_raw = lp;
    if (r.inv_temp != 1.0f)
        lp_raw = logits[token] -
                 (most + kern_logf(sum_of(logits, a->vocab, 1.0f, most, NULL, NULL)));
    ((float *)a->lp_raw.p)[row] = lp_raw;
    ((float *)a->lp.p)[row] = cut && sound ? lp_cut : lp;
    ((int32_t *)a->token.p)[row] = token;
}
