/* str.c - see str.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/str.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>

void *mem_alloc(size_t bytes) {
    void *p = calloc(1, bytes ? bytes : 1);
    if (!p) {
        fprintf(stderr, "error: out of memory: %zu bytes asked for\n", bytes);
        exit(EXIT_ENV);
    }
    return p;
}

void *mem_grow(void *p, size_t bytes) {
    void *q = realloc(p, bytes ? bytes : 1);
    if (!q) {
        fprintf(stderr, "error: out of memory: %zu bytes asked for\n", bytes);
        exit(EXIT_ENV);
    }
    return q;
}

char *mem_dup(const char *text) {
    size_t n = strlen(text) + 1;
    return memcpy(mem_alloc(n), text, n);
}

void str_init(struct str *b) { *b = (struct str){ 0 }; }

void str_release(struct str *b) {
    free(b->s);
    str_init(b);
}

void str_clear(struct str *b) {
    b->len = 0;
    if (b->s) b->s[0] = 0;
}

static void reserve(struct str *b, size_t more) {
    if (b->len + more + 1 <= b->cap) return;
    size_t cap = b->cap ? b->cap : 64;
    while (cap < b->len + more + 1) cap *= 2;
    b->s = mem_grow(b->s, cap);
    b->cap = cap;
}

void str_add(struct str *b, const void *data, size_t bytes) {
    reserve(b, bytes);
    if (bytes) memcpy(b->s + b->len, data, bytes);
    b->len += bytes;
    b->s[b->len] = 0;
}

void str_puts(struct str *b, const char *text) { str_add(b, text, strlen(text)); }

void str_printf(struct str *b, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(NULL, 0, fmt, ap);
    va_end(ap);
    if (n < 0) return;
    reserve(b, (size_t)n);
    va_start(ap, fmt);
    vsnprintf(b->s + b->len, (size_t)n + 1, fmt, ap);
    va_end(ap);
    b->len += (size_t)n;
}

bool str_starts(const char *text, const char *prefix) {
    return strncmp(text, prefix, strlen(prefix)) == 0;
}

bool str_ends(const char *text, const char *suffix) {
    size_t n = strlen(text), m = strlen(suffix);
    return n >= m && memcmp(text + n - m, suffix, m) == 0;
}

bool str_to_i64(const char *text, int64_t *out) {
    char *end;
    if (!((*text >= '0' && *text <= '9') || *text == '-')) return false;
    errno = 0;
    long long v = strtoll(text, &end, 10);
    if (end == text || *end || errno) return false;
    *out = v;
    return true;
}

bool str_to_f64(const char *text, double *out) {
    char *end;
    if (!((*text >= '0' && *text <= '9') || *text == '-' || *text == '.')) return false;
    errno = 0;
    double v = strtod(text, &end);
    if (end == text || *end || !isfinite(v)) return false;
    *out = v;
    return true;
}

bool utf8_valid(const void *data, size_t bytes) {
    const uint8_t *p = data, *end = p + bytes;
    while (p < end) {
        if (*p < 0x80) {
            p++;
            continue;
        }
        int more = *p >= 0xF0 ? 3 : *p >= 0xE0 ? 2 : 1;
        if (*p < 0xC2 || *p > 0xF4 || end - p <= more) return false;
        if (*p == 0xE0 && p[1] < 0xA0) return false;
        if (*p == 0xED && p[1] > 0x9F) return false;
        if (*p == 0xF0 && p[1] < 0x90) return false;
        if (*p == 0xF4 && p[1] > 0x8F) return false;
        for (int i = 1; i <= more; i++)
            if ((p[i] & 0xC0) != 0x80) return false;
        p += more + 1;
    }
    return true;
}

static size_t distance(const char *a, const char *b) {
    size_t n = strlen(a), m = strlen(b), row[65];
    if (n > 64 || m > 64) return 99;
    for (size_t j = 0; j <= m; j++) row[j] = j;
    for (size_t i = 1; i <= n; i++) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= m; j++) {
            size_t best = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            if (row[j] + 1 < best) best = row[j] + 1;
            if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
            row[j] = best;
        }
    }
    return row[m];
}

const char *str_nearest(const char *word, const char *const *names, size_t n) {
    const char *best = NULL;
    size_t best_distance = 4;
    for (size_t i = 0; i < n; i++) {
        size_t d = distance(word, names[i]);
        if (d < best_distance && d < strlen(word)) {
            best = names[i];
            best_distance = d;
        }
    }
    return best;
}
