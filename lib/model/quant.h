/* quant.h - f32 to MXFP4 or NVFP4 and back: codes (one nibble a byte) and a scale a block, and how
 * much was lost.
 *
 * MXFP4: an E8M0 scale for 32 values along a row. OCP (MX specification 1.0, 6.3): scale
 * 2^(floor(log2 amax) - 2), nearest with ties to even, saturate at 6; blocks end with the row.
 * SEED: the earlier system's, kept for comparison: 1e-7 inside its logarithms, ties away from zero,
 * blocks are 32 consecutive elements of the flattened tensor.
 *
 * NVFP4: an E4M3 scale for 16 values along a row, blocks end with the row, and one f32 scale for
 * the tensor. OCP: tensor scale t = amax / (448 * 6), scale = E4M3 nearest to block's amax / (6 t),
 * codes nearest to x / (scale t), all ties to even, saturating. A block too small for any scale
 * becomes zeros. SEED: t = 1; scale = amax / 6 to three mantissa bits without carry and not below
 * 2^-6, ties between codes go to the smaller. The earlier system cut weights along outputs; blocks
 * here lie along inputs, as hardware has them.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_QUANT_H
#define QERL_QUANT_H
#include "kernels/quant.h"
#include "lib/model/model.h"

/* What rounding did to the elements; sums, so that tensors can be added up. */
struct quant_stats {
    /* zeroed: |x| > 1e-10 became 0; saturated: |x| > 6 scales */
    uint64_t elements, zeroed, saturated;
    double relative_sum, x2_sum, d2_sum;             /* |q-x| / (|x| + 1e-10), x^2, (q-x)^2 */
};
void quant_stats_add(struct quant_stats *to, const struct quant_stats *s);
double quant_relative_error(const struct quant_stats *s);  /* mean |q-x| / (|x| + 1e-10) */
/* 10 log10(mean x^2 / mean (q-x)^2); INFINITY if exact */
double quant_sqnr_db(const struct quant_stats *s);
double quant_zeroed(const struct quant_stats *s);          /* shares, 0 .. 1 */
double quant_saturated(const struct quant_stats *s);

/* values f32 [out, in] -> codes uint8 [out, in] (nibbles), scales uint8 [out, ceil(in/32)]; stats
 * is added to, or NULL. -1 when a value is not finite, or under SEED when in is no multiple of
 * 32. */
int quant_mxfp4(const float *values, int out, int in, enum model_rounding r, uint8_t *codes,
                uint8_t *scales, struct quant_stats *stats, struct err *e);
void quant_mxfp4_back(const uint8_t *codes, const uint8_t *scales, int out, int in, float *values);
/* The tensor's scale, from its largest magnitude. */
float quant_nvfp4_tensor_scale(float amax, enum model_rounding r);
/* As quant_mxfp4, scales uint8 [out, ceil(in/16)]. -1 when a value is not finite, or under SEED
 * when a block needs a scale above 448. */
int quant_nvfp4(const float *values, int out, int in, enum model_rounding r, float tensor_scale,
                uint8_t *codes, uint8_t *scales, struct quant_stats *stats, struct err *e);
void quant_nvfp4_back(const uint8_t *codes, const uint8_t *scales, float tensor_scale, int out,
                      int in, float *values);
/* The values as MXFP4 or NVFP4 holds them, in place: a matrix f32 [out, in] with the scales it
 * would have alone. stats is added to, or NULL. -1 as quant_mxfp4 and quant_nvfp4. */
int quant_round(float *values, int out, int in, enum model_quant q, enum model_rounding r,
                struct quant_stats *stats, struct err *e);
/* Index of the first value that is not finite, or -1. */
int64_t quant_not_finite(const float *values, int64_t n);
#endif
