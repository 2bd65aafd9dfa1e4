/* treatment.c - from the settings to what records say: every key of noise and formats is part of
 * the treatment's hash, a score's label says what acts in it, and evidence that lacks something is
 * found out.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/stage/policy.h"

#include <criterion/criterion.h>
#include <unistd.h>

#include "lib/base/fs.h"

static const char base[] =
    "run.steps = 100\nquant.exclude = layers.0\nquant.activations = mxfp4\n"
    "noise.ops.type = sparse\nnoise.ops.scale = 0.5\nnoise.ops.rate = 0.1\n"
    "noise.modules.type = relative_gaussian\nnoise.modules.scale = 0.1\n"
    "noise.modules.targets = linear\nnoise.aqn.sigma_start = 0.01\nnoise.aqn.sigma_end = 0.001\n"
    "noise.aqn.schedule = epoch\nnoise.aqn.epochs = 2\nnoise.aqn.layers = 0-3:1\n"
    "noise.aqn.zone_edge = 0\nnoise.aqn.zone_middle = 2\n";

/* Another value of each key; a key that is missing here fails the test. */
static const char *const other[][2] = {
    { "quant.weights", "bf16" }, { "quant.parity", "seed" }, { "quant.activations", "nvfp4" },
    { "quant.adapter", "nvfp4" }, { "quant.exclude", "layers.1" },
    { "noise.aqn.sigma_start", "0.02" }, { "noise.aqn.sigma_end", "0.002" },
    { "noise.aqn.stages", "4" }, { "noise.aqn.schedule", "linear" }, { "noise.aqn.epochs", "3" },
    { "noise.aqn.targets", "linears" }, { "noise.aqn.exclude", "norm" },
    { "noise.aqn.layers", "0-3:0.5" }, { "noise.aqn.others", "2" }, { "noise.aqn.zone_edge", "5" },
    { "noise.aqn.zone_middle", "3" }, { "noise.aqn.zone_switch", "0.25" },
    { "noise.aqn.zone_early", "0.5" }, { "noise.aqn.zone_late", "0.25" },
    { "noise.ops.type", "relative_gaussian" }, { "noise.ops.scale", "0.4" },
    { "noise.ops.rate", "0.2" }, { "noise.ops.ops", "head" },
    { "noise.ops.direction", "forward" }, { "noise.ops.layers", "0" },
    { "noise.ops.rollout", "no" }, { "noise.ops.logprob", "no" }, { "noise.ops.update", "no" },
    { "noise.ops.eval", "yes" }, { "noise.ops.dtype", "bf16" },
    { "noise.modules.type", "absolute_gaussian" }, { "noise.modules.scale", "0.2" },
    { "noise.modules.targets", "rmsnorm" }, { "noise.modules.exclude", "q_proj" },
    { "noise.modules.at", "output" }, { "noise.modules.layers", "0" },
    { "noise.modules.rollout", "no" }, { "noise.modules.logprob", "no" },
    { "noise.modules.update", "no" }, { "noise.modules.eval", "yes" },
    { "noise.modules.dtype", "bf16" },
};

static char dir[] = "/tmp/qerl-treatment.XXXXXX";
static struct model_conf model;

static void start(void) {
    struct err e = { 0 };
    cr_assert(mkdtemp(dir) && model_conf_load(&model, "models/tiny", &e) == 0, "%s", e.text);
}
static void stop(void) { fs_remove_tree(dir, NULL); }
TestSuite(treatment, .init = start, .fini = stop);

/* Settings of `text`, in which lines for key are left out and `key = value` stands instead. */
static void load(struct shared *c, const char *text, const char *key, const char *value) {
    char path[FS_PATH_MAX];
    struct err e = { 0 };
    struct str file;
    str_init(&file);
    for (const char *p = text, *end; *p; p = end + 1) {
        end = strchr(p, '\n');
        if (key && str_starts(p, key) && p[strlen(key)] == ' ') continue;
        str_add(&file, p, (size_t)(end - p) + 1);
    }
    if (key) str_printf(&file, "%s = %s\n", key, value);
    fs_join(path, sizeof path, dir, "conf");
    cr_assert(fs_replace(path, file.s, file.len, &e) == 0 && shared_load(c, path, &e) == 0,
              "%s", e.text);
    str_release(&file);
}

