/* tape_kill.c - tapes: what a kill leaves is cut, what damage leaves is refused, what was synced is
 * there.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/wire/tape.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lib/base/hash.h"
#include "lib/base/log.h"
#include "tests/unit/rec_any.h"
#include "tests/unit/wire_dir.h"

enum { FRAMES = 4 };

static struct wire_dir dir;
static void start(void) {
    wire_dir_init(&dir);
    log_open("test", LOG_LEVEL_ERROR);
}
static void stop(void) { wire_dir_release(&dir); }
TestSuite(tape, .init = start, .fini = stop);

static struct rec frame_rec(int64_t i) {
    return (struct rec){ .type = REC_END, .end = { .fence = 7, .step = i } };
}

static void append(struct tape *t, int64_t from, int64_t to) {
    struct err e = { 0 };
    for (int64_t i = from; i < to; i++) {
        struct rec r = frame_rec(i);
        cr_assert(tape_append(t, &r, &e) == 0, "%s", e.text);
    }
    cr_assert(tape_sync(t, &e) == 0, "%s", e.text);
}

static void make(const char *path, int64_t frames) {
    struct tape *t;
    struct err e = { 0 };
    cr_assert(tape_append_open(&t, path, &e) == 0, "%s", e.text);
    append(t, 0, frames);
    tape_close(&t);
}

/* Reads to the end; each frame is the one expected there. Returns tape_read's last word. */
static int read_all(struct tape *t, int64_t *n, struct err *e) {
    struct rec r;
    int rc;
    for (*n = 0; (rc = tape_read(t, &r, e)) == 1; (*n)++) {
        cr_assert(r.type == REC_END && r.end.step == *n, "frame %lld is another", (long long)*n);
        cr_assert(tape_frames(t) == (uint64_t)*n + 1);
        rec_release(&r);
    }
    return rc;
}

static int64_t count(const char *path) {
    struct tape *t;
    struct err e = { 0 };
    int64_t n;
    cr_assert(tape_read_open(&t, path, &e) == 0, "%s", e.text);
    cr_assert(read_all(t, &n, &e) == 0, "%s", e.text);
    tape_close(&t);
    return n;
}

static struct str bytes_of(const char *path) {
    struct str b = { 0 };
    struct err e = { 0 };
    cr_assert(fs_read(&b, path, 1 << 24, &e) == 0, "%s", e.text);
    return b;
}

static size_t last_frame_at(const struct str *b) {
    size_t at = 16, last = 16;
    while (at < b->len) {
        uint32_t length;
        memcpy(&length, b->s + at, 4);
        last = at;
        at += 16 + length;
    }
    return last;
}

Test(tape, header_and_frame_are_the_bytes_of_the_contract) {
    const char *path = wire_dir_file(&dir, "t.tape");
    make(path, 1);
    struct str b = bytes_of(path), payload = { 0 };
    struct rec r = frame_rec(0);
    rec_pack(&payload, &r);
    uint64_t sequence = 0;
    uint32_t length, crc, want = crc32c(crc32c(0, &sequence, 8), payload.s, payload.len);
    cr_assert(memcmp(b.s, "QERLTAPE\x01\0\0\0\0\0\0\0", 16) == 0);
    memcpy(&length, b.s + 16, 4);
    memcpy(&crc, b.s + 20, 4);
    cr_assert(length == payload.len && crc == want && memcmp(b.s + 24, &sequence, 8) == 0);
    cr_assert(b.len == 32 + payload.len && memcmp(b.s + 32, payload.s, payload.len) == 0);
    str_release(&b);
    str_release(&payload);
}

Test(tape, every_type_of_record_comes_back) {
    const char *path = wire_dir_file(&dir, "t.tape");
    struct rec x[REC_TYPE_COUNT], y;
    struct any a = { 9 };
    struct tape *t;
    struct err e = { 0 };
    cr_assert(tape_append_open(&t, path, &e) == 0, "%s", e.text);
    for (int i = REC_NONE + 1; i < REC_TYPE_COUNT; i++) {
        any_fill(&x[i], (enum rec_type)i, &a);
        cr_assert(tape_append(t, &x[i], &e) == 0, "%s", e.text);
    }
    tape_close(&t);
    cr_assert(tape_read_open(&t, path, &e) == 0, "%s", e.text);
    for (int i = REC_NONE + 1; i < REC_TYPE_COUNT; i++) {
        cr_assert(tape_read(t, &y, &e) == 1, "%s", e.text);
        cr_assert(!any_differs(&x[i], &y));
        rec_release(&x[i]);
        rec_release(&y);
    }
    cr_assert(tape_read(t, &y, &e) == 0);
    tape_close(&t);
}

