/* net_step.c - one decode step: rows that are all wanted, each drawn from; where the table can, a
 * step is kept and run again as one launch (kern.h: record, keep, replay).
 *
 * Knows: what changes from step to step and is uploaded before (rows, samplers, pages; keys of
 * noise lie there already); what a recording holds besides, which must be as it was (bound_of); and
 * that the host's counts of noise come with a replay too, as the recording counted them: the
 * kernels' counts come by themselves.
 * Does not know: what a layer computes (net_forward.c), how a table keeps anything.
 * A number of rows that is met for the first time is run, so that the backend has all the memory it
 * wants; the second time it is recorded.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/rng.h"
#include "lib/model/net_int.h"

enum { NEW, RAN, KEPT, NEVER };                   /* of a number of rows, with or without cuts */
enum { ROWS_BITS = 19 };

/* ---- what a recording holds ---- */

_Static_assert(sizeof(struct kern_weight) == sizeof(kptr) + 3 * sizeof(int) + sizeof(float),
               "no bytes between the members: they are hashed");
static uint64_t mix(uint64_t h, const void *from, size_t bytes) {
    const char *at = from;
    for (size_t i = 0; i < bytes; i += sizeof h) {
        uint64_t word = 0;
        memcpy(&word, at + i, bytes - i < sizeof word ? bytes - i : sizeof word);
        h = rng_mix64(h ^ word);
    }
    return h;
}
#define MIX(h, value) mix(h, &(value), sizeof(value))

static uint64_t mix_linears(uint64_t h, const struct net *n,
                            const struct kern_weight (*w)[PROJ_COUNT]) {
    return w ? mix(h, w, (size_t)n->model->conf.layers * sizeof *w) : rng_mix64(h);
}

/* Everything that decides which operations a step calls and with what, but rows and cuts: the
 * adapter's presence and scale, where the noise beside weights lies, the plan and its phase. */
static uint64_t bound_of(const struct net *n) {
    const struct net_noise *x = &n->op_noise;
    const struct noise_view *v = n->noise;
    uint64_t h = MIX(1, n->adapted);
    h = MIX(h, n->lora.shape.alpha);
    h = MIX(h, n->plain);
    h = mix_linears(v ? MIX(h, v->dw) : h, n, v ? v->linear : NULL);
    if (x->on) {
        h = MIX(h, *x->plan);
        h = MIX(h, x->ops);
        h = MIX(h, x->modules);
    }
    if (!net_noise_weights_on(n)) return h;
    h = MIX(h, x->weights.dw);
    h = MIX(h, x->weights.head);
    return mix_linears(h, n, x->weights.linear);
}

static uint64_t key_of(const struct net *n, int rows, bool cuts) {
    _Static_assert(sizeof(uintptr_t) <= sizeof(uint64_t), "an address fits a key");
    assert(rows < 1 << ROWS_BITS);
    /* malloc aligns to 16, and addresses of programs have 48 bits */
    return (uint64_t)(uintptr_t)n >> 4 << (ROWS_BITS + 1) | (uint64_t)cuts << ROWS_BITS |
           (uint64_t)rows;
}

/* ---- one step ---- */

static void operations(struct net *n, int rows, bool cuts) {
    n->apart = true;
    net_layers(n, rows, false);
    net_want_all(n, rows);
    net_head_and_draw(n, cuts);
    n->apart = false;
}

/* Notes the operations under the key and runs them from there; what the host counted of them is
 * kept beside. false: they could not be kept, and it is as if they had not been called. */
static bool record(struct net *n, int rows, bool cuts, uint64_t key) {
    struct net_graphs *g = &n->graphs;
    struct net_noise *x = &n->op_noise;
    const struct noise_evidence before = x->seen;
    n->k->record(n->k);
    operations(n, rows, cuts);
    if (!n->k->keep(n->k, key) || !n->k->replay(n->k, key)) {
        x->seen = before;
        x->head_seen = false;
        return false;
    }
    const struct noise_evidence counted = noise_evidence_since(&x->seen, &before);
    assert(!g->counted || memcmp(&g->counts, &counted, sizeof counted) == 0);
    g->counts = counted;
    return g->counted = true;
}

static bool replay(struct net *n, uint64_t key) {
    if (!n->k->replay(n->k, key)) return false;
    noise_evidence_add(&n->op_noise.seen, &n->graphs.counts);
    n->op_noise.head_seen = n->op_noise.on;
    return true;
}

static void forget(struct net *n, uint64_t bound) {
    struct net_graphs *g = &n->graphs;
    if (g->kept) n->k->forget(n->k);
    memset(g->state, NEW, net_graphs_states(n));
    g->kept = g->counted = false;
    g->bound = bound;
}

static void run(struct net *n, int rows, bool cuts) {
    struct net_graphs *g = &n->graphs;
    if (!g->state) {
        operations(n, rows, cuts);
        return;
    }
    const uint64_t bound = bound_of(n), key = key_of(n, rows, cuts);
    if (bound != g->bound) forget(n, bound);
    uint8_t *state = &g->state[2 * rows + cuts];
    if (*state == KEPT && replay(n, key)) return;
    if (*state == RAN || *state == KEPT) {
        const bool kept = record(n, rows, cuts, key);
        *state = kept ? KEPT : NEVER;
        g->kept |= kept;
        if (kept) return;
    }
    if (*state == NEW) *state = RAN;
    operations(n, rows, cuts);
}

int net_step(struct net *n, const struct net_row *rows, int count, const struct kern_sampler *s,
             int32_t *token, float *lp, float *lp_raw, struct err *e) {
    assert(count > 0 && count <= n->o.rows_max);
    n->wants = 0;
    if (net_noise_prepare(n, e) < 0 || net_claim(n, rows, count, e) < 0) return -1;
    net_upload_rows(n, rows, count);
    const bool cuts = net_upload_samplers(n, s, count);
    n->wants = count;
    run(n, count, cuts);
    net_fetch_drawn(n, count, token, lp, lp_raw);
    return n->k->sync(n->k, e) < 0 ? err_wrap(e, "decode step") : 0;
}

/* ---- life ---- */

size_t net_graphs_states(const struct net *n) { return 2 * ((size_t)n->o.rows_max + 1); }

void net_graphs_init(struct net *n) {
    if (n->o.graphs && n->k->record) n->graphs.state = mem_alloc(net_graphs_states(n));
}

void net_graphs_release(struct net *n) {
    if (n->graphs.kept) n->k->forget(n->k);
    free(n->graphs.state);
    n->graphs = (struct net_graphs){ 0 };
}
