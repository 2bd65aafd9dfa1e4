/* stat_test.c - see stat.h: tests and how much a test needs.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/stat.h"

#include <math.h>

#include "lib/base/rng.h"
#include "lib/base/str.h"

enum { DEALS_MAX = 1000000, DEALS_DRAWN = 100000, SEEDS_MAX = 10000, SAMPLE_MAX = 4096 };

/* ---- signs ---- */

/* P(X <= k) for X ~ Binomial(n, 1/2) */
static double binomial_half(int k, int n) {
    double sum = 0;
    for (int i = 0; i <= k; i++)
        sum += exp(lgamma(n + 1.) - lgamma(i + 1.) - lgamma(n - i + 1.) - n * M_LN2);
    return sum;
}

/* The distribution of a sum of +-d, one term after another: p[s + total] for the sum s. */
static double flip_tail(const int *d, int n, int total, int seen) {
    const size_t cells = 2 * (size_t)total + 1;
    double *p = mem_alloc(cells * sizeof *p), *next = mem_alloc(cells * sizeof *next), tail = 0;
    p[total] = 1;
    for (int i = 0; i < n; i++) {
        const size_t by = (size_t)abs(d[i]);
        if (!by) continue;
        for (size_t s = 0; s < cells; s++)
            next[s] = .5 * (s >= by ? p[s - by] : 0) + .5 * (s + by < cells ? p[s + by] : 0);
        memcpy(p, next, cells * sizeof *p);
    }
    for (int s = -total; s <= total; s++)
        if (abs(s) >= seen) tail += p[s + total];
    free(p);
    free(next);
    return tail < 1 ? tail : 1;
}

double stat_sign_flip(const int *d, int n) {
    int total = 0, sum = 0, up = 0, down = 0;
    for (int i = 0; i < n; i++) {
        total += abs(d[i]);
        sum += d[i];
        up += d[i] > 0;
        down += d[i] < 0;
    }
    if (sum == 0) return 1;
    if (total > up + down) return flip_tail(d, n, total, abs(sum));
    return fmin(1, 2 * binomial_half(up < down ? up : down, up + down));
}

/* ---- means ---- */

double stat_paired_t(const double *d, int n, double least) {
    double sum = 0, squares = 0;
    if (n < 2) return NAN;
    for (int i = 0; i < n; i++) sum += d[i];
    for (int i = 0; i < n; i++) squares += (d[i] - sum / n) * (d[i] - sum / n);
    const double sd = fmax(sqrt(squares / (n - 1)), least);
    if (sd <= 0) return sum == 0 ? 1 : 0;
    const double t = sum / n / sd * sqrt(n);
    return 2 * stat_t_cdf(-fabs(t), n - 1);
}

static double ways(int na, int nb) {
    return exp(lgamma(na + nb + 1.) - lgamma(na + 1.) - lgamma(nb + 1.));
}

double stat_permutation_least(int na, int nb) { return (na == nb ? 2 : 1) / round(ways(na, nb)); }

/* The next way to choose k of n, in order; false after the last. */
static bool next_choice(int *chosen, int k, int n) {
    int i = k - 1;
    while (i >= 0 && chosen[i] == n - k + i) i--;
    if (i < 0) return false;
    chosen[i]++;
    for (int j = i + 1; j < k; j++) chosen[j] = chosen[j - 1] + 1;
    return true;
}

/* k of n by keyed draws: the first k places of a shuffle. */
static void draw_choice(int *chosen, int *all, int k, int n, uint32_t number) {
    const uint32_t key[2] = { 0x7374u, 0x6174u };
    for (int i = 0; i < n; i++) all[i] = i;
    for (int i = 0; i < k; i++) {
        const uint32_t counter[4] = { number, (uint32_t)i, 0, 0 };
        const uint64_t drawn = rng_philox(counter, key).v[0];
        const int j = i + (int)((drawn * (uint64_t)(n - i)) >> 32);
        const int kept = all[i];
        all[i] = all[j];
        all[j] = kept;
        chosen[i] = all[i];
    }
}

double stat_permutation(const double *a, int na, const double *b, int nb) {
    const int n = na + nb;
    if (na < 1 || nb < 1 || n > SAMPLE_MAX) return NAN;
    double *v = mem_alloc((size_t)n * sizeof *v), sum = 0, sum_a = 0, most = 0;
    int *chosen = mem_alloc((size_t)n * sizeof *chosen), *all = mem_alloc((size_t)n * sizeof *all);
    for (int i = 0; i < n; i++) {
        v[i] = i < na ? a[i] : b[i - na];
        sum += v[i];
        if (fabs(v[i]) > most) most = fabs(v[i]);
        if (i < na) sum_a += v[i], chosen[i] = i;
    }
    /* ties that differ by rounding are ties */
    const double seen = fabs(sum_a / na - (sum - sum_a) / nb) - 1e-12 * most;
    const bool every = ways(na, nb) <= DEALS_MAX;
    int64_t deals = 0, as_far = 0;
    do {
        double other = 0;
        if (!every) draw_choice(chosen, all, na, n, (uint32_t)deals);
        for (int i = 0; i < na; i++) other += v[chosen[i]];
        as_far += fabs(other / na - (sum - other) / nb) >= seen;
        deals++;
    } while (every ? next_choice(chosen, na, n) : deals < DEALS_DRAWN);
    free(v);
    free(chosen);
    free(all);
    /* of drawn deals the seen one is one more */
    return every ? (double)as_far / (double)deals : (double)(as_far + 1) / (double)(deals + 1);
}

/* ---- how much is needed ---- */

double stat_questions_needed(double differ, double delta, double alpha, double power) {
    if (differ < delta) differ = delta;              /* nothing smaller can make that difference */
    const double za = stat_normal_quantile(1 - alpha / 2), zb = stat_normal_quantile(power);
    const double root = za * sqrt(differ) + zb * sqrt(differ - delta * delta);
    return ceil(root * root / (delta * delta));
}

static double normal_cdf(double x) { return .5 * erfc(-x * M_SQRT1_2); }

double stat_paired_t_power(int n, double delta, double sd, double alpha) {
    if (n < 2) return 0;
    if (sd <= 0) return delta > 0 ? 1 : 0;
    const double df = n - 1, t = stat_t_quantile(1 - alpha / 2, df), shift = sqrt(n) * delta / sd;
    /* over s = sqrt(chi-square / df): P(|Z + shift| > t s), Simpson's rule */
    const double log_scale = log(2) + .5 * df * log(.5 * df) - lgamma(.5 * df);
    const int cells = 4000;
    const double from = fmax(0, 1 - 12 / sqrt(2 * df)), to = 1 + 12 / sqrt(2 * df),
                 step = (to - from) / cells;
    double sum = 0;
    for (int i = 0; i <= cells; i++) {
        const double s = from + i * step;
        if (s <= 0 && df > 1) continue;
        const double density = exp(log_scale + (df > 1 ? (df - 1) * log(s) : 0) - .5 * df * s * s);
        const double beyond = normal_cdf(shift - t * s) + normal_cdf(-shift - t * s);
        sum += (i == 0 || i == cells ? 1 : i % 2 ? 4 : 2) * density * beyond;
    }
    return sum * step / 3;
}

int stat_seeds_needed(double sd, double delta, double alpha, double power) {
    int low = 1, high = 2;
    while (high <= SEEDS_MAX && stat_paired_t_power(high, delta, sd, alpha) < power) {
        low = high;
        high *= 2;
    }
    if (high > SEEDS_MAX) return -1;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (stat_paired_t_power(middle, delta, sd, alpha) < power) low = middle;
        else high = middle;
    }
    return high;
}
