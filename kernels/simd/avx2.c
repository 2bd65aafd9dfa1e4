/* avx2.c - the vector text of this folder compiled for AVX2; empty where the compiler has no such
 * machine.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cpu.h"

#if defined(__AVX2__) && defined(__FMA__)
#include "kernels/simd/attn.h"
#include "kernels/simd/gemm.h"
#include "kernels/simd/loss.h"
#include "kernels/simd/perturb.h"
#include "kernels/simd/quant.h"
#include "kernels/simd/rows.h"
#include "kernels/simd/weights.h"

void kern_avx2_fill(struct kern *k) {
#include "kernels/simd/fill.inc"
}
#endif
