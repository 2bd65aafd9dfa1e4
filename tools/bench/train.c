/* train.c - the LoRA training step, and the whole DAPO step with it, on synthetic weights.
 *
 * Training: a micro-batch of 4 sequences of 300 tokens, 200 of them scored, LoRA r 32, head bf16.
 * DAPO step: 2 prompts of 100 tokens x 8 answers of 200 through lib/gen, forward and backward of
 * all of them, AdamW, the new adapter adopted; end-of-text is never drawn.
 * Order: training, the step.
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <time.h>

#include "lib/base/clock.h"
#include "lib/base/rng.h"
#include "lib/gen/gen.h"
#include "tools/bench/bench.h"
#include "tools/bench/host.h"
#include "tools/bench/synth.h"

enum { RANK = 32, PROMPT = 100, ANSWER = 200, LENGTH = PROMPT + ANSWER, MICRO = 4,
       GROUPS = 2, SAMPLES = 8, SEQS = GROUPS * SAMPLES, REPEATS_MAX = 8 };

static struct net_opts train_opts(void) {
    return (struct net_opts){ .rows_max = MICRO * LENGTH, .slots_max = MICRO,
                              .positions_max = LENGTH, .train = true, .lora = shape_lora(RANK) };
}

static struct gen_opts gen_options(void) {
    return (struct gen_opts){ .rows = SEQS, .positions_max = LENGTH, .lora = shape_lora(RANK),
                              .graphs = true };
}

struct training {
    struct kern *kern;
    struct net *net;
    struct lora *lora;
    int32_t ids[SEQS][LENGTH];
    struct net_seq seq[SEQS];
    struct err err;
};

static void training_release(struct training *t) {
    net_destroy(&t->net);
    lora_destroy(&t->lora);
}

static int training_open(struct training *t, struct synth *s, bool noise, struct err *e) {
    struct net_opts o = train_opts();
    o.noise = noise;
    t->kern = &s->kern;
    t->lora = synth_lora(s, RANK);
    for (int i = 0; i < SEQS; i++) {
        for (int j = 0; j < LENGTH; j++)
            t->ids[i][j] = (int32_t)(rng_mix64((uint64_t)(i * LENGTH + j)) %
                                     (uint64_t)s->model.conf.vocab);
        t->seq[i] = (struct net_seq){ .ids = t->ids[i], .n = LENGTH, .prompt_n = PROMPT };
    }
    return net_create(&t->net, &s->model, &o, e) < 0 ? -1 : net_adopt(t->net, t->lora, NULL, e);
}

/* A policy-gradient weight of ordinary size for each token; the answers alternate in sign. */
static void slope(void *ud, int seq, int first, int count, const float *lp, const float *entropy,
                  float *coef) {
    (void)ud, (void)first, (void)lp, (void)entropy;
    for (int i = 0; i < count; i++) coef[i] = (seq % 2 ? 1.f : -1.f) / (SEQS * ANSWER);
}

static void train_call(void *arg) {
    struct training *t = arg;
    if (net_train(t->net, t->seq, MICRO, 1, slope, NULL, NULL, &t->err) == 0)
        t->kern->sync(t->kern, &t->err);
}

/* Forward and backward with all operators noisy over the clean one before it, in turns. */
static int noisy_train(struct bench *b, enum shape m, const char *key, struct err *e) {
    double ratio[REPEATS_MAX], took[2] = { 0 }, cpu[2] = { 0 }, spent = 0;
    struct noise_plan plan;
    char what[96];
    int n = 0;
    if (bench_synth(b, m, e) < 0 || synth_noise(b->synth, &plan, e) < 0) return -1;
    struct training *t = mem_alloc(sizeof *t);
    int rc = training_open(t, b->synth, true, e);
    if (rc == 0) {                                   /* memory is touched for the first time */
        net_set_noise(t->net, &plan, NOISE_PHASE_UPDATE, 1, 1);
        train_call(t);
    }
    while (rc == 0 && n < REPEATS_MAX && (n == 0 || spent < (b->quick ? 0 : 8))) {
        for (int noisy = 0; noisy < 2; noisy++) {
            net_set_noise(t->net, noisy ? &plan : NULL, NOISE_PHASE_UPDATE, 1, 1);
            double begun = clock_seconds();
            const clock_t cpu_begun = clock();
            train_call(t);
            cpu[noisy] += (double)(clock() - cpu_begun);
            took[noisy] = clock_seconds() - begun;
            spent += took[noisy];
        }
        ratio[n++] = took[1] / took[0];
        if (*t->err.text) rc = err_set(e, "%s", t->err.text);
    }
    snprintf(what, sizeof what, "last: clean %.2f s, noisy %.2f s; CPU time %.2fx", took[0],
             took[1], cpu[1] / cpu[0]);
    if (rc == 0)
        bench_report(b, key, &(struct figure){ .unit = "x", .what = what,
                                               .s = spread_of(ratio, n) });
    training_release(t);
    free(t);
    return rc;
}

