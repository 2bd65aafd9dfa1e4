/* update.c - see update.h. Order: sequences, advantages, old log-probs, mini-batches (loss,
 * backward, norm, AdamW), metrics.
 * SPDX-License-Identifier: Apache-2.0 */
#include "stages/learner/update.h"

#include <math.h>

#include "lib/base/log.h"

struct updater {
    const struct learner_conf *c;
    struct kern *kern;
    struct net *net;
    kptr p, m, v;                    /* AdamW's arrays on the backend */
    /* [params]: the state before the step; only where several mini-batches may leave half a step */
    float *old_value, *old_m, *old_v;
    size_t params;
};

/* all samples of the step; sequence s has response tokens start[s] .. start[s+1]-1 */
struct batch {
    struct net_seq *seq;
    int32_t *ids, *start;
    double *advantage;
    float *old, *cur, *mu, *entropy;
    int seqs;
    /* one mini-batch: the old policy is the current one, ratio exactly 1 */
    bool old_is_cur;
    const struct learner_conf *c;
    int first_seq;                   /* of the mini-batch in hand */
    double tokens;                   /* of the mini-batch: the loss is a mean over them */
    struct update_metrics *metrics;
};

static struct net_opts train_opts(const struct learner_conf *c, const struct model_conf *m,
                                  const struct lora_shape *shape) {
    int64_t longest = c->shared.data.prompt_max + c->shared.sample.new_max;
    if (longest > m->positions_max) longest = m->positions_max;
    int rows = (int)(c->micro_tokens > longest ? c->micro_tokens : longest);
    /* Very short sequences close a micro-batch early. Pages: each sequence may leave one partly
     * empty. */
    int slots = rows / KERN_PAGE < 1 ? 1 : rows / KERN_PAGE < 256 ? rows / KERN_PAGE : 256;
    return (struct net_opts){ .rows_max = rows,
                              .slots_max = slots,
                              .positions_max = (int)longest,
                              .pages_max = rows / KERN_PAGE + slots + 1,
                              .train = true,
                              .lora = *shape };
}

size_t updater_plan(const struct learner_conf *c, const struct model_conf *m,
                    const struct lora_shape *shape) {
    struct net_opts o = train_opts(c, m, shape);
    /* the state, AdamW's copy of it, and what save_state keeps */
    int copies = c->minibatch > 0 && c->minibatch < c->batch ? 9 : 6;
    return net_plan(m, (enum model_quant)c->shared.quant.weights, &o) +
           (size_t)copies * sizeof(float) * lora_params(m, shape);
}

size_t updater_plan_pages(const struct learner_conf *c, const struct model_conf *m,
                          const struct lora_shape *shape) {
    struct net_opts o = train_opts(c, m, shape);
    return net_plan_pages(m, (enum model_quant)c->shared.quant.weights, &o);
}

int updater_create(struct updater **out, const struct policy *p, const struct learner_conf *c,
                   struct err *e) {
    struct updater *u = mem_alloc(sizeof *u);
    struct net_opts o = train_opts(c, &p->model->conf, &p->shape);
    u->c = c;
    u->kern = p->model->kern;
    u->params = lora_params(&p->model->conf, &p->shape);
    size_t bytes = u->params * sizeof(float);
    if (net_create(&u->net, p->model, &o, e) < 0 || u->kern->alloc(u->kern, &u->p, bytes, e) < 0 ||
        u->kern->alloc(u->kern, &u->m, bytes, e) < 0 ||
        u->kern->alloc(u->kern, &u->v, bytes, e) < 0) {
        updater_destroy(&u);
        return -1;
    }
    *out = u;
    return 0;
}

void updater_destroy(struct updater **up) {
    struct updater *u = *up;
    if (!u) return;
    kptr *const all[] = { &u->p, &u->m, &u->v };
    for (size_t i = 0; i < COUNT_OF(all); i++)
        if (all[i]->p) u->kern->free(u->kern, all[i]);
    free(u->old_value);
    free(u->old_m);
    free(u->old_v);
    net_destroy(&u->net);
    free(u);
    *up = NULL;
}

