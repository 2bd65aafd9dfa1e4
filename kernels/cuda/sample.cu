/* sample.cu - one draw from each row of logits, on the device, where ids and log-probs stay.
 *
 * kernels/ref/sample.c is the text. The first kernel draws from whole rows and the greedy ones, a
 * block a row. The second cuts: candidates near the largest logit are sorted by rank in scratch,
 * what survives by id. Sums in double are one thread's, in the order of the text; the weights that
 * they add are made by all. Keys are distinct, so the order in which candidates are found is lost.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cuda/softmax.cuh"

/* CUTS: blocks that cut rows, each with scratch for a whole row's keys. CUT_BLOCKS: for as many a
 * kernel may take registers; asked for none, ptxas spills some */
enum { VOCAB_MAX = 1 << 20, CUTS = 32, CUT_BLOCKS = 4 };
typedef unsigned long long rank_t;

/* What the first kernel leaves for the second. */
struct drawn { double mass; float most, raw_lse; bool cut; };
struct draw_args {
    const float *logits;
    const struct kern_sampler *sampler;
    int rows, vocab;
    int32_t *token;
    float *lp, *lp_raw;
    struct drawn *drawn;
    rank_t *keys;                                     /* [CUTS][vocab], NULL: no row is cut */
};

struct row { const float *logits; int vocab; float inv_temp, zmost; };
__device__ static inline float row_weight(const struct row *r, int i) {
    return kern_expf(r->logits[i] * r->inv_temp - r->zmost);
}
__device__ static inline bool is_greedy(const struct kern_sampler *s) {
    return !(s->temperature > 0.0f);
}
__device__ static struct row row_of(const struct draw_args *a, int row, float most) {
    const struct kern_sampler *s = &a->sampler[row];
    struct row r = { a->logits + (size_t)row * (size_t)a->vocab, a->vocab,
                     is_greedy(s) ? 1.0f : 1.0f / s->temperature, 0.0f };
    r.zmost = most * r.inv_temp;
    return r;
}

/* ---- a walk: weights added in order by one thread ---- */

/* key: ids in their low 32 bits, or NULL for ids from `first` */
struct walk_in { const rank_t *key; int first, n; };
/* Where a walk stands; shared. at: the element that reached `want`, or n; last: the last element
 * with a weight above 0, or 0. */
struct walk { double seen, want; bool beyond, done; int at, last; };

__device__ static inline int walk_id(const struct walk_in *in, int i) {
    return in->key ? (int)(uint32_t)in->key[i] : in->first + i;
}
/* From w->seen until it is w->want or more; `beyond`: more. Every thread of the block calls; e: a
 * float for each. */
__device__ static void walk_on(const struct row *r, struct walk_in in, struct walk *w, float *e) {
    for (int from = 0; from < in.n; from += ROW_THREADS) {
        const int n = in.n - from < ROW_THREADS ? in.n - from : ROW_THREADS;
        if ((int)threadIdx.x < n)
            e[threadIdx.x] = row_weight(r, walk_id(&in, from + (int)threadIdx.x));
        __syncthreads();
        for (int i = 0; i < n && threadIdx.x == 0 && !w->done; i++) {
            w->seen += (double)e[i];
            if (e[i] > 0.0f) w->last = from + i;
            w->done = w->beyond ? w->seen > w->want : w->seen >= w->want;
            if (w->done) w->at = from + i;
        }
        __syncthreads();
        if (w->done) return;
    }
}
/* A new walk, begun at `seen`. */
__device__ static void walk_from(const struct row *r, struct walk_in in, double seen, double want,
                                 bool beyond, struct walk *w, float *e) {
    __syncthreads();
    if (threadIdx.x == 0) {
        w->seen = seen, w->want = want, w->beyond = beyond;
        w->done = false, w->at = in.n, w->last = 0;
    }
    __syncthreads();
    walk_on(r, in, w, e);
}
/* Sum of all weights, for every thread. */
__device__ static double walk_all(const struct row *r, struct walk_in in, struct walk *w,
                                  float *e) {
    walk_from(r, in, 0.0, INFINITY, true, w, e);
    return w->seen;
}

/* ---- whole rows ---- */

/* The lowest id whose logit is `value`, 0 where none is; found: shared. */
__device__ static int first_of(const struct row *r, float value, int *found) {
    int least = r->vocab;
    if (threadIdx.x == 0) *found = r->vocab;
    __syncthreads();
    for (int i = (int)threadIdx.x; i < r->vocab && least == r->vocab; i += ROW_THREADS)
        if (r->logits[i] == value) least = i;
    if (least < r->vocab) atomicMin(found, least);
    __syncthreads();
    return *found < r->vocab ? *found : 0;
}

