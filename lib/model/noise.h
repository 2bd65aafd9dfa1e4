/* noise.h - AQN: noise beside constant norm weights, as a view that cannot accumulate.
 *
 * dw ~ N(0, sigma^2) per channel and norm, drawn in f32, keyed (seed, RNG_PURPOSE_AQN, version),
 * counter (channel/4, norm index): anyone who knows the key rebuilds it. Norm index = 2 * layer (+1
 * for the post-attention norm); the final norm is 2 * layers. All norms are targets (spec: the
 * study's "rmsnorm").
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_NOISE_H
#define QERL_NOISE_H
#include "lib/model/model.h"

struct noise_view {
    double sigma;                  /* intended */
    uint64_t seed, version;        /* the key */
    /* rms of (w + dw) - w as computed in f32 on what the forward pass reads */
    double realised;
    int64_t elements, changed;     /* channels visited, channels whose w + dw differs from w */
    kptr dw;                       /* f32 [2 * layers + 1, dim] */
    struct kern *kern;
};
/* sigma 0 gives a view whose dw is absent. -1 when sigma > 0 and nothing changed: a treatment that
 * did not happen. */
int noise_view_open(struct noise_view *v, const struct model *m, double sigma, uint64_t seed,
                    uint64_t version, struct err *e);
void noise_view_close(struct noise_view *v);
/* dw of one norm, or absent. */
static inline kptr noise_view_dw(const struct noise_view *v, int norm, int dim) {
    return v && v->dw.p ? kptr_at(v->dw, (size_t)norm * (size_t)dim * sizeof(float))
                        : (kptr){ NULL };
}
/* K-stage step schedule of spec dapo 14.1 in integer arithmetic: completed steps done of total S, K
 * stages; first interval 0, then geometric start -> end. K = 2 has the one value start. Caller has
 * checked K >= 2, start > 0, end > 0. */
double noise_schedule(int64_t done, int64_t steps_total, int stages, double start, double end);
#endif
