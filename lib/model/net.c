/* net.c - a net's memory, its life. Slots and pages: net_slots.c. Its adapter: net_adapter.c. The
 * maths: net_forward.c, net_backward.c. Scoring and training over sequences: net_train.c.
 *
 * Order: layout (also counts), rope tables, create.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/net_int.h"

#include <math.h>

#include "lib/base/str.h"

/* ---- layout ---- */

struct carve { kptr base; size_t used; };            /* base absent: only count */

static kptr carve(struct carve *c, size_t bytes) {
    kptr p = c->base.p ? kptr_at(c->base, c->used) : (kptr){ NULL };
    c->used += (bytes + 63) & ~(size_t)63;
    return p;
}
static kptr carve_f32(struct carve *c, int rows, int cols) {
    return carve(c, (size_t)rows * (size_t)cols * sizeof(float));
}
static kptr carve_t(const struct net *n, struct carve *c, int rows, int cols) {
    return carve(c, (size_t)rows * (size_t)cols * net_type_bytes(n->type));
}

static void carve_act(struct net *n, const struct model_conf *m, struct carve *c,
                      struct net_act *a) {
    const int R = n->o.rows_max;
    if (n->o.train) {
        a->x_in = carve_f32(c, R, m->dim);
        a->x_mid = carve_f32(c, R, m->dim);
        a->rstd_in = carve_f32(c, R, 1);
        a->rstd_post = carve_f32(c, R, 1);
        a->lse = carve_f32(c, R, m->heads);
        if (n->o.noise_peaks) a->peaks = carve_f32(c, R, 2 * m->heads);
        a->gate = carve_t(n, c, R, m->ffn_dim);
        a->up = carve_t(n, c, R, m->ffn_dim);
    }
    a->h_in = carve_t(n, c, R, m->dim);
    a->h_post = carve_t(n, c, R, m->dim);
    a->q = carve_t(n, c, R, n->q_dim);
    a->attn = carve_t(n, c, R, n->q_dim);
    if (n->o.noise && n->o.train) a->attn_clean = carve_t(n, c, R, n->q_dim);
    a->act = carve_t(n, c, R, m->ffn_dim);
    for (enum net_site s = 0; s < NET_SITE_COUNT; s++)
        if (n->site_rank[s]) a->u[s] = carve_t(n, c, R, n->site_rank[s]);
}

static void carve_lora(struct net *n, const struct model_conf *m, struct carve *c, int layer) {
    const enum kern_format format = n->type == KERN_BF16 ? KERN_FORMAT_BF16 : KERN_FORMAT_F32;
    struct net_lora_layer none = { 0 }, *l = n->lora_layer ? &n->lora_layer[layer] : &none;
    for (enum proj p = 0; p < PROJ_COUNT; p++) {
        if (!n->lora.shape.on[p]) continue;
        int out, in;
        model_proj_shape(m, p, &out, &in);
        struct kern_weight *a = &l->a[net_site_of(p)];
        if (!a->out) {
            *a = (struct kern_weight){
                .format = format, .out = n->site_rank[net_site_of(p)], .in = in, .scale = 1
            };
            a->data = carve(c, kern_weight_bytes(format, a->out, a->in));
        }
        l->b[p] = (struct kern_weight){
            .format = format, .out = out, .in = n->lora.shape.rank, .scale = 1
        };
        l->b[p].data = carve(c, kern_weight_bytes(format, out, n->lora.shape.rank));
    }
}

static void carve_backward(struct net *n, const struct model_conf *m, struct carve *c) {
    const int R = n->o.rows_max;
    int rank = 1;
    for (enum net_site s = 0; s < NET_SITE_COUNT; s++)
        rank = n->site_rank[s] > rank ? n->site_rank[s] : rank;
    n->dx = carve_f32(c, R, m->dim);
    n->dh = carve_f32(c, R, n->q_dim > m->dim ? n->q_dim : m->dim);
    n->dact = carve_f32(c, R, m->ffn_dim);
    n->dq = carve_f32(c, R, n->q_dim);
    n->dk = carve_f32(c, R, n->kv_dim);
    n->dv = carve_f32(c, R, n->kv_dim);
    n->du = carve_f32(c, R, rank);
    n->dhid = carve_f32(c, R, m->dim);
    n->grad = carve(c, n->lora.params * sizeof(float));
}

