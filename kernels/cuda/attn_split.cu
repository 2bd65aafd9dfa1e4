/* attn_split.cu - attention of a few rows with a long past: pages side by side, then a walk.
 *
 * What of a page depends on earlier pages is little: the running maximum, which is a maximum of
 * pages' maxima, and the two chains l and o. So the pages' scores and maxima are made first, each
 * page by itself; then each page's probabilities (their maximum is known), their sum and their
 * products with values; then l = fma(l, fix, sum) and o = o * fix + product walk over the pages in
 * order. No sum is in another order than kernels/ref/attn.c's.
 *
 * A page that neighbouring rows share is read by one block for all of them, as long as they are
 * RUN_MOST at most. Grids and memory follow from rows, heads and slot_pages alone, so a launch that
 * was recorded stays right while positions grow: a block without a page leaves at once.
 * Order: what is handed on, runs of rows, scores, noise on them, values, walk, launch.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cuda/attn.cuh"

/* SPLIT_ROWS: a block sees to the runs that begin in as many rows; SPLIT_BYTES: of a call's
 * memory, beyond which its rows go in parts; AHEAD: products under way in a walk */
enum { SPLIT_ROWS = 8, RUN_MOST = 32, SPLIT_THREADS = TILE_WARPS * WARP, SPLIT_BYTES = 64 << 20,
       AHEAD = 8 };
static_assert((int)SPLIT_ROWS + RUN_MOST <= 2 * (int)WARP, "a run ends within two warps of rows");

/* Rows [first, end) of the call, and what the kernels hand on: an entry a query (row - first, head)
 * and page of its slot. */
struct split {
    struct kern_attn a;
    int first, end;
    float *score, *value;                             /* [KERN_PAGE], [head_dim] of each entry */
    float *top, *sum, *size;                          /* size: the largest |score|, clean */
};
__device__ static inline size_t split_entry(const struct split *s, int row, int head, int page) {
    return ((size_t)(row - s->first) * (size_t)s->a.heads + (size_t)head) *
               (size_t)s->a.kv.slot_pages +
           (size_t)page;
}
__device__ static inline int split_keys(const struct split *s, int row) {
    return ((const int32_t *)s->a.pos.p)[row] + 1;
}

/* ---- runs of rows ---- */

/* What row r has as its slot's page; -1 where it sees none of it, and beyond the rows. */
__device__ static inline int split_page(const struct split *s, int r, int page) {
    if (r < s->first || r >= s->end || split_keys(s, r) <= page * KERN_PAGE) return -1;
    const int slot = ((const int32_t *)s->a.slots.p)[r];
    return ((const int32_t *)s->a.kv.table.p)[(size_t)slot * (size_t)s->a.kv.slot_pages +
                                              (size_t)page];
}

/* How many rows next before row r share its page; r shares it with the one before. */
__device__ static int split_before(const struct split *s, int r, int page) {
    for (int n = 0;; n += WARP) {
        const int row = r - n - (int)threadIdx.x % WARP, id = split_page(s, row, page);
        const unsigned joined = __ballot_sync(
            WARP_ALL, id >= 0 && id == split_page(s, row - 1, page));
        if (joined != WARP_ALL) return n + __ffs((int)~joined) - 1;
    }
}

/* Calls f(page id, tile) for this warp's share of the tiles of runs that begin in the block's rows:
 * blockIdx is page of the slot, kv head, rows. The whole warp calls, f included. */
