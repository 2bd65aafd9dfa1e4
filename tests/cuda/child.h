/* child.h - runs a program that tests/cuda/NAME.cu became, and keeps what it printed.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef TESTS_CUDA_CHILD_H
#define TESTS_CUDA_CHILD_H
#include "lib/base/sys.h"

#include <criterion/criterion.h>
#include <sys/wait.h>
#include <unistd.h>

/* The builds that docs/cuda-emulation.md lists; HERE: those that belong to this test program. */
enum { PLAIN = 1, RACE = 2, SAN = 4 };
#ifdef __SANITIZE_ADDRESS__
enum { HERE = SAN };
#else
enum { HERE = PLAIN | RACE };
#endif

struct ran { int status; char out[16384]; };

/* settings: of the environment. status: the exit code, or 128 + the signal, as a shell has it; out:
 * stdout and stderr. */
static inline struct ran child(const char *program, int build, const char *settings,
                               const char *args) {
    struct ran r = { 0, "" };
    char self[512] = "", path[768], command[1536];
    cr_assert(readlink("/proc/self/exe", self, sizeof self - 1) > 0);
    char *tests = strstr(self, "/tests/cuda/run");
    cr_assert(tests, "not where the Makefile puts it: %s", self);
    *tests = 0;
    snprintf(path, sizeof path, "%s/cuda-%s/tests/cuda/%s", self, build == RACE ? "race" : "emu",
             program);
    if (access(path, X_OK) != 0)
        cr_skip_test("no emulated CUDA here: CUDA_HOME (default /usr/local/cuda) lacks include/"
                     "cuda_runtime.h, cublas_v2.h or nccl.h, or this is no x86-64");
    snprintf(command, sizeof command,
             "exec 2>&1; ulimit -c 0; export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS= %s; %s %s",
             settings, path, args);
    FILE *f = popen(command, "r");
    cr_assert(f);
    size_t n = fread(r.out, 1, sizeof r.out - 1, f);
    r.out[n] = 0;
    int status = pclose(f);
    r.status = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
    return r;
}
#endif
