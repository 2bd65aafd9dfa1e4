/* library.h - functions of a library that one form needs, found when that form is opened: the
 * plugin itself links none of it, so that the other forms run without.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_CUDA_LIBRARY_H
#define QERL_CUDA_LIBRARY_H
#include "lib/base/err.h"

struct cuda_function { const char *name; void **to; };
struct cuda_library {
    const char *file;                    /* "libcublas.so.13", as the loader finds it */
    const char *own;                     /* the environment variable that names another file */
    const char *package;                 /* what to install */
    const struct cuda_function *function;
    int functions;
};
/* Loads it, for good, and fills in its functions; in the emulated build, those of the stand-in. -1
 * (EXIT_ENV) with a line that says what is missing. */
int cuda_library_load(const struct cuda_library *l, struct err *e);
#endif
