/* matrix_check.c - can every run of a matrix start? Asked before the first one does, so that a
 * night is not lost to a misspelt word in the last file.
 *
 * Knows: what `run` would refuse: settings, what the stages say to them (--plan), absent files, a
 * full disk. Does not know: what a run may meet later.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/matrix.h"

#include "pipe/plan.h"
#include "pipe/stop.h"

struct problem { char *text; struct str runs; int n; };
struct problems { struct problem *v; int n, code; };

void worse_code(int *code, int other) {
    if (other && (!*code || other < *code)) *code = other;
}

static void add(struct problems *all, const struct cell *c, const char *text, int code) {
    enum { NAMED = 4 };
    int i = 0;
    worse_code(&all->code, code);
    while (i < all->n && strcmp(all->v[i].text, text) != 0) i++;
    if (i == all->n) {
        all->v = mem_grow(all->v, (size_t)++all->n * sizeof *all->v);
        all->v[i] = (struct problem){ .text = mem_dup(text) };
        str_init(&all->v[i].runs);
    }
    struct problem *p = &all->v[i];
    if (p->n++ < NAMED) str_printf(&p->runs, "%s%s", p->n > 1 ? ", " : "", c->name);
}

static void add_absent(struct problems *all, const struct cell *c, const struct plan *pl) {
    char *text = NULL;
    size_t bytes;
    FILE *f = open_memstream(&text, &bytes);
    if (!f) return;
    plan_print_absent(pl, f);
    fclose(f);
    add(all, c, text, EXIT_ENV);
    free(text);
}

/* What the stages say, as `check` asks them. The seed changes none of it: one of a kind asks. */
static void ask_stages(struct problems *all, const struct cell *c, struct pipeline *p) {
    struct plan pl = { 0 };
    struct folder f;
    struct str talk;
    struct err e = { 0 };
    str_init(&talk);
    folder_next(&f, p->runs_dir, p->name);
    if (plan_ask(&pl, p, f.dir, f.id, &talk, &e) < 0)
        add(all, c, talk.len ? talk.s : e.text, e.code ? e.code : EXIT_FAILED);
    else if (plan_absent(&pl)) add_absent(all, c, &pl);
    else if (plan_disk(&pl, p, &e) < 0) add(all, c, e.text, EXIT_ENV);
    str_release(&talk);
    plan_release(&pl);
}

static void check_cell(struct problems *all, const struct matrix *m, struct cell *c) {
    struct cell_told t;
    struct str text;
    str_init(&text);
    cell_load(&t, m, c);
    if (t.p.code) {
        lang_print_errors(&t.p.lang, &text);
        add(all, c, text.s, t.p.code);
    } else if (cell_find_run(c, &t.p) && folder_state(&c->f, NULL, 0) == RUN_STATE_DONE) {
        c->state = CELL_WAS_DONE;
    } else if (c->seed == 0) {
        ask_stages(all, c, &t.p);
    }
    str_release(&text);
    cell_unload(&t);
}

static void print_problems(const struct problems *all, const struct matrix *m) {
    if (m->wrong.len) fputs(m->wrong.s, stderr);
    for (int i = 0; i < all->n; i++) {
        const struct problem *p = &all->v[i];
        const size_t n = strlen(p->text);
        fprintf(stderr, "%s%s  in %s", p->text, n && p->text[n - 1] == '\n' ? "" : "\n", p->runs.s);
        if (p->n > 4) fprintf(stderr, " and %d more", p->n - 4);
        fputc('\n', stderr);
    }
    for (int i = 0; i < m->cells; i++)
        if (m->cell[i].state == CELL_SKIPPED)
            fprintf(stderr, "skipped: %s: %s\n", m->cell[i].file, m->cell[i].why);
    fprintf(stderr, "qerl-pipe: nothing was started: not every run of the set can\n");
}

int matrix_check(struct matrix *m) {
    struct problems all = { .code = m->wrong_code };
    if (m->cells > 1) fprintf(stderr, "checking %d runs before the first starts\n", m->cells);
    for (int i = 0; i < m->cells && !stop_came(); i++)
        if (m->cell[i].state == CELL_WAITS) check_cell(&all, m, &m->cell[i]);
    if (stop_came()) {
        fprintf(stderr, "qerl-pipe: stopped while the set was checked; nothing was started\n");
        all.code = EXIT_FAILED;
    } else if (all.code) {
        print_problems(&all, m);
    }
    for (int i = 0; i < all.n; i++) {
        free(all.v[i].text);
        str_release(&all.v[i].runs);
    }
    free(all.v);
    return all.code;
}