Test(tape, torn_at_every_byte_of_the_last_frame_loses_that_frame_only) {
    const char *path = wire_dir_file(&dir, "t.tape"), *torn = wire_dir_file(&dir, "torn.tape");
    make(path, FRAMES);
    struct str b = bytes_of(path);
    for (size_t n = last_frame_at(&b); n < b.len; n++) {
        struct tape *t;
        struct err e = { 0 };
        int64_t frames;
        wire_dir_write(torn, b.s, n);
        cr_assert(count(torn) == FRAMES - 1, "a reader stops before the torn frame");
        cr_assert(tape_append_open(&t, torn, &e) == 0, "cut at %zu: %s", n, e.text);
        cr_assert(read_all(t, &frames, &e) == 0 && frames == FRAMES - 1, "cut at %zu: %s", n,
                  e.text);
        append(t, FRAMES - 1, FRAMES);
        tape_close(&t);
        struct str again = bytes_of(torn);
        cr_assert(again.len == b.len && memcmp(again.s, b.s, b.len) == 0,
                  "as if nothing had happened");
        str_release(&again);
    }
    str_release(&b);
}

Test(tape, torn_header_is_a_new_tape) {
    const char *path = wire_dir_file(&dir, "t.tape"), *torn = wire_dir_file(&dir, "torn.tape");
    make(path, 1);
    struct str b = bytes_of(path);
    for (size_t n = 0; n < 16; n++) {
        wire_dir_write(torn, b.s, n);
        cr_assert(count(torn) == 0);
        make(torn, 2);
        cr_assert(count(torn) == 2);
    }
    str_release(&b);
}

Test(tape, a_tail_of_zeros_is_torn) {
    const char *path = wire_dir_file(&dir, "t.tape");
    make(path, FRAMES);
    struct str b = bytes_of(path);
    static const char zeros[5000];
    str_add(&b, zeros, sizeof zeros);
    wire_dir_write(path, b.s, b.len);
    cr_assert(count(path) == FRAMES);
    make(path, 0);
    cr_assert(count(path) == FRAMES);
    str_release(&b);
}

Test(tape, a_flipped_bit_before_the_last_frame_is_refused_with_its_place) {
    const char *path = wire_dir_file(&dir, "t.tape"), *bad = wire_dir_file(&dir, "bad.tape");
    make(path, FRAMES);
    struct str b = bytes_of(path);
    size_t last = last_frame_at(&b), each = (last - 16) / (FRAMES - 1);
    for (size_t i = 16; i < last; i++)
        for (int bit = 0; bit < 8; bit++) {
            struct tape *t;
            struct err e = { 0 };
            char where[64];
            int64_t n;
            snprintf(where, sizeof where, "frame %zu at byte %zu ", (i - 16) / each,
                     16 + (i - 16) / each * each);
            b.s[i] ^= (char)(1 << bit);
            wire_dir_write(bad, b.s, b.len);
            cr_assert(tape_read_open(&t, bad, &e) == 0 && read_all(t, &n, &e) < 0,
                      "byte %zu bit %d was accepted", i, bit);
            cr_assert(strstr(e.text, where) && e.code == EXIT_FAILED, "byte %zu: %s", i, e.text);
            tape_close(&t);
            e.text[0] = 0;
            cr_assert(tape_append_open(&t, bad, &e) < 0 && strstr(e.text, where), "byte %zu: %s", i,
                      e.text);
            struct str after = bytes_of(bad);
            cr_assert(after.len == b.len, "a damaged tape is not touched");
            str_release(&after);
            b.s[i] ^= (char)(1 << bit);
        }
    str_release(&b);
}

