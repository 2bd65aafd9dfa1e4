/* str.h - a growing byte string, and the few string helpers that C lacks.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_STR_H
#define QERL_STR_H
#include "lib/base/err.h"

/* Always NUL-terminated once anything was added; may hold NULs. Out of memory ends the program with
 * a message: strings here are small, and no caller could do better. */
struct str {
    char *s;
    size_t len, cap;
};
void str_init(struct str *b);                       /* allocates nothing */
void str_release(struct str *b);
void str_clear(struct str *b);                      /* keeps the memory */
void str_add(struct str *b, const void *data, size_t bytes);
void str_puts(struct str *b, const char *text);
void str_printf(struct str *b, const char *fmt, ...) PRINTF_LIKE(2, 3);

/* malloc, realloc and strdup that cannot return NULL: out of memory prints one line and exits with
 * EXIT_ENV. */
void *mem_alloc(size_t bytes);                      /* zeroed */
void *mem_grow(void *p, size_t bytes);
char *mem_dup(const char *text);

bool str_starts(const char *text, const char *prefix);
bool str_ends(const char *text, const char *suffix);
/* whole text, decimal; false on anything else */
bool str_to_i64(const char *text, int64_t *out);
bool str_to_f64(const char *text, double *out);     /* whole text, finite */
bool utf8_valid(const void *data, size_t bytes);    /* strict: no surrogates, no overlong forms */
/* Edit distance for "did you mean"; nearest of names[n] within distance 3 (and less than the word's
 * length), or NULL. */
const char *str_nearest(const char *word, const char *const *names, size_t n);
#endif
