/* rank.c - see rank.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/stage/rank.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "lib/base/gpus.h"
#include "lib/base/pool.h"

/* ---- start ---- */

/* Between fork and exec: only async-signal-safe calls. */
static void child(char **argv, int fd, pid_t parent) __attribute__((noreturn));
static void child(char **argv, int fd, pid_t parent) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(EXIT_FAILED);
    fcntl(fd, F_SETFD, 0);
    execve("/proc/self/exe", argv, environ);
    static const char said[] = "cannot run /proc/self/exe for a rank\n";
    _exit(write(STDERR_FILENO, said, sizeof said - 1) < 0 ? EXIT_FAILED : EXIT_ENV);
}

pid_t rank_start(void *stage, int rank, int fd, struct err *e) {
    const struct stage *s = stage;
    char number[40], option[] = "--rank";
    char **argv = mem_alloc((size_t)(s->argc + 3) * sizeof *argv);
    snprintf(number, sizeof number, "%d:%d", rank, fd);
    argv[0] = s->argv[0];
    argv[1] = option;                /* first: what a rank does not need is then passed over */
    argv[2] = number;
    memcpy(argv + 3, s->argv + 1, (size_t)(s->argc - 1) * sizeof *argv);
    fflush(NULL);
    const pid_t parent = getpid(), pid = fork();
    if (pid == 0) child(argv, fd, parent);
    free(argv);
    return pid < 0 ? err_code(e, EXIT_ENV, "fork: %s", strerror(errno)) : pid;
}

/* ---- cores ---- */

int rank_cores(const struct shared *c, int ranks) {
    const int cores = pool_cores(), asked = (int)c->run.threads, share = cores / ranks;
    const int most = asked < cores ? asked : cores;
    return most > share ? most : share > 0 ? share : 1;
}

static int take_cores(const struct shared *c, int rank, int ranks, struct err *e) {
    cpu_set_t all, own;
    int core[CPU_SETSIZE], n = 0;
    if (sched_getaffinity(0, sizeof all, &all) < 0) return 0;
    for (int i = 0; i < CPU_SETSIZE; i++)
        if (CPU_ISSET(i, &all)) core[n++] = i;
    const int count = rank_cores(c, ranks), first = rank * n / ranks;
    CPU_ZERO(&own);
    for (int i = 0; i < count; i++) CPU_SET((size_t)core[(first + i) % n], &own);
    return sched_setaffinity(0, sizeof own, &own) < 0
               ? err_code(e, EXIT_ENV, "cores of rank %d: %s", rank, strerror(errno))
               : 0;
}

/* ---- GPUs ---- */

bool rank_on_gpus(const struct shared *c) {
    char name[32];
    return str_starts(shared_kernels(c->run.kernels, name, sizeof name), "cuda");
}

/* -1: all GPUs are visible, however many. */
static int gpus_seen(void) {
    const char *list = getenv("CUDA_VISIBLE_DEVICES");
    return list ? gpus_count(list) : -1;
}

static int take_gpu(int rank, struct err *e) {
    const char *list = getenv("CUDA_VISIBLE_DEVICES");
    char own[GPUS_WORD_MAX];
    if (!list) snprintf(own, sizeof own, "%d", rank);
    else if (gpus_word(own, list, rank) < 0)
        return err_code(e, EXIT_ENV, "there is no GPU for rank %d: CUDA_VISIBLE_DEVICES is '%s'",
                        rank, list);
    return setenv("CUDA_VISIBLE_DEVICES", own, 1) < 0
               ? err_code(e, EXIT_ENV, "GPU of rank %d: setenv: %s", rank, strerror(errno))
               : 0;
}

int rank_take_share(const struct shared *c, int rank, int ranks, struct err *e) {
    if (rank_on_gpus(c) && take_gpu(rank, e) < 0) return -1;
    return take_cores(c, rank, ranks, e);
}

int rank_default(const struct shared *c) {
    const int seen = rank_on_gpus(c) ? gpus_seen() : 1;
    return seen > 1 ? seen : 1;
}

int rank_check(const struct shared *c, const char *key, int64_t ranks, struct err *e) {
    const int seen = gpus_seen();
    /* without any, the kernels say so */
    if (!rank_on_gpus(c) || seen <= 0 || ranks <= seen) return 0;
    return err_more(e, EXIT_CONFIG,
                    "%s = %lld, but the stage has %d GPU%s, one for each rank: place it on as "
                    "many, as in place = gpu:0-%lld", key, (long long)ranks, seen,
                    seen == 1 ? "" : "s", (long long)ranks - 1);
}

void rank_note(json_t *notes, const struct shared *c, const char *key, int64_t ranks) {
    char text[200] = "";
    const int seen = rank_on_gpus(c) ? gpus_seen() : 0, cores = pool_cores();
    if (seen > ranks)
        snprintf(text, sizeof text, "%s = %lld, but the stage has %d GPUs: the last %lld %s taken "
                 "and idle", key, (long long)ranks, seen, (long long)(seen - ranks),
                 seen - ranks == 1 ? "is" : "are");
    else if (ranks > cores)
        snprintf(text, sizeof text, "%s = %lld, but the stage has %d core%s: its processes take "
                 "turns, and each has its own memory", key, (long long)ranks, cores,
                 cores == 1 ? "" : "s");
    if (*text) json_array_append_new(notes, json_string(text));
}
