/* lora_peft.c - sizes of spec dapo 17.12, first values, PEFT folders: there and back, and hostile
 * ones.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/unit/net_fixture.h"

#include <criterion/criterion.h>
#include <math.h>
#include <unistd.h>

#include "lib/base/fs.h"
#include "lib/model/safetensors.h"

static const struct lora_shape all = { .rank = 8, .alpha = 16, .on = { 1, 1, 1, 1, 1, 1, 1 } };

static struct model_conf conf(int dim, int ffn, int heads, int kv_heads, int head_dim, int layers) {
    return (struct model_conf){ .dim = dim,
                                .ffn_dim = ffn,
                                .heads = heads,
                                .kv_heads = kv_heads,
                                .head_dim = head_dim,
                                .layers = layers };
}

Test(lora, has_the_parameter_counts_of_known_models) {
    const struct { struct model_conf c; size_t params[3]; } want[] = {
        { conf(896, 4864, 14, 2, 64, 24), { 4399104, 8798208, 17596416 } },
        { conf(1536, 8960, 12, 2, 128, 28), { 9232384, 18464768, 36929536 } },
        { conf(2048, 11008, 16, 2, 128, 36), { 14966784, 29933568, 59867136 } },
        { conf(3584, 18944, 28, 4, 128, 28), { 20185088, 40370176, 80740352 } },
        { conf(4096, 14336, 32, 8, 128, 32), { 20971520, 41943040, 83886080 } },
    };
    for (size_t i = 0; i < COUNT_OF(want); i++)
        for (int j = 0; j < 3; j++) {
            struct lora_shape s = all;
            s.rank = 8 << j;
            cr_expect_eq(lora_params(&want[i].c, &s), want[i].params[j]);
        }
    const struct lora_shape qv = { .rank = 8,
                                   .alpha = 8,
                                   .on = { [PROJ_Q] = true, [PROJ_V] = true } };
    cr_expect_eq(lora_params(&want[0].c, &qv), 540672);
}

Test(lora, matrices_lie_end_to_end) {
    struct model_conf c = fix_small_conf();
    struct lora_shape s = all;
    s.on[PROJ_K] = s.on[PROJ_UP] = false;
    struct lora *l = lora_create(&c, &s, 1);
    size_t at = 0;
    for (int layer = 0; layer < c.layers; layer++)
        for (enum proj p = 0; p < PROJ_COUNT; p++) {
            if (!s.on[p]) continue;
            size_t a, b;
            int out, in;
            model_proj_shape(&c, p, &out, &in);
            lora_offsets(l, layer, p, &a, &b);
            cr_expect(a == at && b == a + 8 * (size_t)in);
            at = b + 8 * (size_t)out;
        }
    cr_expect_eq(at, l->params);
    lora_destroy(&l);
    lora_destroy(&l);
}

Test(lora, starts_with_a_in_its_bounds_and_b_zero) {
    static const struct { int in; double bound;
    } want[] = { { 64, .125 },         { 896, .033407655 }, { 2048, .022097087 },
                 { 3584, .016703828 }, { 4096, .015625 },   { 18944, .007265477 } };
    for (size_t i = 0; i < COUNT_OF(want); i++) {
        struct model_conf c = conf(want[i].in, 16, 1, 1, 16, 1);
        struct lora *l = lora_create(&c, &all, 5);
        size_t a, b;
        lora_offsets(l, 0, PROJ_Q, &a, &b);
        double most = 0, sum = 0, squares = 0;
        for (size_t j = a; j < b; j++) {
            const double v = (double)l->value[j];
            most = fmax(most, fabs(v));
            sum += v;
            squares += v * v;
        }
        const double n = (double)(b - a);
        cr_expect(most <= want[i].bound * (1 + 1e-6) && most > .97 * want[i].bound,
                  "in %d: largest %.9g", want[i].in, most);
        cr_expect(fabs(sqrt(squares / n) / (want[i].bound / sqrt(3.)) - 1) < .06);
        cr_expect(fabs(sum / n) < .1 * want[i].bound);
        for (size_t j = 0; j < 128; j++) cr_assert_eq(l->value[b + j], 0.f);
        lora_destroy(&l);
    }
}

Test(lora, is_named_by_shape_and_values_and_made_by_its_seed) {
    struct model_conf c = fix_small_conf();
    char one[SHA256_HEX], two[SHA256_HEX];
    struct lora *a = lora_create(&c, &all, 1), *b = lora_create(&c, &all, 1),
                *other = lora_create(&c, &all, 2);
    lora_sha256(a, one);
    lora_sha256(b, two);
    cr_expect_str_eq(one, two);
    lora_sha256(other, two);
    cr_expect_str_neq(one, two);
    b->shape.alpha = 17;
    lora_sha256(b, two);
    cr_expect_str_neq(one, two);
    b->shape.alpha = all.alpha;
    b->value[b->params - 1] = 1e-30f;
    lora_sha256(b, two);
    cr_expect_str_neq(one, two);
    lora_destroy(&a);
    lora_destroy(&b);
    lora_destroy(&other);
}

/* ---- folders ---- */

