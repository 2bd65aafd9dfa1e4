/* carrier.h - inside lib/wire only: what carries a link. One table of functions a carrier; link.c
 * picks it by the URL.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_CARRIER_H
#define QERL_CARRIER_H
#include "lib/wire/link.h"
#include "lib/wire/tape.h"

struct carrier {
    const char *scheme;          /* start of the URL; "-" is matched whole */
    bool file;                   /* knows direction and can end */
    /* rest: the URL behind the scheme */
    int (*open)(struct link *l, const char *rest, struct err *e);
    void (*close)(struct link *l);
    int (*recv)(struct link *l, struct rec *r, char *peer, int timeout_ms, struct err *e);
    int (*send)(struct link *l, const struct rec *r, const char *peer, int timeout_ms,
                struct err *e);
    bool (*ready)(struct link *l);          /* a record or the end can be had without waiting */
};
extern const struct carrier carrier_zmq_ipc, carrier_zmq_tcp;           /* link_zmq.c */
extern const struct carrier carrier_file, carrier_pipe, carrier_tape;   /* link_file.c */

struct link {
    const struct carrier *carrier;
    char *name, *url, *identity;
    struct link_opts o;          /* name and identity point at the copies above */
    bool ended;                  /* LINK_END was returned */
    struct str out;              /* the record being sent */
    void *socket;                /* zmq */
    int fd;                      /* files and pipes; -1 = none */
    bool own_fd, eof;
    struct str in;               /* bytes read ahead */
    size_t in_at, in_seen;       /* start of the next line; bytes already searched for its end */
    int64_t line;                /* lines read so far */
    int64_t records;             /* written so far */
    struct tape *tape;
};
#endif
