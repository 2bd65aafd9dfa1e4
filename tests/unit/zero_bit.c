/* zero_bit.c - the zero-bit rule: a token's log-prob has the same bits whoever computes it, and so
 * has the gradient.
 *
 * One test a path. For each small model, weight format and dress (adapter, AQN, noise on operations and
 * modules: the same seed, whatever the phase), the first way of
 * playing is the truth: other batches, threads, chunks of the prompt, shared pages, refilled slots,
 * scoring and training must give its bits, and its first sequences must have those of ref. Paths in
 * plain C (ref, amx-emulated) do a part of it, so that the suite takes half a minute.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/unit/net_fixture.h"

#include <criterion/criterion.h>

#include "lib/base/rng.h"

enum { SEQS = 33, GROUP = 3, PROMPT_MAX = 65, NEW_MAX = 8, POSITIONS = PROMPT_MAX + NEW_MAX,
       BATCH_MAX = 33, SEQS_SLOW = 6 };
static const float TEMPERATURE = .9f;

static const struct shape { const char *name; struct model_conf conf; } shapes[] = {
    { "qwen2, 6 heads of 10 in groups of 3",
      { .arch = MODEL_ARCH_QWEN2, .vocab = 61, .dim = 50, .layers = 2, .heads = 6, .kv_heads = 2,
        .head_dim = 10, .ffn_dim = 75, .tied = true, .qkv_bias = true } },
    { "llama, 7 heads of 64 in one group",
      { .arch = MODEL_ARCH_LLAMA, .vocab = 47, .dim = 33, .layers = 2, .heads = 7, .kv_heads = 1,
        .head_dim = 64, .ffn_dim = 40 } },
    { "llama, 3 heads of 22 in groups of 1",
      { .arch = MODEL_ARCH_LLAMA, .vocab = 50, .dim = 66, .layers = 2, .heads = 3, .kv_heads = 3,
        .head_dim = 22, .ffn_dim = 31, .tied = true } },
};
/* f32 too: there no rounding to bf16 hides a small difference */
static const struct format {
    const char *name;
    enum model_quant weights, activations;
    enum model_rounding rounding;                    /* of the activations */
    bool some;                                       /* some inputs are left alone */
    enum model_quant adapter;
} formats[] = {
    { "mxfp4", MODEL_QUANT_MXFP4, MODEL_QUANT_BF16, MODEL_ROUNDING_OCP, false, MODEL_QUANT_BF16 },
    { "nvfp4", MODEL_QUANT_NVFP4, MODEL_QUANT_BF16, MODEL_ROUNDING_OCP, false, MODEL_QUANT_BF16 },
    { "bf16", MODEL_QUANT_BF16, MODEL_QUANT_BF16, MODEL_ROUNDING_OCP, false, MODEL_QUANT_BF16 },
    { "f32", MODEL_QUANT_F32, MODEL_QUANT_BF16, MODEL_ROUNDING_OCP, false, MODEL_QUANT_BF16 },
    { "mxfp4, inputs too", MODEL_QUANT_MXFP4, MODEL_QUANT_MXFP4, MODEL_ROUNDING_SEED, false, MODEL_QUANT_BF16 },
    { "nvfp4, most inputs too", MODEL_QUANT_NVFP4, MODEL_QUANT_NVFP4, MODEL_ROUNDING_OCP, true, MODEL_QUANT_BF16 },
    { "mxfp4, adapters in nvfp4", MODEL_QUANT_MXFP4, MODEL_QUANT_BF16, MODEL_ROUNDING_SEED, false,
      MODEL_QUANT_NVFP4 },
    { "nvfp4, inputs and adapters in mxfp4", MODEL_QUANT_NVFP4, MODEL_QUANT_MXFP4,
      MODEL_ROUNDING_OCP, false, MODEL_QUANT_MXFP4 },
    { "f32, inputs and adapters of a layer in nvfp4", MODEL_QUANT_F32, MODEL_QUANT_NVFP4,
      MODEL_ROUNDING_OCP, true, MODEL_QUANT_NVFP4 },
};
static const struct dress { const char *name; bool lora; double sigma; bool ops; } dresses[] = {
    { "bare", false, 0, false }, { "adapter", true, 0, false }, { "adapter and AQN", true, .02, false },
    { "adapter, AQN and noise everywhere", true, .02, true },
};

/* Ways to decode: sequences at once, prompt tokens a call (0 = all), whether samples of a group
 * share pages of the prompt, whether all pages held something else before. The first is the truth.
 * Below 33 sequences at once, slots are refilled as sequences end. */
