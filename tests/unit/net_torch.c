/* net_torch.c - small random models against PyTorch: logits, log-probs and LoRA gradients of
 * tests/vectors/net_* (made by make_net.py: Qwen2 with biases, grouped queries, tied head; Llama
 * with llama3 rope scaling, untied), through the real readers of models and of peft's adapters. Run
 * from the repository's root.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/unit/net_fixture.h"

#include <criterion/criterion.h>
#include <math.h>

#include "lib/base/str.h"
#include "lib/model/safetensors.h"

enum { SEQS = 3, TOKENS_MAX = 64 };
static const char *const models[] = { "qwen2", "llama" };

struct vec {
    struct pool *pool;
    struct kern kern;
    struct model *model;
    struct lora *lora;
    struct net *net;
    struct st_file want;
    int32_t ids[SEQS][TOKENS_MAX];
    struct net_seq seq[SEQS];
    float *weights[SEQS];
};

static const struct st_tensor *want(const struct vec *v, const char *fmt, int s) {
    char name[192];
    snprintf(name, sizeof name, fmt, s);
    const struct st_tensor *t = st_find(&v->want, name);
    cr_assert_not_null(t, "no tensor '%s'", name);
    return t;
}

static float *want_f32(const struct vec *v, const char *fmt, int s) {
    const struct st_tensor *t = want(v, fmt, s);
    float *out = mem_alloc((size_t)t->elements * sizeof *out);
    cr_assert_eq(st_to_f32(t, out, NULL), 0);
    return out;
}

static void vec_open(struct vec *v, const char *name, const char *path, enum model_quant q) {
    struct err e = { 0 };
    char dir[256], file[300];
    memset(v, 0, sizeof *v);
    snprintf(dir, sizeof dir, "tests/vectors/net_%s", name);
    snprintf(file, sizeof file, "%s/want.safetensors", dir);
    v->pool = pool_create(2);
    cr_assert_eq(kern_open(&v->kern, path, v->pool, &e), 0, "%s", e.text);
    cr_assert_eq(
        model_open(&v->model, &v->kern, &(struct model_opts){ .path = dir, .quant = q }, &e), 0,
        "%s", e.text);
    cr_assert_eq(st_open(&v->want, file, &e), 0, "%s", e.text);
    snprintf(file, sizeof file, "%s/adapter", dir);
    cr_assert_eq(lora_load(&v->lora, &v->model->conf, file, &e), 0, "%s", e.text);
    const int32_t *prompts = (const void *)want(v, "prompts", 0)->data;
    for (int s = 0; s < SEQS; s++) {
        const struct st_tensor *t = want(v, "ids.%d", s);
        cr_assert_leq(t->elements, TOKENS_MAX);
        memcpy(v->ids[s], t->data, (size_t)t->elements * sizeof(int32_t));
        int32_t prompt;
        memcpy(&prompt, (const uint8_t *)prompts + 4 * s, sizeof prompt);
        v->seq[s] = (struct net_seq){ .ids = v->ids[s], .n = (int)t->elements, .prompt_n = prompt };
        v->weights[s] = want_f32(v, "weights.%d", s);
    }
    struct net_opts o = {
        .rows_max = 128, .slots_max = 4, .positions_max = 64, .train = true, .lora = v->lora->shape
    };
    cr_assert_eq(net_create(&v->net, v->model, &o, &e), 0, "%s", e.text);
}

static void vec_close(struct vec *v) {
    for (int s = 0; s < SEQS; s++) free(v->weights[s]);
    net_destroy(&v->net);
    lora_destroy(&v->lora);
    st_close(&v->want);
    model_close(&v->model);
    pool_destroy(&v->pool);
}

static float *logits(struct vec *v, int s) {
    struct err e = { 0 };
    struct net_row row[TOKENS_MAX];
    int32_t index[TOKENS_MAX];
    const int n = v->seq[s].n, slot = net_slot_open(v->net);
    for (int i = 0; i < n; i++) {
        row[i] = (struct net_row){ .token = v->ids[s][i], .slot = slot, .pos = i };
        index[i] = i;
    }
    float *out = mem_alloc((size_t)n * (size_t)v->model->conf.vocab * sizeof *out);
    cr_assert_eq(net_forward(v->net, row, n, index, n, &e), 0, "%s", e.text);
    cr_assert_eq(net_logits(v->net, out, &e), 0, "%s", e.text);
    net_slot_close(v->net, slot);
    return out;
}

static void expect_logits(struct vec *v, const char *which, const char *path) {
    for (int s = 0; s < SEQS; s++) {
        float *got = logits(v, s), *torch = want_f32(v, which, s);
        double worst = 0;
        for (size_t i = 0; i < (size_t)v->seq[s].n * (size_t)v->model->conf.vocab; i++)
            worst = fmax(worst, fabs((double)got[i] - (double)torch[i]));
        cr_expect(worst < 1e-4, "%s, sequence %d, %s: logits differ by %g", path, s, which, worst);
        free(got);
        free(torch);
    }
}

static void weighted(void *ud, int seq, int first, int count, const float *lp, const float *entropy,
                     float *coef) {
    const struct vec *v = ud;
    (void)lp, (void)entropy;
    for (int i = 0; i < count; i++) coef[i] = v->weights[seq][first + i];
}

/* Relative error of the whole matrix, in the Frobenius norm. */
static double distance(const float *got, const float *ref, size_t n) {
    double diff = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        diff += ((double)got[i] - (double)ref[i]) * ((double)got[i] - (double)ref[i]);
        norm += (double)ref[i] * (double)ref[i];
    }
    return sqrt(diff / (norm > 0 ? norm : 1));
}