static char dir[64];
static void make_dir(void) {
    snprintf(dir, sizeof dir, "/tmp/qerl-lora-XXXXXX");
    cr_assert_not_null(mkdtemp(dir));
}
static void remove_dir(void) { fs_remove_tree(dir, NULL); }
TestSuite(lora_folder, .init = make_dir, .fini = remove_dir);

static char *in_dir(const char *name) {
    static char path[4][128];
    static int turn;
    char *p = path[turn++ % 4];
    snprintf(p, 128, "%s/%s", dir, name);
    return p;
}

Test(lora_folder, comes_back_with_the_bits_it_was_saved_with) {
    struct err e = { 0 };
    struct model_conf c = fix_small_conf();
    struct lora *l = fix_lora(&c, 5, 7.5f, .3f, 9), *back;
    char one[SHA256_HEX], two[SHA256_HEX];
    cr_assert_eq(lora_save(l, in_dir("a/b/v1/"), "some \"base\"", &e), 0, "%s", e.text);
    cr_assert_eq(lora_load(&back, &c, in_dir("a/b/v1"), &e), 0, "%s", e.text);
    cr_expect(back->shape.rank == 5 && back->shape.alpha == 7.5f &&
              memcmp(back->shape.on, l->shape.on, sizeof l->shape.on) == 0);
    lora_sha256(l, one);
    lora_sha256(back, two);
    cr_expect_str_eq(one, two);
    lora_destroy(&back);
    lora_destroy(&l);
}

Test(lora_folder, saving_again_is_fine_and_saving_another_replaces) {
    struct err e = { 0 };
    struct model_conf c = fix_small_conf();
    struct lora *l = fix_lora(&c, 4, 8, .3f, 9), *other = fix_lora(&c, 2, 8, .1f, 9), *back;
    for (int i = 0; i < 2; i++)
        cr_assert_eq(lora_save(l, in_dir("v"), "base", &e), 0, "%s", e.text);
    cr_assert_eq(lora_save(other, in_dir("v"), "base", &e), 0, "%s", e.text);
    cr_assert_eq(lora_load(&back, &c, in_dir("v"), &e), 0, "%s", e.text);
    cr_expect_eq(back->shape.rank, 2);
    char pattern[128];
    snprintf(pattern, sizeof pattern, "%s/v.tmp.%ld", dir, (long)getpid());
    cr_expect_not(fs_exists(pattern));
    lora_destroy(&back);
    lora_destroy(&other);
    lora_destroy(&l);
}

static const char good_config[] =
    "{\"peft_type\":\"LORA\",\"r\":2,\"lora_alpha\":4,\"target_modules\":[\"q_proj\"]}";

static void write_config(const char *text) {
    fs_mkdirs(in_dir("h"), NULL);
    cr_assert_eq(fs_replace(in_dir("h/adapter_config.json"), text, strlen(text), NULL), 0);
}

static void expect_refused(const char *words) {
    struct err e = { 0 };
    struct model_conf c = fix_toy_conf();
    struct lora *l;
    cr_expect_eq(lora_load(&l, &c, in_dir("h"), &e), -1, "taken, though: %s", words);
    cr_expect_null(l);
    cr_expect(strstr(e.text, words), "'%s' does not say '%s'", e.text, words);
}

