/* net_toy.c - the toy transformer of spec dapo 17.13: forward, log-probs, gradients, noise, against
 * printed numbers. Left out: the rows of norm gradients (norm weights are never trained here).
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/unit/net_fixture.h"

#include <criterion/criterion.h>
#include <math.h>

static const int32_t ids[] = { 1, 4, 2, 7, 3, 9 };
static const double base_pos0[] = { 1.249335973, .307179520,  -.875589844, -1.372511985,
                                    -.794349097, .406025351,  1.288361208, 1.161527119,
                                    .124871891,  -1.009595161 };
static const double base_pos5[] = { -1.163247485, -1.616423251, -.803458934, .638852654,
                                    1.580752637,  1.284453236,  -.017955008, -1.306299141,
                                    -1.571422592, -.605654857 };
static const double lora_pos5[] = { -1.216446967, -1.572560996, -.696892132, .724650508,
                                    1.578576309,  1.196007438,  -.123390915, -1.346137489,
                                    -1.514458107, -.496507671 };
static const double lora_pos2[] = { -.915160841,  -1.591867861, -1.021668971, .348800538,
                                    1.446055503,  1.410618994,  .270248336,   -1.081807133,
                                    -1.586485919, -.848474456 };
static const double lp_base[] = { -3.604672158, -2.738655200, -3.657528542 };
static const double lp_lora[] = { -3.647384281, -2.933612118, -3.522922464 };
static const double lp_lora_7[] = { -4.527623844, -3.440556271, -4.394199375 };
static const double entropy_1[] = { 1.746287644, 1.829493695, 1.649705607 };
static const double entropy_7[] = { 1.413260063, 1.663380366, 1.307756755 };
static const double lp_noise[] = { -3.662415218, -2.941241856, -3.525802179 };

static bool near(double got, double want) { return fabs(got - want) <= 1e-5 * (1 + fabs(want)); }

static void expect_all(const char *path, const char *what, const float *got, const double *want,
                       int n) {
    for (int i = 0; i < n; i++)
        cr_expect(near((double)got[i], want[i]), "%s: %s[%d] is %.9f, not %.9f", path, what, i,
                  (double)got[i], want[i]);
}

static struct lora *toy_lora(const struct model_conf *c) {
    struct lora_shape s = { .rank = 2, .alpha = 4, .on = { 1, 1, 1, 1, 1, 1, 1 } };
    struct lora *l = lora_create(c, &s, 0);
    for (int layer = 0; layer < 2; layer++)
        for (enum proj p = 0; p < PROJ_COUNT; p++) {
            size_t a, b;
            int out, in;
            model_proj_shape(c, p, &out, &in);
            lora_offsets(l, layer, p, &a, &b);
            for (int i = 0; i < 2 * in; i++)
                l->value[a + (size_t)i] = (float)(.2 * sin(.9 * i + 100 + 20 * layer + (int)p));
            for (int i = 0; i < 2 * out; i++)
                l->value[b + (size_t)i] = (float)(.05 * sin(.9 * i + 200 + 20 * layer + (int)p));
        }
    return l;
}

struct toy {
    struct fix f;
    struct net *net;
    struct lora *lora;
    const char *path;
};

static void toy_open(struct toy *t, const char *path) {
    struct err e = { 0 };
    struct model_conf c = fix_toy_conf();
    fix_open(&t->f, path, 2, &c, MODEL_QUANT_F32, fix_toy_value);
    t->path = path;
    t->lora = toy_lora(&c);
    struct net_opts o = {
        .rows_max = 16, .slots_max = 2, .positions_max = 32, .train = true, .lora = t->lora->shape
    };
    cr_assert_eq(net_create(&t->net, &t->f.model, &o, &e), 0, "%s", e.text);
}

static void toy_close(struct toy *t) {
    net_destroy(&t->net);
    lora_destroy(&t->lora);
    fix_close(&t->f);
}

static void logits(struct toy *t, float out[60]) {
    struct err e = { 0 };
    struct net_row row[6];
    int32_t want[6];
    int slot = net_slot_open(t->net);
    for (int i = 0; i < 6; i++) {
        row[i] = (struct net_row){ .token = ids[i], .slot = slot, .pos = i };
        want[i] = i;
    }
    cr_assert_eq(net_forward(t->net, row, 6, want, 6, &e), 0, "%s", e.text);
    cr_assert_eq(net_logits(t->net, out, &e), 0, "%s", e.text);
    net_slot_close(t->net, slot);
}

static void on_every_path(void (*test)(struct toy *t)) {
    const char *names[8];
    for (int i = 0, n = kern_paths(names); i < n; i++) {
        struct toy t;
        toy_open(&t, names[i]);
        test(&t);
        toy_close(&t);
    }
}

static const struct net_seq seq = { .ids = ids, .n = 6, .prompt_n = 3 };

static void forward(struct toy *t) {
    struct err e = { 0 };
    float z[60], lp[3], entropy[3];
    logits(t, z);
    expect_all(t->path, "base logits 0", z, base_pos0, 10);
    expect_all(t->path, "base logits 5", z + 50, base_pos5, 10);
    cr_assert_eq(net_logprobs(t->net, &seq, 1, 1, lp, NULL, &e), 0, "%s", e.text);
    expect_all(t->path, "base lp", lp, lp_base, 3);
    cr_assert_eq(net_adopt(t->net, t->lora, NULL, &e), 0, "%s", e.text);
    logits(t, z);
    expect_all(t->path, "lora logits 5", z + 50, lora_pos5, 10);
    expect_all(t->path, "lora logits 2", z + 20, lora_pos2, 10);
    cr_assert_eq(net_logprobs(t->net, &seq, 1, 1, lp, entropy, &e), 0, "%s", e.text);
    expect_all(t->path, "lora lp", lp, lp_lora, 3);
    expect_all(t->path, "entropy", entropy, entropy_1, 3);
    cr_assert_eq(net_logprobs(t->net, &seq, 1, .7f, lp, entropy, &e), 0, "%s", e.text);
    expect_all(t->path, "lora lp T .7", lp, lp_lora_7, 3);
    expect_all(t->path, "entropy T .7", entropy, entropy_7, 3);
}
Test(net_toy, forward_gives_the_printed_logits_logprobs_and_entropies) { on_every_path(forward); }

/* The clipped loss of 17.13 with r = 1, e^.3, e^-.3: coef = dL/dlp / 3 tokens. */
struct toy_loss { double advantage, loss; };
static void clipped(void *ud, int s, int first, int count, const float *lp, const float *entropy,
                    float *coef) {
    static const double d[] = { 0, .3, -.3 };
    struct toy_loss *l = ud;
    (void)lp, (void)entropy;
    cr_assert(s == 0 && first + count <= 3);
    for (int i = 0; i < count; i++) {
        const double a = l->advantage, r = exp(d[first + i]), clip = fmin(fmax(r, .8), 1.28);
        const double free_loss = -a * r, cut_loss = -a * clip, loss = fmax(free_loss, cut_loss);
        l->loss += loss / 3;
        coef[i] = (float)(free_loss >= cut_loss ? -a * r / 3 : 0);
    }
}

