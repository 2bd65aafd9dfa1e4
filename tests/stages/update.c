/* update.c - one update of the adapter on the embedded model: what may change its bits and what may
 * not.
 * SPDX-License-Identifier: Apache-2.0 */
#include "stages/learner/update.h"

#include <criterion/criterion.h>
#include <math.h>
#include <unistd.h>

#include "lib/base/log.h"
#include "stages/learner/parts.h"

enum { GROUPS = 4, SAMPLES = 4, PROMPT = 40 };

struct bench {
    struct learner_conf c;
    struct policy policy;
    struct updater *u;
    struct update_state s;
    struct rec group[GROUPS];
    const struct rec_group *list[GROUPS];
};

static struct bench b;

static void open_updater(void) {
    struct err e = { 0 };
    updater_destroy(&b.u);
    cr_assert(updater_create(&b.u, &b.policy, &b.c, &e) == 0, "%s", e.text);
}

/* A fresh adapter and empty moments: every update below starts from the same state. */
static void fresh_state(void) {
    lora_destroy(&b.s.lora);
    free(b.s.m);
    free(b.s.v);
    b.s = (struct update_state){ .lora = lora_create(&b.policy.model->conf, &b.policy.shape, 1) };
    b.s.m = mem_alloc(b.s.lora->params * sizeof(float));
    b.s.v = mem_alloc(b.s.lora->params * sizeof(float));
}

static void add_sample(struct rec_sample *x, int k, int tokens, double score, int seed) {
    *x = (struct rec_sample){ .k = k, .score = score };
    x->ids = (struct rec_i32){ mem_alloc((size_t)tokens * sizeof(int32_t)), tokens };
    x->lp = (struct rec_f32){ mem_alloc((size_t)tokens * sizeof(float)), tokens };
    for (int i = 0; i < tokens; i++) {
        x->ids.v[i] = (seed * 131 + k * 17 + i * 7) % 600;
        x->lp.v[i] = -1.5f;
    }
}

static void add_group(int g, int samples, const int *tokens, const double *score) {
    struct rec_group *r = &b.group[g].group;
    rec_release(&b.group[g]);
    rec_init(&b.group[g], REC_GROUP);
    r->group = g;
    r->prompt_ids = (struct rec_i32){ mem_alloc(PROMPT * sizeof(int32_t)), PROMPT };
    for (int i = 0; i < PROMPT; i++) r->prompt_ids.v[i] = (g * 37 + i * 11) % 600;
    r->samples = samples;
    r->sample = mem_alloc((size_t)samples * sizeof *r->sample);
    for (int k = 0; k < samples; k++) add_sample(&r->sample[k], k, tokens[k], score[k], g + 1);
    b.list[g] = r;
}

static void start(void) {
    static char tiny[] = "models/tiny", none[] = "", all[] = "all", norms[] = "norms",
                projections[] = "q,k,v,o,gate,up,down";
    struct err e = { 0 };
    b = (struct bench){ 0 };
    log_open("test", LOG_LEVEL_ERROR);
    struct shared *c = &b.c.shared;
    c->run.kernels = 0;                       /* auto */
    c->run.threads = 1;
    c->run.steps = 10;
    c->model.path = tiny;
    c->model.packed_dir = c->model.chat = c->quant.exclude = none;
    c->ops.ops = c->ops.layers = c->modules.layers = all;
    c->modules.targets = c->modules.exclude = none;
    c->aqn.targets = norms;
    c->aqn.exclude = c->aqn.layers = c->aqn.zone_edge = c->aqn.zone_middle = none;
    c->aqn.others = 1;
    c->quant.weights = MODEL_QUANT_MXFP4;
    c->lora.rank = 8;
    c->lora.alpha = 16;
    c->lora.targets = projections;
    c->data.prompt_max = 64;
    c->sample.n = SAMPLES;
    c->sample.new_max = 32;
    c->sample.temperature = c->sample.top_p = 1;
    b.c = (struct learner_conf){ .shared = *c,
                                 .batch = GROUPS,
                                 .micro_tokens = 1280,
                                 .lr = 1e-3,
                                 .beta1 = .9,
                                 .beta2 = .999,
                                 .adam_eps = 1e-8,
                                 .weight_decay = .01,
                                 .grad_clip = 1,
                                 .clip_low = .2,
                                 .clip_high = .28,
                                 .clip_dual = 10,
                                 .adv_eps = 1e-6,
                                 .adv_ddof = 1 };
    cr_assert(policy_open(&b.policy, &b.c.shared, &e) == 0, "%s", e.text);
    for (int g = 0; g < GROUPS; g++)
        add_group(g, SAMPLES, (const int[]){ 3 + g, 20, 1, 9 }, (const double[]){ 1, 0, g & 1, 0 });
    open_updater();
    fresh_state();
}

