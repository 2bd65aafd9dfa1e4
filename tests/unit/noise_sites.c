/* noise_sites.c - noise in the network seen from outside: which operations were asked for noise, what was counted,
 * what a phase, a direction, a seed changes, and that a plan which is off costs nothing.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/unit/net_fixture.h"

#include <criterion/criterion.h>
#include <math.h>

#include "kernels/noise_math.h"
#include "lib/base/rng.h"
#include "lib/base/str.h"
#include "lib/gen/gen.h"

enum { SEQS = 10, TOKENS = 30, GROUP = 5, PROMPT = 18, SCORED = SEQS * (TOKENS - PROMPT), VOCAB = 61 };

struct world { struct fix f; struct model_conf c; struct net *n; struct lora *l; struct noise_plan plan; };
static int32_t ids[SEQS][TOKENS];
static struct net_seq seq[SEQS];

/* ---- a table that tells on its callers ---- */

enum { CALLS_MAX = 2000 };
static struct call { uint32_t site; bool counted; uint32_t prompt, sample; int32_t pos; } calls[CALLS_MAX];
static int call_count;
static void (*perturb_real)(struct kern *, const struct kern_perturb *);
static void (*attn_real)(struct kern *, const struct kern_attn *);
static void (*attn_bwd_real)(struct kern *, const struct kern_attn_bwd *);

static void note(const struct kern_noise *n) {
    const uint32_t *id = n->id.p;
    if (!n->type) return;
    cr_assert(call_count < CALLS_MAX);
    calls[call_count++] = (struct call){ .site = n->site, .counted = n->sums.p, .prompt = id ? id[0] : 0,
                                         .sample = id ? id[1] : 0,
                                         .pos = n->pos.p ? *(const int32_t *)n->pos.p : -1 };
}
static int plain_calls;
static void perturb_spy(struct kern *k, const struct kern_perturb *a) {
    note(&a->noise);
    plain_calls += !a->noise.type;
    perturb_real(k, a);
}
static void note_attn(const struct kern_attn_noise *n) {
    if (!n) return;
    note(&n->scores);
    note(&n->probs);
    note(&n->dprobs);
    note(&n->dscores);
}
static void attn_spy(struct kern *k, const struct kern_attn *a) {
    note_attn(a->noise);
    attn_real(k, a);
}
static void attn_bwd_spy(struct kern *k, const struct kern_attn_bwd *a) {
    note_attn(a->noise);
    attn_bwd_real(k, a);
}
static void silu_spy(struct kern *k, const struct kern_silu *a) {
    (void)k;
    (void)a;
    plain_calls++;
}

/* Micro-batches of up to 6 texts: more wanted rows than the head takes at once. */
static struct net_opts opts(const struct world *w, bool peaks) {
    return (struct net_opts){ .rows_max = 180, .slots_max = 7, .positions_max = 64, .train = true,
                              .lora = w->l->shape, .noise = true, .noise_peaks = peaks };
}
/* A net for w->l, in place of the one that was there. */
static void world_net(struct world *w, bool peaks) {
    struct err e = { 0 };
    const struct net_opts o = opts(w, peaks);
    if (w->n) net_destroy(&w->n);
    cr_assert_eq(net_create(&w->n, &w->f.model, &o, &e), 0, "%s", e.text);
    cr_assert_eq(net_adopt(w->n, w->l, NULL, &e), 0, "%s", e.text);
}
static void world_open(struct world *w, enum model_quant q, int threads) {
    *w = (struct world){ 0 };
    w->c = fix_small_conf();
    fix_open(&w->f, "auto", threads, &w->c, q, fix_small_value);
    w->l = fix_lora(&w->c, 4, 8, .2f, 7);
    perturb_real = w->f.kern.perturb;
    attn_real = w->f.kern.attn;
    attn_bwd_real = w->f.kern.attn_bwd;
    w->f.kern.perturb = perturb_spy;
    w->f.kern.attn = attn_spy;
    w->f.kern.attn_bwd = attn_bwd_spy;
    world_net(w, false);
    for (int s = 0; s < SEQS; s++) {
        for (int i = 0; i < TOKENS; i++)
            ids[s][i] = (int32_t)(rng_mix64((uint64_t)(i < PROMPT ? s / GROUP * 100 + i : s * 1000 + i)) % VOCAB);
        seq[s] = (struct net_seq){ .ids = ids[s], .n = TOKENS, .prompt_n = PROMPT, .uid = (uint64_t)(s / GROUP + 3),
                                   .sample = s % GROUP };
    }
    call_count = plain_calls = 0;
}
static void world_close(struct world *w) {
    net_destroy(&w->n);
    lora_destroy(&w->l);
    fix_close(&w->f);
}

static struct noise_text text(const char *ops, bool forward, bool backward) {
    return (struct noise_text){ .type = KERN_NOISE_RELATIVE_GAUSSIAN, .scale = .02, .names = ops, .layers = "all",
                                .forward = forward, .backward = backward, .phase = { true, true, true, false } };
}
static struct noise_text text_modules(const char *targets, enum noise_point at) {
    struct noise_text m = text(targets, true, false);
    m.exclude = "";
    m.point = at;
    return m;
}
static void make(struct world *w, const struct noise_text *ops, const struct noise_text *modules) {
    struct err e = { 0 };
    cr_assert_eq(noise_plan_make(&w->plan, ops, modules, &w->c, &e), 0, "%s", e.text);
}

