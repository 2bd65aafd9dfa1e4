/* net_train.c - whole sequences through the net: scored, or scored and differentiated.
 *
 * A response token at position p is predicted by row p - 1, so a sequence of n tokens is n - 1
 * rows, and only the rows from prompt_n - 1 on meet the head. Scoring streams rows and may cut a
 * sequence anywhere (its keys stay in its slot); training takes micro-batches of whole sequences,
 * because the backward needs all of a sequence's rows at once. Order: checks, head, scoring,
 * micro-batch, training.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/str.h"
#include "lib/model/net_int.h"

static int min_int(int a, int b) { return a < b ? a : b; }
static bool scored(const struct net_seq *s) { return s->n > s->prompt_n; }

static int check_seqs(const struct net *n, const struct net_seq *s, int seqs, float temperature,
                      struct err *e) {
    if (!(temperature > 0))
        return err_set(e, "log-probs at temperature %g: it must be above 0", (double)temperature);
    for (int i = 0; i < seqs; i++) {
        if (s[i].prompt_n < 1 || s[i].n < s[i].prompt_n)
            return err_set(
                e,
                "sequence %d has %d tokens, %d of them prompt: at least one prompt token is needed",
                i, s[i].n, s[i].prompt_n);
        if (s[i].n - 1 > n->o.positions_max)
            return err_set(e, "sequence %d has %d tokens, more than %d", i, s[i].n,
                           n->o.positions_max + 1);
        for (int t = 0; t < s[i].n; t++)
            if (s[i].ids[t] < 0 || s[i].ids[t] >= n->model->conf.vocab)
                return err_set(e, "sequence %d: token id %d is outside the vocabulary of %d", i,
                               s[i].ids[t], n->model->conf.vocab);
    }
    return 0;
}

static struct net_row row_of(const struct net_seq *s, int p, int slot) {
    const uint32_t sample = p < s->prompt_n ? KERN_NOISE_NO_SAMPLE : (uint32_t)s->sample;
    return (struct net_row){ .token = s->ids[p],
                             .slot = slot,
                             .pos = p,
                             .prompt = net_prompt_id(s->uid),
                             .sample = sample };
}

/* Log-probs of targets first .. first+count-1 (already in n->targets) from hid_t into n->lp,
 * n->lse, n->entropy. */
static void score_rows(struct net *n, int first, int count, float temperature, bool entropy) {
    net_head(n, first, count);
    const kptr targets = kptr_at(n->targets, (size_t)first * sizeof(int32_t));
    n->k->logprob(n->k, &(struct kern_logprob){ .logits = n->logits,
                                                .targets = targets,
                                                .lp = n->lp,
                                                .lse = n->lse,
                                                .entropy = entropy ? n->entropy : (kptr){ NULL },
                                                .rows = count,
                                                .vocab = n->model->conf.vocab,
                                                .inv_temp = 1.f / temperature });
}

/* ---- scoring ---- */

struct stream {
    struct net *n;
    float temperature, *lp, *entropy;             /* outputs move on; entropy may be NULL */
    struct net_host *h;                           /* slot: of sequences that end in the buffer */
    int rows, wants, dones;
};

static int flush(struct stream *t, struct err *e) {
    struct net *n = t->n;
    int rc = 0;
    if (t->rows) rc = net_forward(n, t->h->row, t->rows, t->h->want, t->wants, e);
    if (rc == 0 && t->wants)
        n->k->upload(n->k, n->targets, t->h->target, (size_t)t->wants * sizeof *t->h->target);
    for (int first = 0; rc == 0 && first < t->wants; first += n->head_rows) {
        const int count = min_int(n->head_rows, t->wants - first);
        score_rows(n, first, count, t->temperature, t->entropy != NULL);
        n->k->download(n->k, t->lp, n->lp, (size_t)count * sizeof(float));
        t->lp += count;
        if (!t->entropy) continue;
        n->k->download(n->k, t->entropy, n->entropy, (size_t)count * sizeof(float));
        t->entropy += count;
    }
    for (int i = 0; i < t->dones; i++) net_slot_close(n, t->h->slot[i]);
    t->rows = t->wants = t->dones = 0;
    return rc == 0 ? n->k->sync(n->k, e) : rc;
}

/* An empty slot with room for all of the sequence; where there is none, finished ones are flushed
 * away first. */
static int stream_slot(struct stream *t, int positions, struct err *e) {
    for (int attempt = 0; attempt < 2; attempt++) {
        int slot = net_slot_open(t->n);
        if (slot >= 0 && net_slot_reserve(t->n, slot, positions) == 0) return slot;
        if (slot >= 0) net_slot_close(t->n, slot);
        if (attempt == 0 && flush(t, e) < 0) return -1;
    }
    return err_set(e, "no slot or no KV pages are free for a sequence of %d tokens", positions + 1);
}

