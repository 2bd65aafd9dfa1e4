/* net_backward.c - gradients of the LoRA matrices, layers in reverse.
 *
 * The base is frozen, so a projection gives: dB += g (x) u, du = B'g, dA += (s du) (x) x, dx += W'g
 * + s A'du, with A, B, x and u as the forward read them (net_adopt). Sums over tokens run inside
 * `outer`, per sequence and in tiles, so micro-batches change nothing. Below the first layer
 * nothing is trained: its inputs' gradient is not made.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/net_int.h"

struct pass { struct net *n; int layer, rows, seqs; const int32_t *seq_start; };

static kptr grad_at(const struct net *n, size_t offset) {
    return kptr_at(n->grad, offset * sizeof(float));
}

/* Adapter of one projection, given g = dL/dy: its dB and dA, and its columns of du for
 * adapter_dx. */
static void adapter_grad(const struct pass *t, enum proj p, const struct net_act *act, kptr g,
                         kptr x) {
    struct net *n = t->n;
    if (!net_lora_on(n, p)) return;
    x = net_noise_input(n, t->layer, p, x, t->rows);
    const struct kern_weight *b = &n->lora_layer[t->layer].b[p];
    const int rank = n->lora.shape.rank, ld = n->site_rank[net_site_of(p)];
    const kptr du = kptr_at(n->du, (size_t)net_site_column(n, p) * sizeof(float));
    size_t a_at, b_at;
    int out, in;
    model_proj_shape(&n->model->conf, p, &out, &in);
    lora_offsets(&n->lora, t->layer, p, &a_at, &b_at);
    n->k->outer(n->k, &(struct kern_outer){ .a = g,
                                            .a_ld = out,
                                            .b = net_u_of(n, act, p),
                                            .b_type = n->type,
                                            .b_ld = ld,
                                            .scale = 1,
                                            .round = n->round,
                                            .g = grad_at(n, b_at),
                                            .m = out,
                                            .n = rank,
                                            .seq_start = t->seq_start,
                                            .seqs = t->seqs });
    n->k->linear_t(n->k, &(struct kern_linear_t){ .dy = g,
                                                  .dy_ld = out,
                                                  .w = *b,
                                                  .scale = 1,
                                                  .round = n->round,
                                                  .dx = du,
                                                  .dx_ld = ld,
                                                  .rows = t->rows });
    n->k->outer(n->k, &(struct kern_outer){ .a = du,
                                            .a_ld = ld,
                                            .b = x,
                                            .b_type = n->type,
                                            .b_ld = in,
                                            .scale = net_lora_scale(n),
                                            .round = n->round,
                                            .g = grad_at(n, a_at),
                                            .m = rank,
                                            .n = in,
                                            .seq_start = t->seq_start,
                                            .seqs = t->seqs });
}

/* What A of these projections read of x. */
static kptr adapter_x(const struct pass *t, enum proj p, int count, kptr x) {
    struct net *n = t->n;
    if (!net_adapter_rounds_in(n, t->layer, p, count)) return x;
    net_round_rows(n, x, n->xq, t->rows, n->model->layer[t->layer].w[p].in);
    return n->xq;
}

static void weight_dx(const struct pass *t, const struct kern_weight *w, kptr g, kptr dx,
                      bool add) {
    t->n->k->linear_t(t->n->k, &(struct kern_linear_t){ .dy = g,
                                                        .dy_ld = w->out,
                                                        .w = *w,
                                                        .scale = 1,
                                                        .accumulate = add,
                                                        .round = t->n->round,
                                                        .dx = dx,
                                                        .dx_ld = w->in,
                                                        .rows = t->rows });
}

/* dx = (W + dW)'g, or dx += it: the weights of the forward pass, noise included. */
static void base_dx(const struct pass *t, enum proj p, kptr g, kptr dx, bool add) {
    const struct kern_weight *dw = noise_view_linear(t->n->noise, t->layer, p);
    weight_dx(t, &t->n->model->layer[t->layer].w[p], g, dx, add);
    if (dw) weight_dx(t, dw, g, dx, true);
    dw = net_noise_weight(t->n, t->layer, (enum noise_module)p);
    if (dw) weight_dx(t, dw, g, dx, true);
}

/* dx += s A'du for all projections of a site at once. */
static void adapter_dx(const struct pass *t, enum net_site site, kptr dx) {
    struct net *n = t->n;
    const struct kern_weight *a = &n->lora_layer[t->layer].a[site];
    if (!n->adapted || !a->out) return;
    n->k->linear_t(n->k, &(struct kern_linear_t){ .dy = n->du,
                                                  .dy_ld = a->out,
                                                  .w = *a,
                                                  .scale = net_lora_scale(n),
                                                  .accumulate = true,
                                                  .round = n->round,
                                                  .dx = dx,
                                                  .dx_ld = a->in,
                                                  .rows = t->rows });
}

static void norm_bwd(const struct pass *t, int index, kptr x, kptr rstd, kptr w) {
    const int dim = t->n->model->conf.dim;
    const struct kern_rmsnorm_bwd a = { .dy = t->n->dh,
                                        .x = x,
                                        .rstd = rstd,
                                        .w = w,
                                        .dw = net_norm_dw(t->n, index),
                                        .dx = t->n->dx,
                                        .rows = t->rows,
                                        .dim = dim };
    if (!net_noise_norm_bwd(t->n, index, &a)) t->n->k->rmsnorm_bwd(t->n->k, &a);
}

