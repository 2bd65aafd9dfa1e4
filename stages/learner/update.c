/* update.c - see update.h. Order: the net, mini-batches (backward, norm, AdamW), log-probs to
 * compare with, the step.
 * SPDX-License-Identifier: Apache-2.0 */
#include "stages/learner/update.h"

#include <math.h>

#include "lib/stage/rank.h"
#include "stages/learner/parts.h"

enum { TAKEN = 1 << 20 };            /* numbers of one download: 4 MiB */

struct updater {
    const struct learner_conf *c;
    const struct policy *policy;
    struct kern *kern;
    struct net *net;
    kptr p, m, v;                    /* AdamW's arrays on the backend: the masters */
    bool ahead;                      /* m and v there are newer than the state's */
    /* [params]: the adapter before the step; only where several mini-batches may leave half a
     * step */
    float *old_value;
    float *piece;                    /* [TAKEN]: of what comes back from the backend */
    size_t params;
    struct noise_view aqn;           /* its memory stays from step to step */
    struct ranks *ranks;             /* NULL = alone */
    struct parts_grad grad;
};

static bool keeps_peaks(const struct learner_conf *c, const struct model_conf *m) {
    struct noise_plan p;
    return treatment_plan(&p, &c->shared, m, false, NULL) == 0 && noise_plan_peaks(&p);
}

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
                              .lora = *shape,
                              .activations = (enum model_quant)c->shared.quant.activations,
                              .noise = c->shared.ops.type || c->shared.modules.type,
                              .noise_peaks = keeps_peaks(c, m) };
}

size_t updater_plan(const struct learner_conf *c, const struct model_conf *m,
                    const struct lora_shape *shape) {
    struct net_opts o = train_opts(c, m, shape);
    /* the state, on the backend too, and what save_state keeps */
    int copies = c->minibatch > 0 && c->minibatch < c->batch ? 7 : 6;
    return net_plan(m, (enum model_quant)c->shared.quant.weights, &o) +
           (size_t)copies * sizeof(float) * lora_params(m, shape) + TAKEN * sizeof(float) +
           parts_plan((int)c->ranks, rank_on_gpus(&c->shared));
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
    u->policy = p;
    u->kern = p->model->kern;
    u->params = lora_params(&p->model->conf, &p->shape);
    u->piece = mem_alloc(TAKEN * sizeof *u->piece);
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
    parts_grad_close(&u->grad);
    noise_view_close(&u->aqn);
    free(u->old_value);
    free(u->piece);
    net_destroy(&u->net);
    free(u);
    *up = NULL;
}

int updater_join(struct updater *u, struct ranks *r, struct err *e) {
    u->ranks = r;
    return parts_grad_open(&u->grad, r, u->kern, e);
}

void updater_load(struct updater *u, const struct update_state *s) {
    const size_t bytes = u->params * sizeof(float);
    u->kern->upload(u->kern, u->p, s->lora->value, bytes);
    u->kern->upload(u->kern, u->m, s->m, bytes);
    u->kern->upload(u->kern, u->v, s->v, bytes);
    u->ahead = false;
}

int updater_store(struct updater *u, struct update_state *s, struct err *e) {
    const size_t bytes = u->params * sizeof(float);
    if (!u->ahead) return 0;
    u->kern->download(u->kern, s->m, u->m, bytes);
    u->kern->download(u->kern, s->v, u->v, bytes);
    u->ahead = false;
    return u->kern->sync(u->kern, e);
}

/* The new adapter, piece by piece: did any byte change? */
static bool take_value(struct updater *u, float *value) {
    bool changed = false;
    for (size_t at = 0; at < u->params; at += TAKEN) {
        const size_t n = u->params - at < TAKEN ? u->params - at : TAKEN, bytes = n * sizeof(float);
        u->kern->download(u->kern, u->piece, kptr_at(u->p, at * sizeof(float)), bytes);
        changed |= memcmp(value + at, u->piece, bytes) != 0;
        memcpy(value + at, u->piece, bytes);
    }
    return changed;
}

