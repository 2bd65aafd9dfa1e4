/* avx512bf16.c - AVX-512 with its products on VDPBF16PS; empty where the compiler has no such
 * machine. Operands that are not bf16 go to the path it starts from.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cpu.h"

#if defined(__AVX512BF16__)
#define QERL_MUL_BF16
#include "kernels/simd/attn.h"
#include "kernels/simd/gemm.h"

void kern_avx512bf16_fill(struct kern *k) {
    kern_avx512_fill(k);
    k->linear = simd_linear;
    k->linear_t = simd_linear_t;
    k->outer = simd_outer;
    k->attn = simd_attn;
    k->attn_bwd = simd_attn_bwd;
}
#endif
