/* net_forward.c - the layers, the wanted rows, the head: what every stage computes, in the one
 * order there is.
 *
 * Order: one projection with its adapter, a layer, all layers, wanted rows, head, the public calls.
 * Prefill, decode and training differ only in the list of rows and in `save`, which copies and
 * never computes.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/net_int.h"

/* u = bf16(s A x) of all adapted projections that read x. */
static void adapter_in(struct net *n, int layer, enum net_site site, kptr x, int x_ld, kptr u,
                       int rows) {
    const struct kern_weight *a = &n->lora_layer[layer].a[site];
    if (!n->adapted || !a->out) return;
    n->k->linear(n->k, &(struct kern_linear){ .x = x,
                                              .x_type = n->type,
                                              .x_ld = x_ld,
                                              .w = *a,
                                              .scale = net_lora_scale(n),
                                              .y = u,
                                              .y_type = n->type,
                                              .y_ld = a->out,
                                              .rows = rows,
                                              .apart = n->apart }, 1);
}

/* n->xq becomes x as a 4-bit unit would read it, where a projection of p .. p + count - 1 does. The
 * backward has x (gradients pass straight through), and so has an adapter in full precision. */
static void round_input(struct net *n, int layer, enum proj p, int count, kptr x, int in,
                        int rows) {
    bool any = false;
    for (int i = 0; i < count; i++) any |= net_rounds_in(n, layer, p + (enum proj)i);
    if (any) net_round_rows(n, x, n->xq, rows, in);
}

/* y += dW x of those projections whose weights carry noise: (W + dW) x in two products. */
static void project_noise(struct net *n, int layer, enum proj p, const struct kern_linear *base,
                          int count, bool module) {
    struct kern_linear a[KERN_LINEARS_MAX];
    int used = 0;
    for (int i = 0; i < count; i++, p++) {
        const struct kern_weight *w = module ? net_noise_weight(n, layer, (enum noise_module)p)
                                             : noise_view_linear(n->noise, layer, p);
        if (!w) continue;
        if (module) net_noise_weight_seen(n, (enum noise_module)p);
        a[used++] = (struct kern_linear){ .x = base[i].x,
                                          .x_type = n->type,
                                          .x_ld = w->in,
                                          .w = *w,
                                          .scale = 1,
                                          .accumulate = true,
                                          .y = base[i].y,
                                          .y_type = KERN_F32,
                                          .y_ld = w->out,
                                          .rows = base[i].rows,
                                          .apart = n->apart };
    }
    if (used) n->k->linear(n->k, a, used);
}

/* y += (W + dW) e + B u(e) of those projections that have noise e on their input x: by itself, as
 * x + e rounded to bf16 would be x for a small e. */
static void project_input_noise(struct net *n, int layer, enum proj p,
                                const struct kern_linear *base, int count, kptr x, int rows) {
    if (!net_noise_at_input(n, layer, p, count)) return;
    for (int i = 0; i < count; i++, p++) {
        struct kern_linear a = base[i];
        a.x = net_noise_input_delta(n, layer, p, x, rows);
        if (!a.x.p) continue;
        a.bias = (kptr){ NULL };
        a.accumulate = true;
        adapter_in(n, layer, net_site_of(p), a.x, a.w.in, n->op_noise.u, rows);
        if (a.b.out)
            a.u = kptr_at(n->op_noise.u, (size_t)net_site_column(n, p) * net_type_bytes(n->type));
        n->k->linear(n->k, &a, 1);
        project_noise(n, layer, p, &a, 1, false);
    }
}

/* The linears y = W x + b + B u of projections p .. p + count - 1, which share x, into y[0] ..: one
 * operation. `add` for the residual, which takes o and down without a copy of its own. */
