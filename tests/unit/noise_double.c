/* noise_double.c - the network with noise against a second network, written here in double and with draws of its own:
 * log-probs, and gradients by differences with the noise held fixed.
 *
 * The other network knows the sites by number and the counters by kernels/noise.h, nothing of lib/model/net.
 * Held fixed: e of each result, for most types scale z |t|; of a probability, which is divided by its row's sum
 * afterwards, the factor 1 + e / t.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/unit/net_fixture.h"

#include <criterion/criterion.h>
#include <math.h>

#include "lib/base/rng.h"
#include "lib/base/str.h"

enum { D = 12, F = 20, LAYERS = 2, HEADS = 4, KV = 2, DIM = 4, VOCAB = 19, RANK = 3, SEQS = 3, TOKENS = 8,
       WIDE = 24, DRAWS_MAX = 60000 };
static const struct model_conf conf = {
    .arch = MODEL_ARCH_QWEN2, .vocab = VOCAB, .dim = D, .layers = LAYERS, .heads = HEADS, .kv_heads = KV,
    .head_dim = DIM, .ffn_dim = F, .positions_max = 64, .norm_eps = 1e-6f, .rope_theta = 10000, .qkv_bias = true,
    .bos = -1,
};
static const uint64_t SEED = 77, FIXED = 78;

/* two samples of one prompt, and another prompt whose uid has both halves */
static const struct net_seq seqs[SEQS] = {
    { .ids = (const int32_t[]){ 3, 1, 17, 5, 9, 2, 11, 4 }, .n = 8, .prompt_n = 4, .uid = 9, .sample = 0 },
    { .ids = (const int32_t[]){ 3, 1, 17, 5, 6, 6, 12 }, .n = 7, .prompt_n = 4, .uid = 9, .sample = 1 },
    { .ids = (const int32_t[]){ 8, 14, 0, 3, 13 }, .n = 5, .prompt_n = 1, .uid = 0x700000009u, .sample = 5 },
};
static float coef(int seq, int i) { return (seq % 2 ? -.4f : .5f) + .1f * (float)i; }

/* ---- the other network ---- */

struct other {
    const struct noise_plan *p;                      /* NULL = clean */
    double *lora;                                    /* values as lora.value */
    const struct lora *shape;
    double *draw;                                    /* what is held fixed, in the order of use */
    int draws;
    bool again;                                      /* use them */
    uint32_t prompt, sample;                         /* of the row at hand */
    int pos;
};

