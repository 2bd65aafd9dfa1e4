/* noise.c - see noise.h. Order: the draw, memory, norms, linears, the proof that it happened,
 * life.
 *
 * Knows: which tensors there are and in which order, the key of a draw, how to measure it.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/noise.h"

#include <math.h>

#include "kernels/normal.h"
#include "lib/base/str.h"

/* ---- the draw ---- */

void noise_draw(float *to, size_t first, size_t n, double sd, uint64_t seed, uint64_t version,
                int tensor) {
    uint32_t key[2];
    rng_key(key, seed, RNG_PURPOSE_AQN, version);
    for (size_t at = first & ~(size_t)3; at < first + n; at += 4) {
        const uint32_t counter[4] = { (uint32_t)(at / 4), (uint32_t)tensor, 0, 0 };
        double z[4];
        rng_normal4(z, rng_philox(counter, key));
        for (size_t j = at < first ? first - at : 0; j < 4 && at + j < first + n; j++)
            to[at + j - first] = (float)(sd * z[j]);
    }
}

void noise_draw_linear(float *to, size_t first, size_t n, double sd, uint64_t seed,
                       uint64_t version, int tensor) {
    uint32_t key[2];
    double z[4];
    rng_key(key, seed, RNG_PURPOSE_AQN, version);
    for (size_t i = 0; i < n; i++) {
        const size_t at = first + i;
        if (i == 0 || at % 4 == 0) kern_weight_draw4(z, key, (uint32_t)tensor, at / 4);
        to[i] = kern_weight_dw(sd, z[at % 4]);
    }
}

/* What was measured on the weights of one tensor, one row or one kind. */
struct tally {
    double noise2, weight2;              /* sums of squares */
    double scaled2;                      /* of noise / multiplier */
    double rounding2;                    /* variance that rounding w + dw may add to it */
    int64_t elements, changed, changed_bf16;
};

static void tally_add(struct tally *to, const struct tally *t) {
    to->noise2 += t->noise2;
    to->weight2 += t->weight2;
    to->scaled2 += t->scaled2;
    to->rounding2 += t->rounding2;
    to->elements += t->elements;
    to->changed += t->changed;
    to->changed_bf16 += t->changed_bf16;
}

/* All that one view measures; layer[layers] is the final norm. */
struct measured { struct tally norms, linears, layer[MODEL_LAYERS_MAX + 1]; };

static void tally_element(struct tally *t, float w, float noisy, double d, double m) {
    t->noise2 += d * d;
    t->scaled2 += d / m * (d / m);
    t->weight2 += (double)w * (double)w;
    t->elements++;
    t->changed += noisy < w || noisy > w;
    t->changed_bf16 += f32_to_bf16(noisy) != f32_to_bf16(w);
}

/* ---- memory ---- */

static enum kern_format linear_format(enum model_quant q) {
    return q == MODEL_QUANT_F32 ? KERN_FORMAT_F32 : KERN_FORMAT_BF16;
}

static size_t whole_lines(size_t bytes) { return (bytes + 63) & ~(size_t)63; }

static size_t linear_bytes(const struct model_conf *c, enum model_quant q, enum proj p) {
    int out, in;
    model_proj_shape(c, p, &out, &in);
    return whole_lines(kern_weight_bytes(linear_format(q), out, in));
}

/* dw of norms, then noisy linears, then what is measured of one of them. */
struct room { size_t linears, squares, counts, bytes; };

static struct room room_of(const struct model_conf *c, enum model_quant q,
                           const struct noise_target *t) {
    struct room r = { 0 };
    int most = 0;
    if (!t || t->norms)
        r.linears = whole_lines((size_t)(2 * c->layers + 1) * (size_t)c->dim * sizeof(float));
    r.squares = r.linears;
    for (int layer = 0; t && layer < c->layers; layer++)
        for (enum proj p = 0; p < PROJ_COUNT; p++) {
            int out, in;
            if (!(t->linear[layer][p] > 0)) continue;
            model_proj_shape(c, p, &out, &in);
            most = out > most ? out : most;
            r.squares += linear_bytes(c, q, p);
        }
    r.counts = r.squares + whole_lines((size_t)most * KERN_WEIGHT_SQUARES * sizeof(double));
    r.bytes = r.counts + (most ? whole_lines(KERN_WEIGHT_COUNTS * sizeof(int64_t)) : 0);
    return r;
}

size_t noise_view_plan(const struct model_conf *c, enum model_quant q,
                       const struct noise_target *t) {
    return room_of(c, q, t).bytes;
}

static int make_room(struct noise_view *v, size_t bytes, struct err *e) {
    if (v->mem.p && v->mem_bytes >= bytes) return 0;
    if (v->mem.p) v->kern->free(v->kern, &v->mem);
    v->mem_bytes = bytes;
    if (v->kern->alloc(v->kern, &v->mem, bytes, e) < 0)
        return err_wrap(e, "cannot make room for noise on weights");
    return 0;
}

