/* net_fixture.h - small models made by hand for the tests of net, lora, noise and gen.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_NET_FIXTURE_H
#define QERL_NET_FIXTURE_H
#include "lib/model/net.h"

struct fix {
    struct pool *pool;
    struct kern kern;
    struct model model;
};
/* Value of element i of a tensor (row-major). name: "embed", "head", "norm_final", "norm_in",
 * "norm_post", "q_proj", ..., "bias" (proj then says which). */
typedef float fix_value(const char *name, int layer, enum proj p, size_t i);
/* Aborts the test on failure. */
void fix_open(struct fix *f, const char *path, int threads, const struct model_conf *c,
              enum model_quant q, fix_value *value);
void fix_close(struct fix *f);
/* Projections read their input in this format, but those with (layer + projection) % 5 == 3 where
 * some are to be left alone. */
void fix_activations(struct fix *f, enum model_quant a, enum model_rounding r, bool some);
/* Adapters are read in this format, but those of layers with layer % 2 == 1, whose inputs then stay
 * as they are too, where some are to be left alone. */
void fix_adapter(struct fix *f, enum model_quant a, enum model_rounding r, bool some);

/* the toy transformer of spec dapo 17.13 */
struct model_conf fix_toy_conf(void);
float fix_toy_value(const char *name, int layer, enum proj p, size_t i);
/* odd shapes, grouped queries, tied: property tests */
struct model_conf fix_small_conf(void);
float fix_small_value(const char *name, int layer, enum proj p, size_t i);
/* All seven projections; A as lora_create makes it, B uniform in +-b. */
struct lora *fix_lora(const struct model_conf *c, int rank, float alpha, float b, uint64_t seed);
#endif