static const struct play { const char *name; int threads, batch, chunk; bool share, stale; }
    plays[] = {
        { "33 at once, prompts whole", 1, 33, 0, false, false },
        { "one after the other, prompts whole", 2, 1, 0, false, true },
        { "one after the other, prompts token by token", 1, 1, 1, false, false },
        { "7 at once, prompts whole, pages shared", 2, 7, 0, true, true },
        { "7 at once, prompts in chunks of 5, own pages", 3, 7, 5, false, true },
        { "16 at once, prompts token by token, pages shared", 3, 16, 1, true, false },
        { "16 at once, prompts in chunks of 31, own pages", 1, 16, 31, false, true },
        { "33 at once, prompts in chunks of 16, pages shared", 2, 33, 16, true, true },
        { "33 at once, prompts token by token, own pages", 3, 33, 1, false, false },
    };
/* net_logprobs with these rows a call */
static const struct score { const char *name; int threads, rows, slots; } scores[] = {
    { "scored, 300 rows a call", 1, 300, 4 },
    { "scored, 7 rows a call", 2, 7, 2 },
    { "scored, 1 row a call", 1, 1, 1 },
    { "scored, 64 rows a call", 3, 64, 16 },
};
/* net_train with these micro-batches; the first gradient is the truth */
static const struct score trains[] = {
    { "trained, micro-batches of 1000 rows", 1, 1000, 64 },
    { "trained, micro-batches of one sequence", 2, POSITIONS, 1 },
    { "trained, micro-batches of 150 rows", 3, 150, 5 },
};

/* prompt and answer; lp of each token of the answer */
struct text { int prompt_n, n; int32_t ids[POSITIONS]; float lp[NEW_MAX]; };
/* one model in one format on one path, with 1, 2 and 3 threads */
struct world {
    const char *path;
    const struct shape *shape;
    const struct dress *dress;
    const struct format *format;
    struct model_conf conf;
    struct fix fix[3];
    struct noise_view noise[3];
    struct noise_plan plan;
    struct lora *lora;
    int seqs;
    bool slow;                                       /* a path in plain C */
};

static int prompt_length(int seq) {
    static const int n[SEQS / GROUP] = { 5, 33, 12, 64, 1, 31, 20, 40, 2, 32, 65 };
    return n[seq / GROUP];
}
static int answer_length(int seq) { return 2 + seq * 5 % (NEW_MAX - 1); }

static void text_start(const struct world *w, struct text *t) {
    memset(t, 0, (size_t)w->seqs * sizeof *t);
    for (int s = 0; s < w->seqs; s++) {
        t[s].prompt_n = t[s].n = prompt_length(s);
        for (int i = 0; i < t[s].n; i++)
            t[s].ids[i] = (int32_t)(rng_mix64((uint64_t)(s / GROUP * 1000 + i)) %
                                    (uint64_t)w->conf.vocab);
    }
}

/* --- the one comparison --- */

static void expect_same(const struct world *w, const char *way, const struct text *want,
                        const struct text *got, int seqs) {
    for (int s = 0; s < seqs; s++)
        for (int i = 0; i < want[s].n - want[s].prompt_n; i++) {
            const int at = want[s].prompt_n + i;
            if (want[s].n == got[s].n && want[s].ids[at] == got[s].ids[at] &&
                memcmp(&want[s].lp[i], &got[s].lp[i], sizeof(float)) == 0)
                continue;
            cr_expect(false,
                      "path %s, %s, %s, %s; %s: sequence %d, token %d is %d with log-prob %.9g "
                      "instead of %d with %.9g",
                      w->path, w->shape->name, w->format->name, w->dress->name, way, s, i,
                      got[s].ids[at], (double)got[s].lp[i], want[s].ids[at],
                      (double)want[s].lp[i]);
            return;                                  /* what follows a wrong token is another text */
        }
}

static void expect_same_grad(const struct world *w, const char *way, const float *want,
                             const float *got) {
    for (size_t i = 0; i < w->lora->params; i++)
        if (memcmp(&want[i], &got[i], sizeof *want) != 0) {
            cr_expect(false, "path %s, %s, %s, %s; %s: gradient %zu of %zu is %.9g instead of %.9g",
                      w->path, w->shape->name, w->format->name, w->dress->name, way, i,
                      w->lora->params, (double)got[i], (double)want[i]);
            return;
        }
}

/* --- decoding --- */

