/* stat.h - what an accuracy is worth, and what a difference between two of them is.
 *
 * Knows: intervals, exact tests, power. Does not know: runs, questions, seeds. Every interval takes
 * alpha, the chance to miss: 0.05 for 95 %; whoever looks k times gives 0.05 / k.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_STAT_H
#define QERL_STAT_H
#include "lib/base/sys.h"

struct stat_span { double low, high; };

/* 95 % Wilson score interval of right/n, both ends in [0, 1]; n = 0 gives 0, 1. */
void stat_interval(int64_t right, int64_t n, double *low, double *high);
struct stat_span stat_wilson(int64_t right, int64_t n, double alpha);

double stat_normal_quantile(double p);
double stat_t_cdf(double t, double df);
double stat_t_quantile(double p, double df);

/* Two shares of independent questions: interval of b - a (Newcombe's method 10: from the Wilson
 * intervals). */
struct stat_span stat_two_shares(int64_t right_a, int64_t n_a, int64_t right_b, int64_t n_b,
                                 double alpha);
/* Two shares of the same n questions, of which a alone and b alone got some right: interval of
 * b - a (Bonett and Price 2012). */
struct stat_span stat_paired_shares(int64_t only_a, int64_t only_b, int64_t n, double alpha);
/* Mean of n differences: t interval; n < 2 gives -inf, inf. In this and what follows a deviation
 * counts as no less than `least`: a few values that happen to be equal are no certainty. *sd gets
 * what counted. */
struct stat_span stat_paired_mean(const double *d, int n, double least, double alpha, double *sd);
/* Difference of means b - a of two independent samples of at least 2: Welch's t interval. */
struct stat_span stat_two_means(const double *a, int na, double least_a, const double *b, int nb,
                                double least_b, double alpha);
/* Mean share of n runs on the same questions: Wilson's interval for the questions, widened by the
 * spread of the mean over runs. */
struct stat_span stat_mean_share(const double *share, int n, int64_t questions, double alpha);

/* Two-sided p that whole differences d[n] are 0 but for chance signs: each d is as likely +d as -d.
 * Exact. Where every |d| <= 1 this is McNemar's exact test. */
double stat_sign_flip(const int *d, int n);
/* Two-sided p of the paired t test. NAN for n < 2; with least 0 it is 0 or 1 where all differences
 * are equal. */
double stat_paired_t(const double *d, int n, double least);
/* Two-sided p that a and b come from one population, by the difference of means over all ways to
 * deal the values out: all of them up to a million, else 100,000 keyed draws. */
double stat_permutation(const double *a, int na, const double *b, int nb);
/* The smallest p that stat_permutation can give for these sizes. */
double stat_permutation_least(int na, int nb);

/* Questions, answered once each by two policies, that show a difference of `delta` with probability
 * `power`, where the share `differ` of them is answered differently (Connor 1987). */
double stat_questions_needed(double differ, double delta, double alpha, double power);
/* Power of the paired t test with n pairs whose differences have mean delta and deviation sd. */
double stat_paired_t_power(int n, double delta, double sd, double alpha);
/* Seeds per arm that show delta with this power by a paired t test; -1 = more than 10,000. */
int stat_seeds_needed(double sd, double delta, double alpha, double power);
#endif
