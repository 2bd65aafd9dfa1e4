/* plan.h - what the stages say about the run before it starts (--plan), joined into one.
 *
 * Knows: how to ask, which sums and which agreements make one plan, what an absent file means.
 * Does not know: what a step or a model is; the numbers come from the programs that will do the
 * work.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_PLAN_H
#define QERL_PLAN_H
#include "pipe/resolve.h"

struct plan_file {
    /* absent: the command that gets it, NULL = there */
    const char *path, *role, *sha256, *absent, *stage;
    int64_t bytes, lines;                                    /* -1 unknown */
};
struct plan {
    /* each stage's own answer, owned; strings below are lent by it */
    json_t *of[PIPELINE_STAGES_MAX];
    int64_t steps, prompts_least, prompts_most;              /* -1 = no stage said */
    const json_t *scored, *sigma;                            /* arrays, or NULL */
    int64_t scored_last;                                     /* -1 = nothing is scored */
    int64_t memory_bytes, disk_bytes;                        /* sums; 0 = no stage said */
    double seconds_per_step;
    const char *seconds_how;                 /* what that rests on; NULL = not said */
    struct plan_file *file; int files;
};
/* Asks every stage with a throw-away configuration. -1 with e->code when a stage refuses: its
 * lines, each with the place in the .pipe file that caused it, are in *talk. */
int plan_ask(struct plan *pl, struct pipeline *p, const char *run_dir, const char *run_id,
             struct str *talk, struct err *e);
void plan_release(struct plan *pl);
bool plan_absent(const struct plan *pl);
/* -1 where the disk of the run folders has not the room that the run needs. */
int plan_disk(const struct plan *pl, const struct pipeline *p, struct err *e);
/* -1 where a stage needs more memory than its GPU has, whoever else uses it. */
int plan_room(const struct plan *pl, const struct pipeline *p, struct err *e);
/* The readable plan of `check`. */
void plan_print(const struct plan *pl, const struct pipeline *p, FILE *to);
/* Two lines: what is missing, and the command that gets it. */
void plan_print_absent(const struct plan *pl, FILE *to);
void bytes_text(char *out, size_t size, double bytes);       /* "1.5 GiB" */
#endif
