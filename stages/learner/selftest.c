/* selftest.c - see selftest.h. Order: windows, the loss and its gradient, differences, layers, the
 * verdict.
 * SPDX-License-Identifier: Apache-2.0 */
#include "stages/learner/selftest.h"

#include <math.h>

#include "lib/base/clock.h"
#include "lib/base/rng.h"
#include "lib/base/str.h"
#include "lib/model/net.h"

enum { STEPS = 2 };
struct trial {
    const struct policy *p;
    struct net *net;
    struct lora *lora;
    struct net_seq seq;
    float *at;                       /* the adapter's values: lora's are moved from there */
    float *plain, *rounded;          /* gradients [params]; rounded NULL where nothing rounds */
    bool *alive;                     /* [layers] its gradient was not 0 on some window */
    double *cosine;                  /* [layers] the highest so far */
    double quotient[STEPS][SELFTEST_WINDOWS];
    int differences;
};

/* ---- windows ---- */

int selftest_windows(struct selftest_window w[SELFTEST_WINDOWS], const struct policy *p,
                     const struct shared *c, const struct task_set *train, struct err *e) {
    struct str text;
    struct tok_ids ids = { 0 };
    int rc = 0;
    str_init(&text);
    for (int i = 0; rc == 0 && i < SELFTEST_WINDOWS; i++) {
        const int q = (int)((int64_t)i * train->n / SELFTEST_WINDOWS);
        rc = policy_prompt(p, c, train->q[q].question, &text, &ids, e);
        if (rc < 0) break;
        w[i].n = ids.n < SELFTEST_TOKENS ? ids.n : SELFTEST_TOKENS;
        /* templates begin and end all prompts alike */
        memcpy(w[i].ids, ids.id + (ids.n - w[i].n) / 2, (size_t)w[i].n * sizeof *ids.id);
    }
    free(ids.id);
    str_release(&text);
    return rc;
}

/* ---- the loss and its gradient ---- */

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

static double dot(const float *a, const float *b, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)a[i] * (double)b[i];
    return sum;
}

/* ---- differences ---- */

/* The mean log-prob at `at` + by * the gradient. */
static int mean_lp(struct trial *t, double by, double *mean, struct err *e) {
    float lp[SELFTEST_TOKENS];
    *mean = 0;
    for (size_t i = 0; i < t->lora->params; i++)
        t->lora->value[i] = t->at[i] + (float)(by * (double)t->plain[i]);
    if (net_adopt(t->net, t->lora, NULL, e) < 0 ||
        net_logprobs(t->net, &t->seq, 1, 1, lp, NULL, e) < 0)
        return -1;
    for (int i = 0; i < t->seq.n - 1; i++) *mean += (double)lp[i] / (t->seq.n - 1);
    return 0;
}

/* Steps along the gradient that should change the mean by `change` each way: in f32 too small for
 * the loss to bend, in bf16 as large as its rounding asks. */
static int difference(struct trial *t, struct selftest *s, struct err *e) {
    static const double fine[STEPS] = { .01, .003 }, coarse[STEPS] = { .1, .05 };
    const double *change = t->p->model->quant == MODEL_QUANT_F32 ? fine : coarse;
    const double squares = dot(t->plain, t->plain, t->lora->params);
    double up, down, off[STEPS];
    if (!(squares > 0)) return 0;
    for (int i = 0; i < STEPS; i++) {
        if (mean_lp(t, change[i] / squares, &up, e) < 0 ||
            mean_lp(t, -change[i] / squares, &down, e) < 0)
            return -1;
        t->quotient[i][t->differences] = (up - down) / (2 * change[i]);
        off[i] = t->quotient[i][t->differences] - 1;
    }
    const double most = SELFTEST_DIFFERENCE_OFF;
    s->difference = t->quotient[STEPS - 1][t->differences++];
    s->right += fabs(off[0]) <= most && fabs(off[1]) <= most;
    s->low += off[0] < -most && off[1] < -most;
    s->high += off[0] > most && off[1] > most;
    return 0;
}

static int by_size(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *v, int n) {
    qsort(v, (size_t)n, sizeof *v, by_size);
    return (v[(n - 1) / 2] + v[n / 2]) / 2;
}

/* All windows but one say so, none says the opposite, and it does not hang on the step. */
static bool is_wrong(struct trial *t, struct selftest *s) {
    const int least = SELFTEST_WINDOWS - 1;
    if (s->right || (s->low < least && s->high < least)) return false;
    const double large = median(t->quotient[0], t->differences);
    s->difference = median(t->quotient[1], t->differences);
    return fabs(large - s->difference) <= SELFTEST_DIFFERENCE_OFF * fmax(1, fabs(s->difference));
}

/* ---- layers ---- */

static int look_at_layers(struct trial *t, struct err *e) {
    const int layers = t->lora->conf.layers;
    const size_t n = t->lora->params / (size_t)layers;
    for (int l = 0; l < layers; l++) {
        const float *plain = t->plain + (size_t)l * n,
                    *rounded = t->rounded ? t->rounded + (size_t)l * n : plain;
        const double pp = dot(plain, plain, n), rr = dot(rounded, rounded, n);
        if (!isfinite(pp) || !isfinite(rr))
            return err_code(e, EXIT_ENV, "the gradient of layer %d has the norm %g", l,
                            sqrt(isfinite(pp) ? rr : pp));
        if (!(pp > 0 && rr > 0)) continue;
        t->alive[l] = true;
        if (t->rounded) t->cosine[l] = fmax(t->cosine[l], dot(plain, rounded, n) / sqrt(pp * rr));
    }
    return 0;
}

