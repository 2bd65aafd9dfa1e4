/* cublas_cpu.cc - the part of cuBLAS that the plugin may use, as plain loops.
 *
 * Sums are in float and in an order of their own: not cuBLAS's, which nobody knows, nor that of
 * kern.h, so a test that asks for either's bits fails. As there, it changes with the number of
 * columns; and where a handle lacks what cuBLAS asks for if results are to repeat (a workspace, set
 * after the stream; no atomics), from call to call. C is not read when beta is 0. Every matrix has
 * to lie in one buffer of the handle's device; scalars are the host's.
 * SPDX-License-Identifier: Apache-2.0 */
#if __has_include(<cublas_v2.h>)
#include "tests/cuda/emu/emu.h"

#include "kernels/cuda/blas.h"

#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdio.h>
#include <stdlib.h>
#include <vector>

static_assert((int)CUBLAS_STATUS_SUCCESS == BLAS_OK && (int)CUBLAS_OP_N == BLAS_AS_STORED &&
                  (int)CUBLAS_OP_T == BLAS_TURNED &&
                  (int)CUBLAS_ATOMICS_NOT_ALLOWED == BLAS_NO_ATOMICS &&
                  (int)CUBLAS_COMPUTE_32F == BLAS_SUMS_IN_F32 &&
                  (int)CUBLAS_GEMM_DEFAULT == BLAS_ALGORITHM_DEFAULT &&
                  (int)CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION == BLAS_NO_REDUCED_SUMS,
              "kernels/cuda/blas.h has cuBLAS's numbers");
static_assert(sizeof(cublasOperation_t) == sizeof(int) && sizeof(cublasStatus_t) == sizeof(int) &&
                  sizeof(cublasComputeType_t) == sizeof(int) &&
                  sizeof(cublasGemmAlgo_t) == sizeof(int),
              "kernels/cuda/blas.h passes cuBLAS's enums as int");

struct cublasContext { cudaStream_t stream; int device; bool workspace, atomics; };

static cublasStatus_t refuse(cublasStatus_t s, const char *what) {
    fprintf(stderr, "emu: cuBLAS: %s (%s)\n", what, cublasGetStatusName(s));
    return s;
}
extern "C" const char *cublasGetStatusName(cublasStatus_t s) {
    switch (s) {
    case CUBLAS_STATUS_SUCCESS: return "CUBLAS_STATUS_SUCCESS";
    case CUBLAS_STATUS_NOT_INITIALIZED: return "CUBLAS_STATUS_NOT_INITIALIZED";
    case CUBLAS_STATUS_INVALID_VALUE: return "CUBLAS_STATUS_INVALID_VALUE";
    case CUBLAS_STATUS_NOT_SUPPORTED: return "CUBLAS_STATUS_NOT_SUPPORTED";
    default: return "CUBLAS_STATUS_OF_ANOTHER_KIND";
    }
}
extern "C" const char *cublasGetStatusString(cublasStatus_t s) { return cublasGetStatusName(s); }
extern "C" cublasStatus_t cublasGetProperty(libraryPropertyType type, int *v) {
    *v = type == MAJOR_VERSION ? CUBLAS_VER_MAJOR
         : type == MINOR_VERSION ? CUBLAS_VER_MINOR : CUBLAS_VER_PATCH;
    return CUBLAS_STATUS_SUCCESS;
}
extern "C" cublasStatus_t cublasGetVersion_v2(cublasHandle_t, int *v) {
    *v = CUBLAS_VERSION;
    return CUBLAS_STATUS_SUCCESS;
}
extern "C" cublasStatus_t cublasCreate_v2(cublasHandle_t *h) {
    int device;
    *h = nullptr;
    if (cudaGetDevice(&device)) return refuse(CUBLAS_STATUS_NOT_INITIALIZED, "no device");
    *h = new cublasContext{ nullptr, device, false, false };
    return CUBLAS_STATUS_SUCCESS;
}
extern "C" cublasStatus_t cublasDestroy_v2(cublasHandle_t h) {
    delete h;
    return CUBLAS_STATUS_SUCCESS;
}
extern "C" cublasStatus_t cublasSetStream_v2(cublasHandle_t h, cudaStream_t s) {
    h->stream = s;
    h->workspace = false;
    return CUBLAS_STATUS_SUCCESS;
}
extern "C" cublasStatus_t cublasSetAtomicsMode(cublasHandle_t h, cublasAtomicsMode_t m) {
    h->atomics = m == CUBLAS_ATOMICS_ALLOWED;
    return CUBLAS_STATUS_SUCCESS;
}
extern "C" cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t) {
    return CUBLAS_STATUS_SUCCESS;
}
extern "C" cublasStatus_t cublasSetPointerMode_v2(cublasHandle_t, cublasPointerMode_t m) {
    return m == CUBLAS_POINTER_MODE_HOST
               ? CUBLAS_STATUS_SUCCESS
               : refuse(CUBLAS_STATUS_NOT_SUPPORTED, "scalars on the device: not emulated");
}
/* A whole buffer of device `device` holds [p, p + bytes). */
static bool holds(const void *p, size_t bytes, int device) {
    int its;
    char *first;
    size_t size;
    return emu_buffer(p, &its, &first, &size) && its == device &&
           (const char *)p + bytes <= first + size;
}
extern "C" cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t h, void *p, size_t bytes) {
    if (!bytes || (holds(p, bytes, h->device) && (uintptr_t)p % 256 == 0)) {
        h->workspace = bytes != 0;
        return CUBLAS_STATUS_SUCCESS;
    }
    return refuse(CUBLAS_STATUS_INVALID_VALUE, "the workspace is no 256-byte aligned device memory");
}

