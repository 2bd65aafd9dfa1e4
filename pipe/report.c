/* report.c - see report.h.
 *
 * Order: the table at the end of a run, runs/SUMMARY.md, status. Every accuracy is printed with n
 * and its 95 % interval; a difference is called one only where the intervals are apart.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/report.h"

#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <sys/stat.h>
#include <time.h>

#include "lib/base/fs.h"
#include "pipe/expect.h"
#include "pipe/result.h"
#include "pipe/tail.h"
#include "pipe/treatment.h"

/* ---- what the metrics say ---- */

json_t *report_last_metrics(const struct folder *f) {
    char path[FS_PATH_MAX];
    struct tail t;
    struct str line;
    fs_join(path, sizeof path, f->dir, "metrics.jsonl");
    tail_open(&t, path, true);
    t.read_bytes = t.read_bytes > 65536 ? t.read_bytes - 65536 : 0;
    str_init(&line);
    while (tail_next(&t))
        if (t.line.len && t.line.s[0] == '{') {
            str_clear(&line);
            str_add(&line, t.line.s, t.line.len);
        }
    tail_close(&t);
    json_t *o = line.len ? json_parse(line.s, line.len, "metrics.jsonl", NULL) : NULL;
    str_release(&line);
    return o;
}

static int64_t count_of(const json_t *metrics, const char *key) {
    int64_t n = 0;
    json_may_int(metrics, key, &n, 0, INT64_MAX, "metrics", NULL);
    return n;
}

static bool made_no_update(const json_t *metrics) {
    const int64_t step = count_of(metrics, "step");
    return step > 0 && count_of(metrics, "train/steps_skipped") +
                               count_of(metrics, "train/updates_nonfinite") >= step;
}

/* A run that never learned looks like one that learned nothing: it is said. */
static void print_no_update(const json_t *metrics, const char *indent, FILE *to) {
    const int64_t step = count_of(metrics, "step"),
                  starved = count_of(metrics, "train/steps_skipped"),
                  nonfinite = count_of(metrics, "train/updates_nonfinite");
    if (!made_no_update(metrics)) return;
    fprintf(to, "%sNO UPDATE  %lld of %lld steps skipped (%lld: no group could teach, %lld: not "
                "finite); the adapter is the one that it began with\n", indent,
            (long long)(starved + nonfinite), (long long)step, (long long)starved,
            (long long)nonfinite);
}

static double b_zeroed(const json_t *metrics) {
    return json_number_value(json_object_get(metrics, "quant/adapter/b_zeroed"));
}

/* An adapter that its own format reads as 0 is scored as if nothing had been learnt. */
static void print_unseen(const json_t *metrics, const char *indent, FILE *to) {
    const double zeroed = b_zeroed(metrics);
    if (zeroed > B_ZEROED_SAID)
        fprintf(to, "%sADAPTER UNSEEN  in step %lld quant.adapter read %.0f %% of B as 0: what was "
                    "learnt there is in no answer and no score\n", indent,
                (long long)json_integer_value(json_object_get(metrics, "step")), 100 * zeroed);
}

/* ---- the end of a run ---- */

static void print_series(const struct score *v, int n, FILE *to) {
    char text[300];
    const bool varies = strcmp(v[0].noise, v[n - 1].noise) != 0;
    fprintf(to, "%s, %s rule, %s, %s%s%s\n", v->split, v->rule, v->quant, score_noise(v),
            varies ? ", at the end " : "", varies ? v[n - 1].noise : "");
    fprintf(to, "  %8s %8s %8s %9s   %s\n", "step", "right", "n", "accuracy", "95 % interval");
    for (int i = 0; i < n; i++)
        fprintf(to, "  %8lld %8lld %8lld %7.1f %%   [%.1f, %.1f]\n", (long long)v[i].step,
                (long long)v[i].right, (long long)v[i].n, score_percent(&v[i]), 100 * v[i].low,
                100 * v[i].high);
    if (n < 2) return;
    const struct score *a = &v[0], *b = &v[n - 1];
    double gain = score_percent(b) - score_percent(a);
    bool apart = b->low > a->high || b->high < a->low;
    snprintf(text, sizeof text,
             apart ? "the 95 %% intervals are apart"
                   : "the 95 %% intervals overlap: not "
                     "distinguishable this way");
    fprintf(to, "  step %lld to %lld: %+.1f points; %s\n", (long long)a->step, (long long)b->step,
            gain, text);
}

