/* matrix_doses.c - dose and response of one file of a sweep: what each value does to the clean
 * score, and to the score under the noise of that value where a run has one.
 *
 * Order: where noisy scores are found, the arms, one row, the table.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/matrix.h"

#include <dirent.h>

#include "lib/base/fs.h"
#include "lib/base/stat.h"
#include "pipe/compare.h"
#include "pipe/table.h"

enum { CLEAN, NOISY, KINDS };
struct dose { const char *value; struct arm arm[KINDS]; };       /* the runs with such a score */
struct doses { struct dose v[VALUES_MAX]; int n; bool noisy; double alpha; };

/* ---- noisy scores ---- */

/* "stepSTEP-noise_SIZE-trained-n_N-sSEED" of `qerl-pipe eval`; a SIZE may hold a '-'. */
static bool is_grid_cell(const char *name, int64_t step, double size, int64_t seed) {
    const char *noise = strstr(name, "-noise_"), *format = strstr(name, "-trained-n_"),
               *end = strrchr(name, '-');
    char text[24];
    int64_t at, of;
    double is;
    if (!noise || !format || format < noise || end <= format || end[1] != 's') return false;
    noise += strlen("-noise_");
    snprintf(text, sizeof text, "%.*s", (int)(format - noise), noise);
    at = strtoll(name + strlen("step"), NULL, 10);
    return at == step && str_to_i64(end + 2, &of) && of == seed && str_to_f64(text, &is) &&
           is == size;
}

/* The offline score that `qerl-pipe eval --noise SIZE` kept of the last step of r, of as many
 * questions as the run's own. */
static bool find_grid_score(struct result *r, const char *value) {
    const struct score last = r->score[r->score_n - 1];
    char path[FS_PATH_MAX];
    bool found = false;
    double size;
    if (!str_to_f64(value, &size) || size <= 0) return false;
    fs_join(path, sizeof path, r->f.dir, "eval");
    DIR *d = opendir(path);
    for (struct dirent *entry; d && !found && (entry = readdir(d));) {
        char dir[FS_PATH_MAX];
        if (!is_grid_cell(entry->d_name, last.step, size, r->seed)) continue;
        fs_join(dir, sizeof dir, path, entry->d_name);
        found = result_use_offline(r, dir, NULL) == 0 && r->score->n == last.n &&
                !strcmp(r->score->quant, last.quant) && !strcmp(r->score->rule, last.rule);
    }
    if (d) closedir(d);
    return found;
}

/* r read once more, with the scores under noise that belong to its value; false: it has none. */
static bool read_noisy(struct result *r, const struct result *of, const struct matrix *m,
                       const char *value) {
    const int64_t last = of->score[of->score_n - 1].step;
    if (result_read(r, m->line->runs_dir, of->f.dir, NULL) < 0) return false;
    if (result_use_noisy(r, NULL) == 0 && result_score(r, last)) return true;
    return !strcmp(m->key, "noise.ops.scale") && find_grid_score(r, value);
}

/* ---- arms ---- */

static void add(struct arm *a, struct result *r) {
    if (a->n < ARM_RUNS_MAX) a->run[a->n++] = r;
}

static bool is_silent(const char *value) {
    double v;
    return !strcmp(value, "off") || (str_to_f64(value, &v) && v == 0);
}

/* The arms of one file, by value; runs that could not be read are left out and said. */
static void read_doses(struct doses *d, const struct matrix *m, const char *file,
                       struct result *store, int *stored, FILE *to) {
    for (int v = 0; v < m->values; v++) {
        struct dose *x = &d->v[d->n];
        *x = (struct dose){ .value = m->value[v] };
        for (int i = 0; i < m->cells; i++) {
            const struct cell *c = &m->cell[i];
            struct err e = { 0 };
            if (c->file != file || c->value != m->value[v] || !cell_is_done(c)) continue;
            struct result *r = &store[(*stored)++], *noisy = &store[(*stored)++];
            if (result_read(r, m->line->runs_dir, c->f.dir, &e) < 0)
                fprintf(to, "  %s is left out: %s\n", c->name, e.text);
            else if (r->score_n && !score_is_clean(r->score)) add(&x->arm[NOISY], r);
            else if (r->score_n) {
                add(&x->arm[CLEAN], r);
                if (read_noisy(noisy, r, m, x->value)) add(&x->arm[NOISY], noisy);
            }
        }
        /* without noise the score under it is the clean one */
        if (is_silent(x->value) && !x->arm[NOISY].n) x->arm[NOISY] = x->arm[CLEAN];
        else if (x->arm[NOISY].n) d->noisy = true;
        if (x->arm[CLEAN].n || x->arm[NOISY].n) d->n++;
        else fprintf(to, "  %s = %s is left out: no run of it is done\n", m->key, m->value[v]);
    }
}

