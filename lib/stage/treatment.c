/* treatment.c - see treatment.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/stage/treatment.h"

#include "lib/stage/aqn.h"

double treatment_sigma(const struct shared *c, int64_t step) {
    const struct noise_schedule s = aqn_schedule(c);
    return noise_schedule_at(&s, step);
}

int treatment_view(struct noise_view *v, const struct model *m, const struct shared *c,
                   int64_t step, double sigma, uint64_t seed, int64_t version, struct err *e) {
    struct noise_target t;
    *v = (struct noise_view){ .kern = m->kern };
    if (sigma > 0 && aqn_target(&t, c, step, &m->conf, e) < 0) return -1;
    return noise_view_open(v, m, &t, sigma, seed, (uint64_t)version, e);
}
