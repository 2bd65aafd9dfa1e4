/* net_props.c - what must hold for any weights: zero adapters, masks, micro-batches, threads,
 * paths, chunks, slots. "Equal" here means equal bits.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/unit/net_fixture.h"

#include <criterion/criterion.h>
#include <math.h>

#include "lib/base/rng.h"

enum { SEQS = 5, TOKENS_MAX = 90, VOCAB = 61, RESPONSE_MAX = 300 };

struct text { int32_t ids[SEQS][TOKENS_MAX]; struct net_seq seq[SEQS]; int responses; };

static void text_fill(struct text *t) {
    static const int n[SEQS] = { 40, 75, 9, 66, 33 }, prompt[SEQS] = { 12, 30, 1, 33, 32 };
    t->responses = 0;
    for (int s = 0; s < SEQS; s++) {
        for (int i = 0; i < n[s]; i++)
            t->ids[s][i] = (int32_t)(rng_mix64((uint64_t)(s * 1000 + i)) % VOCAB);
        t->seq[s] = (struct net_seq){ .ids = t->ids[s], .n = n[s], .prompt_n = prompt[s] };
        t->responses += n[s] - prompt[s];
    }
}

static void loss_plain(void *ud, int seq, int first, int count, const float *lp,
                       const float *entropy, float *coef) {
    (void)ud, (void)entropy;
    for (int i = 0; i < count; i++)
        coef[i] = (seq % 2 ? .03f : -.02f) * (1 + .01f * (float)(first + i)) + .001f * lp[i];
}

struct trial {
    const char *path;
    int threads, rows, slots;
    enum model_quant quant;
    net_loss *loss;
    float b;
};

static float *train(const struct trial *t, const struct text *x, size_t *params) {
    struct err e = { 0 };
    struct fix f;
    struct model_conf c = fix_small_conf();
    fix_open(&f, t->path, t->threads, &c, t->quant, fix_small_value);
    struct lora *l = fix_lora(&c, 4, 8, t->b, 7);
    struct net_opts o = { .rows_max = t->rows,
                          .slots_max = t->slots,
                          .positions_max = 96,
                          .train = true,
                          .lora = l->shape };
    struct net *n;
    cr_assert_eq(net_create(&n, &f.model, &o, &e), 0, "%s", e.text);
    cr_assert_eq(net_adopt(n, l, NULL, &e), 0, "%s", e.text);
    float *g = calloc(l->params, sizeof *g);
    cr_assert_eq(net_train(n, x->seq, SEQS, 1, t->loss ? t->loss : loss_plain, NULL, g, &e), 0,
                 "%s", e.text);
    *params = l->params;
    net_destroy(&n);
    lora_destroy(&l);
    fix_close(&f);
    return g;
}

static void expect_same_grad(const struct trial *a, const struct trial *b, const char *what) {
    struct text x;
    size_t n;
    text_fill(&x);
    float *ga = train(a, &x, &n), *gb = train(b, &x, &n);
    bool any = false;
    for (size_t i = 0; i < n; i++) any |= ga[i] != 0;
    cr_expect(any, "%s: the gradient is all zero", what);
    cr_expect(memcmp(ga, gb, n * sizeof *ga) == 0, "%s", what);
    free(ga);
    free(gb);
}

Test(net_props, micro_batches_and_threads_change_no_bit_of_the_gradient) {
    const struct trial one = { "auto", 1, 400, 8, MODEL_QUANT_BF16, NULL, .2f };
    struct trial t = one;
    t.rows = 74;
    expect_same_grad(&one, &t, "rows_max 400 and 74");
    t = one, t.slots = 1;
    expect_same_grad(&one, &t, "8 slots and 1");
    t = one, t.threads = 2, t.rows = 150;
    expect_same_grad(&one, &t, "1 thread and 2");
    t = one, t.threads = 3;
    expect_same_grad(&one, &t, "1 thread and 3");
    struct trial q = one, r = one;
    q.quant = r.quant = MODEL_QUANT_MXFP4;
    r.rows = 74, r.threads = 2;
    expect_same_grad(&q, &r, "the same in MXFP4");
}

Test(net_props, every_path_gives_the_bits_of_the_reference) {
    const char *names[8];
    for (int i = 1, n = kern_paths(names); i < n; i++)
        for (enum model_quant q = 0; q <= MODEL_QUANT_F32; q++) {
            const struct trial ref = { "ref", 1, 200, 8, q, NULL, .2f },
                               fast = { names[i], 2, 200, 8, q, NULL, .2f };
            expect_same_grad(&ref, &fast, names[i]);
        }
}

static void loss_tail_masked(void *ud, int seq, int first, int count, const float *lp,
                             const float *entropy, float *coef) {
    loss_plain(ud, seq, first, count, lp, entropy, coef);
    for (int i = 0; i < count; i++)
        if (seq == 1 && first + i >= 20) coef[i] = 0;
}
Test(net_props, ids_of_masked_tokens_change_nothing) {
    struct text x;
    size_t n;
    text_fill(&x);
    const struct trial t = { "auto", 2, 400, 8, MODEL_QUANT_BF16, loss_tail_masked, .2f };
    float *a = train(&t, &x, &n);
    for (int i = 30 + 20; i < x.seq[1].n; i++) x.ids[1][i] = (x.ids[1][i] + 5) % VOCAB;
    float *b = train(&t, &x, &n);
    cr_expect(memcmp(a, b, n * sizeof *a) == 0);
    free(a);
    free(b);
}

Test(net_props, with_b_zero_only_b_has_a_gradient) {
    struct text x;
    size_t n;
    text_fill(&x);
    const struct trial t = { "auto", 2, 400, 8, MODEL_QUANT_BF16, NULL, 0 };
    float *g = train(&t, &x, &n);
    struct model_conf c = fix_small_conf();
    struct lora *l = fix_lora(&c, 4, 8, 0, 7);
    for (int layer = 0; layer < c.layers; layer++)
        for (enum proj p = 0; p < PROJ_COUNT; p++) {
            size_t a, b;
            int out, in;
            bool any = false;
            model_proj_shape(&c, p, &out, &in);
            lora_offsets(l, layer, p, &a, &b);
            for (size_t i = a; i < b; i++) cr_assert_eq(g[i], 0.f);
            for (size_t i = b; i < b + 4 * (size_t)out; i++) any |= g[i] != 0;
            cr_expect(any, "layer %d %s.B has no gradient", layer, model_proj_name[p]);
        }
    lora_destroy(&l);
    free(g);
}

/* A net over the small model, with and without adapter and noise; responses' log-probs by
 * net_logprobs. */