/* ---- products ---- */

struct matrix { const void *p; cudaDataType type; int ld; long long stride; };
struct gemm {
    bool ta, tb;
    int m, n, k, batch;
    float alpha, beta;
    struct matrix a, b, c;                            /* c: read and written */
    size_t turn;                                      /* the first k of every sum */
};
static size_t size_of(cudaDataType t) { return t == CUDA_R_32F ? 4 : 2; }
static float get(const struct matrix *x, size_t i) {
    switch (x->type) {
    case CUDA_R_32F: return ((const float *)x->p)[i];
    case CUDA_R_16F: return __half2float(((const __half *)x->p)[i]);
    default: return __bfloat162float(((const __nv_bfloat16 *)x->p)[i]);
    }
}
static void put(const struct matrix *x, size_t i, float v) {
    switch (x->type) {
    case CUDA_R_32F: ((float *)x->p)[i] = v; break;
    case CUDA_R_16F: ((__half *)x->p)[i] = __float2half(v); break;
    default: ((__nv_bfloat16 *)x->p)[i] = __float2bfloat16(v);
    }
}
/* k is split into parts, as many as the shape says, each with a sum of its own. */
static void product(const struct gemm *g, long long at) {
    size_t m = (size_t)g->m, n = (size_t)g->n, k = (size_t)g->k;
    const size_t parts = 1 + n % 4;
    std::vector<float> a(m * k), sum(m), part(m);     /* a[l][i] */
    for (size_t l = 0; l < k; l++)
        for (size_t i = 0; i < m; i++) {
            size_t in = g->ta ? i * (size_t)g->a.ld + l : l * (size_t)g->a.ld + i;
            a[l * m + i] = get(&g->a, (size_t)(at * g->a.stride) + in);
        }
    for (size_t j = 0; j < n; j++) {
        for (size_t i = 0; i < m; i++) sum[i] = part[i] = 0;
        for (size_t step = 0; step < k; step++) {
            const size_t l = (step + g->turn) % k;
            size_t in = g->tb ? l * (size_t)g->b.ld + j : j * (size_t)g->b.ld + l;
            float b = get(&g->b, (size_t)(at * g->b.stride) + in);
            for (size_t i = 0; i < m; i++) part[i] += a[l * m + i] * b;
            if ((step + 1) * parts / k == step * parts / k) continue;
            for (size_t i = 0; i < m; i++) sum[i] += part[i], part[i] = 0;
        }
        for (size_t i = 0; i < m; i++) {
            size_t out = (size_t)(at * g->c.stride) + j * (size_t)g->c.ld + i;
            float v = g->alpha * sum[i];
            if (g->beta != 0) v += g->beta * get(&g->c, out);
            put(&g->c, out, v);
        }
    }
}
static void gemm_run(void *arg) {
    const struct gemm *g = (const struct gemm *)arg;
    for (int i = 0; i < g->batch; i++) product(g, i);
}
static void gemm_drop(void *arg) { delete (struct gemm *)arg; }