/* The block of ids that holds u by the blocks' sums: w stands at its beginning. One thread. */
__device__ static int find_block(const float *blocks, int count, double mass, float u,
                                 double *seen_to, double *want_to) {
    const double want = (double)u * mass;
    double seen = 0.0;
    int at = 0, last = 0;
    for (; at < count; at++) {
        if (blocks[at] > 0.0f) last = at;
        if (seen + (double)blocks[at] > want) break;
        seen += (double)blocks[at];
    }
    if (at == count) {                                /* u * mass rounded up to the mass */
        at = last;
        seen -= (double)blocks[last];
    }
    *seen_to = seen;
    *want_to = want;
    return at;
}
__device__ static int draw_whole(const struct row *r, const float *blocks, int count, double mass,
                                 float u, struct walk *w, float *e) {
    __shared__ double seen, want;
    __shared__ int at;
    if (threadIdx.x == 0) at = find_block(blocks, count, mass, u, &seen, &want);
    __syncthreads();
    const int first = at * ROW_BLOCK, left = r->vocab - first;
    const struct walk_in in = { NULL, first, left < ROW_BLOCK ? left : ROW_BLOCK };
    walk_from(r, in, seen, want, true, w, e);
    return first + (w->done ? w->at : w->last);
}

__global__ static void __launch_bounds__(ROW_THREADS) draw_kernel(struct draw_args a) {
    DYN_SHARED(float, blocks);
    __shared__ struct row_buf buf;
    __shared__ struct walk walk;
    __shared__ double mass;
    __shared__ int found;
    const int row = (int)blockIdx.x, count = (a.vocab + ROW_BLOCK - 1) / ROW_BLOCK;
    const struct kern_sampler s = a.sampler[row];
    const float most = row_most(a.logits + (size_t)row * (size_t)a.vocab, a.vocab, &buf);
    const struct row r = row_of(&a, row, most);
    const float sum = row_sum(r.logits, a.vocab, r.inv_temp, most, blocks, NULL, &buf);
    const float lse = r.zmost + kern_logf(sum);
    const bool sound = lse - lse == 0.0f, cut = kern_sampler_cuts(&s, a.vocab) && sound;
    float raw_lse = lse;
    int token = 0;
    if (r.inv_temp != 1.0f)
        raw_lse = most + kern_logf(row_sum(r.logits, a.vocab, 1.0f, most, NULL, NULL, &buf));
    if (threadIdx.x == 0) {
        mass = 0.0;
        for (int b = 0; b < count; b++) mass += (double)blocks[b];
    }
    __syncthreads();
    if (is_greedy(&s) || !sound) token = first_of(&r, most, &found);
    else if (!cut) token = draw_whole(&r, blocks, count, mass, s.u, &walk, buf.e);
    if (threadIdx.x) return;
    a.token[row] = token;
    a.lp[row] = r.logits[token] * r.inv_temp - lse;
    a.lp_raw[row] = r.logits[token] - raw_lse;
    const struct drawn left = { mass, most, raw_lse, cut };
    a.drawn[row] = left;
}

/* ---- cuts ---- */

/* Candidates as sortable numbers: largest logit first, lower id first among equals. */
__device__ static rank_t rank_key(float v, int id) {
    uint32_t u = kern_bits(v + 0.0f);                             /* -0 is 0 */
    u = u & 0x80000000u ? ~u : u | 0x80000000u;
    return (rank_t)~u << 32 | (uint32_t)id;
}

/* Ascending, by all threads of the block. Bitonic, every exchange upwards: elements beyond n would
 * be larger than all and never move. */
__device__ static void sort_keys(rank_t *key, int n) {
    for (int size = 1; size < n; size *= 2)           /* runs that are sorted */
        for (int by = size; by > 0; by /= 2) {
            __syncthreads();
            for (int i = (int)threadIdx.x; i / by * 2 * by + i % by < n; i += ROW_THREADS) {
                const int base = i / by * 2 * by, off = i % by, lo = base + off,
                          hi = by == size ? base + 2 * by - 1 - off : lo + by;
                if (hi >= n || key[lo] <= key[hi]) continue;
                const rank_t t = key[lo];
                key[lo] = key[hi];
                key[hi] = t;
            }
        }
    __syncthreads();
}

/* Keys of ids whose z is `least` or more, in no order; how many. count: shared. */
__device__ static int find_keys(const struct row *r, float least, rank_t *key, int *count) {
    __syncthreads();
    if (threadIdx.x == 0) *count = 0;
    __syncthreads();
    for (int i = (int)threadIdx.x; i < r->vocab; i += ROW_THREADS)
        if (r->logits[i] * r->inv_temp >= least)
            key[atomicAdd(count, 1)] = rank_key(r->logits[i], i);
    __syncthreads();
    return *count;
}

