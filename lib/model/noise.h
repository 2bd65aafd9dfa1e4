/* noise.h - AQN: noise beside constant weights, as a view that cannot accumulate.
 *
 * Norm weights: dw ~ N(0, (m sigma)^2) per channel and norm, drawn in f32, keyed (seed,
 * RNG_PURPOSE_AQN, version), counter (channel / 4, tensor): anyone who knows the key rebuilds it. m
 * is the target's multiplier. Tensor = 2 * layer for a layer's first norm, + 1 for its second, 2 *
 * layers for the final one. Linear weights: dW of the same law, counter (element / 4 of the
 * row-major matrix, 2 * layers + 1 + layer * PROJ_COUNT + proj), rounded once to a bf16 matrix that
 * is the noise, by the backend where the weights lie (kernels/weights.h); the net multiplies by it
 * as a second product. Does not know: how much of it when
 * (noise_schedule.h), which weights (noise_target.h), when a version changes.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_NOISE_H
#define QERL_NOISE_H
#include "lib/model/noise_schedule.h"
#include "lib/model/noise_target.h"

struct noise_view {
    double sigma;                  /* intended */
    uint64_t seed, version;        /* the key */
    /* rms over all targets of what the forward pass adds to a weight, divided by the target's
     * multiplier: (w + dw) - w in f32 of norms, the bf16 dW of linears; to be compared with
     * sigma */
    double realised;
    /* visited; where f32(w + dw) is not w; that would differ were w + dw stored as bf16 */
    int64_t elements, changed, changed_bf16;
    double weight_rms;             /* of the targets' weights */
    /* rms of the noise by layer, multipliers and all; [layers] is the final norm; 0 = not hit */
    float layer_rms[MODEL_LAYERS_MAX + 1];
    int layers;
    /* rms of the noise over the rms of the weights that it hits: of norms or of linears, whichever
     * is more. Above NOISE_STRONG it deserves a warning. */
    double strength;
    kptr dw;                       /* f32 [2 * layers + 1, dim]; rows of norms not hit are 0 */
    /* [layers], bf16 (f32 under MODEL_QUANT_F32); .out 0 = not hit; NULL = no linear is */
    struct kern_weight (*linear)[PROJ_COUNT];
    kptr mem;                      /* all of it, and what is measured on the backend */
    size_t mem_bytes;
    struct kern *kern;
};
#define NOISE_STRONG 0.1

/* Bytes of a view: what noise on weights costs in the backend's memory. */
size_t noise_view_plan(const struct model_conf *c, enum model_quant q,
                       const struct noise_target *t);
/* sigma 0 gives an empty view. target NULL: all norms at 1. -1 when sigma > 0 and nothing changed,
 * or realised is more than 6 standard errors from sigma (above it, and from what the rounding of
 * w + dw may add): a treatment that did not happen; or when noise_strength_check
 * refuses it. EXIT_CONFIG in all three: a restart would meet it again. */
int noise_view_open(struct noise_view *v, const struct model *m, const struct noise_target *target,
                    double sigma, uint64_t seed, uint64_t version, struct err *e);
void noise_view_close(struct noise_view *v);
/* The same for a view that was opened before or is all zero: its memory stays where it is if it is
 * large enough, so that noise on the same targets has the same addresses. */
int noise_view_renew(struct noise_view *v, const struct model *m, const struct noise_target *target,
                     double sigma, uint64_t seed, uint64_t version, struct err *e);
/* What it says where strength is above 1, and of linears below what f32 keeps beside them: their
 * product with the input would be rounded away. margin: how much stricter; kind: "norm" or
 * "linear", rms of these weights. */
int noise_strength_check(double sigma, double strength, double margin, double rms,
                         const char *kind, struct err *e);
/* The same refusals before there is a packed model, from the weights where they were downloaded,
 * for each target and each sigma: norms by drawing the noise and measuring it, linears by their rms
 * (5 % stricter, which is what packing may change of it). *failed: whose sigma. 0 where the weights
 * are absent or cannot be read: whoever opens the model says why. */
int noise_try(const char *path, const struct model_conf *c, const struct noise_target *target,
              int targets, const double *sigma, int sigmas, uint64_t seed, int *failed,
              struct err *e);
/* dw of one norm, or absent. */
static inline kptr noise_view_dw(const struct noise_view *v, int norm, int dim) {
    return v && v->dw.p ? kptr_at(v->dw, (size_t)norm * (size_t)dim * sizeof(float))
                        : (kptr){ NULL };
}
/* dW of a projection, or NULL. */
static inline const struct kern_weight *noise_view_linear(const struct noise_view *v, int layer,
                                                          enum proj p) {
    return v && v->linear && v->linear[layer][p].out ? &v->linear[layer][p] : NULL;
}

/* The draw itself: to[i] = sd * z of elements first .. first + n - 1 of a norm's tensor, with the C
 * library's log, cos and sin; of a linear's, rounded to bf16, with those of kernels/normal.h. */
void noise_draw(float *to, size_t first, size_t n, double sd, uint64_t seed, uint64_t version,
                int tensor);
void noise_draw_linear(float *to, size_t first, size_t n, double sd, uint64_t seed,
                       uint64_t version, int tensor);
static inline int noise_tensor_linear(const struct model_conf *c, int layer, enum proj p) {
    return 2 * c->layers + 1 + layer * PROJ_COUNT + (int)p;
}
#endif
