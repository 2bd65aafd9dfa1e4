/* noise_view.c - AQN: its draws, one view and the proof of it, on norms and on linear weights.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/unit/net_fixture.h"

#include <criterion/criterion.h>
#include <math.h>

#include "kernels/pack.h"

/* A wider toy, so that statistics mean something: 2 * 16 + 1 norms of 254 channels. */
static struct model_conf wide_conf(void) {
    struct model_conf c = fix_toy_conf();
    c.dim = 254, c.layers = 16, c.heads = 1, c.kv_heads = 1, c.head_dim = 2, c.ffn_dim = 2,
    c.vocab = 2;
    return c;
}
enum { N = 33 * 254 };

static struct noise_target target_of(const struct model_conf *c, const char *targets, const char *layers,
                                     double others) {
    const struct noise_target_text x = { .targets = targets, .exclude = "", .layers = layers, .others = others,
                                         .zone_edge = "", .zone_middle = "" };
    struct noise_target t;
    struct err e = { 0 };
    cr_assert_eq(noise_target_make(&t, &x, 0, 1, c, &e), 0, "%s", e.text);
    return t;
}

static int compare(const void *a, const void *b) {
    const float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}
/* Standard normal at fixed keys: mean, deviation, and the largest distance from its CDF. */
Test(noise_draw, is_standard_normal_times_its_deviation) {
    enum { DRAWS = 200000 };
    static const double sds[] = { 1e-6, 1e-4, 1e-2, 1e-1 };
    float *x = malloc(DRAWS * sizeof *x);
    for (size_t k = 0; k < COUNT_OF(sds); k++) {
        double sum = 0, sum2 = 0, distance = 0;
        noise_draw(x, 0, DRAWS, sds[k], 11, 22, (int)k);
        for (int i = 0; i < DRAWS; i++) {
            const double z = (double)x[i] / sds[k];
            sum += z, sum2 += z * z;
        }
        const double mean = sum / DRAWS, sd = sqrt(sum2 / DRAWS - mean * mean);
        qsort(x, DRAWS, sizeof *x, compare);
        for (int i = 0; i < DRAWS; i++) {
            const double cdf = .5 * erfc(-(double)x[i] / sds[k] / sqrt(2.));
            distance = fmax(distance, fmax(cdf - i / (double)DRAWS, (i + 1) / (double)DRAWS - cdf));
        }
        cr_expect(fabs(mean) < 4 / sqrt(DRAWS), "sd %g: mean %g", sds[k], mean);
        cr_expect(fabs(sd - 1) < 4 / sqrt(2. * DRAWS), "sd %g: deviation %g", sds[k], sd);
        cr_expect(distance < 1.63 / sqrt(DRAWS), "sd %g: Kolmogorov-Smirnov %g", sds[k], distance);
    }
    free(x);
}

/* A piece of a tensor has the bits that it has in the whole. */
Test(noise_draw, is_the_same_in_pieces) {
    float whole[101], piece[101];
    noise_draw(whole, 0, 101, .5, 3, 4, 5);
    for (size_t from = 0; from < 101; from++)
        for (size_t n = 1; from + n <= 101; n += 7) {
            noise_draw(piece, from, n, .5, 3, 4, 5);
            cr_assert(memcmp(piece, whole + from, n * sizeof *piece) == 0, "%zu from %zu", n, from);
        }
}

Test(noise_view, realises_the_sigma_that_was_intended) {
    struct fix f;
    struct err e = { 0 };
    struct model_conf c = wide_conf();
    fix_open(&f, "ref", 1, &c, MODEL_QUANT_F32, fix_small_value);
    static const double sigmas[] = { .1, .05, .01, .001, .0001, 1e-5, 1e-6 };
    for (size_t i = 0; i < COUNT_OF(sigmas); i++) {
        struct noise_view v;
        cr_assert_eq(noise_view_open(&v, &f.model, NULL, sigmas[i], 1, i, &e), 0, "%s", e.text);
        cr_expect_eq(v.elements, N);
        cr_expect_gt(v.changed, v.elements * (sigmas[i] > 1e-5 ? 99 : 90) / 100);
        cr_expect(fabs(v.realised / sigmas[i] - 1) < .03, "sigma %g realised %g", sigmas[i],
                  v.realised);
        cr_expect(fabs(v.weight_rms - sqrt(1 + .09 / 3)) < .01);
        cr_expect(fabs(v.strength - sigmas[i] / v.weight_rms) < .03 * v.strength);
        noise_view_close(&v);
    }
    fix_close(&f);
}

