/* stat_values.c - intervals, tests and power against values of SciPy 1.17 and statsmodels 0.14 (the
 * call stands beside each), and against what must hold for any.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/stat.h"

#include <criterion/criterion.h>
#include <math.h>

#define near(got, want, tolerance)                                                             \
    do {                                                                                       \
        const double got_ = (got), want_ = (want);                                             \
        cr_expect(fabs(got_ - want_) <= (tolerance), #got " is %.17g, not %.17g", got_, want_);  \
    } while (0)

static void span(struct stat_span s, double low, double high) {
    near(s.low, low, 1e-9);
    near(s.high, high, 1e-9);
}

Test(stat, wilson_intervals) {                       /* proportion_confint(r, n, alpha, "wilson") */
    span(stat_wilson(171, 512, .05), 0.29450183733367963, 0.37593954132430873);
    span(stat_wilson(0, 10, .05), 0, 0.27753279986288926);
    span(stat_wilson(10, 10, .01), 0.6011459066950917, 1);
    span(stat_wilson(989, 1319, .05 / 3), 0.7202208975588237, 0.7772385343657601);
    span(stat_wilson(0, 0, .05), 0, 1);
}

Test(stat, distributions) {                          /* norm.ppf, t.cdf, t.ppf */
    near(stat_normal_quantile(.975), 1.959963984540054, 1e-12);
    near(stat_normal_quantile(.9975), 2.807033768343811, 1e-12);
    near(stat_normal_quantile(1e-8), -5.612001244174789, 1e-9);
    near(stat_t_cdf(0, 3), .5, 1e-15);
    near(stat_t_cdf(2.5, 2), 0.9351941398892446, 1e-12);
    near(stat_t_cdf(-1.7, 9), 0.061673831071911926, 1e-12);
    near(stat_t_cdf(12, 1), 0.9735353239404101, 1e-12);
    near(stat_t_cdf(3.2, 4.7), 0.9869080651215986, 1e-12);
    near(stat_t_cdf(-40, 5) / 9.205981085886477e-08, 1, 1e-9);
    near(stat_t_quantile(.975, 2), 4.302652729749462, 1e-9);
    near(stat_t_quantile(.9917, 3.3), 4.506968305706367, 1e-9);
    near(stat_t_quantile(.025, 30), -2.042272456301238, 1e-9);
    near(stat_t_quantile(.9999, 1), 3183.098757118502, 1e-5);
}

Test(stat, differences_of_shares) {
    /* confint_proportions_2indep(method="newcomb", compare="diff") */
    span(stat_two_shares(965, 1319, 887, 1319, .05), -0.09384032920563387, -0.024235834128334424);
    span(stat_two_shares(5, 20, 12, 30, .01), -0.19499181258538562, 0.42955807038662697);
    span(stat_two_shares(0, 10, 10, 10, .05), 0.6075093504305241, 1);
    /* the formula of Bonett and Price, in NumPy */
    span(stat_paired_shares(10, 2, 50, .05), -0.28853359908075654, -0.019158708611551167);
    span(stat_paired_shares(200, 120, 1319, .05 / 4), -0.09423260063884512, -0.026887762722244975);
    span(stat_paired_shares(0, 0, 0, .05), -1, 1);
}

static double mcnemar(int only_a, int only_b) {
    int d[400] = { 0 }, n = 40;                      /* 40 on which both agree */
    for (int i = 0; i < only_a; i++) d[n++] = -1;
    for (int i = 0; i < only_b; i++) d[n++] = 1;
    return stat_sign_flip(d, n);
}

Test(stat, exact_mcnemar) {                          /* mcnemar(table, exact=True) */
    near(mcnemar(10, 2), 0.03857421875, 1e-12);
    near(mcnemar(0, 6), 0.03125, 1e-12);
    near(mcnemar(30, 45), 0.10534226887460482, 1e-12);
    near(mcnemar(7, 7), 1, 0);
    near(mcnemar(0, 1), 1, 1e-12);
    near(mcnemar(0, 0), 1, 0);
    near(mcnemar(200, 120) / 9.07996856911584e-06, 1, 1e-9);
}

Test(stat, exact_sign_flips) {       /* permutation_test(permutation_type="samples"), all 512 */
    const int d[] = { 3, -1, 2, 0, 2, -4, 4, 1, 1 };
    near(stat_sign_flip(d, 9), 0.3515625, 1e-12);
    const int far[] = { 5, 5, 5, 5 };
    near(stat_sign_flip(far, 4), 2. / 16, 1e-15);
}

