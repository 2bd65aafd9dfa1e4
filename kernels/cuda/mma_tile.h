/* mma_tile.h - what the products on tensor cores share: operands as lines of eight k, the packed
 * records among them, and a warp's tile of 32 by 64 outputs.
 *
 * Order of a sum: chunks of MMA_CHUNK k, each from +0 through mma_block over its k ascending; the
 * chunks are added up ascending in f32. It does not depend on how many rows there are, nor on how
 * chunks are spread over warps. An adapter's share is one chunk, however long.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_CUDA_MMA_TILE_H
#define QERL_CUDA_MMA_TILE_H
#include "kernels/cuda/mma.h"
#include "kernels/cuda/records.h"

enum { MMA_CHUNK = 128, MMA_CHUNK_BLOCKS = MMA_CHUNK / MMA_K, MMA_LINES = MMA_CHUNK / MMA_LANE_K };
/* A thread block: four warps, each with MMA_PARTS parts of 16 rows of A, share 64 columns. Two of
 * them fill an SM's registers. */
enum { MMA_THREADS = 128, MMA_WARPS = MMA_THREADS / 32, MMA_PARTS = 2, MMA_TILES = 8,
       MMA_OF_SM = 2 };
enum { MMA_COLUMNS = MMA_TILES * MMA_N, MMA_DEEP = MMA_WARPS * MMA_PARTS };

/* ---- lines ---- */

__device__ static inline bool line_aligned(const void *p, int ld, size_t element) {
    return ((uintptr_t)p | (size_t)ld * element) % sizeof(struct mma_line) == 0;
}
__device__ static inline uint32_t bf16_pair(uint16_t low, uint16_t high) {
    return low | (uint32_t)high << 16;
}
/* Eight k of a row from k on, zeros from `end` on. */
__device__ static inline struct mma_line line_bf16(const uint16_t *row, int k, int end,
                                                   bool aligned) {
    struct mma_line v = { };
    if (aligned && k + MMA_LANE_K <= end) {
        v = *(const struct mma_line *)(row + k);
    } else {
#pragma unroll
        for (int j = 0; j < MMA_LANE_K; j++)
            if (k + j < end) v.pair[j / 2] |= (uint32_t)row[k + j] << j % 2 * 16;
    }
    return v;
}
/* The same of f32, rounded. */
__device__ static inline struct mma_line line_f32(const float *row, int k, int end, bool aligned) {
    struct mma_line v;
    float4 x = { }, y = { };
    if (aligned && k + MMA_LANE_K <= end) {
        x = *(const float4 *)(row + k);
        y = *(const float4 *)(row + k + 4);
    } else {
        float *at[MMA_LANE_K] = { &x.x, &x.y, &x.z, &x.w, &y.x, &y.y, &y.z, &y.w };
#pragma unroll
        for (int j = 0; j < MMA_LANE_K; j++)
            if (k + j < end) *at[j] = row[k + j];
    }
    v.pair[0] = bf16_pair(f32_to_bf16(x.x), f32_to_bf16(x.y));
    v.pair[1] = bf16_pair(f32_to_bf16(x.z), f32_to_bf16(x.w));
    v.pair[2] = bf16_pair(f32_to_bf16(y.x), f32_to_bf16(y.y));
    v.pair[3] = bf16_pair(f32_to_bf16(y.z), f32_to_bf16(y.w));
    return v;
}