int net_widest_input(const struct net *n, const struct model_conf *m) {
    const int widest = m->dim > n->q_dim ? m->dim : n->q_dim;
    return m->ffn_dim > widest ? m->ffn_dim : widest;
}

static int max_int(int a, int b) { return a > b ? a : b; }

static void carve_noise(struct net *n, const struct model_conf *m, struct carve *c) {
    struct net_noise *x = &n->op_noise;
    const int R = n->o.rows_max, wide = max_int(m->dim, m->ffn_dim);
    int rank = 1;
    for (enum net_site s = 0; s < NET_SITE_COUNT; s++) rank = max_int(rank, n->site_rank[s]);
    x->id = carve(c, 2 * (size_t)R * sizeof(uint32_t));
    x->want_id = carve(c, 2 * (size_t)R * sizeof(uint32_t));
    x->want_pos = carve(c, (size_t)R * sizeof(int32_t));
    x->sums = carve(c, (size_t)NET_TALLIES * KERN_NOISE_SUMS * sizeof(int64_t));
    x->keys = carve(c, NET_NOISE_KEYS * 2 * sizeof(uint32_t));
    x->wide = carve_f32(c, R, wide);
    x->norm_in = carve_f32(c, R, m->dim);
    x->in = carve_t(n, c, R, net_widest_input(n, m));
    x->u = carve_t(n, c, R, rank);
}

static size_t pages_bytes(const struct net *n, const struct model_conf *m) {
    return (size_t)n->pages_max * (size_t)m->layers * 2 * (size_t)n->kv_dim * KERN_PAGE *
           net_type_bytes(n->type);
}

/* Lays everything out from `base`, or only counts where that is absent. */
static size_t net_carve(struct net *n, const struct model_conf *m, kptr base) {
    struct carve c = { base, 0 };
    struct net_act none;
    const int R = n->o.rows_max, H = n->head_rows;
    n->cos = carve_f32(&c, n->o.positions_max, m->head_dim / 2);
    n->sin = carve_f32(&c, n->o.positions_max, m->head_dim / 2);
    kptr *ints[] = { &n->tokens, &n->slots, &n->pos, &n->index, &n->targets };
    for (size_t i = 0; i < COUNT_OF(ints); i++) *ints[i] = carve(&c, (size_t)R * sizeof(int32_t));
    n->x = carve_f32(&c, R, m->dim);
    n->qf = carve_f32(&c, R, n->q_dim);
    n->kf = carve_f32(&c, R, n->kv_dim);
    n->vf = carve_f32(&c, R, n->kv_dim);
    n->kt = carve_t(n, &c, R, n->kv_dim);
    n->gate = carve_f32(&c, R, m->ffn_dim);
    n->up = carve_f32(&c, R, m->ffn_dim);
    n->hid = carve_f32(&c, R, m->dim);
    n->hid_t = carve_t(n, &c, R, m->dim);
    n->hid_rstd = carve_f32(&c, R, 1);
    if (model_quant_rounds(n->o.activations)) n->xq = carve_t(n, &c, R, net_widest_input(n, m));
    n->logits = carve_f32(&c, H, m->vocab);
    kptr *heads[] = { &n->lp, &n->lse, &n->entropy, &n->coef };
    for (size_t i = 0; i < COUNT_OF(heads); i++) *heads[i] = carve_f32(&c, H, 1);
    n->sampler = carve(&c, (size_t)R * sizeof(struct kern_sampler));
    n->drawn = carve(&c, 3 * (size_t)R * sizeof(uint32_t));
    for (int l = 0; l < (n->o.train ? m->layers : 1); l++)
        carve_act(n, m, &c, n->act ? &n->act[l] : &none);
    n->kv.table = carve(&c, (size_t)n->o.slots_max * (size_t)n->slot_pages * sizeof(int32_t));
    n->kv.pages = carve(&c, pages_bytes(n, m));
    if (n->lora.shape.rank)
        for (int l = 0; l < m->layers; l++) carve_lora(n, m, &c, l);
    if (n->o.train) carve_backward(n, m, &c);
    if (n->o.noise) carve_noise(n, m, &c);
    return c.used;
}

