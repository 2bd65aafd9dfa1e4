/* linear_mma.cu - linear, linear_t and outer on tensor cores: the table cuda-mma.
 *
 * Knows: mma_tile.h's order of sums, which decoding and training share: so a row has one result,
 * whatever rows come with it and whichever of the kernels below took it. Operands that the
 * instruction does not take (f32, not rounded) go to linear.cu, by the operation's types alone.
 * Does not know: the CPU's bits. Order: few rows, many rows, linear_t, outer.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cuda/linears.h"
#include "kernels/cuda/mma_tile.h"

/* Activations of bf16: rows of a linear's x or u. */
struct lines { const uint16_t *p; size_t ld; int rows, in; bool aligned; };
__device__ static struct lines lines_of(kptr p, int ld, int rows, int in) {
    const struct lines x = { (const uint16_t *)p.p, (size_t)ld, rows, in,
                             line_aligned(p.p, ld, sizeof(uint16_t)) };
    return x;
}
__device__ static inline struct mma_line lines_get(const struct lines *x, int row, int k) {
    return line_bf16(x->p + (size_t)row * x->ld, k, row < x->rows ? x->in : 0, x->aligned);
}
/* Output of row i of A, which is element i of a lane's c where c's rows are outputs of a panel. */
__device__ static inline int panel_output(int lane, int i) { return lane / 4 * 2 + i / 2; }
__device__ static inline int tile_column(int lane, int i) { return lane % 4 * 2 + i % 2; }

/* ---- few rows: a panel a thread block, a chunk of k a warp ---- */

/* FEW_BLOCKS: of an SM, whose registers suffice for so many */
enum { FEW_WARPS = 8, FEW_THREADS = 32 * FEW_WARPS, FEW_BLOCKS = 3 };
template <int TILES> struct few_sums { float of[FEW_WARPS][TILES * MMA_N][KERN_OUT_BLOCK]; };

template <int TILES, enum kern_format FORMAT>
__device__ static __forceinline__ void few_blocks(float c[TILES][4], const struct lines *x,
                                                  const struct kern_weight *w, int panel,
                                                  int block, int end) {
    const int lane = (int)threadIdx.x % 32;
#pragma unroll 2
    for (; block < end; block++) {
        struct mma_line low, high;
        line_outputs<FORMAT>(&low, &high, record_of(w, panel, block), lane);
        for (int n = 0; n < TILES; n++)
            mma_block(c[n], low, high,
                      lines_get(x, n * MMA_N + lane / 4,
                                block * MMA_K + lane % 4 * MMA_LANE_K));
    }
}
/* Leaves in s->of[slot] what the blocks from `block` to `end` give. */
template <int TILES>
__device__ static __forceinline__ void few_chunk(struct few_sums<TILES> *s, int slot,
                                                 const struct lines *x,
                                                 const struct kern_weight *w, int panel,
                                                 int block, int end) {
    const int lane = (int)threadIdx.x % 32;
    float c[TILES][4] = { };
    if (w->format == KERN_FORMAT_BF16)
        few_blocks<TILES, KERN_FORMAT_BF16>(c, x, w, panel, block, end);
    else if (w->format == KERN_FORMAT_MXFP4)
        few_blocks<TILES, KERN_FORMAT_MXFP4>(c, x, w, panel, block, end);
    else
        few_blocks<TILES, KERN_FORMAT_NVFP4>(c, x, w, panel, block, end);
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            s->of[slot][n * MMA_N + tile_column(lane, i)][panel_output(lane, i)] = c[n][i];
}

