/* select.h - which parts of a model a setting means: modules by name, layers by number.
 *
 * Names are matched by whole parts, never by substring: "gate" is not in "gate_proj". Layers may be
 * given for a model of another depth. Does not know: what is done with what was selected.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_SELECT_H
#define QERL_SELECT_H
#include "lib/model/model.h"

enum { SELECT_NAME_MAX = 96 };

/* Whether the pattern's parts (between dots) stand in this order among the parts of name
 * ("model.layers.7.self_attn.q_proj"): "down_proj", "layers.27.q_proj", "layers.14-17", where a
 * range stands for a number. */
bool select_name(const char *pattern, const char *name);
/* Next word of a list separated by commas or blanks, copied into word; false at its end. Words of
 * SELECT_NAME_MAX or more bytes are cut. */
bool select_word(const char **list, char word[SELECT_NAME_MAX]);
/* "model.layers.7.mlp.down_proj" */
void select_proj_name(char out[SELECT_NAME_MAX], int layer, enum proj p);
/* "model.layers.3.input_layernorm", "...post_attention_layernorm", "model.norm" (the last) */
void select_norm_name(char out[SELECT_NAME_MAX], int index, int layers);

/* times[layer] of "0,3,14-17", "14-17 of 28", "0-5:0.5, 14-17:1.5 of 28": 1 or the item's
 * multiplier for the layers that it names, `others` for the rest; "" and "all": 1 for all. "of N",
 * said once, holds for the whole list: each layer takes what stands at its relative depth in a
 * model of N; an item that no layer takes, in a shallower model, is given the layer in its middle
 * if that is free. EXIT_CONFIG, with `key` in the message, on anything else, on layers the model
 * has not and on a layer named twice. */
int select_layers(float times[MODEL_LAYERS_MAX], const char *text, int layers, double others,
                  const char *key, struct err *e);
/* Several lists as one, each item's multiplier times its list's factor. */
struct select_list { const char *text, *key; double factor; };
int select_lists(float times[MODEL_LAYERS_MAX], const struct select_list *list, int lists,
                 int layers, double others, struct err *e);
/* The layers whose multiplier is not 0 as "0-3,7": what a scaled list became. Returns out. */
const char *select_layers_text(char *out, size_t bytes, const float *times, int layers);
#endif
