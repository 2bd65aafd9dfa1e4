/* dequant.c - GGUF's block formats to floats, one function a format (formulas: ggml-quants.c,
 * dequantize_row_*).
 *
 * Multiplications and additions in ggml's order, in f32, never fused: the values are the very bits
 * that ggml's own CPU code and PyPI's gguf give. Q4_K, Q5_K, Q6_K are superblocks of 256 with
 * packed 6-bit (8-bit) scales.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/pack.h"
#include "lib/model/gguf.h"
#include "lib/model/half.h"

static const struct { const char *name; int elements, bytes;
} TYPE[GGUF_TYPE_COUNT] = {
    [GGUF_TYPE_F32] = { "F32", 1, 4 },
    [GGUF_TYPE_F16] = { "F16", 1, 2 },
    [GGUF_TYPE_BF16] = { "BF16", 1, 2 },
    [GGUF_TYPE_Q4_0] = { "Q4_0", 32, 18 },
    [GGUF_TYPE_Q4_1] = { "Q4_1", 32, 20 },
    [GGUF_TYPE_Q5_0] = { "Q5_0", 32, 22 },
    [GGUF_TYPE_Q5_1] = { "Q5_1", 32, 24 },
    [GGUF_TYPE_Q8_0] = { "Q8_0", 32, 34 },
    [GGUF_TYPE_Q4_K] = { "Q4_K", 256, 144 },
    [GGUF_TYPE_Q5_K] = { "Q5_K", 256, 176 },
    [GGUF_TYPE_Q6_K] = { "Q6_K", 256, 210 },
    [GGUF_TYPE_MXFP4] = { "MXFP4", 32, 17 },
    /* known by name only, so that a refusal can say what it met */
    [9] = { "Q8_1", 0, 0 },
    [10] = { "Q2_K", 0, 0 },
    [11] = { "Q3_K", 0, 0 },
    [15] = { "Q8_K", 0, 0 },
    [16] = { "IQ2_XXS", 0, 0 },
    [17] = { "IQ2_XS", 0, 0 },
    [18] = { "IQ3_XXS", 0, 0 },
    [19] = { "IQ1_S", 0, 0 },
    [20] = { "IQ4_NL", 0, 0 },
    [21] = { "IQ3_S", 0, 0 },
    [22] = { "IQ2_S", 0, 0 },
    [23] = { "IQ4_XS", 0, 0 },
    [24] = { "I8", 0, 0 },
    [25] = { "I16", 0, 0 },
    [26] = { "I32", 0, 0 },
    [27] = { "I64", 0, 0 },
    [28] = { "F64", 0, 0 },
    [29] = { "IQ1_M", 0, 0 },
    [34] = { "TQ1_0", 0, 0 },
    [35] = { "TQ2_0", 0, 0 },
};

const char *gguf_type_name(int type) {
    return type >= 0 && type < GGUF_TYPE_COUNT ? TYPE[type].name : NULL;
}

void gguf_type_block(enum gguf_type type, int *elements, int *bytes) {
    *elements = TYPE[type].elements;
    *bytes = TYPE[type].bytes;
}

static uint16_t u16_at(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }
static uint32_t u32_at(const uint8_t *p) {
    return (uint32_t)u16_at(p) | (uint32_t)u16_at(p + 2) << 16;
}
static float half_at(const uint8_t *p) { return f16_to_f32(u16_at(p)); }

static void q4_0(const uint8_t *b, float *y) {
    float d = half_at(b);
    for (int j = 0; j < 16; j++) {
        y[j] = (float)((b[2 + j] & 15) - 8) * d;
        y[j + 16] = (float)((b[2 + j] >> 4) - 8) * d;
    }
}

static void q4_1(const uint8_t *b, float *y) {
    float d = half_at(b), m = half_at(b + 2);
    for (int j = 0; j < 16; j++) {
        y[j] = (float)(b[4 + j] & 15) * d + m;
        y[j + 16] = (float)(b[4 + j] >> 4) * d + m;
    }
}

static void q5_0(const uint8_t *b, float *y) {
    float d = half_at(b);
    uint32_t high = u32_at(b + 2);
    for (int j = 0; j < 16; j++) {
        y[j] = (float)((int)((b[6 + j] & 15) | (high >> j & 1) << 4) - 16) * d;
        y[j + 16] = (float)((int)((uint32_t)(b[6 + j] >> 4) | (high >> (j + 16) & 1) << 4) - 16) *
                    d;
    }
}