static void batch_release(struct batch *b) {
    void *all[] = { b->seq, b->ids, b->start, b->advantage, b->old, b->cur, b->mu, b->entropy };
    for (size_t i = 0; i < COUNT_OF(all); i++) free(all[i]);
}

static void batch_open(struct batch *b, const struct learner_conf *c,
                       const struct rec_group *const *group, int groups) {
    size_t ids = 0, tokens = 0;
    *b = (struct batch){ .c = c };
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
    b->old = mem_alloc(tokens * sizeof(float));
    b->cur = mem_alloc(tokens * sizeof(float));
    b->mu = mem_alloc(tokens * sizeof(float));
    b->entropy = mem_alloc(tokens * sizeof(float));
    int32_t *at = b->ids;
    int s = 0;
    for (int g = 0; g < groups; g++) {
        const struct rec_group *r = group[g];
        double reward[REC_SAMPLES_MAX];
        for (int k = 0; k < r->samples; k++) reward[k] = r->sample[k].score;
        dapo_advantage(reward, r->samples, (int)c->adv_ddof, c->adv_eps, b->advantage + s);
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

/* net_train's callback: slope of the loss at each token of one piece of one sequence. */
static void loss_of_piece(void *ud, int seq, int first, int count, const float *lp,
                          const float *entropy, float *coef) {
    struct batch *b = ud;
    const struct learner_conf *c = b->c;
    struct update_metrics *m = b->metrics;
    int s = b->first_seq + seq;
    struct dapo_clip clip = { c->clip_low, c->clip_high, c->clip_dual };
    for (int i = 0; i < count; i++) {
        int32_t t = b->start[s] + first + i;
        if (b->old_is_cur) b->old[t] = lp[i];
        b->cur[t] = lp[i];
        b->entropy[t] = entropy ? entropy[i] : 0;
        double w = c->tis_cap > 0 ? dapo_tis((double)b->old[t], (double)b->mu[t], c->tis_cap) : 1;
        struct dapo_token x = dapo_loss(&clip, b->advantage[s], w, (double)lp[i],
                                        (double)b->old[t]);
        coef[i] = (float)(x.slope / b->tokens);
        m->loss += x.loss;
        m->clipfrac += x.clipped;
        m->clipfrac_lower += x.clipped_lower;
        m->ppo_kl += (double)b->old[t] - (double)lp[i];
        m->tis_mean += w;
        double off = fabs((double)lp[i] - (double)b->old[t]);
        if (b->first_seq == 0 && off > m->old_cur_max) m->old_cur_max = off;
    }
}

/* The new adapter, piece by piece: did any byte change? */
static bool take_value(struct updater *u, float *value) {
    float piece[4096];
    bool changed = false;
    for (size_t at = 0; at < u->params; at += COUNT_OF(piece)) {
        const size_t n = u->params - at < COUNT_OF(piece) ? u->params - at : COUNT_OF(piece);
        u->kern->download(u->kern, piece, kptr_at(u->p, at * sizeof *piece), n * sizeof *piece);
        changed |= memcmp(value + at, piece, n * sizeof *piece) != 0;
        memcpy(value + at, piece, n * sizeof *piece);
    }
    return changed;
}

static int minibatch_step(struct updater *u, struct update_state *s, struct batch *b, int seqs,
                          struct err *e) {
    const struct learner_conf *c = u->c;
    struct kern *k = u->kern;
    size_t bytes = u->params * sizeof(float);
    struct update_metrics *m = b->metrics;
    b->tokens = b->start[b->first_seq + seqs] - b->start[b->first_seq];
    if (net_adopt(u->net, s->lora, NULL, e) < 0 ||
        net_train(u->net, b->seq + b->first_seq, seqs, (float)c->shared.sample.temperature,
                  loss_of_piece, b, NULL, e) < 0)
        return -1;
    double norm = sqrt(k->sum_squares(k, net_grad(u->net), u->params));
    m->grad_norm = norm;
    if (!isfinite(norm)) {
        m->nonfinite = true;
        return 0;
    }
    s->adam_steps++;
    struct kern_adamw a = { .p = u->p,
                            .m = u->m,
                            .v = u->v,
                            .g = net_grad(u->net),
                            .n = u->params,
                            .lr = (float)m->lr,
                            .b1 = (float)c->beta1,
                            .b2 = (float)c->beta2,
                            .eps = (float)c->adam_eps,
                            .wd = (float)c->weight_decay,
                            .g_scale = (float)dapo_grad_scale(norm, c->grad_clip),
                            .m_scale = (float)(1 / (1 - pow(c->beta1, (double)s->adam_steps))),
                            .v_scale = (float)(1 / (1 - pow(c->beta2, (double)s->adam_steps))) };
    k->upload(k, u->p, s->lora->value, bytes);
    k->upload(k, u->m, s->m, bytes);
    k->upload(k, u->v, s->v, bytes);
    k->adamw(k, &a);
    k->download(k, s->m, u->m, bytes);
    k->download(k, s->v, u->v, bytes);
    m->changed |= take_value(u, s->lora->value);
    return k->sync(k, e);
}

static void save_state(struct updater *u, const struct update_state *s) {
    const size_t bytes = u->params * sizeof(float);
    float **const old[] = { &u->old_value, &u->old_m, &u->old_v };
    for (size_t i = 0; !u->old_v && i < COUNT_OF(old); i++) *old[i] = mem_alloc(bytes);
    memcpy(u->old_value, s->lora->value, bytes);
    memcpy(u->old_m, s->m, bytes);
    memcpy(u->old_v, s->v, bytes);
}

static void restore_state(const struct updater *u, struct update_state *s) {
    const size_t bytes = u->params * sizeof(float);
    memcpy(s->lora->value, u->old_value, bytes);
    memcpy(s->m, u->old_m, bytes);
    memcpy(s->v, u->old_v, bytes);
}

static void finish_metrics(struct update_metrics *m, const struct batch *b, double cap) {
    double n = (double)b->start[b->seqs], entropy = 0;
    m->tokens = b->start[b->seqs];
    m->loss /= n;
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
    dapo_gap(&m->gap, b->old, b->mu, b->start, b->seqs, cap);
}

int updater_step(struct updater *u, struct update_state *s, const struct rec_group *const *group,
                 int groups, struct update_metrics *metrics, struct err *e) {
    const struct learner_conf *c = u->c;
    struct batch b;
    int rc = 0, per = (int)(c->minibatch > 0 ? c->minibatch : c->batch);
    *metrics = (struct update_metrics){ 0 };
    struct dapo_rate rate = { (enum dapo_schedule)c->schedule,
                              c->lr,
                              c->lr_floor,
                              c->warmup,
                              c->shared.run.steps,
                              c->lr_stable };
    metrics->lr = dapo_rate_at(&rate, s->rate_steps);
    batch_open(&b, c, group, groups);
    b.metrics = metrics;
    b.old_is_cur = groups <= per;
    const int64_t adam_steps = s->adam_steps;
    if (!b.old_is_cur) save_state(u, s);
    if (!b.old_is_cur) {
        rc = net_adopt(u->net, s->lora, NULL, e);
        if (rc == 0)
            rc = net_logprobs(u->net, b.seq, b.seqs, (float)c->shared.sample.temperature, b.old,
                              NULL, e);
    }
    for (int g = 0; rc == 0 && g < groups && !metrics->nonfinite;) {
        int seqs = 0;
        for (int last = g + per < groups ? g + per : groups; g < last; g++)
            seqs += group[g]->samples;
        rc = minibatch_step(u, s, &b, seqs, e);
        b.first_seq += seqs;
    }
    if (rc == 0) {
        finish_metrics(metrics, &b, c->tis_cap > 0 ? c->tis_cap : 2);
        if (!metrics->nonfinite) s->rate_steps++;
        else if (!b.old_is_cur) {
            restore_state(u, s);
            s->adam_steps = adam_steps;
            metrics->changed = false;
        }
    }
    batch_release(&b);
    return rc;
}
