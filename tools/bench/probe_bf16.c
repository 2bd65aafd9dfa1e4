/* probe_bf16.c - see probe.h: the dot product of bf16 pairs.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tools/bench/probe.h"

#if defined(__x86_64__)
#include <immintrin.h>

void probe_bf16(long turns) {
    __m512 acc[16];
    /* each pair is (1, 0.5) . (0.5, -1) = 0: sums stay what they were */
    const __m512bh a = (__m512bh)_mm512_set1_epi32(0x3f003f80);
    const __m512bh b = (__m512bh)_mm512_set1_epi32((int)0xbf803f00);
    for (int i = 0; i < 16; i++) acc[i] = _mm512_set1_ps(1.f + (float)i);
    for (long t = 0; t < turns; t++) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) acc[i] = _mm512_dpbf16_ps(acc[i], a, b);
    }
    for (int i = 1; i < 16; i++) acc[0] = _mm512_add_ps(acc[0], acc[i]);
    __asm__ volatile("" : : "v"(acc[0]));
}
#else
void probe_bf16(long turns) { (void)turns; }
#endif
