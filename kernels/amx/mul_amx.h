/* mul_amx.h - the multiplier of mul.h on AMX tiles: operands that are bf16.
 *
 * A row of a lhs block is 32 bf16 in order of k: 16 rows are an A tile. A rhs block has 16 rows,
 * row j holding column c's k = 2j and 2j + 1 at 2c and 2c + 1: a B tile. mul_run needs open tiles
 * (tiles.h); the other functions only fill memory. A tile load cannot take its bytes from a store
 * that is still on its way: whoever fills blocks fills several before he multiplies.
 * Order: multiplying, lhs, records, rhs.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_MUL_AMX_H
#define QERL_MUL_AMX_H
#include "kernels/amx/tiles.h"
#include "kernels/simd/codes.h"
#include "kernels/simd/mul.h"

typedef uint16_t mul_t;
enum { MUL_ROWS = AMX_TILE_ROWS, MUL_IS_BF16 = 1, MUL_PANELS = 4, MUL_PAIR = 2 * MUL_COLS };
MUL_RUN_ARGS(mul_t);

/* Where the sums of one tile are while it is multiplied: in place, or, when it has rows that nobody
 * owns, in a spare tile. What the spare one holds beyond does not matter. */
struct mul_sums { float *at; size_t stride; };
static _Thread_local _Alignas(64) float mul_spare[4][AMX_TILE_BYTES / sizeof(float)];

static struct mul_sums sums_open(const struct mul *m, int row, int panel, float *spare) {
    float *acc = m->acc + (size_t)row * m->acc_row + (size_t)panel * m->acc_panel;
    if (m->rows - row >= MUL_ROWS) return (struct mul_sums){ acc, m->acc_row * sizeof *acc };
    for (int r = 0; r < m->rows - row; r++)
        v_store(spare + r * MUL_COLS, v_load(acc + (size_t)r * m->acc_row));
    return (struct mul_sums){ spare, MUL_COLS * sizeof *spare };
}
static void sums_close(const struct mul *m, int row, int panel, const float *spare) {
    float *acc = m->acc + (size_t)row * m->acc_row + (size_t)panel * m->acc_panel;
    if (m->rows - row >= MUL_ROWS) return;
    for (int r = 0; r < m->rows - row; r++)
        v_store(acc + (size_t)r * m->acc_row, v_load(spare + r * MUL_COLS));
}

/* Tiles 0 .. 3 hold n <= 4 sums of R tiles of rows, 1, 2 or 4, times 4 / R panels: sum i is that of
 * rows i % R and panel i / R. Four hide the latency; a step, which is one block, loads five tiles
 * or four for its four products. */
