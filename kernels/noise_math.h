/* noise_math.h - a draw as arithmetic on floats, which every CPU path repeats bit for bit.
 *
 * Knows: what a random word becomes, how a term is added and what is measured of it, one element at
 * a time. Only operations of math.h's kind and sqrt; sums in 16 lanes. Constants are named for the
 * vector form (simd/draw.h). Accuracy: sine and cosine within 2^-23 of the true ones, a normal
 * number within 2^-20 of what its words give in exact arithmetic on u.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_KERN_NOISE_MATH_H
#define QERL_KERN_NOISE_MATH_H
#include "kernels/kern.h"
#include "kernels/math.h"
#include "kernels/pack.h"
#include "lib/base/rng.h"

/* sin(pi/2 f) = f S(f^2), cos(pi/2 f) = 1 + f^2 C(f^2) for |f| <= 1/2: Chebyshev fits */
#define KTURN_S0 (-0.00460214921f)
#define KTURN_S1 0.0796802176f
#define KTURN_S2 (-0.645963478f)
#define KTURN_S3 1.57079632f
#define KTURN_C0 0.000906739898f
#define KTURN_C1 (-0.0208615283f)
#define KTURN_C2 0.253669410f
#define KTURN_C3 (-1.23370055f)
#define KNOISE_SQRT3 1.73205081f
#define KNOISE_R_MOST 4096.0f                /* a larger r is no measurement: all fits 64 bits */
#define KNOISE_RELATIVE_LEAST 0x1p-100f      /* nor is that of a smaller t, of a relative type */
#define KNOISE_FP8_LEAST 0x1p-6f
#define KNOISE_FP8_MOST 240.0f               /* what 448 becomes, too */

/* in (0, 1], steps of 2^-24 */
KERN_FN float kern_unitf(uint32_t w) {
    return fmaf((float)(int32_t)(w >> 8), 0x1p-24f, 0x1p-25f);
}

/* cosine and sine of u turns, u in [0, 1] */
KERN_FN void kern_turnf(float u, float *c, float *s) {
    float t = fmaf(u, 4.0f, KEXP_MAGIC), f = fmaf(u, 4.0f, KEXP_MAGIC - t), q = f * f;
    float ps = fmaf(fmaf(fmaf(KTURN_S0, q, KTURN_S1), q, KTURN_S2), q, KTURN_S3) * f;
    float pc = fmaf(fmaf(fmaf(fmaf(KTURN_C0, q, KTURN_C1), q, KTURN_C2), q, KTURN_C3), q, 1.0f);
    uint32_t n = kern_bits(t);                                    /* its low bits: the quarter */
    float sine = n & 1 ? pc : ps, cosine = n & 1 ? ps : pc;
    *s = kern_float(kern_bits(sine) ^ (n & 2) << 30);
    *c = kern_float(kern_bits(cosine) ^ ((n + 1) & 2) << 30);
}

/* Two standard normal numbers from two words. */
KERN_FN void kern_normal2f(float z[2], uint32_t w0, uint32_t w1) {
    float radius = sqrtf(-2.0f * kern_logf(kern_unitf(w0))), c, s;
    kern_turnf(kern_unitf(w1), &c, &s);
    z[0] = radius * c;
    z[1] = radius * s;
}
KERN_FN float kern_uniformf(uint32_t w) {
    return fmaf(kern_unitf(w), 2.0f * KNOISE_SQRT3, -KNOISE_SQRT3);
}
KERN_FN float kern_signf(uint32_t w) { return w & 1 ? -1.0f : 1.0f; }

/* Words whose top 24 bits are below this are hit. */
KERN_FN uint32_t kern_noise_hits(float rate) {
    double hits = (double)rate * 0x1p24;
    return hits < 0.0 ? 0 : hits > 0x1p24 ? 1u << 24 : (uint32_t)(hits + 0.5);
}