static const struct {
    int layer;
    enum proj p;
    char m;
    double norm[2], first[2], last[2];
} grads[] = {
    { 0,
      PROJ_Q,
      'A',
      { 7.823758e-3, 3.108416e-2 },
      { 1.634541e-4, 3.493252e-3 },
      { 2.287961e-3, -1.240780e-2 } },
    { 0,
      PROJ_Q,
      'B',
      { 2.492472e-1, 5.742142e-1 },
      { 1.177856e-2, 1.884562e-2 },
      { -1.510066e-2, 4.959546e-3 } },
    { 0,
      PROJ_DOWN,
      'B',
      { 3.728963e-1, 5.132156e-1 },
      { -1.016984e-1, 2.042276e-1 },
      { 1.029330e-1, -1.418107e-1 } },
    { 1,
      PROJ_V,
      'A',
      { 3.242247e-2, 2.395289e-2 },
      { -8.582032e-4, 3.480153e-3 },
      { 2.481010e-3, 4.093950e-3 } },
    { 1,
      PROJ_O,
      'B',
      { 1.658938e-1, 1.686481e-1 },
      { 2.750748e-2, 5.968332e-2 },
      { 2.826856e-2, 5.334854e-2 } },
    { 1,
      PROJ_GATE,
      'A',
      { 4.771813e-2, 2.333566e-2 },
      { 2.314121e-3, 4.764508e-3 },
      { 2.018058e-3, -1.075392e-3 } },
    { 1,
      PROJ_DOWN,
      'A',
      { 2.939639e-2, 3.035701e-2 },
      { 2.883600e-3, -4.513224e-3 },
      { -5.766090e-4, -4.725914e-3 } },
    { 1,
      PROJ_DOWN,
      'B',
      { 1.594243e-1, 2.953995e-1 },
      { -3.362886e-2, 1.359238e-1 },
      { 2.243228e-2, -5.818461e-2 } },
};