/* Sizes that follow from the options; no memory yet. */
static void net_shape(struct net *n, const struct model_conf *m, enum model_quant q,
                      const struct net_opts *o) {
    assert(o->rows_max > 0 && o->slots_max > 0 && o->positions_max > 0 && o->lora.rank >= 0);
    *n = (struct net){ .o = *o };
    n->type = q == MODEL_QUANT_F32 ? KERN_F32 : KERN_BF16;
    n->round = n->type == KERN_BF16;
    n->q_dim = m->heads * m->head_dim;
    n->kv_dim = m->kv_heads * m->head_dim;
    n->head_rows = o->rows_max < NET_HEAD_ROWS ? o->rows_max : NET_HEAD_ROWS;
    n->slot_pages = (o->positions_max + KERN_PAGE - 1) / KERN_PAGE;
    n->pages_max = o->pages_max ? o->pages_max : o->slots_max * n->slot_pages;
    if (o->train && !o->pages_max && n->pages_max > o->rows_max / KERN_PAGE + o->slots_max)
        /* all rows of a micro-batch, last pages partial */
        n->pages_max = o->rows_max / KERN_PAGE + o->slots_max;
    if (n->pages_max < n->slot_pages) n->pages_max = n->slot_pages;
    n->kv = (struct kern_kv){ .type = n->type,
                              .layers = m->layers,
                              .kv_heads = m->kv_heads,
                              .head_dim = m->head_dim,
                              .slot_pages = n->slot_pages };
    if (!o->lora.rank) memset(n->o.lora.on, 0, sizeof n->o.lora.on);
    n->lora = (struct lora){ .shape = n->o.lora, .conf = *m };
    n->lora.params = lora_params(m, &n->o.lora);
    for (enum proj p = 0; p < PROJ_COUNT; p++)
        if (n->lora.shape.on[p]) n->site_rank[net_site_of(p)] += n->lora.shape.rank;
}

size_t net_plan(const struct model_conf *c, enum model_quant q, const struct net_opts *o) {
    struct net n;
    net_shape(&n, c, q, o);
    return net_carve(&n, c, (kptr){ NULL });
}

size_t net_plan_pages(const struct model_conf *c, enum model_quant q, const struct net_opts *o) {
    struct net n;
    net_shape(&n, c, q, o);
    return pages_bytes(&n, c);
}

int net_site_column(const struct net *n, enum proj p) {
    int column = 0;
    for (enum proj q = 0; q < p; q++)
        if (n->lora.shape.on[q] && net_site_of(q) == net_site_of(p)) column += n->lora.shape.rank;
    return column;
}

/* ---- rope ---- */

/* Frequency i of a head; llama3 scaling as in transformers: long waves slowed by `factor`, a ramp
 * between. */
static float rope_frequency(const struct model_conf *c, int i) {
    double f = 1. / pow((double)c->rope_theta, 2. * i / c->head_dim);
    if (c->rope_llama3.on) {
        const double old = c->rope_llama3.original_positions, low = c->rope_llama3.low_freq_factor;
        const double high = c->rope_llama3.high_freq_factor, wave = 2. * 3.14159265358979323846 / f;
        const double ramp = (old / wave - low) / (high - low);
        const double slow = f / c->rope_llama3.factor;
        f = wave > old / low ? slow : wave < old / high ? f : (1. - ramp) * slow + ramp * f;
    }
    return (float)f;
}

