/* ranks.h - processes that make one computation together, each its part, on one machine.
 *
 * Rank 0 opens the ranks and starts the others; all then make the same calls in the same order, and
 * a call gives every rank what each of them has, through shared memory. Ranks that make different
 * calls are told which. A rank that ended, or that uses no processor time for `patience` seconds
 * while rank 0 waits for it, is lost: from then on every call of every rank fails, and rank 0's
 * message names it. Nobody else judges: the others wait for rank 0 as long as it lives, and whoever
 * starts them sees to it that they die with it. So no rank may sleep through its work: who waits
 * for a device spins (CUDA's default), who waits for a disk has `patience` seconds.
 * Does not know: how a rank is started, what is computed. Ownership: callers' arrays are lent for
 * the call.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_RANKS_H
#define QERL_RANKS_H
#include "lib/base/str.h"   /* first: says which system we compile for */
#include <sys/types.h>

enum { RANKS_MAX = 64, RANKS_WINDOW_BYTES = 1 << 20 };
struct ranks;
/* Starts a child process in which ranks_join(rank, fd) is called; fd is open there under the same
 * number. Returns its pid, or -1. */
typedef pid_t ranks_start(void *ud, int rank, int fd, struct err *e);
/* In rank 0: count >= 2 ranks, itself included. */
int ranks_open(struct ranks **out, int count, double patience, ranks_start *start, void *ud,
               struct err *e);
/* Takes fd. */
int ranks_join(struct ranks **out, int rank, int fd, struct err *e);
/* In rank 0: all calls of the others end, and so do they: those that do not within a few seconds
 * are killed. */
void ranks_close(struct ranks **r);
int ranks_own(const struct ranks *r);
int ranks_count(const struct ranks *r);
/* In another rank, after a call failed: rank 0 closed the ranks, or a rank is lost. Rank 0 has said
 * all that there is to say. */
bool ranks_over(const struct ranks *r);

/* Every rank has an array of the same size, of which rank i filled the bytes from[i] .. from[i + 1]
 * - 1 (from: count + 1 ascending numbers, the same in all ranks); afterwards each has all of it.
 * `call` names the call in messages. -1: EXIT_FAILED, or the code with which a lost rank ended
 * where it is EXIT_CONFIG or EXIT_ENV. */
int ranks_share(struct ranks *r, const char *call, void *data, const size_t *from, struct err *e);
/* The same with `bytes` from each rank. */
int ranks_gather(struct ranks *r, const char *call, void *data, size_t bytes, struct err *e);
/* What rank 0 has in data is in every rank's data; of the same size in all. */
int ranks_send(struct ranks *r, const char *call, void *data, size_t bytes, struct err *e);
/* The same of whatever size rank 0 has. */
int ranks_broadcast(struct ranks *r, const char *call, struct str *data, struct err *e);
/* Whether a child that is some rank has ended, for those who talk to their ranks in another way: 0
 * or, with a message as above, -1. */
int ranks_lost(int rank, pid_t pid, struct err *e);
/* For who waits for the ranks elsewhere, on a device: 0, or -1 as a call would fail now. */
int ranks_watch(struct ranks *r, struct err *e);
/* Bytes of shared memory. */
size_t ranks_plan(int count);
#endif
