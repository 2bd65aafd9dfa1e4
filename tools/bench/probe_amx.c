/* probe_amx.c - see probe.h: tiles, in assembly of our own, because gcc 12 passes only a part of
 * the configuration to _tile_loadconfig.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tools/bench/probe.h"

#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>

enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_TILE_DATA = 18, TILE_BYTES = 1024 };

struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
_Static_assert(sizeof(struct tile_config) == 64, "the tile configuration is 64 bytes");

bool probe_amx_allow(void) {
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_TILE_DATA) == 0;
}

void probe_amx_begin(void) {
    struct tile_config c = { .palette = 1 };
    for (int i = 0; i < 8; i++) c.row_bytes[i] = 64, c.rows[i] = 16;
    __asm__ volatile("ldtilecfg %0\n\t"
                     "tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3\n\t"
                     "tilezero %%tmm4\n\ttilezero %%tmm5\n\ttilezero %%tmm6\n\ttilezero %%tmm7"
                     : : "m"(c));
}

void probe_amx_end(void) { __asm__ volatile("tilerelease"); }

#define MULTIPLY                                                                                   \
    "tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n\ttdpbf16ps %%tmm7, %%tmm4, %%tmm1\n\t"                     \
    "tdpbf16ps %%tmm6, %%tmm5, %%tmm2\n\ttdpbf16ps %%tmm7, %%tmm5, %%tmm3"

/* Two tiles of pairs (1, -1), then two of ones: never zeros, and every dot product is 0. */
static void fill(uint16_t *tile) {
    for (int i = 0; i < 4 * TILE_BYTES / 2; i++)
        tile[i] = i < TILE_BYTES && i % 2 ? 0xbf80 : 0x3f80;
}
static void load(const uint16_t *tile) {
    const char *p = (const char *)tile;
    __asm__ volatile("tileloadd (%0,%4,1), %%tmm4\n\ttileloadd (%1,%4,1), %%tmm5\n\t"
                     "tileloadd (%2,%4,1), %%tmm6\n\ttileloadd (%3,%4,1), %%tmm7"
                     : : "r"(p), "r"(p + TILE_BYTES), "r"(p + 2 * TILE_BYTES),
                         "r"(p + 3 * TILE_BYTES), "r"((long)64) : "memory");
}

void probe_amx_registers(long turns) {
    static _Thread_local _Alignas(64) uint16_t tile[4 * TILE_BYTES / 2];
    fill(tile);
    load(tile);
    for (long t = 0; t < turns; t++) __asm__ volatile(MULTIPLY : : : "memory");
}

void probe_amx_l1(long turns) {
    static _Thread_local _Alignas(64) uint16_t tile[4][4 * TILE_BYTES / 2];
    for (int i = 0; i < 4; i++) fill(tile[i]);
    for (long t = 0; t < turns; t++) {
        load(tile[t % 4]);
        __asm__ volatile(MULTIPLY : : : "memory");
    }
}
#else
bool probe_amx_allow(void) { return false; }
void probe_amx_begin(void) {}
void probe_amx_end(void) {}
void probe_amx_registers(long turns) { (void)turns; }
void probe_amx_l1(long turns) { (void)turns; }
#endif
