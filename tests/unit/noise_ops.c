/* noise_ops.c - plans of noise: names, layers and patterns to sites, the canonical text, the verdict on what
 * was measured.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/noise_ops.h"

#include <criterion/criterion.h>
#include <math.h>

#include "lib/base/rng.h"

static const struct model_conf qwen = { .arch = MODEL_ARCH_QWEN2, .layers = 28 };

/* matmul, forward, everywhere but eval; tests change what they are about */
static struct noise_text text_ops(const char *names, const char *layers) {
    return (struct noise_text){ .type = KERN_NOISE_RELATIVE_GAUSSIAN, .scale = .05, .names = names,
                                .layers = layers, .forward = true, .phase = { true, true, true, false } };
}
static struct noise_text text_modules(const char *targets, const char *exclude, const char *layers) {
    return (struct noise_text){ .type = KERN_NOISE_RELATIVE_GAUSSIAN, .scale = .05, .names = targets,
                                .exclude = exclude, .layers = layers, .phase = { true, false, false, false },
                                .point = NOISE_POINT_OUTPUT };
}

static void expect_text(const struct noise_text *o, const struct noise_text *m, const char *want) {
    struct noise_plan p;
    struct err e = { 0 };
    struct str s;
    str_init(&s);
    cr_assert_eq(noise_plan_make(&p, o, m, &qwen, &e), 0, "%s", e.text);
    noise_plan_text(&p, &s);
    cr_expect_str_eq(s.s, want);
    str_release(&s);
}
static void expect_ops(struct noise_text t, const char *want) { expect_text(&t, NULL, want); }
static void expect_modules(struct noise_text t, const char *want) { expect_text(NULL, &t, want); }

/* Refused with EXIT_CONFIG and all of these words. */
static void expect_refused(const struct noise_text *o, const struct noise_text *m, const char *says,
                           const char *also) {
    struct noise_plan p;
    struct err e = { 0 };
    cr_expect_eq(noise_plan_make(&p, o, m, &qwen, &e), -1, "%s", says);
    cr_expect_eq(e.code, EXIT_CONFIG);
    cr_expect(strstr(e.text, says), "'%s' is not in: %s", says, e.text);
    cr_expect(!also || strstr(e.text, also), "'%s' is not in: %s", also, e.text);
}
static void refused_ops(struct noise_text t, const char *says, const char *also) {
    expect_refused(&t, NULL, says, also);
}
static void refused_modules(struct noise_text t, const char *says, const char *also) {
    expect_refused(NULL, &t, says, also);
}

Test(noise_ops, one_text_for_one_treatment) {
    expect_text(NULL, NULL, "none");
    expect_ops(text_ops("matmul", "all"), "ops relative_gaussian 0.05 matmul forward rollout,logprob,update");
    expect_ops(text_ops(" head, matmul,head", "0-27"),
               "ops relative_gaussian 0.05 matmul,head forward rollout,logprob,update");
    expect_ops(text_ops("all", "all"),
               "ops relative_gaussian 0.05 matmul,bmm,softmax,silu,norm,rope,head forward rollout,logprob,update");
    expect_ops(text_ops("silu", "3,0,1,14-17"),
               "ops relative_gaussian 0.05 silu layers 0-1,3,14-17 forward rollout,logprob,update");
    struct noise_text o = text_ops("matmul", "all"), m = text_modules("rmsnorm", "lm_head", "all");
    o.type = KERN_NOISE_SPARSE;
    o.rate = 1e-3;
    o.backward = true;
    expect_text(&o, &m,
                "ops sparse 0.05 rate 0.001 matmul forward+backward rollout,logprob,update; modules relative_gaussian "
                "0.05 input_layernorm,post_attention_layernorm,norm output rollout");
    o = text_ops("matmul", "all");
    o.bf16 = true;
    o.scale = 1e-4;
    expect_ops(o, "ops relative_gaussian 0.0001 bf16 matmul forward rollout,logprob,update");
    /* a backward without a forward acts in the update alone, whatever else is on */
    o = text_ops("matmul", "all");
    o.backward = true;
    o.forward = false;
    expect_ops(o, "ops relative_gaussian 0.05 matmul backward update");
}

Test(noise_ops, layers_scale_to_the_depth_of_the_model) {
    static const struct { int layers; const char *want; } cases[] = {
        { 28, "layers 14-17" }, { 24, "layers 12-14" }, { 56, "layers 28-35" }, { 4, "layers 2" },
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        const struct model_conf c = { .layers = cases[i].layers };
        struct noise_text t = text_ops("silu", "14-17 of 28");
        struct noise_plan p;
        struct err e = { 0 };
        struct str s;
        str_init(&s);
        cr_assert_eq(noise_plan_make(&p, &t, NULL, &c, &e), 0, "%s", e.text);
        noise_plan_text(&p, &s);
        cr_expect(strstr(s.s, cases[i].want), "'%s' is not in: %s", cases[i].want, s.s);
        str_release(&s);
    }
}

Test(noise_ops, layers_that_are_not_there_are_refused) {
    refused_ops(text_ops("matmul", "28"), "noise.ops.layers", "28");
    refused_ops(text_ops("matmul", "14-30 of 28"), "noise.ops.layers", "30");
    refused_ops(text_ops("matmul", "17-14"), "noise.ops.layers", "17-14");
    refused_ops(text_ops("matmul", "0-3:0.5"), "multipliers", NULL);
    refused_ops(text_ops("matmull", "two"), "'two'", "'matmull'");           /* both at once */
    refused_modules(text_modules("linear", "", "28"), "noise.modules.layers", "28");
}