template <int TILES>
__global__ void __launch_bounds__(FEW_THREADS, FEW_BLOCKS) linear_mma_few(struct linears all) {
    __shared__ struct few_sums<TILES> s;
    const struct kern_linear &a = all.of[blockIdx.y];
    const int panel = (int)blockIdx.x, t = (int)threadIdx.x, warp = t / 32,
              r = t / KERN_OUT_BLOCK, j = t % KERN_OUT_BLOCK, o = panel * KERN_OUT_BLOCK + j;
    const bool mine = r < TILES * MMA_N;
    if (panel >= record_panels(&a.w)) return;
    const struct lines x = lines_of(a.x, a.x_ld, a.rows, a.w.in),
                       u = lines_of(a.u, a.u_ld, a.rows, a.b.in);
    const int blocks = record_blocks(&a.w);
    float sum = 0.0f;
    for (int from = 0; from < blocks; from += FEW_WARPS * MMA_CHUNK_BLOCKS) {
        const int at = from + warp * MMA_CHUNK_BLOCKS;
        if (at < blocks)
            few_chunk<TILES>(&s, warp, &x, &a.w, panel, at, min(at + MMA_CHUNK_BLOCKS, blocks));
        __syncthreads();
        for (int i = 0; mine && i < FEW_WARPS && from + i * MMA_CHUNK_BLOCKS < blocks; i++)
            sum += s.of[i][r][j];
        __syncthreads();
    }
    if (a.b.out && warp == 0) few_chunk<TILES>(&s, 0, &u, &a.b, panel, 0, record_blocks(&a.b));
    __syncthreads();
    if (!mine || r >= a.rows || o >= a.w.out) return;
    const float y = linear_value(&a, sum, r, o);
    linear_put(&a, a.b.out ? y + s.of[0][r][j] : y, r, o);
}

/* ---- many rows ---- */

/* Onto c: the staged chunk that begins at block `from` of the weight's inputs. */
__device__ static __forceinline__ void outputs_blocks(float c[MMA_PARTS][MMA_TILES][4],
                                                      const struct mma_stage *s,
                                                      const struct kern_weight *w, int panel,
                                                      int from, int tiles) {
    const int lane = (int)threadIdx.x % 32, blocks = min((int)MMA_CHUNK_BLOCKS,
                                                         record_blocks(w) - from);
    const int last = record_panels(w) - 1;            /* beyond it results are not kept */
#define OUTPUTS(FORMAT)                                                                      \
    tile_blocks(c, s, blocks, tiles, [=](int p, int b, mma_line *low, mma_line *high) {      \
        line_outputs<FORMAT>(low, high, record_of(w, min(panel + p, last), from + b), lane); \
    })
    if (w->format == KERN_FORMAT_BF16) OUTPUTS(KERN_FORMAT_BF16);
    else if (w->format == KERN_FORMAT_MXFP4) OUTPUTS(KERN_FORMAT_MXFP4);
    else OUTPUTS(KERN_FORMAT_NVFP4);
#undef OUTPUTS
}
__device__ static __forceinline__ void tile_clear(float c[MMA_PARTS][MMA_TILES][4]) {
#pragma unroll
    for (int e = 0; e < MMA_PARTS * MMA_TILES * 4; e++) c[e / 32][e / 4 % 8][e % 4] = 0.0f;
}
__device__ static void stage_lines(struct mma_stage *s, const struct lines *x, int row0, int k0) {
    __syncthreads();
    stage_fill(s, [=](int row, int k) { return lines_get(x, row0 + row, k0 + k); });
    __syncthreads();
}

