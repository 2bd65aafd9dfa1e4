/* child.h - the product's programs as child processes of the benchmark.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_BENCH_CHILD_H
#define QERL_BENCH_CHILD_H
#include "lib/base/err.h"

enum { CHILD_ARGS_MAX = 64 };
struct child_args { const char *v[CHILD_ARGS_MAX]; int n; };
void child_arg(struct child_args *a, const char *text);   /* lends */

/* Starts v[0] with stderr going to the file `log` and stdout into a pipe (*out) or, out NULL, to
 * the log too. */
int child_start(const struct child_args *a, const char *log, int *out, int *pid, struct err *e);
/* Waits; -1 with the log's last line when it did not end with 0. */
int child_wait(int pid, const char *program, const char *log, struct err *e);
int child_run(const struct child_args *a, const char *log, struct err *e);
#endif