/* z of element i */
static double normal(const struct other *o, uint32_t site, int head, int i) {
    uint32_t key[2];
    double z[4];
    rng_key(key, SEED, RNG_PURPOSE_OP_NOISE, 0);
    rng_normal4(z, rng_philox((uint32_t[4]){ o->prompt, o->sample | (uint32_t)head << 16, (uint32_t)o->pos,
                                             site + (uint32_t)(i / 4) }, key));
    return z[i % 4];
}
static double e4m3(double t) {
    const double size = fmin(fmax(fabs(t), 0x1p-6), 448), power = exp2(fmin(floor(log2(size)), 7)),
                 steps = fmin(nearbyint((size / power - 1) * 8), 7);
    return t == 0 ? t : copysign(power * (1 + steps / 8), t);
}
/* e of t with draw z, in a row whose largest |t| is most */
static double term(const struct noise_text *x, double z, double t, double most) {
    switch (x->type) {
    case KERN_NOISE_ABSOLUTE_GAUSSIAN: return x->scale * z;
    case KERN_NOISE_BIAS: return t > 0 ? x->scale : t < 0 ? -x->scale : 0;
    case KERN_NOISE_DEADZONE: return fabs(t) < x->scale * most ? -t : 0;
    case KERN_NOISE_FP8: return e4m3(t) - t;
    default: return x->scale * z * fabs(t);
    }
}
static double most_of(const double *t, int n) {
    double most = 0;
    for (int i = 0; i < n; i++) most = fmax(most, fabs(t[i]));
    return most;
}
/* t += e, or times a factor */
static void hit(struct other *o, const struct noise_text *x, int layer, int number, int head, double *t, int n,
                bool factor) {
    const double most = most_of(t, n);
    for (int i = 0; i < n; i++, o->draws++) {
        cr_assert(o->draws < DRAWS_MAX);
        if (!o->again)
            o->draw[o->draws] = term(x, normal(o, (uint32_t)layer << 24 | (uint32_t)number << 16, head, i), t[i],
                                     most) / (factor ? t[i] : 1);
        t[i] = factor ? t[i] * (1 + o->draw[o->draws]) : t[i] + o->draw[o->draws];
    }
}
static void hit_op(struct other *o, enum noise_op op, int layer, int number, int head, double *t, int n) {
    if (!o->p || !o->p->op[op] || !o->p->op_text.forward || !(layer < 0 ? o->p->op_whole : o->p->op_layer[layer]))
        return;
    hit(o, &o->p->op_text, layer < 0 ? 0 : layer, number, head, t, n, op == NOISE_OP_SOFTMAX);
}
/* w + e of row `row` of a module's weights: the counter has the row for a position */
static void heavy(const struct other *o, enum noise_module m, int layer, int row, const double *w, int n, double *to) {
    const struct noise_text *x = o->p ? &o->p->module_text : NULL;
    const bool on = x && x->type && x->point == NOISE_POINT_WEIGHT && o->p->module[layer][m];
    const struct other at = { .prompt = ~0u, .sample = 0xffff, .pos = row };
    for (int i = 0; i < n; i++)
        to[i] = w[i] + (on ? term(x, normal(&at, (uint32_t)layer << 24 | (uint32_t)(64 + m) << 16, 0, i), w[i],
                                  most_of(w, n)) : 0);
}
static void hit_module(struct other *o, enum noise_module m, int layer, enum noise_point at, double *t, int n) {
    if (!o->p || !o->p->module_text.type || o->p->module_text.point != at || !o->p->module[layer][m]) return;
    hit(o, &o->p->module_text, layer, (at == NOISE_POINT_INPUT ? 32 : 48) + (int)m, 0, t, n, false);
}

/* The model's values, looked up once: making one costs a hash of its name. */
enum tensor { EMBED, HEAD, NORM_FINAL, NORM_IN, NORM_POST, BIAS, PROJ, TENSORS = PROJ + PROJ_COUNT };
static double value[LAYERS][TENSORS][WIDE * F];
static void values_make(void) {
    static const char *const name[] = { "embed", "head", "norm_final", "norm_in", "norm_post", "bias" };
    for (int l = 0; l < LAYERS; l++)
        for (int t = 0; t < TENSORS; t++)
            for (size_t i = 0; i < WIDE * F; i++) {
                const enum proj p = t < BIAS ? 0 : t == BIAS ? (enum proj)(i / WIDE) : (enum proj)(t - PROJ);
                value[l][t][i] = (double)fix_small_value(t < PROJ ? name[t] : model_proj_name[p], l, p,
                                                         t == BIAS ? i % WIDE : i);
            }
}

/* The same of a whole matrix: a draw costs, so it is kept for the case at hand. */
static int cases;
static const double *weights(const struct other *o, int layer, enum noise_module m, const double *w, int out, int in) {
    static double kept[LAYERS][NOISE_MODULE_COUNT][WIDE * F];
    static int of[LAYERS][NOISE_MODULE_COUNT];
    if (!o->p || o->p->module_text.point != NOISE_POINT_WEIGHT) return w;
    for (int row = 0; row < out && of[layer][m] != cases; row++)
        heavy(o, m, layer, row, w + row * in, in, kept[layer][m] + row * in);
    of[layer][m] = cases;
    return kept[layer][m];
}

static void norm(struct other *o, enum tensor w, enum noise_module m, int layer, int site, const double *x,
                 double *y) {
    double in[D], weight[D], sum = 0;
    const int l = layer < 0 ? 0 : layer;
    memcpy(in, x, sizeof in);
    hit_module(o, m, l, NOISE_POINT_INPUT, in, D);
    for (int i = 0; i < D; i++) sum += in[i] * in[i];
    const double rstd = 1 / sqrt(sum / D + 1e-6);
    heavy(o, m, l, 0, value[l][w], D, weight);
    for (int i = 0; i < D; i++) y[i] = in[i] * rstd * weight[i];
    hit_op(o, NOISE_OP_NORM, layer, site, 0, y, D);
    hit_module(o, m, l, NOISE_POINT_OUTPUT, y, D);
}