Test(tape, a_missing_or_doubled_frame_is_refused) {
    const char *path = wire_dir_file(&dir, "t.tape");
    make(path, FRAMES);
    struct str b = bytes_of(path), cut = { 0 };
    size_t each = (last_frame_at(&b) - 16) / (FRAMES - 1);
    struct tape *t;
    struct err e = { 0 };
    int64_t n;
    str_add(&cut, b.s, 16 + each);
    str_add(&cut, b.s + 16 + 2 * each, b.len - 16 - 2 * each);
    wire_dir_write(path, cut.s, cut.len);
    cr_assert(tape_read_open(&t, path, &e) == 0 && read_all(t, &n, &e) < 0 && n == 1);
    cr_assert(strstr(e.text, "frame 1 at byte"), "%s", e.text);
    tape_close(&t);
    str_release(&b);
    str_release(&cut);
}

Test(tape, other_files_are_refused) {
    static const struct { const char *bytes; size_t n; const char *says; } cases[] = {
        { "{\"rec\":\"traj\"}\n", 15, "is not a tape" },
        { "QERLTAPE\x02\0\0\0\0\0\0\0", 16, "has another version" },
        { "QERLTAPE\x01\0\0\0\0\0\1\0", 16, "is not a tape" },
    };
    const char *path = wire_dir_file(&dir, "t.tape");
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        struct tape *t;
        struct err e = { 0 };
        wire_dir_write(path, cases[i].bytes, cases[i].n);
        cr_assert(tape_read_open(&t, path, &e) < 0 && strstr(e.text, cases[i].says), "%s", e.text);
        cr_assert(tape_append_open(&t, path, &e) < 0 && strstr(e.text, cases[i].says), "%s",
                  e.text);
    }
    struct tape *t;
    struct err e = { 0 };
    cr_assert(tape_read_open(&t, wire_dir_file(&dir, "absent.tape"), &e) < 0 && e.code == EXIT_ENV,
              "%s", e.text);
    cr_assert(tape_read_open(&t, dir.path, &e) < 0 && e.code == EXIT_ENV, "%s", e.text);
}

Test(tape, appends_after_reopening_without_reading) {
    const char *path = wire_dir_file(&dir, "t.tape");
    struct tape *t;
    struct err e = { 0 };
    make(path, 3);
    cr_assert(tape_append_open(&t, path, &e) == 0, "%s", e.text);
    cr_assert(tape_frames(t) == 0);
    append(t, 3, 5);
    cr_assert(tape_frames(t) == 5);
    tape_close(&t);
    cr_assert(count(path) == 5);
}

Test(tape, truncate_forgets_frames) {
    const char *path = wire_dir_file(&dir, "t.tape");
    struct tape *t;
    struct err e = { 0 };
    int64_t n;
    make(path, 10);
    cr_assert(tape_append_open(&t, path, &e) == 0 && read_all(t, &n, &e) == 0 && n == 10, "%s",
              e.text);
    cr_assert(tape_truncate(t, 11, &e) < 0 && strstr(e.text, "has 10 frames, 11 are needed"), "%s",
              e.text);
    cr_assert(tape_truncate(t, 10, &e) == 0 && tape_frames(t) == 10);
    cr_assert(tape_truncate(t, 4, &e) == 0 && tape_frames(t) == 4, "%s", e.text);
    append(t, 4, 6);
    tape_close(&t);
    cr_assert(count(path) == 6);
    cr_assert(tape_append_open(&t, path, &e) == 0 && tape_truncate(t, 0, &e) == 0, "%s", e.text);
    tape_close(&t);
    cr_assert(count(path) == 0);
}

Test(tape, a_reader_sees_what_is_appended_later) {
    const char *path = wire_dir_file(&dir, "t.tape");
    struct tape *w, *t;
    struct rec r;
    struct err e = { 0 };
    cr_assert(tape_append_open(&w, path, &e) == 0 && tape_read_open(&t, path, &e) == 0, "%s",
              e.text);
    cr_assert(tape_read(t, &r, &e) == 0);
    append(w, 0, 1);
    cr_assert(tape_read(t, &r, &e) == 1);
    rec_release(&r);
    cr_assert(tape_read(t, &r, &e) == 0);
    tape_close(&t);
    tape_close(&w);
}