/* Largest distance of a matrix from PyTorch's gradient. */
static double gradient_distance(struct vec *v) {
    struct err e = { 0 };
    float *grad = mem_alloc(v->lora->params * sizeof *grad);
    double worst = 0;
    cr_assert_eq(net_train(v->net, v->seq, SEQS, 1, weighted, v, grad, &e), 0, "%s", e.text);
    for (int layer = 0; layer < v->model->conf.layers; layer++)
        for (enum proj p = 0; p < PROJ_COUNT; p++)
            for (int m = 0; m < 2 && v->lora->shape.on[p]; m++) {
                char name[160];
                size_t at[2];
                lora_offsets(v->lora, layer, p, &at[0], &at[1]);
                snprintf(name, sizeof name,
                         "grad.base_model.model.model.layers.%d.%s.%s.lora_%c.weight", layer,
                         p <= PROJ_O ? "self_attn" : "mlp", model_proj_name[p], "AB"[m]);
                float *torch = want_f32(v, name, 0);
                worst = fmax(worst,
                             distance(grad + at[m], torch, (size_t)want(v, name, 0)->elements));
                free(torch);
            }
    free(grad);
    return worst;
}

Test(net_torch, fp32_logits_logprobs_and_gradients_are_pytorchs) {
    const char *names[8];
    for (size_t m = 0; m < COUNT_OF(models); m++)
        for (int i = 0, n = kern_paths(names); i < n; i++) {
            struct vec v;
            struct err e = { 0 };
            float lp[SEQS * TOKENS_MAX], *at = lp;
            vec_open(&v, models[m], names[i], MODEL_QUANT_F32);
            expect_logits(&v, "base.%d", names[i]);
            cr_assert_eq(net_adopt(v.net, v.lora, NULL, &e), 0, "%s", e.text);
            expect_logits(&v, "lora.%d", names[i]);
            cr_assert_eq(net_logprobs(v.net, v.seq, SEQS, 1, lp, NULL, &e), 0, "%s", e.text);
            for (int s = 0; s < SEQS; at += v.seq[s].n - v.seq[s].prompt_n, s++) {
                float *torch = want_f32(&v, "lp.%d", s);
                for (int t = 0; t < v.seq[s].n - v.seq[s].prompt_n; t++)
                    cr_expect(fabs((double)at[t] - (double)torch[t]) < 1e-4, "%s: lp %g, not %g",
                              models[m], (double)at[t], (double)torch[t]);
                free(torch);
            }
            const double d = gradient_distance(&v);
            cr_expect(d < 1e-4, "%s on %s: a gradient is off by %g", models[m], names[i], d);
            vec_close(&v);
        }
}

static int top(const float *z, int n) {
    int best = 0;
    for (int i = 1; i < n; i++) best = z[i] > z[best] ? i : best;
    return best;
}

/* In bf16 a logit is off by `rms` typically; a winner that leads by more than 8 of those must stay
 * the winner. */
Test(net_torch, bf16_keeps_every_clear_winner_and_the_gradients_direction) {
    for (size_t m = 0; m < COUNT_OF(models); m++) {
        struct vec v;
        struct err e = { 0 };
        vec_open(&v, models[m], "auto", MODEL_QUANT_BF16);
        cr_assert_eq(net_adopt(v.net, v.lora, NULL, &e), 0, "%s", e.text);
        const int vocab = v.model->conf.vocab;
        int clear = 0, rows = 0;
        for (int s = 0; s < SEQS; s++) {
            float *got = logits(&v, s), *torch = want_f32(&v, "lora.%d", s);
            const size_t n = (size_t)v.seq[s].n * (size_t)vocab;
            double rms = 0;
            for (size_t i = 0; i < n; i++)
                rms += ((double)got[i] - (double)torch[i]) * ((double)got[i] - (double)torch[i]);
            rms = sqrt(rms / (double)n);
            cr_expect(distance(got, torch, n) < .025, "%s: relative error %g", models[m],
                      distance(got, torch, n));
            for (int t = 0; t < v.seq[s].n; t++, rows++) {
                float *z = torch + (size_t)t * (size_t)vocab;
                const int best = top(z, vocab);
                const float lead = z[best];
                z[best] = -1e30f;
                if (lead - z[top(z, vocab)] < 8 * (float)rms) continue;
                clear++;
                cr_expect_eq(top(got + (size_t)t * (size_t)vocab, vocab), best,
                             "%s sequence %d row %d", models[m], s, t);
            }
            free(got);
            free(torch);
        }
        cr_expect_gt(clear * 2, rows);
        const double d = gradient_distance(&v);
        /* PyTorch's own bf16 autocast: .14, .17 */
        cr_expect(d < .14, "%s: a gradient is off by %g", models[m], d);
        vec_close(&v);
    }
}