static void sums_load(const struct mul *m, int row, int panel, int R, int n, struct mul_sums s[4]) {
    for (int i = 0; i < n; i++)
        s[i] = sums_open(m, row + i % R * MUL_ROWS, panel + i / R, mul_spare[i]);
    TILE_LOAD(0, s[0].at, s[0].stride);
    if (n > 1) TILE_LOAD(1, s[1].at, s[1].stride);
    if (n > 2) TILE_LOAD(2, s[2].at, s[2].stride);
    if (n > 3) TILE_LOAD(3, s[3].at, s[3].stride);
}
static void sums_store(const struct mul *m, int row, int panel, int R, int n,
                       const struct mul_sums s[4]) {
    TILE_STORE(0, s[0].at, s[0].stride);
    if (n > 1) TILE_STORE(1, s[1].at, s[1].stride);
    if (n > 2) TILE_STORE(2, s[2].at, s[2].stride);
    if (n > 3) TILE_STORE(3, s[3].at, s[3].stride);
    for (int i = 0; i < n; i++)
        sums_close(m, row + i % R * MUL_ROWS, panel + i / R, mul_spare[i]);
}
INLINE void sums_step(const struct mul *m, const mul_t *a, const mul_t *b, size_t b_panel,
                      const int R, int n) {
    const size_t a_row = m->lhs_row * sizeof(mul_t), a_tile = m->lhs_row * MUL_ROWS;
    if (R == 1) {
        TILE_LOAD(4, a, a_row);
        TILE_LOAD(5, b, 64);
        TILE_PRODUCT(0, 4, 5);
        if (n == 1) return;
        TILE_LOAD(6, b + b_panel, 64);
        TILE_PRODUCT(1, 4, 6);
        if (n == 2) return;
        TILE_LOAD(7, b + 2 * b_panel, 64);
        TILE_PRODUCT(2, 4, 7);
        if (n == 3) return;
        TILE_LOAD(5, b + 3 * b_panel, 64);
        TILE_PRODUCT(3, 4, 5);
    } else if (R == 2) {
        TILE_LOAD(6, b, 64);
        TILE_LOAD(4, a, a_row);
        TILE_PRODUCT(0, 4, 6);
        TILE_LOAD(5, a + a_tile, a_row);
        TILE_PRODUCT(1, 5, 6);
        if (n == 2) return;
        TILE_LOAD(7, b + b_panel, 64);
        TILE_PRODUCT(2, 4, 7);
        TILE_PRODUCT(3, 5, 7);
    } else {
        TILE_LOAD(4, b, 64);
        TILE_LOAD(5, a, a_row);
        TILE_PRODUCT(0, 5, 4);
        TILE_LOAD(6, a + a_tile, a_row);
        TILE_PRODUCT(1, 6, 4);
        TILE_LOAD(7, a + 2 * a_tile, a_row);
        TILE_PRODUCT(2, 7, 4);
        if (n == 3) return;
        TILE_LOAD(5, a + 3 * a_tile, a_row);
        TILE_PRODUCT(3, 5, 4);
    }
}

INLINE void run_group(const struct mul *m, int row, int panel, const int R, int n) {
    const mul_t *a = m->lhs + (size_t)row * m->lhs_row, *b = m->rhs + (size_t)panel * m->rhs_panel;
    struct mul_sums s[4];
    sums_load(m, row, panel, R, n, s);
    for (int i = m->blocks; i > 0; i--, a += m->lhs_block, b += m->rhs_block)
        sums_step(m, a, b, m->rhs_panel, R, n);
    sums_store(m, row, panel, R, n, s);
}
static void mul_run(const struct mul *m) {
    for (int row = 0; row < m->rows; row += 2 * MUL_ROWS)
        if (m->rows - row > MUL_ROWS)
            for (int panel = 0; panel < m->panels; panel += 2)
                run_group(m, row, panel, 2, m->panels - panel > 1 ? 4 : 2);
        else
            for (int panel = 0; panel < m->panels; panel += 4)
                run_group(m, row, panel, 1, m->panels - panel < 4 ? m->panels - panel : 4);
}

/* The rhs is made while what was made four blocks before is multiplied: by then it has left the
 * stores' queue, from which a tile load cannot take it, and making and multiplying use different
 * parts of the core. */
typedef void mul_get(void *arg, mul_t *to, int panel, int count, int block);
struct mul_maker { mul_get *get; void *arg; mul_t *slots; int block; };
enum { MUL_SLOTS = 8 };                                 /* steps whose blocks are in memory */
#define MUL_FUSED (4 * MUL_SLOTS)

INLINE void fused_group(const struct mul *m, int panel, int count, const struct mul_maker *from,
                        const int R, int n) {
    const size_t slot = 4 / R * MUL_RHS;
    struct mul_sums s[4];
    sums_load(m, 0, panel, R, n, s);
    for (int i = 0; i < m->blocks + R; i++) {
        const int done = i - R;
        if (i < m->blocks)
            from->get(from->arg, from->slots + (size_t)(i % MUL_SLOTS) * slot, panel, count,
                      from->block + i);
        if (done >= 0)
            sums_step(m, m->lhs + (size_t)done * m->lhs_block,
                      from->slots + (size_t)(done % MUL_SLOTS) * slot, MUL_RHS, R, n);
    }
    sums_store(m, 0, panel, R, n, s);
}