/* q_proj of both toy layers, rank 2, with one thing spoiled. */
static void write_tensors(int spoil) {
    static float a[16], b[16];
    char name[5][96];
    struct st_out t[5];
    int n = 0;
    for (int layer = 0; layer < 2; layer++)
        for (int m = 0; m < 2; m++) {
            snprintf(name[n], 96,
                     "base_model.model.model.layers.%d.self_attn.q_proj.lora_%c.weight", layer,
                     m ? 'B' : 'A');
            t[n] = m ? (struct st_out){ name[n], 2, { 8, 2 }, b }
                     : (struct st_out){ name[n], 2, { 2, 8 }, a };
            n++;
        }
    a[3] = spoil == 1 ? NAN : spoil == 2 ? INFINITY : .5f;
    if (spoil == 3) t[1].shape[0] = 2, t[1].shape[1] = 8;
    if (spoil == 4) n = 3;
    if (spoil == 5)
        t[n] = t[0], t[n++].name = "base_model.model.model.layers.0.mlp.q_proj.lora_A.weight";
    if (spoil == 6)
        t[n] = t[0], t[n++].name = "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight";
    if (spoil == 7) n = 0;
    if (spoil == 8) t[0].rank = 1, t[0].shape[0] = 16;
    cr_assert_eq(st_write(in_dir("h/adapter_model.safetensors"), t, n, NULL, NULL), 0);
}

Test(lora_folder, hostile_tensors_are_refused_by_name) {
    static const char *const words[] = { "",
                                         "not finite",
                                         "not finite",
                                         "is not [8, 2]",
                                         "lacks tensor",
                                         "unknown tensor",
                                         "unknown tensor",
                                         "none of this model's projections",
                                         "is not [2, 8]" };
    write_config(good_config);
    for (int spoil = 1; spoil < 9; spoil++) {
        write_tensors(spoil);
        expect_refused(words[spoil]);
    }
    struct err e = { 0 };
    struct model_conf c = fix_toy_conf();
    struct lora *l;
    write_tensors(0);
    cr_expect_eq(lora_load(&l, &c, in_dir("h"), &e), 0, "%s", e.text);
    cr_expect(l && l->shape.on[PROJ_Q] && !l->shape.on[PROJ_K] && l->value[3] == .5f);
    lora_destroy(&l);
}

Test(lora_folder, hostile_configs_are_refused_by_field) {
    static const struct { const char *text, *words;
    } bad[] = {
        { "{", "adapter_config.json" },
        { "[]", "peft_type" },
        { "{\"peft_type\":\"LOHA\",\"r\":2,\"lora_alpha\":4}", "LOHA" },
        { "{\"peft_type\":\"LORA\",\"r\":0,\"lora_alpha\":4}", "'r'" },
        { "{\"peft_type\":\"LORA\",\"r\":513,\"lora_alpha\":4}", "'r'" },
        { "{\"peft_type\":\"LORA\",\"r\":2}", "lora_alpha" },
        { "{\"peft_type\":\"LORA\",\"r\":2,\"lora_alpha\":1e300}", "lora_alpha" },
        { "{\"peft_type\":\"LORA\",\"r\":4,\"lora_alpha\":4}", "is not [4, 8]" },
        { "{\"peft_type\":\"LORA\",\"r\":2,\"lora_alpha\":4,\"use_dora\":true}", "use_dora" },
        { "{\"peft_type\":\"LORA\",\"r\":2,\"lora_alpha\":4,\"bias\":\"all\"}", "bias" },
        { "{\"peft_type\":\"LORA\",\"r\":2,\"lora_alpha\":4,\"rank_pattern\":{\"q_proj\":4}}",
          "rank_pattern" },
        { "{\"peft_type\":\"LORA\",\"r\":2,\"lora_alpha\":4,\"modules_to_save\":[\"lm_head\"]}",
          "modules_to_save" },
    };
    for (size_t i = 0; i < COUNT_OF(bad); i++) {
        write_config(bad[i].text);
        write_tensors(0);
        expect_refused(bad[i].words);
    }
    fs_remove_tree(in_dir("h"), NULL);
    expect_refused("adapter_config.json");
}