static void hash_of(char out[17], const char *key, const char *value) {
    struct shared c;
    struct noise_plan plan;
    struct err e = { 0 };
    /* update = no leaves no backward: said first, or the plan is refused */
    const bool update = key && strcmp(key, "noise.ops.update") == 0;
    char text[sizeof base + 64];
    snprintf(text, sizeof text, "%s%s", base, update ? "noise.ops.direction = forward\n" : "");
    load(&c, text, key, value);
    cr_assert(treatment_plan(&plan, &c, &model, false, &e) == 0, "%s = %s: %s", key ? key : "",
              key ? value : "", e.text);
    policy_treatment(out, &c, &plan, "the model");
    shared_release(&c);
}

static const char *other_value(const char *key) {
    for (size_t i = 0; i < COUNT_OF(other); i++)
        if (strcmp(other[i][0], key) == 0) return other[i][1];
    return NULL;
}

Test(treatment, every_key_of_noise_and_formats_is_in_the_hash) {
    static const struct stage_key *const tables[] = { shared_quant_keys, shared_aqn_keys,
                                                      shared_ops_keys, shared_modules_keys };
    char before[17], after[17];
    hash_of(before, NULL, NULL);
    for (size_t t = 0; t < COUNT_OF(tables); t++)
        for (const struct stage_key *k = tables[t]; k->name; k++) {
            const char *value = other_value(k->name);
            cr_assert(value, "%s: name another value of it here", k->name);
            hash_of(after, k->name, value);
            cr_expect_str_neq(before, after, "%s = %s is the same treatment", k->name, value);
        }
}

/* Into got, which is cleared. */
static void text_of(struct str *got, const char *text, enum noise_phase phase, bool in_eval, int64_t step,
                    double sigma) {
    struct shared c;
    struct noise_plan plan;
    struct err e = { 0 };
    load(&c, text, NULL, NULL);
    cr_assert(treatment_plan(&plan, &c, &model, in_eval, &e) == 0, "%s", e.text);
    str_clear(got);
    treatment_text(got, &plan, &c, &model, phase, step, sigma);
    shared_release(&c);
}

/* A hash at its end is left to the test of hashes. */
static void expect_text(const char *text, enum noise_phase phase, bool in_eval, double sigma,
                        const char *want) {
    struct str got;
    str_init(&got);
    text_of(&got, text, phase, in_eval, 0, sigma);
    char *hash = strchr(got.s, '#');
    cr_expect_eq(hash != NULL, want[strlen(want) - 1] == '#', "%s", got.s);
    if (hash) cr_expect_eq(strlen(hash), 13u);
    if (hash) hash[1] = 0;
    cr_expect_str_eq(got.s, want);
    str_release(&got);
}

Test(treatment, a_label_says_what_acts_in_that_phase) {
    static const char ops[] = "noise.ops.type = relative_gaussian\nnoise.ops.scale = 0.05\n";
    static const char back[] = "noise.ops.type = relative_gaussian\nnoise.ops.scale = 0.05\n"
                               "noise.ops.direction = backward\n";
    expect_text("run.steps = 5\n", NOISE_PHASE_EVAL, true, 0, "none");
    expect_text(ops, NOISE_PHASE_EVAL, false, 0, "none");
    expect_text(ops, NOISE_PHASE_EVAL, true, 0,
                "ops relative_gaussian 0.05 matmul forward eval");
    expect_text(ops, NOISE_PHASE_EVAL, true, .01,
                "ops relative_gaussian 0.05 matmul forward eval; aqn 0.01 on norms");
    expect_text(ops, NOISE_PHASE_UPDATE, true, 0,
                "ops relative_gaussian 0.05 matmul forward+backward update");
    expect_text(back, NOISE_PHASE_EVAL, true, 0, "none");
    expect_text(back, NOISE_PHASE_EVAL, true, .01, "aqn 0.01 on norms");
    expect_text("noise.aqn.targets = input_layernorm, down_proj\nnoise.aqn.exclude = layers.0.down_proj\n"
                "noise.aqn.layers = 0-3:0.5, 4-5:1.5\n", NOISE_PHASE_EVAL, true, .01,
                "aqn 0.01 on input_layernorm,down_proj but layers.0.down_proj in layers 0-3:0.5,4-5:1.5 #");
    expect_text("noise.aqn.targets = linears\nnoise.aqn.zone_edge = 0,5\n"
                "noise.aqn.zone_middle = 1-4\nnoise.aqn.zone_early = 0.5\nnoise.aqn.others = 0.25\n",
                NOISE_PHASE_EVAL, true, .01, "aqn 0.01 on linears in zones 0,5 and 1-4 x0.5 others 0.25 #");
    expect_text("noise.aqn.targets = q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj,norm\n",
                NOISE_PHASE_EVAL, true, .01,
                "aqn 0.01 on q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,do... #");
}