/* The key of this noise's draws: whoever draws asks here. */
KERN_FN void kern_noise_key(uint32_t key[2], const struct kern_noise *n) {
    const uint32_t *at = (const uint32_t *)n->key_at.p;
    key[0] = at ? at[0] : n->key[0];
    key[1] = at ? at[1] : n->key[1];
}
KERN_FN bool kern_noise_draws(enum kern_noise_type type) {
    return type != KERN_NOISE_DEADZONE && type != KERN_NOISE_BIAS && type != KERN_NOISE_FP8;
}
/* z of the four elements of one counter; 0 for types that draw nothing. */
KERN_FN void kern_noise_draw4(float z[4], const struct kern_noise *n,
                                    const uint32_t counter[4]) {
    z[0] = z[1] = z[2] = z[3] = 0.0f;
    if (!kern_noise_draws(n->type)) return;
    uint32_t key[2];
    kern_noise_key(key, n);
    struct rng4 r = rng_philox(counter, key);
    const uint32_t *w = r.v, hits = kern_noise_hits(n->rate);
    switch (n->type) {
    case KERN_NOISE_RELATIVE_UNIFORM:
        for (int i = 0; i < 4; i++) z[i] = kern_uniformf(w[i]);
        return;
    case KERN_NOISE_SYSTEMATIC:
        for (int i = 0; i < 4; i++) z[i] = kern_signf(w[i]);
        return;
    case KERN_NOISE_SPARSE:
        for (int i = 0; i < 4; i++) z[i] = w[i] >> 8 < hits ? kern_signf(w[i]) : 0.0f;
        return;
    default:
        kern_normal2f(z, w[0], w[1]);
        kern_normal2f(z + 2, w[2], w[3]);
    }
}

/* e is z times |t| or t: it commutes with a division of the whole row. */
KERN_FN bool kern_noise_relative(const struct kern_noise *n) {
    return n->type < KERN_NOISE_DEADZONE;
}
/* What attn_bwd can make; peaks: it has what attn left of the rows. */
KERN_FN bool kern_noise_backward(const struct kern_attn_noise *n, bool peaks) {
    const struct kern_noise *each[] = { &n->dprobs, &n->dscores, &n->scores };
    for (size_t i = 0; i < (peaks ? 2 : COUNT_OF(each)); i++)
        if (!kern_noise_relative(each[i]) && each[i]->type != KERN_NOISE_ABSOLUTE_GAUSSIAN)
            return false;
    return peaks || kern_noise_relative(&n->probs);
}

/* First three words of a row's counters; the fourth is the site's, plus i / 4. */
KERN_FN void kern_noise_counter(uint32_t c[4], const struct kern_noise *n, int row,
                                      uint32_t head) {
    const uint32_t *id = (const uint32_t *)n->id.p;
    bool fixed = n->type == KERN_NOISE_SYSTEMATIC;
    c[0] = fixed || !id ? ~0u : id[2 * row];
    c[1] = (fixed || !id ? (uint32_t)KERN_NOISE_NO_SAMPLE : id[2 * row + 1]) | head << 16;
    c[2] = fixed ? ~0u : n->pos.p ? (uint32_t)((const int32_t *)n->pos.p)[row] : (uint32_t)row;
    c[3] = n->site;
}

/* What a span measures: a row of perturb, a page of a row in attention. */
struct kern_noise_lanes { float r[16], r2[16]; int64_t sum[KERN_NOISE_SUMS]; };

/* Closes a span: its lanes go into the sums. */
KERN_FN void kern_noise_span(struct kern_noise_lanes *l) {
    l->sum[KERN_NOISE_R] += llrintf(kern_fold16(l->r) * 0x1p20f);
    l->sum[KERN_NOISE_R2] += llrintf(kern_fold16(l->r2) * 0x1p20f);
    memset(l->r, 0, sizeof l->r);
    memset(l->r2, 0, sizeof l->r2);
}

