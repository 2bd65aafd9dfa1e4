/* decode.c - tokens a second of decoding and of prefill, through lib/model/net as gen runs it.
 *
 * n sequences in groups of 8 share the pages of a prompt of 100 tokens and have about 100 of their
 * own; LoRA is active, tokens are drawn at temperature 1. Where a sequence stands is set up without
 * computing its past (synth.h): time depends on how many keys there are, not on their values.
 * SPDX-License-Identifier: Apache-2.0 */
#include <time.h>

#include "lib/base/clock.h"
#include "lib/base/rng.h"
#include "lib/base/str.h"
#include "tools/bench/bench.h"
#include "tools/bench/synth.h"

enum { PROMPT = 100, OWN = 100, GROUP = 8, POSITIONS = 256, ROWS = 512, STEPS_MAX = 32 };

struct batch {
    struct net *net;
    int n, own;                          /* sequences; tokens each has beside the prompt */
    int slot[64];
    int32_t want[64], token[64];
    float lp[64], lp_raw[64];
    struct kern_sampler sampler[64];
    struct net_row row[ROWS];
};

static int32_t any_token(const struct synth *s, int i) {
    return (int32_t)(rng_mix64((uint64_t)i) % (uint64_t)s->model.conf.vocab);
}

/* Positions from .. to-1 of a slot, in calls of at most ROWS rows. */
static int run_rows(struct batch *t, const struct synth *s, int slot, int from, int to,
                    struct err *e) {
    int rows = to - from;
    for (int i = 0; i < rows; i++)
        t->row[i] = (struct net_row){
            .token = any_token(s, from + i), .slot = slot, .pos = from + i
        };
    return net_forward(t->net, t->row, rows, NULL, 0, e);
}

/* The sequences as they are OWN - steps / 2 tokens after the prompt. */
static int set_up(struct batch *t, struct synth *s, int n, int own, struct err *e) {
    struct kern kept;
    int rc = 0;
    synth_skip_begin(s, &kept);
    for (int i = 0, base = -1; i < n && rc == 0; i++) {
        if (i % GROUP == 0) {
            base = net_slot_open(t->net);
            rc = run_rows(t, s, base, 0, PROMPT, e);
        }
        if (rc == 0) t->slot[i] = net_slot_fork(t->net, base, PROMPT);
        if (rc == 0) rc = run_rows(t, s, t->slot[i], PROMPT, PROMPT + own, e);
        if (i % GROUP == GROUP - 1 || i == n - 1) net_slot_close(t->net, base);
    }
    synth_skip_end(s, &kept);
    t->n = n;
    t->own = own;
    for (int i = 0; i < n; i++) t->token[i] = any_token(s, i);
    return rc;
}

static int step(struct batch *t, struct err *e) {
    for (int i = 0; i < t->n; i++) {
        t->row[i] = (struct net_row){
            .token = t->token[i], .slot = t->slot[i], .pos = PROMPT + t->own
        };
        t->sampler[i] = (struct kern_sampler){
            .temperature = 1, .top_p = 1,
            .u = rng_unit((uint32_t)rng_mix64((uint64_t)(t->own * 64 + i)))
        };
    }
    t->own++;
    return net_step(t->net, t->row, t->n, t->sampler, t->token, t->lp, t->lp_raw, e);
}

/* Seconds of a step, after `warm` that do not count: one, and two more where steps are replayed. */
static int time_steps(struct batch *t, int warm, double seconds, struct spread *out,
                      struct err *e) {
    double v[STEPS_MAX], spent = 0;
    int n = 0;
    for (int i = 0; i < warm; i++)
        if (step(t, e) < 0) return -1;
    while (n < STEPS_MAX && (n < 3 || spent < seconds)) {
        double begun = clock_seconds();
        if (step(t, e) < 0) return -1;
        v[n] = clock_seconds() - begun;
        spent += v[n++];
    }
    *out = spread_of(v, n);
    return 0;
}

/* What is decoded, how. */
struct decoding { int n, rank; bool mxfp4, graphs, noise; };

static struct net_opts decode_opts(const struct decoding *d) {
    return (struct net_opts){ .rows_max = d->n > PROMPT + 1 ? d->n : PROMPT + 1,
                              .slots_max = d->n + 1, .positions_max = POSITIONS,
                              .lora = shape_lora(d->rank), .noise = d->noise,
                              .graphs = d->graphs };
}
static bool fits(struct bench *b, enum shape m, const struct net_opts *o, const char *key) {
    return bench_room(b, m, key, (double)net_plan(&shape_conf[m], MODEL_QUANT_MXFP4, o));
}