Test(noise_ops, patterns_match_whole_parts) {
    cr_expect(noise_module_hit("layers.2", NOISE_MODULE_Q, 2));
    for (int l = 20; l < 30; l++) cr_expect_not(noise_module_hit("layers.2", NOISE_MODULE_Q, l));
    cr_expect(noise_module_hit("layers.3.down_proj", NOISE_MODULE_DOWN, 3));
    cr_expect(noise_module_hit("model.layers.3.mlp.down_proj", NOISE_MODULE_DOWN, 3));
    cr_expect_not(noise_module_hit("layers.3.down_proj", NOISE_MODULE_DOWN, 13));
    cr_expect_not(noise_module_hit("layers.3.down_proj", NOISE_MODULE_UP, 3));
    cr_expect(noise_module_hit("layers.14-17.linear", NOISE_MODULE_O, 17));
    cr_expect_not(noise_module_hit("layers.14-17.linear", NOISE_MODULE_O, 18));
    cr_expect_not(noise_module_hit("layers.14-17.linear", NOISE_MODULE_NORM_IN, 15));
    cr_expect_not(noise_module_hit("linear", NOISE_MODULE_HEAD, 0));
    cr_expect(noise_module_hit("rmsnorm", NOISE_MODULE_NORM_FINAL, 0));
    cr_expect(noise_module_hit("norm", NOISE_MODULE_NORM_FINAL, 0));
    cr_expect_not(noise_module_hit("norm", NOISE_MODULE_NORM_IN, 0));
    cr_expect_not(noise_module_hit("proj", NOISE_MODULE_Q, 0));
    cr_expect(noise_module_hit("self_attn", NOISE_MODULE_V, 5));
    cr_expect_not(noise_module_hit("", NOISE_MODULE_V, 5));
}

Test(noise_ops, modules_by_pattern) {
    expect_modules(text_modules("linear", "lm_head", "all"),
                   "modules relative_gaussian 0.05 q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj output "
                   "rollout");
    expect_modules(text_modules("q_proj, layers.2.mlp.down_proj", "", "all"),
                   "modules relative_gaussian 0.05 q_proj,down_proj[2] output rollout");
    expect_modules(text_modules("linear", "layers.0, layers.27, self_attn, up_proj", "all"),
                   "modules relative_gaussian 0.05 gate_proj[1-26],down_proj[1-26] output rollout");
    expect_modules(text_modules("rmsnorm", "", "14-17 of 28"),
                   "modules relative_gaussian 0.05 input_layernorm[14-17],post_attention_layernorm[14-17] output "
                   "rollout");
    expect_modules(text_modules("lm_head", "", "all"), "modules relative_gaussian 0.05 lm_head output rollout");

    struct noise_plan p;
    struct err e = { 0 };
    struct noise_text m = text_modules("linear, rmsnorm", "layers.0, layers.27", "all");
    cr_assert_eq(noise_plan_make(&p, NULL, &m, &qwen, &e), 0, "%s", e.text);
    int linears = 0;
    for (int i = 0; i <= NOISE_MODULE_DOWN; i++) linears += p.module_sites[i];
    cr_expect_eq(linears, 182);                      /* 7 x 26, as the study counted */
    cr_expect_eq(p.module_sites[NOISE_MODULE_NORM_IN] + p.module_sites[NOISE_MODULE_NORM_POST] +
                 p.module_sites[NOISE_MODULE_NORM_FINAL], 53);
}

Test(noise_ops, misspelt_and_empty_names_are_refused) {
    refused_ops(text_ops("matmull", "all"), "did you mean 'matmul'", "softmax");
    refused_ops(text_ops("matmull, softmx", "all"), "'matmull'", "'softmx'");
    refused_ops(text_ops("", "all"), "names no operation", NULL);
    refused_modules(text_modules("dwn_proj", "", "all"), "did you mean 'down_proj'", "lm_head");
    refused_modules(text_modules("layers.28", "", "all"), "names no module", "28 layers");
    refused_modules(text_modules("layers.3", "", "14-17"), "hits nothing in these layers", NULL);
    refused_modules(text_modules("norm", "", "14-17"), "hits nothing in these layers", NULL);
    refused_modules(text_modules("rmsnorm", "norms", "all"), "'norms'", NULL);
    refused_modules(text_modules("", "", "all"), "targets is empty", NULL);
    refused_modules(text_modules("q_proj", "layers.0-27", "all"), "excluded", NULL);
}

Test(noise_ops, what_the_model_has_not_is_said) {
    struct noise_plan p;
    struct err e = { 0 };
    struct noise_text t = text_ops("gelu, silu", "all");
    refused_ops(text_ops("gelu", "all"), "not in this model", NULL);
    cr_assert_eq(noise_plan_make(&p, &t, NULL, &qwen, &e), 0, "%s", e.text);
    cr_expect(p.op_absent[NOISE_OP_GELU] && !p.op[NOISE_OP_GELU] && p.op[NOISE_OP_SILU]);
    json_t *table = noise_plan_json(&p);
    int notes = 0;
    for (size_t i = 0; i < json_array_size(table); i++)
        notes += json_object_get(json_array_get(table, i), "note") != NULL;
    cr_expect_eq(json_array_size(table), 6);
    cr_expect_eq(notes, 3);                          /* once a phase */
    json_decref(table);
}