/* A record's outputs 2g (low) and 2g + 1 (high) at the lane's k of its 32 inputs. */
template <enum kern_format FORMAT>
__device__ static inline void line_outputs(struct mma_line *low, struct mma_line *high,
                                           const uint8_t *record, int lane) {
    const int g = lane / 4, k = lane % 4 * MMA_LANE_K, step = KERN_OUT_BLOCK / 2;
    if constexpr (FORMAT == KERN_FORMAT_BF16) {
        const uint32_t *both = (const uint32_t *)record + k * step + g;
#pragma unroll
        for (int j = 0; j < MMA_LANE_K; j += 2) {
            const uint32_t x = both[j * step], y = both[(j + 1) * step];
            low->pair[j / 2] = __byte_perm(x, y, 0x5410);
            high->pair[j / 2] = __byte_perm(x, y, 0x7632);
        }
    } else {
        const uint8_t *code = record + k * step + g, *scale = record + RECORD_CODES + 2 * g;
        if (FORMAT == KERN_FORMAT_NVFP4) scale += k / 16 * KERN_OUT_BLOCK;
        const uint32_t even = bf16_scale(FORMAT, scale[0]) * 0x10001u,
                       odd = bf16_scale(FORMAT, scale[1]) * 0x10001u;
#pragma unroll
        for (int j = 0; j < MMA_LANE_K; j += 2) {
            const uint32_t w = code[j * step] | (uint32_t)code[(j + 1) * step] << 16;
            low->pair[j / 2] = bf16x2_mul(e2m1x2(w), even);
            high->pair[j / 2] = bf16x2_mul(e2m1x2(w >> 4), odd);
        }
    }
}
/* Inputs i (low) and i + 8 (high), of one 16, at eight outputs from `first` on. */
template <enum kern_format FORMAT>
__device__ static inline void line_inputs(struct mma_line *low, struct mma_line *high,
                                          const uint8_t *record, int i, int first) {
    const int at = i * KERN_OUT_BLOCK + first, more = 8 * KERN_OUT_BLOCK;
    if constexpr (FORMAT == KERN_FORMAT_BF16) {
        *low = *(const struct mma_line *)((const uint16_t *)record + at);
        *high = *(const struct mma_line *)((const uint16_t *)record + at + more);
    } else {
        const uint8_t *scale = record + RECORD_CODES + first;
        if (FORMAT == KERN_FORMAT_NVFP4) scale += i / 16 * KERN_OUT_BLOCK;
        const uint32_t x = *(const uint32_t *)(record + at / 2),
                       y = *(const uint32_t *)(record + (at + more) / 2);
#pragma unroll
        for (int j = 0; j < MMA_LANE_K; j += 2) {
            const uint32_t even = bf16_scale(FORMAT, scale[j]),
                           s = even | bf16_scale(FORMAT, scale[j + 1]) << 16,
                           v = x >> 4 * j & 255, w = y >> 4 * j & 255;
            low->pair[j / 2] = bf16x2_mul(e2m1x2(v | v << 12), s);
            high->pair[j / 2] = bf16x2_mul(e2m1x2(w | w << 12), s);
        }
    }
}

/* ---- a chunk of one operand in shared memory ---- */

/* The slack keeps neighbouring rows out of each other's banks. */
struct mma_stage { struct mma_line row[MMA_COLUMNS][MMA_LINES + 1]; };

__device__ static inline struct mma_line stage_line(const struct mma_stage *s, int row, int block,
                                                    int lane) {
    return s->row[row][block * (MMA_K / MMA_LANE_K) + lane % 4];
}
/* Fills rows and k from line(row, k of the chunk). */
template <class LINE> __device__ static inline void stage_fill(struct mma_stage *s, LINE line) {
    for (int e = (int)threadIdx.x; e < MMA_COLUMNS * MMA_LINES; e += MMA_THREADS)
        s->row[e / MMA_LINES][e % MMA_LINES] = line(e / MMA_LINES, e % MMA_LINES * MMA_LANE_K);
}

/* c += this warp's rows of A times the staged columns, over the chunk's blocks below `blocks`.
 * load(part, block, low, high) gives A; the first `tiles` tiles of columns count. */
template <class LOAD>
__device__ static __forceinline__ void tile_blocks(float c[MMA_PARTS][MMA_TILES][4],
                                                   const struct mma_stage *s, int blocks,
                                                   int tiles, LOAD load) {
    const int lane = (int)threadIdx.x % 32;
#pragma unroll 1
    for (int block = 0; block < blocks; block++) {
        struct mma_line low[MMA_PARTS], high[MMA_PARTS];
#pragma unroll
        for (int p = 0; p < MMA_PARTS; p++) load(p, block, &low[p], &high[p]);
#pragma unroll
        for (int n = 0; n < MMA_TILES; n++) {
            if (n >= tiles) break;
            const struct mma_line b = stage_line(s, n * MMA_N + lane / 4, block, lane);
#pragma unroll
            for (int p = 0; p < MMA_PARTS; p++) mma_block(c[p][n], low[p], high[p], b);
        }
    }
}
__device__ static __forceinline__ void tile_add(float sum[MMA_PARTS][MMA_TILES][4],
                                                const float c[MMA_PARTS][MMA_TILES][4]) {
#pragma unroll
    for (int e = 0; e < MMA_PARTS * MMA_TILES * 4; e++)
        sum[e / 32][e / 4 % 8][e % 4] += c[e / 32][e / 4 % 8][e % 4];
}
static_assert(MMA_TILES == 8, "tile_add counts in eights");
#endif
