/* child.c - this program once more, for one run of a matrix (see matrix.h).
 *
 * The child has a process group of its own, so that Ctrl-C reaches it once, from us, and not a
 * second time from the terminal (which would mean: stop at once).
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/matrix.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lib/base/fs.h"
#include "pipe/proc.h"
#include "pipe/stop.h"

static void in_child(const char *const *argv, int said, pid_t parent) {
    const int null = open("/dev/null", O_RDWR);
    setpgid(0, 0);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    signal(SIGINT, SIG_DFL);
    signal(SIGTERM, SIG_DFL);
    if (getppid() != parent || dup2(null, 0) < 0 || dup2(null, 1) < 0 || dup2(said, 2) < 0)
        _exit(127);
    execv("/proc/self/exe", (char *const *)(uintptr_t)argv);
    _exit(127);
}

static void read_talk(int fd, const char *name, struct str *talk) {
    FILE *f = fdopen(fd, "r");
    char *line = NULL;
    size_t room = 0;
    for (ssize_t n; f;) {
        n = getline(&line, &room, f);
        if (n < 0 && errno == EINTR && !feof(f)) {
            clearerr(f);
            continue;
        }
        if (n < 0) break;
        if (talk->len < PROC_OUT_BYTES_MAX) str_add(talk, line, (size_t)n);
        if (name) fprintf(stderr, "%s: %s", name, line);
    }
    free(line);
    if (f) fclose(f);
}

int child_run(const char *const *argv, const char *name, struct str *talk, struct err *e) {
    int pipe_fd[2], w = 0;
    if (pipe2(pipe_fd, O_CLOEXEC) < 0) return err_code(e, EXIT_ENV, "pipe: %s", strerror(errno));
    fflush(NULL);
    const pid_t parent = getpid(), pid = fork();
    if (pid == 0) in_child(argv, pipe_fd[1], parent);
    close(pipe_fd[1]);
    if (pid < 0) {
        close(pipe_fd[0]);
        return err_code(e, EXIT_ENV, "fork: %s", strerror(errno));
    }
    stop_pass_to(pid);
    str_add(talk, "", 0);
    read_talk(pipe_fd[0], name, talk);
    while (waitpid(pid, &w, 0) < 0 && errno == EINTR) continue;
    stop_pass_to(0);
    return proc_status(w);
}