Test(noise_ops, combinations_that_mean_nothing_are_refused) {
    struct noise_text t = text_ops("matmul", "all"), m = text_modules("linear", "", "all"), x;
    x = t, x.scale = 0;
    refused_ops(x, "scale is 0", NULL);
    x = t, x.scale = 1e-9;
    refused_ops(x, "vanishes in f32", NULL);
    x = t, x.type = KERN_NOISE_SPARSE;
    refused_ops(x, "rate", NULL);
    x.scale = 10, x.rate = 1;
    refused_ops(x, "larger than what it is added to", NULL);
    x = t, x.type = KERN_NOISE_DEADZONE, x.scale = 1;
    refused_ops(x, "leaves nothing of it", NULL);
    x = t, x.type = KERN_NOISE_ABSOLUTE_GAUSSIAN;
    refused_ops(x, "is for modules", NULL);
    x = t, x.forward = false;
    refused_ops(x, "direction", NULL);
    x = t, x.type = KERN_NOISE_DEADZONE, x.backward = true;
    refused_ops(x, "deadzone acts on results", NULL);
    x = t, x.backward = true, x.forward = false, x.phase[NOISE_PHASE_EVAL] = true;
    refused_ops(x, "noise.ops.eval = yes", "noise.ops.direction = backward");
    x = t, x.type = KERN_NOISE_OFF;
    refused_ops(x, "noise.ops.scale is 0.05", "noise.ops.type is off");
    x = m, x.type = KERN_NOISE_OFF;
    refused_modules(x, "noise.modules.scale is 0.05", "noise.modules.type is off");
    x.scale = 0;                                     /* a control: said to be nothing */
    expect_modules(x, "none");
    x = t, x.backward = true, x.phase[NOISE_PHASE_UPDATE] = false;
    refused_ops(x, "update only", NULL);
    x = t, memset(x.phase, 0, sizeof x.phase);
    refused_ops(x, "no phase is on", NULL);
    refused_ops(text_ops("matmul,head", "14-17"), "head lies in no layer", NULL);
    x = m, x.type = KERN_NOISE_SPARSE;
    refused_modules(x, "is for operations", NULL);
    x = m, x.bf16 = true, x.point = NOISE_POINT_WEIGHT;
    refused_modules(x, "at = weight takes dtype = f32", NULL);
    static const int on_weights[] = { KERN_NOISE_RELATIVE_GAUSSIAN, KERN_NOISE_ABSOLUTE_GAUSSIAN, KERN_NOISE_BIAS,
                                      KERN_NOISE_DEADZONE };
    for (size_t i = 0; i < COUNT_OF(on_weights); i++) {
        struct noise_plan p;
        struct err e = { 0 };
        x = m, x.type = on_weights[i], x.point = NOISE_POINT_WEIGHT;
        cr_expect_eq(noise_plan_make(&p, NULL, &x, &qwen, &e), 0, "%s", e.text);
    }
    x = t, x.scale = 0;                              /* one message for all of it */
    m.names = "liner";
    expect_refused(&x, &m, "noise.ops.scale", "'liner'");
}

/* What deadzone and fp8 cause depends on the data: nobody may take a threshold for a size. */
Test(noise_ops, types_without_a_size_say_so) {
    struct noise_plan p;
    struct err e = { 0 };
    struct noise_text o = text_ops("matmul", "all"), m = text_modules("q_proj", "", "all");
    o.type = KERN_NOISE_DEADZONE;
    m.type = KERN_NOISE_FP8;
    refused_modules(m, "noise.modules.scale is 0.05", "leave noise.modules.scale out");
    m.scale = 0;
    expect_text(&o, &m, "ops deadzone 0.05 matmul forward rollout,logprob,update; modules fp8 q_proj output rollout");
    cr_assert_eq(noise_plan_make(&p, &o, &m, &qwen, &e), 0, "%s", e.text);
    json_t *table = noise_plan_json(&p);
    for (size_t i = 0; i < json_array_size(table); i++) {
        const json_t *row = json_array_get(table, i), *threshold = json_object_get(row, "threshold");
        const bool op = !strcmp(json_string_value(json_object_get(row, "kind")), "op");
        cr_expect_null(json_object_get(row, "intended"));
        cr_expect_eq(threshold != NULL, op);
        cr_expect(!op || json_number_value(threshold) == .05);
    }
    json_decref(table);
    /* evidence: the same names, and a threshold that is another's is refused */
    struct noise_evidence ev = { 0 };
    table = noise_evidence_json(&p, NOISE_PHASE_ROLLOUT, &ev);
    json_t *flushed = json_object_get(table, "op/matmul/forward"),
           *rounded = json_object_get(table, "module/q_proj/forward");
    cr_expect_float_eq(json_number_value(json_object_get(flushed, "threshold")), .05, 1e-12);
    cr_expect(!json_object_get(flushed, "intended") && !json_object_get(rounded, "intended"));
    cr_expect(json_object_get(rounded, "realised") && !json_object_get(rounded, "threshold"));
    cr_expect_eq(noise_evidence_read(&ev, &p, NOISE_PHASE_ROLLOUT, table, &e), 0, "%s", e.text);
    json_object_set_new(flushed, "threshold", json_real(.06));
    cr_expect_eq(noise_evidence_read(&ev, &p, NOISE_PHASE_ROLLOUT, table, &e), -1);
    cr_expect(strstr(e.text, "0.06"), "%s", e.text);
    json_decref(table);
    m.point = NOISE_POINT_WEIGHT;
    refused_modules(m, "fp8 on weights", "at = input or output");
    o.type = KERN_NOISE_FP8;
    o.scale = 0;
    refused_ops(o, "noise.ops.type = fp8 is for modules", NULL);
}

