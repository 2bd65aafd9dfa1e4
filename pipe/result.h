/* result.h - one finished experiment as a comparison sees it, read from its run folder alone: what
 * it was told, what was scored, which question was answered right, what each step had cost by then.
 * Or a curve of the study (pipelines/reference/NAME.tsv), which has scores and nothing else.
 *
 * Ownership: all of it lives until result_release.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_RESULT_H
#define QERL_RESULT_H
#include "pipe/folder.h"
#include "pipe/scores.h"

enum { QUESTION_BYTES = 64 };
struct point {                               /* after a completed step */
    int64_t step;
    double reward;                           /* NAN = not known */
    double prompts, tokens;                  /* since the run began; NAN = not known */
};
struct mark {                                /* one answer of one score */
    int64_t step, k;
    bool right;
    char question[QUESTION_BYTES];
};
/* A larger share of B that quant.adapter reads as 0 is said: what was learnt is hardly seen. */
#define B_ZEROED_SAID .5
struct result {
    struct folder f;
    enum run_state state;
    bool reference;
    struct str remarks;                      /* a reference's own words: source, caveats */
    struct lang conf;                        /* resolved.pipe; empty for a reference */
    json_t *manifest;
    struct scores scores;                    /* all series */
    /* the one compared: a clean one where there is any, after result_use_noisy the first under
     * noise; score_n 0 = nothing was scored */
    const struct score *score; int score_n;
    int damaged;                             /* lines of metrics.jsonl that cannot be read */
    bool no_update;                          /* steps were made, and every one was skipped */
    double b_zeroed;                         /* of the last step; 0 = not quantised, or not known */
    struct point *point; int points;         /* by step; the first is step 0 */
    /* of that series, by step, question, k; none: the run kept no answers, or none by this rule */
    struct mark *mark; int marks;
    int64_t seed;
};
/* A run folder, id or name; "ref:NAME": pipelines/reference/NAME.tsv, "ref:FILE.tsv" that file. */
int result_read(struct result *r, const char *runs_dir, const char *word, struct err *e);
/* Takes the scores under noise instead (eval.also_noisy, noise.ops.eval). */
int result_use_noisy(struct result *r, struct err *e);
/* Takes the one score that `qerl-pipe eval` kept in this folder instead, with its answers. */
int result_use_offline(struct result *r, const char *dir, struct err *e);
void result_release(struct result *r);
const char *result_value(const struct result *r, const char *key);           /* NULL = not set */
const char *result_file_sha256(const struct result *r, const char *role);    /* "" = not known */
const struct point *result_point(const struct result *r, int64_t step);      /* NULL = none */
const struct score *result_score(const struct result *r, int64_t step);      /* NULL = none */
/* The marks of one step; *n of them. */
const struct mark *result_marks(const struct result *r, int64_t step, int *n);
/* The answers of a tape that belong to the series of `like`, sorted as in struct result; -1 when
 * the tape is damaged. Used for scores outside a run's own series, too. */
int marks_read(struct mark **out, int *n, const char *tape, const struct score *like,
               struct err *e);
/* reference.c */
int reference_read(struct result *r, const char *name, struct err *e);
#endif
