/* net_adapter.c - adapters in a 4-bit format: what the net multiplies with, its gradient, and that
 * the trained values stay as they are.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/unit/net_fixture.h"

#include <criterion/criterion.h>
#include <math.h>

#include "lib/base/fs.h"
#include "lib/base/rng.h"
#include "lib/base/str.h"
#include "lib/model/quant.h"

enum { SEQS = 3, TOKENS = 9, PROMPT = 4, RANK = 32, WIDE = 128 };

struct text { int32_t ids[SEQS][TOKENS]; struct net_seq seq[SEQS]; };
static void text_fill(struct text *t, int vocab) {
    for (int s = 0; s < SEQS; s++) {
        for (int i = 0; i < TOKENS; i++)
            t->ids[s][i] = (int32_t)(rng_mix64((uint64_t)(s * 1000 + i)) % (uint64_t)vocab);
        t->seq[s] = (struct net_seq){ .ids = t->ids[s], .n = TOKENS, .prompt_n = PROMPT };
    }
}

static const struct format { enum model_quant adapter; enum model_rounding rounding; } formats[] = {
    { MODEL_QUANT_MXFP4, MODEL_ROUNDING_OCP },
    { MODEL_QUANT_NVFP4, MODEL_ROUNDING_OCP },
    { MODEL_QUANT_NVFP4, MODEL_ROUNDING_SEED },
};

static void loss(void *ud, int seq, int first, int count, const float *lp, const float *entropy,
                 float *coef) {
    float *to = ud;
    (void)entropy;
    for (int i = 0; i < count; i++) {
        to[seq * TOKENS + first + i] = lp[i];
        coef[i] = (seq % 2 ? .3f : -.2f) * (1 + .1f * (float)(first + i));
    }
}

/* Gradient of the adapter, and each token's log-prob. */
static float *gradient(const struct model *m, const struct lora *l, float lp[SEQS * TOKENS]) {
    struct net *n;
    struct text t;
    struct err e = { 0 };
    struct net_opts o = { .rows_max = SEQS * TOKENS, .slots_max = SEQS, .positions_max = TOKENS,
                          .train = true, .lora = l->shape };
    text_fill(&t, m->conf.vocab);
    cr_assert_eq(net_create(&n, m, &o, &e), 0, "%s", e.text);
    cr_assert_eq(net_adopt(n, l, NULL, &e), 0, "%s", e.text);
    float *g = mem_alloc(l->params * sizeof *g);
    cr_assert_eq(net_train(n, t.seq, SEQS, 1, loss, lp, g, &e), 0, "%s", e.text);
    net_destroy(&n);
    return g;
}

/* One matrix through codes and back. */
static void by_hand(float *x, int out, int in, const struct format *f) {
    static uint8_t codes[WIDE * WIDE], scales[WIDE * WIDE];
    struct err e = { 0 };
    float most = 0;
    cr_assert(out <= WIDE && in <= WIDE);
    for (int i = 0; i < out * in; i++) most = fmaxf(most, fabsf(x[i]));
    const float t = quant_nvfp4_tensor_scale(most, f->rounding);
    if (f->adapter == MODEL_QUANT_MXFP4) {
        cr_assert_eq(quant_mxfp4(x, out, in, f->rounding, codes, scales, NULL, &e), 0);
        quant_mxfp4_back(codes, scales, out, in, x);
    } else {
        cr_assert_eq(quant_nvfp4(x, out, in, f->rounding, t, codes, scales, NULL, &e), 0);
        quant_nvfp4_back(codes, scales, t, out, in, x);
    }
}

static struct lora *adapter(const struct model_conf *c) {
    struct lora *l = fix_lora(c, RANK, 8, .2f, 7);
    for (size_t i = 0; i < l->params; i++) l->value[i] *= 1 + (float)(i % 7);
    return l;
}

