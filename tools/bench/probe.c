/* probe.c - what this CPU has, and the probe that needs nothing.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tools/bench/probe.h"

#if defined(__x86_64__)
#include <cpuid.h>

void probe_cycles(long turns) {
    unsigned long x = 1;
    for (long t = 0; t < turns; t++)
        __asm__ volatile(".rept 64\n\tadd $1, %0\n\t.endr" : "+r"(x));
}

/* State components that the system saves. */
static uint64_t saved_state(void) {
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return 0;
    __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (uint64_t)d << 32 | a;
}

struct probe_cpu probe_cpu(void) {
    uint32_t a, b, c, d, a1 = 0, most = 0;
    struct probe_cpu p = { 0 };
    __builtin_cpu_init();
    p.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    p.avx512 = p.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!__get_cpuid_count(7, 0, &most, &b, &c, &d)) return p;
    if (most >= 1) __get_cpuid_count(7, 1, &a1, &b, &c, &a);
    p.bf16 = p.avx512 && a1 >> 5 & 1;
    p.amx = p.avx512 && d >> 24 & 1 && d >> 22 & 1 && (saved_state() >> 17 & 3) == 3;
    return p;
}
#else
void probe_cycles(long turns) {
    volatile unsigned long x = 1;
    for (long t = 0; t < turns * 64; t++) x = x + 1;
}
struct probe_cpu probe_cpu(void) { return (struct probe_cpu){ 0 }; }
#endif
