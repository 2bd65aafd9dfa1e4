/* net_noise.c - the plan's noise in the forward pass, and what was counted of it.
 *
 * Knows: at which results a plan's sites lie, whose draw a row's is, which buffers hold a result
 * before its noise. Does not know: how noise is drawn (kernels/noise.h), which sites were meant
 * (noise_ops.h). Each net_noise_* takes an operation that is about to run; where the plan hits
 * nothing it leaves it alone, so a clean pass makes the calls it always made.
 * Order: setting and taking, who the rows are, one draw, the operations as a layer runs them.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/rng.h"
#include "lib/model/net_int.h"

/* ---- setting and taking ---- */

void net_set_noise(struct net *n, const struct noise_plan *plan, enum noise_phase phase,
                   uint64_t seed, uint64_t fixed_seed) {
    struct net_noise *x = &n->op_noise;
    if (plan && (plan != x->weights.plan || seed != x->weights.seed)) x->weights.ready = false;
    x->on = plan && noise_plan_on(plan, phase);
    assert(!x->on || n->o.noise);
    x->plan = plan;
    x->seed = seed;
    x->fixed_seed = fixed_seed;
    x->repeats = -1;
    if (x->keys.p) {
        uint32_t key[NET_NOISE_KEYS][2];
        rng_key(key[NET_NOISE_KEY], seed, RNG_PURPOSE_OP_NOISE, 0);
        rng_key(key[NET_NOISE_KEY_FIXED], fixed_seed, RNG_PURPOSE_OP_NOISE, 1);
        n->k->upload(n->k, x->keys, key, sizeof key);
    }
    const bool ops = x->on && plan->op_text.type && plan->op_text.phase[phase];
    x->ops[NOISE_FORWARD] = ops && plan->op_text.forward;
    x->ops[NOISE_BACKWARD] = ops && plan->op_text.backward && phase == NOISE_PHASE_UPDATE;
    x->modules = x->on && plan->module_text.type && plan->module_text.phase[phase];
}

static void tally_sums(struct noise_tally *t, const int64_t sum[KERN_NOISE_SUMS]) {
    t->elements += sum[KERN_NOISE_ELEMENTS];
    t->measured += sum[KERN_NOISE_MEASURED];
    t->coarse += sum[KERN_NOISE_COARSE];
    t->changed += sum[KERN_NOISE_CHANGED];
    t->changed_bf16 += sum[KERN_NOISE_CHANGED_BF16];
    t->r += sum[KERN_NOISE_R];
    t->r2 += sum[KERN_NOISE_R2];
}

int net_noise_take_sums(struct net *n, struct err *e) {
    struct net_noise *x = &n->op_noise;
    int64_t sum[NET_TALLIES][KERN_NOISE_SUMS];
    if (!n->o.noise) return 0;
    n->k->download(n->k, sum, x->sums, sizeof sum);
    n->k->zero(n->k, x->sums, sizeof sum);
    for (int op = 0; op < NOISE_OP_COUNT; op++)
        for (int d = 0; d < NOISE_DIRECTION_COUNT; d++)
            tally_sums(&x->seen.op[op][d], sum[op * NOISE_DIRECTION_COUNT + d]);
    for (int m = 0; m < NOISE_MODULE_COUNT; m++)
        tally_sums(&x->seen.module[m], sum[NET_TALLY_MODULE + m]);
    tally_sums(&x->seen.grad, sum[NET_TALLY_GRAD]);
    return n->k->sync(n->k, e);
}

/* The weights were drawn and measured once, however many passes and takes use them. */
static void add_weights(const struct net_noise *x, struct noise_evidence *to) {
    if (!x->seen.passes[NOISE_FORWARD] || to->weights_draw == x->weights.draw) return;
    struct noise_evidence once = { 0 };
    memcpy(once.module, x->weights.tally, sizeof once.module);
    for (int m = 0; m < NOISE_MODULE_COUNT; m++) once.module[m].sites = 0;      /* of passes */
    noise_evidence_add(to, &once);
    to->weights_draw = x->weights.draw;
}

int net_take_noise(struct net *n, struct noise_evidence *to, struct err *e) {
    struct net_noise *x = &n->op_noise;
    if (net_noise_take_sums(n, e) < 0) return err_wrap(e, "counts of noise");
    if (net_noise_weights_on(n)) add_weights(x, to);
    noise_evidence_add(to, &x->seen);
    x->seen = (struct noise_evidence){ 0 };
    x->repeats = -1;
    return 0;
}

