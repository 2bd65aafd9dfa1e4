/* matrix.c - the command matrix: which cells, what became of each before, one run after another
 * once all of them can start (matrix_check.c).
 *
 * Order: the sweep, cells, one cell, the command.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/matrix.h"

#include <ctype.h>
#include <math.h>

#include "lib/base/fs.h"
#include "pipe/stop.h"

/* ---- the sweep ---- */

/* "key=v1,v2"; values that hold commas are parted by ';'. */
static int read_sweep(struct matrix *m, const char *text, struct err *e) {
    const char *eq = strchr(text, '=');
    if (!eq || eq == text || !eq[1] || !memchr(text, '.', (size_t)(eq - text)))
        return err_code(e, EXIT_USAGE, "--sweep takes section.key=value,value,...; not '%s'", text);
    m->key = mem_dup(text);
    m->key[eq - text] = 0;
    if (!strcmp(m->key, "run.seed") || !strcmp(m->key, "run.name"))
        return err_code(e, EXIT_USAGE, "--sweep of %s: a matrix names its runs and gives them "
                                       "their seeds; --seeds K runs each with K of them", m->key);
    char *rest = m->key + (eq - text) + 1;
    const char *parted = strchr(rest, ';') ? ";" : ",";
    for (char *value; (value = strsep(&rest, parted));) {
        if (m->values == VALUES_MAX)
            return err_code(e, EXIT_USAGE, "--sweep takes at most %d values", VALUES_MAX);
        while (*value == ' ') value++;
        if (!*value) return err_code(e, EXIT_USAGE, "--sweep has an empty value in '%s'", text);
        for (int i = 0; i < m->values; i++)
            if (strcmp(m->value[i], value) == 0)
                return err_code(e, EXIT_USAGE, "--sweep has the value %s twice", value);
        m->value[m->values++] = value;
    }
    return m->values > 1 ? 0 : err_code(e, EXIT_USAGE, "--sweep needs two values or more");
}

/* ---- cells ---- */

/* NAME[-tiny][-key_value]-sSEED, of letters that may name a folder. */
static void name_cell(struct cell *c, const struct matrix *m, const char *name, int64_t seed) {
    char dose[80] = "";
    if (c->value) snprintf(dose, sizeof dose, "-%.44s_%.30s", m->key, c->value);
    snprintf(c->name, sizeof c->name, "%.40s%s%s-s%lld", name, m->line->tiny ? "-tiny" : "", dose,
             (long long)seed);
    for (char *p = c->name; *p; p++)
        if (!isalnum((unsigned char)*p) && !strchr("._-", *p)) *p = '_';
}

static void fail(struct cell *c, enum cell_state state, const char *why) {
    c->state = state;
    snprintf(c->why, sizeof c->why, "%.*s", (int)strcspn(why, "\n"), why);
}

/* noise.ops.scale = 0 and the like: a size of 0 is no noise of any type, the sweep's control. */
static bool is_control(const struct matrix *m, const struct cell *c) {
    double v;
    return str_starts(m->key, "noise.") && str_ends(m->key, ".scale") &&
           str_to_f64(c->value, &v) && v == 0;
}

/* What a cell is told besides its file; later ones win. */
static void collect_sets(struct cell_told *s, const struct matrix *m, const struct cell *c) {
    s->sets = 0;
    if (m->line->tiny) s->sets = tiny_sets(&s->plain, s->set);
    for (int i = 0; i < m->line->sets; i++) s->set[s->sets++] = m->line->set[i];
    int64_t seed = 1;
    const char *text = pipeline_text(&s->plain, "run.seed", "1");
    if (!str_to_i64(text, &seed)) seed = 1;
    snprintf(s->own[0], sizeof s->own[0], "run.name=%s", c->name);
    snprintf(s->own[1], sizeof s->own[1], "run.seed=%lld", (long long)seed + c->seed);
    s->set[s->sets++] = s->own[0];
    s->set[s->sets++] = s->own[1];
    if (c->value) s->set[s->sets++] = s->own[2];
    if (c->value && is_control(m, c)) {
        snprintf(s->own[4], sizeof s->own[4], "%.*s.type=off",
                 (int)(strrchr(m->key, '.') - m->key), m->key);
        s->set[s->sets++] = s->own[4];
    }
    if (strcmp(m->line->runs_dir, "runs") != 0) {
        snprintf(s->own[3], sizeof s->own[3], "run.runs_dir=%.250s", m->line->runs_dir);
        s->set[s->sets++] = s->own[3];
    }
}

