/* book.h - what the evaluator keeps in a run folder: every answer (tape/answers.tape), every score
 * (scores.jsonl), samples.md.
 *
 * Idempotent per step: answers of a step are written as one durable batch, then the score line. A
 * batch cut short by a kill is dropped and asked again; a whole batch without its line is scored
 * from the answers.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_BOOK_H
#define QERL_BOOK_H
#include "stages/eval/tally.h"

struct book;
int book_open(struct book **out, const struct eval_conf *c, int64_t answers_per_step,
              struct err *e);
void book_close(struct book **b);
bool book_has_score(const struct book *b, int64_t step);
/* Tally of the kept answers of a step, or NULL. */
const struct tally *book_answers(const struct book *b, int64_t step);
int book_keep_answers(struct book *b, const struct rec *answer, int64_t n, struct err *e);
int book_keep_score(struct book *b, const struct rec *score, struct err *e);
/* Rewrites samples.md: the first `shown` questions of each kept step, side by side. */
int book_write_samples(struct book *b, struct err *e);
#endif