static int one(struct bench *b, struct synth *s, const struct decoding *d, const char *key,
               struct err *e) {
    const double seconds = b->quick ? .3 : 2;
    const int n = d->n;
    struct batch *t = mem_alloc(sizeof *t);
    struct lora *l = synth_lora(s, d->rank);
    struct net_opts o = decode_opts(d);
    struct spread steps = { 0 };
    synth_head(s, d->mxfp4);
    int rc = net_create(&t->net, &s->model, &o, e);
    if (rc == 0) rc = net_adopt(t->net, l, NULL, e);
    if (rc == 0) rc = set_up(t, s, n, OWN - STEPS_MAX / 2, e);
    if (rc == 0) rc = time_steps(t, b->plugin ? 3 : 1, seconds, &steps, e);
    if (rc == 0) {
        const struct shape_size size = shape_size(&s->model.conf, d->rank);
        const struct limits *most = bench_limits(b);
        const struct work w = limits_decode(most, &size, n, n > 1 ? PROMPT : 0,
                                            n > 1 ? OWN : PROMPT + OWN,
                                            d->mxfp4 ? limits_mxfp4_bytes : 2);
        bench_report(b, key, &(struct figure){ .unit = "tok/s", .s = spread_rate(steps, n),
                                               .limit = n / limits_seconds(most, &w), .work = w,
                                               .set = w.bytes, .seconds = steps.median,
                                               .target = n <= 16 ? TARGET_MEMORY : TARGET_NONE });
    }
    net_destroy(&t->net);
    lora_destroy(&l);
    free(t);
    synth_head(s, false);
    return rc;
}

/* ---- with noise ---- */

/* A step with all operators noisy over the clean step before it, the same net, in turns; cpu: of
 * the process's CPU time, which others on the machine disturb less. */
static int time_noisy(struct batch *t, const struct noise_plan *plan, double seconds,
                      struct spread *out, double clean_noisy[2], double cpu[2], struct err *e) {
    double ratio[STEPS_MAX], took[2][STEPS_MAX], spent = 0;
    int n = 0;
    if (step(t, e) < 0) return -1;
    while (n < STEPS_MAX / 2 && (n < 3 || spent < seconds)) {
        for (int noisy = 0; noisy < 2; noisy++) {
            net_set_noise(t->net, noisy ? plan : NULL, NOISE_PHASE_ROLLOUT, 1, 1);
            double begun = clock_seconds();
            const clock_t cpu_begun = clock();
            if (step(t, e) < 0) return -1;
            cpu[noisy] += (double)(clock() - cpu_begun);
            took[noisy][n] = clock_seconds() - begun;
            spent += took[noisy][n];
        }
        ratio[n] = took[1][n] / took[0][n];
        n++;
    }
    for (int noisy = 0; noisy < 2; noisy++) clean_noisy[noisy] = spread_of(took[noisy], n).median;
    *out = spread_of(ratio, n);
    return 0;
}

static int noisy(struct bench *b, struct synth *s, const struct decoding *d, const char *key,
                 struct err *e) {
    struct batch *t = mem_alloc(sizeof *t);
    struct lora *l = synth_lora(s, 32);
    struct noise_plan plan;
    struct net_opts o = decode_opts(d);
    struct spread ratio = { 0 };
    double ms[2] = { 0 }, cpu[2] = { 0 };
    char what[96];
    int rc = synth_noise(s, &plan, e);
    if (rc == 0) rc = net_create(&t->net, &s->model, &o, e);
    if (rc == 0) rc = net_adopt(t->net, l, NULL, e);
    if (rc == 0) rc = set_up(t, s, d->n, OWN - STEPS_MAX / 2, e);
    if (rc == 0) rc = time_noisy(t, &plan, b->quick ? .5 : 4, &ratio, ms, cpu, e);
    snprintf(what, sizeof what, "clean %.1f ms, noisy %.1f ms a step; CPU time %.2fx", ms[0] * 1e3,
             ms[1] * 1e3, cpu[1] / cpu[0]);
    if (rc == 0)
        bench_report(b, key, &(struct figure){ .unit = "x", .what = what, .s = ratio });
    net_destroy(&t->net);
    lora_destroy(&l);
    free(t);
    return rc;
}

/* ---- prefill ---- */

struct prefill { struct batch t; struct synth *s; struct err err; };