/* Multipliers that differ anywhere, behind the cut of a list too, are another noise. */
Test(treatment, labels_of_different_multipliers_differ) {
    static const char *const text[] = {
        "noise.aqn.layers = 0:1\nnoise.aqn.others = .1\n", "noise.aqn.layers = 0:1\nnoise.aqn.others = 9\n",
        "noise.aqn.layers = 0:.5,1:0.123456789,2:0.123456789,3:0.123456789,4:0.93,5:0.5\n",
        "noise.aqn.layers = 0:.5,1:0.123456789,2:0.123456789,3:0.123456789,4:0.93,5:9.0\n",
        "noise.aqn.zone_middle = 1-4\nnoise.aqn.zone_early = .1\nnoise.aqn.zone_late = 2\nrun.steps = 4\n",
        "noise.aqn.zone_middle = 1-4\nnoise.aqn.zone_early = 9\nnoise.aqn.zone_late = 2\nrun.steps = 4\n",
        "noise.aqn.targets = norms, layers.0.q_proj, layers.0.k_proj, layers.0.v_proj, layers.1.q_proj\n",
        "noise.aqn.targets = norms, layers.0.q_proj, layers.0.k_proj, layers.0.v_proj, layers.2.q_proj\n",
    };
    struct str a, b;
    str_init(&a);
    str_init(&b);
    for (size_t i = 0; i < COUNT_OF(text); i += 2) {
        text_of(&a, text[i], NOISE_PHASE_EVAL, true, 0, .03);
        text_of(&b, text[i + 1], NOISE_PHASE_EVAL, true, 0, .03);
        cr_assert(strchr(a.s, '#') && strchr(b.s, '#'), "%s, %s", a.s, b.s);
        cr_expect_str_neq(strchr(a.s, '#'), strchr(b.s, '#'));
    }
    /* one thing in two wordings; zones that have changed */
    text_of(&a, "noise.aqn.layers = 0-2:2,3:3\n", NOISE_PHASE_EVAL, true, 0, .03);
    text_of(&b, "noise.aqn.layers = 3:3, 0:2, 1:2, 2:2\n", NOISE_PHASE_EVAL, true, 0, .03);
    cr_expect_str_eq(strchr(a.s, '#'), strchr(b.s, '#'));
    text_of(&a, text[4], NOISE_PHASE_EVAL, true, 4, .03);
    text_of(&b, text[5], NOISE_PHASE_EVAL, true, 4, .03);
    cr_expect_str_eq(a.s, b.s);
    str_release(&a);
    str_release(&b);
}