static void linear(struct other *o, int layer, enum proj p, const double *x, double *y) {
    int out, in;
    size_t a, b;
    double own[WIDE], u[RANK];
    model_proj_shape(&conf, p, &out, &in);
    lora_offsets(o->shape, layer, p, &a, &b);
    memcpy(own, x, (size_t)in * sizeof *own);
    hit_module(o, (enum noise_module)p, layer, NOISE_POINT_INPUT, own, in);
    for (int r = 0; r < RANK; r++) {
        u[r] = 0;
        for (int i = 0; i < in; i++) u[r] += o->lora[a + (size_t)(r * in + i)] * own[i];
        u[r] *= (double)(o->shape->shape.alpha / RANK);
    }
    const double *base = weights(o, layer, (enum noise_module)p, value[layer][PROJ + p], out, in);
    for (int j = 0; j < out; j++) {
        y[j] = 0;
        for (int i = 0; i < in; i++) y[j] += base[j * in + i] * own[i];
        for (int r = 0; r < RANK; r++) y[j] += o->lora[b + (size_t)(j * RANK + r)] * u[r];
    }
    hit_op(o, NOISE_OP_MATMUL, layer, (int)p, 0, y, out);
    for (int j = 0; j < out && p <= PROJ_V; j++) y[j] += value[layer][BIAS][(int)p * WIDE + j];
    hit_module(o, (enum noise_module)p, layer, NOISE_POINT_OUTPUT, y, out);
}

static void rotate(double *x, int heads, int pos) {
    for (int h = 0; h < heads; h++)
        for (int i = 0; i < DIM / 2; i++) {
            const double angle = pos * pow(10000, -2. * i / DIM), c = cos(angle), s = sin(angle);
            double *a = &x[h * DIM + i], *b = a + DIM / 2, old = *a;
            *a = old * c - *b * s;
            *b = *b * c + old * s;
        }
}

struct keys { double k[TOKENS][KV * DIM], v[TOKENS][KV * DIM]; };

static void attention(struct other *o, int layer, struct keys *kv, const double *h, double *y) {
    double q[HEADS * DIM];
    linear(o, layer, PROJ_Q, h, q);
    linear(o, layer, PROJ_K, h, kv->k[o->pos]);
    linear(o, layer, PROJ_V, h, kv->v[o->pos]);
    rotate(q, HEADS, o->pos);
    hit_op(o, NOISE_OP_ROPE, layer, 14, 0, q, HEADS * DIM);
    rotate(kv->k[o->pos], KV, o->pos);
    hit_op(o, NOISE_OP_ROPE, layer, 15, 0, kv->k[o->pos], KV * DIM);
    for (int head = 0; head < HEADS; head++) {
        double s[TOKENS], most = -INFINITY, sum = 0;
        const int at = head * KV / HEADS * DIM;
        for (int j = 0; j <= o->pos; j++) {
            s[j] = 0;
            for (int i = 0; i < DIM; i++) s[j] += q[head * DIM + i] * kv->k[j][at + i] / sqrt(DIM);
        }
        hit_op(o, NOISE_OP_BMM, layer, 7, head, s, o->pos + 1);
        for (int j = 0; j <= o->pos; j++) most = fmax(most, s[j]);
        for (int j = 0; j <= o->pos; j++) s[j] = exp(s[j] - most);
        hit_op(o, NOISE_OP_SOFTMAX, layer, 9, head, s, o->pos + 1);
        for (int j = 0; j <= o->pos; j++) sum += s[j];
        for (int i = 0; i < DIM; i++) {
            double *v = &y[head * DIM + i];
            *v = 0;
            for (int j = 0; j <= o->pos; j++) *v += s[j] / sum * kv->v[j][at + i];
        }
    }
    hit_op(o, NOISE_OP_BMM, layer, 8, 0, y, HEADS * DIM);
}

