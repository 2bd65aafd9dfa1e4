/* check.c - the plan as `qerl-pipe check` prints it.
 * SPDX-License-Identifier: Apache-2.0 */

#include "pipe/fetch.h"
#include "pipe/expect.h"
#include "pipe/report.h"
#include "pipe/treatment.h"

#include <math.h>
#include <sys/sysinfo.h>

#include "lib/base/fs.h"

void bytes_text(char *out, size_t size, double bytes) {
    static const char *const unit[] = { "B", "KiB", "MiB", "GiB", "TiB" };
    size_t i = 0;
    while (bytes >= 1024 && i + 1 < COUNT_OF(unit)) bytes /= 1024, i++;
    snprintf(out, size, i && bytes < 100 ? "%.1f %s" : "%.0f %s", bytes, unit[i]);
}

static void print_head(const struct pipeline *p, FILE *to) {
    static const char *const key[] = { "exp_id", "tensorboard", "question", "source" };
    fprintf(to, "experiment   %s (%s)\n", p->name, p->lang.path);
    for (size_t i = 0; i < COUNT_OF(key); i++) {
        char name[64];
        snprintf(name, sizeof name, "run.%s", key[i]);
        const char *text = pipeline_text(p, name, NULL);
        if (text) fprintf(to, "%-12s %s\n", key[i], text);
    }
}

static void print_expected(const struct pipeline *p, FILE *to) {
    struct expectation x;
    char text[300];
    if (expect_read(&x, &p->lang, NULL) < 0) return;
    if (*x.hypothesis) fprintf(to, "hypothesis   %s\n", x.hypothesis);
    if (!x.set) return;
    expect_text(text, sizeof text, &x);
    fprintf(to, "expected     %s\n", text);
}

/* What every process takes of a GPU before it has a tensor: the driver's context, the kernels, the
 * buffers of NCCL. A round figure, since none of them says what it takes. */
enum { GPU_PROCESS_BYTES = 1 << 30 };

/* What a stage takes of each of its GPUs: what a process makes, the weights and the driver's;
 * -1 where it is unknown, without the model. */
static double device_needs(const json_t *of) {
    const json_t *weights = json_object_get(of, "weights_bytes");
    return weights ? json_number_value(json_object_get(of, "memory_bytes")) +
                         json_number_value(weights) + GPU_PROCESS_BYTES
                   : -1;
}

static double device_has(const json_t *device) {
    return json_number_value(json_object_get(device, "memory_bytes"));
}

static void print_device(const json_t *of, const json_t *device, FILE *to) {
    char needs[120] = "what it needs is unknown without the model", sum[32], own[32], has[32],
         unused[32];
    const double needed = device_needs(of), all = device_has(device),
                 left = json_number_value(json_object_get(device, "free_bytes"));
    bytes_text(sum, sizeof sum, needed);
    bytes_text(own, sizeof own, GPU_PROCESS_BYTES);
    if (needed >= 0)
        snprintf(needs, sizeof needs,
                 "needs %s with the weights and %s for the driver and NCCL", sum, own);
    bytes_text(has, sizeof has, all);
    bytes_text(unused, sizeof unused, left);
    fprintf(to, "             on %s (%s): %s, has %s, %s free%s\n",
            json_string_value(json_object_get(device, "name")),
            json_string_value(json_object_get(device, "arch")), needs, has, unused,
            needed > all    ? ": TOO LITTLE"
            : needed > left ? ": more than is free now"
                            : "");
}

/* The GPUs that are used: ranks may be fewer. */
static size_t devices_used(const json_t *of) {
    const size_t n = json_array_size(json_object_get(of, "devices")),
                 ranks = (size_t)json_integer_value(json_object_get(of, "ranks"));
    return ranks && ranks < n ? ranks : n;
}

static void print_devices(const json_t *of, FILE *to) {
    for (size_t i = 0; i < devices_used(of); i++)
        print_device(of, json_array_get(json_object_get(of, "devices"), i), to);
}

int plan_room(const struct plan *pl, const struct pipeline *p, struct err *e) {
    int rc = 0;
    for (int i = 0; i < p->stages; i++) {
        const json_t *of = pl->of[i], *all = json_object_get(of, "devices");
        const char *key = json_string_value(json_object_get(of, "memory_key"));
        for (size_t k = 0; k < devices_used(of); k++) {
            char place[500], needs[32], has[32];
            if (device_needs(of) <= device_has(json_array_get(all, k))) continue;
            place_text(place, sizeof place, &p->stage[i].place.choice[p->stage[i].place.taken]);
            bytes_text(needs, sizeof needs, device_needs(of));
            bytes_text(has, sizeof has, device_has(json_array_get(all, k)));
            rc = err_more(e, EXIT_ENV, "stage '%s' on %s needs %s, the GPU has %s in all: place it "
                          "on a larger one%s%s", p->stage[i].name, place, needs, has,
                          key ? ", or set a smaller " : "", key ? key : "");
            break;
        }
    }
    return rc;
}

