/* rank.h - a stage that computes in several processes of its own: how the others are started, and
 * what each gets of the stage's cores and GPUs.
 *
 * Knows: the command line, affinity, CUDA_VISIBLE_DEVICES. Does not know: what they compute, how
 * they talk (lib/base/ranks.h).
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_RANK_H
#define QERL_RANK_H
#include "lib/stage/shared.h"   /* first: says which system we compile for */
#include <sys/types.h>

/* ranks_start for `stage`, a struct stage: this program again, with the same command line and
 * s->rank set. Before the caller takes its own share. */
pid_t rank_start(void *stage, int rank, int fd, struct err *e);
/* Takes this process's share: of the cores one part, or as many as run.threads asks for, which may
 * then overlap; of the GPUs the one with its number. Before threads are made. */
int rank_take_share(const struct shared *c, int rank, int ranks, struct err *e);
/* Cores in that share. */
int rank_cores(const struct shared *c, int ranks);
bool rank_on_gpus(const struct shared *c);
/* Ranks of a stage that computes on GPUs: how many it sees; on cores 1. */
int rank_default(const struct shared *c);
/* EXIT_CONFIG where a stage on GPUs has fewer of them than ranks. */
int rank_check(const struct shared *c, const char *key, int64_t ranks, struct err *e);
/* Adds to notes that a stage has more ranks than cores, or GPUs that no rank takes. */
void rank_note(json_t *notes, const struct shared *c, const char *key, int64_t ranks);
#endif