static void stop(void) {
    updater_destroy(&b.u);
    lora_destroy(&b.s.lora);
    free(b.s.m);
    free(b.s.v);
    for (int g = 0; g < GROUPS; g++) rec_release(&b.group[g]);
    policy_close(&b.policy);
}
TestSuite(update, .init = start, .fini = stop, .timeout = 250);

static const struct update_treatment treatment = {
    .seed = 7, .fixed_seed = 1, .sigma = .05, .step = 3, .version = 2
};

static struct update_metrics step(int groups, char sha[SHA256_HEX]) {
    struct update_metrics m;
    struct err e = { 0 };
    updater_load(b.u, &b.s);
    cr_assert(updater_step(b.u, &b.s, b.list, groups, &treatment, &m, &e) == 0, "%s", e.text);
    cr_assert(updater_store(b.u, &b.s, &e) == 0, "%s", e.text);
    if (sha) lora_sha256(b.s.lora, sha);
    return m;
}

Test(update, a_minibatch_gives_several_optimiser_updates_and_one_step_of_the_rate) {
    static const struct {
        int64_t minibatch, updates;
    } t[] = { { 0, 1 }, { 4, 1 }, { 2, 2 }, { 1, 4 } };
    char sha[COUNT_OF(t)][SHA256_HEX];
    for (size_t i = 0; i < COUNT_OF(t); i++) {
        b.c.minibatch = t[i].minibatch;
        fresh_state();
        struct update_metrics m = step(GROUPS, sha[i]);
        cr_expect_eq(b.s.adam_steps, t[i].updates, "minibatch %lld: %lld updates",
                     (long long)t[i].minibatch, (long long)b.s.adam_steps);
        cr_expect(b.s.rate_steps == 1 && m.changed && !m.nonfinite);
        cr_expect(m.old_cur_max == 0, "the first mini-batch has ratio exactly 1");
        cr_expect((t[i].updates == 1) == (m.ppo_kl == 0),
                  "later mini-batches meet a policy that moved");
    }
    cr_expect_str_eq(sha[0], sha[1]);
    cr_expect_str_neq(sha[0], sha[2]);
    cr_expect_str_neq(sha[2], sha[3]);
}

Test(update, micro_batches_change_no_bit) {
    static const int64_t micro[] = { 1280, 64, 97, 300, 4096 };
    char sha[COUNT_OF(micro)][SHA256_HEX];
    for (size_t i = 0; i < COUNT_OF(micro); i++) {
        b.c.micro_tokens = micro[i];
        open_updater();
        fresh_state();
        step(GROUPS, NULL);
        step(GROUPS, sha[i]);
        cr_expect_str_eq(sha[0], sha[i], "micro_tokens %lld", (long long)micro[i]);
    }
}

/* Losses 3, 1, -1 on sequences of 1, 3 and 6 tokens: (3 + 3 - 6) / 10 by token; by sequence it
 * would be 1. */
Test(update, the_loss_is_a_mean_over_tokens_whatever_the_micro_batch) {
    static const int64_t micro[] = { 1280, 64 };
    b.c.adv_eps = 0;
    add_group(0, 1, (const int[]){ 1 }, (const double[]){ -3 });
    add_group(1, 1, (const int[]){ 3 }, (const double[]){ -1 });
    add_group(2, 1, (const int[]){ 6 }, (const double[]){ 1 });
    for (size_t i = 0; i < COUNT_OF(micro); i++) {
        b.c.micro_tokens = micro[i];
        open_updater();
        fresh_state();
        struct update_metrics m = step(3, NULL);
        cr_expect(m.tokens == 10 && m.loss == 0, "loss %g over %lld tokens", m.loss,
                  (long long)m.tokens);
        cr_expect(m.advantage_max == 1 && m.advantage_min == -3);
    }
}

