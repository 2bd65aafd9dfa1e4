/* selftest.h - is the gradient that this learner would train with right? Asked once, of the model
 * and the kernels in use, before the first step.
 *
 * On windows from the middle of prompts, each under a random adapter of small rank, without noise:
 *   difference   (L(v + h d) - L(v - h d)) / (2 h |g|) for d = g / |g|, inputs and adapter as they
 *                are: 1 where the backward is the derivative of the forward. By two small steps,
 *                for the loss may bend, and bf16 be too coarse
 *   cosine       of the straight-through gradient to that one, by layer; only where inputs or
 *                adapters are rounded
 * Refused is what no prompt can be the reason of: a gradient that is not finite, a layer whose
 * gradient is 0 on every window, a difference that on all windows but one is too small, or too
 * large, by both steps, and about the same by both. One window that is right by both ends the test.
 * Cosines only warn: of a few tokens in 4 bits any of them may come out.
 *
 * A wrong size, sign or formula shows here; a part that is missing at a right angle to the rest
 * does not: that is held by tests of each operation.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_SELFTEST_H
#define QERL_SELFTEST_H
#include "lib/stage/policy.h"
#include "lib/task/task.h"

/* tokens and rank: the most that are taken */
enum { SELFTEST_TOKENS = 16, SELFTEST_RANK = 4, SELFTEST_WINDOWS = 8 };
#define SELFTEST_DIFFERENCE_OFF 0.25                 /* most that `difference` may be off 1 */
#define SELFTEST_COSINE_LOW 0.3                      /* worth a warning where no window has more */

struct selftest_window { int32_t ids[SELFTEST_TOKENS]; int n; };     /* n at least 2 */
struct selftest {
    int tokens, windows;                             /* of the first; how many were needed */
    int right, low, high;                            /* windows whose difference is so */
    int layer;                                       /* of the lowest cosine; -1: nothing rounds */
    double difference;                               /* of the last window; refused: the median */
    double cosine, seconds;                          /* the lowest layer's highest */
};
/* Windows of prompts that lie all over the file. */
int selftest_windows(struct selftest_window w[SELFTEST_WINDOWS], const struct policy *p,
                     const struct shared *c, const struct task_set *train, struct err *e);
/* EXIT_ENV and the number where the gradient is certainly wrong. */
int selftest_run(struct selftest *s, const struct policy *p,
                 const struct selftest_window w[SELFTEST_WINDOWS], struct err *e);
#endif