/* More rows than four sums take: their blocks are made with the first rows and serve the others. */
static void fused_rows(const struct mul *m, int panel, int count, struct mul_maker from,
                       bool pairs) {
    for (; from.block < m->blocks; from.block += MUL_SLOTS) {
        struct mul first = *m, others;
        const int left = m->blocks - from.block;
        first.lhs += (size_t)from.block * m->lhs_block;
        first.blocks = left < MUL_SLOTS ? left : MUL_SLOTS;
        first.rows = (pairs ? 2 : 4) * MUL_ROWS;
        others = first;
        others.rhs = from.slots;
        if (pairs) {
            fused_group(&first, panel, count, &from, 2, 2 * count);
            others.rhs_panel = MUL_RHS, others.rhs_block = 2 * MUL_RHS;
        } else {
            for (int c = 0; c < count; c++) {
                struct mul_maker one = from;
                one.slots += (size_t)c * MUL_SLOTS * MUL_RHS;
                fused_group(&first, panel + c, 1, &one, 4, 4);
            }
            others.rhs_panel = MUL_SLOTS * MUL_RHS, others.rhs_block = MUL_RHS;
        }
        others.lhs += (size_t)first.rows * m->lhs_row;
        others.acc += (size_t)first.rows * m->acc_row + (size_t)panel * m->acc_panel;
        others.rows = m->rows - first.rows;
        others.panels = count;
        mul_run(&others);
    }
}

static void mul_fused(const struct mul *m, mul_t *rhs, mul_get *get, void *arg, bool pairs) {
    const struct mul_maker from = { get, arg, rhs, 0 };
    const int tiles = (m->rows + MUL_ROWS - 1) / MUL_ROWS;
    for (int panel = 0, count; panel < m->panels; panel += count) {
        const int left = m->panels - panel, most = tiles == 1 ? 4 : tiles > 2 && tiles < 5 && !pairs
                                                                        ? 1 : 2;
        count = left < most ? left : most;
        if (tiles == 1) fused_group(m, panel, count, &from, 1, count);
        else if (tiles == 2) fused_group(m, panel, count, &from, 2, 2 * count);
        else if (most == 1) fused_group(m, panel, 1, &from, 4, tiles);
        else fused_rows(m, panel, count, from, pairs);
    }
}

INLINE __m512i load512(const void *p) { return _mm512_loadu_si512(p); }
INLINE void store512(void *p, __m512i v) { _mm512_storeu_si512(p, v); }
/* n may be outside 0 .. 32 */
INLINE __mmask32 mask32(int n) { return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1u; }
/* Row j of a rhs block from its elements 2j and 2j + 1, each 16 columns as the low halves of 32
 * bits. */
INLINE __m512i pair_of(__m512i even, __m512i odd) {
    return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
}
/* Elements at .. at + n - 1 (n <= 16) of a source, as the low halves of 32 bits. */
INLINE __m512i source_bits(const struct mul_source *s, size_t at, int n) {
    if (s->type == KERN_BF16 && s->scale == 1.0f)
        return _mm512_cvtepu16_epi32(
            _mm256_maskz_loadu_epi16(v_mask(n), (const uint16_t *)s->from + at));
    return v_round_bits(v_mul(v_set(s->scale), v_get_n(s->from, s->type, at, n)));
}
INLINE bool source_is_bf16(const struct mul_source *s) {
    return s->round || (s->type == KERN_BF16 && s->scale == 1.0f);
}

/* 16 x 16 of 32 bits */
INLINE void transpose16(__m512i r[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {        /* part l of r[4 q + i]: rows 4 q .., column 4 l + i */
        const __m512i a = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88),
                      b = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88),
                      c = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd),
                      d = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
        r[i] = _mm512_shuffle_i32x4(a, b, 0x88);
        r[i + 4] = _mm512_shuffle_i32x4(c, d, 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(a, b, 0xdd);
        r[i + 12] = _mm512_shuffle_i32x4(c, d, 0xdd);
    }
}

