/* math.h - the exp, log and 16-lane sums that every CPU path shares, bit for bit.
 *
 * Only fma, add, multiply, divide, compare and integer operations: a vector path repeats them lane
 * by lane and gets the same bits. Constants are named so that the vector forms (simd/vec.h) cannot
 * drift from these. Accuracy: exp and log within 2 ulp; exp(-inf) = 0, overflow gives inf,
 * subnormal results are right; NaN passes. Source of the polynomials: Cephes (S. Moshier), expf.c
 * and logf.c.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_KERN_MATH_H
#define QERL_KERN_MATH_H
#include "lib/base/sys.h"

#include <math.h>

#define KEXP_MOST   89.0f              /* above: 2^128 and more, which is inf */
#define KEXP_LEAST  (-105.0f)          /* below: less than half of the least subnormal, which is 0 */
#define KEXP_LOG2E  1.44269504088896341f
#define KEXP_MAGIC  12582912.0f        /* 1.5 * 2^23: adding it rounds to an integer in the low bits */
#define KEXP_LN2_HI 0.693359375f
#define KEXP_LN2_LO (-2.12194440e-4f)
#define KEXP_P0     1.9875691500e-4f
#define KEXP_P1     1.3981999507e-3f
#define KEXP_P2     8.3334519073e-3f
#define KEXP_P3     4.1665795894e-2f
#define KEXP_P4     1.6666665459e-1f
#define KEXP_P5     5.0000001201e-1f
#define KLOG_P0     7.0376836292e-2f
#define KLOG_P1     (-1.1514610310e-1f)
#define KLOG_P2     1.1676998740e-1f
#define KLOG_P3     (-1.2420140846e-1f)
#define KLOG_P4     1.4249322787e-1f
#define KLOG_P5     (-1.6668057665e-1f)
#define KLOG_P6     2.0000714765e-1f
#define KLOG_P7     (-2.4999993993e-1f)
#define KLOG_P8     3.3333331174e-1f

KERN_FN uint32_t kern_bits(float f) {
    union { float f; uint32_t u; } v = { f };
    return v.u;
}
KERN_FN float kern_float(uint32_t u) {
    union { uint32_t u; float f; } v = { u };
    return v.f;
}

KERN_FN float kern_expf(float x) {
    x = KEXP_MOST < x ? KEXP_MOST : x;                                   /* both keep a NaN */
    x = KEXP_LEAST > x ? KEXP_LEAST : x;
    float t = fmaf(x, KEXP_LOG2E, KEXP_MAGIC);
    int32_t n = (int32_t)(kern_bits(t) - kern_bits(KEXP_MAGIC));
    float k = t - KEXP_MAGIC;
    float r = fmaf(k, -KEXP_LN2_LO, fmaf(k, -KEXP_LN2_HI, x));
    float p = fmaf(KEXP_P0, r, KEXP_P1);
    p = fmaf(p, r, KEXP_P2);
    p = fmaf(p, r, KEXP_P3);
    p = fmaf(p, r, KEXP_P4);
    p = fmaf(p, r, KEXP_P5);
    p = fmaf(p, r * r, r) + 1.0f;
    /* 2^n in two steps: n may be -151 or 128 */
    int32_t first = n >> 1;
    float a = kern_float((uint32_t)(first + 127) << 23);
    float b = kern_float(((uint32_t)n - (uint32_t)first + 127u) << 23);
    return p * a * b;
}

KERN_FN float kern_logf(float x) {
    if (!(x > 0.0f)) return x == 0.0f ? -INFINITY : NAN;
    if (x == INFINITY) return x;
    int e = 0;
    if (x < 1.17549435e-38f) {
        x *= 8388608.0f;
        e = -23;
    }
    uint32_t u = kern_bits(x);
    e += (int)(u >> 23) - 126;
    float m = kern_float((u & 0x007fffffu) | 0x3f000000u);               /* [.5, 1) */
    if (m < 0.707106781186547524f) {
        e--;
        m = m + m;
    }
    float f = m - 1.0f, z = f * f, k = (float)e;
    float p = fmaf(KLOG_P0, f, KLOG_P1);
    p = fmaf(p, f, KLOG_P2);
    p = fmaf(p, f, KLOG_P3);
    p = fmaf(p, f, KLOG_P4);
    p = fmaf(p, f, KLOG_P5);
    p = fmaf(p, f, KLOG_P6);
    p = fmaf(p, f, KLOG_P7);
    p = fmaf(p, f, KLOG_P8);
    float y = f * z * p;
    y = fmaf(k, KEXP_LN2_LO, y);
    y = fmaf(-0.5f, z, y);
    return fmaf(k, KEXP_LN2_HI, f + y);
}

KERN_FN float kern_sigmoidf(float x) { return 1.0f / (1.0f + kern_expf(-x)); }

/* Lane i += lane i + step, for step = 8, 4, 2, 1. */
KERN_FN float kern_fold16(float lane[16]) {
    for (int step = 8; step > 0; step >>= 1)
        for (int i = 0; i < step; i++) lane[i] += lane[i + step];
    return lane[0];
}
/* Dot product in the canonical order: lane i takes elements i, i + 16, ... */
KERN_FN float kern_dotf(const float *a, const float *b, int n) {
    float lane[16] = { 0 };
    for (int i = 0; i < n; i++) lane[i & 15] = fmaf(a[i], b[i], lane[i & 15]);
    return kern_fold16(lane);
}
/* One step of the tile order (kern.h): subnormal operands and results are zero. A result counts as
 * subnormal by its exact value: what rounds up to 2^-126 only for want of bits is zero too. */
KERN_FN float kern_flushf(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }
KERN_FN float kern_fma_flush(float a, float b, float c) {
    a = kern_flushf(a), b = kern_flushf(b), c = kern_flushf(c);
    float y = fmaf(a, b, c);
    if (!(fabsf(y) <= 0x1p-126f)) return y;
    bool tiny = fabs((double)a * (double)b + (double)c) < 0x1p-126 * (1.0 - 0x1p-25);
    return tiny ? copysignf(0.0f, y) : y;
}
/* acc + the products of a[k * a_ld] and b[k * b_ld] in the tile order. */
KERN_FN float kern_dot_tile(float acc, const float *a, size_t a_ld, const float *b,
                                  size_t b_ld, size_t n) {
    for (size_t at = 0; at < n; at += 32) {
        float chain[2] = { 0.0f, 0.0f };
        for (size_t k = at; k < at + 32; k++)
            chain[k & 1] = k < n ? kern_fma_flush(a[k * a_ld], b[k * b_ld], chain[k & 1])
                                 : chain[k & 1] + 0.0f;
        acc = kern_flushf(kern_flushf(acc) + kern_flushf(chain[0] + chain[1]));
    }
    return acc;
}
#endif