static void layer_run(struct other *o, int layer, struct keys *kv, double *x) {
    double h[D], y[WIDE], up[F], act[F], out[D];
    norm(o, NORM_IN, NOISE_MODULE_NORM_IN, layer, 11, x, h);
    attention(o, layer, kv, h, y);
    linear(o, layer, PROJ_O, y, out);
    for (int i = 0; i < D; i++) x[i] += out[i];
    norm(o, NORM_POST, NOISE_MODULE_NORM_POST, layer, 12, x, h);
    linear(o, layer, PROJ_GATE, h, act);
    linear(o, layer, PROJ_UP, h, up);
    for (int i = 0; i < F; i++) act[i] /= 1 + exp(-act[i]);
    hit_op(o, NOISE_OP_SILU, layer, 10, 0, act, F);
    for (int i = 0; i < F; i++) act[i] *= up[i];
    linear(o, layer, PROJ_DOWN, act, out);
    for (int i = 0; i < D; i++) x[i] += out[i];
}

static double head_run(struct other *o, const double *x, int target) {
    double h[D], z[VOCAB], most = -INFINITY, sum = 0;
    norm(o, NORM_FINAL, NOISE_MODULE_NORM_FINAL, -1, 13, x, h);
    hit_module(o, NOISE_MODULE_HEAD, 0, NOISE_POINT_INPUT, h, D);
    const double *w = weights(o, 0, NOISE_MODULE_HEAD, value[0][HEAD], VOCAB, D);
    for (int v = 0; v < VOCAB; v++) {
        z[v] = 0;
        for (int i = 0; i < D; i++) z[v] += w[v * D + i] * h[i];
    }
    hit_op(o, NOISE_OP_HEAD, -1, 16, 0, z, VOCAB);
    hit_module(o, NOISE_MODULE_HEAD, 0, NOISE_POINT_OUTPUT, z, VOCAB);
    for (int v = 0; v < VOCAB; v++) most = fmax(most, z[v]);
    for (int v = 0; v < VOCAB; v++) sum += exp(z[v] - most);
    return z[target] - most - log(sum);
}

/* Log-probs of all responses, and the loss whose slope is coef. */
static double other_run(struct other *o, double *lp) {
    double loss = 0;
    o->draws = 0;
    for (int s = 0; s < SEQS; s++) {
        const struct net_seq *q = &seqs[s];
        static struct keys kv[LAYERS];
        o->prompt = (uint32_t)(q->uid ^ q->uid >> 32);
        for (o->pos = 0; o->pos < q->n - 1; o->pos++) {
            double x[D];
            o->sample = o->pos < q->prompt_n ? 0xffff : (uint32_t)q->sample;
            for (int i = 0; i < D; i++) x[i] = value[0][EMBED][q->ids[o->pos] * D + i];
            for (int l = 0; l < LAYERS; l++) layer_run(o, l, &kv[l], x);
            if (o->pos < q->prompt_n - 1) continue;
            const double one = head_run(o, x, q->ids[o->pos + 1]);
            loss += (double)coef(s, o->pos - q->prompt_n + 1) * one;
            if (lp) *lp++ = one;
        }
    }
    return loss;
}

/* ---- both ---- */

static void loss_fixed(void *ud, int seq, int first, int count, const float *lp, const float *entropy, float *c) {
    float **at = ud;
    (void)entropy;
    for (int i = 0; i < count; i++) {
        *(*at)++ = lp[i];
        c[i] = coef(seq, first + i);
    }
}

/* Log-probs and the gradient of a net with this plan in this phase. */
static void net_run(const struct noise_plan *plan, const struct lora *l, float *lp, float *grad) {
    struct fix f;
    struct net *n;
    struct err e = { 0 };
    const struct net_opts o = { .rows_max = 40, .slots_max = 4, .positions_max = 32, .train = true,
                                .lora = l->shape, .noise = true, .noise_peaks = noise_plan_peaks(plan) };
    fix_open(&f, "auto", 1, &conf, MODEL_QUANT_F32, fix_small_value);
    cr_assert_eq(net_create(&n, &f.model, &o, &e), 0, "%s", e.text);
    cr_assert_eq(net_adopt(n, l, NULL, &e), 0, "%s", e.text);
    net_set_noise(n, plan, NOISE_PHASE_UPDATE, SEED, FIXED);
    memset(grad, 0, l->params * sizeof *grad);
    cr_assert_eq(net_train(n, seqs, SEQS, 1, loss_fixed, &lp, grad, &e), 0, "%s", e.text);
    net_destroy(&n);
    fix_close(&f);
}