/* The angle is a product of two floats, as in the implementations that models were trained with. */
static void rope_fill(struct net *n, const struct model_conf *c) {
    const int half = c->head_dim / 2;
    const size_t count = (size_t)n->o.positions_max * (size_t)half, bytes = count * sizeof(float);
    float *cosines = mem_alloc(2 * bytes), *sines = cosines + count;
    for (int i = 0; i < half; i++) {
        const float f = rope_frequency(c, i);
        for (int p = 0; p < n->o.positions_max; p++) {
            const float angle = (float)p * f;
            cosines[(size_t)p * (size_t)half + (size_t)i] = (float)cos((double)angle);
            sines[(size_t)p * (size_t)half + (size_t)i] = (float)sin((double)angle);
        }
    }
    n->k->upload(n->k, n->cos, cosines, bytes);
    n->k->upload(n->k, n->sin, sines, bytes);
    free(cosines);
}

/* ---- life ---- */

static void host_alloc(struct net *n) {
    const size_t R = (size_t)n->o.rows_max, S = (size_t)n->o.slots_max + 1;
    struct net_host *h = &n->host;
    h->row = mem_alloc(R * sizeof *h->row);
    h->upload = mem_alloc((5 * R + 4 * S) * sizeof *h->upload);
    h->want = h->upload + 3 * R;
    h->target = h->want + R;
    h->seq_start = h->target + R;
    h->want_start = h->seq_start + S;
    h->seq = h->want_start + S;
    h->slot = h->seq + S;
    h->id = mem_alloc(6 * R * sizeof *h->id);
    h->pos = (int32_t *)(h->id + 4 * R);
    h->lp = mem_alloc(3 * (size_t)n->head_rows * sizeof *h->lp);
    h->entropy = h->lp + n->head_rows;
    h->coef = h->entropy + n->head_rows;
    h->drawn = mem_alloc(3 * R * sizeof *h->drawn);
}

int net_create(struct net **out, const struct model *m, const struct net_opts *o, struct err *e) {
    const struct model_conf *c = &m->conf;
    *out = NULL;
    if (o->positions_max > c->positions_max)
        return err_code(e, EXIT_CONFIG,
                        "sequences of %d tokens were asked for, but the model ends at %d",
                        o->positions_max, c->positions_max);
    struct net *n = mem_alloc(sizeof *n);
    net_shape(n, c, m->quant, o);
    n->o.activations = m->activations;
    n->model = m;
    n->k = m->kern;
    n->act = mem_alloc((size_t)(o->train ? c->layers : 1) * sizeof *n->act);
    n->lora_layer = mem_alloc((size_t)c->layers * sizeof *n->lora_layer);
    n->mem_bytes = net_carve(n, c, (kptr){ NULL });
    memset(n->lora_layer, 0, (size_t)c->layers * sizeof *n->lora_layer);
    if (n->k->alloc(n->k, &n->mem, n->mem_bytes, e) < 0) {
        net_destroy(&n);
        return err_wrap(e, "cannot make room for a net of %zu rows", (size_t)o->rows_max);
    }
    net_carve(n, c, n->mem);
    rope_fill(n, c);
    n->slot = mem_alloc((size_t)o->slots_max * sizeof *n->slot);
    n->table = mem_alloc((size_t)o->slots_max * (size_t)n->slot_pages * sizeof *n->table);
    n->page_users = mem_alloc((size_t)n->pages_max * sizeof *n->page_users);
    n->page_free = mem_alloc((size_t)n->pages_max * sizeof *n->page_free);
    host_alloc(n);
    net_graphs_init(n);
    for (int i = 0; i < n->pages_max; i++) n->page_free[i] = n->pages_max - 1 - i;
    n->pages_free = n->pages_max;
    *out = n;
    return 0;
}

void net_destroy(struct net **np) {
    struct net *n = *np;
    if (!n) return;
    net_graphs_release(n);
    if (n->mem.p) n->k->free(n->k, &n->mem);
    net_noise_weights_release(n);
    free(n->act);
    free(n->lora_layer);
    free(n->slot);
    free(n->table);
    free(n->page_users);
    free(n->page_free);
    free(n->host.row);
    free(n->host.upload);
    free(n->host.id);
    free(n->host.lp);
    free(n->host.drawn);
    free(n);
    *np = NULL;
}
