/* resolve.h - one experiment, understood: the .pipe file joined with what its stages say about
 * themselves.
 *
 * Knows: which keys and ports exist and where, types and ranges, which link fits, where each stage
 * runs. Does not know: what any key means. A key is right because some stage declares it.
 * Every value reaches every stage that declares it, so two stages cannot disagree; a value that
 * none declares is an error. Launcher keys: [run] name exp_id tensorboard question hypothesis
 * source runs_dir stall_seconds, [expect] hypothesis above at, and in each stage exec, place,
 * replicas, restarts, in.PORT, out.PORT. The launcher gives run.dir and run.id to stages that
 * declare them. Ownership: everything lent by a struct pipeline lives until pipeline_release.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_RESOLVE_H
#define QERL_RESOLVE_H
#include "pipe/about.h"
#include "pipe/lang.h"
#include "pipe/place.h"

enum { PIPELINE_STAGES_MAX = 16, PIPELINE_PORTS_MAX = 16, REPLICAS_MAX = 16 };

struct pipe_stage {
    const char *name;                        /* of [stage NAME] */
    struct origin at;
    const char *exec_asked;                  /* as written, default qerl-NAME */
    char *exec;                              /* path that is run */
    struct about about;                      /* about.json NULL: could not be asked */
    const char *place_asked;
    struct place place;
    int replicas, restarts;
    /* How many the launcher starts: as many as replicas says, or one for each GPU where the stage
     * has no ranks, which would be processes of its own. */
    int processes;
    /* by index of about.port: from in.PORT / out.PORT, NULL = not written */
    const char *url[PIPELINE_PORTS_MAX];
    const struct lang_link *link[PIPELINE_PORTS_MAX];
    /* filled by pipeline_conf */
    struct str conf;
    struct origin *conf_at; int conf_lines;  /* origin of each line of conf, for messages */
};
struct pipeline {
    struct lang lang;
    struct place_machine machine;
    struct pipe_stage stage[PIPELINE_STAGES_MAX]; int stages;
    const char *name, *runs_dir;
    double stall_seconds;
    int env_errors;                          /* of the errors, those that are the machine's */
    int code;                                /* exit code that the errors deserve, 0 = none */
};
/* Reads, asks the stages, checks everything. Errors are in p->lang; p->code says how bad. */
void pipeline_load(struct pipeline *p, const char *path, const char *const *sets, int n);
void pipeline_release(struct pipeline *p);
/* Value of a launcher key, or `def`. */
const char *pipeline_text(const struct pipeline *p, const char *name, const char *def);
struct pipe_stage *pipeline_stage(struct pipeline *p, const char *name);
/* The value a stage gets for one of its keys: what the file says, else the default (origin
 * "default"), else NULL. */
const char *pipeline_value(const struct pipeline *p, const struct pipe_stage *s,
                           const struct about_key *k, struct origin *at);
/* One line for each reason why GPUs were passed over: whose, which, and the reason. */
void pipeline_passed(const struct pipeline *p, struct str *out);

/* wire.c */
/* links, kinds, records, required ports; part of pipeline_load */
void pipeline_wire(struct pipeline *p);
/* Fills conf of every stage: all keys with their values, run.dir, run.id, and the URL of each port.
 * Sockets lie in ipc_dir. */
void pipeline_conf(struct pipeline *p, const char *run_dir, const char *run_id,
                   const char *ipc_dir);
/* One .pipe file without base that says the same, each line with its origin; defaults included. */
void pipeline_resolved(const struct pipeline *p, struct str *out);
/* value.c: is `text` a value for k? 0 and the plain form (units applied) in `out`, else -1 and a
 * sentence. */
int value_check(const struct about_key *k, const char *text, struct str *out, struct err *e);
#endif