/* Memory and keys and values are those of one rank. */
static void print_ranks(const json_t *of, FILE *to) {
    const json_int_t ranks = json_integer_value(json_object_get(of, "ranks")),
                     cores = json_integer_value(json_object_get(of, "rank_cores"));
    if (ranks < 2) return;
    fprintf(to, ", in each of %d ranks with ", (int)ranks);
    if (json_object_get(of, "devices")) fprintf(to, "a GPU and ");
    fprintf(to, "%d core%s", (int)cores, cores == 1 ? "" : "s");
}

static void print_stages(const struct plan *pl, const struct pipeline *p, FILE *to) {
    fprintf(to, "\nstages\n");
    for (int i = 0; i < p->stages; i++) {
        const struct pipe_stage *s = &p->stage[i];
        char place[500], memory[32] = "-", pages[32];
        int64_t bytes = 0, pages_bytes = 0;
        struct err e = { 0 };
        place_text(place, sizeof place, &s->place.choice[s->place.taken]);
        json_may_int(pl->of[i], "memory_bytes", &bytes, 0, INT64_MAX, "plan", &e);
        json_may_int(pl->of[i], "pages_bytes", &pages_bytes, 0, INT64_MAX, "plan", &e);
        if (bytes) bytes_text(memory, sizeof memory, (double)bytes);
        fprintf(to, "  %-10s %-20s place %-10s (of: %s)  memory %s", s->name, s->exec_asked, place,
                s->place_asked, memory);
        bytes_text(pages, sizeof pages, (double)pages_bytes);
        if (pages_bytes) fprintf(to, ", %s of it keys and values", pages);
        print_ranks(pl->of[i], to);
        if (s->processes > 1 && s->place.choice[s->place.taken].gpu)
            fprintf(to, ", in each of %d processes with a GPU", s->processes);
        else if (s->processes > 1) fprintf(to, "  x %d replicas", s->processes);
        fputc('\n', to);
        print_devices(pl->of[i], to);
    }
    for (int i = 0; i < p->lang.links; i++) {
        const struct lang_link *k = &p->lang.link[i];
        fprintf(to, "  %s.%s -> %s.%s  %s/%s\n", k->from, k->from_port, k->to, k->to_port,
                k->from_kind, k->to_kind);
    }
}

/* 0, 200, 400, ..., 3600, 3736: long lists with one stride are shortened. */
static void print_scored(const json_t *scored, FILE *to) {
    size_t n = json_array_size(scored);
    fprintf(to, "scored steps %zu: ", n);
    for (size_t i = 0; i < n; i++) {
        if (n > 12 && i == 3) {
            fprintf(to, "..., ");
            i = n - 2;
        }
        fprintf(to, "%lld%s", (long long)json_integer_value(json_array_get(scored, i)),
                i + 1 < n ? ", " : "\n");
    }
    if (!n) fprintf(to, "none\n");
}

static void print_sigma(const json_t *sigma, FILE *to) {
    fprintf(to, "sigma        by completed steps\n");
    for (size_t i = 0; i < json_array_size(sigma); i++) {
        const json_t *row = json_array_get(sigma, i);
        int64_t from = 0, last = 0;
        double value = 0, end = NAN;
        struct err e = { 0 };
        json_may_num(row, "sigma_to", &end, "plan", &e);
        json_may_int(row, "from", &from, 0, INT64_MAX, "plan", &e);
        json_may_int(row, "to", &last, 0, INT64_MAX, "plan", &e);
        json_may_num(row, "sigma", &value, "plan", &e);
        fprintf(to, "  %6lld .. %-6lld  %.6g", (long long)from, (long long)last, value);
        if (!isnan(end)) fprintf(to, " to %.6g", end);
        fputc('\n', to);
    }
}

