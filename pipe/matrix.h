/* matrix.h - a set of runs, one after another, in run folders of their own names.
 *
 * A cell is one file under one seed and one value of the sweep. Its state is that of its run
 * folder, found by name and settings; the matrix keeps no file. So a matrix that was stopped or
 * killed goes on when it is asked for again.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_MATRIX_H
#define QERL_MATRIX_H
#include "pipe/commands.h"
#include "pipe/contrast.h"
#include "pipe/resolve.h"
#include "pipe/tiny.h"

enum { CELLS_MAX = 4096, VALUES_MAX = 64 };
enum cell_state { CELL_WAITS, CELL_SKIPPED, CELL_FAILED, CELL_DONE, CELL_WAS_DONE };
struct cell {
    const char *file;
    char *value;                             /* of the sweep; NULL without one */
    int seed;                                /* counts from 0, added to the file's run.seed */
    char name[160];                          /* of the run */
    struct folder f;                         /* valid when done */
    enum cell_state state;
    char why[400];                           /* skipped, failed, stopped (it waits) */
};
struct matrix {
    const struct command_line *line;
    struct cell *cell; int cells;
    char *key, *value[VALUES_MAX]; int values;       /* --sweep; values 0 = none */
    int seeds;
    struct str wrong; int wrong_code;        /* problems found while making cells, as lines */
};
/* A cell as its run will be told: the file, the command line, --tiny, the cell's own name, seed and
 * value. Lent until cell_unload. */
struct cell_told {
    struct pipeline plain, p;                /* as the file says it; with all options */
    const char *set[SETS_MAX + TINY_SETS_MAX + 8]; int sets;
    char own[5][300];
};
void cell_load(struct cell_told *t, const struct matrix *m, const struct cell *c);
void cell_unload(struct cell_told *t);
/* The run of that name with these settings, if there is one: c->f. */
bool cell_find_run(struct cell *c, struct pipeline *p);

/* matrix_check.c: everything that `run` would refuse, of all cells that wait, before one starts;
 * cells whose run is done are marked so. Prints each problem once, with the runs that have it.
 * Returns 0, or the exit code: then nothing may start. */
int matrix_check(struct matrix *m);
/* Of several reasons the exit code says what the user can mend at once: a wrong word before what
 * the machine lacks. */
void worse_code(int *code, int other);
/* One table of all cells; with a sweep a dose-response table for each file (matrix_doses.c). */
void matrix_print(const struct matrix *m, FILE *to);
void matrix_print_doses(const struct matrix *m, const char *file, FILE *to);
bool cell_is_done(const struct cell *c);

/* likeness.c: would the run told `old` be told the same by p? Names and places aside. */
bool settings_are(const struct lang *old, struct pipeline *p);

/* child.c: runs this program with argv (NULL-terminated, argv[0] ignored); its stdout is dropped,
 * the lines of its stderr go to `talk` and, with a name, to our stderr as "name: line". Signals
 * are passed on (stop.h). Returns its exit code, or -1. */
int child_run(const char *const *argv, const char *name, struct str *talk, struct err *e);
#endif
