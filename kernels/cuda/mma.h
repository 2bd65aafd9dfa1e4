/* mma.h - the one tensor-core instruction in use, and the bf16 pairs that it reads, each with the
 * same arithmetic in C++ for the emulated device.
 *
 * All products of this folder that run on tensor cores go through mma_block: 16 rows of A times 8
 * columns of B over 32 k, as two instructions of 16 k. Lane l has g = l / 4 and t = l % 4. It hands
 * in the k 8t .. 8t+7 of A's rows g and g + 8 and of B's column g, four words of two bf16 each (the
 * lower k in the lower half): 16 bytes that lie together wherever k is the fast dimension. It gets
 * c[0..3]: rows g, g, g + 8, g + 8 of columns 2t, 2t + 1, 2t, 2t + 1.
 * The first instruction takes each lane's first four k, the second the other four. Emulated, the
 * products, exact in f32, are added one after another onto c, in the order of the instruction's
 * own k. A device may add them in another order and with fewer guard bits, so its bits are its
 * own. What the callers need of a device is that an element of c depends on nothing but its row,
 * its column and its c before.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_CUDA_MMA_H
#define QERL_CUDA_MMA_H
#include "kernels/pack.h"

enum { MMA_M = 16, MMA_N = 8, MMA_K = KERN_IN_BLOCK, MMA_LANE_K = MMA_K / 4 };

/* A lane's eight k of one row or column. */
struct __align__(16) mma_line { uint32_t pair[MMA_LANE_K / 2]; };

#ifdef __CUDACC__
__device__ static inline void mma_16(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
/* Two products of bf16, rounded once; subnormals count. */
__device__ static inline uint32_t bf16x2_mul(uint32_t a, uint32_t b) {
    uint32_t y;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(0x80008000u));
    return y;
}
#else
static inline void mma_16(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    const int g = emu_lane() / 4, t = emu_lane() % 4;
    /* of the four lanes that share g, or have the columns 2t and 2t + 1 */
    uint32_t rows[4][4], columns[2][4][2];
    const unsigned char *all = emu_exchange(0xffffffffu, "mma A", a, 16, __FILE__, __LINE__);
    memcpy(rows, all + g * 4 * 16, sizeof rows);
    all = emu_exchange(0xffffffffu, "mma B", b, 8, __FILE__, __LINE__);
    memcpy(columns, all + t * 2 * 4 * 8, sizeof columns);
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++) {
            const int of = k % 8 / 2, upper = k / 8, shift = k % 2 * 16;
            c[i] += bf16_to_f32((uint16_t)(rows[of][upper * 2 + i / 2] >> shift)) *
                    bf16_to_f32((uint16_t)(columns[i % 2][of][upper] >> shift));
        }
}
static inline uint32_t bf16x2_mul(uint32_t a, uint32_t b) {
    const float low = bf16_to_f32((uint16_t)a) * bf16_to_f32((uint16_t)b),
                high = bf16_to_f32((uint16_t)(a >> 16)) * bf16_to_f32((uint16_t)(b >> 16));
    return f32_to_bf16(low) | (uint32_t)f32_to_bf16(high) << 16;
}
#endif

__device__ static inline void mma_block(float c[4], const struct mma_line &low,
                                        const struct mma_line &high, const struct mma_line &b) {
    for (int step = 0; step < 4; step += 2) {
        const uint32_t a[4] = { low.pair[step], high.pair[step], low.pair[step + 1],
                                high.pair[step + 1] };
        mma_16(c, a, b.pair + step);
    }
}

/* The values of two E2M1 codes, in the low nibbles of w's halves. */
__device__ static inline uint32_t e2m1x2(uint32_t w) {
    /* the nibble's bits where a bf16 keeps them are its value times 2^-126 */
    return bf16x2_mul((w << 6 & 0x01c001c0u) | (w << 12 & 0x80008000u), 0x7e807e80u);
}
/* The scale of a 4-bit record as bf16, which holds it exactly. */
__device__ static inline uint32_t bf16_scale(enum kern_format format, uint8_t s) {
    return f32_to_bf16(format == KERN_FORMAT_MXFP4 ? pack_e8m0(s) : pack_e4m3(s));
}
#endif
