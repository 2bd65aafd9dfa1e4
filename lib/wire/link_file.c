/* link_file.c - links that are files and pipes: JSON lines, and tapes.
 *
 * An input ends. An output is appended to, never truncated: a stage started again must not eat what
 * it wrote; a last line that a kill left half written is cut. Each record is written at once; a
 * tape is made durable when it is closed. Order: lines in, lines out, tapes.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/wire/link.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "lib/base/clock.h"
#include "lib/base/log.h"
#include "lib/wire/carrier.h"
#include "lib/wire/fields.h"

enum { LINE_MAX_BYTES = REC_BYTES_MAX, READ_BYTES = 1 << 16 };

/* ---- lines in ---- */

static const char *label(const struct link *l) {
    return l->carrier == &carrier_pipe ? "<stdin>" : strchr(l->url, ':') + 1;
}

/* Bytes of the next whole line in the buffer, its end not counted; -1 = none yet. Looks at each
 * byte once. */
static ssize_t line_end(struct link *l) {
    size_t have = l->in.len - l->in_at;
    if (!have) return -1;
    const char *start = l->in.s + l->in_at,
               *nl = memchr(start + l->in_seen, '\n', have - l->in_seen);
    if (nl) {
        l->in_seen = (size_t)(nl - start);
        return nl - start;
    }
    l->in_seen = have;
    return l->eof ? (ssize_t)have : -1;
}

static bool ready_lines(struct link *l) { return l->eof || line_end(l) >= 0; }

static int64_t now_ms(void) { return (int64_t)(clock_seconds() * 1e3); }

/* 1 = more bytes (or the end), 0 = nothing in time or a signal, -1 = error. */
static int fill(struct link *l, int timeout_ms, struct err *e) {
    struct pollfd p = { l->fd, POLLIN, 0 };
    if (poll(&p, 1, timeout_ms) <= 0) return 0;
    if (l->in_at == l->in.len) str_clear(&l->in), l->in_at = 0;
    if (l->in_at > READ_BYTES && l->in_at > l->in.len / 2) {
        memmove(l->in.s, l->in.s + l->in_at, l->in.len - l->in_at + 1);
        l->in.len -= l->in_at;
        l->in_at = 0;
    }
    char buf[READ_BYTES];
    ssize_t n = read(l->fd, buf, sizeof buf);
    if (n < 0 && (errno == EINTR || errno == EAGAIN)) return 0;
    if (n < 0) return err_set(e, "cannot read '%s': %s", label(l), strerror(errno));
    if (n == 0) l->eof = true;
    else str_add(&l->in, buf, (size_t)n);
    if (l->in.len - l->in_at > LINE_MAX_BYTES && line_end(l) < 0)
        return err_set(e, "%s:%lld: a line of more than %d bytes", label(l), (long long)l->line + 1,
                       LINE_MAX_BYTES);
    return 1;
}

static bool blank(const char *p, size_t n) {
    while (n && (*p == ' ' || *p == '\t' || *p == '\r')) p++, n--;
    return n == 0;
}

/* Takes the line of n bytes at the front; 1 = a record, 0 = it was blank, -1 = wrong. */
static int take_line(struct link *l, size_t n, struct rec *r, struct err *e) {
    const char *p = l->in.s + l->in_at;
    l->in_at += n + (l->in_at + n < l->in.len);      /* the newline, where there is one */
    l->in_seen = 0;
    l->line++;
    if (l->line == 1 && n >= 3 && memcmp(p, "\xEF\xBB\xBF", 3) == 0) p += 3, n -= 3;
    if (n && p[n - 1] == '\r') n--;
    if (blank(p, n)) return 0;
    char where[512];
    snprintf(where, sizeof where, "%s:%lld", label(l), (long long)l->line);
    return rec_from_json_line(r, p, n, l->o.expected, where, l->line - 1, e) < 0 ? -1 : 1;
}

static int recv_lines(struct link *l, struct rec *r, char *peer, int timeout_ms, struct err *e) {
    (void)peer;
    int64_t until = now_ms() + timeout_ms;
    for (;;) {
        ssize_t n = line_end(l);
        if (n >= 0) {
            int rc = take_line(l, (size_t)n, r, e);
            if (rc) return rc < 0 ? -1 : LINK_RECORD;
            continue;
        }
        if (l->eof) return LINK_END;
        int64_t left = timeout_ms < 0 ? -1 : until - now_ms();
        int rc = fill(l, timeout_ms < 0 ? -1 : left > 0 ? (int)left : 0, e);
        if (rc <= 0) return rc < 0 ? -1 : LINK_EMPTY;
    }
}

/* ---- lines out ---- */

