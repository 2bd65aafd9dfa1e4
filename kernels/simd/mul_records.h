/* mul_records.h - for the multiplier on VDPBF16PS: products of few rows straight from packed
 * records, whose blocks would cost more to store and to read back than to multiply.
 *
 * A step's weights are made in a register and meet all rows of a tile there. An MXFP4 scale is a
 * power of two and one for a column of the whole block: where no number comes near an end of the
 * range, even + odd times the scale has the bits of the sum of scaled products, so that codes are
 * multiplied as they are. RECORDS_X and RECORDS_SCALE are that range: with |x| in 2^-X .. 2^X or 0,
 * all that a chain can hold is a multiple of 2^(-X - 8) below 2^(X + 9), before the scale and
 * after.
 * Does not know: where rows and records come from.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_SIMD_MUL_RECORDS_H
#define QERL_SIMD_MUL_RECORDS_H
#include "kernels/simd/mul_tile.h"

#define MUL_RECORDS
enum {
    MUL_RECORDS_ROWS = 16,                       /* with more, a block in memory serves them */
    RECORDS_ROWS = 8, RECORDS_PANELS = 2,        /* of a tile */
    RECORDS_X = 86, RECORDS_SCALE = 32
};
_Static_assert(RECORDS_X + 8 + RECORDS_SCALE <= 126 && RECORDS_X + 9 + RECORDS_SCALE <= 127,
               "no sum is subnormal or infinite");

/* The first record of the panels to be multiplied; those of a panel follow each other. */
struct mul_packed { const uint8_t *at; size_t panel_bytes; enum kern_format format; };

/* n elements of lhs blocks, all of them zero or within 2^-RECORDS_X .. 2^RECORDS_X */
static bool lhs_tame(const mul_t *lhs, size_t n) {
    const __m512i least = _mm512_set1_epi16((127 - RECORDS_X) << 7),
                  range = _mm512_set1_epi16(2 * RECORDS_X << 7),
                  size = _mm512_set1_epi16(0x7fff);
    __mmask32 wild = 0;
    for (size_t i = 0; i < n; i += 32) {
        const __m512i x = _mm512_loadu_si512(lhs + i);
        wild |= _mm512_mask_cmpgt_epu16_mask(_mm512_test_epi16_mask(x, size),
                                             _mm512_sub_epi16(_mm512_and_si512(x, size), least),
                                             range);
    }
    return !wild;
}
/* Whether mul_records takes weights of a format with these rows, n elements. */
static bool records_take(enum kern_format format, const mul_t *lhs, int rows, size_t n) {
    if (rows > MUL_RECORDS_ROWS) return false;
    return format == KERN_FORMAT_BF16 || (format == KERN_FORMAT_MXFP4 && lhs_tame(lhs, n));
}
INLINE bool record_tame(const uint8_t *record) {
    const __m128i s = _mm_loadu_si128((const __m128i *)(const void *)(record + 256));
    const __m128i out = _mm_subs_epu8(_mm_sub_epi8(s, _mm_set1_epi8(127 - RECORDS_SCALE)),
                                      _mm_set1_epi8(2 * RECORDS_SCALE));
    return _mm_testz_si128(out, out);
}
INLINE vf record_scale(const uint8_t *record) {             /* of a tame one */
    const __m128i s = _mm_loadu_si128((const __m128i *)(const void *)(record + 256));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu8_epi32(s), 23));
}

/* The weights of step i of a chain, as rhs_record lays them out, but for MXFP4's scale. */
INLINE vf record_step(const uint8_t *record, const int i, const int odd,
                      const enum kern_format format) {
    if (format == KERN_FORMAT_MXFP4)
        return _mm512_castsi512_ps(_mm512_permutexvar_epi16(
            codes_of(_mm512_loadu_si512(record + i / 2 * 64), i % 2 * 2 + odd),
            _mm512_load_si512(mul_e2m1)));
    return _mm512_castsi512_ps(step_of(_mm512_loadu_si512(record + i * 128),
                                       _mm512_loadu_si512(record + i * 128 + 64), odd));
}
INLINE void record_chain(vf *sum, const mul_t *x, const struct mul_packed *w,
                         const uint8_t *record, const int odd, const enum kern_format format,
                         const int R, const int C) {
#pragma GCC unroll 8
    for (int i = 0; i < MUL_STEPS; i++) {
        vf b[RECORDS_PANELS];
#pragma GCC unroll 2
        for (int c = 0; c < C; c++)
            b[c] = record_step(record + (size_t)c * w->panel_bytes, i, odd, format);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const vf a = mul_x(x + r * MUL_LHS + (i + odd * MUL_CHAIN) * MUL_LANE);
#pragma GCC unroll 2
            for (int c = 0; c < C; c++) sum[r * C + c] = mul_fma(a, b[c], sum[r * C + c]);
        }
    }
}