static void lhs_rows(mul_t *to, size_t to_row, size_t to_block, const struct mul_source *s,
                     int rows, int k) {
    assert(source_is_bf16(s));
    const bool as_is = s->type == KERN_BF16 && s->scale == 1.0f;
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < k; i += MUL_K) {
            const size_t at = (size_t)r * s->ld + (size_t)i;
            mul_t *out = to + (size_t)r * to_row + (size_t)(i / MUL_K) * to_block;
            if (as_is) {
                store512(out, _mm512_maskz_loadu_epi16(mask32(k - i),
                                                       (const uint16_t *)s->from + at));
                continue;
            }
            const int n = v_left(i, k), more = k - i > 16 ? v_left(i + 16, k) : 0;
            const __m512i low = source_bits(s, at, n), high = source_bits(s, at + 16, more);
            _mm256_storeu_si256((__m256i *)(void *)out, _mm512_cvtepi32_epi16(low));
            _mm256_storeu_si256((__m256i *)(void *)(out + 16), _mm512_cvtepi32_epi16(high));
        }
}

static void lhs_cols(mul_t *to, size_t to_row, size_t to_block, const struct mul_source *s,
                     int rows, int k) {
    assert(source_is_bf16(s));
    for (int i = 0; i < k; i += MUL_K)
        for (int r = 0; r < rows; r += 16) {
            const int n = v_left(r, rows);
            const size_t at = (size_t)i * s->ld + (size_t)r;
            __m512i pair[16];
            for (int j = 0; j < 16; j++) {
                const size_t even = at + (size_t)(2 * j) * s->ld;
                const int left = k - i - 2 * j;
                pair[j] = pair_of(left > 0 ? source_bits(s, even, n) : _mm512_setzero_si512(),
                                  left > 1 ? source_bits(s, even + s->ld, n)
                                           : _mm512_setzero_si512());
            }
            transpose16(pair);
            for (int j = 0; j < n; j++)
                store512(to + (size_t)(r + j) * to_row + (size_t)(i / MUL_K) * to_block, pair[j]);
        }
}

/* Records of 4 bits: a row of 16 codes is 8 bytes. Where all scales are plain, codes become bf16 by
 * tables and integer sums (codes.h), else by products in f32; values have at most 6 significant
 * bits, so that neither rounds. */
INLINE __m512i exact_bits(vf v) { return _mm512_srli_epi32(_mm512_castps_si512(v), 16); }
INLINE bool record_plain(const uint8_t *record, enum kern_format format) {
    return format == KERN_FORMAT_MXFP4 ? mxfp4_plain(record) : nvfp4_plain(record);
}
/* of inputs 0 .. 15 (half 0) or 16 .. 31 */
INLINE vf record_scales(const uint8_t *record, enum kern_format format, int half) {
    return format == KERN_FORMAT_MXFP4 ? v_e8m0(record + 256) : v_e4m3(record + 256 + half * 16);
}

/* Codes of rows 2j and 2j + 1: word 2c + p from byte c / 2 of row 2j + p, by 4 where c is odd. */
INLINE __m512i codes_of(const uint8_t *record, int j) {
    static const _Alignas(64) uint8_t from[64] = {
        0, 0, 8,  8,  0, 0, 8,  8,  1, 1, 9,  9,  1, 1, 9,  9,
        2, 2, 10, 10, 2, 2, 10, 10, 3, 3, 11, 11, 3, 3, 11, 11,
        4, 4, 12, 12, 4, 4, 12, 12, 5, 5, 13, 13, 5, 5, 13, 13,
        6, 6, 14, 14, 6, 6, 14, 14, 7, 7, 15, 15, 7, 7, 15, 15,
    };
    const __m512i rows = _mm512_broadcast_i32x4(
        _mm_loadu_si128((const __m128i *)(const void *)(record + j * 16)));
    return _mm512_srlv_epi16(_mm512_shuffle_epi8(rows, load512(from)),
                             _mm512_set1_epi64(0x0004000400000000));
}

