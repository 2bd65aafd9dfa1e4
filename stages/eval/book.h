/* book.h - what the evaluator keeps in a run folder: every answer (tape/answers.tape), every score
 * (scores.jsonl), samples.md.
 *
 * Idempotent per step and noise: the answers are written as one durable batch, then the score
 * lines of a step in one. A batch cut short by a kill is dropped and asked again; a whole batch
 * without its line is scored from the answers.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_BOOK_H
#define QERL_BOOK_H
#include "stages/eval/tally.h"

struct book;
int book_open(struct book **out, const struct eval_conf *c, int64_t answers_per_step,
              struct err *e);
void book_close(struct book **b);
bool book_has_score(const struct book *b, int64_t step, const char *noise);
/* Tally of the kept answers of a step under that noise, or NULL. */
const struct tally *book_answers(const struct book *b, int64_t step, const char *noise);
int book_keep_answers(struct book *b, const struct rec *answer, int64_t n, struct err *e);
/* The scores of a step, together: who waits for one finds all. */
int book_keep_scores(struct book *b, const struct rec *score, int n, struct err *e);
/* Rewrites samples.md: the first `shown` questions of each kept step, side by side. */
int book_write_samples(struct book *b, struct err *e);
#endif