/* Newest adapter of the run, or "". */
static void last_adapter(const char *dir, char out[FS_PATH_MAX]) {
    char parent[FS_PATH_MAX], best[64] = "";
    fs_join(parent, sizeof parent, dir, "adapters");
    DIR *d = opendir(parent);
    for (struct dirent *entry; d && (entry = readdir(d));)
        if (entry->d_name[0] == 'v' && !strchr(entry->d_name, '.') &&
            strcmp(entry->d_name, best) > 0)
            snprintf(best, sizeof best, "%.60s", entry->d_name);
    if (d) closedir(d);
    *out = 0;
    if (*best) fs_join(out, FS_PATH_MAX, parent, best);
}

static void print_places(const char *dir, FILE *to) {
    char adapter[FS_PATH_MAX], path[FS_PATH_MAX];
    static const struct { const char *what, *name; } place[] = {
        { "curves ", "metrics.jsonl" }, { "       ", "tensorboard" }, { "samples", "samples.md" },
    };
    last_adapter(dir, adapter);
    fprintf(to, "\n");
    if (*adapter) fprintf(to, "adapter  %s\n", adapter);
    for (size_t i = 0; i < COUNT_OF(place); i++) {
        fs_join(path, sizeof path, dir, place[i].name);
        if (*adapter && fs_exists(path)) fprintf(to, "%s  %s\n", place[i].what, path);
    }
}

static void print_next(const char *dir, FILE *to) {
    char adapter[FS_PATH_MAX];
    const char *me = program_invocation_name, *slash = strrchr(me, '/');
    int bin = slash ? (int)(slash - me) + 1 : 0;
    last_adapter(dir, adapter);
    if (!*adapter) return;
    fprintf(to, "\ntry next\n  %s rescore %s --rule flexible\n", me, dir);
    fprintf(to, "  %.*sqerl-eval -c %s/conf/eval.conf --in adapter= --set eval.adapter=%s\n", bin,
            me, dir, adapter);
    fprintf(to, "  %s check pipelines/e6b_qerl.pipe --set model.path=models/tiny\n", me);
}

static json_t *read_manifest(const struct folder *f) {
    char path[FS_PATH_MAX];
    fs_join(path, sizeof path, f->dir, "manifest.json");
    return json_parse_file(path, 1 << 22, NULL);
}

void report_results(const struct folder *f, FILE *to) {
    struct scores s;
    scores_read(&s, f->dir);
    fprintf(to, "\nrun %s\n", f->id);
    for (int i = 0, j; i < s.n; i = j) {
        j = scores_series_end(&s, i);
        print_series(&s.v[i], j - i, to);
    }
    if (!s.n) fprintf(to, "no scores\n");
    json_t *metrics = report_last_metrics(f);
    json_t *manifest = read_manifest(f);
    print_no_update(metrics, "  ", to);
    print_unseen(metrics, "  ", to);
    if (metrics) treatment_add_score(metrics, f->dir);
    treatment_print(json_object_get(manifest, "noise"), metrics, "noise    ", to);
    treatment_warnings(metrics, "  ", to);
    json_decref(manifest);
    json_decref(metrics);
    expect_print(f, "  ", to);
    print_places(f->dir, to);
    print_next(f->dir, to);
    scores_release(&s);
}

/* ---- runs/SUMMARY.md ---- */

