/* mul_bf16.h - the multiplier of mul.h on VDPBF16PS (AVX-512 BF16): operands that are bf16.
 *
 * Per 32-bit lane VDPBF16PS does the fma of the odd (high) elements first, then that of the even
 * (low) ones, subnormals as zero. So a chain of the tile order is such an instruction per two of
 * its terms, with the earlier term in the high half: step i of the even chain holds k = 4i (high)
 * and 4i + 2 (low), of the odd chain 4i + 1 and 4i + 3. A block is 8 even steps, then 8 odd ones.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_SIMD_MUL_BF16_H
#define QERL_SIMD_MUL_BF16_H
#include "kernels/simd/mul.h"

typedef uint16_t mul_t;
enum { MUL_ROWS = 1, MUL_IS_BF16 = 1 };
enum { MUL_STEPS = 8, MUL_STEP = 1, MUL_CHAIN = 8 };
MUL_RUN_ARGS(mul_t);

INLINE vf mul_x(const mul_t *x) {
    int32_t pair;
    memcpy(&pair, x, sizeof pair);
    return _mm512_castsi512_ps(_mm512_set1_epi32(pair));
}
INLINE vf mul_w(const mul_t *w) { return v_load((const float *)(const void *)w); }
INLINE vf mul_fma(vf x, vf w, vf sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w);
}
#include "kernels/simd/mul_tile.h"

/* Element k of a block's row in the order of the steps: place of k among 32. */
#define MUL_PLACE(k) ((k) % 2 * 16 + (k) / 4 * 2 + ((k) / 2 + 1) % 2)
/* which k lies at place p */
#define MUL_AT(p) ((p) % 16 / 2 * 4 + ((p) + 1) % 2 * 2 + (p) / 16)
#define MUL_AT8(p)                                                                                 \
    MUL_AT(p), MUL_AT(p + 1), MUL_AT(p + 2), MUL_AT(p + 3), MUL_AT(p + 4), MUL_AT(p + 5),          \
        MUL_AT(p + 6), MUL_AT(p + 7)
static const _Alignas(64) uint16_t mul_order[32] = { MUL_AT8(0), MUL_AT8(8), MUL_AT8(16),
                                                     MUL_AT8(24) };

INLINE __m512i mul_ordered(__m512i row) {
    return _mm512_permutexvar_epi16(_mm512_load_si512(mul_order), row);
}
INLINE __mmask32 mul_mask(int n) { return n >= 32 ? ~0u : (1u << n) - 1u; }

INLINE __m256i halves(vf v) {                              /* exact: values that are bf16 */
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(v), 16));
}
INLINE __m512i joined(__m256i low, __m256i high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

/* n <= 32 elements as bf16, k ascending, zero beyond */
INLINE __m512i mul_get(const struct mul_source *s, size_t at, int n) {
    if (s->type == KERN_BF16 && s->scale == 1.0f)
        return _mm512_maskz_loadu_epi16(mul_mask(n), (const uint16_t *)s->from + at);
    const vf scale = v_set(s->scale);
    const vf a = v_mul(scale, v_get_n(s->from, s->type, at, n < 16 ? n : 16));
    const vf b = n > 16 ? v_mul(scale, v_get_n(s->from, s->type, at + 16, n - 16)) : v_zero();
    return joined(_mm512_cvtepi32_epi16(v_round_bits(a)), _mm512_cvtepi32_epi16(v_round_bits(b)));
}

static void lhs_rows(mul_t *to, size_t to_row, size_t to_block, const struct mul_source *s,
                     int rows, int k) {
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < k; i += MUL_K) {
            const int n = k - i < MUL_K ? k - i : MUL_K;
            _mm512_storeu_si512(to + (size_t)r * to_row + (size_t)(i / MUL_K) * to_block,
                                mul_ordered(mul_get(s, (size_t)r * s->ld + (size_t)i, n)));
        }
}

static void lhs_cols(mul_t *to, size_t to_row, size_t to_block, const struct mul_source *s,
                     int rows, int k) {
    for (int i = 0; i < (k + MUL_K - 1) / MUL_K * MUL_K; i++)
        for (int r = 0; r < rows; r += 32) {
            uint16_t lane[32];
            const int n = rows - r < 32 ? rows - r : 32;
            _mm512_storeu_si512(lane, i < k ? mul_get(s, (size_t)i * s->ld + (size_t)r, n)
                                            : _mm512_setzero_si512());
            for (int j = 0; j < n; j++)
                to[(size_t)(r + j) * to_row + (size_t)(i / 32) * to_block +
                   MUL_PLACE((size_t)i % 32)] = lane[j];
        }
}