Test(stat, means_over_seeds) {
    const double d[] = { .021, -.004, .033, .012, .018 };
    double sd;
    near(stat_paired_t(d, 5, 0), 0.05751340726317396, 1e-12);                  /* ttest_1samp */
    span(stat_paired_mean(d, 5, 0, .05, &sd), -0.0008198501894008565, 0.032819850189400854);
    near(sd, 0.013546217184144066, 1e-15);
    cr_expect(isnan(stat_paired_t(d, 1, 0)));
    cr_expect(isinf(stat_paired_mean(d, 1, 0, .05, &sd).high));
    const double same[] = { .5, .5, .5 }, none[] = { 0, 0, 0 };
    near(stat_paired_t(same, 3, 0), 0, 0);
    near(stat_paired_t(none, 3, 0), 1, 0);
    const double a[] = { .701, .688, .715, .69 }, b[] = { .73, .712, .709, .741 };
    span(stat_two_means(a, 4, 0, b, 4, 0, .05), 0.0003038323667330159, 0.04869616763326714);
}

Test(stat, equal_differences_are_no_certainty) {
    const double same[] = { .05, .05, .05 }, none[] = { 0, 0, 0 };
    double sd;
    /* t = .05 / .03 * sqrt 3, two degrees of freedom: p = 1 - sqrt(t^2 / (t^2 + 2)) */
    const double t2 = .05 * .05 * 3 / (.03 * .03);
    near(stat_paired_t(same, 3, .03), 1 - sqrt(t2 / (t2 + 2)), 1e-12);
    near(stat_paired_t(none, 3, .03), 1, 1e-12);
    const struct stat_span s = stat_paired_mean(same, 3, .03, .05, &sd);
    near(sd, .03, 0);
    near(s.high - .05, 4.302652729911275 * .03 / sqrt(3), 1e-9);
    const double d[] = { .021, -.004, .033, .012, .018 };       /* spread above it: it has no part */
    near(stat_paired_t(d, 5, .013), stat_paired_t(d, 5, 0), 0);
    const struct stat_span two = stat_two_means(none, 3, .03, same, 3, .04, .05);
    cr_expect(two.low < .05 - .05 && two.high > .05 + .05);
    /* several runs widen, one is Wilson's */
    const double shares[] = { .5, .6 };
    const struct stat_span one = stat_mean_share(shares, 1, 100, .05), w = stat_wilson(50, 100, .05);
    near(one.low, w.low, 0);
    near(one.high, w.high, 0);
    const struct stat_span both = stat_mean_share(shares, 2, 100, .05);
    cr_expect(both.low < .1 && both.high > .99);
}

Test(stat, exact_permutation) {      /* permutation_test, all ways */
    const double a[] = { .701, .688, .715, .69 }, b[] = { .73, .712, .709, .741 };
    near(stat_permutation(a, 4, b, 4), 0.08571428571428572, 1e-15);
    const double low[] = { 1, 2, 3 }, high[] = { 4, 5, 6 };
    near(stat_permutation(low, 3, high, 3), .1, 1e-15);
    near(stat_permutation_least(3, 3), .1, 1e-15);
    const double odd[] = { 1, 2, 9 }, five[] = { 4, 5, 6, 7, 8 };
    near(stat_permutation(odd, 3, five, 5), 22. / 56, 1e-15);      /* counted with itertools */
    near(stat_permutation_least(3, 5), 1. / 56, 1e-15);
    /* too many ways for all: draws come near the t test, and the same each time */
    double x[30], y[30];
    for (int i = 0; i < 30; i++) x[i] = sin(i), y[i] = sin(i * 7 + 1) + .3;
    const double p = stat_permutation(x, 30, y, 30);
    near(p, 0.0674, .004);           /* 400,000 draws of SciPy's */
    near(stat_permutation(x, 30, y, 30), p, 0);
}

Test(stat, power) {                  /* nct: t.ppf(.975, n - 1), shift sqrt(n) delta / sd */
    near(stat_paired_t_power(3, .02, .01, .05), 0.4707494312784346, 1e-6);
    near(stat_paired_t_power(5, .01, .015, .05), 0.2113344895460399, 1e-6);
    near(stat_paired_t_power(10, .02, .02, .05), 0.8030968566327219, 1e-6);
    near(stat_paired_t_power(2, .05, .01, .05), 0.42096140914950386, 1e-6);
    near(stat_paired_t_power(100, .003, .01, .05), 0.8439471027374162, 1e-6);
    cr_expect_eq(stat_seeds_needed(.01, .01, .05, .8), 10);
    cr_expect_eq(stat_seeds_needed(.015, .02, .05, .8), 7);
    cr_expect_eq(stat_seeds_needed(.02, .01, .05, .8), 34);
    cr_expect_eq(stat_seeds_needed(.01, .05, .05, .8), 3);
    cr_expect_eq(stat_seeds_needed(1, .001, .05, .8), -1);
    /* Connor's formula, in NumPy */
    near(stat_questions_needed(.2, .01, .05, .8), 15696, 0);
    near(stat_questions_needed(.2, .02, .05, .8), 3923, 0);
    near(stat_questions_needed(.2, .05, .05, .8), 626, 0);
    near(stat_questions_needed(.04, .05, .05, .8), 155, 0);
}