static int lowest(const struct trial *t) {
    int at = 0;
    for (int l = 1; l < t->lora->conf.layers; l++)
        if (t->cosine[l] < t->cosine[at]) at = l;
    return at;
}

static int dead_layer(const struct trial *t) {
    for (int l = 0; l < t->lora->conf.layers; l++)
        if (!t->alive[l]) return l;
    return -1;
}

/* ---- verdict ---- */

static int trial_open(struct trial *t, const struct policy *p, struct err *e) {
    struct net_opts o = { .rows_max = SELFTEST_TOKENS, .slots_max = 1,
                          .positions_max = SELFTEST_TOKENS, .train = true, .lora = p->shape };
    const size_t layers = (size_t)p->model->conf.layers;
    /* a small one costs a tenth; one in 4 bits may need the blocks of its own rank */
    if (!model_quant_rounds(p->model->adapter) && o.lora.rank > SELFTEST_RANK) {
        o.lora.alpha *= (float)SELFTEST_RANK / (float)o.lora.rank;
        o.lora.rank = SELFTEST_RANK;
    }
    *t = (struct trial){ .p = p };
    if (net_create(&t->net, p->model, &o, e) < 0) return -1;
    t->lora = lora_create(&p->model->conf, &o.lora, 1);
    t->at = mem_alloc(t->lora->params * sizeof *t->at);
    t->plain = mem_alloc(t->lora->params * sizeof *t->plain);
    t->alive = mem_alloc(layers * sizeof *t->alive);
    t->cosine = mem_alloc(layers * sizeof *t->cosine);
    if (model_quant_rounds(p->model->activations) || model_quant_rounds(p->model->adapter))
        t->rounded = mem_alloc(t->lora->params * sizeof *t->rounded);
    for (size_t l = 0; l < layers; l++) t->cosine[l] = t->rounded ? -1 : 1;
    return 0;
}

static void trial_close(struct trial *t) {
    net_destroy(&t->net);
    lora_destroy(&t->lora);
    free(t->at);
    free(t->plain);
    free(t->rounded);
    free(t->alive);
    free(t->cosine);
}

/* A's own first values, and a B that is not 0: else A would have no gradient. */
static void set_adapter(struct trial *t, int window) {
    struct lora *first = lora_create(&t->p->model->conf, &t->lora->shape, (uint64_t)window + 1);
    uint64_t draw = (uint64_t)window + 1;
    for (size_t i = 0; i < t->lora->params; i++) {
        draw = rng_mix64(draw);
        t->at[i] = first->value[i] != 0 ? first->value[i]
                                        : .04f * ((float)(draw >> 40) * 0x1p-24f - .5f);
        t->lora->value[i] = t->at[i];
    }
    lora_destroy(&first);
}

static int look(struct trial *t, struct selftest *s, const struct selftest_window *w, int i,
                struct err *e) {
    t->seq = (struct net_seq){ .ids = w->ids, .n = w->n, .prompt_n = 1 };
    set_adapter(t, i);
    if (gradient(t, true, t->plain, e) < 0 ||
        (t->rounded && gradient(t, false, t->rounded, e) < 0) || look_at_layers(t, e) < 0)
        return -1;
    if (s->right) return 0;
    net_set_plain(t->net, true);
    return difference(t, s, e);
}

static int judge(struct trial *t, struct selftest *s, struct err *e) {
    const int dead = dead_layer(t);
    if (dead >= 0)
        return err_code(e, EXIT_ENV, "the gradient of layer %d has the norm 0 on each of %d "
                        "windows", dead, s->windows);
    if (is_wrong(t, s))
        return err_code(e, EXIT_ENV,
                        "along the gradient the loss changes by %.3f of what it says (1 +- %g); of "
                        "%d windows %d are wrong alike and none is right",
                        s->difference, SELFTEST_DIFFERENCE_OFF, s->windows,
                        s->low > s->high ? s->low : s->high);
    return 0;
}

int selftest_run(struct selftest *s, const struct policy *p,
                 const struct selftest_window w[SELFTEST_WINDOWS], struct err *e) {
    const double begun = clock_seconds();
    struct trial t;
    *s = (struct selftest){ .tokens = w->n, .layer = -1, .cosine = 1 };
    int rc = trial_open(&t, p, e);
    while (rc == 0 && s->windows < SELFTEST_WINDOWS) {
        rc = look(&t, s, &w[s->windows], s->windows, e);
        s->windows++;
        if (s->right && dead_layer(&t) < 0 && t.cosine[lowest(&t)] >= SELFTEST_COSINE_LOW) break;
    }
    if (rc == 0) rc = judge(&t, s, e);
    if (rc == 0 && t.rounded) {
        s->layer = lowest(&t);
        s->cosine = t.cosine[s->layer];
    }
    trial_close(&t);
    s->seconds = clock_seconds() - begun;
    return rc < 0 ? err_wrap(e, "gradient self-test on %d tokens: nothing can be trained with it",
                             s->tokens)
                  : 0;
}
