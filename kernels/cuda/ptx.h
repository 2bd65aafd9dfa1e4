/* ptx.h - the instructions of a GPU that C++ has no name for, each with the same arithmetic in C++
 * for a compiler of CPUs.
 *
 * A product of kern.h takes subnormal operands and results as zero. The instructions do that by
 * themselves; whether they call a result subnormal by its exact value, as kern_fma_flush does, or
 * after rounding shows only on a device and only within half of the last bit at 2^-126.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_CUDA_PTX_H
#define QERL_CUDA_PTX_H
#include "kernels/math.h"

#ifdef __CUDACC__
__device__ static inline float fma_ftz(float a, float b, float c) {
    float y;
    asm("fma.rn.ftz.f32 %0, %1, %2, %3;" : "=f"(y) : "f"(a), "f"(b), "f"(c));
    return y;
}
__device__ static inline float add_ftz(float a, float b) {
    float y;
    asm("add.rn.ftz.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}
__device__ static inline float mul_ftz(float a, float b) {
    float y;
    asm("mul.rn.ftz.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}
#else
static inline float fma_ftz(float a, float b, float c) { return kern_fma_flush(a, b, c); }
static inline float add_ftz(float a, float b) {
    return kern_flushf(kern_flushf(a) + kern_flushf(b));
}
static inline float mul_ftz(float a, float b) {
    return kern_flushf(kern_flushf(a) * kern_flushf(b));
}
#endif
#endif
