/* err.c - see err.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/err.h"

#include <stdarg.h>

static int set(struct err *e, int code, const char *fmt, va_list ap) {
    if (!e) return -1;
    if (code) e->code = code;
    vsnprintf(e->text, sizeof e->text, fmt, ap);
    return -1;
}

int err_set(struct err *e, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    set(e, 0, fmt, ap);
    va_end(ap);
    return -1;
}

int err_code(struct err *e, int code, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    set(e, code, fmt, ap);
    va_end(ap);
    return -1;
}

int err_more(struct err *e, int code, const char *fmt, ...) {
    if (!e) return -1;
    e->code = code;
    size_t used = strlen(e->text);
    if (used && used + 1 < sizeof e->text) e->text[used++] = '\n';
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(e->text + used, sizeof e->text - used, fmt, ap);
    va_end(ap);
    return -1;
}

int err_wrap(struct err *e, const char *fmt, ...) {
    if (!e) return -1;
    char old[ERR_TEXT_MAX];
    memcpy(old, e->text, sizeof old);
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(e->text, sizeof e->text, fmt, ap);
    va_end(ap);
    if (n < 0) n = 0;
    if ((size_t)n < sizeof e->text &&
        snprintf(e->text + n, sizeof e->text - (size_t)n, ": %s", old) < 0)
        e->text[n] = 0;
    return -1;
}

int err_at(struct err *e, const char *file, int line, const char *fmt, ...) {
    if (!e) return -1;
    size_t used = strlen(e->text);
    int n = snprintf(e->text + used, sizeof e->text - used, "%s%s:%d: ", used ? "\n" : "", file,
                     line);
    if (n > 0) used += (size_t)n;
    if (used >= sizeof e->text) return -1;
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(e->text + used, sizeof e->text - used, fmt, ap);
    va_end(ap);
    return -1;
}
