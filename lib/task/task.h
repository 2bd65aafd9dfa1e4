/* task.h - what a question, a prompt and a right answer are: GSM8K.
 *
 * One place for rules that rollout, reward, learner and evaluator must share, so that training and
 * evaluation cannot score or prompt differently. Rules work on the answer's text alone; they never
 * see a model. "Character" is a Unicode code point (a byte that is not valid UTF-8 counts as one);
 * digits are ASCII.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_TASK_H
#define QERL_TASK_H
#include "lib/base/err.h"
#include "lib/base/hash.h"
#include "lib/base/str.h"

enum { TASK_LINE_BYTES_MAX = 1 << 20, TASK_QUESTIONS_MAX = 10000000 };

struct task_question {
    char *question;
    char *gold;                      /* text after the last "#### ", commas removed */
};
struct task_set {
    struct task_question *q;
    int n;
    char split[16];                  /* "train", "test": begins every question id, "test:17" */
    char sha256[SHA256_HEX];         /* of the file */
};
/* Reads JSON lines {"question": ..., "answer": "... #### 42"}. An absent file is EXIT_ENV; a
 * malformed line, a missing field or an answer without "#### " is EXIT_ENV too and names file:line.
 * first_n > 0 keeps only the first questions. */
int task_load(struct task_set *s, const char *path, const char *split, int first_n, struct err *e);
void task_release(struct task_set *s);

/* The user message of a question: the question, a space, the instruction (verl's wording). */
void task_user_message(struct str *out, const char *question);

enum task_rule {
    TASK_RULE_STRICT,
    TASK_RULE_FLEXIBLE,
    TASK_RULE_LM_STRICT,
    TASK_RULE_LM_FLEXIBLE,
    TASK_RULE_COUNT
};
extern const char
    *const task_rule_name[TASK_RULE_COUNT]; /* "strict", "flexible", "lm-strict", "lm-flexible" */
/* strict       last 300 characters, last "#### <-?[0-9.,]+>", commas and dollars dropped, compared
 *              as text
 * flexible     last 300 characters, last -?[0-9.,]+ that is not ".", compared as it stands
 * lm-strict    whole text, first "#### <-?[0-9.,]+>"; lm-flexible: last
 *              (-?[$0-9.,]{2,})|(-?[0-9]+); both drop commas, dollars
 *              and one final full stop (lm-evaluation-harness)
 * True when the answer read equals gold. extracted (or NULL) receives it, "" when nothing was
 * found. */
bool task_right(enum task_rule rule, const char *text, const char *gold, struct str *extracted);

/* Overlong shaping: 0 up to new_max - buffer tokens, then linear down to -factor at new_max. buffer
 * 0 = off. */
double task_overlong(int64_t tokens, int64_t new_max, int64_t buffer, double factor);

/* Unbiased pass@k from n samples of which c were right: 1 - C(n-c, k) / C(n, k). */
double task_pass_at(int n, int c, int k);

/* Order of the questions: position `index` of the endless stream of epochs, each a fresh
 * permutation keyed by (seed, epoch). */
struct task_order {
    uint64_t seed;
    int n;
    int64_t epoch;                   /* of perm; -1 = none yet */
    int *perm;
};
void task_order_init(struct task_order *o, uint64_t seed, int n);
void task_order_release(struct task_order *o);
int task_order_at(struct task_order *o, int64_t index);
#endif
