/* selftest.c - see selftest.h. Order: the loss and its gradient, differences, layers, the verdict.
 * SPDX-License-Identifier: Apache-2.0 */
#include "stages/learner/selftest.h"

#include <math.h>

#include "lib/base/clock.h"
#include "lib/base/rng.h"
#include "lib/base/str.h"
#include "lib/model/net.h"

struct trial {
    const struct policy *p;
    struct net *net;
    struct lora *lora;
    struct net_seq seq;
    float *plain, *rounded;          /* gradients [params] */
};

/* The mean log-prob of the tokens after the first. */
static void loss(void *ud, int seq, int first, int count, const float *lp, const float *entropy,
                 float *coef) {
    const struct trial *t = ud;
    (void)seq, (void)first, (void)lp, (void)entropy;
    for (int i = 0; i < count; i++) coef[i] = 1.f / (float)(t->seq.n - 1);
}

static int gradient(struct trial *t, bool plain, float *to, struct err *e) {
    memset(to, 0, t->lora->params * sizeof *to);
    net_set_plain(t->net, plain);
    return net_adopt(t->net, t->lora, NULL, e) < 0
               ? -1
               : net_train(t->net, &t->seq, 1, 1, loss, t, to, e);
}

static int mean_lp(struct trial *t, double *mean, struct err *e) {
    float lp[SELFTEST_TOKENS];
    *mean = 0;
    if (net_adopt(t->net, t->lora, NULL, e) < 0 ||
        net_logprobs(t->net, &t->seq, 1, 1, lp, NULL, e) < 0)
        return -1;
    for (int i = 0; i < t->seq.n - 1; i++) *mean += (double)lp[i] / (t->seq.n - 1);
    return 0;
}

static double dot(const float *a, const float *b, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)a[i] * (double)b[i];
    return sum;
}

/* ---- differences ---- */

static void move(struct lora *l, const float *g, double by) {
    for (size_t i = 0; i < l->params; i++) l->value[i] += (float)(by * (double)g[i]);
}

/* A step along the gradient that should change the mean by `change` each way. */
static int quotient(struct trial *t, double squares, double change, double *out, struct err *e) {
    double up, down;
    move(t->lora, t->plain, change / squares);
    if (mean_lp(t, &up, e) < 0) return -1;
    move(t->lora, t->plain, -2 * change / squares);
    if (mean_lp(t, &down, e) < 0) return -1;
    move(t->lora, t->plain, change / squares);
    *out = (up - down) / (2 * change);
    return 0;
}

static bool is_right(double quotient_of_gradient) {
    return fabs(quotient_of_gradient - 1) <= SELFTEST_DIFFERENCE_OFF;
}

/* The first step is far above what rounding to bf16 moves the mean, and mostly little enough to be
 * straight; a wrong gradient is wrong at the others too. */
static int difference(struct trial *t, double *out, struct err *e) {
    static const double change[] = { .3, .1, 1 };
    const double squares = dot(t->plain, t->plain, t->lora->params);
    *out = 0;
    if (!(squares > 0) || !isfinite(squares)) return 0;
    for (size_t i = 0; i < COUNT_OF(change) && !is_right(*out); i++)
        if (quotient(t, squares, change[i], out, e) < 0) return -1;
    return 0;
}

/* ---- layers ---- */

static int check_layers(const struct trial *t, struct selftest *s, struct err *e) {
    const int layers = t->lora->conf.layers;
    const size_t n = t->lora->params / (size_t)layers;
    s->layer = -1;
    s->cosine = 1;
    for (int l = 0; l < layers; l++) {
        const float *plain = t->plain + (size_t)l * n,
                    *rounded = t->rounded ? t->rounded + (size_t)l * n : plain;
        const double pp = dot(plain, plain, n), rr = dot(rounded, rounded, n);
        if (!(pp > 0 && rr > 0 && isfinite(pp) && isfinite(rr)))
            return err_code(e, EXIT_ENV, "the gradient of layer %d has the norm %g", l,
                            sqrt(pp > 0 && isfinite(pp) ? rr : pp));
        const double c = dot(plain, rounded, n) / sqrt(pp * rr);
        if (!t->rounded || (s->layer >= 0 && c >= s->cosine)) continue;
        s->cosine = c;
        s->layer = l;
    }
    if (s->cosine >= SELFTEST_COSINE_LEAST) return 0;
    return err_code(e, EXIT_ENV,
                    "the straight-through gradient of layer %d has the cosine %.3f to the "
                    "unrounded one (at least %g)",
                    s->layer, s->cosine, SELFTEST_COSINE_LEAST);
}

/* ---- verdict ---- */

/* A's own first values, and a B that is not 0: else A would have no gradient. */
static int trial_open(struct trial *t, const struct policy *p, const int32_t *ids, int n,
                      struct err *e) {
    struct net_opts o = { .rows_max = n, .slots_max = 1, .positions_max = n, .train = true,
                          .lora = p->shape };
    uint64_t draw = 1;
    /* a small one costs a tenth; one in 4 bits may need the blocks of its own rank */
    if (!model_quant_rounds(p->model->adapter) && o.lora.rank > SELFTEST_RANK) {
        o.lora.alpha *= (float)SELFTEST_RANK / (float)o.lora.rank;
        o.lora.rank = SELFTEST_RANK;
    }
    *t = (struct trial){ .p = p, .seq = { .ids = ids, .n = n, .prompt_n = 1 } };
    if (net_create(&t->net, p->model, &o, e) < 0) return -1;
    t->lora = lora_create(&p->model->conf, &o.lora, 1);
    for (size_t i = 0; i < t->lora->params; i++)
        if (t->lora->value[i] == 0)
            t->lora->value[i] = .04f * ((float)((draw = rng_mix64(draw)) >> 40) * 0x1p-24f - .5f);
    t->plain = mem_alloc(t->lora->params * sizeof *t->plain);
    if (model_quant_rounds(p->model->activations) || model_quant_rounds(p->model->adapter))
        t->rounded = mem_alloc(t->lora->params * sizeof *t->rounded);
    return 0;
}

static void trial_close(struct trial *t) {
    net_destroy(&t->net);
    lora_destroy(&t->lora);
    free(t->plain);
    free(t->rounded);
}

int selftest_run(struct selftest *s, const struct policy *p, const int32_t *ids, int n,
                 struct err *e) {
    const double begun = clock_seconds();
    struct trial t;
    assert(n >= 2);
    *s = (struct selftest){ .tokens = n < SELFTEST_TOKENS ? n : SELFTEST_TOKENS };
    /* templates begin and end all prompts alike */
    int rc = trial_open(&t, p, ids + (n - s->tokens) / 2, s->tokens, e);
    if (rc == 0) rc = gradient(&t, true, t.plain, e);
    if (rc == 0) rc = difference(&t, &s->difference, e);
    if (rc == 0 && t.rounded) rc = gradient(&t, false, t.rounded, e);
    if (rc == 0) rc = check_layers(&t, s, e);
    trial_close(&t);
    s->seconds = clock_seconds() - begun;
    if (rc == 0 && !is_right(s->difference))
        rc = err_code(e, EXIT_ENV,
                      "along the gradient the loss changes by %.3f of what it says (1 +- %g)",
                      s->difference, SELFTEST_DIFFERENCE_OFF);
    return rc < 0 ? err_wrap(e, "gradient self-test on %d tokens: nothing can be trained with it",
                             s->tokens)
                  : 0;
}
