/* records.h - packed weights as device code reads them: what kernels/pack.h lays out, as floats.
 *
 * Knows: the four record formats. Values are without the tensor scale and have pack_get's bits.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_CUDA_RECORDS_H
#define QERL_CUDA_RECORDS_H
#include "kernels/cuda/device.h"

enum { RECORD_CODES = KERN_IN_BLOCK * KERN_OUT_BLOCK / 2 };    /* scales follow these bytes */

__host__ __device__ static inline int record_panels(const struct kern_weight *w) {
    return (w->out + KERN_OUT_BLOCK - 1) / KERN_OUT_BLOCK;
}
__host__ __device__ static inline int record_blocks(const struct kern_weight *w) {
    return (w->in + KERN_IN_BLOCK - 1) / KERN_IN_BLOCK;
}
__device__ static inline size_t record_bytes(enum kern_format format) {
    const size_t values = KERN_IN_BLOCK * KERN_OUT_BLOCK;
    return format == KERN_FORMAT_F32     ? values * 4
           : format == KERN_FORMAT_BF16  ? values * 2
           : format == KERN_FORMAT_MXFP4 ? sizeof(struct pack_mxfp4)
                                         : sizeof(struct pack_nvfp4);
}
__device__ static inline const uint8_t *record_of(const struct kern_weight *w, int panel,
                                                  int block) {
    return (const uint8_t *)w->data.p +
           ((size_t)panel * (size_t)record_blocks(w) + (size_t)block) * record_bytes(w->format);
}

/* What the codes of output `lane` at input k of a 4-bit record are multiplied by. */
__device__ static inline float record_scale(const uint8_t *record, enum kern_format format, int k,
                                            int lane) {
    const uint8_t *scale = record + RECORD_CODES;
    return format == KERN_FORMAT_MXFP4 ? pack_e8m0(scale[lane])
                                       : pack_e4m3(scale[k / 16 * KERN_OUT_BLOCK + lane]);
}

__device__ static inline float record_get(const struct kern_weight *w, int o, int i) {
    const uint8_t *record = record_of(w, o / KERN_OUT_BLOCK, i / KERN_IN_BLOCK);
    const int k = i % KERN_IN_BLOCK, lane = o % KERN_OUT_BLOCK, at = k * KERN_OUT_BLOCK + lane;
    if (w->format == KERN_FORMAT_F32) return ((const float *)record)[at];
    if (w->format == KERN_FORMAT_BF16) return bf16_to_f32(((const uint16_t *)record)[at]);
    return pack_e2m1_of((uint8_t)(record[at / 2] >> at % 2 * 4)) *
           record_scale(record, w->format, k, lane);
}

/* What outputs first .. first + N - 1 are multiplied by at input k; 16 inputs share it, and all 32
 * of an MXFP4 record. N is 4 or 8 and divides `first`. Formats without scales leave s alone. */
template <int N>
__device__ static inline void record_scales(float s[N], const uint8_t *record,
                                            enum kern_format format, int k, int first) {
    if (format == KERN_FORMAT_F32 || format == KERN_FORMAT_BF16) return;
    for (int j = 0; j < N; j++) s[j] = record_scale(record, format, k, first + j);
}
/* These N values. */
template <int N>
__device__ static inline void record_values(float to[N], const uint8_t *record,
                                            enum kern_format format, int k, int first,
                                            const float s[N]) {
    const int at = k * KERN_OUT_BLOCK + first;
    if (format == KERN_FORMAT_F32) {
        for (int j = 0; j < N; j += 4) {
            const float4 v = *(const float4 *)((const float *)record + at + j);
            to[j] = v.x, to[j + 1] = v.y, to[j + 2] = v.z, to[j + 3] = v.w;
        }
    } else if (format == KERN_FORMAT_BF16) {
        for (int j = 0; j < N; j += 4) {
            const uint2 v = *(const uint2 *)((const uint16_t *)record + at + j);
            to[j] = kern_float(v.x << 16), to[j + 1] = kern_float(v.x & 0xffff0000u);
            to[j + 2] = kern_float(v.y << 16), to[j + 3] = kern_float(v.y & 0xffff0000u);
        }
    } else {
        const uint8_t *code = record + at / 2;
        const uint32_t codes = N == 8 ? *(const uint32_t *)code : *(const uint16_t *)code;
        for (int j = 0; j < N; j++) to[j] = pack_e2m1_of((uint8_t)(codes >> 4 * j)) * s[j];
    }
}
#endif