static float norms_are_one(const char *name, int layer, enum proj p, size_t i) {
    return strncmp(name, "norm", 4) ? fix_small_value(name, layer, p, i) : 1;
}
/* Spec dapo 17.7: what bf16 weights of 1 would keep of it. */
Test(noise_view, counts_what_bf16_storage_would_have_kept) {
    static const struct { double sigma, share; } rows[] = { { .01, .77 }, { .00316, .37 }, { .001, .03 }, { 1e-4, 0 } };
    struct fix f;
    struct err e = { 0 };
    struct model_conf c = wide_conf();
    fix_open(&f, "ref", 1, &c, MODEL_QUANT_F32, norms_are_one);
    for (size_t i = 0; i < COUNT_OF(rows); i++) {
        struct noise_view v;
        cr_assert_eq(noise_view_open(&v, &f.model, NULL, rows[i].sigma, 1, i, &e), 0, "%s", e.text);
        cr_expect(fabs((double)v.changed_bf16 / N - rows[i].share) < .02, "sigma %g: %g", rows[i].sigma,
                  (double)v.changed_bf16 / N);
        noise_view_close(&v);
    }
    fix_close(&f);
}

Test(noise_view, is_a_function_of_its_key_and_never_touches_the_weights) {
    struct fix f;
    struct err e = { 0 };
    struct model_conf c = wide_conf();
    fix_open(&f, "ref", 1, &c, MODEL_QUANT_F32, fix_small_value);
    static float one[N], again[N], version[N], seed[N], before[254], after[254], drawn[254];
    struct {
        uint64_t seed, version;
        float *to;
    } draws[] = { { 1, 2, one }, { 1, 2, again }, { 1, 3, version }, { 2, 2, seed } };
    f.kern.download(&f.kern, before, f.model.layer[3].norm_post, sizeof before);
    for (size_t i = 0; i < COUNT_OF(draws); i++) {
        struct noise_view v;
        cr_assert_eq(noise_view_open(&v, &f.model, NULL, .01, draws[i].seed, draws[i].version, &e), 0,
                     "%s", e.text);
        f.kern.download(&f.kern, draws[i].to, v.dw, sizeof one);
        noise_view_close(&v);
        cr_expect_null(noise_view_dw(&v, 0, 254).p);
    }
    f.kern.download(&f.kern, after, f.model.layer[3].norm_post, sizeof after);
    cr_expect(memcmp(before, after, sizeof before) == 0);
    cr_expect(memcmp(one, again, sizeof one) == 0);
    cr_expect(memcmp(one, version, sizeof one) != 0);
    cr_expect(memcmp(one, seed, sizeof one) != 0);
    /* every norm has its own draw, which anyone makes again from the key */
    cr_expect(memcmp(one, one + 254, 254 * sizeof(float)) != 0);
    noise_draw(drawn, 0, 254, .01, 1, 2, 7);
    cr_expect(memcmp(drawn, one + 7 * 254, sizeof drawn) == 0);
    fix_close(&f);
}

Test(noise_view, multipliers_scale_each_layer_and_nothing_else) {
    struct fix f;
    struct err e = { 0 };
    struct model_conf c = wide_conf();
    static float dw[N], plain[254];
    struct noise_view v;
    fix_open(&f, "ref", 1, &c, MODEL_QUANT_F32, fix_small_value);
    const struct noise_target t = target_of(&c, "norms", "4-7:1.5, 8-11:0.5", 0);
    cr_assert_eq(noise_view_open(&v, &f.model, &t, .02, 1, 2, &e), 0, "%s", e.text);
    f.kern.download(&f.kern, dw, v.dw, sizeof dw);
    cr_expect_eq(v.elements, 16 * 254);
    cr_expect(fabs(v.realised / .02 - 1) < .05, "realised %g", v.realised);
    for (int norm = 0; norm < 33; norm++) {
        const double m = norm / 2 >= 4 && norm / 2 < 8 ? 1.5 : norm / 2 >= 8 && norm / 2 < 12 ? .5 : 0;
        noise_draw(plain, 0, 254, m * .02, 1, 2, norm);
        if (m == 0) memset(plain, 0, sizeof plain);
        cr_expect(memcmp(plain, dw + norm * 254, sizeof plain) == 0, "norm %d", norm);
        const double layer = (double)v.layer_rms[norm / 2];
        cr_expect(m == 0 ? layer == 0 : fabs(layer / (m * .02) - 1) < 6 / sqrt(2. * 508), "layer %d: %g", norm / 2, layer);
    }
    noise_view_close(&v);
    fix_close(&f);
}

