/* noise.h - noise_math.h sixty-four elements at a time: what perturb and attention share.
 *
 * Knows: one kind of noise prepared for a call, how it meets a vector, pages of attention's rows.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_SIMD_NOISE_H
#define QERL_SIMD_NOISE_H
#include "kernels/simd/draw.h"

enum { NOISE_WIDE = 64 };                    /* elements of one draw */

/* One kind of noise in one part of an operation, and what that part measures. */
struct noise {
    const struct kern_noise *n;
    struct draw_key key;
    uint32_t hits;
    int64_t sum[KERN_NOISE_SUMS];
};
INLINE void noise_open(struct noise *s, const struct kern_noise *n) {
    uint32_t key[2];
    kern_noise_key(key, n);
    s->n = n, s->key = draw_key(key), s->hits = kern_noise_hits(n->rate);
    memset(s->sum, 0, sizeof s->sum);
}
INLINE void noise_close(const struct noise *s) { cpu_noise_take(s->n, s->sum); }

/* z of the 64 elements of these counters. `type` is the noise's, known to the compiler where the
 * caller knows it. */
INLINE void noise_draw(vf z[4], const struct noise *s, const enum kern_noise_type type, vu c0,
                       vu c1, vu c2, vu c3) {
    vu w[4];
    for (int i = 0; i < 4; i++) z[i] = v_zero();
    if (!kern_noise_draws(type)) return;
    draw_words(w, &s->key, c0, c1, c2, c3);
    if (type == KERN_NOISE_RELATIVE_UNIFORM)
        for (int i = 0; i < 4; i++) z[i] = draw_uniform(w[i]);
    else if (type == KERN_NOISE_SYSTEMATIC)
        for (int i = 0; i < 4; i++) z[i] = i_sign(w[i]);
    else if (type == KERN_NOISE_SPARSE)
        for (int i = 0; i < 4; i++) z[i] = v_keep(i_hit(w[i], s->hits), i_sign(w[i]));
    else {
        draw_normal2(z, w[0], w[1]);
        draw_normal2(z + 2, w[2], w[3]);
    }
    v_transpose4(z);
}

/* What is measured until a span ends. */
struct noise_lanes { vf r, r2; int elements, measured, coarse, changed, changed_bf16; };
INLINE struct noise_lanes noise_lanes(void) {
    return (struct noise_lanes){ .r = v_zero(), .r2 = v_zero() };
}

/* kern_noise_add on the lanes that count: t + e. */
INLINE vf noise_add(const struct noise *s, const enum kern_noise_type type, const bool bf16, vf t,
                    vf z, vf edge, int lanes, struct noise_lanes *l) {
    const vf one = v_set(1.0f), scale = v_set(s->n->scale);
    const bool flat = type == KERN_NOISE_ABSOLUTE_GAUSSIAN || type == KERN_NOISE_BIAS,
               flush = type == KERN_NOISE_DEADZONE, fp8 = type == KERN_NOISE_FP8;
    if (bf16) t = v_round(t);
    const vf size = v_abs(t), by = flat ? one : type == KERN_NOISE_SYSTEMATIC ? t : size;
    if (bf16) z = v_round(z);
    if (type == KERN_NOISE_BIAS)
        z = v_sub(v_keep(v_less(v_zero(), t), one), v_keep(v_less(t, v_zero()), one));
    if (flush) z = v_keep(v_less(size, edge), v_set(-1.0f));
    const vf least = v_set(KNOISE_FP8_LEAST),
             m = flush ? t : fp8 ? v_max(least, size) : v_mul(by, scale), unit = v_abs(m);
    vf e = v_mul(z, m);
    if (bf16 && !flush) e = v_round(v_mul(v_round(v_mul(z, by)), scale));
    e = v_keep(v_less(unit, v_set(INFINITY)), e);
    vf y = v_add(t, e);
    if (bf16) y = v_round(y);
    if (fp8) y = v_fp8(t);
    if (!s->n->sums.p) return y;
    const vm some = m_first(lanes), changed = m_and(some, v_differ(y, t));
    const vf r = v_div(v_sub(y, t), unit);
    vm measured = m_and(some, v_less(v_abs(r), v_set(KNOISE_R_MOST)));
    if (type != KERN_NOISE_ABSOLUTE_GAUSSIAN)
        measured = m_and(measured, v_less(v_set(type < KERN_NOISE_DEADZONE ? KNOISE_RELATIVE_LEAST
                                                                           : 0.0f), size));
    const vf kept = v_keep(measured, r);
    l->r = v_add(l->r, kept);
    l->r2 = v_fma(kept, kept, l->r2);
    l->elements += lanes;
    l->measured += m_count(measured);
    if (flat) {
        const vm fine = v_less(size, v_set(kern_noise_coarse(s->n)));
        l->coarse += m_count(measured) - m_count(m_and(measured, fine));
    }
    if (fp8)
        l->coarse += m_count(m_and(measured, v_less(size, least))) +
                     m_count(m_and(measured, v_less(v_set(KNOISE_FP8_MOST), size)));
    l->changed += m_count(changed);
    l->changed_bf16 += m_count(m_and(changed, v_differ_bf16(y, t)));
    return y;
}

