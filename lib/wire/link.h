/* link.h - one end of an edge of the dataflow, whatever carries it.
 *
 * A URL says what: zmq+ipc://PATH, zmq+tcp://HOST:PORT, tape:FILE, file:FILE.jsonl, "-" (stdin or
 * stdout, JSON lines). The port's declaration says the socket type and who binds; files and pipes
 * know only direction. Reliability is not here: sockets may lose what a dead process held, and the
 * protocol (acks, journal, resend) answers for it. Socket options of every socket: LINGER 0 (2 s
 * from link_close on), IMMEDIATE 1, small high-water marks, MAXMSGSIZE, heartbeats 2 s / 6 s,
 * ROUTER_MANDATORY 1, ROUTER_HANDOVER 1. File outputs are appended to, never truncated. Tickets and
 * groups in a file of JSON lines that name no group are numbered by their line, from 0. tcp stays
 * on this machine (no CURVE yet). When a sender leaves, a reader over ipc that is behind by its
 * high-water mark loses the rest (libzmq takes the hang-up for an error); over tcp it does not.
 * Ownership: link_recv gives the record to the caller (rec_release). link_send copies.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_LINK_H
#define QERL_LINK_H
#include "lib/wire/rec.h"

enum link_kind {
    LINK_KIND_PUSH,
    LINK_KIND_PULL,
    LINK_KIND_ROUTER,
    LINK_KIND_DEALER,
    LINK_KIND_PUB,
    LINK_KIND_SUB
};
enum { LINK_PEER_MAX = 64 };
struct link_opts {
    const char *name;            /* port name, for messages and "waits on" */
    enum link_kind kind;
    bool bind;
    bool output;                 /* direction for files and pipes */
    enum rec_type expected;      /* record type of a file or pipe; REC_NONE = any */
    int hwm;                     /* 0 = 64 */
    const char *identity;        /* DEALER: own name as the ROUTER sees it */
};
struct link;
/* a port in use: EXIT_ENV */
int link_open(struct link **out, const char *url, const struct link_opts *o, struct err *e);
void link_close(struct link **l);
const char *link_name(const struct link *l);
const char *link_url(const struct link *l);
bool link_is_file(const struct link *l);            /* file, tape or pipe: it can end */

/* and -1 with an error (a bad line or frame: EXIT_FAILED) */
enum { LINK_EMPTY = 0, LINK_RECORD = 1, LINK_END = 2 };
/* Waits at most timeout_ms (0 = only look). peer (LINK_PEER_MAX bytes, or NULL) receives a ROUTER's
 * sender. */
int link_recv(struct link *l, struct rec *r, char *peer, int timeout_ms, struct err *e);
/* peer names the receiver on a ROUTER, NULL otherwise. 0 sent; 1 not now (full, or the peer is
 * gone); -1 error. Blocks at most timeout_ms at the high-water mark. File outputs are flushed per
 * record; a reader that closed its end is an error. */
int link_send(struct link *l, const struct rec *r, const char *peer, int timeout_ms, struct err *e);
/* Sleeps until one of the links can be read, a signal comes, or the time is over; file inputs are
 * always readable. Returns the index or -1. */
int link_wait(struct link *const *l, int n, int timeout_ms);
#endif
