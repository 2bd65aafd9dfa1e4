/* vec.h - sixteen floats as one value, on AVX-512 (one register) or AVX2 (two): with draw.h, which
 * adds integers and draws, all that knows intrinsics but for the multipliers.
 *
 * Every function does lane by lane what kernels/math.h does on one float, in the same order: same
 * bits. `n` is how many lanes count, 0 .. 16; loads give zero beyond, stores leave memory alone.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_SIMD_VEC_H
#define QERL_SIMD_VEC_H
#include <immintrin.h>

#include "kernels/cpu.h"

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
typedef __m512 vf;

INLINE __mmask16 v_mask(int n) { return (__mmask16)((1u << n) - 1u); }
INLINE vf v_set(float x) { return _mm512_set1_ps(x); }
INLINE vf v_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE vf v_load_n(const float *p, int n) {
    return n == 16 ? v_load(p) : _mm512_maskz_loadu_ps(v_mask(n), p);
}
INLINE void v_store(float *p, vf v) { _mm512_storeu_ps(p, v); }
INLINE void v_store_n(float *p, vf v, int n) {
    if (n == 16) v_store(p, v);
    else _mm512_mask_storeu_ps(p, v_mask(n), v);
}
INLINE vf v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf v_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
INLINE vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf v_div(vf a, vf b) { return _mm512_div_ps(a, b); }
INLINE vf v_sqrt(vf a) { return _mm512_sqrt_ps(a); }
INLINE vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf v_neg(vf a) {
    return _mm512_castsi512_ps(
        _mm512_xor_si512(_mm512_castps_si512(a), _mm512_set1_epi32(INT32_MIN)));
}
INLINE vf v_max(vf x, vf m) { return _mm512_max_ps(x, m); }              /* x > m ? x : m */
INLINE vf v_min(vf x, vf m) { return _mm512_min_ps(x, m); }              /* x < m ? x : m */
/* lanes < n from a */
INLINE vf v_pick(vf a, vf b, int n) { return _mm512_mask_blend_ps(v_mask(n), b, a); }
INLINE vf v_zero_unless_positive(vf x, vf if_positive) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ), if_positive);
}
/* 0 where |x| < 2^-126 */
INLINE vf v_flush(vf x) {
    const __m512 least = _mm512_set1_ps(0x1p-126f);
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(_mm512_abs_ps(x), least, _CMP_NLT_UQ), x);
}
/* p 2^n, rounded once; n = t - KEXP_MAGIC = k */
INLINE vf v_times_pow2(vf p, vf t, vf k) {
    (void)t;
    return _mm512_scalef_ps(p, k);
}
/* step where a >= least, else 0, added to y */
INLINE vf v_climb(vf y, vf a, float least, float step) {
    return _mm512_mask_add_ps(y, _mm512_cmp_ps_mask(a, v_set(least), _CMP_GE_OQ), y, v_set(step));
}
INLINE vf v_abs(vf x) { return _mm512_abs_ps(x); }
INLINE vf v_copysign(vf x, vf from) {                                    /* x >= 0 */
    const __m512i bit = _mm512_set1_epi32(INT32_MIN);
    return _mm512_castsi512_ps(_mm512_or_si512(
        _mm512_castps_si512(x), _mm512_and_si512(_mm512_castps_si512(from), bit)));
}
INLINE vf v_widen(__m256i h) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
INLINE vf v_load_h(const uint16_t *p) { return v_widen(_mm256_loadu_si256((const __m256i *)p)); }
INLINE vf v_load_h_n(const uint16_t *p, int n) {
    return n == 16 ? v_load_h(p) : v_widen(_mm256_maskz_loadu_epi16(v_mask(n), p));
}
/* 16 pairs of a type: their first elements, their second ones. */
INLINE void v_pairs_h(const uint16_t *p, vf pair[2]) {
    const __m512i u = _mm512_loadu_si512(p);
    pair[0] = _mm512_castsi512_ps(_mm512_slli_epi32(u, 16));
    pair[1] = _mm512_castsi512_ps(_mm512_and_si512(u, _mm512_set1_epi32(-65536)));
}
INLINE void v_pairs(const float *p, vf pair[2]) {
    const __m512i first = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28,
                                            30);
    const __m512i second = _mm512_or_si512(first, _mm512_set1_epi32(1));
    pair[0] = _mm512_permutex2var_ps(v_load(p), first, v_load(p + 16));
    pair[1] = _mm512_permutex2var_ps(v_load(p), second, v_load(p + 16));
}
INLINE __m512i v_round_bits(vf v) {
    __m512i u = _mm512_castps_si512(v), hi = _mm512_srli_epi32(u, 16);
    __m512i odd = _mm512_and_si512(hi, _mm512_set1_epi32(1));
    __m512i up = _mm512_srli_epi32(
        _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    return _mm512_mask_or_epi32(up, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), hi,
                                _mm512_set1_epi32(0x40));
}
INLINE vf v_round(vf v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v_round_bits(v), 16)); }
INLINE void v_store_h_n(uint16_t *p, vf v, int n) {
    __m256i h = _mm512_cvtepi32_epi16(v_round_bits(v));
    if (n == 16) _mm256_storeu_si256((__m256i *)p, h);
    else _mm256_mask_storeu_epi16(p, v_mask(n), h);
}
INLINE __m256 v_low(vf v) { return _mm512_castps512_ps256(v); }
INLINE __m256 v_high(vf v) { return _mm512_extractf32x8_ps(v, 1); }
/* pack_e8m0 of 16 scales */
INLINE vf v_e8m0(const uint8_t *s) {
    __m512i e = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)s)),
            u = _mm512_slli_epi32(e, 23);
    u = _mm512_mask_mov_epi32(u, _mm512_cmpeq_epi32_mask(e, _mm512_setzero_si512()),
                              _mm512_set1_epi32(0x00400000));
    u = _mm512_mask_mov_epi32(u, _mm512_cmpeq_epi32_mask(e, _mm512_set1_epi32(255)),
                              _mm512_set1_epi32(0x7fc00000));
    return _mm512_castsi512_ps(u);
}
/* pack_e4m3 of 16 scales: its exponent as float32's is 120 too low */
INLINE vf v_e4m3(const uint8_t *s) {
    const __m512i u = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)s)),
                  size = _mm512_and_si512(u, _mm512_set1_epi32(0x7f));
    const __mmask16 nan = _mm512_cmpeq_epi32_mask(size, _mm512_set1_epi32(0x7f));
    vf v = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(size, 20)), v_set(0x1p120f));
    v = _mm512_mask_mov_ps(v, nan, v_set(NAN));
    return _mm512_castsi512_ps(
        _mm512_or_si512(_mm512_castps_si512(v),
                        _mm512_and_si512(u, _mm512_set1_epi32(INT32_MIN))));
}
INLINE vf v_e2m1_table(void) { return v_load(pack_e2m1); }
/* 8 bytes: nibble i is lane i */
INLINE vf v_e2m1(const uint8_t q[8], vf table) {
    const __m512i shift = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24,
                                            28);
    const __m512i word = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    __m512i x = _mm512_permutexvar_epi32(
        word, _mm512_castsi128_si512(_mm_loadl_epi64((const __m128i *)q)));
    /* reads the low 4 bits only */
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(x, shift), table);
}
/* Lane j = fold of x[j], by op: sixteen 16-lane folds at once, each in the order of kern_fold16. */
#define V_FOLD_ALL(name, op)                                                                       \
    INLINE vf name(const vf x[16]) {                                                               \
        vf e[8], q[4], d[2];                                                                       \
        for (int i = 0; i < 8; i++) {                                                              \
            const vf a = x[i / 4 * 8 + i % 4], b = x[i / 4 * 8 + i % 4 + 4];                       \
            e[i] = op(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));         \
        }                                                                                          \
        for (int i = 0; i < 4; i++)                                                                \
            q[i] = op(_mm512_shuffle_f32x4(e[i], e[i + 4], 0x88),                                  \
                      _mm512_shuffle_f32x4(e[i], e[i + 4], 0xdd));                                 \
        for (int i = 0; i < 2; i++)                                                                \
            d[i] = op(_mm512_shuffle_ps(q[i * 2], q[i * 2 + 1], 0x44),                             \
                      _mm512_shuffle_ps(q[i * 2], q[i * 2 + 1], 0xee));                            \
        return op(_mm512_shuffle_ps(d[0], d[1], 0x88), _mm512_shuffle_ps(d[0], d[1], 0xdd));       \
    }