struct scene { struct fix f; struct net *n; struct lora *l; struct text x; };

static void scene_open(struct scene *s, const char *path, int rows, enum model_quant q, float b) {
    struct err e = { 0 };
    struct model_conf c = fix_small_conf();
    text_fill(&s->x);
    fix_open(&s->f, path, 2, &c, q, fix_small_value);
    s->l = fix_lora(&c, 4, 8, b, 7);
    struct net_opts o = {
        .rows_max = rows, .slots_max = 3, .positions_max = 96, .lora = s->l->shape
    };
    cr_assert_eq(net_create(&s->n, &s->f.model, &o, &e), 0, "%s", e.text);
}
static void scene_close(struct scene *s) {
    net_destroy(&s->n);
    lora_destroy(&s->l);
    fix_close(&s->f);
}
static void score(struct scene *s, const struct lora *l, const struct noise_view *v, float *lp,
                  float *entropy) {
    struct err e = { 0 };
    cr_assert_eq(net_adopt(s->n, l, v, &e), 0, "%s", e.text);
    cr_assert_eq(net_logprobs(s->n, s->x.seq, SEQS, .9f, lp, entropy, &e), 0, "%s", e.text);
}

Test(net_props, an_adapter_with_b_zero_is_the_base_model) {
    struct scene s;
    float base[RESPONSE_MAX], with[RESPONSE_MAX];
    scene_open(&s, "auto", 128, MODEL_QUANT_BF16, 0);
    score(&s, NULL, NULL, base, NULL);
    score(&s, s.l, NULL, with, NULL);
    cr_expect(memcmp(base, with, (size_t)s.x.responses * sizeof *base) == 0);
    scene_close(&s);
}

