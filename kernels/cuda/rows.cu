/* rows.cu - norms, activations, rotations and moves of rows on a device, and what follows the
 * gradient: AdamW, its norm.
 *
 * Knows: the formulas of kern.h in the order of kernels/ref, whose bits these give. One thread an
 * element; where a row is summed, one block a row: all its threads fetch, 16 lanes sum.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cuda/records.h"

enum { THREADS = 256, ROW_THREADS = 128, ROW_STAGE = 2048, LANES = 16 };

/* A thread for each of n elements. */
#define EACH(k, operation, kernel, a, n)                                                           \
    do {                                                                                           \
        if ((n) == 0) break;                                                                       \
        LAUNCH(kernel, cuda_blocks(n, THREADS), THREADS, 0, cuda_stream(k), *(a));                 \
        CUDA_TRY(k, operation, cudaGetLastError());                                                \
    } while (0)

__global__ static void embed_rows(struct kern_embed a) {
    const size_t i = cuda_index(), dim = (size_t)a.w.in;
    if (i >= (size_t)a.rows * dim) return;
    const int token = ((const int32_t *)a.tokens.p)[i / dim];
    ((float *)a.y.p)[i] = record_get(&a.w, token, (int)(i % dim)) * a.w.scale;
}
void cuda_embed(struct kern *k, const struct kern_embed *a) {
    EACH(k, "embed", embed_rows, a, (size_t)a->rows * (size_t)a->w.in);
}

/* Lanes 0 .. 15 of a warp; lane 0 has the sum. */
__device__ static float fold16(float lane) {
    for (int by = LANES / 2; by > 0; by >>= 1)
        lane += __shfl_down_sync(0xffffu, lane, by, LANES);
    return lane;
}

__global__ static void rmsnorm_rows(struct kern_rmsnorm a) {
    __shared__ float xs[ROW_STAGE], rstd;
    const int t = (int)threadIdx.x;
    const size_t row = (size_t)blockIdx.x * (size_t)a.dim;
    const float *x = (const float *)a.x.p + row, *w = (const float *)a.w.p,
                *dw = (const float *)a.dw.p;
    float lane = 0.0f;
    for (int at = 0; at < a.dim; at += ROW_STAGE) {
        const int n = min((int)ROW_STAGE, a.dim - at);
        for (int i = t; i < n; i += ROW_THREADS) xs[i] = x[at + i];
        __syncthreads();
        for (int i = t; t < LANES && i < n; i += LANES) lane = fmaf(xs[i], xs[i], lane);
        __syncthreads();
    }
    if (t < LANES) lane = fold16(lane);
    if (t == 0) {
        rstd = 1.0f / sqrtf(lane / (float)a.dim + a.eps);
        if (a.rstd.p) ((float *)a.rstd.p)[blockIdx.x] = rstd;
    }
    __syncthreads();
    for (int i = t; i < a.dim; i += ROW_THREADS) {
        const float g = dw ? w[i] + dw[i] : w[i];
        cuda_put(a.y, a.y_type, row + (size_t)i, x[i] * rstd * g);
    }
}
void cuda_rmsnorm(struct kern *k, const struct kern_rmsnorm *a) {
    if (!a->rows) return;
    LAUNCH(rmsnorm_rows, a->rows, ROW_THREADS, 0, cuda_stream(k), *a);
    CUDA_TRY(k, "rmsnorm", cudaGetLastError());
}

__global__ static void rmsnorm_bwd_rows(struct kern_rmsnorm_bwd a) {
    __shared__ float xs[ROW_STAGE], gs[ROW_STAGE], factor;
    const int t = (int)threadIdx.x;
    const size_t row = (size_t)blockIdx.x * (size_t)a.dim;
    const float *x = (const float *)a.x.p + row, *dy = (const float *)a.dy.p + row,
                *w = (const float *)a.w.p, *dw = (const float *)a.dw.p;
    const float m = ((const float *)a.rstd.p)[blockIdx.x];
    float *dx = (float *)a.dx.p + row, lane = 0.0f;
    for (int at = 0; at < a.dim; at += ROW_STAGE) {
        const int n = min((int)ROW_STAGE, a.dim - at);
        for (int i = t; i < n; i += ROW_THREADS) {
            xs[i] = x[at + i];
            gs[i] = dy[at + i] * (dw ? w[at + i] + dw[at + i] : w[at + i]);
        }
        __syncthreads();
        for (int i = t; t < LANES && i < n; i += LANES) lane = fmaf(gs[i], xs[i], lane);
        __syncthreads();
    }
    if (t < LANES) lane = fold16(lane);
    if (t == 0) factor = m * m * m * (lane / (float)a.dim);
    __syncthreads();
    for (int i = t; i < a.dim; i += ROW_THREADS) {
        const float g = dy[i] * (dw ? w[i] + dw[i] : w[i]);
        dx[i] += fmaf(-factor, x[i], m * g);
    }
}
void cuda_rmsnorm_bwd(struct kern *k, const struct kern_rmsnorm_bwd *a) {
    if (!a->rows) return;
    LAUNCH(rmsnorm_bwd_rows, a->rows, ROW_THREADS, 0, cuda_stream(k), *a);
    CUDA_TRY(k, "rmsnorm_bwd", cudaGetLastError());
}

