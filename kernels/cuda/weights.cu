/* weights.cu - whole packed weights: rows out of them, and AQN's noise.
 *
 * A block of the noise is a panel, a thread four inputs of one output: a record a round. What was
 * done to it is measured where it lies; the sums of a row, whose order is that of its inputs, are
 * taken by one thread each.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cuda/records.h"
#include "kernels/cuda/reduce.cuh"
#include "kernels/normal.h"

/* ---- rows ---- */

__global__ static void unpack_kernel(struct kern_weight_rows a, size_t n) {
    const size_t at = cuda_index();
    if (at >= n) return;
    const int o = a.first + (int)(at / (size_t)a.w.in), i = (int)(at % (size_t)a.w.in);
    ((float *)a.values.p)[at] = a.w.scale * record_get(&a.w, o, i);
}

void cuda_unpack(struct kern *k, const struct kern_weight_rows *a) {
    const size_t n = (size_t)a->rows * (size_t)a->w.in;
    if (!n) return;
    LAUNCH(unpack_kernel, cuda_blocks(n, 256), 256, 0, cuda_stream(k), *a, n);
    CUDA_TRY(k, "unpack", cudaGetLastError());
}

/* ---- AQN ---- */

enum { NOISE_THREADS = 128, NOISE_RECORD = KERN_IN_BLOCK * KERN_OUT_BLOCK };
static_assert(NOISE_THREADS * 4 == NOISE_RECORD, "a thread has four inputs of a record");

/* z of element `at` of the tensor by itself. */
__device__ static double noise_at(const struct kern_weight_noise *a, size_t at) {
    const uint32_t counter[4] = { (uint32_t)(at / 4), a->tensor, 0, 0 };
    const struct rng4 r = rng_philox(counter, a->key);
    double z[2];
    kern_normal2(z, at & 2 ? r.v[2] : r.v[0], at & 2 ? r.v[3] : r.v[1]);
    return at & 1 ? z[1] : z[0];
}
/* z of elements at .. at + 3. */
__device__ static void noise_four(double z[4], const struct kern_weight_noise *a, size_t at) {
    if (at % 4 == 0) kern_weight_draw4(z, a->key, a->tensor, at / 4);
    else
        for (int j = 0; j < 4; j++) z[j] = noise_at(a, at + (size_t)j);
}

struct noise_record { float dw[NOISE_RECORD], w[NOISE_RECORD]; double scaled[NOISE_RECORD]; };

/* Four inputs from i on of output o: drawn, written, left in r to be summed. */
__device__ static void noise_put(const struct kern_weight_noise *a, struct noise_record *r, int o,
                                 int i, size_t record, int count[KERN_WEIGHT_COUNTS]) {
    const bool row = o < a->w.out;
    double z[4] = { 0.0, 0.0, 0.0, 0.0 };
    if (row && i < a->w.in) noise_four(z, a, (size_t)o * (size_t)a->w.in + (size_t)i);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const bool inside = row && i + j < a->w.in;
        const int at = (i % KERN_IN_BLOCK + j) * KERN_OUT_BLOCK + o % KERN_OUT_BLOCK;
        const float dw = inside ? kern_weight_dw(a->sd, z[j]) : 0.0f,
                    w = inside ? a->w.scale * record_get(&a->w, o, i + j) : 0.0f, noisy = w + dw;
        const double scaled = a->times == 1.0 ? (double)dw : (double)dw / a->times;
        cuda_put(a->to.data, a->to.format == KERN_FORMAT_F32 ? KERN_F32 : KERN_BF16,
                 record * NOISE_RECORD + (size_t)at, dw);
        count[KERN_WEIGHT_CHANGED] += noisy < w || noisy > w;
        count[KERN_WEIGHT_CHANGED_BF16] += f32_to_bf16(noisy) != f32_to_bf16(w);
        r->dw[at] = dw, r->w[at] = w, r->scaled[at] = scaled * scaled;
    }
}
/* Adds the record's squares of one row. */
__device__ static double noise_sum(double sum, const struct noise_record *r, int square, int lane) {
    for (int k = 0; k < KERN_IN_BLOCK; k++) {
        const int at = k * KERN_OUT_BLOCK + lane;
        const double x = (double)(square == KERN_WEIGHT_NOISE ? r->dw[at] : r->w[at]);
        sum += square == KERN_WEIGHT_SCALED ? r->scaled[at] : x * x;
    }
    return sum;
}

__global__ static void __launch_bounds__(NOISE_THREADS)
    weight_noise_kernel(struct kern_weight_noise a) {
    __shared__ struct noise_record r;
    const int panel = (int)blockIdx.x, thread = (int)threadIdx.x, lane = thread % KERN_OUT_BLOCK,
              part = thread / KERN_OUT_BLOCK, o = panel * KERN_OUT_BLOCK + lane,
              blocks = record_blocks(&a.w);
    int count[KERN_WEIGHT_COUNTS] = {};
    double sum = 0.0;
    for (int b = 0; b < blocks; b++) {
        noise_put(&a, &r, o, b * KERN_IN_BLOCK + 4 * part,
                  (size_t)panel * (size_t)blocks + (size_t)b, count);
        __syncthreads();
        if (part < KERN_WEIGHT_SQUARES) sum = noise_sum(sum, &r, part, lane);
        __syncthreads();
    }
    if (part < KERN_WEIGHT_SQUARES && o < a.w.out)
        ((double *)a.squares.p)[(size_t)o * KERN_WEIGHT_SQUARES + (size_t)part] = sum;
    for (int i = 0; i < KERN_WEIGHT_COUNTS; i++) {
        const int all = __reduce_add_sync(WARP_ALL, count[i]);
        if (thread % WARP == 0)
            atomicAdd((unsigned long long *)a.counts.p + i, (unsigned long long)all);
    }
}

void cuda_weight_noise(struct kern *k, const struct kern_weight_noise *a) {
    assert(a->to.format == KERN_FORMAT_F32 || a->to.format == KERN_FORMAT_BF16);
    assert(a->to.out == a->w.out && a->to.in == a->w.in);
    if (a->w.out <= 0 || a->w.in <= 0) return;
    LAUNCH(weight_noise_kernel, (unsigned)record_panels(&a->w), NOISE_THREADS, 0, cuda_stream(k),
           *a);
    CUDA_TRY(k, "weight_noise", cudaGetLastError());
}