/* Room for attention's rows is made where the backward needs it, and nowhere else. */
Test(noise_ops, peaks_are_kept_for_a_dead_zone_in_attention_that_is_trained_through) {
    static const struct { const char *ops; bool peaks; } cases[] = {
        { "bmm", true }, { "matmul, softmax", true }, { "all", true }, { "matmul, silu, head", false },
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++)
        for (int way = 0; way < 4; way++) {
            struct noise_text t = text_ops(cases[i].ops, "all");
            struct noise_plan p;
            struct err e = { 0 };
            if (way != 1) t.type = KERN_NOISE_DEADZONE;
            if (way == 2) t.phase[NOISE_PHASE_UPDATE] = false;
            cr_assert_eq(noise_plan_make(&p, way == 3 ? NULL : &t, NULL, &qwen, &e), 0, "%s", e.text);
            cr_expect_eq(noise_plan_peaks(&p), cases[i].peaks && way == 0, "%s, way %d", cases[i].ops, way);
        }
}

Test(noise_ops, sites_are_counted_from_the_model) {
    struct noise_plan p;
    struct err e = { 0 };
    struct noise_text t = text_ops("all", "all");
    t.backward = true;
    cr_assert_eq(noise_plan_make(&p, &t, NULL, &qwen, &e), 0, "%s", e.text);
    static const int want[NOISE_OP_COUNT][2] = {
        { 7 * 28, 4 * 28 - 1 }, { 2 * 28, 4 * 28 }, { 28, 28 }, { 28, 28 }, { 0, 0 }, { 57, 56 }, { 56, 56 }, { 1, 1 }
    };
    for (int op = 0; op < NOISE_OP_COUNT; op++)
        for (int d = 0; d < 2; d++)
            cr_expect_eq(p.op_sites[op][d], want[op][d], "%s %d: %d", noise_op_name[op], d, p.op_sites[op][d]);
    json_t *table = noise_plan_json(&p);
    /* 7 forward and a note on gelu in three phases; 7 backward and the adapter's gradient in one */
    cr_expect_eq(json_array_size(table), 3 * 8 + 8);
    json_decref(table);
    cr_expect(noise_plan_on(&p, NOISE_PHASE_ROLLOUT) && !noise_plan_on(&p, NOISE_PHASE_EVAL));
    t = text_ops("matmul, norm", "0,14-17");
    t.backward = true;
    cr_assert_eq(noise_plan_make(&p, &t, NULL, &qwen, &e), 0, "%s", e.text);
    cr_expect_eq(p.op_sites[NOISE_OP_MATMUL][NOISE_FORWARD], 35);
    cr_expect_eq(p.op_sites[NOISE_OP_MATMUL][NOISE_BACKWARD], 19);
    cr_expect_eq(p.op_sites[NOISE_OP_NORM][NOISE_FORWARD], 10);      /* not the final one */
}

/* ---- the verdict ---- */

struct world { struct noise_plan plan; struct noise_evidence ev; struct noise_tally *t; };

/* What a kernel would have counted over 3 passes with `n` elements, of a size that is `share` of the
 * intended one: drawn, added in f32 and measured as kernels/noise.h says. */
static void measured(struct noise_tally *t, const struct noise_text *x, int n, double share) {
    const uint32_t key[2] = { 3, 4 };
    const float scale = (float)(x->scale * share);
    double r1 = 0, r2 = 0;
    for (int i = 0; i < n; i += 4) {
        const struct rng4 d = rng_philox((uint32_t[4]){ (uint32_t)i }, key),
                          v = rng_philox((uint32_t[4]){ (uint32_t)i, 1 }, key);
        double g[4];
        rng_normal4(g, d);
        for (int j = 0; j < 4; j++) {
            const float y = .1f + rng_unit(v.v[j]), sign = d.v[j] & 1 ? 1.f : -1.f;
            const float z = x->type == KERN_NOISE_RELATIVE_GAUSSIAN  ? (float)g[j]
                            : x->type == KERN_NOISE_RELATIVE_UNIFORM ? sqrtf(12) * (rng_unit(d.v[j]) - .5f)
                            : x->type == KERN_NOISE_SYSTEMATIC       ? sign
                            : rng_unit(d.v[j]) < (float)x->rate      ? sign
                                                                     : 0;
            const float sum = y + scale * z * y, delta = sum - y;
            const double r = (double)delta / ((double)y * x->scale);
            r1 += r;
            r2 += r * r;
            t->changed += sum != y;
        }
    }
    t->elements = t->measured = n;
    t->r = llround(r1 * 0x1p20);
    t->r2 = llround(r2 * 0x1p20);
}

static void world(struct world *w, struct noise_text t, int n, double share) {
    struct err e = { 0 };
    memset(w, 0, sizeof *w);
    cr_assert_eq(noise_plan_make(&w->plan, &t, NULL, &qwen, &e), 0, "%s", e.text);
    w->t = &w->ev.op[NOISE_OP_MATMUL][NOISE_FORWARD];
    w->ev.passes[NOISE_FORWARD] = w->ev.wanted = 3;
    w->ev.rows = w->ev.rows_squared = n;
    w->t->sites = 3 * 7 * 28;
    measured(w->t, &t, n, share);
}
static void expect_verdict(struct world *w, int want, const char *says) {
    struct err e = { 0 };
    cr_expect_eq(noise_evidence_check(&w->plan, NOISE_PHASE_UPDATE, &w->ev, &e), want, "%s: %s",
                 says ? says : "accepted", e.text);
    cr_expect(!says || strstr(e.text, says), "'%s' is not in: %s", says, e.text);
}

