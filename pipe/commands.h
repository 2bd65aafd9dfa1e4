/* commands.h - one function per command of qerl-pipe; each returns the exit code and prints its own
 * errors.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_COMMANDS_H
#define QERL_COMMANDS_H
#include "lib/base/err.h"

enum { WORDS_MAX = 200, SETS_MAX = 256 };
struct command_line {
    const char *word[WORDS_MAX]; int words;      /* after the command's name */
    const char *set[SETS_MAX]; int sets;         /* of --set */
    const char *rule, *runs_dir;                 /* --rule, --runs */
    const char *align, *picture;                 /* --align, --picture */
    const char *seeds, *sweep;                   /* --seeds, --sweep */
    const char *noise, *quant, *n, *step;        /* --noise, --quant, --n, --step */
    bool follow, force, json, markdown;          /* -f; --force, --force-different */
    bool tiny, noisy;                            /* --tiny, --noisy */
    char **argv;
};
int command_run(const struct command_line *c);
int command_check(const struct command_line *c);
int command_resume(const struct command_line *c);
int command_describe(const struct command_line *c);
int command_status(const struct command_line *c);
int command_logs(const struct command_line *c);
int command_stop(const struct command_line *c);
int command_rescore(const struct command_line *c);
int command_compare(const struct command_line *c);
int command_eval(const struct command_line *c);
int command_matrix(const struct command_line *c);
int command_doctor(const struct command_line *c);

/* One line on stderr, "qerl-pipe: text"; returns the error's code, or `code` where it has none. */
int complain_once(const struct err *e, int code);
#endif