/* Memory as if the net had run before: nothing may depend on what is fresh. */
static int (*alloc_fresh)(struct kern *k, kptr *out, size_t bytes, struct err *e);
static int alloc_used(struct kern *k, kptr *out, size_t bytes, struct err *e) {
    if (alloc_fresh(k, out, bytes, e) < 0) return -1;
    memset(out->p, 0xff, bytes);                     /* a NaN in bf16 and in f32 */
    return 0;
}

static struct net *net_open(struct world *w, int threads, int rows, int slots, enum noise_phase phase,
                            bool stale) {
    struct net *n;
    struct err e = { 0 };
    struct net_opts o = { .rows_max = rows, .slots_max = slots, .positions_max = POSITIONS,
                          .train = phase == NOISE_PHASE_UPDATE, .lora = w->lora->shape,
                          .noise = w->dress->ops };
    struct fix *f = &w->fix[threads - 1];
    alloc_fresh = f->kern.alloc;
    if (stale) f->kern.alloc = alloc_used;
    cr_assert_eq(net_create(&n, &f->model, &o, &e), 0, "%s", e.text);
    f->kern.alloc = alloc_fresh;
    cr_assert_eq(net_adopt(n, w->dress->lora ? w->lora : NULL,
                           w->dress->sigma > 0 ? &w->noise[threads - 1] : NULL, &e), 0, "%s",
                 e.text);
    if (w->dress->ops) net_set_noise(n, &w->plan, phase, 5, 6);
    return n;
}

struct running { int seq, slot, fed; };              /* seq -1: free; fed: tokens given to the net */

/* Where sequence `seq` may begin: a slot of its own, or one that shares its group's prompt up to
 * the last token. False while the first of the group has not read the prompt yet. */
static bool begin(struct net *n, const struct play *p, struct running *run, int at, int seq) {
    const int first = seq - seq % GROUP, shared = prompt_length(seq) - 1;
    int slot = -1, fed = 0;
    for (int i = 0; p->share && i < p->batch; i++)
        if (run[i].seq == first && first != seq) {
            if (run[i].fed < shared) return false;
            slot = net_slot_fork(n, run[i].slot, fed = shared);
        }
    if (slot < 0) slot = net_slot_open(n);
    cr_assert(slot >= 0);
    run[at] = (struct running){ seq, slot, fed };
    return true;
}

/* One call for everybody: a chunk of the prompt, or the newest token. */
static void step(struct net *n, const struct play *p, struct running *run, struct text *t) {
    static struct net_row row[BATCH_MAX * PROMPT_MAX];
    struct kern_sampler draw[BATCH_MAX];
    int32_t want[BATCH_MAX], token[BATCH_MAX];
    float lp[BATCH_MAX], raw[BATCH_MAX];
    struct err e = { 0 };
    int rows = 0, wants = 0, who[BATCH_MAX];
    for (int i = 0; i < p->batch; i++) {
        if (run[i].seq < 0) continue;
        const struct text *x = &t[run[i].seq];
        int count = x->n - run[i].fed;
        if (p->chunk && count > p->chunk) count = p->chunk;
        for (int k = 0; k < count; k++, run[i].fed++)
            row[rows++] = (struct net_row){
                .token = x->ids[run[i].fed], .slot = run[i].slot, .pos = run[i].fed,
                .prompt = net_prompt_id((uint64_t)(run[i].seq / GROUP)),
                .sample = run[i].fed < x->prompt_n ? KERN_NOISE_NO_SAMPLE : (uint32_t)(run[i].seq % GROUP),
            };
        if (run[i].fed < x->n) continue;
        const uint64_t h = rng_mix64((uint64_t)(run[i].seq * 4096 + x->n));
        draw[wants] = (struct kern_sampler){ .temperature = TEMPERATURE, .top_p = 1,
                                             .u = (float)(h >> 40) * 0x1p-24f };
        who[wants] = i;
        want[wants++] = rows - 1;
    }
    cr_assert_eq(net_forward(n, row, rows, want, wants, &e), 0, "%s", e.text);
    cr_assert_eq(net_sample(n, draw, token, lp, raw, &e), 0, "%s", e.text);
    for (int i = 0; i < wants; i++) {
        struct running *r = &run[who[i]];
        struct text *x = &t[r->seq];
        x->lp[x->n - x->prompt_n] = lp[i];
        x->ids[x->n++] = token[i];
        if (x->n - x->prompt_n < answer_length(r->seq)) continue;
        net_slot_close(n, r->slot);
        r->seq = -1;
    }
}

