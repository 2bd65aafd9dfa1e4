/* tb.c - see tb.h. The messages are packed by protobuf-c from code that protoc-c makes out of
 * tb.proto at build time.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/tb.h"

#include <errno.h>
#include <fcntl.h>
#include <time.h>
#include <unistd.h>

#include "lib/base/fs.h"
#include "lib/base/hash.h"
#include "lib/base/str.h"
#include "lib/base/tb.pb-c.h"

enum { PENDING_MAX = 1 << 16 };

struct tb {
    int fd, failed;              /* failed: errno of the first write that did not work */
    char path[FS_PATH_MAX];
    struct str pending;
};

/* A sum over data that holds sums itself would be weak, so TensorFlow's record format rotates and
 * shifts it. */
static uint32_t masked_crc(const void *data, size_t bytes) {
    uint32_t crc = crc32c(0, data, bytes);
    return ((crc >> 15) | (crc << 17)) + 0xa282ead8u;
}

static void put_pending(struct tb *t) {
    for (size_t done = 0; !t->failed && done < t->pending.len;) {
        ssize_t n = write(t->fd, t->pending.s + done, t->pending.len - done);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) t->failed = n < 0 ? errno : ENOSPC;
        else done += (size_t)n;
    }
    str_clear(&t->pending);
}

static void put_event(struct tb *t, const Tb__Event *event) {
    uint64_t bytes = tb__event__get_packed_size(event);
    uint8_t *payload = mem_alloc(bytes);
    tb__event__pack(event, payload);
    uint32_t crc = masked_crc(&bytes, sizeof bytes);
    str_add(&t->pending, &bytes, sizeof bytes);
    str_add(&t->pending, &crc, sizeof crc);
    str_add(&t->pending, payload, bytes);
    crc = masked_crc(payload, bytes);
    str_add(&t->pending, &crc, sizeof crc);
    free(payload);
    if (t->pending.len >= PENDING_MAX) put_pending(t);
}

static int create(struct tb *t, const char *dir, struct err *e) {
    char host[64] = "localhost";
    if (gethostname(host, sizeof host) < 0 || strchr(host, '/'))
        snprintf(host, sizeof host, "localhost");
    host[sizeof host - 1] = 0;
    /* two files of one second get different names */
    for (int again = 0; again < 1000; again++) {
        char suffix[16] = "";
        if (again) snprintf(suffix, sizeof suffix, ".%d", again);
        int n = snprintf(t->path, sizeof t->path, "%s/events.out.tfevents.%010lld.%s.%lld%s", dir,
                         (long long)time(NULL), host, (long long)getpid(), suffix);
        if (n < 0 || (size_t)n >= sizeof t->path) return err_set(e, "path too long: '%s'", dir);
        t->fd = open(t->path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
        if (t->fd >= 0) return 0;
        if (errno != EEXIST) break;
    }
    return err_code(e, EXIT_ENV, "cannot create '%s': %s", t->path, strerror(errno));
}

int tb_open(struct tb **out, const char *dir, struct err *e) {
    struct tb *t = mem_alloc(sizeof *t);
    *out = NULL;
    if (create(t, dir, e) < 0) {
        free(t);
        return -1;
    }
    char version[] = "brain.Event:2";
    Tb__Event event = TB__EVENT__INIT;
    event.wall_time = (double)time(NULL);
    event.what_case = TB__EVENT__WHAT_FILE_VERSION;
    event.file_version = version;
    put_event(t, &event);
    *out = t;
    return tb_flush(t, e) < 0 ? (tb_close(out, NULL), -1) : 0;
}

void tb_scalar(struct tb *t, const char *tag, int64_t step, double wall_time, double value) {
    Tb__Value scalar = TB__VALUE__INIT;
    Tb__Value *list[] = { &scalar };
    Tb__Summary summary = TB__SUMMARY__INIT;
    Tb__Event event = TB__EVENT__INIT;
    scalar.tag = (char *)(uintptr_t)tag;
    scalar.value_case = TB__VALUE__VALUE_SIMPLE_VALUE;
    scalar.simple_value = (float)value;
    summary.n_value = 1;
    summary.value = list;
    event.wall_time = wall_time;
    event.step = step;
    event.what_case = TB__EVENT__WHAT_SUMMARY;
    event.summary = &summary;
    put_event(t, &event);
}

int tb_flush(struct tb *t, struct err *e) {
    put_pending(t);
    return t->failed
               ? err_code(e, EXIT_FAILED, "cannot write '%s': %s", t->path, strerror(t->failed))
               : 0;
}

int tb_close(struct tb **tp, struct err *e) {
    struct tb *t = *tp;
    if (!t) return 0;
    int rc = tb_flush(t, e);
    if (close(t->fd) < 0 && rc == 0)
        rc = err_code(e, EXIT_FAILED, "cannot write '%s': %s", t->path, strerror(errno));
    str_release(&t->pending);
    free(t);
    *tp = NULL;
    return rc;
}

const char *tb_path(const struct tb *t) { return t->path; }
