/* model_exclude.c - modules that a 4-bit format leaves alone: which a pattern means, what is stored,
 * how the result is called.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/exclude.h"

#include <criterion/criterion.h>

#include "lib/base/log.h"
#include "lib/model/packed.h"
#include "tests/unit/model_files.h"

/* as many projections as Qwen2.5-1.5B has: 196 */
static const struct model_conf deep = { .layers = 28 }, tiny = { .layers = 6 };

static const struct {
    const char *patterns;
    const struct model_conf *conf;
    int count;
    int layer, proj;                                 /* one that must be hit */
} hits[] = {
    { "", &deep, 0, -1, 0 },
    { "layers.1", &deep, 7, 1, PROJ_DOWN },
    { "layers.0, layers.27", &deep, 14, 27, PROJ_Q },
    { "layers.14-17", &deep, 28, 17, PROJ_UP },
    { "down_proj", &deep, 28, 5, PROJ_DOWN },
    { "mlp", &deep, 84, 5, PROJ_GATE },
    { "layers.27.q_proj", &deep, 1, 27, PROJ_Q },
    { "model.layers.3.self_attn.k_proj", &deep, 1, 3, PROJ_K },
    { "layers.3.self_attn,layers.3.q_proj", &deep, 4, 3, PROJ_O },
    { "layers.0 of 28, layers.27 of 28", &tiny, 14, 5, PROJ_V },
    { "layers.0 of 28, layers.27 of 28", &deep, 14, 27, PROJ_V },
    { "layers.14-21.down_proj of 28", &tiny, 2, 3, PROJ_DOWN },
};

Test(model_exclude, patterns,
     .description = "whole parts of names: layers.1 is not layer 10, a module named twice counts "
                    "once; 182 of 196 stay without the first and the last layer") {
    for (size_t i = 0; i < COUNT_OF(hits); i++) {
        struct model_exclude x;
        struct err e = { 0 };
        cr_assert_eq(model_exclude_make(&x, hits[i].patterns, hits[i].conf, &e), 0, "%s", e.text);
        cr_expect_eq(x.count, hits[i].count, "'%s' left %d alone", hits[i].patterns, x.count);
        if (hits[i].layer >= 0) cr_expect(x.on[hits[i].layer][hits[i].proj], "%s", hits[i].patterns);
        int on = 0;
        for (int l = 0; l < MODEL_LAYERS_MAX; l++)
            for (int p = 0; p < PROJ_COUNT; p++) on += x.on[l][p];
        cr_expect_eq(on, x.count);
    }
}

static const struct { const char *patterns, *says; } wrong[] = {
    { "layers.28", "hits no module; there are layers.0 to layers.27" },
    { "dwn_proj", "did you mean 'down_proj'?" },
    { "down", "hits no module" },
    { "ayers.1", "did you mean 'layers'?" },
    { "q_proj.layers.1", "hits no module" },
    { "layers..1", "hits no module" },
    { "lm_head", "it is never quantised" },
    { "embed_tokens", "it is never quantised" },
    { "layers", "leave nothing quantised" },
    { "layers.40 of 28", "layer 40" },
    { "q_proj of 28", "cannot read" },
    { "layers.30, layers.1, down_porj", "down_porj" },
};

Test(model_exclude, refused,
     .description = "a pattern that hits nothing is an error of the configuration that names it and "
                    "what there is; all of them at once") {
    for (size_t i = 0; i < COUNT_OF(wrong); i++) {
        struct model_exclude x;
        struct err e = { 0 };
        cr_expect_eq(model_exclude_make(&x, wrong[i].patterns, &deep, &e), -1, "%s",
                     wrong[i].patterns);
        cr_expect(strstr(e.text, wrong[i].says), "'%s' says: %s", wrong[i].patterns, e.text);
        cr_expect_eq(e.code, EXIT_CONFIG);
        if (strchr(wrong[i].patterns, ',')) cr_expect(strstr(e.text, "'layers.30'"), "%s", e.text);
    }
}

Test(model_exclude, id, .description = "names the set, not how it was written") {
    static const char *const same[] = { "layers.2", "layers.2.mlp, layers.2.self_attn", "layers.2,,mlp" };
    char id[3][9];
    for (int i = 0; i < 3; i++) {
        struct model_exclude x;
        cr_assert_eq(model_exclude_make(&x, same[i], &deep, NULL), 0);
        model_exclude_id(&x, id[i]);
        cr_expect_eq(strlen(id[i]), 8);
    }
    cr_expect_str_eq(id[0], id[1]);
    cr_expect_str_neq(id[0], id[2]);
    model_exclude_id(&(struct model_exclude){ .count = 0 }, id[0]);
    cr_expect_str_empty(id[0]);
}

static struct model *open_tiny(const char *dir, enum model_quant weights,
                               enum model_quant activations, const char *exclude) {
    struct model *m;
    struct err e = { 0 };
    const struct model_opts o = { .path = "models/tiny", .quant = weights, .packed_dir = dir,
                                  .activations = activations, .exclude = exclude };
    log_open("test", LOG_LEVEL_ERROR);
    cr_assert_eq(model_open(&m, NULL, &o, &e), 0, "%s", e.text);
    return m;
}

