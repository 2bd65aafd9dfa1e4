/* selftest.h - is the gradient that this learner would train with right? Asked once, of the model
 * and the kernels in use, before the first step.
 *
 * On the middle of a prompt under a random adapter of small rank, without noise:
 *   difference   (L(v + h d) - L(v - h d)) / (2 h |g|) for d = g / |g|, inputs and adapter as they
 *                are: 1 where the backward is the derivative of the forward
 *   cosine       of the straight-through gradient to that one, by layer; only where inputs or
 *                adapters are rounded
 * and every layer's gradient is not 0. A wrong size, sign or formula shows here; a part that is
 * missing at a right angle to the rest does not: that is held by tests of each operation.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_SELFTEST_H
#define QERL_SELFTEST_H
#include "lib/stage/policy.h"

enum { SELFTEST_TOKENS = 16, SELFTEST_RANK = 4 };    /* of both the most that are taken */
#define SELFTEST_DIFFERENCE_OFF 0.25                 /* most that `difference` may be off 1 */
/* A layer's gradients have 10^4 values and more: two that have nothing to do with each other stay
 * below it. What 4-bit inputs leave is far above, but may be small enough to be warned of. */
#define SELFTEST_COSINE_LEAST 0.02
#define SELFTEST_COSINE_LOW 0.3

struct selftest {
    int tokens, layer;                               /* of the lowest cosine; -1: nothing rounds */
    double difference, cosine, seconds;
};
/* ids: n tokens, at least 2. EXIT_ENV and the number where one is outside its bound. */
int selftest_run(struct selftest *t, const struct policy *p, const int32_t *ids, int n,
                 struct err *e);
#endif