static int64_t last_step(const struct arm *a) {
    return a->run[0]->score[a->run[0]->score_n - 1].step;
}

static const struct result *first_run(const struct dose *d) {
    return d->arm[CLEAN].n ? d->arm[CLEAN].run[0] : d->arm[NOISY].run[0];
}

/* What the sweep's section is called in the rows of the treatment; NULL = its noise is no row. */
static const char *kind_of(const char *key) {
    return str_starts(key, "noise.ops.")       ? "op"
           : str_starts(key, "noise.modules.") ? "module"
                                               : NULL;
}

/* A value above 0 that made no noise, say because another key leaves it off. */
static void say_no_noise(const struct matrix *m, const struct dose *d, FILE *to) {
    const char *kind = kind_of(m->key);
    if (!kind || is_silent(d->value)) return;
    const json_t *rows = json_object_get(first_run(d)->manifest, "noise");
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const json_t *row = json_array_get(rows, i);
        const char *is = json_string_value(json_object_get(row, "kind"));
        if (is && !strcmp(is, kind) && json_number_value(json_object_get(row, "sites")) > 0) return;
    }
    fprintf(to, "  %s = %s: NO NOISE was in force in these runs\n", m->key, d->value);
}

/* Two doses may have been scored in different formats: then nothing is tested, and it is said.
 * Other noise in noisy scores is what a sweep is for. */
static bool comparable(const struct dose *a, const struct dose *b, FILE *to) {
    struct str why;
    bool ok = true;
    str_init(&why);
    result_reasons(first_run(a), first_run(b), &why);
    for (char *line = why.s, *end; line && *line; line = end + 1) {
        end = strchr(line, '\n');
        if (str_starts(line, "the noise during evaluation")) continue;
        fprintf(to, "  %s beside %s: %.*s\n", b->value, a->value, (int)(end - line), line);
        ok = false;
    }
    str_release(&why);
    return ok;
}

/* ---- one row ---- */

static void accuracy_cells(struct table *t, const struct arm *a) {
    double v[ARM_RUNS_MAX];
    if (!a->n) {
        for (int i = 0; i < 2; i++) table_cell(t, "-");
        return;
    }
    const int64_t step = last_step(a);
    for (int i = 0; i < a->n; i++) v[i] = result_accuracy(a->run[i], step);
    const struct stat_span s = stat_mean_share(v, a->n, result_score(a->run[0], step)->n,
                                               CONTRAST_ALPHA);
    table_cell(t, "%.1f %%", 100 * arm_accuracy(a, step));
    table_cell(t, "[%.1f, %.1f]", 100 * s.low, 100 * s.high);
}

/* Beside the first value; true: worse than it. */
static bool difference_cells(struct table *t, const struct doses *d, int i, int kind, bool may) {
    const struct arm *base = &d->v[0].arm[kind], *other = &d->v[i].arm[kind];
    if (i == 0 || !may || !base->n || !other->n) {
        for (int j = 0; j < 2; j++) table_cell(t, "-");
        table_cell(t, "%s", i == 0 ? "the first value"
                            : may  ? "no such score"
                                   : "not compared");
        return false;
    }
    const struct effect e = effect_of_arms(base, last_step(base), other, last_step(other),
                                           d->alpha);
    table_cell(t, "%+.1f", 100 * e.difference);
    table_cell(t, "[%+.1f, %+.1f]", 100 * e.low, 100 * e.high);
    char reading[80];
    effect_reading(reading, &e);
    table_cell(t, "%s%s", reading,
               contrast_of_treatments(&e) ? "" : " (two adapters)");
    return e.verdict == VERDICT_WORSE;
}

