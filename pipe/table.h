/* table.h - a small table for people: aligned text, or markdown.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_TABLE_H
#define QERL_TABLE_H
#include "lib/base/str.h"

struct table {
    int columns, cells;                      /* cells of the head included */
    unsigned left;                           /* bit i: column i is text, aligned to the left */
    char **cell;
};
/* head: names of the columns, "step|accuracy|..."; a name that begins with '<' is of a text. */
void table_init(struct table *t, const char *head);
void table_release(struct table *t);
/* The next cell, row by row; ASCII. */
void table_cell(struct table *t, const char *fmt, ...) PRINTF_LIKE(2, 3);
/* Text is indented by two blanks. A last row that is not full is filled up. */
void table_print(struct table *t, bool markdown, FILE *to);
#endif