static bool fits(const struct matrix *x, int rows, int columns, int batch, int device) {
    if (!rows || !columns) return true;
    size_t last = (size_t)(columns - 1) * (size_t)x->ld + (size_t)rows;
    if (x->ld < rows || x->stride < 0) return false;
    last += (size_t)(batch - 1) * (size_t)x->stride;
    return holds(x->p, last * size_of(x->type), device);
}
static bool known(cudaDataType t) {
    return t == CUDA_R_32F || t == CUDA_R_16F || t == CUDA_R_16BF;
}
static cublasStatus_t gemm(cublasHandle_t h, const struct gemm *g) {
    if (!h) return refuse(CUBLAS_STATUS_NOT_INITIALIZED, "no handle");
    if (g->m < 0 || g->n < 0 || g->k < 0 || g->batch < 0)
        return refuse(CUBLAS_STATUS_INVALID_VALUE, "a negative size");
    if (!known(g->a.type) || g->a.type != g->b.type || !known(g->c.type) ||
        (g->c.type != g->a.type && g->c.type != CUDA_R_32F))
        return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "a product of these types");
    if (!fits(&g->a, g->ta ? g->k : g->m, g->ta ? g->m : g->k, g->batch, h->device))
        return refuse(CUBLAS_STATUS_INVALID_VALUE, "A does not lie in one buffer of the device");
    if (!fits(&g->b, g->tb ? g->n : g->k, g->tb ? g->k : g->n, g->batch, h->device))
        return refuse(CUBLAS_STATUS_INVALID_VALUE, "B does not lie in one buffer of the device");
    if (!fits(&g->c, g->m, g->n, g->batch, h->device))
        return refuse(CUBLAS_STATUS_INVALID_VALUE, "C does not lie in one buffer of the device");
    static unsigned calls;
    struct emu_work w = {};
    w.launch.name = "cuBLAS product";
    w.launch.run = gemm_run;
    w.launch.drop = gemm_drop;
    struct gemm *mine = new struct gemm(*g);
    mine->turn = h->workspace && !h->atomics ? 0 : calls++ * 7;
    w.launch.args = mine;
    w.device = h->device;
    return emu_queue(h->stream, &w) ? CUBLAS_STATUS_EXECUTION_FAILED : CUBLAS_STATUS_SUCCESS;
}
extern "C" cublasStatus_t cublasGemmStridedBatchedEx(
    cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
    const void *alpha, const void *a, cudaDataType a_type, int lda, long long a_stride,
    const void *b, cudaDataType b_type, int ldb, long long b_stride, const void *beta, void *c,
    cudaDataType c_type, int ldc, long long c_stride, int batch, cublasComputeType_t compute,
    cublasGemmAlgo_t) {
    if (compute != CUBLAS_COMPUTE_32F && compute != CUBLAS_COMPUTE_32F_PEDANTIC)
        return refuse(CUBLAS_STATUS_NOT_SUPPORTED, "sums in anything but float");
    struct gemm g = { ta != CUBLAS_OP_N, tb != CUBLAS_OP_N, m, n, k, batch,
                      *(const float *)alpha, *(const float *)beta, { a, a_type, lda, a_stride },
                      { b, b_type, ldb, b_stride }, { c, c_type, ldc, c_stride }, 0 };
    return gemm(h, &g);
}
extern "C" cublasStatus_t cublasGemmEx(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb,
                                       int m, int n, int k, const void *alpha, const void *a,
                                       cudaDataType a_type, int lda, const void *b,
                                       cudaDataType b_type, int ldb, const void *beta, void *c,
                                       cudaDataType c_type, int ldc, cublasComputeType_t compute,
                                       cublasGemmAlgo_t algo) {
    return cublasGemmStridedBatchedEx(h, ta, tb, m, n, k, alpha, a, a_type, lda, 0, b, b_type, ldb,
                                      0, beta, c, c_type, ldc, 0, 1, compute, algo);
}
extern "C" cublasStatus_t cublasSgemm_v2(cublasHandle_t h, cublasOperation_t ta,
                                         cublasOperation_t tb, int m, int n, int k,
                                         const float *alpha, const float *a, int lda,
                                         const float *b, int ldb, const float *beta, float *c,
                                         int ldc) {
    return cublasGemmEx(h, ta, tb, m, n, k, alpha, a, CUDA_R_32F, lda, b, CUDA_R_32F, ldb, beta, c,
                        CUDA_R_32F, ldc, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
}
#endif
