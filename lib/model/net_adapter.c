/* net_adapter.c - how a net takes an adapter: values as its formats read them, packed.
 *
 * Knows: which matrices lie where, which are rounded to 4 bits first. Does not know: what is
 * computed with them (net_forward.c, net_backward.c), how the masters change. Order: rounding,
 * packing, adopt, what its projections read.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/str.h"
#include "lib/model/net_int.h"

/* ---- rounding ---- */

/* A and B of one layer, each rounded by itself and measured by itself: whoever does it, the sums
 * are taken in order. */
struct rounding {
    struct matrix {
        float *value;
        int out, in;
        struct quant_stats stats;
        struct err e;
    } m[2 * PROJ_COUNT];
    int n;
    enum model_quant format;
    enum model_rounding rounding;
};

static void round_part(void *arg, int part, int parts) {
    struct rounding *x = arg;
    for (int i = part; i < x->n; i += parts) {
        struct matrix *m = &x->m[i];
        quant_round(m->value, m->out, m->in, x->format, x->rounding, &m->stats, &m->e);
    }
}

/* value: this layer's part of the adapter, a copy */
static int round_layer(struct net *n, const struct lora *l, int layer, float *value, size_t first,
                       struct err *e) {
    const struct model *m = n->model;
    struct rounding x = { .format = m->adapter, .rounding = m->rounding };
    for (enum proj p = 0; p < PROJ_COUNT; p++) {
        if (!l->shape.on[p] || !m->layer[layer].quant_adapter[p]) continue;
        size_t a, b;
        int out, in;
        model_proj_shape(&m->conf, p, &out, &in);
        lora_offsets(l, layer, p, &a, &b);
        x.m[x.n++] = (struct matrix){ value + a - first, l->shape.rank, in, { 0 }, { 0 } };
        x.m[x.n++] = (struct matrix){ value + b - first, out, l->shape.rank, { 0 }, { 0 } };
    }
    if (n->k->pool) pool_run(n->k->pool, pool_threads(n->k->pool), round_part, &x);
    else round_part(&x, 0, 1);
    for (int i = 0; i < x.n; i++) {
        if (x.m[i].e.text[0]) {
            *e = x.m[i].e;
            return err_wrap(e, "%s of layer %d's adapter cannot be read as %s", i % 2 ? "B" : "A",
                            layer, model_quant_name(x.format));
        }
        quant_stats_add(&n->adapter_stats[i % 2], &x.m[i].stats);
    }
    return 0;
}

/* ---- packing ---- */

/* A of the projections that share an input are stacked in enum order: rows of one matrix. */
static void pack_layer(struct net *n, const struct lora *l, int layer, const float *value,
                       size_t first, float *stack) {
    struct net_lora_layer *to = &n->lora_layer[layer];
    const size_t rank = (size_t)l->shape.rank;
    for (enum net_site s = 0; s < NET_SITE_COUNT; s++) {
        size_t used = 0;
        for (enum proj p = 0; p < PROJ_COUNT; p++) {
            if (!l->shape.on[p] || net_site_of(p) != s) continue;
            size_t a, b;
            lora_offsets(l, layer, p, &a, &b);
            memcpy(stack + used, value + a - first, rank * (size_t)to->a[s].in * sizeof(float));
            used += rank * (size_t)to->a[s].in;
            n->k->pack(n->k, &to->b[p], value + b - first);
        }
        if (used) n->k->pack(n->k, &to->a[s], stack);
    }
}

static int take_layers(struct net *n, const struct lora *l, struct err *e) {
    const struct model *m = n->model;
    const size_t params = l->params / (size_t)m->conf.layers;
    float *stack = mem_alloc(3 * (size_t)l->shape.rank *
                             (size_t)net_widest_input(n, &m->conf) * sizeof *stack);
    float *rounded = model_quant_rounds(m->adapter) && !n->plain
                         ? mem_alloc(params * sizeof *rounded)
                         : NULL;
    int rc = 0;
    for (int layer = 0; rc == 0 && layer < m->conf.layers; layer++) {
        const size_t first = (size_t)layer * params;
        const float *value = l->value + first;
        if (rounded) {
            memcpy(rounded, value, params * sizeof *rounded);
            rc = round_layer(n, l, layer, rounded, first, e);
            value = rounded;
        }
        if (rc == 0) pack_layer(n, l, layer, value, first, stack);
    }
    free(stack);
    free(rounded);
    return rc;
}

/* ---- adopt ---- */

int net_adopt(struct net *n, const struct lora *l, const struct noise_view *v, struct err *e) {
    assert(!v || !(v->dw.p || v->linear) || v->kern == n->k);
    n->noise = v;
    n->op_noise.weights.norms_ready = false;         /* they hold AQN's noise too */
    n->adapted = false;
    memset(n->adapter_stats, 0, sizeof n->adapter_stats);
    if (!l) return 0;
    if (l->shape.rank != n->lora.shape.rank ||
        memcmp(l->shape.on, n->lora.shape.on, sizeof l->shape.on) != 0)
        return err_set(e, "cannot adopt an adapter of rank %d: this net was made for rank %d%s",
                       l->shape.rank, n->lora.shape.rank,
                       l->shape.rank == n->lora.shape.rank ? " with other targets" : "");
    if (l->params != n->lora.params)
        return err_set(e, "cannot adopt an adapter of %zu values, %zu needed", l->params,
                       n->lora.params);
    if (take_layers(n, l, e) < 0 || n->k->sync(n->k, e) < 0)
        return err_wrap(e, "cannot adopt the adapter");
    n->lora.shape.alpha = l->shape.alpha;
    n->adapted = true;
    return 0;
}

void net_set_plain(struct net *n, bool plain) { n->plain = plain; }

void net_adapter_stats(const struct net *n, struct quant_stats *a, struct quant_stats *b) {
    *a = n->adapter_stats[0];
    *b = n->adapter_stats[1];
}

/* ---- what its projections read ---- */

bool net_adapter_rounds_in(const struct net *n, int layer, enum proj p, int count) {
    const struct model_layer *l = &n->model->layer[layer];
    int on = 0, rounds = 0;
    for (int i = 0; i < count; i++, p++) {
        if (!net_lora_on(n, p)) continue;
        on++;
        rounds += net_rounds_in(n, layer, p) && l->quant_adapter[p];
    }
    assert(rounds == 0 || rounds == on);             /* one product serves them all */
    return rounds > 0;
}

void net_round_rows(struct net *n, kptr x, kptr y, int rows, int dim) {
    const struct model *m = n->model;
    n->k->quant_rows(n->k, &(struct kern_quant_rows){
                               .x = x,
                               .y = y,
                               .type = n->type,
                               .format = m->activations == MODEL_QUANT_MXFP4 ? KERN_FORMAT_MXFP4
                                                                             : KERN_FORMAT_NVFP4,
                               .seed = m->rounding == MODEL_ROUNDING_SEED,
                               .rows = rows,
                               .dim = dim });
}
