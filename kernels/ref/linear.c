/* linear.c - the reference for products with packed weights: linear, linear_t, outer, embed, pack.
 *
 * Knows: the record layout through pack_get, and the one order of summation that kern.h promises.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cpu.h"

/* Row o of the weight as f32 (without the tensor scale), in a buffer of w->in floats. */
static void weight_row(float *to, const struct kern_weight *w, int o) {
    for (int i = 0; i < w->in; i++) to[i] = pack_get(w->data.p, w->format, w->out, w->in, o, i);
}

void ref_embed(struct kern *k, const struct kern_embed *a) {
    (void)k;
    const int32_t *tokens = a->tokens.p;
    float *y = a->y.p;
    for (int r = 0; r < a->rows; r++)
        for (int i = 0; i < a->w.in; i++)
            y[(size_t)r * (size_t)a->w.in + (size_t)i] =
                pack_get(a->w.data.p, a->w.format, a->w.out, a->w.in, tokens[r], i) * a->w.scale;
}

static void linear_one(const struct kern_linear *a) {
    const float *bias = a->bias.p;
    float *w = cpu_scratch((size_t)a->w.in * sizeof *w), scale = a->scale * a->w.scale;
    for (int o = 0; o < a->w.out; o++) {
        weight_row(w, &a->w, o);
        for (int r = 0; r < a->rows; r++) {
            float acc = 0.0f;
            for (int i = 0; i < a->w.in; i++)
                acc = fmaf(cpu_get(a->x, a->x_type, (size_t)r * (size_t)a->x_ld + (size_t)i), w[i],
                           acc);
            size_t at = (size_t)r * (size_t)a->y_ld + (size_t)o;
            acc *= scale;
            if (bias) acc += bias[o];
            if (a->accumulate) acc += ((const float *)a->y.p)[at];
            cpu_put(a->y, a->y_type, at, acc);
        }
    }
}

void ref_linear(struct kern *k, const struct kern_linear *a, int n) {
    (void)k;
    for (int i = 0; i < n; i++) {
        linear_one(&a[i]);
        if (!a[i].b.out) continue;
        struct kern_linear lora = a[i];
        lora.x = a[i].u, lora.x_ld = a[i].u_ld, lora.w = a[i].b;
        lora.bias = (kptr){ NULL }, lora.scale = 1, lora.accumulate = true;
        linear_one(&lora);
    }
}

void ref_linear_t(struct kern *k, const struct kern_linear_t *a) {
    (void)k;
    int in = a->w.in, out = a->w.out;
    float *acc = cpu_scratch(((size_t)in * (size_t)a->rows + (size_t)in) * sizeof *acc);
    float *w = acc + (size_t)in * (size_t)a->rows, scale = a->scale * a->w.scale;
    memset(acc, 0, (size_t)in * (size_t)a->rows * sizeof *acc);
    for (int o = 0; o < out; o++) {
        weight_row(w, &a->w, o);
        for (int r = 0; r < a->rows; r++) {
            float dy = cpu_round(((const float *)a->dy.p)[(size_t)r * (size_t)a->dy_ld + (size_t)o],
                                 a->round);
            float *to = acc + (size_t)r * (size_t)in;
            for (int i = 0; i < in; i++) to[i] = fmaf(dy, w[i], to[i]);
        }
    }
    for (int r = 0; r < a->rows; r++)
        for (int i = 0; i < in; i++) {
            float *dx = (float *)a->dx.p + (size_t)r * (size_t)a->dx_ld + i;
            float v = acc[(size_t)r * (size_t)in + (size_t)i] * scale;
            *dx = a->accumulate ? *dx + v : v;
        }
}

void ref_outer(struct kern *k, const struct kern_outer *a) {
    (void)k;
    for (int i = 0; i < a->m; i++)
        for (int j = 0; j < a->n; j++) {
            float *g = (float *)a->g.p + (size_t)i * (size_t)a->n + j;
            for (int s = 0; s < a->seqs; s++) {
                float sum = 0.0f;
                for (int t = a->seq_start[s]; t < a->seq_start[s + 1]; t += 32) {
                    int end = t + 32 < a->seq_start[s + 1] ? t + 32 : a->seq_start[s + 1];
                    float tile = 0.0f;
                    for (int r = t; r < end; r++) {
                        float x = a->scale *
                                  ((const float *)a->a.p)[(size_t)r * (size_t)a->a_ld + (size_t)i];
                        float y = cpu_get(a->b, a->b_type, (size_t)r * (size_t)a->b_ld + (size_t)j);
                        tile = fmaf(cpu_round(x, a->round), y, tile);
                    }
                    sum += tile;
                }
                *g += sum;
            }
        }
}

void ref_pack(struct kern *k, const struct kern_weight *w, const float *values) {
    (void)k;
    pack_f32(w->data.p, w->format, values, w->out, w->in);
}
