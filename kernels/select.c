/* select.c - which path this CPU can run, by its feature bits (never by its model name), by what
 * the system saves, and by a known answer of the instructions whose inner order matters.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cpu.h"

#include <pthread.h>
#include <stdatomic.h>

#include "kernels/amx/amx.h"
#include "lib/base/log.h"
#include "lib/base/str.h"

struct path {
    const char *name;
    bool (*have)(void);
    /* whether auto takes it where there is one; NULL: neither auto nor kern_paths knows it */
    bool (*likes)(void);
    void (*fill)(struct kern *k);
};

#if defined(__x86_64__)
/* __builtin_cpu_supports asks CPUID and, for the wide registers, XCR0. */
static bool have_avx2(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
static bool have_avx512(void) {
    return have_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
static bool has_avx512bf16(void) {
    return amx_emulates() && have_avx512() && __builtin_cpu_supports("avx512bf16");
}
static bool bf16_agrees;
static pthread_once_t bf16_once = PTHREAD_ONCE_INIT;
static void bf16_check(void) { bf16_agrees = amx_agrees(avx512bf16_product); }
static bool have_avx512bf16(void) {
    if (!has_avx512bf16()) return false;
    pthread_once(&bf16_once, bf16_check);
    return bf16_agrees;
}
/* Intel's VDPBF16PS does half as many products a cycle as its float32 FMA, AMD's twice as many:
 * the one thing that no feature bit tells. The bits of the results are the same. */
static bool likes_avx512bf16(void) { return __builtin_cpu_is("amd"); }
static bool have_amx(void) { return have_avx512() && amx_use() == AMX_USE_READY; }
static bool have_amx_emulated(void) { return have_avx512() && amx_emulates(); }

/* Why a path that this CPU seems to have is not used; NULL where there is nothing to say. */
static const char *trouble(const char *name) {
    const bool any = !strcmp(name, "auto");
    if ((any || !strcmp(name, "amx")) && amx_use() == AMX_USE_REFUSED)
        return "the kernel refuses this process the state of AMX tiles";
    if ((any || !strcmp(name, "amx")) && amx_use() == AMX_USE_WRONG)
        return "this CPU's TDPBF16PS does not give the bits of its description";
    if ((any || !strcmp(name, "avx512bf16")) && has_avx512bf16() && !have_avx512bf16())
        return "this CPU's VDPBF16PS does not give the bits of its description";
    return NULL;
}
#else
static const char *trouble(const char *name) { (void)name; return NULL; }
#endif
static bool always(void) { return true; }
static void ref_fill(struct kern *k) { (void)k; }

static const struct path path[] = {                   /* best last */
    { "ref", always, always, ref_fill },
#if defined(__x86_64__)
    { "avx2", have_avx2, always, kern_avx2_fill },
    { "avx512", have_avx512, always, kern_avx512_fill },
    { "avx512bf16", have_avx512bf16, likes_avx512bf16, kern_avx512bf16_fill },
    { "amx-emulated", have_amx_emulated, NULL, kern_amx_emulated_fill },
    { "amx", have_amx, always, kern_amx_fill },
#endif
};
_Static_assert(COUNT_OF(path) <= 9, "kern_paths has room for 8 names, one is never listed");

int kern_paths(const char *names[8]) {
    int n = 0;
    for (size_t i = 0; i < COUNT_OF(path); i++)
        if (path[i].likes && path[i].have()) names[n++] = path[i].name;
    return n;
}

/* A name of some machine's path, whatever this one is; cuda and its kin are asked elsewhere. */
static bool is_name(const char *name) {
    static const char *const all[] = { "auto", "ref", "avx2", "avx512", "avx512bf16",
                                       "amx-emulated", "amx" };
    for (size_t i = 0; i < COUNT_OF(all); i++)
        if (strcmp(all[i], name) == 0) return true;
    return false;
}

int kern_open(struct kern *k, const char *name, struct pool *pool, struct err *e) {
    const struct path *best = NULL;
    if (name && str_starts(name, "cuda")) return cuda_open(k, name, pool, e);
    bool any = !name || !strcmp(name, "auto");
    const char *why = trouble(any ? "auto" : name);
    for (size_t i = 0; i < COUNT_OF(path); i++) {
        bool asked = any ? path[i].likes && path[i].likes() : !strcmp(name, path[i].name);
        if (asked && path[i].have()) best = &path[i];
    }
    if (!best) {
        const char *names[8];
        char list[128] = "";
        for (int i = 0, n = kern_paths(names); i < n; i++)
            snprintf(list + strlen(list), sizeof list - strlen(list), "%s%s", i ? ", " : "",
                     names[i]);
        if (!is_name(name))
            return err_code(e, EXIT_CONFIG, "there are no kernels '%s': auto, ref, avx2, avx512, "
                                            "avx512bf16, amx, cuda, cuda-mma, cuda-blas; "
                                            "this machine has: %s", name, list);
        return err_code(e, EXIT_ENV, "this machine cannot run kernels '%s'%s%s; it has: %s", name,
                        why ? ": " : "", why ? why : "", list);
    }
    static atomic_flag said = ATOMIC_FLAG_INIT;
    if (why && !atomic_flag_test_and_set(&said))
        log_warn("kernels: '%s', not the fastest: %s", best->name, why);
    *k = kern_ref_table;
    k->name = best->name;
    k->pool = pool;
    best->fill(k);
    return 0;
}