static void loss(void *ud, int s, int first, int count, const float *lp, const float *entropy, float *coef) {
    (void)entropy;
    for (int i = 0; i < count; i++) {
        ((float *)ud)[s * (TOKENS - PROMPT) + first + i] = lp[i];
        coef[i] = (s % 2 ? .3f : -.2f) + .01f * (float)(first + i);
    }
}
static float *train(struct world *w, float lp[SCORED]) {
    struct err e = { 0 };
    float *grad = mem_alloc(w->l->params * sizeof *grad);
    cr_assert_eq(net_train(w->n, seq, SEQS, 1, loss, lp, NULL, &e), 0, "%s", e.text);
    w->f.kern.download(&w->f.kern, grad, net_grad(w->n), w->l->params * sizeof *grad);
    return grad;
}
static void score(struct world *w, float lp[SCORED]) {
    struct err e = { 0 };
    cr_assert_eq(net_logprobs(w->n, seq, SEQS, 1, lp, NULL, &e), 0, "%s", e.text);
}
static struct noise_evidence take(struct world *w) {
    struct noise_evidence ev = { 0 };
    struct err e = { 0 };
    cr_assert_eq(net_take_noise(w->n, &ev, &e), 0, "%s", e.text);
    return ev;
}
static void expect_happened(struct world *w, enum noise_phase phase, struct noise_evidence *ev) {
    struct err e = { 0 };
    ev->updates = ev->passes[NOISE_BACKWARD] > 0;    /* each test makes one */
    cr_expect_eq(noise_evidence_check(&w->plan, phase, ev, &e), 0, "%s", e.text);
}
/* Log-probs under the plan, or an update and noise on its gradient: what was measured, which must be what was meant. */
static struct noise_evidence scored(struct world *w, uint64_t seed, float lp[SCORED]) {
    net_set_noise(w->n, &w->plan, NOISE_PHASE_LOGPROB, seed, 2);
    call_count = 0;
    score(w, lp);
    struct noise_evidence ev = take(w);
    expect_happened(w, NOISE_PHASE_LOGPROB, &ev);
    return ev;
}
static struct noise_evidence trained(struct world *w, uint64_t seed, float lp[SCORED]) {
    net_set_noise(w->n, &w->plan, NOISE_PHASE_UPDATE, seed, 2);
    call_count = 0;
    free(train(w, lp));
    net_noise_grad(w->n, seed);
    struct noise_evidence ev = take(w);
    expect_happened(w, NOISE_PHASE_UPDATE, &ev);
    return ev;
}
/* Calls with noise at this site; only the counted ones, or the others. */
static int calls_at(uint32_t site, bool counted) {
    int n = 0;
    for (int i = 0; i < call_count; i++) n += calls[i].site == site && calls[i].counted == counted;
    return n;
}

/* ---- off ---- */

Test(noise_sites, a_plan_that_is_off_costs_nothing_and_changes_no_bit) {
    struct world w;
    float clean[SCORED], lp[SCORED];
    const struct noise_text t = text("all", true, true);
    world_open(&w, MODEL_QUANT_BF16, 2);
    w.f.kern.silu = silu_spy;
    float *want = train(&w, clean);
    make(&w, &t, NULL);
    net_set_noise(w.n, &w.plan, NOISE_PHASE_EVAL, 1, 2);         /* off in that phase */
    float *got = train(&w, lp);
    cr_expect_eq(call_count + plain_calls, 0, "%d calls", call_count + plain_calls);
    cr_expect_eq(memcmp(clean, lp, sizeof lp), 0);
    cr_expect_eq(memcmp(want, got, w.l->params * sizeof *got), 0);
    struct noise_evidence ev = take(&w);
    expect_happened(&w, NOISE_PHASE_EVAL, &ev);
    cr_expect_gt(ev.passes[NOISE_FORWARD], 0);
    free(want);
    free(got);
    world_close(&w);
}

/* ---- which sites ---- */

/* A name for each number between the first and the last of a kind, none twice, and none elsewhere. */
Test(noise_sites, every_site_of_an_operation_has_a_name_of_its_own) {
    for (int i = 0; i < NOISE_SITE_COUNT; i++) {
        const bool site = i <= NOISE_SITE_HEAD || (i >= NOISE_SITE_DX_QKV && i <= NOISE_SITE_DHEAD) || i == NOISE_SITE_GRAD;
        const char *name = noise_site_about[i].name;
        cr_expect_eq(name != NULL, site, "site %d", i);
        for (int j = 0; name && j < i; j++)
            cr_expect(!noise_site_about[j].name || strcmp(name, noise_site_about[j].name), "%d and %d: %s", i, j, name);
    }
    for (int p = 0; p < PROJ_COUNT; p++) cr_expect_str_eq(noise_site_about[p].name, model_proj_name[p]);
    cr_expect_eq(noise_site_module(NOISE_POINT_WEIGHT, NOISE_MODULE_HEAD), 74);
}