static int stream_seq(struct stream *t, const struct net_seq *s, struct err *e) {
    int slot = stream_slot(t, s->n - 1, e);
    if (slot < 0) return -1;
    net_noise_sequence(t->n, s);
    for (int p = 0; p < s->n - 1; p++) {
        if (t->rows == t->n->o.rows_max && flush(t, e) < 0) {
            net_slot_close(t->n, slot);
            return -1;
        }
        if (p >= s->prompt_n - 1) {
            t->h->want[t->wants] = t->rows;
            t->h->target[t->wants++] = s->ids[p + 1];
        }
        t->h->row[t->rows++] = row_of(s, p, slot);
    }
    t->h->slot[t->dones++] = slot;
    return 0;
}

int net_logprobs(struct net *n, const struct net_seq *s, int seqs, float temperature, float *lp,
                 float *entropy, struct err *e) {
    if (check_seqs(n, s, seqs, temperature, e) < 0) return -1;
    struct stream t = {
        .n = n, .temperature = temperature, .lp = lp, .entropy = entropy, .h = &n->host
    };
    int rc = 0;
    for (int i = 0; i < seqs && rc == 0; i++)
        if (scored(&s[i])) rc = stream_seq(&t, &s[i], e);
    if (rc < 0) t.rows = t.wants = 0;                                  /* only close what is open */
    if (flush(&t, rc < 0 ? NULL : e) < 0) rc = -1;
    return rc;
}

/* ---- training ---- */

struct micro {
    struct net *n;
    const struct net_seq *s;                      /* all sequences of the call */
    float temperature;
    net_loss *loss;
    void *ud;
    int seqs, rows, wants;                        /* of this micro-batch */
    struct net_host *h;
};

/* Adds sequence i; false when the micro-batch is full. */
static bool micro_add(struct micro *b, int i) {
    struct net *n = b->n;
    const struct net_seq *s = &b->s[i];
    if (b->seqs == n->o.slots_max || b->rows + s->n - 1 > n->o.rows_max) return false;
    const int slot = net_slot_open(n);
    if (slot < 0) return false;
    if (net_slot_reserve(n, slot, s->n - 1) < 0) {
        net_slot_close(n, slot);
        return false;
    }
    net_noise_sequence(n, s);
    b->h->seq[b->seqs] = i;
    b->h->slot[b->seqs++] = slot;
    for (int p = 0; p < s->n - 1; p++) {
        if (p >= s->prompt_n - 1) {
            b->h->want[b->wants] = b->rows;
            b->h->target[b->wants++] = s->ids[p + 1];
        }
        b->h->row[b->rows++] = row_of(s, p, slot);
    }
    b->h->seq_start[b->seqs] = b->rows;
    b->h->want_start[b->seqs] = b->wants;
    return true;
}

static void micro_clear(struct micro *b) {
    for (int i = 0; i < b->seqs; i++) net_slot_close(b->n, b->h->slot[i]);
    b->seqs = b->rows = b->wants = 0;
}

/* Asks the loss about each sequence's part of the wanted rows first .. first+count-1. True when any
 * coef is not 0. */
static bool ask_loss(struct micro *b, int first, int count) {
    for (int i = 0; i < b->seqs; i++) {
        const int start = b->h->want_start[i], end = b->h->want_start[i + 1];
        const int from = start > first ? start : first, to = min_int(end, first + count);
        if (from >= to) continue;
        const int at = from - first;
        b->loss(b->ud, b->h->seq[i], from - start, to - from, b->h->lp + at, b->h->entropy + at,
                b->h->coef + at);
    }
    for (int i = 0; i < count; i++)
        if (b->h->coef[i] != 0) return true;
    return false;
}

/* Head forward and backward in chunks: n->dhid is the gradient of hid_t's rows. True when any of it
 * is not zero. */
