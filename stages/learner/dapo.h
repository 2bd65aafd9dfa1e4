/* dapo.h - the arithmetic of one update: which groups teach, advantages, the clipped loss and its
 * gradient, the weights that correct for who sampled, the metrics that say how far the two policies
 * are apart, the learning rate.
 *
 * Knows: numbers of one step. Does not know: files, sockets, the network. All in double.
 * Formulas: DAPO (arXiv 2503.14476) as verl runs it; names of metrics are verl's.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_DAPO_H
#define QERL_DAPO_H
#include "lib/base/sys.h"

/* False when all values are equal (compared, not by a standard deviation: that of equal floats need
 * not be 0). A group of one teaches. */
bool dapo_teaches(const double *metric, int n);

/* A_i = (R_i - mean) / (sd + eps), sd with n - ddof; exactly 0 for all when the rewards are equal;
 * n = 1: R / (1 + eps). */
void dapo_advantage(const double *reward, int n, int ddof, double eps, double *advantage);

/* A_i = R_i - mean: spread is not divided away; n = 1: R. */
void dapo_advantage_mean(const double *reward, int n, double *advantage);

struct dapo_clip {
    double low, high;                /* ratio is clipped to [1 - low, 1 + high] */
    double dual;                     /* c > 1 of the dual clip; 0 = off */
};
struct dapo_token {
    double loss;                     /* to be minimised */
    double slope;                    /* dL / d lp_cur */
    bool clipped, clipped_lower;     /* counted by pg_clipfrac, pg_clipfrac_lower */
};
/* Loss of one token with advantage a and weight w (1 = no correction); at equality the unclipped
 * slope. */
struct dapo_token dapo_loss(const struct dapo_clip *c, double a, double w, double lp_cur,
                            double lp_old);

/* k3 estimate of KL(current, reference) at one token: exp(d) - d - 1 with d = lp_ref - lp_cur held
 * within +-20, at most 10; with .slope 0 there. */
struct dapo_token dapo_kl(double lp_ref, double lp_cur);

/* Truncated importance weight of one token: min(exp(clamp(lp_old - lp_mu, +-20)), cap). */
double dapo_tis(double lp_old, double lp_mu, double cap);

/* Distance between the policy that sampled (mu) and the learner's (old), over all tokens of `seqs`
 * sequences; sequence s is tokens start[s] .. start[s+1]-1. cap: the truncation that weights would
 * have. */
struct dapo_gap {
    /* of |exp(old) - exp(mu)|; std with ddof 1 */
    double probs_diff_mean, probs_diff_max, probs_diff_std;
    /* of |old - mu|: 0 when both computed the same bits */
    double logp_diff_mean, logp_diff_max;
    double probs_pearson;
    /* mean of mu - old, d^2/2, exp(d) - d - 1; d = old - mu */
    double kl, k2, k3_kl;
    double training_ppl, rollout_ppl, log_ppl_diff, log_ppl_abs_diff, ppl_ratio;
    double chi2_token, chi2_seq;
    double is_mean, is_max, is_min, is_std, is_eff_sample_size, is_fraction_high, is_fraction_low;
    /* tokens whose two log-probs are not the same bits */
    int64_t tokens, tokens_differ;
};
void dapo_gap(struct dapo_gap *g, const float *old, const float *mu, const int32_t *start, int seqs,
              double cap);

enum dapo_schedule { DAPO_SCHEDULE_CONSTANT, DAPO_SCHEDULE_COSINE, DAPO_SCHEDULE_WSD };
struct dapo_rate {
    enum dapo_schedule schedule;
    double peak, floor;              /* floor as a share of the peak */
    /* scheduler steps; the first has s = 0 and so, with a warm-up, rate 0 */
    int64_t warmup, total;
    /* WSD: share of the steps after the warm-up that stay at the peak */
    double stable;
};
double dapo_rate_at(const struct dapo_rate *r, int64_t s);

/* Factor on the gradient for a bound on its norm: min(1, most / (norm + 1e-6)). */
double dapo_grad_scale(double norm, double most);
#endif
