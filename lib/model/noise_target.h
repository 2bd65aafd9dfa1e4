/* noise_target.h - which weights AQN hits, and how much of sigma each gets at a moment of the run.
 *
 * Knows: names and layers of a model, per-layer multipliers, zones that change once in a run. Does
 * not know: sigma (noise_schedule.h), how noise is drawn (noise.h).
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_NOISE_TARGET_H
#define QERL_NOISE_TARGET_H
#include "lib/model/model.h"

struct noise_target {
    /* multiplier of each norm (index as in noise.h) and of each projection; 0 = not hit */
    float norm[2 * MODEL_LAYERS_MAX + 1];
    float linear[MODEL_LAYERS_MAX][PROJ_COUNT];
    int norms, linears;                  /* how many have a multiplier above 0 */
    int64_t elements;                    /* values in them */
};

struct noise_target_text {               /* as the configuration says it; lent */
    const char *targets;         /* "norms", "linears", or names: "input_layernorm, down_proj" */
    const char *exclude;                 /* names; "" = none */
    /* "0,3,14-17", "14-17 of 28" (as select_layers scales it), "0-13:0.5, 14-17:1.5" with
     * multipliers; "" = 1 everywhere. "of N", said once, holds for the whole list. What it does not
     * name, the final norm among it, gets `others`. */
    const char *layers;
    double others;
    /* Zones, instead of `layers`: edge keeps its multipliers; middle has zone_early, from
     * floor(zone_switch * steps) completed steps on zone_late; what is in neither has `others`. */
    const char *zone_edge, *zone_middle; /* "" = no zones */
    double zone_switch, zone_early, zone_late;
};
/* The targets while step done + 1 is made. EXIT_CONFIG on a name or layer that hits nothing, on
 * multipliers that distinguish nothing, and where nothing at all would be hit. */
int noise_target_make(struct noise_target *t, const struct noise_target_text *x, int64_t done,
                      int64_t steps, const struct model_conf *c, struct err *e);
/* Completed steps at which the zones change; -1: they do not. */
int64_t noise_target_switch(const struct noise_target_text *x, int64_t steps);
#endif
