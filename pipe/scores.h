/* scores.h - scores.jsonl of a run: every score with the conditions it was measured under.
 *
 * A series is what may be put in one row of numbers: one split, rule, format and noise. Clean and
 * noisy scores are never of one series. Where noise follows a schedule, its value may differ inside
 * a series.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_SCORES_H
#define QERL_SCORES_H
#include "lib/base/json.h"

struct score {                               /* one line of scores.jsonl */
    int64_t step, n, right, version, samples_per_question;
    char split[40], rule[40], quant[60], noise[1000];
    char adapter_sha256[65], model_sha256[65], data_sha256[65];
    double low, high;                        /* 95 % interval of right / n */
};
struct scores {
    struct score *v;
    int n;
    int damaged;                             /* whole lines that are no score */
};
/* A step scored twice under the same conditions counts once (the last line wins); sorted by series,
 * clean ones first, then by step. */
void scores_read(struct scores *s, const char *run_dir);
void scores_release(struct scores *s);
bool scores_has_step(const struct scores *s, int64_t step);
int score_from_json(struct score *s, const char *line, size_t bytes);
bool score_is_clean(const struct score *s);
bool score_same_series(const struct score *a, const struct score *b);
/* The end (one past the last) of the series that begins at `from`. */
int scores_series_end(const struct scores *s, int from);
const char *score_noise(const struct score *s);              /* as a reader calls it: "clean" */
double score_percent(const struct score *s);
/* "171/512 = 33.4 % [29.4, 37.6] strict, mxfp4, clean" */
void score_text(char *out, size_t size, const struct score *s);
#endif
