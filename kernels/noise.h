/* noise.h - imperfect arithmetic on purpose: how an operation of the table perturbs what it
 * returns.
 *
 * For a result t of an operation, e is drawn, multiplied and added in f32 before t is rounded to
 * its storage: y = t + e. Each element's draw is a function of key and counter alone, so batch,
 * place, threads and phase change nothing, and any draw can be made again.
 *
 * Counter of element i of a row: { prompt, sample | head << 16, position, site | i / 4 }, word
 * i % 4 of Philox4x32-10. head is 0 outside attention; there i is the key's position.
 *
 * type                 e
 *   relative_gaussian  z * (scale * |t|), z ~ N(0, 1): Box-Muller in f32, words (0,1) and (2,3)
 *   relative_uniform   z * (scale * |t|), z uniform on (-sqrt 3, sqrt 3): its deviation is 1 too
 *   systematic         z * (scale * t), z = +1 or -1, fixed for (key, site, head, i): the counter
 *                      is { ~0, 0xffff | head << 16, ~0, site | i / 4 }, the caller's key has no
 *                      step in it
 *   sparse             with probability `rate` z * (scale * |t|), z = +1 or -1; else 0
 *   deadzone           -t where |t| < scale * the row's largest |t| (NaN skipped), else 0; a row
 *                      is a token's, in attention a token's and head's
 *   absolute_gaussian  scale * z
 *   bias               scale * sign(t), 0 where t is 0
 *   fp8                y - t, y being t in E4M3 as the earlier system has it, without a scale: |t|
 *                      clamped to 2^-6 .. 448, exponent at most 7, 3 bits of mantissa rounded to
 *                      nearest even but never up into the next exponent (so 240 is the largest);
 *                      0 stays. y is stored as it is. It has no `scale`
 * A t that is not finite stays as it is; e is 0 where scale * |t| is not. A word whose top 24 bits
 * are below 2^24 rate is a hit; a sign is a word's lowest bit (1: negative).
 * bf16: the earlier system's arithmetic. t, z, the products (|t| first, then scale) and the sum are
 * each rounded to bf16, whatever the storage.
 * kernels/noise_math.h and kernels/ref/noise.c are the text; every CPU path gives their bits.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_KERN_NOISE_H
#define QERL_KERN_NOISE_H
#include "lib/base/sys.h"

enum kern_noise_type {
    KERN_NOISE_OFF,
    KERN_NOISE_RELATIVE_GAUSSIAN,
    KERN_NOISE_RELATIVE_UNIFORM,
    KERN_NOISE_SYSTEMATIC,
    KERN_NOISE_SPARSE,
    KERN_NOISE_DEADZONE,
    KERN_NOISE_ABSOLUTE_GAUSSIAN,
    KERN_NOISE_BIAS,
    KERN_NOISE_FP8,
    KERN_NOISE_TYPE_COUNT
};

/* What was measured after the act, as sums of integers: their order changes nothing. With d = (t +
 * e) - t as computed (bf16: t as rounded), r = d / (|t| scale) of elements whose t is not 0
 * (relative types: and |t| above 2^-100, where all products are normal numbers; absolute_gaussian:
 * d / scale of all; bias: d / scale; deadzone: d / |t|; fp8: d / |t|, of a |t|
 * below 2^-6 d / 2^-6) where that is finite and below 4,096, a row's sums of r and r^2 are taken as
 * the other row sums of kern.h and rounded to units of 2^-20; in attention each page of 32 keys of
 * a row by itself.
 * Coarse: of those measured, the ones near which f32's steps are no small part of an absolute size:
 * |t| >= scale * KERN_NOISE_COARSE_* (steps of 2^-3 scale; of bias, which does not average out,
 * 2^-7 scale), with bf16, whose steps are 2^16 as large, 2^-16 of that; of fp8, those outside 2^-6
 * .. 240. 0 of other types. */
#define KERN_NOISE_COARSE_GAUSSIAN 0x1p20f
#define KERN_NOISE_COARSE_BIAS 0x1p16f
enum kern_noise_sum {
    KERN_NOISE_ELEMENTS,             /* visited */
    KERN_NOISE_MEASURED,             /* of these, those that have an r */
    KERN_NOISE_CHANGED,              /* t + e is not t */
    KERN_NOISE_CHANGED_BF16,         /* nor is it when both are rounded to bf16 */
    KERN_NOISE_COARSE,
    KERN_NOISE_R,                    /* sum of r, 2^-20 */
    KERN_NOISE_R2,                   /* sum of r^2, 2^-20 */
    KERN_NOISE_SUMS
};

enum { KERN_NOISE_DIM_MAX = 1 << 18, KERN_NOISE_NO_SAMPLE = 0xffff };
#define KERN_NOISE_SITE(layer, number) ((uint32_t)(layer) << 24 | (uint32_t)(number) << 16)

struct kern_noise {
    enum kern_noise_type type;
    float scale, rate;
    bool bf16;
    uint32_t key[2];
    kptr key_at;                     /* uint32 [2], read when the operation runs; absent: key */
    uint32_t site;                   /* KERN_NOISE_SITE */
    kptr id;                         /* uint32 [rows, 2]: prompt, sample (below 2^16);
                                      * absent: ~0 and KERN_NOISE_NO_SAMPLE */
    kptr pos;                        /* int32 [rows]; absent: the row's index */
    kptr sums;                       /* int64 [KERN_NOISE_SUMS], added to; absent: not counted */
};

/* y = (t + e), or with `delta` (t + e) - t, the noise alone; then + bias[col], then * mul[row,
 * col], as far as present; then y is stored, or added to what is there when accumulate (f32 then).
 * With type OFF a plain conversion. x of x_type [rows, dim] with stride x_ld, y of y_type with
 * stride y_ld, mul f32 [rows, dim] dense, bias f32 [dim]. y may be x where the types are the same.
 * dim <= KERN_NOISE_DIM_MAX. */
struct kern_perturb {
    struct kern_noise noise;
    kptr x; enum kern_type x_type; int x_ld;
    bool delta;
    kptr bias, mul; bool accumulate;
    kptr y; enum kern_type y_type; int y_ld;
    int rows, dim;
};
/* y = silu(x): x of x_type, y f32, both [rows, dim]. */
struct kern_silu { kptr x; enum kern_type x_type; kptr y; int rows, dim; };

/* Noise inside attention: on scores (t = scale * q.k, before the softmax) and on probabilities. A
 * noisy probability is max(0, p + e) over the sum of all of the row, which lse takes part in: p is
 * exp(score - the row's maximum so far), where types that are not relative first find the final
 * maximum. The backward (attn_bwd) makes both again, so p there is the noisy one; noise is a
 * constant of the pass (its derivative is that of a clean operation), and besides it adds `dprobs`
 * to dy . v and `dscores` to ds. Keys that a row does not see are not visited. Rows' id and pos are
 * the queries', `pos` absent: the row's index in the call.
 * What the backward cannot find page by page attn leaves in `peaks`, f32 [rows, heads, 2]: the edge
 * of type deadzone on scores (0 of others) and the final maximum m of noisy scores. With it
 * attn_bwd makes scores and probabilities of every type again, a probability that is not relative
 * as noisy exp(score - m) * exp(m - lse). Without it scores take relative types and
 * absolute_gaussian, probabilities relative ones. dprobs and dscores take what scores take without
 * it. */
struct kern_attn_noise { struct kern_noise scores, probs, dprobs, dscores; };
#endif
