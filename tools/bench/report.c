/* report.c - figures as lines of a table on stdout and as entries of the JSON report.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tools/bench/bench.h"

#include "lib/base/clock.h"
#include "lib/base/fs.h"

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

bool bench_begins(struct bench *b, const char *key) {
    if (!bench_wants(b, key)) return false;
    if (b->deadline == 0 || clock_seconds() < b->deadline) return true;
    bench_absent(b, key, "no time left of --seconds");
    return false;
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

int bench_keep(const struct bench *b, struct err *e) {
    json_t *o = json_pack("{sO sO}", "machine", b->machine, "figures", b->figures);
    char *text = json_dumps(o, JSON_INDENT(1) | JSON_REAL_PRECISION(6));
    int rc = fs_replace(b->json, text, strlen(text), e);
    free(text);
    json_decref(o);
    return rc;
}

/* Takes o. */
static void enter(struct bench *b, json_t *o) {
    struct err e = { 0 };
    json_array_append_new(b->figures, o);
    if (b->json && bench_keep(b, &e) < 0) fprintf(stderr, "qerl-bench: %s\n", e.text);
}

/* The shares of a device's memory and peak, into the JSON and as words; "" on cores. */
static void shares(struct bench *b, const struct figure *f, json_t *o, char out[160]) {
    static const double least[] = { 0, .7, .6 };
    const struct limits *l = &b->limits;
    out[0] = 0;
    if (!b->plugin || f->seconds <= 0) return;
    const double bytes = f->work.bytes / f->seconds, flops = f->work.flops / f->seconds,
                 share[] = { 0, bytes / limits_read(l, f->set), flops / l->chip };
    json_object_set_new(o, "bytes_per_second", json_real(bytes));
    json_object_set_new(o, "flops_per_second", json_real(flops));
    json_object_set_new(o, "memory_share", json_real(share[TARGET_MEMORY]));
    json_object_set_new(o, "peak_share", json_real(share[TARGET_PEAK]));
    int n = snprintf(out, 160, "memory %.0f %%, peak %.0f %%", 100 * share[TARGET_MEMORY],
                     100 * share[TARGET_PEAK]);
    if (b->sheet.bytes > 0) {
        const double memory = bytes / b->sheet.bytes, peak = flops / b->sheet.flops;
        json_object_set_new(o, "datasheet_memory_share", json_real(memory));
        json_object_set_new(o, "datasheet_peak_share", json_real(peak));
        n += snprintf(out + n, 160 - (size_t)n, " (data sheet: %.0f %%, %.0f %%)", 100 * memory,
                      100 * peak);
    }
    if (f->target == TARGET_NONE) return;
    const bool met = share[f->target] >= least[f->target];
    const char *of = f->target == TARGET_MEMORY ? "memory" : "peak";
    snprintf(out + n, 160 - (size_t)n, "; target %.0f %% of %s: %s", 100 * least[f->target], of,
             met ? "met" : "missed");
    json_object_set_new(o, "target", json_real(least[f->target]));
    json_object_set_new(o, "target_of", json_string(of));
    json_object_set_new(o, "target_met", json_boolean(met));
}

void bench_report(struct bench *b, const char *key, const struct figure *f) {
    char median[16], least[16], most[16], limit[16] = "-", share[16] = "-", range[40], command[256];
    char of_device[160];
    double part = f->limit > 0 ? f->s.median / f->limit : 0;
    if (part > 0 && is_time(f->unit)) part = 1 / part;
    if (f->limit > 0) {
        digits(limit, f->limit);
        snprintf(share, sizeof share, "%.0f %%", 100 * part);
    }
    snprintf(range, sizeof range, "%s .. %s", digits(least, f->s.min), digits(most, f->s.max));
    header(b);
    command_of(b, key, command);
    json_t *o = json_pack("{ss ss sf sf sf si ss}", "figure", key, "unit", f->unit, "median",
                          f->s.median, "min", f->s.min, "max", f->s.max, "repeats", f->s.n,
                          "command", command);
    if (f->limit > 0) {
        json_object_set_new(o, "limit", json_real(f->limit));
        json_object_set_new(o, "share", json_real(part));
    }
    if (f->what) json_object_set_new(o, "what", json_string(f->what));
    shares(b, f, o, of_device);
    printf("%-38s %9s %19s %-8s %9s %6s%s%s%s%s\n", key, digits(median, f->s.median), range,
           f->unit, limit, share, f->what ? "  " : "", f->what ? f->what : "",
           of_device[0] ? "  " : "", of_device);
    fflush(stdout);
    enter(b, o);
}

static void absent(struct bench *b, const char *key, const char *why, bool failed) {
    header(b);
    printf("%-38s %9s %19s %-8s %9s %6s  %s\n", key, "-", "-", "-", "-", "-", why);
    fflush(stdout);
    enter(b, json_pack("{ss ss sb}", "figure", key, "absent", why, "failed", failed));
}

void bench_absent(struct bench *b, const char *key, const char *why) {
    absent(b, key, why, false);
}

void bench_failed(struct bench *b, const char *key, struct err *e) {
    b->failed++;
    absent(b, key, e->text, true);
    *e = (struct err){ 0 };
}