static void project(struct net *n, int layer, enum proj p, int count, kptr x,
                    const struct net_act *act, const kptr *y, bool add, int rows) {
    const struct model_layer *l = &n->model->layer[layer];
    struct kern_linear a[KERN_LINEARS_MAX];
    const enum proj first = p;
    assert(count <= KERN_LINEARS_MAX);
    for (int i = 0; i < count; i++, p++) {
        const struct kern_weight *w = &l->w[p];
        a[i] = (struct kern_linear){ .x = net_rounds_in(n, layer, p) ? n->xq : x,
                                     .x_type = n->type,
                                     .x_ld = w->in,
                                     .w = *w,
                                     .scale = 1,
                                     .bias = p <= PROJ_V ? l->bias[p] : (kptr){ NULL },
                                     .accumulate = add,
                                     .y = y[i],
                                     .y_type = KERN_F32,
                                     .y_ld = w->out,
                                     .rows = rows,
                                     .apart = n->apart };
        if (!net_lora_on(n, p)) continue;
        a[i].u = net_u_of(n, act, p);
        a[i].u_ld = n->site_rank[net_site_of(p)];
        a[i].b = n->lora_layer[layer].b[p];
    }
    const bool noisy = net_noise_linear(n, layer, first, a, count);
    n->k->linear(n->k, a, count);
    project_noise(n, layer, first, a, count, false);
    project_noise(n, layer, first, a, count, true);
    project_input_noise(n, layer, first, a, count, x, rows);
    if (noisy) net_noise_linear_end(n, layer, first, a, count, y);
}

/* What follows one input x of width `in`: u of its adapters, then its projections. The backward
 * needs u of what each projection read. */
static void linears(struct net *n, int layer, enum proj p, int count, kptr x, int in,
                    const struct net_act *act, const kptr *y, bool add, int rows) {
    const enum net_site site = net_site_of(p);
    const bool rounds = net_adapter_rounds_in(n, layer, p, count);
    round_input(n, layer, p, count, x, in, rows);
    adapter_in(n, layer, site, rounds ? n->xq : x, in, act->u[site], rows);
    if (rounds) {                                    /* u of each projection is a row of its own */
        const int rank = n->lora.shape.rank;
        net_round_rows(n, act->u[site], act->u[site], rows * (n->site_rank[site] / rank), rank);
    }
    project(n, layer, p, count, x, act, y, add, rows);
    if (!n->o.train || !net_noise_at_input(n, layer, p, count)) return;
    for (int i = 0; i < count; i++, p++) {
        const kptr own = net_noise_input(n, layer, p, x, rows);
        adapter_in(n, layer, site, own, in, n->op_noise.u, rows);
        net_noise_keep_u(n, p, act, rows);
    }
}

static void norm(struct net *n, int index, kptr x, kptr w, kptr y, kptr rstd, int rows) {
    const struct model_conf *c = &n->model->conf;
    const struct kern_rmsnorm a = { .x = x,
                                    .w = w,
                                    .dw = net_norm_dw(n, index),
                                    .y = y,
                                    .rstd = rstd,
                                    .y_type = n->type,
                                    .rows = rows,
                                    .dim = c->dim,
                                    .eps = c->norm_eps };
    if (!net_noise_norm(n, index, &a)) n->k->rmsnorm(n->k, &a);
}

static void rope(struct net *n, int layer, enum noise_site site, kptr x, kptr y, int heads,
                 int rows) {
    const struct kern_rope a = { .x = x,
                                 .y = y,
                                 .y_type = n->type,
                                 .pos = n->pos,
                                 .cos = n->cos,
                                 .sin = n->sin,
                                 .rows = rows,
                                 .heads = heads,
                                 .head_dim = n->model->conf.head_dim };
    if (!net_noise_rope(n, layer, site, &a)) n->k->rope(n->k, &a);
}

static void attention(struct net *n, int layer, struct net_act *a, int rows, bool save) {
    const struct model_conf *c = &n->model->conf;
    linears(n, layer, PROJ_Q, 3, a->h_in, c->dim, a, (kptr[]){ n->qf, n->kf, n->vf }, false, rows);
    rope(n, layer, NOISE_SITE_ROPE_Q, n->qf, a->q, c->heads, rows);
    rope(n, layer, NOISE_SITE_ROPE_K, n->kf, n->kt, c->kv_heads, rows);
    n->k->kv_put(n->k, &(struct kern_kv_put){ .kv = n->kv,
                                              .layer = layer,
                                              .k = n->kt,
                                              .k_type = n->type,
                                              .v = n->vf,
                                              .slots = n->slots,
                                              .pos = n->pos,
                                              .rows = rows });
    struct kern_attn attn = { .q = a->q,
                              .q_type = n->type,
                              .kv = n->kv,
                              .layer = layer,
                              .slots = n->slots,
                              .pos = n->pos,
                              .y = a->attn,
                              .y_type = n->type,
                              .lse = save ? a->lse : (kptr){ NULL },
                              .rows = rows,
                              .heads = c->heads,
                              .scale = net_attn_scale(n) };
    if (!net_noise_attn(n, layer, a, &attn)) n->k->attn(n->k, &attn);
    linears(n, layer, PROJ_O, 1, a->attn, n->q_dim, a, &n->x, true, rows);
}

