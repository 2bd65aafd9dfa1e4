/* link_zmq.c - links over ZeroMQ: one socket a link, one record a message.
 *
 * Facts that shaped it (libzmq 4.3): a ROUTER throws unroutable messages away unless it is told not
 * to; DEALER and PUSH queue for peers that are not there unless IMMEDIATE is set; LINGER -1 hangs
 * at exit; an ipc path in use is silently taken over; contexts do not survive fork. While a link
 * lives LINGER is 0; at link_close it is 2 s, so that the last words of a stage that ends in good
 * order reach a peer that is there - nothing may rely on it. Order: context, addresses, open, send,
 * receive.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/wire/link.h"

#include <errno.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include <zmq.h>

#include "lib/wire/carrier.h"

enum {
    HWM_DEFAULT = 64,
    LINGER_CLOSE_MS = 2000,
    HEARTBEAT_MS = 2000,
    SILENCE_MS = 6000,
    RECONNECT_MS = 50,
    RECONNECT_MAX_MS = 2000
};

/* ---- the context: one a process, made after fork, gone with its last socket ---- */

static void *context;
static pid_t context_pid;
static int context_sockets;

static void *context_get(struct err *e) {
    if (context && context_pid == getpid()) return context;
    int major, minor, patch;
    zmq_version(&major, &minor, &patch);
    if (major * 10000 + minor * 100 + patch < 40303) {
        err_code(e, EXIT_ENV, "libzmq %d.%d.%d is too old: 4.3.3 closed holes in it", major, minor,
                 patch);
        return NULL;
    }
    context = zmq_ctx_new();       /* a parent's context is left alone: it is not ours to close */
    context_pid = getpid();
    context_sockets = 0;
    if (!context) err_code(e, EXIT_ENV, "cannot start ZeroMQ: %s", zmq_strerror(errno));
    return context;
}

static void socket_close(void *socket, int linger_ms) {
    zmq_setsockopt(socket, ZMQ_LINGER, &linger_ms, sizeof linger_ms);
    zmq_close(socket);
    if (context_pid != getpid() || --context_sockets > 0) return;
    while (zmq_ctx_term(context) < 0 && errno == EINTR) continue;
    context = NULL;
}

/* ---- addresses ---- */

/* Somebody who answers on an ipc path would lose it without a word if we bound it too. */
static int ipc_check(const char *path, bool bind, struct err *e) {
    struct sockaddr_un a = { .sun_family = AF_UNIX };
    if (strlen(path) >= sizeof a.sun_path)
        return err_code(e, EXIT_ENV,
                        "the path of an ipc socket has at most %zu bytes, '%s' has %zu",
                        sizeof a.sun_path - 1, path, strlen(path));
    if (!bind) return 0;
    memcpy(a.sun_path, path, strlen(path));
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) return err_code(e, EXIT_ENV, "cannot make a socket: %s", strerror(errno));
    bool taken = connect(fd, (struct sockaddr *)&a, sizeof a) == 0 || errno == EAGAIN ||
                 errno == EINPROGRESS;
    close(fd);
    return taken ? err_code(e, EXIT_ENV, "'%s' is in use: another process listens there", path) : 0;
}

static bool is_loopback(const char *host, size_t n) {
    return (n == 9 && memcmp(host, "localhost", 9) == 0) ||
           (n == 5 && memcmp(host, "[::1]", 5) == 0) ||
           (n > 4 && memcmp(host, "127.", 4) == 0 && strspn(host, "0123456789.") == n);
}

/* "HOST:PORT" -> "tcp://HOST:PORT" for libzmq, which binds numbers and not names. */
static int tcp_address(struct str *out, const char *rest, struct err *e) {
    const char *colon = strrchr(rest, ':');
    int64_t port;
    if (!colon || colon == rest ||
        (strcmp(colon + 1, "*") != 0 &&
         (!str_to_i64(colon + 1, &port) || port < 1 || port > 65535)))
        return err_set(e, "'%s' is not HOST:PORT", rest);
    if (!is_loopback(rest, (size_t)(colon - rest)))
        return err_set(e,
                       "'%s' leaves this machine, and links are not encrypted yet: use 127.0.0.1, "
                       "or an ssh tunnel that "
                       "ends there",
                       rest);
    if (str_starts(rest, "localhost:")) str_printf(out, "tcp://127.0.0.1%s", colon);
    else str_printf(out, "tcp://%s", rest);
    return 0;
}

/* ---- open ---- */

static const int socket_type[] = {
    [LINK_KIND_PUSH] = ZMQ_PUSH,     [LINK_KIND_PULL] = ZMQ_PULL, [LINK_KIND_ROUTER] = ZMQ_ROUTER,
    [LINK_KIND_DEALER] = ZMQ_DEALER, [LINK_KIND_PUB] = ZMQ_PUB,   [LINK_KIND_SUB] = ZMQ_SUB,
};

static int set_int(void *socket, int option, int value) {
    return zmq_setsockopt(socket, option, &value, sizeof value);
}