/* What AQN hits; multipliers of layers, and when zones change them. */
static void print_targets(const struct plan *pl, const struct pipeline *p, FILE *to) {
    const json_t *aqn = NULL, *zone;
    size_t i;
    for (int s = 0; s < p->stages && !aqn; s++) aqn = json_object_get(pl->of[s], "aqn");
    if (!aqn) return;
    fprintf(to, "  hits %lld norms, %lld linears: %lld values\n",
            (long long)json_integer_value(json_object_get(aqn, "norms")),
            (long long)json_integer_value(json_object_get(aqn, "linears")),
            (long long)json_integer_value(json_object_get(aqn, "elements")));
    json_array_foreach(json_object_get(aqn, "zones"), i, zone) {
        const char *layers = json_string_value(json_object_get(zone, "layers"));
        const long long from = json_integer_value(json_object_get(zone, "from"));
        if (i || (layers && *layers))
            fprintf(to, "  from step %lld layers %s\n", from, layers && *layers ? layers : "x1");
    }
}

static bool any_sigma(const json_t *sigma) {
    for (size_t i = 0; i < json_array_size(sigma); i++)
        if (json_number_value(json_object_get(json_array_get(sigma, i), "sigma")) > 0) return true;
    return false;
}

/* The noise that is meant: the schedule of AQN, then operators and modules. */
static void print_noise(const struct plan *pl, const struct pipeline *p, FILE *to) {
    json_t *rows = treatment_rows(pl, p->stages);
    const bool aqn = any_sigma(pl->sigma);
    if (aqn) {
        print_sigma(pl->sigma, to);
        print_targets(pl, p, to);
    }
    if (json_array_size(rows)) {
        fprintf(to, "noise        intended, and sites in one pass through the network\n");
        treatment_print(rows, NULL, "  ", to);
    } else if (!aqn && pl->steps >= 0) {
        fprintf(to, "noise        none\n");
    }
    json_decref(rows);
}

static bool on_gpus(const json_t *of) { return json_object_get(of, "devices"); }

static bool weights_on_gpus(const struct plan *pl, const struct pipeline *p) {
    for (int i = 0; i < p->stages; i++)
        if (on_gpus(pl->of[i]) && json_object_get(pl->of[i], "weights_bytes")) return true;
    return false;
}

/* One line for each packed file, however many stages on cores map it, and one for GPUs, where
 * every process has its own; returns the bytes of those on cores. */
static int64_t print_weights(const struct plan *pl, const struct pipeline *p, FILE *to) {
    int64_t all = 0;
    for (int i = 0; i < p->stages; i++) {
        const json_t *label = json_object_get(pl->of[i], "weights");
        const int64_t bytes = json_integer_value(json_object_get(pl->of[i], "weights_bytes"));
        char text[32];
        const bool gpus = on_gpus(pl->of[i]);
        bool told = !json_is_string(label);
        for (int j = 0; j < i && !told; j++)
            told = on_gpus(pl->of[j]) == gpus &&
                   json_equal(label, json_object_get(pl->of[j], "weights"));
        if (told) continue;
        bytes_text(text, sizeof text, (double)bytes);
        const char *count = json_string_value(json_object_get(pl->of[i], "quantised"));
        fprintf(to, "weights      %s as %s%s%s%s, %s\n", text, json_string_value(label),
                count ? " (" : "", count ? count : "", count ? ")" : "",
                gpus                     ? "copied to each GPU"
                : weights_on_gpus(pl, p) ? "mapped once for all stages on cores"
                                         : "mapped once for all stages");
        if (!gpus) all += bytes;
    }
    return all;
}

/* What the newest run of that name took; an estimate knows neither machine nor settings so well. */
static void print_measured(const struct pipeline *p, FILE *to) {
    struct folder f = { .lock_fd = -1 };
    int64_t step = 0;
    double seconds = 0;
    if (folder_find(&f, p->runs_dir, p->name, NULL) < 0) return;
    json_t *last = report_last_metrics(&f);
    json_may_int(last, "step", &step, 0, INT64_MAX, "metrics", NULL);
    json_may_num(last, "timing_s/step", &seconds, "metrics", NULL);
    if (seconds > 0)
        fprintf(to, "             measured in %s, maybe under other settings: %.2f s for step "
                    "%lld\n", f.id, seconds, (long long)step);
    json_decref(last);
}

