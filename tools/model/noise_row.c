/* noise_row.c - the noise on one row of a module's weights that nobody drew: of a bias or a dead
 * zone it follows from the weights, so they are read, and what a rollout kept beside them is made
 * again.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/noise_math.h"
#include "lib/stage/policy.h"
#include "tools/model/noise.h"

/* Row `row` of a module of layer `layer`; how many values, -1 where the module has no such row. */
static int read_row(float **values, struct model *m, enum noise_module module, int64_t layer,
                    int64_t row, struct err *e) {
    struct model_layer *l = &m->layer[layer];
    const bool norm = module >= NOISE_MODULE_NORM_IN && module <= NOISE_MODULE_NORM_FINAL;
    const struct kern_weight *w = module == NOISE_MODULE_HEAD ? &m->head : &l->w[norm ? 0 : module];
    const int rows = norm ? 1 : w->out, n = norm ? m->conf.dim : w->in;
    if (row >= rows)
        return err_code(e, EXIT_USAGE, "--position %lld: %s has rows 0 to %d", (long long)row,
                        noise_module_name[module], rows - 1);
    float *all = mem_alloc((size_t)rows * (size_t)n * sizeof *all);
    if (norm)
        m->kern->download(m->kern, all, module == NOISE_MODULE_NORM_IN     ? l->norm_in
                                        : module == NOISE_MODULE_NORM_POST ? l->norm_post
                                                                           : m->norm_final,
                          (size_t)n * sizeof *all);
    else model_values(m->kern, w, all);
    memmove(all, all + row * n, (size_t)n * sizeof *all);
    *values = all;
    return n;
}

static int print_row(const struct kern_noise *n, const struct ask *a, struct model *m,
                     enum noise_module module, struct err *e) {
    float *w = NULL, most = 0;
    const bool matrix = module <= NOISE_MODULE_DOWN || module == NOISE_MODULE_HEAD,
               rounded = matrix && m->quant != MODEL_QUANT_F32;
    const int64_t layer = noise_module_in_layer(module) ? a->layer : 0;
    if (layer >= m->conf.layers)
        return err_code(e, EXIT_USAGE, "--layer %lld: the model has layers 0 to %d",
                        (long long)layer, m->conf.layers - 1);
    const int count = read_row(&w, m, module, layer, a->position, e);
    if (count < 0) return -1;
    for (int i = 0; i < count; i++) most = fabsf(w[i]) > most ? fabsf(w[i]) : most;
    const float edge = kern_noise_edge(n, most);
    printf("element    weight         e%s\n", rounded ? ", as the bf16 matrix holds it" : "");
    for (int64_t i = a->element < 0 ? 0 : a->element, k = 0; i < count && k < a->count; i++, k++) {
        const float by = kern_noise_add(n, w[i], 0, edge, 0, NULL) - w[i];
        printf("%-10lld %-14.9g %.9g\n", (long long)i, (double)w[i],
               (double)kern_noise_round(by, rounded));
    }
    free(w);
    return 0;
}

int noise_of_row(const struct kern_noise *n, const struct origin *s, const struct ask *a,
                 enum noise_module module, struct err *e) {
    struct kern k;
    struct model *m = NULL;
    struct model_opts o = { .path = a->path, .quant = MODEL_QUANT_BF16 };
    if (s->run) o = policy_model_opts(&s->shared);
    if (s->run && a->model) o.path = a->model;
    int rc = kern_open(&k, NULL, NULL, e);
    if (rc == 0) rc = model_open(&m, &k, &o, e);
    if (rc == 0) rc = print_row(n, a, m, module, e);
    if (m) model_close(&m);
    return rc;
}
