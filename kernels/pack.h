/* pack.h - the layout of packed weights: one record per 16 outputs x 32 inputs.
 *
 * Record r of panel p covers outputs 16p .. 16p+15 and inputs 32r .. 32r+31; records of a panel
 * follow each other, then the next panel. Within a record, input k is a row of 16 outputs:
 *   F32    2,048 bytes: float    [32][16]
 *   BF16   1,024 bytes: uint16   [32][16]
 *   MXFP4    272 bytes: uint8    [32][8]  low nibble = even output, high = odd; then uint8
 *            scale[16] (E8M0, per output)
 *   NVFP4    288 bytes: as MXFP4, then uint8 scale[2][16] (E4M3; [0] inputs 0-15, [1] inputs 16-31)
 * A nibble is E2M1: sign bit 3, magnitudes 0 .5 1 1.5 2 3 4 6. Padding outputs and inputs are zero.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_PACK_H
#define QERL_PACK_H
#include "kernels/kern.h"

#include <math.h>

struct pack_mxfp4 { uint8_t q[32][8]; uint8_t scale[16]; };
struct pack_nvfp4 { uint8_t q[32][8]; uint8_t scale[2][16]; };
static_assert(sizeof(struct pack_mxfp4) == 272, "an MXFP4 record is 272 bytes");
static_assert(sizeof(struct pack_nvfp4) == 288, "an NVFP4 record is 288 bytes");

KERN_FN float bf16_to_f32(uint16_t h) {
    union { uint32_t u; float f; } v = { (uint32_t)h << 16 };
    return v.f;
}
KERN_FN uint16_t f32_to_bf16(float f) {          /* to nearest even; a NaN stays a NaN */
    union { float f; uint32_t u; } v = { f };
    if ((v.u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((v.u >> 16) | 0x40u);
    return (uint16_t)((v.u + 0x7fffu + ((v.u >> 16) & 1u)) >> 16);
}
extern const float pack_e2m1[16];                      /* value of each nibble */
/* The same without a table, for kernels of a GPU: the nibble's bits where a float keeps them. */
KERN_FN float pack_e2m1_of(uint8_t nibble) {
    union { uint32_t u; float f; } v = { (nibble & 7u) << 22 | (nibble & 8u) << 28 };
    return v.f * 0x1p126f;
}
/* 2^(s-127); 255 is NaN, 0 is the subnormal 2^-127 */
KERN_FN float pack_e8m0(uint8_t s) {
    union {
        uint32_t u;
        float f;
    } v = { s == 0 ? 0x00400000u : s == 255 ? 0x7fc00000u : (uint32_t)s << 23 };
    return v.f;
}
KERN_FN float pack_e4m3(uint8_t s) {
    union { uint32_t u; float f; } v = { (s & 0x7fu) << 20 | (s & 0x80u) << 24 };
    return (s & 0x7f) == 0x7f ? NAN : v.f * 0x1p120f;
}

/* Row-major host data -> records (host memory `to`, kern_weight_bytes long, fully written). */
void pack_f32(void *to, enum kern_format bf16_or_f32, const float *values, int out, int in);
void pack_bf16(void *to, const uint16_t *values, int out, int in);
/* codes: nibble per element, row-major uint8 [out, in]; scales uint8 [out, ceil(in/32)] (MXFP4) or
 * [out, ceil(in/16)]. */
void pack_codes(void *to, enum kern_format mxfp4_or_nvfp4, const uint8_t *codes,
                const uint8_t *scales, int out, int in);
/* One element back as f32, without the tensor scale (slow; tests, inspection). */
float pack_get(const void *records, enum kern_format format, int out, int in, int o, int i);
#endif