Test(net_props, noise_of_sigma_zero_is_no_noise_and_other_noise_is_some) {
    struct scene s;
    struct err e = { 0 };
    struct noise_view none, some;
    float clean[RESPONSE_MAX], zero[RESPONSE_MAX], noisy[RESPONSE_MAX];
    scene_open(&s, "auto", 128, MODEL_QUANT_BF16, .2f);
    cr_assert_eq(noise_view_open(&none, &s.f.model, NULL, 0, 1, 2, &e), 0);
    cr_assert_eq(noise_view_open(&some, &s.f.model, NULL, .01, 1, 2, &e), 0);
    score(&s, s.l, NULL, clean, NULL);
    score(&s, s.l, &none, zero, NULL);
    score(&s, s.l, &some, noisy, NULL);
    cr_expect(memcmp(clean, zero, (size_t)s.x.responses * sizeof *clean) == 0);
    cr_expect(memcmp(clean, noisy, (size_t)s.x.responses * sizeof *clean) != 0);
    noise_view_close(&some);
    scene_close(&s);
}

Test(net_props, the_size_of_a_call_changes_no_bit_of_a_logprob) {
    for (enum model_quant q = 0; q <= MODEL_QUANT_F32; q++) {
        float want[RESPONSE_MAX], want_h[RESPONSE_MAX], got[RESPONSE_MAX], got_h[RESPONSE_MAX];
        static const int rows[] = { 300, 1, 7, 64, 97 };
        for (size_t i = 0; i < COUNT_OF(rows); i++) {
            struct scene s;
            scene_open(&s, "auto", rows[i], q, .2f);
            score(&s, s.l, NULL, i ? got : want, i ? got_h : want_h);
            const size_t bytes = (size_t)s.x.responses * sizeof(float);
            if (i)
                cr_expect(memcmp(want, got, bytes) == 0 && memcmp(want_h, got_h, bytes) == 0,
                          "quant %d, %d rows", (int)q, rows[i]);
            scene_close(&s);
        }
    }
}

/* The learner's own forward (net_train) sees the log-probs that scoring gives. */
static void loss_records(void *ud, int seq, int first, int count, const float *lp,
                         const float *entropy, float *coef) {
    float **to = ud;
    (void)entropy;
    for (int i = 0; i < count; i++) to[seq][first + i] = lp[i], coef[i] = 1;
}
Test(net_props, training_sees_the_logprobs_of_scoring) {
    struct scene s;
    struct err e = { 0 };
    float scored[RESPONSE_MAX], trained[RESPONSE_MAX], *to[SEQS];
    scene_open(&s, "auto", 128, MODEL_QUANT_BF16, .2f);
    score(&s, s.l, NULL, scored, NULL);
    struct net_opts o = {
        .rows_max = 100, .slots_max = 4, .positions_max = 96, .train = true, .lora = s.l->shape
    };
    struct net *n;
    cr_assert_eq(net_create(&n, &s.f.model, &o, &e), 0, "%s", e.text);
    cr_assert_eq(net_adopt(n, s.l, NULL, &e), 0);
    float *g = calloc(s.l->params, sizeof *g);
    for (int i = 0, at = 0; i < SEQS; at += s.x.seq[i].n - s.x.seq[i].prompt_n, i++)
        to[i] = trained + at;
    cr_assert_eq(net_train(n, s.x.seq, SEQS, .9f, loss_records, to, g, &e), 0, "%s", e.text);
    cr_expect(memcmp(scored, trained, (size_t)s.x.responses * sizeof *scored) == 0);
    free(g);
    net_destroy(&n);
    scene_close(&s);
}

Test(net_props, gradients_of_several_calls_add_up_as_one_call) {
    struct text x;
    size_t params;
    struct err e = { 0 };
    struct fix f;
    text_fill(&x);
    const struct trial whole = { "auto", 2, 400, 8, MODEL_QUANT_BF16, NULL, .2f };
    float *want = train(&whole, &x, &params), *got = calloc(params, sizeof *got);
    struct model_conf c = fix_small_conf();
    fix_open(&f, "auto", 2, &c, MODEL_QUANT_BF16, fix_small_value);
    struct lora *l = fix_lora(&c, 4, 8, .2f, 7);
    struct net_opts o = {
        .rows_max = 100, .slots_max = 2, .positions_max = 96, .train = true, .lora = l->shape
    };
    struct net *n;
    cr_assert_eq(net_create(&n, &f.model, &o, &e), 0, "%s", e.text);
    cr_assert_eq(net_adopt(n, l, NULL, &e), 0);
    for (int i = 0; i < SEQS; i += 2)              /* pairs: the loss looks at the parity only */
        cr_assert_eq(net_train(n, x.seq + i, i + 2 <= SEQS ? 2 : 1, 1, loss_plain, NULL, got, &e),
                     0, "%s", e.text);
    cr_expect(memcmp(want, got, params * sizeof *got) == 0);
    free(want);
    free(got);
    net_destroy(&n);
    lora_destroy(&l);
    fix_close(&f);
}

