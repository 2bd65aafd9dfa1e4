/* noise_sum.c - see noise_sum.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "stages/learner/noise_sum.h"

void noise_sum_add(struct progress *p, const struct noise_plan *plan, enum noise_phase phase,
                   const struct noise_evidence *ev) {
    int64_t changed[2];
    noise_evidence_changed(changed, plan, phase, ev);
    for (int k = 0; k < 2; k++) {
        int64_t *sum = &p->noise_changed[phase][k];
        if (changed[k] > 0) *sum = (*sum > 0 ? *sum : 0) + changed[k];
        else if (changed[k] < 0 && *sum == 0) *sum = -1;
    }
}

int noise_sum_check(const struct progress *p, const struct noise_plan *plan, struct err *e) {
    for (int phase = 0; phase < NOISE_PHASE_EVAL; phase++)
        for (int k = 0; k < 2; k++) {
            const struct noise_text *t = k ? &plan->module_text : &plan->op_text;
            if (p->noise_changed[phase][k] >= 0) continue;
            return err_code(e, EXIT_CONFIG,
                            "%s of type %s and scale %g changed not one element in phase %s of "
                            "all %lld steps: the treatment did not happen; give it a larger %s",
                            k ? "noise.modules" : "noise.ops", noise_type_name[t->type], t->scale,
                            noise_phase_name[phase], (long long)p->step,
                            t->type == KERN_NOISE_SPARSE ? "rate" : "scale");
        }
    return 0;
}