/* Losses -1 on two tokens and .5 on four: 0 by token, -.25 by sequence. */
Test(update, the_grpo_loss_is_a_mean_over_sequences) {
    b.c.adv_eps = 0;
    add_group(0, 1, (const int[]){ 2 }, (const double[]){ 1 });
    add_group(1, 1, (const int[]){ 4 }, (const double[]){ -.5 });
    char token[SHA256_HEX], seq[SHA256_HEX];
    struct update_metrics m = step(2, token);
    cr_expect(m.loss == 0, "by token %g", m.loss);
    b.c.loss = LEARNER_LOSS_SEQ_MEAN;
    fresh_state();
    m = step(2, seq);
    cr_expect(m.loss == -.25, "by sequence %g", m.loss);
    cr_expect_str_neq(token, seq, "the gradient did not follow the loss");
    b.c.minibatch = 1;
    b.c.lr = 0;                                      /* or the second would meet another policy */
    fresh_state();
    m = step(2, NULL);
    cr_expect(m.loss == -.25, "in two mini-batches %g", m.loss);
}

Test(update, advantages_may_keep_the_spread) {
    b.c.advantage = LEARNER_ADVANTAGE_GROUP_MEAN;
    struct update_metrics m = step(1, NULL);         /* rewards 1, 0, 0, 0 */
    cr_expect(m.advantage_max == .75 && m.advantage_min == -.25);
}

Test(update, the_kl_term_pulls_back_to_the_base) {
    char off[SHA256_HEX], on[SHA256_HEX];
    step(GROUPS, off);
    b.c.kl_coef = .1;
    fresh_state();
    struct update_metrics m = step(GROUPS, on);
    cr_expect(m.kl_loss == 0, "a fresh adapter is the base, KL %g", m.kl_loss);
    cr_expect_str_eq(off, on, "a KL term of exactly 0 changed a bit");
    for (int g = 0; g < GROUPS; g++)                 /* equal rewards: nothing but the KL term */
        for (int k = 0; k < SAMPLES; k++) b.group[g].group.sample[k].score = 1;
    double before = step(GROUPS, NULL).kl_loss, after = before;
    for (int i = 0; i < 4; i++) after = step(GROUPS, NULL).kl_loss;
    cr_expect(before > 0, "an adapter that moved has KL %g", before);
    cr_expect(after < .9 * before, "KL %g, four updates later %g", before, after);
}

Test(update, the_reference_of_the_kl_term_is_clean_and_counts_for_no_phase) {
    struct shared *c = &b.c.shared;
    struct err e = { 0 };
    c->ops.type = KERN_NOISE_RELATIVE_GAUSSIAN;
    c->ops.scale = .01;
    c->ops.logprob = c->ops.update = true;
    b.c.kl_coef = .1;
    b.c.minibatch = GROUPS / 2;                      /* so that the old log-probs are a pass too */
    policy_close(&b.policy);
    cr_assert(policy_open(&b.policy, c, &e) == 0, "%s", e.text);
    open_updater();
    const struct update_metrics m = step(GROUPS, NULL);      /* holds the counts against the plan */
    cr_expect(m.logprob.passes[NOISE_FORWARD] == 1, "%lld passes of log-probs",
              (long long)m.logprob.passes[NOISE_FORWARD]);
    cr_expect(m.kl_loss > 0, "a fresh adapter under noise has KL %g to the clean base", m.kl_loss);
}

/* Log-probs of the learner itself, as a rollout with the same bits reports them. */
static void fill_own_logprobs(bool aqn) {
    int32_t ids[PROMPT + 32];
    struct err e = { 0 };
    struct net *n;
    struct net_opts o = { .rows_max = 1280,
                          .slots_max = 64,
                          .positions_max = 96,
                          .pages_max = 128,
                          .lora = b.policy.shape,
                          .noise = b.c.shared.ops.type != 0 };
    struct noise_view v = { 0 };
    if (aqn)
        cr_assert(treatment_view(&v, b.policy.model, &b.c.shared, treatment.step, treatment.sigma,
                                 treatment.seed, treatment.version, &e) == 0, "%s", e.text);
    cr_assert(net_create(&n, b.policy.model, &o, &e) == 0 && net_adopt(n, b.s.lora, &v, &e) == 0,
              "%s", e.text);
    net_set_noise(n, &b.policy.plan, NOISE_PHASE_ROLLOUT, treatment.seed, treatment.fixed_seed);
    for (int g = 0; g < GROUPS; g++)
        for (int k = 0; k < SAMPLES; k++) {
            struct rec_group *r = &b.group[g].group;
            struct rec_sample *x = &r->sample[k];
            memcpy(ids, r->prompt_ids.v, sizeof(int32_t) * PROMPT);
            memcpy(ids + PROMPT, x->ids.v, sizeof(int32_t) * (size_t)x->ids.n);
            struct net_seq s = { .ids = ids, .n = PROMPT + x->ids.n, .prompt_n = PROMPT,
                                 .uid = (uint64_t)g, .sample = k };
            cr_assert(net_logprobs(n, &s, 1, 1, x->lp.v, NULL, &e) == 0, "%s", e.text);
        }
    net_destroy(&n);
    noise_view_close(&v);
}