Test(noise_ops, a_realised_size_is_held_against_its_error) {
    static const int types[] = { KERN_NOISE_RELATIVE_GAUSSIAN, KERN_NOISE_RELATIVE_UNIFORM, KERN_NOISE_SYSTEMATIC,
                                 KERN_NOISE_SPARSE };
    static const double scales[] = { 1e-6, 1e-5, 1e-3, .05, .5 };
    struct world w;
    for (size_t i = 0; i < COUNT_OF(types); i++)
        for (size_t s = 0; s < COUNT_OF(scales); s++) {
            struct noise_text t = text_ops("matmul", "all");
            t.type = types[i];
            t.rate = .01;
            t.scale = scales[s];
            world(&w, t, 200000, 1);
            expect_verdict(&w, 0, NULL);
            world(&w, t, 200000, types[i] == KERN_NOISE_SPARSE ? .8 : .96);
            expect_verdict(&w, -1, "chance and rounding");
            world(&w, t, 200000, types[i] == KERN_NOISE_SPARSE ? 1.2 : 1.04);
            expect_verdict(&w, -1, "chance and rounding");
        }
    /* draws that are the same ones again say less */
    world(&w, text_ops("matmul", "all"), 20000, 1.05);
    expect_verdict(&w, -1, "chance and rounding");
    w.ev.rows_squared *= 8;
    expect_verdict(&w, 0, NULL);
}

/* One draw for all of a thousand rows has the right size and a mean that none would have. */
Test(noise_ops, draws_that_are_shared_are_found_by_their_mean) {
    static const int types[] = { KERN_NOISE_RELATIVE_GAUSSIAN, KERN_NOISE_RELATIVE_UNIFORM, KERN_NOISE_SPARSE };
    struct world w;
    for (size_t i = 0; i < COUNT_OF(types); i++) {
        struct noise_text t = text_ops("matmul", "all");
        t.type = types[i];
        t.rate = .25;
        world(&w, t, 200000, 1);
        expect_verdict(&w, 0, NULL);
        const double rms = types[i] == KERN_NOISE_SPARSE ? .5 : 1;
        for (int sign = -1; sign <= 1; sign += 2) {
            w.t->r = llround(.02 * sign * rms * 200000 * 0x1p20);
            expect_verdict(&w, -1, "draws are shared");
            w.t->r /= 2;
            expect_verdict(&w, 0, NULL);
        }
        w.t->r *= 2;
        w.ev.rows_squared *= 4;                      /* the prompts' draws of groups are, and that is known */
        expect_verdict(&w, 0, NULL);
    }
    struct noise_text t = text_ops("matmul", "all");
    t.type = KERN_NOISE_SYSTEMATIC;                  /* fixed signs have the mean that they have */
    world(&w, t, 200000, 1);
    w.t->r = w.t->r2 / 3;
    expect_verdict(&w, 0, NULL);
}

/* Absolute types: what counts is not the result's, and f32's steps are counted where they were. */
Test(noise_ops, absolute_sizes_are_held_against_the_steps_of_what_they_were_added_to) {
    static const int n = 400000;
    struct noise_text m = text_modules("linear", "", "all");
    struct err e = { 0 };
    struct noise_plan p;
    m.point = NOISE_POINT_INPUT;
    m.names = "q_proj";
    for (int bias = 0; bias < 2; bias++)
        for (double scale = 1e-6; scale < .2; scale *= 10) {
            m.type = bias ? KERN_NOISE_BIAS : KERN_NOISE_ABSOLUTE_GAUSSIAN;
            m.scale = scale;
            cr_assert_eq(noise_plan_make(&p, NULL, &m, &qwen, &e), 0, "%s", e.text);
            struct noise_evidence ev = { .passes = { 1 }, .wanted = 1, .rows = n, .rows_squared = n };
            struct noise_tally *t = &ev.module[NOISE_MODULE_Q];
            *t = (struct noise_tally){ .sites = 28, .elements = n, .measured = n, .changed = n };
            t->r2 = (int64_t)(n * .93 * 0x1p20);
            cr_expect_eq(noise_evidence_check(&p, NOISE_PHASE_ROLLOUT, &ev, &e), -1, "size off by 3.5 %%, scale %g",
                         scale);
            t->changed /= 2;
            t->r2 = (int64_t)n << 19;                /* every other element was missed */
            cr_expect_eq(noise_evidence_check(&p, NOISE_PHASE_ROLLOUT, &ev, &e), -1, "half of it, scale %g", scale);
            t->changed = n;
            t->r2 = (int64_t)n << 20;
            cr_expect_eq(noise_evidence_check(&p, NOISE_PHASE_ROLLOUT, &ev, &e), 0, "%s", e.text);
            json_t *all = noise_evidence_json(&p, NOISE_PHASE_ROLLOUT, &ev);
            cr_expect_null(json_object_get(json_object_get(all, "module/q_proj/forward"), "warning"));
            json_decref(all);
            t->coarse = n / 5;
            t->r2 = (int64_t)(n * .85 * 0x1p20);
            cr_expect_eq(noise_evidence_check(&p, NOISE_PHASE_ROLLOUT, &ev, &e), 0, "%s", e.text);
            all = noise_evidence_json(&p, NOISE_PHASE_ROLLOUT, &ev);
            cr_expect(strstr(json_string_value(json_object_get(json_object_get(all, "module/q_proj/forward"),
                                                               "warning")), "20 %"));
            json_decref(all);
            t->coarse = n;                           /* next to nothing is not something */
            t->r2 = (int64_t)(n * .1 * 0x1p20);
            cr_expect_eq(noise_evidence_check(&p, NOISE_PHASE_ROLLOUT, &ev, &e), -1);
        }
}

