/* grid_table.c - the scores of a grid as one table (see grid.h).
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/grid.h"

#include "lib/base/stat.h"
#include "pipe/contrast.h"
#include "pipe/table.h"

enum { SEED_STRIDE = 1000 };                 /* answers of another seed count as further k */

/* All answers of a row under `seeds` seeds; a row with one cell has the same under each. */
static struct mark *all_marks(const struct grid_row *row, int seeds, int *n) {
    struct mark *all = NULL;
    *n = 0;
    for (int s = 0; s < seeds; s++) {
        const int c = row->cells == 1 ? 0 : s;
        if (c >= row->cells || !row->marks[c]) continue;
        all = mem_grow(all, (size_t)(*n + row->marks[c]) * sizeof *all);
        for (int i = 0; i < row->marks[c]; i++) {
            all[*n] = row->mark[c][i];
            all[(*n)++].k += (int64_t)s * SEED_STRIDE;
        }
    }
    return all;
}

static int by_question(const void *a, const void *b) {
    const struct mark *x = a, *y = b;
    const int c = strcmp(x->question, y->question);
    return c ? c : (x->k > y->k) - (x->k < y->k);
}

static struct effect effect_of_rows(const struct grid *g, const struct grid_row *a,
                                    const struct grid_row *b, double alpha) {
    const int seeds = a->cells > 1 || b->cells > 1 ? g->seeds : 1;
    int na, nb;
    struct mark *x = all_marks(a, seeds, &na), *y = all_marks(b, seeds, &nb);
    if (na) qsort(x, (size_t)na, sizeof *x, by_question);
    if (nb) qsort(y, (size_t)nb, sizeof *y, by_question);
    const struct effect e = effect_of_marks(x, na, y, nb, alpha);
    free(x);
    free(y);
    return e;
}

static void accuracy_cells(struct table *t, const struct grid_row *row) {
    double v[GRID_SEEDS_MAX], mean = 0;
    const int64_t n = row->score[0].n;
    for (int i = 0; i < row->cells; i++)
        mean += (v[i] = score_percent(&row->score[i]) / 100) / row->cells;
    const struct stat_span s = stat_mean_share(v, row->cells, n, CONTRAST_ALPHA);
    table_cell(t, "%d", row->cells);
    table_cell(t, "%lld", (long long)n);
    table_cell(t, "%.1f %%", 100 * mean);
    table_cell(t, "[%.1f, %.1f]", 100 * s.low, 100 * s.high);
}

static void difference_cells(struct table *t, const struct grid *g, int i, double alpha) {
    if (i == 0) {
        table_cell(t, "-");
        table_cell(t, "-");
        table_cell(t, "the first row");
        return;
    }
    const struct effect e = effect_of_rows(g, &g->row[0], &g->row[i], alpha);
    if (e.basis != BASIS_QUESTIONS) {
        table_cell(t, "-");
        table_cell(t, "-");
        table_cell(t, "not paired: the answers hold no score by this rule");
        return;
    }
    table_cell(t, "%+.1f", 100 * e.difference);
    table_cell(t, "[%+.1f, %+.1f]", 100 * e.low, 100 * e.high);
    char reading[80];
    effect_reading(reading, &e);
    table_cell(t, "%s", reading);
}

void grid_print(const struct grid *g, FILE *to) {
    struct table t;
    int done = 0;
    while (done < g->rows && g->row[done].cells) done++;
    const double alpha = CONTRAST_ALPHA / (done > 1 ? done - 1 : 1);
    fprintf(to, "run %s, adapter of step %lld; noise: %s on %s, forward, ", g->f.id,
            (long long)g->step, g->type, g->ops);
    if (g->layers && strcmp(g->layers, "all") != 0) fprintf(to, "layers %s, ", g->layers);
    if (g->dtype && strcmp(g->dtype, "f32") != 0) fprintf(to, "drawn in %s, ", g->dtype);
    if (strcmp(g->type, "systematic") == 0)
        fprintf(to, "on the device of the run (seed %lld), ", (long long)g->device);
    fprintf(to, "%s", g->backward ? "of the kind that the run had on its gradients alone"
                      : g->own ? "of the kind that the run trained under, in the size given"
                               : "chosen here: the run had no operator noise");
    if (g->modules) fprintf(to, "; its noise on modules (%s) is off here", g->modules);
    fputc('\n', to);
    if (g->state != RUN_STATE_DONE)
        fprintf(to, "  the run is %s: this is its last scored adapter, not its end\n",
                run_state_name[g->state]);
    table_init(&t, "<format|noise|<realised|seeds|n|accuracy|95 %|difference|interval|<reading");
    for (int i = 0; i < done; i++) {
        const struct grid_row *row = &g->row[i];
        const bool other = strcmp(row->score[0].quant, g->trained) != 0;
        table_cell(&t, "%s%s%s%s", row->score[0].quant, other ? " (IN THE RUN: " : "",
                   other ? g->trained : "", other ? ")" : "");
        table_cell(&t, "%s", row->noise);
        table_cell(&t, "%s", row->realised);
        accuracy_cells(&t, row);
        difference_cells(&t, g, i, alpha);
    }
    table_print(&t, false, to);
    table_release(&t);
    fprintf(to, "  one adapter; differences to the first row are paired by question and hold "
                "together at 95 %% (Bonferroni: %.4g %% each)\n", 100 * (1 - alpha));
    int least = GRID_SEEDS_MAX, most = 0;
    for (int i = 0; i < done; i++) {
        least = g->row[i].cells < least ? g->row[i].cells : least;
        most = g->row[i].cells > most ? g->row[i].cells : most;
    }
    if (most == 2)
        fprintf(to, "  two seeds: the spread between them is hardly known, so the 95 %% intervals "
                    "of these rows mean little; 3 seeds or more say something\n");
    if (least == 1 && g->seeds > 1)
        fprintf(to, "  one seed where nothing is drawn: the answers are the same under each\n");
}
