/* metrics.h - metrics.jsonl: one line a completed step, keyed (stage, step), with verl's names. The
 * learner is its only writer; going on after step N first drops the lines of later steps, so a
 * replay writes them again, not twice.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_METRICS_H
#define QERL_METRICS_H
#include "stages/learner/ckpt.h"

struct step_counts {                 /* of one step, all its waves */
    int waves, groups, kept, surplus, all_right, all_wrong;
    int64_t samples, right, tokens, version;
    int ranks;                       /* that made the update */
    int64_t lag, trained;            /* learner.lag_max; the version that the update began with */
    double sigma, sigma_realised;
    int64_t noise_elements, noise_changed;
    /* measured noise by phase, as groups carry it: rollout (all groups), log-probs, update; NULL or
     * "" = none */
    const char *evidence[NOISE_PHASE_COUNT];
};
struct step_seconds { double gather, update, step; };

struct metrics;
/* device: of the learner, lent, in every line; "" = none. */
int metrics_open(struct metrics **out, const char *dir, const char *device, int64_t step,
                 struct err *e);
void metrics_close(struct metrics **m);
/* Appends the line of step p->step; u = NULL where the step made no update. Returns the line
 * (lent), NULL on error. */
const char *metrics_step(struct metrics *m, const struct progress *p, const struct step_counts *n,
                         const struct update_metrics *u, const struct rec_group *const *group,
                         int groups, const struct step_seconds *t, struct err *e);
int metrics_sync(struct metrics *m, struct err *e);
#endif
