/* noise_sum.c - the verdict on a whole run: one hit in any step is enough, none in all of them is an error.
 * SPDX-License-Identifier: Apache-2.0 */
#include "stages/learner/noise_sum.h"

#include <criterion/criterion.h>

Test(noise_sum, a_run_whose_noise_never_hit_is_an_error) {
    struct noise_plan plan = { .op_text = { .type = KERN_NOISE_SPARSE, .scale = .5, .rate = 1e-7, .forward = true,
                                            .phase = { [NOISE_PHASE_UPDATE] = true } } };
    struct noise_evidence none = { .passes = { 1 } }, one;
    struct progress p = { .step = 2 };
    struct err e = { 0 };
    plan.op[NOISE_OP_ROPE] = true;
    plan.op_sites[NOISE_OP_ROPE][NOISE_FORWARD] = 2;
    noise_sum_add(&p, &plan, NOISE_PHASE_UPDATE, &none);         /* a step that was skipped says nothing */
    cr_expect_eq(noise_sum_check(&p, &plan, &e), 0, "%s", e.text);
    none.op[NOISE_OP_ROPE][NOISE_FORWARD] = (struct noise_tally){ .sites = 2, .elements = 1000, .measured = 1000 };
    one = none;
    one.op[NOISE_OP_ROPE][NOISE_FORWARD].changed = 1;
    noise_sum_add(&p, &plan, NOISE_PHASE_UPDATE, &none);
    noise_sum_add(&p, &plan, NOISE_PHASE_UPDATE, &none);
    noise_sum_add(&p, &plan, NOISE_PHASE_ROLLOUT, &none);        /* where nothing was intended */
    cr_expect_eq(noise_sum_check(&p, &plan, &e), -1);
    cr_expect_eq(e.code, EXIT_CONFIG);
    cr_expect(strstr(e.text, "in phase update"), "%s", e.text);
    noise_sum_add(&p, &plan, NOISE_PHASE_UPDATE, &one);
    noise_sum_add(&p, &plan, NOISE_PHASE_UPDATE, &none);
    cr_expect_eq(p.noise_changed[NOISE_PHASE_UPDATE][0], 1);
    cr_expect_eq(noise_sum_check(&p, &plan, &e), 0, "%s", e.text);
}
