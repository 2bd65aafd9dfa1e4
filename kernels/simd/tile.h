/* tile.h - the one loop nest that does the multiplying: acc[r, c] = fma(x[r, k], w[k, c], acc[r,
 * c]) for k ascending.
 *
 * A tile is R rows of x against C panels of 16 columns of w, held in registers over all of k.
 * Whoever calls it decides what rows, columns and k are: outputs and inputs (gemm.h), queries and
 * keys (attn.h). The sums start from and end in memory, so k may be cut anywhere without changing a
 * bit.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_SIMD_TILE_H
#define QERL_SIMD_TILE_H
#include "kernels/simd/vec.h"

#if defined(__AVX512F__)
enum { TILE_R = 8, TILE_C = 2, TILE_C_THIN = 4 };            /* 16 sums in 32 registers */
#else
/* 12 in 16; a panel is two registers */
enum { TILE_R = 6, TILE_C = 1, TILE_C_THIN = 2 };
#endif
_Static_assert(2 * TILE_C_THIN <= TILE_R * TILE_C, "a thin tile fits");
/* up to so many rows, C_THIN panels hide the latency */
enum { TILE_THIN = 2 };

struct tile {
    const float *x;
    /* stride of k in x, where x is stored k by k */
    size_t x_k;
    const float *w;
    size_t w_k, w_panel;                                     /* strides of k and of panels in w */
    float *acc;
    size_t acc_row, acc_panel;
    int n;                                                   /* length of k */
};

INLINE void tile_run(const struct tile *t, const int R, const int C, const size_t x_row,
                     const bool by_k) {
    /* of fixed size, or they would live in memory */
    vf s[TILE_R * TILE_C];
    const float *x = t->x, *w = t->w;
    const size_t x_k = by_k ? t->x_k : 1, w_k = t->w_k, w_panel = t->w_panel;
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++)
            s[r * C + c] = v_load(t->acc + (size_t)r * t->acc_row + (size_t)c * t->acc_panel);
    for (int k = 0; k < t->n; k++) {
        vf b[TILE_C_THIN];
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) b[c] = v_load(w + (size_t)c * w_panel);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            vf a = v_set(x[(size_t)r * x_row]);
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) s[r * C + c] = v_fma(a, b[c], s[r * C + c]);
        }
        x += x_k;
        w += w_k;
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++)
            v_store(t->acc + (size_t)r * t->acc_row + (size_t)c * t->acc_panel, s[r * C + c]);
}

INLINE void tile_rows(const struct tile *t, int rows, const int C, const size_t x_row,
                      const bool by_k) {
    switch (rows) {
    case 1: tile_run(t, 1, C, x_row, by_k); break;
    case 2: tile_run(t, 2, C, x_row, by_k); break;
    case 3: tile_run(t, 3, C, x_row, by_k); break;
    case 4: tile_run(t, 4, C, x_row, by_k); break;
    case 5: tile_run(t, 5, C, x_row, by_k); break;
    case 6: tile_run(t, 6, C, x_row, by_k); break;
#if defined(__AVX512F__)
    case 7: tile_run(t, 7, C, x_row, by_k); break;
    case 8: tile_run(t, 8, C, x_row, by_k); break;
#endif
    default: assert(!"rows of a tile");
    }
}

/* All of rows x panels. The row stride of x is a constant of the caller, so that it costs no
 * register. */
INLINE void tile_block(struct tile t, int rows, int panels, const size_t x_row, const bool by_k) {
    const float *x = t.x, *w = t.w;
    float *acc = t.acc;
    for (int c = 0; c < panels;) {
        int take = rows <= TILE_THIN && panels - c >= TILE_C_THIN ? TILE_C_THIN
                   : panels - c >= TILE_C                         ? TILE_C
                                                                  : 1;
        t.w = w + (size_t)c * t.w_panel;
        for (int r = 0; r < rows; r += TILE_R) {
            int n = rows - r < TILE_R ? rows - r : TILE_R;
            t.x = x + (size_t)r * x_row;
            t.acc = acc + (size_t)r * t.acc_row + (size_t)c * t.acc_panel;
            if (take == TILE_C_THIN && n == 1) tile_run(&t, 1, TILE_C_THIN, x_row, by_k);
            else if (take == TILE_C_THIN) tile_run(&t, 2, TILE_C_THIN, x_row, by_k);
            else if (TILE_C > 1 && take == TILE_C) tile_rows(&t, n, TILE_C, x_row, by_k);
            else tile_rows(&t, n, 1, x_row, by_k);
        }
        c += take;
    }
}

/* row stride of x: a page of keys */
enum { TILE_Q = 32 };
static void tile_page(struct tile t, int rows, int panels) {
    tile_block(t, rows, panels, TILE_Q, false);
}
static void tile_by_k(struct tile t, int rows, int panels) { tile_block(t, rows, panels, 1, true); }
#endif