Test(net_props, gradient_into_logits_sums_to_zero) {
    struct fix f;
    struct model_conf c = fix_toy_conf();
    fix_open(&f, "ref", 1, &c, MODEL_QUANT_F32, fix_toy_value);
    enum { ROWS = 3, V = 97 };
    float z[ROWS * V], coef[ROWS] = { 1, -2.5f, .01f };
    int32_t target[ROWS] = { 0, 96, 50 };
    kptr p;
    cr_assert_eq(f.kern.alloc(&f.kern, &p, sizeof z + 4 * 64, NULL), 0);
    kptr t = kptr_at(p, sizeof z), lp = kptr_at(t, 64), lse = kptr_at(lp, 64),
         cf = kptr_at(lse, 64);
    for (int i = 0; i < ROWS * V; i++) z[i] = (float)(5 * sin(.7 * i));
    f.kern.upload(&f.kern, p, z, sizeof z);
    f.kern.upload(&f.kern, t, target, sizeof target);
    f.kern.upload(&f.kern, cf, coef, sizeof coef);
    f.kern.logprob(&f.kern, &(struct kern_logprob){ .logits = p,
                                                    .targets = t,
                                                    .lp = lp,
                                                    .lse = lse,
                                                    .rows = ROWS,
                                                    .vocab = V,
                                                    .inv_temp = 1.4f });
    f.kern.logprob_bwd(&f.kern, &(struct kern_logprob_bwd){ .logits = p,
                                                            .targets = t,
                                                            .lse = lse,
                                                            .coef = cf,
                                                            .rows = ROWS,
                                                            .vocab = V,
                                                            .inv_temp = 1.4f });
    f.kern.download(&f.kern, z, p, sizeof z);
    for (int r = 0; r < ROWS; r++) {
        double sum = 0;
        for (int i = 0; i < V; i++) sum += (double)z[r * V + i];
        cr_expect(fabs(sum) < 1e-5, "row %d sums to %g", r, sum);
    }
    f.kern.free(&f.kern, &p);
    fix_close(&f);
}

/* ---- slots ---- */

Test(net_props, forked_slots_go_on_as_the_whole_sequence_would) {
    struct scene s;
    struct err e = { 0 };
    float want[VOCAB], got[VOCAB];
    scene_open(&s, "auto", 96, MODEL_QUANT_BF16, .2f);
    const int32_t *ids = s.x.ids[1];
    struct net_row row[75];
    /* 31 32 43 54 65 */
    for (int forked = 31; forked <= 65; forked += forked == 31 ? 1 : 11) {
        int base = net_slot_open(s.n);
        for (int i = 0; i < 70; i++) row[i] = (struct net_row){ .token = ids[i], .slot = base, .pos = i };
        const int32_t last = 69;
        cr_assert_eq(net_forward(s.n, row, 70, &last, 1, &e), 0, "%s", e.text);
        cr_assert_eq(net_logits(s.n, want, &e), 0);
        int fork = net_slot_fork(s.n, base, forked);
        cr_assert_geq(fork, 0);
        net_slot_close(s.n, base);                                        /* shared pages live on */
        for (int i = forked; i < 70; i++) {
            struct net_row one = { .token = ids[i], .slot = fork, .pos = i };
            const int32_t zero = 0;
            cr_assert_eq(net_forward(s.n, &one, 1, &zero, 1, &e), 0, "%s", e.text);
        }
        cr_assert_eq(net_logits(s.n, got, &e), 0);
        cr_expect(memcmp(want, got, sizeof got) == 0, "forked at %d", forked);
        net_slot_close(s.n, fork);
    }
    scene_close(&s);
}

