/* net_quant.c - 4-bit inputs inside the net: what each product reads, what its result is, what the
 * gradients are.
 *
 * The spies stand in the kernel table: they see every product with its operands, do the quantised
 * ones again by hand, and call the real operation.
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>
#include <math.h>

#include "kernels/cpu.h"
#include "lib/base/rng.h"
#include "lib/base/str.h"
#include "lib/model/quant.h"
#include "tests/unit/net_fixture.h"

enum { TOKENS = 24, PROMPT = 6, SEQS = 3, LONGEST = 160, WIDE = 128 };

static struct fix model;
static struct lora *adapter;
static void (*real_linear)(struct kern *, const struct kern_linear *, int);
static void (*real_quant_rows)(struct kern *, const struct kern_quant_rows *);
static struct {
    float x[TOKENS * WIDE];          /* the last rows that were quantised, before and after */
    float q[TOKENS * WIDE];
    const void *at;                  /* where the quantised ones lie */
    int by_hand, plain, adapters, heads, quantised;
    uint16_t u[TOKENS * WIDE];       /* what the first product with an adapter's A gave */
    size_t u_bytes;
} seen;

static bool is_base(const struct kern_weight *w, int *layer, int *p) {
    for (*layer = 0; *layer < model.model.conf.layers; ++*layer)
        for (*p = 0; *p < PROJ_COUNT; ++*p)
            if (model.model.layer[*layer].w[*p].data.p == w->data.p) return true;
    return false;
}

/* Rows of x through the packing of weights and back. */
static void by_packing(const float *x, int rows, int dim, float *q) {
    static uint8_t codes[WIDE], scales[WIDE];
    const enum model_rounding r = model.model.rounding;
    struct err e = { 0 };
    for (int i = 0; i < rows; i++, x += dim, q += dim) {
        float most = 0;
        for (int k = 0; k < dim; k++) most = fmaxf(most, fabsf(x[k]));
        const float t = quant_nvfp4_tensor_scale(most, r);
        if (model.model.activations == MODEL_QUANT_MXFP4) {
            cr_assert_eq(quant_mxfp4(x, 1, dim, r, codes, scales, NULL, &e), 0, "%s", e.text);
            quant_mxfp4_back(codes, scales, 1, dim, q);
        } else {
            cr_assert_eq(quant_nvfp4(x, 1, dim, r, t, codes, scales, NULL, &e), 0, "%s", e.text);
            quant_nvfp4_back(codes, scales, t, 1, dim, q);
        }
    }
}

static void spy_quant_rows(struct kern *k, const struct kern_quant_rows *a) {
    const size_t n = (size_t)a->rows * (size_t)a->dim;
    cr_assert(a->rows <= TOKENS && a->dim <= WIDE);
    cr_expect_neq(a->x.p, a->y.p, "the input itself was overwritten");
    for (size_t i = 0; i < n; i++) seen.x[i] = cpu_get(a->x, a->type, i);
    real_quant_rows(k, a);
    by_packing(seen.x, a->rows, a->dim, seen.q);
    for (size_t i = 0; i < n; i++) {
        const float got = cpu_get(a->y, a->type, i);
        cr_assert_float_eq(got, seen.q[i], fabsf(seen.q[i]) * 0x1p-8f);       /* bf16 again */
        seen.q[i] = got;
    }
    seen.at = a->y.p;
    seen.quantised++;
}

/* y = (W dequantised) (x dequantised) + b [+ y], in double. */
static void check_by_hand(const struct kern_linear *a, const float *before) {
    for (int r = 0; r < a->rows; r++)
        for (int o = 0; o < a->w.out; o++) {
            double sum = 0, size = 0;
            for (int k = 0; k < a->w.in; k++) {
                const double w = (double)pack_get(a->w.data.p, a->w.format, a->w.out, a->w.in, o, k);
                const double t = w * (double)a->w.scale * (double)seen.q[r * a->w.in + k];
                sum += t;
                size += fabs(t);
            }
            if (a->bias.p) sum += (double)((const float *)a->bias.p)[o];
            if (a->accumulate) sum += (double)before[r * a->w.out + o];
            const double y = (double)((const float *)a->y.p)[r * a->y_ld + o];
            cr_assert(fabs(y - sum) <= 2e-6 * (size + fabs(sum)), "row %d, output %d: %.9g, not %.9g",
                      r, o, y, sum);
        }
}