struct case_ {
    const char *ops, *op_layers, *targets, *exclude, *layers;
    enum noise_point at;
    int type;                                        /* 0 = relative_gaussian of .05 */
    double scale;
};

static void plan_of(struct noise_plan *p, const struct case_ *c) {
    struct err e = { 0 };
    const int type = c->type ? c->type : KERN_NOISE_RELATIVE_GAUSSIAN;
    const double scale = c->type ? c->scale : .05;
    const struct noise_text o = { .type = c->ops ? type : 0, .scale = scale, .names = c->ops,
                                  .layers = c->op_layers, .forward = true, .phase = { [NOISE_PHASE_UPDATE] = true } },
                            m = { .type = c->targets ? type : 0, .scale = scale,
                                  .names = c->targets, .exclude = c->exclude, .layers = c->layers,
                                  .phase = { [NOISE_PHASE_UPDATE] = true }, .point = c->at };
    cr_assert_eq(noise_plan_make(p, c->ops ? &o : NULL, c->targets ? &m : NULL, &conf, &e), 0, "%s", e.text);
}

/* The net must agree with the other one, which must differ from its clean self by far more. */
static void agree(const struct case_ *c) {
    struct noise_plan plan;
    struct str name;
    struct lora *l = fix_lora(&conf, RANK, 4, .3f, 3);
    struct other o = { .shape = l };
    double lp[SEQS * TOKENS], clean[SEQS * TOKENS], most = 0;
    float got[SEQS * TOKENS] = { 0 }, *grad = mem_alloc(l->params * sizeof *grad);
    int count = 0;
    for (int s = 0; s < SEQS; s++) count += seqs[s].n - seqs[s].prompt_n;
    values_make();
    cases++;
    str_init(&name);
    plan_of(&plan, c);
    noise_plan_text(&plan, &name);
    o.lora = mem_alloc(l->params * sizeof *o.lora);
    o.draw = mem_alloc(DRAWS_MAX * sizeof *o.draw);
    for (size_t i = 0; i < l->params; i++) o.lora[i] = (double)l->value[i];
    other_run(&o, clean);
    o.p = &plan;
    other_run(&o, lp);
    net_run(&plan, l, got, grad);
    for (int i = 0; i < count; i++) {
        most = fmax(most, fabs(lp[i] - clean[i]));
        cr_expect_float_eq((double)got[i], lp[i], 3e-5, "%s: log-prob %d is %.6f, not %.6f (clean %.6f)", name.s, i,
                           (double)got[i], lp[i], clean[i]);
    }
    cr_expect_gt(most, 1e-3, "%s: noise moves no log-prob by more than %g", name.s, most);

    o.again = true;
    double largest = 0;
    for (size_t i = 0; i < l->params; i++) largest = fmax(largest, fabs((double)grad[i]));
    for (size_t i = 0; i < l->params; i += 5) {
        const double at = o.lora[i], h = 1e-4;
        o.lora[i] = at + h;
        const double above = other_run(&o, NULL);
        o.lora[i] = at - h;
        const double slope = (above - other_run(&o, NULL)) / (2 * h);
        o.lora[i] = at;
        cr_expect_float_eq((double)grad[i], slope, 2e-5 * largest + 2e-5 * fabs(slope),
                           "%s: gradient %zu is %.7f, not %.7f", name.s, i, (double)grad[i], slope);
    }
    str_release(&name);
    lora_destroy(&l);
    free(o.lora);
    free(o.draw);
    free(grad);
}

static void agree_op(const char *op) { agree(&(struct case_){ .ops = op, .op_layers = "all" }); }
static void agree_module(const char *targets, const char *exclude, const char *layers, enum noise_point at) {
    agree(&(struct case_){ .targets = targets, .exclude = exclude, .layers = layers, .at = at });
}

