/* attn_tile.cu - attention of many rows: a warp takes TILE neighbouring queries of a kv head and
 * walks over their pages in order.
 *
 * Rows of one sequence name the same pages, so a page comes once for the tile, and once for the
 * block from the first-level cache, whose warps have the tiles next to each other. Queries of a
 * tile that name different pages go one after another.
 * Order: a warp's tile, a page, what a row's noise needs beforehand, the walk, launch.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cuda/attn.cuh"

enum { WALK_WARPS = 4, WALK_THREADS = WALK_WARPS * WARP };

/* A warp's shared memory: p, then q and o [TILE][ld]. */
static __host__ __device__ inline int walk_floats(int dim) {
    return TILE * (KERN_PAGE + 2 * tile_ld(dim));
}

/* Lane x has what belongs to query x: keys it sees (0 beyond the tile), m, l, fix, edge. */
struct walk {
    const struct kern_attn *a;
    const struct kern_attn_noise *noise;
    struct tile t;
    int h, most;                                      /* most keys of any */
    float *p, *q, *o;
    int keys, slot;
    float m, l, fix, edge;
    struct noise_tally scores, probs;
};

/* Queries [first, end) of the tile, which read page `id` as page number `page`. */
struct walk_run { int page, id, first, end; };

/* Calls f for the tile's runs at each of its pages in order. The whole warp calls, f included. */
template <class F> __device__ static inline void walk_each(struct walk *w, F f) {
    const int32_t *table = (const int32_t *)w->a->kv.table.p;
    for (int page = 0; page * KERN_PAGE < w->most; page++) {
        const int id = w->keys > page * KERN_PAGE
                           ? table[(size_t)w->slot * (size_t)w->a->kv.slot_pages + (size_t)page]
                           : -1;
        unsigned left = __ballot_sync(WARP_ALL, id >= 0);
        while (left) {
            const int first = __ffs((int)left) - 1, same = __shfl_sync(WARP_ALL, id, first);
            const unsigned others = ~__ballot_sync(WARP_ALL, id == same) >> first << first;
            const struct walk_run r = { page, same, first, __ffs((int)others) - 1 };
            f(&r);
            left &= ~0u << r.end;
        }
    }
}

/* The run's clean scores into p, for this lane's key. */
template <bool BF16>
__device__ static inline void walk_scores(struct walk *w, const struct walk_run *r) {
    float sum[TILE];
    const struct kern_kv *kv = &w->a->kv;
    const int lane = (int)threadIdx.x % WARP;
    tile_scores<BF16>(sum, w->q, kv->head_dim,
                      pairs_at<BF16>(kv, cuda_kv_in_page(kv, w->a->layer, r->id, w->h, 0)));
#pragma unroll
    for (int x = 0; x < TILE; x++) w->p[x * KERN_PAGE + lane] = sum[x] * w->a->scale;
}
/* Query x's score of this lane's key, 0 where it is not seen; l NULL: its noise is not counted. */
template <bool NOISY>
__device__ static inline float walk_score(struct walk *w, int x, int page, bool seen,
                                          struct noise_tally *l) {
    const int lane = (int)threadIdx.x % WARP;
    const float s = seen ? w->p[x * KERN_PAGE + lane] : 0.0f;
    if (!NOISY) return s;
    return noise_page(&w->noise->scores, tile_row(&w->t, x), tile_head(&w->t, x),
                      __shfl_sync(WARP_ALL, w->edge, x), s, page * KERN_PAGE + lane, seen, l);
}

/* Before the walk, where a type needs it: each row's largest |score|, or its largest noisy one. */
template <bool BF16, bool NOISY>
__device__ static inline float walk_peak(struct walk *w, float least) {
    const int lane = (int)threadIdx.x % WARP;
    float peak = least;
    walk_each(w, [&](const struct walk_run *r) {
        walk_scores<BF16>(w, r);
#pragma unroll 1
        for (int x = r->first; x < r->end; x++) {
            const bool seen = r->page * KERN_PAGE + lane < __shfl_sync(WARP_ALL, w->keys, x);
            float s = walk_score<NOISY>(w, x, r->page, seen, NULL);
            if (!NOISY) s = fabsf(s);
            s = warp_most(seen ? larger(s, least) : least);
            if (lane == x) peak = larger(s, peak);
        }
    });
    return peak;
}

