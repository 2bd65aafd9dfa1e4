/* report.c - figures as lines of a table on stdout and as entries of the JSON report.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tools/bench/bench.h"

/* `path` is `of` itself or lies below it. */
static bool below(const char *path, const char *of) {
    size_t n = strlen(of);
    return strncmp(path, of, n) == 0 && (path[n] == 0 || path[n] == '/');
}

bool bench_wants(const struct bench *b, const char *key) {
    for (int i = 0; i < b->onlys; i++)
        if (below(key, b->only[i])) return true;
    return b->onlys == 0;
}

bool bench_enters(const struct bench *b, const char *path) {
    for (int i = 0; i < b->onlys; i++)
        if (below(path, b->only[i]) || below(b->only[i], path)) return true;
    return b->onlys == 0;
}

/* Four digits that mean something. */
static const char *digits(char out[16], double v) {
    double a = v < 0 ? -v : v;
    int after = a >= 1000 || a == 0 ? 0 : a >= 100 ? 1 : a >= 10 ? 2 : a >= .01 ? 3 : 6;
    snprintf(out, 16, "%.*f", after, v);
    return out;
}

static bool is_time(const char *unit) {
    return !strcmp(unit, "s") || !strcmp(unit, "ms") || !strcmp(unit, "us") || !strcmp(unit, "ns");
}

static void header(const struct bench *b) {
    if (json_array_size(b->figures) == 0)
        printf("%-38s %9s %19s %-8s %9s %6s\n", "figure (repeat it: --only FIGURE)", "median",
               "least .. most", "unit", "limit", "share");
}

static void command_of(const struct bench *b, const char *key, char out[256]) {
    int n = snprintf(out, 256, "bin/qerl-bench --only %s --kernels %s --threads %d", key,
                     b->kern.name, b->threads);
    if (b->quick) n += snprintf(out + n, 256 - (size_t)n, " --quick");
    if (b->data) snprintf(out + n, 256 - (size_t)n, " --data %s", b->data);
}

void bench_report(struct bench *b, const char *key, const struct figure *f) {
    char median[16], least[16], most[16], limit[16] = "-", share[16] = "-", range[40], command[256];
    double part = f->limit > 0 ? f->s.median / f->limit : 0;
    if (part > 0 && is_time(f->unit)) part = 1 / part;
    if (f->limit > 0) {
        digits(limit, f->limit);
        snprintf(share, sizeof share, "%.0f %%", 100 * part);
    }
    snprintf(range, sizeof range, "%s .. %s", digits(least, f->s.min), digits(most, f->s.max));
    header(b);
    printf("%-38s %9s %19s %-8s %9s %6s%s%s\n", key, digits(median, f->s.median), range, f->unit,
           limit, share, f->what ? "  " : "", f->what ? f->what : "");
    fflush(stdout);
    command_of(b, key, command);
    json_t *o = json_pack("{ss ss sf sf sf si ss}", "figure", key, "unit", f->unit, "median",
                          f->s.median, "min", f->s.min, "max", f->s.max, "repeats", f->s.n,
                          "command", command);
    if (f->limit > 0) {
        json_object_set_new(o, "limit", json_real(f->limit));
        json_object_set_new(o, "share", json_real(part));
    }
    if (f->what) json_object_set_new(o, "what", json_string(f->what));
    json_array_append_new(b->figures, o);
}

void bench_absent(struct bench *b, const char *key, const char *why) {
    header(b);
    printf("%-38s %9s %19s %-8s %9s %6s  %s\n", key, "-", "-", "-", "-", "-", why);
    fflush(stdout);
    json_array_append_new(b->figures, json_pack("{ss ss}", "figure", key, "absent", why));
}
