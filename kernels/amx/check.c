/* check.c - may this process use AMX, and does the instruction do what its description says?
 *
 * Knows: CPUID, XCR0, the kernel's permission for the tiles' state, a known answer. Nothing here is
 * compiled for AVX-512 or AMX: what needs them is called only where the CPU has them.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "kernels/amx/amx.h"

enum {
    XCR0_TILES = 3 << 17,                                    /* TILECFG and TILEDATA */
    REQUEST_PERMISSION = 0x1023, TILEDATA = 18,              /* ARCH_REQ_XCOMP_PERM */
};

bool amx_emulates(void) {
    /* asks CPUID and, for the wide registers, XCR0 */
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vbmi");
}

static bool cpu_has_tiles(void) {
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & XCR0_TILES) != XCR0_TILES) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    return d >> 22 & 1 && d >> 24 & 1;                       /* AMX-BF16, AMX-TILE */
}

/* A bf16 or the upper half of an f32 with an exponent in [least, least + 2^bits); one in eight is
 * zero or subnormal. */
static uint32_t number(uint64_t *seed, uint32_t least, int bits) {
    *seed = *seed * 6364136223846793005u + 1442695040888963407u;
    const uint32_t r = (uint32_t)(*seed >> 32), exponent = least + (r >> 8 & ((1u << bits) - 1));
    const uint32_t tail = (r >> 28 & 1) ? r & 0x7f : 0;
    return (r & 0x8000) | (r >> 29 ? exponent << 7 | (r & 0x7f) : tail);
}

bool amx_agrees(amx_product *product) {
    /* Exponents of factors and of sums: near one, over a wide range (rounding at every step), and
     * such that products and sums are subnormal, vanish, or meet the smallest normal number. */
    static const struct { uint8_t least, bits, sum_least, sum_bits; } kind[] = {
        { 120, 3, 120, 3 }, { 100, 5, 90, 6 }, { 56, 4, 0, 4 }, { 62, 2, 0, 2 },
    };
    enum { ROUNDS = 8 };
    _Alignas(64) float c[256], want[256];
    _Alignas(64) uint16_t a[512], b[512];
    uint64_t seed = 1;
    for (size_t i = 0; i < ROUNDS * COUNT_OF(kind); i++) {
        const int of = (int)(i % COUNT_OF(kind));
        for (int j = 0; j < 512; j++) {
            a[j] = (uint16_t)number(&seed, kind[of].least, kind[of].bits);
            b[j] = (uint16_t)number(&seed, kind[of].least, kind[of].bits);
        }
        for (int j = 0; j < 256; j++) {
            const uint32_t bits = number(&seed, kind[of].sum_least, kind[of].sum_bits) << 16 |
                                  (uint32_t)(seed >> 20 & 0xffff);
            memcpy(&c[j], &bits, sizeof bits);
        }
        memcpy(want, c, sizeof want);
        amx_emulated_product(want, a, b);
        product(c, a, b);
        if (memcmp(c, want, sizeof want)) return false;
    }
    return true;
}

static enum amx_use use;
static pthread_once_t use_once = PTHREAD_ONCE_INIT;

static void use_find(void) {
    if (!amx_emulates() || !cpu_has_tiles()) use = AMX_USE_ABSENT;
    else if (syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILEDATA)) use = AMX_USE_REFUSED;
    else use = amx_agrees(amx_tile_product) ? AMX_USE_READY : AMX_USE_WRONG;
}
enum amx_use amx_use(void) {
    pthread_once(&use_once, use_find);
    return use;
}
#endif
