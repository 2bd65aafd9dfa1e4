/* noise_try.c - what AQN of a size would do to weights that nobody has packed yet: so that `check`
 * can refuse what a run would.
 *
 * Knows: the norms and projections of a source file. Order: norms, linears, both.
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>

#include "lib/base/fs.h"
#include "lib/base/str.h"
#include "lib/model/noise.h"
#include "lib/model/source.h"

/* A model of norms only, in host memory. */
struct norms {
    struct kern kern;
    struct model model;
    float *value;
};

static bool is_norm(const struct source_item *x) {
    return x->kind == SOURCE_KIND_NORM_FINAL || x->kind == SOURCE_KIND_NORM_IN ||
           x->kind == SOURCE_KIND_NORM_POST;
}

static int read_norms(struct norms *n, const struct source *s, struct err *e) {
    float *to = n->value;
    for (int i = 0; i < source_count(s); i++) {
        const struct source_item *x = source_at(s, i);
        if (!is_norm(x)) continue;
        if (source_rows(s, i, 0, 1, to, e) < 0) return -1;
        if (x->kind == SOURCE_KIND_NORM_FINAL) n->model.norm_final.p = to;
        else if (x->kind == SOURCE_KIND_NORM_IN) n->model.layer[x->layer].norm_in.p = to;
        else n->model.layer[x->layer].norm_post.p = to;
        to += n->model.conf.dim;
    }
    return 0;
}

static int try_norms(const struct source *s, const struct model_conf *c,
                     const struct noise_target *target, double sigma, uint64_t seed,
                     struct err *e) {
    struct norms n = { .model = { .conf = *c } };
    struct noise_target norms = *target;
    struct noise_view v;
    memset(norms.linear, 0, sizeof norms.linear);
    norms.linears = 0;
    if (kern_open(&n.kern, "ref", NULL, e) < 0) return -1;
    n.model.kern = &n.kern;
    n.model.layer = mem_alloc((size_t)c->layers * sizeof *n.model.layer);
    n.value = mem_alloc((size_t)(2 * c->layers + 1) * (size_t)c->dim * sizeof *n.value);
    int rc = read_norms(&n, s, NULL) < 0
                 ? 0
                 : noise_view_open(&v, &n.model, &norms, sigma, seed, 0, e);
    if (rc == 0) noise_view_close(&v);
    free(n.model.layer);
    free(n.value);
    return rc;
}

static int try_linears(const struct source *s, const struct noise_target *target, double sigma,
                       struct err *e) {
    enum { ROWS = 64 };
    double weight2 = 0, noise2 = 0, elements = 0;
    for (int i = 0; i < source_count(s); i++) {
        const struct source_item *x = source_at(s, i);
        const double times = x->kind == SOURCE_KIND_PROJ
                                 ? (double)target->linear[x->layer][x->proj]
                                 : 0;
        if (times <= 0) continue;
        float *row = mem_alloc(ROWS * (size_t)x->cols * sizeof *row);
        for (int first = 0; first < x->rows; first += ROWS) {
            const int count = x->rows - first < ROWS ? x->rows - first : ROWS;
            if (source_rows(s, i, first, count, row, NULL) < 0) continue;
            for (int64_t k = 0; k < (int64_t)count * x->cols; k++)
                weight2 += (double)row[k] * (double)row[k];
        }
        free(row);
        const double n = (double)x->rows * x->cols;
        noise2 += n * times * times * sigma * sigma;
        elements += n;
    }
    if (!(weight2 > 0)) return 0;
    return noise_strength_check(sigma, sqrt(noise2 / weight2), sqrt(weight2 / elements), "linear",
                                e);
}

int noise_try(const char *path, const struct model_conf *c, const struct noise_target *target,
              double sigma, uint64_t seed, struct err *e) {
    struct source *s;
    char file[FS_PATH_MAX];
    if (source_open(&s, model_path_resolve(path, file), c, NULL) < 0) return 0;
    int rc = target->norms ? try_norms(s, c, target, sigma, seed, e) : 0;
    if (rc == 0 && target->linears) rc = try_linears(s, target, sigma, e);
    source_close(&s);
    return rc;
}
