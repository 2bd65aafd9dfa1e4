/* place.h - where a stage runs: `gpu:0,1 | cpu:0-1 | cpu:*`, alternatives in order of preference.
 *
 * The first alternative that the machine has is taken: a GPU that the driver shows, cores that this
 * process may use. Cores may be shared between stages (they take turns), a GPU may not. Where the
 * launcher itself was given GPUs (CUDA_VISIBLE_DEVICES), gpu:0 is the first of those. With
 * QERL_CUDA set, the plugin that it names is asked what there is: the emulated one of the tests
 * has devices. A GPU that is passed over is told, with the reason. A list with an empty
 * alternative, or a number twice, is a mistake.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_PLACE_H
#define QERL_PLACE_H
#include "lib/base/err.h"   /* first: says which system we compile for */
#include <sched.h>

#include "lib/base/json.h"

enum { PLACE_ALTERNATIVES_MAX = 8, PLACE_IDS_MAX = 1024, PLACE_VISIBLE_MAX = 64 * 64 };
struct place_machine {
    cpu_set_t cores;                         /* our affinity */
    uint64_t gpus;                           /* bit i: GPU i is there */
    bool emulated;                           /* they are a CPU's work, for tests */
    char trouble[400];                       /* why none is there, where that is known */
};
struct place_choice {
    bool gpu, emulated;
    uint64_t gpus;
    cpu_set_t cores;                         /* of a GPU stage: all of ours */
};
struct place {
    struct place_choice choice[PLACE_ALTERNATIVES_MAX];
    int choices;
    int taken;                               /* -1: the machine has none of them */
    char passed[200], why[400];              /* GPUs asked for before it, "" for none */
};
void place_machine(struct place_machine *m);
/* What the plugin says of all GPUs (qerl-rollout --devices); NULL where it cannot be asked. */
json_t *place_devices(struct err *e);
/* Text to alternatives; a mistake in it is an error whatever the machine. */
int place_read(struct place *p, const char *text, const struct place_machine *m, struct err *e);
/* Sets p->taken; EXIT_ENV and a sentence with what the machine has if nothing fits. */
int place_take(struct place *p, const char *text, const struct place_machine *m, struct err *e);
void place_cores_text(char *out, size_t size, const cpu_set_t *cores);   /* "0-1,4" */
void place_gpus_text(char *out, size_t size, uint64_t gpus);             /* "0,1", "" for none */
/* "gpu:0", "cpu:0-1"; an emulated GPU says so */
void place_text(char *out, size_t size, const struct place_choice *c);
int place_gpus(const struct place_choice *c);                /* how many */
/* The same with one of its GPUs only: that of the part-th process. */
struct place_choice place_share(const struct place_choice *c, int part);
/* The CUDA_VISIBLE_DEVICES of a stage placed there: "" for none. */
void place_visible(char *out, size_t size, const struct place_choice *c);
#endif
