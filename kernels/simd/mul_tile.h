/* mul_tile.h - for the multipliers on vector registers: mul_run, a tile of rows x panels at a time,
 * and lhs_cols.
 *
 * A multiplier gives rhs_rows, mul_x (one step of a row, in every lane), mul_w (that step of 16
 * columns) and mul_fma. A block is MUL_STEPS steps of the even chain and as many of the odd one;
 * step i of chain j lies at i * MUL_STEP + j * MUL_CHAIN, in units of a lane's 32 bits.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_SIMD_MUL_TILE_H
#define QERL_SIMD_MUL_TILE_H
#include "kernels/simd/mul.h"

/* The most of a tile: its sums of one chain fit the registers beside a step's operands. The chains
 * take turns, so that each operand read serves more sums. */
#if defined(__AVX512F__)
enum { MUL_TILE_PANELS = 3, MUL_TILE_THIN = 6 };
#else
enum { MUL_TILE_PANELS = 1, MUL_TILE_THIN = 3 };           /* a panel is two registers */
#endif
enum { MUL_TILE_ROWS = 6, MUL_SUMS = MUL_TILE_ROWS * MUL_TILE_PANELS };
enum { MUL_PANELS = 6 };                                /* a group of whole tiles */
enum { MUL_LANE = 4 / (int)sizeof(mul_t) };             /* elements in a lane's 32 bits */

/* Subnormals as the tile instructions treat them: as zero, in and out. */
enum { MUL_FLUSH = 0x8040 };

INLINE void mul_chain(vf *sum, const mul_t *x, size_t x_row, const mul_t *w, size_t w_panel,
                      const int R, const int C) {
#pragma GCC unroll 4
    for (int i = 0; i < MUL_STEPS; i++) {
        vf b[MUL_TILE_THIN];
#pragma GCC unroll 8
        for (int c = 0; c < C; c++)
            b[c] = mul_w(w + (size_t)c * w_panel + i * (MUL_STEP * MUL_LANE * 16));
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const vf a = mul_x(x + (size_t)r * x_row + i * (MUL_STEP * MUL_LANE));
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) sum[r * C + c] = mul_fma(a, b[c], sum[r * C + c]);
        }
    }
}

/* The next lines of what is read ahead. */
struct mul_cursor { struct mul_ahead left; size_t in_row; int lines; };
INLINE struct mul_cursor mul_cursor(const struct mul_ahead *ahead, int turns) {
    const int lines = ahead->rows * (int)((ahead->row_bytes + 63) / 64);
    return (struct mul_cursor){ *ahead, 0, turns ? (lines + turns - 1) / turns : 0 };
}
INLINE void mul_fetch(struct mul_cursor *f) {
    for (int i = 0; i < f->lines && f->left.rows > 0; i++) {
        _mm_prefetch((const char *)f->left.at + f->in_row, _MM_HINT_T0);
        f->in_row += 64;
        if (f->in_row < f->left.row_bytes) continue;
        f->in_row = 0;
        f->left.at += f->left.row_stride;
        f->left.rows--;
    }
}

INLINE void mul_tile(const struct mul *m, struct mul_cursor *f, size_t row, size_t panel,
                     const int R, const int C) {
    const mul_t *x = m->lhs + row * m->lhs_row, *w = m->rhs + panel * m->rhs_panel;
    float *acc = m->acc + row * m->acc_row + panel * m->acc_panel;
    for (int b = 0; b < m->blocks; b++, x += m->lhs_block, w += m->rhs_block) {
        vf even[MUL_SUMS], odd[MUL_SUMS];
        mul_fetch(f);
#pragma GCC unroll 24
        for (int i = 0; i < R * C; i++) even[i] = odd[i] = v_zero();
        mul_chain(even, x, m->lhs_row, w, m->rhs_panel, R, C);
        mul_chain(odd, x + MUL_CHAIN * MUL_LANE, m->lhs_row, w + MUL_CHAIN * MUL_LANE * 16,
                  m->rhs_panel, R, C);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) {
                float *at = acc + (size_t)r * m->acc_row + (size_t)c * m->acc_panel;
                v_store(at, v_add(v_load(at), v_add(even[r * C + c], odd[r * C + c])));
            }
    }
}