static void mlp(struct net *n, int layer, struct net_act *a, int rows, bool save) {
    const struct model_conf *c = &n->model->conf;
    linears(n, layer, PROJ_GATE, 2, a->h_post, c->dim, a, (kptr[]){ n->gate, n->up }, false, rows);
    const struct kern_swiglu swiglu = { .gate = n->gate,
                                        .up = n->up,
                                        .y = a->act,
                                        .gate_kept = save ? a->gate : (kptr){ NULL },
                                        .up_kept = save ? a->up : (kptr){ NULL },
                                        .y_type = n->type,
                                        .rows = rows,
                                        .dim = c->ffn_dim };
    if (!net_noise_swiglu(n, layer, &swiglu)) n->k->swiglu(n->k, &swiglu);
    linears(n, layer, PROJ_DOWN, 1, a->act, c->ffn_dim, a, &n->x, true, rows);
}

void net_layers(struct net *n, int rows, bool save) {
    const struct model_conf *c = &n->model->conf;
    const size_t x_bytes = (size_t)rows * (size_t)c->dim * sizeof(float);
    const kptr none = { NULL };
    n->k->embed(n->k, &(struct kern_embed){
                          .tokens = n->tokens, .w = n->model->embed, .y = n->x, .rows = rows });
    for (int layer = 0; layer < c->layers; layer++) {
        struct net_act *a = &n->act[save ? layer : 0];
        if (save) n->k->copy(n->k, a->x_in, n->x, x_bytes);
        norm(n, 2 * layer, n->x, n->model->layer[layer].norm_in, a->h_in,
             save ? a->rstd_in : none, rows);
        attention(n, layer, a, rows, save);
        if (save) n->k->copy(n->k, a->x_mid, n->x, x_bytes);
        norm(n, 2 * layer + 1, n->x, n->model->layer[layer].norm_post, a->h_post,
             save ? a->rstd_post : none, rows);
        mlp(n, layer, a, rows, save);
    }
}

void net_want(struct net *n, const int32_t *index, int wants, bool save) {
    const struct model_conf *c = &n->model->conf;
    assert(wants <= n->o.rows_max);
    n->wants = wants;
    if (!wants) return;
    n->k->upload(n->k, n->index, index, (size_t)wants * sizeof *index);
    n->k->gather(n->k, &(struct kern_gather){ .x = n->x,
                                              .index = n->index,
                                              .y = n->hid,
                                              .type = KERN_F32,
                                              .rows = wants,
                                              .dim = c->dim });
    net_noise_want(n, index, wants);
    norm(n, 2 * c->layers, n->hid, n->model->norm_final, n->hid_t,
         save ? n->hid_rstd : (kptr){ NULL }, wants);
}

void net_want_all(struct net *n, int rows) {
    assert(rows == n->wants);
    net_noise_want_all(n);
    norm(n, 2 * n->model->conf.layers, n->x, n->model->norm_final, n->hid_t, (kptr){ NULL }, rows);
}

void net_head(struct net *n, int first, int count) {
    const struct kern_weight *w = &n->model->head;
    assert(count <= n->head_rows && first + count <= n->wants);
    kptr x = kptr_at(n->hid_t, (size_t)first * (size_t)w->in * net_type_bytes(n->type));
    const struct kern_linear a = { .x = x,
                                   .x_type = n->type,
                                   .x_ld = w->in,
                                   .w = *w,
                                   .scale = 1,
                                   .y = n->logits,
                                   .y_type = KERN_F32,
                                   .y_ld = w->out,
                                   .rows = count,
                                   .apart = n->apart };
    if (!net_noise_head(n, first, &a)) n->k->linear(n->k, &a, 1);
}

void net_upload_rows(struct net *n, const struct net_row *rows, int count) {
    int32_t *tokens = n->host.upload, *slots = tokens + count, *pos = slots + count;
    const size_t bytes = (size_t)count * sizeof *tokens;
    for (int i = 0; i < count; i++) {
        tokens[i] = rows[i].token;
        slots[i] = rows[i].slot;
        pos[i] = rows[i].pos;
    }
    n->k->upload(n->k, n->tokens, tokens, bytes);
    n->k->upload(n->k, n->slots, slots, bytes);
    n->k->upload(n->k, n->pos, pos, bytes);
    net_noise_rows(n, rows, count);
}

/* ---- public ---- */

