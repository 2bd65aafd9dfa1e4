/* noise_schedule.h - how strong AQN is after so many completed steps of a run.
 *
 * A pure function of the run's own step counter, in integer arithmetic up to the choice of the
 * stage: nobody has to push a step anywhere, and `check` prints the very table that the run
 * follows. Does not know: which weights are hit (noise_target.h), how noise is drawn (noise.h).
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_NOISE_SCHEDULE_H
#define QERL_NOISE_SCHEDULE_H
#include "lib/base/err.h"

enum noise_aqn_kind {
    /* K stages over the run: the first is silent, the others fall geometrically from start to end
     * (spec dapo 14.1, 17.7) */
    NOISE_AQN_STEP,
    /* epoch i of E covers the range start * (end/start)^(i/E .. (i+1)/E); inside it a silent
     * interval, then K stages, geometric (spec experiments 5.3) */
    NOISE_AQN_EPOCH,
    NOISE_AQN_CONSTANT,          /* start throughout, from the first step */
    NOISE_AQN_LINEAR,            /* from start at step 0 to end at the last step of the run */
    NOISE_AQN_EXPONENTIAL        /* the same, geometrically */
};
struct noise_schedule {
    enum noise_aqn_kind kind;
    double start, end;
    int stages, epochs;          /* epochs: equal parts of the run */
    int64_t steps;               /* of the run */
};
static inline bool noise_schedule_on(const struct noise_schedule *s) {
    return s->start > 0 || s->end > 0;
}
/* EXIT_CONFIG, a line for each setting that would silently do nothing, would never be reached or
 * cannot be computed. Nothing to say about a schedule that is off. */
int noise_schedule_check(const struct noise_schedule *s, struct err *e);
/* Sigma of the step that follows `done` completed ones; done beyond the run is taken as its end. 0
 * when off. The caller has checked. */
double noise_schedule_at(const struct noise_schedule *s, int64_t done);
#endif
