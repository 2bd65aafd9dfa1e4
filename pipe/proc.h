/* proc.h - other programs: run one and read what it says, or start one that stays.
 *
 * A started program has its own process group, dies with the launcher (PR_SET_PDEATHSIG,
 * re-checked), inherits nothing but its log, /dev/null and the descriptors named here. Call from
 * the main thread only: the death signal belongs to it.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_PROC_H
#define QERL_PROC_H
#include "lib/base/err.h"   /* first: says which system we compile for */
#include <sched.h>
#include <sys/types.h>

#include "lib/base/str.h"

enum { PROC_ARGS_MAX = 32, PROC_OUT_BYTES_MAX = 8 << 20 };

/* Runs argv (NULL-terminated), collects stdout and stderr, waits. *status: exit code, or 128 +
 * signal. -1 if it cannot be started, says too much, or takes longer than timeout_s. */
int proc_capture(const char *const *argv, struct str *out, struct str *talk, int timeout_s,
                 int *status, struct err *e);
/* The same with CUDA_VISIBLE_DEVICES = gpus. */
int proc_capture_on(const char *gpus, const char *const *argv, struct str *out, struct str *talk,
                    int timeout_s, int *status, struct err *e);
/* Runs argv on our own stdin, stdout and stderr; returns its status as above, or -1. */
int proc_through(const char *const *argv, struct err *e);

struct proc_spec {
    const char *const *argv;
    const char *log;             /* stdout and stderr are appended to it */
    const cpu_set_t *cores;      /* NULL = ours */
    const char *gpus;            /* value of CUDA_VISIBLE_DEVICES; "" = none */
    int ready_fd;                /* inherited under the same number, -1 = none */
    /* inherited: holds the run folder's lock as long as a stage lives; -1 = none */
    int lock_fd;
};
/* Returns the pid and its pidfd (readable when it has ended). */
pid_t proc_start(const struct proc_spec *s, int *pidfd, struct err *e);
int proc_status(int wait_status);                    /* exit code, or 128 + signal */
/* The folder this program lies in (from /proc/self/exe), without the final '/'. */
void proc_self_dir(char *out, size_t size);
/* Where a program named in a .pipe lies: a path that exists as it stands, else its base name beside
 * this program. */
int proc_find(char *out, size_t size, const char *exec);
#endif
