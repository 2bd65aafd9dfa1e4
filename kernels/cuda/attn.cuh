/* attn.cuh - what the kernels of attention share: where keys and values lie, which heads read
 * them, and a warp's tile, which is up to TILE queries of one kv head against one page.
 *
 * A lane has a key when scores are made and an element of the head when values are added, so a
 * page comes in whole lines, once for all queries of the tile; what the lanes need of the queries
 * lies in the warp's shared memory. Every sum is kernels/ref/attn.c's.
 * Order: pages, heads, tile, scores, values.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_CUDA_ATTN_CUH
#define QERL_CUDA_ATTN_CUH
#include "kernels/cuda/noise.cuh"

enum { TILE = 8, TILE_WARPS = 8, TILE_SHARED_MOST = 48 << 10 };

/* attn_split.cu: pages side by side; attn_tile.cu: pages one after another. The same bits. */
void cuda_attn_split(struct kern *k, const struct kern_attn *a);
void cuda_attn_tile(struct kern *k, const struct kern_attn *a);

/* ---- pages ---- */

/* Two neighbours along what a product sums over. */
template <bool BF16> struct kv_pair { float2 v; };
template <> struct kv_pair<true> { uint32_t v; };
__device__ static inline float2 pair_of(kv_pair<false> p) { return p.v; }
__device__ static inline float2 pair_of(kv_pair<true> p) {
    return make_float2(kern_float(p.v << 16), kern_float(p.v & 0xffff0000u));
}
/* Those of the page from element `at` on. */
template <bool BF16>
__device__ static inline const kv_pair<BF16> *pairs_at(const struct kern_kv *kv, size_t at) {
    return (const kv_pair<BF16> *)kv->pages.p + at / 2;
}

/* ---- heads ---- */

/* Heads [kv_first(h), kv_first(h + 1)) read kv head h. */
__device__ static inline int kv_first(int h, int heads, int kv_heads) {
    return (int)(((int64_t)h * heads + kv_heads - 1) / kv_heads);
}
/* A noisy probability: no -0; a NaN stays. */
__device__ static inline float above_zero(float p) { return (0.0f > p ? 0.0f : p) + 0.0f; }

/* ---- tile ---- */

/* Of a query's vector in shared memory: groups of four are read at once. */
static __host__ __device__ inline int tile_ld(int dim) { return (dim + 3) / 4 * 4; }
/* Warps of a block, each of which needs `bytes` of shared memory. */
static inline unsigned tile_warps(size_t bytes) {
    const unsigned fit = (unsigned)(TILE_SHARED_MOST / bytes), most = TILE_WARPS;
    return fit < 1 ? 1 : fit < most ? fit : most;
}

/* The n queries from number `from` on of the kv head whose first head is `head`, which number
 * group a row from `row` on. */
struct tile { int row, head, group, from, n; };
__device__ static inline int tile_row(const struct tile *t, int x) {
    return t->row + (t->from + x) / t->group;
}
__device__ static inline int tile_head(const struct tile *t, int x) {
    return t->head + (t->from + x) % t->group;
}

/* The tile's queries, zeros beyond. The warp must meet before they are read. */
__device__ static inline void tile_queries(float *q, const struct kern_attn *a,
                                           const struct tile *t) {
    const int dim = a->kv.head_dim, ld = tile_ld(dim), lane = (int)threadIdx.x % WARP;
    for (int x = 0; x < TILE; x++, q += ld) {
        const size_t at = ((size_t)tile_row(t, x) * (size_t)a->heads + (size_t)tile_head(t, x)) *
                          (size_t)dim;
        for (int i = lane; i < ld; i += WARP)
            q[i] = x < t->n && i < dim ? cuda_get(a->q, a->q_type, at + (size_t)i) : 0.0f;
    }
}

/* Of a page's pairs as many are asked for at once: enough to keep the memory busy, and registers
 * for many warps. */
enum { AT_ONCE = 8, STEP = 2 * AT_ONCE };

/* ---- scores ---- */

/* even, odd: the chains of STEP products each at most, n of which are there. */
template <bool BF16>
__device__ static inline void scores_step(float even[TILE], float odd[TILE], const float *q,
                                          int ld, int n, const kv_pair<BF16> *keys) {
    kv_pair<BF16> key[AT_ONCE];
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
        key[u] = {};
        if (2 * u < n) key[u] = keys[u * KERN_PAGE];
    }
