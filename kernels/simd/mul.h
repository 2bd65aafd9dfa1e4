/* mul.h - THE MULTIPLIER: what every product of a path is made of, and the only part in which the
 * paths differ.
 *
 *   acc[r, c] += sum over blocks of 32 k, ascending, of (even + odd)
 *   even, odd = the chains of fma(lhs[r, k], rhs[k, c], chain) over the block's even and odd k,
 *               ascending, each from +0; subnormal operands and results are taken as zero; a short
 *               block is padded with zeros
 * which is what one AMX tile instruction does. gemm.h and attn.h are written on these functions
 * alone; a path provides them by one header: mul_f32.h (AVX2, AVX-512), mul_bf16.h (AVX-512 BF16),
 * amx/mul_amx.h. All give the same bits for the same operands.
 *
 * Blocks. mul_t is the path's element, MUL_LHS elements hold one row x 32 k, MUL_RHS elements hold
 * 32 k x 16 columns; their inside is the path's own. A bf16 multiplier takes operands that are
 * bf16 already (type KERN_BF16, a packed format, or `round`); whoever has others asks the f32 one.
 *
 *   mul_run      acc rows/panels by strides in floats; lhs and rhs by strides in elements. lhs must
 *                be readable up to the next multiple of MUL_ROWS rows; what stands there is not
 *                used
 *   mul_fused    (where MUL_FUSED is defined) as mul_run, with blocks that get(arg, to, panel,
 *                count, block) makes on the way, while those made before are multiplied: one block
 *                of panels [panel, panel + count), one after another at `to`. rhs has room for
 *                MUL_FUSED blocks. pairs: get makes two panels also where one is asked for
 *   mul_records  (where MUL_RECORDS is defined) as mul_run for few rows, the rhs being packed
 *                records as they lie; records_take says whether it may
 *   lhs_rows     element (r, k) = scale * from[r * ld + k]
 *   lhs_cols     element (r, k) = scale * from[k * ld + r]
 *   rhs_record   k = the 32 inputs, columns = the 16 outputs of one packed record
 *   rhs_record_t k = the 16 outputs of record a and of b (NULL: zeros), columns = inputs 0-15 into
 *                `to`, 16-31 into `to2`
 *   rhs_rows     element (k, c) = from[k * ld + c]
 *   rhs_pairs    element (k, c) = from[(k / 2 * ld + c) * 2 + k % 2]       pages of keys and values
 *   rhs_pairs_t  element (k, c) = from[(c / 2 * ld + k) * 2 + c % 2]       the same, transposed
 * lhs_* fill `rows` rows and ceil(k / 32) blocks; rhs_* one block of k <= 32 and cols <= 16; all
 * zero what is left of a block. Memory outside the named elements is not touched. `round`: to bf16,
 * after the scale.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_SIMD_MUL_H
#define QERL_SIMD_MUL_H
#include "kernels/simd/vec.h"

enum { MUL_K = 32, MUL_COLS = 16, MUL_LHS = 32, MUL_RHS = 512 };

/* from: f32 or bf16 by type, strides in elements */
struct mul_source { const void *from; enum kern_type type; size_t ld; float scale; bool round; };
INLINE struct mul_source source_at(struct mul_source s, size_t row, size_t column) {
    s.from = (const char *)s.from + (row * s.ld + column) * (s.type == KERN_F32 ? 4 : 2);
    return s;
}
/* What the caller reads next, in rows: asked for a few lines at a time while this is multiplied, as
 * a core that asks for all of it at once has to wait. rows 0: nothing. */
struct mul_ahead { const uint8_t *at; size_t row_bytes, row_stride; int rows; };
#define MUL_RUN_ARGS(T)                                                                            \
    struct mul {                                                                                   \
        const T *lhs; size_t lhs_row, lhs_block;                                                   \
        const T *rhs; size_t rhs_panel, rhs_block;                                                 \
        float *acc; size_t acc_row, acc_panel;                                                     \
        int rows, panels, blocks;                                                                  \
        struct mul_ahead ahead;                                                                    \
    }

#if defined(QERL_MUL_AMX)
#include "kernels/amx/mul_amx.h"
#elif defined(QERL_MUL_BF16)
#include "kernels/simd/mul_bf16.h"
#else
#include "kernels/simd/mul_f32.h"
#endif

/* The path that takes the operands a bf16 multiplier does not. */
INLINE struct kern mul_wide(void) {
    struct kern wide = { 0 };
    kern_avx512_fill(&wide);
    return wide;
}
#endif
