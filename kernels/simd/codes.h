/* codes.h - MXFP4 and NVFP4 codes to bf16, 32 at a time, exactly: what the bf16 multipliers share.
 *
 * A code lies in the low four bits of its word, whatever is above. Does not know where codes come
 * from and which belong together: that is a multiplier's order. AVX-512 with BW and VBMI.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_SIMD_CODES_H
#define QERL_SIMD_CODES_H
#include "kernels/simd/vec.h"

/* E2M1 as bf16 bits; tables are there twice, as an index is five bits wide */
#define MUL_E2M1                                                                                   \
    0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80,        \
        0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0
static const _Alignas(64) uint16_t mul_e2m1[32] = { MUL_E2M1, MUL_E2M1 };
/* Exponent over .5 and sign as bf16 bits; a mantissa of 1.5 is told by bit 0. */
#define MUL_E2M1_UP                                                                                \
    0x0000, 0x0000, 0x0080, 0x0081, 0x0100, 0x0101, 0x0180, 0x0181, 0x8000, 0x8000, 0x8080,        \
        0x8081, 0x8100, 0x8101, 0x8180, 0x8181
static const _Alignas(64) uint16_t mul_e2m1_up[32] = { MUL_E2M1_UP, MUL_E2M1_UP };

/* 2 .. 252 all: the smallest product is normal, the largest finite */
INLINE bool mxfp4_plain(const uint8_t *record) {
    const __m128i s = _mm_loadu_si128((const __m128i *)(record + 256));
    const __m128i out = _mm_subs_epu8(_mm_add_epi8(s, _mm_set1_epi8(-2)), _mm_set1_epi8((char)250));
    return _mm_testz_si128(out, out);
}
/* what a scale adds to an exponent, of 16 outputs */
INLINE __m512i mxfp4_up(const uint8_t *record) {
    const __m128i s = _mm_loadu_si128((const __m128i *)(record + 256));
    return _mm512_slli_epi32(_mm512_sub_epi32(_mm512_cvtepu8_epi32(s), _mm512_set1_epi32(127)), 7);
}
INLINE __m512i mxfp4_value(__m512i code, __m512i table, __m512i up) {
    const __mmask32 some = _mm512_test_epi16_mask(code, _mm512_set1_epi16(7));
    const __m512i v = _mm512_permutexvar_epi16(code, table);
    return _mm512_mask_add_epi16(v, some, v, up);
}

/* The same by bytes, for codes that lie so in both bytes of their word: where a permutation of
 * words is two instructions inside, one of bytes is one. */
static const _Alignas(64) uint8_t mul_e2m1_bytes[64] = {
    0x00, 0x00, 0x80, 0xc0, 0x00, 0x40, 0x80, 0xc0, 0x00, 0x00, 0x80, 0xc0, 0x00, 0x40, 0x80, 0xc0,
    0x00, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40, 0x80, 0xbf, 0xbf, 0xbf, 0xc0, 0xc0, 0xc0, 0xc0,
};
INLINE __m512i mxfp4_value_by_bytes(__m512i code, __m512i table, __m512i up) {
    const __mmask32 some = _mm512_test_epi16_mask(code, _mm512_set1_epi16(7));
    const __m512i index = _mm512_ternarylogic_epi32(code, _mm512_set1_epi16(0x0f0f),
                                                    _mm512_set1_epi16(0x1000), 0xea);
    const __m512i v = _mm512_permutexvar_epi8(index, table);
    return _mm512_mask_add_epi16(v, some, v, up);
}

/* 0x08 .. 0x7e all: normal and positive, as a code of zero keeps its own sign */
INLINE bool nvfp4_plain(const uint8_t *record) {
    const __m256i s = _mm256_loadu_si256((const __m256i *)(record + 256));
    const __m256i out = _mm256_subs_epu8(_mm256_add_epi8(s, _mm256_set1_epi8(-8)),
                                         _mm256_set1_epi8(0x7e - 8));
    return _mm256_testz_si256(out, out);
}
/* Half a scale as bf16, and 1.5 times that less the flag, which is added with the exponent; of 16
 * outputs, in the low words of lanes. */
struct nvfp4_base { __m512i plain, more; };
INLINE struct nvfp4_base nvfp4_base(const uint8_t *scale) {
    const vf half = v_mul(v_e4m3(scale), v_set(0.5f)), more = v_mul(half, v_set(1.5f));
    return (struct nvfp4_base){
        _mm512_srli_epi32(_mm512_castps_si512(half), 16),
        _mm512_sub_epi32(_mm512_srli_epi32(_mm512_castps_si512(more), 16), _mm512_set1_epi32(1)) };
}
INLINE __m512i nvfp4_value(__m512i code, __m512i table, __m512i plain, __m512i more) {
    const __mmask32 some = _mm512_test_epi16_mask(code, _mm512_set1_epi16(7));
    const __m512i up = _mm512_permutexvar_epi16(code, table);
    const __mmask32 mantissa = _mm512_test_epi16_mask(up, _mm512_set1_epi16(1));
    return _mm512_mask_add_epi16(up, some, up, _mm512_mask_blend_epi16(mantissa, plain, more));
}

INLINE __m512i both_words(__m512i low) {
    return _mm512_mask_blend_epi16(0xaaaaaaaau, low, _mm512_slli_epi32(low, 16));
}
#endif
