/* noise_bf16.h - what dtype = bf16 should realise of relative noise, its roundings included.
 *
 * For t in bf16 the arithmetic of kernels/noise.h is the same at t and 2 t, so r = ((t + e) - t) /
 * (scale |t|) hangs on z and on which of 128 mantissas t has. Its moments are exact sums over the
 * bf16 values of z for each of them; over data, whose mantissas nobody knows, they lie between the
 * least and the most.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_NOISE_BF16_H
#define QERL_NOISE_BF16_H
#include "kernels/kern.h"

struct noise_bf16 {
    double r2_least, r2_most;        /* of the mean of r^2 of one mantissa */
    double r_most, r4_most;          /* of |mean of r|, mean of r^4 */
    double size_most;                /* of |r|: one draw */
};
/* Of a relative type, of sparse noise where it hits; all 0 of others. */
struct noise_bf16 noise_bf16_of(enum kern_noise_type type, double scale);
#endif