int net_forward(struct net *n, const struct net_row *rows, int count, const int32_t *want,
                int wants, struct err *e) {
    assert(count > 0 && count <= n->o.rows_max && wants >= 0 && wants <= count);
    n->wants = 0;
    if (net_noise_prepare(n, e) < 0) return -1;
    if (net_claim(n, rows, count, e) < 0) return -1;
    net_upload_rows(n, rows, count);
    net_layers(n, count, false);
    net_want(n, want, wants, false);
    return n->k->sync(n->k, e) < 0 ? err_wrap(e, "forward pass") : 0;
}

static int min_int(int a, int b) { return a < b ? a : b; }

/* Up to head_rows draws from n->logits, sampler first .. of those uploaded, `all` in all. */
static void draw(struct net *n, int first, int count, int all, bool cuts) {
    const size_t at = (size_t)first * sizeof(uint32_t), column = (size_t)all * sizeof(uint32_t);
    n->k->sample(n->k, &(struct kern_sample){
                           .logits = n->logits,
                           .rows = count,
                           .vocab = n->model->conf.vocab,
                           .sampler = kptr_at(n->sampler,
                                              (size_t)first * sizeof(struct kern_sampler)),
                           .cuts = cuts,
                           .token = kptr_at(n->drawn, at),
                           .lp = kptr_at(n->drawn, column + at),
                           .lp_raw = kptr_at(n->drawn, 2 * column + at) });
}

bool net_upload_samplers(struct net *n, const struct kern_sampler *s, int count) {
    bool cuts = false;
    assert(count <= n->o.rows_max);
    for (int i = 0; i < count && !cuts; i++) cuts = kern_sampler_cuts(&s[i], n->model->conf.vocab);
    n->k->upload(n->k, n->sampler, s, (size_t)count * sizeof *s);
    return cuts;
}

void net_fetch_drawn(struct net *n, int count, int32_t *token, float *lp, float *lp_raw) {
    const size_t bytes = (size_t)count * sizeof *n->host.drawn;
    n->k->download(n->k, n->host.drawn, n->drawn, 3 * bytes);
    memcpy(token, n->host.drawn, bytes);
    memcpy(lp, n->host.drawn + count, bytes);
    memcpy(lp_raw, n->host.drawn + 2 * count, bytes);
}

void net_head_and_draw(struct net *n, bool cuts) {
    for (int first = 0; first < n->wants; first += n->head_rows) {
        const int count = min_int(n->head_rows, n->wants - first);
        net_head(n, first, count);
        draw(n, first, count, n->wants, cuts);
    }
}

int net_sample(struct net *n, const struct kern_sampler *s, int32_t *token, float *lp,
               float *lp_raw, struct err *e) {
    net_head_and_draw(n, net_upload_samplers(n, s, n->wants));
    net_fetch_drawn(n, n->wants, token, lp, lp_raw);
    return n->k->sync(n->k, e) < 0 ? err_wrap(e, "sampling") : 0;
}

int net_sample_row(struct net *n, int want, const struct kern_sampler *s, int count, int32_t *token,
                   float *lp, float *lp_raw, struct err *e) {
    assert(want >= 0 && want < n->wants);
    const size_t row_bytes = (size_t)n->model->conf.vocab * sizeof(float);
    for (int first = 0; first < count; first += n->head_rows) {
        const int rows = min_int(n->head_rows, count - first);
        n->op_noise.again = first > 0;               /* the same row: its noise counts once */
        net_head(n, want, 1);
        n->op_noise.again = false;
        for (int i = 1; i < rows; i++)
            n->k->copy(n->k, kptr_at(n->logits, (size_t)i * row_bytes), n->logits, row_bytes);
        draw(n, 0, rows, rows, net_upload_samplers(n, s + first, rows));
        net_fetch_drawn(n, rows, token + first, lp + first, lp_raw + first);
    }
    return n->k->sync(n->k, e) < 0 ? err_wrap(e, "sampling") : 0;
}

int net_logits(struct net *n, float *out, struct err *e) {
    const size_t vocab = (size_t)n->model->conf.vocab;
    for (int first = 0; first < n->wants; first += n->head_rows) {
        const int count = min_int(n->head_rows, n->wants - first);
        net_head(n, first, count);
        n->k->download(n->k, out + (size_t)first * vocab, n->logits,
                       (size_t)count * vocab * sizeof(float));
    }
    return n->k->sync(n->k, e) < 0 ? err_wrap(e, "logits") : 0;
}