/* Four prompts of 128 tokens in one call, logits of each one's last row. */
static void prefill_call(void *arg) {
    struct prefill *p = arg;
    struct batch *t = &p->t;
    for (int i = 0; i < 4; i++) {
        t->slot[i] = net_slot_open(t->net);
        t->want[i] = i * 128 + 127;
        for (int j = 0; j < 128; j++)
            t->row[i * 128 + j] = (struct net_row){
                .token = any_token(p->s, i * 128 + j), .slot = t->slot[i], .pos = j
            };
    }
    if (net_forward(t->net, t->row, 512, t->want, 4, &p->err) == 0)
        net_sample(t->net, t->sampler, t->token, t->lp, t->lp_raw, &p->err);
    for (int i = 0; i < 4; i++) net_slot_close(t->net, t->slot[i]);
}

static struct net_opts prefill_opts(void) {
    return (struct net_opts){ .rows_max = 512, .slots_max = 4, .positions_max = 128,
                              .lora = shape_lora(32) };
}

static int prefill(struct bench *b, struct synth *s, const char *key, struct err *e) {
    struct prefill *p = mem_alloc(sizeof *p);
    struct lora *l = synth_lora(s, 32);
    const struct net_opts o = prefill_opts();
    p->s = s;
    for (int i = 0; i < 4; i++) p->t.sampler[i] = (struct kern_sampler){ 1, 0, 1, .5f };
    int rc = net_create(&p->t.net, &s->model, &o, e);
    if (rc == 0) rc = net_adopt(p->t.net, l, NULL, e);
    if (rc == 0) {
        struct spread t = timing_of(prefill_call, p, b->quick ? .3 : 1.5);
        const struct shape_size size = shape_size(&s->model.conf, 32);
        const struct work w = limits_prefill(&size, 512, 64, 4);
        if (*p->err.text) rc = err_set(e, "%s", p->err.text);
        else bench_report(b, key, &(struct figure){ .unit = "tok/s", .what = "4 prompts of 128",
                                                    .s = spread_rate(t, 512),
                                                    .limit = 512 / limits_seconds(bench_limits(b),
                                                                                  &w),
                                                    .work = w, .set = w.bytes,
                                                    .seconds = t.median });
    }
    net_destroy(&p->t.net);
    lora_destroy(&l);
    free(p);
    return rc;
}

/* "decode/MODEL/head-bf16/n16"; on a device, which replays its steps, also ".../graphs-off". */
static void decodes(struct bench *b, enum shape m, bool mxfp4, struct err *e) {
    static const int N[] = { 1, 8, 16, 64 };
    char key[BENCH_KEY_MAX];
    for (size_t i = 0; i < COUNT_OF(N); i++)
        for (int graphs = 1; graphs >= (b->plugin ? 0 : 1); graphs--) {
            const struct decoding d = { .n = N[i], .rank = mxfp4 ? 16 : 32, .mxfp4 = mxfp4,
                                        .graphs = graphs };
            const struct net_opts o = decode_opts(&d);
            snprintf(key, sizeof key, "decode/%s/head-%s/n%d%s", shape_name[m],
                     mxfp4 ? "mxfp4" : "bf16", N[i], graphs ? "" : "/graphs-off");
            if (!bench_begins(b, key) || !fits(b, m, &o, key)) continue;
            if (bench_synth(b, m, e) < 0 || one(b, b->synth, &d, key, e) < 0)
                bench_failed(b, key, e);
        }
}

void part_decode(struct bench *b, enum shape m) {
    struct err e = { 0 };
    char key[BENCH_KEY_MAX];
    decodes(b, m, false, &e);
    decodes(b, m, true, &e);
    for (int n = 16; n <= 64; n *= 4) {
        const struct decoding d = { .n = n, .rank = 32, .noise = true };
        const struct net_opts o = decode_opts(&d);
        snprintf(key, sizeof key, "noisy/%s/decode/n%d", shape_name[m], n);
        if (!bench_begins(b, key) || !fits(b, m, &o, key)) continue;
        if (bench_synth(b, m, &e) < 0 || noisy(b, b->synth, &d, key, &e) < 0)
            bench_failed(b, key, &e);
    }
    const struct net_opts o = prefill_opts();
    snprintf(key, sizeof key, "prefill/%s", shape_name[m]);
    if (!bench_begins(b, key) || !fits(b, m, &o, key)) return;
    if (bench_synth(b, m, &e) < 0 || prefill(b, b->synth, key, &e) < 0) bench_failed(b, key, &e);
}
