/* attn.cu - keys and values go into pages, and attention over them: which form the forward takes,
 * and the backward.
 *
 * Every sum is kernels/ref/attn.c's: a lane makes whole products of the tile order. The backward,
 * a warp a query and a lane a key of the page, has two kernels, one for dq and one for dk and dv,
 * which both make p and ds again; only the first counts the noise.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cuda/attn.cuh"

/* ATTN_BLOCKS: for as many a kernel may take registers; asked for none, ptxas spills some */
enum { PUT_THREADS = 128, ATTN_WARPS = 4, ATTN_THREADS = ATTN_WARPS * WARP, ATTN_BLOCKS = 3 };

__global__ static void kv_put_kernel(struct kern_kv_put a) {
    const struct kern_kv *kv = &a.kv;
    const size_t dim = (size_t)kv->head_dim, heads = (size_t)kv->kv_heads, at = cuda_index();
    if (at >= (size_t)a.rows * heads * dim) return;
    const size_t row = at / (heads * dim);
    const int h = (int)(at / dim % heads), i = (int)(at % dim),
              slot = ((const int32_t *)a.slots.p)[row], pos = ((const int32_t *)a.pos.p)[row];
    cuda_put(kv->pages, kv->type, cuda_kv_at(kv, a.layer, slot, pos, h, 0, i),
             cuda_get(a.k, a.k_type, at));
    cuda_put(kv->pages, kv->type, cuda_kv_at(kv, a.layer, slot, pos, h, 1, i),
             ((const float *)a.v.p)[at]);
}

void cuda_kv_put(struct kern *k, const struct kern_kv_put *a) {
    const size_t n = (size_t)a->rows * (size_t)a->kv.kv_heads * (size_t)a->kv.head_dim;
    if (a->rows <= 0) return;
    LAUNCH(kv_put_kernel, cuda_blocks(n, PUT_THREADS), PUT_THREADS, 0, cuda_stream(k), *a);
    CUDA_TRY(k, "kv_put", cudaGetLastError());
}

/* A page's keys or values of one head: where they begin. */
struct page { const struct kern_kv *kv; size_t at; };
__device__ static inline struct page page_of(const struct kern_kv *kv, int layer, int slot,
                                             int pos, int h, int is_v) {
    struct page p = { kv, cuda_kv_page(kv, layer, slot, pos, h, is_v) };
    return p;
}
__device__ static inline float key_at(const struct page *p, int j, int i) {
    const int in = (i / 2 * KERN_PAGE + j) * 2 + i % 2;
    return cuda_get(p->kv->pages, p->kv->type, p->at + (size_t)in);
}
__device__ static inline float value_at(const struct page *p, int j, int i) {
    const int in = (j / 2 * p->kv->head_dim + i) * 2 + j % 2;
    return cuda_get(p->kv->pages, p->kv->type, p->at + (size_t)in);
}
/* x . key j, x . value j */
__device__ static float key_dot(const float *x, const struct page *p, int j) {
    return cuda_dot(0.0f, (size_t)p->kv->head_dim, [=](size_t i) { return x[i]; },
                    [=](size_t i) { return key_at(p, j, (int)i); });
}
__device__ static float value_dot(const float *x, const struct page *p, int j) {
    return cuda_dot(0.0f, (size_t)p->kv->head_dim, [=](size_t i) { return x[i]; },
                    [=](size_t i) { return value_at(p, j, (int)i); });
}
__device__ static inline int kv_head_of(int head, int heads, int kv_heads) {
    return (int)((int64_t)head * kv_heads / heads);
}

/* ---- forward ---- */

/* The form follows from shapes alone, so that a launch that was recorded stays the right one: few
 * rows with room for a long past are decoding. */
enum { DECODE_ROWS = 256, DECODE_PAGES = 5 };

void cuda_attn(struct kern *k, const struct kern_attn *a) {
    if (a->rows <= 0) return;
    if (a->rows <= DECODE_ROWS && a->kv.slot_pages >= DECODE_PAGES) cuda_attn_split(k, a);
    else cuda_attn_tile(k, a);
}

/* ---- backward ---- */

struct bwd_tally { struct noise_tally scores, probs, dprobs, dscores; };