V_FOLD_ALL(v_fold_all, v_add)
V_FOLD_ALL(v_most_all, v_max)                                             /* no NaN in x */
#undef V_FOLD_ALL
#else
typedef struct { __m256 a, b; } vf;

/* n may be outside 0 .. 8 */
INLINE __m256i v_mask8(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INLINE vf v_set(float x) { return (vf){ _mm256_set1_ps(x), _mm256_set1_ps(x) }; }
INLINE vf v_load(const float *p) { return (vf){ _mm256_loadu_ps(p), _mm256_loadu_ps(p + 8) }; }
INLINE vf v_load_n(const float *p, int n) {
    if (n == 16) return v_load(p);
    return (vf){ _mm256_maskload_ps(p, v_mask8(n)), _mm256_maskload_ps(p + 8, v_mask8(n - 8)) };
}
INLINE void v_store(float *p, vf v) {
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
}
INLINE void v_store_n(float *p, vf v, int n) {
    if (n == 16) { v_store(p, v); return; }
    _mm256_maskstore_ps(p, v_mask8(n), v.a);
    _mm256_maskstore_ps(p + 8, v_mask8(n - 8), v.b);
}
#define V_EACH(name, op)                                                                           \
    INLINE vf name(vf x, vf y) { return (vf){ op(x.a, y.a), op(x.b, y.b) }; }
V_EACH(v_add, _mm256_add_ps)
V_EACH(v_sub, _mm256_sub_ps)
V_EACH(v_mul, _mm256_mul_ps)
V_EACH(v_div, _mm256_div_ps)
V_EACH(v_max, _mm256_max_ps)
V_EACH(v_min, _mm256_min_ps)
#undef V_EACH
INLINE vf v_sqrt(vf x) { return (vf){ _mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b) }; }
INLINE vf v_fma(vf x, vf y, vf c) {
    return (vf){ _mm256_fmadd_ps(x.a, y.a, c.a), _mm256_fmadd_ps(x.b, y.b, c.b) };
}
INLINE vf v_neg(vf x) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    return (vf){ _mm256_xor_ps(x.a, sign), _mm256_xor_ps(x.b, sign) };
}
INLINE __m256 v_climb8(__m256 y, __m256 a, __m256 least, __m256 step) {
    return _mm256_add_ps(y, _mm256_and_ps(_mm256_cmp_ps(a, least, _CMP_GE_OQ), step));
}
/* step where a >= least, else 0, added to y */
INLINE vf v_climb(vf y, vf a, float least, float step) {
    const __m256 l = _mm256_set1_ps(least), s = _mm256_set1_ps(step);
    return (vf){ v_climb8(y.a, a.a, l, s), v_climb8(y.b, a.b, l, s) };
}
INLINE vf v_abs(vf x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return (vf){ _mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b) };
}
INLINE vf v_copysign(vf x, vf from) {                                    /* x >= 0 */
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return (vf){ _mm256_or_ps(x.a, _mm256_and_ps(from.a, sign)),
                 _mm256_or_ps(x.b, _mm256_and_ps(from.b, sign)) };
}
INLINE vf v_pick(vf x, vf y, int n) {
    return (vf){ _mm256_blendv_ps(y.a, x.a, _mm256_castsi256_ps(v_mask8(n))),
                 _mm256_blendv_ps(y.b, x.b, _mm256_castsi256_ps(v_mask8(n - 8))) };
}
INLINE vf v_zero_unless_positive(vf x, vf y) {
    __m256 z = _mm256_setzero_ps();
    return (vf){ _mm256_and_ps(_mm256_cmp_ps(x.a, z, _CMP_GT_OQ), y.a),
                 _mm256_and_ps(_mm256_cmp_ps(x.b, z, _CMP_GT_OQ), y.b) };
}
INLINE __m256 v_flush8(__m256 x) {
    const __m256 least = _mm256_set1_ps(0x1p-126f), sign = _mm256_set1_ps(-0.0f);
    return _mm256_and_ps(_mm256_cmp_ps(_mm256_andnot_ps(sign, x), least, _CMP_NLT_UQ), x);
}
/* 0 where |x| < 2^-126 */
INLINE vf v_flush(vf x) { return (vf){ v_flush8(x.a), v_flush8(x.b) }; }
/* p 2^n in two steps, of which only the last may round; n from the low bits of t */
INLINE __m256 v_times_pow2_8(__m256 p, __m256 t) {
    const __m256i n = _mm256_sub_epi32(_mm256_castps_si256(t),
                                       _mm256_castps_si256(_mm256_set1_ps(KEXP_MAGIC)));
    const __m256i half = _mm256_srai_epi32(n, 1), bias = _mm256_set1_epi32(127);
    const __m256i a = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
    const __m256i b = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(n, half), bias), 23);
    return _mm256_mul_ps(_mm256_mul_ps(p, _mm256_castsi256_ps(a)), _mm256_castsi256_ps(b));
}
INLINE vf v_times_pow2(vf p, vf t, vf k) {
    (void)k;
    return (vf){ v_times_pow2_8(p.a, t.a), v_times_pow2_8(p.b, t.b) };
}
INLINE vf v_load_h(const uint16_t *p) {
    __m256i lo = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    __m256i hi = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p + 8)));
    return (vf){ _mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)),
                 _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16)) };
}
INLINE vf v_load_h_n(const uint16_t *p, int n) {
    if (n == 16) return v_load_h(p);
    uint16_t h[16] = { 0 };
    for (int i = 0; i < n; i++) h[i] = p[i];
    return v_load_h(h);
}
INLINE void v_pairs8_h(const uint16_t *p, __m256 *first, __m256 *second) {
    const __m256i u = _mm256_loadu_si256((const __m256i *)(const void *)p);
    *first = _mm256_castsi256_ps(_mm256_slli_epi32(u, 16));
    *second = _mm256_castsi256_ps(_mm256_and_si256(u, _mm256_set1_epi32(-65536)));
}
INLINE void v_pairs8(const float *p, __m256 *first, __m256 *second) {
    const __m256 a = _mm256_loadu_ps(p), b = _mm256_loadu_ps(p + 8);
    const __m256 low = _mm256_permute2f128_ps(a, b, 0x20),
                 high = _mm256_permute2f128_ps(a, b, 0x31);
    *first = _mm256_shuffle_ps(low, high, 0x88);
    *second = _mm256_shuffle_ps(low, high, 0xdd);
}
/* 16 pairs of a type: their first elements, their second ones. */
INLINE void v_pairs_h(const uint16_t *p, vf pair[2]) {
    v_pairs8_h(p, &pair[0].a, &pair[1].a);
    v_pairs8_h(p + 16, &pair[0].b, &pair[1].b);
}
INLINE void v_pairs(const float *p, vf pair[2]) {
    v_pairs8(p, &pair[0].a, &pair[1].a);
    v_pairs8(p + 16, &pair[0].b, &pair[1].b);
}
INLINE __m256i v_round_bits8(__m256 v) {
    __m256i u = _mm256_castps_si256(v), hi = _mm256_srli_epi32(u, 16);
    __m256i odd = _mm256_and_si256(hi, _mm256_set1_epi32(1));
    __m256i up = _mm256_srli_epi32(
        _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    __m256i nan = _mm256_or_si256(hi, _mm256_set1_epi32(0x40));
    return _mm256_blendv_epi8(up, nan, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
}
INLINE vf v_round(vf v) {
    return (vf){ _mm256_castsi256_ps(_mm256_slli_epi32(v_round_bits8(v.a), 16)),
                 _mm256_castsi256_ps(_mm256_slli_epi32(v_round_bits8(v.b), 16)) };
}
INLINE void v_store_h_n(uint16_t *p, vf v, int n) {
    __m256i h = _mm256_packus_epi32(v_round_bits8(v.a), v_round_bits8(v.b));
    h = _mm256_permute4x64_epi64(h, 0xd8);
    if (n == 16) { _mm256_storeu_si256((__m256i *)p, h); return; }
    uint16_t t[16];
    _mm256_storeu_si256((__m256i *)t, h);
    for (int i = 0; i < n; i++) p[i] = t[i];
}
INLINE __m256 v_low(vf v) { return v.a; }
INLINE __m256 v_high(vf v) { return v.b; }
INLINE __m256 v_e8m0_8(const uint8_t *s) {
    __m256i e = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)s)),
            u = _mm256_slli_epi32(e, 23);
    u = _mm256_blendv_epi8(u, _mm256_set1_epi32(0x00400000),
                           _mm256_cmpeq_epi32(e, _mm256_setzero_si256()));
    u = _mm256_blendv_epi8(u, _mm256_set1_epi32(0x7fc00000),
                           _mm256_cmpeq_epi32(e, _mm256_set1_epi32(255)));
    return _mm256_castsi256_ps(u);
}
/* pack_e8m0 of 16 scales */
INLINE vf v_e8m0(const uint8_t *s) { return (vf){ v_e8m0_8(s), v_e8m0_8(s + 8) }; }
INLINE __m256 v_e4m3_8(const uint8_t *s) {
    const __m256i u = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)s)),
                  size = _mm256_and_si256(u, _mm256_set1_epi32(0x7f)),
                  nan = _mm256_cmpeq_epi32(size, _mm256_set1_epi32(0x7f));
    __m256 v = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(size, 20)),
                             _mm256_set1_ps(0x1p120f));
    v = _mm256_blendv_ps(v, _mm256_set1_ps(NAN), _mm256_castsi256_ps(nan));
    return _mm256_or_ps(v, _mm256_castsi256_ps(
                               _mm256_and_si256(u, _mm256_set1_epi32(INT32_MIN))));
}
/* pack_e4m3 of 16 scales: its exponent as float32's is 120 too low */
INLINE vf v_e4m3(const uint8_t *s) { return (vf){ v_e4m3_8(s), v_e4m3_8(s + 8) }; }
INLINE __m256 v_e2m1_table(void) { return _mm256_loadu_ps(pack_e2m1); }
INLINE __m256 v_e2m1_8(const uint8_t q[4], __m256 table) {
    int32_t word;
    memcpy(&word, q, 4);
    __m256i x = _mm256_srlv_epi32(_mm256_set1_epi32(word),
                                  _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    __m256i sign = _mm256_and_si256(_mm256_slli_epi32(x, 28), _mm256_set1_epi32(INT32_MIN));
    return _mm256_xor_ps(_mm256_permutevar8x32_ps(table, x), _mm256_castsi256_ps(sign));
}
INLINE vf v_e2m1(const uint8_t q[8], __m256 table) {
    return (vf){ v_e2m1_8(q, table), v_e2m1_8(q + 4, table) };
}
/* Lane j = fold of x[j], by op: sixteen 16-lane folds at once, each in the order of kern_fold16. */
#define V_FOLD_ALL(name, op)                                                                       \
    INLINE __m256 name##8(const vf x[8]) {                                                         \
        __m256 q[4];                                                                               \
        for (int i = 0; i < 4; i++) {                                                              \
            __m256 a = op(x[i].a, x[i].b), b = op(x[i + 4].a, x[i + 4].b);                         \
            q[i] = op(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));     \
        }                                                                                          \
        __m256 z = op(_mm256_shuffle_ps(q[0], q[1], 0x44), _mm256_shuffle_ps(q[0], q[1], 0xee));   \
        __m256 w = op(_mm256_shuffle_ps(q[2], q[3], 0x44), _mm256_shuffle_ps(q[2], q[3], 0xee));   \
        return op(_mm256_shuffle_ps(z, w, 0x88), _mm256_shuffle_ps(z, w, 0xdd));                   \
    }                                                                                              \
    INLINE vf name(const vf x[16]) { return (vf){ name##8(x), name##8(x + 8) }; }
V_FOLD_ALL(v_fold_all, _mm256_add_ps)
V_FOLD_ALL(v_most_all, _mm256_max_ps)                                     /* no NaN in x */
#undef V_FOLD_ALL
#endif

/* From here on both are one text. */
INLINE vf v_zero(void) { return v_set(0.0f); }
INLINE vf v_fma_n(vf a, vf b, vf c, int n) {
    return n == 16 ? v_fma(a, b, c) : v_pick(v_fma(a, b, c), c, n);
}
INLINE vf v_add_n(vf a, vf b, int n) { return n == 16 ? v_add(a, b) : v_pick(v_add(a, b), a, n); }
INLINE int v_left(int at, int end) { return end - at < 16 ? end - at : 16; }

INLINE float v_fold(vf v) {
    __m256 h = _mm256_add_ps(v_low(v), v_high(v));
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
INLINE float v_fold_max(vf v) {                                           /* no NaN in v */
    __m256 h = _mm256_max_ps(v_low(v), v_high(v));
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
}
INLINE vf v_get_n(const void *p, enum kern_type type, size_t at, int n) {
    return type == KERN_F32 ? v_load_n((const float *)p + at, n)
                            : v_load_h_n((const uint16_t *)p + at, n);
}
INLINE void v_put_n(void *p, enum kern_type type, size_t at, vf v, int n) {
    if (type == KERN_F32) v_store_n((float *)p + at, v, n);
    else v_store_h_n((uint16_t *)p + at, v, n);
}
INLINE vf v_exp(vf x) {                                                   /* kern_expf */
    x = v_min(v_set(KEXP_MOST), x);
    x = v_max(v_set(KEXP_LEAST), x);
    vf t = v_fma(x, v_set(KEXP_LOG2E), v_set(KEXP_MAGIC)), k = v_sub(t, v_set(KEXP_MAGIC));
    vf r = v_fma(k, v_set(-KEXP_LN2_LO), v_fma(k, v_set(-KEXP_LN2_HI), x));
    vf p = v_fma(v_set(KEXP_P0), r, v_set(KEXP_P1));
    p = v_fma(p, r, v_set(KEXP_P2));
    p = v_fma(p, r, v_set(KEXP_P3));
    p = v_fma(p, r, v_set(KEXP_P4));
    p = v_fma(p, r, v_set(KEXP_P5));
    p = v_add(v_fma(p, v_mul(r, r), r), v_set(1.0f));
    return v_times_pow2(p, t, k);
}
INLINE vf v_sigmoid(vf x) { return v_div(v_set(1.0f), v_add(v_set(1.0f), v_exp(v_neg(x)))); }

/* 8 x 8 floats transposed; strides in floats. */
INLINE void v_transpose8(float *to, size_t to_ld, const float *from, size_t ld) {
    __m256 r[8];
    for (int i = 0; i < 4; i++) {
        r[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from + (size_t)i * ld)),
                                    _mm_loadu_ps(from + (size_t)(i + 4) * ld), 1);
        r[i + 4] = _mm256_insertf128_ps(
            _mm256_castps128_ps256(_mm_loadu_ps(from + (size_t)i * ld + 4)),
            _mm_loadu_ps(from + (size_t)(i + 4) * ld + 4), 1);
    }
    for (int h = 0; h < 8; h += 4) {
        __m256 a = _mm256_unpacklo_ps(r[h], r[h + 1]), b = _mm256_unpackhi_ps(r[h], r[h + 1]);
        __m256 c = _mm256_unpacklo_ps(r[h + 2], r[h + 3]),
               d = _mm256_unpackhi_ps(r[h + 2], r[h + 3]);
        _mm256_storeu_ps(to + (size_t)h * to_ld, _mm256_shuffle_ps(a, c, 0x44));
        _mm256_storeu_ps(to + (size_t)(h + 1) * to_ld, _mm256_shuffle_ps(a, c, 0xee));
        _mm256_storeu_ps(to + (size_t)(h + 2) * to_ld, _mm256_shuffle_ps(b, d, 0x44));
        _mm256_storeu_ps(to + (size_t)(h + 3) * to_ld, _mm256_shuffle_ps(b, d, 0xee));
    }
}

/* Splits [0, count) evenly: the range of one part. */
INLINE size_t part_at(size_t count, int part, int parts) {
    return count * (size_t)part / (size_t)parts;
}
/* Parts for `count` independent rows of `work` elements each: one where waking a thread costs more
 * than it brings. */
INLINE int parts_for(const struct kern *k, size_t count, size_t work) {
    size_t most = (size_t)cpu_threads(k) * 4, parts = count * work / 8192;
    if (parts > most) parts = most;
    if (parts > count) parts = count;
    return parts < 1 || cpu_threads(k) == 1 ? 1 : (int)parts;
}
#endif
