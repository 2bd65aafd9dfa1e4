/* shapes.h - the models that the figures are about, by shape only.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_BENCH_SHAPES_H
#define QERL_BENCH_SHAPES_H
#include "lib/model/lora.h"

enum shape { SHAPE_TINY, SHAPE_135M, SHAPE_05B, SHAPE_15B, SHAPE_7B, SHAPE_COUNT };
extern const char *const shape_name[SHAPE_COUNT];        /* "tiny", "135m", ... */
extern const struct model_conf shape_conf[SHAPE_COUNT];  /* no end-of-text: it is never drawn */

/* All seven projections adapted, alpha = rank. */
struct lora_shape shape_lora(int rank);

/* What the formulas of the limits need. */
struct shape_size {
    double body, head;           /* linear weights; vocab * dim */
    double lora;                 /* adapter parameters */
    double kv_bytes;             /* of one position, all layers, bf16 */
    double layers, q_dim;
};
struct shape_size shape_size(const struct model_conf *c, int rank);
#endif
