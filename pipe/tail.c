/* tail.c - see tail.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/tail.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

enum { TAIL_LINE_MAX = 1 << 20 };

void tail_open(struct tail *t, const char *path, bool from_end) {
    struct stat st;
    *t = (struct tail){ 0 };
    snprintf(t->path, sizeof t->path, "%s", path);
    if (from_end && stat(path, &st) == 0) t->read_bytes = st.st_size;
}

static bool take_line(struct tail *t) {
    char *nl = t->part.len ? memchr(t->part.s, '\n', t->part.len) : NULL;
    if (!nl) return false;
    size_t n = (size_t)(nl - t->part.s);
    str_clear(&t->line);
    str_add(&t->line, t->part.s, n);
    t->part.len -= n + 1;
    memmove(t->part.s, nl + 1, t->part.len);
    t->part.s[t->part.len] = 0;
    return true;
}

int tail_next(struct tail *t) {
    char buf[1 << 14];
    struct stat st;
    for (;;) {
        if (take_line(t)) return 1;
        int fd = open(t->path, O_RDONLY | O_CLOEXEC);
        if (fd < 0) return 0;
        if (fstat(fd, &st) == 0 && st.st_size < t->read_bytes) {
            t->read_bytes = st.st_size;
            str_clear(&t->part);
        }
        ssize_t n = pread(fd, buf, sizeof buf, t->read_bytes);
        close(fd);
        if (n <= 0) return 0;
        t->read_bytes += n;
        if (t->part.len + (size_t)n > TAIL_LINE_MAX) str_clear(&t->part);
        str_add(&t->part, buf, (size_t)n);
    }
}

void tail_close(struct tail *t) {
    str_release(&t->part);
    str_release(&t->line);
}

void tail_last(const char *path, int lines, const char *before, FILE *to) {
    char buf[1 << 15];
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return;
    int64_t from = fstat(fd, &st) == 0 && st.st_size > (int64_t)sizeof buf - 1
        ? st.st_size - (int64_t)sizeof buf + 1 : 0;
    ssize_t n = pread(fd, buf, sizeof buf - 1, from);
    close(fd);
    if (n <= 0) return;
    buf[n] = 0;
    if (buf[n - 1] == '\n') buf[--n] = 0;
    char *p = buf + n;
    for (int seen = 0; p > buf; p--)
        if (p[-1] == '\n' && ++seen == lines) break;
    char *save = NULL;
    for (char *line = strtok_r(p, "\n", &save); line; line = strtok_r(NULL, "\n", &save))
        fprintf(to, "%s%s\n", before, line);
}
