/* draw.h - sixteen counters to sixty-four draws: Philox, logarithm, sine and cosine of
 * noise_math.h on AVX-512 or AVX2. Beside vec.h the file that knows intrinsics.
 *
 * Counters lie in lanes so that after a transposition inside 128 bits the four vectors are
 * neighbours: lane 4 g + j makes lanes 4 g .. 4 g + 3 of vector j.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_SIMD_DRAW_H
#define QERL_SIMD_DRAW_H
#include "kernels/simd/vec.h"

/* vu: sixteen uint32. wi: the same in 64-bit lanes, even ones and odd ones; what lies above their
 * low halves is never read. vm: a truth a lane. */
#if defined(__AVX512F__)
typedef __m512i vu;
typedef struct { __m512i even, odd; } wi;
typedef __mmask16 vm;

INLINE vu i_set(uint32_t x) { return _mm512_set1_epi32((int32_t)x); }
INLINE vu i_or(vu a, vu b) { return _mm512_or_si512(a, b); }
/* lanes 4 g, 4 g + 1: x; the other two: y */
INLINE vu i_two(uint32_t x, uint32_t y) {
    return _mm512_mask_mov_epi32(i_set(x), 0xcccc, i_set(y));
}
/* lane 4 g + j: 4 (j & most) + g */
INLINE vu i_places(int most) {
    const __m512i j = _mm512_and_si512(_mm512_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1,
                                                         2, 3), _mm512_set1_epi32(most));
    return _mm512_add_epi32(_mm512_slli_epi32(j, 2),
                            _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3));
}
INLINE wi w_split(vu x) { return (wi){ x, _mm512_srli_epi64(x, 32) }; }
INLINE vu w_join(wi x) {
    return _mm512_mask_mov_epi32(x.even, 0xaaaa, _mm512_slli_epi64(x.odd, 32));
}
INLINE wi w_mul(wi x, uint32_t by) {
    const __m512i m = _mm512_set1_epi64((int64_t)by);
    return (wi){ _mm512_mul_epu32(x.even, m), _mm512_mul_epu32(x.odd, m) };
}
INLINE __m512i w_mix1(__m512i p, __m512i c, uint32_t k) {
    return _mm512_ternarylogic_epi32(_mm512_srli_epi64(p, 32), c, _mm512_set1_epi32((int32_t)k),
                                     0x96);
}
/* high half of p ^ c ^ k */
INLINE wi w_mix(wi p, wi c, uint32_t k) {
    return (wi){ w_mix1(p.even, c.even, k), w_mix1(p.odd, c.odd, k) };
}
INLINE vf i_unit(vu w) {
    return v_fma(_mm512_cvtepi32_ps(_mm512_srli_epi32(w, 8)), v_set(0x1p-24f), v_set(0x1p-25f));
}
/* x = m 2^k with m in [sqrt 1/2, sqrt 2), x normal */
INLINE vf v_mantissa(vf x, vf *k) {
    const __m512i u = _mm512_castps_si512(x),
                  e = _mm512_srai_epi32(_mm512_sub_epi32(u, _mm512_set1_epi32(0x3f3504f3)), 23);
    *k = _mm512_cvtepi32_ps(e);
    return _mm512_castsi512_ps(_mm512_sub_epi32(u, _mm512_slli_epi32(e, 23)));
}
/* Of quarter t's low two bits: odd ones take b; bit 1 of the bits + add is the sign. */
INLINE vf v_quarter(vf t, vf a, vf b, int add) {
    const __m512i n = _mm512_castps_si512(t);
    const vf x = _mm512_mask_mov_ps(a, _mm512_test_epi32_mask(n, _mm512_set1_epi32(1)), b);
    const __m512i sign = _mm512_slli_epi32(
        _mm512_and_si512(_mm512_add_epi32(n, _mm512_set1_epi32(add)), _mm512_set1_epi32(2)), 30);
    return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(x), sign));
}
/* 1 or -1 by the lowest bit */
INLINE vf i_sign(vu w) {
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_slli_epi32(w, 31),
                                               _mm512_castps_si512(v_set(1.0f))));
}
INLINE vm i_hit(vu w, uint32_t hits) {
    return _mm512_cmplt_epu32_mask(_mm512_srli_epi32(w, 8), _mm512_set1_epi32((int32_t)hits));
}
INLINE void v_transpose4(vf x[4]) {
    const vf a = _mm512_unpacklo_ps(x[0], x[1]), b = _mm512_unpackhi_ps(x[0], x[1]),
             c = _mm512_unpacklo_ps(x[2], x[3]), d = _mm512_unpackhi_ps(x[2], x[3]);
    x[0] = _mm512_shuffle_ps(a, c, 0x44);
    x[1] = _mm512_shuffle_ps(a, c, 0xee);
    x[2] = _mm512_shuffle_ps(b, d, 0x44);
    x[3] = _mm512_shuffle_ps(b, d, 0xee);
}
INLINE vm v_less(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
INLINE vm v_differ(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_OQ); }
INLINE vm m_and(vm a, vm b) { return a & b; }
INLINE vm m_first(int n) { return v_mask(n); }
INLINE int m_count(vm m) { return __builtin_popcount(m); }
INLINE vf v_keep(vm m, vf x) { return _mm512_maskz_mov_ps(m, x); }          /* 0 elsewhere */
INLINE __m512i v_rounding(vf x) {
    const __m512i u = _mm512_castps_si512(x),
                  odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7fff));
}
INLINE vf v_fp8(vf t) {                                                       /* kern_fp8f */
    const vf size = v_abs(t);
    const __m512i u = _mm512_castps_si512(v_min(v_max(size, v_set(KNOISE_FP8_LEAST)),
                                                v_set(KNOISE_FP8_MOST))),
                  odd = _mm512_and_si512(_mm512_srli_epi32(u, 20), _mm512_set1_epi32(1)),
                  up = _mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7ffff)),
                  r = _mm512_and_si512(up, _mm512_set1_epi32(-0x100000)),
                  back = _mm512_and_si512(_mm512_srli_epi32(_mm512_xor_si512(r, u), 3),
                                          _mm512_set1_epi32(0x100000)),
                  sign = _mm512_and_si512(_mm512_castps_si512(t), _mm512_set1_epi32(INT32_MIN)),
                  y = _mm512_or_si512(_mm512_sub_epi32(r, back), sign);
    const vm some = m_and(v_less(v_zero(), size), v_less(size, v_set(INFINITY)));
    return _mm512_mask_mov_ps(t, some, _mm512_castsi512_ps(y));
}
/* no NaN in a or b */
INLINE vm v_differ_bf16(vf a, vf b) {
    return _mm512_test_epi32_mask(_mm512_xor_si512(v_rounding(a), v_rounding(b)),
                                  _mm512_set1_epi32(-65536));
}
#else
typedef struct { __m256i a, b; } vu;
typedef struct { vu even, odd; } wi;
typedef vf vm;

