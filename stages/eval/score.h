/* score.h - the ways to come to a score: from kept answers, from one adapter, or from each scored
 * step of a run.
 *
 * Knows: the learner's notes (adapters/at-NNNNNN.json), which scores a step has, where a score is
 * told. Does not know: how answers are made (examiner.h), kept (book.h) or counted (tally.h).
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_EVAL_SCORE_H
#define QERL_EVAL_SCORE_H
#include "stages/eval/book.h"
#include "stages/eval/examiner.h"

/* Kept answers (eval.answers) again, without a model. 0 or -1. */
int score_again(struct stage *s);
/* One adapter, or the base model, once. 0 or -1. */
int score_once(struct stage *s, struct examiner *x);
/* Every scored step until the last, as the learner comes to it. 0 all, 1 asked to stop, -1. */
int score_run(struct stage *s, struct examiner *x, struct book *b);
#endif