Test(update, a_correction_without_a_difference_corrects_nothing) {
    char off[SHA256_HEX], same[SHA256_HEX], other[SHA256_HEX];
    fill_own_logprobs(false);
    struct update_metrics m = step(GROUPS, off);
    cr_expect(m.gap.tokens_differ == 0, "%lld tokens differ", (long long)m.gap.tokens_differ);
    b.c.tis_cap = 2;
    fresh_state();
    m = step(GROUPS, same);
    cr_expect(m.tis_mean == 1);
    cr_expect_str_eq(off, same, "weights of exactly 1 changed a bit");
    b.group[0].group.sample[1].lp.v[0] -= .5f;
    fresh_state();
    m = step(GROUPS, other);
    cr_expect(m.tis_mean > 1);
    cr_expect_str_neq(off, other);
}

Test(update, a_gradient_that_is_not_finite_touches_nothing) {
    size_t bytes = b.s.lora->params * sizeof(float);
    float *before = mem_alloc(3 * bytes);
    step(GROUPS, NULL);                              /* moments that could be hurt */
    b.s.lora->value[5] = NAN;
    memcpy(before, b.s.lora->value, bytes);
    memcpy((char *)before + bytes, b.s.m, bytes);
    memcpy((char *)before + 2 * bytes, b.s.v, bytes);
    for (b.c.minibatch = 0; b.c.minibatch <= 2; b.c.minibatch += 2) {
        struct update_metrics m = step(GROUPS, NULL);
        cr_expect(m.nonfinite && !m.changed);
        cr_expect(b.s.adam_steps == 1 && b.s.rate_steps == 1);
        cr_expect(memcmp(before, b.s.lora->value, bytes) == 0 &&
                  memcmp((char *)before + bytes, b.s.m, bytes) == 0 &&
                  memcmp((char *)before + 2 * bytes, b.s.v, bytes) == 0);
    }
    free(before);
}

/* ---- where the state lies ---- */

static struct update_metrics bare_step(int groups) {
    struct update_metrics m;
    struct err e = { 0 };
    cr_assert(updater_step(b.u, &b.s, b.list, groups, &treatment, &m, &e) == 0, "%s", e.text);
    return m;
}

/* value, m and v in one array, which the caller frees */
static float *copy_of_state(void) {
    const size_t n = b.s.lora->params;
    float *all = mem_alloc(3 * n * sizeof *all);
    memcpy(all, b.s.lora->value, n * sizeof *all);
    memcpy(all + n, b.s.m, n * sizeof *all);
    memcpy(all + 2 * n, b.s.v, n * sizeof *all);
    return all;
}

static void expect_state(const char *what, const float *all) {
    float *now = copy_of_state();
    cr_expect(memcmp(now, all, 3 * b.s.lora->params * sizeof *all) == 0, "%s", what);
    free(now);
}

/* The backend holds the masters: what the host has of the moments is written, never read. */
Test(update, steps_go_on_from_what_lies_on_the_backend) {
    struct err e = { 0 };
    for (b.c.minibatch = 0; b.c.minibatch <= 2; b.c.minibatch += 2) {
        fresh_state();
        for (int i = 0; i < 3; i++) step(GROUPS, NULL);
        float *want = copy_of_state();
        fresh_state();
        updater_load(b.u, &b.s);
        for (int i = 0; i < 3; i++) {
            bare_step(GROUPS);
            b.s.m[0] = b.s.v[0] = 1e3f;
        }
        cr_assert(updater_store(b.u, &b.s, &e) == 0, "%s", e.text);
        expect_state("three steps without a word from the host", want);
        free(want);
    }
}

