/* expect.c - see expect.h. Met and not met are said only where the interval lies on one side.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/expect.h"

#include <ctype.h>
#include <math.h>

#include "lib/base/fs.h"
#include "lib/base/stat.h"
#include "pipe/contrast.h"

static int read_above(struct expectation *x, const char *text, struct err *e) {
    char *end;
    double v = strtod(text, &end);
    while (*end == ' ') end++;
    x->set = true;
    if (end != text && *end == '%') {
        v /= 100;
        end += 1 + strspn(end + 1, " ");
    }
    if (end != text && str_starts(end, "of ") && str_to_i64(end + 3, &x->n) && x->n > 0) end = "";
    if (end != text && !*end) {
        x->share = v;
        if (x->share >= 0 && x->share <= 1) return 0;
        if (strchr(text, '%') || !(v > 1 && v <= 100))
            return err_set(e, "'%s' for 'expect.above' is no share from 0 to 100 %%", text);
        return err_set(e, "'%s' for 'expect.above' is outside 0 .. 1: is '%s %%' meant?", text,
                       text);
    }
    for (const char *p = text; *p; p++)
        if (!isalnum((unsigned char)*p) && !strchr("._-", *p))
            return err_set(e, "'%s' for 'expect.above' is neither a share nor the name of a run",
                           text);
    x->run = text;
    return 0;
}

int expect_read(struct expectation *x, const struct lang *l, struct err *e) {
    const struct lang_value *above = lang_get(l, "expect.above"), *at = lang_get(l, "expect.at"),
                            *hypothesis = lang_get(l, "expect.hypothesis");
    if (!hypothesis) hypothesis = lang_get(l, "run.hypothesis");
    *x = (struct expectation){ .hypothesis = hypothesis ? hypothesis->text : "" };
    if (above && *above->text && read_above(x, above->text, e) < 0) return -1;
    x->best = at && strcmp(at->text, "best") == 0;
    if (at && !x->best && strcmp(at->text, "final") != 0)
        return err_set(e, "'%s' for 'expect.at' is not one of final|best", at->text);
    return 0;
}

void expect_text(char *out, size_t size, const struct expectation *x) {
    const char *at = x->best ? "at the best score" : "at the final score";
    if (x->run) snprintf(out, size, "above run %s %s", x->run, at);
    else if (x->n)
        snprintf(out, size, "above %.4g %% of %lld %s", 100 * x->share, (long long)x->n, at);
    else snprintf(out, size, "above %.4g %% %s", 100 * x->share, at);
}

/* Did the command line say so? The settings that a run keeps end each line with its origin. */
static bool by_option(const struct lang *l, const char *key) {
    const struct lang_value *v = lang_get(l, key);
    struct str text;
    if (!v || v->at.line < 1) return false;
    str_init(&text);
    char *line = fs_read(&text, v->at.file, 1 << 20, NULL) == 0 ? text.s : NULL;
    for (int i = 1; line && i < v->at.line; i++)
        if ((line = strchr(line, '\n'))) line++;
    if (line) line[strcspn(line, "\n")] = 0;
    const bool said = line && str_ends(line, "# --set");
    str_release(&text);
    return said;
}

/* A number is expected of the file's own model and data; NULL = it was these that ran. */
static const char *other_files(const struct lang *l) {
    static const char *const key[] = { "model.path", "data.train", "data.test" };
    for (size_t i = 0; i < COUNT_OF(key); i++)
        if (by_option(l, key[i]) && !by_option(l, "expect.above")) return key[i];
    return NULL;
}

/* The score that counts: the last, or the best of those after training began. */
static const struct score *score_of(const struct result *r, bool best) {
    const struct score *s = &r->score[r->score_n - 1];
    for (int i = 0; i < r->score_n && best; i++)
        if (r->score[i].step > 0 && score_percent(&r->score[i]) > score_percent(s))
            s = &r->score[i];
    return s;
}

static const char *const words[] = { "not distinguishable", "met by this run",
                                     "not met by this run" };     /* by enum verdict */