/* How many of the n candidates, sorted here, survive top-k and top-p; -1 when the answer needs
 * more candidates. mass: of the whole row. */
__device__ static int keep(const struct row *r, const struct kern_sampler *s, rank_t *key, int n,
                           double mass, struct walk *w, float *e) {
    const int top_k = s->top_k > 0 && s->top_k < r->vocab ? s->top_k : 0;
    if (top_k > n) return -1;
    sort_keys(key, n);
    const struct walk_in in = { key, 0, top_k ? top_k : n };
    if (top_k) mass = walk_all(r, in, w, e);
    if (!(s->top_p < 1.0f)) return in.n;
    walk_from(r, in, 0.0, (double)s->top_p * mass, false, w, e);
    return w->done ? w->at + 1 : top_k || n == r->vocab ? in.n : -1;
}

__device__ static void draw_cut(const struct draw_args *a, int row, rank_t *key, struct walk *w,
                                float *e) {
    __shared__ int count;
    const struct kern_sampler s = a->sampler[row];
    const struct drawn d = a->drawn[row];
    const struct row r = row_of(a, row, d.most);
    int n = -1;
    for (int turn = 0; n < 0; turn++) {               /* candidates: so far below the largest z */
        const float least = r.zmost - (turn == 0 ? 6.0f : turn == 1 ? 14.0f : INFINITY);
        n = find_keys(&r, least, key, &count);
        n = keep(&r, &s, key, n, d.mass, w, e);
    }
    for (int i = (int)threadIdx.x; i < n; i += ROW_THREADS) key[i] = (uint32_t)key[i];
    sort_keys(key, n);
    const struct walk_in in = { key, 0, n };
    const double kept = walk_all(&r, in, w, e);
    walk_from(&r, in, 0.0, (double)s.u * kept, true, w, e);
    if (threadIdx.x) return;
    const int token = (int)key[w->done ? w->at : w->last];
    a->token[row] = token;
    a->lp[row] = r.logits[token] * r.inv_temp - r.zmost - kern_logf((float)kept);
    a->lp_raw[row] = r.logits[token] - d.raw_lse;
}

__global__ static void __launch_bounds__(ROW_THREADS, CUT_BLOCKS)
    draw_cut_kernel(struct draw_args a) {
    __shared__ struct walk walk;
    __shared__ float e[ROW_THREADS];
    rank_t *key = a.keys + (size_t)blockIdx.x * (size_t)a.vocab;
    for (int row = (int)blockIdx.x; row < a.rows; row += (int)gridDim.x) {
        if (a.drawn[row].cut) draw_cut(&a, row, key, &walk, e);
        __syncthreads();
    }
}

static size_t padded(size_t bytes) { return (bytes + 15) / 16 * 16; }

/* Carves the scratch: keys, drawn. */
static bool draw_memory(struct kern *k, struct draw_args *a, int cuts) {
    const size_t keys = padded((size_t)cuts * (size_t)a->vocab * sizeof *a->keys);
    char *at = (char *)cuda_scratch(k, "sample", keys + (size_t)a->rows * sizeof *a->drawn);
    if (!at) return false;
    a->keys = (rank_t *)at;
    a->drawn = (struct drawn *)(at + keys);
    return true;
}

void cuda_sample(struct kern *k, const struct kern_sample *s) {
    struct draw_args a = {};
    const size_t blocks = (size_t)((s->vocab + ROW_BLOCK - 1) / ROW_BLOCK) * sizeof(float);
    const int cuts = !s->cuts ? 0 : s->rows < CUTS ? s->rows : CUTS;
    if (s->rows <= 0) return;
    assert(s->vocab > 0 && s->vocab <= VOCAB_MAX);
    a.logits = (const float *)s->logits.p, a.rows = s->rows, a.vocab = s->vocab;
    a.sampler = (const struct kern_sampler *)s->sampler.p;
    a.token = (int32_t *)s->token.p;
    a.lp = (float *)s->lp.p, a.lp_raw = (float *)s->lp_raw.p;
    if (!draw_memory(k, &a, cuts)) return;
    LAUNCH(draw_kernel, (unsigned)a.rows, ROW_THREADS, blocks, cuda_stream(k), a);
    CUDA_TRY(k, "sample", cudaGetLastError());
    if (!cuts) return;
    LAUNCH(draw_cut_kernel, (unsigned)cuts, ROW_THREADS, 0, cuda_stream(k), a);
    CUDA_TRY(k, "sample", cudaGetLastError());
}
