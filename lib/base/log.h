/* log.h - talk to stderr, one line an event: "hh:mm:ss level name: text".
 * Results go to stdout by the programs themselves. `log_name` is the program's or stage's name.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_LOG_H
#define QERL_LOG_H
#include "lib/base/sys.h"

enum log_level { LOG_LEVEL_DEBUG, LOG_LEVEL_INFO, LOG_LEVEL_WARN, LOG_LEVEL_ERROR };

void log_open(const char *log_name, enum log_level least);   /* keeps the pointer */
void log_at(enum log_level level, const char *fmt, ...) PRINTF_LIKE(2, 3);
#define log_debug(...) log_at(LOG_LEVEL_DEBUG, __VA_ARGS__)
#define log_info(...)  log_at(LOG_LEVEL_INFO, __VA_ARGS__)
#define log_warn(...)  log_at(LOG_LEVEL_WARN, __VA_ARGS__)
#define log_error(...) log_at(LOG_LEVEL_ERROR, __VA_ARGS__)
#endif