Test(noise_view, linears_carry_their_draws_rounded_once) {
    static const enum model_quant quants[] = { MODEL_QUANT_BF16, MODEL_QUANT_MXFP4, MODEL_QUANT_NVFP4,
                                               MODEL_QUANT_F32 };
    static const double sigmas[] = { .1, .01, 1e-4, 1e-6 };
    struct model_conf c = fix_small_conf();
    const struct noise_target t = target_of(&c, "down_proj, layers.1.q_proj", "1-2:0.5", 1);
    for (size_t q = 0; q < COUNT_OF(quants); q++)
        for (size_t s = 0; s < COUNT_OF(sigmas); s++) {
            struct fix f;
            struct err e = { 0 };
            struct noise_view v;
            fix_open(&f, "ref", 2, &c, quants[q], fix_small_value);
            cr_assert_eq(noise_view_open(&v, &f.model, &t, sigmas[s], 5, 6, &e), 0, "%s", e.text);
            cr_expect_eq(v.elements, 3 * c.dim * c.ffn_dim + c.dim * c.heads * c.head_dim);
            cr_expect_eq(v.elements, t.elements);
            cr_expect(fabs(v.realised / sigmas[s] - 1) < .05, "realised %g of %g", v.realised, sigmas[s]);
            cr_expect_gt(v.changed, v.elements * (sigmas[s] > 1e-5 ? 99 : 90) / 100);
            cr_expect_null(v.dw.p);
            for (int l = 0; l < c.layers; l++)
                for (enum proj p = 0; p < PROJ_COUNT; p++) {
                    const struct kern_weight *w = noise_view_linear(&v, l, p);
                    cr_assert_eq(w != NULL, p == PROJ_DOWN || (l == 1 && p == PROJ_Q));
                    if (!w) continue;
                    float *drawn = malloc((size_t)w->out * (size_t)w->in * sizeof *drawn);
                    float third;
                    noise_draw(drawn, 0, (size_t)w->out * (size_t)w->in, (l ? .5 : 1) * sigmas[s], 5, 6,
                               noise_tensor_linear(&c, l, p));
                    noise_draw_linear(&third, 3, 1, (l ? .5 : 1) * sigmas[s], 5, 6, noise_tensor_linear(&c, l, p));
                    cr_assert_eq(third, bf16_to_f32(f32_to_bf16(drawn[3])));
                    for (int o = 0; o < w->out; o++)
                        for (int i = 0; i < w->in; i++)
                            cr_assert_eq(pack_get(w->data.p, w->format, w->out, w->in, o, i),
                                         bf16_to_f32(f32_to_bf16(drawn[o * w->in + i])));
                    free(drawn);
                }
            noise_view_close(&v);
            cr_expect_null(v.linear);
            fix_close(&f);
        }
}

static int allocs;
static int (*alloc_real)(struct kern *, kptr *, size_t, struct err *);
static int alloc_count(struct kern *k, kptr *out, size_t bytes, struct err *e) {
    allocs++;
    return alloc_real(k, out, bytes, e);
}
/* All that the passes read. */
static void expect_same_noise(struct fix *f, const struct noise_view *a, const struct noise_view *b) {
    const struct model_conf *c = &f->model.conf;
    cr_assert_eq(a->dw.p != NULL, b->dw.p != NULL);
    if (a->dw.p) cr_expect(memcmp(a->dw.p, b->dw.p, (size_t)((2 * c->layers + 1) * c->dim) * sizeof(float)) == 0);
    for (int l = 0; l < c->layers; l++)
        for (enum proj p = 0; p < PROJ_COUNT; p++) {
            const struct kern_weight *x = noise_view_linear(a, l, p), *y = noise_view_linear(b, l, p);
            cr_assert_eq(x != NULL, y != NULL);
            if (x) cr_expect(memcmp(x->data.p, y->data.p, kern_weight_bytes(x->format, x->out, x->in)) == 0);
        }
}
/* A device's graphs keep addresses: versions change what lies there. */
Test(noise_view, a_renewed_view_is_a_new_one_in_the_same_place) {
    struct model_conf c = fix_small_conf();
    const struct noise_target all = target_of(&c, "norms, linears", "", 1), some = target_of(&c, "down_proj", "", 1);
    static const struct { double sigma; bool all; } step[] = {
        { .01, true }, { 0, true }, { .02, true }, { .01, false }, { .02, true },
    };
    struct fix f;
    struct err e = { 0 };
    struct noise_view v = { 0 };
    void *place = NULL;
    fix_open(&f, "ref", 2, &c, MODEL_QUANT_BF16, fix_small_value);
    cr_assert_lt(noise_view_plan(&c, MODEL_QUANT_BF16, &some), noise_view_plan(&c, MODEL_QUANT_BF16, &all));
    alloc_real = f.kern.alloc;
    for (size_t i = 0; i < COUNT_OF(step); i++) {
        const struct noise_target *t = step[i].all ? &all : &some;
        struct noise_view fresh;
        allocs = 0;
        f.kern.alloc = alloc_count;
        cr_assert_eq(noise_view_renew(&v, &f.model, t, step[i].sigma, 5, i, &e), 0, "%s", e.text);
        f.kern.alloc = alloc_real;
        cr_expect_eq(allocs, i == 0, "%zu", i);
        if (i == 0) place = v.mem.p;
        cr_expect_eq(v.mem.p, place);
        cr_expect_eq(v.dw.p != NULL, step[i].sigma > 0 && step[i].all);
        cr_expect_eq(v.linear != NULL, step[i].sigma > 0);
        if (step[i].sigma == 0) continue;
        cr_assert_eq(noise_view_open(&fresh, &f.model, t, step[i].sigma, 5, i, &e), 0, "%s", e.text);
        expect_same_noise(&f, &v, &fresh);
        cr_expect_eq(v.realised, fresh.realised);
        cr_expect_eq(v.linear[0][PROJ_DOWN].data.p == place, !step[i].all);
        noise_view_close(&fresh);
    }
    noise_view_close(&v);
    cr_expect(!v.mem.p && !v.linear);
    fix_close(&f);
}