/* ---- who the rows are ---- */

void net_noise_rows(struct net *n, const struct net_row *rows, int count) {
    struct net_noise *x = &n->op_noise;
    uint32_t *id = n->host.id;
    x->seen.passes[NOISE_FORWARD]++;
    x->seen.rows += count;
    x->seen.rows_squared += count;
    x->head_seen = false;
    if (!x->on) return;
    for (int i = 0; i < count; i++) {
        id[2 * i] = rows[i].prompt;
        id[2 * i + 1] = rows[i].sample;
        n->host.pos[i] = rows[i].pos;
    }
    n->k->upload(n->k, x->id, id, 2 * (size_t)count * sizeof *id);
}

void net_noise_want(struct net *n, const int32_t *index, int wants) {
    struct net_noise *x = &n->op_noise;
    const size_t R = (size_t)n->o.rows_max;
    uint32_t *id = n->host.id + 2 * R;
    int32_t *pos = n->host.pos + R;
    x->seen.wanted++;
    x->all = false;
    if (!x->on) return;
    for (int i = 0; i < wants; i++) {
        memcpy(&id[2 * i], &n->host.id[2 * index[i]], 2 * sizeof *id);
        pos[i] = n->host.pos[index[i]];
    }
    n->k->upload(n->k, x->want_id, id, 2 * (size_t)wants * sizeof *id);
    n->k->upload(n->k, x->want_pos, pos, (size_t)wants * sizeof *pos);
}

void net_noise_want_all(struct net *n) {
    n->op_noise.seen.wanted++;
    n->op_noise.all = true;
}

/* Samples of one group follow each other, and each computes the prompt again: k times the same
 * draws count as k^2 in rows_squared, which the last of them raises by 2k - 1. */
void net_noise_sequence(struct net *n, const struct net_seq *s) {
    struct net_noise *x = &n->op_noise;
    x->repeats = x->repeats >= 0 && x->prompt == s->uid ? x->repeats + 1 : 0;
    x->prompt = s->uid;
    x->seen.rows_squared += 2 * x->repeats * s->prompt_n;
}

/* ---- one draw ---- */

bool net_noise_op_here(const struct net *n, enum noise_op op, enum noise_direction d, int layer) {
    const struct net_noise *x = &n->op_noise;
    return x->ops[d] && x->plan->op[op] &&
           (layer == NET_NO_LAYER ? x->plan->op_whole : x->plan->op_layer[layer]);
}

static bool module_here(const struct net *n, enum noise_module m, int layer, enum noise_point at) {
    const struct net_noise *x = &n->op_noise;
    return x->modules && x->plan->module_text.point == at &&
           x->plan->module[layer == NET_NO_LAYER ? 0 : layer][m];
}

static struct kern_noise draw(struct net *n, const struct noise_text *t, int layer, int site,
                              struct noise_tally *tally, int sums) {
    struct net_noise *x = &n->op_noise;
    const bool wanted = layer == NET_NO_LAYER && !x->all, fixed = t->type == KERN_NOISE_SYSTEMATIC;
    struct kern_noise k = { .type = (enum kern_noise_type)t->type,
                            .scale = (float)t->scale,
                            .rate = (float)t->rate,
                            .bf16 = t->bf16,
                            .site = KERN_NOISE_SITE(layer == NET_NO_LAYER ? 0 : layer, site),
                            .id = wanted ? x->want_id : x->id,
                            .pos = wanted ? x->want_pos : n->pos };
    k.key_at = kptr_at(x->keys, (fixed ? NET_NOISE_KEY_FIXED : NET_NOISE_KEY) * sizeof k.key);
    if (!tally || x->again) return k;
    tally->sites += !x->more;
    k.sums = kptr_at(x->sums, (size_t)sums * KERN_NOISE_SUMS * sizeof(int64_t));
    return k;
}

struct kern_noise net_noise_op(struct net *n, enum noise_op op, enum noise_direction d, int layer,
                               enum noise_site site, bool count) {
    if (!net_noise_op_here(n, op, d, layer)) return (struct kern_noise){ 0 };
    return draw(n, &n->op_noise.plan->op_text, layer, site,
                count ? &n->op_noise.seen.op[op][d] : NULL, op * NOISE_DIRECTION_COUNT + (int)d);
}

