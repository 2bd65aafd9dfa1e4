/* model_open.c - opening whole models: GGUF equals HF, packed files are made, shared, checked and
 * made again.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/model.h"

#include <math.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "kernels/pack.h"
#include "lib/base/log.h"
#include "lib/model/packed.h"
#include "tests/unit/model_files.h"

#define VECTORS "tests/vectors/gguf/"

static struct model *open_model(const char *path, enum model_quant q, enum model_rounding r,
                                const char *packed_dir) {
    struct model *m;
    struct err e = { 0 };
    struct model_opts o = { .path = path, .quant = q, .rounding = r, .packed_dir = packed_dir };
    log_open("test", LOG_LEVEL_ERROR);
    cr_assert(model_open(&m, NULL, &o, &e) == 0, "%s: %s", path, e.text);
    return m;
}

static void expect_same_weight(const struct kern_weight *a, const struct kern_weight *b,
                               const char *what) {
    cr_assert(a->format == b->format && a->out == b->out && a->in == b->in && a->scale == b->scale,
              "%s", what);
    cr_expect(memcmp(a->data.p, b->data.p, kern_weight_bytes(a->format, a->out, a->in)) == 0,
              "%s differs", what);
}

static void expect_same(const struct model *a, const struct model *b) {
    size_t norm = (size_t)a->conf.dim * sizeof(float);
    expect_same_weight(&a->embed, &b->embed, "embedding");
    expect_same_weight(&a->head, &b->head, "head");
    cr_expect(memcmp(a->norm_final.p, b->norm_final.p, norm) == 0);
    for (int l = 0; l < a->conf.layers; l++) {
        const struct model_layer *x = &a->layer[l], *y = &b->layer[l];
        cr_expect(memcmp(x->norm_in.p, y->norm_in.p, norm) == 0 &&
                  memcmp(x->norm_post.p, y->norm_post.p, norm) == 0);
        for (int p = 0; p < PROJ_COUNT; p++)
            expect_same_weight(&x->w[p], &y->w[p], model_proj_name[p]);
        for (int p = 0; p < 3; p++) {
            cr_expect_eq(!x->bias[p].p, !y->bias[p].p);
            if (x->bias[p].p)
                cr_expect(memcmp(x->bias[p].p, y->bias[p].p, (size_t)x->w[p].out * sizeof(float)) ==
                          0);
        }
    }
}

Test(model_open, gguf_is_hf,
     .description = "the same weights as GGUF and as safetensors give the same records") {
    static const char *const name[] = { "llama", "qwen2" };
    for (int i = 0; i < 2; i++)
        for (int q = MODEL_QUANT_BF16; q <= MODEL_QUANT_F32; q++) {
            char hf[64], gguf[64];
            snprintf(hf, sizeof hf, VECTORS "%s", name[i]);
            snprintf(gguf, sizeof gguf, VECTORS "%s.gguf", name[i]);
            struct model *a = open_model(hf, (enum model_quant)q, MODEL_ROUNDING_OCP, NULL);
            struct model *b = open_model(gguf, (enum model_quant)q, MODEL_ROUNDING_OCP, NULL);
            cr_expect(a->conf.tied == (i == 1) && a->conf.qkv_bias == (i == 1));
            cr_expect_eq(a->head.data.p == a->embed.data.p, a->conf.tied);
            expect_same(a, b);
            model_close(&a);
            model_close(&b);
            cr_expect_null(a);
        }
}

Test(model_open, values,
     .description = "records hold the file's values, row by row, the 4-bit formats their rounding") {
    struct st_file f;
    struct err e = { 0 };
    cr_assert(st_open(&f, VECTORS "llama/model.safetensors", &e) == 0, "%s", e.text);
    struct model *b16 = open_model(VECTORS "llama", MODEL_QUANT_BF16, MODEL_ROUNDING_OCP, NULL);
    struct model *f32 = open_model(VECTORS "llama", MODEL_QUANT_F32, MODEL_ROUNDING_OCP, NULL);
    for (int i4 = 0; i4 < 4; i4++) {
        const enum model_rounding r = (enum model_rounding)(i4 % 2);
        const bool nv = i4 >= 2;
        struct model *m4 = open_model(VECTORS "llama", nv ? MODEL_QUANT_NVFP4 : MODEL_QUANT_MXFP4,
                                      r, NULL);
        for (int p = 0; p < PROJ_COUNT; p++) {
            char name[96];
            snprintf(name, sizeof name, "model.layers.1.%s.%s.weight",
                     p <= PROJ_O ? "self_attn" : "mlp", model_proj_name[p]);
            const struct st_tensor *t = st_find(&f, name);
            float *x = mem_alloc((size_t)t->elements * sizeof *x),
                  *y = mem_alloc((size_t)t->elements * sizeof *x);
            int out = (int)t->shape[0], in = (int)t->shape[1];
            uint8_t *codes = mem_alloc((size_t)t->elements),
                    *scales = mem_alloc((size_t)t->elements / 16);
            cr_assert(st_to_f32(t, x, &e) == 0);
            if (nv) {
                float amax = 0;
                for (int i = 0; i < out * in; i++) amax = fmaxf(amax, fabsf(x[i]));
                const float scale = quant_nvfp4_tensor_scale(amax, r);
                cr_assert(quant_nvfp4(x, out, in, r, scale, codes, scales, NULL, &e) == 0);
                quant_nvfp4_back(codes, scales, scale, out, in, y);
            } else {
                cr_assert(quant_mxfp4(x, out, in, r, codes, scales, NULL, &e) == 0);
                quant_mxfp4_back(codes, scales, out, in, y);
            }
            for (int i = 0; i < out * in; i++) {
                const struct kern_weight *w = &b16->layer[1].w[p];
                cr_expect_eq(pack_get(w->data.p, w->format, out, in, i / in, i % in), x[i]);
                w = &f32->layer[1].w[p];
                cr_expect_eq(pack_get(w->data.p, w->format, out, in, i / in, i % in), x[i]);
                w = &m4->layer[1].w[p];
                cr_expect_eq(pack_get(w->data.p, w->format, out, in, i / in, i % in) * w->scale,
                             y[i], "%s %d", name, i);
            }
            free(x), free(y), free(codes), free(scales);
        }
        cr_expect_eq(m4->embed.format, KERN_FORMAT_BF16);
        model_close(&m4);
    }
    cr_expect_eq(f32->embed.format, KERN_FORMAT_F32);
    model_close(&b16);
    model_close(&f32);
    st_close(&f);
}

/* --- packed files --- */

