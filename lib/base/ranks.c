/* ranks.c - see ranks.h.
 *
 * Each rank has a slot with a count of its calls (a futex word) and two windows, used in turn: who
 * writes call k waits until all have arrived at call k, so all are through with the reading of call
 * k - 2, whose window that was. Larger arrays take several turns. Order: memory, lost ranks,
 * waiting, one turn, calls.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/ranks.h"

#include <errno.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "lib/base/clock.h"
#include "lib/base/hash.h"

enum { LOOK_MS = 50, CALL_NAME_MAX = 48, CLOSE_SECONDS = 5 };
#define RANKS_MAGIC 0x6b6e6172u

struct call {                        /* what a rank believes it is doing */
    char name[CALL_NAME_MAX];
    uint64_t bytes;
    uint32_t parts;                  /* CRC of the borders */
    uint32_t zero;                   /* instead of padding: compared byte by byte */
};
_Static_assert(sizeof(struct call) == CALL_NAME_MAX + 16, "struct call has no padding");
struct slot {
    _Alignas(64) _Atomic uint32_t arrived;           /* calls begun: others wait for it */
    struct call call[2];
};
struct memory {
    uint32_t magic, count;
    _Atomic uint32_t over;           /* rank 0 left, or a rank is lost */
    struct slot slot[RANKS_MAX];
    /* then char window[2][count][RANKS_WINDOW_BYTES] */
};
struct ranks {
    struct memory *m;
    size_t bytes;
    int own, count;
    uint32_t turns;
    double patience;
    pid_t pid[RANKS_MAX];            /* rank 0's; 0 = reaped */
    struct err why;                  /* the first failure: all later calls repeat it */
};

/* ---- memory ---- */

static size_t window_at(void) { return (sizeof(struct memory) + 4095) / 4096 * 4096; }
size_t ranks_plan(int count) { return window_at() + 2 * (size_t)count * RANKS_WINDOW_BYTES; }

static char *window(const struct ranks *r, uint32_t turn, int rank) {
    const size_t i = (size_t)(turn & 1) * (size_t)r->count + (size_t)rank;
    return (char *)r->m + window_at() + i * RANKS_WINDOW_BYTES;
}

static int map(struct ranks *r, int fd, size_t bytes, struct err *e) {
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED)
        return err_code(e, EXIT_ENV, "cannot map the ranks' memory: %s", strerror(errno));
    r->m = p;
    r->bytes = bytes;
    return 0;
}

int ranks_open(struct ranks **out, int count, double patience, ranks_start *start, void *ud,
               struct err *e) {
    assert(count >= 2 && count <= RANKS_MAX);
    struct ranks *r = mem_alloc(sizeof *r);
    const size_t bytes = ranks_plan(count);
    const int fd = memfd_create("qerl-ranks", MFD_CLOEXEC);
    int rc = 0;
    r->count = count;
    r->patience = patience;
    if (fd < 0 || ftruncate(fd, (off_t)bytes) < 0)
        rc = err_code(e, EXIT_ENV, "cannot make %zu bytes of shared memory: %s", bytes,
                      strerror(errno));
    if (rc == 0) rc = map(r, fd, bytes, e);
    if (rc == 0) {
        r->m->magic = RANKS_MAGIC;
        r->m->count = (uint32_t)count;
    }
    for (int i = 1; rc == 0 && i < count; i++) {
        r->pid[i] = start(ud, i, fd, e);
        if (r->pid[i] < 0) rc = err_wrap(e, "cannot start rank %d", i);
        if (r->pid[i] < 0) r->pid[i] = 0;
    }
    if (fd >= 0) close(fd);
    if (rc < 0) ranks_close(&r);
    *out = r;
    return rc;
}

int ranks_join(struct ranks **out, int rank, int fd, struct err *e) {
    struct ranks *r = mem_alloc(sizeof *r);
    const off_t bytes = lseek(fd, 0, SEEK_END);
    r->own = rank;
    int rc = bytes <= (off_t)sizeof(struct memory)
                 ? err_code(e, EXIT_USAGE, "descriptor %d is no memory of ranks", fd)
                 : map(r, fd, (size_t)bytes, e);
    if (rc == 0) {
        r->count = (int)r->m->count;
        if (r->m->magic != RANKS_MAGIC || rank < 1 || rank >= r->count ||
            ranks_plan(r->count) != r->bytes)
            rc = err_code(e, EXIT_USAGE, "descriptor %d is no memory of ranks with a rank %d", fd,
                          rank);
    }
    if (rc < 0) ranks_close(&r);
    else close(fd);
    *out = r;
    return rc;
}