/* Query x at a page: m, l and fix move on, its probabilities stand in p. Returns how many keys it
 * sees. */
template <bool NOISY>
__device__ static inline int walk_probs(struct walk *w, int x, int page) {
    const int lane = (int)threadIdx.x % WARP, keys = __shfl_sync(WARP_ALL, w->keys, x),
              key = page * KERN_PAGE + lane;
    const bool seen = key < keys;
    const float s = walk_score<NOISY>(w, x, page, seen, &w->scores),
                m = __shfl_sync(WARP_ALL, w->m, x),
                most = larger(warp_most(seen ? larger(s, -INFINITY) : -INFINITY), m);
    float p = seen ? kern_expf(s - most) : 0.0f;
    if (NOISY)                                        /* p of the row's maximum is 1 */
        p = above_zero(noise_page(&w->noise->probs, tile_row(&w->t, x), tile_head(&w->t, x),
                                  kern_noise_edge(&w->noise->probs, 1.0f), p, key, seen,
                                  &w->probs));
    const float sum = warp_sum(p);
    w->p[x * KERN_PAGE + lane] = cuda_round(p, w->a->kv.type == KERN_BF16);
    if (lane == x) {
        w->fix = kern_expf(m - most);
        w->l = fmaf(w->l, w->fix, sum);
        w->m = most;
    }
    return min((int)KERN_PAGE, keys - page * KERN_PAGE);
}

template <bool BF16, bool NOISY>
__device__ static inline void walk_page(struct walk *w, const struct walk_run *r) {
    const struct kern_kv *kv = &w->a->kv;
    const int lane = (int)threadIdx.x % WARP, dim = kv->head_dim, ld = tile_ld(dim);
    const kv_pair<BF16> *values =
        pairs_at<BF16>(kv, cuda_kv_in_page(kv, w->a->layer, r->id, w->h, 1));
    int least = KERN_PAGE, most = 0, seen[TILE];
    float fix[TILE];
    walk_scores<BF16>(w, r);
#pragma unroll 1
    for (int x = r->first; x < r->end; x++) {
        const int n = walk_probs<NOISY>(w, x, r->page);
        least = min(least, n), most = max(most, n);
    }
#pragma unroll
    for (int x = 0; x < TILE; x++) {
        seen[x] = __shfl_sync(WARP_ALL, w->keys, x) - r->page * KERN_PAGE;
        fix[x] = __shfl_sync(WARP_ALL, w->fix, x);
    }
    __syncwarp();
#pragma unroll 1
    for (int i = lane; i < dim + lane; i += WARP) {
        float sum[TILE];
        if (least == most) tile_values<BF16, true>(sum, w->p, seen, most, dim, values, i);
        else tile_values<BF16, false>(sum, w->p, seen, most, dim, values, i);
#pragma unroll
        for (int x = 0; x < TILE; x++) {
            if (x < r->first || x >= r->end || i >= dim) continue;
            float o = w->o[x * ld + i] * fix[x];
            if (fabsf(o) < 0x1p-126f) o = 0.0f;
            w->o[x * ld + i] = add_ftz(o, sum[x]);
        }
    }
    __syncwarp();
}

/* y, lse and peaks of the tile. */
__device__ static inline void walk_put(const struct walk *w) {
    const struct kern_attn *a = w->a;
    const int lane = (int)threadIdx.x % WARP, dim = a->kv.head_dim, ld = tile_ld(dim);
    for (int x = 0; x < w->t.n; x++) {
        const size_t query = (size_t)tile_row(&w->t, x) * (size_t)a->heads +
                             (size_t)tile_head(&w->t, x);
        const float inv = 1.0f / __shfl_sync(WARP_ALL, w->l, x);
        for (int i = lane; i < dim; i += WARP)
            cuda_put(a->y, a->y_type, query * (size_t)dim + (size_t)i, w->o[x * ld + i] * inv);
        if (lane != x) continue;
        if (a->lse.p) ((float *)a->lse.p)[query] = w->m + kern_logf(w->l);
        if (!a->peaks.p) continue;
        ((float *)a->peaks.p)[2 * query] = w->edge;
        ((float *)a->peaks.p)[2 * query + 1] = w->m;
    }
}