#pragma unroll
    for (int u = 0; u < AT_ONCE; u += 2) {
        if (2 * u >= n) break;
        const float2 k = pair_of(key[u]), l = pair_of(key[u + 1]);
#pragma unroll
        for (int x = 0; x < TILE; x++) {
            const float4 v = *(const float4 *)(q + x * ld + 2 * u);
            even[x] = fma_ftz(v.z, l.x, fma_ftz(v.x, k.x, even[x]));
            odd[x] = fma_ftz(v.w, l.y, fma_ftz(v.y, k.y, odd[x]));
        }
    }
}

/* sum[x] = q of query x . this lane's key. */
template <bool BF16>
__device__ static inline void tile_scores(float sum[TILE], const float *q, int dim,
                                          const kv_pair<BF16> *keys) {
    const int ld = tile_ld(dim);
    keys += threadIdx.x % WARP;
    for (int x = 0; x < TILE; x++) sum[x] = 0.0f;
#pragma unroll 1
    for (int at = 0; at < dim; at += KERN_IN_BLOCK) {
        float even[TILE] = {}, odd[TILE] = {};
#pragma unroll 1
        for (int i = at; i < at + KERN_IN_BLOCK && i < dim; i += STEP, keys += AT_ONCE * KERN_PAGE)
            scores_step<BF16>(even, odd, q + i, ld, dim - i, keys);
#pragma unroll
        for (int x = 0; x < TILE; x++) {                      /* the padding's zeros: no -0 */
            if (dim - at < KERN_IN_BLOCK) even[x] += 0.0f, odd[x] += 0.0f;
            sum[x] = add_ftz(sum[x], add_ftz(even[x], odd[x]));
        }
    }
}

/* ---- values ---- */

/* even, odd: the chains over n keys, STEP at most. ALIKE: every query sees all of them; else
 * seen[x] - from of them, and what lies behind is taken for 0. */
template <bool BF16, bool ALIKE>
__device__ static inline void values_step(float even[TILE], float odd[TILE], const float *p,
                                          const int *seen, int from, int n, int dim,
                                          const kv_pair<BF16> *values, bool inside) {
    kv_pair<BF16> value[AT_ONCE];
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
        value[u] = {};
        if (2 * u < n && inside) value[u] = values[u * dim];
    }
#pragma unroll
    for (int j = 0; j < STEP; j += 4) {
        if (j >= n) break;
        float2 v = pair_of(value[j / 2]), w = pair_of(value[j / 2 + 1]);
        v.y = j + 1 < n ? v.y : 0.0f;
        w.y = j + 3 < n ? w.y : 0.0f;
#pragma unroll
        for (int x = 0; x < TILE; x++) {
            const float4 f = *(const float4 *)(p + x * KERN_PAGE + j);
            const int most = ALIKE ? (int)STEP : seen[x] - from;
            even[x] = fma_ftz(f.x, j < most ? v.x : 0.0f, even[x]);
            odd[x] = fma_ftz(f.y, j + 1 < most ? v.y : 0.0f, odd[x]);
            even[x] = fma_ftz(f.z, j + 2 < most ? w.x : 0.0f, even[x]);
            odd[x] = fma_ftz(f.w, j + 3 < most ? w.y : 0.0f, odd[x]);
        }
    }
}

/* sum[x] = p of query x . element i of the page's values; n: how many keys the queries see (ALIKE),
 * or the most that one sees. */
template <bool BF16, bool ALIKE>
__device__ static inline void tile_values(float sum[TILE], const float *p, const int *seen, int n,
                                          int dim, const kv_pair<BF16> *values, int i) {
    float even[TILE] = {}, odd[TILE] = {};
    values += i;
#pragma unroll 1
    for (int j = 0; j < n; j += STEP, values += AT_ONCE * dim)
        values_step<BF16, ALIKE>(even, odd, p + j, seen, j, n - j, dim, values, i < dim);
#pragma unroll
    for (int x = 0; x < TILE; x++) {
        if (n <= KERN_PAGE - 4) even[x] += 0.0f, odd[x] += 0.0f;
        sum[x] = add_ftz(even[x], odd[x]);
    }
}
#endif