Test(update, a_later_mini_batch_that_is_not_finite_takes_the_step_back) {
    struct err e = { 0 };
    const double rate = b.c.lr;
    b.c.minibatch = 2;
    step(GROUPS, NULL);
    float *before = copy_of_state();
    step(GROUPS, NULL);
    float *after = copy_of_state();
    memcpy(b.s.lora->value, before, b.s.lora->params * sizeof *before);
    memcpy(b.s.m, before + b.s.lora->params, b.s.lora->params * sizeof *before);
    memcpy(b.s.v, before + 2 * b.s.lora->params, b.s.lora->params * sizeof *before);
    b.s.adam_steps = 2;
    b.s.rate_steps = 1;
    b.c.lr = 1e36;                                   /* where the first leads nothing is finite */
    struct update_metrics m = step(GROUPS, NULL);
    cr_expect(m.nonfinite && !m.changed && b.s.adam_steps == 2 && b.s.rate_steps == 1);
    expect_state("the state before", before);
    b.c.lr = rate;
    bare_step(GROUPS);                               /* from what was put back on the backend */
    cr_assert(updater_store(b.u, &b.s, &e) == 0, "%s", e.text);
    expect_state("the state that the step leads to", after);
    free(before);
    free(after);
}

/* ---- noise ---- */

static void with_noise(const char *ops, int direction, bool logprob, bool update) {
    struct err e = { 0 };
    struct shared *c = &b.c.shared;
    c->ops.type = KERN_NOISE_RELATIVE_GAUSSIAN;
    c->ops.scale = .02;
    c->ops.ops = (char *)(uintptr_t)ops;
    c->ops.direction = direction;
    c->ops.rollout = true;
    c->ops.logprob = logprob;
    c->ops.update = update;
    policy_close(&b.policy);
    cr_assert(policy_open(&b.policy, c, &e) == 0, "%s", e.text);
    open_updater();
    fresh_state();
}
enum { BOTH, FORWARD, BACKWARD };

Test(update, shared_noise_gives_the_bits_that_were_sampled) {
    static const int64_t minibatch[] = { 0, 2 };
    with_noise("all", BOTH, true, true);
    fill_own_logprobs(false);
    for (size_t i = 0; i < COUNT_OF(minibatch); i++) {
        b.c.minibatch = minibatch[i];
        fresh_state();
        struct update_metrics m = step(GROUPS, NULL);
        cr_expect(m.gap.tokens_differ == 0, "minibatch %lld: %lld tokens differ",
                  (long long)minibatch[i], (long long)m.gap.tokens_differ);
        cr_expect(m.old_cur_max == 0, "the first ratio is off by %g", m.old_cur_max);
        for (int op = 0; op < NOISE_OP_COUNT; op++) {
            const bool here = op != NOISE_OP_GELU;
            cr_expect((m.logprob.op[op][NOISE_FORWARD].sites > 0) == here &&
                      (m.update.op[op][NOISE_FORWARD].sites > 0) == here &&
                      (m.update.op[op][NOISE_BACKWARD].sites > 0) == here, "%s", noise_op_name[op]);
            cr_expect(m.logprob.op[op][NOISE_BACKWARD].sites == 0);
        }
        cr_expect_eq(m.update.grad.sites, minibatch[i] ? 2 : 1, "once an update");
        cr_expect_eq(m.logprob.grad.sites, 0);
    }
}

Test(update, noise_in_one_phase_makes_old_log_probs_of_their_own) {
    with_noise("matmul", FORWARD, false, true);
    fill_own_logprobs(false);                        /* of the rollout: noisy */
    struct update_metrics m = step(GROUPS, NULL);
    cr_expect(m.old_cur_max > 0, "clean old and noisy current log-probs are the same");
    cr_expect(m.logprob.op[NOISE_OP_MATMUL][NOISE_FORWARD].sites == 0 && m.gap.tokens_differ > 0);
    with_noise("matmul", FORWARD, true, false);
    fill_own_logprobs(false);
    m = step(GROUPS, NULL);
    cr_expect(m.old_cur_max > 0 && m.gap.tokens_differ == 0);
    cr_expect(m.update.op[NOISE_OP_MATMUL][NOISE_FORWARD].sites == 0);
    with_noise("matmul", BACKWARD, true, true);      /* changes no result: no pass is needed */
    m = step(GROUPS, NULL);
    cr_expect(m.old_cur_max == 0 && m.update.op[NOISE_OP_MATMUL][NOISE_BACKWARD].sites > 0);
    cr_expect(m.logprob.passes[NOISE_FORWARD] == m.update.passes[NOISE_FORWARD]);
}