static int train(struct bench *b, enum shape m, const char *key, struct err *e) {
    if (bench_synth(b, m, e) < 0) return -1;
    struct training *t = mem_alloc(sizeof *t);
    int rc = training_open(t, b->synth, false, e);
    if (rc == 0) {
        struct spread s = timing_of(train_call, t, b->quick ? .5 : 3);
        const struct shape_size size = shape_size(&b->synth->model.conf, RANK);
        double flops = limits_train_flops(&size, LENGTH, ANSWER);
        if (*t->err.text) rc = err_set(e, "%s", t->err.text);
        else bench_report(b, key, &(struct figure){
                 .unit = "tok/s", .what = "4 x 300 tokens, forward and backward",
                 .s = spread_rate(s, MICRO * LENGTH), .limit = bench_limits(b)->flops / flops,
                 .work.flops = flops * MICRO * LENGTH, .seconds = s.median });
    }
    training_release(t);
    free(t);
    return rc;
}

void part_train(struct bench *b, enum shape m) {
    struct err e = { 0 };
    char key[BENCH_KEY_MAX];
    snprintf(key, sizeof key, "train/%s/step", shape_name[m]);
    const struct net_opts o = train_opts();
    const double bytes = (double)net_plan(&shape_conf[m], MODEL_QUANT_MXFP4, &o);
    if (bench_begins(b, key) && bench_room(b, m, key, bytes) && train(b, m, key, &e) < 0)
        bench_failed(b, key, &e);
    snprintf(key, sizeof key, "noisy/%s/train", shape_name[m]);
    if (bench_begins(b, key) && noisy_train(b, m, key, &e) < 0) bench_failed(b, key, &e);
    snprintf(key, sizeof key, "train/%s/arena", shape_name[m]);
    if (bench_wants(b, key))
        bench_report(b, key, &(struct figure){ .unit = "MB", .what = "net_plan of that net",
                                               .s = spread_of(&(double){ bytes / 1e6 }, 1) });
}

/* ---- the step ---- */

struct dapo {
    struct synth *s;
    struct training t;
    struct gen *gen;
    kptr p, m, v;                                    /* AdamW's arrays */
    double decode, train, update;                    /* seconds of the last step */
};

static void take(void *ud, const struct gen_sample *g) {
    struct dapo *d = ud;
    const int at = (int)g->tag * SAMPLES + g->k;
    memcpy(d->t.ids[at] + PROMPT, g->ids, (size_t)g->n * sizeof(int32_t));
    d->t.seq[at].n = PROMPT + g->n;
}

static int generate(struct dapo *d, int number, struct err *e) {
    for (int i = 0; i < GROUPS; i++) {
        for (int k = 1; k < SAMPLES; k++)
            memcpy(d->t.ids[i * SAMPLES + k], d->t.ids[i * SAMPLES], PROMPT * sizeof(int32_t));
        struct gen_request r = { .tag = (uint64_t)i, .prompt = d->t.ids[i * SAMPLES],
                                 .prompt_n = PROMPT, .samples = SAMPLES, .new_max = ANSWER,
                                 .temperature = 1, .top_p = 1, .prompt_uid = (uint64_t)i };
        rng_key(r.key, 1, RNG_PURPOSE_SAMPLE, (uint64_t)number);
        if (gen_submit(d->gen, &r, e) < 0) return -1;
    }
    while (!gen_idle(d->gen))
        if (gen_step(d->gen, take, d, e) < 0) return -1;
    return 0;
}

