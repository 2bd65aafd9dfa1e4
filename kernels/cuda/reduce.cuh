/* reduce.cuh - what a warp or a block agrees on: the largest value, and sums in the order of
 * kern.h (16 lanes, folded 8, 4, 2, 1), whatever the schedule of the threads.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_CUDA_REDUCE_CUH
#define QERL_CUDA_REDUCE_CUH
#include "kernels/cuda/device.h"

enum { WARP = 32, WARPS_MAX = 32 };
#define WARP_ALL 0xffffffffu

/* The larger one; b when a is NaN. */
__device__ static inline float larger(float a, float b) { return a > b ? a : b; }

/* Largest value of the warp, for every lane. No value may be NaN. */
__device__ static inline float warp_most(float v) {
    for (int by = WARP / 2; by > 0; by >>= 1) v = larger(__shfl_xor_sync(WARP_ALL, v, by), v);
    return v;
}
/* kern_fold16 of lanes 0 - 15 for lane 0, of lanes 16 - 31 for lane 16. */
__device__ static inline float warp_fold16(float lane) {
    for (int by = 8; by > 0; by >>= 1) lane += __shfl_down_sync(WARP_ALL, lane, by, 16);
    return lane;
}
/* The row sum of 32 values, one a lane, for every lane. */
__device__ static inline float warp_sum(float v) {
    v += __shfl_down_sync(WARP_ALL, v, 16);
    return __shfl_sync(WARP_ALL, warp_fold16(v), 0);
}

/* Largest value of the block, for every thread; part: WARPS_MAX floats of shared memory. No value
 * may be NaN. */
__device__ static inline float block_most(float v, float *part) {
    v = warp_most(v);
    if (threadIdx.x % WARP == 0) part[threadIdx.x / WARP] = v;
    __syncthreads();
    for (unsigned i = 0; i < blockDim.x / WARP; i++) v = larger(part[i], v);
    __syncthreads();
    return v;
}
#endif
