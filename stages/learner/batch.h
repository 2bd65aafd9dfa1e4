/* batch.h - the samples of one step as sequences of tokens, and the loss of each token.
 *
 * Knows: advantages, old and reference log-probs, how tokens are averaged. Does not know: the
 * network, the optimiser.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_LEARNER_BATCH_H
#define QERL_LEARNER_BATCH_H
#include "stages/learner/update.h"

/* sequence s has response tokens start[s] .. start[s+1]-1 */
struct batch {
    const struct learner_conf *c;
    struct net_seq *seq;
    int32_t *ids, *start;
    double *advantage;               /* [seqs] */
    /* [tokens]: log-probs of the policy before the step, now, when it sampled, of the base model
     * (NULL where no KL term asks) */
    float *old, *cur, *mu, *ref, *entropy;
    int seqs;
    bool old_is_cur;                 /* old has no pass of its own: the ratio is exactly 1 */
    int first_seq, mini_seqs;        /* the mini-batch in hand: the loss is a mean over it */
    int part_first;                  /* of it, where our own sequences begin */
    bool teaches;                    /* a slope of it is not 0 */
    int64_t repeats_logprob, repeats_update;         /* see parts_repeats */
    struct update_metrics *metrics;
};
void batch_open(struct batch *b, const struct learner_conf *c,
                const struct rec_group *const *group, int groups, struct update_metrics *metrics);
void batch_release(struct batch *b);
/* net_train's callback: slope of the loss at each token of one piece of one sequence, counted from
 * part_first. */
void batch_loss(void *batch, int seq, int first, int count, const float *lp, const float *entropy,
                float *coef);
/* Once cur and entropy of the whole mini-batch in hand are known: adds its sums to the metrics and
 * says whether it teaches. */
void batch_count(struct batch *b);
/* When all mini-batches are through: sums to means, distance to the policy that sampled. */
void batch_finish(struct batch *b);
#endif