/* The best of many scores is lucky: the interval is widened for their number. */
static void judge_share(const struct expectation *x, const struct result *r, FILE *to) {
    const struct score *at = score_of(r, x->best);
    const int looks = x->best && r->score_n > 1 ? r->score_n - 1 : 1;
    const double alpha = CONTRAST_ALPHA / looks;
    const struct stat_span s = stat_wilson(at->right, at->n, alpha);
    struct stat_span d = { s.low - x->share, s.high - x->share };
    if (x->n)
        d = stat_two_shares(llround(x->share * (double)x->n), x->n, at->right, at->n, alpha);
    const enum verdict v = d.low > 0    ? VERDICT_BETTER
                           : d.high < 0 ? VERDICT_WORSE
                                        : VERDICT_NONE;
    fprintf(to, "%s, one seed: %.1f %% [%.1f, %.1f] at step %lld, %s", words[v],
            score_percent(at), 100 * s.low, 100 * s.high, (long long)at->step, score_noise(at));
    if (x->n) fprintf(to, "; %+.1f points [%+.1f, %+.1f]", score_percent(at) - 100 * x->share,
                      100 * d.low, 100 * d.high);
    fprintf(to, "\n");
}

/* The run of that name, or the one of this seed as matrix names its runs: of those the own kind
 * first. */
static bool read_named(struct result *other, const char *runs_dir, const char *name,
                       const struct result *r) {
    char of_seed[200];
    const char *own = result_value(r, "run.name"), *dash = own ? strrchr(own, '-') : NULL;
    const bool of_matrix = dash && dash[1] == 's' && isdigit((unsigned char)dash[2]);
    struct err e = { 0 };
    snprintf(of_seed, sizeof of_seed, "%.100s%s-s%lld", name,
             own && strstr(own, "-tiny-s") ? "-tiny" : "", (long long)r->seed);
    for (int i = 0; i < 2; i++) {
        if (result_read(other, runs_dir, (i == 0) == of_matrix ? of_seed : name, &e) == 0)
            return true;
        result_release(other);
    }
    return false;
}

static void judge_run(const struct expectation *x, const struct result *r, const char *runs_dir,
                      FILE *to) {
    struct result other;
    struct str why;
    str_init(&why);
    const bool there = read_named(&other, runs_dir, x->run, r);
    if (there) result_reasons(&other, r, &why);
    if (!there) {
        fprintf(to, "cannot be said: there is no run '%s' or '%s-s%lld' in '%s'; run it, then: "
                    "qerl-pipe status %s\n", x->run, x->run, (long long)r->seed, runs_dir,
                r->f.dir);
    } else if (why.len) {
        fprintf(to, "cannot be said: %.*s\n", (int)strcspn(why.s, "\n"), why.s);
    } else {
        const struct score *a = score_of(&other, x->best), *b = score_of(r, x->best);
        const int looks = x->best ? other.score_n + r->score_n - 2 : 1;
        const struct effect f = effect_of_runs(&other, a->step, r, b->step,
                                               CONTRAST_ALPHA / (looks > 1 ? looks : 1));
        fprintf(to, "%s, one seed: %+.1f points [%+.1f, %+.1f] to %s; at step %lld, beside its "
                    "step %lld\n",
                words[f.verdict], 100 * f.difference, 100 * f.low, 100 * f.high, other.f.id,
                (long long)b->step, (long long)a->step);
    }
    result_release(&other);
    str_release(&why);
}

void expect_print(const struct folder *f, const char *indent, FILE *to) {
    struct expectation x;
    struct result r;
    struct err e = { 0 };
    char runs[600], text[300];
    snprintf(runs, sizeof runs, "%s", f->dir);
    char *slash = strrchr(runs, '/');
    if (slash) *slash = 0;
    else snprintf(runs, sizeof runs, ".");
    const int rc = result_read(&r, runs, f->dir, &e);
    if (expect_read(&x, &r.conf, NULL) == 0) {
        if (*x.hypothesis) fprintf(to, "%shypothesis %s\n", indent, x.hypothesis);
        if (x.set) {
            expect_text(text, sizeof text, &x);
            fprintf(to, "%sexpected   %s: ", indent, text);
            const char *other = other_files(&r.conf);
            if (rc < 0) fprintf(to, "cannot be said: %s\n", e.text);
            else if (other && !x.run)
                fprintf(to, "cannot be said: other model or data (%s was set to '%s')\n", other,
                        result_value(&r, other));
            else if (!r.score_n || (!x.best && r.state != RUN_STATE_DONE))
                fprintf(to, "cannot be said before the final score\n");
            else if (x.run) judge_run(&x, &r, runs, to);
            else judge_share(&x, &r, to);
        }
    }
    result_release(&r);
}