/* blockIdx: tiles of the kv head, kv head */
template <bool BF16, bool NOISY>
__global__ static void __launch_bounds__(WALK_THREADS, 3)
    walk_kernel(struct kern_attn a, struct kern_attn_noise noise) {
    DYN_SHARED(float, shared);
    const int lane = (int)threadIdx.x % WARP, dim = a.kv.head_dim, ld = tile_ld(dim),
              h = (int)blockIdx.y, head = kv_first(h, a.heads, a.kv.kv_heads),
              group = kv_first(h + 1, a.heads, a.kv.kv_heads) - head, queries = a.rows * group,
              warp = (int)threadIdx.x / WARP,
              from = (int)(blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP) * TILE;
    if (from >= queries) return;
    struct walk w = {};
    w.a = &a, w.noise = &noise, w.h = h;
    w.t = { 0, head, group, from, min((int)TILE, queries - from) };
    w.p = shared + warp * walk_floats(dim), w.q = w.p + TILE * KERN_PAGE, w.o = w.q + TILE * ld;
    const int row = lane < w.t.n ? tile_row(&w.t, lane) : -1;
    w.keys = row < 0 ? 0 : ((const int32_t *)a.pos.p)[row] + 1;
    w.slot = row < 0 ? 0 : ((const int32_t *)a.slots.p)[row];
    w.most = __reduce_max_sync(WARP_ALL, w.keys);
    w.m = -INFINITY;
    for (int i = lane; i < TILE * ld; i += WARP) w.o[i] = 0.0f;
    for (int i = lane; i < TILE * KERN_PAGE; i += WARP) w.p[i] = 0.0f;
    tile_queries(w.q, &a, &w.t);
    __syncwarp();
    if (NOISY)
        w.edge = kern_noise_edge(&noise.scores, noise.scores.type == KERN_NOISE_DEADZONE
                                                    ? walk_peak<BF16, false>(&w, 0.0f) : 0.0f);
    if (NOISY && !kern_noise_relative(&noise.probs)) w.m = walk_peak<BF16, true>(&w, -INFINITY);
    walk_each(&w, [&](const struct walk_run *r) { walk_page<BF16, NOISY>(&w, r); });
    walk_put(&w);
    if (!NOISY) return;
    noise_take(&noise.scores, &w.scores);
    noise_take(&noise.probs, &w.probs);
}

template <bool BF16>
static void walk_launch(struct kern *k, const struct kern_attn *a, bool noisy,
                        const struct kern_attn_noise *noise) {
    const size_t bytes = (size_t)walk_floats(a->kv.head_dim) * sizeof(float),
                 group = (size_t)(a->heads + a->kv.kv_heads - 1) / (size_t)a->kv.kv_heads;
    const unsigned warps = min(tile_warps(bytes), (unsigned)WALK_WARPS);
    const dim3 grid(cuda_blocks((size_t)a->rows * group, TILE * warps), (unsigned)a->kv.kv_heads);
    if (noisy)
        LAUNCH((walk_kernel<BF16, true>), grid, warps * WARP, warps * bytes, cuda_stream(k), *a,
               *noise);
    else
        LAUNCH((walk_kernel<BF16, false>), grid, warps * WARP, warps * bytes, cuda_stream(k), *a,
               *noise);
    CUDA_TRY(k, "attn", cudaGetLastError());
}

void cuda_attn_tile(struct kern *k, const struct kern_attn *a) {
    const struct kern_attn_noise noise = a->noise ? *a->noise : kern_attn_noise();
    struct kern_attn b = *a;
    if (!a->noise) b.peaks.p = NULL;
    if (a->kv.type == KERN_BF16) walk_launch<true>(k, &b, a->noise, &noise);
    else walk_launch<false>(k, &b, a->noise, &noise);
}
