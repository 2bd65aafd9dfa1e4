/* grid.h - one adapter of a run scored again under several formats, sizes of operator noise and
 * seeds.
 *
 * A cell is one offline score in a folder of its own, RUN/eval/CELL, with every answer; a cell that
 * has its score is not asked again. Cells that differ only in the seed are one row. A row in
 * which nothing is drawn would give the same answers under every seed: it has one cell.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_GRID_H
#define QERL_GRID_H
#include "pipe/commands.h"
#include "pipe/result.h"

enum { GRID_ROWS_MAX = 256, GRID_LIST_MAX = 32, GRID_SEEDS_MAX = 64 };
struct grid_row {
    const char *noise, *quant;               /* as asked: "0.05", "trained" */
    struct score score[GRID_SEEDS_MAX];
    struct mark *mark[GRID_SEEDS_MAX]; int marks[GRID_SEEDS_MAX];
    char realised[80];                       /* of the first seed */
    int cells;
};
struct grid {
    struct folder f;
    int64_t step;
    const char *type, *ops;                  /* of the noise; own: as the run trained under */
    const char *layers, *dtype;              /* NULL = the evaluator's defaults */
    bool own, backward;                      /* the run had it on its gradients alone */
    const char *modules;                     /* type of the run's module noise; NULL = none */
    int64_t device;                          /* key of type systematic: the run's seed */
    char trained[60];                        /* format of the run's own scores */
    enum run_state state;                    /* of the run */
    int seeds;
    struct grid_row *row; int rows;
};
/* Accuracy with intervals, realised noise, difference to the first row. */
void grid_print(const struct grid *g, FILE *to);
#endif
