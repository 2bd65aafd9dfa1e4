/* tape.c - see tape.h.
 *
 * Knows: frames, torn tails, damage, durability. Does not know: what a record means.
 * What tells a torn tail from damage: after a kill only the end of the file can be missing. So a
 * frame that is cut off or does not match its CRC is a tail only if no good frame with the next
 * number is anywhere behind it. Order: frames as bytes, scan, open, read, append, truncate.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/wire/tape.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "lib/base/fs.h"
#include "lib/base/hash.h"
#include "lib/base/log.h"

enum { HEAD_BYTES = 16, FRAME_BYTES = 16, TAPE_VERSION = 1, PENDING_MAX = 4 << 20 };
static const uint8_t head[HEAD_BYTES] = { 'Q', 'E', 'R', 'L', 'T', 'A', 'P', 'E', TAPE_VERSION };

struct tape {
    int fd;
    bool append, failed, warned;
    char *path;
    uint64_t size;             /* of the good part of the file: where the next frame goes */
    uint64_t read_at;          /* offset of the next frame to read */
    uint64_t frames_read, frames_total;    /* total: append mode only */
    uint64_t *at;              /* offset of each frame, append mode only */
    uint64_t at_cap;
    struct str pending;        /* appended, not yet written */
    struct str frame;          /* the payload last read */
};

/* ---- frames as bytes ---- */

struct frame_head { uint32_t length, crc; uint64_t sequence; };
_Static_assert(sizeof(struct frame_head) == FRAME_BYTES, "a frame header is 16 bytes on disk");

static uint32_t frame_crc(uint64_t sequence, const void *payload, size_t bytes) {
    return crc32c(crc32c(0, &sequence, sizeof sequence), payload, bytes);
}

/* Bytes read (short only at the end of the file), or -1. */
static ssize_t read_at(const struct tape *t, void *to, size_t bytes, uint64_t offset,
                       struct err *e) {
    size_t got = 0;
    while (got < bytes) {
        ssize_t n = pread(t->fd, (char *)to + got, bytes - got, (off_t)(offset + got));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return err_set(e, "cannot read tape '%s': %s", t->path, strerror(errno));
        if (n == 0) break;
        got += (size_t)n;
    }
    return (ssize_t)got;
}

enum found { FOUND_FRAME, FOUND_END, FOUND_TORN, FOUND_DAMAGE, FOUND_ERROR };

static int payload_read(struct tape *t, uint64_t offset, uint32_t length, struct err *e) {
    str_clear(&t->frame);
    if (t->frame.cap <= length) {
        t->frame.s = mem_grow(t->frame.s, (size_t)length + 1);
        t->frame.cap = (size_t)length + 1;
    }
    ssize_t n = read_at(t, t->frame.s, length, offset, e);
    if (n < 0) return -1;
    t->frame.len = (size_t)n;
    t->frame.s[n] = 0;
    return 0;
}

static bool zeros(const uint8_t *p, const uint8_t *end) {
    while (p < end && !*p) p++;
    return p == end;
}

static bool frame_between(const uint8_t *p, const uint8_t *end, uint64_t sequence) {
    for (; end - p >= FRAME_BYTES; p++) {
        struct frame_head h;
        memcpy(&h, p, sizeof h);
        if (h.sequence == sequence && h.length && h.length <= (size_t)(end - p) - FRAME_BYTES &&
            frame_crc(h.sequence, p + FRAME_BYTES, h.length) == h.crc)
            return true;
    }
    return false;
}

/* A frame at `offset` that is cut off or does not match: is it what a crash leaves (1), or damage
 * (0)? -1 = cannot read. */
static int is_tail(const struct tape *t, uint64_t offset, const struct frame_head *h,
                   uint64_t sequence, struct err *e) {
    struct fs_map m;
    if (fs_map(&m, t->path, e) < 0) return -1;
    const uint8_t *body = m.data + offset + FRAME_BYTES, *end = m.data + m.bytes;
    bool tail = m.bytes < offset + FRAME_BYTES;
    if (!tail && !frame_between(body, end, sequence + 1))
        tail = h->length >= (size_t)(end - body) || zeros(body + h->length, end);
    fs_unmap(&m);
    return tail;
}

static int damage(const struct tape *t, uint64_t offset, uint64_t sequence, const char *what,
                  struct err *e) {
    return err_code(e, EXIT_FAILED, "tape '%s' is damaged: frame %llu at byte %llu %s", t->path,
                    (unsigned long long)sequence, (unsigned long long)offset, what);
}