Test(noise_double, matmul) { agree_op("matmul"); }
Test(noise_double, bmm) { agree_op("bmm"); }
Test(noise_double, softmax) { agree_op("softmax"); }
Test(noise_double, silu) { agree_op("silu"); }
Test(noise_double, norm) { agree_op("norm"); }
Test(noise_double, rope) { agree_op("rope"); }
Test(noise_double, head) { agree_op("head"); }
Test(noise_double, all_operations) { agree_op("all"); }
Test(noise_double, chosen_layers_only) {
    agree(&(struct case_){ .ops = "all", .op_layers = "1" });
    agree(&(struct case_){ .ops = "matmul, norm", .op_layers = "0" });
}
Test(noise_double, module_inputs) {
    agree_module("linear", "", "all", NOISE_POINT_INPUT);
    agree_module("rmsnorm", "", "all", NOISE_POINT_INPUT);
    agree_module("lm_head", "", "all", NOISE_POINT_INPUT);
}
Test(noise_double, module_outputs) {
    agree_module("linear", "", "all", NOISE_POINT_OUTPUT);
    agree_module("rmsnorm", "", "all", NOISE_POINT_OUTPUT);
    agree_module("lm_head", "", "all", NOISE_POINT_OUTPUT);
}
Test(noise_double, module_weights) {
    agree_module("linear", "", "all", NOISE_POINT_WEIGHT);
    agree_module("rmsnorm", "", "all", NOISE_POINT_WEIGHT);
    agree_module("lm_head", "", "all", NOISE_POINT_WEIGHT);
    agree_module("linear, rmsnorm", "layers.1.k_proj, layers.0.mlp, norm", "all", NOISE_POINT_WEIGHT);
}
/* Values of the small net that lie on a step of these types are the same in f32 and double: the seed has none that
 * falls to another side. */
Test(noise_double, other_types_on_inputs_outputs_and_weights) {
    static const struct { int type; double scale; } types[] = {
        { KERN_NOISE_ABSOLUTE_GAUSSIAN, .02 }, { KERN_NOISE_BIAS, .02 }, { KERN_NOISE_DEADZONE, .2 },
        { KERN_NOISE_FP8, 0 },
    };
    for (size_t i = 0; i < COUNT_OF(types); i++)
        for (int at = NOISE_POINT_INPUT; at <= (types[i].scale > 0 ? NOISE_POINT_WEIGHT : NOISE_POINT_OUTPUT); at++)
            agree(&(struct case_){ .targets = "linear, rmsnorm, lm_head", .exclude = "", .layers = "all",
                                   .at = (enum noise_point)at, .type = types[i].type, .scale = types[i].scale });
}
/* What attention flushed its backward flushes again: every other term of the gradient is that of the clean operation. */
Test(noise_double, dead_zones_in_operations) {
    static const char *const ops[] = { "matmul", "bmm", "softmax", "silu", "norm", "rope", "head", "all" };
    for (size_t i = 0; i < COUNT_OF(ops); i++)
        agree(&(struct case_){ .ops = ops[i], .op_layers = "all", .type = KERN_NOISE_DEADZONE, .scale = .3 });
    agree(&(struct case_){ .ops = "bmm, softmax", .op_layers = "1", .type = KERN_NOISE_DEADZONE, .scale = .5 });
}
Test(noise_double, chosen_modules_only) {
    agree_module("linear, rmsnorm", "layers.1.k_proj, layers.0.mlp, norm", "all", NOISE_POINT_INPUT);
    agree_module("up_proj, o_proj", "", "1", NOISE_POINT_OUTPUT);
}
Test(noise_double, operations_and_modules_together) {
    agree(&(struct case_){ .ops = "all", .op_layers = "all", .targets = "linear, rmsnorm, lm_head", .exclude = "",
                           .layers = "all", .at = NOISE_POINT_OUTPUT });
    agree(&(struct case_){ .ops = "matmul, norm", .op_layers = "all", .targets = "linear, rmsnorm", .exclude = "",
                           .layers = "0", .at = NOISE_POINT_INPUT });
}
