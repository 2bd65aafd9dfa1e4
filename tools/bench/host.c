/* host.c - see host.h. Linux only, as the product is.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tools/bench/host.h"

#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

static const char *const FLAGS[] = { "avx2",          "fma",         "f16c",      "avx512f",
                                     "avx512bw",      "avx512vl",    "avx512dq",  "avx512_vnni",
                                     "avx512vbmi",   "avx512_bf16", "avx512_fp16", "amx_tile",
                                     "amx_bf16",      "amx_int8" };

static void flags_of(char *line, struct str *flags) {
    for (char *word; (word = strsep(&line, " \n"));)
        for (size_t i = 0; i < COUNT_OF(FLAGS); i++)
            if (strcmp(word, FLAGS[i]) == 0)
                str_printf(flags, "%s%s", flags->len ? " " : "", FLAGS[i]);
}

void host_cpu(struct str *name, struct str *flags) {
    FILE *f = fopen("/proc/cpuinfo", "r");
    char *line = NULL;
    size_t cap = 0;
    while (f && getline(&line, &cap, f) > 0 && !(name->len && flags->len)) {
        char *value = strchr(line, ':');
        if (!value) continue;
        value += 1 + (value[1] == ' ');
        if (str_starts(line, "model name") && !name->len)
            str_add(name, value, strcspn(value, "\n"));
        if (str_starts(line, "flags") && !flags->len) flags_of(value, flags);
    }
    free(line);
    if (f) fclose(f);
    if (!name->len) str_puts(name, "unknown");
    if (!flags->len) str_puts(flags, "none");
}

void host_date(char out[32]) {
    time_t now = time(NULL);
    struct tm t;
    strftime(out, 32, "%Y-%m-%d %H:%M UTC", gmtime_r(&now, &t));
}

double host_memory_bytes(void) {
    return (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
}

int64_t host_peak_bytes(void) {
    struct rusage u;
    return getrusage(RUSAGE_SELF, &u) == 0 ? (int64_t)u.ru_maxrss * 1024 : 0;
}

size_t host_l2_bytes(void) {
    long n = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return n > 0 ? (size_t)n : (size_t)1 << 20;
}

static double own_seconds(int who) {
    struct rusage u;
    if (getrusage(who, &u) < 0) return 0;
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) +
           (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) * 1e-6;
}

struct host_load host_load(void) {
    struct host_load l = { .own = own_seconds(RUSAGE_SELF) + own_seconds(RUSAGE_CHILDREN) };
    double v[8] = { 0 }, ticks = (double)sysconf(_SC_CLK_TCK);
    FILE *f = fopen("/proc/stat", "r");
    /* user nice system idle iowait irq softirq steal */
    int n = f ? fscanf(f, "cpu %lf %lf %lf %lf %lf %lf %lf %lf", &v[0], &v[1], &v[2], &v[3], &v[4],
                       &v[5], &v[6], &v[7])
              : 0;
    if (f) fclose(f);
    for (int i = 0; i < n; i++) {
        l.total += v[i] / ticks;
        if (i != 3 && i != 4) l.busy += v[i] / ticks;
    }
    return l;
}

double host_others(const struct host_load *from, const struct host_load *to) {
    double total = to->total - from->total;
    double others = to->busy - from->busy - (to->own - from->own);
    return total > 0 && others > 0 ? others / total : 0;
}
