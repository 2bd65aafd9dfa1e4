/* supervise.h - the processes of one run: started, watched, restarted, stopped.
 *
 * Knows: ready lines, beats, exit codes, signals, how often a stage may die. Does not know what a
 * step computes: progress is the counter in a stage's beats, and a step is complete when the
 * learner's counter of steps grows. Rules: a stage that ends with 2, 3 or 4 before it was ready is
 * not restarted (it would say the same again); any other death is followed by a restart after 0.2
 * s, doubling, at most `restarts` times per completed step. The learner's end with 0 ends the run:
 * rollout and reward get 5 s to end by themselves, the evaluator as long as it needs.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_SUPERVISE_H
#define QERL_SUPERVISE_H
#include "pipe/folder.h"

struct outcome {
    enum run_state state;
    int code;
    char reason[600];
};
/* Works in f (locked by us) until the run is over, whatever way. Writes no state: the caller does,
 * from *o. */
void supervise(struct outcome *o, struct pipeline *p, const struct plan *pl, const struct folder *f,
               const char *ipc_dir);
#endif