/* ---- norms ---- */

static kptr norm_weight(const struct model *m, int norm) {
    if (norm == 2 * m->conf.layers) return m->norm_final;
    const struct model_layer *l = &m->layer[norm / 2];
    return norm % 2 ? l->norm_post : l->norm_in;
}

/* What the forward pass will see of it: w + dw is one f32 addition there, so it is measured as one
 * here. */
static void measure_norm(struct tally *t, const float *w, const float *dw, int dim, double m) {
    for (int i = 0; i < dim; i++) {
        const float noisy = w[i] + dw[i], size = fabsf(noisy);
        const double ulp = (double)(nextafterf(size, INFINITY) - size) / m;
        tally_element(t, w[i], noisy, (double)noisy - (double)w[i], m);
        t->rounding2 += ulp * ulp / 12;
    }
}

static int open_norms(struct noise_view *v, const struct model *m,
                      const struct noise_target *target, struct measured *all, struct err *e) {
    const int dim = m->conf.dim, norms = 2 * m->conf.layers + 1;
    const size_t row_bytes = (size_t)dim * sizeof(float);
    v->dw = v->mem;
    v->kern->zero(v->kern, v->dw, row_bytes * (size_t)norms);
    float *w = mem_alloc(2 * row_bytes), *dw = w + dim;
    for (int norm = 0; norm < norms; norm++) {
        const double times = target ? (double)target->norm[norm] : 1;
        if (times == 0) continue;
        noise_draw(dw, 0, (size_t)dim, times * v->sigma, v->seed, v->version, norm);
        v->kern->download(v->kern, w, norm_weight(m, norm), row_bytes);
        struct tally t = { 0 };
        measure_norm(&t, w, dw, dim, times);
        tally_add(&all->norms, &t);
        tally_add(&all->layer[norm / 2], &t);
        v->kern->upload(v->kern, noise_view_dw(v, norm, dim), dw, row_bytes);
    }
    free(w);
    return v->kern->sync(v->kern, e);
}

/* ---- linears ---- */

/* Rows are added in their order, whoever made them. */
static void take_sums(struct tally *t, const struct noise_view *v, const struct room *room,
                      const struct kern_weight *w) {
    struct kern *k = v->kern;
    const size_t bytes = (size_t)w->out * KERN_WEIGHT_SQUARES * sizeof(double);
    int64_t count[KERN_WEIGHT_COUNTS];
    double *square = mem_alloc(bytes);
    k->download(k, square, kptr_at(v->mem, room->squares), bytes);
    k->download(k, count, kptr_at(v->mem, room->counts), sizeof count);
    for (int o = 0; o < w->out; o++) {
        const double *row = square + o * KERN_WEIGHT_SQUARES;
        t->noise2 += row[KERN_WEIGHT_NOISE];
        t->scaled2 += row[KERN_WEIGHT_SCALED];
        t->weight2 += row[KERN_WEIGHT_VALUE];
    }
    t->elements = (int64_t)w->out * w->in;
    t->changed = count[KERN_WEIGHT_CHANGED];
    t->changed_bf16 = count[KERN_WEIGHT_CHANGED_BF16];
    free(square);
}

static void make_matrix(const struct noise_view *v, const struct room *room,
                        const struct kern_weight *w, const struct kern_weight *to, double times,
                        int tensor, struct tally *t) {
    struct kern_weight_noise a = { .w = *w,
                                   .to = *to,
                                   .sd = times * v->sigma,
                                   .times = times,
                                   .tensor = (uint32_t)tensor,
                                   .squares = kptr_at(v->mem, room->squares),
                                   .counts = kptr_at(v->mem, room->counts) };
    rng_key(a.key, v->seed, RNG_PURPOSE_AQN, v->version);
    v->kern->zero(v->kern, a.counts, KERN_WEIGHT_COUNTS * sizeof(int64_t));
    v->kern->weight_noise(v->kern, &a);
    take_sums(t, v, room, w);
}

static int open_linears(struct noise_view *v, const struct model *m,
                        const struct noise_target *target, const struct room *room,
                        struct measured *all, struct err *e) {
    const struct model_conf *c = &m->conf;
    size_t used = room->linears;
    v->linear = mem_alloc((size_t)c->layers * sizeof *v->linear);
    for (int layer = 0; layer < c->layers; layer++)
        for (enum proj p = 0; p < PROJ_COUNT; p++) {
            if (!(target->linear[layer][p] > 0)) continue;
            const struct kern_weight *w = &m->layer[layer].w[p];
            struct kern_weight *to = &v->linear[layer][p];
            struct tally t = { 0 };
            *to = (struct kern_weight){ .data = kptr_at(v->mem, used),
                                        .format = linear_format(m->quant),
                                        .out = w->out,
                                        .in = w->in,
                                        .scale = 1 };
            used += linear_bytes(c, m->quant, p);
            make_matrix(v, room, w, to, (double)target->linear[layer][p],
                        noise_tensor_linear(c, layer, p), &t);
            tally_add(&all->linears, &t);
            tally_add(&all->layer[layer], &t);
        }
    return v->kern->sync(v->kern, e);
}

