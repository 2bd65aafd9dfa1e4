/* tiles.h - the tile instructions, as inline assembly or, with QERL_AMX_EMULATED, in C.
 *
 * Eight tiles of 16 rows x 64 bytes, all configured alike. TILE_* take tile numbers 0 .. 7 as
 * literals, addresses, and strides in bytes. Tiles belong to a thread between tiles_open and
 * tiles_close; the emulation stops the program when that is not so, where the CPU would.
 * No intrinsics: gcc 12 passes 8 of the 64 bytes of a configuration to ldtilecfg and drops the
 * stores of the others. The assembler needs no flag for these instructions, the compiler never
 * touches tiles.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_AMX_TILES_H
#define QERL_AMX_TILES_H
#include "kernels/amx/amx.h"

/* As ldtilecfg reads it: palette 1; only tiles 0 .. 7 exist, the rest is reserved and zero. */
struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
_Static_assert(sizeof(struct tile_config) == 64, "ldtilecfg reads 64 bytes");
static const _Alignas(64) struct tile_config tile_config = {
    .palette = 1,
    .row_bytes = { 64, 64, 64, 64, 64, 64, 64, 64 },
    .rows = { 16, 16, 16, 16, 16, 16, 16, 16 }
};

#if !defined(QERL_AMX_EMULATED)
static inline void tiles_open(void) {
    __asm__ volatile("ldtilecfg %0" : : "m"(tile_config));
}
static inline void tiles_close(void) { __asm__ volatile("tilerelease" : : : "memory"); }

#define TILE_LOAD(T, from, stride)                                                                 \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #T                                               \
                     : : "r"((const void *)(from)), "r"((size_t)(stride)) : "memory")
#define TILE_STORE(T, to, stride)                                                                  \
    __asm__ volatile("tilestored %%tmm" #T ", (%0,%1,1)"                                           \
                     : : "r"((void *)(to)), "r"((size_t)(stride)) : "memory")
/* The assembler's order: second factor, first factor, sum. */
#define TILE_PRODUCT(C, A, B)                                                                      \
    __asm__ volatile("tdpbf16ps %%tmm" #B ", %%tmm" #A ", %%tmm" #C : : : )
#else
#include <assert.h>
#include <string.h>

union amx_tile { uint8_t bytes[AMX_TILE_BYTES]; uint16_t bf16[512]; float f32[256]; };
static _Thread_local struct { bool open; _Alignas(64) union amx_tile tile[8]; } own_tiles;

static inline void tiles_open(void) {
    memset(own_tiles.tile, 0, sizeof own_tiles.tile);
    own_tiles.open = tile_config.palette == 1;
}
static inline void tiles_close(void) { own_tiles.open = false; }
static inline void tile_load(int t, const void *from, size_t stride) {
    assert(own_tiles.open);
    for (size_t r = 0; r < AMX_TILE_ROWS; r++)
        memcpy(own_tiles.tile[t].bytes + r * 64, (const char *)from + r * stride, 64);
}
static inline void tile_store(int t, void *to, size_t stride) {
    assert(own_tiles.open);
    for (size_t r = 0; r < AMX_TILE_ROWS; r++)
        memcpy((char *)to + r * stride, own_tiles.tile[t].bytes + r * 64, 64);
}
static inline void tile_product(int c, int a, int b) {
    assert(own_tiles.open);
    amx_emulated_product(own_tiles.tile[c].f32, own_tiles.tile[a].bf16, own_tiles.tile[b].bf16);
}
#define TILE_LOAD(T, from, stride) tile_load(T, from, stride)
#define TILE_STORE(T, to, stride)  tile_store(T, to, stride)
#define TILE_PRODUCT(C, A, B)      tile_product(C, A, B)
#endif
#endif