static int update(struct dapo *d, int number, struct err *e) {
    struct kern *k = &d->s->kern;
    struct lora *l = d->t.lora;
    const size_t bytes = l->params * sizeof(float);
    float b1 = 1, b2 = 1;
    const kptr grad = net_grad(d->t.net);
    const double norm = sqrt(k->sum_squares(k, grad, l->params));
    k->upload(k, d->p, l->value, bytes);
    for (int i = 0; i <= number; i++) b1 *= .9f, b2 *= .999f;
    k->adamw(k, &(struct kern_adamw){ .p = d->p, .m = d->m, .v = d->v, .g = grad,
                                      .n = l->params, .lr = 1e-5f, .b1 = .9f, .b2 = .999f,
                                      .eps = 1e-8f, .wd = .01f,
                                      .g_scale = norm > 1 ? (float)(1 / norm) : 1,
                                      .m_scale = 1 / (1 - b1), .v_scale = 1 / (1 - b2) });
    k->download(k, l->value, d->p, bytes);
    return net_adopt(d->t.net, l, NULL, e) < 0 ? -1 : gen_adopt(d->gen, l, NULL, e);
}

static int dapo_step(struct dapo *d, int number, struct err *e) {
    double begun = clock_seconds();
    if (generate(d, number, e) < 0) return -1;
    double generated = clock_seconds();
    if (net_train(d->t.net, d->t.seq, SEQS, 1, slope, NULL, NULL, e) < 0) return -1;
    double trained = clock_seconds();
    if (update(d, number, e) < 0) return -1;
    d->decode = generated - begun;
    d->train = trained - generated;
    d->update = clock_seconds() - trained;
    return 0;
}

static int dapo_open(struct dapo *d, struct synth *s, struct err *e) {
    struct kern *k = &s->kern;
    struct gen_opts o = gen_options();
    d->s = s;
    if (training_open(&d->t, s, false, e) < 0 || gen_create(&d->gen, &s->model, NULL, &o, e) < 0 ||
        gen_adopt(d->gen, d->t.lora, NULL, e) < 0)
        return -1;
    kptr *all[] = { &d->p, &d->m, &d->v };
    const size_t bytes = d->t.lora->params * sizeof(float);
    for (size_t i = 0; i < COUNT_OF(all); i++) {
        if (k->alloc(k, all[i], bytes, e) < 0) return -1;
        k->zero(k, *all[i], bytes);
    }
    return 0;
}

static void dapo_close(struct dapo *d) {
    kptr *all[] = { &d->p, &d->m, &d->v };
    for (size_t i = 0; i < COUNT_OF(all); i++)
        if (all[i]->p) d->s->kern.free(&d->s->kern, all[i]);
    gen_destroy(&d->gen);
    training_release(&d->t);
}

/* Seconds at best: prompts, 199 decode steps of 16 with a growing past, training. */
static double dapo_limit(const struct limits *l, const struct model_conf *c, double *decode,
                         double *train) {
    const struct shape_size size = shape_size(c, RANK);
    struct work w = limits_prefill(&size, GROUPS * PROMPT, PROMPT / 2, GROUPS);
    *decode = limits_seconds(l, &w);
    for (int i = 1; i < ANSWER; i++) {
        w = limits_decode(l, &size, SEQS, PROMPT, i, 2);
        *decode += limits_seconds(l, &w);
    }
    *train = SEQS * LENGTH * limits_train_flops(&size, LENGTH, ANSWER) / l->flops;
    return *decode + *train;
}

enum { STEPS_MAX = 5 };