/* A value of the sweep that leaves no noise has no noisy score either: its clean one is it. */
static bool asks_in_vain(const struct pipeline *p) {
    const char *also = pipeline_text(p, "eval.also_noisy", "no");
    return (!strcmp(also, "yes") || !strcmp(also, "true") || !strcmp(also, "on")) &&
           !strcmp(pipeline_text(p, "noise.ops.type", "off"), "off") &&
           !strcmp(pipeline_text(p, "noise.modules.type", "off"), "off") &&
           strtod(pipeline_text(p, "noise.aqn.sigma_start", "0"), NULL) == 0 &&
           strtod(pipeline_text(p, "noise.aqn.sigma_end", "0"), NULL) == 0;
}

/* what --tiny asks: the file, --set and the sweep's value */
static void load_plain(struct cell_told *t, const struct matrix *m, const struct cell *c) {
    for (t->sets = 0; t->sets < m->line->sets; t->sets++) t->set[t->sets] = m->line->set[t->sets];
    snprintf(t->own[2], sizeof t->own[2], "%.100s=%.180s", c->value ? m->key : "",
             c->value ? c->value : "");
    if (c->value) t->set[t->sets++] = t->own[2];
    pipeline_load(&t->plain, c->file, t->set, t->sets);
}

void cell_load(struct cell_told *t, const struct matrix *m, const struct cell *c) {
    load_plain(t, m, c);
    collect_sets(t, m, c);
    pipeline_load(&t->p, c->file, t->set, t->sets);
    if (!c->value || !asks_in_vain(&t->p)) return;
    pipeline_release(&t->p);
    t->set[t->sets++] = "eval.also_noisy=no";
    pipeline_load(&t->p, c->file, t->set, t->sets);
}

void cell_unload(struct cell_told *t) {
    pipeline_release(&t->p);
    pipeline_release(&t->plain);
}

static bool trains(struct pipeline *p) {
    for (int i = 0; i < p->stages; i++)
        if (p->stage[i].about.name && strcmp(p->stage[i].about.name, "learner") == 0) return true;
    return false;
}

static void first_error(struct cell *c, struct pipeline *p) {
    struct str text;
    str_init(&text);
    lang_print_errors(&p->lang, &text);
    fail(c, CELL_FAILED, text.s ? text.s : "cannot be read");
    str_release(&text);
}

static struct cell *add_cell(struct matrix *m, const char *file) {
    m->cell = mem_grow(m->cell, (size_t)(m->cells + 1) * sizeof *m->cell);
    struct cell *c = &m->cell[m->cells++];
    *c = (struct cell){ .file = file };
    snprintf(c->name, sizeof c->name, "%.100s", strrchr(file, '/') ? strrchr(file, '/') + 1 : file);
    return c;
}

static bool name_taken(const struct matrix *m, const struct cell *c) {
    for (int i = 0; i < m->cells; i++)
        if (&m->cell[i] != c && strcmp(m->cell[i].name, c->name) == 0) return true;
    return false;
}

static int add_file(struct matrix *m, const char *file, struct err *e) {
    struct pipeline p;
    int64_t seed = 1;
    pipeline_load(&p, file, m->line->set, m->line->sets);
    const char *text = pipeline_text(&p, "run.seed", "1");
    if (!str_to_i64(text, &seed)) seed = 1;
    if (p.code) {
        lang_print_errors(&p.lang, &m->wrong);
        worse_code(&m->wrong_code, p.code);
        first_error(add_cell(m, file), &p);
    }
    else if (!trains(&p)) fail(add_cell(m, file), CELL_SKIPPED, "does not train: no stage learner");
    for (int v = 0; v < (m->values ? m->values : 1) && !p.code && trains(&p); v++)
        for (int k = 0; k < m->seeds; k++) {
            if (m->cells == CELLS_MAX) {
                pipeline_release(&p);
                return err_code(e, EXIT_USAGE, "more than %d runs", CELLS_MAX);
            }
            struct cell *c = add_cell(m, file);
            c->seed = k;
            c->value = m->values ? m->value[v] : NULL;
            name_cell(c, m, p.name, seed + k);
            if (!name_taken(m, c)) continue;
            fail(c, CELL_FAILED, "another run of this matrix has the same name: set run.name");
            str_printf(&m->wrong, "%s: '%s': %s\n", file, c->name, c->why);
            worse_code(&m->wrong_code, EXIT_USAGE);
        }
    pipeline_release(&p);
    return 0;
}

/* ---- one cell ---- */

bool cell_find_run(struct cell *c, struct pipeline *p) {
    char path[FS_PATH_MAX];
    struct lang old;
    if (folder_find(&c->f, p->runs_dir, c->name, NULL) < 0) return false;
    fs_join(path, sizeof path, c->f.dir, "resolved.pipe");
    lang_read(&old, path, NULL, 0);
    const bool same = !old.errors && settings_are(&old, p);
    lang_release(&old);
    return same;
}

