/* matrix_table.c - what a matrix found: a row for each run, and with a sweep a dose-response table
 * of each file.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/matrix.h"

#include "lib/base/stat.h"
#include "pipe/compare.h"
#include "pipe/table.h"

static bool is_done(const struct cell *c) {
    return c->state == CELL_DONE || c->state == CELL_WAS_DONE;
}

/* ---- all runs ---- */

static void score_cells(struct table *t, const struct cell *c) {
    struct scores s;
    scores_read(&s, c->f.dir);
    const int end = s.n ? scores_series_end(&s, 0) : 0;
    if (!end) {
        for (int i = 0; i < 5; i++) table_cell(t, "-");
    } else {
        const struct score *a = &s.v[0], *b = &s.v[end - 1];
        table_cell(t, "%lld", (long long)b->step);
        table_cell(t, "%.1f %%", score_percent(a));
        table_cell(t, "%.1f %% (%lld/%lld)", score_percent(b), (long long)b->right,
                   (long long)b->n);
        table_cell(t, "[%.1f, %.1f]", 100 * b->low, 100 * b->high);
        table_cell(t, "%s, %s, %s", b->rule, b->quant, score_noise(b));
    }
    scores_release(&s);
}

static void last_adapter(char sha256[65], const struct cell *c) {
    struct scores s;
    *sha256 = 0;
    if (!is_done(c)) return;
    scores_read(&s, c->f.dir);
    const int end = s.n ? scores_series_end(&s, 0) : 0;
    if (end && s.v[end - 1].step > 0)
        snprintf(sha256, 65, "%s", s.v[end - 1].adapter_sha256);
    scores_release(&s);
}

/* Runs that were told different things and ended with the same bytes. */
static void print_twins(const struct matrix *m, FILE *to) {
    char(*sha256)[65] = mem_alloc(((size_t)m->cells + 1) * sizeof *sha256);
    for (int i = 0; i < m->cells; i++) {
        last_adapter(sha256[i], &m->cell[i]);
        int j = 0;
        while (strcmp(sha256[j], sha256[i]) != 0) j++;
        if (j < i && *sha256[i])
            fprintf(to, "  %s and %s ended with the same adapter, byte for byte: what differs "
                        "between them changed nothing\n", m->cell[j].f.id, m->cell[i].f.id);
    }
    free(sha256);
}

static void print_cells(const struct matrix *m, FILE *to) {
    static const char *const word[] = { "not run", "skipped", "FAILED", "done", "done before" };
    struct table t;
    table_init(&t, "<run|<state|step|first|last|95 %|<measured");
    for (int i = 0; i < m->cells; i++) {
        const struct cell *c = &m->cell[i];
        table_cell(&t, "%s", is_done(c) ? c->f.id : c->name);
        table_cell(&t, "%s", c->state == CELL_WAITS && *c->why ? "stopped" : word[c->state]);
        if (is_done(c)) {
            score_cells(&t, c);
            continue;
        }
        for (int j = 0; j < 4; j++) table_cell(&t, "%s", "");
        table_cell(&t, "%s", c->why);
    }
    table_print(&t, false, to);
    table_release(&t);
}

/* ---- dose and response ---- */

struct dose { const char *value; struct arm arm; };

/* The arms of one file, by value; runs that could not be read are left out and said. */
static int read_doses(const struct matrix *m, const char *file, struct dose *d,
                      struct result *store, int *stored, FILE *to) {
    int n = 0;
    for (int v = 0; v < m->values; v++) {
        struct dose *x = &d[n];
        *x = (struct dose){ .value = m->value[v] };
        for (int i = 0; i < m->cells; i++) {
            const struct cell *c = &m->cell[i];
            struct err e = { 0 };
            if (c->file != file || c->value != m->value[v] || !is_done(c)) continue;
            struct result *r = &store[(*stored)++];
            if (result_read(r, m->line->runs_dir, c->f.dir, &e) < 0)
                fprintf(to, "  %s is left out: %s\n", c->name, e.text);
            else if (r->score_n && x->arm.n < ARM_RUNS_MAX) x->arm.run[x->arm.n++] = r;
        }
        if (x->arm.n) n++;
        else fprintf(to, "  %s = %s is left out: no run of it is done\n", m->key, m->value[v]);
    }
    return n;
}

static int64_t last_step(const struct arm *a) {
    return a->run[0]->score[a->run[0]->score_n - 1].step;
}