Test(update, old_log_probs_may_stand_under_the_noise_that_sampled) {
    fill_own_logprobs(true);
    struct update_metrics m = step(GROUPS, NULL);
    cr_expect(m.gap.tokens_differ > 0, "clean log-probs are those under noise");
    b.c.old_logprob = LEARNER_POLICY_NOISY;
    fresh_state();
    m = step(GROUPS, NULL);
    cr_expect(m.gap.tokens_differ == 0, "%lld tokens differ", (long long)m.gap.tokens_differ);
    cr_expect(m.old_cur_max > 0, "the update is not clean");
    cr_expect(m.aqn.sigma == treatment.sigma && fabs(m.aqn.realised / m.aqn.sigma - 1) < .1);
}

Test(update, a_gradient_of_zero_is_no_missing_treatment) {
    with_noise("all", BOTH, true, true);
    for (int g = 0; g < GROUPS; g++)
        for (int k = 0; k < SAMPLES; k++) b.group[g].group.sample[k].score = 1;
    struct update_metrics m = step(GROUPS, NULL);
    cr_expect(m.grad_norm == 0 && m.update.passes[NOISE_BACKWARD] == 0 && m.update.grad.sites == 0);
}

/* ---- several ranks ---- */

struct outcome {
    struct update_metrics m;
    char sha[SHA256_HEX];
    double *grad;                    /* direction of the gradient: AdamW's first moment */
};

static int rank_step(struct ranks *r, int groups, struct update_metrics *m, struct err *e) {
    char all[RANKS_MAX][SHA256_HEX];
    updater_load(b.u, &b.s);
    if (updater_join(b.u, r, e) < 0 ||
        updater_step(b.u, &b.s, b.list, groups, &treatment, m, e) < 0 ||
        updater_store(b.u, &b.s, e) < 0)
        return -1;
    lora_sha256(b.s.lora, all[ranks_own(r)]);
    if (ranks_gather(r, "hash", all, sizeof *all, e) < 0) return -1;
    for (int i = 1; i < ranks_count(r); i++)
        if (strcmp(all[0], all[i]) != 0) return err_set(e, "rank %d has another adapter", i);
    return 0;
}

/* The other ranks are forks: they have the model, the state and the groups. */
static pid_t fork_rank(void *groups, int rank, int fd, struct err *e) {
    const pid_t pid = fork();
    if (pid) return pid;
    struct update_metrics m;
    struct ranks *r;
    if (ranks_join(&r, rank, fd, e) < 0 || rank_step(r, *(int *)groups, &m, e) < 0) {
        fprintf(stderr, "rank %d: %s\n", rank, e->text);
        _exit(1);
    }
    _exit(0);
}

static struct outcome step_of(int ranks, int groups) {
    struct outcome o;
    struct ranks *r;
    struct err e = { 0 };
    open_updater();
    fresh_state();
    if (ranks == 1) o.m = step(groups, o.sha);
    else {
        cr_assert(ranks_open(&r, ranks, 60, fork_rank, &groups, &e) == 0, "%s", e.text);
        cr_assert(rank_step(r, groups, &o.m, &e) == 0, "%s", e.text);
        lora_sha256(b.s.lora, o.sha);
        ranks_close(&r);
    }
    o.grad = mem_alloc(b.s.lora->params * sizeof *o.grad);
    for (size_t i = 0; i < b.s.lora->params; i++) o.grad[i] = (double)b.s.m[i];
    return o;
}

/* |a - b| / |a| */
static double apart(const double *x, const double *y) {
    double d = 0, n = 0;
    for (size_t i = 0; i < b.s.lora->params; i++) {
        d += (x[i] - y[i]) * (x[i] - y[i]);
        n += x[i] * x[i];
    }
    return n > 0 ? sqrt(d / n) : d;
}

static void expect_same_metrics(const char *what, const struct update_metrics *a,
                                const struct update_metrics *x) {
    const double one[] = { a->loss, a->kl_loss, a->clipfrac, a->clipfrac_lower, a->ppo_kl,
                           a->entropy, a->lr, a->old_cur_max, a->advantage_max, a->advantage_min,
                           a->tis_mean, a->aqn.realised },
                 two[] = { x->loss, x->kl_loss, x->clipfrac, x->clipfrac_lower, x->ppo_kl,
                           x->entropy, x->lr, x->old_cur_max, x->advantage_max, x->advantage_min,
                           x->tis_mean, x->aqn.realised };
    for (size_t i = 0; i < COUNT_OF(one); i++)
        cr_expect(one[i] == two[i], "%s: metric %zu is %.17g, of several ranks %.17g", what, i,
                  one[i], two[i]);
    cr_expect(memcmp(&a->gap, &x->gap, sizeof a->gap) == 0, "%s: the gap", what);
    cr_expect(a->tokens == x->tokens && a->changed == x->changed && a->nonfinite == x->nonfinite,
              "%s", what);
}

