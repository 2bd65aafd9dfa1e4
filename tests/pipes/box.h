/* box.h - a folder of its own for one test of the launcher: fake stages in it, the real qerl-pipe
 * on its PATH.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_TEST_BOX_H
#define QERL_TEST_BOX_H
#include "lib/base/str.h"

#include <criterion/criterion.h>

extern struct str box_out, box_talk;         /* stdout and stderr of the last box_run */
/* makes the folder and works in it; stages are bin/qerl-NAME */
void box_open(void);
void box_close(void);
void box_file(const char *name, const char *text);
/* Runs a shell command; returns its exit code. "qerl-pipe" is the one built beside this test. */
int box_run(const char *fmt, ...) PRINTF_LIKE(1, 2);
char *box_read(const char *name); /* whole file, lent until the next call; "" if absent */
/* A pipeline of four fake stages, with `extra` lines at its end; learner_do and eval_do are shell
 * commands. */
void box_pipeline(const char *name, const char *learner_do, const char *eval_do, const char *extra);

#define box_expect(code, ...)                                                                      \
    do {                                                                                           \
        int box_rc = box_run(__VA_ARGS__);                                                         \
        cr_assert_eq(box_rc, code, "exit code %d, not %d\nstdout: %s\nstderr: %s", box_rc, code,   \
                     box_out.s, box_talk.s);                                                       \
    } while (0)
#define box_has(where, text) cr_assert(strstr((where), (text)), "no '%s' in:\n%s", (text), (where))
#define box_lacks(where, text) cr_assert(!strstr((where), (text)), "unexpected '%s' in:\n%s", (text), (where))
#endif