static int socket_options(struct link *l) {
    int hwm = l->o.hwm ? l->o.hwm : HWM_DEFAULT, rc = 0;
    int64_t bytes_max = REC_BYTES_MAX;
    rc |= set_int(l->socket, ZMQ_LINGER, 0);
    rc |= set_int(l->socket, ZMQ_IMMEDIATE, 1);
    rc |= set_int(l->socket, ZMQ_SNDHWM, hwm);
    rc |= set_int(l->socket, ZMQ_RCVHWM, hwm);
    rc |= set_int(l->socket, ZMQ_HEARTBEAT_IVL, HEARTBEAT_MS);
    rc |= set_int(l->socket, ZMQ_HEARTBEAT_TIMEOUT, SILENCE_MS);
    rc |= set_int(l->socket, ZMQ_HEARTBEAT_TTL, SILENCE_MS);
    rc |= set_int(l->socket, ZMQ_RECONNECT_IVL, RECONNECT_MS);
    rc |= set_int(l->socket, ZMQ_RECONNECT_IVL_MAX, RECONNECT_MAX_MS);
    rc |= zmq_setsockopt(l->socket, ZMQ_MAXMSGSIZE, &bytes_max, sizeof bytes_max);
    if (l->o.kind == LINK_KIND_ROUTER) {
        rc |= set_int(l->socket, ZMQ_ROUTER_MANDATORY, 1);
        /* a stage started again takes its name over */
        rc |= set_int(l->socket, ZMQ_ROUTER_HANDOVER, 1);
    }
    if (l->o.kind == LINK_KIND_DEALER && l->identity)
        rc |= zmq_setsockopt(l->socket, ZMQ_ROUTING_ID, l->identity, strlen(l->identity));
    if (l->o.kind == LINK_KIND_SUB) rc |= zmq_setsockopt(l->socket, ZMQ_SUBSCRIBE, "", 0);
    return rc;
}

/* A port left to the system ("...:*") is known only now. */
static void learn_url(struct link *l) {
    char last[256];
    size_t n = sizeof last;
    if (!str_ends(l->url, ":*") || zmq_getsockopt(l->socket, ZMQ_LAST_ENDPOINT, last, &n) < 0)
        return;
    struct str url = { 0 };
    str_printf(&url, "zmq+%s", last);
    free(l->url);
    l->url = url.s;
}

static int attach(struct link *l, const char *address, struct err *e) {
    if (l->identity && (strlen(l->identity) >= LINK_PEER_MAX || !*l->identity))
        return err_set(e, "the name '%s' must have 1 to %d bytes", l->identity, LINK_PEER_MAX - 1);
    if (!context_get(e)) return -1;
    l->socket = zmq_socket(context, socket_type[l->o.kind]);
    if (!l->socket) return err_code(e, EXIT_ENV, "cannot make a socket: %s", zmq_strerror(errno));
    context_sockets++;
    if (socket_options(l) != 0)
        return err_code(e, EXIT_ENV, "cannot set socket options: %s", zmq_strerror(errno));
    int rc = l->o.bind ? zmq_bind(l->socket, address) : zmq_connect(l->socket, address);
    if (rc < 0 && errno == EADDRINUSE)
        return err_code(e, EXIT_ENV, "'%s' is in use: another process listens there", address);
    if (rc < 0)
        return err_code(e, EXIT_ENV, "cannot %s '%s': %s", l->o.bind ? "listen at" : "connect to",
                        address, zmq_strerror(errno));
    learn_url(l);
    return 0;
}

static int open_ipc(struct link *l, const char *rest, struct err *e) {
    if (ipc_check(rest, l->o.bind, e) < 0) return -1;
    struct str address = { 0 };
    str_printf(&address, "ipc://%s", rest);
    int rc = attach(l, address.s, e);
    str_release(&address);
    return rc;
}

static int open_tcp(struct link *l, const char *rest, struct err *e) {
    struct str address = { 0 };
    int rc = tcp_address(&address, rest, e);
    if (rc == 0) rc = attach(l, address.s, e);
    str_release(&address);
    return rc;
}

static void close_zmq(struct link *l) {
    if (l->socket) socket_close(l->socket, LINGER_CLOSE_MS);
}

/* ---- send ---- */

/* A peer that gave itself no name has five bytes of the library's; they are shown as '#' and hex
 * digits. */
static size_t peer_to_id(const char *peer, char id[LINK_PEER_MAX]) {
    size_t n = strlen(peer);
    if (*peer != '#') {
        memcpy(id, peer, n);
        return n;
    }
    size_t bytes = 0;
    for (const char *p = peer + 1; p[0] && p[1] && bytes < LINK_PEER_MAX; p += 2) {
        char pair[3] = { p[0], p[1], 0 };
        id[bytes++] = (char)strtol(pair, NULL, 16);
    }
    return bytes;
}

