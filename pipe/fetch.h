/* fetch.h - what tools/fetch could bring for a file that is not there: its table,
 * tools/fetch.table, read as data.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_FETCH_H
#define QERL_FETCH_H
#include "lib/base/str.h"

struct fetch_row {
    char name[64], status[16], sha256[65];
    int64_t bytes, lines;                    /* -1 = not known */
};
/* The row of `path`, a file or a whole folder of the table (then bytes and lines are -1). False:
 * tools/fetch has not got it. */
bool fetch_find(struct fetch_row *r, const char *path);
/* How to get `path`, a sentence: "tools/fetch gsm8k (7473 lines, ...)", or what to set where no
 * fetch would help. `asked` is what the stage said. */
void fetch_hint(struct str *out, const char *path, const char *role, const char *asked);
#endif