/* ---- the table ---- */

/* With few seeds the difference is that of two adapters, not of the means beside it. */
static void say_few_seeds(const struct doses *d, FILE *to) {
    const struct dose *base = &d->v[0];
    for (int i = 1; i < d->n; i++)
        for (int kind = CLEAN; kind < KINDS; kind++) {
            const struct arm *x = &base->arm[kind], *y = &d->v[i].arm[kind];
            const struct result *a, *b;
            if (!x->n || !y->n || x->n + y->n == 2) continue;
            if (x->n >= ARM_SEEDS_MIN && y->n >= ARM_SEEDS_MIN) continue;
            arms_pick(x, y, &a, &b);
            fprintf(to, "  two adapters: fewer than %d seeds of a value; the difference is that of "
                        "seed %lld, not of the means beside it\n", ARM_SEEDS_MIN,
                    (long long)b->seed);
            return;
        }
}

static void say_worse(const struct doses *d, int worse, const char *by, FILE *to) {
    if (worse) fprintf(to, "  %sthe first value that is worse than %s: %s\n", by, d->v[0].value,
                       d->v[worse].value);
    else fprintf(to, "  %sno value is worse than %s, within these intervals\n", by, d->v[0].value);
}

static void print_doses(const struct matrix *m, struct doses *d, FILE *to) {
    const int looks = (d->n - 1) * (d->noisy ? KINDS : 1);
    struct table t;
    int worse[KINDS] = { 0 };
    char head[300];
    d->alpha = CONTRAST_ALPHA / looks;
    snprintf(head, sizeof head, "<%.80s|seeds|step|n|%s|95 %%|difference|interval|<reading%s",
             m->key, d->noisy ? "clean" : "accuracy",
             d->noisy ? "|noisy|95 %|difference|interval|<reading" : "");
    table_init(&t, head);
    for (int i = 0; i < d->n; i++) {
        const struct dose *x = &d->v[i];
        const struct arm *any = x->arm[CLEAN].n ? &x->arm[CLEAN] : &x->arm[NOISY];
        const bool may = i == 0 || comparable(&d->v[0], x, to);
        say_no_noise(m, x, to);
        table_cell(&t, "%s", x->value);
        table_cell(&t, "%d", any->n);
        table_cell(&t, "%lld", (long long)last_step(any));
        table_cell(&t, "%lld", (long long)result_score(any->run[0], last_step(any))->n);
        for (int kind = CLEAN; kind < (d->noisy ? KINDS : NOISY); kind++) {
            accuracy_cells(&t, &x->arm[kind]);
            if (difference_cells(&t, d, i, kind, may) && !worse[kind]) worse[kind] = i;
        }
    }
    table_print(&t, false, to);
    table_release(&t);
    fprintf(to, "  differences to the first value hold together at 95 %% (Bonferroni: %.4g %% "
                "each)\n", 100 * (1 - d->alpha));
    say_few_seeds(d, to);
    say_worse(d, worse[CLEAN], d->noisy ? "clean score: " : "", to);
    if (!d->noisy) return;
    say_worse(d, worse[NOISY], "noisy score: ", to);
    fprintf(to, "  noisy: the same adapter under the noise of its value; where that is none, the "
                "clean score\n");
}

void matrix_print_doses(const struct matrix *m, const char *file, FILE *to) {
    struct doses *d = mem_alloc(sizeof *d);
    struct result *store = mem_alloc(2 * (size_t)m->cells * sizeof *store);
    int stored = 0;
    fprintf(to, "\n%s: dose and response\n", file);
    read_doses(d, m, file, store, &stored, to);
    if (d->n > 1) print_doses(m, d, to);
    for (int i = 0; i < stored; i++) result_release(&store[i]);
    free(store);
    free(d);
}
