/* quant.cu - rows as a 4-bit unit would read them: a block a row, an element a lane, scales of
 * kernels/quant.h from what a warp or half of one agrees on.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cuda/reduce.cuh"

enum { QUANT_THREADS = 128 };

/* Largest magnitude of the row; -1 when it holds a value that is not finite. */
__device__ static float quant_row_most(const struct kern_quant_rows *a, size_t at, float *part) {
    float most = 0.0f;
    bool bad = false;
    for (int i = (int)threadIdx.x; i < a->dim; i += QUANT_THREADS) {
        const float x = cuda_get(a->x, a->type, at + (size_t)i);
        bad = bad || x - x != 0.0f;
        most = larger(fabsf(x), most);
    }
    most = block_most(most, part);
    return __syncthreads_or(bad) ? -1.0f : most;
}

__global__ static void __launch_bounds__(QUANT_THREADS)
    quant_rows_kernel(struct kern_quant_rows a) {
    __shared__ float part[WARPS_MAX];
    const size_t at = (size_t)blockIdx.x * (size_t)a.dim;
    const float row_most = quant_row_most(&a, at, part);
    const bool finite = row_most >= 0.0f;
    const bool mx = a.format == KERN_FORMAT_MXFP4;
    const float tensor = mx ? 1.0f : quant_tensor_scale(row_most, a.seed);
    for (int first = 0; first < a.dim; first += QUANT_THREADS) {
        const int i = first + (int)threadIdx.x;
        const float x = i < a.dim ? cuda_get(a.x, a.type, at + (size_t)i) : 0.0f;
        float most = finite ? fabsf(x) : 0.0f;
        for (int by = 1; by < (mx ? QUANT_BLOCK : QUANT_BLOCK_NVFP4); by *= 2)
            most = larger(__shfl_xor_sync(WARP_ALL, most, by), most);
        struct quant_block b;
        quant_block_fill(&b, a.format, a.seed, most, tensor);
        if (i >= a.dim) continue;
        cuda_put(a.y, a.type, at + (size_t)i,
                 finite ? pack_e2m1_of(quant_code(&b, x)) * b.unit * tensor : NAN);
    }
}

void cuda_quant_rows(struct kern *k, const struct kern_quant_rows *a) {
    assert(a->format == KERN_FORMAT_MXFP4 || a->format == KERN_FORMAT_NVFP4);
    if (a->rows <= 0 || a->dim <= 0) return;
    LAUNCH(quant_rows_kernel, (unsigned)a->rows, QUANT_THREADS, 0, cuda_stream(k), *a);
    CUDA_TRY(k, "quant_rows", cudaGetLastError());
}