/* The same with all matrices of even layers (or of all) rounded. */
static struct lora *rounded(const struct model_conf *c, const struct format *f, bool some) {
    struct lora *l = adapter(c);
    for (int layer = 0; layer < c->layers; layer += some ? 2 : 1)
        for (enum proj p = 0; p < PROJ_COUNT; p++) {
            size_t a, b;
            int out, in;
            model_proj_shape(c, p, &out, &in);
            lora_offsets(l, layer, p, &a, &b);
            by_hand(l->value + a, RANK, in, f);
            by_hand(l->value + b, out, RANK, f);
        }
    return l;
}

Test(net_adapter, rounded_is_as_if_it_held_the_rounded_values,
     .description = "log-probs and gradients have the bits of an adapter that holds the 4-bit values "
                    "made by hand: straight through; the trained values are not touched") {
    const struct model_conf c = fix_small_conf();
    for (size_t i = 0; i < COUNT_OF(formats); i++)
        for (int some = 0; some < 2; some++) {
            float lp[3][SEQS * TOKENS] = { 0 }, *g[3];
            struct lora *l = adapter(&c), *as_it_was = adapter(&c),
                        *hand = rounded(&c, &formats[i], some);
            struct fix f;
            fix_open(&f, "auto", 2, &c, MODEL_QUANT_MXFP4, fix_small_value);
            g[0] = gradient(&f.model, l, lp[0]);
            g[1] = gradient(&f.model, hand, lp[1]);
            fix_adapter(&f, formats[i].adapter, formats[i].rounding, some);
            g[2] = gradient(&f.model, l, lp[2]);
            cr_expect(memcmp(lp[1], lp[2], sizeof lp[1]) == 0, "format %zu, some %d", i, some);
            cr_expect(memcmp(g[1], g[2], l->params * sizeof(float)) == 0, "format %zu, some %d", i,
                      some);
            cr_expect(memcmp(lp[0], lp[2], sizeof lp[1]) != 0, "format %zu does nothing", i);
            cr_expect(memcmp(l->value, as_it_was->value, l->params * sizeof(float)) == 0);
            for (int k = 0; k < 3; k++) free(g[k]);
            fix_close(&f);
            lora_destroy(&l);
            lora_destroy(&as_it_was);
            lora_destroy(&hand);
        }
}

/* ---- what A and B read ---- */

static struct { int inputs, own; const void *xq; } seen;
static void (*real_quant_rows)(struct kern *, const struct kern_quant_rows *);
static void (*real_linear)(struct kern *, const struct kern_linear *, int);

static void spy_quant_rows(struct kern *k, const struct kern_quant_rows *a) {
    real_quant_rows(k, a);
    if (a->x.p != a->y.p) seen.xq = a->y.p;
    else {
        cr_expect_eq(a->dim, RANK, "each projection's u is a row of its own");
        seen.own++;
    }
}
static void spy_linear(struct kern *k, const struct kern_linear *a, int n) {
    if (n == 1 && a->w.out % RANK == 0 && a->y_type == KERN_BF16) seen.inputs += a->x.p == seen.xq;
    real_linear(k, a, n);
}

/* One forward and backward, inputs in MXFP4; A products that read rounded inputs, u's rounded. */
static void watched(enum model_quant a, bool some, int *inputs, int *own) {
    const struct model_conf c = fix_small_conf();
    float lp[SEQS * TOKENS];
    struct fix f;
    memset(&seen, 0, sizeof seen);
    fix_open(&f, "auto", 1, &c, MODEL_QUANT_BF16, fix_small_value);
    fix_activations(&f, MODEL_QUANT_MXFP4, MODEL_ROUNDING_OCP, false);
    if (a) fix_adapter(&f, a, MODEL_ROUNDING_OCP, some);
    real_quant_rows = f.kern.quant_rows;
    real_linear = f.kern.linear;
    f.kern.quant_rows = spy_quant_rows;
    f.kern.linear = spy_linear;
    struct lora *l = adapter(&c);
    free(gradient(&f.model, l, lp));
    lora_destroy(&l);
    fix_close(&f);
    *inputs = seen.inputs;
    *own = seen.own;
}

