/* folder.h - runs/NAME-0001: made once, locked while it is worked on, and readable when nobody
 * does.
 *
 * resolved.pipe  what was asked        manifest.json  with what          state  running | done |
 *                stopped | failed | incomplete
 * conf/STAGE.conf  log/STAGE.log       run.lock       pid, held by launcher and stages together
 * The rest (metrics.jsonl, scores.jsonl, samples.md, adapters/, ckpt/, tape/, tensorboard/) belongs
 * to the stages.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_FOLDER_H
#define QERL_FOLDER_H
#include "pipe/plan.h"

enum run_state {
    RUN_STATE_RUNNING,
    RUN_STATE_DONE,
    RUN_STATE_STOPPED,
    RUN_STATE_FAILED,
    RUN_STATE_INCOMPLETE,
    RUN_STATE_UNKNOWN
};
extern const char *const run_state_name[];

struct folder {
    char dir[600], id[160];
    int lock_fd;                             /* -1 = not ours */
};
/* The next free number of NAME in runs_dir, without making anything. */
void folder_next(struct folder *f, const char *runs_dir, const char *name);
/* mkdir that must succeed, its sub-folders, the lock. Numbers in use are skipped, never reused. */
int folder_create(struct folder *f, const char *runs_dir, const char *name, struct err *e);
/* A run by its path or by NAME (the newest NAME-NNNN in runs_dir) or by its id. EXIT_USAGE with
 * what there is. */
int folder_find(struct folder *f, const char *runs_dir, const char *run, struct err *e);
/* Waits up to 5 s for survivors of a killed launcher; EXIT_FAILED when it stays held. */
int folder_lock(struct folder *f, struct err *e);
void folder_unlock(struct folder *f);
/* Remembers the folder of the sockets in the lock, so that whoever locks next can remove what a
 * kill left behind. */
void folder_note_sockets(const struct folder *f, const char *dir);
/* 0 = nobody works on it, else the launcher's pid (or 1 if only stages hold it). */
int64_t folder_holder(const struct folder *f);
int folder_set_state(const struct folder *f, enum run_state s, const char *reason, struct err *e);
enum run_state folder_state(const struct folder *f, char *reason, size_t size);
/* conf/, resolved.pipe, manifest.json; a resumed run keeps its first manifest and adds a line to
 * "starts". */
int folder_write(const struct folder *f, struct pipeline *p, const struct plan *pl, char **argv,
                 struct err *e);
int folder_write_conf(const struct folder *f, struct pipeline *p, struct err *e);
/* Compares the manifest with the programs and files of today: a sentence for each difference. */
int folder_compare(const struct folder *f, const struct pipeline *p, const struct plan *pl,
                   struct str *differences, struct err *e);
/* Ids of all runs in runs_dir, sorted; the caller frees each and the list. */
int folder_list(const char *runs_dir, char ***ids);
/* Works where the run was started, which relative paths in its files mean; run.c. */
void folder_enter(struct folder *f);
/* The evaluator a run used, exec of the stage in its resolved file; left alone if there is none. */
void eval_of_run(const struct folder *f, char *exec, size_t size);
const char *cpu_flags(void); /* "avx2 fma avx512f ...": those that kernels care about */
#endif