static void spy_linear(struct kern *k, const struct kern_linear *a, int n) {
    static float before[KERN_LINEARS_MAX][TOKENS * WIDE];
    int layer, p;
    for (int i = 0; i < n; i++)
        if (a[i].accumulate)
            memcpy(before[i], a[i].y.p, (size_t)a[i].rows * (size_t)a[i].y_ld * sizeof(float));
    real_linear(k, a, n);
    for (int i = 0; i < n; i++) {
        if (is_base(&a[i].w, &layer, &p)) {
            const bool quant = model.model.layer[layer].quant_in[p];
            cr_assert_eq(a[i].x.p == seen.at, quant, "layer %d, %s", layer, model_proj_name[p]);
            if (quant && !a[i].b.out) check_by_hand(&a[i], before[i]);
            *(quant ? &seen.by_hand : &seen.plain) += 1;
            continue;
        }
        cr_expect_neq(a[i].x.p, seen.at, "an adapter or the head read a quantised input");
        if (a[i].w.data.p == model.model.head.data.p) seen.heads++;
        else if (!seen.adapters++) {
            seen.u_bytes = (size_t)a[i].rows * (size_t)a[i].w.out * sizeof *seen.u;
            memcpy(seen.u, a[i].y.p, seen.u_bytes);
        }
    }
}

/* One pass of TOKENS rows through the small model, watched. */
static void watched_pass(enum model_quant weights, enum model_quant a, enum model_rounding r,
                         bool some, bool adapted) {
    const struct model_conf c = fix_small_conf();
    struct net_row row[TOKENS];
    struct net *n;
    struct err e = { 0 };
    memset(&seen, 0, sizeof seen);
    fix_open(&model, "auto", 1, &c, weights, fix_small_value);
    fix_activations(&model, a, r, some);
    adapter = fix_lora(&c, 4, 8, .2f, 7);
    real_linear = model.kern.linear;
    real_quant_rows = model.kern.quant_rows;
    model.kern.linear = spy_linear;
    model.kern.quant_rows = spy_quant_rows;
    struct net_opts o = { .rows_max = TOKENS, .slots_max = 1, .positions_max = TOKENS,
                          .lora = adapter->shape };
    cr_assert_eq(net_create(&n, &model.model, &o, &e), 0, "%s", e.text);
    cr_assert_eq(net_adopt(n, adapted ? adapter : NULL, NULL, &e), 0, "%s", e.text);
    const int slot = net_slot_open(n);
    for (int i = 0; i < TOKENS; i++)
        row[i] = (struct net_row){ .token = i * 7 % c.vocab, .slot = slot, .pos = i };
    float *logits = mem_alloc(TOKENS * (size_t)c.vocab * sizeof *logits);
    const int32_t want[] = { 3, TOKENS - 1 };
    cr_assert_eq(net_forward(n, row, TOKENS, want, 2, &e), 0, "%s", e.text);
    cr_assert_eq(net_logits(n, logits, &e), 0, "%s", e.text);
    free(logits);
    net_destroy(&n);
    lora_destroy(&adapter);
    fix_close(&model);
}

static const struct { enum model_quant weights, activations; enum model_rounding rounding; }
    formats[] = {
        { MODEL_QUANT_MXFP4, MODEL_QUANT_MXFP4, MODEL_ROUNDING_OCP },
        { MODEL_QUANT_NVFP4, MODEL_QUANT_NVFP4, MODEL_ROUNDING_OCP },
        { MODEL_QUANT_NVFP4, MODEL_QUANT_NVFP4, MODEL_ROUNDING_SEED },
        { MODEL_QUANT_BF16, MODEL_QUANT_MXFP4, MODEL_ROUNDING_OCP },
    };

Test(net_quant, products_by_hand,
     .description = "each of the 7 x layers products is (W dequantised) x (row dequantised), the "
                    "head's is not; modules left alone read their input as it is") {
    const int all = fix_small_conf().layers * PROJ_COUNT;
    for (size_t i = 0; i < COUNT_OF(formats); i++)
        for (int some = 0; some < 2; some++) {
            watched_pass(formats[i].weights, formats[i].activations, formats[i].rounding, some,
                         false);
            const int alone = some ? 4 : 0;      /* (layer + projection) % 5 == 3 in 3 layers */
            cr_expect_eq(seen.by_hand, all - alone, "%d products of %d", seen.by_hand, all);
            cr_expect_eq(seen.plain, alone);
            cr_expect(seen.heads == 1 && seen.adapters == 0);
        }
    watched_pass(MODEL_QUANT_MXFP4, MODEL_QUANT_BF16, MODEL_ROUNDING_OCP, false, false);
    cr_expect(seen.plain == all && seen.by_hand == 0 && seen.quantised == 0,
              "W4A16 quantises no input");
}

