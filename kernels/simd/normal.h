/* normal.h - kernels/normal.h lane by lane: sixteen pairs of words to sixteen pairs of numbers.
 *
 * Doubles are vectors of the compiler's, WIDE a register; the same operations in the same order as
 * the text they repeat, so the same bits.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_SIMD_NORMAL_H
#define QERL_SIMD_NORMAL_H
#include "kernels/normal.h"
#include "kernels/simd/draw.h"

#if defined(__AVX512F__)
enum { WIDE = 8 };
typedef double vd __attribute__((vector_size(64)));
typedef uint64_t vq __attribute__((vector_size(64)));
typedef uint32_t vw __attribute__((vector_size(32)));
typedef float vh __attribute__((vector_size(32)));
INLINE vd d_fma(vd a, vd b, vd c) { return _mm512_fmadd_pd(a, b, c); }
INLINE vd d_sqrt(vd a) { return _mm512_sqrt_pd(a); }
INLINE vd d_set(double x) { return _mm512_set1_pd(x); }
INLINE vu i_load(const uint32_t *p) { return _mm512_loadu_si512(p); }
INLINE void i_store(uint32_t *to, vu x) { _mm512_storeu_si512(to, x); }
#else
enum { WIDE = 4 };
typedef double vd __attribute__((vector_size(32)));
typedef uint64_t vq __attribute__((vector_size(32)));
typedef uint32_t vw __attribute__((vector_size(16)));
typedef float vh __attribute__((vector_size(16)));
INLINE vd d_fma(vd a, vd b, vd c) { return _mm256_fmadd_pd(a, b, c); }
INLINE vd d_sqrt(vd a) { return _mm256_sqrt_pd(a); }
INLINE vd d_set(double x) { return _mm256_set1_pd(x); }
INLINE vu i_load(const uint32_t *p) {
    return (vu){ _mm256_loadu_si256((const __m256i *)(const void *)p),
                 _mm256_loadu_si256((const __m256i *)(const void *)(p + 8)) };
}
INLINE void i_store(uint32_t *to, vu x) {
    _mm256_storeu_si256((__m256i *)(void *)to, x.a);
    _mm256_storeu_si256((__m256i *)(void *)(to + 8), x.b);
}
#endif

INLINE vd d_of_floats(const float *p) {
    vh h;
    memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, vd);
}
INLINE void d_to_floats(float *p, vd x) {
    const vh h = __builtin_convertvector(x, vh);
    memcpy(p, &h, sizeof h);
}
/* An integer below 2^32 as a double: the low bits of 2^52 + it. */
INLINE vd d_of_bits(vq x) { return (vd)(x | 0x4330000000000000ull) - 0x1p52; }
/* (w + 1/2) 2^-32 */
INLINE vd d_unit(const uint32_t *w) {
    vw words;
    memcpy(&words, w, sizeof words);
    return (d_of_bits(__builtin_convertvector(words, vq)) + 0.5) * KNORMAL_2_32;
}
INLINE vd d_pick(vq all_ones, vd a, vd b) {
    return (vd)(((vq)a & all_ones) | ((vq)b & ~all_ones));
}

INLINE vd d_log(vd u) {                                                   /* kern_log64 */
    const vq bits = (vq)u, up = bits - KNORMAL_ROOT + (1024ull << 52);
    const vd k = d_of_bits(up >> 52) - 1024.0,
             f = (vd)(bits - (up & 0xfff0000000000000ull) + (1024ull << 52)) - 1.0,
             s = f / (2.0 + f), q = s * s, half = 0.5 * f * f;
    vd l = d_fma(d_set(KNORMAL_L6), q, d_set(KNORMAL_L5));
    l = d_fma(l, q, d_set(KNORMAL_L4));
    l = d_fma(l, q, d_set(KNORMAL_L3));
    l = d_fma(l, q, d_set(KNORMAL_L2));
    l = d_fma(l, q, d_set(KNORMAL_L1));
    l = d_fma(l, q, d_set(KNORMAL_L0));
    return d_fma(k, d_set(KNORMAL_LN2_HI),
                 f - (half - d_fma(s, d_fma(l, q, half), k * KNORMAL_LN2_LO)));
}

INLINE void d_turn(vd angle, vd *c, vd *s) {                              /* kern_turn64 */
    const vd t = d_fma(angle, d_set(KNORMAL_2_PI), d_set(KNORMAL_MAGIC)), n = t - KNORMAL_MAGIC,
             r = d_fma(-n, d_set(KNORMAL_PI2_LO), d_fma(-n, d_set(KNORMAL_PI2_HI), angle)),
             q = r * r, half = 0.5 * q, w = 1.0 - half;
    vd ps = d_fma(d_set(KNORMAL_S5), q, d_set(KNORMAL_S4)),
       pc = d_fma(d_set(KNORMAL_C5), q, d_set(KNORMAL_C4));
    ps = d_fma(ps, q, d_set(KNORMAL_S3));
    pc = d_fma(pc, q, d_set(KNORMAL_C3));
    ps = d_fma(ps, q, d_set(KNORMAL_S2));
    pc = d_fma(pc, q, d_set(KNORMAL_C2));
    ps = d_fma(ps, q, d_set(KNORMAL_S1));
    pc = d_fma(pc, q, d_set(KNORMAL_C1));
    ps = d_fma(ps, q, d_set(KNORMAL_S0));
    pc = d_fma(pc, q, d_set(KNORMAL_C0));
    ps = d_fma(r * q, ps, r);
    pc = w + d_fma(q * q, pc, (1.0 - w) - half);
    const vq quarter = (vq)t, odd = -(quarter & 1);
    *s = (vd)((vq)d_pick(odd, pc, ps) ^ (quarter & 2) << 62);
    *c = (vd)((vq)d_pick(odd, ps, pc) ^ ((quarter + 1) & 2) << 62);
}

/* sd * z of kern_normal2 as f32; sixteen lanes of words. */
INLINE void normal2(float z0[16], float z1[16], vu w0, vu w1, double sd) {
    uint32_t word[2][16];
    i_store(word[0], w0);
    i_store(word[1], w1);
    for (int i = 0; i < 16; i += WIDE) {
        const vd radius = d_sqrt(-2.0 * d_log(d_unit(word[0] + i)));
        vd c, s;
        d_turn(KNORMAL_TURN * d_unit(word[1] + i), &c, &s);
        d_to_floats(z0 + i, sd * (radius * c));
        d_to_floats(z1 + i, sd * (radius * s));
    }
}
#endif
