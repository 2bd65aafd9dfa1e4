/* amx.h - what is known of AMX outside the text that uses it: whether this machine may and whether
 * its tile instruction computes what the other paths compute.
 *
 * Does not know: weights, drivers, paths. x86-64 only.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_AMX_H
#define QERL_AMX_H
#include <stdbool.h>
#include <stdint.h>

enum { AMX_TILE_ROWS = 16, AMX_TILE_BYTES = 1024 };

/* One TDPBF16PS on whole tiles in memory: c [16][16] f32 += a [16][32] bf16 times b [16][32] bf16,
 * b's row k holding column n's elements 2k and 2k+1 at 2n and 2n+1. */
typedef void amx_product(float *c, const uint16_t *a, const uint16_t *b);
/* In C, after the pseudo-code of the instruction set reference. Needs AVX-512. */
void amx_emulated_product(float *c, const uint16_t *a, const uint16_t *b);
/* By the instruction. Needs AMX_USE_READY or, before that is known, the kernel's permission. */
void amx_tile_product(float *c, const uint16_t *a, const uint16_t *b);
/* The same by VDPBF16PS: what the path avx512bf16 multiplies with. */
void avx512bf16_product(float *c, const uint16_t *a, const uint16_t *b);
/* Does `product` give the bits of the emulated one? Random tiles, among them subnormals, zeros of
 * both signs and sums that vanish; a fraction of a millisecond. */
bool amx_agrees(amx_product *product);

enum amx_use {
    AMX_USE_ABSENT,                    /* no AMX-BF16, no AVX-512 VBMI, or not saved by the OS */
    AMX_USE_REFUSED,                   /* the kernel denies this process the tiles' state */
    AMX_USE_WRONG,                     /* the instruction's bits differ from its description */
    AMX_USE_READY
};
/* Asks the CPU, asks the kernel, tries the instruction: once a process. Threads may call it. */
enum amx_use amx_use(void);
/* What amx-emulated needs: AVX-512 F, BW, VL, DQ and VBMI. */
bool amx_emulates(void);
#endif
