/* team.h - the learner's ranks: processes of which the first alone talks to other stages, journals
 * and commits, and all make every update together (parts.h).
 *
 * Rank 0 gives the others its state once, and each step's groups and treatment; after a step all
 * must have the same adapter and moments, or nothing is committed. Whatever ends a rank ends the
 * step and the learner: the launcher starts it again, and it goes on from what was committed.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_LEARNER_TEAM_H
#define QERL_LEARNER_TEAM_H
#include "stages/learner/update.h"

struct team;
/* Rank 0: starts the others and takes its own share of cores or GPUs. *out stays NULL where
 * learner.ranks is 1; the functions below then do what they do for one rank. */
int team_open(struct team **out, struct stage *s, struct err *e);
void team_close(struct team **t);
/* The state that all go on from; u takes it, and joins the team. pool (lent, or NULL) makes its
 * hashes. */
int team_begin(struct team *t, struct updater *u, struct update_state *s, struct pool *pool,
               struct err *e);
/* updater_step by all ranks. */
int team_step(struct team *t, struct updater *u, struct update_state *s,
              const struct rec_group *const *group, int groups, const struct update_treatment *how,
              struct update_metrics *metrics, struct err *e);
/* The life of another rank: until rank 0 ends it. */
void team_work(struct stage *s) __attribute__((noreturn));
#endif
