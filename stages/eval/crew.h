/* crew.h - the other processes of an evaluator that has several (eval.ranks), each with its share
 * of cores or its GPU: rank 0 starts them and gives orders, they answer in frames.
 *
 * Rank 0 alone has links and keeps books, so nothing is lost with another rank but work: it is
 * named, and the evaluator ends. Does not know: what an order says (examiner.c).
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_CREW_H
#define QERL_CREW_H
#include "lib/stage/stage.h"

enum crew_kind { CREW_READY, CREW_ANSWER, CREW_EVIDENCE };
struct crew;
struct crew_frame {
    int rank;
    enum crew_kind kind;
    size_t bytes;
    const char *data;                /* lent until the next crew_hear */
};
/* In rank 0: starts ranks - 1 others, before the caller takes its own share. */
int crew_open(struct crew **out, struct stage *s, int ranks, struct err *e);
/* The others end, those in the middle of something too. */
void crew_close(struct crew **c);
/* To all of them. */
int crew_order(struct crew *c, const void *order, size_t bytes, struct err *e);
/* 1 with a frame, 0 none came in timeout_ms, -1: one of them is lost. */
int crew_hear(struct crew *c, struct crew_frame *f, int timeout_ms, struct err *e);
/* In another rank, fd its end. Both 1, or 0: rank 0 has left, and so does the caller. -1. */
int crew_take(int fd, void *order, size_t bytes, struct err *e);
int crew_tell(int fd, enum crew_kind kind, const void *data, size_t bytes, struct err *e);
#endif
