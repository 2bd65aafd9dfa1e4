/* emulated.c - the path "amx-emulated": amx.c's text with the tile instructions in C.
 *
 * The product is written after the pseudo-code of TDPBF16PS in the instruction set reference: per
 * element two chains of fused multiply-adds from zero, over the even and over the odd k, then
 * sum += even + odd; round to nearest even, subnormals zero on the way in and out.
 * SPDX-License-Identifier: Apache-2.0 */
#define QERL_AMX_EMULATED
#include "kernels/amx/amx.c"

#if defined(__AVX512VBMI__)
void amx_emulated_product(float *c, const uint16_t *a, const uint16_t *b) {
    /* all exceptions masked, to nearest, subnormals flushed: whatever the thread has set */
    enum { MXCSR_OF_TILES = 0x9fc0 };
    vf even_b[16], odd_b[16];
    for (int k = 0; k < 16; k++) {
        const __m512i pair = _mm512_loadu_si512(b + k * 32);
        even_b[k] = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
        odd_b[k] = _mm512_castsi512_ps(
            _mm512_and_si512(pair, _mm512_set1_epi32((int32_t)0xffff0000)));
    }
    const unsigned csr = _mm_getcsr();
    _mm_setcsr(MXCSR_OF_TILES);
    /* the compiler knows nothing of MXCSR, but keeps loads and stores between these two */
    __asm__ volatile("" : : : "memory");
    for (int m = 0; m < AMX_TILE_ROWS; m++) {
        vf even = v_zero(), odd = v_zero();
        for (int k = 0; k < 16; k++) {
            even = v_fma(v_set(bf16_to_f32(a[m * 32 + 2 * k])), even_b[k], even);
            odd = v_fma(v_set(bf16_to_f32(a[m * 32 + 2 * k + 1])), odd_b[k], odd);
        }
        v_store(c + m * 16, v_add(v_load(c + m * 16), v_add(even, odd)));
    }
    __asm__ volatile("" : : : "memory");
    _mm_setcsr(csr);
}
#endif