static const struct { const char *op; int forward[4], backward[4]; } sites[] = {      /* 0: no more */
    { "matmul", { 1, 3, 5, 6 }, { NOISE_SITE_DX_QKV, NOISE_SITE_DX_O, NOISE_SITE_DX_MLP, NOISE_SITE_DX_DOWN } },
    { "bmm", { NOISE_SITE_SCORES, NOISE_SITE_VALUES },
      { NOISE_SITE_DQ, NOISE_SITE_DK, NOISE_SITE_DV, NOISE_SITE_DPROBS } },
    { "softmax", { NOISE_SITE_PROBS }, { NOISE_SITE_DSCORES } },
    { "silu", { NOISE_SITE_SILU }, { NOISE_SITE_DGATE } },
    { "norm", { NOISE_SITE_NORM_IN, NOISE_SITE_NORM_POST, NOISE_SITE_NORM_FINAL },
      { NOISE_SITE_DNORM_IN, NOISE_SITE_DNORM_POST, NOISE_SITE_DNORM_FINAL } },
    { "rope", { NOISE_SITE_ROPE_Q, NOISE_SITE_ROPE_K }, { NOISE_SITE_ROPE_DQ, NOISE_SITE_ROPE_DK } },
    { "head", { NOISE_SITE_HEAD }, { NOISE_SITE_DHEAD } },
};

static bool final_site(int site) {
    return site == NOISE_SITE_NORM_FINAL || site == NOISE_SITE_DNORM_FINAL || site == NOISE_SITE_HEAD ||
           site == NOISE_SITE_DHEAD;
}

/* Once a micro-batch in each layer (the head: by its chunks), and nowhere else. */
static void expect_sites(const struct world *w, const struct noise_evidence *ev, const int want[4], bool backward) {
    const int passes = (int)ev->passes[backward];
    for (int i = 0; i < 4 && want[i]; i++)
        for (int layer = 0; layer < w->c.layers; layer++) {
            const bool first_only = final_site(want[i]),
                       above = want[i] == NOISE_SITE_DX_QKV || want[i] == NOISE_SITE_DNORM_IN;
            const int least = (first_only && layer) || (above && !layer) ? 0 : passes,
                      got = calls_at(KERN_NOISE_SITE(layer, want[i]), true);
            cr_expect(want[i] == NOISE_SITE_HEAD && !layer ? got >= least : got == least,
                      "site %d in layer %d: %d times in %d passes", want[i], layer, got, passes);
        }
}

Test(noise_sites, each_operation_hits_its_own_sites_as_often_as_expected) {
    for (size_t i = 0; i < COUNT_OF(sites); i++)
        for (int way = 1; way <= 3; way++) {
            struct world w;
            float lp[SCORED];
            const struct noise_text t = text(sites[i].op, way & 1, way & 2);
            world_open(&w, MODEL_QUANT_MXFP4, 1);
            make(&w, &t, NULL);
            const struct noise_evidence ev = trained(&w, 1, lp);
            cr_expect_gt(ev.passes[NOISE_BACKWARD], 1, "one micro-batch shows little");
            if (way & 1) expect_sites(&w, &ev, sites[i].forward, false);
            if (way & 2) expect_sites(&w, &ev, sites[i].backward, true);
            for (int c = 0; c < call_count; c++) {
                const int number = (int)(calls[c].site >> 16 & 255);
                bool known = number >= NOISE_SITE_GRAD && !i && (way & 2);
                for (int j = 0; j < 4; j++)
                    known |= ((way & 1) && number == sites[i].forward[j]) ||
                             ((way & 2) && sites[i].backward[j] && number == sites[i].backward[j]);
                known |= !i && (way & 1) && number <= PROJ_DOWN;
                cr_expect(known, "%s, way %d: site %d was hit", sites[i].op, way, number);
            }
            for (int op = 0; op < NOISE_OP_COUNT; op++)
                for (int d = 0; d < 2; d++)
                    cr_expect_eq(ev.op[op][d].elements > 0,
                                 !strcmp(noise_op_name[op], sites[i].op) && (way & (d ? 2 : 1)));
            cr_expect_eq(ev.grad.sites, !i && (way & 2));
            world_close(&w);
        }
}

Test(noise_sites, chosen_layers_only_and_in_no_layer) {
    struct world w;
    float lp[SCORED];
    struct noise_text t = text("all", true, true);
    t.layers = "1";
    world_open(&w, MODEL_QUANT_NVFP4, 1);
    make(&w, &t, NULL);
    trained(&w, 1, lp);
    cr_expect_gt(call_count, 20);
    for (int c = 0; c < call_count; c++) {
        cr_expect_eq(calls[c].site >> 24, 1, "site %x", calls[c].site);
        cr_expect_not(final_site((int)(calls[c].site >> 16 & 255)), "site %x", calls[c].site);
    }
    world_close(&w);
}

static size_t first_alloc;
static int (*alloc_real)(struct kern *, kptr *, size_t, struct err *);
static int alloc_spy(struct kern *k, kptr *out, size_t bytes, struct err *e) {
    if (!first_alloc) first_alloc = bytes;
    return alloc_real(k, out, bytes, e);
}