Test(noise_ops, a_treatment_that_did_not_happen_is_an_error) {
    struct world w;
    struct noise_text t = text_ops("matmul", "all");
    world(&w, t, 1000, 1);
    w.t->sites -= 1;
    expect_verdict(&w, -1, "were expected");
    world(&w, t, 1000, 1);
    *w.t = (struct noise_tally){ 0 };
    expect_verdict(&w, -1, "no site was visited");
    world(&w, t, 1000, 1);
    w.t->changed = w.t->r = w.t->r2 = 0;
    expect_verdict(&w, -1, "not one of 1000 elements changed");
    world(&w, t, 1000, 1);
    w.ev.op[NOISE_OP_SILU][NOISE_FORWARD].sites = 1;
    expect_verdict(&w, -1, "was not intended");
    world(&w, t, 1000, 1);
    w.ev.op[NOISE_OP_MATMUL][NOISE_BACKWARD].elements = 1;
    expect_verdict(&w, -1, "was not intended");
    world(&w, t, 1000, 1);
    memset(&w.ev, 0, sizeof w.ev);
    expect_verdict(&w, -1, "no site was visited in 0 passes");
    struct err e = { 0 };
    world(&w, t, 1000, 1);
    cr_expect_eq(noise_evidence_check(&w.plan, NOISE_PHASE_EVAL, &w.ev, &e), -1);
    cr_expect(strstr(e.text, "eval was not intended"), "%s", e.text);
}

Test(noise_ops, a_backward_counts_in_the_update_only) {
    struct world w;
    struct noise_text t = text_ops("matmul", "all");
    struct err e = { 0 };
    t.backward = true;
    world(&w, t, 1000, 1);
    expect_verdict(&w, 0, NULL);                     /* no backward ran: flat losses */
    w.ev.passes[NOISE_BACKWARD] = 1;
    expect_verdict(&w, -1, "op/matmul/backward");
    w.ev.op[NOISE_OP_MATMUL][NOISE_BACKWARD] = *w.t;
    w.ev.op[NOISE_OP_MATMUL][NOISE_BACKWARD].sites = 4 * 28 - 1;
    expect_verdict(&w, -1, "op/lora_grad/backward");
    w.ev.grad = *w.t;
    w.ev.updates = w.ev.grad.sites = 4;
    expect_verdict(&w, 0, NULL);
    w.ev.grad.sites = 8;                             /* twice an update */
    expect_verdict(&w, -1, "op/lora_grad/backward in phase update: 8 sites");
    w.ev.grad.sites = 1;                             /* in one of four mini-batches */
    expect_verdict(&w, -1, "4 were expected");
    w.ev.grad.sites = 4;
    cr_expect_eq(noise_evidence_check(&w.plan, NOISE_PHASE_LOGPROB, &w.ev, &e), -1);
    cr_expect(strstr(e.text, "backward in phase logprob was not intended"), "%s", e.text);
}

Test(noise_ops, bf16_that_realises_nothing_is_a_warning) {
    struct world w;
    struct noise_text t = text_ops("matmul", "all");
    t.bf16 = true;
    t.scale = 1e-4;
    world(&w, t, 1000, 1);
    w.t->changed = w.t->r = w.t->r2 = 0;
    expect_verdict(&w, 0, NULL);
    json_t *all = noise_evidence_json(&w.plan, NOISE_PHASE_UPDATE, &w.ev),
           *o = json_object_get(all, "op/matmul/forward");
    cr_assert_not_null(o);
    cr_expect_not_null(json_object_get(o, "warning"));
    cr_expect_float_eq(json_real_value(json_object_get(o, "intended")), 1e-4, 1e-12);
    cr_expect_eq(json_real_value(json_object_get(o, "realised")), 0);
    cr_expect_eq(json_object_size(all), 2);          /* and the passes */
    json_decref(all);
    w.t->sites = 0;                                  /* but it must have been tried */
    expect_verdict(&w, -1, "no site was visited");
    all = noise_evidence_json(&w.plan, NOISE_PHASE_EVAL, &w.ev);
    cr_expect_eq(json_object_size(all), 0);
    json_decref(all);
}

/* z and t to bf16, the two products, the sum: a text of its own, in double. */
static double to_bf16(double x) {
    if (x == 0) return 0;
    const double step = exp2(floor(log2(fabs(x))) - 7);
    return nearbyint(x / step) * step;
}
static double as_bf16(double t, double z, double scale) {
    return to_bf16(t + to_bf16(to_bf16(to_bf16(z) * fabs(t)) * scale));
}

