/* avx512bf16.c - AVX-512 with its products on VDPBF16PS; empty where the compiler has no such
 * machine. Operands that are not bf16 go to the path it starts from.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cpu.h"

#if defined(__AVX512BF16__)
#define QERL_MUL_BF16
#include "kernels/simd/attn.h"
#include "kernels/simd/gemm.h"

#include "kernels/amx/amx.h"

void avx512bf16_product(float *c, const uint16_t *a, const uint16_t *b) {
    mul_t lhs[16 * MUL_LHS], rhs[MUL_RHS];
    const struct mul_source rows = { a, KERN_BF16, MUL_K, 1.0f, false },
                            pairs = { b, KERN_BF16, MUL_COLS, 1.0f, false };
    lhs_rows(lhs, MUL_LHS, 16 * MUL_LHS, &rows, 16, MUL_K);
    rhs_pairs(rhs, &pairs, MUL_K, MUL_COLS);
    mul_run(&(struct mul){ .lhs = lhs, .lhs_row = MUL_LHS, .lhs_block = 16 * MUL_LHS, .rhs = rhs,
                           .rhs_panel = MUL_RHS, .rhs_block = MUL_RHS, .acc = c,
                           .acc_row = MUL_COLS, .acc_panel = 16 * MUL_COLS, .rows = 16,
                           .panels = 1, .blocks = 1 });
}

void kern_avx512bf16_fill(struct kern *k) {
    kern_avx512_fill(k);
#include "kernels/simd/products.inc"
}
#endif