static bool head_both_ways(struct micro *b) {
    struct net *n = b->n;
    const int vocab = n->model->conf.vocab, dim = n->model->conf.dim;
    bool any = false;
    n->k->upload(n->k, n->targets, b->h->target, (size_t)b->wants * sizeof *b->h->target);
    for (int first = 0; first < b->wants; first += n->head_rows) {
        const int count = min_int(n->head_rows, b->wants - first);
        const size_t bytes = (size_t)count * sizeof(float);
        const kptr dhid = kptr_at(n->dhid, (size_t)first * (size_t)dim * sizeof(float));
        score_rows(n, first, count, b->temperature, true);
        n->k->download(n->k, b->h->lp, n->lp, bytes);
        n->k->download(n->k, b->h->entropy, n->entropy, bytes);
        if (!ask_loss(b, first, count)) {
            n->k->zero(n->k, dhid, bytes * (size_t)dim);
            continue;
        }
        any = true;
        n->k->upload(n->k, n->coef, b->h->coef, bytes);
        n->k->logprob_bwd(n->k, &(struct kern_logprob_bwd){
                                    .logits = n->logits,
                                    .targets = kptr_at(n->targets, (size_t)first * sizeof(int32_t)),
                                    .lse = n->lse,
                                    .coef = n->coef,
                                    .rows = count,
                                    .vocab = vocab,
                                    .inv_temp = 1.f / b->temperature });
        struct kern_linear_t back = { .dy = n->logits,
                                      .dy_ld = vocab,
                                      .w = n->model->head,
                                      .scale = 1,
                                      .round = n->round,
                                      .dx = dhid,
                                      .dx_ld = dim,
                                      .rows = count };
        n->k->linear_t(n->k, &back);
        const struct kern_weight *dw = net_noise_weight(n, NET_NO_LAYER, NOISE_MODULE_HEAD);
        if (dw) back.w = *dw, back.accumulate = true, n->k->linear_t(n->k, &back);
    }
    return any;
}

static void micro_run(struct micro *b) {
    struct net *n = b->n;
    const struct model_conf *c = &n->model->conf;
    const size_t wanted_bytes = (size_t)b->wants * (size_t)c->dim * sizeof(float);
    net_upload_rows(n, b->h->row, b->rows);
    net_layers(n, b->rows, true);
    net_want(n, b->h->want, b->wants, true);
    if (!head_both_ways(b)) return;
    n->k->zero(n->k, n->dh, wanted_bytes);
    net_noise_back(n, NOISE_OP_HEAD, NET_NO_LAYER, NOISE_SITE_DHEAD, n->dhid, b->wants, c->dim);
    const struct kern_rmsnorm_bwd norm = { .dy = n->dhid,
                                           .x = n->hid,
                                           .rstd = n->hid_rstd,
                                           .w = n->model->norm_final,
                                           .dw = net_norm_dw(n, 2 * c->layers),
                                           .dx = n->dh,
                                           .rows = b->wants,
                                           .dim = c->dim };
    if (!net_noise_norm_bwd(n, 2 * c->layers, &norm)) n->k->rmsnorm_bwd(n->k, &norm);
    n->k->zero(n->k, n->dx, (size_t)b->rows * (size_t)c->dim * sizeof(float));
    n->k->scatter_add(
        n->k, &(struct kern_scatter_add){
                  .y = n->dh, .index = n->index, .x = n->dx, .rows = b->wants, .dim = c->dim });
    net_layers_bwd(n, b->rows, b->h->seq_start, b->seqs);
}

static int train_all(struct micro *b, int seqs, struct err *e) {
    for (int i = 0; i < seqs;) {
        while (i < seqs && (!scored(&b->s[i]) || micro_add(b, i))) i++;
        if (!b->seqs && i < seqs)
            return err_set(
                e, "sequence %d of %d tokens does not fit a micro-batch of %d rows and %d KV pages",
                i, b->s[i].n, b->n->o.rows_max, b->n->pages_max);
        if (!b->seqs) break;
        for (int j = 0; j < b->seqs; j++)
            b->n->slot[b->h->slot[j]].positions = b->h->seq_start[j + 1] - b->h->seq_start[j];
        micro_run(b);
        micro_clear(b);
        if (b->n->k->sync(b->n->k, e) < 0) return err_wrap(e, "training pass");
    }
    return 0;
}

int net_train(struct net *n, const struct net_seq *s, int seqs, float temperature, net_loss *loss,
              void *ud, float *grad, struct err *e) {
    assert(n->o.train && loss);
    if (!n->adapted) return err_set(e, "nothing to train: no adapter was adopted");
    if (check_seqs(n, s, seqs, temperature, e) < 0 || net_noise_prepare(n, e) < 0) return -1;
    struct micro b = { n, s, temperature, loss, ud, .h = &n->host };
    n->wants = 0;
    /* The sum goes on from what the caller has, so that even several calls add up as one would. */
    const size_t bytes = n->lora.params * sizeof *grad;
    if (grad) n->k->upload(n->k, n->grad, grad, bytes);
    else n->k->zero(n->k, n->grad, bytes);
    int rc = train_all(&b, seqs, e);
    micro_clear(&b);
    if (rc == 0 && grad) n->k->download(n->k, grad, n->grad, bytes);
    if (n->k->sync(n->k, rc == 0 ? e : NULL) < 0) rc = -1;
    return rc;
}

kptr net_grad(const struct net *n) { return n->grad; }