static void packed_name(char *out, const char *dir, const struct model *m) {
    struct packed_plan p;
    packed_plan_init(&p, &m->conf, m->quant, m->rounding, NULL);
    packed_path(out, dir, m->sha256, &p);
    packed_plan_release(&p);
}

static ino_t inode(const char *path) {
    struct stat st;
    cr_assert(stat(path, &st) == 0);
    return st.st_ino;
}

static void damage(const char *path, long at, size_t cut) {
    struct str all;
    struct err e = { 0 };
    str_init(&all);
    cr_assert(fs_read(&all, path, 1 << 24, &e) == 0);
    if (at >= 0) all.s[at] ^= 1;
    cr_assert(fs_replace(path, all.s, all.len - cut, &e) == 0);
    str_release(&all);
}

static void packed_and_shared(enum model_quant q) {
    char dir[64], path[FS_PATH_MAX];
    struct err e = { 0 };
    test_dir(dir);
    struct model *memory = open_model(VECTORS "qwen2", q, MODEL_ROUNDING_OCP, NULL);
    struct model *m = open_model(VECTORS "qwen2", q, MODEL_ROUNDING_OCP, dir);
    packed_name(path, dir, m);
    expect_same(memory, m);
    cr_expect_str_eq(m->sha256, memory->sha256);
    ino_t first = inode(path);
    model_close(&m);
    m = open_model(VECTORS "qwen2", q, MODEL_ROUNDING_OCP, dir);
    cr_expect_eq(inode(path), first, "made again without need");
    model_close(&m);
    static const struct {
        long at;
        size_t cut;
    } wrong[] = { { 0, 0 }, { 30, 0 }, { 100, 0 }, { 170, 0 }, { -1, 1 }, { -1, 4000 } };
    for (size_t i = 0; i < COUNT_OF(wrong); i++) {
        damage(path, wrong[i].at, wrong[i].cut);
        ino_t before = inode(path);
        m = open_model(VECTORS "qwen2", q, MODEL_ROUNDING_OCP, dir);
        cr_expect_neq(inode(path), before, "case %zu was not noticed", i);
        expect_same(memory, m);
        model_close(&m);
    }
    struct model *seed = open_model(VECTORS "qwen2", q, MODEL_ROUNDING_SEED, dir);
    packed_name(path, dir, seed);
    cr_expect(str_ends(path, q == MODEL_QUANT_MXFP4 ? "-mxfp4-seed" : "-nvfp4-seed") &&
              fs_exists(path));
    model_close(&seed);
    model_close(&memory);
    cr_assert(fs_remove_tree(dir, &e) == 0);
}