Test(treatment, evidence_that_lacks_an_operation_is_found_out) {
    struct shared c;
    struct noise_plan plan;
    struct err e = { 0 };
    load(&c, "noise.ops.type = relative_gaussian\nnoise.ops.scale = 0.05\n"
             "noise.ops.ops = matmul, gelu, head\n", NULL, NULL);
    cr_assert(treatment_plan(&plan, &c, &model, false, &e) == 0, "%s", e.text);
    struct noise_evidence seen = { .passes = { 1, 0 } };
    seen.op[NOISE_OP_MATMUL][NOISE_FORWARD] =
        (struct noise_tally){ .sites = 42, .elements = 9, .r2 = (int64_t)1 << 59 };
    const struct treatment_seeds seeds = { UINT64_MAX, 3 };
    struct noise_evidence sum = { 0 };
    char *text = treatment_evidence(&plan, NOISE_PHASE_ROLLOUT, &seen, NULL, seeds);
    for (int i = 0; i < 2; i++)
        cr_expect(treatment_evidence_add(&sum, &plan, NOISE_PHASE_ROLLOUT, text, &e) == 0, "%s", e.text);
    cr_expect(treatment_evidence_add(&sum, &plan, NOISE_PHASE_EVAL, "", &e) == 0, "clean: %s", e.text);
    cr_expect_eq(sum.op[NOISE_OP_MATMUL][NOISE_FORWARD].elements, 18);
    cr_expect_eq(sum.op[NOISE_OP_MATMUL][NOISE_FORWARD].r2, (int64_t)1 << 60);
    cr_expect_eq(sum.passes[NOISE_FORWARD], 2);
    cr_expect(strstr(text, "\"seed\":\"18446744073709551615\""), "%s", text);
    cr_expect_not(strstr(text, "fixed_seed"), "%s", text);
    char *of_sum = treatment_evidence_sum(&plan, NOISE_PHASE_ROLLOUT, &sum, text);
    cr_expect(strstr(of_sum, "\"seed\":\"18446744073709551615\"") && strstr(of_sum, "\"elements\":18"), "%s", of_sum);
    free(of_sum);
    /* it says that the head was never met: no fault of this part, but of a sum that has no more */
    cr_expect(treatment_check(&plan, NOISE_PHASE_ROLLOUT, &sum, &e) < 0);
    cr_expect_eq(e.code, EXIT_CONFIG);
    static const char *const lacking[] = {
        "", "{}", "no JSON", "{\"op/matmul/forward\":7}", "{\"op/matmul/forward\":{\"intended\":0.05,\"sums\":[1]}}",
        "{\"op/matmul/forward\":{\"intended\":0.05,\"sums\":[1,1,1,1,1,1,1,\"1\"]}}"
    };
    for (size_t i = 0; i < COUNT_OF(lacking); i++) {
        cr_expect(treatment_evidence_add(&sum, &plan, NOISE_PHASE_ROLLOUT, lacking[i], &e) < 0, "%s", lacking[i]);
        cr_expect(strstr(e.text, "op/matmul/forward was intended while rollout, its evidence names no site"), "%s", e.text);
    }
    cr_expect_eq(sum.op[NOISE_OP_MATMUL][NOISE_FORWARD].elements, 18);
    /* of other noise, and of noise that nobody asked for */
    plan.op_text.scale = .04;
    cr_expect(treatment_evidence_add(&sum, &plan, NOISE_PHASE_ROLLOUT, text, &e) < 0);
    cr_expect(strstr(e.text, "of size 0.04 was intended"), "%s", e.text);
    plan.op_text.scale = .05;
    cr_expect(treatment_evidence_add(&sum, &plan, NOISE_PHASE_EVAL, text, &e) < 0);
    cr_expect(strstr(e.text, "op/matmul/forward was not intended while eval"), "%s", e.text);
    free(text);
    shared_release(&c);
}

/* The same draw lies beside the weights of every rollout. */
Test(treatment, a_draw_for_weights_counts_once_in_a_sum) {
    struct shared c;
    struct noise_plan plan;
    struct err e = { 0 };
    load(&c, "noise.modules.type = relative_gaussian\nnoise.modules.scale = 0.05\nnoise.modules.targets = q_proj\n"
             "noise.modules.at = weight\n", NULL, NULL);
    cr_assert(treatment_plan(&plan, &c, &model, false, &e) == 0, "%s", e.text);
    struct noise_evidence sum = { 0 }, seen = { .passes = { 2, 0 } };
    seen.module[NOISE_MODULE_Q] = (struct noise_tally){ .sites = 4, .elements = 100, .measured = 100, .r2 = 7 };
    char *text = treatment_evidence(&plan, NOISE_PHASE_ROLLOUT, &seen, NULL, (struct treatment_seeds){ 0 });
    for (int i = 0; i < 3; i++)
        cr_expect(treatment_evidence_add(&sum, &plan, NOISE_PHASE_ROLLOUT, text, &e) == 0, "%s", e.text);
    cr_expect_eq(sum.module[NOISE_MODULE_Q].sites, 12);
    cr_expect_eq(sum.module[NOISE_MODULE_Q].elements, 100);
    cr_expect_eq(sum.module[NOISE_MODULE_Q].r2, 7);
    cr_expect_eq(sum.passes[NOISE_FORWARD], 6);
    free(text);
    shared_release(&c);
}
