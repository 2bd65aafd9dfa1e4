/* ahead.c - see ahead.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "stages/learner/ahead.h"

static int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

void ahead_open(struct progress *p, const struct learner_conf *c, int64_t wave,
                const char *sha256) {
    const int64_t due = lesser(c->lag_max + 1, c->shared.run.steps - p->step);
    while (p->leases < due) {
        struct lease *l = &p->lease[p->leases++];
        l->first = p->cursor;
        l->version = p->version;
        snprintf(l->sha256, sizeof l->sha256, "%s", sha256);
        p->cursor += wave;
    }
}

void ahead_close(struct progress *p) {
    assert(p->leases > 0);
    p->leases--;
    memmove(p->lease, p->lease + 1, (size_t)p->leases * sizeof *p->lease);
}

int64_t ahead_floor(const struct progress *p) { return p->leases ? p->lease[0].first : p->cursor; }

bool ahead_whole(const struct progress *p, const struct learner_conf *c) {
    return p->leases == lesser(c->lag_max, c->shared.run.steps - p->step);
}

int64_t ahead_sampled_alike(const struct intake_policy *p, const struct learner_conf *c) {
    if (p->step > 0) return 1;
    const int64_t last = lesser(c->lag_max, c->shared.run.steps - 1);
    return p->for_step == last ? last + 1 : 0;
}

struct intake_policy ahead_policy(const struct progress *p, const struct learner_conf *c, int i) {
    assert(i < p->leases);
    const struct lease *l = &p->lease[i];
    const int64_t step = p->step + i, made = step < c->lag_max ? 0 : step - c->lag_max;
    struct intake_policy q = { .for_step = step,
                               .step = made,
                               .version = l->version,
                               .sigma = treatment_sigma(&c->shared, made),
                               .noise_seed = policy_noise_seed((uint64_t)c->shared.run.seed,
                                                               made) };
    ckpt_adapter_path(q.adapter, c->shared.run.dir, l->version);
    snprintf(q.adapter_sha256, sizeof q.adapter_sha256, "%s", l->sha256);
    return q;
}
