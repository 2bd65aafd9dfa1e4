/* peer.h - a real qerl-learner in a folder of its own, and a rollout with its reward played by the
 * test over the same sockets.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_TEST_PEER_H
#define QERL_TEST_PEER_H
#include "lib/base/sys.h"

#include <criterion/criterion.h>

#include "lib/wire/link.h"

enum { PEER_TICKETS_MAX = 64, PEER_QUESTIONS = 40 };

struct peer {
    char dir[64];                    /* run.dir is dir/run */
    pid_t pid;
    struct link *ticket, *group;     /* DEALER "rollout-0"; PUSH */
    struct str said;                 /* the learner's stderr, once it has ended */
    struct rec kept[PEER_TICKETS_MAX];
    int tickets;                     /* kept[0 .. tickets), by group id, each group once */
};

/* Folder, questions, learner with `settings` ("--set a=b --set c=d") behind the peer's own. */
void peer_open(struct peer *p, const char *settings);
/* The learner, which has ended, once more in the same folder. */
void peer_again(struct peer *p, const char *settings);
void peer_close(struct peer *p);
/* Says want until ticket number n is there (0 = the first group of the run). */
struct rec_ticket *peer_ticket(struct peer *p, int n);
/* A scored group as that ticket asks for it: sample k has 2 + k tokens and score[k] (also its acc,
 * as 0 or 1). */
struct rec peer_group(const struct rec_ticket *t, const double *score);
/* Sends and releases. */
void peer_send(struct peer *p, struct rec *group);
/* Waits for the next ack or nack: its type; why holds the reason. */
enum rec_type peer_answer(struct peer *p, int64_t *group, char *why, size_t size);
/* Waits for the learner to end; its exit code. */
int peer_end(struct peer *p);
/* Whole file under run.dir, lent until the next call; "" if absent. */
const char *peer_read(struct peer *p, const char *name);
bool peer_has(struct peer *p, const char *name);
/* How often a group stands in the journal. */
int peer_journalled(struct peer *p, int64_t group);
/* sha256 of the adapter of a version. */
const char *peer_adapter(struct peer *p, int64_t version);
#endif
