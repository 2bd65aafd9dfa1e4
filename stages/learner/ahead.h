/* ahead.h - which groups a step begins with and which policy samples them, learner.lag_max steps
 * ahead.
 *
 * When step s (counted from 0) is opened, the first wave of step s + lag is given its groups and
 * the adapter of that moment; at step 0 the waves of steps 0 .. lag are. So every group of step s
 * is sampled by the adapter of max(0, s - lag) completed steps, further waves of the step too, and
 * neither this nor a group's id depends on what arrives when. At lag 0 a step takes the next groups
 * and the present adapter.
 *
 * Knows: counters. Does not know: tickets, files, the network.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_LEARNER_AHEAD_H
#define QERL_LEARNER_AHEAD_H
#include "stages/learner/ckpt.h"
#include "stages/learner/intake.h"

/* Gives the steps p->step .. p->step + lag, as far as the run has them, the leases they lack: of
 * the adapter p->version with this hash, and of waves of `wave` groups from p->cursor on. */
void ahead_open(struct progress *p, const struct learner_conf *c, int64_t wave,
                const char *sha256);
/* The first lease's step is completed. */
void ahead_close(struct progress *p);
/* The lowest group id that a step to come may want. */
int64_t ahead_floor(const struct progress *p);
/* Whether a checkpoint has the leases that a run with this lag left there. */
bool ahead_whole(const struct progress *p, const struct learner_conf *c);
/* How many steps up to this one a rollout cannot tell apart: 1, or, for the last of those that the
 * fresh adapter samples before any update, all of these; 0 for the ones before. What a rollout
 * measured between two groups may be of two such steps. */
int64_t ahead_sampled_alike(const struct intake_policy *p, const struct learner_conf *c);
/* What the groups of the i-th leased step must be made with. */
struct intake_policy ahead_policy(const struct progress *p, const struct learner_conf *c, int i);
#endif