template <class F> __device__ static inline void split_each(const struct split *s, F f) {
    const int page = (int)blockIdx.x, h = (int)blockIdx.y, lane = (int)threadIdx.x % WARP,
              row = s->first + (int)blockIdx.z * SPLIT_ROWS,
              head = kv_first(h, s->a.heads, s->a.kv.kv_heads),
              group = kv_first(h + 1, s->a.heads, s->a.kv.kv_heads) - head;
    const int near = split_page(s, row + lane, page);
    const unsigned seen = __ballot_sync(WARP_ALL, near >= 0);
    if (!(seen & ((1u << SPLIT_ROWS) - 1))) return;
    const int far = split_page(s, row + WARP + lane, page),
              last = __shfl_sync(WARP_ALL, near, WARP - 1),
              near_up = __shfl_up_sync(WARP_ALL, near, 1),
              far_up = __shfl_up_sync(WARP_ALL, far, 1),
              near_old = lane ? near_up : split_page(s, row - 1, page),
              far_old = lane ? far_up : last;
    const uint64_t joined =
        (uint64_t)__ballot_sync(WARP_ALL, far >= 0 && far == far_old) << WARP |
        __ballot_sync(WARP_ALL, near >= 0 && near == near_old);
    int item = 0, before = joined & 1 ? split_before(s, row, page) - 1 : 0;
    for (int x = 0; x < SPLIT_ROWS; x++) {
        before = joined >> x & 1 ? before + 1 : 0;
        if (!(seen >> x & 1) || before % RUN_MOST) continue;
        const int rows = min(RUN_MOST, __ffsll((long long)~(joined >> (x + 1)))),
                  queries = rows * group, id = __shfl_sync(WARP_ALL, near, x);
        for (int from = 0; from < queries; from += TILE, item++) {
            const struct tile t = { row + x, head, group, from, min((int)TILE, queries - from) };
            if (item % ((int)blockDim.x / WARP) == (int)threadIdx.x / WARP) f(id, &t);
        }
    }
}

/* ---- scores ---- */

/* Clean scores, a page's largest, and where the noise asks for it its largest |score|. */
template <bool BF16>
__global__ static void __launch_bounds__(SPLIT_THREADS, 2) split_scores_kernel(struct split s) {
    DYN_SHARED(float, shared);
    const int dim = s.a.kv.head_dim, page = (int)blockIdx.x, lane = (int)threadIdx.x % WARP;
    float *score = shared + (int)threadIdx.x / WARP * TILE * (tile_ld(dim) + KERN_PAGE),
          *q = score + TILE * KERN_PAGE;
    split_each(&s, [&](int id, const struct tile *t) {
        float sum[TILE];
        tile_queries(q, &s.a, t);
        __syncwarp();
        tile_scores<BF16>(sum, q, dim,
                          pairs_at<BF16>(&s.a.kv, cuda_kv_in_page(&s.a.kv, s.a.layer, id,
                                                                  (int)blockIdx.y, 0)));
#pragma unroll
        for (int x = 0; x < TILE; x++) score[x * KERN_PAGE + lane] = sum[x];
#pragma unroll 1
        for (int x = 0; x < t->n; x++) {
            const size_t at = split_entry(&s, tile_row(t, x), tile_head(t, x), page);
            const bool sees = page * KERN_PAGE + lane < split_keys(&s, tile_row(t, x));
            const float v = sees ? score[x * KERN_PAGE + lane] * s.a.scale : 0.0f,
                        top = warp_most(sees ? larger(v, -INFINITY) : -INFINITY);
            s.score[at * KERN_PAGE + (size_t)lane] = v;
            if (lane == 0) s.top[at] = top;
            if (!s.size) continue;
            const float size = warp_most(larger(fabsf(v), 0.0f));
            if (lane == 0) s.size[at] = size;
        }
        __syncwarp();
    });
}

/* ---- noise on them ---- */

/* Largest of the query's first `pages` entries, for every lane. */
__device__ static inline float split_most(const float *of, int pages, float least) {
    for (int j = (int)threadIdx.x % WARP; j < pages; j += WARP) least = larger(of[j], least);
    return warp_most(least);
}
__device__ static inline int split_pages(int keys) { return (keys + KERN_PAGE - 1) / KERN_PAGE; }
__device__ static inline float split_edge(const struct split *s, const struct kern_noise *n,
                                          size_t first, int pages) {
    return kern_noise_edge(n, s->size ? split_most(s->size + first, pages, 0.0f) : 0.0f);
}