static double norm_of(const float *g, size_t n) {
    double s = 0;
    for (size_t i = 0; i < n; i++) s += (double)g[i] * (double)g[i];
    return sqrt(s);
}

static void gradient(struct toy *t) {
    static const double loss_want[] = { -1.006939407, 1.049952936 },
                        global_want[] = { 1.051790653, 2.061926126 };
    struct err e = { 0 };
    float *grad = calloc(t->lora->params, sizeof *grad);
    cr_assert_eq(net_adopt(t->net, t->lora, NULL, &e), 0, "%s", e.text);
    for (int sign = 0; sign < 2; sign++) {
        struct toy_loss loss = { sign ? -1 : 1, 0 };
        memset(grad, 0, t->lora->params * sizeof *grad);
        cr_assert_eq(net_train(t->net, &seq, 1, 1, clipped, &loss, grad, &e), 0, "%s", e.text);
        cr_expect(near(loss.loss, loss_want[sign]), "loss %.9f, not %.9f", loss.loss,
                  loss_want[sign]);
        double global = norm_of(grad, t->lora->params);
        cr_expect(near(global, global_want[sign]), "%s: global norm %.9f, not %.9f", t->path,
                  global, global_want[sign]);
        for (size_t i = 0; i < COUNT_OF(grads); i++) {
            size_t a, b;
            int out, in;
            model_proj_shape(&t->f.model.conf, grads[i].p, &out, &in);
            lora_offsets(t->lora, grads[i].layer, grads[i].p, &a, &b);
            const float *g = grad + (grads[i].m == 'A' ? a : b);
            size_t n = 2 * (size_t)(grads[i].m == 'A' ? in : out);
            const char *name = model_proj_name[grads[i].p];
            cr_expect(near(norm_of(g, n), grads[i].norm[sign]), "%s: %d %s.%c norm %g", t->path,
                      grads[i].layer, name, grads[i].m, norm_of(g, n));
            cr_expect(near((double)g[0], grads[i].first[sign]), "%s: %d %s.%c first %g", t->path,
                      grads[i].layer, name, grads[i].m, (double)g[0]);
            cr_expect(near((double)g[n - 1], grads[i].last[sign]), "%s: %d %s.%c last %g", t->path,
                      grads[i].layer, name, grads[i].m, (double)g[n - 1]);
        }
    }
    free(grad);
}
Test(net_toy, backward_gives_the_printed_gradients) { on_every_path(gradient); }

/* z_j = .01 sin(1.7 j + .3) on the four layer norms, none on the final one. */
static void noise(struct toy *t) {
    struct err e = { 0 };
    float dw[5 * 8] = { 0 }, lp[3];
    for (int i = 0; i < 32; i++) dw[i] = (float)(.01 * sin(1.7 * (i % 8) + .3));
    struct noise_view v = { .kern = &t->f.kern };
    cr_assert_eq(t->f.kern.alloc(&t->f.kern, &v.dw, sizeof dw, &e), 0);
    t->f.kern.upload(&t->f.kern, v.dw, dw, sizeof dw);
    cr_assert_eq(net_adopt(t->net, t->lora, &v, &e), 0, "%s", e.text);
    cr_assert_eq(net_logprobs(t->net, &seq, 1, 1, lp, NULL, &e), 0, "%s", e.text);
    expect_all(t->path, "noisy lp", lp, lp_noise, 3);
    cr_assert_eq(net_adopt(t->net, t->lora, NULL, &e), 0, "%s", e.text);
    cr_assert_eq(net_logprobs(t->net, &seq, 1, 1, lp, NULL, &e), 0, "%s", e.text);
    expect_all(t->path, "clean again", lp, lp_lora, 3);
    noise_view_close(&v);
}
Test(net_toy, noise_beside_the_norms_gives_the_printed_logprobs_and_leaves_no_trace) {
    on_every_path(noise);
}
