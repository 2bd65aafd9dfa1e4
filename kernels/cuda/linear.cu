/* linear.cu - products with packed weights on a device: linear, linear_t, outer.
 *
 * Knows: the tile order of kern.h, which is one thread's business for each output element: it keeps
 * an even and an odd chain over the 32 k that the block has staged, and its accumulator. A thread
 * block has 64 x 64 outputs, a thread 4 x 4 of them. Which thread owns an output changes no bit.
 * Does not know: tensor cores, whose order of sums is another (linear_mma.cu).
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cuda/linears.h"

enum { TILE = 64, TILE_K = KERN_IN_BLOCK, TILE_LD = TILE + 4, SIDE = 4, THREADS = 256 };
enum { PANELS = TILE / KERN_OUT_BLOCK, PANEL_THREADS = THREADS / PANELS };

/* Transposed, so that a thread's four rows, and its four columns, lie side by side. */
struct __align__(16) staged { float row[TILE_K][TILE_LD], col[TILE_K][TILE_LD]; };
struct place { int t, row, col, row0, col0; bool busy; };

__device__ static struct place place_of(int rows, int cols) {
    struct place p;
    p.t = (int)threadIdx.x;
    p.row0 = (int)blockIdx.y * TILE, p.col0 = (int)blockIdx.x * TILE;
    p.row = p.t / (TILE / SIDE) * SIDE, p.col = p.t % (TILE / SIDE) * SIDE;
    p.busy = p.row0 + p.row < rows && p.col0 + p.col < cols;
    return p;
}
static dim3 tiles_of(int rows, int cols, int deep) {
    return dim3((unsigned)((cols + TILE - 1) / TILE), (unsigned)((rows + TILE - 1) / TILE),
                (unsigned)deep);
}

/* One block of 32 k onto a thread's 16 accumulators. */
__device__ static void tile_block(float acc[SIDE][SIDE], const struct staged *s,
                                  const struct place *p) {
    float chain[2][SIDE][SIDE] = { };
#pragma unroll
    for (int k = 0; k < TILE_K; k++) {
        const float4 x = *(const float4 *)&s->row[k][p->row],
                     w = *(const float4 *)&s->col[k][p->col];
        const float xs[SIDE] = { x.x, x.y, x.z, x.w }, ws[SIDE] = { w.x, w.y, w.z, w.w };
        for (int i = 0; i < SIDE; i++)
            for (int j = 0; j < SIDE; j++)
                chain[k % 2][i][j] = fma_ftz(xs[i], ws[j], chain[k % 2][i][j]);
    }
    for (int i = 0; i < SIDE; i++)
        for (int j = 0; j < SIDE; j++)
            acc[i][j] = add_ftz(acc[i][j], add_ftz(chain[0][i][j], chain[1][i][j]));
}

/* A matrix of activations: an element counts as scale * stored, then rounded to bf16. */
struct source { kptr p; enum kern_type type; int ld; float scale; bool round; };
__device__ static float source_get(const struct source *s, int row, int col) {
    const float v = s->scale * cuda_get(s->p, s->type, (size_t)row * (size_t)s->ld + (size_t)col);
    return cuda_round(v, s->round);
}