/* Each mantissa's mean of r^2 by 16,000 draws lies where the exact sums say, and at both ends there is one. */
Test(noise_ops, what_bf16_leaves_of_a_size_is_what_drawing_it_leaves) {
    static const double scales[] = { 1e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2, 1 };
    enum { N = 16000 };
    const uint32_t key[2] = { 8, 9 };
    for (int uniform = 0; uniform < 2; uniform++)
        for (size_t s = 0; s < COUNT_OF(scales); s++) {
            const double scale = (double)(float)scales[s];
            const struct noise_bf16 b = noise_bf16_of(uniform ? KERN_NOISE_RELATIVE_UNIFORM
                                                              : KERN_NOISE_RELATIVE_GAUSSIAN, scale);
            const double off = 6 * sqrt(b.r4_most / N) + 3 * b.size_most * b.size_most / N + 1e-6;
            double least = INFINITY, most = 0;
            for (int m = 0; m < 128; m++) {
                const double t = (m % 2 ? -64 : .5) * (1 + m / 128.);
                double r1 = 0, r2 = 0, r4 = 0;
                for (uint32_t i = 0; i < N; i += 4) {
                    double z[4];
                    const struct rng4 d = rng_philox((uint32_t[4]){ i, (uint32_t)m }, key);
                    rng_normal4(z, d);
                    for (int j = 0; j < 4; j++) {
                        if (uniform) z[j] = sqrt(12) * ((double)rng_unit(d.v[j]) - .5);
                        const double r = (as_bf16(t, z[j], scale) - t) / (fabs(t) * scale);
                        cr_assert(fabs(r) <= b.size_most * 1.0001, "scale %g: r = %g", scale, r);
                        r1 += r / N, r2 += r * r / N, r4 += r * r * r * r / N;
                    }
                }
                cr_expect(r2 > b.r2_least - off && r2 < b.r2_most + off, "scale %g, mantissa %d: %g, not %g to %g", scale,
                          m, r2, b.r2_least, b.r2_most);
                cr_expect(fabs(r1) <= b.r_most + 6 * sqrt((b.r2_most + 1e-9) / N) + 3 * b.size_most / N);
                cr_expect(r4 <= b.r4_most * 1.5 + 1e-3 + off * 40);
                least = fmin(least, r2), most = fmax(most, r2);
            }
            cr_expect(least < b.r2_least + off && most > b.r2_most - off, "scale %g: %g .. %g, not %g .. %g", scale, least,
                      most, b.r2_least, b.r2_most);
        }
    /* all of 0.05, nothing of 1e-4, and what lies between is neither */
    cr_expect(noise_bf16_of(KERN_NOISE_RELATIVE_GAUSSIAN, .05).r2_least > .99);
    cr_expect_eq(noise_bf16_of(KERN_NOISE_RELATIVE_GAUSSIAN, 1e-4).r2_most, 0);
    cr_expect(noise_bf16_of(KERN_NOISE_RELATIVE_GAUSSIAN, 1e-3).r2_most < .8);
    /* t = 1 (1 - .005) is nearest to 1 - 2^-8, t = 1 + .005 to 1 + 2^-7: the ends over the mantissas */
    const struct noise_bf16 fixed = noise_bf16_of(KERN_NOISE_SYSTEMATIC, .005);
    cr_expect_float_eq(sqrt(fixed.r2_least), 0x1p-8 / .005, 1e-6);
    cr_expect_float_eq(sqrt(fixed.r2_most), 0x1p-7 / .005, 1e-6);
}

Test(noise_ops, sizes_under_bf16_are_held_against_its_steps) {
    static const struct { double scale, r2; int n, want; } cases[] = {
        { 1e-4, 0, 100000, 0 }, { 1e-4, 1e-3, 100000, -1 }, { 1e-3, .25, 100000, 0 }, { 1e-3, 1, 100000, -1 },
        { 1e-3, 0, 10000000, -1 }, { 1e-2, 1.02, 1000000, 0 }, { 1e-2, .97, 1000000, -1 }, { 1e-2, 1.1, 1000000, -1 },
        { .05, 1, 1000000, 0 }, { .05, .98, 1000000, -1 }, { .05, 1.02, 1000000, -1 }, { .05, 0, 1000000, -1 },
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        struct world w;
        struct noise_text t = text_ops("matmul", "all");
        t.bf16 = true;
        t.scale = cases[i].scale;
        world(&w, t, 1000, 1);
        w.ev.rows = w.ev.rows_squared = cases[i].n;
        w.t->elements = w.t->measured = w.t->changed = cases[i].n;
        w.t->r = 0;
        w.t->r2 = llround(cases[i].r2 * cases[i].n * 0x1p20);
        if (cases[i].r2 == 0) w.t->changed = 0;
        expect_verdict(&w, cases[i].want, cases[i].want ? "chance and rounding" : NULL);
        w.t->r = cases[i].n * (int64_t)(.3 * 0x1p20);            /* one draw for all */
        if (cases[i].want == 0) expect_verdict(&w, -1, "draws are shared");
    }
}

/* A dead zone and E4M3 have no size, but not every measurement can be theirs. */
Test(noise_ops, what_no_size_is_intended_for_is_held_against_what_it_does) {
    for (int bf16 = 0; bf16 < 2; bf16++) {
        struct world w;
        struct noise_text t = text_ops("matmul", "all");
        t.type = KERN_NOISE_DEADZONE;
        t.bf16 = bf16;
        world(&w, t, 1000, 1);
        *w.t = (struct noise_tally){ .sites = w.t->sites, .elements = 1000, .measured = 990, .changed = 70,
                                     .r = -(12 << 20), .r2 = 70 << 20 };
        expect_verdict(&w, 0, NULL);
        for (int off = -1; off <= 1; off += 2) {
            w.t->r2 = (70 << 20) + off;
            expect_verdict(&w, -1, "a dead zone makes 0 of each element that it changes");
        }
        w.t->r = w.t->r2 = w.t->changed = 0;
        w.t->elements = 10000;
        expect_verdict(&w, -1, "of type deadzone and scale 0.05 in phase update: not one of 10000 elements changed");

        struct noise_plan p;
        struct err e = { 0 };
        struct noise_text m = text_modules("q_proj", "", "all");
        m.type = KERN_NOISE_FP8;
        m.scale = 0;
        m.bf16 = bf16;
        cr_assert_eq(noise_plan_make(&p, NULL, &m, &qwen, &e), 0, "%s", e.text);
        struct noise_evidence ev = { .passes = { 1 }, .wanted = 1, .rows = 1000, .rows_squared = 1000 };
        struct noise_tally *q = &ev.module[NOISE_MODULE_Q];
        *q = (struct noise_tally){ .sites = 28, .elements = 1000, .measured = 1000, .coarse = 10, .changed = 940,
                                   .r2 = (int64_t)((10 + 990 / 256.) * 0x1p20) };
        cr_expect_eq(noise_evidence_check(&p, NOISE_PHASE_ROLLOUT, &ev, &e), 0, "%s", e.text);
        q->r2 += 1 << 15;
        cr_expect_eq(noise_evidence_check(&p, NOISE_PHASE_ROLLOUT, &ev, &e), -1);
        cr_expect(strstr(e.text, "E4M3 gives at most 0.117"), "%s", e.text);
        q->r2 = (int64_t)((5 + 990 * 7e-4) * 0x1p20);
        cr_expect_eq(noise_evidence_check(&p, NOISE_PHASE_ROLLOUT, &ev, &e), 0, "%s", e.text);
        q->changed = 470;                            /* every other element was missed */
        q->r2 /= 2;
        cr_expect_eq(noise_evidence_check(&p, NOISE_PHASE_ROLLOUT, &ev, &e), -1);
        cr_expect(strstr(e.text, "E4M3 changes at least 752"), "%s", e.text);
        q->changed = 940;                            /* all moved, by next to nothing */
        q->r2 = 1000;
        cr_expect_eq(noise_evidence_check(&p, NOISE_PHASE_ROLLOUT, &ev, &e), -1);
        q->changed = q->r2 = 0;
        e = (struct err){ 0 };
        cr_expect_eq(noise_evidence_check(&p, NOISE_PHASE_ROLLOUT, &ev, &e), -1);
        cr_expect(strstr(e.text, "of type fp8 and scale 0 in phase rollout: not one of 1000"), "%s", e.text);
    }
}

