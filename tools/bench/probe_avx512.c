/* probe_avx512.c - see probe.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tools/bench/probe.h"

#if defined(__x86_64__)
#include <immintrin.h>

void probe_fma512(long turns) {
    __m512 acc[16];
    const __m512 keep = _mm512_set1_ps(.75f), add = _mm512_set1_ps(.5f);
    for (int i = 0; i < 16; i++) acc[i] = _mm512_set1_ps(1.f + (float)i);
    for (long t = 0; t < turns; t++) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) acc[i] = _mm512_fmadd_ps(acc[i], keep, add);
    }
    for (int i = 1; i < 16; i++) acc[0] = _mm512_add_ps(acc[0], acc[i]);
    __asm__ volatile("" : : "v"(acc[0]));
}

void probe_read512(const void *p, size_t bytes) {
    const __m512i *v = p, *end = v + bytes / sizeof *v;
    __m512i acc[8] = { 0 };
    for (; v < end; v += 8) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) acc[i] = _mm512_xor_si512(acc[i], v[i]);
    }
    for (int i = 1; i < 8; i++) acc[0] = _mm512_xor_si512(acc[0], acc[i]);
    __asm__ volatile("" : : "v"(acc[0]));
}
#else
void probe_fma512(long turns) { (void)turns; }
void probe_read512(const void *p, size_t bytes) { (void)p, (void)bytes; }
#endif
