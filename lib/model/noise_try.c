/* noise_try.c - what AQN of a size would do to weights that nobody has packed yet: so that `check`
 * can refuse what a run would.
 *
 * Knows: the norms and projections of a source file. Order: norms, linears, both.
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>

#include "lib/base/fs.h"
#include "lib/base/str.h"
#include "lib/model/noise.h"
#include "lib/model/noise_ops.h"
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

/* Sums of squares of the projections, each read once for all that is tried. */
struct linears { double square[MODEL_LAYERS_MAX][PROJ_COUNT]; };

static double square_of(const struct source *s, int i) {
    enum { ROWS = 64 };
    const struct source_item *x = source_at(s, i);
    double sum = 0;
    float *row = mem_alloc(ROWS * (size_t)x->cols * sizeof *row);
    for (int first = 0; first < x->rows; first += ROWS) {
        const int count = x->rows - first < ROWS ? x->rows - first : ROWS;
        if (source_rows(s, i, first, count, row, NULL) < 0) continue;
        for (int64_t k = 0; k < (int64_t)count * x->cols; k++)
            sum += (double)row[k] * (double)row[k];
    }
    free(row);
    return sum;
}

static void read_linears(struct linears *l, const struct source *s,
                         const struct noise_target *target, int targets) {
    memset(l, 0, sizeof *l);
    for (int i = 0; i < source_count(s); i++) {
        const struct source_item *x = source_at(s, i);
        bool hit = false;
        for (int t = 0; t < targets && x->kind == SOURCE_KIND_PROJ; t++)
            hit = hit || target[t].linear[x->layer][x->proj] > 0;
        if (hit) l->square[x->layer][x->proj] = square_of(s, i);
    }
}

static int try_linears(const struct linears *l, const struct model_conf *c,
                       const struct noise_target *target, double sigma, struct err *e) {
    double weight2 = 0, noise2 = 0, elements = 0;
    for (int layer = 0; layer < c->layers; layer++)
        for (enum proj p = 0; p < PROJ_COUNT; p++) {
            const double times = (double)target->linear[layer][p];
            int out, in;
            if (times <= 0) continue;
            model_proj_shape(c, p, &out, &in);
            const double n = (double)out * in;
            weight2 += l->square[layer][p];
            noise2 += n * times * times * sigma * sigma;
            elements += n;
        }
    if (!(weight2 > 0)) return 0;
    return noise_strength_check(sigma, sqrt(noise2 / weight2), .05, sqrt(weight2 / elements),
                                "linear", e);
}

int noise_try(const char *path, const struct model_conf *c, const struct noise_target *target,
              int targets, const double *sigma, int sigmas, uint64_t seed, int *failed,
              struct err *e) {
    struct source *s;
    struct linears l;
    char file[FS_PATH_MAX];
    int rc = 0;
    if (source_open(&s, model_path_resolve(path, file), c, NULL) < 0) return 0;
    read_linears(&l, s, target, targets);
    for (int i = 0; rc == 0 && i < targets * sigmas; i++) {
        const struct noise_target *t = &target[i / sigmas];
        *failed = i % sigmas;
        if (t->norms) rc = try_norms(s, c, t, sigma[*failed], seed, e);
        if (rc == 0 && t->linears) rc = try_linears(&l, c, t, sigma[*failed], e);
    }
    source_close(&s);
    return rc;
}

/* Whether a dead zone would find something in one norm. */
static bool zone_hits(const float *w, int n, float scale) {
    float most = 0;
    for (int i = 0; i < n; i++) most = fmaxf(most, fabsf(w[i]));
    for (int i = 0; i < n; i++)
        if (w[i] != 0 && fabsf(w[i]) < scale * most) return true;
    return false;
}

int noise_try_zone(const char *path, const struct model_conf *c, const struct noise_plan *p,
                   struct err *e) {
    const struct noise_text *t = &p->module_text;
    struct source *s;
    char file[FS_PATH_MAX];
    bool hits = false;
    if (t->type != KERN_NOISE_DEADZONE || t->point != NOISE_POINT_WEIGHT) return 0;
    for (int m = 0; m < NOISE_MODULE_COUNT; m++)
        if (p->module_sites[m] && (m < NOISE_MODULE_NORM_IN || m > NOISE_MODULE_NORM_FINAL))
            return 0;
    if (source_open(&s, model_path_resolve(path, file), c, NULL) < 0) return 0;
    float *w = mem_alloc((size_t)c->dim * sizeof *w);
    for (int i = 0; i < source_count(s) && !hits; i++) {
        const struct source_item *x = source_at(s, i);
        if (!is_norm(x)) continue;
        const enum noise_module m = x->kind == SOURCE_KIND_NORM_IN     ? NOISE_MODULE_NORM_IN
                                    : x->kind == SOURCE_KIND_NORM_POST ? NOISE_MODULE_NORM_POST
                                                                       : NOISE_MODULE_NORM_FINAL;
        hits = p->module[x->layer < 0 ? 0 : x->layer][m] &&
               (source_rows(s, i, 0, 1, w, NULL) < 0 || zone_hits(w, c->dim, (float)t->scale));
    }
    free(w);
    source_close(&s);
    if (hits) return 0;
    return err_code(e, EXIT_CONFIG,
                    "noise.modules.scale = %g: a dead zone of that size finds no weight of these "
                    "norms, not one would change; give it more, or other targets", t->scale);
}