static void path_of(char out[FS_PATH_MAX], const char *dir, const struct model *m,
                    const char *patterns) {
    struct model_exclude x;
    struct packed_plan p;
    cr_assert_eq(model_exclude_make(&x, patterns, &m->conf, NULL), 0);
    packed_plan_init(&p, &m->conf, m->quant, m->rounding, &x);
    packed_path(out, dir, m->sha256, &p);
    packed_plan_release(&p);
}

Test(model_exclude, files,
     .description = "excluded weights are those of the bf16 model, the others those of the whole "
                    "4-bit model; each set has a file of its own") {
    static const char patterns[] = "layers.0, layers.5.down_proj";
    char dir[64], all_path[FS_PATH_MAX], some_path[FS_PATH_MAX];
    test_dir(dir);
    struct model *all = open_tiny(dir, MODEL_QUANT_NVFP4, MODEL_QUANT_MXFP4, NULL),
                 *some = open_tiny(dir, MODEL_QUANT_NVFP4, MODEL_QUANT_MXFP4, patterns),
                 *flat = open_tiny(dir, MODEL_QUANT_BF16, MODEL_QUANT_MXFP4, patterns);
    int left = 0;
    for (int l = 0; l < all->conf.layers; l++)
        for (int p = 0; p < PROJ_COUNT; p++) {
            const bool out = l == 0 || (l == 5 && p == PROJ_DOWN);
            const struct kern_weight *w = &some->layer[l].w[p],
                                     *from = out ? &flat->layer[l].w[p] : &all->layer[l].w[p];
            cr_assert(w->format == from->format && w->scale == from->scale);
            cr_expect_eq(memcmp(w->data.p, from->data.p,
                                kern_weight_bytes(w->format, w->out, w->in)), 0, "%d %d", l, p);
            cr_expect_eq(some->layer[l].quant_in[p], !out);
            cr_expect_eq(flat->layer[l].quant_in[p], !out, "inputs under bf16 weights too");
            cr_expect(all->layer[l].quant_in[p]);
            left += some->layer[l].quant_in[p];
        }
    cr_expect_eq(some->excluded, 8);
    cr_expect_eq(left, 7 * some->conf.layers - 8);
    cr_expect_eq(some->head.format, KERN_FORMAT_BF16);
    path_of(all_path, dir, all, NULL);
    path_of(some_path, dir, some, patterns);
    cr_expect_str_neq(all_path, some_path);
    cr_expect(fs_exists(all_path) && fs_exists(some_path), "%s", some_path);
    path_of(all_path, dir, flat, patterns);              /* nothing is left out of bf16 */
    cr_expect(str_ends(all_path, "-bf16"), "%s", all_path);
    model_close(&all);
    model_close(&some);
    model_close(&flat);
}

Test(model_exclude, labels, .description = "how scores call a format") {
    static const struct {
        const char *label;
        int weights, activations;
        bool seed, excluded;
        int adapter;
    } v[] = {
        { "bf16", MODEL_QUANT_BF16, 0, true, true, 0 },
        { "mxfp4", MODEL_QUANT_MXFP4, 0, false, false, 0 },
        { "mxfp4-seed", MODEL_QUANT_MXFP4, 0, true, false, 0 },
        { "mxfp4-w4a4", MODEL_QUANT_MXFP4, MODEL_QUANT_MXFP4, false, false, 0 },
        { "mxfp4-seed-w4a4-x", MODEL_QUANT_MXFP4, MODEL_QUANT_MXFP4, true, true, 0 },
        { "nvfp4-w4a4-x", MODEL_QUANT_NVFP4, MODEL_QUANT_NVFP4, false, true, 0 },
        { "mxfp4-nvfp4-w4a4", MODEL_QUANT_MXFP4, MODEL_QUANT_NVFP4, false, false, 0 },
        { "nvfp4-seed-w16a4", MODEL_QUANT_BF16, MODEL_QUANT_NVFP4, true, false, 0 },
        { "f32", MODEL_QUANT_F32, 0, false, false, 0 },
        { "mxfp4-lora-mxfp4", MODEL_QUANT_MXFP4, 0, false, false, MODEL_QUANT_MXFP4 },
        { "mxfp4-w4a4-lora-nvfp4-x", MODEL_QUANT_MXFP4, MODEL_QUANT_MXFP4, false, true,
          MODEL_QUANT_NVFP4 },
        { "bf16-seed-lora-nvfp4", MODEL_QUANT_BF16, 0, true, false, MODEL_QUANT_NVFP4 },
        { "f32-lora-mxfp4", MODEL_QUANT_F32, 0, false, false, MODEL_QUANT_MXFP4 },
        { "nvfp4-seed-w16a4-lora-mxfp4", MODEL_QUANT_BF16, MODEL_QUANT_NVFP4, true, false,
          MODEL_QUANT_MXFP4 },
    };
    for (size_t i = 0; i < COUNT_OF(v); i++)
        cr_expect_str_eq(model_format_label((enum model_quant)v[i].weights,
                                            (enum model_quant)v[i].activations,
                                            (enum model_quant)v[i].adapter,
                                            v[i].seed ? MODEL_ROUNDING_SEED : MODEL_ROUNDING_OCP,
                                            v[i].excluded),
                         v[i].label);
}
