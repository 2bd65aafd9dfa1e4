/* exclude.h - the projections that a 4-bit treatment leaves alone: bf16 weights, inputs as they
 * are.
 *
 * A list of patterns as select_name has them, separated by commas: "layers.0", "down_proj",
 * "layers.14-17", "layers.27.q_proj"; "layers.27 of 28" is scaled to the model's depth as
 * select_layers does. Embeddings, head, norms and adapters are never quantised and need no pattern.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_EXCLUDE_H
#define QERL_EXCLUDE_H
#include "lib/model/model.h"

struct model_exclude {
    bool on[MODEL_LAYERS_MAX][PROJ_COUNT];
    int count;
};
/* NULL or "" = none. EXIT_CONFIG on patterns that hit nothing (all of them, with the names there
 * are), and when nothing would stay quantised. */
int model_exclude_make(struct model_exclude *x, const char *patterns, const struct model_conf *c,
                       struct err *e);
/* 8 hex digits that name the set, however its patterns were written; "" when it is empty. */
void model_exclude_id(const struct model_exclude *x, char out[9]);
#endif