INLINE vu i_set(uint32_t x) {
    return (vu){ _mm256_set1_epi32((int32_t)x), _mm256_set1_epi32((int32_t)x) };
}
INLINE vu i_or(vu x, vu y) {
    return (vu){ _mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b) };
}
/* lanes 4 g, 4 g + 1: x; the other two: y */
INLINE vu i_two(uint32_t x, uint32_t y) {
    const __m256i q = _mm256_blend_epi32(_mm256_set1_epi32((int32_t)x),
                                         _mm256_set1_epi32((int32_t)y), 0xcc);
    return (vu){ q, q };
}
/* lane 4 g + j: 4 (j & most) + g */
INLINE vu i_places(int most) {
    const __m256i j = _mm256_and_si256(_mm256_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3),
                                       _mm256_set1_epi32(most)),
                  q = _mm256_slli_epi32(j, 2);
    return (vu){ _mm256_add_epi32(q, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1)),
                 _mm256_add_epi32(q, _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3)) };
}
INLINE wi w_split(vu x) {
    return (wi){ x, { _mm256_srli_epi64(x.a, 32), _mm256_srli_epi64(x.b, 32) } };
}
INLINE vu w_join(wi x) {
    return (vu){ _mm256_blend_epi32(x.even.a, _mm256_slli_epi64(x.odd.a, 32), 0xaa),
                 _mm256_blend_epi32(x.even.b, _mm256_slli_epi64(x.odd.b, 32), 0xaa) };
}
INLINE vu w_mul1(vu x, __m256i m) {
    return (vu){ _mm256_mul_epu32(x.a, m), _mm256_mul_epu32(x.b, m) };
}
INLINE wi w_mul(wi x, uint32_t by) {
    const __m256i m = _mm256_set1_epi64x((int64_t)by);
    return (wi){ w_mul1(x.even, m), w_mul1(x.odd, m) };
}
INLINE __m256i w_mix0(__m256i p, __m256i c, uint32_t k) {
    return _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p, 32), c),
                            _mm256_set1_epi32((int32_t)k));
}
INLINE vu w_mix1(vu p, vu c, uint32_t k) {
    return (vu){ w_mix0(p.a, c.a, k), w_mix0(p.b, c.b, k) };
}
/* high half of p ^ c ^ k */
INLINE wi w_mix(wi p, wi c, uint32_t k) {
    return (wi){ w_mix1(p.even, c.even, k), w_mix1(p.odd, c.odd, k) };
}
INLINE vf i_unit(vu w) {
    const vf x = { _mm256_cvtepi32_ps(_mm256_srli_epi32(w.a, 8)),
                   _mm256_cvtepi32_ps(_mm256_srli_epi32(w.b, 8)) };
    return v_fma(x, v_set(0x1p-24f), v_set(0x1p-25f));
}
INLINE __m256 v_mantissa8(__m256 x, __m256 *k) {
    const __m256i u = _mm256_castps_si256(x),
                  e = _mm256_srai_epi32(_mm256_sub_epi32(u, _mm256_set1_epi32(0x3f3504f3)), 23);
    *k = _mm256_cvtepi32_ps(e);
    return _mm256_castsi256_ps(_mm256_sub_epi32(u, _mm256_slli_epi32(e, 23)));
}
/* x = m 2^k with m in [sqrt 1/2, sqrt 2), x normal */
INLINE vf v_mantissa(vf x, vf *k) {
    return (vf){ v_mantissa8(x.a, &k->a), v_mantissa8(x.b, &k->b) };
}
INLINE __m256 v_quarter8(__m256 t, __m256 a, __m256 b, int add) {
    const __m256i n = _mm256_castps_si256(t);
    const __m256 x = _mm256_blendv_ps(a, b, _mm256_castsi256_ps(_mm256_slli_epi32(n, 31)));
    const __m256i sign = _mm256_slli_epi32(
        _mm256_and_si256(_mm256_add_epi32(n, _mm256_set1_epi32(add)), _mm256_set1_epi32(2)), 30);
    return _mm256_xor_ps(x, _mm256_castsi256_ps(sign));
}
/* Of quarter t's low two bits: odd ones take b; bit 1 of the bits + add is the sign. */
INLINE vf v_quarter(vf t, vf a, vf b, int add) {
    return (vf){ v_quarter8(t.a, a.a, b.a, add), v_quarter8(t.b, a.b, b.b, add) };
}
INLINE __m256 i_sign8(__m256i w) {
    return _mm256_or_ps(_mm256_castsi256_ps(_mm256_slli_epi32(w, 31)), _mm256_set1_ps(1.0f));
}
/* 1 or -1 by the lowest bit */
INLINE vf i_sign(vu w) { return (vf){ i_sign8(w.a), i_sign8(w.b) }; }
INLINE vm i_hit(vu w, uint32_t hits) {                                 /* both below 2^31 */
    const __m256i h = _mm256_set1_epi32((int32_t)hits);
    return (vm){ _mm256_castsi256_ps(_mm256_cmpgt_epi32(h, _mm256_srli_epi32(w.a, 8))),
                 _mm256_castsi256_ps(_mm256_cmpgt_epi32(h, _mm256_srli_epi32(w.b, 8))) };
}
#define V_TWO(op, x, y)     ((vf){ op((x).a, (y).a), op((x).b, (y).b) })
#define V_TWO_I(op, x, y, i) ((vf){ op((x).a, (y).a, i), op((x).b, (y).b, i) })
INLINE void v_transpose4(vf x[4]) {
    const vf a = V_TWO(_mm256_unpacklo_ps, x[0], x[1]),
             b = V_TWO(_mm256_unpackhi_ps, x[0], x[1]),
             c = V_TWO(_mm256_unpacklo_ps, x[2], x[3]),
             d = V_TWO(_mm256_unpackhi_ps, x[2], x[3]);
    x[0] = V_TWO_I(_mm256_shuffle_ps, a, c, 0x44);
    x[1] = V_TWO_I(_mm256_shuffle_ps, a, c, 0xee);
    x[2] = V_TWO_I(_mm256_shuffle_ps, b, d, 0x44);
    x[3] = V_TWO_I(_mm256_shuffle_ps, b, d, 0xee);
}
INLINE vm v_less(vf x, vf y) { return V_TWO_I(_mm256_cmp_ps, x, y, _CMP_LT_OQ); }
INLINE vm v_differ(vf x, vf y) { return V_TWO_I(_mm256_cmp_ps, x, y, _CMP_NEQ_OQ); }
#undef V_TWO
#undef V_TWO_I
INLINE vm m_and(vm x, vm y) { return (vm){ _mm256_and_ps(x.a, y.a), _mm256_and_ps(x.b, y.b) }; }
INLINE vm m_first(int n) {
    return (vm){ _mm256_castsi256_ps(v_mask8(n)), _mm256_castsi256_ps(v_mask8(n - 8)) };
}
INLINE int m_count(vm m) {
    return __builtin_popcount((unsigned)(_mm256_movemask_ps(m.a) | _mm256_movemask_ps(m.b) << 8));
}
INLINE vf v_keep(vm m, vf x) { return m_and(m, x); }                        /* 0 elsewhere */
INLINE __m256 v_fp8_8(__m256 t, __m256 limited, __m256 some) {
    const __m256i u = _mm256_castps_si256(limited),
                  odd = _mm256_and_si256(_mm256_srli_epi32(u, 20), _mm256_set1_epi32(1)),
                  up = _mm256_add_epi32(_mm256_add_epi32(u, odd), _mm256_set1_epi32(0x7ffff)),
                  r = _mm256_and_si256(up, _mm256_set1_epi32(-0x100000)),
                  back = _mm256_and_si256(_mm256_srli_epi32(_mm256_xor_si256(r, u), 3),
                                          _mm256_set1_epi32(0x100000)),
                  sign = _mm256_and_si256(_mm256_castps_si256(t), _mm256_set1_epi32(INT32_MIN)),
                  y = _mm256_or_si256(_mm256_sub_epi32(r, back), sign);
    return _mm256_blendv_ps(t, _mm256_castsi256_ps(y), some);
}
INLINE vf v_fp8(vf t) {                                                       /* kern_fp8f */
    const vf size = v_abs(t),
             x = v_min(v_max(size, v_set(KNOISE_FP8_LEAST)), v_set(KNOISE_FP8_MOST));
    const vm some = m_and(v_less(v_zero(), size), v_less(size, v_set(INFINITY)));
    return (vf){ v_fp8_8(t.a, x.a, some.a), v_fp8_8(t.b, x.b, some.b) };
}
INLINE __m256i v_rounding8(__m256 x) {
    const __m256i u = _mm256_castps_si256(x),
                  odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(u, odd), _mm256_set1_epi32(0x7fff));
}
INLINE __m256 v_differ_bf16_8(__m256 x, __m256 y) {
    const __m256i high = _mm256_srli_epi32(_mm256_xor_si256(v_rounding8(x), v_rounding8(y)), 16);
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(high, _mm256_setzero_si256()));
}
/* no NaN in x or y */
INLINE vm v_differ_bf16(vf x, vf y) {
    return (vm){ v_differ_bf16_8(x.a, y.a), v_differ_bf16_8(x.b, y.b) };
}
#endif

