/* synth.c - see synth.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tools/bench/synth.h"

#include <math.h>

#include "kernels/pack.h"
#include "lib/base/str.h"

/* ---- random bits, 64 at a time ---- */

static uint64_t mix(uint64_t *state) {               /* splitmix64 */
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

struct fill { uint8_t *at; size_t bytes; enum kern_format format; int exponent; uint64_t seed; };
enum { PIECE = sizeof(struct pack_mxfp4) << 16 };    /* whole records */

/* bf16: random sign and mantissa, magnitude between 2^e and 2^(e+1). */
static void fill_bf16(uint8_t *at, size_t bytes, int exponent, uint64_t *state) {
    const uint64_t e = (uint64_t)(127 + exponent) << 7, all = e | e << 16 | e << 32 | e << 48;
    for (size_t i = 0; i < bytes; i += 8) {
        uint64_t x = (mix(state) & 0x807f807f807f807fu) | all;
        memcpy(at + i, &x, 8);
    }
}

static void fill_mxfp4(uint8_t *at, size_t bytes, int exponent, uint64_t *state) {
    for (size_t i = 0; i < bytes; i += sizeof(struct pack_mxfp4)) {
        struct pack_mxfp4 *r = (struct pack_mxfp4 *)(at + i);
        for (size_t j = 0; j < sizeof r->q; j += 8) {
            uint64_t x = mix(state);
            memcpy((uint8_t *)r->q + j, &x, 8);
        }
        uint64_t x = mix(state);
        for (int j = 0; j < 16; j++)
            r->scale[j] = (uint8_t)(127 + exponent - (int)(x >> j & 1));
    }
}

static void fill_part(void *arg, int part, int parts) {
    const struct fill *f = arg;
    const size_t unit = f->format == KERN_FORMAT_MXFP4 ? sizeof(struct pack_mxfp4) : 8;
    size_t units = f->bytes / unit, from = units * (size_t)part / (size_t)parts,
           to = units * (size_t)(part + 1) / (size_t)parts;
    uint64_t state = f->seed + (uint64_t)part * 0x1234567;
    if (f->format == KERN_FORMAT_MXFP4)
        fill_mxfp4(f->at + from * unit, (to - from) * unit, f->exponent, &state);
    else fill_bf16(f->at + from * unit, (to - from) * unit, f->exponent, &state);
}

/* f->bytes of the backend's memory at p: a piece by the host's threads, then copies of it. */
static void fill_memory(struct kern *k, kptr p, const struct fill *f) {
    struct fill piece = *f;
    piece.bytes = f->bytes < PIECE ? f->bytes : PIECE;
    piece.at = mem_alloc(piece.bytes + 1);
    if (k->pool) pool_run(k->pool, 4 * pool_threads(k->pool), fill_part, &piece);
    else fill_part(&piece, 0, 1);
    k->upload(k, p, piece.at, piece.bytes);
    for (size_t at = piece.bytes; at < f->bytes; at += PIECE)
        k->copy(k, kptr_at(p, at), p, f->bytes - at < PIECE ? f->bytes - at : PIECE);
    free(piece.at);
}

/* ---- the model ---- */

struct layout { struct synth *s; kptr base; size_t used; uint64_t seed; };

static kptr place(struct layout *l, size_t bytes) {
    kptr p = l->base.p ? kptr_at(l->base, l->used) : l->base;
    l->used += (bytes + 63) & ~(size_t)63;
    return p;
}

static struct kern_weight weight(struct layout *l, enum kern_format format, int out, int in) {
    struct kern_weight w = { .format = format, .out = out, .in = in, .scale = 1 };
    const size_t bytes = kern_weight_bytes(format, out, in);
    w.data = place(l, bytes);
    if (!l->base.p) return w;
    /* rms of random codes, half of them at half the scale, and of bf16 in [1, 2); a product should
     * keep the size of its input */
    const double rms = format == KERN_FORMAT_MXFP4 ? 2.2 : 1.5;
    const struct fill f = { NULL, bytes, format, (int)lround(-log2(sqrt((double)in) * rms)),
                            ++l->seed << 32 };
    fill_memory(&l->s->kern, w.data, &f);
    return w;
}

static kptr vector(struct layout *l, int n, float value) {
    const size_t bytes = (size_t)n * sizeof(float);
    kptr p = place(l, bytes);
    if (!p.p) return p;
    float *v = mem_alloc(bytes);
    for (int i = 0; i < n; i++) v[i] = value + .01f * (float)(i % 7);
    l->s->kern.upload(&l->s->kern, p, v, bytes);
    free(v);
    return p;
}

static size_t lay_out(struct synth *s, kptr base) {
    struct layout l = { s, base, 0, 0 };
    struct model *m = &s->model;
    const struct model_conf *c = &m->conf;
    for (int i = 0; i < c->layers; i++) {
        struct model_layer none, *layer = base.p ? &m->layer[i] : &none;
        *layer = (struct model_layer){ .norm_in = vector(&l, c->dim, 1),
                                       .norm_post = vector(&l, c->dim, 1) };
        for (int p = 0; p < PROJ_COUNT; p++) {
            int out, in;
            model_proj_shape(c, (enum proj)p, &out, &in);
            layer->w[p] = weight(&l, KERN_FORMAT_MXFP4, out, in);
            if (p <= PROJ_V && c->qkv_bias) layer->bias[p] = vector(&l, out, .01f);
        }
    }
    m->norm_final = vector(&l, c->dim, 1);
    m->embed = s->head_bf16 = weight(&l, KERN_FORMAT_BF16, c->vocab, c->dim);
    s->head_mxfp4 = weight(&l, KERN_FORMAT_MXFP4, c->vocab, c->dim);
    return l.used;
}

size_t synth_bytes(enum shape m) {
    struct synth s = { .shape = m, .model = { .conf = shape_conf[m] } };
    return lay_out(&s, (kptr){ NULL });
}

void synth_fill(struct kern *k, kptr p, size_t bytes) {
    const struct fill f = { NULL, bytes & ~(size_t)63, KERN_FORMAT_BF16, -1, 77 };
    fill_memory(k, p, &f);
}

/* The product's own memory, filled. */
static int (*plain_alloc)(struct kern *k, kptr *out, size_t bytes, struct err *e);
static int alloc_filled(struct kern *k, kptr *out, size_t bytes, struct err *e) {
    if (plain_alloc(k, out, bytes, e) < 0) return -1;
    synth_fill(k, *out, bytes);
    return 0;
}

/* As model.c: plain pages for a CPU, a device's own memory. */
static kptr weights_alloc(struct synth *s, bool device, struct err *e) {
    const size_t bytes = (synth_bytes(s->shape) + 4095) & ~(size_t)4095;
    if (device) {
        plain_alloc(&s->kern, &s->device, bytes, e);
        return s->device;
    }
    s->memory = aligned_alloc(4096, bytes);
    if (!s->memory) err_code(e, EXIT_ENV, "out of memory");
    return (kptr){ s->memory };
}

int synth_open(struct synth **out, enum shape m, const struct kern *k, bool device,
               struct err *e) {
    struct synth *s = mem_alloc(sizeof *s);
    s->shape = m;
    s->kern = *k;
    plain_alloc = k->alloc;
    s->kern.alloc = alloc_filled;
    s->model = (struct model){ .conf = shape_conf[m], .quant = MODEL_QUANT_MXFP4,
                               .sha256 = "synthetic", .kern = &s->kern };
    s->model.layer = mem_alloc((size_t)shape_conf[m].layers * sizeof *s->model.layer);
    const kptr memory = weights_alloc(s, device, e);
    if (memory.p) lay_out(s, memory);
    if (!memory.p || s->kern.sync(&s->kern, e) < 0) {
        synth_close(&s);
        return err_wrap(e, "the weights of %s", shape_name[m]);
    }
    s->model.head = s->head_bf16;
    *out = s;
    return 0;
}

void synth_close(struct synth **sp) {
    struct synth *s = *sp;
    if (!s) return;
    free(s->model.layer);
    free(s->memory);
    if (s->device.p) s->kern.free(&s->kern, &s->device);
    free(s);
    *sp = NULL;
}

void synth_head(struct synth *s, bool mxfp4) {
    s->model.head = mxfp4 ? s->head_mxfp4 : s->head_bf16;
}

struct lora *synth_lora(const struct synth *s, int rank) {
    struct lora_shape shape = shape_lora(rank);
    struct lora *l = lora_create(&s->model.conf, &shape, 1);
    uint64_t state = 5;
    for (int i = 0; i < s->model.conf.layers; i++)
        for (int p = 0; p < PROJ_COUNT; p++) {
            size_t a, b;
            int out, in;
            model_proj_shape(&s->model.conf, (enum proj)p, &out, &in);
            lora_offsets(l, i, (enum proj)p, &a, &b);
            for (size_t j = 0; j < (size_t)out * (size_t)rank; j++)
                l->value[b + j] = ((float)(mix(&state) >> 40) * 0x1p-23f - 1.f) * .02f;
        }
    return l;
}

int synth_noise(const struct synth *s, struct noise_plan *p, struct err *e) {
    const struct noise_text ops = { .type = KERN_NOISE_RELATIVE_GAUSSIAN, .scale = .05,
                                    .names = "all", .layers = "all", .forward = true,
                                    .backward = true, .phase = { true, true, true, true } },
                            none = { .names = "", .layers = "all" };
    return noise_plan_make(p, &ops, &none, &s->model.conf, e);
}

/* ---- operations that do nothing ---- */

#define SKIP(op) static void skip_##op(struct kern *k, const struct kern_##op *a) { (void)k, (void)a; }
SKIP(embed) SKIP(rmsnorm) SKIP(rope) SKIP(kv_put) SKIP(attn) SKIP(swiglu) SKIP(add) SKIP(gather)
static void skip_linear(struct kern *k, const struct kern_linear *a, int n) {
    (void)k, (void)a, (void)n;
}

void synth_skip_begin(struct synth *s, struct kern *kept) {
    *kept = s->kern;
    s->kern.embed = skip_embed;
    s->kern.rmsnorm = skip_rmsnorm;
    s->kern.linear = skip_linear;
    s->kern.rope = skip_rope;
    s->kern.kv_put = skip_kv_put;
    s->kern.attn = skip_attn;
    s->kern.swiglu = skip_swiglu;
    s->kern.add = skip_add;
    s->kern.gather = skip_gather;
}

void synth_skip_end(struct synth *s, const struct kern *kept) { s->kern = *kept; }
