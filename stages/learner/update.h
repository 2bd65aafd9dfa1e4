/* update.h - one update of the adapter from the groups of one step.
 *
 * Knows: advantages, loss, backward, gradient norm, AdamW. Does not know: sockets, files, how an
 * answer was scored. The result depends on the groups (sorted by id) and the settings, never on
 * micro-batches or threads.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_UPDATE_H
#define QERL_UPDATE_H
#include "lib/model/net.h"
#include "lib/model/quant.h"
#include "lib/wire/rec.h"
#include "stages/learner/conf.h"

struct update_state {                /* what a checkpoint holds besides counters */
    struct lora *lora;
    float *m, *v;                    /* AdamW moments, lora->params each */
    int64_t adam_steps;              /* updates that changed m and v */
    int64_t rate_steps;              /* scheduler steps taken */
};
/* What is done to the arithmetic of one step. */
struct update_treatment {
    uint64_t seed, fixed_seed;       /* of noise on operations and modules */
    double sigma;                    /* AQN that sampled the groups, for the old log-probs */
    int64_t step, version;
};
struct update_metrics {
    double loss, kl_loss, kl_coef, clipfrac, clipfrac_lower, ppo_kl, entropy, grad_norm, lr;
    double old_cur_max;              /* max |lp_cur - lp_old| in the first mini-batch: exactly 0 */
    double advantage_max, advantage_min, tis_mean;
    struct dapo_gap gap;             /* learner's log-probs against the rollout's */
    int64_t tokens;
    /* Measured in the two phases. Where no pass of their own is made, the old log-probs are those
     * of the update's forward pass, and so is what was done to them. */
    struct noise_evidence logprob, update;
    struct noise_view aqn;           /* under the old log-probs; numbers only */
    /* what quant.adapter did to the adapter that was trained */
    struct quant_stats adapter_a, adapter_b;
    bool changed;                    /* the adapter's bytes changed */
    bool nonfinite;                  /* gradient not finite: nothing was touched */
};
struct updater;
struct ranks;
int updater_create(struct updater **out, const struct policy *p, const struct learner_conf *c,
                   struct err *e);
void updater_destroy(struct updater **u);
/* The state that the next step starts from. AdamW's arrays lie on the backend from then on: of s a
 * step changes the adapter and the counters; moments come back with updater_store. */
void updater_load(struct updater *u, const struct update_state *s);
int updater_store(struct updater *u, struct update_state *s, struct err *e);
/* From now on a step is made together with the other ranks, lent: all call updater_step with equal
 * states, groups and treatments, and end with equal states and metrics. All call it, and each is
 * told where their gradients cannot meet. */
int updater_join(struct updater *u, struct ranks *r, struct err *e);
size_t updater_plan(const struct learner_conf *c, const struct model_conf *m,
                    const struct lora_shape *shape);
/* of these, the KV pages */
size_t updater_plan_pages(const struct learner_conf *c, const struct model_conf *m,
                          const struct lora_shape *shape);
/* s: as it was loaded, or as the last step left it. groups: at least one, sorted by id. -1 also
 * where noise that was intended did not happen. On a non-finite gradient the state is left as it
 * was and metrics->nonfinite set. */
int updater_step(struct updater *u, struct update_state *s, const struct rec_group *const *group,
                 int groups, const struct update_treatment *t, struct update_metrics *metrics,
                 struct err *e);
#endif
