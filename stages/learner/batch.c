/* batch.c - see batch.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "stages/learner/batch.h"

#include <math.h>

static void batch_alloc(struct batch *b, const struct rec_group *const *group, int groups) {
    size_t ids = 0, tokens = 0;
    for (int g = 0; g < groups; g++) {
        b->seqs += group[g]->samples;
        for (int k = 0; k < group[g]->samples; k++) {
            ids += (size_t)(group[g]->prompt_ids.n + group[g]->sample[k].ids.n);
            tokens += (size_t)group[g]->sample[k].ids.n;
        }
    }
    b->seq = mem_alloc((size_t)b->seqs * sizeof *b->seq);
    b->start = mem_alloc((size_t)(b->seqs + 1) * sizeof *b->start);
    b->advantage = mem_alloc((size_t)b->seqs * sizeof *b->advantage);
    b->ids = mem_alloc(ids * sizeof *b->ids);
    float **const per_token[] = { &b->old, &b->cur, &b->mu, &b->entropy, &b->ref };
    const size_t arrays = COUNT_OF(per_token) - (b->c->kl_coef > 0 ? 0 : 1);
    for (size_t i = 0; i < arrays; i++) *per_token[i] = mem_alloc(tokens * sizeof(float));
}

static void group_advantage(const struct learner_conf *c, const struct rec_group *g, double *a) {
    double reward[REC_SAMPLES_MAX];
    for (int k = 0; k < g->samples; k++) reward[k] = g->sample[k].score;
    if (c->advantage == LEARNER_ADVANTAGE_GROUP_MEAN) dapo_advantage_mean(reward, g->samples, a);
    else dapo_advantage(reward, g->samples, (int)c->adv_ddof, c->adv_eps, a);
}

void batch_open(struct batch *b, const struct learner_conf *c,
                const struct rec_group *const *group, int groups, struct update_metrics *metrics) {
    *b = (struct batch){ .c = c, .metrics = metrics };
    batch_alloc(b, group, groups);
    int32_t *at = b->ids;
    int s = 0;
    for (int g = 0; g < groups; g++) {
        const struct rec_group *r = group[g];
        group_advantage(c, r, b->advantage + s);
        for (int k = 0; k < r->samples; k++, s++) {
            const struct rec_sample *x = &r->sample[k];
            b->seq[s] = (struct net_seq){ .ids = at,
                                          .n = r->prompt_ids.n + x->ids.n,
                                          .prompt_n = r->prompt_ids.n,
                                          .uid = (uint64_t)r->group,
                                          .sample = k };
            memcpy(at, r->prompt_ids.v, (size_t)r->prompt_ids.n * sizeof *at);
            memcpy(at + r->prompt_ids.n, x->ids.v, (size_t)x->ids.n * sizeof *at);
            at += b->seq[s].n;
            b->start[s + 1] = b->start[s] + x->ids.n;
            memcpy(b->mu + b->start[s], x->lp.v, (size_t)x->ids.n * sizeof(float));
        }
    }
}

void batch_release(struct batch *b) {
    void *all[] = { b->seq, b->ids, b->start,   b->advantage, b->old,
                    b->cur, b->mu,  b->entropy, b->ref };
    for (size_t i = 0; i < COUNT_OF(all); i++) free(all[i]);
}

static bool by_sequence(const struct batch *b) { return b->c->loss == LEARNER_LOSS_SEQ_MEAN; }

/* What a token of sequence s is divided by in the mean over the mini-batch. */
static double share_of(const struct batch *b, int s) {
    const int32_t *start = b->start;
    if (by_sequence(b)) return (double)(start[s + 1] - start[s]) * b->mini_seqs;
    return start[b->first_seq + b->mini_seqs] - start[b->first_seq];
}

/* One token of sequence s, whose tokens are divided by `divisor`. */
struct token {
    struct dapo_token x, kl;         /* x.slope holds the KL term's share */
    double weight;
    float coef;                      /* its slope in the mean */
};

static struct token token_loss(const struct batch *b, int s, int32_t t, double divisor) {
    const struct learner_conf *c = b->c;
    const struct dapo_clip clip = { c->clip_low, c->clip_high, c->clip_dual };
    const double cur = (double)b->cur[t], old = (double)b->old[t];
    struct token k = { .weight = 1 };
    if (c->tis_cap > 0) k.weight = dapo_tis(old, (double)b->mu[t], c->tis_cap);
    k.x = dapo_loss(&clip, b->advantage[s], k.weight, cur, old);
    if (b->ref) {
        k.kl = dapo_kl((double)b->ref[t], cur);
        k.x.slope += c->kl_coef * k.kl.slope;
    }
    k.coef = (float)(k.x.slope / divisor);
    return k;
}

void batch_loss(void *batch, int seq, int first, int count, const float *lp, const float *entropy,
                float *coef) {
    struct batch *b = batch;
    const int s = b->part_first + seq;
    const double divisor = share_of(b, s);
    for (int i = 0; i < count; i++) {
        const int32_t t = b->start[s] + first + i;
        b->cur[t] = lp[i];
        b->entropy[t] = entropy ? entropy[i] : 0;
        if (b->old_is_cur) b->old[t] = lp[i];
        coef[i] = token_loss(b, s, t, divisor).coef;
    }
}

static void count_sequence(struct batch *b, int s) {
    struct update_metrics *m = b->metrics;
    const double divisor = share_of(b, s), part = by_sequence(b) ? divisor / b->mini_seqs : 1;
    for (int32_t t = b->start[s]; t < b->start[s + 1]; t++) {
        if (b->old_is_cur) b->old[t] = b->cur[t];
        const struct token k = token_loss(b, s, t, divisor);
        const double moved = (double)b->old[t] - (double)b->cur[t], off = fabs(moved);
        b->teaches |= k.coef != 0;
        m->loss += k.x.loss / part;
        m->kl_loss += k.kl.loss / part;
        m->clipfrac += k.x.clipped;
        m->clipfrac_lower += k.x.clipped_lower;
        m->ppo_kl += moved;
        m->tis_mean += k.weight;
        if (b->first_seq == 0 && off > m->old_cur_max) m->old_cur_max = off;
    }
}

void batch_count(struct batch *b) {
    for (int s = b->first_seq; s < b->first_seq + b->mini_seqs; s++) count_sequence(b, s);
}

void batch_finish(struct batch *b) {
    struct update_metrics *m = b->metrics;
    const double n = (double)b->start[b->seqs], means = by_sequence(b) ? (double)b->seqs : n;
    double entropy = 0;
    m->tokens = b->start[b->seqs];
    m->loss /= means;
    m->kl_loss /= means;
    m->clipfrac /= n;
    m->clipfrac_lower /= n;
    m->ppo_kl /= n;
    m->tis_mean /= n;
    for (int32_t t = 0; t < b->start[b->seqs]; t++) entropy += (double)b->entropy[t];
    m->entropy = entropy / n;
    m->advantage_max = m->advantage_min = b->advantage[0];
    for (int s = 1; s < b->seqs; s++) {
        if (b->advantage[s] > m->advantage_max) m->advantage_max = b->advantage[s];
        if (b->advantage[s] < m->advantage_min) m->advantage_min = b->advantage[s];
    }
    dapo_gap(&m->gap, b->old, b->mu, b->start, b->seqs, b->c->tis_cap > 0 ? b->c->tis_cap : 2);
}