/* A span ends; r, r2: its lanes, folded. */
INLINE void noise_span(struct noise *s, const struct noise_lanes *l, float r, float r2) {
    s->sum[KERN_NOISE_ELEMENTS] += l->elements;
    s->sum[KERN_NOISE_MEASURED] += l->measured;
    s->sum[KERN_NOISE_COARSE] += l->coarse;
    s->sum[KERN_NOISE_CHANGED] += l->changed;
    s->sum[KERN_NOISE_CHANGED_BF16] += l->changed_bf16;
    s->sum[KERN_NOISE_R] += llrintf(r * 0x1p20f);
    s->sum[KERN_NOISE_R2] += llrintf(r2 * 0x1p20f);
}

/* A page of one row's keys in attention: t[32], of which the first n are seen. */
struct noise_page { int row, head, n; float edge; };

/* Two pages from key `at`, 32 floats each, side by side. whole: both are seen to the end. */
INLINE void noise_pages2(const struct noise *s, const enum kern_noise_type type, const bool bf16,
                         const bool whole, float *t, const struct noise_page page[2], int at,
                         struct noise_lanes l[2]) {
    uint32_t x[4], y[4];
    kern_noise_counter(x, s->n, page[0].row, (uint32_t)page[0].head);
    kern_noise_counter(y, s->n, page[1].row, (uint32_t)page[1].head);
    vf z[4];
    const vu places = i_or(i_set(s->n->site | (uint32_t)at / 4), i_places(1));
    noise_draw(z, s, type, i_two(x[0], y[0]), i_two(x[1], y[1]), i_two(x[2], y[2]), places);
    for (int i = 0; i < 4; i++) {
        const int seen = page[i / 2].n - i % 2 * 16, n = whole || seen > 16 ? 16 : seen;
        if (n > 0)
            v_store_n(t + i * 16, noise_add(s, type, bf16, v_load(t + i * 16), z[i],
                                            v_set(page[i / 2].edge), n, &l[i / 2]), n);
    }
}
/* Pages of sixteen rows at most, each a span. */
static void noise_pages(struct noise *s, float *t, const struct noise_page *page, int rows,
                        int at) {
    struct noise_lanes l[16];
    float r[16], r2[16];
    vf x[16];
    if (s->n->type == KERN_NOISE_OFF) return;
    for (int i = 0; i < 16; i++) l[i] = noise_lanes();
    for (int i = 0; i < rows; i += 2) {
        struct noise_page two[2] = { page[i], { page[i].row, 0, 0, 0.0f } };
        if (i + 1 < rows) two[1] = page[i + 1];
        if (two[0].n <= 0 && two[1].n <= 0) continue;
        float *from = t + i * KERN_PAGE;
        if (s->n->type != KERN_NOISE_RELATIVE_GAUSSIAN || s->n->bf16)
            noise_pages2(s, s->n->type, s->n->bf16, false, from, two, at, l + i);
        else if (two[0].n >= KERN_PAGE && two[1].n >= KERN_PAGE)
            noise_pages2(s, KERN_NOISE_RELATIVE_GAUSSIAN, false, true, from, two, at, l + i);
        else noise_pages2(s, KERN_NOISE_RELATIVE_GAUSSIAN, false, false, from, two, at, l + i);
    }
    if (!s->n->sums.p) return;
    for (int i = 0; i < 16; i++) x[i] = l[i].r;
    v_store(r, v_fold_all(x));
    for (int i = 0; i < 16; i++) x[i] = l[i].r2;
    v_store(r2, v_fold_all(x));
    for (int i = 0; i < rows; i++) noise_span(s, &l[i], r[i], r2[i]);
}
#endif
