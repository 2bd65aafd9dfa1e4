/* quant.h - how a block of values becomes 4-bit codes with one scale: the arithmetic that packs
 * weights (lib/model/quant.c) and that every CPU path repeats on activations.
 *
 * lib/model/quant.h defines both formats and both roundings. Each of the four is a staircase on
 * a = |x| * by (or |x| / by): the code is the number of `least` that a reaches, so a tie that goes
 * down has the next float above it there. kernels/simd/quant.h does the same, 16 values at once.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_KERN_QUANT_H
#define QERL_KERN_QUANT_H
#include "kernels/math.h"
#include "kernels/pack.h"

enum { QUANT_BLOCK = 32, QUANT_BLOCK_NVFP4 = 16, QUANT_STEPS = 7 };

struct quant_block {
    float by;
    bool divides;
    float least[QUANT_STEPS];
    float unit;                      /* what code value 1 stands for, without the tensor scale */
    uint8_t scale;                   /* E8M0 or E4M3; NVFP4 under seed may need 0x7f, its 480 */
};

enum quant_ties { QUANT_TIES_EVEN, QUANT_TIES_AWAY, QUANT_TIES_DOWN };

/* 2^k, -126 <= k <= 127 */
KERN_FN float quant_power2(int k) { return kern_float((uint32_t)(k + 127) << 23); }

/* floor(log2 x) of a positive finite f32 */
KERN_FN int quant_floor_log2(float x) {
    int k = (int)(kern_bits(x) >> 23) - 127;
    if (k > -127) return k;
    (void)frexpf(x, &k);
    return k - 1;
}

/* floor(log2f x) of a positive normal x, log2f rounded correctly: the last floats below a power of
 * two, `left` steps of 2^-24 of it away, are rounded up to it. */
KERN_FN int quant_floor_log2f(float x) {
    int k = quant_floor_log2(x), size = k < 0 ? ~k : k, rounds = 1;
    int left = 0x800000 - (int)(kern_bits(x) & 0x7fffff);
    while (rounds * 2 <= size) rounds *= 2;           /* half a step of log2f's result, in 2^-24 */
    return left < rounds * 0.69314718 ? k + 1 : k;
}

/* pack_e4m3 of 0 .. 0x7e, and of 0x7f the 480 that the earlier system made of it */
KERN_FN float quant_e4m3(uint8_t s) { return kern_float((uint32_t)s << 20) * 0x1p120f; }

/* Nearest E4M3 of a finite r >= 0, ties to even, at most 448: adding 2^(52 + step) rounds to whole
 * steps, and 16 eighths carry into the exponent by themselves. */
KERN_FN uint8_t quant_e4m3_nearest(double r) {
    if (r >= 448) return 0x7e;
    union { double f; uint64_t u; } v = { r }, big;
    int e = (int)(v.u >> 52) - 1023;
    if (e < -6) e = -6;
    big.u = (uint64_t)(e - 3 + 52 + 1023) << 52;
    v.f = (r + big.f) - big.f;
    big.u = (uint64_t)(3 - e + 1023) << 52;
    return (uint8_t)((e + 6) * 8 + (int)(v.f * big.f));
}

/* The tensor's scale, from its largest magnitude. */
KERN_FN float quant_tensor_scale(float amax, bool seed) {
    if (seed || !(amax > 0)) return 1;
    float t = amax / (448 * 6);
    return t > 0x1p-126f ? t : 0x1p-126f;                 /* a normal f32 is as exact as the rest */
}

/* away: from zero, as the earlier system computed it: floor(2 a / 2^p + .5) half steps within
 * binade p in f32, where the sum takes the float just below .25 up to 1. down: to the smaller. */
KERN_FN void quant_fix(struct quant_block *b, enum quant_ties ties, float by, bool divides) {
    static const float least[][QUANT_STEPS] = {
        { 0x1.000002p-2f, .75f, 0x1.400002p0f, 1.75f, 0x1.400002p1f, 3.5f, 0x1.400002p2f },
        { 0x1.fffffep-3f, .75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.f },
        { 0x1.000002p-2f, 0x1.800002p-1f, 0x1.400002p0f, 0x1.c00002p0f, 0x1.400002p1f,
          0x1.c00002p1f, 0x1.400002p2f },
    };
    memcpy(b->least, least[ties], sizeof b->least);
    b->by = by;
    b->divides = divides;
}

/* SEED's E = floor(log2(amax + 1e-7)) - 2 in f32 lies in -26 .. 125: the log2 of the largest floats
 * rounds up to 128. */
KERN_FN void quant_block_mxfp4(struct quant_block *b, float amax, bool seed) {
    int e = amax > 0 ? quant_floor_log2(amax) - 2 : -127;
    if (seed) e = quant_floor_log2f(amax + 1e-7f) - 2;
    e = e < -127 ? -127 : e > 125 ? 125 : e;
    b->scale = (uint8_t)(e + 127);
    b->unit = pack_e8m0(b->scale);
    quant_fix(b, seed ? QUANT_TIES_AWAY : QUANT_TIES_EVEN, quant_power2(-e), false);
}

/* OCP. unit * tensor scale and its products with the grid's midpoints are exact in double; `least`
 * is the first float at or, where the tie goes down, above them. */
KERN_FN void quant_block_nvfp4_ocp(struct quant_block *b, float amax, float tensor_scale) {
    static const double middle[QUANT_STEPS] = { .25, .75, 1.25, 1.75, 2.5, 3.5, 5 };
    b->scale = quant_e4m3_nearest((double)amax / (6 * (double)tensor_scale));
    b->unit = quant_e4m3(b->scale);
    b->by = 1;
    b->divides = false;
    const double unit = (double)b->unit * (double)tensor_scale;
    for (int i = 0; i < QUANT_STEPS; i++) {
        const double m = middle[i] * unit;
        const float f = (float)m;
        const bool below = i % 2 ? (double)f < m : (double)f <= m;
        b->least[i] = kern_float(kern_bits(f) + below);
        if (b->scale == 0) b->least[i] = INFINITY;        /* too small for any scale: zeros */
    }
}

/* SEED, in f32 as the earlier system computed it. It added 1e-10 to the scale before dividing,
 * which changes no f32 of 2^-6 or more. */
KERN_FN void quant_block_nvfp4_seed(struct quant_block *b, float amax) {
    const float r = (amax > 1e-10f ? amax : 1e-10f) / 6;
    int e = quant_floor_log2f(r);
    e = e < -6 ? -6 : e > 8 ? 8 : e;
    float eighths = rintf(8 * r * quant_power2(-e));
    eighths = eighths < 8 ? 8 : eighths > 15 ? 15 : eighths;
    b->scale = (uint8_t)((e + 6) * 8 + (int)eighths);
    b->unit = quant_e4m3(b->scale);
    quant_fix(b, QUANT_TIES_DOWN, b->unit, true);
}

KERN_FN void quant_block_fill(struct quant_block *b, enum kern_format format, bool seed,
                               float amax, float tensor_scale) {
    if (format == KERN_FORMAT_MXFP4) quant_block_mxfp4(b, amax, seed);
    else if (seed) quant_block_nvfp4_seed(b, amax);
    else quant_block_nvfp4_ocp(b, amax, tensor_scale);
}

KERN_FN uint8_t quant_code(const struct quant_block *b, float x) {
    const float a = b->divides ? fabsf(x) / b->by : fabsf(x) * b->by;
    int q = 0;
    while (q < QUANT_STEPS && a >= b->least[q]) q++;
    return (uint8_t)(q | (x < 0 && q ? 8 : 0));
}
#endif