/* Adds it, and makes the pages' largest scores again: a block a query and 32 of its pages. */
__global__ static void __launch_bounds__(SPLIT_THREADS, 2)
    split_noise_kernel(struct split s, struct kern_noise noise) {
    const int row = s.first + (int)blockIdx.x / s.a.heads, head = (int)blockIdx.x % s.a.heads,
              keys = split_keys(&s, row), pages = split_pages(keys), begin = (int)blockIdx.y * WARP,
              lane = (int)threadIdx.x % WARP;
    const size_t first = split_entry(&s, row, head, 0);
    struct noise_tally tally = {};
    if (begin >= pages) return;
    const float edge = split_edge(&s, &noise, first, pages);
    for (int page = begin + (int)threadIdx.x / WARP; page < pages && page < begin + WARP;
         page += TILE_WARPS) {
        const int key = page * KERN_PAGE + lane;
        float *at = s.score + (first + (size_t)page) * KERN_PAGE + lane;
        const float v = noise_page(&noise, row, head, edge, *at, key, key < keys, &tally),
                    top = warp_most(key < keys ? larger(v, -INFINITY) : -INFINITY);
        *at = v;
        if (lane == 0) s.top[first + (size_t)page] = top;
    }
    noise_take(&noise, &tally);
}

/* ---- values ---- */

/* A warp's probabilities, and of each query how many keys it sees and its entry. */
struct split_probs { float p[TILE * KERN_PAGE]; int seen[TILE]; size_t entry[TILE]; };

/* Probabilities of query x of the tile against the page, their sum; returns how many keys the
 * query sees. */
template <bool NOISY>
__device__ static inline int split_probs_of(const struct split *s, const struct kern_noise *noise,
                                            const struct tile *t, int x, struct split_probs *to,
                                            struct noise_tally *tally) {
    const int page = (int)blockIdx.x, lane = (int)threadIdx.x % WARP, row = tile_row(t, x),
              head = tile_head(t, x), keys = split_keys(s, row), key = page * KERN_PAGE + lane;
    const size_t first = split_entry(s, row, head, 0), at = first + (size_t)page;
    /* p of the row's maximum is 1: the final one where a type asks for it */
    const bool final = NOISY && !kern_noise_relative(noise);
    const float m = split_most(s->top + first, final ? split_pages(keys) : page + 1, -INFINITY);
    float p = key < keys ? kern_expf(s->score[at * KERN_PAGE + (size_t)lane] - m) : 0.0f;
    if (NOISY)
        p = above_zero(noise_page(noise, row, head, kern_noise_edge(noise, 1.0f), p, key,
                                  key < keys, tally));
    const float sum = warp_sum(p);
    const int seen = min((int)KERN_PAGE, keys - page * KERN_PAGE);
    to->p[x * KERN_PAGE + lane] = cuda_round(p, s->a.kv.type == KERN_BF16);
    if (lane) return seen;
    s->sum[at] = sum;
    to->seen[x] = seen;
    to->entry[x] = at;
    return seen;
}

template <bool BF16, bool NOISY>
__global__ static void __launch_bounds__(SPLIT_THREADS, NOISY ? 1 : 2)   /* no register spilled */
    split_values_kernel(struct split s, struct kern_noise noise) {
    __shared__ struct split_probs probs[TILE_WARPS];
    const int dim = s.a.kv.head_dim, lane = (int)threadIdx.x % WARP;
    struct split_probs *own = probs + (int)threadIdx.x / WARP;
    struct noise_tally tally = {};
    split_each(&s, [&](int id, const struct tile *t) {
        const kv_pair<BF16> *values = pairs_at<BF16>(
            &s.a.kv, cuda_kv_in_page(&s.a.kv, s.a.layer, id, (int)blockIdx.y, 1));
        int least = KERN_PAGE, most = 0;
        for (int x = 0; x < TILE; x++) own->p[x * KERN_PAGE + lane] = 0.0f;
#pragma unroll 1
        for (int x = 0; x < t->n; x++) {
            const int seen = split_probs_of<NOISY>(&s, &noise, t, x, own, &tally);
            least = min(least, seen), most = max(most, seen);
        }
        __syncwarp();
#pragma unroll 1
        for (int i = lane; i < dim + lane; i += WARP) {
            float sum[TILE];
            if (least == most)
                tile_values<BF16, true>(sum, own->p, own->seen, most, dim, values, i);
            else tile_values<BF16, false>(sum, own->p, own->seen, most, dim, values, i);
#pragma unroll
            for (int x = 0; x < TILE; x++)
                if (x < t->n && i < dim) s.value[own->entry[x] * (size_t)dim + (size_t)i] = sum[x];
        }
        __syncwarp();
    });
    if (NOISY) noise_take(&noise, &tally);
}