Test(model_open, packed,
     .description =
         "a packed file is made once, shared, and made again when header, table or size is wrong") {
    packed_and_shared(MODEL_QUANT_MXFP4);
    packed_and_shared(MODEL_QUANT_NVFP4);
}

Test(model_open, race,
     .description = "stages that pack the same model at the same time all get it") {
    char dir[64];
    struct err e = { 0 };
    pid_t child[6];
    test_dir(dir);
    log_open("test", LOG_LEVEL_ERROR);
    for (size_t i = 0; i < COUNT_OF(child); i++)
        if ((child[i] = fork()) == 0) {
            struct model *m;
            struct model_opts o = { .path = VECTORS "llama", .quant = MODEL_QUANT_MXFP4,
                                    .packed_dir = dir };
            int rc = model_open(&m, NULL, &o, &e);
            if (rc < 0) fprintf(stderr, "%s\n", e.text);
            else model_close(&m);
            _exit(rc ? 1 : 0);
        }
    for (size_t i = 0; i < COUNT_OF(child); i++) {
        int status = -1;
        waitpid(child[i], &status, 0);
        cr_expect_eq(status, 0);
    }
    cr_assert(fs_remove_tree(dir, &e) == 0);
}

Test(model_open, threads,
     .description = "the bits of a packed model do not depend on the number of threads") {
    struct pool *pool = pool_create(3);
    struct kern k = { .name = "ref", .pool = pool };
    struct model *a = open_model("models/tiny", MODEL_QUANT_MXFP4, MODEL_ROUNDING_OCP, NULL), *b;
    struct model_opts o = { .path = "models/tiny", .quant = MODEL_QUANT_MXFP4 };
    struct err e = { 0 };
    cr_assert(model_open(&b, &k, &o, &e) == 0, "%s", e.text);
    expect_same(a, b);
    model_close(&a);
    model_close(&b);
    pool_destroy(&pool);
}

/* --- wrong weights --- */

#define CONFIG                                                                                     \
    "{\"model_type\":\"llama\",\"vocab_size\":2,\"hidden_size\":2,\"intermediate_size\":2,\"num_"  \
    "hidden_layers\":1,"                                                                           \
    "\"num_attention_heads\":1,\"max_position_embeddings\":8,\"tie_word_embeddings\":true}"

/* Tensors of the little model in `CONFIG`, of which one may be left out, replaced or added. */
static const char *const NAMES[] = {
    "model.embed_tokens.weight",
    "model.norm.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.post_attention_layernorm.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.0.self_attn.v_proj.weight",
    "model.layers.0.self_attn.o_proj.weight",
    "model.layers.0.mlp.gate_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
};
enum { NAMES_COUNT = COUNT_OF(NAMES) };

static int little(struct st_out *t, const float *x) {
    for (int i = 0; i < NAMES_COUNT; i++)
        t[i] = (struct st_out){ NAMES[i], strstr(NAMES[i], "norm") ? 1 : 2, { 2, 2 }, x };
    return NAMES_COUNT;
}

static void expect_refused(const char *dir, const struct st_out *t, int n, const char *message) {
    char path[FS_PATH_MAX], want[512];
    struct model *m;
    struct err e = { 0 };
    struct model_opts o = { .path = dir, .quant = MODEL_QUANT_BF16 };
    fs_join(path, sizeof path, dir, "model.safetensors");
    cr_assert(st_write(path, t, n, NULL, &e) == 0);
    cr_assert_eq(model_open(&m, NULL, &o, &e), -1, "accepted, wanted: %s", message);
    cr_expect_null(m);
    snprintf(want, sizeof want, "'%s': %s", dir, message);
    expect_err(&e, message[0] == '=' ? message + 1 : want);
}

