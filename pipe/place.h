/* place.h - where a stage runs: `gpu:0,1 | cpu:0-1 | cpu:*`, alternatives in order of preference.
 *
 * The first alternative that the machine has is taken: a GPU that the driver shows, cores that this
 * process may use. Cores may be shared between stages (they take turns), a GPU may not.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_PLACE_H
#define QERL_PLACE_H
#include "lib/base/err.h"   /* first: says which system we compile for */
#include <sched.h>


enum { PLACE_ALTERNATIVES_MAX = 8, PLACE_IDS_MAX = 1024 };
struct place_machine {
    cpu_set_t cores;                         /* our affinity */
    uint64_t gpus;                           /* bit i: GPU i is there */
};
struct place_choice {
    bool gpu;
    uint64_t gpus;
    cpu_set_t cores;                         /* of a GPU stage: all of ours */
};
struct place {
    struct place_choice choice[PLACE_ALTERNATIVES_MAX];
    int choices;
    int taken;                               /* -1: the machine has none of them */
};
void place_machine(struct place_machine *m);
/* Text to alternatives; a mistake in it is an error whatever the machine. */
int place_read(struct place *p, const char *text, const struct place_machine *m, struct err *e);
/* Sets p->taken; EXIT_ENV and a sentence with what the machine has if nothing fits. */
int place_take(struct place *p, const char *text, const struct place_machine *m, struct err *e);
void place_cores_text(char *out, size_t size, const cpu_set_t *cores);   /* "0-1,4" */
void place_gpus_text(char *out, size_t size, uint64_t gpus);             /* "0,1", "" for none */
void place_text(char *out, size_t size, const struct place_choice *c);   /* "gpu:0", "cpu:0-1" */
#endif