int ranks_own(const struct ranks *r) { return r->own; }
int ranks_count(const struct ranks *r) { return r->count; }
bool ranks_over(const struct ranks *r) { return r->own > 0 && atomic_load(&r->m->over); }

/* ---- lost ranks ---- */

/* Seconds of processor time that a process has used. */
static double cpu_seconds(pid_t pid) {
    clockid_t clock;
    struct timespec t = { 0 };
    if (clock_getcpuclockid(pid, &clock) != 0 || clock_gettime(clock, &t) < 0) return 0;
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int ranks_lost(int rank, pid_t pid, struct err *e) {
    int status;
    const pid_t got = waitpid(pid, &status, WNOHANG);
    if (got == 0 || (got < 0 && errno == EINTR)) return 0;
    if (got < 0)                     /* by somebody who ignores SIGCHLD: there is no status */
        return err_code(e, EXIT_FAILED, "rank %d is lost: it ended, nobody knows how (%s)", rank,
                        strerror(errno));
    if (WIFSIGNALED(status))
        return err_code(e, EXIT_FAILED, "rank %d is lost: it was killed by signal %d (%s)", rank,
                        WTERMSIG(status), strsignal(WTERMSIG(status)));
    const int code = WEXITSTATUS(status);
    return err_code(e, code == EXIT_CONFIG || code == EXIT_ENV ? code : EXIT_FAILED,
                    "rank %d is lost: it ended with exit code %d, its own lines above say why",
                    rank, code);
}

static int fail(struct ranks *r, struct err *e) {
    atomic_store(&r->m->over, 1);
    if (!*r->why.text) err_code(&r->why, EXIT_FAILED, "the ranks have ended");
    if (e) *e = r->why;
    return -1;
}

/* Rank 0 looks after its children. */
static int look(struct ranks *r, struct err *e) {
    for (int i = 1; i < r->count && !*r->why.text; i++)
        if (r->own == 0 && r->pid[i] > 0 && ranks_lost(i, r->pid[i], &r->why) < 0) r->pid[i] = 0;
    return *r->why.text || atomic_load(&r->m->over) ? fail(r, e) : 0;
}

int ranks_watch(struct ranks *r, struct err *e) { return look(r, e); }

void ranks_close(struct ranks **rp) {
    struct ranks *r = *rp;
    if (!r) return;
    if (r->own == 0 && r->m) atomic_store(&r->m->over, 1);
    const double until = clock_seconds() + CLOSE_SECONDS;
    for (int i = 1; i < r->count && r->own == 0; i++) {
        while (r->pid[i] > 0 && waitpid(r->pid[i], NULL, WNOHANG) == 0) {
            if (clock_seconds() > until) kill(r->pid[i], SIGKILL);
            nanosleep(&(struct timespec){ .tv_nsec = 5000000 }, NULL);
        }
    }
    if (r->m) munmap(r->m, r->bytes);
    free(r);
    *rp = NULL;
}

/* ---- waiting ---- */

static bool reached(const struct ranks *r, int rank, uint32_t turn) {
    return (int32_t)(atomic_load(&r->m->slot[rank].arrived) - turn) >= 0;
}

/* Looks are counted, not seconds: while we are stopped ourselves, nobody else grows late. */
static int wait_for(struct ranks *r, int rank, uint32_t turn, struct err *e) {
    const struct timespec wait = { .tv_nsec = LOOK_MS * 1000000 };
    _Atomic uint32_t *word = &r->m->slot[rank].arrived;
    double used = -1;
    for (int idle = 0; !reached(r, rank, turn); idle++) {
        if (look(r, e) < 0 && !reached(r, rank, turn)) return -1;
        const double now = r->own == 0 ? cpu_seconds(r->pid[rank]) : 0;
        if (now > used) idle = 0;
        used = now;
        if (r->own == 0 && idle * LOOK_MS * 1e-3 > r->patience) {
            kill(r->pid[rank], SIGKILL);
            err_code(&r->why, EXIT_FAILED, "rank %d is lost: it used no processor time for %g s "
                     "while it was waited for", rank, r->patience);
            return fail(r, e);
        }
        const uint32_t seen = atomic_load(word);
        if ((int32_t)(seen - turn) < 0) syscall(SYS_futex, word, FUTEX_WAIT, seen, &wait, NULL, 0);
    }
    return 0;
}

static void arrive(struct ranks *r, uint32_t turn) {
    _Atomic uint32_t *word = &r->m->slot[r->own].arrived;
    atomic_store(word, turn);
    syscall(SYS_futex, word, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

/* ---- one turn ---- */

static int different(struct ranks *r, int rank, const struct call *a, const struct call *b,
                     struct err *e) {
    err_code(&r->why, EXIT_FAILED,
             "rank %d calls '%s' with %llu bytes where rank %d calls '%s' with %llu%s: the ranks "
             "do not compute the same", r->own, a->name, (unsigned long long)a->bytes, rank,
             b->name, (unsigned long long)b->bytes,
             a->parts == b->parts ? "" : " parted otherwise");
    return fail(r, e);
}

static size_t part_left(const size_t *from, int rank, size_t done, size_t *at) {
    const size_t size = from[rank + 1] - from[rank], left = size > done ? size - done : 0;
    *at = from[rank] + done;
    return left < RANKS_WINDOW_BYTES ? left : RANKS_WINDOW_BYTES;
}

/* The bytes done .. done + RANKS_WINDOW_BYTES - 1 of every rank's part. */
static int turn(struct ranks *r, const struct call *call, char *data, const size_t *from,
                size_t done, struct err *e) {
    const uint32_t now = ++r->turns;
    size_t at, bytes = part_left(from, r->own, done, &at);
    if (look(r, e) < 0) return -1;
    if (bytes) memcpy(window(r, now, r->own), data + at, bytes);
    r->m->slot[r->own].call[now & 1] = *call;
    arrive(r, now);
    for (int i = 0; i < r->count; i++)
        if (wait_for(r, i, now, e) < 0) return -1;
    for (int i = 0; i < r->count; i++) {
        const struct call *other = &r->m->slot[i].call[now & 1];
        if (memcmp(call, other, sizeof *call) != 0) return different(r, i, call, other, e);
    }
    for (int i = 0; i < r->count; i++) {
        bytes = part_left(from, i, done, &at);
        if (i != r->own && bytes) memcpy(data + at, window(r, now, i), bytes);
    }
    return 0;
}

/* ---- calls ---- */

int ranks_share(struct ranks *r, const char *name, void *data, const size_t *from, struct err *e) {
    struct call call;
    size_t longest = 0;
    memset(&call, 0, sizeof call);
    snprintf(call.name, sizeof call.name, "%s", name);
    call.bytes = from[r->count] - from[0];
    call.parts = crc32c(0, from, (size_t)(r->count + 1) * sizeof *from);
    for (int i = 0; i < r->count; i++)
        if (from[i + 1] - from[i] > longest) longest = from[i + 1] - from[i];
    size_t done = 0;
    do {
        if (turn(r, &call, data, from, done, e) < 0) return -1;
        done += RANKS_WINDOW_BYTES;
    } while (done < longest);
    return 0;
}

int ranks_gather(struct ranks *r, const char *call, void *data, size_t bytes, struct err *e) {
    size_t from[RANKS_MAX + 1];
    for (int i = 0; i <= r->count; i++) from[i] = (size_t)i * bytes;
    return ranks_share(r, call, data, from, e);
}

int ranks_send(struct ranks *r, const char *call, void *data, size_t bytes, struct err *e) {
    size_t from[RANKS_MAX + 1] = { 0 };
    for (int i = 1; i <= r->count; i++) from[i] = bytes;
    return ranks_share(r, call, data, from, e);
}

int ranks_broadcast(struct ranks *r, const char *call, struct str *data, struct err *e) {
    uint64_t bytes = data->len;
    if (ranks_send(r, call, &bytes, sizeof bytes, e) < 0) return -1;
    if (r->own > 0) {
        data->s = mem_grow(data->s, bytes + 1);
        data->cap = bytes + 1;
        data->len = bytes;
        data->s[bytes] = 0;
    }
    return ranks_send(r, call, data->s, bytes, e);
}
