/* crew.c - see crew.h. A socket for each of the others; order: start and end, rank 0, the others.
 * SPDX-License-Identifier: Apache-2.0 */
#include "stages/eval/crew.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "lib/base/clock.h"
#include "lib/base/ranks.h"
#include "lib/stage/rank.h"

#define CLOSE_SECONDS 3.0
enum { FRAME_BYTES_MAX = 64 << 20, READ_BYTES = 1 << 16 };

struct head { uint32_t kind, bytes; };
struct other {
    pid_t pid;
    int fd;
    struct str got;                  /* frames, the last maybe in part */
    size_t at;                       /* of the first that was not lent yet */
};
struct crew {
    int ranks;
    struct other other[RANKS_MAX];   /* from 1 */
};

/* ---- start and end ---- */

static int start(struct crew *c, struct stage *s, int rank, struct err *e) {
    int end[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, end) < 0)
        return err_code(e, EXIT_ENV, "socketpair: %s", strerror(errno));
    const pid_t pid = rank_start(s, rank, end[1], e);
    close(end[1]);
    c->other[rank] = (struct other){ .pid = pid > 0 ? pid : 0, .fd = end[0] };
    c->ranks = rank + 1;
    return pid < 0 ? err_wrap(e, "cannot start rank %d", rank) : 0;
}

int crew_open(struct crew **out, struct stage *s, int ranks, struct err *e) {
    struct crew *c = *out = mem_alloc(sizeof *c);
    c->ranks = 1;
    for (int i = 1; i < ranks; i++)
        if (start(c, s, i, e) < 0) return -1;
    return 0;
}

void crew_close(struct crew **cp) {
    struct crew *c = *cp;
    if (!c) return;
    for (int i = 1; i < c->ranks; i++) close(c->other[i].fd);
    const double until = clock_seconds() + CLOSE_SECONDS;
    for (int i = 1; i < c->ranks; i++) {
        struct other *o = &c->other[i];
        while (o->pid > 0 && waitpid(o->pid, NULL, WNOHANG) == 0) {
            if (clock_seconds() > until) kill(o->pid, SIGKILL);
            nanosleep(&(struct timespec){ .tv_nsec = 5000000 }, NULL);
        }
        str_release(&o->got);
    }
    free(c);
    *cp = NULL;
}

/* ---- rank 0 ---- */

/* Its end of the socket is closed: it has ended, or is about to. */
static int lost(struct crew *c, int rank, struct err *e) {
    const double until = clock_seconds() + CLOSE_SECONDS;
    struct other *o = &c->other[rank];
    while (o->pid > 0 && clock_seconds() < until) {
        if (ranks_lost(rank, o->pid, e) < 0) {
            o->pid = 0;
            return -1;
        }
        nanosleep(&(struct timespec){ .tv_nsec = 5000000 }, NULL);
    }
    return err_code(e, EXIT_FAILED, "rank %d is lost: it does not talk any more", rank);
}

/* 0 sent, 1 nobody is at the other end, -1. */
static int send_all(int fd, const void *data, size_t bytes, struct err *e) {
    const char *at = data;
    while (bytes) {
        const ssize_t n = send(fd, at, bytes, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && (errno == EPIPE || errno == ECONNRESET)) return 1;
        if (n < 0) return err_set(e, "between ranks: send: %s", strerror(errno));
        at += n;
        bytes -= (size_t)n;
    }
    return 0;
}

int crew_order(struct crew *c, const void *order, size_t bytes, struct err *e) {
    for (int i = 1; i < c->ranks; i++) {
        const int rc = send_all(c->other[i].fd, order, bytes, e);
        if (rc != 0) return rc < 0 ? -1 : lost(c, i, e);
    }
    return 0;
}

/* A whole frame that is here already. */
static bool next_frame(struct crew *c, struct crew_frame *f) {
    for (int i = 1; i < c->ranks; i++) {
        struct other *o = &c->other[i];
        struct head h;
        if (o->got.len - o->at < sizeof h) continue;
        memcpy(&h, o->got.s + o->at, sizeof h);
        if (o->got.len - o->at - sizeof h < h.bytes) continue;
        *f = (struct crew_frame){ i, (enum crew_kind)h.kind, h.bytes,
                                  o->got.s + o->at + sizeof h };
        o->at += sizeof h + h.bytes;
        return true;
    }
    return false;
}

static int read_some(struct crew *c, int rank, struct err *e) {
    struct other *o = &c->other[rank];
    char bytes[READ_BYTES];
    const ssize_t n = recv(o->fd, bytes, sizeof bytes, MSG_DONTWAIT);
    if (n < 0 && (errno == EINTR || errno == EAGAIN)) return 0;
    if (n <= 0) return lost(c, rank, e);
    if (o->at == o->got.len) {
        str_clear(&o->got);
        o->at = 0;
    }
    str_add(&o->got, bytes, (size_t)n);
    return 0;
}

int crew_hear(struct crew *c, struct crew_frame *f, int timeout_ms, struct err *e) {
    struct pollfd p[RANKS_MAX];
    if (next_frame(c, f)) return 1;
    for (int i = 1; i < c->ranks; i++)
        p[i] = (struct pollfd){ .fd = c->other[i].fd, .events = POLLIN };
    if (poll(p + 1, (nfds_t)c->ranks - 1, timeout_ms) < 0) return 0;
    for (int i = 1; i < c->ranks; i++)
        if (p[i].revents && read_some(c, i, e) < 0) return -1;
    return next_frame(c, f);
}

/* ---- the others ---- */

int crew_take(int fd, void *order, size_t bytes, struct err *e) {
    char *at = order;
    while (bytes) {
        const ssize_t n = recv(fd, at, bytes, 0);
        if (n < 0 && errno == EINTR) continue;
        if (n == 0 || (n < 0 && errno == ECONNRESET)) return 0;
        if (n < 0) return err_set(e, "between ranks: recv: %s", strerror(errno));
        at += n;
        bytes -= (size_t)n;
    }
    return 1;
}

int crew_tell(int fd, enum crew_kind kind, const void *data, size_t bytes, struct err *e) {
    assert(bytes <= FRAME_BYTES_MAX);
    const struct head h = { kind, (uint32_t)bytes };
    int rc = send_all(fd, &h, sizeof h, e);
    if (rc == 0) rc = send_all(fd, data, bytes, e);
    return rc < 0 ? -1 : !rc;
}
