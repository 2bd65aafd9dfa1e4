/* net_noise_bwd.c - the plan's noise in the backward pass: on the gradients that operations return,
 * and the derivative of what the forward added.
 *
 * Forward noise is a constant of the pass: its derivative is that of the clean operation, taken at
 * the values that the noisy pass had. What the backward needs of them is drawn again.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/rng.h"
#include "lib/model/net_int.h"

static struct kern_perturb in_place(struct kern_noise noise, kptr x, int rows, int dim) {
    return (struct kern_perturb){ .noise = noise,
                                  .x = x,
                                  .x_type = KERN_F32,
                                  .x_ld = dim,
                                  .y = x,
                                  .y_type = KERN_F32,
                                  .y_ld = dim,
                                  .rows = rows,
                                  .dim = dim };
}

void net_noise_back(struct net *n, enum noise_op op, int layer, enum noise_site site, kptr dx,
                    int rows, int dim) {
    const struct kern_noise noise = net_noise_op(n, op, NOISE_BACKWARD, layer, site, true);
    const struct kern_perturb a = in_place(noise, dx, rows, dim);
    if (noise.type) n->k->perturb(n->k, &a);
}

bool net_noise_norm_bwd(struct net *n, int index, const struct kern_rmsnorm_bwd *a) {
    if (!n->op_noise.on) return false;
    const int layer = net_noise_norm_layer(n, index);
    const enum noise_site site = layer == NET_NO_LAYER ? NOISE_SITE_DNORM_FINAL
                                 : index % 2           ? NOISE_SITE_DNORM_POST
                                                       : NOISE_SITE_DNORM_IN;
    const struct kern_noise noise = net_noise_op(n, NOISE_OP_NORM, NOISE_BACKWARD, layer, site,
                                                 true);
    struct kern_rmsnorm_bwd b = *a;
    b.x = net_noise_norm_x(n, index, a->x, a->rows, false);
    if (noise.type) {                                /* dx is added to the residual's after it */
        b.dx = n->op_noise.wide;
        n->k->zero(n->k, b.dx, (size_t)a->rows * (size_t)a->dim * sizeof(float));
    }
    n->k->rmsnorm_bwd(n->k, &b);
    struct kern_perturb add = in_place(noise, b.dx, a->rows, a->dim);
    add.y = a->dx;
    add.accumulate = true;
    if (noise.type) n->k->perturb(n->k, &add);
    return true;
}

/* Scores and probabilities as the forward had them. */
static struct kern_noise again(struct net *n, enum noise_op op, int layer, enum noise_site site) {
    return net_noise_op(n, op, NOISE_FORWARD, layer, site, false);
}

bool net_noise_attn_bwd(struct net *n, int layer, const struct net_act *act, int rows,
                        struct kern_attn_bwd *a) {
    if (!n->op_noise.on) return false;
    const struct kern_attn_noise noise = {
        .scores = again(n, NOISE_OP_BMM, layer, NOISE_SITE_SCORES),
        .probs = again(n, NOISE_OP_SOFTMAX, layer, NOISE_SITE_PROBS),
        .dprobs = net_noise_op(n, NOISE_OP_BMM, NOISE_BACKWARD, layer, NOISE_SITE_DPROBS, true),
        .dscores = net_noise_op(n, NOISE_OP_SOFTMAX, NOISE_BACKWARD, layer, NOISE_SITE_DSCORES,
                                true),
    };
    if (noise.scores.type || noise.probs.type || noise.dprobs.type || noise.dscores.type)
        a->noise = &noise;
    a->peaks = act->peaks;
    if (net_noise_op_here(n, NOISE_OP_BMM, NOISE_FORWARD, layer)) a->y = act->attn_clean;
    n->k->attn_bwd(n->k, a);
    a->noise = NULL;
    net_noise_back(n, NOISE_OP_BMM, layer, NOISE_SITE_DQ, a->dq, rows, n->q_dim);
    net_noise_back(n, NOISE_OP_BMM, layer, NOISE_SITE_DK, a->dk, rows, n->kv_dim);
    net_noise_back(n, NOISE_OP_BMM, layer, NOISE_SITE_DV, a->dv, rows, n->kv_dim);
    return true;
}

