/* gen_batch.c - samples are pure functions of their keys: batch size, threads, order and neighbours
 * change no bit, and the learner's scoring gives the very log-probs that were sampled with.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/unit/net_fixture.h"

#include <criterion/criterion.h>

#include "lib/base/rng.h"
#include "lib/gen/gen.h"

enum { GROUPS = 4, SAMPLES = 3, NEW_MAX = 40, PROMPT_MAX = 70, VOCAB = 61, EOS = 17 };

struct out { int n; enum gen_stop stop; int32_t ids[NEW_MAX]; float lp[NEW_MAX], lp_raw[NEW_MAX]; };
struct run_opts {
    const char *path;
    int threads, rows;
    enum model_quant quant;
    bool backwards, eos;
    float temperature;
    double sigma;
    int top_k; float top_p;
};

static const int prompt_n[GROUPS] = { 5, 32, 70, 33 };

static void prompt_fill(int g, int32_t ids[PROMPT_MAX]) {
    for (int i = 0; i < prompt_n[g]; i++)
        ids[i] = (int32_t)(rng_mix64((uint64_t)(g * 977 + i)) % VOCAB);
}

static void take(void *ud, const struct gen_sample *s) {
    struct out *o = (struct out *)ud + s->tag * SAMPLES + (uint64_t)s->k;
    cr_assert(s->n > 0 && s->n <= NEW_MAX && o->n == 0);
    o->n = s->n;
    o->stop = s->stop;
    memcpy(o->ids, s->ids, (size_t)s->n * sizeof *s->ids);
    memcpy(o->lp, s->lp, (size_t)s->n * sizeof *s->lp);
    memcpy(o->lp_raw, s->lp_raw, (size_t)s->n * sizeof *s->lp_raw);
}

static void setup(struct fix *f, const struct run_opts *r, struct lora **l) {
    struct model_conf c = fix_small_conf();
    if (r->eos) c.eos[c.eos_count++] = EOS;
    fix_open(f, r->path, r->threads, &c, r->quant, fix_small_value);
    *l = fix_lora(&c, 4, 8, .1f, 3);
}

static void generate(const struct run_opts *r, struct out out[GROUPS * SAMPLES]) {
    struct err e = { 0 };
    struct fix f;
    struct lora *l;
    struct gen *g;
    struct noise_view v;
    memset(out, 0, GROUPS * SAMPLES * sizeof *out);
    setup(&f, r, &l);
    struct gen_opts o = { .rows = r->rows,
                          .positions_max = PROMPT_MAX + NEW_MAX,
                          .lora = l->shape };
    cr_assert_eq(gen_create(&g, &f.model, NULL, &o, &e), 0, "%s", e.text);
    cr_assert_eq(noise_view_open(&v, &f.model, NULL, r->sigma, 5, 6, &e), 0, "%s", e.text);
    cr_assert_eq(gen_adopt(g, l, &v, &e), 0, "%s", e.text);
    for (int i = 0; i < GROUPS; i++) {
        const int group = r->backwards ? GROUPS - 1 - i : i;
        int32_t ids[PROMPT_MAX];
        prompt_fill(group, ids);
        struct gen_request q = { .tag = (uint64_t)group,
                                 .prompt = ids,
                                 .prompt_n = prompt_n[group],
                                 .samples = SAMPLES,
                                 .new_max = NEW_MAX - group,
                                 .temperature = r->temperature,
                                 .top_k = r->top_k,
                                 .top_p = r->top_p > 0 ? r->top_p : 1,
                                 .key = { 11, 22 },
                                 .prompt_uid = 1000u + (uint64_t)group };
        cr_assert_eq(gen_submit(g, &q, &e), 0, "%s", e.text);
    }
    cr_expect_not(gen_idle(g));
    cr_expect_eq(gen_adopt(g, l, NULL, NULL), -1);
    int64_t tokens = 0;
    while (!gen_idle(g)) cr_assert_eq(gen_step(g, take, out, &e), 0, "%s", e.text);
    for (int i = 0; i < GROUPS * SAMPLES; i++) {
        cr_assert(out[i].n > 0, "sample %d never came", i);
        tokens += out[i].n;
    }
    cr_expect_eq(gen_tokens_total(g), tokens);
    noise_view_close(&v);
    gen_destroy(&g);
    lora_destroy(&l);
    fix_close(&f);
}

static void expect_same(const struct run_opts *a, const struct run_opts *b, const char *what) {
    static struct out oa[GROUPS * SAMPLES], ob[GROUPS * SAMPLES];
    generate(a, oa);
    generate(b, ob);
    cr_expect(memcmp(oa, ob, sizeof oa) == 0, "%s", what);
}

Test(gen_batch, rows_threads_and_order_change_no_bit) {
    const struct run_opts base = { .path = "auto",
                                   .threads = 1,
                                   .rows = 16,
                                   .quant = MODEL_QUANT_BF16,
                                   .temperature = 1,
                                   .eos = true };
    struct run_opts r = base;
    r.rows = 1;
    expect_same(&base, &r, "16 rows and 1");
    r.rows = 5, r.threads = 2, r.backwards = true;
    expect_same(&base, &r, "16 rows; 5 rows, 2 threads, backwards");
    r.rows = 2, r.threads = 3;
    expect_same(&base, &r, "16 rows; 2 rows, 3 threads, backwards");
    struct run_opts q = base;
    q.quant = r.quant = MODEL_QUANT_MXFP4;
    expect_same(&q, &r, "the same in MXFP4");
    q.temperature = r.temperature = .7f, q.top_k = r.top_k = 20, q.top_p = r.top_p = .9f;
    expect_same(&q, &r, "the same with top-k and top-p");
    const char *names[8];
    for (int i = 1, n = kern_paths(names); i < n; i++) {
        struct run_opts ref = base, fast = base;
        ref.path = "ref", fast.path = names[i];
        expect_same(&ref, &fast, names[i]);
    }
}

/* Scores the samples with a learner's net and compares bits. */
static void expect_zero_gap(const struct run_opts *r, int learner_threads, int learner_rows) {
    static struct out out[GROUPS * SAMPLES];
    static int32_t ids[GROUPS * SAMPLES][PROMPT_MAX + NEW_MAX];
    struct net_seq seq[GROUPS * SAMPLES];
    static float lp[GROUPS * SAMPLES * NEW_MAX];
    struct err e = { 0 };
    struct fix f;
    struct lora *l;
    struct net *n;
    generate(r, out);
    struct run_opts learner = *r;
    learner.threads = learner_threads;
    setup(&f, &learner, &l);
    struct net_opts o = { .rows_max = learner_rows,
                          .slots_max = 3,
                          .positions_max = PROMPT_MAX + NEW_MAX,
                          .train = true,
                          .lora = l->shape };
    cr_assert_eq(net_create(&n, &f.model, &o, &e), 0, "%s", e.text);
    cr_assert_eq(net_adopt(n, l, NULL, &e), 0);
    for (int i = 0; i < GROUPS * SAMPLES; i++) {
        const int g = i / SAMPLES;
        prompt_fill(g, ids[i]);
        memcpy(ids[i] + prompt_n[g], out[i].ids, (size_t)out[i].n * sizeof(int32_t));
        seq[i] = (struct net_seq){ .ids = ids[i], .n = prompt_n[g] + out[i].n, .prompt_n = prompt_n[g] };
    }
    cr_assert_eq(net_logprobs(n, seq, GROUPS * SAMPLES, r->temperature, lp, NULL, &e), 0, "%s",
                 e.text);
    const float *at = lp;
    int different = 0, tokens = 0;
    for (int i = 0; i < GROUPS * SAMPLES; at += out[i].n, tokens += out[i].n, i++)
        different += memcmp(at, out[i].lp, (size_t)out[i].n * sizeof *at) != 0;
    cr_expect_eq(different, 0, "%s, %d threads, %d rows: %d of %d samples differ", r->path,
                 learner_threads, learner_rows, different, GROUPS * SAMPLES);
    cr_expect_gt(tokens, 100);
    net_destroy(&n);
    lora_destroy(&l);
    fix_close(&f);
}

