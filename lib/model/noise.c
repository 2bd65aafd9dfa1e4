/* noise.c - see noise.h. Order: the draw, norms, linears, the proof that it happened, life.
 *
 * Knows: which tensors there are and in which order, the key of a draw, how to measure it.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/noise.h"

#include <math.h>

#include "kernels/pack.h"
#include "lib/base/rng.h"
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
    if (v->kern->alloc(v->kern, &v->dw, row_bytes * (size_t)norms, e) < 0)
        return err_wrap(e, "cannot make room for noise");
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

static enum kern_format linear_format(enum model_quant q) {
    return q == MODEL_QUANT_F32 ? KERN_FORMAT_F32 : KERN_FORMAT_BF16;
}

static size_t linear_bytes(const struct model_conf *c, enum model_quant q, enum proj p) {
    int out, in;
    model_proj_shape(c, p, &out, &in);
    return (kern_weight_bytes(linear_format(q), out, in) + 63) & ~(size_t)63;
}

size_t noise_view_plan(const struct model_conf *c, enum model_quant q,
                       const struct noise_target *t) {
    size_t bytes = 0;
    for (int layer = 0; layer < c->layers; layer++)
        for (enum proj p = 0; p < PROJ_COUNT; p++)
            if (t->linear[layer][p] > 0) bytes += linear_bytes(c, q, p);
    return bytes;
}

/* One matrix in the making: rows are drawn, rounded and measured by the pool. */
struct matrix {
    const struct noise_view *v;
    const struct kern_weight *w;
    float *values;                       /* [out, in]: of w, row by row replaced by the noise */
    struct tally *row;                   /* [out]: summed in their order, whoever made them */
    double times;
    int tensor;
};

static void noise_rows(void *arg, int part, int parts) {
    struct matrix *x = arg;
    const size_t in = (size_t)x->w->in;
    float *dw = mem_alloc(in * sizeof *dw);
    for (int o = part; o < x->w->out; o += parts) {
        float *w = x->values + (size_t)o * in;
        noise_draw(dw, (size_t)o * in, in, x->times * x->v->sigma, x->v->seed, x->v->version,
                   x->tensor);
        for (size_t i = 0; i < in; i++) {
            dw[i] = bf16_to_f32(f32_to_bf16(dw[i]));
            tally_element(&x->row[o], w[i], w[i] + dw[i], (double)dw[i], x->times);
        }
        memcpy(w, dw, in * sizeof *dw);
    }
    free(dw);
}

static void make_matrix(struct noise_view *v, struct matrix *x, const struct kern_weight *to,
                        struct tally *t) {
    const int out = x->w->out;
    x->values = mem_alloc((size_t)out * (size_t)x->w->in * sizeof *x->values);
    x->row = mem_alloc((size_t)out * sizeof *x->row);
    model_values(v->kern, x->w, x->values);
    if (v->kern->pool) pool_run(v->kern->pool, pool_threads(v->kern->pool), noise_rows, x);
    else noise_rows(x, 0, 1);
    for (int o = 0; o < out; o++) tally_add(t, &x->row[o]);
    v->kern->pack(v->kern, to, x->values);
    free(x->values);
    free(x->row);
}

static int open_linears(struct noise_view *v, const struct model *m,
                        const struct noise_target *target, struct measured *all, struct err *e) {
    const struct model_conf *c = &m->conf;
    size_t used = 0;
    if (v->kern->alloc(v->kern, &v->linear_mem, noise_view_plan(c, m->quant, target), e) < 0)
        return err_wrap(e, "cannot make room for noise on %d linear weights", target->linears);
    v->linear = mem_alloc((size_t)c->layers * sizeof *v->linear);
    for (int layer = 0; layer < c->layers; layer++)
        for (enum proj p = 0; p < PROJ_COUNT; p++) {
            if (!(target->linear[layer][p] > 0)) continue;
            struct kern_weight *to = &v->linear[layer][p];
            struct matrix x = { .v = v,
                                .w = &m->layer[layer].w[p],
                                .times = (double)target->linear[layer][p],
                                .tensor = noise_tensor_linear(c, layer, p) };
            *to = (struct kern_weight){ .data = kptr_at(v->linear_mem, used),
                                        .format = linear_format(m->quant),
                                        .out = x.w->out,
                                        .in = x.w->in,
                                        .scale = 1 };
            used += linear_bytes(c, m->quant, p);
            struct tally t = { 0 };
            make_matrix(v, &x, to, &t);
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
    *v = (struct noise_view){ .sigma = sigma,
                              .seed = seed,
                              .version = version,
                              .layers = m->conf.layers,
                              .kern = m->kern };
    if (!isfinite(sigma) || sigma < 0)
        return err_set(e, "noise of sigma %g: must be a finite number, 0 or more", sigma);
    if (sigma == 0) return 0;
    struct measured all = { 0 };
    int rc = !target || target->norms ? open_norms(v, m, target, &all, e) : 0;
    if (rc == 0 && target && target->linears) rc = open_linears(v, m, target, &all, e);
    if (rc == 0) rc = prove(v, &all, e);
    if (rc < 0) noise_view_close(v);
    return rc;
}

void noise_view_close(struct noise_view *v) {
    if (v->dw.p) v->kern->free(v->kern, &v->dw);
    if (v->linear_mem.p) v->kern->free(v->kern, &v->linear_mem);
    free(v->linear);
    v->dw = v->linear_mem = (kptr){ NULL };
    v->linear = NULL;
}
