/* conf.h - inside lib/model: a model's shape out of config.json or GGUF metadata.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_CONF_H
#define QERL_CONF_H
#include "lib/model/gguf.h"
#include "lib/model/model.h"

/* Limits on what a file may ask for; all shapes below them fit an int and their products an
 * int64. */
enum {
    CONF_VOCAB_MAX = 1 << 21, CONF_DIM_MAX = 1 << 16, CONF_FFN_MAX = 1 << 19, CONF_HEADS_MAX = 1024,
    CONF_HEAD_DIM_MAX = 1024, CONF_POSITIONS_MAX = 1 << 24, CONF_FILE_BYTES_MAX = 1 << 24,
};

bool conf_is_gguf(const char *path);                 /* by the name's ending */
int conf_from_hf(struct model_conf *c, const char *dir, struct err *e);
int conf_from_gguf(struct model_conf *c, const struct gguf *g, struct err *e);
const char *conf_arch_name(enum model_arch a);       /* "llama", "qwen2" */
#endif