/* One thread a pair: y may be x. */
__global__ static void rope_pairs(struct kern_rope a) {
    const size_t e = cuda_index(), pairs = (size_t)a.head_dim / 2, i = e % pairs, head = e / pairs,
                 r = head / (size_t)a.heads;
    if (r >= (size_t)a.rows) return;
    const size_t at = head * (size_t)a.head_dim + i,
                 turn = (size_t)((const int32_t *)a.pos.p)[r] * pairs + i;
    const float x0 = ((const float *)a.x.p)[at], x1 = ((const float *)a.x.p)[at + pairs],
                c = ((const float *)a.cos.p)[turn], sine = ((const float *)a.sin.p)[turn],
                s = a.inverse ? -sine : sine;
    cuda_put(a.y, a.y_type, at, fmaf(x0, c, -(x1 * s)));
    cuda_put(a.y, a.y_type, at + pairs, fmaf(x1, c, x0 * s));
}
void cuda_rope(struct kern *k, const struct kern_rope *a) {
    EACH(k, "rope", rope_pairs, a, (size_t)a->rows * (size_t)a->heads * (size_t)(a->head_dim / 2));
}

__global__ static void swiglu_each(struct kern_swiglu a) {
    const size_t i = cuda_index();
    if (i >= (size_t)a.rows * (size_t)a.dim) return;
    const float gate = ((const float *)a.gate.p)[i], up = ((const float *)a.up.p)[i];
    cuda_put(a.y, a.y_type, i, gate * kern_sigmoidf(gate) * up);
    if (!a.gate_kept.p) return;
    cuda_put(a.gate_kept, a.y_type, i, gate);
    cuda_put(a.up_kept, a.y_type, i, up);
}
void cuda_swiglu(struct kern *k, const struct kern_swiglu *a) {
    EACH(k, "swiglu", swiglu_each, a, (size_t)a->rows * (size_t)a->dim);
}

__global__ static void swiglu_bwd_each(struct kern_swiglu_bwd a) {
    const size_t i = cuda_index();
    if (i >= (size_t)a.rows * (size_t)a.dim) return;
    const float dy = ((const float *)a.dy.p)[i], g = cuda_get(a.gate, a.type, i),
                u = cuda_get(a.up, a.type, i), s = kern_sigmoidf(g);
    ((float *)a.dup.p)[i] = dy * (g * s);
    ((float *)a.dgate.p)[i] = dy * u * (s * fmaf(g, 1.0f - s, 1.0f));
}
void cuda_swiglu_bwd(struct kern *k, const struct kern_swiglu_bwd *a) {
    EACH(k, "swiglu_bwd", swiglu_bwd_each, a, (size_t)a->rows * (size_t)a->dim);
}

__global__ static void silu_each(struct kern_silu a) {
    const size_t i = cuda_index();
    if (i >= (size_t)a.rows * (size_t)a.dim) return;
    const float x = cuda_get(a.x, a.x_type, i);
    ((float *)a.y.p)[i] = x * kern_sigmoidf(x);
}
void cuda_silu(struct kern *k, const struct kern_silu *a) {
    EACH(k, "silu", silu_each, a, (size_t)a->rows * (size_t)a->dim);
}

__global__ static void add_each(struct kern_add a) {
    const size_t i = cuda_index();
    if (i < a.n) ((float *)a.x.p)[i] += ((const float *)a.y.p)[i];
}
void cuda_add(struct kern *k, const struct kern_add *a) {
    EACH(k, "add", add_each, a, a->n);
}