Test(net_quant, adapters_read_their_input_as_it_is,
     .description = "the adapter's product of the first layer has the same bits with 4-bit inputs "
                    "and without") {
    static uint16_t u[TOKENS * WIDE];
    watched_pass(MODEL_QUANT_MXFP4, MODEL_QUANT_BF16, MODEL_ROUNDING_OCP, false, true);
    cr_assert(seen.adapters == 4 * fix_small_conf().layers && seen.u_bytes);
    memcpy(u, seen.u, seen.u_bytes);
    watched_pass(MODEL_QUANT_MXFP4, MODEL_QUANT_MXFP4, MODEL_ROUNDING_OCP, false, true);
    cr_expect_eq(memcmp(u, seen.u, seen.u_bytes), 0);
    cr_expect_eq(seen.by_hand, fix_small_conf().layers * PROJ_COUNT);
}

/* ---- gradients ---- */

static void loss(void *ud, int seq, int first, int count, const float *lp, const float *entropy,
                 float *coef) {
    (void)ud, (void)lp, (void)entropy, (void)seq;
    for (int i = 0; i < count; i++) coef[i] = 1 + .1f * (float)((first + i) % 7);
}

struct text { int32_t ids[SEQS][LONGEST]; struct net_seq seq[SEQS]; };
static void text_fill(struct text *t, int vocab) {
    for (int s = 0; s < SEQS; s++) {
        for (int i = 0; i < TOKENS; i++)
            t->ids[s][i] = (int32_t)(rng_mix64((uint64_t)(s * 1000 + i)) % (uint64_t)vocab);
        t->seq[s] = (struct net_seq){ .ids = t->ids[s], .n = TOKENS, .prompt_n = PROMPT };
    }
}

static struct net *net_for(const struct model *m, const struct lora *l) {
    struct net *n;
    struct err e = { 0 };
    struct net_opts o = { .rows_max = SEQS * LONGEST, .slots_max = SEQS, .positions_max = LONGEST,
                          .train = true, .lora = l->shape };
    cr_assert_eq(net_create(&n, m, &o, &e), 0, "%s", e.text);
    cr_assert_eq(net_adopt(n, l, NULL, &e), 0, "%s", e.text);
    return n;
}

static float *gradient(const struct model *m, const struct lora *l, const struct text *t) {
    struct err e = { 0 };
    struct net *n = net_for(m, l);
    float *g = mem_alloc(l->params * sizeof *g);
    cr_assert_eq(net_train(n, t->seq, SEQS, 1, loss, NULL, g, &e), 0, "%s", e.text);
    net_destroy(&n);
    return g;
}

/* Projections that move the residual stream a little: the loss is smooth over the rounding's size. */
static float calm_value(const char *name, int layer, enum proj p, size_t i) {
    return (strstr(name, "_proj") ? .35f : 1.f) * fix_small_value(name, layer, p, i);
}

static float *gradient_of_small(enum model_quant weights, enum model_quant activations, size_t *n) {
    const struct model_conf c = fix_small_conf();
    struct fix f;
    struct text t;
    fix_open(&f, "auto", 1, &c, weights, calm_value);
    fix_activations(&f, activations, MODEL_ROUNDING_OCP, false);
    struct lora *l = fix_lora(&c, 4, 8, .2f, 7);
    text_fill(&t, c.vocab);
    float *g = gradient(&f.model, l, &t);
    *n = l->params / (size_t)c.layers;               /* the first layer's come first */
    lora_destroy(&l);
    fix_close(&f);
    return g;
}

static double cosine(const float *a, const float *b, size_t n) {
    double ab = 0, aa = 0, bb = 0;
    for (size_t i = 0; i < n; i++) {
        ab += (double)a[i] * (double)b[i];
        aa += (double)a[i] * (double)a[i];
        bb += (double)b[i] * (double)b[i];
    }
    return ab / sqrt(aa * bb);
}

