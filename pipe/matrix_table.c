/* matrix_table.c - what a matrix found: a row for each run.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/matrix.h"

#include "lib/base/stat.h"
#include "pipe/compare.h"
#include "pipe/table.h"

bool cell_is_done(const struct cell *c) {
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
    if (!cell_is_done(c)) return;
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
        table_cell(&t, "%s", cell_is_done(c) ? c->f.id : c->name);
        table_cell(&t, "%s", c->state == CELL_WAITS && *c->why ? "stopped" : word[c->state]);
        if (cell_is_done(c)) {
            score_cells(&t, c);
            continue;
        }
        for (int j = 0; j < 4; j++) table_cell(&t, "%s", "");
        table_cell(&t, "%s", c->why);
    }
    table_print(&t, false, to);
    table_release(&t);
}

void matrix_print(const struct matrix *m, FILE *to) {
    print_cells(m, to);
    print_twins(m, to);
    for (int i = 0; i < m->line->words && m->values; i++)
        for (int j = 0; j < m->cells; j++)
            if (m->cell[j].file == m->line->word[i] && m->cell[j].value) {
                matrix_print_doses(m, m->line->word[i], to);
                break;
            }
}