Test(model_open, wrong_weights,
     .description = "missing, misshapen, unknown and non-finite tensors are named") {
    char dir[64];
    struct err e = { 0 };
    float x[6] = { 1, 2, 3, 4, 5, 6 }, nan[4] = { 1, 2, 3, 0 }, big[4] = { 3.4e38f, 0, 0, 0 };
    struct st_out t[NAMES_COUNT + 1];
    nan[2] /= nan[3], nan[2] -= nan[2];
    test_dir(dir);
    test_text(dir, "config.json", CONFIG);
    int n = little(t, x);
    expect_refused(dir, t, n - 1, "tensor 'model.layers.0.mlp.down_proj.weight' is missing");
    t[0].shape[0] = 3;
    expect_refused(
        dir, t, n,
        "tensor 'model.embed_tokens.weight' has shape [3, 2], the configuration says [2, 2]");
    little(t, x);
    t[1].rank = 2, t[1].shape[1] = 1;
    expect_refused(dir, t, n,
                   "tensor 'model.norm.weight' has shape [2, 1], the configuration says [2]");
    little(t, x);
    t[n] = (struct st_out){ "model.layers.0.self_attn.q_norm.weight", 1, { 2 }, x };
    expect_refused(
        dir, t, n + 1,
        "tensor 'model.layers.0.self_attn.q_norm.weight' is not part of a llama model; leaving it "
        "out "
        "would compute something else");
    t[4].data = nan;
    expect_refused(
        dir, t, n,
        "=tensor 'model.layers.0.self_attn.q_proj.weight' holds a value that is not finite (row "
        "1, column "
        "0)");
    t[4].data = big;
    expect_refused(
        dir, t, n,
        "=tensor 'model.layers.0.self_attn.q_proj.weight' holds a value too large for bf16");
    t[4].data = x;
    test_text(
        dir, "config.json",
        "{\"model_type\":\"llama\",\"vocab_size\":2,\"hidden_size\":2,\"intermediate_size\":2,"
        "\"num_hidden_layers\":1,\"num_attention_heads\":1,\"max_position_embeddings\":8}");
    expect_refused(
        dir, t, n,
        "tensor 'lm_head.weight' is missing (and the configuration does not tie it to the "
        "embedding)");
    cr_assert(fs_remove_tree(dir, &e) == 0);
}

/* Two shards behind an index, reached through symbolic links as in a hub cache. */
Test(model_open, shards,
     .description = "shards and symbolic links are followed; an index cannot leave its folder") {
    char dir[64], blobs[FS_PATH_MAX], from[FS_PATH_MAX], to[FS_PATH_MAX];
    struct err e = { 0 };
    float x[4] = { 1, 2, 3, 4 };
    struct st_out t[NAMES_COUNT + 1];
    struct str index;
    int n = little(t, x);
    test_dir(dir);
    fs_join(blobs, sizeof blobs, dir, "blobs");
    cr_assert(fs_mkdirs(blobs, &e) == 0);
    for (int i = 0; i < 2; i++) {
        char name[64];
        snprintf(name, sizeof name, "shard%d", i);
        fs_join(from, sizeof from, blobs, name);
        snprintf(name, sizeof name, "blobs/shard%d", i);
        cr_assert(st_write(from, t + (i ? 5 : 0), i ? n - 5 : 5, NULL, &e) == 0);
        snprintf(to, sizeof to, "%s/model-0000%d-of-00002.safetensors", dir, i + 1);
        cr_assert(symlink(name, to) == 0);
    }
    str_init(&index);
    str_puts(&index, "{\"metadata\":{},\"weight_map\":{");
    for (int i = 0; i < n; i++)
        str_printf(&index, "%s\"%s\":\"model-0000%d-of-00002.safetensors\"", i ? "," : "", NAMES[i],
                   i < 5 ? 1 : 2);
    str_puts(&index, "}}");
    test_text(dir, "config.json", CONFIG);
    test_text(dir, "model.safetensors.index.json", index.s);
    struct model *m = open_model(dir, MODEL_QUANT_F32, MODEL_ROUNDING_OCP, NULL);
    cr_expect_eq(pack_get(m->embed.data.p, m->embed.format, 2, 2, 1, 0), 3);
    model_close(&m);
    test_text(dir, "model.safetensors.index.json", "{\"weight_map\":{\"a\":\"../x.safetensors\"}}");
    struct model_opts o = { .path = dir, .quant = MODEL_QUANT_F32 };
    cr_expect_eq(model_open(&m, NULL, &o, &e), -1);
    cr_expect(strstr(e.text, "tensor 'a' must name a .safetensors file in the same folder"), "%s",
              e.text);
    str_release(&index);
    cr_assert(fs_remove_tree(dir, &e) == 0);
}