Test(net_quant, gradients_pass_straight_through,
     .description = "with 4-bit weights, inputs or both the first layer's gradient is not zero and "
                    "points where the unquantised one does") {
    static const struct { const char *name; enum model_quant weights, activations; } mode[] = {
        { "weights, MXFP4", MODEL_QUANT_MXFP4, MODEL_QUANT_BF16 },
        { "input, MXFP4", MODEL_QUANT_BF16, MODEL_QUANT_MXFP4 },
        { "both, MXFP4", MODEL_QUANT_MXFP4, MODEL_QUANT_MXFP4 },
        { "weights, NVFP4", MODEL_QUANT_NVFP4, MODEL_QUANT_BF16 },
        { "input, NVFP4", MODEL_QUANT_BF16, MODEL_QUANT_NVFP4 },
        { "both, NVFP4", MODEL_QUANT_NVFP4, MODEL_QUANT_NVFP4 },
    };
    size_t n;
    float *want = gradient_of_small(MODEL_QUANT_BF16, MODEL_QUANT_BF16, &n);
    for (size_t i = 0; i < COUNT_OF(mode); i++) {
        float *got = gradient_of_small(mode[i].weights, mode[i].activations, &n);
        const double c = cosine(want, got, n);
        fprintf(stderr, "gradient of the first layer, 4-bit %-14s cosine %.3f\n", mode[i].name, c);
        cr_expect(c > .9 && c < 1 - 1e-6, "%s: cosine %.4f", mode[i].name, c);
        free(got);
    }
    free(want);
}

/* Value of a projection as MXFP4 holds it, exact in bf16. */
static float kept_value(const char *name, int layer, enum proj p, size_t i) {
    static float back[WIDE * WIDE];
    static uint8_t codes[WIDE * WIDE], scales[WIDE * WIDE];
    static int have_layer = -1, have_p;
    const struct model_conf c = fix_small_conf();
    if (!strstr(name, "_proj")) return fix_small_value(name, layer, p, i);
    if (have_layer != layer || have_p != (int)p) {
        int out, in;
        struct err e = { 0 };
        model_proj_shape(&c, p, &out, &in);
        float *x = mem_alloc((size_t)(out * in) * sizeof *x);
        for (int k = 0; k < out * in; k++) x[k] = fix_small_value(name, layer, p, (size_t)k);
        cr_assert_eq(quant_mxfp4(x, out, in, MODEL_ROUNDING_OCP, codes, scales, NULL, &e), 0);
        quant_mxfp4_back(codes, scales, out, in, back);
        free(x);
        have_layer = layer;
        have_p = (int)p;
    }
    return back[i];
}

Test(net_quant, the_backward_uses_the_weights_of_the_forward,
     .description = "4-bit weights give the gradient of a bf16 model that holds their values, bit by "
                    "bit, with 4-bit inputs and without") {
    const struct model_conf c = fix_small_conf();
    struct lora *l = fix_lora(&c, 4, 8, .2f, 7);
    struct text t;
    text_fill(&t, c.vocab);
    for (int a = 0; a < 2; a++) {
        float *g[2];
        for (int i = 0; i < 2; i++) {
            struct fix f;
            fix_open(&f, "auto", 2, &c, i ? MODEL_QUANT_BF16 : MODEL_QUANT_MXFP4,
                     i ? kept_value : fix_small_value);
            fix_activations(&f, a ? MODEL_QUANT_MXFP4 : MODEL_QUANT_BF16, MODEL_ROUNDING_OCP, false);
            g[i] = gradient(&f.model, l, &t);
            fix_close(&f);
        }
        cr_expect_eq(memcmp(g[0], g[1], l->params * sizeof *g[0]), 0, "4-bit inputs: %d", a);
        free(g[0]);
        free(g[1]);
    }
    lora_destroy(&l);
}

/* ---- finite differences, what rounding took off held as it was ---- */

static struct { float *off; size_t n, most; bool replay; } held;

static void hold_quant_rows(struct kern *k, const struct kern_quant_rows *a) {
    const size_t n = (size_t)a->rows * (size_t)a->dim;
    const float *x = a->x.p;
    float *y = a->y.p;
    cr_assert(a->type == KERN_F32 && held.n + n <= held.most);
    for (size_t i = 0; i < n && !held.replay; i++) held.off[held.n + i] = -x[i];     /* y may be x */
    if (!held.replay) real_quant_rows(k, a);
    for (size_t i = 0; i < n; i++, held.n++) {
        if (held.replay) y[i] = x[i] + held.off[held.n];
        else held.off[held.n] += y[i];
    }
}

