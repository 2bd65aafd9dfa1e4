/* noise_site.h - the places of a pass where noise acts: numbers, names, whose operation.
 *
 * Knows: what stands in every draw's counter and what a person calls it. Does not know: which of
 * them a plan hits (noise_ops.h), who runs them (net_noise.c).
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_NOISE_SITE_H
#define QERL_NOISE_SITE_H
#include "lib/model/model.h"

/* matmul: the seven projections, each with its adapter, before the bias. bmm: attention's scores
 * and values. head: the logits. */
enum noise_op { NOISE_OP_MATMUL, NOISE_OP_BMM, NOISE_OP_SOFTMAX, NOISE_OP_SILU, NOISE_OP_GELU,
                NOISE_OP_NORM, NOISE_OP_ROPE, NOISE_OP_HEAD, NOISE_OP_COUNT };
enum noise_direction { NOISE_FORWARD, NOISE_BACKWARD, NOISE_DIRECTION_COUNT };
/* modules by the names that model files give them; projections first, as in enum proj */
enum noise_module { NOISE_MODULE_Q, NOISE_MODULE_K, NOISE_MODULE_V, NOISE_MODULE_O,
                    NOISE_MODULE_GATE, NOISE_MODULE_UP, NOISE_MODULE_DOWN, NOISE_MODULE_NORM_IN,
                    NOISE_MODULE_NORM_POST, NOISE_MODULE_NORM_FINAL, NOISE_MODULE_HEAD,
                    NOISE_MODULE_COUNT };
enum noise_point { NOISE_POINT_INPUT, NOISE_POINT_OUTPUT, NOISE_POINT_WEIGHT, NOISE_POINT_COUNT };
extern const char *const noise_op_name[], *const noise_direction_name[], *const noise_module_name[],
    *const noise_point_name[];

/* Numbers of sites, part of every draw's counter (KERN_NOISE_SITE(layer, number)): never renumber.
 * Those that lie in no layer have layer 0. Forward, of operations: the projections are 0 .. 6 as in
 * enum proj. */
enum noise_site {
    NOISE_SITE_SCORES = 7, NOISE_SITE_VALUES, NOISE_SITE_PROBS, NOISE_SITE_SILU,
    NOISE_SITE_NORM_IN, NOISE_SITE_NORM_POST, NOISE_SITE_NORM_FINAL, NOISE_SITE_ROPE_Q,
    NOISE_SITE_ROPE_K, NOISE_SITE_HEAD,
    /* of modules: + enum noise_module */
    NOISE_SITE_MODULE_INPUT = 32, NOISE_SITE_MODULE_OUTPUT = 48, NOISE_SITE_MODULE_WEIGHT = 64,
    /* backward: gradients of inputs; DX_QKV and DX_MLP are the sums that q, k, v and gate, up
     * return */
    NOISE_SITE_DX_QKV = 128, NOISE_SITE_DX_O, NOISE_SITE_DX_MLP, NOISE_SITE_DX_DOWN,
    NOISE_SITE_DQ, NOISE_SITE_DK, NOISE_SITE_DV, NOISE_SITE_DPROBS, NOISE_SITE_DSCORES,
    NOISE_SITE_DGATE, NOISE_SITE_DNORM_IN, NOISE_SITE_DNORM_POST, NOISE_SITE_DNORM_FINAL,
    NOISE_SITE_ROPE_DQ, NOISE_SITE_ROPE_DK, NOISE_SITE_DHEAD,
    /* the accumulated gradient of the adapter: a layer's rows of NOISE_GRAD_ROW, what is left */
    NOISE_SITE_GRAD = 192, NOISE_SITE_GRAD_REST, NOISE_SITE_COUNT
};
enum { NOISE_GRAD_ROW = 4096 };

/* LAST: behind the layers. HEADS: of each attention head. ABOVE: not in the first layer, below
 * which nothing is trained. GRAD: of the adapter's gradient, once an update and not in a pass. */
enum { NOISE_SITE_LAST = 1, NOISE_SITE_HEADS = 2, NOISE_SITE_ABOVE = 4, NOISE_SITE_OF_GRAD = 8 };
/* By number; .name NULL: no site of an operation. */
extern const struct noise_site_about { const char *name; enum noise_op op; int flags; }
    noise_site_about[NOISE_SITE_COUNT];

static inline enum noise_direction noise_site_direction(int number) {
    return number < NOISE_SITE_DX_QKV ? NOISE_FORWARD : NOISE_BACKWARD;
}
static inline int noise_site_module(enum noise_point at, enum noise_module m) {
    return (at == NOISE_POINT_INPUT    ? NOISE_SITE_MODULE_INPUT
            : at == NOISE_POINT_OUTPUT ? NOISE_SITE_MODULE_OUTPUT
                                       : NOISE_SITE_MODULE_WEIGHT) + (int)m;
}
static inline bool noise_module_in_layer(enum noise_module m) {
    return m < NOISE_MODULE_NORM_FINAL;
}
#endif
