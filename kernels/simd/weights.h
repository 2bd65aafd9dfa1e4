/* weights.h - AQN's noise on packed weights, a panel at a time: the sixteen lanes are its rows, so
 * four inputs are one counter a row, records are read and written as they lie, and each row's sums
 * keep their order.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_SIMD_WEIGHTS_H
#define QERL_SIMD_WEIGHTS_H
#include "kernels/simd/normal.h"

/* Sixteen outputs at input k of a record, with the tensor scale. */
INLINE vf record_values(const uint8_t *record, const struct kern_weight *w, int k) {
    const uint8_t *scale = record + KERN_IN_BLOCK * KERN_OUT_BLOCK / 2;
    const vf by = v_set(w->scale);
    if (w->format == KERN_FORMAT_F32) return v_mul(by, v_load((const float *)record + k * 16));
    if (w->format == KERN_FORMAT_BF16)
        return v_mul(by, v_load_h((const uint16_t *)record + k * 16));
    const vf code = v_e2m1(record + k * 8, v_e2m1_table());
    return v_mul(by, v_mul(code, w->format == KERN_FORMAT_MXFP4 ? v_e8m0(scale)
                                                                : v_e4m3(scale + k / 16 * 16)));
}

/* What is measured of a panel. */
struct weight_sums {
    vd square[KERN_WEIGHT_SQUARES][16 / WIDE];
    int64_t count[KERN_WEIGHT_COUNTS];
};

INLINE void weight_measure(struct weight_sums *s, vf w, vf dw, double times) {
    float x[2][16];
    const vf noisy = v_add(w, dw);
    v_store(x[0], dw);
    v_store(x[1], w);
    s->count[KERN_WEIGHT_CHANGED] += m_count(v_differ(noisy, w));
    s->count[KERN_WEIGHT_CHANGED_BF16] += m_count(v_differ_bf16(noisy, w));
    for (int i = 0; i < 16 / WIDE; i++) {
        const vd d = d_of_floats(x[0] + i * WIDE), value = d_of_floats(x[1] + i * WIDE);
        s->square[KERN_WEIGHT_NOISE][i] += d * d;
        s->square[KERN_WEIGHT_VALUE][i] += value * value;
        if (times == 1.0) continue;
        const vd scaled = d / times;
        s->square[KERN_WEIGHT_SCALED][i] += scaled * scaled;
    }
}

/* Four inputs from i on, whose counters are `place`. */
INLINE void weight_four(const struct kern_weight_noise *a, const struct draw_key *key,
                        struct weight_sums *s, const uint8_t *record, size_t to, vu place, int k,
                        int lanes) {
    float z[4][16];
    vu word[4];
    draw_words(word, key, place, i_set(a->tensor), i_set(0), i_set(0));
    normal2(z[0], z[1], word[0], word[1], a->sd);
    normal2(z[2], z[3], word[2], word[3], a->sd);
    for (int j = 0; j < 4; j++) {
        const vf dw = v_pick(v_round(v_load(z[j])), v_zero(), lanes);
        weight_measure(s, record_values(record, &a->w, k + j), dw, a->times);
        v_put_n(a->to.data.p, a->to.format == KERN_FORMAT_F32 ? KERN_F32 : KERN_BF16,
                to + (size_t)(k + j) * KERN_OUT_BLOCK, dw, 16);
    }
}

/* What is left of the panel's last record. */
static void weight_pad(const struct kern_weight_noise *a, size_t to, int k) {
    const enum kern_type type = a->to.format == KERN_FORMAT_F32 ? KERN_F32 : KERN_BF16;
    for (; k < KERN_IN_BLOCK; k++)
        v_put_n(a->to.data.p, type, to + (size_t)k * KERN_OUT_BLOCK, v_zero(), 16);
}

static void weight_keep(const struct kern_weight_noise *a, const struct weight_sums *s, int first,
                        int lanes) {
    double *to = (double *)a->squares.p + (size_t)first * KERN_WEIGHT_SQUARES;
    for (int lane = 0; lane < lanes; lane++)
        for (int i = 0; i < KERN_WEIGHT_SQUARES; i++) {
            const int from = i == KERN_WEIGHT_SCALED && a->times == 1.0 ? KERN_WEIGHT_NOISE : i;
            to[lane * KERN_WEIGHT_SQUARES + i] = s->square[from][lane / WIDE][lane % WIDE];
        }
}

static void weight_panel(const struct kern_weight_noise *a, const struct draw_key *key, int panel,
                         int64_t count[KERN_WEIGHT_COUNTS]) {
    const int first = panel * KERN_OUT_BLOCK, in = a->w.in, lanes = v_left(first, a->w.out),
              blocks = (in + KERN_IN_BLOCK - 1) / KERN_IN_BLOCK;
    const size_t bytes = kern_record_bytes(a->w.format), at = (size_t)panel * (size_t)blocks;
    struct weight_sums s;
    uint32_t quad[16];
    memset(&s, 0, sizeof s);
    for (int i = 0; i < 16; i++) quad[i] = (uint32_t)((size_t)(first + i) * (size_t)in / 4);
    for (int b = 0; b < blocks; b++) {
        const uint8_t *record = (const uint8_t *)a->w.data.p + (at + (size_t)b) * bytes;
        const size_t to = (at + (size_t)b) * KERN_IN_BLOCK * KERN_OUT_BLOCK;
        int k = 0;
        for (; k < KERN_IN_BLOCK && b * KERN_IN_BLOCK + k < in; k += 4) {
            weight_four(a, key, &s, record, to, i_load(quad), k, lanes);
            for (int i = 0; i < 16; i++) quad[i]++;
        }
        weight_pad(a, to, k);
    }
    weight_keep(a, &s, first, lanes);
    for (int i = 0; i < KERN_WEIGHT_COUNTS; i++) count[i] += s.count[i];
}

static void weight_noise_part(void *arg, int part, int parts) {
    const struct kern_weight_noise *a = arg;
    const struct draw_key key = draw_key(a->key);
    int64_t count[KERN_WEIGHT_COUNTS] = { 0 };
    for (int p = part; p * KERN_OUT_BLOCK < a->w.out; p += parts) weight_panel(a, &key, p, count);
    cpu_weight_take(a, count);
}

static void simd_weight_noise(struct kern *k, const struct kern_weight_noise *a) {
    assert(a->to.format == KERN_FORMAT_F32 || a->to.format == KERN_FORMAT_BF16);
    assert(a->to.out == a->w.out && a->to.in == a->w.in);
    if (a->w.in % 4) ref_weight_noise(k, a);         /* its rows do not begin with a counter */
    else cpu_run(k, cpu_threads(k), weight_noise_part, (void *)(uintptr_t)a);
}
#endif