static void rhs_record(mul_t *to, const uint8_t *record, enum kern_format format) {
    assert(format != KERN_FORMAT_F32);
    if (format == KERN_FORMAT_BF16) {
        const __m512i word = _mm512_add_epi32(
            _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14,
                                                 15), _mm512_set1_epi32(0x00010001)),
            _mm512_set1_epi32(0x00100000));
        for (int j = 0; j < 16; j++)
            store512(to + j * MUL_PAIR, _mm512_permutexvar_epi16(word, load512(record + j * 64)));
        return;
    }
    const bool plain = record_plain(record, format);
    if (plain && format == KERN_FORMAT_MXFP4) {
        const __m512i table = load512(mul_e2m1_bytes), up = both_words(mxfp4_up(record));
#pragma GCC unroll 4
        for (int j = 0; j < 16; j++)
            store512(to + j * MUL_PAIR, mxfp4_value_by_bytes(codes_of(record, j), table, up));
        return;
    }
    for (int half = 0; half < 2; half++) {
        if (plain) {
            const struct nvfp4_base base = nvfp4_base(record + 256 + half * 16);
            const __m512i one = both_words(base.plain), more = both_words(base.more),
                          table = load512(mul_e2m1_up);
            for (int j = half * 8; j < half * 8 + 8; j++)
                store512(to + j * MUL_PAIR, nvfp4_value(codes_of(record, j), table, one, more));
            continue;
        }
        const vf scale = record_scales(record, format, half), table = v_e2m1_table();
        for (int j = half * 8; j < half * 8 + 8; j++)
            store512(to + j * MUL_PAIR,
                     pair_of(exact_bits(v_mul(v_e2m1(record + j * 16, table), scale)),
                             exact_bits(v_mul(v_e2m1(record + j * 16 + 8, table), scale))));
    }
}

/* The words of 16 outputs, two and two. */
INLINE void pairs_put(int32_t to[8], __m512i low) {
    _mm256_storeu_si256((__m256i *)(void *)to, _mm512_cvtepi32_epi16(low));
}
/* 8 rows of a rhs block from 16 inputs of a record of 4 bits: row j is column j of the bytes. */
static void half_record_t(mul_t *to, const uint8_t *record, enum kern_format format, int half) {
    static const _Alignas(64) uint8_t across[64] = {
        0, 8,  16, 24, 32, 40, 48, 56, 1, 9,  17, 25, 33, 41, 49, 57,
        2, 10, 18, 26, 34, 42, 50, 58, 3, 11, 19, 27, 35, 43, 51, 59,
        4, 12, 20, 28, 36, 44, 52, 60, 5, 13, 21, 29, 37, 45, 53, 61,
        6, 14, 22, 30, 38, 46, 54, 62, 7, 15, 23, 31, 39, 47, 55, 63,
    };
    const __m512i order = load512(across),
                  a = _mm512_permutexvar_epi8(order, load512(record + half * 128)),
                  b = _mm512_permutexvar_epi8(order, load512(record + half * 128 + 64));
    _Alignas(64) uint8_t column[2][4][16];                   /* of bytes 2 i and 2 i + 1 */
    store512(column[0], _mm512_unpacklo_epi64(a, b));
    store512(column[1], _mm512_unpackhi_epi64(a, b));
    if (!record_plain(record, format)) {
        const vf table = v_e2m1_table();
        float scale[16];
        v_store(scale, record_scales(record, format, half));
        for (int j = 0; j < 8; j++) {
            const __m512i bytes = _mm512_cvtepu8_epi32(
                _mm_load_si128((const __m128i *)(const void *)column[j % 2][j / 2]));
            const vf even = _mm512_permutexvar_ps(bytes, table),
                     odd = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table);
            store512(to + j * MUL_PAIR,
                     pair_of(exact_bits(v_mul(even, v_set(scale[2 * j]))),
                             exact_bits(v_mul(odd, v_set(scale[2 * j + 1])))));
        }
        return;
    }
    /* both codes of a byte, the odd output's shifted down */
    const __m512i fourfold = _mm512_mullo_epi32(
                      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                      _mm512_set1_epi32(0x01010101)),
                  shift = _mm512_set1_epi32(0x00040000);
    const bool mx = format == KERN_FORMAT_MXFP4;
    const __m512i table = mx ? load512(mul_e2m1_bytes) : load512(mul_e2m1_up);
    int32_t one[8], more[8] = { 0 };
    if (mx) {
        pairs_put(one, mxfp4_up(record));
    } else {
        const struct nvfp4_base base = nvfp4_base(record + 256 + half * 16);
        pairs_put(one, base.plain);
        pairs_put(more, base.more);
    }
    for (int j = 0; j < 8; j++) {
        const __m512i bytes = _mm512_broadcast_i32x4(
            _mm_load_si128((const __m128i *)(const void *)column[j % 2][j / 2]));
        const __m512i code = _mm512_srlv_epi16(_mm512_shuffle_epi8(bytes, fourfold), shift),
                      by = _mm512_set1_epi32(one[j]);
        store512(to + j * MUL_PAIR,
                 mx ? mxfp4_value_by_bytes(code, table, by)
                    : nvfp4_value(code, table, by, _mm512_set1_epi32(more[j])));
    }
}