static struct kern_noise module_noise(struct net *n, enum noise_module m, int layer,
                                      enum noise_point at, bool count) {
    if (!module_here(n, m, layer, at)) return (struct kern_noise){ 0 };
    return draw(n, &n->op_noise.plan->module_text, layer, noise_site_module(at, m),
                count ? &n->op_noise.seen.module[m] : NULL, NET_TALLY_MODULE + (int)m);
}

struct kern_noise net_noise_weight_draw(struct net *n, enum noise_module m, int layer) {
    return module_noise(n, m, layer, NOISE_POINT_WEIGHT, true);
}
void net_noise_weight_seen(struct net *n, enum noise_module m) {
    n->op_noise.seen.module[m].sites += !n->op_noise.more && !n->op_noise.again;
}

/* x f32 into y, dense. */
static void put(struct net *n, struct kern_noise noise, kptr x, kptr y, enum kern_type y_type,
                int rows, int dim) {
    n->k->perturb(n->k, &(struct kern_perturb){ .noise = noise,
                                                .x = x,
                                                .x_type = KERN_F32,
                                                .x_ld = dim,
                                                .y = y,
                                                .y_type = y_type,
                                                .y_ld = dim,
                                                .rows = rows,
                                                .dim = dim });
}

/* The two that may follow each other on one result, from x (f32, changed) into y. */
static void put_both(struct net *n, struct kern_noise op, struct kern_noise module, kptr x, kptr y,
                     enum kern_type y_type, int rows, int dim) {
    if (op.type && module.type) put(n, op, x, x, KERN_F32, rows, dim);
    put(n, module.type ? module : op, x, y, y_type, rows, dim);
}

/* ---- norms and rotations ---- */

enum noise_module net_noise_norm_module(const struct net *n, int index) {
    return index == 2 * n->model->conf.layers ? NOISE_MODULE_NORM_FINAL
           : index % 2                        ? NOISE_MODULE_NORM_POST
                                              : NOISE_MODULE_NORM_IN;
}
int net_noise_norm_layer(const struct net *n, int index) {
    return index == 2 * n->model->conf.layers ? NET_NO_LAYER : index / 2;
}

kptr net_noise_norm_x(struct net *n, int index, kptr x, int rows, bool count) {
    const int layer = net_noise_norm_layer(n, index);
    const struct kern_noise in = module_noise(n, net_noise_norm_module(n, index), layer,
                                              NOISE_POINT_INPUT, count);
    if (!in.type) return x;
    put(n, in, x, n->op_noise.norm_in, KERN_F32, rows, n->model->conf.dim);
    return n->op_noise.norm_in;
}

bool net_noise_norm(struct net *n, int index, const struct kern_rmsnorm *a) {
    if (!n->op_noise.on) return false;
    const enum noise_module m = net_noise_norm_module(n, index);
    const int layer = net_noise_norm_layer(n, index),
              site = NOISE_SITE_NORM_IN + (int)m - NOISE_MODULE_NORM_IN;
    const struct kern_noise op = net_noise_op(n, NOISE_OP_NORM, NOISE_FORWARD, layer, site, true),
                            out = module_noise(n, m, layer, NOISE_POINT_OUTPUT, true);
    struct kern_rmsnorm b = *a;
    if (module_here(n, m, layer, NOISE_POINT_WEIGHT)) net_noise_weight_seen(n, m);
    b.x = net_noise_norm_x(n, index, a->x, a->rows, true);
    if (op.type || out.type) b.y = n->op_noise.wide, b.y_type = KERN_F32;
    n->k->rmsnorm(n->k, &b);
    if (op.type || out.type) put_both(n, op, out, b.y, a->y, a->y_type, a->rows, a->dim);
    return true;
}

bool net_noise_rope(struct net *n, int layer, enum noise_site site, const struct kern_rope *a) {
    const struct kern_noise op = net_noise_op(n, NOISE_OP_ROPE, NOISE_FORWARD, layer, site, true);
    struct kern_rope b = *a;
    if (!op.type) return false;
    b.y = a->x;
    b.y_type = KERN_F32;
    n->k->rope(n->k, &b);
    put(n, op, b.y, a->y, a->y_type, a->rows, a->heads * a->head_dim);
    return true;
}

