/* pack.c - see pack.h. Plain loops: this runs once per weight file or once per adapter version.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/pack.h"

const float pack_e2m1[16] = { 0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                              -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f };

size_t kern_record_bytes(enum kern_format format) {
    switch (format) {
    case KERN_FORMAT_F32: return (size_t)KERN_IN_BLOCK * KERN_OUT_BLOCK * 4;
    case KERN_FORMAT_BF16: return (size_t)KERN_IN_BLOCK * KERN_OUT_BLOCK * 2;
    case KERN_FORMAT_MXFP4: return sizeof(struct pack_mxfp4);
    case KERN_FORMAT_NVFP4: return sizeof(struct pack_nvfp4);
    }
    assert(!"a weight format");
    return 0;
}

static size_t panels(int out) { return ((size_t)out + KERN_OUT_BLOCK - 1) / KERN_OUT_BLOCK; }
static size_t records(int in) { return ((size_t)in + KERN_IN_BLOCK - 1) / KERN_IN_BLOCK; }

size_t kern_weight_bytes(enum kern_format format, int out, int in) {
    return panels(out) * records(in) * kern_record_bytes(format);
}

/* Address of element (k, lane) of the f32 or bf16 record that holds output o, input i. */
static size_t element(int in, int o, int i) {
    size_t record = (size_t)(o / KERN_OUT_BLOCK) * records(in) + (size_t)(i / KERN_IN_BLOCK);
    return (record * KERN_IN_BLOCK + (size_t)(i % KERN_IN_BLOCK)) * KERN_OUT_BLOCK +
           (size_t)(o % KERN_OUT_BLOCK);
}

void pack_f32(void *to, enum kern_format format, const float *values, int out, int in) {
    assert(format == KERN_FORMAT_F32 || format == KERN_FORMAT_BF16);
    memset(to, 0, kern_weight_bytes(format, out, in));
    for (int o = 0; o < out; o++)
        for (int i = 0; i < in; i++) {
            float v = values[(size_t)o * (size_t)in + (size_t)i];
            if (format == KERN_FORMAT_F32) ((float *)to)[element(in, o, i)] = v;
            else ((uint16_t *)to)[element(in, o, i)] = f32_to_bf16(v);
        }
}

void pack_bf16(void *to, const uint16_t *values, int out, int in) {
    memset(to, 0, kern_weight_bytes(KERN_FORMAT_BF16, out, in));
    for (int o = 0; o < out; o++)
        for (int i = 0; i < in; i++)
            ((uint16_t *)to)[element(in, o, i)] = values[(size_t)o * (size_t)in + (size_t)i];
}

void pack_codes(void *to, enum kern_format format, const uint8_t *codes, const uint8_t *scales,
                int out, int in) {
    assert(format == KERN_FORMAT_MXFP4 || format == KERN_FORMAT_NVFP4);
    bool mx = format == KERN_FORMAT_MXFP4;
    int group = mx ? 32 : 16, groups = (in + group - 1) / group;
    size_t bytes = kern_record_bytes(format);
    memset(to, 0, kern_weight_bytes(format, out, in));
    for (int o = 0; o < out; o++) {
        uint8_t *panel = (uint8_t *)to + (size_t)(o / KERN_OUT_BLOCK) * records(in) * bytes;
        int lane = o % KERN_OUT_BLOCK;
        for (int i = 0; i < in; i++) {
            uint8_t *q = panel + (size_t)(i / KERN_IN_BLOCK) * bytes + (i % KERN_IN_BLOCK) * 8 +
                         lane / 2;
            int code = codes[(size_t)o * (size_t)in + (size_t)i] & 15;
            *q = (uint8_t)(*q | code << (lane & 1 ? 4 : 0));
        }
        for (int g = 0; g < groups; g++) { /* both kinds keep their scales after 256 bytes */
            uint8_t *record = panel + (size_t)(mx ? g : g / 2) * bytes;
            record[256 + (mx ? 0 : g % 2 * 16) + lane] =
                scales[(size_t)o * (size_t)groups + (size_t)g];
        }
    }
}

float pack_get(const void *from, enum kern_format format, int out, int in, int o, int i) {
    assert(o >= 0 && o < out && i >= 0 && i < in);
    (void)out;
    size_t at = element(in, o, i);
    if (format == KERN_FORMAT_F32) return ((const float *)from)[at];
    if (format == KERN_FORMAT_BF16) return bf16_to_f32(((const uint16_t *)from)[at]);
    const uint8_t *record = (const uint8_t *)from + at / 512 * kern_record_bytes(format);
    int k = i % KERN_IN_BLOCK, lane = o % KERN_OUT_BLOCK;
    float v = pack_e2m1[record[k * 8 + lane / 2] >> (lane & 1 ? 4 : 0) & 15];
    if (format == KERN_FORMAT_MXFP4) return v * pack_e8m0(record[256 + lane]);
    return v * pack_e4m3(record[256 + k / 16 * 16 + lane]);
}
