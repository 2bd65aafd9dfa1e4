/* check.c - see check.h. Order: keys without effect, combinations.
 * SPDX-License-Identifier: Apache-2.0 */
#include "stages/learner/check.h"

#include "lib/stage/aqn.h"
#include "lib/stage/effect.h"

/* ---- keys without effect ---- */

static bool rate_constant(const void *conf) {
    return ((const struct learner_conf *)conf)->schedule == DAPO_SCHEDULE_CONSTANT;
}
static bool not_wsd(const void *conf) {
    return ((const struct learner_conf *)conf)->schedule != DAPO_SCHEDULE_WSD;
}
static bool not_divided(const void *conf) {
    return ((const struct learner_conf *)conf)->advantage == LEARNER_ADVANTAGE_GROUP_MEAN;
}
/* who says one wave has it */
static bool no_filter(const void *conf) {
    const struct learner_conf *c = conf;
    return c->filter == FILTER_METRIC_OFF && c->waves_max != 1;
}

/* ahead of nothing */
static bool one_step(const void *conf) {
    return ((const struct learner_conf *)conf)->shared.run.steps <= 1;
}

/* What rollouts apply and old log-probs do not, an older adapter included. On one backend their
 * log-probs have the same bits otherwise, and each weight would be exactly 1. */
static bool same_policy(const void *conf) {
    const struct learner_conf *c = conf;
    const struct shared *s = &c->shared;
    if (c->lag_max > 0 && !one_step(conf)) return false;
    const bool aqn = s->aqn.sigma_start > 0 || s->aqn.sigma_end > 0;
    const bool ops = s->ops.type && s->ops.direction != SHARED_DIRECTION_BACKWARD &&
                     s->ops.rollout != s->ops.logprob;
    const bool modules = s->modules.type && s->modules.rollout != s->modules.logprob;
    return !(aqn && c->old_logprob == LEARNER_POLICY_CLEAN) && !ops && !modules;
}

static const struct effect_rule rules[] = {
    { "learner.tis_cap", same_policy,
      "the old log-probs are those of the policy that sampled, so every weight is 1; it acts under "
      "noise.aqn with learner.old_logprob = clean, under noise that is on in only one of the "
      "phases rollout and logprob, or with learner.lag_max; unset it" },
    { "learner.lag_max", one_step,
      "a run of one step has nothing to ask for ahead; raise run.steps, or unset it" },
    { "learner.lr_floor", rate_constant,
      "it is of learner.lr_schedule = cosine and wsd; set one of these, or unset it" },
    { "learner.lr_stable", not_wsd,
      "it is of learner.lr_schedule = wsd; set that, or unset it" },
    { "learner.adv_eps", not_divided,
      "learner.advantage = group_mean divides by nothing; unset it" },
    { "learner.adv_ddof", not_divided,
      "learner.advantage = group_mean divides by nothing; unset it" },
    { "filter.waves_max", no_filter,
      "with filter.metric = off a step asks for one wave; unset it" },
    { 0 },
};

/* ---- combinations ---- */

int learner_check(const struct learner_conf *c, const struct stage_key *const *tables,
                  struct err *e) {
    int rc = effect_check_shared(&c->shared, e);
    if (effect_check(c, tables, rules, e) < 0 || aqn_check(&c->shared, e) < 0) rc = -1;
    if ((float)c->lr <= 0)
        rc = err_more(e, EXIT_CONFIG,
                      "learner.lr = %g would do nothing: in f32 it is 0, so no step would change "
                      "the adapter; the untrained model's score is that of step 0 of any run, or "
                      "of qerl-eval without an adapter",
                      c->lr);
    if (c->minibatch > 0 && c->batch % c->minibatch)
        rc = err_more(e, EXIT_CONFIG,
                      "learner.batch = %lld is not a multiple of learner.minibatch = %lld",
                      (long long)c->batch, (long long)c->minibatch);
    if (c->wave > 0 && c->wave < c->batch && c->filter == FILTER_METRIC_OFF)
        rc = err_more(e, EXIT_CONFIG,
                      "learner.wave = %lld is smaller than learner.batch = %lld and filter.metric "
                      "is off: a step could never have its batch",
                      (long long)c->wave, (long long)c->batch);
    if (c->old_logprob == LEARNER_POLICY_NOISY && c->shared.aqn.sigma_start <= 0 &&
        c->shared.aqn.sigma_end <= 0)
        rc = err_more(e, EXIT_CONFIG,
                      "learner.old_logprob = noisy: log-probs under AQN, but noise.aqn is off");
    if (c->shared.sample.temperature <= 0)
        rc = err_more(e, EXIT_CONFIG,
                      "sample.temperature must be above 0 to train: greedy answers of a group are "
                      "all the same");
    if (c->shared.sample.top_k > 0 || c->shared.sample.top_p < 1)
        rc = err_more(e, EXIT_CONFIG,
                      "training needs sample.top_k = 0 and sample.top_p = 1: the learner scores "
                      "with the whole distribution");
    if (c->shared.sample.n < 2 && c->filter != FILTER_METRIC_OFF)
        rc = err_more(e, EXIT_CONFIG,
                      "sample.n = 1: a group of one has no spread; use at least 2 or set "
                      "filter.metric = off");
    const int64_t answers = (c->minibatch > 0 ? c->minibatch : c->batch) * c->shared.sample.n;
    if (c->ranks > answers)
        rc = err_more(e, EXIT_CONFIG,
                      "learner.ranks = %lld, but an update has %lld answers (sample.n times "
                      "learner.minibatch or learner.batch): some ranks would have nothing to do",
                      (long long)c->ranks, (long long)answers);
    return rc;
}