/* A block whose scales need more care, by way of memory. */
static __attribute__((noinline)) void record_wild(const struct mul *m, const mul_t *x, float *acc,
                                                  int rows, const uint8_t *record,
                                                  enum kern_format format) {
    mul_t block[MUL_RHS];
    const unsigned csr = _mm_getcsr();
    _mm_setcsr(csr & ~(unsigned)MUL_FLUSH);                  /* a scale may be subnormal */
    rhs_record(block, record, format);
    _mm_setcsr(csr);
    mul_run(&(struct mul){ .lhs = x, .lhs_row = m->lhs_row, .rhs = block, .acc = acc,
                           .acc_row = m->acc_row, .rows = rows, .panels = 1, .blocks = 1 });
}

INLINE void record_tile(const struct mul *m, const struct mul_packed *w, struct mul_cursor *f,
                        int row, int panel, const enum kern_format format, const int R,
                        const int C) {
    const bool mx = format == KERN_FORMAT_MXFP4;
    const size_t bytes = mx ? 272 : 1024;
    const mul_t *x = m->lhs + (size_t)row * m->lhs_row;
    const uint8_t *record = w->at + (size_t)panel * w->panel_bytes;
    float *acc = m->acc + (size_t)row * m->acc_row + (size_t)panel * m->acc_panel;
    for (int b = 0; b < m->blocks; b++, x += m->lhs_block, record += bytes) {
        vf even[RECORDS_ROWS * RECORDS_PANELS], odd[RECORDS_ROWS * RECORDS_PANELS];
        bool tame = true;
        mul_fetch(f);
#pragma GCC unroll 2
        for (int c = 0; mx && c < C; c++)
            tame = tame && record_tame(record + (size_t)c * w->panel_bytes);
        for (int c = 0; !tame && c < C; c++)
            record_wild(m, x, acc + (size_t)c * m->acc_panel, R,
                        record + (size_t)c * w->panel_bytes, format);
        if (!tame) continue;
#pragma GCC unroll 16
        for (int i = 0; i < R * C; i++) even[i] = odd[i] = v_zero();
        record_chain(even, x, w, record, 0, format, R, C);
        record_chain(odd, x, w, record, 1, format, R, C);
#pragma GCC unroll 2
        for (int c = 0; c < C; c++) {
            const vf scale = mx ? record_scale(record + (size_t)c * w->panel_bytes) : v_set(1.0f);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                float *at = acc + (size_t)r * m->acc_row + (size_t)c * m->acc_panel;
                const vf both = v_add(even[r * C + c], odd[r * C + c]);
                v_store(at, mx ? v_fma(both, scale, v_load(at)) : v_add(v_load(at), both));
            }
        }
    }
}

typedef void record_tile_fn(const struct mul *m, const struct mul_packed *w, struct mul_cursor *f,
                            int row, int panel);
#define RECORD_TILE(R, C)                                                                          \
    static void record_tile_##R##_##C(const struct mul *m, const struct mul_packed *w,             \
                                      struct mul_cursor *f, int row, int panel) {                  \
        if (w->format == KERN_FORMAT_MXFP4)                                                        \
            record_tile(m, w, f, row, panel, KERN_FORMAT_MXFP4, R, C);                             \
        else                                                                                       \
            record_tile(m, w, f, row, panel, KERN_FORMAT_BF16, R, C);                              \
    }
#define RECORD_TILES(R) RECORD_TILE(R, 1) RECORD_TILE(R, 2)
RECORD_TILES(1)
RECORD_TILES(2)
RECORD_TILES(3)
RECORD_TILES(4)
RECORD_TILES(5)
RECORD_TILES(6)
RECORD_TILES(7)
RECORD_TILES(8)
#undef RECORD_TILES
#undef RECORD_TILE
static record_tile_fn *const record_tile_of[RECORDS_ROWS][RECORDS_PANELS] = {
    { record_tile_1_1, record_tile_1_2 }, { record_tile_2_1, record_tile_2_2 },
    { record_tile_3_1, record_tile_3_2 }, { record_tile_4_1, record_tile_4_2 },
    { record_tile_5_1, record_tile_5_2 }, { record_tile_6_1, record_tile_6_2 },
    { record_tile_7_1, record_tile_7_2 }, { record_tile_8_1, record_tile_8_2 },
};

static void mul_records(const struct mul *m, const struct mul_packed *w) {
    const int tiles = (m->rows + RECORDS_ROWS - 1) / RECORDS_ROWS;
    const int turns = tiles * ((m->panels + RECORDS_PANELS - 1) / RECORDS_PANELS) * m->blocks;
    struct mul_cursor f = mul_cursor(&m->ahead, turns);
    const unsigned csr = _mm_getcsr();
    assert(m->lhs_row == MUL_LHS);
    _mm_setcsr(csr | MUL_FLUSH);                             /* as mul_run */
    __asm__ volatile("" : : : "memory");
    for (int c = 0, n; c < m->panels; c += n) {
        n = m->panels - c < RECORDS_PANELS ? m->panels - c : RECORDS_PANELS;
        for (int t = 0; t < tiles; t++) {                    /* of about as many rows each */
            const int row = m->rows * t / tiles, rows = m->rows * (t + 1) / tiles - row;
            record_tile_of[rows - 1][n - 1](m, w, &f, row, c);
        }
    }
    __asm__ volatile("" : : : "memory");
    _mm_setcsr(csr);
}
#endif