/* Log-probs and entropies of the mini-batch in hand; its gradient, in net_grad. */
static int minibatch_pass(struct updater *u, struct batch *b, struct err *e) {
    struct parts p;
    parts_make(&p, u->ranks, b, b->first_seq, b->mini_seqs);
    b->part_first = p.from[p.own];
    if (net_train(u->net, b->seq + b->part_first, p.from[p.own + 1] - b->part_first,
                  (float)u->c->shared.sample.temperature, batch_loss, b, NULL, e) < 0 ||
        parts_tokens(&p, "log-probs", b, b->cur, e) < 0 ||
        parts_tokens(&p, "entropies", b, b->entropy, e) < 0)
        return -1;
    b->repeats_update += parts_repeats(&p, b);
    b->teaches = false;
    batch_count(b);
    return parts_grad_sum(&u->grad, net_grad(u->net), u->params, e);
}

/* The gradient of the mini-batch in hand; noise on it comes before its norm. */
static int minibatch_grad(struct updater *u, const struct update_state *s, struct batch *b,
                          const struct update_treatment *t, struct err *e) {
    const struct noise_plan *plan = &u->policy->plan;
    if (net_adopt(u->net, s->lora, NULL, e) < 0) return -1;
    net_adapter_stats(u->net, &b->metrics->adapter_a, &b->metrics->adapter_b);
    net_set_noise(u->net, plan, NOISE_PHASE_UPDATE, t->seed, t->fixed_seed);
    if (minibatch_pass(u, b, e) < 0) return -1;
    b->metrics->update.updates += b->teaches;
    if (b->teaches) net_noise_grad(u->net, (uint64_t)s->adam_steps);
    return net_take_noise(u->net, &b->metrics->update, e);
}

static int minibatch_step(struct updater *u, struct update_state *s, struct batch *b,
                          const struct update_treatment *t, struct err *e) {
    const struct learner_conf *c = u->c;
    struct kern *k = u->kern;
    struct update_metrics *m = b->metrics;
    if (minibatch_grad(u, s, b, t, e) < 0) return -1;
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
    k->adamw(k, &a);
    u->ahead = true;
    m->changed |= take_value(u, s->lora->value);
    return k->sync(k, e);
}

/* Moments stay as they are on the host while the step goes on. */
static int save_state(struct updater *u, struct update_state *s, struct err *e) {
    const size_t bytes = u->params * sizeof(float);
    if (!u->old_value) u->old_value = mem_alloc(bytes);
    memcpy(u->old_value, s->lora->value, bytes);
    return updater_store(u, s, e);
}

static int restore_state(struct updater *u, struct update_state *s, struct err *e) {
    memcpy(s->lora->value, u->old_value, u->params * sizeof(float));
    updater_load(u, s);
    return u->kern->sync(u->kern, e);
}

/* Whether noise changes results in one of the two phases only. */
static bool phases_differ(const struct noise_text *t) {
    return t->type && t->forward &&
           t->phase[NOISE_PHASE_LOGPROB] != t->phase[NOISE_PHASE_UPDATE];
}

static bool under_aqn(const struct updater *u, const struct update_treatment *t) {
    return u->c->old_logprob == LEARNER_POLICY_NOISY && t->sigma > 0;
}

/* Without a pass of their own the old log-probs are those of the only update. */
static bool own_old_pass(const struct updater *u, const struct update_treatment *t, bool several) {
    const struct noise_plan *p = &u->policy->plan;
    return several || under_aqn(u, t) || phases_differ(&p->op_text) ||
           phases_differ(&p->module_text);
}

/* Of all sequences of the step, under what the net was told. */
static int fixed_pass(struct updater *u, struct batch *b, const char *call, float *lp,
                      struct err *e) {
    struct parts p;
    parts_make(&p, u->ranks, b, 0, b->seqs);
    const int first = p.from[p.own], seqs = p.from[p.own + 1] - first;
    if (net_logprobs(u->net, b->seq + first, seqs, (float)u->c->shared.sample.temperature,
                     lp + b->start[first], NULL, e) < 0)
        return -1;
    if (lp == b->old) b->repeats_logprob = parts_repeats(&p, b);
    return parts_tokens(&p, call, b, lp, e);
}

static int old_logprobs(struct updater *u, const struct update_state *s, struct batch *b,
                        const struct update_treatment *t, struct err *e) {
    const struct shared *c = &u->c->shared;
    const bool noisy = under_aqn(u, t);
    if (noisy && treatment_view(&u->aqn, u->policy->model, c, t->step, t->sigma, t->seed,
                                t->version, e) < 0)
        return -1;
    int rc = net_adopt(u->net, s->lora, noisy ? &u->aqn : NULL, e);
    net_set_noise(u->net, &u->policy->plan, NOISE_PHASE_LOGPROB, t->seed, t->fixed_seed);
    if (rc == 0) rc = fixed_pass(u, b, "old log-probs", b->old, e);
    if (rc == 0) rc = net_take_noise(u->net, &b->metrics->logprob, e);
    if (!noisy) return rc;
    b->metrics->aqn = u->aqn;
    b->metrics->aqn.dw = b->metrics->aqn.mem = (kptr){ NULL };
    b->metrics->aqn.linear = NULL;
    return net_adopt(u->net, s->lora, NULL, e) < 0 ? -1 : rc;      /* it lent the view until now */
}