static double loss_of(struct net *n, const struct lora *l, const struct text *t) {
    static float lp[SEQS * TOKENS];
    struct err e = { 0 };
    double sum = 0;
    cr_assert_eq(net_adopt(n, l, NULL, &e), 0, "%s", e.text);
    held.n = 0;
    cr_assert_eq(net_logprobs(n, t->seq, SEQS, 1, lp, NULL, &e), 0, "%s", e.text);
    const float *at = lp;
    for (int s = 0; s < SEQS; s++)
        for (int i = 0; i < TOKENS - PROMPT; i++) {
            float coef, entropy = 0;
            loss(NULL, s, i, 1, at, &entropy, &coef);
            sum += (double)coef * (double)*at++;
        }
    return sum;
}

/* The largest gradient of each A and B against a difference quotient. */
static void check_differences(struct net *n, struct lora *l, const struct text *t, const float *g) {
    const double h = 4e-3;
    double worst = 0;
    for (int layer = 0; layer < l->conf.layers; layer++)
        for (int half = 0; half < 2 * PROJ_COUNT; half++) {
            size_t from, to, a, b;
            int out, in;
            const enum proj p = (enum proj)(half / 2);
            model_proj_shape(&l->conf, p, &out, &in);
            lora_offsets(l, layer, p, &a, &b);
            from = half % 2 ? b : a;
            to = from + (size_t)l->shape.rank * (size_t)(half % 2 ? out : in);
            size_t at = from;
            for (size_t i = from; i < to; i++)
                if (fabsf(g[i]) > fabsf(g[at])) at = i;
            const float kept = l->value[at];
            l->value[at] = kept + (float)h;
            const double up = loss_of(n, l, t);
            l->value[at] = kept - (float)h;
            const double down = loss_of(n, l, t);
            l->value[at] = kept;
            const double d = (up - down) / (2 * h), off = fabs(d - (double)g[at]) / fabs(d);
            worst = fmax(worst, off);
            cr_expect(off < .02, "layer %d, %s of %s: %.5g, but differences say %.5g", layer,
                      half % 2 ? "B" : "A", model_proj_name[p], (double)g[at], d);
        }
    fprintf(stderr, "gradients against finite differences: at most %.2g off\n", worst);
}

Test(net_quant, gradients_are_those_of_held_rounding,
     .description = "straight-through is exact: with what rounding took off held constant, finite "
                    "differences agree for the adapter of each projection and layer, whether it "
                    "reads rounded inputs itself or not") {
    const struct model_conf c = fix_small_conf();
    for (int i = 0; i < 4; i++) {
        const enum model_quant q = i % 2 ? MODEL_QUANT_NVFP4 : MODEL_QUANT_MXFP4;
        struct fix f;
        struct text t;
        struct err e = { 0 };
        fix_open(&f, "auto", 1, &c, MODEL_QUANT_F32, calm_value);
        fix_activations(&f, q, MODEL_ROUNDING_OCP, false);
        if (i >= 2) fix_adapter(&f, q, MODEL_ROUNDING_OCP, false);
        f.model.adapter = MODEL_QUANT_BF16;          /* only what it reads: its values are moved */
        struct lora *l = fix_lora(&c, 4, 8, .2f, 7);
        held.most = (size_t)(SEQS * TOKENS) * (size_t)c.layers * 12 * WIDE;
        held.off = mem_alloc(held.most * sizeof *held.off);
        held.n = 0;
        held.replay = false;
        real_quant_rows = f.kern.quant_rows;
        f.kern.quant_rows = hold_quant_rows;
        text_fill(&t, c.vocab);
        struct net *n = net_for(&f.model, l);
        float *g = mem_alloc(l->params * sizeof *g);
        cr_assert_eq(net_train(n, t.seq, SEQS, 1, loss, NULL, g, &e), 0, "%s", e.text);
        cr_assert_gt(held.n, 0);
        held.replay = true;
        check_differences(n, l, &t, g);
        net_destroy(&n);
        lora_destroy(&l);
        fix_close(&f);
        free(held.off);
        free(g);
    }
}