static void q5_1(const uint8_t *b, float *y) {
    float d = half_at(b), m = half_at(b + 2);
    uint32_t high = u32_at(b + 4);
    for (int j = 0; j < 16; j++) {
        y[j] = (float)((b[8 + j] & 15) | (high >> j & 1) << 4) * d + m;
        y[j + 16] = (float)((uint32_t)(b[8 + j] >> 4) | (high >> (j + 16) & 1) << 4) * d + m;
    }
}

static void q8_0(const uint8_t *b, float *y) {
    float d = half_at(b);
    for (int j = 0; j < 32; j++) y[j] = (float)(int8_t)b[2 + j] * d;
}

/* Scale and minimum j of eight, 6 bits each in 12 bytes. */
static void k_scale(const uint8_t *s, int j, float *scale, float *minimum) {
    int a = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
    int m = j < 4 ? s[j + 4] & 63 : s[j + 4] >> 4 | (s[j] >> 6) << 4;
    *scale = (float)a;
    *minimum = (float)m;
}

/* Q4_K and, with the fifth bits in qh, Q5_K. */
static void q45_k(const uint8_t *b, const uint8_t *qh, const uint8_t *q, float *y) {
    float d = half_at(b), dmin = half_at(b + 2), scale, minimum;
    for (int j = 0; j < 8; j++) {
        k_scale(b + 4, j, &scale, &minimum);
        float d1 = d * scale, m1 = dmin * minimum;
        for (int l = 0; l < 32; l++) {
            int v = q[32 * (j / 2) + l] >> (j & 1 ? 4 : 0) & 15;
            if (qh) v |= (qh[l] >> j & 1) << 4;
            y[32 * j + l] = d1 * (float)v - m1;
        }
    }
}

static void q6_k(const uint8_t *b, float *y) {
    const uint8_t *ql = b, *qh = b + 128, *sc = b + 192;
    float d = half_at(b + 208);
    for (int i = 0; i < 256; i++) {
        int half = i / 128, quarter = i % 128 / 32, l = i % 32;
        int low = ql[64 * half + 32 * (quarter & 1) + l] >> (quarter & 2 ? 4 : 0) & 15;
        int v = (low | (qh[32 * half + l] >> 2 * quarter & 3) << 4) - 32;
        y[i] = d * (float)(int8_t)sc[i / 16] * (float)v;
    }
}

static void mxfp4(const uint8_t *b, float *y) {
    float d = pack_e8m0(b[0]);
    for (int j = 0; j < 16; j++) {
        y[j] = pack_e2m1[b[1 + j] & 15] * d;
        y[j + 16] = pack_e2m1[b[1 + j] >> 4] * d;
    }
}

void gguf_dequant(enum gguf_type type, const uint8_t *b, int64_t n, float *y) {
    int step = TYPE[type].elements, bytes = TYPE[type].bytes;
    assert(step && n % step == 0);
    for (int64_t i = 0; i < n; i += step, b += bytes, y += step)
        switch (type) {
        case GGUF_TYPE_F32: memcpy(y, b, 4); break;
        case GGUF_TYPE_F16: *y = half_at(b); break;
        case GGUF_TYPE_BF16: *y = bf16_to_f32(u16_at(b)); break;
        case GGUF_TYPE_Q4_0: q4_0(b, y); break;
        case GGUF_TYPE_Q4_1: q4_1(b, y); break;
        case GGUF_TYPE_Q5_0: q5_0(b, y); break;
        case GGUF_TYPE_Q5_1: q5_1(b, y); break;
        case GGUF_TYPE_Q8_0: q8_0(b, y); break;
        case GGUF_TYPE_Q4_K: q45_k(b, NULL, b + 16, y); break;
        case GGUF_TYPE_Q5_K: q45_k(b, b + 16, b + 48, y); break;
        case GGUF_TYPE_Q6_K: q6_k(b, y); break;
        case GGUF_TYPE_MXFP4: mxfp4(b, y); break;
        case GGUF_TYPE_COUNT: break;
        }
}