/* A step that is too small for a rare kind of noise may have none; a score of it is none. */
Test(noise_ops, rare_noise_is_judged_where_something_is_complete) {
    static const struct { int type; double scale, rate; int n, few; } cases[] = {
        { KERN_NOISE_SPARSE, .5, 1e-6, 3000000, 1 }, { KERN_NOISE_SPARSE, .5, 1e-4, 3000000, 0 },
        { KERN_NOISE_DEADZONE, 1e-5, 0, 500000, 1 }, { KERN_NOISE_DEADZONE, 1e-2, 0, 500000, 0 },
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        struct world w;
        struct err e = { 0 };
        int64_t changed[2];
        struct noise_text t = text_ops("matmul, head", "all");
        t.type = cases[i].type, t.scale = cases[i].scale, t.rate = cases[i].rate;
        t.phase[NOISE_PHASE_EVAL] = true;
        world(&w, t, 1000, 1);
        struct noise_tally *head = &w.ev.op[NOISE_OP_HEAD][NOISE_FORWARD];
        *w.t = (struct noise_tally){ .sites = w.t->sites, .elements = cases[i].n, .measured = cases[i].n };
        *head = *w.t;
        head->sites = 3;
        expect_verdict(&w, cases[i].few ? 0 : -1, cases[i].few ? NULL : "elements changed");
        cr_expect_eq(noise_evidence_check(&w.plan, NOISE_PHASE_EVAL, &w.ev, &e), -1);
        cr_expect(strstr(e.text, "elements changed"), "%s", e.text);
        noise_evidence_changed(changed, &w.plan, NOISE_PHASE_UPDATE, &w.ev);
        cr_expect_eq(changed[0], -1);
        cr_expect_eq(changed[1], 0);
        json_t *all = noise_evidence_json(&w.plan, NOISE_PHASE_UPDATE, &w.ev);
        cr_expect(strstr(json_string_value(json_object_get(json_object_get(all, "op/head/forward"), "warning")),
                         "realised 0"));
        json_decref(all);
        if (!cases[i].few) continue;
        head->changed = 1, head->r2 = 1 << 20;       /* one hit anywhere makes a score of it */
        e = (struct err){ 0 };
        cr_expect_eq(noise_evidence_check(&w.plan, NOISE_PHASE_EVAL, &w.ev, &e), 0, "%s", e.text);
        noise_evidence_changed(changed, &w.plan, NOISE_PHASE_UPDATE, &w.ev);
        cr_expect_eq(changed[0], 1);
    }
}

Test(noise_ops, evidence_adds_up) {
    struct world w;
    struct noise_evidence sum = { 0 };
    world(&w, text_ops("matmul", "all"), 4000, 1);
    for (int i = 0; i < 3; i++) noise_evidence_add(&sum, &w.ev);
    const struct noise_tally *t = &sum.op[NOISE_OP_MATMUL][NOISE_FORWARD];
    cr_expect_eq(t->sites, 3 * w.t->sites);
    cr_expect_eq(t->elements, 12000);
    cr_expect_eq(sum.passes[NOISE_FORWARD], 9);
    cr_expect_float_eq(noise_tally_rms(t, .05), noise_tally_rms(w.t, .05), 1e-9);
    cr_expect_float_eq(noise_tally_rms(t, .05), .05, .003);
    cr_expect_float_eq(noise_tally_mean(t, .05), 0, .004);
}

/* A group that comes after the first, or instead of it, still says what lay beside the weights. */
Test(noise_ops, what_came_since_has_the_draw_for_weights_again) {
    struct noise_evidence a = { .passes = { 2 }, .weights_draw = 1 }, b;
    a.module[NOISE_MODULE_Q] = (struct noise_tally){ .sites = 6, .elements = 100, .measured = 99, .r2 = 7 };
    b = a;
    b.passes[NOISE_FORWARD] = 3;
    b.module[NOISE_MODULE_Q].sites = 9;
    const struct noise_evidence since = noise_evidence_since(&b, &a);
    cr_expect_eq(since.passes[NOISE_FORWARD], 1);
    cr_expect_eq(since.module[NOISE_MODULE_Q].sites, 3);
    cr_expect_eq(since.module[NOISE_MODULE_Q].elements, 100);
    cr_expect_eq(since.module[NOISE_MODULE_Q].r2, 7);
}