/* Passes and sites are as many as ranks make; what was drawn and measured at each token is not. */
static void expect_same_noise(const char *what, const struct noise_evidence *a,
                              const struct noise_evidence *x) {
    cr_expect(a->rows == x->rows && a->rows_squared == x->rows_squared && a->updates == x->updates,
              "%s: rows %lld %lld, of several ranks %lld %lld", what, (long long)a->rows,
              (long long)a->rows_squared, (long long)x->rows, (long long)x->rows_squared);
    cr_expect(a->grad.sites == x->grad.sites && a->grad.elements == x->grad.elements, "%s", what);
    for (int i = 0; i < NOISE_OP_COUNT * NOISE_DIRECTION_COUNT + NOISE_MODULE_COUNT; i++) {
        const int op = i / NOISE_DIRECTION_COUNT, d = i % NOISE_DIRECTION_COUNT;
        struct noise_tally one = op < NOISE_OP_COUNT
                                     ? a->op[op][d]
                                     : a->module[i - NOISE_OP_COUNT * NOISE_DIRECTION_COUNT],
                           two = op < NOISE_OP_COUNT
                                     ? x->op[op][d]
                                     : x->module[i - NOISE_OP_COUNT * NOISE_DIRECTION_COUNT];
        one.sites = two.sites = 0;
        cr_expect(memcmp(&one, &two, sizeof one) == 0, "%s: tally %d: %lld of %lld, %lld of %lld",
                  what, i, (long long)one.r2, (long long)one.elements, (long long)two.r2,
                  (long long)two.elements);
    }
}

static void with_settings(const char *what) {
    struct shared *c = &b.c.shared;
    struct err e = { 0 };
    static char projections[] = "linear";
    if (strcmp(what, "kl") == 0) b.c.kl_coef = .1;
    if (strcmp(what, "grpo") == 0) b.c.loss = LEARNER_LOSS_SEQ_MEAN;
    if (strcmp(what, "tis") == 0) b.c.tis_cap = 2;
    if (strcmp(what, "old under aqn") == 0) b.c.old_logprob = LEARNER_POLICY_NOISY;
    if (strcmp(what, "minibatches") == 0) {
        b.c.minibatch = 1;
        b.c.lr = 0;                                  /* or the second meets other bits */
    }
    if (strcmp(what, "noise") == 0) with_noise("all", BOTH, true, true);
    if (strcmp(what, "noise of one phase") == 0) with_noise("all", BOTH, false, true);
    if (strcmp(what, "noise on weights") == 0) {
        c->modules.type = 1;
        c->modules.scale = .01;
        c->modules.targets = projections;
        c->modules.at = NOISE_POINT_WEIGHT;
        c->modules.rollout = c->modules.logprob = c->modules.update = true;
        policy_close(&b.policy);
        cr_assert(policy_open(&b.policy, c, &e) == 0, "%s", e.text);
    }
}

/* 1e-6: sums over 16 sequences, each rounded to 24 bits, in another order; 1e-7 is what is seen. */
Test(update, several_ranks_have_the_metrics_of_one_and_nearly_its_gradient) {
    static const char *const settings[] = { "plain", "kl", "grpo", "tis", "minibatches",
                                            "old under aqn", "noise", "noise of one phase",
                                            "noise on weights" };
    for (size_t i = 0; i < COUNT_OF(settings); i++) {
        if (i) stop(), start();
        with_settings(settings[i]);
        struct outcome one = step_of(1, GROUPS);
        for (int ranks = 2; ranks <= 3; ranks++) {
            char what[80];
            struct outcome o = step_of(ranks, GROUPS);
            snprintf(what, sizeof what, "%s, %d ranks", settings[i], ranks);
            expect_same_metrics(what, &one.m, &o.m);
            expect_same_noise(what, &one.m.logprob, &o.m.logprob);
            expect_same_noise(what, &one.m.update, &o.m.update);
            /* noise is relative to each rank's rounding of the sum: draws, not bits, are equal */
            cr_expect(apart(one.grad, o.grad) < 1e-6, "%s: gradients are %g apart", what,
                      apart(one.grad, o.grad));
            free(o.grad);
        }
        free(one.grad);
    }
}