/* A warp's query; pos: its row within the sequence. q and dy (rounded) in shared memory. edge: of
 * type deadzone on scores; from: what a score's exponential is taken from. */
struct bwd {
    int row, head, kvh, slot, pos, lane;
    float *q, *dy, lse, delta, edge, from;
};

/* Whether probabilities are those of the final maximum, which attn left. */
__device__ static inline bool bwd_own(const struct kern_attn_bwd *a,
                                      const struct kern_attn_noise *noise) {
    return a->peaks.p && !kern_noise_relative(&noise->probs);
}

/* Fills all but the names of the query at row and head. The whole warp calls. */
template <bool NOISY>
__device__ static void bwd_query(const struct kern_attn_bwd *a,
                                 const struct kern_attn_noise *noise, struct bwd *b) {
    const size_t query = (size_t)b->row * (size_t)a->heads + (size_t)b->head;
    const int dim = a->kv.head_dim;
    const float *dy = (const float *)a->dy.p;
    float delta = 0.0f;
    for (int i = b->lane; i < dim; i += WARP) {
        const size_t at = query * (size_t)dim + (size_t)i;
        b->q[i] = cuda_get(a->q, a->q_type, at);
        b->dy[i] = cuda_round(dy[at], a->kv.type == KERN_BF16);
    }
    for (int i = b->lane; i < dim && b->lane < 16; i += 16) {
        const size_t at = query * (size_t)dim + (size_t)i;
        delta = fmaf(dy[at], cuda_get(a->y, a->y_type, at), delta);
    }
    b->delta = __shfl_sync(WARP_ALL, warp_fold16(delta), 0);
    b->lse = b->from = ((const float *)a->lse.p)[query];
    b->edge = 0.0f;
    if (NOISY && a->peaks.p) b->edge = ((const float *)a->peaks.p)[2 * query];
    if (NOISY && bwd_own(a, noise)) b->from = ((const float *)a->peaks.p)[2 * query + 1];
    __syncwarp();
}

/* p and ds of the query against this lane's key in the page from key `at`, 0 where it is not
 * seen. The whole warp calls; l NULL: not counted. */
template <bool NOISY>
__device__ static void bwd_page(const struct kern_attn_bwd *a, const struct kern_attn_noise *noise,
                                const struct bwd *b, int at, float *p, float *ds,
                                struct bwd_tally *l) {
    const struct page keys = page_of(&a->kv, a->layer, b->slot, at, b->kvh, 0),
                      values = page_of(&a->kv, a->layer, b->slot, at, b->kvh, 1);
    const int key = at + b->lane;
    const bool seen = key <= b->pos, round = a->kv.type == KERN_BF16;
    float s = seen ? key_dot(b->q, &keys, b->lane) * a->scale : 0.0f;
    float d = seen ? value_dot(b->dy, &values, b->lane) : 0.0f;
    if (NOISY) s = noise_page(&noise->scores, b->row, b->head, b->edge, s, key, seen,
                              l ? &l->scores : NULL);
    *p = seen ? kern_expf(s - b->from) : 0.0f;
    if (NOISY) {
        *p = above_zero(noise_page(&noise->probs, b->row, b->head,
                                   kern_noise_edge(&noise->probs, 1.0f), *p, key, seen,
                                   l ? &l->probs : NULL));
        if (bwd_own(a, noise)) *p *= kern_expf(b->from - b->lse);
        d = noise_page(&noise->dprobs, b->row, b->head, 0.0f, d, key, seen,
                       l ? &l->dprobs : NULL);
    }
    *ds = seen ? *p * (d - b->delta) * a->scale : 0.0f;
    if (NOISY) *ds = noise_page(&noise->dscores, b->row, b->head, 0.0f, *ds, key, seen,
                                l ? &l->dscores : NULL);
    *p = cuda_round(*p, round);
    *ds = cuda_round(*ds, round);
}