static int send_part(struct link *l, const void *data, size_t bytes, int flags, struct err *e) {
    if (zmq_send(l->socket, data, bytes, flags) >= 0) return 0;
    if (errno == EAGAIN || errno == EHOSTUNREACH || errno == EINTR) return 1;
    return err_code(e, EXIT_FAILED, "cannot send: %s", zmq_strerror(errno));
}

static int send_zmq(struct link *l, const struct rec *r, const char *peer, int timeout_ms,
                    struct err *e) {
    bool routed = l->o.kind == LINK_KIND_ROUTER;
    assert(routed == (peer != NULL));
    if (peer && (strlen(peer) >= LINK_PEER_MAX || !*peer))
        return err_set(e, "'%s' is no name of a peer", peer);
    str_clear(&l->out);
    rec_pack(&l->out, r);
    if (l->out.len > REC_BYTES_MAX)
        return err_set(e, "%s: %zu bytes, a record has at most %d", rec_name[r->type], l->out.len,
                       REC_BYTES_MAX);
    set_int(l->socket, ZMQ_SNDTIMEO, timeout_ms);
    if (routed) {
        char id[LINK_PEER_MAX];
        size_t n = peer_to_id(peer, id);
        int rc = send_part(l, id, n, ZMQ_SNDMORE, e);
        if (rc) return rc;
        /* the first part was taken: the second cannot block for long */
        set_int(l->socket, ZMQ_SNDTIMEO, -1);
    }
    int rc;
    while ((rc = send_part(l, l->out.s, l->out.len, 0, e)) == 1 && routed && errno == EINTR)
        continue;
    return rc;
}

/* ---- receive ---- */

static void id_to_peer(const void *id, size_t n, char *peer) {
    const unsigned char *p = id;
    bool text = n > 0 && n < LINK_PEER_MAX && utf8_valid(id, n) && p[0] != '#';
    for (size_t i = 0; i < n && text; i++) text = p[i] >= ' ' && p[i] != 0x7F;
    if (text) {
        memcpy(peer, id, n);
        peer[n] = 0;
        return;
    }
    snprintf(peer, LINK_PEER_MAX, "#");
    for (size_t i = 0; i < n && 2 * i + 3 < LINK_PEER_MAX; i++)
        snprintf(peer + 1 + 2 * i, 3, "%02x", p[i]);
}

/* The rest of a message with too many parts must go, or it would be taken for the next one. */
static int drop_rest(void *socket) {
    int more = 0, dropped = 0;
    size_t n = sizeof more;
    while (zmq_getsockopt(socket, ZMQ_RCVMORE, &more, &n) == 0 && more) {
        zmq_msg_t m;
        zmq_msg_init(&m);
        if (zmq_msg_recv(&m, socket, 0) < 0) more = 0;
        zmq_msg_close(&m);
        dropped++;
    }
    return dropped;
}

static int recv_body(struct link *l, zmq_msg_t *m, struct rec *r, char *peer, struct err *e) {
    char from[LINK_PEER_MAX] = "";
    if (l->o.kind == LINK_KIND_ROUTER) {
        id_to_peer(zmq_msg_data(m), zmq_msg_size(m), from);
        if (!zmq_msg_more(m))
            return err_set(e, "port '%s': a message without a body from '%s'", l->name, from);
        if (zmq_msg_recv(m, l->socket, 0) < 0)
            return err_set(e, "port '%s': %s", l->name, zmq_strerror(errno));
    }
    if (peer) snprintf(peer, LINK_PEER_MAX, "%s", from);
    if (zmq_msg_more(m)) return err_set(e, "port '%s': a message of several parts", l->name);
    if (rec_unpack(r, zmq_msg_data(m), zmq_msg_size(m), e) == 0) return LINK_RECORD;
    return err_wrap(e, "port '%s'%s%s", l->name, *from ? " from " : "", from);
}

static int recv_zmq(struct link *l, struct rec *r, char *peer, int timeout_ms, struct err *e) {
    zmq_msg_t m;
    set_int(l->socket, ZMQ_RCVTIMEO, timeout_ms);
    zmq_msg_init(&m);
    int rc = LINK_EMPTY;
    if (zmq_msg_recv(&m, l->socket, 0) >= 0) {
        rc = recv_body(l, &m, r, peer, e);
        if (rc < 0) drop_rest(l->socket);
    } else if (errno != EAGAIN && errno != EINTR) {
        rc = err_set(e, "port '%s': cannot receive: %s", l->name, zmq_strerror(errno));
    }
    zmq_msg_close(&m);
    return rc;
}

static bool ready_zmq(struct link *l) {
    int events = 0;
    size_t n = sizeof events;
    return zmq_getsockopt(l->socket, ZMQ_EVENTS, &events, &n) == 0 && events & ZMQ_POLLIN;
}

const struct carrier carrier_zmq_ipc = { "zmq+ipc://", false,    open_ipc, close_zmq,
                                         recv_zmq,     send_zmq, ready_zmq };
const struct carrier carrier_zmq_tcp = { "zmq+tcp://", false,    open_tcp, close_zmq,
                                         recv_zmq,     send_zmq, ready_zmq };
