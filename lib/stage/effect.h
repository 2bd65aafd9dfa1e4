/* effect.h - settings that would be silently without effect: which, why, and what to do instead.
 *
 * A key that differs from its default and could change nothing under the other settings is refused.
 * One exception: a section that is switched off as a whole (noise.*.type = off, both sigmas 0) may
 * keep its other keys, so that an arm without noise differs from its twin in one key; check lists
 * them as a note. A size without its type stays refused.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_EFFECT_H
#define QERL_EFFECT_H
#include "lib/stage/shared.h"

struct effect_rule {
    const char *key;
    bool (*idle)(const void *conf);  /* under the other settings it changes nothing */
    const char *why;                 /* "it is of ...: what to do" */
};
/* Refuses (EXIT_CONFIG, one line each) every key of the rules that is not at its default and idle.
 * The rules end with a NULL key. */
int effect_check(const void *conf, const struct stage_key *const *tables,
                 const struct effect_rule *rules, struct err *e);
/* The same for [quant], [lora] and [noise.*], which several stages share. */
int effect_check_shared(const struct shared *c, struct err *e);
/* Appends a line for each section that is off and says more than that. */
void effect_notes(const struct shared *c, json_t *notes);
#endif
