/* softmax.cuh - one row of logits in one block: its largest value, and its sum of exponentials in
 * 16 lanes (kern.h), by chunks: all threads make exponentials, then a few add them in order.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_CUDA_SOFTMAX_CUH
#define QERL_CUDA_SOFTMAX_CUH
#include "kernels/cuda/reduce.cuh"

/* ROW_BLOCK is CPU_BLOCK of kernels/cpu.h: the sampler's blocks of ids. */
enum { ROW_THREADS = 256, ROW_CHUNK = 1024, ROW_BLOCK = 256, ROW_BLOCKS = ROW_CHUNK / ROW_BLOCK };

/* Shared memory of a block that sums rows. */
struct row_buf { float e[ROW_CHUNK], d[ROW_CHUNK], part[WARPS_MAX]; };

__device__ static inline float row_most(const float *logits, int vocab, struct row_buf *buf) {
    float most = -INFINITY;
    for (int i = (int)threadIdx.x; i < vocab; i += ROW_THREADS) most = larger(logits[i], most);
    return block_most(most, buf->part);
}

/* Lane x of the sums over the chunk's n exponentials, by warps: 0 all, 1 the tilt, 2 and 3 each
 * block of ids by itself. */
__device__ static inline void row_chunk(const struct row_buf *buf, int n, float *sum,
                                        float *blocks) {
    const int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    if (warp == 0)
        for (int i = lane; i < n && lane < 16; i += 16) *sum += buf->e[i];
    if (warp == 1)
        for (int i = lane; i < n && lane < 16; i += 16) *sum = fmaf(buf->e[i], buf->d[i], *sum);
    if (warp >= 2 && warp < 2 + ROW_BLOCKS / 2 && blocks) {
        const int b = (warp - 2) * 2 + lane / 16, end = (b + 1) * ROW_BLOCK;
        float part = 0.0f;
        for (int i = b * ROW_BLOCK + lane % 16; i < end && i < n; i += 16) part += buf->e[i];
        part = warp_fold16(part);
        if (lane % 16 == 0 && b * ROW_BLOCK < n) blocks[b] = part;
    }
}

/* What cpu_row_sum of kernels/cpu.h does, for every thread of the block. tilt or blocks may be
 * NULL. */
__device__ static inline float row_sum(const float *logits, int vocab, float inv_temp, float most,
                                       float *blocks, float *tilt, struct row_buf *buf) {
    const float zmost = most * inv_temp;
    float sum = 0.0f;
    for (int first = 0; first < vocab; first += ROW_CHUNK) {
        const int n = vocab - first < ROW_CHUNK ? vocab - first : ROW_CHUNK;
        for (int i = (int)threadIdx.x; i < n; i += ROW_THREADS) {
            const float d = logits[first + i] * inv_temp - zmost, e = kern_expf(d);
            buf->e[i] = e;
            buf->d[i] = e > 0.0f ? d : 0.0f;                          /* 0 * -inf would be NaN */
        }
        __syncthreads();
        row_chunk(buf, n, &sum, blocks ? blocks + first / ROW_BLOCK : NULL);
        __syncthreads();
    }
    sum = warp_fold16(sum);
    if (threadIdx.x % WARP == 0) buf->part[threadIdx.x / WARP] = sum;
    __syncthreads();
    sum = buf->part[0];
    if (tilt) *tilt = buf->part[1];
    __syncthreads();
    return sum;
}
#endif
