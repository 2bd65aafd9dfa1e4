/* mul_bf16.h - the multiplier of mul.h on VDPBF16PS (AVX-512 BF16): operands that are bf16.
 *
 * Per 32-bit lane VDPBF16PS does the fma of the odd (high) elements first, then that of the even
 * (low) ones, subnormals as zero. So a chain of the tile order is such an instruction per two of
 * its terms, with the earlier term in the high half: step i of the even chain holds k = 4i (high)
 * and 4i + 2 (low), of the odd chain 4i + 1 and 4i + 3. A block is 8 even steps, then 8 odd ones.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_SIMD_MUL_BF16_H
#define QERL_SIMD_MUL_BF16_H
#include "kernels/simd/codes.h"
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

/* Rows k of 16 columns as two registers each for four of them, to a step that holds two of them:
 * row01 is row 4i then 4i + 1, row23 the two after. */
INLINE __m512i step_of(__m512i row01, __m512i row23, const int odd) {
    static const _Alignas(64) uint16_t even[32] = {
        32, 0, 33, 1, 34, 2, 35, 3, 36, 4, 37, 5, 38, 6, 39, 7,
        40, 8, 41, 9, 42, 10, 43, 11, 44, 12, 45, 13, 46, 14, 47, 15 };
    return _mm512_permutex2var_epi16(row01, _mm512_add_epi16(_mm512_load_si512(even),
                                                             _mm512_set1_epi16(odd ? 16 : 0)),
                                     row23);
}
INLINE void steps_put(mul_t *to, int i, __m512i row01, __m512i row23) {
    _mm512_storeu_si512(to + i * 32, step_of(row01, row23, 0));
    _mm512_storeu_si512(to + (i + 8) * 32, step_of(row01, row23, 1));
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

/* Where the codes of an even step lie in 32 bytes: of column c, row 4i + 2 for word 2c, row 4i for
 * word 2c + 1, in the low nibble of a byte or in the high one. What else is in the word is not
 * used. */
#define MUL_BYTE2(c) 16 + (c) / 2, 0, (c) / 2, 0
#define MUL_BYTE8(c) MUL_BYTE2(c), MUL_BYTE2(c + 1), MUL_BYTE2(c + 2), MUL_BYTE2(c + 3)
static const _Alignas(64) uint8_t mul_bytes[64] = { MUL_BYTE8(0), MUL_BYTE8(4), MUL_BYTE8(8),
                                                    MUL_BYTE8(12) };
/* The codes of 64 bytes are those of four steps: even, odd, and so the next. */
INLINE __m512i codes_of(__m512i q, int j) {
    const __m512i shift = _mm512_set1_epi64(0x0004000400000000);
    const __m512i where = _mm512_add_epi8(_mm512_load_si512(mul_bytes),
                                          _mm512_set1_epi8((char)(j % 2 * 8 + j / 2 * 32)));
    return _mm512_srlv_epi16(_mm512_permutexvar_epi8(where, q), shift);
}

static void rhs_mxfp4(mul_t *to, const uint8_t *record) {
    if (!mxfp4_plain(record)) {
        rhs_codes_slow(to, record, KERN_FORMAT_MXFP4);
        return;
    }
    const __m512i table = _mm512_load_si512(mul_e2m1), up = both_words(mxfp4_up(record));
    for (int i = 0; i < 8; i += 2) {
        const __m512i q = _mm512_loadu_si512(record + i * 32);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            _mm512_storeu_si512(to + (i + j / 2 + j % 2 * 8) * 32,
                                mxfp4_value(codes_of(q, j), table, up));
    }
}

static void rhs_nvfp4(mul_t *to, const uint8_t *record) {
    if (!nvfp4_plain(record)) {
        rhs_codes_slow(to, record, KERN_FORMAT_NVFP4);
        return;
    }
    const __m512i table = _mm512_load_si512(mul_e2m1_up);
    for (int group = 0; group < 2; group++) {
        const struct nvfp4_base base = nvfp4_base(record + 256 + group * 16);
        const __m512i plain = both_words(base.plain), more = both_words(base.more);
        for (int i = group * 4; i < group * 4 + 4; i += 2) {
            const __m512i q = _mm512_loadu_si512(record + i * 32);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                _mm512_storeu_si512(to + (i + j / 2 + j % 2 * 8) * 32,
                                    nvfp4_value(codes_of(q, j), table, plain, more));
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

/* Transposed. Steps 4h to 4h + 3 of both chains come from the 16 outputs of record h; a word of
 * them belongs to an input (column) and an output: 2, 0, 6, 4 .. of the even steps, 3, 1, 7, 5 ..
 * of the odd ones. i counts the even steps, then the odd. */
INLINE void step_t_put(mul_t *to, int h, int i, __m512i v) {
    _mm512_storeu_si512(to + (h * 4 + i % 4 + i / 4 * 8) * 32, v);
}

/* Words of 16 outputs, from lanes, as the 8 steps need them: two a step. */
struct step_words { uint16_t w[16]; };
INLINE struct step_words step_words(__m512i low) {
    static const _Alignas(32) uint16_t order[16] = { MUL_AT8(0), MUL_AT8(16) };
    struct step_words s;
    _mm256_storeu_si256((__m256i *)s.w, _mm256_permutexvar_epi16(
                                            _mm256_load_si256((const __m256i *)order),
                                            _mm512_cvtepi32_epi16(low)));
    return s;
}
INLINE __m512i step_word(const struct step_words *s, int i) {
    int32_t pair;
    memcpy(&pair, s->w + 2 * i, sizeof pair);
    return _mm512_set1_epi32(pair);
}

static void record_t_slow(mul_t *to, mul_t *to2, int h, const uint8_t *record,
                          enum kern_format format) {
    mul_t flat[MUL_RHS];
    rhs_codes_slow(flat, record, format);
    for (int in = 0; in < 32; in++)
        for (int out = 0; out < 16; out++) {
            const int p = MUL_PLACE(in), q = MUL_PLACE(h * 16 + out);
            (in < 16 ? to : to2)[q / 2 * 32 + in % 16 * 2 + q % 2] =
                flat[p / 2 * 32 + out * 2 + p % 2];
        }
}

/* The codes of outputs 4i and 4i + 2 of 16 inputs in the low nibbles of words, those of 4i + 1 and
 * 4i + 3 above them. */
INLINE __m512i codes_t(const uint8_t *q, int i) {
    static const _Alignas(64) uint8_t where[64] = {
        1,  0, 0,  0, 9,  0, 8,  0, 17, 0, 16, 0, 25, 0, 24, 0, 33,  0, 32,  0, 41,  0,
        40, 0, 49, 0, 48, 0, 57, 0, 56, 0, 65, 0, 64, 0, 73, 0, 72,  0, 81,  0, 80,  0,
        89, 0, 88, 0, 97, 0, 96, 0, 105, 0, 104, 0, 113, 0, 112, 0, 121, 0, 120, 0 };
    return _mm512_permutex2var_epi8(
        _mm512_loadu_si512(q),
        _mm512_add_epi8(_mm512_load_si512(where), _mm512_set1_epi16((short)(2 * i))),
        _mm512_loadu_si512(q + 64));
}

static void mxfp4_t(mul_t *to, mul_t *to2, int h, const uint8_t *record) {
    if (!mxfp4_plain(record)) {
        record_t_slow(to, to2, h, record, KERN_FORMAT_MXFP4);
        return;
    }
    const __m512i table = _mm512_load_si512(mul_e2m1);
    const struct step_words up = step_words(mxfp4_up(record));
    for (int half = 0; half < 2; half++)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            __m512i code = codes_t(record + half * 128, i);
            for (int odd = 0; odd < 2; odd++, code = _mm512_srli_epi16(code, 4))
                step_t_put(half ? to2 : to, h, i + odd * 4,
                           mxfp4_value(code, table, step_word(&up, i + odd * 4)));
        }
}

static void nvfp4_t(mul_t *to, mul_t *to2, int h, const uint8_t *record) {
    if (!nvfp4_plain(record)) {
        record_t_slow(to, to2, h, record, KERN_FORMAT_NVFP4);
        return;
    }
    const __m512i table = _mm512_load_si512(mul_e2m1_up);
    for (int half = 0; half < 2; half++) {
        const struct nvfp4_base base = nvfp4_base(record + 256 + half * 16);
        const struct step_words plain = step_words(base.plain), more = step_words(base.more);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            __m512i code = codes_t(record + half * 128, i);
            for (int odd = 0; odd < 2; odd++, code = _mm512_srli_epi16(code, 4))
                step_t_put(half ? to2 : to, h, i + odd * 4,
                           nvfp4_value(code, table, step_word(&plain, i + odd * 4),
                                       step_word(&more, i + odd * 4)));
        }
    }
}

/* Four rows of 16 bf16 to [4 steps][4 rows] pairs, even steps; odd ones are one word on. */
#define MUL_T4(i)                                                                                  \
    4 * (i) + 2, 4 * (i), 4 * (i) + 18, 4 * (i) + 16, 4 * (i) + 34, 4 * (i) + 32, 4 * (i) + 50,    \
        4 * (i) + 48
static const _Alignas(64) uint16_t mul_four[32] = { MUL_T4(0), MUL_T4(1), MUL_T4(2), MUL_T4(3) };

static void bf16_t(mul_t *to, mul_t *to2, int h, const uint8_t *record) {
    const __m512i even = _mm512_load_si512(mul_four),
                  odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
    for (int half = 0; half < 2; half++)
        for (int chain = 0; chain < 2; chain++) {
            __m512i x[4], y[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const uint8_t *four = record + half * 512 + i * 128;
                x[i] = _mm512_permutex2var_epi16(_mm512_loadu_si512(four), chain ? odd : even,
                                                 _mm512_loadu_si512(four + 64));
            }
            y[0] = _mm512_shuffle_i64x2(x[0], x[1], 0x44);
            y[1] = _mm512_shuffle_i64x2(x[2], x[3], 0x44);
            y[2] = _mm512_shuffle_i64x2(x[0], x[1], 0xee);
            y[3] = _mm512_shuffle_i64x2(x[2], x[3], 0xee);
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) {
                step_t_put(half ? to2 : to, h, chain * 4 + i * 2,
                           _mm512_shuffle_i64x2(y[i * 2], y[i * 2 + 1], 0x88));
                step_t_put(half ? to2 : to, h, chain * 4 + i * 2 + 1,
                           _mm512_shuffle_i64x2(y[i * 2], y[i * 2 + 1], 0xdd));
            }
        }
}

static void rhs_record_t(mul_t *to, mul_t *to2, const uint8_t *a, const uint8_t *b,
                         enum kern_format format) {
    for (int h = 0; h < 2; h++) {
        const uint8_t *record = h ? b : a;
        if (!record)
            for (int i = 0; i < 8; i++) {
                step_t_put(to, h, i, _mm512_setzero_si512());
                step_t_put(to2, h, i, _mm512_setzero_si512());
            }
        else if (format == KERN_FORMAT_MXFP4) mxfp4_t(to, to2, h, record);
        else if (format == KERN_FORMAT_NVFP4) nvfp4_t(to, to2, h, record);
        else bf16_t(to, to2, h, record);
    }
}

/* One row of 16 columns as bf16 in the low words of lanes. */
INLINE __m512i words_get(const struct mul_source *s, const bool as_is, size_t at, int n) {
    if (as_is)
        return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(
            v_mask(n), (const uint16_t *)s->from + at));
    return v_round_bits(v_mul(v_set(s->scale), v_get_n(s->from, s->type, at, n)));
}
INLINE void rows_put(mul_t *to, const struct mul_source *s, const bool as_is, int k, int cols) {
    for (int i = 0; i < 8; i++) {
        __m512i row[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            row[j] = i * 4 + j < k ? words_get(s, as_is, (size_t)(i * 4 + j) * s->ld, cols)
                                   : _mm512_setzero_si512();
        _mm512_storeu_si512(to + i * 32, _mm512_or_si512(_mm512_slli_epi32(row[0], 16), row[2]));
        _mm512_storeu_si512(to + (i + 8) * 32,
                            _mm512_or_si512(_mm512_slli_epi32(row[1], 16), row[3]));
    }
}
static void rhs_rows(mul_t *to, const struct mul_source *s, int k, int cols) {
    const bool as_is = s->type == KERN_BF16 && s->scale == 1.0f, whole = k == 32 && cols == 16;
    if (as_is && whole) rows_put(to, s, true, 32, 16);
    else if (as_is) rows_put(to, s, true, k, cols);
    else if (whole) rows_put(to, s, false, 32, 16);
    else rows_put(to, s, false, k, cols);
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

#include "kernels/simd/mul_tile.h"
#include "kernels/simd/mul_records.h"
#endif
