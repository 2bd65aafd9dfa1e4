/* tail.h - a growing text file, line by line, while another program writes it.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_TAIL_H
#define QERL_TAIL_H
#include "lib/base/str.h"

struct tail {
    char path[1024];
    int64_t read_bytes;                      /* so far */
    struct str part, line;                   /* an unfinished line waits in part */
};
/* the file may not exist yet */
void tail_open(struct tail *t, const char *path, bool from_end);
/* 1 and t->line (without '\n') if a whole line has come, else 0. A file that became shorter is
 * followed from its new end. */
int tail_next(struct tail *t);
void tail_close(struct tail *t);
/* The last `lines` lines of a file, each with `before` in front of it. */
void tail_last(const char *path, int lines, const char *before, FILE *to);
#endif
