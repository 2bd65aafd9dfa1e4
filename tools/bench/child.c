/* child.c - see child.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tools/bench/child.h"

#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lib/base/fs.h"

extern char **environ;

void child_arg(struct child_args *a, const char *text) {
    assert(a->n < CHILD_ARGS_MAX - 1);
    a->v[a->n++] = text;
}

int child_start(const struct child_args *a, const char *log, int *out, int *pid, struct err *e) {
    char *argv[CHILD_ARGS_MAX] = { NULL };
    int end[2] = { -1, -1 };
    posix_spawn_file_actions_t f;
    pid_t child;
    for (int i = 0; i < a->n; i++) argv[i] = (char *)(uintptr_t)a->v[i];
    if (out && pipe2(end, O_CLOEXEC) < 0) return err_set(e, "no pipe: %s", strerror(errno));
    posix_spawn_file_actions_init(&f);
    posix_spawn_file_actions_addopen(&f, 0, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_addopen(&f, 2, log, O_WRONLY | O_CREAT | O_APPEND, 0644);
    posix_spawn_file_actions_adddup2(&f, out ? end[1] : 2, 1);
    int rc = posix_spawn(&child, a->v[0], &f, NULL, argv, environ);
    posix_spawn_file_actions_destroy(&f);
    if (out) close(end[1]);
    if (rc != 0) {
        if (out) close(end[0]);
        return err_code(e, EXIT_ENV, "cannot start '%s': %s", a->v[0], strerror(rc));
    }
    if (out) *out = end[0];
    *pid = child;
    return 0;
}

int child_wait(int pid, const char *program, const char *log, struct err *e) {
    int status;
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR) return err_set(e, "cannot wait: %s", strerror(errno));
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return 0;
    struct str text;
    str_init(&text);
    const char *last = "no message";
    if (fs_read(&text, log, 1 << 20, NULL) == 0 && text.len) {
        while (text.len && text.s[text.len - 1] == '\n') text.s[--text.len] = 0;
        const char *line = strrchr(text.s, '\n');
        last = line ? line + 1 : text.s;
    }
    err_set(e, "'%s' failed: %s", program, last);
    str_release(&text);
    return -1;
}

int child_run(const struct child_args *a, const char *log, struct err *e) {
    int pid;
    return child_start(a, log, NULL, &pid, e) < 0 ? -1 : child_wait(pid, a->v[0], log, e);
}
