/* parts.c - see parts.h. Order: sequences, tokens, evidence, gradient.
 * SPDX-License-Identifier: Apache-2.0 */
#include "stages/learner/parts.h"

#include "lib/stage/device.h"

/* ---- sequences ---- */

/* Rank i ends with the sequence that brings the rows to (i + 1) / count of all, or nearer to it
 * than without. */
void parts_split(struct parts *p, int count, const struct batch *b, int first, int seqs) {
    *p = (struct parts){ .count = count };
    const int end = first + seqs;
    int64_t all = 0, rows = 0;
    for (int s = first; s < end; s++) all += b->seq[s].n;
    int s = p->from[0] = first;
    for (int i = 0; i < count; i++) {
        while (s < end && (2 * rows + b->seq[s].n) * count <= 2 * all * (i + 1))
            rows += b->seq[s++].n;
        p->from[i + 1] = i + 1 == count ? end : s;
    }
}

void parts_make(struct parts *p, struct ranks *ranks, const struct batch *b, int first,
                int seqs) {
    parts_split(p, ranks ? ranks_count(ranks) : 1, b, first, seqs);
    p->ranks = ranks;
    p->own = ranks ? ranks_own(ranks) : 0;
}

/* ---- tokens ---- */

int parts_tokens(const struct parts *p, const char *call, const struct batch *b, float *value,
                 struct err *e) {
    size_t from[RANKS_MAX + 1];
    if (!p->ranks) return 0;
    for (int i = 0; i <= p->count; i++) from[i] = (size_t)b->start[p->from[i]] * sizeof *value;
    return ranks_share(p->ranks, call, value, from, e);
}

/* ---- evidence ---- */

/* k samples of one prompt in one pass count k^2 for each of its rows. */
int64_t parts_repeats(const struct parts *p, const struct batch *b) {
    int64_t lacking = 0;
    for (int s = p->from[0]; s < p->from[p->count];) {
        const struct net_seq *q = &b->seq[s];
        int64_t all = 0, parted = 0;
        for (int i = 0; i < p->count; i++) {
            int64_t here = 0;
            while (s < p->from[i + 1] && b->seq[s].uid == q->uid) here++, s++;
            all += here;
            parted += here * here;
        }
        lacking += (all * all - parted) * q->prompt_n;
    }
    return lacking;
}

static void drop_common(struct noise_evidence *part, const struct noise_evidence *sum) {
    part->updates = 0;
    part->grad = (struct noise_tally){ 0 };
    for (int m = 0; m < NOISE_MODULE_COUNT && part->weights_draw; m++)
        if (sum->module[m].elements)
            part->module[m] = (struct noise_tally){ .sites = part->module[m].sites };
}

int parts_evidence(struct ranks *ranks, const char *call, struct noise_evidence *v,
                   struct err *e) {
    if (!ranks) return 0;
    const int count = ranks_count(ranks);
    struct noise_evidence *all = mem_alloc((size_t)count * sizeof *all), sum = { 0 };
    all[ranks_own(ranks)] = *v;
    const int rc = ranks_gather(ranks, call, all, sizeof *all, e);
    for (int i = 0; i < count; i++) {
        if (i) drop_common(&all[i], &sum);
        noise_evidence_add(&sum, &all[i]);
        if (all[i].weights_draw) sum.weights_draw = all[i].weights_draw;
    }
    if (rc == 0) *v = sum;
    free(all);
    return rc;
}

/* ---- gradient ---- */

static int host_gather(struct parts_grad *g, kptr grad, size_t n, struct err *e) {
    g->kern->download(g->kern, g->all + (size_t)ranks_own(g->ranks) * n, grad, n * sizeof(float));
    if (g->kern->sync(g->kern, e) < 0) return -1;
    return ranks_gather(g->ranks, "gradient", g->all, n * sizeof(float), e);
}

static int host_add(struct parts_grad *g, kptr grad, size_t n, struct err *e) {
    for (int r = 1; r < ranks_count(g->ranks); r++) {
        const float *part = g->all + (size_t)r * n;
        for (size_t i = 0; i < n; i++) g->all[i] += part[i];
    }
    g->kern->upload(g->kern, grad, g->all, n * sizeof(float));
    return g->kern->sync(g->kern, e);
}

enum { HOST_PIECE = 1 << 18, DEVICE_PIECE = 1 << 22 };
static const struct parts_grad_ops host_ops = { HOST_PIECE, host_gather, host_add, NULL };

static int device_gather(struct parts_grad *g, kptr grad, size_t n, struct err *e) {
    return device_ranks_gather(g->devices, grad, n, e);
}

static int device_add(struct parts_grad *g, kptr grad, size_t n, struct err *e) {
    (void)e;                         /* latched */
    device_ranks_add(g->devices, grad, n);
    return 0;
}

static int device_wait(struct parts_grad *g, struct err *e) {
    if (device_ranks_wait(g->devices, e) < 0) return -1;
    return g->kern->sync(g->kern, e);
}

static const struct parts_grad_ops device_ops = { DEVICE_PIECE, device_gather, device_add,
                                                  device_wait };

int parts_grad_open(struct parts_grad *g, struct ranks *ranks, struct kern *k, struct err *e) {
    const struct parts_grad_ops *ops = device_is(k) ? &device_ops : &host_ops;
    *g = (struct parts_grad){ .ops = ops, .ranks = ranks, .kern = k };
    if (ops == &device_ops)
        return device_ranks_open(&g->devices, ranks, k, ops->piece, e);
    g->all = mem_alloc((size_t)ranks_count(ranks) * ops->piece * sizeof(float));
    return 0;
}

void parts_grad_close(struct parts_grad *g) {
    device_ranks_close(&g->devices);
    free(g->all);
    *g = (struct parts_grad){ 0 };
}

/* First all come here, with a pass that did not fail and gradients of one size: who waits on a
 * device is not told why. */
static int all_came(struct parts_grad *g, size_t params, struct err *e) {
    size_t n[RANKS_MAX];
    if (g->kern->sync(g->kern, e) < 0) return -1;
    n[ranks_own(g->ranks)] = params;
    if (ranks_gather(g->ranks, "gradient's size", n, sizeof *n, e) < 0) return -1;
    for (int r = 1; r < ranks_count(g->ranks); r++)
        if (n[r] != n[0])
            return err_set(e, "rank %d has %zu numbers, rank 0 has %zu", r, n[r], n[0]);
    return 0;
}

int parts_grad_sum(struct parts_grad *g, kptr grad, size_t params, struct err *e) {
    if (!g->ranks) return 0;
    const size_t piece = g->ops->piece;
    int rc = all_came(g, params, e);
    for (size_t at = 0; rc == 0 && at < params; at += piece) {
        const size_t n = params - at < piece ? params - at : piece;
        const kptr x = kptr_at(grad, at * sizeof(float));
        rc = g->ops->gather(g, x, n, e);
        if (rc == 0) rc = g->ops->add(g, x, n, e);
    }
    if (rc == 0 && g->ops->wait) rc = g->ops->wait(g, e);
    return rc < 0 ? err_wrap(e, "gradient of all ranks") : 0;
}

size_t parts_plan(int ranks, bool on_devices) {
    const size_t n = (size_t)ranks, piece = on_devices ? DEVICE_PIECE : HOST_PIECE;
    return ranks > 1 ? n * piece * sizeof(float) + ranks_plan(ranks) / n : 0;
}
