/* noise_target.c - which weights AQN hits and how much: the study's profiles, zones, names, refusals.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/noise_target.h"

#include <criterion/criterion.h>
#include <math.h>

static struct model_conf deep(int layers) {
    return (struct model_conf){ .arch = MODEL_ARCH_QWEN2, .dim = 16, .layers = layers, .heads = 2, .kv_heads = 1,
                                .head_dim = 8, .ffn_dim = 24, .vocab = 8 };
}
static struct noise_target_text words(void) {
    return (struct noise_target_text){ .targets = "norms", .exclude = "", .layers = "", .others = 1,
                                       .zone_edge = "", .zone_middle = "", .zone_switch = .5, .zone_early = 1,
                                       .zone_late = .5 };
}
static struct noise_target make(const struct noise_target_text *x, int64_t done, int64_t steps, int layers) {
    struct err e = { 0 };
    struct noise_target t;
    const struct model_conf c = deep(layers);
    cr_assert_eq(noise_target_make(&t, x, done, steps, &c, &e), 0, "%s", e.text);
    return t;
}
static void expect_layer(const struct noise_target *t, int layer, double want, const char *what) {
    for (int i = 0; i < 2; i++)
        cr_expect(fabs((double)t->norm[2 * layer + i] - want) < 1e-6, "%s: layer %d has %g instead of %g", what,
                  layer, (double)t->norm[2 * layer + i], want);
}

Test(noise_target, counts_norms_and_linears_of_the_studys_model) {
    struct noise_target_text x = words();
    struct noise_target t = make(&x, 0, 1, 28);
    cr_expect(t.norms == 57 && t.linears == 0 && t.elements == 57 * 16);
    x.targets = "linears";
    t = make(&x, 0, 1, 28);
    cr_expect(t.norms == 0 && t.linears == 196);
    cr_expect_eq(t.elements, 28 * (16 * 16 + 2 * 8 * 16 + 16 * 16 + 3 * 24 * 16));
    x.targets = "norms, linears", x.exclude = "layers.0, layers.27, down_proj";
    t = make(&x, 0, 1, 28);
    cr_expect(t.norms == 53 && t.linears == 26 * 6, "%d norms, %d linears", t.norms, t.linears);
    x.targets = "down_proj", x.exclude = "";
    t = make(&x, 0, 1, 28);
    cr_expect(t.norms == 0 && t.linears == 28 && t.linear[5][PROJ_DOWN] == 1 && t.linear[5][PROJ_UP] == 0);
}

Test(noise_target, names_are_whole_parts) {
    struct noise_target_text x = words();
    x.targets = "layers.2";
    struct noise_target t = make(&x, 0, 1, 28);
    cr_expect(t.norms == 2 && t.linears == 7 && t.norm[4] == 1 && t.norm[40] == 0);
    x.targets = "input_layernorm, layers.3.q_proj";
    t = make(&x, 0, 1, 28);
    cr_expect(t.norms == 28 && t.linears == 1 && t.linear[3][PROJ_Q] == 1 && t.norm[56] == 0);
    x.targets = "norm";                                          /* the last one, and no layernorm */
    t = make(&x, 0, 1, 28);
    cr_expect(t.norms == 1 && t.norm[56] == 1);
}

Test(noise_target, profiles_of_the_study_reach_the_layers_they_name) {
    struct noise_target_text x = words();
    x.layers = "14-17 of 28:1", x.others = 0;                     /* E9a */
    struct noise_target t = make(&x, 0, 1, 28);
    cr_expect(t.norms == 8 && t.norm[56] == 0);
    for (int l = 0; l < 28; l++) expect_layer(&t, l, l >= 14 && l <= 17, "E9a");
    x.layers = "14-17 of 28:1.5, 10-13 of 28:1.2, 18-21 of 28:1.2", x.others = 1;        /* E9b */
    t = make(&x, 0, 1, 28);
    for (int l = 0; l < 28; l++)
        expect_layer(&t, l, l < 10 || l > 21 ? 1 : l < 14 || l > 17 ? 1.2 : 1.5, "E9b");
    cr_expect(t.norm[56] == 1);
    /* E13l; E13m is 2 - it, E13n that / 1.21 */
    static const double l13[28] = { .83, .89, .93, .93, .93, .98, .99, 1.01, 1.00, 1.02, 1.06, 1.10, 1.12, 1.11,
                                    1.15, 1.17, 1.15, 1.12, 1.09, 1.07, 1.02, .99, .96, .94, .91, .90, .79, .88 };
    char text[3][28 * 16];
    for (int k = 0; k < 3; k++) {
        size_t n = 0;
        for (int l = 0; l < 28; l++) {
            const double m = k == 0 ? l13[l] : k == 1 ? 2 - l13[l] : (2 - l13[l]) / 1.21;
            n += (size_t)snprintf(text[k] + n, sizeof text[k] - n, "%s%d:%.4f", l ? ", " : "", l, m);
        }
        x.layers = text[k];
        t = make(&x, 0, 1, 28);
        for (int l = 0; l < 28; l++)
            cr_expect(fabs((double)t.norm[2 * l] - (k == 0 ? l13[l] : k == 1 ? 2 - l13[l] : (2 - l13[l]) / 1.21)) < 1e-4);
    }
    cr_expect(fabs((double)t.norm[52] - 1) < 1e-4, "E13n is 1 in layer 26");
}

