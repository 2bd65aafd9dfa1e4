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

static double seconds_of(struct kern *k, void (*fn)(void *), void *arg, int calls, struct err *e) {
    double begun = clock_seconds();
    for (int i = 0; i < calls; i++) fn(arg);
    if (k && k->sync(k, e) < 0) return -1;
    return (clock_seconds() - begun) / calls;
}

struct spread timing_on(struct kern *k, void (*fn)(void *arg), void *arg, double seconds,
                        struct err *e) {
    const double sample_seconds = 2e-3;
    const struct spread none = { 0 };
    double v[TIMING_REPEATS_MAX], warm = seconds_of(k, fn, arg, 1, e), spent = 0;
    if (warm < 0) return none;
    if (warm > 4 * seconds) return spread_of(&warm, 1);
    /* the first call pays for pages and caches: the second says how many make a sample */
    if (warm < sample_seconds) warm = seconds_of(k, fn, arg, 1, e);
    double per = sample_seconds / (warm > 1e-9 ? warm : 1e-9);
    int calls = per < 1 ? 1 : per > 1e6 ? 1000000 : (int)per, least = warm > seconds ? 2 : 3, n = 0;
    while (n < TIMING_REPEATS_MAX && (n < least || spent < seconds)) {
        v[n] = seconds_of(k, fn, arg, calls, e);
        if (v[n] < 0) return none;
        spent += v[n++] * calls;
    }
    return spread_of(v, n);
}

/* ---- kept calls ---- */

enum { KEPT_CALLS = 16, KEPT_KEY = 1 };              /* no net's key is so small */
static const double kept_longest_seconds = 4e-3;

static void replay(void *arg) {
    struct kern *k = arg;
    const bool there = k->replay(k, KEPT_KEY);
    assert(there || *k->latched.text);
    (void)there;
}

struct spread timing_kept(struct kern *k, void (*fn)(void *arg), void *arg, double seconds,
                          bool *kept, struct err *e) {
    const struct spread none = { 0 };
    *kept = false;
    if (!k->record) return timing_on(k, fn, arg, seconds, e);
    double once = seconds_of(k, fn, arg, 1, e);      /* its memory grows now or never */
    if (once >= 0) once = seconds_of(k, fn, arg, 1, e);
    if (once < 0) return none;
    if (once < kept_longest_seconds) {
        k->record(k);
        for (int i = 0; i < KEPT_CALLS; i++) fn(arg);
        *kept = k->keep(k, KEPT_KEY);
    }
    if (!*kept) return timing_on(k, fn, arg, seconds, e);
    const struct spread s = timing_on(k, replay, k, seconds, e);
    k->forget(k);
    return spread_times(s, 1. / KEPT_CALLS);
}

struct spread timing_of(void (*fn)(void *arg), void *arg, double seconds) {
    return timing_on(NULL, fn, arg, seconds, NULL);
}