/* Rows k of 16 columns as two registers each for four of them, to the steps that hold them. */
INLINE void steps_put(mul_t *to, int i, __m512i row01, __m512i row23) {
    /* row01 is row 4i then 4i + 1, row23 the two after */
    static const _Alignas(64) uint16_t even[32] = {
        32, 0, 33, 1, 34, 2, 35, 3, 36, 4, 37, 5, 38, 6, 39, 7,
        40, 8, 41, 9, 42, 10, 43, 11, 44, 12, 45, 13, 46, 14, 47, 15 };
    const __m512i first = _mm512_load_si512(even),
                  second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    _mm512_storeu_si512(to + i * 32, _mm512_permutex2var_epi16(row01, first, row23));
    _mm512_storeu_si512(to + (i + 8) * 32, _mm512_permutex2var_epi16(row01, second, row23));
}

/* Any scales, by way of float32: overflow, subnormals, NaN. */
static void rhs_codes_slow(mul_t *to, const uint8_t *record, enum kern_format format) {
    const bool mx = format == KERN_FORMAT_MXFP4;
    const vf table = v_e2m1_table();
    for (int i = 0; i < 8; i++) {
        const vf scale = mx ? v_e8m0(record + 256) : v_e4m3(record + 256 + i / 4 * 16);
        vf row[4];
        for (int j = 0; j < 4; j++) row[j] = v_mul(v_e2m1(record + (i * 4 + j) * 8, table), scale);
        steps_put(to, i, joined(halves(row[0]), halves(row[1])),
                  joined(halves(row[2]), halves(row[3])));
    }
}

/* The code of column c of row 4i + 2 in the low nibble of word 2c, of row 4i in that of word
 * 2c + 1; from 32 bytes of codes to those of an even step, or of an odd one 8 bytes on. What is
 * above the nibble is left as it comes. */
INLINE __m512i codes_of(__m512i q, __m512i where) {
    const __m512i shift = _mm512_set1_epi64(0x0004000400000000);
    return _mm512_srlv_epi16(_mm512_permutexvar_epi8(where, q), shift);
}

#define MUL_BYTE2(c) 16 + (c) / 2, 0, (c) / 2, 0
#define MUL_BYTE8(c) MUL_BYTE2(c), MUL_BYTE2(c + 1), MUL_BYTE2(c + 2), MUL_BYTE2(c + 3)
static const _Alignas(64) uint8_t mul_bytes[64] = { MUL_BYTE8(0), MUL_BYTE8(4), MUL_BYTE8(8),
                                                    MUL_BYTE8(12) };
/* E2M1 as bf16 bits; twice, as the index is five bits wide */
#define MUL_E2M1                                                                                   \
    0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80,        \
        0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0
static const _Alignas(64) uint16_t mul_e2m1[32] = { MUL_E2M1, MUL_E2M1 };
/* Exponent over .5 and sign as bf16 bits; a mantissa of 1.5 is told by bit 0. */
#define MUL_E2M1_UP                                                                                \
    0x0000, 0x0000, 0x0080, 0x0081, 0x0100, 0x0101, 0x0180, 0x0181, 0x8000, 0x8000, 0x8080,        \
        0x8081, 0x8100, 0x8101, 0x8180, 0x8181
static const _Alignas(64) uint16_t mul_e2m1_up[32] = { MUL_E2M1_UP, MUL_E2M1_UP };

