/* err.h - one failure of the outside world, as a sentence.
 *
 * Functions that can fail take `struct err *e` last and return -1 (or NULL) after err_set. Callers
 * that know more wrap it: "cannot load adapter 'x': file is shorter than its header says". Only
 * main and the stage loop print. `e` may be NULL where the caller does not care.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_ERR_H
#define QERL_ERR_H
#include "lib/base/sys.h"

enum { ERR_TEXT_MAX = 4096 };

struct err {
    /* exit code this failure deserves (enum exit_code), 0 = unset: the caller decides */
    int code;
    char text[ERR_TEXT_MAX];   /* "" = no failure yet */
};

/* All return -1, so `return err_set(e, ...)` reads well. */
int err_set(struct err *e, const char *fmt, ...) PRINTF_LIKE(2, 3);
/* err_set + exit code */
int err_code(struct err *e, int code, const char *fmt, ...) PRINTF_LIKE(3, 4);
int err_wrap(struct err *e, const char *fmt, ...) PRINTF_LIKE(2, 3); /* prefix "fmt: old text" */
/* appends a line + exit code */
int err_more(struct err *e, int code, const char *fmt, ...) PRINTF_LIKE(3, 4);
/* Appends a line "file:line: message"; used by readers that report every error in one pass. */
int err_at(struct err *e, const char *file, int line, const char *fmt, ...) PRINTF_LIKE(4, 5);
#endif
