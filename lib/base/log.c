/* log.c - see log.h. One write(2) a line, so that lines of several processes do not mix.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/log.h"

#include <stdarg.h>
#include <time.h>
#include <unistd.h>

static const char *name = "qerl";
static enum log_level least_shown = LOG_LEVEL_INFO;

void log_open(const char *log_name, enum log_level least) {
    name = log_name;
    least_shown = least;
}

void log_at(enum log_level level, const char *fmt, ...) {
    static const char *const word[] = { "debug", "info", "warning", "error" };
    if (level < least_shown) return;
    char line[4400];
    struct tm tm;
    time_t now = time(NULL);
    localtime_r(&now, &tm);
    int n = snprintf(line, sizeof line, "%02d:%02d:%02d %s %s: ", tm.tm_hour, tm.tm_min, tm.tm_sec,
                     word[level], name);
    va_list ap;
    va_start(ap, fmt);
    int m = vsnprintf(line + n, sizeof line - (size_t)n - 1, fmt, ap);
    va_end(ap);
    size_t len = (size_t)n + (m < 0 ? 0 : (size_t)m);
    if (len > sizeof line - 2) len = sizeof line - 2;
    line[len++] = '\n';
    if (write(STDERR_FILENO, line, len) < 0) return;   /* nowhere left to complain */
}
