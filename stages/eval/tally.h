/* tally.h - from kept answers to a score: a pure function of the answers and the rule, so any score
 * can be made again without a model.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_TALLY_H
#define QERL_TALLY_H
#include "lib/wire/rec.h"
#include "stages/eval/conf.h"

/* Answers of one (run, step, quant, noise), in any order. */
struct tally {
    char *run, *split, *quant, *noise;
    int64_t version, step, n, right, parsed, right_strict, right_flexible, tokens, truncated;
    uint64_t texts;                  /* sum over answers of a checksum of question, k and text */
};
struct tally_set { struct tally *t; int n; };
void tally_release(struct tally_set *s);
/* Adds one answer to its row, made where new; rule decides `right` and `parsed`. */
void tally_add(struct tally_set *s, const struct rec_answer *a, enum task_rule rule);
/* The score record of a row; strings are lent by the row. */
void tally_score(struct rec *out, const struct tally *t, enum task_rule rule);
/* One line for people; who = NULL or "" names the policy by its step: "step 200  test  171 of 512 =
 *                                         33.4 % [29.4, 37.6]  rule strict  mxfp4, noise none
 *                                                              ...". */
void tally_line(struct str *out, const struct rec_score *s, const char *who);
#endif