/* ---- walk ---- */

/* Largest of this lane's value and those of the lanes below. No value may be NaN. */
__device__ static inline float warp_most_below(float v) {
    for (int by = 1; by < WARP; by *= 2) {
        const float below = __shfl_up_sync(WARP_ALL, v, (unsigned)by);
        if ((int)threadIdx.x % WARP >= by) v = larger(below, v);
    }
    return v;
}

/* Up to 32 pages from entry `at`, for this lane's element of o; m and l of what came before and,
 * on return, after them. */
__device__ static inline float split_walk(const struct split *s, size_t at, int n, int i, float o,
                                          float *m, float *l) {
    const int lane = (int)threadIdx.x % WARP, dim = s->a.kv.head_dim;
    const float most = larger(warp_most_below(lane < n ? s->top[at + (size_t)lane] : -INFINITY),
                              *m),
                up = __shfl_up_sync(WARP_ALL, most, 1),
                fix = kern_expf((lane ? up : *m) - most),
                sum = lane < n ? s->sum[at + (size_t)lane] : 0.0f;
    const float *value = s->value + at * (size_t)dim + (size_t)i;
    for (int from = 0; from < n; from += AHEAD) {
        float v[AHEAD];
#pragma unroll
        for (int u = 0; u < AHEAD; u++)
            v[u] = from + u < n && i < dim ? value[(size_t)(from + u) * (size_t)dim] : 0.0f;
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            if (from + u >= n) break;
            const float f = __shfl_sync(WARP_ALL, fix, from + u);
            *l = fmaf(*l, f, __shfl_sync(WARP_ALL, sum, from + u));
            o *= f;
            if (fabsf(o) < 0x1p-126f) o = 0.0f;
            o = add_ftz(o, v[u]);
        }
    }
    *m = __shfl_sync(WARP_ALL, most, WARP - 1);
    return o;
}

/* A warp a query and 32 elements of o. final: m begins as the row's final maximum. */
__global__ static void __launch_bounds__(SPLIT_THREADS, 2)
    split_walk_kernel(struct split s, struct kern_noise scores, bool final) {
    const int dim = s.a.kv.head_dim, parts = (dim + WARP - 1) / WARP,
              lane = (int)threadIdx.x % WARP,
              part = (int)(blockIdx.x * TILE_WARPS + threadIdx.x / WARP), query = part / parts,
              i = part % parts * WARP + lane, row = s.first + query / s.a.heads;
    if (row >= s.end) return;
    const int pages = split_pages(split_keys(&s, row));
    const size_t first = (size_t)query * (size_t)s.a.kv.slot_pages,
                 to = (size_t)s.first * (size_t)s.a.heads + (size_t)query;
    float l = 0.0f, o = 0.0f, m = final ? split_most(s.top + first, pages, -INFINITY) : -INFINITY;
    for (int page = 0; page < pages; page += WARP)
        o = split_walk(&s, first + (size_t)page, min((int)WARP, pages - page), i, o, &m, &l);
    const float inv = 1.0f / l;
    if (i < dim) cuda_put(s.a.y, s.a.y_type, to * (size_t)dim + (size_t)i, o * inv);
    if (part % parts) return;
    if (s.a.lse.p && lane == 0) ((float *)s.a.lse.p)[to] = m + kern_logf(l);
    if (!s.a.peaks.p) return;
    const float edge = split_edge(&s, &scores, first, pages);
    if (lane) return;
    ((float *)s.a.peaks.p)[2 * to] = edge;
    ((float *)s.a.peaks.p)[2 * to + 1] = m;
}

