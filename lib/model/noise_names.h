/* noise_names.h - layers and modules as a researcher writes them.
 *
 * Knows: lists, ranges, "14-17 of 28", the names that model files give to modules.
 * Does not know: what is done to what was named.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_NOISE_NAMES_H
#define QERL_NOISE_NAMES_H
#include "lib/base/str.h"
#include "lib/model/model.h"

enum { NOISE_WORD_MAX = 64 };

/* Next item of a comma list, blanks around it cut, into word; false at the end. *at moves on. Empty
 * items are skipped. */
bool noise_list_next(const char **at, char word[NOISE_WORD_MAX]);

/* "all", "0,3,14-17", or "14-17 of 28": layers of a model of that depth, scaled to this one. Range
 * a-b of N goes to floor(a L / N) .. ceil((b + 1) L / N) - 1: all that it touches, never nothing.
 * EXIT_CONFIG on other text and on layers that the model has not. */
int noise_layers_parse(bool on[MODEL_LAYERS_MAX], const char *text, int layers, struct err *e);
/* "all", or "0,3,14-17": one text for one set. Appends. */
void noise_layers_text(const bool *on, int layers, struct str *out);

/* modules by the names that model files give them */
enum noise_module {
    NOISE_MODULE_Q, NOISE_MODULE_K, NOISE_MODULE_V, NOISE_MODULE_O, NOISE_MODULE_GATE,
    NOISE_MODULE_UP, NOISE_MODULE_DOWN, NOISE_MODULE_NORM_IN, NOISE_MODULE_NORM_POST,
    NOISE_MODULE_NORM_FINAL, NOISE_MODULE_HEAD, NOISE_MODULE_COUNT
};
extern const char *const noise_module_name[];      /* "q_proj", ..., "lm_head" */
static inline bool noise_module_in_layer(enum noise_module m) {
    return m < NOISE_MODULE_NORM_FINAL;
}
/* Whether the pattern names this module: its parts between dots are found in order among those of
 * model.layers.3.mlp.down_proj, each whole. A part may be a range of layers ("layers.14-17"),
 * "linear" (the seven projections) or "rmsnorm" (the norms). "layers.2" is not layers.20. */
bool noise_pattern_hits(const char *pattern, enum noise_module m, int layer);
/* EXIT_CONFIG, naming the nearest and all names, where the pattern hits no module of such a
 * model. */
int noise_pattern_check(const char *pattern, int layers, struct err *e);
#endif