INLINE void mul_rows(const struct mul *m, struct mul_cursor *f, size_t row, int rows, size_t panel,
                     const int C) {
    switch (rows) {
    case 1: mul_tile(m, f, row, panel, 1, C); break;
    case 2: mul_tile(m, f, row, panel, 2, C); break;
    case 3: mul_tile(m, f, row, panel, 3, C); break;
    case 4: mul_tile(m, f, row, panel, 4, C); break;
    case 5: mul_tile(m, f, row, panel, 5, C); break;
    case 6: mul_tile(m, f, row, panel, 6, C); break;
    default: assert(!"rows of a tile");
    }
}

static void mul_run(const struct mul *m) {
    const unsigned csr = _mm_getcsr();
    const int tiles = (m->rows + MUL_TILE_ROWS - 1) / MUL_TILE_ROWS;
    const int wide = m->rows == 1 ? MUL_TILE_THIN : MUL_TILE_PANELS;
    const int turns = tiles * ((m->panels + wide - 1) / wide) * m->blocks;
    struct mul_cursor f = mul_cursor(&m->ahead, turns);
    /* no compiler may move sums over a change of MXCSR, which it does not see in them */
    _mm_setcsr(csr | MUL_FLUSH);
    __asm__ volatile("" : : : "memory");
    for (int c = 0; c < m->panels;) {
        const int left = m->panels - c;
        if (m->rows == 1 && left >= MUL_TILE_THIN) {
            mul_tile(m, &f, 0, (size_t)c, 1, MUL_TILE_THIN);
            c += MUL_TILE_THIN;
            continue;
        }
        for (int t = 0; t < tiles; t++) {                   /* of about as many rows each */
            const int row = m->rows * t / tiles, rows = m->rows * (t + 1) / tiles - row;
            if (MUL_TILE_PANELS == 3 && left >= 3) mul_rows(m, &f, (size_t)row, rows, (size_t)c, 3);
            else if (MUL_TILE_PANELS == 3 && left == 2)
                mul_rows(m, &f, (size_t)row, rows, (size_t)c, 2);
            else mul_rows(m, &f, (size_t)row, rows, (size_t)c, 1);
        }
        c += left < MUL_TILE_PANELS ? left : MUL_TILE_PANELS;
    }
    __asm__ volatile("" : : : "memory");
    _mm_setcsr(csr);
}

/* Rows of rhs are steps in lanes: transposed, they are rows of lhs. */
static void lhs_cols(mul_t *to, size_t to_row, size_t to_block, const struct mul_source *s,
                     int rows, int k) {
    enum { STEPS = 2 * MUL_STEPS };
    _Alignas(64) mul_t steps[MUL_RHS], out[MUL_RHS];
    for (int i = 0; i < k; i += MUL_K)
        for (int r = 0; r < rows; r += 16) {
            const struct mul_source from = source_at(*s, (size_t)i, (size_t)r);
            const int n = rows - r < 16 ? rows - r : 16;
            for (size_t j = MUL_K; j < 2 * MUL_K; j++)      /* each in a page of its own */
                _mm_prefetch((const char *)source_at(from, j, 0).from, _MM_HINT_T0);
            rhs_rows(steps, &from, k - i < MUL_K ? k - i : MUL_K, n);
            mul_t *at = to + (size_t)r * to_row + (size_t)(i / MUL_K) * to_block,
                  *put = n == 16 ? at : out;
            const size_t ld = n == 16 ? to_row : MUL_LHS;
            for (int j = 0; j < STEPS; j += 8)
                for (size_t c = 0; c < 16; c += 8)
                    v_transpose8((float *)(void *)(put + c * ld + (size_t)(j * MUL_LANE)),
                                 ld / MUL_LANE,
                                 (const float *)(const void *)(steps + (size_t)(j * 16 + (int)c) *
                                                                           MUL_LANE),
                                 16);
            for (int j = 0; put == out && j < n; j++)
                memcpy(at + (size_t)j * to_row, out + j * MUL_LHS, MUL_LHS * sizeof *at);
        }
}
#endif
