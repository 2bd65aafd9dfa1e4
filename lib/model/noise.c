/* noise.c - see noise.h: the schedule, and one draw of AQN as rows of dw beside the norms' weights.
 *
 * Knows: which norms there are and in which order, the key of a draw, how to prove that it
 * happened. Does not know: when a version changes, who reads dw (net.h).
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/noise.h"

#include <math.h>

#include "lib/base/rng.h"
#include "lib/base/str.h"

static kptr norm_weight(const struct model *m, int norm) {
    if (norm == 2 * m->conf.layers) return m->norm_final;
    const struct model_layer *l = &m->layer[norm / 2];
    return norm % 2 ? l->norm_post : l->norm_in;
}

static void draw(float *dw, int dim, double sigma, const uint32_t key[2], int norm) {
    for (int i = 0; i < dim; i += 4) {
        const uint32_t counter[4] = { (uint32_t)i / 4, (uint32_t)norm, 0, 0 };
        double z[4];
        rng_normal4(z, rng_philox(counter, key));
        for (int j = 0; j < 4 && i + j < dim; j++) dw[i + j] = (float)(sigma * z[j]);
    }
}

/* What the forward pass will see of it: w + dw is one f32 addition there, so it is measured as one
 * here. */
static double measure(struct noise_view *v, const float *w, const float *dw, int dim) {
    double sum = 0;
    for (int i = 0; i < dim; i++) {
        float noisy = w[i] + dw[i];
        double d = (double)noisy - (double)w[i];
        sum += d * d;
        v->changed += noisy != w[i];
        v->elements++;
    }
    return sum;
}

int noise_view_open(struct noise_view *v, const struct model *m, double sigma, uint64_t seed,
                    uint64_t version, struct err *e) {
    *v = (struct noise_view){ .sigma = sigma, .seed = seed, .version = version, .kern = m->kern };
    if (!isfinite(sigma) || sigma < 0)
        return err_set(e, "noise of sigma %g: must be a finite number, 0 or more", sigma);
    if (sigma == 0) return 0;
    const int dim = m->conf.dim, norms = 2 * m->conf.layers + 1;
    const size_t row_bytes = (size_t)dim * sizeof(float);
    if (m->kern->alloc(m->kern, &v->dw, row_bytes * (size_t)norms, e) < 0)
        return err_wrap(e, "cannot make room for noise");
    float *w = mem_alloc(2 * row_bytes), *dw = w + dim;
    uint32_t key[2];
    rng_key(key, seed, RNG_PURPOSE_AQN, version);
    double sum = 0;
    for (int norm = 0; norm < norms; norm++) {
        draw(dw, dim, sigma, key, norm);
        m->kern->download(m->kern, w, norm_weight(m, norm), row_bytes);
        sum += measure(v, w, dw, dim);
        m->kern->upload(m->kern, noise_view_dw(v, norm, dim), dw, row_bytes);
    }
    free(w);
    v->realised = sqrt(sum / (double)v->elements);
    int rc = m->kern->sync(m->kern, e);
    if (rc == 0 && v->changed == 0)
        rc = err_set(e, "noise of sigma %g was intended, but not one of %lld norm weights changed",
                     sigma, (long long)v->elements);
    if (rc < 0) noise_view_close(v);
    return rc;
}

void noise_view_close(struct noise_view *v) {
    if (v->dw.p) v->kern->free(v->kern, &v->dw);
    v->dw = (kptr){ NULL };
}

double noise_schedule(int64_t done, int64_t steps_total, int stages, double start, double end) {
    assert(stages >= 2 && steps_total > 0 && start > 0 && end > 0);
    if (done > steps_total) done = steps_total;
    const int64_t interval = done <= 0 ? 0 : done * stages / steps_total;
    if (interval == 0) return 0;
    if (stages == 2) return start;
    const int64_t last = stages - 2, i = interval - 1 < last ? interval - 1 : last;
    /* exactly, whatever pow makes of it */
    if (i == last) return end;
    return i == 0 ? start : start * pow(end / start, (double)i / (double)last);
}