static void play(struct world *w, const struct play *p, struct text *t) {
    struct running run[BATCH_MAX];
    struct net *n = net_open(w, p->threads, p->batch * (p->chunk ? p->chunk : PROMPT_MAX), p->batch,
                             NOISE_PHASE_ROLLOUT, p->stale);
    text_start(w, t);
    for (int i = 0; i < p->batch; i++) run[i].seq = -1;
    for (int next = 0, busy = 1; busy;) {
        for (int i = 0; i < p->batch && next < w->seqs; i++)
            if (run[i].seq < 0 && !begin(n, p, run, i, next++)) {
                next--;
                break;
            }
        busy = 0;
        for (int i = 0; i < p->batch; i++) busy += run[i].seq >= 0;
        if (busy) step(n, p, run, t);
    }
    net_destroy(&n);
}

/* --- scoring and training --- */

static void as_seqs(const struct world *w, const struct text *t, struct net_seq seq[SEQS]) {
    for (int s = 0; s < w->seqs; s++)
        seq[s] = (struct net_seq){ .ids = t[s].ids, .n = t[s].n, .prompt_n = t[s].prompt_n,
                                   .uid = (uint64_t)(s / GROUP), .sample = s % GROUP };
}

static void score(struct world *w, const struct score *c, const struct text *truth, struct text *t) {
    float lp[SEQS * NEW_MAX], *at = lp;
    struct net_seq seq[SEQS];
    struct err e = { 0 };
    struct net *n = net_open(w, c->threads, c->rows, c->slots, NOISE_PHASE_LOGPROB, true);
    memcpy(t, truth, (size_t)w->seqs * sizeof *t);
    as_seqs(w, truth, seq);
    cr_assert_eq(net_logprobs(n, seq, w->seqs, TEMPERATURE, lp, NULL, &e), 0, "%s", e.text);
    for (int s = 0; s < w->seqs; at += t[s].n - t[s].prompt_n, s++)
        memcpy(t[s].lp, at, (size_t)(t[s].n - t[s].prompt_n) * sizeof *lp);
    net_destroy(&n);
}

static void loss(void *ud, int seq, int first, int count, const float *lp, const float *entropy,
                 float *coef) {
    struct text *t = ud;
    (void)entropy;
    for (int i = 0; i < count; i++) {
        t[seq].lp[first + i] = lp[i];
        coef[i] = (seq % 2 ? .03f : -.02f) * (1 + .01f * (float)(first + i)) + .001f * lp[i];
    }
}

static float *train(struct world *w, const struct score *c, const struct text *truth,
                    struct text *t) {
    struct net_seq seq[SEQS];
    struct err e = { 0 };
    struct net *n = net_open(w, c->threads, c->rows, c->slots, NOISE_PHASE_UPDATE, true);
    float *grad = calloc(w->lora->params, sizeof *grad);
    memcpy(t, truth, (size_t)w->seqs * sizeof *t);
    as_seqs(w, truth, seq);
    cr_assert_eq(net_train(n, seq, w->seqs, TEMPERATURE, loss, t, grad, &e), 0, "%s", e.text);
    net_destroy(&n);
    return grad;
}

/* --- worlds --- */

