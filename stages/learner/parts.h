/* parts.h - one update parted among ranks: who computes which sequences, and how results become
 * everybody's.
 *
 * Every rank has all groups of the step, and the same adapter and moments; it makes passes over its
 * own sequences only. Each token's log-probs and entropy are then shared, so that the metrics of
 * the step are summed in the same order as by one rank, to the same bits. The gradient is a sum for
 * each rank, added in rank order: other bits than one rank's, but the same for any threads,
 * micro-batches and kernels. ranks NULL = one rank, alone: then nothing here costs anything.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_LEARNER_PARTS_H
#define QERL_LEARNER_PARTS_H
#include "lib/base/ranks.h"
#include "stages/learner/batch.h"

/* A call of sequences first .. first + seqs - 1 of b, parted: rank i has from[i] .. from[i+1] - 1,
 * about as many rows as any other. Depends on their lengths alone. */
struct parts {
    struct ranks *ranks;             /* lent */
    int own, count;
    int from[RANKS_MAX + 1];
};
void parts_make(struct parts *p, struct ranks *ranks, const struct batch *b, int first, int seqs);
void parts_split(struct parts *p, int count, const struct batch *b, int first, int seqs);
/* A value of each token of these sequences: afterwards every rank has all. */
int parts_tokens(const struct parts *p, const char *call, const struct batch *b, float *value,
                 struct err *e);
/* What the sum of the ranks' rows_squared lacks, since samples of a group share the draws of their
 * prompt in whichever rank they are. */
int64_t parts_repeats(const struct parts *p, const struct batch *b);
/* The sum over ranks. What all of them count (updates, the gradient, a draw for weights) is in it
 * once. */
int parts_evidence(struct ranks *ranks, const char *call, struct noise_evidence *v, struct err *e);

/* How the ranks' gradients become one, a piece at a time: gather brings those of all ranks to where
 * add finds them, add leaves their sum, made in rank order, in grad; wait (NULL: nothing is under
 * way) ends when that is done. On cores they meet in shared memory; on GPUs, one for each rank, by
 * NCCL, and a kernel adds them: the same bits. */
struct parts_grad {
    const struct parts_grad_ops *ops;
    struct ranks *ranks;             /* lent; NULL: there is one */
    struct kern *kern;               /* lent */
    float *all;                      /* the host's: [ranks, piece] */
    struct device_ranks *devices;    /* the devices' */
};
struct parts_grad_ops {
    size_t piece;                    /* floats */
    int (*gather)(struct parts_grad *g, kptr grad, size_t n, struct err *e);
    int (*add)(struct parts_grad *g, kptr grad, size_t n, struct err *e);
    int (*wait)(struct parts_grad *g, struct err *e);
};
/* All ranks call it. */
int parts_grad_open(struct parts_grad *g, struct ranks *ranks, struct kern *k, struct err *e);
void parts_grad_close(struct parts_grad *g);
/* grad, params floats on the backend, is the sum of all ranks' in every rank. */
int parts_grad_sum(struct parts_grad *g, kptr grad, size_t params, struct err *e);
/* Bytes of each of these ranks, its share of the common memory among them. */
size_t parts_plan(int ranks, bool on_devices);
#endif