/* dq: a warp a query of sequence blockIdx.y */
template <bool NOISY>
__global__ static void __launch_bounds__(ATTN_THREADS, ATTN_BLOCKS)
    attn_dq_kernel(struct kern_attn_bwd a, struct kern_attn_noise noise,
                   const int32_t *seq_start) {
    DYN_SHARED(float, shared);
    const int warp = (int)threadIdx.x / WARP, dim = a.kv.head_dim;
    const int first = seq_start[blockIdx.y], len = seq_start[blockIdx.y + 1] - first;
    const int64_t index = (int64_t)blockIdx.x * ATTN_WARPS + warp;
    if (index >= (int64_t)len * a.heads) return;
    struct bwd b;
    b.pos = (int)(index / a.heads), b.head = (int)(index % a.heads), b.row = first + b.pos;
    b.kvh = kv_head_of(b.head, a.heads, a.kv.kv_heads);
    b.slot = ((const int32_t *)a.slots.p)[first];
    b.lane = (int)threadIdx.x % WARP;
    b.q = shared + warp * (3 * dim + KERN_PAGE), b.dy = b.q + dim;
    float *dq = b.dy + dim, *ds_of = dq + dim, p, ds;
    struct bwd_tally tally = {};
    for (int i = b.lane; i < dim; i += WARP) dq[i] = 0.0f;
    bwd_query<NOISY>(&a, &noise, &b);
    for (int at = 0; at <= b.pos; at += KERN_PAGE) {
        const struct page keys = page_of(&a.kv, a.layer, b.slot, at, b.kvh, 0);
        bwd_page<NOISY>(&a, &noise, &b, at, &p, &ds, NOISY ? &tally : NULL);
        ds_of[b.lane] = ds;
        __syncwarp();
        /* past the sequence's end pages hold anything */
        for (int i = b.lane; i < dim; i += WARP)
            dq[i] = cuda_dot(dq[i], KERN_PAGE, [=](size_t j) { return ds_of[j]; },
                             [&](size_t j) {
                                 return at + (int)j < len ? key_at(&keys, (int)j, i) : 0.0f;
                             });
        __syncwarp();
    }
    const size_t to = ((size_t)b.row * (size_t)a.heads + (size_t)b.head) * (size_t)dim;
    for (int i = b.lane; i < dim; i += WARP) ((float *)a.dq.p)[to + (size_t)i] = dq[i];
    if (!NOISY) return;
    noise_take(&noise.scores, &tally.scores);
    noise_take(&noise.probs, &tally.probs);
    noise_take(&noise.dprobs, &tally.dprobs);
    noise_take(&noise.dscores, &tally.dscores);
}

/* 32 queries of one kv head against a page of keys. */
struct bwd_tile {
    float p[WARP][KERN_PAGE + 1], ds[WARP][KERN_PAGE + 1];
    size_t query[WARP];                               /* element of q and dy */
};

/* Adds the tile's n queries to dk and dv of the page's keys, or sets them. */
__device__ static void tile_add(const struct kern_attn_bwd *a, const struct bwd_tile *tile, int n,
                                int keys, size_t to, bool sets) {
    const int dim = a->kv.head_dim;
    const size_t ld = (size_t)a->kv.kv_heads * (size_t)dim;
    const float *dy = (const float *)a->dy.p;
    const bool round = a->kv.type == KERN_BF16;
    for (int e = (int)threadIdx.x; e < keys * dim; e += ATTN_THREADS) {
        const int j = e / dim, i = e % dim;
        float *dk = (float *)a->dk.p + to + (size_t)j * ld + i,
              *dv = (float *)a->dv.p + to + (size_t)j * ld + i;
        *dk = cuda_dot(sets ? 0.0f : *dk, (size_t)n,
                       [=](size_t x) { return tile->ds[x][j]; }, [=](size_t x) {
                           return cuda_get(a->q, a->q_type, tile->query[x] + (size_t)i);
                       });
        *dv = cuda_dot(sets ? 0.0f : *dv, (size_t)n,
                       [=](size_t x) { return tile->p[x][j]; }, [=](size_t x) {
                           return cuda_round(dy[tile->query[x] + (size_t)i], round);
                       });
    }
}

/* dk, dv: a block a page of keys, kv head and sequence. Queries before the page see none of it:
 * what they would add is 0. */
