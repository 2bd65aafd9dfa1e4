/* lora.c - see lora.h: where each matrix lies in the flat vector, its first values, its name by
 * hash. The PEFT folder format is in lora_peft.c.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/lora.h"

#include <math.h>

#include "lib/base/rng.h"
#include "lib/base/str.h"

static size_t proj_params(const struct model_conf *c, const struct lora_shape *s, enum proj p,
                          size_t *a_params) {
    int out, in;
    model_proj_shape(c, p, &out, &in);
    *a_params = (size_t)s->rank * (size_t)in;
    return *a_params + (size_t)s->rank * (size_t)out;
}

static size_t layer_params(const struct model_conf *c, const struct lora_shape *s) {
    size_t n = 0, a;
    for (enum proj p = 0; p < PROJ_COUNT; p++)
        if (s->on[p]) n += proj_params(c, s, p, &a);
    return n;
}

size_t lora_params(const struct model_conf *c, const struct lora_shape *s) {
    return (size_t)c->layers * layer_params(c, s);
}

void lora_offsets(const struct lora *l, int layer, enum proj p, size_t *a, size_t *b) {
    assert(l->shape.on[p] && layer >= 0 && layer < l->conf.layers);
    size_t at = (size_t)layer * layer_params(&l->conf, &l->shape), a_params;
    for (enum proj q = 0; q < p; q++)
        if (l->shape.on[q]) at += proj_params(&l->conf, &l->shape, q, &a_params);
    proj_params(&l->conf, &l->shape, p, &a_params);
    *a = at;
    *b = at + a_params;
}

/* One matrix A: element i takes word i % 4 of the draw with counter (i / 4, layer, projection). */
static void init_a(float *a, size_t n, int in, const uint32_t key[2], int layer, enum proj p) {
    const float bound = (float)(1. / sqrt((double)in));
    for (size_t i = 0; i < n; i += 4) {
        const uint64_t word = i / 4;
        const uint32_t counter[4] = { (uint32_t)word, (uint32_t)(word >> 32), (uint32_t)layer,
                                      (uint32_t)p };
        struct rng4 r = rng_philox(counter, key);
        for (size_t j = 0; j < 4 && i + j < n; j++)
            a[i + j] = (2.f * rng_unit(r.v[j]) - 1.f) * bound;
    }
}

struct lora *lora_create(const struct model_conf *c, const struct lora_shape *s, uint64_t seed) {
    assert(s->rank > 0);
    struct lora *l = mem_alloc(sizeof *l);
    *l = (struct lora){ .shape = *s, .conf = *c, .params = lora_params(c, s) };
    l->value = mem_alloc(l->params * sizeof(float));
    uint32_t key[2];
    rng_key(key, seed, RNG_PURPOSE_LORA_INIT, 0);
    for (int layer = 0; layer < c->layers; layer++)
        for (enum proj p = 0; p < PROJ_COUNT; p++) {
            if (!s->on[p]) continue;
            size_t a, b;
            int out, in;
            model_proj_shape(c, p, &out, &in);
            lora_offsets(l, layer, p, &a, &b);
            init_a(l->value + a, b - a, in, key, layer, p);
        }
    return l;
}

void lora_destroy(struct lora **l) {
    if (!*l) return;
    free((*l)->value);
    free(*l);
    *l = NULL;
}

void lora_sha256(const struct lora *l, char out[SHA256_HEX]) {
    struct sha256 s;
    char shape[256];
    int n = snprintf(shape, sizeof shape, "qerl-lora 1 rank %d alpha %.9g layers %d params %zu on",
                     l->shape.rank, (double)l->shape.alpha, l->conf.layers, l->params);
    for (enum proj p = 0; p < PROJ_COUNT; p++)
        n += snprintf(shape + n, sizeof shape - (size_t)n, " %d", l->shape.on[p]);
    sha256_init(&s);
    sha256_add(&s, shape, (size_t)n + 1);
    sha256_add(&s, l->value, l->params * sizeof(float));
    sha256_hex(&s, out);
}
