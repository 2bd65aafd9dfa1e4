/* view.h - what a user sees while a run works: a block that is redrawn on a terminal, one-line
 * events elsewhere.
 *
 * Reads metrics.jsonl and scores.jsonl as the stages write them; everything goes to stderr, and to
 * log/launcher.log.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_VIEW_H
#define QERL_VIEW_H
#include "pipe/report.h"
#include "pipe/tail.h"

struct view_stage {                          /* one process, as the supervisor knows it */
    const char *id, *phase, *waits_for;
};
struct view {
    bool terminal, colour;
    int drawn;                               /* lines of the block on the screen */
    int64_t steps, step, step_at_start;
    double started, shown_at, drawn_at;
    double reward, sigma, realised, tokens_per_second; /* NaN = not known */
    char score[300]; int64_t score_step;
    const char *title;
    FILE *log;
    struct tail metrics, scores;
};
void view_open(struct view *v, const struct folder *f, int64_t steps);
void view_close(struct view *v);
void view_event(struct view *v, const char *fmt, ...) PRINTF_LIKE(2, 3);
/* Reads new lines, prints events that are due, redraws. */
void view_tick(struct view *v, const struct view_stage *s, int n);
#endif