__global__ static void __launch_bounds__(MMA_THREADS, MMA_OF_SM)
    linear_mma_tiles(struct linears all) {
    __shared__ struct mma_stage s;
    const struct kern_linear &a = all.of[blockIdx.z];
    const int lane = (int)threadIdx.x % 32, row0 = (int)blockIdx.y * MMA_COLUMNS,
              panel = (int)blockIdx.x * MMA_DEEP + (int)threadIdx.x / 32 * MMA_PARTS;
    if (row0 >= a.rows || (int)blockIdx.x * MMA_DEEP >= record_panels(&a.w)) return;
    const int tiles = (min(a.rows - row0, (int)MMA_COLUMNS) + MMA_N - 1) / MMA_N;
    const struct kern_weight w = a.w, b = a.b;
    const struct lines x = lines_of(a.x, a.x_ld, a.rows, w.in),
                       u = lines_of(a.u, a.u_ld, a.rows, b.in);
    float sum[MMA_PARTS][MMA_TILES][4] = { }, c[MMA_PARTS][MMA_TILES][4] = { };
    for (int from = 0; from < record_blocks(&w); from += MMA_CHUNK_BLOCKS) {
        stage_lines(&s, &x, row0, from * MMA_K);
        tile_clear(c);
        outputs_blocks(c, &s, &w, panel, from, tiles);
        tile_add(sum, c);
    }
    tile_clear(c);
    for (int from = 0; b.out && from < record_blocks(&b); from += MMA_CHUNK_BLOCKS) {
        stage_lines(&s, &u, row0, from * MMA_K);
        outputs_blocks(c, &s, &b, panel, from, tiles);
    }
#pragma unroll
    for (int e = 0; e < MMA_PARTS * MMA_TILES * 4; e++) {
        const int p = e / 32, n = e / 4 % 8, i = e % 4,
                  r = row0 + n * MMA_N + tile_column(lane, i),
                  o = (panel + p) * KERN_OUT_BLOCK + panel_output(lane, i);
        if (r >= a.rows || o >= w.out) continue;
        const float y = linear_value(&a, sum[p][n][i], r, o);
        linear_put(&a, b.out ? y + c[p][n][i] : y, r, o);
    }
}

static unsigned parts(int n, int of) { return (unsigned)((n + of - 1) / of); }

static void linear_run(struct kern *k, const struct linears *all) {
    const unsigned panels = parts(all->outs, KERN_OUT_BLOCK);
    if (all->rows <= MMA_N)
        LAUNCH((linear_mma_few<1>), dim3(panels, (unsigned)all->n), FEW_THREADS, 0,
               cuda_stream(k), *all);
    else if (all->rows <= LINEAR_FEW)
        LAUNCH((linear_mma_few<LINEAR_FEW / MMA_N>), dim3(panels, (unsigned)all->n), FEW_THREADS,
               0, cuda_stream(k), *all);
    else
        LAUNCH(linear_mma_tiles,
               dim3(parts((int)panels, MMA_DEEP), parts(all->rows, MMA_COLUMNS), (unsigned)all->n),
               MMA_THREADS, 0, cuda_stream(k), *all);
    CUDA_TRY(k, "linear", cudaGetLastError());
}
void cuda_mma_linear(struct kern *k, const struct kern_linear *a, int n) {
    struct linears all = { };
    for (int i = 0; i < n; i++) {
        if (!linear_takes_mma(&a[i])) {
            cuda_linear(k, &a[i], 1);
            continue;
        }
        all.of[all.n++] = a[i];
        all.rows = max(all.rows, a[i].rows);
        all.outs = max(all.outs, a[i].w.out);
    }
    if (all.rows && all.outs) linear_run(k, &all);
}

/* ---- linear_t: A is the weight turned over, a warp has the 32 inputs of a record ---- */

/* The staged chunk begins at panel `from`; k runs over two panels a block. */
__device__ static __forceinline__ void inputs_blocks(float c[MMA_PARTS][MMA_TILES][4],
                                                     const struct mma_stage *s,
                                                     const struct kern_weight *w, int column,
                                                     int from, int tiles) {
    const int lane = (int)threadIdx.x % 32, panels = record_panels(w),
              blocks = min((int)MMA_CHUNK_BLOCKS, (panels - from + 1) / 2);
    const int upper = lane % 4 / 2, first = lane % 2 * MMA_LANE_K, i = lane / 4;
    const int there = min(column, record_blocks(w) - 1);   /* beyond it results are not kept */
#define INPUTS(FORMAT)                                                                        \
    tile_blocks(c, s, blocks, tiles, [=](int p, int b, mma_line *low, mma_line *high) {       \
        const int panel = from + 2 * b + upper;                                               \
        *low = *high = { };                                                                   \
        if (panel < panels)                                                                   \
            line_inputs<FORMAT>(low, high, record_of(w, panel, there), p * MMA_M + i, first); \
    })
    if (w->format == KERN_FORMAT_BF16) INPUTS(KERN_FORMAT_BF16);
    else if (w->format == KERN_FORMAT_MXFP4) INPUTS(KERN_FORMAT_MXFP4);
    else INPUTS(KERN_FORMAT_NVFP4);
#undef INPUTS
}
static_assert(MMA_PARTS * MMA_M == KERN_IN_BLOCK, "a warp has a record's inputs");