static void rhs_mxfp4(mul_t *to, const uint8_t *record) {
    const __m128i s = _mm_loadu_si128((const __m128i *)(record + 256));
    /* 2 .. 252: the smallest product is normal, the largest finite */
    const __m128i odd = _mm_subs_epu8(_mm_add_epi8(s, _mm_set1_epi8(-2)), _mm_set1_epi8((char)250));
    if (!_mm_testz_si128(odd, odd)) {
        rhs_codes_slow(to, record, KERN_FORMAT_MXFP4);
        return;
    }
    const __m512i byte = _mm512_load_si512(mul_bytes), table = _mm512_load_si512(mul_e2m1),
                  where[4] = { byte, _mm512_add_epi8(byte, _mm512_set1_epi8(8)),
                               _mm512_add_epi8(byte, _mm512_set1_epi8(32)),
                               _mm512_add_epi8(byte, _mm512_set1_epi8(40)) };
    const __m512i up = _mm512_slli_epi32(
        _mm512_sub_epi32(_mm512_cvtepu8_epi32(s), _mm512_set1_epi32(127)), 7);
    const __m512i both = _mm512_mask_blend_epi16(0xaaaaaaaau, up, _mm512_slli_epi32(up, 16));
    for (int i = 0; i < 8; i += 2) {
        const __m512i q = _mm512_loadu_si512(record + i * 32);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            const __m512i code = codes_of(q, where[j]);
            const __mmask32 some = _mm512_test_epi16_mask(code, _mm512_set1_epi16(7));
            const __m512i v = _mm512_permutexvar_epi16(code, table);
            _mm512_storeu_si512(to + (i + j / 2 + j % 2 * 8) * 32,
                                _mm512_mask_add_epi16(v, some, v, both));
        }
    }
}

static void rhs_nvfp4(mul_t *to, const uint8_t *record) {
    /* E4M3 scales with their exponent bits neither all zero (zero, subnormal) nor NaN */
    const __m256i s = _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(record + 256)),
                                       _mm256_set1_epi8(0x7f));
    if (_mm256_cmplt_epu8_mask(s, _mm256_set1_epi8(8)) |
        _mm256_cmpeq_epu8_mask(s, _mm256_set1_epi8(0x7f))) {
        rhs_codes_slow(to, record, KERN_FORMAT_NVFP4);
        return;
    }
    const __m512i byte = _mm512_load_si512(mul_bytes), table = _mm512_load_si512(mul_e2m1_up),
                  where[4] = { byte, _mm512_add_epi8(byte, _mm512_set1_epi8(8)),
                               _mm512_add_epi8(byte, _mm512_set1_epi8(32)),
                               _mm512_add_epi8(byte, _mm512_set1_epi8(40)) };
    for (int group = 0; group < 2; group++) {
        /* half the scale in float32: bias 127 instead of 7; and 1.5 times that */
        const __m512i code = _mm512_cvtepi8_epi32(
            _mm_loadu_si128((const __m128i *)(record + 256 + group * 16)));
        const __m512i sign = _mm512_and_si512(code, _mm512_set1_epi32(INT32_MIN));
        const __m512i size = _mm512_add_epi32(
            _mm512_slli_epi32(_mm512_and_si512(code, _mm512_set1_epi32(0x7f)), 20),
            _mm512_set1_epi32(119 << 23));
        const __m512i one = _mm512_or_si512(size, sign);
        const __m512i half = _mm512_castps_si512(v_mul(_mm512_castsi512_ps(one), v_set(1.5f)));
        const __m512i plain = _mm512_or_si512(one, _mm512_srli_epi32(one, 16));
        /* less the flag, which is added with the exponent */
        const __m512i more = _mm512_sub_epi16(_mm512_or_si512(half, _mm512_srli_epi32(half, 16)),
                                              _mm512_set1_epi16(1));
        for (int i = group * 4; i < group * 4 + 4; i += 2) {
            const __m512i q = _mm512_loadu_si512(record + i * 32);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                const __m512i nibble = codes_of(q, where[j]);
                const __mmask32 some = _mm512_test_epi16_mask(nibble, _mm512_set1_epi16(7));
                const __m512i up = _mm512_permutexvar_epi16(nibble, table);
                const __mmask32 mantissa = _mm512_test_epi16_mask(up, _mm512_set1_epi16(1));
                const __m512i base = _mm512_mask_blend_epi16(mantissa, plain, more);
                _mm512_storeu_si512(to + (i + j / 2 + j % 2 * 8) * 32,
                                    _mm512_mask_add_epi16(up, some, up, base));
            }
        }
    }
}