static void world_open(struct world *w, const char *path, const struct shape *s,
                       const struct format *format) {
    const struct noise_target_text everything = { .targets = "norms, linears", .exclude = "", .layers = "", .others = 1,
                                                  .zone_edge = "", .zone_middle = "" };
    struct noise_target target;
    struct err e = { 0 };
    *w = (struct world){ .path = path, .shape = s, .format = format, .conf = s->conf };
    w->slow = !strcmp(path, "ref") || !strcmp(path, "amx-emulated");
    w->seqs = w->slow ? SEQS_SLOW : SEQS;
    w->conf.positions_max = POSITIONS;
    w->conf.norm_eps = 1e-6f;
    w->conf.rope_theta = 10000;
    w->conf.bos = -1;
    w->lora = fix_lora(&w->conf, 5, 8, .2f, 7);
    /* each shape and format another kind: draws, faults, what depends on a whole row */
    static const int types[] = { KERN_NOISE_RELATIVE_GAUSSIAN, KERN_NOISE_SPARSE, KERN_NOISE_DEADZONE };
    const int type = types[s - shapes];
    enum noise_point point = (enum noise_point)((format - formats) % 3);
    /* together they are refused: see policy_plan */
    if (format->adapter && format->activations && point == NOISE_POINT_INPUT)
        point = NOISE_POINT_OUTPUT;
    const struct noise_text ops = { .type = type, .scale = .02, .rate = .2, .layers = "all",
                                    /* in an update attention cannot be flushed */
                                    .names = type == KERN_NOISE_DEADZONE ? "matmul, silu, norm, rope, head" : "all",
                                    .forward = true, .backward = type != KERN_NOISE_DEADZONE,
                                    .phase = { true, true, true } },
                            modules = { .type = point == NOISE_POINT_WEIGHT ? KERN_NOISE_RELATIVE_GAUSSIAN
                                                                            : KERN_NOISE_DEADZONE,
                                        .scale = .02, .layers = "all", .names = "q_proj, up_proj, rmsnorm, lm_head",
                                        .exclude = "", .phase = { true, true, true }, .point = point };
    cr_assert_eq(noise_plan_make(&w->plan, &ops, &modules, &w->conf, &e), 0, "%s", e.text);
    for (int i = 0; i < 3; i++) {
        fix_open(&w->fix[i], path, i + 1, &w->conf, format->weights, fix_small_value);
        fix_activations(&w->fix[i], format->activations, format->rounding,
                        format->some && !format->adapter);
        if (format->adapter)
            fix_adapter(&w->fix[i], format->adapter, format->rounding, format->some);
        cr_assert_eq(noise_target_make(&target, &everything, 0, 1, &w->conf, &e), 0, "%s", e.text);
        cr_assert_eq(noise_view_open(&w->noise[i], &w->fix[i].model, &target, .02, 1, 2, &e), 0, "%s", e.text);
    }
}
static void world_close(struct world *w) {
    for (int i = 0; i < 3; i++) {
        noise_view_close(&w->noise[i]);
        fix_close(&w->fix[i]);
    }
    lora_destroy(&w->lora);
}

/* All ways in one world must agree, and with what ref (or NULL) makes of its fewer sequences. */
static void agree(struct world *w, struct world *ref) {
    static struct text truth[SEQS], t[SEQS];
    float *want = NULL;
    play(w, &plays[0], truth);
    if (ref) {
        play(ref, &plays[0], t);
        expect_same(w, "against ref", t, truth, ref->seqs);
    }
    for (size_t i = 1; i < COUNT_OF(plays); i += w->slow ? 2 : 1) {
        play(w, &plays[i], t);
        expect_same(w, plays[i].name, truth, t, w->seqs);
    }
    for (size_t i = 0; i < COUNT_OF(scores); i += w->slow ? 2 : 1) {
        score(w, &scores[i], truth, t);
        expect_same(w, scores[i].name, truth, t, w->seqs);
    }
    for (size_t i = 0; w->dress->lora && i < COUNT_OF(trains); i += w->slow ? 2 : 1) {
        float *got = train(w, &trains[i], truth, t);
        expect_same(w, trains[i].name, truth, t, w->seqs);
        if (want) expect_same_grad(w, trains[i].name, want, got);
        else want = got;
        if (want != got) free(got);
    }
    free(want);
    if (!ref || !w->dress->lora) return;
    const int all = w->seqs;
    want = train(ref, &trains[0], truth, t);
    w->seqs = ref->seqs;
    float *got = train(w, &trains[0], truth, t);
    w->seqs = all;
    expect_same_grad(w, "gradient against ref", want, got);
    free(want);
    free(got);
}

static void on_path(const char *path) {
    struct kern k;
    struct err e = { 0 };
    const bool is_ref = !strcmp(path, "ref");
    if (kern_open(&k, path, NULL, &e) < 0) cr_skip_test("%s", e.text);
    for (size_t s = 0; s < COUNT_OF(shapes); s++)
        for (size_t q = 0; q < COUNT_OF(formats); q++) {
            struct world w, ref;
            world_open(&w, path, &shapes[s], &formats[q]);
            if (!is_ref) world_open(&ref, "ref", &shapes[s], &formats[q]);
            /* two of the three dresses, one on slow paths: each meets each shape and each format;
             * the first is held against ref */
            for (size_t d = 0; d < (w.slow ? 1 : 2); d++) {
                w.dress = ref.dress = &dresses[(s + q + d) % COUNT_OF(dresses)];
                agree(&w, is_ref || d ? NULL : &ref);
            }
            if (!is_ref) world_close(&ref);
            world_close(&w);
        }
}

Test(zero_bit, ref) { on_path("ref"); }
Test(zero_bit, avx2) { on_path("avx2"); }
Test(zero_bit, avx512) { on_path("avx512"); }
Test(zero_bit, avx512bf16) { on_path("avx512bf16"); }
Test(zero_bit, amx) { on_path("amx"); }
Test(zero_bit, amx_emulated) { on_path("amx-emulated"); }