__global__ static void __launch_bounds__(MMA_THREADS, MMA_OF_SM)
    linear_t_mma(struct kern_linear_t a) {
    __shared__ struct mma_stage s;
    const int lane = (int)threadIdx.x % 32, row0 = (int)blockIdx.y * MMA_COLUMNS,
              column = (int)blockIdx.x * MMA_WARPS + (int)threadIdx.x / 32;
    const int tiles = (min(a.rows - row0, (int)MMA_COLUMNS) + MMA_N - 1) / MMA_N;
    const bool aligned = line_aligned(a.dy.p, a.dy_ld, sizeof(float));
    const float scale = a.scale * a.w.scale;
    float sum[MMA_PARTS][MMA_TILES][4] = { }, c[MMA_PARTS][MMA_TILES][4];
    for (int from = 0; from < a.w.out; from += MMA_CHUNK) {
        __syncthreads();
        stage_fill(&s, [=](int row, int k) {
            const float *dy = (const float *)a.dy.p + (size_t)(row0 + row) * (size_t)a.dy_ld;
            return line_f32(dy, from + k, row0 + row < a.rows ? a.w.out : 0, aligned);
        });
        __syncthreads();
        tile_clear(c);
        inputs_blocks(c, &s, &a.w, column, from / KERN_OUT_BLOCK, tiles);
        tile_add(sum, c);
    }
#pragma unroll
    for (int e = 0; e < MMA_PARTS * MMA_TILES * 4; e++) {
        const int p = e / 32, n = e / 4 % 8, i = e % 4,
                  r = row0 + n * MMA_N + tile_column(lane, i),
                  in = column * KERN_IN_BLOCK + p * MMA_M + lane / 4 + i / 2 * 8;
        if (r >= a.rows || in >= a.w.in) continue;
        float *dx = (float *)a.dx.p + (size_t)r * (size_t)a.dx_ld + in;
        *dx = a.accumulate ? *dx + sum[p][n][i] * scale : sum[p][n][i] * scale;
    }
}
void cuda_mma_linear_t(struct kern *k, const struct kern_linear_t *a) {
    if (!linear_t_takes_mma(a)) {
        cuda_linear_t(k, a);
        return;
    }
    if (!a->rows || !a->w.in) return;
    LAUNCH(linear_t_mma,
           dim3(parts(a->w.in, MMA_WARPS * KERN_IN_BLOCK), parts(a->rows, MMA_COLUMNS)),
           MMA_THREADS, 0, cuda_stream(k), *a);
    CUDA_TRY(k, "linear_t", cudaGetLastError());
}

/* ---- outer: 64 by 64 of g a thread block, 16 by 64 a warp, k runs over a sequence's rows ---- */

/* get(k, i): column first + i of the sequence's row; zeros beyond both ends. */
template <class GET>
__device__ static void stage_turned(struct mma_stage *s, int columns, int rows, GET get) {
    const int deep = min((rows + MMA_K - 1) / MMA_K * MMA_K, (int)MMA_CHUNK);
    for (int e = (int)threadIdx.x; e < MMA_COLUMNS * deep / 2; e += MMA_THREADS) {
        const int i = e % MMA_COLUMNS, k = e / MMA_COLUMNS * 2;
        const uint16_t none = 0, low = i < columns && k < rows ? get(k, i) : none,
                       high = i < columns && k + 1 < rows ? get(k + 1, i) : none;
        s->row[i][k / MMA_LANE_K].pair[k % MMA_LANE_K / 2] = bf16_pair(low, high);
    }
}
__device__ static void stage_outer(struct mma_stage *sa, struct mma_stage *sb,
                                   const struct kern_outer *o, int m0, int n0, int from, int end) {
    const float *a = (const float *)o->a.p + (size_t)from * (size_t)o->a_ld + m0, scale = o->scale;
    const uint16_t *b = (const uint16_t *)o->b.p + (size_t)from * (size_t)o->b_ld + n0;
    const size_t a_ld = (size_t)o->a_ld, b_ld = (size_t)o->b_ld;
    __syncthreads();
    stage_turned(sa, o->m - m0, end - from, [=](int k, int i) {
        return f32_to_bf16(scale * a[(size_t)k * a_ld + (size_t)i]);
    });
    stage_turned(sb, o->n - n0, end - from,
                 [=](int k, int i) { return b[(size_t)k * b_ld + (size_t)i]; });
    __syncthreads();
}

