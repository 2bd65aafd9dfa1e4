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

/* A dozen of an instruction by itself, or in turn with a dozen of another: what shares its pipes
 * takes longer together than the slower of both. Registers and memory hold zeros. */
#define DOT(n, m) "vdpbf16ps %%zmm30, %%zmm31, %%zmm" #n "\n\t"
#define PERMUTE(n, m) "vpermw %%zmm30, %%zmm31, %%zmm" #m "\n\t"
#define STORE(n, m) "vmovdqa64 %%zmm" #m ", 64*" #n "(%[at])\n\t"
#define NONE(n, m)
#define TWO(x, y, n, m) x(n, m) y(n, m)
#define DOZEN(x, y)                                                                                \
    TWO(x, y, 0, 12) TWO(x, y, 1, 13) TWO(x, y, 2, 14) TWO(x, y, 3, 15) TWO(x, y, 4, 16)           \
    TWO(x, y, 5, 17) TWO(x, y, 6, 18) TWO(x, y, 7, 19) TWO(x, y, 8, 20) TWO(x, y, 9, 21)           \
    TWO(x, y, 10, 22) TWO(x, y, 11, 23)
#define MIX(name, x, y)                                                                            \
    void name(long turns) {                                                                        \
        static _Alignas(64) char at[12 * 64];                                                      \
        __asm__ volatile("vpxord %%zmm30, %%zmm30, %%zmm30\n\t"                                    \
                         "vpxord %%zmm31, %%zmm31, %%zmm31\n"                                      \
                         "1:\n\t" DOZEN(x, y) "dec %[left]\n\tjnz 1b"                              \
                         : [left] "+r"(turns)                                                      \
                         : [at] "r"(at)                                                            \
                         : "memory", "cc", "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", \
                           "zmm7", "zmm8", "zmm9", "zmm10", "zmm11", "zmm12", "zmm13", "zmm14",    \
                           "zmm15", "zmm16", "zmm17", "zmm18", "zmm19", "zmm20", "zmm21", "zmm22", \
                           "zmm23", "zmm30", "zmm31");                                             \
    }
MIX(probe_dots, DOT, NONE)
MIX(probe_permutes, PERMUTE, NONE)
MIX(probe_stores, STORE, NONE)
MIX(probe_dots_permutes, DOT, PERMUTE)
MIX(probe_dots_stores, DOT, STORE)
#else
void probe_bf16(long turns) { (void)turns; }
void probe_dots(long turns) { (void)turns; }
void probe_permutes(long turns) { (void)turns; }
void probe_stores(long turns) { (void)turns; }
void probe_dots_permutes(long turns) { (void)turns; }
void probe_dots_stores(long turns) { (void)turns; }
#endif