Test(net_adapter, with_rounded_inputs_it_reads_them_too,
     .description = "A reads the input that the weights read, B reads u rounded row by row, in each "
                    "layer that is not left alone; an adapter in full precision reads neither") {
    const int layers = fix_small_conf().layers, even = (layers + 1) / 2;
    int inputs, own;
    watched(MODEL_QUANT_NVFP4, false, &inputs, &own);
    cr_expect(inputs == 4 * layers && own == 4 * layers, "%d and %d", inputs, own);
    watched(MODEL_QUANT_NVFP4, true, &inputs, &own);
    cr_expect(inputs == 4 * even && own == 4 * even, "%d and %d", inputs, own);
    watched(MODEL_QUANT_BF16, false, &inputs, &own);
    cr_expect(inputs == 0 && own == 0, "%d and %d", inputs, own);
}

Test(net_adapter, what_was_lost_is_told) {
    const struct model_conf c = fix_small_conf();
    struct quant_stats a, b;
    struct net *n;
    struct fix f;
    struct err e = { 0 };
    fix_open(&f, "auto", 1, &c, MODEL_QUANT_BF16, fix_small_value);
    struct lora *l = adapter(&c);
    struct net_opts o = { .rows_max = 4, .slots_max = 1, .positions_max = 4, .lora = l->shape };
    cr_assert_eq(net_create(&n, &f.model, &o, &e), 0, "%s", e.text);
    cr_assert_eq(net_adopt(n, l, NULL, &e), 0, "%s", e.text);
    net_adapter_stats(n, &a, &b);
    cr_expect(a.elements == 0 && b.elements == 0);
    fix_adapter(&f, MODEL_QUANT_NVFP4, MODEL_ROUNDING_SEED, false);
    cr_assert_eq(net_adopt(n, l, NULL, &e), 0, "%s", e.text);
    net_adapter_stats(n, &a, &b);
    cr_expect_eq(a.elements + b.elements, l->params);
    cr_expect(quant_sqnr_db(&a) > 5 && quant_sqnr_db(&a) < 40, "%g", quant_sqnr_db(&a));
    /* far below the smallest scale of this rounding: nothing of B is left */
    for (size_t i = 0; i < l->params; i++) l->value[i] *= 1e-4f;
    cr_assert_eq(net_adopt(n, l, NULL, &e), 0, "%s", e.text);
    net_adapter_stats(n, &a, &b);
    cr_expect_gt(quant_zeroed(&b), .99);
    l->value[l->params - 1] = NAN;
    cr_expect_eq(net_adopt(n, l, NULL, &e), -1);
    cr_expect(strstr(e.text, "B of layer") && strstr(e.text, "cannot be read as nvfp4"), "%s",
              e.text);
    net_destroy(&n);
    lora_destroy(&l);
    fix_close(&f);
}

Test(net_adapter, a_saved_adapter_holds_the_trained_values) {
    char dir[] = "/tmp/qerl-adapter.XXXXXX", path[FS_PATH_MAX];
    const struct model_conf c = fix_small_conf();
    struct lora *l = adapter(&c), *back;
    struct net *n;
    struct fix f;
    struct err e = { 0 };
    cr_assert(mkdtemp(dir));
    fs_join(path, sizeof path, dir, "v0");
    fix_open(&f, "auto", 1, &c, MODEL_QUANT_BF16, fix_small_value);
    fix_adapter(&f, MODEL_QUANT_MXFP4, MODEL_ROUNDING_OCP, false);
    struct net_opts o = { .rows_max = 4, .slots_max = 1, .positions_max = 4, .lora = l->shape };
    cr_assert_eq(net_create(&n, &f.model, &o, &e), 0, "%s", e.text);
    cr_assert_eq(net_adopt(n, l, NULL, &e), 0, "%s", e.text);
    cr_assert_eq(lora_save(l, path, "small", &e), 0, "%s", e.text);
    cr_assert_eq(lora_load(&back, &c, path, &e), 0, "%s", e.text);
    struct lora *want = adapter(&c);
    cr_expect_eq(memcmp(want->value, back->value, want->params * sizeof(float)), 0);
    net_destroy(&n);
    lora_destroy(&l);
    lora_destroy(&back);
    lora_destroy(&want);
    fix_close(&f);
    fs_remove_tree(dir, NULL);
}
