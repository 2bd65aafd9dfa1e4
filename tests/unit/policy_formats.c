/* policy_formats.c - formats from the settings to a score's label and to the treatment that records
 * must agree on.
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>

#include "lib/stage/policy.h"

static struct shared settings(int weights, int activations, int adapter, int parity,
                              const char *exclude) {
    struct shared c = { .quant = { .weights = weights, .parity = parity, .activations = activations,
                                   .adapter = adapter,
                                   .exclude = (char *)(uintptr_t)exclude } };
    static char none[] = "";
    c.lora.targets = c.aqn.targets = c.aqn.exclude = c.aqn.layers = c.aqn.zone_edge =
        c.aqn.zone_middle = none;
    return c;
}

Test(policy_formats, each_is_a_treatment_of_its_own,
     .description = "weights, inputs, adapters, rounding and exclusions each change the treatment's hash; an "
                    "exclusion where nothing is quantised does not") {
    static const struct {
        int weights, activations, parity;
        const char *exclude, *label;
        int adapter;
    } v[] = {
        { MODEL_QUANT_MXFP4, 0, MODEL_ROUNDING_OCP, "", "mxfp4", 0 },
        { MODEL_QUANT_MXFP4, 0, MODEL_ROUNDING_SEED, "", "mxfp4-seed", 0 },
        { MODEL_QUANT_MXFP4, 1, MODEL_ROUNDING_OCP, "", "mxfp4-w4a4", 0 },
        { MODEL_QUANT_MXFP4, 2, MODEL_ROUNDING_OCP, "", "mxfp4-nvfp4-w4a4", 0 },
        { MODEL_QUANT_MXFP4, 1, MODEL_ROUNDING_OCP, "layers.0", "mxfp4-w4a4-x", 0 },
        { MODEL_QUANT_MXFP4, 1, MODEL_ROUNDING_OCP, "layers.1", "mxfp4-w4a4-x", 0 },
        { MODEL_QUANT_BF16, 1, MODEL_ROUNDING_OCP, "", "mxfp4-w16a4", 0 },
        { MODEL_QUANT_MXFP4, 0, MODEL_ROUNDING_OCP, "", "mxfp4-lora-mxfp4", 1 },
        { MODEL_QUANT_MXFP4, 0, MODEL_ROUNDING_OCP, "", "mxfp4-lora-nvfp4", 2 },
        { MODEL_QUANT_MXFP4, 0, MODEL_ROUNDING_SEED, "", "mxfp4-seed-lora-nvfp4", 2 },
        { MODEL_QUANT_BF16, 0, MODEL_ROUNDING_OCP, "layers.0", "bf16-lora-mxfp4-x", 1 },
        { MODEL_QUANT_BF16, 0, MODEL_ROUNDING_OCP, "", "bf16", 0 },
    };
    const struct noise_plan none = { 0 };
    char hash[COUNT_OF(v)][17], same[17];
    for (size_t i = 0; i < COUNT_OF(v); i++) {
        const struct shared c = settings(v[i].weights, v[i].activations, v[i].adapter,
                                          v[i].parity, v[i].exclude);
        cr_expect_str_eq(policy_quant_label(&c), v[i].label);
        policy_treatment(hash[i], &c, &none, "the model");
        for (size_t j = 0; j < i; j++) cr_expect_str_neq(hash[i], hash[j], "%zu and %zu", i, j);
    }
    const struct shared idle = settings(MODEL_QUANT_BF16, 0, 0, MODEL_ROUNDING_OCP, "layers.0");
    cr_expect_str_eq(policy_quant_label(&idle), "bf16");
    policy_treatment(same, &idle, &none, "the model");
    cr_expect_str_eq(same, hash[COUNT_OF(v) - 1]);
}
