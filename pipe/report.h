/* report.h - what a run found, read from its files alone: scores, the table at the end,
 * runs/SUMMARY.md, status.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_REPORT_H
#define QERL_REPORT_H
#include "pipe/folder.h"

struct score {                               /* one line of scores.jsonl */
    int64_t step, n, right, version;
    char split[40], rule[40], quant[40], noise[120];
    double low, high;                        /* 95 % interval of right / n */
};
struct scores {
    struct score *v;
    int n;
};
/* A step scored twice under the same conditions counts once (the last line wins); sorted by
 * step. */
void scores_read(struct scores *s, const char *run_dir);
void scores_release(struct scores *s);
bool scores_has_step(const struct scores *s, int64_t step);
int score_from_json(struct score *s, const char *line, size_t bytes);
void score_text(char *out, size_t size,
                const struct score *s); /* "171/512 = 33.4 % [29.4, 37.6] strict, mxfp4, clean" */
/* First and last of the series of the first line; false if there is none. */
bool scores_ends(const struct scores *s, struct score *first, struct score *last);

void report_results(const struct folder *f, FILE *to);
int report_summary(const char *runs_dir, struct err *e);
void report_status(const struct folder *f, bool details, FILE *to);
#endif