Test(noise_sites, modules_count_at_each_point) {
    for (int at = NOISE_POINT_INPUT; at <= NOISE_POINT_WEIGHT; at++) {
        struct world w;
        float lp[SCORED];
        struct noise_text m = text_modules("linear, rmsnorm, lm_head", (enum noise_point)at);
        m.exclude = "layers.1";
        world_open(&w, MODEL_QUANT_MXFP4, 2);
        make(&w, NULL, &m);
        alloc_real = w.f.kern.alloc;
        w.f.kern.alloc = alloc_spy;
        first_alloc = 0;
        for (int phase = NOISE_PHASE_LOGPROB; phase <= NOISE_PHASE_UPDATE; phase++) {
            net_set_noise(w.n, &w.plan, (enum noise_phase)phase, 1, 2);
            if (phase == NOISE_PHASE_LOGPROB) score(&w, lp);
            else free(train(&w, lp));
            struct noise_evidence ev = take(&w);
            expect_happened(&w, (enum noise_phase)phase, &ev);
            cr_expect_eq(ev.module[NOISE_MODULE_Q].sites, 2 * ev.passes[NOISE_FORWARD]);
            cr_expect_eq(ev.module[NOISE_MODULE_NORM_FINAL].sites, ev.wanted);
            cr_expect_eq(ev.module[NOISE_MODULE_HEAD].sites, ev.wanted);
        }
        /* noise on weights is the one kind that needs room of its own, and says how much */
        cr_expect_eq(first_alloc, net_plan_weights(&w.c, MODEL_QUANT_MXFP4, &w.plan));
        cr_expect_eq(first_alloc > 0, at == NOISE_POINT_WEIGHT);
        world_close(&w);
    }
}

Test(noise_sites, small_noise_on_inputs_survives_their_storage_in_bf16) {
    static const char *const targets[] = { "linear", "lm_head", "down_proj", "rmsnorm" };
    for (size_t i = 0; i < COUNT_OF(targets); i++) {
        struct world w;
        float clean[SCORED], lp[SCORED];
        struct noise_text m = text_modules(targets[i], NOISE_POINT_INPUT);
        int differ = 0;
        m.scale = 1e-5;
        world_open(&w, MODEL_QUANT_BF16, 1);
        make(&w, NULL, &m);
        score(&w, clean);
        take(&w);
        scored(&w, 1, lp);
        for (int j = 0; j < SCORED; j++) differ += lp[j] != clean[j];
        cr_expect_gt(differ, SCORED / 2, "%s: %d log-probs differ", targets[i], differ);
        world_close(&w);
    }
}

Test(noise_sites, weights_drawn_once_are_counted_once_however_often_they_are_asked_for) {
    struct world w;
    struct err e = { 0 };
    float lp[SCORED];
    struct noise_text m = text_modules("linear, rmsnorm, lm_head", NOISE_POINT_WEIGHT);
    world_open(&w, MODEL_QUANT_BF16, 2);
    make(&w, NULL, &m);
    for (int seed = 1; seed <= 2; seed++) {
        struct noise_evidence sum = { 0 };
        net_set_noise(w.n, &w.plan, NOISE_PHASE_LOGPROB, (uint64_t)seed, 2);
        for (int i = 0; i < 50; i++) {
            call_count = 0;
            score(&w, lp);
            cr_assert_eq(net_take_noise(w.n, &sum, &e), 0, "%s", e.text);
        }
        expect_happened(&w, NOISE_PHASE_LOGPROB, &sum);
        for (enum proj p = 0; p < PROJ_COUNT; p++) {
            int out, in;
            model_proj_shape(&w.c, p, &out, &in);
            cr_expect_eq(sum.module[p].elements, (int64_t)w.c.layers * out * in, "%s: %lld", noise_module_name[p],
                         (long long)sum.module[p].elements);
        }
        cr_expect_eq(sum.module[NOISE_MODULE_NORM_IN].elements, w.c.layers * w.c.dim);
        cr_expect_eq(sum.module[NOISE_MODULE_HEAD].elements, w.c.vocab * w.c.dim);
        cr_expect_eq(sum.module[NOISE_MODULE_Q].sites, w.c.layers * sum.passes[NOISE_FORWARD]);
        /* the draw is still there, and whoever asks for the first time hears of it */
        struct noise_evidence other = { 0 };
        score(&w, lp);
        cr_assert_eq(net_take_noise(w.n, &other, &e), 0, "%s", e.text);
        cr_expect_eq(other.module[NOISE_MODULE_Q].r2, sum.module[NOISE_MODULE_Q].r2);
    }
    world_close(&w);
}

/* The counter of that type has no row: what else would tell rows of a long gradient apart? */
Test(noise_sites, a_fixed_bias_of_the_gradient_does_not_repeat) {
    struct world w;
    float lp[SCORED];
    struct noise_text m = text("matmul", false, true);
    m.type = KERN_NOISE_SYSTEMATIC;
    world_open(&w, MODEL_QUANT_F32, 2);
    lora_destroy(&w.l);
    w.l = fix_lora(&w.c, 16, 8, .2f, 7);
    world_net(&w, false);
    make(&w, &m, NULL);
    const size_t params = w.l->params, layer = params / (size_t)w.c.layers;
    cr_assert(layer > 2 * 4096);
    net_set_noise(w.n, &w.plan, NOISE_PHASE_UPDATE, 1, 2);
    float *before = train(&w, lp), *after = mem_alloc(params * sizeof *after);
    for (uint64_t update = 0; update < 2; update++) {
        w.f.kern.upload(&w.f.kern, net_grad(w.n), before, params * sizeof *before);
        net_noise_grad(w.n, update);
        w.f.kern.download(&w.f.kern, after, net_grad(w.n), params * sizeof *after);
        int same = 0, seen = 0;
        struct kern_noise n = { .type = KERN_NOISE_SYSTEMATIC };
        rng_key(n.key, 2, RNG_PURPOSE_OP_NOISE, 1);
        for (size_t i = 0; i < layer; i++) {
            const uint32_t counter[4] = { ~0u, KERN_NOISE_NO_SAMPLE, ~0u, KERN_NOISE_SITE(0, NOISE_SITE_GRAD) | (uint32_t)(i / 4) };
            float z[4];
            kern_noise_draw4(z, &n, counter);
            cr_assert_float_eq(after[i], before[i] * (1 + .02f * z[i % 4]), 1e-6f * fabsf(before[i]), "element %zu", i);
            if (i < 4096 || before[i] == 0 || before[i - 4096] == 0) continue;
            const bool up = fabsf(after[i]) > fabsf(before[i]), was_up = fabsf(after[i - 4096]) > fabsf(before[i - 4096]);
            same += up == was_up;
            seen++;
        }
        cr_assert(seen > 1000);
        cr_expect(abs(2 * same - seen) < seen / 4, "%d of %d signs come again after 4,096 elements", same, seen);
    }
    free(before);
    free(after);
    world_close(&w);
}