static int dapo_run(struct bench *b, enum shape m, struct dapo *d, struct err *e) {
    double all[STEPS_MAX], decode[STEPS_MAX], train[STEPS_MAX], rest[STEPS_MAX], spent = 0;
    double limit[2];
    int n = 0;
    while (n < STEPS_MAX && (n == 0 || spent < (b->quick ? 0 : 8))) {
        if (dapo_step(d, n, e) < 0) return -1;
        decode[n] = d->decode;
        train[n] = d->train;
        rest[n] = d->update;
        all[n] = d->decode + d->train + d->update;
        spent += all[n++];
    }
    double best = dapo_limit(bench_limits(b), &d->s->model.conf, &limit[0], &limit[1]);
    const struct { const char *name; double *v, limit; const char *what; } part[] = {
        { "step", all, best, "2 prompts x 8 answers x 200 tokens" },
        { "decode", decode, limit[0], "prompts and 200 tokens of each answer" },
        { "train", train, limit[1], "forward and backward of 16 x 300 tokens" },
        { "update", rest, 0, "AdamW, packing and adopting the adapter" },
    };
    char key[BENCH_KEY_MAX];
    for (size_t i = 0; i < COUNT_OF(part); i++) {
        struct spread s = spread_of(part[i].v, n);
        if (i == 0 && b->step_seconds == 0) b->step_seconds = s.median;
        snprintf(key, sizeof key, "dapo/%s/%s", shape_name[m], part[i].name);
        if (bench_wants(b, key))
            bench_report(b, key, &(struct figure){ .unit = "s", .what = part[i].what, .s = s,
                                                   .limit = part[i].limit });
    }
    double bytes = (double)host_peak_bytes() / 1e6;
    snprintf(key, sizeof key, "dapo/%s/memory", shape_name[m]);
    if (bench_wants(b, key))
        bench_report(b, key, &(struct figure){ .unit = "MB", .what = "peak of this process so far",
                                               .s = { bytes, bytes, bytes, 1 } });
    return 0;
}

/* Both nets and AdamW, by the code that allocates them. */
static double dapo_bytes(enum shape m) {
    const struct model_conf *c = &shape_conf[m];
    const struct net_opts o = train_opts();
    const struct gen_opts g = gen_options();
    return (double)net_plan(c, MODEL_QUANT_MXFP4, &o) + (double)gen_plan(c, MODEL_QUANT_MXFP4, &g) +
           5. * sizeof(float) * (double)lora_params(c, &o.lora);
}

/* With the weights. */
static void dapo_plan(struct bench *b, enum shape m, const char *key) {
    const struct model_conf *c = &shape_conf[m];
    double bytes = dapo_bytes(m) + (double)kern_weight_bytes(KERN_FORMAT_BF16, c->vocab, c->dim);
    for (int p = 0; p < PROJ_COUNT; p++) {
        int out, in;
        model_proj_shape(c, (enum proj)p, &out, &in);
        bytes += c->layers * (double)kern_weight_bytes(KERN_FORMAT_MXFP4, out, in);
    }
    bench_report(b, key, &(struct figure){ .unit = "MB",
                                           .what = "planned: weights, both nets, AdamW",
                                           .s = spread_of(&(double){ bytes / 1e6 }, 1) });
}

static int dapo(struct bench *b, enum shape m, struct err *e) {
    if (bench_synth(b, m, e) < 0) return -1;
    struct dapo *d = mem_alloc(sizeof *d);
    int rc = dapo_open(d, b->synth, e);
    if (rc == 0) rc = dapo_run(b, m, d, e);
    dapo_close(d);
    free(d);
    return rc;
}

void part_dapo(struct bench *b, enum shape m) {
    struct err e = { 0 };
    static const char *const timed[] = { "step", "decode", "train", "update", "memory" };
    char path[BENCH_KEY_MAX];
    bool any = false;
    snprintf(path, sizeof path, "dapo/%s/plan", shape_name[m]);
    if (bench_wants(b, path)) dapo_plan(b, m, path);
    for (size_t i = 0; i < COUNT_OF(timed); i++) {
        snprintf(path, sizeof path, "dapo/%s/%s", shape_name[m], timed[i]);
        any |= bench_begins(b, path);
    }
    snprintf(path, sizeof path, "dapo/%s", shape_name[m]);
    if (any && bench_room(b, m, path, dapo_bytes(m)) && dapo(b, m, &e) < 0)
        bench_failed(b, path, &e);
}