/* Looks at the frame that should start at `offset`; its payload lands in t->frame. */
static enum found look(struct tape *t, uint64_t offset, uint64_t sequence, struct frame_head *h,
                       struct err *e) {
    struct stat st;
    if (fstat(t->fd, &st) < 0) {
        err_set(e, "cannot read tape '%s': %s", t->path, strerror(errno));
        return FOUND_ERROR;
    }
    uint64_t size = (uint64_t)st.st_size;
    if (size <= offset) return FOUND_END;
    if (size - offset < FRAME_BYTES) return FOUND_TORN;
    if (read_at(t, h, sizeof *h, offset, e) < 0) return FOUND_ERROR;
    uint64_t left = size - offset - FRAME_BYTES;
    if (h->length && h->length <= left && h->length <= REC_BYTES_MAX) {
        if (payload_read(t, offset + FRAME_BYTES, h->length, e) < 0) return FOUND_ERROR;
        if (frame_crc(h->sequence, t->frame.s, t->frame.len) == h->crc) {
            if (h->sequence == sequence) return FOUND_FRAME;
            damage(t, offset, sequence, "has another number: frames are missing or out of order",
                   e);
            return FOUND_DAMAGE;
        }
    }
    int tail = is_tail(t, offset, h, sequence, e);
    if (tail) return tail < 0 ? FOUND_ERROR : FOUND_TORN;
    damage(t, offset, sequence, "does not match its checksum, and it is not the last", e);
    return FOUND_DAMAGE;
}

/* ---- scan and open ---- */

static void note_frame(struct tape *t, uint64_t offset) {
    if (t->frames_total == t->at_cap) {
        t->at_cap = t->at_cap ? 2 * t->at_cap : 256;
        t->at = mem_grow(t->at, t->at_cap * sizeof *t->at);
    }
    t->at[t->frames_total++] = offset;
}

static int cut(struct tape *t, uint64_t size, struct err *e) {
    if (ftruncate(t->fd, (off_t)size) < 0 || fdatasync(t->fd) < 0) {
        t->failed = true;
        return err_set(e, "cannot cut tape '%s': %s", t->path, strerror(errno));
    }
    t->size = size;
    return 0;
}

static int scan(struct tape *t, struct err *e) {
    t->size = HEAD_BYTES;
    for (;;) {
        struct frame_head h;
        enum found f = look(t, t->size, t->frames_total, &h, e);
        if (f == FOUND_FRAME) {
            note_frame(t, t->size);
            t->size += FRAME_BYTES + h.length;
        } else if (f == FOUND_TORN) {
            log_warn("tape '%s': the last frame (%llu) is torn; cut at byte %llu", t->path,
                     (unsigned long long)t->frames_total, (unsigned long long)t->size);
            return cut(t, t->size, e);
        } else return f == FOUND_END ? 0 : -1;
    }
}

/* 1 = a whole header, 0 = the file is empty or died while its header was written, -1 = not ours. */
static int head_look(struct tape *t, struct err *e) {
    uint8_t got[HEAD_BYTES];
    ssize_t n = read_at(t, got, sizeof got, 0, e);
    if (n < 0) return -1;
    if (memcmp(got, head, (size_t)n < 8 ? (size_t)n : 8) == 0 && n >= 12 &&
        memcmp(got + 8, head + 8, 4) != 0)
        return err_code(e, EXIT_FAILED,
                        "tape '%s' has another version; this program reads version %d", t->path,
                        TAPE_VERSION);
    if (memcmp(got, head, (size_t)n) != 0)
        return err_code(e, EXIT_FAILED, "'%s' is not a tape", t->path);
    return n == HEAD_BYTES;
}

static int head_write(struct tape *t, struct err *e) {
    if (ftruncate(t->fd, 0) < 0 || pwrite(t->fd, head, sizeof head, 0) != (ssize_t)sizeof head ||
        fsync(t->fd) < 0)
        return err_set(e, "cannot create tape '%s': %s", t->path, strerror(errno));
    return fs_sync_parent(t->path, e);
}

static int open_file(struct tape *t, int flags, struct err *e) {
    struct stat st;
    t->fd = open(t->path, flags | O_CLOEXEC, 0644);
    if (t->fd < 0)
        return err_code(e, EXIT_ENV, "cannot open tape '%s': %s", t->path, strerror(errno));
    if (fstat(t->fd, &st) < 0 || !S_ISREG(st.st_mode))
        return err_code(e, EXIT_ENV, "tape '%s' is not a regular file", t->path);
    return 0;
}

static struct tape *tape_new(const char *path, bool append) {
    struct tape *t = mem_alloc(sizeof *t);
    t->fd = -1;
    t->append = append;
    t->path = mem_dup(path);
    t->read_at = t->size = HEAD_BYTES;
    return t;
}

static int append_start(struct tape *t, struct err *e) {
    if (open_file(t, O_RDWR | O_CREAT, e) < 0) return -1;
    if (flock(t->fd, LOCK_EX | LOCK_NB) < 0)
        return err_code(e, EXIT_ENV, "tape '%s' is being written by another process", t->path);
    int whole = head_look(t, e);
    if (whole < 0) return -1;
    return whole ? scan(t, e) : head_write(t, e);
}

int tape_append_open(struct tape **out, const char *path, struct err *e) {
    *out = NULL;
    if (strlen(path) >= FS_PATH_MAX) return err_code(e, EXIT_ENV, "path too long: '%s'", path);
    struct tape *t = tape_new(path, true);
    if (append_start(t, e) < 0) {
        tape_close(&t);
        return -1;
    }
    *out = t;
    return 0;
}

