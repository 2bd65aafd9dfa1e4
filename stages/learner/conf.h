/* conf.h - settings of the learner.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_LEARNER_CONF_H
#define QERL_LEARNER_CONF_H
#include "lib/stage/policy.h"
#include "stages/learner/dapo.h"

enum { LAG_MAX = 8 };
enum { PORT_TICKET, PORT_GROUP, PORT_ADAPTER, PORT_SCORE };
enum learner_policy { LEARNER_POLICY_CLEAN, LEARNER_POLICY_NOISY };
enum learner_loss { LEARNER_LOSS_TOKEN_MEAN, LEARNER_LOSS_SEQ_MEAN };
enum learner_advantage { LEARNER_ADVANTAGE_GROUP_STD, LEARNER_ADVANTAGE_GROUP_MEAN };
enum filter_metric { FILTER_METRIC_ACC, FILTER_METRIC_SCORE, FILTER_METRIC_OFF };

struct learner_conf {
    struct shared shared;
    int64_t batch, wave, minibatch, micro_tokens, save_every;
    double lr, lr_floor, lr_stable, beta1, beta2, adam_eps, weight_decay, grad_clip;
    int64_t warmup;
    int schedule;                    /* enum dapo_schedule */
    double clip_low, clip_high, clip_dual, adv_eps, tis_cap, kl_coef;
    int old_logprob, loss, advantage;            /* learner_policy, learner_loss, ... */
    int64_t adv_ddof;
    int filter;                      /* enum filter_metric */
    int64_t waves_max;
    int64_t lag_max;                 /* steps asked for ahead, 0 .. LAG_MAX: ahead.h */
    int64_t ranks;                   /* after check: at least 1 */
};
#endif
