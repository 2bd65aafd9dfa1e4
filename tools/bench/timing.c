/* timing.c - see timing.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tools/bench/timing.h"

#include "lib/base/clock.h"

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

struct spread spread_of(double *v, int n) {
    if (n <= 0) return (struct spread){ 0 };
    qsort(v, (size_t)n, sizeof *v, by_value);
    double middle = n % 2 ? v[n / 2] : (v[n / 2 - 1] + v[n / 2]) / 2;
    return (struct spread){ middle, v[0], v[n - 1], n };
}

struct spread spread_rate(struct spread s, double amount) {
    if (s.n == 0) return s;
    return (struct spread){ amount / s.median, amount / s.max, amount / s.min, s.n };
}

struct spread spread_times(struct spread s, double factor) {
    return (struct spread){ s.median * factor, s.min * factor, s.max * factor, s.n };
}

static double seconds_of(void (*fn)(void *), void *arg, int calls) {
    double begun = clock_seconds();
    for (int i = 0; i < calls; i++) fn(arg);
    return (clock_seconds() - begun) / calls;
}

struct spread timing_of(void (*fn)(void *arg), void *arg, double seconds) {
    const double sample_seconds = 2e-3;
    double v[TIMING_REPEATS_MAX], warm = seconds_of(fn, arg, 1), spent = 0;
    if (warm > 4 * seconds) return spread_of(&warm, 1);
    /* the first call pays for pages and caches: the second says how many make a sample */
    if (warm < sample_seconds) warm = seconds_of(fn, arg, 1);
    double per = sample_seconds / (warm > 1e-9 ? warm : 1e-9);
    int calls = per < 1 ? 1 : per > 1e6 ? 1000000 : (int)per, least = warm > seconds ? 2 : 3, n = 0;
    while (n < TIMING_REPEATS_MAX && (n < least || spent < seconds)) {
        v[n] = seconds_of(fn, arg, calls);
        spent += v[n++] * calls;
    }
    return spread_of(v, n);
}
