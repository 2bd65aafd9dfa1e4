/* examiner.h - asks a policy the test questions: one adapter in, one answer record per question and
 * sample out.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_EXAMINER_H
#define QERL_EXAMINER_H
#include "lib/wire/rec.h"
#include "stages/eval/conf.h"

struct examiner;
struct gen_opts examiner_gen_opts(const struct eval_conf *c, const struct lora_shape *shape);
struct examiner *examiner_create(struct stage *s);       /* model, questions; NULL with s->err */
void examiner_destroy(struct examiner **x);
/* Answers of all questions under the adapter in `dir` ("" = base), clean; ordered by question and
 * sample, owned by the caller (rec_release each, free). sha256 not "" must be the adapter's. 0, 1
 * asked to stop, -1. */
int examiner_ask(struct examiner *x, const char *dir, const char *sha256, int64_t version,
                 int64_t step, struct rec **answer, int64_t *count);
int64_t examiner_answers(const struct examiner *x);      /* per scored step */
/* What a score says besides its numbers: hashes, sampling. Lends. */
void examiner_label(const struct examiner *x, struct rec_score *s);
#endif
