/* noise.cu - noise on what an operation returns: a block a row, four elements of one counter a
 * thread.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cuda/noise.cuh"

enum { PERTURB_THREADS = 128, PERTURB_CHUNK = 4 * PERTURB_THREADS };

__device__ static float perturb_edge(const struct kern_perturb *a, size_t from, float *part) {
    float most = 0.0f;
    if (a->noise.type != KERN_NOISE_DEADZONE) return 0.0f;
    for (int i = (int)threadIdx.x; i < a->dim; i += PERTURB_THREADS)
        most = larger(fabsf(cuda_get(a->x, a->x_type, from + (size_t)i)), most);
    return kern_noise_edge(&a->noise, block_most(most, part));
}

/* What follows the noise: x became t. */
__device__ static void perturb_store(const struct kern_perturb *a, int row, int i, float x,
                                     float t) {
    const float *bias = (const float *)a->bias.p, *mul = (const float *)a->mul.p;
    const size_t to = (size_t)row * (size_t)a->y_ld + (size_t)i;
    if (a->delta) t -= x;
    if (bias) t += bias[i];
    if (mul) t *= mul[(size_t)row * (size_t)a->dim + (size_t)i];
    if (a->accumulate) t += ((const float *)a->y.p)[to];
    cuda_put(a->y, a->y_type, to, t);
}

/* Elements first .. first + 3, as far as there are; r gets their measures. */
__device__ static void perturb_four(const struct kern_perturb *a, int row,
                                    const uint32_t counter[4], float edge, int first, float r[4],
                                    struct noise_tally *l) {
    const size_t from = (size_t)row * (size_t)a->x_ld;
    const uint32_t c[4] = { counter[0], counter[1], counter[2],
                            counter[3] | (uint32_t)(first / 4) };
    float z[4] = { 0.0f, 0.0f, 0.0f, 0.0f };
    if (a->noise.type != KERN_NOISE_OFF && first < a->dim) kern_noise_draw4(z, &a->noise, c);
    for (int i = 0; i < 4; i++) {
        r[i] = 0.0f;
        if (first + i >= a->dim) continue;
        const float x = cuda_get(a->x, a->x_type, from + (size_t)(first + i));
        float t = x;
        if (a->noise.type != KERN_NOISE_OFF) t = noise_one(&a->noise, x, z[i], edge, &r[i], l);
        perturb_store(a, row, first + i, x, t);
    }
}

__global__ static void __launch_bounds__(PERTURB_THREADS) perturb_kernel(struct kern_perturb a) {
    __shared__ float4 measure[PERTURB_THREADS];
    __shared__ float part[WARPS_MAX];
    const float *chunk = (const float *)measure;
    const int row = (int)blockIdx.x, lane = (int)threadIdx.x;
    const bool counts = a.noise.type != KERN_NOISE_OFF && a.noise.sums.p;
    const float edge = perturb_edge(&a, (size_t)row * (size_t)a.x_ld, part);
    struct noise_tally tally = {};
    float r = 0.0f, r2 = 0.0f, four[4];
    uint32_t counter[4];
    kern_noise_counter(counter, &a.noise, row, 0);
    for (int first = 0; first < a.dim; first += PERTURB_CHUNK) {
        perturb_four(&a, row, counter, edge, first + 4 * lane, four, &tally);
        if (!counts) continue;
        measure[lane] = make_float4(four[0], four[1], four[2], four[3]);
        __syncthreads();
        for (int i = lane; i < PERTURB_CHUNK && lane < 16; i += 16) {
            r += chunk[i];
            r2 = fmaf(chunk[i], chunk[i], r2);
        }
        __syncthreads();
    }
    if (!counts) return;
    if (lane < WARP) {
        tally.r = llrintf(warp_fold16(r) * 0x1p20f);
        tally.r2 = llrintf(warp_fold16(r2) * 0x1p20f);
    }
    noise_take(&a.noise, &tally);
}

void cuda_perturb(struct kern *k, const struct kern_perturb *a) {
    assert(a->dim <= KERN_NOISE_DIM_MAX && (!a->accumulate || a->y_type == KERN_F32));
    if (a->rows <= 0 || a->dim <= 0) return;
    LAUNCH(perturb_kernel, (unsigned)a->rows, PERTURB_THREADS, 0, cuda_stream(k), *a);
    CUDA_TRY(k, "perturb", cudaGetLastError());
}
