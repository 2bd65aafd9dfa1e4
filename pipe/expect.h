/* expect.h - [expect]: what a pipeline's author expected, and whether it came so.
 *
 *   [expect]
 *   hypothesis = AQN widens exploration          text; else that of [run]
 *   above = 73.24 % of 1319                      a share, of how many questions if that is known,
 *                                                or the name of another run (matrix: NAME-sSEED)
 *   at = final                                   final | best
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_EXPECT_H
#define QERL_EXPECT_H
#include "pipe/result.h"

struct expectation {
    const char *hypothesis;                  /* "" = none */
    const char *run;                         /* NULL = a share */
    double share;
    int64_t n;                               /* of the share; 0 = not known: taken as exact */
    bool set, best;                          /* set: there is something to judge */
};
/* Lends l's texts. -1: above is neither a share nor a name, or at is neither final nor best. */
int expect_read(struct expectation *x, const struct lang *l, struct err *e);
/* expect_name.c: -1 where no run has that name (of runs_dir; a matrix adds -sSEED) and no .pipe
 * file beside l, or beside its base that says so, would make one, or where it is `own`; the error
 * lists those that would do. */
int expect_check_name(const char *name, const char *own, const char *runs_dir,
                      const struct lang *l, struct err *e);
/* "above 73.24 % at the final score" */
void expect_text(char *out, size_t size, const struct expectation *x);
/* About one run of one seed; a treatment takes several (compare). Lines "hypothesis ..." and
 * "expected ...: met by this run | not met ... | not distinguishable, one seed: ...", each behind
 * `indent`; nothing where the run expects nothing. */
void expect_print(const struct folder *f, const char *indent, FILE *to);
#endif
