/* timing.h - repeat something, and say how the repeats spread.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_BENCH_TIMING_H
#define QERL_BENCH_TIMING_H
#include "kernels/kern.h"

enum { TIMING_REPEATS_MAX = 64 };
struct spread { double median, min, max; int n; };

/* Of v[n]; sorts v. n = 0 gives zeros. */
struct spread spread_of(double *v, int n);
/* 1 / s * amount: seconds a call -> amount a second. */
struct spread spread_rate(struct spread s, double amount);
struct spread spread_times(struct spread s, double factor);

/* Seconds of one fn(arg). Runs it once to warm up, then for about `seconds` in samples long enough
 * for the clock (2 ms), 3 to TIMING_REPEATS_MAX of them. What takes longer than `seconds` is run
 * twice, and when it takes longer than 4 of them, only once: its warm-up then is the sample. */
struct spread timing_of(void (*fn)(void *arg), void *arg, double seconds);
/* The same of operations that k queues: a sample ends when they are done. No repeats (n = 0) and
 * the reason where one failed. */
struct spread timing_on(struct kern *k, void (*fn)(void *arg), void *arg, double seconds,
                        struct err *e);
/* The same of an operation that is short beside its launch: where k can keep a sequence (kern.h),
 * many calls are kept and run at one launch. *kept says whether. */
struct spread timing_kept(struct kern *k, void (*fn)(void *arg), void *arg, double seconds,
                          bool *kept, struct err *e);
#endif