static void cell(struct str *out, const char *text) {
    for (; *text; text++) {
        if (*text == '|') str_puts(out, "\\|");
        else str_add(out, *text == '\n' ? " " : text, 1);
    }
}

static void summary_score(struct str *out, const struct score *s) {
    str_printf(out, " %lld | %.1f %% (%lld/%lld) | %.1f - %.1f |", (long long)s->step,
               score_percent(s), (long long)s->right, (long long)s->n, 100 * s->low, 100 * s->high);
}

/* What a row of any series of the run begins with. */
static void summary_head(struct str *out, const struct folder *f, const json_t *m) {
    const char *exp_id = json_string_value(json_object_get(m, "exp_id")),
        *treated = json_string_value(json_object_get(m, "treatment"));
    const int64_t steps = json_integer_value(json_object_get(m, "steps"));
    str_printf(out, "| %s | ", f->id);
    cell(out, exp_id ? exp_id : "");
    json_t *metrics = report_last_metrics(f);
    str_printf(out, " | %s%s%s | ", run_state_name[folder_state(f, NULL, 0)],
               made_no_update(metrics) ? ", NO UPDATE" : "",
               b_zeroed(metrics) > B_ZEROED_SAID ? ", ADAPTER UNSEEN" : "");
    json_decref(metrics);
    cell(out, treated ? treated : "");
    if (steps < 0) str_puts(out, " | - |");
    else str_printf(out, " | %lld |", (long long)steps);
}

/* One row for each series: clean and noisy scores never share one. */
static void summary_run(struct str *out, const char *runs_dir, const char *id) {
    struct folder f = { .lock_fd = -1 };
    struct scores s;
    if (folder_find(&f, runs_dir, id, NULL) < 0) return;
    json_t *m = read_manifest(&f);
    scores_read(&s, f.dir);
    for (int i = 0, end; i < s.n; i = end) {
        end = scores_series_end(&s, i);
        const struct score *last = &s.v[end - 1];
        summary_head(out, &f, m);
        summary_score(out, &s.v[i]);
        summary_score(out, last);
        str_printf(out, " %s, %s, %s | ", last->split, last->rule, last->quant);
        cell(out, score_noise(last));
        str_puts(out, " |\n");
    }
    if (!s.n) {
        summary_head(out, &f, m);
        str_puts(out, " - | - | - | - | - | - | - | - |\n");
    }
    scores_release(&s);
    json_decref(m);
}

int report_summary(const char *runs_dir, struct err *e) {
    char **ids, path[FS_PATH_MAX];
    struct str out;
    str_init(&out);
    str_puts(
        &out,
        "# Runs\n\nWritten by qerl-pipe from the run records after each run. Intervals are 95 % "
        "(Wilson); overlapping ones\n"
        "show no difference.\n\n"
        "| run | experiment | state | treatment | steps | first step | score | interval, % | last "
        "step | score | interval, % "
        "| measured | noise |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|\n");
    int n = folder_list(runs_dir, &ids);
    for (int i = 0; i < n; i++) {
        summary_run(&out, runs_dir, ids[i]);
        free(ids[i]);
    }
    free(ids);
    fs_join(path, sizeof path, runs_dir, "SUMMARY.md");
    int rc = fs_replace(path, out.s, out.len, e);
    str_release(&out);
    return rc;
}

/* ---- status ---- */

/* The few metrics a reader asks for first; all of them are in metrics.jsonl. */
static void status_metrics(const json_t *o, FILE *to) {
    static const char *const key[] = { "critic/rewards/mean",  "actor/pg_loss",
                                       "actor/entropy",        "actor/grad_norm",
                                       "response_length/mean", "noise/sigma_intended",
                                       "noise/sigma_realised", "training/rollout_logp_differ",
                                       "perf/throughput",      "train/ranks",
                                       "train/staleness/mean" };
    for (size_t i = 0; i < COUNT_OF(key); i++) {
        const json_t *v = json_object_get(o, key[i]);
        if (json_is_number(v)) fprintf(to, "  %-30s %.6g\n", key[i], json_number_value(v));
    }
}

