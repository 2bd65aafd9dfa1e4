/* blas.h - the part of cuBLAS that blas.cu calls, declared here: neither building the plugin nor
 * loading it needs cuBLAS. tests/cuda/emu/cublas_cpu.cc holds the numbers against NVIDIA's header.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_CUDA_BLAS_H
#define QERL_CUDA_BLAS_H
#include <cuda_runtime.h>

enum { BLAS_OK = 0 };
enum blas_turn { BLAS_AS_STORED = 0, BLAS_TURNED = 1 };
enum { BLAS_NO_ATOMICS = 0, BLAS_SUMS_IN_F32 = 68, BLAS_ALGORITHM_DEFAULT = -1 };
/* partial sums of split products are added as f32, whatever the result's type */
enum { BLAS_NO_REDUCED_SUMS = 16 };

typedef struct cublasContext *blas_handle;
struct blas_api {
    int (*create)(blas_handle *h);
    int (*destroy)(blas_handle h);
    int (*version)(blas_handle h, int *v);            /* 130100 = 13.1.0 */
    int (*stream)(blas_handle h, cudaStream_t s);     /* takes the workspace away */
    int (*workspace)(blas_handle h, void *p, size_t bytes);
    int (*atomics)(blas_handle h, int mode);
    int (*math)(blas_handle h, int mode);
    const char *(*status_name)(int status);
    /* c = alpha a b + beta c, columns one after another; scalars are f32 of the host */
    int (*gemm)(blas_handle h, int turn_a, int turn_b, int m, int n, int k, const void *alpha,
                const void *a, cudaDataType a_type, int lda, const void *b, cudaDataType b_type,
                int ldb, const void *beta, void *c, cudaDataType c_type, int ldc, int sums,
                int algorithm);
};
#endif
