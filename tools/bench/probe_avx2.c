/* probe_avx2.c - see probe.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tools/bench/probe.h"

#if defined(__x86_64__)
#include <immintrin.h>

void probe_fma256(long turns) {
    __m256 acc[12];
    const __m256 keep = _mm256_set1_ps(.75f), add = _mm256_set1_ps(.5f);
    for (int i = 0; i < 12; i++) acc[i] = _mm256_set1_ps(1.f + (float)i);
    for (long t = 0; t < turns; t++) {
#pragma GCC unroll 12
        for (int i = 0; i < 12; i++) acc[i] = _mm256_fmadd_ps(acc[i], keep, add);
    }
    for (int i = 1; i < 12; i++) acc[0] = _mm256_add_ps(acc[0], acc[i]);
    __asm__ volatile("" : : "x"(acc[0]));
}

void probe_read256(const void *p, size_t bytes) {
    const __m256i *v = p, *end = v + bytes / sizeof *v;
    __m256i acc[8] = { 0 };
    for (; v < end; v += 16) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) acc[i % 8] = _mm256_xor_si256(acc[i % 8], v[i]);
    }
    for (int i = 1; i < 8; i++) acc[0] = _mm256_xor_si256(acc[0], acc[i]);
    __asm__ volatile("" : : "x"(acc[0]));
}
#else
void probe_fma256(long turns) { (void)turns; }
void probe_read256(const void *p, size_t bytes) { (void)p, (void)bytes; }
#endif