KERN_FN float kern_noise_round(float x, bool bf16) {
    return bf16 ? bf16_to_f32(f32_to_bf16(x)) : x;
}
/* From it on the arithmetic's steps are coarse for an absolute size. */
KERN_FN float kern_noise_coarse(const struct kern_noise *n) {
    return n->scale * (n->type == KERN_NOISE_BIAS ? KERN_NOISE_COARSE_BIAS
                                                  : KERN_NOISE_COARSE_GAUSSIAN) *
           (n->bf16 ? 0x1p-16f : 1.0f);
}
/* E4M3 of kernels/noise.h. With no bit left of the mantissa a carry has made the next exponent: one
 * step back is 1.875 of the old one. */
KERN_FN float kern_fp8f(float t) {
    const float size = fabsf(t), least = size < KNOISE_FP8_LEAST ? KNOISE_FP8_LEAST : size;
    const uint32_t u = kern_bits(least > KNOISE_FP8_MOST ? KNOISE_FP8_MOST : least),
                   r = (u + 0x7ffffu + (u >> 20 & 1)) & 0xfff00000u,
                   back = (r ^ u) >> 3 & 0x100000u;
    if (!(size > 0.0f && size < INFINITY)) return t;
    return kern_float((r - back) | (kern_bits(t) & 0x80000000u));
}
/* Below it type deadzone flushes; most is the row's largest |t|. */
KERN_FN float kern_noise_edge(const struct kern_noise *n, float most) {
    return kern_noise_round(n->scale * kern_noise_round(most, n->bf16), n->bf16);
}

/* t + e of element i; counts into l where that is given. */
KERN_FN float kern_noise_add(const struct kern_noise *n, float t, float z, float edge, int i,
                                   struct kern_noise_lanes *l) {
    t = kern_noise_round(t, n->bf16), z = kern_noise_round(z, n->bf16);
    const bool flat = n->type == KERN_NOISE_ABSOLUTE_GAUSSIAN || n->type == KERN_NOISE_BIAS,
               flush = n->type == KERN_NOISE_DEADZONE, fp8 = n->type == KERN_NOISE_FP8;
    float size = fabsf(t), by = flat ? 1.0f : n->type == KERN_NOISE_SYSTEMATIC ? t : size;
    if (n->type == KERN_NOISE_BIAS) z = t > 0.0f ? 1.0f : t < 0.0f ? -1.0f : 0.0f;
    if (flush) z = size < edge ? -1.0f : 0.0f;
    float least = size < KNOISE_FP8_LEAST ? KNOISE_FP8_LEAST : size,
          m = flush ? t : fp8 ? least : by * n->scale, e = z * m;
    if (n->bf16 && !flush)
        e = kern_noise_round(kern_noise_round(z * by, true) * n->scale, true);
    if (!(fabsf(m) < INFINITY)) e = 0.0f;
    float y = fp8 ? kern_fp8f(t) : kern_noise_round(t + e, n->bf16);
    if (!l) return y;
    float r = (y - t) / fabsf(m);
    bool changed = y < t || y > t,
         some = n->type == KERN_NOISE_ABSOLUTE_GAUSSIAN ||
                size > (kern_noise_relative(n) ? KNOISE_RELATIVE_LEAST : 0.0f),
         measured = some && fabsf(r) < KNOISE_R_MOST,
         coarse = flat ? !(size < kern_noise_coarse(n))
                       : fp8 && (size < KNOISE_FP8_LEAST || size > KNOISE_FP8_MOST);
    if (measured) {
        l->r[i & 15] += r;
        l->r2[i & 15] = fmaf(r, r, l->r2[i & 15]);
    }
    l->sum[KERN_NOISE_ELEMENTS]++;
    l->sum[KERN_NOISE_MEASURED] += measured;
    l->sum[KERN_NOISE_COARSE] += measured && coarse;
    l->sum[KERN_NOISE_CHANGED] += changed;
    l->sum[KERN_NOISE_CHANGED_BF16] += changed && f32_to_bf16(y) != f32_to_bf16(t);
    return y;
}
#endif