/* Only they hold AQN's noise; and the draw is measured once. */
Test(noise_sites, another_aqn_draw_makes_the_noise_of_norms_anew_and_no_other) {
    struct world w;
    struct err e = { 0 };
    struct noise_view v;
    float alone[SCORED], with[SCORED], lp[SCORED];
    struct noise_text m = text_modules("q_proj, rmsnorm", NOISE_POINT_WEIGHT);
    world_open(&w, MODEL_QUANT_BF16, 2);
    make(&w, NULL, &m);
    cr_assert_eq(noise_view_open(&v, &w.f.model, NULL, .05, 5, 6, &e), 0, "%s", e.text);
    net_set_noise(w.n, &w.plan, NOISE_PHASE_LOGPROB, 1, 2);
    score(&w, alone);
    const struct noise_evidence first = take(&w);
    for (int round = 0; round < 2; round++) {
        cr_assert_eq(net_adopt(w.n, w.l, &v, &e), 0, "%s", e.text);
        call_count = 0;
        score(&w, round ? lp : with);
        cr_expect_eq(calls_at(KERN_NOISE_SITE(0, NOISE_SITE_MODULE_WEIGHT + NOISE_MODULE_Q), true), 0);
        cr_expect_eq(calls_at(KERN_NOISE_SITE(0, NOISE_SITE_MODULE_WEIGHT + NOISE_MODULE_Q), false), 0);
        cr_expect_eq(calls_at(KERN_NOISE_SITE(0, NOISE_SITE_MODULE_WEIGHT + NOISE_MODULE_NORM_IN), false), 1);
        cr_expect_eq(calls_at(KERN_NOISE_SITE(0, NOISE_SITE_MODULE_WEIGHT + NOISE_MODULE_NORM_IN), true), 0);
        const struct noise_evidence again = take(&w);
        cr_expect_eq(again.module[NOISE_MODULE_NORM_IN].r2, first.module[NOISE_MODULE_NORM_IN].r2);
        cr_assert_eq(net_adopt(w.n, w.l, NULL, &e), 0, "%s", e.text);
        float without[SCORED];
        score(&w, without);
        cr_expect(memcmp(alone, without, sizeof alone) == 0, "AQN stayed behind");
        take(&w);
    }
    cr_expect(memcmp(with, lp, sizeof with) == 0);
    cr_expect(memcmp(with, alone, sizeof with) != 0);
    noise_view_close(&v);
    world_close(&w);
}

/* A device's graphs keep addresses: seeds change what lies there. */
Test(noise_sites, noise_on_weights_is_made_again_in_place) {
    struct world w;
    float lp[3][SCORED];
    struct noise_text m = text_modules("linear, rmsnorm, lm_head", NOISE_POINT_WEIGHT);
    world_open(&w, MODEL_QUANT_BF16, 2);
    make(&w, NULL, &m);
    alloc_real = w.f.kern.alloc;
    w.f.kern.alloc = alloc_spy;
    first_alloc = 0;
    for (int i = 0; i < 3; i++) {
        net_set_noise(w.n, &w.plan, NOISE_PHASE_LOGPROB, i == 1 ? 3 : 1, 2);
        score(&w, lp[i]);
        take(&w);
        cr_expect_eq(first_alloc > 0, i == 0, "seed %d", i);
        first_alloc = 0;
    }
    cr_expect(memcmp(lp[0], lp[1], sizeof lp[0]) != 0);
    cr_expect(memcmp(lp[0], lp[2], sizeof lp[0]) == 0, "something of another seed stayed behind");
    world_close(&w);
}

/* ---- whose draw it is ---- */

Test(noise_sites, rows_carry_prompt_sample_and_position) {
    struct world w;
    const struct noise_text t = text("head, rope", true, false);
    float lp[SCORED];
    world_open(&w, MODEL_QUANT_BF16, 1);
    make(&w, &t, NULL);
    net_set_noise(w.n, &w.plan, NOISE_PHASE_LOGPROB, 1, 2);
    score(&w, lp);
    int heads = 0;
    for (int c = 0; c < call_count; c++) {
        const int number = (int)(calls[c].site >> 16 & 255);
        cr_expect(calls[c].prompt == 3 || calls[c].prompt == 4);
        if (number != NOISE_SITE_HEAD) continue;
        /* first wanted row: the prompt's last token, or one of the answer */
        cr_expect(calls[c].pos >= PROMPT - 1 && calls[c].pos < TOKENS);
        cr_expect_eq(calls[c].sample == KERN_NOISE_NO_SAMPLE, calls[c].pos < PROMPT);
        heads++;
    }
    cr_expect_gt(heads, 0);
    world_close(&w);
}