/* From here on both are one text. */
struct draw_key { uint32_t k[10][2]; };                                     /* of every round */
INLINE struct draw_key draw_key(const uint32_t key[2]) {
    struct draw_key d;
    for (uint32_t i = 0; i < 10; i++) {
        d.k[i][0] = key[0] + i * 0x9E3779B9u;
        d.k[i][1] = key[1] + i * 0xBB67AE85u;
    }
    return d;
}
INLINE void draw_words(vu w[4], const struct draw_key *key, vu c0, vu c1, vu c2, vu c3) {
    wi x0 = w_split(c0), x1 = w_split(c1), x2 = w_split(c2), x3 = w_split(c3);
#pragma GCC unroll 10
    for (int i = 0; i < 10; i++) {
        const wi p0 = w_mul(x0, 0xD2511F53u), p1 = w_mul(x2, 0xCD9E8D57u);
        x0 = w_mix(p1, x1, key->k[i][0]);
        x2 = w_mix(p0, x3, key->k[i][1]);
        x1 = p1, x3 = p0;
    }
    w[0] = w_join(x0), w[1] = w_join(x1), w[2] = w_join(x2), w[3] = w_join(x3);
}

INLINE vf v_log(vf x) {                                  /* kern_logf of a normal, finite x > 0 */
    vf k, f = v_sub(v_mantissa(x, &k), v_set(1.0f)), z = v_mul(f, f);
    vf p = v_fma(v_set(KLOG_P0), f, v_set(KLOG_P1));
    p = v_fma(p, f, v_set(KLOG_P2));
    p = v_fma(p, f, v_set(KLOG_P3));
    p = v_fma(p, f, v_set(KLOG_P4));
    p = v_fma(p, f, v_set(KLOG_P5));
    p = v_fma(p, f, v_set(KLOG_P6));
    p = v_fma(p, f, v_set(KLOG_P7));
    p = v_fma(p, f, v_set(KLOG_P8));
    vf y = v_mul(v_mul(f, z), p);
    y = v_fma(k, v_set(KEXP_LN2_LO), y);
    y = v_fma(v_set(-0.5f), z, y);
    return v_fma(k, v_set(KEXP_LN2_HI), v_add(f, y));
}
INLINE void draw_normal2(vf z[2], vu w0, vu w1) {                         /* kern_normal2f */
    const vf radius = v_sqrt(v_mul(v_set(-2.0f), v_log(i_unit(w0)))), u = i_unit(w1),
             four = v_set(4.0f), t = v_fma(u, four, v_set(KEXP_MAGIC)),
             f = v_fma(u, four, v_sub(v_set(KEXP_MAGIC), t)), q = v_mul(f, f);
    vf s = v_fma(v_set(KTURN_S0), q, v_set(KTURN_S1)), c = v_fma(v_set(KTURN_C0), q,
                                                                 v_set(KTURN_C1));
    s = v_fma(s, q, v_set(KTURN_S2));
    c = v_fma(c, q, v_set(KTURN_C2));
    s = v_mul(v_fma(s, q, v_set(KTURN_S3)), f);
    c = v_fma(v_fma(c, q, v_set(KTURN_C3)), q, v_set(1.0f));
    z[0] = v_mul(radius, v_quarter(t, c, s, 1));
    z[1] = v_mul(radius, v_quarter(t, s, c, 0));
}
INLINE vf draw_uniform(vu w) {                                            /* kern_uniformf */
    return v_fma(i_unit(w), v_set(2.0f * KNOISE_SQRT3), v_set(-KNOISE_SQRT3));
}
#endif