static void rhs_record(mul_t *to, const uint8_t *record, enum kern_format format) {
    if (format == KERN_FORMAT_MXFP4) {
        rhs_mxfp4(to, record);
    } else if (format == KERN_FORMAT_NVFP4) {
        rhs_nvfp4(to, record);
    } else {
        assert(format == KERN_FORMAT_BF16);
        for (int i = 0; i < 8; i++)
            steps_put(to, i, _mm512_loadu_si512(record + i * 128),
                      _mm512_loadu_si512(record + i * 128 + 64));
    }
}

static void rhs_record_t(mul_t *to, mul_t *to2, const uint8_t *a, const uint8_t *b,
                         enum kern_format format) {
    /* as element (k, c) of record a is element (c, k) of the result; by elements, untuned */
    mul_t flat[512];
    for (int half = 0; half < 2; half++) {
        if (half && !b) memset(flat, 0, sizeof flat);
        else rhs_record(flat, half ? b : a, format);
        for (int in = 0; in < 32; in++)
            for (int out = 0; out < 16; out++) {
                const int k = half * 16 + out;
                const mul_t v = flat[MUL_PLACE(in) / 2 * 32 + out * 2 + MUL_PLACE(in) % 2];
                (in < 16 ? to : to2)[MUL_PLACE(k) / 2 * 32 + in % 16 * 2 + MUL_PLACE(k) % 2] = v;
            }
    }
}

static void rhs_rows(mul_t *to, const struct mul_source *s, int k, int cols) {
    for (int i = 0; i < 8; i++) {
        __m512i row[4];
        for (int j = 0; j < 4; j++)
            row[j] = i * 4 + j < k ? mul_get(s, (size_t)(i * 4 + j) * s->ld, cols)
                                   : _mm512_setzero_si512();
        steps_put(to, i, joined(_mm512_castsi512_si256(row[0]), _mm512_castsi512_si256(row[1])),
                  joined(_mm512_castsi512_si256(row[2]), _mm512_castsi512_si256(row[3])));
    }
}

/* The pairs of k = at, at + 1 of a page's columns. */
INLINE __m512i pairs_get(const struct mul_source *s, int at, const bool whole, int k, int cols) {
    const uint16_t *from = (const uint16_t *)s->from + (size_t)at * s->ld;
    if (whole) return _mm512_loadu_si512(from);
    const __mmask32 want = at + 1 < k ? ~0u : at < k ? 0x55555555u : 0u;
    return _mm512_maskz_loadu_epi16(want & mul_mask(cols * 2), from);
}
INLINE void pairs_put(mul_t *to, const struct mul_source *s, const bool whole, int k, int cols) {
    const __m512i high = _mm512_set1_epi32(-65536);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        const __m512i first = pairs_get(s, i * 4, whole, k, cols),
                      second = pairs_get(s, i * 4 + 2, whole, k, cols);
        /* even: the first's low half above the second's low half; odd: the same of high halves */
        _mm512_storeu_si512(to + i * 32, _mm512_or_si512(_mm512_slli_epi32(first, 16),
                                                         _mm512_andnot_si512(high, second)));
        _mm512_storeu_si512(to + (i + 8) * 32, _mm512_or_si512(_mm512_and_si512(high, first),
                                                               _mm512_srli_epi32(second, 16)));
    }
}
static void rhs_pairs(mul_t *to, const struct mul_source *s, int k, int cols) {
    if (k == MUL_K && cols == MUL_COLS) pairs_put(to, s, true, k, cols);
    else pairs_put(to, s, false, k, cols);
}

static void rhs_pairs_t(mul_t *to, const struct mul_source *s, int k, int cols) {
    /* row k as 16 columns, two in each float: what is transposed */
    float row[MUL_K * 8];
    if (k == MUL_K && cols == MUL_COLS) {
        for (int i = 0; i < MUL_K; i += 8)
            v_transpose8(row + i * 8, 8, (const float *)s->from + i, s->ld);
    } else {
        const uint16_t *from = s->from;
        uint16_t *at = memset(row, 0, sizeof row);
        for (int i = 0; i < k; i++)
            for (int c = 0; c < cols; c++)
                at[i * 16 + c] = from[((size_t)(c / 2) * s->ld + (size_t)i) * 2 + (size_t)(c % 2)];
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        steps_put(to, i, _mm512_loadu_si512(row + i * 32), _mm512_loadu_si512(row + i * 32 + 16));
}
#endif
