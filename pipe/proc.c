/* proc.c - see proc.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/proc.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "lib/base/clock.h"
#include "lib/base/fs.h"
#include "pipe/stop.h"

int proc_status(int w) {
    return WIFEXITED(w) ? WEXITSTATUS(w) : WIFSIGNALED(w) ? 128 + WTERMSIG(w) : 255;
}

void proc_self_dir(char *out, size_t size) {
    ssize_t n = readlink("/proc/self/exe", out, size - 1);
    out[n > 0 ? n : 0] = 0;
    char *slash = strrchr(out, '/');
    if (slash) *slash = 0;
    else snprintf(out, size, ".");
}

int proc_find(char *out, size_t size, const char *exec) {
    const char *slash = strrchr(exec, '/');
    if (slash && access(exec, X_OK) == 0 && !fs_is_dir(exec)) {
        snprintf(out, size, "%s", exec);
        return 0;
    }
    char dir[FS_PATH_MAX];
    proc_self_dir(dir, sizeof dir);
    int n = snprintf(out, size, "%s/%s", dir, slash ? slash + 1 : exec);
    return n > 0 && (size_t)n < size && access(out, X_OK) == 0 ? 0 : -1;
}

/* In the child, between fork and exec: only async-signal-safe calls. */
static void child_common(pid_t parent) {
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    for (int s = 1; s < 32; s++) signal(s, SIG_DFL);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(127);
}

static void child_exec(const char *const *argv, char **env, int said) {
    execve(argv[0], (char *const *)(uintptr_t)argv, env);
    int failed = errno;
    if (write(said, &failed, sizeof failed) < 0) _exit(126);
    _exit(127);
}

/* The parent's end of the pipe over which a child reports that exec failed: 0 bytes mean success
 * (close-on-exec). */
static int exec_verdict(int fd, pid_t pid, const char *program, struct err *e) {
    int failed = 0;
    ssize_t n;
    while ((n = read(fd, &failed, sizeof failed)) < 0 && errno == EINTR) continue;
    close(fd);
    if (n <= 0) return 0;
    waitpid(pid, NULL, 0);
    return err_code(e, EXIT_ENV, "cannot run '%s': %s", program, strerror(failed));
}

/* Reads both pipes until both end. */
static int drain(int out_fd, int talk_fd, struct str *out, struct str *talk, double until,
                 struct err *e) {
    struct pollfd p[2] = { { out_fd, POLLIN, 0 }, { talk_fd, POLLIN, 0 } };
    struct str *to[2] = { out, talk };
    char buf[1 << 14];
    while (p[0].fd >= 0 || p[1].fd >= 0) {
        if (clock_seconds() > until) return err_code(e, EXIT_STALLED, "gave no answer in time");
        if (poll(p, 2, 200) < 0 && errno != EINTR) return err_set(e, "poll: %s", strerror(errno));
        for (int i = 0; i < 2; i++) {
            if (p[i].fd < 0 || !p[i].revents) continue;
            ssize_t n = read(p[i].fd, buf, sizeof buf);
            if (n > 0) str_add(to[i], buf, (size_t)n);
            else if (n == 0 || errno != EINTR) p[i].fd = -1;
            if (to[i]->len > PROC_OUT_BYTES_MAX)
                return err_set(e, "said more than %d bytes", PROC_OUT_BYTES_MAX);
        }
    }
    return 0;
}

/* Everything that allocates happens before fork: the environment with the visible GPUs. */
static char **env_with_gpus(const char *gpus) {
    int n = 0;
    while (environ[n]) n++;
    char **env = mem_alloc((size_t)(n + 2) * sizeof *env);
    int m = 0;
    for (int i = 0; i < n; i++)
        if (!str_starts(environ[i], "CUDA_VISIBLE_DEVICES=")) env[m++] = environ[i];
    struct str s;
    str_init(&s);
    str_printf(&s, "CUDA_VISIBLE_DEVICES=%s", gpus);
    env[m] = s.s;
    return env;
}