template <bool NOISY>
__global__ static void __launch_bounds__(ATTN_THREADS, ATTN_BLOCKS)
    attn_dkv_kernel(struct kern_attn_bwd a, struct kern_attn_noise noise,
                    const int32_t *seq_start) {
    DYN_SHARED(float, shared);
    __shared__ struct bwd_tile tile;
    const int warp = (int)threadIdx.x / WARP, dim = a.kv.head_dim, kv_heads = a.kv.kv_heads;
    const int first = seq_start[blockIdx.z], len = seq_start[blockIdx.z + 1] - first;
    const int at = (int)blockIdx.x * KERN_PAGE, h = (int)blockIdx.y;
    if (at >= len) return;
    const int head = kv_first(h, a.heads, kv_heads),
              group = kv_first(h + 1, a.heads, kv_heads) - head;
    const int queries = len * group, keys = len - at < KERN_PAGE ? len - at : KERN_PAGE;
    const size_t to = ((size_t)(first + at) * (size_t)kv_heads + (size_t)h) * (size_t)dim;
    struct bwd b;
    b.kvh = h, b.slot = ((const int32_t *)a.slots.p)[first];
    b.lane = (int)threadIdx.x % WARP;
    b.q = shared + warp * 2 * dim, b.dy = b.q + dim;
    const int begin = at * group / WARP * WARP;
    for (int from = begin; from < queries; from += WARP) {
        const int n = queries - from < WARP ? queries - from : WARP;
        for (int x = warp; x < n; x += ATTN_WARPS) {
            float p = 0.0f, ds = 0.0f;
            b.pos = (from + x) / group, b.row = first + b.pos;
            b.head = head + (from + x) % group;
            bwd_query<NOISY>(&a, &noise, &b);
            bwd_page<NOISY>(&a, &noise, &b, at, &p, &ds, NULL);
            tile.p[x][b.lane] = p, tile.ds[x][b.lane] = ds;
            if (b.lane == 0)
                tile.query[x] = ((size_t)b.row * (size_t)a.heads + (size_t)b.head) * (size_t)dim;
            __syncwarp();
        }
        __syncthreads();
        tile_add(&a, &tile, n, keys, to, from == begin);
        __syncthreads();
    }
}

template <bool NOISY>
static void attn_bwd_launch(struct kern *k, const struct kern_attn_bwd *a,
                            const struct kern_attn_noise *noise, const int32_t *seq_start,
                            int len) {
    const size_t dim = (size_t)a->kv.head_dim,
                 dq_smem = ATTN_WARPS * (3 * dim + KERN_PAGE) * sizeof(float),
                 dkv_smem = ATTN_WARPS * 2 * dim * sizeof(float);
    const dim3 dq(cuda_blocks((size_t)len * (size_t)a->heads, ATTN_WARPS), (unsigned)a->seqs),
        dkv(cuda_blocks((size_t)len, KERN_PAGE), (unsigned)a->kv.kv_heads, (unsigned)a->seqs);
    LAUNCH(attn_dq_kernel<NOISY>, dq, ATTN_THREADS, dq_smem, cuda_stream(k), *a, *noise,
           seq_start);
    CUDA_TRY(k, "attn_bwd", cudaGetLastError());
    LAUNCH(attn_dkv_kernel<NOISY>, dkv, ATTN_THREADS, dkv_smem, cuda_stream(k), *a, *noise,
           seq_start);
    CUDA_TRY(k, "attn_bwd", cudaGetLastError());
}

void cuda_attn_bwd(struct kern *k, const struct kern_attn_bwd *a) {
    const struct kern_attn_noise noise = a->noise ? *a->noise : kern_attn_noise();
    int len = 0;
    assert(!a->noise || kern_noise_backward(a->noise, a->peaks.p));
    assert(a->heads >= a->kv.kv_heads);
    for (int s = 0; s < a->seqs; s++) {
        const int n = a->seq_start[s + 1] - a->seq_start[s];
        len = n > len ? n : len;
    }
    if (len <= 0) return;
    const int32_t *seq_start = (const int32_t *)cuda_small(
        k, "attn_bwd", a->seq_start, (size_t)(a->seqs + 1) * sizeof(int32_t));
    if (!seq_start) return;
    if (a->noise) attn_bwd_launch<true>(k, a, &noise, seq_start, len);
    else attn_bwd_launch<false>(k, a, &noise, seq_start, len);
}