/* Of the base model: the adapter off, a clean pass. */
static int reference_logprobs(struct updater *u, struct batch *b, struct err *e) {
    struct noise_evidence clean = { 0 };             /* its passes belong to no phase */
    if (net_adopt(u->net, NULL, NULL, e) < 0) return -1;
    net_set_noise(u->net, NULL, NOISE_PHASE_LOGPROB, 0, 0);
    if (fixed_pass(u, b, "log-probs of the reference", b->ref, e) < 0) return -1;
    return net_take_noise(u->net, &clean, e);
}

static int fixed_logprobs(struct updater *u, const struct update_state *s, struct batch *b,
                          const struct update_treatment *t, struct err *e) {
    if (b->ref && reference_logprobs(u, b, e) < 0) return err_wrap(e, "log-probs of the reference");
    if (!b->old_is_cur && old_logprobs(u, s, b, t, e) < 0) return err_wrap(e, "old log-probs");
    return 0;
}

static int check_evidence(const struct updater *u, const struct batch *b, struct err *e) {
    struct update_metrics *m = b->metrics;
    if (parts_evidence(u->ranks, "noise of log-probs", &m->logprob, e) < 0 ||
        parts_evidence(u->ranks, "noise of the update", &m->update, e) < 0)
        return -1;
    m->logprob.rows_squared += b->repeats_logprob;
    m->update.rows_squared += b->repeats_update;
    if (b->old_is_cur) {
        m->logprob = m->update;
        m->logprob.passes[NOISE_BACKWARD] = 0;
        m->logprob.grad = (struct noise_tally){ 0 };
        for (int op = 0; op < NOISE_OP_COUNT; op++)
            m->logprob.op[op][NOISE_BACKWARD] = (struct noise_tally){ 0 };
    }
    if (treatment_check(&u->policy->plan, NOISE_PHASE_LOGPROB, &m->logprob, e) < 0) return -1;
    return treatment_check(&u->policy->plan, NOISE_PHASE_UPDATE, &m->update, e);
}

static double rate_of(const struct learner_conf *c, int64_t rate_steps) {
    const struct dapo_rate rate = { .schedule = (enum dapo_schedule)c->schedule,
                                    .peak = c->lr,
                                    .floor = c->lr_floor,
                                    .warmup = c->warmup,
                                    .total = c->shared.run.steps,
                                    .stable = c->lr_stable };
    return dapo_rate_at(&rate, rate_steps);
}

int updater_step(struct updater *u, struct update_state *s, const struct rec_group *const *group,
                 int groups, const struct update_treatment *t, struct update_metrics *metrics,
                 struct err *e) {
    const struct learner_conf *c = u->c;
    const int per = (int)(c->minibatch > 0 ? c->minibatch : c->batch);
    const bool several = groups > per;
    const int64_t adam_steps = s->adam_steps;
    struct batch b;
    *metrics = (struct update_metrics){ .lr = rate_of(c, s->rate_steps), .kl_coef = c->kl_coef };
    batch_open(&b, c, group, groups, metrics);
    b.old_is_cur = !own_old_pass(u, t, several);
    int rc = several ? save_state(u, s, e) : 0;
    if (rc == 0) rc = fixed_logprobs(u, s, &b, t, e);
    for (int g = 0; rc == 0 && g < groups && !metrics->nonfinite;) {
        b.mini_seqs = 0;
        for (int last = g + per < groups ? g + per : groups; g < last; g++)
            b.mini_seqs += group[g]->samples;
        rc = minibatch_step(u, s, &b, t, e);
        b.first_seq += b.mini_seqs;
    }
    if (rc == 0) rc = check_evidence(u, &b, e);
    if (rc == 0) {
        batch_finish(&b);
        if (!metrics->nonfinite) s->rate_steps++;
        else if (several) {
            rc = restore_state(u, s, e);
            s->adam_steps = adam_steps;
            metrics->changed = false;
        }
    }
    batch_release(&b);
    return rc;
}