static int capture(char **env, const char *const *argv, struct str *out, struct str *talk,
                   int timeout_s, int *status, struct err *e) {
    int o[2], t[2], x[2], w = 0;
    if (pipe2(o, O_CLOEXEC) < 0 || pipe2(t, O_CLOEXEC) < 0 || pipe2(x, O_CLOEXEC) < 0)
        return err_code(e, EXIT_ENV, "pipe: %s", strerror(errno));
    pid_t parent = getpid(), pid = fork();
    if (pid == 0) {
        child_common(parent);
        int null = open("/dev/null", O_RDONLY);
        if (dup2(null, 0) < 0 || dup2(o[1], 1) < 0 || dup2(t[1], 2) < 0) _exit(127);
        child_exec(argv, env, x[1]);
    }
    int failed = errno;
    close(o[1]);
    close(t[1]);
    close(x[1]);
    str_add(out, "", 0);
    str_add(talk, "", 0);
    int rc = pid < 0 ? err_code(e, EXIT_ENV, "fork: %s", strerror(failed))
                     : exec_verdict(x[0], pid, argv[0], e);
    if (rc == 0) {
        stop_pass_to(pid);
        rc = drain(o[0], t[0], out, talk, clock_seconds() + timeout_s, e);
        if (rc < 0) {
            kill(pid, SIGKILL);
            err_wrap(e, "'%s'", argv[0]);
        }
        while (waitpid(pid, &w, 0) < 0 && errno == EINTR) continue;
        stop_pass_to(0);
        *status = proc_status(w);
    }
    close(o[0]);
    close(t[0]);
    return rc;
}

int proc_capture(const char *const *argv, struct str *out, struct str *talk, int timeout_s,
                 int *status, struct err *e) {
    return capture(environ, argv, out, talk, timeout_s, status, e);
}

static void env_free(char **env) {
    char **last = env;
    while (last[1]) last++;
    free(*last);
    free(env);
}

int proc_capture_on(const char *gpus, const char *const *argv, struct str *out, struct str *talk,
                    int timeout_s, int *status, struct err *e) {
    char **env = env_with_gpus(gpus);
    const int rc = capture(env, argv, out, talk, timeout_s, status, e);
    env_free(env);
    return rc;
}

int proc_through(const char *const *argv, struct err *e) {
    int x[2], w = 0;
    if (pipe2(x, O_CLOEXEC) < 0) return err_code(e, EXIT_ENV, "pipe: %s", strerror(errno));
    fflush(NULL);
    pid_t parent = getpid(), pid = fork();
    if (pid == 0) {
        child_common(parent);
        child_exec(argv, environ, x[1]);
    }
    close(x[1]);
    if (pid < 0) {
        close(x[0]);
        return err_code(e, EXIT_ENV, "fork: %s", strerror(errno));
    }
    if (exec_verdict(x[0], pid, argv[0], e) < 0) return -1;
    while (waitpid(pid, &w, 0) < 0 && errno == EINTR) continue;
    return proc_status(w);
}

static void child_start(const struct proc_spec *s, char **env, int log, pid_t parent, int said) {
    child_common(parent);
    setpgid(0, 0);
    int null = open("/dev/null", O_RDONLY);
    if (dup2(null, 0) < 0 || dup2(log, 1) < 0 || dup2(log, 2) < 0) _exit(127);
    if (s->ready_fd >= 0) fcntl(s->ready_fd, F_SETFD, 0);
    if (s->lock_fd >= 0) fcntl(s->lock_fd, F_SETFD, 0);
    int failed = s->cores && sched_setaffinity(0, sizeof *s->cores, s->cores) < 0 ? errno : 0;
    if (!failed) {
        execve(s->argv[0], (char *const *)(uintptr_t)s->argv, env);
        failed = errno;
    }
    if (write(said, &failed, sizeof failed) < 0) _exit(126);
    _exit(127);
}

pid_t proc_start(const struct proc_spec *s, int *pidfd, struct err *e) {
    int x[2];
    int log = open(s->log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (log < 0) return err_code(e, EXIT_ENV, "cannot open '%s': %s", s->log, strerror(errno));
    if (pipe2(x, O_CLOEXEC) < 0) {
        close(log);
        return err_code(e, EXIT_ENV, "pipe: %s", strerror(errno));
    }
    char **env = env_with_gpus(s->gpus);
    pid_t parent = getpid(), pid = fork();
    if (pid == 0) child_start(s, env, log, parent, x[1]);
    int failed = errno;
    close(log);
    close(x[1]);
    env_free(env);
    if (pid < 0) {
        close(x[0]);
        return err_code(e, EXIT_ENV, "fork: %s", strerror(failed));
    }
    if (exec_verdict(x[0], pid, s->argv[0], e) < 0) return -1;
    *pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
    if (*pidfd < 0) {
        failed = errno;
        kill(pid, SIGKILL);
        waitpid(pid, NULL, 0);
        return err_code(e, EXIT_ENV, "pidfd_open: %s (Linux 5.3 or newer is needed)",
                        strerror(failed));
    }
    fcntl(*pidfd, F_SETFD, FD_CLOEXEC);
    return pid;
}
