/* sys.h - the first include of every file: which system we compile for.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_SYS_H
#define QERL_SYS_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <assert.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COUNT_OF(a) (sizeof(a) / sizeof((a)[0]))
/* Arithmetic that is the same text on a CPU and in a GPU's kernels: C11 and C++17 both read it. */
#ifdef __CUDACC__
#define KERN_FN static inline __host__ __device__
#else
#define KERN_FN static inline
#endif
#define PRINTF_LIKE(f, a) __attribute__((format(printf, f, a)))

/* Exit codes of every program of the project. */
enum exit_code {
    EXIT_DONE = 0,       /* did what was asked */
    EXIT_FAILED = 1,     /* failed, or ended without its final score */
    EXIT_USAGE = 2,      /* wrong command line */
    EXIT_CONFIG = 3,     /* wrong .pipe or configuration */
    EXIT_ENV = 4,        /* the machine lacks something: model, data, GPU, core */
    EXIT_STALLED = 5,    /* no progress */
};
#endif