__global__ static void gather_each(struct kern_gather a) {
    const size_t i = cuda_index(), dim = (size_t)a.dim;
    if (i >= (size_t)a.rows * dim) return;
    const size_t from = (size_t)((const int32_t *)a.index.p)[i / dim] * dim + i % dim;
    if (a.type == KERN_F32) ((uint32_t *)a.y.p)[i] = ((const uint32_t *)a.x.p)[from];
    else ((uint16_t *)a.y.p)[i] = ((const uint16_t *)a.x.p)[from];
}
void cuda_gather(struct kern *k, const struct kern_gather *a) {
    EACH(k, "gather", gather_each, a, (size_t)a->rows * (size_t)a->dim);
}

__global__ static void scatter_add_each(struct kern_scatter_add a) {
    const size_t i = cuda_index(), dim = (size_t)a.dim;
    if (i >= (size_t)a.rows * dim) return;
    const size_t to = (size_t)((const int32_t *)a.index.p)[i / dim] * dim + i % dim;
    ((float *)a.x.p)[to] += ((const float *)a.y.p)[i];
}
void cuda_scatter_add(struct kern *k, const struct kern_scatter_add *a) {
    EACH(k, "scatter_add", scatter_add_each, a, (size_t)a->rows * (size_t)a->dim);
}

__global__ static void adamw_each(struct kern_adamw a) {
    const size_t i = cuda_index();
    if (i >= a.n) return;
    float *p = (float *)a.p.p, *m = (float *)a.m.p, *v = (float *)a.v.p;
    const float decay = -(a.lr * a.wd), c1 = 1.0f - a.b1, c2 = 1.0f - a.b2,
                g = ((const float *)a.g.p)[i] * a.g_scale, x = fmaf(decay, p[i], p[i]);
    m[i] = fmaf(a.b1, m[i], c1 * g);
    v[i] = fmaf(a.b2, v[i], c2 * g * g);
    const float step = m[i] * a.m_scale / (sqrtf(v[i] * a.v_scale) + a.eps);
    p[i] = fmaf(-a.lr, step, x);
}
void cuda_adamw(struct kern *k, const struct kern_adamw *a) {
    EACH(k, "adamw", adamw_each, a, a->n);
}

/* Eight lanes a block of 4,096 elements, each by itself; then one thread adds the blocks. */
enum { SQUARES_BLOCK = 4096, SQUARES_LANES = 8 };

__global__ static void squares_blocks(const float *x, size_t n, double *sums) {
    const size_t block = cuda_index() / SQUARES_LANES, from = block * SQUARES_BLOCK;
    const size_t to = n < from + SQUARES_BLOCK ? n : from + SQUARES_BLOCK;
    double lane = 0.0;
    for (size_t i = from + threadIdx.x % SQUARES_LANES; i < to; i += SQUARES_LANES)
        lane += (double)x[i] * (double)x[i];
    for (int by = SQUARES_LANES / 2; by > 0; by >>= 1)
        lane += __shfl_down_sync(0xffffffffu, lane, by, SQUARES_LANES);
    if (threadIdx.x % SQUARES_LANES == 0 && from < n) sums[block] = lane;
}
__global__ static void squares_sum(const double *sums, size_t blocks, double *to) {
    double sum = 0.0;
    for (size_t b = 0; b < blocks; b++) sum += sums[b];
    *to = sum;
}
double cuda_sum_squares(struct kern *k, kptr x, size_t n) {
    const size_t blocks = (n + SQUARES_BLOCK - 1) / SQUARES_BLOCK;
    double sum = 0.0;
    if (!n) return sum;
    double *sums = (double *)cuda_scratch(k, "sum_squares", (blocks + 1) * sizeof *sums);
    if (!sums) return sum;
    LAUNCH(squares_blocks, cuda_blocks(blocks * SQUARES_LANES, THREADS), THREADS, 0,
           cuda_stream(k), (const float *)x.p, n, sums + 1);
    CUDA_TRY(k, "sum_squares", cudaGetLastError());
    LAUNCH(squares_sum, 1, 1, 0, cuda_stream(k), sums + 1, blocks, sums);
    CUDA_TRY(k, "sum_squares", cudaGetLastError());
    cuda_fetch(k, "sum_squares", &sum, sums, sizeof sum);
    return sum;
}