static void noise_back(const struct pass *t, enum noise_op op, enum noise_site site, kptr dx,
                       int dim) {
    net_noise_back(t->n, op, t->layer, site, dx, t->rows, dim);
}

static void mlp_bwd(const struct pass *t, struct net_act *a) {
    struct net *n = t->n;
    const int ffn = n->model->conf.ffn_dim;
    adapter_grad(t, PROJ_DOWN, a, n->dx, adapter_x(t, PROJ_DOWN, 1, a->act));
    base_dx(t, PROJ_DOWN, n->dx, n->dact, false);
    adapter_dx(t, NET_SITE_DOWN, n->dact);
    noise_back(t, NOISE_OP_MATMUL, NOISE_SITE_DX_DOWN, n->dact, ffn);
    const struct kern_swiglu_bwd swiglu = { .dy = n->dact,
                                            .gate = a->gate,
                                            .up = a->up,
                                            .type = n->type,
                                            .dgate = n->gate,
                                            .dup = n->up,
                                            .rows = t->rows,
                                            .dim = ffn };
    n->k->swiglu_bwd(n->k, &swiglu);
    net_noise_swiglu_bwd(n, t->layer, &swiglu);
    const kptr x = adapter_x(t, PROJ_GATE, 2, a->h_post);
    adapter_grad(t, PROJ_GATE, a, n->gate, x);
    adapter_grad(t, PROJ_UP, a, n->up, x);
    base_dx(t, PROJ_GATE, n->gate, n->dh, false);
    base_dx(t, PROJ_UP, n->up, n->dh, true);
    adapter_dx(t, NET_SITE_MLP, n->dh);
    noise_back(t, NOISE_OP_MATMUL, NOISE_SITE_DX_MLP, n->dh, n->model->conf.dim);
    norm_bwd(t, 2 * t->layer + 1, a->x_mid, a->rstd_post, n->model->layer[t->layer].norm_post);
}

static void rope_bwd(const struct pass *t, kptr x, int heads) {
    t->n->k->rope(t->n->k, &(struct kern_rope){ .x = x,
                                                .y = x,
                                                .y_type = KERN_F32,
                                                .pos = t->n->pos,
                                                .cos = t->n->cos,
                                                .sin = t->n->sin,
                                                .rows = t->rows,
                                                .heads = heads,
                                                .head_dim = t->n->model->conf.head_dim,
                                                .inverse = true });
}

static void attention_bwd(const struct pass *t, struct net_act *a) {
    struct net *n = t->n;
    const struct model_conf *c = &n->model->conf;
    adapter_grad(t, PROJ_O, a, n->dx, adapter_x(t, PROJ_O, 1, a->attn));
    base_dx(t, PROJ_O, n->dx, n->dh, false);
    adapter_dx(t, NET_SITE_O, n->dh);
    noise_back(t, NOISE_OP_MATMUL, NOISE_SITE_DX_O, n->dh, n->q_dim);
    struct kern_attn_bwd attn = { .q = a->q,
                                  .q_type = n->type,
                                  .kv = n->kv,
                                  .layer = t->layer,
                                  .slots = n->slots,
                                  .y = a->attn,
                                  .y_type = n->type,
                                  .lse = a->lse,
                                  .dy = n->dh,
                                  .dq = n->dq,
                                  .dk = n->dk,
                                  .dv = n->dv,
                                  .seq_start = t->seq_start,
                                  .seqs = t->seqs,
                                  .heads = c->heads,
                                  .scale = net_attn_scale(n) };
    if (!net_noise_attn_bwd(n, t->layer, a, t->rows, &attn)) n->k->attn_bwd(n->k, &attn);
    rope_bwd(t, n->dq, c->heads);
    rope_bwd(t, n->dk, c->kv_heads);
    noise_back(t, NOISE_OP_ROPE, NOISE_SITE_ROPE_DQ, n->dq, n->q_dim);
    noise_back(t, NOISE_OP_ROPE, NOISE_SITE_ROPE_DK, n->dk, n->kv_dim);
    const kptr x = adapter_x(t, PROJ_Q, 3, a->h_in);
    adapter_grad(t, PROJ_Q, a, n->dq, x);
    adapter_grad(t, PROJ_K, a, n->dk, x);
    adapter_grad(t, PROJ_V, a, n->dv, x);
    if (t->layer == 0) return;
    base_dx(t, PROJ_Q, n->dq, n->dh, false);
    base_dx(t, PROJ_K, n->dk, n->dh, true);
    base_dx(t, PROJ_V, n->dv, n->dh, true);
    adapter_dx(t, NET_SITE_QKV, n->dh);
    noise_back(t, NOISE_OP_MATMUL, NOISE_SITE_DX_QKV, n->dh, c->dim);
    norm_bwd(t, 2 * t->layer, a->x_in, a->rstd_in, n->model->layer[t->layer].norm_in);
}

void net_layers_bwd(struct net *n, int rows, const int32_t *seq_start, int seqs) {
    n->op_noise.seen.passes[NOISE_BACKWARD]++;
    for (int layer = n->model->conf.layers - 1; layer >= 0; layer--) {
        const struct pass t = { n, layer, rows, seqs, seq_start };
        mlp_bwd(&t, &n->act[layer]);
        attention_bwd(&t, &n->act[layer]);
    }
}
