/* net_noise_weights.c - noise on the weights of modules: drawn once for a seed, kept beside the
 * weights, never in them.
 *
 * Knows: e of a matrix, made row by row by the backend (of type deadzone a row, one output's
 * weights, has its own edge), rounded once to a bf16 matrix that is the noise (f32 beside f32
 * weights); the net multiplies by it as a second product. Of norms e is f32, and AQN's dw is added
 * to it, because the norm takes one dw: another AQN draw makes them anew, and them alone. All of it
 * stays on the backend, in memory that another seed fills again in place.
 * Does not know: when a seed changes.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/str.h"
#include "lib/model/net_int.h"

enum { BLOCK_ROWS = 256 };                           /* rows of a matrix drawn in one call */
_Static_assert(BLOCK_ROWS % KERN_OUT_BLOCK == 0, "whole panels are packed");

static bool hit(const struct net *n, int layer, enum noise_module m) {
    return n->op_noise.plan->module[layer][m];
}

/* One matrix at `used` of base, or only counted where that is absent. */
static size_t place(struct kern_weight *to, enum model_quant q, int out, int in, kptr base,
                    size_t used) {
    const enum kern_format f = q == MODEL_QUANT_F32 ? KERN_FORMAT_F32 : KERN_FORMAT_BF16;
    *to = (struct kern_weight){ .format = f, .out = out, .in = in, .scale = 1 };
    if (base.p) to->data = kptr_at(base, used);
    return used + ((kern_weight_bytes(f, out, in) + 63) & ~(size_t)63);
}

/* Rows as f32 while their noise is made, and which rows they are. */
static size_t place_buffer(struct net_weights *x, const struct model_conf *c, kptr base,
                           size_t used) {
    const int q_dim = c->heads * c->head_dim, most = c->dim > q_dim ? c->dim : q_dim;
    const size_t widest = (size_t)(c->ffn_dim > most ? c->ffn_dim : most),
                 bytes = BLOCK_ROWS * widest * sizeof(float);
    if (base.p) x->buffer = kptr_at(base, used), x->pos = kptr_at(base, used + bytes);
    return used + bytes + BLOCK_ROWS * sizeof(int32_t);
}

/* Lays out from base, or only counts where that is absent (x->linear may be, then). */
static size_t layout(struct net_weights *x, const struct model_conf *c, enum model_quant q,
                     const struct noise_plan *plan, kptr base) {
    const size_t norms = (size_t)(2 * c->layers + 1) * (size_t)c->dim * sizeof(float);
    size_t used = (norms + 63) & ~(size_t)63;
    struct kern_weight none;
    x->dw = base;
    for (int layer = 0; layer < c->layers; layer++)
        for (enum proj p = 0; p < PROJ_COUNT; p++) {
            int out, in;
            model_proj_shape(c, p, &out, &in);
            if (plan->module[layer][p])
                used = place(x->linear ? &x->linear[layer][p] : &none, q, out, in, base, used);
        }
    if (plan->module[0][NOISE_MODULE_HEAD])
        used = place(&x->head, q, c->vocab, c->dim, base, used);
    return place_buffer(x, c, base, used);
}

size_t net_plan_weights(const struct model_conf *c, enum model_quant q,
                        const struct noise_plan *plan) {
    struct net_weights x = { 0 };
    if (!plan->module_text.type || plan->module_text.point != NOISE_POINT_WEIGHT) return 0;
    return layout(&x, c, q, plan, (kptr){ NULL });
}

/* ---- one weight ---- */

/* x, rows first .. of a weight, becomes its noise, as the backend draws and counts it. */
static void draw_rows(struct net *n, struct kern_noise noise, kptr x, int first, int rows,
                      int dim) {
    int32_t pos[BLOCK_ROWS];
    for (int i = 0; i < rows; i++) pos[i] = first + i;
    noise.id = (kptr){ NULL };
    noise.pos = n->op_noise.weights.pos;
    n->k->upload(n->k, noise.pos, pos, (size_t)rows * sizeof *pos);
    n->k->perturb(n->k, &(struct kern_perturb){ .noise = noise,
                                                .x = x,
                                                .x_ld = dim,
                                                .delta = true,
                                                .y = x,
                                                .y_ld = dim,
                                                .rows = rows,
                                                .dim = dim });
}

static void make_matrix(struct net *n, struct kern_noise noise, const struct kern_weight *w,
                        const struct kern_weight *to) {
    struct kern_weight_rows rows = { .values = n->op_noise.weights.buffer };
    for (; rows.first < w->out; rows.first += rows.rows) {
        rows.rows = w->out - rows.first < BLOCK_ROWS ? w->out - rows.first : BLOCK_ROWS;
        rows.w = *w;
        n->k->unpack(n->k, &rows);
        draw_rows(n, noise, rows.values, rows.first, rows.rows, w->in);
        rows.w = *to;
        n->k->pack_rows(n->k, &rows);
    }
}

/* ---- all of them ---- */

