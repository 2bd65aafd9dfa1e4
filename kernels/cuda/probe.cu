/* probe.cu - what a device can do at most: reading its memory, multiply-adds by its two kinds of
 * units. For benchmarks (tools/bench/device.c); no operation of kern.h.
 *
 * A probe keeps every SM busy with nothing else; all its blocks fit there at once. What it computes
 * goes nowhere: a thread stores its result only where it has a value that it never has.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cuda/device.h"
#include "kernels/cuda/mma.h"

enum { THREADS = 256, BLOCKS_OF_SM = 4, CHAINS = 8, STEPS = 16 };

/* ---- reading ---- */

/* Each turn begins elsewhere, so that another SM reads what this one has in its own cache. */
__global__ void __launch_bounds__(THREADS) probe_read(const uint4 *from, size_t n, int turns,
                                                      uint32_t never, uint32_t *to) {
    const size_t step = (size_t)gridDim.x * blockDim.x;
    uint32_t seen = 0;
    size_t shift = 0;
    for (int turn = 0; turn < turns; turn++) {
#pragma unroll 4
        for (size_t i = cuda_index(); i < n; i += step) {
            size_t at = i + shift;
            if (at >= n) at -= n;
            const uint4 v = from[at];
            seen ^= v.x ^ v.y ^ v.z ^ v.w;
        }
        shift += n / 7 * 3;
        if (shift >= n) shift -= n;
    }
    if (seen == never) *to = seen;
}

/* ---- multiplying ---- */

__global__ void __launch_bounds__(THREADS) probe_fma(int turns, float by, float never, float *to) {
    float c[CHAINS];
    for (int i = 0; i < CHAINS; i++) c[i] = (float)(threadIdx.x + i);
    for (int turn = 0; turn < turns; turn++)
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
            for (int i = 0; i < CHAINS; i++) c[i] = fma_ftz(c[i], by, by);
    float sum = 0.0f;
    for (int i = 0; i < CHAINS; i++) sum += c[i];
    if (sum == never) *to = sum;
}

__global__ void __launch_bounds__(THREADS) probe_mma(int turns, uint32_t pair, float never,
                                                     float *to) {
    float c[CHAINS][4] = { };
    struct mma_line a, b;
#pragma unroll
    for (int i = 0; i < MMA_LANE_K / 2; i++) {
        a.pair[i] = pair + (uint32_t)i;
        b.pair[i] = pair ^ threadIdx.x;
    }
    for (int turn = 0; turn < turns; turn++)
#pragma unroll
        for (int i = 0; i < CHAINS; i++) mma_block(c[i], a, a, b);
    float sum = 0.0f;
    for (int i = 0; i < CHAINS; i++) sum += c[i][0] + c[i][1] + c[i][2] + c[i][3];
    if (sum == never) *to = sum;
}

/* ---- the three ---- */

double cuda_probe(struct kern *k, enum cuda_probe what, kptr p, size_t bytes, int turns) {
    int sms = 0;
    cudaStream_t stream = cuda_stream(k);
    if (!CUDA_TRY(k, "probe", cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount,
                                                     cuda_of(k)->device)))
        return 0;
    float *to = (float *)cuda_scratch(k, "probe", sizeof *to);
    const unsigned blocks = (unsigned)(sms * BLOCKS_OF_SM);
    const double threads = (double)blocks * THREADS;
    const float never = -1.0f;
    if (!to) return 0;
    if (what == CUDA_PROBE_READ)
        LAUNCH(probe_read, blocks, THREADS, 0, stream, (const uint4 *)p.p, bytes / sizeof(uint4),
               turns, 1u, (uint32_t *)to);
    else if (what == CUDA_PROBE_FMA)
        LAUNCH(probe_fma, blocks, THREADS, 0, stream, turns, 0.5f, never, to);
    else
        LAUNCH(probe_mma, blocks, THREADS, 0, stream, turns, 0x3f803f80u, never, to);
    if (!CUDA_TRY(k, "probe", cudaGetLastError())) return 0;
    if (what == CUDA_PROBE_READ) return (double)(bytes / sizeof(uint4) * sizeof(uint4)) * turns;
    if (what == CUDA_PROBE_FMA) return threads * turns * (2.0 * CHAINS * STEPS);
    return threads / 32 * turns * (2.0 * CHAINS * MMA_M * MMA_N * MMA_K);
}