int tape_read_open(struct tape **out, const char *path, struct err *e) {
    *out = NULL;
    struct tape *t = tape_new(path, false);
    if (open_file(t, O_RDONLY, e) < 0 || head_look(t, e) < 0) {
        tape_close(&t);
        return -1;
    }
    *out = t;
    return 0;
}

void tape_close(struct tape **tp) {
    struct tape *t = *tp;
    if (!t) return;
    struct err e = { 0 };
    if (t->append && t->fd >= 0 && !t->failed && tape_sync(t, &e) < 0) log_error("%s", e.text);
    if (t->fd >= 0) close(t->fd);
    str_release(&t->pending);
    str_release(&t->frame);
    free(t->at);
    free(t->path);
    free(t);
    *tp = NULL;
}

/* ---- read ---- */

int tape_read(struct tape *t, struct rec *r, struct err *e) {
    rec_init(r, REC_NONE);
    if (t->append && t->frames_read >= t->frames_total) return 0;
    if (t->append && tape_flush(t, e) < 0) return -1;
    struct frame_head h;
    switch (look(t, t->read_at, t->frames_read, &h, e)) {
    case FOUND_END: return 0;
    case FOUND_TORN:
        if (!t->warned)
            log_warn("tape '%s' ends in a torn frame (%llu)", t->path,
                     (unsigned long long)t->frames_read);
        t->warned = true;
        return 0;
    case FOUND_FRAME: break;
    case FOUND_DAMAGE: case FOUND_ERROR: return -1;
    }
    if (rec_unpack(r, t->frame.s, t->frame.len, e) < 0) {
        err_wrap(e, "tape '%s', frame %llu at byte %llu", t->path,
                 (unsigned long long)t->frames_read, (unsigned long long)t->read_at);
        if (e) e->code = EXIT_FAILED;
        return -1;
    }
    t->read_at += FRAME_BYTES + h.length;
    t->frames_read++;
    return 1;
}

uint64_t tape_frames(const struct tape *t) { return t->frames_read; }

/* ---- append ---- */

static int append_failed(struct tape *t, const char *what, struct err *e) {
    t->failed = true;
    return err_code(e, EXIT_FAILED, "cannot %s tape '%s': %s", what, t->path, strerror(errno));
}

int tape_append(struct tape *t, const struct rec *r, struct err *e) {
    assert(t->append);
    if (t->failed) return err_set(e, "tape '%s' failed before; it must be opened again", t->path);
    if (rec_check(r, e) < 0) return -1;
    size_t start = t->pending.len;
    struct frame_head h = { .sequence = t->frames_total };
    str_add(&t->pending, &h, sizeof h);
    rec_pack(&t->pending, r);
    size_t bytes = t->pending.len - start - FRAME_BYTES;
    if (bytes > REC_BYTES_MAX) {
        t->pending.len = start;
        return err_set(e, "%s: %zu bytes, a record has at most %d", rec_name[r->type], bytes,
                       REC_BYTES_MAX);
    }
    h.length = (uint32_t)bytes;
    h.crc = frame_crc(h.sequence, t->pending.s + start + FRAME_BYTES, bytes);
    memcpy(t->pending.s + start, &h, sizeof h);
    note_frame(t, t->size + start);
    t->frames_read = t->frames_total;
    t->read_at = t->size + t->pending.len;
    return t->pending.len >= PENDING_MAX ? tape_flush(t, e) : 0;
}

int tape_flush(struct tape *t, struct err *e) {
    if (t->failed) return err_set(e, "tape '%s' failed before; it must be opened again", t->path);
    for (size_t done = 0; done < t->pending.len;) {
        ssize_t n = pwrite(t->fd, t->pending.s + done, t->pending.len - done,
                           (off_t)(t->size + done));
        if (n < 0 && errno == EINTR) continue;
        if (n == 0) errno = ENOSPC;
        if (n <= 0) return append_failed(t, "write", e);
        done += (size_t)n;
    }
    t->size += t->pending.len;
    str_clear(&t->pending);
    return 0;
}

int tape_sync(struct tape *t, struct err *e) {
    if (tape_flush(t, e) < 0) return -1;
    return fdatasync(t->fd) < 0 ? append_failed(t, "make durable", e) : 0;
}

int tape_truncate(struct tape *t, uint64_t frames, struct err *e) {
    assert(t->append);
    if (frames > t->frames_total)
        return err_set(e, "tape '%s' has %llu frames, %llu are needed", t->path,
                       (unsigned long long)t->frames_total, (unsigned long long)frames);
    if (tape_flush(t, e) < 0) return -1;
    if (frames == t->frames_total) return 0;
    if (cut(t, t->at[frames], e) < 0) return -1;
    t->frames_total = frames;
    if (t->frames_read >= frames) {
        t->frames_read = frames;
        t->read_at = t->size;
    }
    return 0;
}
