/* treatment.c - see treatment.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/stage/treatment.h"

double treatment_sigma(const struct shared *c, int64_t step) {
    if (c->aqn.sigma_start <= 0) return 0;
    return noise_schedule(step, c->run.steps, (int)c->aqn.stages, c->aqn.sigma_start,
                          c->aqn.sigma_end);
}

int treatment_view(struct noise_view *v, const struct model *m, const struct shared *c,
                   int64_t step, double sigma, uint64_t seed, int64_t version, struct err *e) {
    (void)c;
    (void)step;
    return noise_view_open(v, m, sigma, seed, (uint64_t)version, e);
}
