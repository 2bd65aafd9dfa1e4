/* linears.h - what the forms of `linear` share: up to three at once, and what a sum becomes.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_CUDA_LINEARS_H
#define QERL_CUDA_LINEARS_H
#include "kernels/cuda/records.h"

struct linears { struct kern_linear of[KERN_LINEARS_MAX]; int n, rows, outs; };

/* decode.cu: for at most this many rows; reads each packed weight once. */
enum { LINEAR_FEW = 16 };
void cuda_linear_few(struct kern *k, const struct linears *all);

/* y[r][o] before the adapter's share: `sum` is that of x W'. */
__device__ static inline float linear_value(const struct kern_linear *a, float sum, int r, int o) {
    float v = sum * (a->scale * a->w.scale);
    if (a->bias.p) v += ((const float *)a->bias.p)[o];
    if (a->accumulate) v += ((const float *)a->y.p)[(size_t)r * (size_t)a->y_ld + (size_t)o];
    return v;
}
/* Whether the operands are tensor cores': bf16, or 4 bits of it. */
static inline bool linear_takes_mma(const struct kern_linear *a) {
    return a->x_type == KERN_BF16 && a->w.format != KERN_FORMAT_F32 &&
           (!a->b.out || a->b.format != KERN_FORMAT_F32);
}
static inline bool linear_t_takes_mma(const struct kern_linear_t *a) {
    return a->round && a->w.format != KERN_FORMAT_F32;
}
__device__ static inline void linear_put(const struct kern_linear *a, float v, int r, int o) {
    cuda_put(a->y, a->y_type, (size_t)r * (size_t)a->y_ld + (size_t)o, v);
}
#endif