/* Each of these fills to[k][i], zero beyond the ends; k and i count from `from` and `first`. */
/* element k of row i */
__device__ static void stage_rows(float to[TILE_K][TILE_LD], int t, const struct source *x,
                                  int first, int rows, int from, int cols) {
    for (int e = t; e < TILE * TILE_K; e += THREADS) {
        const int i = e / TILE_K, k = e % TILE_K;
        const bool in = first + i < rows && from + k < cols;
        to[k][i] = in ? source_get(x, first + i, from + k) : 0.0f;
    }
}
/* element i of row k */
__device__ static void stage_columns(float to[TILE_K][TILE_LD], int t, const struct source *x,
                                     int first, int cols, int from, int rows) {
    for (int e = t; e < TILE * TILE_K; e += THREADS) {
        const int i = e % TILE, k = e / TILE;
        const bool in = first + i < cols && from + k < rows;
        to[k][i] = in ? source_get(x, from + k, first + i) : 0.0f;
    }
}
/* A thread's eight outputs of one input; zeros where the weight has no such record. */
__device__ static void weight_values(float v[8], const struct kern_weight *w, int panel, int block,
                                     int k, int first) {
    float scale[8];
    for (int j = 0; j < 8; j++) v[j] = 0.0f;
    if (panel >= record_panels(w) || block >= record_blocks(w)) return;
    const uint8_t *record = record_of(w, panel, block);
    record_scales<8>(scale, record, w->format, k, first);
    record_values<8>(v, record, w->format, k, first, scale);
}
/* input k of output i */
__device__ static void stage_outputs(float to[TILE_K][TILE_LD], int t, const struct kern_weight *w,
                                     int first, int from) {
    const int local = t / PANEL_THREADS, k = t % PANEL_THREADS / 2, lane = t % 2 * 8;
    float v[8];
    weight_values(v, w, first / KERN_OUT_BLOCK + local, from / KERN_IN_BLOCK, k, lane);
    for (int j = 0; j < 8; j++) to[k][local * KERN_OUT_BLOCK + lane + j] = v[j];
}
/* input i of output k: two panels, two records of each */
__device__ static void stage_inputs(float to[TILE_K][TILE_LD], int t, const struct kern_weight *w,
                                    int first, int from) {
    const int lower = t / PANEL_THREADS % 2, right = t / PANEL_THREADS / 2,
              i = t % PANEL_THREADS / 2, lane = t % 2 * 8;
    float v[8];
    weight_values(v, w, from / KERN_OUT_BLOCK + lower, first / KERN_IN_BLOCK + right, i, lane);
    for (int j = 0; j < 8; j++)
        to[lower * KERN_OUT_BLOCK + lane + j][right * KERN_IN_BLOCK + i] = v[j];
}

__device__ static void linear_product(float acc[SIDE][SIDE], struct staged *s,
                                      const struct place *p, const struct source *x, int rows,
                                      const struct kern_weight *w) {
    for (int i = 0; i < SIDE; i++)
        for (int j = 0; j < SIDE; j++) acc[i][j] = 0.0f;
    for (int from = 0; from < w->in; from += TILE_K) {
        __syncthreads();
        stage_rows(s->row, p->t, x, p->row0, rows, from, w->in);
        stage_outputs(s->col, p->t, w, p->col0, from);
        __syncthreads();
        if (p->busy) tile_block(acc, s, p);
    }
}

__global__ static void __launch_bounds__(THREADS) linear_tiles(struct linears all) {
    __shared__ struct staged s;
    const struct kern_linear &a = all.of[blockIdx.z];
    const struct place p = place_of(a.rows, a.w.out);
    if (p.row0 >= a.rows || p.col0 >= a.w.out) return;
    const struct source x = { a.x, a.x_type, a.x_ld, 1.0f, false },
                        u = { a.u, a.x_type, a.u_ld, 1.0f, false };
    float v[SIDE][SIDE], more[SIDE][SIDE];
    linear_product(v, &s, &p, &x, a.rows, &a.w);
    if (a.b.out) linear_product(more, &s, &p, &u, a.rows, &a.b);
    for (int i = 0; i < SIDE; i++)
        for (int j = 0; j < SIDE; j++) {
            const int r = p.row0 + p.row + i, o = p.col0 + p.col + j;
            if (r >= a.rows || o >= a.w.out) continue;
            const float y = linear_value(&a, v[i][j], r, o);
            linear_put(&a, a.b.out ? y + more[i][j] : y, r, o);
        }
}
void cuda_linear(struct kern *k, const struct kern_linear *a, int n) {
    struct linears all = { };
    all.n = n;
    for (int i = 0; i < n; i++) {
        all.of[i] = a[i];
        all.rows = a[i].rows > all.rows ? a[i].rows : all.rows;
        all.outs = a[i].w.out > all.outs ? a[i].w.out : all.outs;
    }
    if (!all.rows) return;
    if (all.rows <= LINEAR_FEW) {
        cuda_linear_few(k, &all);
        return;
    }
    LAUNCH(linear_tiles, tiles_of(all.rows, all.outs, n), THREADS, 0, cuda_stream(k), all);
    CUDA_TRY(k, "linear", cudaGetLastError());
}