static float norms_are_huge(const char *name, int layer, enum proj p, size_t i) {
    return strncmp(name, "norm", 4) ? fix_small_value(name, layer, p, i) : 1e6f;
}
Test(noise_view, says_when_a_treatment_did_not_happen) {
    struct fix f;
    struct err e = { 0 };
    struct model_conf c = wide_conf();
    struct noise_view v;
    fix_open(&f, "ref", 1, &c, MODEL_QUANT_F32, fix_small_value);
    cr_expect_eq(noise_view_open(&v, &f.model, NULL, 0, 1, 1, &e), 0);
    cr_expect(!v.dw.p && v.realised == 0 && v.changed == 0);
    cr_expect_eq(noise_view_open(&v, &f.model, NULL, 1e-12, 1, 1, &e), -1);
    cr_expect(strstr(e.text, "not one of"), "%s", e.text);
    cr_expect_null(v.dw.p);
    cr_expect_eq(noise_view_open(&v, &f.model, NULL, -1, 1, 1, &e), -1);
    cr_expect_eq(noise_view_open(&v, &f.model, NULL, (double)NAN, 1, 1, &e), -1);
    fix_close(&f);
    /* f32 numbers near 1e6 are 1/16 apart: most of the noise is lost in w + dw, and that is said */
    fix_open(&f, "ref", 1, &c, MODEL_QUANT_F32, norms_are_huge);
    cr_expect_eq(noise_view_open(&v, &f.model, NULL, .015, 1, 1, &e), -1);
    cr_expect(strstr(e.text, "was intended") && strstr(e.text, "was realised"), "%s", e.text);
    fix_close(&f);
}

/* A second product carries it into the forward pass, where a sum in f32 loses it. */
Test(noise_view, noise_on_linears_that_f32_does_not_keep_is_refused) {
    static const struct { double sigma; const char *says; } cases[] = {
        { 1e-9, "f32 keeps nothing of it" }, { 1e-15, "not one of" }, { 1e-7, NULL },
    };
    struct fix f;
    struct noise_view v;
    struct model_conf c = fix_small_conf();
    const struct noise_target t = target_of(&c, "linears", "", 1);
    fix_open(&f, "ref", 1, &c, MODEL_QUANT_F32, fix_small_value);
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        struct err e = { 0 };
        cr_expect_eq(noise_view_open(&v, &f.model, &t, cases[i].sigma, 1, 1, &e), cases[i].says ? -1 : 0, "%g: %s",
                     cases[i].sigma, e.text);
        cr_expect(!cases[i].says || strstr(e.text, cases[i].says), "%g: %s", cases[i].sigma, e.text);
        if (!cases[i].says) cr_expect(v.changed < v.elements, "what is not w in f32 counts, not what was drawn");
        if (!cases[i].says) noise_view_close(&v);
    }
    fix_close(&f);
}

/* Failure 27: sigma .05 and .01 once fell on linear weights of deviation .02. */
Test(noise_view, noise_larger_than_the_weights_is_refused) {
    struct fix f;
    struct noise_view v;
    struct model_conf c = fix_small_conf();
    const struct noise_target t = target_of(&c, "norms, linears", "", 1);
    fix_open(&f, "ref", 1, &c, MODEL_QUANT_BF16, fix_small_value);
    struct err e = { 0 };
    cr_expect_eq(noise_view_open(&v, &f.model, &t, .3, 1, 1, &e), -1);
    cr_expect_eq(e.code, EXIT_CONFIG);
    cr_expect(strstr(e.text, "of the linear weights"), "%s", e.text);
    cr_expect(!v.dw.p && !v.linear);
    cr_expect_eq(noise_view_open(&v, &f.model, &t, .2, 1, 1, &e), 0);
    cr_expect(v.strength > .7 && v.strength < .85, "strength %g", v.strength);
    noise_view_close(&v);
    fix_close(&f);
}