static void rhs_record_t(mul_t *to, mul_t *to2, const uint8_t *a, const uint8_t *b,
                         enum kern_format format) {
    assert(format != KERN_FORMAT_F32);
    for (int half = 0; half < 2; half++) {
        mul_t *out = half ? to2 : to;
        if (format == KERN_FORMAT_BF16) {
            __m512i row[16];
            for (int i = 0; i < 16; i++) {                   /* 16 outputs of a, 16 of b */
                const size_t at = (size_t)(half * 16 + i) * 32;
                const __m256i low = _mm256_loadu_si256((const __m256i *)(const void *)(a + at));
                row[i] = _mm512_zextsi256_si512(low);
                if (b)
                    row[i] = _mm512_inserti64x4(
                        row[i], _mm256_loadu_si256((const __m256i *)(const void *)(b + at)), 1);
            }
            transpose16(row);
            for (int j = 0; j < 16; j++) store512(out + j * MUL_PAIR, row[j]);
            continue;
        }
        half_record_t(out, a, format, half);
        if (b) half_record_t(out + 8 * MUL_PAIR, b, format, half);
        else memset(out + 8 * MUL_PAIR, 0, 8 * MUL_PAIR * sizeof *out);
    }
}

static void rhs_rows(mul_t *to, const struct mul_source *s, int k, int cols) {
    assert(source_is_bf16(s));
    for (int j = 0; j < 16; j++) {
        const size_t even = (size_t)(2 * j) * s->ld;
        const __m512i none = _mm512_setzero_si512();
        store512(to + j * MUL_PAIR,
                 pair_of(2 * j < k ? source_bits(s, even, cols) : none,
                         2 * j + 1 < k ? source_bits(s, even + s->ld, cols) : none));
    }
}

/* Pairs that count: all, or only their first elements. */
INLINE __mmask32 pairs_mask(int n, bool odd_too) {
    return mask32(2 * n) & (odd_too ? ~0u : 0x55555555u);
}

static void rhs_pairs(mul_t *to, const struct mul_source *s, int k, int cols) {
    assert(s->type == KERN_BF16);
    const uint16_t *from = s->from;
    for (int j = 0; j < 16; j++)
        store512(to + j * MUL_PAIR,
                 2 * j < k ? _mm512_maskz_loadu_epi16(pairs_mask(cols, 2 * j + 1 < k),
                                                      from + (size_t)j * s->ld * 2)
                           : _mm512_setzero_si512());
}

static void rhs_pairs_t(mul_t *to, const struct mul_source *s, int k, int cols) {
    assert(s->type == KERN_BF16);
    const uint16_t *from = s->from;
    const __m512i first = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36,
                                           34, 32, 30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6,
                                           4, 2, 0),
                  second = _mm512_add_epi16(first, _mm512_set1_epi16(1));
    __m512i col[16];                                         /* 32 k of one column */
    for (int c = 0; c < 16; c += 2) {
        if (c >= cols) {
            col[c] = col[c + 1] = _mm512_setzero_si512();
            continue;
        }
        const uint16_t *at = from + (size_t)(c / 2) * s->ld * 2;
        const bool both = c + 1 < cols;
        const __m512i low = _mm512_maskz_loadu_epi16(pairs_mask(k, both), at),
                      high = _mm512_maskz_loadu_epi16(pairs_mask(k - 16, both), at + 32);
        col[c] = _mm512_permutex2var_epi16(low, first, high);
        col[c + 1] = _mm512_permutex2var_epi16(low, second, high);
    }
    transpose16(col);
    for (int j = 0; j < 16; j++) store512(to + j * MUL_PAIR, col[j]);
}
#endif
