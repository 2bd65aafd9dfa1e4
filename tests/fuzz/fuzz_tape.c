/* fuzz_tape.c - any bytes as a tape: read to its end or to a named damage; what append mode keeps
 * reads the same, and takes one more frame.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/wire/tape.h"

#include <fcntl.h>
#include <unistd.h>

#include "lib/base/log.h"
#include "tests/fuzz/replay.h"

static void must(bool ok, const char *what, const struct err *e) {
    if (ok) return;
    fprintf(stderr, "%s: %s\n", what, e->text);
    abort();
}

static int read_all(struct tape *t, uint64_t *frames, struct err *e) {
    struct rec r;
    int rc;
    while ((rc = tape_read(t, &r, e)) == 1) rec_release(&r);
    *frames = tape_frames(t);
    return rc;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
    char path[64];
    snprintf(path, sizeof path, "/tmp/fuzz_tape.%d", (int)getpid());
    log_open("fuzz", LOG_LEVEL_ERROR);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (fd < 0 || write(fd, data, bytes) != (ssize_t)bytes) abort();
    close(fd);
    struct tape *t;
    struct err e = { 0 };
    uint64_t before = 0, after = 0;
    int read_ok = tape_read_open(&t, path, &e);
    if (read_ok == 0) read_ok = read_all(t, &before, &e);
    must(read_ok == 0 || e.text[0], "refused without a word", &e);
    tape_close(&t);
    e = (struct err){ 0 };
    if (tape_append_open(&t, path, &e) == 0) {
        int rc = read_all(t, &after, &e);
        must(rc == read_ok && (rc < 0 || after == before), "two ways of reading disagree", &e);
        struct rec r = { .type = REC_END };
        must(tape_append(t, &r, &e) == 0 && tape_sync(t, &e) == 0, "cannot append", &e);
    } else must(e.text[0], "refused without a word", &e);
    tape_close(&t);
    unlink(path);
    return 0;
}