/* dup = dy * (silu(gate) + e), e of the forward pass but from the gate that was kept. */
void net_noise_swiglu_bwd(struct net *n, int layer, const struct kern_swiglu_bwd *a) {
    const struct kern_noise noise = net_noise_op(n, NOISE_OP_SILU, NOISE_FORWARD, layer,
                                                 NOISE_SITE_SILU, false);
    if (noise.type) {
        struct kern_perturb up = in_place(noise, a->dup, a->rows, a->dim);
        up.mul = a->dy;
        n->k->silu(n->k, &(struct kern_silu){ .x = a->gate,
                                              .x_type = a->type,
                                              .y = a->dup,
                                              .rows = a->rows,
                                              .dim = a->dim });
        n->k->perturb(n->k, &up);
    }
    net_noise_back(n, NOISE_OP_SILU, layer, NOISE_SITE_DGATE, a->dgate, a->rows, a->dim);
}

/* A layer's part of the gradient: whole rows, then what is left. */
static void grad_rows(struct net *n, struct kern_noise noise, int layer, kptr at, size_t params) {
    const int rows = (int)(params / NOISE_GRAD_ROW), rest = (int)(params % NOISE_GRAD_ROW);
    struct kern_perturb a = in_place(noise, at, rows, NOISE_GRAD_ROW);
    if (rows) n->k->perturb(n->k, &a);
    a = in_place(noise, kptr_at(at, (size_t)rows * NOISE_GRAD_ROW * sizeof(float)), 1, rest);
    a.noise.site = KERN_NOISE_SITE(layer, NOISE_SITE_GRAD_REST);
    if (rest) n->k->perturb(n->k, &a);
}

/* Of type systematic a counter holds no row: long rows, each with a key of its own. */
static void grad_fixed(struct net *n, struct kern_noise noise, kptr at, size_t params) {
    for (size_t i = 0; i * KERN_NOISE_DIM_MAX < params; i++) {
        const size_t from = i * KERN_NOISE_DIM_MAX, left = params - from;
        rng_key(noise.key, n->op_noise.fixed_seed, RNG_PURPOSE_OP_NOISE, 1 + ((uint64_t)i << 32));
        const struct kern_perturb a = in_place(noise, kptr_at(at, from * sizeof(float)), 1,
                                               left < KERN_NOISE_DIM_MAX ? (int)left
                                                                         : KERN_NOISE_DIM_MAX);
        n->k->perturb(n->k, &a);
    }
}

void net_noise_grad(struct net *n, uint64_t update) {
    struct net_noise *x = &n->op_noise;
    const struct noise_plan *p = x->plan;
    if (!x->ops[NOISE_BACKWARD] || !p->op[NOISE_OP_MATMUL]) return;
    const size_t params = n->lora.params / (size_t)p->layers;
    uint32_t key[2];
    rng_key(key, x->seed, RNG_PURPOSE_OP_NOISE, 2 + update);
    x->seen.grad.sites++;
    for (int layer = 0; layer < p->layers; layer++) {
        if (!p->op_layer[layer]) continue;
        struct kern_noise noise = net_noise_op(n, NOISE_OP_MATMUL, NOISE_BACKWARD, layer,
                                               NOISE_SITE_GRAD, false);
        const kptr at = kptr_at(n->grad, (size_t)layer * params * sizeof(float));
        noise.id = noise.pos = noise.key_at = (kptr){ NULL };
        noise.sums = kptr_at(x->sums, NET_TALLY_GRAD * KERN_NOISE_SUMS * sizeof(int64_t));
        if (noise.type == KERN_NOISE_SYSTEMATIC) grad_fixed(n, noise, at, params);
        else {
            memcpy(noise.key, key, sizeof key);
            grad_rows(n, noise, layer, at, params);
        }
    }
}