Test(gen_batch, the_learner_scores_exactly_what_was_sampled) {
    const char *names[8];
    for (int i = 0, paths = kern_paths(names); i < paths; i++)
        for (enum model_quant q = 0; q <= MODEL_QUANT_F32; q++) {
            struct run_opts r = {
                .path = names[i], .threads = 2, .rows = 5, .quant = q, .temperature = 1, .eos = true
            };
            expect_zero_gap(&r, 1, 200);
            r.temperature = .7f;
            r.rows = 1;
            expect_zero_gap(&r, 3, 37);
        }
}

Test(gen_batch, raw_logprobs_are_those_of_temperature_one) {
    static struct out a[GROUPS * SAMPLES];
    const struct run_opts one = {
        .path = "auto", .threads = 1, .rows = 4, .quant = MODEL_QUANT_BF16, .temperature = 1
    };
    generate(&one, a);
    for (int i = 0; i < GROUPS * SAMPLES; i++)
        cr_expect(memcmp(a[i].lp, a[i].lp_raw, (size_t)a[i].n * sizeof(float)) == 0);
}

Test(gen_batch, greedy_samples_agree_and_lengths_and_eos_stop) {
    static struct out a[GROUPS * SAMPLES];
    struct run_opts r = { .path = "auto", .threads = 2, .rows = 4, .quant = MODEL_QUANT_BF16 };
    generate(&r, a);
    for (int g = 0; g < GROUPS; g++)
        for (int k = 0; k < SAMPLES; k++) {
            const struct out *s = &a[g * SAMPLES + k];
            cr_expect(s->n == NEW_MAX - g && s->stop == GEN_STOP_LENGTH);
            cr_expect(memcmp(s->ids, a[g * SAMPLES].ids, (size_t)s->n * sizeof(int32_t)) == 0);
        }
    r.temperature = 1.5f;
    r.eos = true;
    generate(&r, a);
    int eos = 0;
    for (int i = 0; i < GROUPS * SAMPLES; i++) {
        eos += a[i].stop == GEN_STOP_EOS;
        cr_expect_eq(a[i].stop == GEN_STOP_EOS, a[i].ids[a[i].n - 1] == EOS);
        for (int t = 0; t < a[i].n - 1; t++) cr_expect_neq(a[i].ids[t], EOS);
    }
    cr_expect_gt(eos, 0);
}