/* ---- proof ---- */

static double ratio(const struct tally *t) {
    return t->weight2 > 0 ? sqrt(t->noise2 / t->weight2) : t->noise2 > 0 ? INFINITY : 0;
}

static int check_strength(double sigma, const struct tally *t, const char *kind, struct err *e) {
    if (!t->elements) return 0;
    return noise_strength_check(sigma, ratio(t), 0, sqrt(t->weight2 / (double)t->elements), kind,
                                e);
}

static int prove(struct noise_view *v, const struct measured *all, struct err *e) {
    const struct tally *norms = &all->norms, *linears = &all->linears;
    struct tally t = *norms;
    tally_add(&t, linears);
    const double n = (double)t.elements;
    v->elements = t.elements;
    v->changed = t.changed;
    v->changed_bf16 = t.changed_bf16;
    v->realised = sqrt(t.scaled2 / n);
    v->weight_rms = sqrt(t.weight2 / n);
    v->strength = fmax(ratio(norms), ratio(linears));
    for (int l = 0; l <= v->layers; l++)
        if (all->layer[l].elements)
            v->layer_rms[l] = (float)sqrt(all->layer[l].noise2 / (double)all->layer[l].elements);
    if (v->changed == 0)
        return err_code(e, EXIT_CONFIG,
                        "noise of sigma %g was intended, but not one of %lld weights changed",
                        v->sigma, (long long)v->elements);
    const double bound = 6 * v->sigma / sqrt(2 * n);
    const double rounded = sqrt(v->sigma * v->sigma + t.rounding2 / n);
    if (!(v->realised >= v->sigma - bound && v->realised <= rounded + bound))
        return err_code(e, EXIT_CONFIG,
                        "noise of sigma %g was intended, %g was realised on %lld weights (6 "
                        "standard errors: %g)",
                        v->sigma, v->realised, (long long)v->elements, bound);
    if (check_strength(v->sigma, norms, "norm", e) < 0) return -1;
    return check_strength(v->sigma, linears, "linear", e);
}

int noise_strength_check(double sigma, double strength, double margin, double rms,
                         const char *kind, struct err *e) {
    if (strength > 1 - margin)
        return err_code(e, EXIT_CONFIG,
                        "noise of sigma %g is %.3g times the rms %.3g of the %s weights it hits: "
                        "nothing of the model would be left; lower noise.aqn.sigma_start",
                        sigma, strength, rms, kind);
    if (strcmp(kind, "linear") == 0 && strength < (1 + margin) * 0x1p-23)
        return err_code(e, EXIT_CONFIG,
                        "noise of sigma %g is %.3g times the rms %.3g of the linear weights it "
                        "hits: f32 keeps nothing of it beside them below %.3g; raise it",
                        sigma, strength, rms, 0x1p-23);
    return 0;
}

/* ---- life ---- */

int noise_view_open(struct noise_view *v, const struct model *m, const struct noise_target *target,
                    double sigma, uint64_t seed, uint64_t version, struct err *e) {
    *v = (struct noise_view){ .kern = m->kern };
    return noise_view_renew(v, m, target, sigma, seed, version, e);
}

int noise_view_renew(struct noise_view *v, const struct model *m, const struct noise_target *target,
                     double sigma, uint64_t seed, uint64_t version, struct err *e) {
    struct measured all = { 0 };
    free(v->linear);
    *v = (struct noise_view){ .sigma = sigma,
                              .seed = seed,
                              .version = version,
                              .layers = m->conf.layers,
                              .mem = v->mem,
                              .mem_bytes = v->mem_bytes,
                              .kern = m->kern };
    if (!isfinite(sigma) || sigma < 0)
        return err_set(e, "noise of sigma %g: must be a finite number, 0 or more", sigma);
    if (sigma == 0) return 0;
    const struct room room = room_of(&m->conf, m->quant, target);
    int rc = make_room(v, room.bytes, e);
    if (rc == 0 && (!target || target->norms)) rc = open_norms(v, m, target, &all, e);
    if (rc == 0 && target && target->linears) rc = open_linears(v, m, target, &room, &all, e);
    if (rc == 0) rc = prove(v, &all, e);
    if (rc < 0) noise_view_close(v);
    return rc;
}

void noise_view_close(struct noise_view *v) {
    if (v->mem.p) v->kern->free(v->kern, &v->mem);
    free(v->linear);
    v->dw = v->mem = (kptr){ NULL };
    v->mem_bytes = 0;
    v->linear = NULL;
}