static struct stat_span interval_of(const struct arm *a, int64_t step) {
    double v[ARM_RUNS_MAX];
    for (int i = 0; i < a->n; i++) v[i] = result_accuracy(a->run[i], step);
    return stat_mean_share(v, a->n, result_score(a->run[0], step)->n, CONTRAST_ALPHA);
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
    double v;
    if (!kind || (str_to_f64(d->value, &v) && v == 0) || !strcmp(d->value, "off")) return;
    const json_t *rows = json_object_get(d->arm.run[0]->manifest, "noise");
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const json_t *row = json_array_get(rows, i);
        const char *is = json_string_value(json_object_get(row, "kind"));
        if (is && !strcmp(is, kind) && json_number_value(json_object_get(row, "sites")) > 0) return;
    }
    fprintf(to, "  %s = %s: NO NOISE was in force in these runs\n", m->key, d->value);
}

/* Two doses may have been scored in different formats: then nothing is tested, and it is said. */
static bool comparable(const struct dose *a, const struct dose *b, FILE *to) {
    struct str why;
    str_init(&why);
    result_reasons(a->arm.run[0], b->arm.run[0], &why);
    const bool ok = !why.len;
    if (!ok) fprintf(to, "  %s beside %s: %s", b->value, a->value, why.s);
    str_release(&why);
    return ok;
}

/* With few seeds the difference is that of two adapters, not of the means beside it. */
static void reading_cell(struct table *t, const struct arm *base, const struct arm *other,
                         const struct effect *e) {
    const struct result *a, *b;
    arms_pick(base, other, &a, &b);
    if (contrast_of_treatments(e)) table_cell(t, "%s", verdict_name[e->verdict]);
    else if (base->n + other->n == 2) table_cell(t, "%s (two adapters)", verdict_name[e->verdict]);
    else table_cell(t, "%s (two adapters, of seed %lld: fewer than %d seeds)",
                    verdict_name[e->verdict], (long long)b->seed, ARM_SEEDS_MIN);
}

static void print_doses(const struct matrix *m, const struct dose *d, int n, FILE *to) {
    struct table t;
    const char *worse = NULL;
    const double alpha = CONTRAST_ALPHA / (n > 1 ? n - 1 : 1);
    char head[200];
    snprintf(head, sizeof head, "<%.80s|seeds|step|accuracy|n|95 %%|difference|interval|<reading",
             m->key);
    table_init(&t, head);
    for (int i = 0; i < n; i++) {
        const int64_t step = last_step(&d[i].arm), base_step = last_step(&d[0].arm);
        const struct score *s = result_score(d[i].arm.run[0], step);
        const struct stat_span span = interval_of(&d[i].arm, step);
        say_no_noise(m, &d[i], to);
        table_cell(&t, "%s", d[i].value);
        table_cell(&t, "%d", d[i].arm.n);
        table_cell(&t, "%lld", (long long)step);
        table_cell(&t, "%.1f %%", 100 * arm_accuracy(&d[i].arm, step));
        table_cell(&t, "%lld", (long long)s->n);
        table_cell(&t, "[%.1f, %.1f]", 100 * span.low, 100 * span.high);
        if (i == 0 || !comparable(&d[0], &d[i], to)) {
            table_cell(&t, "-");
            table_cell(&t, "-");
            table_cell(&t, i ? "not compared" : "the first value");
            continue;
        }
        const struct effect e = effect_of_arms(&d[0].arm, base_step, &d[i].arm, step, alpha);
        table_cell(&t, "%+.1f", 100 * e.difference);
        table_cell(&t, "[%+.1f, %+.1f]", 100 * e.low, 100 * e.high);
        reading_cell(&t, &d[0].arm, &d[i].arm, &e);
        if (e.verdict == VERDICT_WORSE && !worse) worse = d[i].value;
    }
    table_print(&t, false, to);
    table_release(&t);
    fprintf(to, "  differences to the first value hold together at 95 %% (Bonferroni: %.4g %% "
                "each)\n", 100 * (1 - alpha));
    if (worse) fprintf(to, "  the first value that is worse than %s: %s\n", d[0].value, worse);
    else fprintf(to, "  no value is worse than %s, within these intervals\n", d[0].value);
}

static void print_sweep(const struct matrix *m, const char *file, FILE *to) {
    struct dose *d = mem_alloc(VALUES_MAX * sizeof *d);
    struct result *store = mem_alloc((size_t)m->cells * sizeof *store);
    int stored = 0;
    fprintf(to, "\n%s: dose and response\n", file);
    const int n = read_doses(m, file, d, store, &stored, to);
    if (n > 1) print_doses(m, d, n, to);
    for (int i = 0; i < stored; i++) result_release(&store[i]);
    free(store);
    free(d);
}

void matrix_print(const struct matrix *m, FILE *to) {
    print_cells(m, to);
    print_twins(m, to);
    for (int i = 0; i < m->line->words && m->values; i++)
        for (int j = 0; j < m->cells; j++)
            if (m->cell[j].file == m->line->word[i] && m->cell[j].value) {
                print_sweep(m, m->line->word[i], to);
                break;
            }
}