Test(net_props, rows_that_make_no_sense_are_refused_by_name) {
    struct scene s;
    struct err e = { 0 };
    scene_open(&s, "ref", 8, MODEL_QUANT_BF16, 0);
    int slot = net_slot_open(s.n);
    const struct net_row bad[] = {
        { .token = VOCAB, .slot = slot },
        { .token = -1, .slot = slot },
        { .token = 1, .slot = slot + 1 },
        { .token = 1, .slot = slot, .pos = 1 },
    };
    static const char *const says[] = { "vocabulary", "vocabulary", "not open", "position" };
    for (size_t i = 0; i < COUNT_OF(bad); i++) {
        e.text[0] = 0;
        cr_expect_eq(net_forward(s.n, &bad[i], 1, NULL, 0, &e), -1);
        cr_expect(strstr(e.text, says[i]), "%s", e.text);
    }
    net_slot_close(s.n, slot);
    scene_close(&s);
}

Test(net_props, pages_run_out_aloud_and_come_back) {
    struct scene s;
    struct err e = { 0 };
    struct model_conf c = fix_small_conf();
    fix_open(&s.f, "ref", 1, &c, MODEL_QUANT_BF16, fix_small_value);
    struct net_opts o = { .rows_max = 8, .slots_max = 4, .positions_max = 64, .pages_max = 3 };
    cr_assert_eq(net_create(&s.n, &s.f.model, &o, &e), 0, "%s", e.text);
    int a = net_slot_open(s.n), b = net_slot_open(s.n);
    cr_expect_eq(net_slot_reserve(s.n, a, 64), 0);
    cr_expect_eq(net_slot_reserve(s.n, b, 33), -1);
    cr_expect_eq(net_slot_reserve(s.n, b, 32), 0);
    cr_expect_eq(net_slot_open(s.n), -1);
    net_slot_close(s.n, a);
    cr_expect_eq(net_slot_reserve(s.n, b, 64), 0);
    net_slot_close(s.n, b);
    net_destroy(&s.n);
    fix_close(&s.f);
}

Test(net_props, training_refuses_what_it_cannot_do) {
    struct text x;
    struct err e = { 0 };
    struct fix f;
    struct net *n;
    text_fill(&x);
    struct model_conf c = fix_small_conf();
    fix_open(&f, "ref", 1, &c, MODEL_QUANT_BF16, fix_small_value);
    struct lora *l = fix_lora(&c, 4, 8, .2f, 7), *other = fix_lora(&c, 8, 8, .2f, 7);
    float *g = calloc(l->params, sizeof *g);
    struct net_opts o = {
        .rows_max = 50, .slots_max = 2, .positions_max = 96, .train = true, .lora = l->shape
    };
    cr_assert_eq(net_create(&n, &f.model, &o, &e), 0, "%s", e.text);
    cr_expect_eq(net_train(n, x.seq, 1, 1, loss_plain, NULL, g, &e), -1);
    cr_expect(strstr(e.text, "no adapter"), "%s", e.text);
    cr_expect_eq(net_adopt(n, other, NULL, &e), -1);
    cr_expect(strstr(e.text, "rank 8"), "%s", e.text);
    cr_assert_eq(net_adopt(n, l, NULL, &e), 0);
    cr_expect_eq(net_train(n, x.seq, 2, 1, loss_plain, NULL, g, &e), -1);
    cr_expect(strstr(e.text, "75 tokens") && strstr(e.text, "50 rows"), "%s", e.text);
    /* a failed call leaves the sum alone */
    for (size_t i = 0; i < l->params; i++) cr_assert_eq(g[i], 0.f);
    cr_expect_eq(net_train(n, x.seq, 1, 0, loss_plain, NULL, g, &e), -1);
    struct net_seq bare = { .ids = x.ids[0], .n = 5 };
    cr_expect_eq(net_train(n, &bare, 1, 1, loss_plain, NULL, g, &e), -1);
    /* and the net still works */
    cr_expect_eq(net_train(n, x.seq, 1, 1, loss_plain, NULL, g, &e), 0, "%s", e.text);
    free(g);
    lora_destroy(&l);
    lora_destroy(&other);
    net_destroy(&n);
    fix_close(&f);
}