/* start: seq_start, on the device */
__global__ static void __launch_bounds__(MMA_THREADS) outer_mma(struct kern_outer o,
                                                                const int32_t *start) {
    __shared__ struct mma_stage sa, sb;
    const int lane = (int)threadIdx.x % 32, part = (int)threadIdx.x / 32 * MMA_M + lane / 4,
              m0 = (int)blockIdx.y * MMA_COLUMNS, n0 = (int)blockIdx.x * MMA_COLUMNS;
    float g[MMA_TILES][4] = { };
    const auto at = [=](int n, int i) {
        const int row = m0 + part + i / 2 * 8, column = n0 + n * MMA_N + tile_column(lane, i);
        return row < o.m && column < o.n
                   ? (float *)o.g.p + (size_t)row * (size_t)o.n + (size_t)column
                   : (float *)NULL;
    };
    for (int n = 0; n < MMA_TILES; n++)
        for (int i = 0; i < 4; i++)
            if (at(n, i)) g[n][i] = *at(n, i);
    for (int q = 0; q < o.seqs; q++) {
        float sum[MMA_TILES][4] = { };
        for (int from = start[q]; from < start[q + 1]; from += MMA_CHUNK) {
            float c[MMA_TILES][4] = { };
            const int left = start[q + 1] - from,
                      blocks = min((left + MMA_K - 1) / MMA_K, (int)MMA_CHUNK_BLOCKS);
            stage_outer(&sa, &sb, &o, m0, n0, from, start[q + 1]);
            for (int block = 0; block < blocks; block++) {
                const struct mma_line low = stage_line(&sa, part, block, lane),
                                      high = stage_line(&sa, part + 8, block, lane);
#pragma unroll
                for (int n = 0; n < MMA_TILES; n++)
                    mma_block(c[n], low, high, stage_line(&sb, n * MMA_N + lane / 4, block, lane));
            }
            for (int n = 0; n < MMA_TILES; n++)
                for (int i = 0; i < 4; i++) sum[n][i] += c[n][i];
        }
        for (int n = 0; n < MMA_TILES; n++)
            for (int i = 0; i < 4; i++) g[n][i] += sum[n][i];
    }
    for (int n = 0; n < MMA_TILES; n++)
        for (int i = 0; i < 4; i++)
            if (at(n, i)) *at(n, i) = g[n][i];
}
static_assert(MMA_COLUMNS == MMA_WARPS * MMA_M, "a stage's rows are those of the four warps");

void cuda_mma_outer(struct kern *k, const struct kern_outer *a) {
    if (!a->round || a->b_type != KERN_BF16) {
        cuda_outer(k, a);
        return;
    }
    if (!a->m || !a->n || !a->seqs) return;
    const int32_t *start = (const int32_t *)cuda_small(
        k, "outer", a->seq_start, ((size_t)a->seqs + 1) * sizeof *a->seq_start);
    if (!start) return;
    LAUNCH(outer_mma, dim3(parts(a->n, MMA_COLUMNS), parts(a->m, MMA_COLUMNS)), MMA_THREADS, 0,
           cuda_stream(k), *a, start);
    CUDA_TRY(k, "outer", cudaGetLastError());
}
