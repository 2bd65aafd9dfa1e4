/* normal.h - standard normal numbers in double, with the same bits on every machine: what AQN draws
 * for linear weights.
 *
 * The law is rng_normal4's (lib/base/rng.h), whose log, cos and sin are the C library's. Here they
 * are polynomials, so that a device has the host's bits. Accuracy: z is within 6 units of the last
 * place of what exact functions of the same rounded arguments give. Rounded to f32 the two laws
 * part in one draw of some 10^8, rounded to bf16 in one of some 10^13.
 * Knows: words to numbers, an element's counter. simd/normal.h repeats it lane by lane.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_KERN_NORMAL_H
#define QERL_KERN_NORMAL_H
#include "kernels/pack.h"
#include "lib/base/rng.h"

#include <math.h>

#define KNORMAL_2_32   0x1p-32
#define KNORMAL_MAGIC  0x1.8p52                /* adding it rounds to an integer in the low bits */
#define KNORMAL_ROOT   0x3fe6a09e667f3bcdull   /* the bits of sqrt(1/2) */
#define KNORMAL_LN2_HI 0x1.62e42fefa38p-1      /* 42 bits: a product with an exponent is exact */
#define KNORMAL_LN2_LO 5.497923018708371e-14
#define KNORMAL_TURN   6.283185307179586476925286766559
#define KNORMAL_2_PI   0.6366197723675814
#define KNORMAL_PI2_HI 0x1.921fb54442d18p+0
#define KNORMAL_PI2_LO 6.123233995736766e-17
/* log((1 + s) / (1 - s)) = 2 s + s q L(q), sin r = r + r q S(q), cos r = 1 - q / 2 + q^2 C(q), each
 * with q the square: interpolation at Chebyshev nodes, |s| <= .1716, |r| <= pi/4 */
#define KNORMAL_L0 0x1.5555555555558p-1
#define KNORMAL_L1 0x1.99999999952d7p-2
#define KNORMAL_L2 0x1.2492492df281ap-2
#define KNORMAL_L3 0x1.c71c62e3f11e5p-3
#define KNORMAL_L4 0x1.7462b51cb66eap-3
#define KNORMAL_L5 0x1.39fe51a7c12d9p-3
#define KNORMAL_L6 0x1.2b5900de57b3bp-3
#define KNORMAL_S0 (-0x1.5555555555555p-3)
#define KNORMAL_S1 0x1.1111111110bb2p-7
#define KNORMAL_S2 (-0x1.a01a019e83816p-13)
#define KNORMAL_S3 0x1.71de379654304p-19
#define KNORMAL_S4 (-0x1.ae600aca92c63p-26)
#define KNORMAL_S5 0x1.5e0b05bff209ap-33
#define KNORMAL_C0 0x1.5555555555555p-5
#define KNORMAL_C1 (-0x1.6c16c16c16967p-10)
#define KNORMAL_C2 0x1.a01a019f4e9b4p-16
#define KNORMAL_C3 (-0x1.27e4fa17bf139p-22)
#define KNORMAL_C4 0x1.1eeb68cd22f56p-29
#define KNORMAL_C5 (-0x1.907d8f29fe7d9p-37)

KERN_FN uint64_t kern_bits64(double d) {
    union { double d; uint64_t u; } v = { d };
    return v.u;
}
KERN_FN double kern_double(uint64_t u) {
    union { uint64_t u; double d; } v = { u };
    return v.d;
}

/* log u of a normal u in (0, 1) */
KERN_FN double kern_log64(double u) {
    const uint64_t bits = kern_bits64(u), up = bits - KNORMAL_ROOT + (1024ull << 52);
    const double k = (double)(int32_t)(up >> 52) - 1024.0;
    const double f = kern_double(bits - (up & 0xfff0000000000000ull) + (1024ull << 52)) - 1.0;
    const double s = f / (2.0 + f), q = s * s, half = 0.5 * f * f;
    double l = fma(KNORMAL_L6, q, KNORMAL_L5);
    l = fma(l, q, KNORMAL_L4);
    l = fma(l, q, KNORMAL_L3);
    l = fma(l, q, KNORMAL_L2);
    l = fma(l, q, KNORMAL_L1);
    l = fma(l, q, KNORMAL_L0);
    return fma(k, KNORMAL_LN2_HI,
               f - (half - fma(s, fma(l, q, half), k * KNORMAL_LN2_LO)));
}

/* cosine and sine of an angle in [0, 2 pi] */
KERN_FN void kern_turn64(double angle, double *c, double *s) {
    const double t = fma(angle, KNORMAL_2_PI, KNORMAL_MAGIC), n = t - KNORMAL_MAGIC,
                 r = fma(-n, KNORMAL_PI2_LO, fma(-n, KNORMAL_PI2_HI, angle)), q = r * r,
                 half = 0.5 * q, w = 1.0 - half;
    double ps = fma(KNORMAL_S5, q, KNORMAL_S4), pc = fma(KNORMAL_C5, q, KNORMAL_C4);
    ps = fma(ps, q, KNORMAL_S3);
    pc = fma(pc, q, KNORMAL_C3);
    ps = fma(ps, q, KNORMAL_S2);
    pc = fma(pc, q, KNORMAL_C2);
    ps = fma(ps, q, KNORMAL_S1);
    pc = fma(pc, q, KNORMAL_C1);
    ps = fma(ps, q, KNORMAL_S0);
    pc = fma(pc, q, KNORMAL_C0);
    ps = fma(r * q, ps, r);
    pc = w + fma(q * q, pc, (1.0 - w) - half);
    const uint64_t quarter = kern_bits64(t);
    const double sine = quarter & 1 ? pc : ps, cosine = quarter & 1 ? ps : pc;
    *s = kern_double(kern_bits64(sine) ^ (quarter & 2) << 62);
    *c = kern_double(kern_bits64(cosine) ^ ((quarter + 1) & 2) << 62);
}

/* Two standard normal numbers from two words: Box-Muller on u = (w + 1/2) 2^-32. */
KERN_FN void kern_normal2(double z[2], uint32_t w0, uint32_t w1) {
    const double u = ((double)w0 + 0.5) * KNORMAL_2_32, v = ((double)w1 + 0.5) * KNORMAL_2_32,
                 radius = sqrt(-2.0 * kern_log64(u));
    double c, s;
    kern_turn64(KNORMAL_TURN * v, &c, &s);
    z[0] = radius * c;
    z[1] = radius * s;
}

/* z of elements 4 quad .. 4 quad + 3 of a tensor (kernels/weights.h). */
KERN_FN void kern_weight_draw4(double z[4], const uint32_t key[2], uint32_t tensor, size_t quad) {
    const uint32_t counter[4] = { (uint32_t)quad, tensor, 0, 0 };
    const struct rng4 r = rng_philox(counter, key);
    kern_normal2(z, r.v[0], r.v[1]);
    kern_normal2(z + 2, r.v[2], r.v[3]);
}
/* z becomes the noise itself. */
KERN_FN float kern_weight_dw(double sd, double z) {
    return bf16_to_f32(f32_to_bf16((float)(sd * z)));
}
#endif