static void make_norm(struct net *n, int index, kptr w) {
    const enum noise_module m = net_noise_norm_module(n, index);
    const int layer = net_noise_norm_layer(n, index), dim = n->model->conf.dim;
    const kptr to = net_norm_dw_row(n, index), aqn = noise_view_dw(n->noise, index, dim);
    const size_t bytes = (size_t)dim * sizeof(float);
    if (hit(n, layer < 0 ? 0 : layer, m)) {
        n->k->copy(n->k, to, w, bytes);
        draw_rows(n, net_noise_weight_draw(n, m, layer), to, 0, 1, dim);
    } else n->k->zero(n->k, to, bytes);
    if (aqn.p) n->k->add(n->k, &(struct kern_add){ .x = to, .y = aqn, .n = (size_t)dim });
}

static void make_norms(struct net *n) {
    const struct model *m = n->model;
    for (int layer = 0; layer < m->conf.layers; layer++) {
        make_norm(n, 2 * layer, m->layer[layer].norm_in);
        make_norm(n, 2 * layer + 1, m->layer[layer].norm_post);
    }
    make_norm(n, 2 * m->conf.layers, m->norm_final);
}

static void make_matrices(struct net *n) {
    struct net_weights *x = &n->op_noise.weights;
    const struct model *m = n->model;
    for (int layer = 0; layer < m->conf.layers; layer++)
        for (enum proj p = 0; p < PROJ_COUNT; p++)
            if (x->linear[layer][p].out)
                make_matrix(n, net_noise_weight_draw(n, (enum noise_module)p, layer),
                            &m->layer[layer].w[p], &x->linear[layer][p]);
    if (x->head.out)
        make_matrix(n, net_noise_weight_draw(n, NOISE_MODULE_HEAD, NET_NO_LAYER), &m->head,
                    &x->head);
}

/* In place where there is enough of it: the same plan has the same addresses. */
static int room(struct net *n, struct err *e) {
    struct net_weights *x = &n->op_noise.weights;
    const struct noise_plan *plan = n->op_noise.plan;
    const struct model *m = n->model;
    const size_t bytes = net_plan_weights(&m->conf, m->quant, plan);
    if (x->mem_bytes < bytes) {
        net_noise_weights_release(n);
        if (n->k->alloc(n->k, &x->mem, bytes, e) < 0)
            return err_wrap(e, "cannot make room for noise on weights of modules");
        x->mem_bytes = bytes;
        x->linear = mem_alloc((size_t)m->conf.layers * sizeof *x->linear);
    }
    memset(x->linear, 0, (size_t)m->conf.layers * sizeof *x->linear);
    x->head = (struct kern_weight){ 0 };
    layout(x, &m->conf, m->quant, plan, x->mem);
    return 0;
}

/* Matrices and norms, measured. */
static int make_all(struct net *n, struct err *e) {
    struct net_weights *x = &n->op_noise.weights;
    struct noise_tally seen[NOISE_MODULE_COUNT], *tally = n->op_noise.seen.module;
    if (net_noise_take_sums(n, e) < 0) return -1;
    memcpy(seen, tally, sizeof seen);                /* what follows is counted by itself */
    memset(tally, 0, sizeof seen);
    make_matrices(n);
    make_norms(n);
    const int rc = net_noise_take_sums(n, e);
    memcpy(x->tally, tally, sizeof seen);
    memcpy(tally, seen, sizeof seen);
    x->plan = n->op_noise.plan;
    x->seed = n->op_noise.seed;
    x->draw = ++n->op_noise.weights_draws;
    x->ready = rc == 0;
    return rc;
}

int net_noise_prepare(struct net *n, struct err *e) {
    struct net_weights *x = &n->op_noise.weights;
    int rc = 0;
    if (!n->op_noise.modules || n->op_noise.plan->module_text.point != NOISE_POINT_WEIGHT ||
        (x->ready && x->norms_ready))
        return 0;
    if (!x->ready) {
        rc = room(n, e);
        if (rc == 0) rc = make_all(n, e);
    } else {
        n->op_noise.again = true;                    /* the same draws beside another AQN */
        make_norms(n);
        n->op_noise.again = false;
    }
    x->norms_ready = rc == 0;
    return rc < 0 ? err_wrap(e, "noise on weights of modules") : 0;
}

void net_noise_weights_release(struct net *n) {
    struct net_weights *x = &n->op_noise.weights;
    if (x->mem.p) n->k->free(n->k, &x->mem);
    free(x->linear);
    *x = (struct net_weights){ 0 };
}

/* ---- what the passes ask ---- */

kptr net_norm_dw_row(const struct net *n, int index) {
    return kptr_at(n->op_noise.weights.dw,
                   (size_t)index * (size_t)n->model->conf.dim * sizeof(float));
}

kptr net_norm_dw(const struct net *n, int index) {
    return net_noise_weights_on(n) ? net_norm_dw_row(n, index)
                                   : noise_view_dw(n->noise, index, n->model->conf.dim);
}

const struct kern_weight *net_noise_weight(const struct net *n, int layer, enum noise_module m) {
    if (!net_noise_weights_on(n) || !hit(n, layer < 0 ? 0 : layer, m)) return NULL;
    return m == NOISE_MODULE_HEAD ? &n->op_noise.weights.head
                                  : &n->op_noise.weights.linear[layer][m];
}