/* ---- linears ---- */

bool net_noise_at_input(const struct net *n, int layer, enum proj p, int count) {
    for (int i = 0; i < count; i++)
        if (module_here(n, (enum noise_module)p + (enum noise_module)i, layer, NOISE_POINT_INPUT))
            return true;
    return false;
}

/* x + e, or e alone. */
static kptr own_input(struct net *n, struct kern_noise noise, bool delta, kptr x, int rows,
                      int dim) {
    n->k->perturb(n->k, &(struct kern_perturb){ .noise = noise,
                                                .delta = delta,
                                                .x = x,
                                                .x_type = n->type,
                                                .x_ld = dim,
                                                .y = n->op_noise.in,
                                                .y_type = n->type,
                                                .y_ld = dim,
                                                .rows = rows,
                                                .dim = dim });
    return n->op_noise.in;
}

kptr net_noise_input(struct net *n, int layer, enum proj p, kptr x, int rows) {
    const struct kern_noise in = module_noise(n, (enum noise_module)p, layer, NOISE_POINT_INPUT,
                                              false);
    return in.type ? own_input(n, in, false, x, rows, n->model->layer[layer].w[p].in) : x;
}

kptr net_noise_input_delta(struct net *n, int layer, enum proj p, kptr x, int rows) {
    const struct kern_noise in = module_noise(n, (enum noise_module)p, layer, NOISE_POINT_INPUT,
                                              true);
    return in.type ? own_input(n, in, true, x, rows, n->model->layer[layer].w[p].in)
                   : (kptr){ NULL };
}

void net_noise_keep_u(struct net *n, enum proj p, const struct net_act *act, int rows) {
    if (!net_lora_on(n, p)) return;
    const int ld = n->site_rank[net_site_of(p)];
    const size_t from = (size_t)net_site_column(n, p) * net_type_bytes(n->type);
    n->k->perturb(n->k, &(struct kern_perturb){ .x = kptr_at(n->op_noise.u, from),
                                                .x_type = n->type,
                                                .x_ld = ld,
                                                .y = net_u_of(n, act, p),
                                                .y_type = n->type,
                                                .y_ld = ld,
                                                .rows = rows,
                                                .dim = n->lora.shape.rank });
}

bool net_noise_linear(struct net *n, int layer, enum proj p, struct kern_linear *a, int count) {
    bool any = false;
    if (!n->op_noise.on) return false;
    for (int i = 0; i < count; i++, p++) {
        const bool op = net_noise_op_here(n, NOISE_OP_MATMUL, NOISE_FORWARD, layer);
        if (!op && !module_here(n, (enum noise_module)p, layer, NOISE_POINT_OUTPUT)) continue;
        if (op) a[i].bias = (kptr){ NULL };
        if (a[i].accumulate) a[i].y = n->op_noise.wide;
        a[i].accumulate = false;
        any = true;
    }
    return any;
}

void net_noise_linear_end(struct net *n, int layer, enum proj p, const struct kern_linear *a,
                          int count, const kptr *y) {
    for (int i = 0; i < count; i++, p++) {
        const struct kern_noise op = net_noise_op(n, NOISE_OP_MATMUL, NOISE_FORWARD, layer,
                                                  (enum noise_site)p, true),
                                out = module_noise(n, (enum noise_module)p, layer,
                                                   NOISE_POINT_OUTPUT, true);
        struct kern_perturb b = { .noise = op,
                                  .x = a[i].y,
                                  .x_type = KERN_F32,
                                  .x_ld = a[i].y_ld,
                                  .y = out.type ? a[i].y : y[i],
                                  .y_type = KERN_F32,
                                  .y_ld = a[i].y_ld,
                                  .rows = a[i].rows,
                                  .dim = a[i].w.out };
        const bool add = a[i].y.p != y[i].p;
        if (p <= PROJ_V) b.bias = n->model->layer[layer].bias[p];
        b.accumulate = add && !out.type;
        if (op.type) n->k->perturb(n->k, &b);
        if (!out.type) continue;
        b.noise = out;
        b.bias = (kptr){ NULL };
        b.y = y[i];
        b.accumulate = add;
        n->k->perturb(n->k, &b);
    }
}