Test(noise_sites, another_seed_gives_other_bits_and_the_same_one_the_same) {
    static const enum model_quant quants[] = { MODEL_QUANT_BF16, MODEL_QUANT_MXFP4, MODEL_QUANT_NVFP4 };
    for (size_t q = 0; q < COUNT_OF(quants); q++) {
        struct world w;
        float first[SCORED], again[SCORED], other[SCORED], trained[SCORED];
        struct noise_text t = text("all", true, true);
        world_open(&w, quants[q], 1 + (int)q);
        make(&w, &t, NULL);
        net_set_noise(w.n, &w.plan, NOISE_PHASE_LOGPROB, 1, 2);
        score(&w, first);
        net_set_noise(w.n, &w.plan, NOISE_PHASE_LOGPROB, 3, 2);
        score(&w, other);
        net_set_noise(w.n, &w.plan, NOISE_PHASE_ROLLOUT, 1, 2);
        score(&w, again);
        net_set_noise(w.n, &w.plan, NOISE_PHASE_UPDATE, 1, 2);
        free(train(&w, trained));
        int differ = 0;
        for (int i = 0; i < SCORED; i++) differ += memcmp(&first[i], &other[i], sizeof *first) != 0;
        cr_expect_gt(differ, SCORED * 9 / 10);
        cr_expect_eq(memcmp(first, again, sizeof first), 0);
        cr_expect_eq(memcmp(first, trained, sizeof first), 0);
        /* systematic hangs on the fixed seed alone */
        t.type = KERN_NOISE_SYSTEMATIC;
        make(&w, &t, NULL);
        net_set_noise(w.n, &w.plan, NOISE_PHASE_LOGPROB, 1, 2);
        score(&w, first);
        net_set_noise(w.n, &w.plan, NOISE_PHASE_LOGPROB, 99, 2);
        score(&w, again);
        net_set_noise(w.n, &w.plan, NOISE_PHASE_LOGPROB, 1, 5);
        score(&w, other);
        cr_expect_eq(memcmp(first, again, sizeof first), 0);
        cr_expect_neq(memcmp(first, other, sizeof first), 0);
        world_close(&w);
    }
}

/* ---- sizes ---- */

/* Nobody is accused: many seeds, types, scales and bases, groups that share their prompts. */
Test(noise_sites, realised_sizes_lie_within_their_error) {
    static const int types[] = { KERN_NOISE_RELATIVE_GAUSSIAN, KERN_NOISE_RELATIVE_UNIFORM, KERN_NOISE_SYSTEMATIC,
                                 KERN_NOISE_SPARSE };
    static const enum model_quant quants[] = { MODEL_QUANT_BF16, MODEL_QUANT_MXFP4, MODEL_QUANT_NVFP4 };
    for (size_t q = 0; q < COUNT_OF(quants); q++) {
        struct world w;
        float lp[SCORED];
        world_open(&w, quants[q], 2);
        for (int i = 0; i < 24; i++) {
            struct noise_text t = text("all", true, true);
            t.type = types[i % 4];
            t.rate = .05;
            t.scale = pow(10, -6 + i / 4);
            make(&w, &t, NULL);
            const struct noise_evidence ev = trained(&w, (uint64_t)i * 7 + q, lp);
            cr_expect_eq(ev.rows, SEQS * (TOKENS - 1));
            cr_expect_eq(ev.rows_squared, SEQS * (TOKENS - 1 - PROMPT) + 2 * PROMPT * GROUP * GROUP);
        }
        world_close(&w);
    }
}

/* Under bf16 arithmetic sizes that are lost, kept in part and kept are told from each other. */
Test(noise_sites, sizes_under_bf16_lie_within_its_steps) {
    static const int types[] = { KERN_NOISE_RELATIVE_GAUSSIAN, KERN_NOISE_RELATIVE_UNIFORM, KERN_NOISE_SYSTEMATIC,
                                 KERN_NOISE_SPARSE, KERN_NOISE_DEADZONE };
    static const double scales[] = { 1e-5, 1e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2, .1 };
    for (int base = 0; base < 2; base++) {
        struct world w;
        float lp[SCORED];
        world_open(&w, base ? MODEL_QUANT_MXFP4 : MODEL_QUANT_BF16, 2);
        for (size_t i = 0; i < COUNT_OF(types) * COUNT_OF(scales); i++) {
            struct noise_text t = text("all", true, true);
            t.type = types[i % COUNT_OF(types)];
            t.rate = .05;
            t.scale = scales[i / COUNT_OF(types)];
            t.bf16 = true;
            if (t.type == KERN_NOISE_DEADZONE && t.scale < 5e-2) continue;
            if (t.type == KERN_NOISE_DEADZONE) t.backward = t.phase[NOISE_PHASE_UPDATE] = false;
            make(&w, &t, NULL);
            if (t.backward) trained(&w, i * 7 + (size_t)base, lp);
            else scored(&w, i * 7 + (size_t)base, lp);
        }
        world_close(&w);
    }
}