Test(update, micro_batches_and_kernels_change_no_bit_of_several_ranks) {
    static const struct { int64_t micro; int kernels; } t[] = { { 1280, 0 }, { 64, 0 }, { 97, 0 },
                                                                { 300, 1 } };
    char sha[COUNT_OF(t)][SHA256_HEX];
    struct err e = { 0 };
    for (size_t i = 0; i < COUNT_OF(t); i++) {
        b.c.micro_tokens = t[i].micro;
        b.c.shared.run.kernels = t[i].kernels;
        policy_close(&b.policy);
        cr_assert(policy_open(&b.policy, &b.c.shared, &e) == 0, "%s", e.text);
        struct outcome o = step_of(2, GROUPS);
        memcpy(sha[i], o.sha, sizeof o.sha);
        free(o.grad);
        cr_expect_str_eq(sha[0], sha[i], "micro_tokens %lld", (long long)t[i].micro);
    }
}

Test(update, more_ranks_than_sequences) {
    add_group(0, 2, (const int[]){ 5, 9 }, (const double[]){ 1, 0 });
    struct outcome one = step_of(1, 1), many = step_of(4, 1);
    expect_same_metrics("4 ranks, 2 sequences", &one.m, &many.m);
    cr_expect(apart(one.grad, many.grad) < 1e-6);
    free(one.grad);
    free(many.grad);
}

Test(update, a_gradient_that_is_not_finite_touches_nothing_in_any_rank) {
    struct lora *l = b.s.lora;
    struct ranks *r;
    struct err e = { 0 };
    struct update_metrics m;
    int groups = GROUPS;
    l->value[5] = NAN;
    cr_assert(ranks_open(&r, 2, 60, fork_rank, &groups, &e) == 0, "%s", e.text);
    cr_assert(rank_step(r, groups, &m, &e) == 0, "%s", e.text);
    cr_expect(m.nonfinite && !m.changed && b.s.adam_steps == 0);
    ranks_close(&r);
}

static int sum_of(struct ranks *r, size_t params, struct err *e) {
    struct kern *k = b.policy.model->kern;
    struct parts_grad g;
    kptr grad;
    cr_assert(k->alloc(k, &grad, params * sizeof(float), e) == 0 && parts_grad_open(&g, r, k, e) == 0, "%s", e->text);
    const int rc = parts_grad_sum(&g, grad, params, e);
    parts_grad_close(&g);
    k->free(k, &grad);
    return rc;
}
static pid_t fork_with_fewer(void *params, int rank, int fd, struct err *e) {
    const pid_t pid = fork();
    if (pid) return pid;
    struct ranks *r;
    _exit(ranks_join(&r, rank, fd, e) == 0 && sum_of(r, *(size_t *)params - (rank == 2), e) < 0 ? 0 : 1);
}
Test(update, gradients_of_two_sizes_are_not_added) {
    struct ranks *r;
    struct err e = { 0 };
    size_t params = 9;
    cr_assert(ranks_open(&r, 3, 60, fork_with_fewer, &params, &e) == 0, "%s", e.text);
    cr_expect_eq(sum_of(r, params, &e), -1);
    cr_expect_str_eq(e.text, "gradient of all ranks: rank 2 has 8 numbers, rank 0 has 9");
    ranks_close(&r);
}

Test(update, sequences_are_parted_by_rows) {
    struct net_seq seq[40];
    struct batch batch = { .seq = seq };
    for (int seed = 0; seed < 200; seed++) {
        struct parts p;
        const int seqs = seed % 40, ranks = 1 + seed % 7;
        int64_t all = 0, longest = 0;
        for (int i = 0; i < seqs; i++) {
            seq[i].n = 2 + (i * 7919 + seed * 104729) % (seed % 3 ? 90 : 5);
            all += seq[i].n;
            if (seq[i].n > longest) longest = seq[i].n;
        }
        parts_split(&p, ranks, &batch, 0, seqs);
        cr_expect(p.from[0] == 0 && p.from[ranks] == seqs);
        for (int k = 0; k < ranks; k++) {
            int64_t rows = 0;
            cr_assert_leq(p.from[k], p.from[k + 1]);
            for (int i = p.from[k]; i < p.from[k + 1]; i++) rows += seq[i].n;
            cr_expect(llabs(rows * ranks - all) <= longest * ranks,
                      "%d sequences, rank %d of %d: %lld of %lld rows", seqs, k, ranks,
                      (long long)rows, (long long)all);
        }
    }
}