__global__ static void __launch_bounds__(THREADS) linear_t_tiles(struct kern_linear_t a) {
    __shared__ struct staged s;
    const struct place p = place_of(a.rows, a.w.in);
    const struct source dy = { a.dy, KERN_F32, a.dy_ld, 1.0f, a.round };
    const float scale = a.scale * a.w.scale;
    float acc[SIDE][SIDE] = { };
    for (int from = 0; from < a.w.out; from += TILE_K) {
        __syncthreads();
        stage_rows(s.row, p.t, &dy, p.row0, a.rows, from, a.w.out);
        stage_inputs(s.col, p.t, &a.w, p.col0, from);
        __syncthreads();
        if (p.busy) tile_block(acc, &s, &p);
    }
    for (int i = 0; i < SIDE; i++)
        for (int j = 0; j < SIDE; j++) {
            const int r = p.row0 + p.row + i, c = p.col0 + p.col + j;
            if (r >= a.rows || c >= a.w.in) continue;
            float *dx = (float *)a.dx.p + (size_t)r * (size_t)a.dx_ld + c;
            *dx = a.accumulate ? *dx + acc[i][j] * scale : acc[i][j] * scale;
        }
}
void cuda_linear_t(struct kern *k, const struct kern_linear_t *a) {
    if (!a->rows) return;
    LAUNCH(linear_t_tiles, tiles_of(a->rows, a->w.in, 1), THREADS, 0, cuda_stream(k), *a);
    CUDA_TRY(k, "linear_t", cudaGetLastError());
}

__device__ static size_t outer_at(const struct kern_outer *o, const struct place *p, int i,
                                  int j) {
    return (size_t)(p->row0 + p->row + i) * (size_t)o->n + (size_t)(p->col0 + p->col + j);
}
/* start: seq_start, on the device. g's tile stays in registers over all sequences. */
__global__ static void __launch_bounds__(THREADS) outer_tiles(struct kern_outer o,
                                                              const int32_t *start) {
    __shared__ struct staged s;
    const struct place p = place_of(o.m, o.n);
    const struct source a = { o.a, KERN_F32, o.a_ld, o.scale, o.round },
                        b = { o.b, o.b_type, o.b_ld, 1.0f, false };
    float g[SIDE][SIDE] = { };
    for (int i = 0; i < SIDE; i++)
        for (int j = 0; j < SIDE; j++)
            if (p.row0 + p.row + i < o.m && p.col0 + p.col + j < o.n)
                g[i][j] = ((const float *)o.g.p)[outer_at(&o, &p, i, j)];
    for (int q = 0; q < o.seqs; q++) {
        float acc[SIDE][SIDE] = { };
        for (int from = start[q]; from < start[q + 1]; from += TILE_K) {
            __syncthreads();
            stage_columns(s.row, p.t, &a, p.row0, o.m, from, start[q + 1]);
            stage_columns(s.col, p.t, &b, p.col0, o.n, from, start[q + 1]);
            __syncthreads();
            if (p.busy) tile_block(acc, &s, &p);
        }
        for (int i = 0; i < SIDE; i++)
            for (int j = 0; j < SIDE; j++) g[i][j] += acc[i][j];
    }
    for (int i = 0; i < SIDE; i++)
        for (int j = 0; j < SIDE; j++)
            if (p.row0 + p.row + i < o.m && p.col0 + p.col + j < o.n)
                ((float *)o.g.p)[outer_at(&o, &p, i, j)] = g[i][j];
}
void cuda_outer(struct kern *k, const struct kern_outer *a) {
    if (!a->m || !a->n || !a->seqs) return;
    const int32_t *start = (const int32_t *)cuda_small(
        k, "outer", a->seq_start, ((size_t)a->seqs + 1) * sizeof *a->seq_start);
    if (!start) return;
    LAUNCH(outer_tiles, tiles_of(a->m, a->n, 1), THREADS, 0, cuda_stream(k), *a, start);
    CUDA_TRY(k, "outer", cudaGetLastError());
}