Test(noise_sites, absolute_sizes_lie_within_what_their_arithmetic_can_hold) {
    struct world w;
    float lp[SCORED];
    world_open(&w, MODEL_QUANT_BF16, 2);
    for (int i = 0; i < 24; i++) {
        struct noise_text m = text_modules("linear, rmsnorm, lm_head",
                                           i % 4 < 2 ? NOISE_POINT_OUTPUT : NOISE_POINT_INPUT);
        m.type = i % 2 ? KERN_NOISE_BIAS : KERN_NOISE_ABSOLUTE_GAUSSIAN;
        m.scale = pow(10, -6 + i % 12 / 2);
        m.bf16 = i >= 12;
        make(&w, NULL, &m);
        scored(&w, (uint64_t)i * 7, lp);
    }
    world_close(&w);
}

/* Each type that weights take, on each kind of base: it happened, and rollout and learner have the same. */
Test(noise_sites, every_type_lies_beside_weights) {
    static const int types[] = { KERN_NOISE_RELATIVE_GAUSSIAN, KERN_NOISE_ABSOLUTE_GAUSSIAN, KERN_NOISE_BIAS,
                                 KERN_NOISE_DEADZONE };
    static const enum model_quant quants[] = { MODEL_QUANT_BF16, MODEL_QUANT_MXFP4, MODEL_QUANT_NVFP4 };
    for (size_t q = 0; q < COUNT_OF(quants); q++) {
        struct world w;
        float clean[SCORED], lp[SCORED], again[SCORED];
        world_open(&w, quants[q], 2);
        score(&w, clean);
        take(&w);
        for (size_t i = 0; i < COUNT_OF(types); i++) {
            const bool flush = types[i] == KERN_NOISE_DEADZONE;      /* the small net's norms lie near 1 */
            struct noise_text m = text_modules(flush ? "linear, lm_head" : "linear, rmsnorm, lm_head",
                                               NOISE_POINT_WEIGHT);
            m.type = types[i];
            m.scale = flush ? .3 : .01;
            make(&w, NULL, &m);
            const struct noise_evidence ev = scored(&w, i + 1, lp);
            for (int module = 0; module < NOISE_MODULE_COUNT; module++) {
                const struct noise_tally *t = &ev.module[module];
                cr_expect_eq(t->changed > 0, w.plan.module_sites[module] > 0, "%s", noise_module_name[module]);
                cr_expect(!flush || t->r2 == t->changed << 20);
            }
            cr_expect(memcmp(lp, clean, sizeof lp) != 0);
            net_set_noise(w.n, &w.plan, NOISE_PHASE_UPDATE, i + 1, 2);
            free(train(&w, again));
            cr_expect_eq(memcmp(lp, again, sizeof lp), 0);
            take(&w);
        }
        world_close(&w);
    }
}

/* Trained through on each base: log-probs of the pass that saves are those of the one that does not, each site was hit
 * forward only, and the room for the rows' edges is counted. */
Test(noise_sites, a_dead_zone_in_attention_is_trained_through) {
    static const enum model_quant quants[] = { MODEL_QUANT_BF16, MODEL_QUANT_MXFP4, MODEL_QUANT_NVFP4 };
    for (size_t q = 0; q < COUNT_OF(quants); q++) {
        struct world w;
        float want[SCORED], lp[SCORED];
        struct noise_text t = text("bmm, softmax", true, false);
        t.type = KERN_NOISE_DEADZONE;
        t.scale = .2;
        world_open(&w, quants[q], 2);
        const struct net_opts without = opts(&w, false), with = opts(&w, true);
        cr_expect_eq(net_plan(&w.c, quants[q], &with) - net_plan(&w.c, quants[q], &without),
                     (size_t)w.c.layers * ((180u * (size_t)w.c.heads * 8 + 63) & ~(size_t)63));
        world_net(&w, true);
        make(&w, &t, NULL);
        cr_expect(noise_plan_peaks(&w.plan));
        scored(&w, 1, want);
        net_set_noise(w.n, &w.plan, NOISE_PHASE_UPDATE, 1, 2);
        float *grad = train(&w, lp);
        struct noise_evidence ev = take(&w);
        expect_happened(&w, NOISE_PHASE_UPDATE, &ev);
        cr_expect_eq(memcmp(want, lp, sizeof lp), 0);
        cr_expect_gt(ev.op[NOISE_OP_SOFTMAX][NOISE_FORWARD].changed, 100);
        cr_expect_eq(ev.op[NOISE_OP_BMM][NOISE_FORWARD].r2, ev.op[NOISE_OP_BMM][NOISE_FORWARD].changed << 20);
        for (size_t i = 0; i < w.l->params; i++) cr_assert(isfinite(grad[i]));
        free(grad);
        world_close(&w);
    }
}

static double distance(const float *a, const float *b, size_t n) {
    double d = 0, size = 0;
    for (size_t i = 0; i < n; i++) {
        d += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        size += (double)b[i] * (double)b[i];
    }
    return sqrt(d / size);
}

