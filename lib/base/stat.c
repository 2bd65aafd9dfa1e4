/* stat.c - see stat.h: distributions and intervals. The tests are in stat_test.c.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/stat.h"

#include <math.h>

/* Inverse of the normal distribution by bisection on erfc: slow, exact to the last digits. */
double stat_normal_quantile(double p) {
    double low = -40, high = 40;
    for (int i = 0; i < 200; i++) {
        const double middle = .5 * (low + high);
        if (.5 * erfc(-middle * M_SQRT1_2) < p) low = middle;
        else high = middle;
    }
    return .5 * (low + high);
}

/* Regularised incomplete beta I_x(a, b), by its continued fraction (Lentz), x <= (a+1)/(a+b+2). */
static double beta_fraction(double x, double a, double b) {
    const double tiny = 1e-300;
    double c = 1, d = 1 - (a + b) * x / (a + 1);
    d = 1 / (fabs(d) < tiny ? tiny : d);
    double f = d;
    for (int m = 1; m <= 500; m++) {
        const double even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
                     odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1));
        d = 1 + even * d;
        c = 1 + even / c;
        d = 1 / (fabs(d) < tiny ? tiny : d);
        if (fabs(c) < tiny) c = tiny;
        f *= c * d;
        d = 1 + odd * d;
        c = 1 + odd / c;
        d = 1 / (fabs(d) < tiny ? tiny : d);
        if (fabs(c) < tiny) c = tiny;
        f *= c * d;
        if (fabs(c * d - 1) < 1e-16) break;
    }
    return exp(a * log(x) + b * log1p(-x) + lgamma(a + b) - lgamma(a) - lgamma(b)) * f / a;
}

static double beta_share(double x, double a, double b) {
    if (x <= 0) return 0;
    if (x >= 1) return 1;
    return x <= (a + 1) / (a + b + 2) ? beta_fraction(x, a, b) : 1 - beta_fraction(1 - x, b, a);
}

double stat_t_cdf(double t, double df) {
    const double tail = .5 * beta_share(df / (df + t * t), .5 * df, .5);
    return t > 0 ? 1 - tail : tail;
}

double stat_t_quantile(double p, double df) {
    if (p < .5) return -stat_t_quantile(1 - p, df);
    double low = 0, high = 1;
    while (1 - stat_t_cdf(high, df) > 1 - p && high < 1e12) high *= 2;
    for (int i = 0; i < 200; i++) {
        const double middle = .5 * (low + high);
        if (stat_t_cdf(middle, df) < p) low = middle;
        else high = middle;
    }
    return .5 * (low + high);
}

struct stat_span stat_wilson(int64_t right, int64_t n, double alpha) {
    struct stat_span s = { 0, 1 };
    if (n <= 0) return s;
    const double z = stat_normal_quantile(1 - alpha / 2);
    const double p = (double)right / (double)n, m = (double)n;
    const double middle = (p + z * z / (2 * m)) / (1 + z * z / m);
    const double half = z / (1 + z * z / m) * sqrt(p * (1 - p) / m + z * z / (4 * m * m));
    s.low = right == 0 ? 0 : middle - half;
    s.high = right == n ? 1 : middle + half;
    return s;
}

void stat_interval(int64_t right, int64_t n, double *low, double *high) {
    const struct stat_span s = stat_wilson(right, n, .05);
    *low = s.low;
    *high = s.high;
}

struct stat_span stat_two_shares(int64_t right_a, int64_t n_a, int64_t right_b, int64_t n_b,
                                 double alpha) {
    if (n_a <= 0 || n_b <= 0) return (struct stat_span){ -1, 1 };
    const struct stat_span a = stat_wilson(right_a, n_a, alpha),
                           b = stat_wilson(right_b, n_b, alpha);
    const double pa = (double)right_a / (double)n_a, pb = (double)right_b / (double)n_b;
    return (struct stat_span){ pb - pa - hypot(pb - b.low, a.high - pa),
                               pb - pa + hypot(b.high - pb, pa - a.low) };
}

struct stat_span stat_paired_shares(int64_t only_a, int64_t only_b, int64_t n, double alpha) {
    if (n <= 0) return (struct stat_span){ -1, 1 };
    const double z = stat_normal_quantile(1 - alpha / 2), m = (double)n + 2;
    const double a = ((double)only_a + 1) / m, b = ((double)only_b + 1) / m;
    const double half = z * sqrt((a + b - (b - a) * (b - a)) / m);
    const double low = b - a - half, high = b - a + half;
    return (struct stat_span){ low < -1 ? -1 : low, high > 1 ? 1 : high };
}

static double mean_of(const double *v, int n, double *variance) {
    double sum = 0, squares = 0;
    for (int i = 0; i < n; i++) sum += v[i];
    for (int i = 0; i < n; i++) squares += (v[i] - sum / n) * (v[i] - sum / n);
    *variance = n > 1 ? squares / (n - 1) : INFINITY;
    return sum / n;
}

struct stat_span stat_paired_mean(const double *d, int n, double least, double alpha, double *sd) {
    double variance;
    const double mean = n > 0 ? mean_of(d, n, &variance) : 0;
    if (n < 2) {
        *sd = INFINITY;
        return (struct stat_span){ -INFINITY, INFINITY };
    }
    *sd = fmax(sqrt(variance), least);
    const double half = stat_t_quantile(1 - alpha / 2, n - 1) * *sd / sqrt(n);
    return (struct stat_span){ mean - half, mean + half };
}

struct stat_span stat_two_means(const double *a, int na, double least_a, const double *b, int nb,
                                double least_b, double alpha) {
    double va, vb;
    if (na < 2 || nb < 2) return (struct stat_span){ -INFINITY, INFINITY };
    const double difference = -mean_of(a, na, &va) + mean_of(b, nb, &vb);
    const double ea = fmax(va, least_a * least_a) / na, eb = fmax(vb, least_b * least_b) / nb;
    if (ea + eb <= 0) return (struct stat_span){ difference, difference };
    const double df = (ea + eb) * (ea + eb) / (ea * ea / (na - 1) + eb * eb / (nb - 1));
    const double half = stat_t_quantile(1 - alpha / 2, df) * sqrt(ea + eb);
    return (struct stat_span){ difference - half, difference + half };
}

struct stat_span stat_mean_share(const double *share, int n, int64_t questions, double alpha) {
    double variance, sd;
    const double mean = mean_of(share, n, &variance);
    struct stat_span span = stat_wilson(llround(mean * (double)questions), questions, alpha);
    if (n < 2) return span;
    const struct stat_span runs = stat_paired_mean(share, n, 0, alpha, &sd);
    span.low = fmax(0, mean - hypot(mean - span.low, mean - runs.low));
    span.high = fmin(1, mean + hypot(span.high - mean, runs.high - mean));
    return span;
}