static int write_all(struct link *l, const char *p, size_t bytes, struct err *e) {
    const char *to = l->carrier == &carrier_pipe ? "<stdout>" : label(l);
    while (bytes) {
        ssize_t n = write(l->fd, p, bytes);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EAGAIN) {
            poll(&(struct pollfd){ l->fd, POLLOUT, 0 }, 1, -1);
            continue;
        }
        if (n < 0 && errno == EPIPE)
            return err_code(e, EXIT_FAILED, "the reader of %s has gone", to);
        if (n <= 0)
            return err_code(e, EXIT_FAILED, "cannot write '%s': %s", to,
                            strerror(n < 0 ? errno : ENOSPC));
        p += n;
        bytes -= (size_t)n;
    }
    return 0;
}

static int send_lines(struct link *l, const struct rec *r, const char *peer, int timeout_ms,
                      struct err *e) {
    (void)peer;
    (void)timeout_ms;
    str_clear(&l->out);
    rec_to_json(&l->out, r);
    return write_all(l, l->out.s, l->out.len, e);
}

/* Cuts a last line without an end: it is what a killed writer leaves. */
static int cut_torn_line(struct link *l, struct err *e) {
    struct stat st;
    if (fstat(l->fd, &st) < 0 || !S_ISREG(st.st_mode) || st.st_size == 0) return 0;
    off_t keep = st.st_size;
    char c;
    while (keep > 0 && pread(l->fd, &c, 1, keep - 1) == 1 && c != '\n') keep--;
    if (keep != st.st_size) {
        log_warn("%s: the last line is torn; cut at byte %lld", label(l), (long long)keep);
        if (ftruncate(l->fd, keep) < 0)
            return err_code(e, EXIT_ENV, "cannot cut '%s': %s", label(l), strerror(errno));
    }
    if (keep) log_info("%s: appends to the %lld bytes there", label(l), (long long)keep);
    return 0;
}

static int open_file(struct link *l, const char *path, struct err *e) {
    /* O_RDWR: the end of an output is looked at before it is added to; a FIFO or device takes
     * O_WRONLY only. */
    struct stat st;
    int out = stat(path, &st) == 0 && !S_ISREG(st.st_mode) ? O_WRONLY : O_RDWR | O_CREAT | O_APPEND;
    l->fd = open(path, (l->o.output ? out : O_RDONLY) | O_CLOEXEC, 0644);
    l->own_fd = true;
    if (l->fd < 0) return err_code(e, EXIT_ENV, "cannot open '%s': %s", path, strerror(errno));
    if (!l->o.output && fstat(l->fd, &st) == 0 && S_ISDIR(st.st_mode))
        return err_code(e, EXIT_ENV, "'%s' is a folder", path);
    signal(SIGPIPE, SIG_IGN);
    return l->o.output ? cut_torn_line(l, e) : 0;
}

static int open_pipe(struct link *l, const char *rest, struct err *e) {
    (void)rest;
    l->fd = l->o.output ? STDOUT_FILENO : STDIN_FILENO;
    if (fcntl(l->fd, F_GETFD) < 0)
        return err_code(e, EXIT_ENV, "%s is closed", l->o.output ? "stdout" : "stdin");
    signal(SIGPIPE, SIG_IGN);
    return 0;
}

static void close_lines(struct link *l) {
    if (l->own_fd && l->fd >= 0) close(l->fd);
}

/* ---- tapes ---- */

static int open_tape(struct link *l, const char *path, struct err *e) {
    return l->o.output ? tape_append_open(&l->tape, path, e) : tape_read_open(&l->tape, path, e);
}

static void close_tape(struct link *l) { tape_close(&l->tape); }

static int recv_tape(struct link *l, struct rec *r, char *peer, int timeout_ms, struct err *e) {
    (void)peer;
    (void)timeout_ms;
    int rc = tape_read(l->tape, r, e);
    if (rc <= 0) return rc < 0 ? -1 : LINK_END;
    if (l->o.expected == REC_NONE || r->type == l->o.expected) return LINK_RECORD;
    err_set(e, "tape '%s', frame %llu: a record '%s' where '%s' is expected", label(l),
            (unsigned long long)tape_frames(l->tape) - 1, rec_name[r->type],
            rec_name[l->o.expected]);
    rec_release(r);
    return -1;
}

static int send_tape(struct link *l, const struct rec *r, const char *peer, int timeout_ms,
                     struct err *e) {
    (void)peer;
    (void)timeout_ms;
    if (tape_append(l->tape, r, e) < 0) return -1;
    return tape_flush(l->tape, e);
}

static bool ready_tape(struct link *l) {
    (void)l;
    return true;
}

const struct carrier carrier_file = { "file:",    true,       open_file,  close_lines,
                                      recv_lines, send_lines, ready_lines };
const struct carrier carrier_pipe = { "-",        true,       open_pipe,  close_lines,
                                      recv_lines, send_lines, ready_lines };
const struct carrier carrier_tape = { "tape:",   true,      open_tape, close_tape,
                                      recv_tape, send_tape, ready_tape };