/* Why a run failed: its own reason, else the first thing that was said. */
static void explain(struct cell *c, const char *runs_dir, const char *talk, int code) {
    char reason[300] = "", why[400];
    const bool there = folder_find(&c->f, runs_dir, c->name, NULL) == 0;
    enum run_state s = there ? folder_state(&c->f, reason, sizeof reason) : RUN_STATE_UNKNOWN;
    if (there && *reason && (s == RUN_STATE_FAILED || s == RUN_STATE_INCOMPLETE))
        snprintf(why, sizeof why, "%s: %s", run_state_name[s], reason);
    else snprintf(why, sizeof why, "exit code %d: %.300s", code, *talk ? talk : "nothing was said");
    fail(c, CELL_FAILED, why);
}

static void run_cell(struct cell *c, const struct cell_told *t, bool resume, bool quiet) {
    const char *argv[2 * (SETS_MAX + TINY_SETS_MAX + 8) + 8] = { "qerl-pipe" };
    struct str talk;
    struct err e = { 0 };
    int n = 1;
    argv[n++] = resume ? "resume" : "run";
    argv[n++] = resume ? c->f.dir : c->file;
    for (int i = 0; i < t->sets && !resume; i++) {
        argv[n++] = "--set";
        argv[n++] = t->set[i];
    }
    str_init(&talk);
    const int code = child_run(argv, quiet ? NULL : c->name, &talk, &e);
    if (code == EXIT_DONE && folder_find(&c->f, t->p.runs_dir, c->name, &e) == 0)
        c->state = CELL_DONE;
    else if (!stop_came()) explain(c, t->p.runs_dir, code < 0 ? e.text : talk.s, code);
    else if (folder_find(&c->f, t->p.runs_dir, c->name, NULL) == 0)
        fail(c, CELL_WAITS, "begun; the same command goes on");
    str_release(&talk);
}

static void work_cell(struct matrix *m, struct cell *c) {
    struct cell_told t;
    cell_load(&t, m, c);
    if (t.p.code) {
        first_error(c, &t.p);
    } else {
        const bool known = cell_find_run(c, &t.p);
        if (known && folder_state(&c->f, NULL, 0) == RUN_STATE_DONE) c->state = CELL_WAS_DONE;
        else if (known && folder_holder(&c->f) > 1)
            fail(c, CELL_FAILED, "another process works on it");
        else run_cell(c, &t, known, m->line->tiny);
    }
    cell_unload(&t);
}

/* ---- the command ---- */

static int make_cells(struct matrix *m, struct err *e) {
    int64_t seeds = 1;
    if (m->line->seeds && (!str_to_i64(m->line->seeds, &seeds) || seeds < 1 || seeds > 64))
        return err_code(e, EXIT_USAGE, "--seeds takes a number from 1 to 64, not '%s'",
                        m->line->seeds);
    m->seeds = (int)seeds;
    if (m->line->sweep && read_sweep(m, m->line->sweep, e) < 0) return -1;
    for (int i = 0; i < m->line->words; i++)
        if (add_file(m, m->line->word[i], e) < 0) return -1;
    return 0;
}

static void say_stopped(const struct matrix *m) {
    int done = 0, wait = 0;
    for (int i = 0; i < m->cells; i++) {
        done += m->cell[i].state == CELL_DONE || m->cell[i].state == CELL_WAS_DONE;
        wait += m->cell[i].state == CELL_WAITS;
    }
    fprintf(stderr, "qerl-pipe: stopped; %d of %d runs are done, %d wait; the run folders are "
                    "kept: the same command goes on\n", done, m->cells, wait);
}

static void work(struct matrix *m) {
    static const char *const word[] = { "stopped", "skipped", "FAILED", "done", "done before" };
    for (int i = 0; i < m->cells && !stop_came(); i++) {
        struct cell *c = &m->cell[i];
        if (c->state == CELL_WAITS) work_cell(m, c);
        fprintf(stderr, "%d of %d: %s %s%s%s\n", i + 1, m->cells, c->name, word[c->state],
                *c->why ? ": " : "", c->why);
    }
}

int command_matrix(const struct command_line *l) {
    struct matrix m = { .line = l };
    struct err e = { 0 };
    stop_catch();
    str_init(&m.wrong);
    int code = make_cells(&m, &e) < 0 ? complain_once(&e, EXIT_USAGE) : matrix_check(&m);
    if (!code) {
        work(&m);
        matrix_print(&m, stdout);
        if (stop_came()) say_stopped(&m);
    }
    for (int i = 0; i < m.cells && !code; i++)
        if (m.cell[i].state == CELL_FAILED || m.cell[i].state == CELL_WAITS) code = EXIT_FAILED;
    str_release(&m.wrong);
    free(m.cell);
    free(m.key);
    return code;
}