/* The GPUs of each stage that has any, or wanted some. */
static void status_devices(json_t *manifest, FILE *to) {
    const char *name;
    json_t *stage;
    json_object_foreach(json_object_get(manifest, "stages"), name, stage) {
        const json_t *all = json_object_get(stage, "devices"), *one,
                     *passed = json_object_get(stage, "passed_over");
        const char *place = json_string_value(json_object_get(stage, "place"));
        size_t i;
        if (passed)
            fprintf(to, "  place      %s on %s, not %s: %s\n", name, place ? place : "",
                    json_string_value(json_object_get(passed, "place")),
                    json_string_value(json_object_get(passed, "why")));
        if (json_array_size(all)) fprintf(to, "  place      %s on %s: ", name, place ? place : "");
        json_array_foreach(all, i, one) {
            const char *text = json_string_value(json_object_get(one, "name"));
            fprintf(to, "%s%s%s", i ? ", " : "", text ? text : "",
                    i + 1 < json_array_size(all) ? "" : "\n");
        }
    }
}

static void status_details(const struct folder *f, json_t *m, json_t *metrics,
                           const struct scores *s, FILE *to) {
    char text[300];
    fprintf(to, "  folder     %s\n", f->dir);
    static const char *const key[] = { "exp_id",  "question", "treatment",
                                       "started", "host",     "commit" };
    for (size_t i = 0; i < COUNT_OF(key); i++) {
        const char *v = json_string_value(json_object_get(m, key[i]));
        if (v && *v) fprintf(to, "  %-10s %s\n", key[i], v);
    }
    status_devices(m, to);
    for (int i = 0; i < s->n; i++) {
        score_text(text, sizeof text, &s->v[i]);
        fprintf(to, "  score      step %lld: %s\n", (long long)s->v[i].step, text);
    }
    expect_print(f, "  ", to);
    if (metrics) treatment_add_score(metrics, f->dir);
    treatment_print(json_object_get(m, "noise"), metrics, "  noise      ", to);
    treatment_warnings(metrics, "  ", to);
    print_no_update(metrics, "  ", to);
    print_unseen(metrics, "  ", to);
    status_metrics(metrics, to);
}

void report_status(const struct folder *f, bool details, FILE *to) {
    char reason[600], text[300] = "no score yet";
    struct scores s;
    int64_t step = -1, holder = folder_holder(f);
    json_t *m = read_manifest(f);
    enum run_state state = folder_state(f, reason, sizeof reason);
    scores_read(&s, f->dir);
    const struct score *last = s.n ? &s.v[scores_series_end(&s, 0) - 1] : NULL;
    if (last) score_text(text, sizeof text, last);
    json_t *o = report_last_metrics(f);
    json_may_int(o, "step", &step, 0, INT64_MAX, "metrics", NULL);
    fprintf(to, "%s  %s%s%s", f->id, run_state_name[state], *reason ? ": " : "", reason);
    if (state == RUN_STATE_RUNNING && !holder)
        fprintf(to, " (but no process works on it: qerl-pipe resume %s)", f->dir);
    if (holder > 1) fprintf(to, " (process %lld)", (long long)holder);
    int64_t steps = json_integer_value(json_object_get(m, "steps"));
    if (steps >= 0)
        fprintf(to, "; step %lld of %lld", (long long)(step < 0 ? 0 : step), (long long)steps);
    fprintf(to, "; %s", text);
    if (last && last->step != (step < 0 ? 0 : step))
        fprintf(to, " at step %lld", (long long)last->step);
    fputc('\n', to);
    if (details) status_details(f, m, o, &s, to);
    json_decref(o);
    json_decref(m);
    scores_release(&s);
}
