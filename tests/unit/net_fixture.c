/* net_fixture.c - see net_fixture.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/unit/net_fixture.h"

#include <criterion/criterion.h>
#include <math.h>

#include "kernels/pack.h"
#include "lib/base/rng.h"
#include "lib/base/str.h"
#include "lib/model/quant.h"

static kptr vector(struct fix *f, fix_value *value, const char *name, int layer, enum proj p,
                   int n) {
    float *host = mem_alloc((size_t)n * sizeof *host);
    kptr k;
    for (int i = 0; i < n; i++) host[i] = value(name, layer, p, (size_t)i);
    cr_assert_eq(f->kern.alloc(&f->kern, &k, (size_t)n * sizeof *host, NULL), 0);
    f->kern.upload(&f->kern, k, host, (size_t)n * sizeof *host);
    free(host);
    return k;
}

static void codes4(struct kern_weight *w, void *records, const float *v) {
    const int out = w->out, in = w->in;
    struct err e = { 0 };
    uint8_t *codes = mem_alloc((size_t)out * (size_t)in), *scales = mem_alloc((size_t)out * (size_t)in);
    float amax = 0;
    for (int i = 0; i < out * in; i++) amax = fmaxf(amax, fabsf(v[i]));
    if (w->format == KERN_FORMAT_NVFP4) {
        w->scale = quant_nvfp4_tensor_scale(amax, MODEL_ROUNDING_OCP);
        cr_assert_eq(quant_nvfp4(v, out, in, MODEL_ROUNDING_OCP, w->scale, codes, scales, NULL, &e), 0);
    } else cr_assert_eq(quant_mxfp4(v, out, in, MODEL_ROUNDING_OCP, codes, scales, NULL, &e), 0);
    pack_codes(records, w->format, codes, scales, out, in);
    free(codes);
    free(scales);
}

static struct kern_weight matrix(struct fix *f, fix_value *value, const char *name, int layer,
                                 enum proj p, int out, int in, enum kern_format format) {
    struct kern_weight w = { .format = format, .out = out, .in = in, .scale = 1 };
    const size_t n = (size_t)out * (size_t)in, bytes = kern_weight_bytes(format, out, in);
    float *host = mem_alloc(n * sizeof *host);
    void *records = mem_alloc(bytes);
    for (size_t i = 0; i < n; i++) host[i] = value(name, layer, p, i);
    if (format == KERN_FORMAT_MXFP4 || format == KERN_FORMAT_NVFP4) codes4(&w, records, host);
    else pack_f32(records, format, host, out, in);
    cr_assert_eq(f->kern.alloc(&f->kern, &w.data, bytes, NULL), 0);
    f->kern.upload(&f->kern, w.data, records, bytes);
    free(host);
    free(records);
    return w;
}

void fix_open(struct fix *f, const char *path, int threads, const struct model_conf *c,
              enum model_quant q, fix_value *value) {
    struct err e = { 0 };
    memset(f, 0, sizeof *f);
    f->pool = pool_create(threads);
    cr_assert_eq(kern_open(&f->kern, path, f->pool, &e), 0, "%s", e.text);
    const enum kern_format flat = q == MODEL_QUANT_F32 ? KERN_FORMAT_F32 : KERN_FORMAT_BF16;
    const enum kern_format format = q == MODEL_QUANT_MXFP4   ? KERN_FORMAT_MXFP4
                                    : q == MODEL_QUANT_NVFP4 ? KERN_FORMAT_NVFP4
                                                             : flat;
    struct model *m = &f->model;
    *m = (struct model){ .conf = *c, .quant = q, .kern = &f->kern };
    m->layer = mem_alloc((size_t)c->layers * sizeof *m->layer);
    m->embed = matrix(f, value, "embed", 0, 0, c->vocab, c->dim, flat);
    m->head = c->tied ? m->embed : matrix(f, value, "head", 0, 0, c->vocab, c->dim, flat);
    m->norm_final = vector(f, value, "norm_final", 0, 0, c->dim);
    for (int l = 0; l < c->layers; l++) {
        struct model_layer *layer = &m->layer[l];
        layer->norm_in = vector(f, value, "norm_in", l, 0, c->dim);
        layer->norm_post = vector(f, value, "norm_post", l, 0, c->dim);
        for (enum proj p = 0; p < PROJ_COUNT; p++) {
            int out, in;
            model_proj_shape(c, p, &out, &in);
            layer->w[p] = matrix(f, value, model_proj_name[p], l, p, out, in, format);
            if (p <= PROJ_V && c->qkv_bias) layer->bias[p] = vector(f, value, "bias", l, p, out);
        }
    }
}

void fix_activations(struct fix *f, enum model_quant a, enum model_rounding r, bool some) {
    f->model.activations = a;
    f->model.rounding = r;
    for (int l = 0; l < f->model.conf.layers; l++)
        for (int p = 0; p < PROJ_COUNT; p++)
            f->model.layer[l].quant_in[p] = model_quant_rounds(a) && !(some && (l + p) % 5 == 3);
}

void fix_adapter(struct fix *f, enum model_quant a, enum model_rounding r, bool some) {
    f->model.adapter = a;
    f->model.rounding = r;
    for (int l = 0; l < f->model.conf.layers; l++)
        for (int p = 0; p < PROJ_COUNT; p++) {
            struct model_layer *x = &f->model.layer[l];
            const bool left = some && l % 2;
            x->quant_adapter[p] = model_quant_rounds(a) && !left;
            x->quant_in[p] = x->quant_in[p] && !left;
        }
}

void fix_close(struct fix *f) {
    struct model *m = &f->model;
    for (int l = 0; l < m->conf.layers; l++) {
        for (enum proj p = 0; p < PROJ_COUNT; p++) f->kern.free(&f->kern, &m->layer[l].w[p].data);
        for (int b = 0; b < 3; b++)
            if (m->layer[l].bias[b].p) f->kern.free(&f->kern, &m->layer[l].bias[b]);
        f->kern.free(&f->kern, &m->layer[l].norm_in);
        f->kern.free(&f->kern, &m->layer[l].norm_post);
    }
    if (!m->conf.tied) f->kern.free(&f->kern, &m->head.data);
    f->kern.free(&f->kern, &m->embed.data);
    f->kern.free(&f->kern, &m->norm_final);
    free(m->layer);
    pool_destroy(&f->pool);
}

struct model_conf fix_toy_conf(void) {
    return (struct model_conf){ .arch = MODEL_ARCH_QWEN2,
                                .vocab = 10,
                                .dim = 8,
                                .layers = 2,
                                .heads = 2,
                                .kv_heads = 1,
                                .head_dim = 4,
                                .ffn_dim = 12,
                                .positions_max = 64,
                                .norm_eps = 1e-6f,
                                .rope_theta = 10000,
                                .qkv_bias = true,
                                .bos = -1 };
}

float fix_toy_value(const char *name, int layer, enum proj p, size_t i) {
    double base = 0, scale = .5, t = 0;
    const int b = 10 + 20 * layer;
    if (!strcmp(name, "embed")) t = 1;
    else if (!strcmp(name, "head")) t = 2;
    else if (!strcmp(name, "norm_final")) base = 1, scale = .1, t = 3;
    else if (!strcmp(name, "norm_in")) base = 1, scale = .1, t = b;
    else if (!strcmp(name, "norm_post")) base = 1, scale = .1, t = b + 1;
    else if (!strcmp(name, "bias")) scale = .1, t = b + 10 + (int)p;
    else scale = .4, t = b + 2 + (int)p;
    return (float)(base + scale * sin(.9 * (double)i + t));
}

struct model_conf fix_small_conf(void) {
    return (struct model_conf){ .arch = MODEL_ARCH_QWEN2,
                                .vocab = 61,
                                .dim = 40,
                                .layers = 3,
                                .heads = 6,
                                .kv_heads = 2,
                                .head_dim = 8,
                                .ffn_dim = 72,
                                .positions_max = 256,
                                .norm_eps = 1e-6f,
                                .rope_theta = 10000,
                                .tied = true,
                                .qkv_bias = true,
                                .bos = -1 };
}

float fix_small_value(const char *name, int layer, enum proj p, size_t i) {
    uint64_t h = (uint64_t)layer * 64 + (uint64_t)p;
    for (const char *c = name; *c; c++) h = rng_mix64(h ^ (uint64_t)*c);
    const double u = (double)(rng_mix64(h ^ (i * 0x9E37u)) >> 11) * 0x1p-53 * 2 - 1;
    if (!strncmp(name, "norm", 4)) return (float)(1 + .3 * u);
    if (!strcmp(name, "embed")) return (float)(.9 * u);
    return (float)((!strcmp(name, "bias") ? .2 : .45) * u);
}

struct lora *fix_lora(const struct model_conf *c, int rank, float alpha, float b, uint64_t seed) {
    struct lora_shape s = { .rank = rank, .alpha = alpha, .on = { 1, 1, 1, 1, 1, 1, 1 } };
    struct lora *l = lora_create(c, &s, seed);
    for (int layer = 0; layer < c->layers; layer++)
        for (enum proj p = 0; p < PROJ_COUNT; p++) {
            size_t a_at, b_at;
            int out, in;
            model_proj_shape(c, p, &out, &in);
            lora_offsets(l, layer, p, &a_at, &b_at);
            for (size_t i = 0; i < (size_t)out * (size_t)rank; i++)
                l->value[b_at + i] = b * fix_small_value("lora_b", layer, p, i);
        }
    return l;
}
