/* noise.cuh - noise in the kernels: an element's draw, a page of keys, and what is counted.
 *
 * The arithmetic is kernels/noise_math.h, one element a thread. A span's sums of r and r^2 keep
 * their order; the counts, and the spans' sums once they are integers, meet in atomics, which have
 * none. A tally's address is known when a kernel is built, or it could not stay in registers.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_CUDA_NOISE_CUH
#define QERL_CUDA_NOISE_CUH
#include "kernels/cuda/reduce.cuh"

/* What one thread counted: of r and r2, lane 0's of each warp stand for the warp. */
struct noise_tally {
    int count[KERN_NOISE_R];
    int64_t r, r2;
};

/* t + e of one element; *r becomes what kern_noise_add measured of it, 0 where it has none. */
__device__ static inline float noise_one(const struct kern_noise *n, float t, float z, float edge,
                                         float *r, struct noise_tally *l) {
    struct kern_noise_lanes one = {};                 /* in registers: its places are constants */
    t = kern_noise_add(n, t, z, edge, 0, &one);
    *r = one.r[0];
    for (int i = 0; i < KERN_NOISE_R && l; i++) l->count[i] += (int)one.sum[i];
    return t;
}
/* z of the row's element i alone. */
__device__ static inline float noise_draw(const struct kern_noise *n, const uint32_t counter[4],
                                          int i) {
    const uint32_t c[4] = { counter[0], counter[1], counter[2], counter[3] | (uint32_t)(i / 4) };
    float z[4];
    kern_noise_draw4(z, n, c);
    return i & 2 ? (i & 1 ? z[3] : z[2]) : i & 1 ? z[1] : z[0];
}

/* A row's page of 32 keys, one a lane: t + e of this lane's `key` where it is seen. The whole warp
 * calls. l NULL: not counted. */
__device__ static inline float noise_page(const struct kern_noise *n, int row, int head,
                                          float edge, float t, int key, bool seen,
                                          struct noise_tally *l) {
    uint32_t counter[4];
    float r = 0.0f;
    if (n->type == KERN_NOISE_OFF) return t;
    if (seen) {
        kern_noise_counter(counter, n, row, (uint32_t)head);
        t = noise_one(n, t, noise_draw(n, counter, key), edge, &r, l);
    }
    if (!l || !n->sums.p) return t;
    float next = __shfl_down_sync(WARP_ALL, r, 16);
    l->r += llrintf(warp_fold16(r + next) * 0x1p20f);
    l->r2 += llrintf(warp_fold16(fmaf(next, next, r * r)) * 0x1p20f);
    return t;
}

/* Adds what the warp's threads counted. The whole warp calls. */
__device__ static inline void noise_take(const struct kern_noise *n, const struct noise_tally *l) {
    int64_t sum[KERN_NOISE_SUMS];
    if (n->type == KERN_NOISE_OFF || !n->sums.p) return;
    for (int i = 0; i < KERN_NOISE_R; i++) sum[i] = __reduce_add_sync(WARP_ALL, l->count[i]);
    sum[KERN_NOISE_R] = l->r;
    sum[KERN_NOISE_R2] = l->r2;
    if (threadIdx.x % WARP == 0) cuda_noise_take(n, sum);
}
#endif
