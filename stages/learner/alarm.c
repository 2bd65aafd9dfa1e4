/* alarm.c - see alarm.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "stages/learner/alarm.h"

#include "lib/base/log.h"

static const double growth_most = 1.5, entropy_least = .15, entropy_most = 2, sigma_most = .1,
                    zeroed_most = .5;

/* True where the bound is crossed now. */
static bool crossed(bool *outside, bool now) {
    const bool fresh = now && !*outside;
    *outside = now;
    return fresh;
}

void alarm_look(struct alarm *a, const struct alarm_signs *s) {
    const long long step = (long long)s->step;
    if (a->length_first <= 0) a->length_first = s->length;
    if (crossed(&a->longer, s->length > growth_most * a->length_first))
        log_warn("step %lld: answers have grown from %.0f to %.0f tokens: read some "
                 "(samples.md), a reward may be exploited",
                 step, a->length_first, s->length);
    if (crossed(&a->entropy, s->entropy < entropy_least || s->entropy > entropy_most))
        log_warn("step %lld: mean entropy of a token is %.3f, usual is %g to %g: %s", step,
                 s->entropy, entropy_least, entropy_most,
                 s->entropy < entropy_least ? "the policy has all but stopped exploring"
                                            : "the policy is close to guessing");
    if (crossed(&a->sigma, s->sigma_share > sigma_most))
        log_warn("step %lld: AQN's noise is %.2g of the weights it is added to, more than %g", step,
                 s->sigma_share, sigma_most);
    if (crossed(&a->zeroed, s->b_zeroed > zeroed_most))
        log_warn("step %lld: quant.adapter reads %.0f %% of B as 0: what was learnt there is not "
                 "seen by any stage",
                 step, 100 * s->b_zeroed);
}