Test(tape, a_second_appender_is_refused) {
    const char *path = wire_dir_file(&dir, "t.tape");
    struct tape *t, *u;
    struct err e = { 0 };
    cr_assert(tape_append_open(&t, path, &e) == 0, "%s", e.text);
    cr_assert(tape_append_open(&u, path, &e) < 0 && e.code == EXIT_ENV &&
                  strstr(e.text, "being written"),
              "%s", e.text);
    tape_close(&t);
    cr_assert(tape_append_open(&t, path, &e) == 0, "free again: %s", e.text);
    tape_close(&t);
}

/* Appends until it fails; everything synced before must be there after, and nothing half. */
static void fill_up(const char *path, const char *what) {
    struct tape *t;
    struct err e = { 0 };
    int64_t synced = 0, n;
    cr_assert(tape_append_open(&t, path, &e) == 0, "%s", e.text);
    for (;; synced++) {
        struct rec r = frame_rec(synced);
        if (tape_append(t, &r, &e) < 0 || tape_sync(t, &e) < 0) break;
        cr_assert(synced < 100000, "nothing ever failed");
    }
    cr_assert(strstr(e.text, what) && strstr(e.text, path), "%s", e.text);
    struct rec r = frame_rec(0);
    cr_assert(tape_append(t, &r, &e) < 0 && strstr(e.text, "failed before"),
              "an error is final: %s", e.text);
    tape_close(&t);
    cr_assert(tape_append_open(&t, path, &e) == 0 && read_all(t, &n, &e) == 0, "%s", e.text);
    cr_assert(n == synced, "%lld synced, %lld there", (long long)synced, (long long)n);
    tape_close(&t);
}

Test(tape, a_file_size_limit_is_an_error_not_a_death) {
    struct rlimit l = { 1000, 1000 };
    signal(SIGXFSZ, SIG_IGN);
    cr_assert(setrlimit(RLIMIT_FSIZE, &l) == 0);
    fill_up(wire_dir_file(&dir, "t.tape"), strerror(EFBIG));
}

Test(tape, a_full_disk_is_an_error_and_loses_nothing_synced) {
    const char *disk = wire_dir_file(&dir, "disk");
    cr_assert(mkdir(disk, 0700) == 0);
    if (mount("tmpfs", disk, "tmpfs", 0, "size=64k") < 0)
        cr_skip_test("skipped: mounting a small tmpfs needs root (%s)", strerror(errno));
    char path[300];
    snprintf(path, sizeof path, "%s/t.tape", disk);
    fill_up(path, strerror(ENOSPC));
    umount(disk);
}

/* A writer killed at any moment: what it said was synced is there, and the tape goes on. */
Test(tape, kill_storm_loses_nothing_synced, .timeout = 60) {
    const char *path = wire_dir_file(&dir, "t.tape");
    int64_t total = 0;
    for (int round = 0; round < 30; round++) {
        int p[2];
        cr_assert(pipe(p) == 0);
        pid_t child = fork();
        if (child == 0) {
            struct tape *t;
            struct err e = { 0 };
            int64_t n;
            if (tape_append_open(&t, path, &e) < 0 || read_all(t, &n, &e) < 0) _exit(1);
            for (;; n++) {
                struct rec r = frame_rec(n);
                if (tape_append(t, &r, &e) < 0 || tape_sync(t, &e) < 0) _exit(1);
                if (write(p[1], &n, sizeof n) != sizeof n) _exit(1);
            }
        }
        close(p[1]);
        int64_t said = total - 1, n;
        usleep(1000 + round * 300);
        kill(child, SIGKILL);
        while (read(p[0], &n, sizeof n) == sizeof n) said = n;
        close(p[0]);
        int status;
        waitpid(child, &status, 0);
        cr_assert(WIFSIGNALED(status), "the writer failed by itself");
        if (said < 0) continue;                      /* killed before it had made the file */
        total = count(path);
        cr_assert(total >= said + 1, "%lld said, %lld there", (long long)said + 1,
                  (long long)total);
    }
    cr_assert(total > 30);
}