Test(noise_sites, backward_noise_leaves_log_probs_alone_and_moves_the_gradient_by_its_size) {
    struct world w;
    float clean[SCORED], lp[SCORED];
    world_open(&w, MODEL_QUANT_MXFP4, 1);
    float *want = train(&w, clean), *grad = mem_alloc(w.l->params * sizeof *grad);
    for (size_t i = 0; i < COUNT_OF(sites); i++) {
        const struct noise_text t = text(sites[i].op, false, true);
        make(&w, &t, NULL);
        net_set_noise(w.n, &w.plan, NOISE_PHASE_UPDATE, 1, 2);
        call_count = 0;
        float *got = train(&w, lp);
        cr_expect_eq(memcmp(clean, lp, sizeof lp), 0, "%s: backward noise reached a log-prob", sites[i].op);
        /* each gradient is a sum over many rows, along which independent errors average out */
        const double moved = distance(got, want, w.l->params);
        cr_expect(moved > .02 / 30 && moved < .02 * 4, "%s: the gradient moved by %g", sites[i].op, moved);
        if (i == 0) {
            net_noise_grad(w.n, 4);
            w.f.kern.download(&w.f.kern, grad, net_grad(w.n), w.l->params * sizeof *grad);
            const double d = distance(grad, got, w.l->params);
            cr_expect(d > .015 && d < .025, "the accumulated gradient moved by %g", d);
        }
        free(got);
    }
    /* in a phase without a backward there is none */
    const struct noise_text t = text("matmul", true, true);
    make(&w, &t, NULL);
    net_set_noise(w.n, &w.plan, NOISE_PHASE_LOGPROB, 1, 2);
    call_count = 0;
    score(&w, lp);
    net_noise_grad(w.n, 0);
    for (int c = 0; c < call_count; c++) cr_expect_lt(calls[c].site >> 16 & 255, 128);
    free(want);
    free(grad);
    world_close(&w);
}

Test(noise_sites, bf16_arithmetic_shows_what_it_realises) {
    struct world w;
    float clean[SCORED], lp[SCORED];
    struct noise_text t = text("matmul, head", true, false);
    world_open(&w, MODEL_QUANT_BF16, 1);
    t.bf16 = true;
    t.scale = 1e-4;
    make(&w, &t, NULL);
    score(&w, clean);
    take(&w);
    const struct noise_evidence ev = scored(&w, 1, lp);
    cr_expect_gt(ev.op[NOISE_OP_MATMUL][NOISE_FORWARD].elements, 1000);
    cr_expect_eq(ev.op[NOISE_OP_MATMUL][NOISE_FORWARD].changed, 0);
    json_t *all = noise_evidence_json(&w.plan, NOISE_PHASE_LOGPROB, &ev);
    cr_expect_not_null(json_object_get(json_object_get(all, "op/matmul/forward"), "warning"));
    json_decref(all);
    t.bf16 = false;
    make(&w, &t, NULL);
    net_set_noise(w.n, &w.plan, NOISE_PHASE_LOGPROB, 1, 2);
    score(&w, lp);
    struct noise_evidence f32 = take(&w);
    cr_expect_gt(f32.op[NOISE_OP_MATMUL][NOISE_FORWARD].changed, f32.op[NOISE_OP_MATMUL][NOISE_FORWARD].elements * 9 / 10);
    world_close(&w);
}

/* ---- the generator ---- */

static int samples_seen;
static void take_sample(void *ud, const struct gen_sample *s) {
    float (*lp)[8] = ud;
    memcpy(lp[s->tag * 4 + (uint64_t)s->k], s->lp, (size_t)s->n * sizeof(float));
    samples_seen++;
}

Test(noise_sites, the_generator_counts_passes_and_hands_identities_on) {
    struct world w;
    struct err e = { 0 };
    const struct noise_text t = text("all", true, true);
    float lp[2][8][8] = { 0 };
    world_open(&w, MODEL_QUANT_MXFP4, 1);
    make(&w, &t, NULL);
    for (int batch = 0; batch < 2; batch++) {
        struct gen *g;
        struct noise_evidence ev = { 0 };
        const struct gen_opts o = { .rows = batch ? 1 : 5, .positions_max = 40, .lora = w.l->shape, .noise = true };
        cr_assert_eq(gen_create(&g, &w.f.model, NULL, &o, &e), 0, "%s", e.text);
        cr_assert_eq(gen_adopt(g, w.l, NULL, &e), 0);
        gen_set_noise(g, &w.plan, NOISE_PHASE_ROLLOUT, 1, 2);
        for (uint64_t p = 0; p < 2; p++)
            cr_assert_eq(gen_submit(g, &(struct gen_request){ .tag = p, .prompt = ids[p * GROUP], .prompt_n = 6,
                                                              .samples = 4, .new_max = 8, .temperature = 1,
                                                              .top_p = 1, .prompt_uid = p + 3, .key = { 1, 2 } },
                                    &e), 0, "%s", e.text);
        for (; !gen_idle(g); call_count = 0)
            cr_assert_eq(gen_step(g, take_sample, lp[batch], &e), 0, "%s", e.text);
        cr_assert_eq(gen_take_noise(g, &ev, &e), 0);
        expect_happened(&w, NOISE_PHASE_ROLLOUT, &ev);
        cr_expect_eq(ev.op[NOISE_OP_HEAD][NOISE_FORWARD].sites, ev.wanted);
        cr_expect_eq(ev.op[NOISE_OP_MATMUL][NOISE_FORWARD].sites, 7 * w.c.layers * ev.passes[NOISE_FORWARD]);
        gen_destroy(&g);
    }
    cr_expect_eq(samples_seen, 16);
    cr_expect_eq(memcmp(lp[0], lp[1], sizeof lp[0]), 0);
    world_close(&w);
}
