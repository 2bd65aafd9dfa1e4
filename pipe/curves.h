/* curves.h - TensorBoard event files of a run, made from metrics.jsonl and scores.jsonl as these
 * grow.
 *
 * The lines are the truth and the events their picture: when a file of lines is replaced by a
 * shorter one (a stage went back to its checkpoint), and at every start, the events are made anew.
 * Tags keep verl's names.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_CURVES_H
#define QERL_CURVES_H
#include "lib/base/fs.h"
#include "lib/base/tb.h"

struct curves_source {
    char path[FS_PATH_MAX];
    int64_t read_bytes;
    uint64_t inode;
};
struct curves {
    char dir[FS_PATH_MAX];                   /* RUN/tensorboard/NAME */
    struct tb *tb;
    struct curves_source source[2];          /* metrics, scores */
    double looked_at;
    bool broken;                             /* said once; a picture is not worth a run */
};
void curves_open(struct curves *c, const char *run_dir, const char *name);
void curves_tick(struct curves *c);          /* at most once a second */
void curves_close(struct curves *c);         /* takes what is left, flushes */
#endif