/* ---- launch ---- */

template <bool BF16>
static void split_pages_launch(struct kern *k, const struct split *s,
                               const struct kern_attn_noise *noise) {
    const size_t bytes = TILE * (size_t)(tile_ld(s->a.kv.head_dim) + KERN_PAGE) * sizeof(float);
    const unsigned rows = (unsigned)(s->end - s->first), warps = tile_warps(bytes);
    const dim3 grid((unsigned)s->a.kv.slot_pages, (unsigned)s->a.kv.kv_heads,
                    cuda_blocks(rows, SPLIT_ROWS)),
        queries(rows * (unsigned)s->a.heads, cuda_blocks((size_t)s->a.kv.slot_pages, WARP));
    LAUNCH(split_scores_kernel<BF16>, grid, warps * WARP, warps * bytes, cuda_stream(k), *s);
    CUDA_TRY(k, "attn", cudaGetLastError());
    if (noise->scores.type != KERN_NOISE_OFF) {
        LAUNCH(split_noise_kernel, queries, SPLIT_THREADS, 0, cuda_stream(k), *s, noise->scores);
        CUDA_TRY(k, "attn", cudaGetLastError());
    }
    if (noise->probs.type != KERN_NOISE_OFF)
        LAUNCH((split_values_kernel<BF16, true>), grid, SPLIT_THREADS, 0, cuda_stream(k), *s,
               noise->probs);
    else
        LAUNCH((split_values_kernel<BF16, false>), grid, SPLIT_THREADS, 0, cuda_stream(k), *s,
               noise->probs);
    CUDA_TRY(k, "attn", cudaGetLastError());
}

static void split_launch(struct kern *k, const struct split *s,
                         const struct kern_attn_noise *noise) {
    const size_t parts = (size_t)(s->end - s->first) * (size_t)s->a.heads *
                         (((size_t)s->a.kv.head_dim + WARP - 1) / WARP);
    const bool final = s->a.noise && !kern_noise_relative(&noise->probs);
    if (s->a.kv.type == KERN_BF16) split_pages_launch<true>(k, s, noise);
    else split_pages_launch<false>(k, s, noise);
    LAUNCH(split_walk_kernel, cuda_blocks(parts, TILE_WARPS), SPLIT_THREADS, 0, cuda_stream(k), *s,
           noise->scores, final);
    CUDA_TRY(k, "attn", cudaGetLastError());
}

void cuda_attn_split(struct kern *k, const struct kern_attn *a) {
    const struct kern_attn_noise noise = a->noise ? *a->noise : kern_attn_noise();
    const size_t row = (size_t)a->heads * (size_t)a->kv.slot_pages,
                 entry = (size_t)(KERN_PAGE + a->kv.head_dim + 3),
                 most = SPLIT_BYTES / (row * entry * sizeof(float)), rows = (size_t)a->rows,
                 calls = most ? (rows + most - 1) / most : rows, each = (rows + calls - 1) / calls;
    float *at = (float *)cuda_scratch(k, "attn", each * row * entry * sizeof(float));
    if (!at) return;
    for (size_t first = 0; first < rows; first += each) {
        struct split s = { *a, (int)first, (int)(first + each < rows ? first + each : rows), at,
                           at + each * row * KERN_PAGE, NULL, NULL, NULL };
        s.top = s.value + each * row * (size_t)a->kv.head_dim;
        s.sum = s.top + each * row;
        if (noise.scores.type == KERN_NOISE_DEADZONE) s.size = s.sum + each * row;
        if (!a->noise) s.a.peaks.p = NULL;
        split_launch(k, &s, &noise);
    }
}