static void print_costs(const struct plan *pl, const struct pipeline *p, FILE *to) {
    char text[32], have[32];
    struct sysinfo si;
    int64_t disk = fs_free_bytes(fs_is_dir(p->runs_dir) ? p->runs_dir : ".");
    if (pl->prompts_least >= 0)
        fprintf(to, "prompts      at least %lld, at most %lld\n", (long long)pl->prompts_least,
                (long long)pl->prompts_most);
    const double needed = (double)(pl->memory_bytes + print_weights(pl, p, to));
    bytes_text(text, sizeof text, (double)pl->memory_bytes);
    if (pl->memory_bytes) {
        fprintf(to, "memory       %s in all stages%s together", text,
                weights_on_gpus(pl, p) ? " on cores" : "");
        if (sysinfo(&si) == 0) {
            double total = (double)si.totalram * si.mem_unit;
            bytes_text(have, sizeof have, total);
            fprintf(to, "; the machine has %s%s", have,
                    needed > total ? ": TOO LITTLE" : "");
        }
        fprintf(to, "\n");
    } else if (weights_on_gpus(pl, p)) {
        fprintf(to, "memory       on GPUs only, see the stages\n");
    }
    bytes_text(text, sizeof text, (double)pl->disk_bytes);
    bytes_text(have, sizeof have, (double)disk);
    if (pl->disk_bytes)
        fprintf(to, "disk         %s; free %s%s\n", text, have,
                disk >= 0 && pl->disk_bytes > disk ? ": TOO LITTLE" : "");
    bool hours = pl->seconds_per_step * (double)pl->steps >= 3600;
    if (pl->seconds_per_step > 0 && pl->steps >= 0)
        fprintf(to, "time         about %.1f %s without scoring (%.2f s a step)%s%s\n",
                pl->seconds_per_step * (double)pl->steps / (hours ? 3600 : 60),
                hours ? "hours" : "minutes", pl->seconds_per_step, pl->seconds_how ? ": " : "",
                pl->seconds_how ? pl->seconds_how : "");
    print_measured(p, to);
}

static void print_files(const struct plan *pl, FILE *to) {
    if (pl->files) fprintf(to, "\nfiles\n");
    for (int i = 0; i < pl->files; i++) {
        const struct plan_file *f = &pl->file[i];
        char size[32] = "", lines[40] = "";
        if (f->bytes >= 0) bytes_text(size, sizeof size, (double)f->bytes);
        if (f->lines >= 0) snprintf(lines, sizeof lines, "%lld lines", (long long)f->lines);
        fprintf(to, "  %-8s %s  %s%s%s\n", f->role, f->path, size, *lines && *size ? ", " : "",
                lines);
        if (f->absent) {
            struct str hint;
            str_init(&hint);
            fetch_hint(&hint, f->path, f->role, f->absent);
            fprintf(to, "           absent: %s\n", hint.s);
            str_release(&hint);
        } else fprintf(to, "           sha256 %s\n", f->sha256 ? f->sha256 : "not computed");
    }
}

static void print_notes(const struct plan *pl, const struct pipeline *p, FILE *to) {
    struct str passed;
    str_init(&passed);
    pipeline_passed(p, &passed);
    bool any = passed.len;
    if (any) fprintf(to, "\nnotes\n");
    char *rest = passed.s;
    for (char *line; any && (line = strsep(&rest, "\n")) && *line;) fprintf(to, "  %s\n", line);
    str_release(&passed);
    for (int i = 0; i < p->stages; i++) {
        const json_t *notes = json_object_get(pl->of[i], "notes");
        for (size_t j = 0; j < json_array_size(notes); j++) {
            const char *text = json_string_value(json_array_get(notes, j));
            if (!text) continue;
            if (!any) fprintf(to, "\nnotes\n");
            any = true;
            fprintf(to, "  %s: %s\n", p->stage[i].name, text);
        }
    }
}

void plan_print(const struct plan *pl, const struct pipeline *p, FILE *to) {
    print_head(p, to);
    print_expected(p, to);
    print_stages(pl, p, to);
    fprintf(to, "\n");
    if (pl->steps >= 0) fprintf(to, "steps        %lld\n", (long long)pl->steps);
    if (pl->scored) print_scored(pl->scored, to);
    print_noise(pl, p, to);
    print_costs(pl, p, to);
    print_files(pl, to);
    print_notes(pl, p, to);
}

void plan_print_absent(const struct plan *pl, FILE *to) {
    struct str what, get;
    str_init(&what);
    str_init(&get);
    for (int i = 0; i < pl->files; i++) {
        const struct plan_file *f = &pl->file[i];
        if (!f->absent) continue;
        str_printf(&what, "%s'%s'", what.len ? ", " : "", f->path);
        struct fetch_row row;
        struct str how;
        str_init(&how);
        if (fetch_find(&row, f->path)) str_printf(&how, "tools/fetch %s", row.name);
        else fetch_hint(&how, f->path, f->role, f->absent);
        if (!get.len || !strstr(get.s, how.s)) str_printf(&get, "%s%s", get.len ? "; " : "", how.s);
        str_release(&how);
    }
    fprintf(to, "missing: %s\nget it:  %s\n", what.s ? what.s : "", get.s ? get.s : "");
    str_release(&what);
    str_release(&get);
}