bool net_noise_head(struct net *n, int first, const struct kern_linear *a) {
    struct net_noise *x = &n->op_noise;
    if (!x->on) return false;
    x->more = x->head_seen;
    struct kern_noise each[] = {
        module_noise(n, NOISE_MODULE_HEAD, NET_NO_LAYER, NOISE_POINT_INPUT, true),
        net_noise_op(n, NOISE_OP_HEAD, NOISE_FORWARD, NET_NO_LAYER, NOISE_SITE_HEAD, true),
        module_noise(n, NOISE_MODULE_HEAD, NET_NO_LAYER, NOISE_POINT_OUTPUT, true),
    };
    struct kern_linear b = *a;
    const struct kern_weight *dw = net_noise_weight(n, NET_NO_LAYER, NOISE_MODULE_HEAD);
    if (dw) net_noise_weight_seen(n, NOISE_MODULE_HEAD);
    x->head_seen = true;
    x->more = false;
    for (size_t i = 0; i < COUNT_OF(each); i++) {
        if (!each[i].type) continue;
        each[i].id = kptr_at(each[i].id, (size_t)first * 2 * sizeof(uint32_t));
        each[i].pos = kptr_at(each[i].pos, (size_t)first * sizeof(int32_t));
    }
    n->k->linear(n->k, &b, 1);
    b.accumulate = true;
    if (each[0].type) {
        b.x = own_input(n, each[0], true, a->x, a->rows, a->w.in);
        n->k->linear(n->k, &b, 1);
        b.x = a->x;
    }
    if (dw) b.w = *dw, n->k->linear(n->k, &b, 1);
    for (int i = 1; i < 3; i++)
        if (each[i].type) put(n, each[i], a->y, a->y, KERN_F32, a->rows, a->w.out);
    return true;
}

/* ---- attention and silu ---- */

bool net_noise_attn(struct net *n, int layer, const struct net_act *act, struct kern_attn *a) {
    if (!n->op_noise.on) return false;
    const struct kern_attn_noise noise = {
        .scores = net_noise_op(n, NOISE_OP_BMM, NOISE_FORWARD, layer, NOISE_SITE_SCORES, true),
        .probs = net_noise_op(n, NOISE_OP_SOFTMAX, NOISE_FORWARD, layer, NOISE_SITE_PROBS, true),
    };
    const struct kern_noise values = net_noise_op(n, NOISE_OP_BMM, NOISE_FORWARD, layer,
                                                  NOISE_SITE_VALUES, true);
    if (noise.scores.type || noise.probs.type) a->noise = &noise;
    if (a->lse.p) a->peaks = act->peaks;
    if (values.type) a->y = n->qf, a->y_type = KERN_F32;     /* q is in act by now */
    n->k->attn(n->k, a);
    a->noise = NULL;
    if (!values.type) return true;
    if (act->attn_clean.p)
        put(n, (struct kern_noise){ 0 }, a->y, act->attn_clean, n->type, a->rows, n->q_dim);
    put(n, values, a->y, act->attn, n->type, a->rows, n->q_dim);
    return true;
}

bool net_noise_swiglu(struct net *n, int layer, const struct kern_swiglu *a) {
    const struct kern_noise op = net_noise_op(n, NOISE_OP_SILU, NOISE_FORWARD, layer,
                                              NOISE_SITE_SILU, true);
    if (!op.type) return false;
    const kptr silu = n->op_noise.wide;
    if (a->gate_kept.p) {
        put(n, (struct kern_noise){ 0 }, a->gate, a->gate_kept, a->y_type, a->rows, a->dim);
        put(n, (struct kern_noise){ 0 }, a->up, a->up_kept, a->y_type, a->rows, a->dim);
    }
    n->k->silu(n->k, &(struct kern_silu){ .x = a->gate,
                                          .x_type = KERN_F32,
                                          .y = silu,
                                          .rows = a->rows,
                                          .dim = a->dim });
    n->k->perturb(n->k, &(struct kern_perturb){ .noise = op,
                                                .x = silu,
                                                .x_type = KERN_F32,
                                                .x_ld = a->dim,
                                                .mul = a->up,
                                                .y = a->y,
                                                .y_type = a->y_type,
                                                .y_ld = a->dim,
                                                .rows = a->rows,
                                                .dim = a->dim });
    return true;
}