Test(noise_target, lists_for_another_depth_are_scaled_by_relative_depth) {
    struct noise_target_text x = words();
    x.layers = "14-17 of 28:1.5, 10-13:1.2, 18-21:1.2";
    const struct noise_target six = make(&x, 0, 1, 6);
    static const double want6[] = { 1, 1, 1.2, 1.5, 1.2, 1 };
    for (int l = 0; l < 6; l++) expect_layer(&six, l, want6[l], "28 -> 6");
    const struct noise_target more = make(&x, 0, 1, 56);
    for (int l = 0; l < 56; l++)
        expect_layer(&more, l, l / 2 < 10 || l / 2 > 21 ? 1 : l / 2 < 14 || l / 2 > 17 ? 1.2 : 1.5, "28 -> 56");
    /* in any depth it hits something, and about a seventh of the layers */
    x.layers = "14-17 of 28", x.others = 0;
    for (int layers = 1; layers <= 64; layers++) {
        const struct noise_target t = make(&x, 0, 1, layers);
        cr_expect(t.norms > 0 && abs(t.norms / 2 - layers / 7) <= 1, "%d norms of %d layers", t.norms, layers);
    }
}

/* E14a: edges 0-5 and 23-27 keep 1, the middle goes from 1 to 0.5 at int(T * .5). */
Test(noise_target, zones_switch_at_their_step_and_not_before) {
    struct noise_target_text x = words();
    x.zone_edge = "0-5, 23-27", x.zone_middle = "6-22";
    static const struct { int64_t steps; double at; int64_t change; } runs[] = {
        { 20, .5, 10 }, { 29, .5, 14 }, { 10, .7, 7 }, { 3736, .5, 1868 }, { 10, 0, 0 },
    };
    for (size_t r = 0; r < COUNT_OF(runs); r++) {
        x.zone_switch = runs[r].at;
        cr_expect_eq(noise_target_switch(&x, runs[r].steps), runs[r].change);
        const int64_t at[] = { 0, runs[r].change - 1, runs[r].change, runs[r].steps - 1 };
        for (size_t i = 0; i < COUNT_OF(at); i++) {
            if (at[i] < 0) continue;
            const struct noise_target t = make(&x, at[i], runs[r].steps, 28);
            cr_expect_eq(t.norms, 57);
            for (int l = 0; l < 28; l++)
                expect_layer(&t, l, l < 6 || l > 22 || at[i] < runs[r].change ? 1 : .5, "E14a");
        }
    }
    x.zone_late = x.zone_early;
    cr_expect_eq(noise_target_switch(&x, 20), -1);
    /* scaled together, every layer is in one zone only */
    x.zone_edge = "0-5 of 28:1, 23-27 of 28:1", x.zone_middle = "6-22 of 28", x.zone_late = .5, x.zone_switch = .5;
    for (int layers = 3; layers <= 64; layers++) {
        const struct noise_target t = make(&x, 20, 20, layers);
        expect_layer(&t, 0, 1, "first"), expect_layer(&t, layers / 2, .5, "middle"), expect_layer(&t, layers - 1, 1, "last");
    }
}

Test(noise_target, what_hits_nothing_or_distinguishes_nothing_is_refused) {
    static const struct { const char *targets, *exclude, *layers; double others; const char *edge, *middle, *says; } cases[] = {
        { "gate", "", "", 1, "", "", "'gate' names no weight" },
        { "q_porj", "", "", 1, "", "", "did you mean 'q_proj'" },
        { "lm_head", "", "", 1, "", "", "'lm_head' names no weight" },
        { "norms, input_layernorm", "", "", 1, "", "", "or no further one" },
        { "", "", "", 1, "", "", "noise.aqn.targets is empty" },
        { "layers.28", "", "", 1, "", "", "names no weight" },
        { "norms", "q_proj", "", 1, "", "", "'q_proj' names no target" },
        { "norms", "norms", "", 1, "", "", "no weight is left" },
        { "norms", "", "14-17", 1, "", "", "set noise.aqn.others = 0" },
        { "norms", "", "28", 0, "", "", "layer 28: the model has 28 layers, 0 to 27" },
        { "norms", "", "30 of 30", 0, "", "", "the list is for 30 layers" },
        { "norms", "", "1-3, 2", 0, "", "", "layer 2 is named twice" },
        { "norms", "", "3-1", 0, "", "", "cannot read '3-1'" },
        { "norms", "", "1:x", 0, "", "", "cannot read '1:x'" },
        { "norms", "", "1:-1", 0, "", "", "cannot read '1:-1'" },
        { "norms", "", "1 of 28, 2 of 30", 0, "", "", "cannot read '2 of 30'" },
        { "norms", "", "one", 0, "", "", "cannot read 'one'" },
        { "norms", "", "0-27:0", 0, "", "", "no weight is left" },
        { "norms", "", "", .5, "", "", "noise.aqn.others = 0.5" },
        { "norms", "", "3:2", 1, "0-5", "", "zones stand in" },
        { "norms", "", "", 1, "0-5", "5-9", "layer 5 is named twice" },
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        struct noise_target_text x = words();
        struct noise_target t;
        struct err e = { 0 };
        const struct model_conf c = deep(28);
        x.targets = cases[i].targets, x.exclude = cases[i].exclude, x.layers = cases[i].layers;
        x.others = cases[i].others, x.zone_edge = cases[i].edge, x.zone_middle = cases[i].middle;
        cr_expect_eq(noise_target_make(&t, &x, 0, 10, &c, &e), -1, "case %zu", i);
        cr_expect_eq(e.code, EXIT_CONFIG, "case %zu", i);
        cr_expect(strstr(e.text, cases[i].says), "case %zu says: %s", i, e.text);
    }
}
