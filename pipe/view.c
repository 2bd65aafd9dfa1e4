/* view.c - see view.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/view.h"

#include <math.h>
#include <stdarg.h>
#include <time.h>
#include <unistd.h>

#include "lib/base/clock.h"
#include "lib/base/fs.h"

#define EVENT_SECONDS 5.0
#define DRAW_SECONDS 0.25

void view_open(struct view *v, const struct folder *f, int64_t steps) {
    char path[FS_PATH_MAX];
    const char *no_colour = getenv("NO_COLOR"), *term = getenv("TERM");
    *v = (struct view){ .steps = steps, .title = f->id, .reward = NAN, .sigma = NAN,
                        .tokens_per_second = NAN, .step_at_start = -1 };
    v->terminal = isatty(STDERR_FILENO) && term && strcmp(term, "dumb") != 0;
    v->colour = v->terminal && !(no_colour && *no_colour);
    v->started = clock_seconds();
    fs_join(path, sizeof path, f->dir, "log/launcher.log");
    v->log = fopen(path, "ae");
    fs_join(path, sizeof path, f->dir, "metrics.jsonl");
    tail_open(&v->metrics, path, true);
    fs_join(path, sizeof path, f->dir, "scores.jsonl");
    tail_open(&v->scores, path, true);
}

static void erase(struct view *v) {
    if (v->drawn) fprintf(stderr, "\033[%dA\033[J", v->drawn);
    v->drawn = 0;
}

void view_close(struct view *v) {
    erase(v);
    fflush(stderr);
    if (v->log) fclose(v->log);
    tail_close(&v->metrics);
    tail_close(&v->scores);
    v->log = NULL;
}

void view_event(struct view *v, const char *fmt, ...) {
    char text[2000], clock[16];
    time_t now = time(NULL);
    struct tm tm;
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    localtime_r(&now, &tm);
    strftime(clock, sizeof clock, "%H:%M:%S", &tm);
    erase(v);
    fprintf(stderr, "%s %s\n", clock, text);
    fflush(stderr);
    if (v->log) {
        fprintf(v->log, "%s %s\n", clock, text);
        fflush(v->log);
    }
}

/* ---- what the stages wrote ---- */

/* First of the names that the line has, as a number; NaN if none. */
static double metric(const json_t *o, const char *const *name, size_t n) {
    for (size_t i = 0; i < n; i++) {
        const json_t *x = json_object_get(o, name[i]);
        if (json_is_number(x)) return json_number_value(x);
    }
    return NAN;
}

static void take_metrics(struct view *v, const char *line, size_t bytes) {
    static const char *const reward[] = { "critic/rewards/mean", "critic/score/mean" };
    static const char *const sigma[] = { "noise/sigma_intended" }, *const realised[] = {
        "noise/sigma_realised"
    };
    static const char *const speed[] = { "perf/throughput" };
    int64_t step = -1;
    json_t *o = json_parse(line, bytes, "metrics.jsonl", NULL);
    json_may_int(o, "step", &step, 0, INT64_MAX, "metrics", NULL);
    if (step >= 0) {
        double r = metric(o, reward, COUNT_OF(reward)), s = metric(o, sigma, COUNT_OF(sigma)),
            t = metric(o, speed, COUNT_OF(speed));
        /* the first, or a learner that went back to its checkpoint */
        if (v->step_at_start < 0 || step < v->step) {
            v->step_at_start = step;
            v->started = clock_seconds();
        }
        v->step = step;
        if (!isnan(r)) v->reward = r;
        if (!isnan(s)) v->sigma = s;
        v->realised = metric(o, realised, COUNT_OF(realised));
        if (!isnan(t)) v->tokens_per_second = t;
    }
    json_decref(o);
}

static void eta_text(const struct view *v, char *out, size_t size) {
    int64_t made = v->step - v->step_at_start;
    double seconds = clock_seconds() - v->started;
    snprintf(out, size, "-");
    if (v->step_at_start < 0 || made < 1 || v->steps <= v->step) return;
    double left = seconds / (double)made * (double)(v->steps - v->step);
    if (left >= 3600)
        snprintf(out, size, "%d h %02d min", (int)(left / 3600), (int)(left / 60) % 60);
    else if (left >= 60) snprintf(out, size, "%d min %02d s", (int)(left / 60), (int)left % 60);
    else snprintf(out, size, "%.0f s", left);
}

static void step_text(const struct view *v, char *out, size_t size) {
    char eta[40];
    eta_text(v, eta, sizeof eta);
    int n = snprintf(out, size, "step %lld/%lld", (long long)v->step, (long long)v->steps);
    if (!isnan(v->reward)) n += snprintf(out + n, size - (size_t)n, "  reward %.3f", v->reward);
    if (!isnan(v->sigma)) n += snprintf(out + n, size - (size_t)n, "  sigma %.4g", v->sigma);
    if (v->sigma > 0) n += snprintf(out + n, size - (size_t)n, " (realised %.4g)", v->realised);
    if (!isnan(v->tokens_per_second)) n += snprintf(out + n, size - (size_t)n, "  %.0f tokens/s",
                                                    v->tokens_per_second);
    snprintf(out + n, size - (size_t)n, "  left %s", eta);
}

static void draw(struct view *v, const struct view_stage *s, int n) {
    char text[300];
    const char *bold = v->colour ? "\033[1m" : "", *plain = v->colour ? "\033[0m" : "";
    erase(v);
    step_text(v, text, sizeof text);
    /* no wrapping: a line stays a line */
    fprintf(stderr, "\033[?7l%s%s%s  %s\n", bold, v->title, plain, text);
    fprintf(stderr, "  last score %s\n", *v->score ? v->score : "not yet");
    for (int i = 0; i < n; i++)
        fprintf(stderr, "  %-12s %s%s%s\n", s[i].id, s[i].phase,
                *s[i].waits_for ? ", waits for " : "", s[i].waits_for);
    fprintf(stderr, "\033[?7h");
    fflush(stderr);
    v->drawn = n + 2;
}

void view_tick(struct view *v, const struct view_stage *s, int n) {
    struct score score;
    char text[300];
    int64_t before = v->step;
    while (tail_next(&v->scores)) {
        if (score_from_json(&score, v->scores.line.s, v->scores.line.len) < 0) continue;
        score_text(text, sizeof text, &score);
        snprintf(v->score, sizeof v->score, "step %lld: %.250s", (long long)score.step, text);
        view_event(v, "score step %lld: %s", (long long)score.step, text);
    }
    while (tail_next(&v->metrics)) take_metrics(v, v->metrics.line.s, v->metrics.line.len);
    double now = clock_seconds();
    if (!v->terminal && v->step != before &&
        (now - v->shown_at >= EVENT_SECONDS || v->step == v->steps)) {
        step_text(v, text, sizeof text);
        view_event(v, "%s", text);
        v->shown_at = now;
    }
    if (v->terminal && now - v->drawn_at >= DRAW_SECONDS) {
        draw(v, s, n);
        v->drawn_at = now;
    }
}