Test(gen_batch, noise_changes_samples_and_is_gone_when_off) {
    static struct out clean[GROUPS * SAMPLES], noisy[GROUPS * SAMPLES];
    struct run_opts r = {
        .path = "auto", .threads = 1, .rows = 4, .quant = MODEL_QUANT_BF16, .temperature = 1
    };
    generate(&r, clean);
    r.sigma = .05;
    generate(&r, noisy);
    cr_expect(memcmp(clean, noisy, sizeof clean) != 0);
}

Test(gen_batch, requests_that_cannot_be_served_are_refused) {
    struct err e = { 0 };
    struct fix f;
    struct lora *l;
    struct gen *g;
    const struct run_opts r = { .path = "ref", .threads = 1, .quant = MODEL_QUANT_BF16 };
    setup(&f, &r, &l);
    struct gen_opts o = { .rows = 2, .positions_max = 20 };
    cr_assert_eq(gen_create(&g, &f.model, NULL, &o, &e), 0, "%s", e.text);
    const int32_t ids[] = { 1, 2, 61, 3, -1 };
    const struct gen_request good = {
        .prompt = ids, .prompt_n = 2, .samples = 1, .new_max = 5, .temperature = 1, .top_p = 1
    };
    struct gen_request bad[6];
    for (size_t i = 0; i < COUNT_OF(bad); i++) bad[i] = good;
    bad[0].prompt_n = 0;
    bad[1].prompt_n = 3;
    bad[2].new_max = 19;
    bad[3].samples = 0;
    bad[4].samples = GEN_SAMPLES_MAX + 1;
    bad[5].top_p = 0;
    for (size_t i = 0; i < COUNT_OF(bad); i++)
        cr_expect_eq(gen_submit(g, &bad[i], &e), -1, "request %zu was taken", i);
    cr_expect(gen_idle(g));
    cr_expect_eq(gen_submit(g, &good, &e), 0);
    cr_expect_gt(gen_plan(&f.model.conf, MODEL_QUANT_BF16, &o), 0);
    gen_destroy(&g);
    lora_destroy(&l);
    fix_close(&f);
}