/* --- MXFP4 blocks of a GGUF file --- */

Test(model_open, mxfp4_kept,
     .description = "MXFP4 blocks of a GGUF file keep their codes and scales") {
    enum { DIM = 32, BLOCK = 17 };
    static const char *const name[] = { "token_embd.weight",      "output_norm.weight",
                                        "blk.0.attn_norm.weight", "blk.0.ffn_norm.weight",
                                        "blk.0.attn_q.weight",    "blk.0.attn_k.weight",
                                        "blk.0.attn_v.weight",    "blk.0.attn_output.weight",
                                        "blk.0.ffn_gate.weight",  "blk.0.ffn_up.weight",
                                        "blk.0.ffn_down.weight" };
    struct str b;
    struct err e = { 0 };
    char dir[64], path[FS_PATH_MAX];
    uint64_t at = 0;
    uint8_t blocks[DIM * BLOCK];
    g_start(&b, COUNT_OF(name), 8);
    g_key_text(&b, "general.architecture", "llama");
    g_key_u32(&b, "llama.block_count", 1);
    g_key_u32(&b, "llama.embedding_length", DIM);
    g_key_u32(&b, "llama.feed_forward_length", DIM);
    /* heads of 2: interleaving changes nothing */
    g_key_u32(&b, "llama.attention.head_count", DIM / 2);
    g_key_u32(&b, "llama.context_length", 8);
    g_key_u32(&b, "llama.vocab_size", DIM);
    g_key_f32(&b, "llama.attention.layer_norm_rms_epsilon", 1e-5f);
    for (size_t i = 0; i < COUNT_OF(name); i++) {
        bool vector = strstr(name[i], "norm");
        g_tensor(&b, name[i], vector ? 1 : 2, DIM, DIM, vector ? GGUF_TYPE_F32 : GGUF_TYPE_MXFP4,
                 at);
        at += ((vector ? 4 * DIM : DIM * BLOCK) + 31) / 32 * 32;
    }
    for (int i = 0; i < DIM * BLOCK; i++)
        blocks[i] = (uint8_t)(i % BLOCK ? (i * 37) & 0x33 : 100 + i / BLOCK);
    g_pad(&b, 32);
    for (size_t i = 0; i < COUNT_OF(name); i++) {
        if (strstr(name[i], "norm")) g_zeros(&b, 4 * DIM);
        else str_add(&b, blocks, sizeof blocks);
        g_pad(&b, 32);
    }
    test_dir(dir);
    test_write(dir, "m.gguf", b.s, b.len);
    fs_join(path, sizeof path, dir, "m.gguf");
    struct model *m = open_model(path, MODEL_QUANT_MXFP4, MODEL_ROUNDING_OCP, NULL);
    for (int p = 0; p < PROJ_COUNT; p++) {
        const struct pack_mxfp4 *record = m->layer[0].w[p].data.p;
        for (int o = 0; o < DIM; o++) {
            cr_expect_eq(record[o / 16].scale[o % 16],
                         100 + o); /* largest code 1.5: OCP would choose scale 98 + o */
            for (int i = 0; i < DIM; i++) {
                int byte = blocks[o * BLOCK + 1 + i % 16], want = i < 16 ? byte & 15 : byte >> 4;
                cr_expect_eq(record[o / 16].q[i][o % 16 / 2] >> (o % 2 ? 4 : 0) & 15, want);
            }
        }
    }
    model_close(&m);
    str_release(&b);
    cr_assert(fs_remove_tree(dir, &e) == 0);
}
