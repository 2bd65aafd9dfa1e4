/* lora.h - the trained part: y = (W x + b) + B . bf16(s A x) beside each adapted projection, never
 * merged.
 *
 * One flat f32 vector holds every A and B, so the optimiser, the checkpoint and the hash see one
 * array: layer by layer, projection by projection in enum order, A [rank, in] then B [out, rank],
 * row-major.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_LORA_H
#define QERL_LORA_H
#include "lib/model/model.h"

struct lora_shape {
    int rank;
    float alpha;                                   /* s = alpha / rank */
    bool on[PROJ_COUNT];                           /* adapted projections; all seven by default */
};
struct lora {
    struct lora_shape shape;
    struct model_conf conf;
    size_t params;                                 /* floats in `value` */
    float *value;                                  /* masters, host memory, owned */
};
/* A ~ U(-1/sqrt(in), 1/sqrt(in)) by Philox keyed (seed, RNG_PURPOSE_LORA_INIT), B = 0: the adapted
 * model equals the base. */
struct lora *lora_create(const struct model_conf *c, const struct lora_shape *s, uint64_t seed);
void lora_destroy(struct lora **l);
size_t lora_params(const struct model_conf *c, const struct lora_shape *s);
/* Offsets (floats) of A and B of one projection inside value. */
void lora_offsets(const struct lora *l, int layer, enum proj p, size_t *a, size_t *b);
/* of shape and values: names a policy */
void lora_sha256(const struct lora *l, char out[SHA256_HEX]);

/* PEFT layout: DIR/adapter_model.safetensors (f32) and adapter_config.json (base_model_name_or_path
 * = base_name). The folder is written under a temporary name, fsynced, then renamed into place.
 * Loads what peft writes (f32, f16, bf16). Refuses wrong shapes, missing or unknown tensors, rank
 * over 512, non-finite values. */
int lora_save(const struct lora *l, const char *dir, const char *base_name, struct err *e);
int lora_load(struct lora **out, const struct model_conf *c, const char *dir, struct err *e);
#endif
