/* model_conf.c - configurations: what is read, and the message for each thing that is not
 * supported.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/conf.h"

#include <math.h>

#include "tests/unit/model_files.h"

#define SIZES "\"vocab_size\":100,\"hidden_size\":32,\"intermediate_size\":64,\"num_hidden_layers\":2," \
              "\"num_attention_heads\":4,\"max_position_embeddings\":128"
#define LLAMA "{\"model_type\":\"llama\"," SIZES

static const struct { const char *config, *message;
} bad[] = {
    { "{\"model_type\":\"mistral\"," SIZES "}",
      "model type 'mistral' is not supported (llama and qwen2 are)" },
    { "{" SIZES "}", "field 'model_type' is missing" },
    { "[]", "must hold an object" },
    { "{\"model_type\":\"llama\"}", "field 'vocab_size' is missing" },
    { LLAMA ",\"head_dim\":0}", "field 'head_dim' must be a whole number from 1 to 1024" },
    { LLAMA ",\"head_dim\":7}", "the head dimension 7 must be even" },
    { LLAMA ",\"num_key_value_heads\":3}",
      "4 attention heads cannot share 3 key-value heads evenly" },
    { "{\"model_type\":\"llama\",\"vocab_size\":9999999}",
      "field 'vocab_size' must be a whole number from 1 to 2097152" },
    { "{\"model_type\":\"llama\",\"vocab_size\":1e3}",
      "field 'vocab_size' must be a whole number from 1 to 2097152" },
    { LLAMA ",\"attention_bias\":true}",
      "field 'attention_bias' is true, but biases on the attention's projections are not "
      "supported" },
    { LLAMA ",\"mlp_bias\":true}",
      "field 'mlp_bias' is true, but biases on the feed-forward projections are not supported" },
    { LLAMA ",\"use_sliding_window\":true}",
      "field 'use_sliding_window' is true, but sliding-window attention is not "
      "supported" },
    { LLAMA ",\"hidden_act\":\"gelu\"}", "field 'hidden_act' is 'gelu', only 'silu' is supported" },
    { LLAMA ",\"partial_rotary_factor\":0.5}",
      "field 'partial_rotary_factor' is 0.5, only 1 is supported" },
    { LLAMA ",\"quantization_config\":{}}",
      "field 'quantization_config' is set: these weights are quantised already; use the "
      "unquantised model" },
    { LLAMA ",\"rms_norm_eps\":0}", "the norm's epsilon must lie between 0 and 1" },
    { LLAMA ",\"rope_theta\":-1}", "the rotary base (rope theta) must be at least 1" },
    { LLAMA ",\"eos_token_id\":100}", "field 'eos_token_id' must hold ids from 0 to 99" },
    { LLAMA ",\"eos_token_id\":[1,\"x\"]}", "field 'eos_token_id' must hold ids from 0 to 99" },
    { LLAMA ",\"eos_token_id\":[1,2,3,4,5,6,7,8,9]}",
      "field 'eos_token_id' lists more than 8 ids" },
    { LLAMA ",\"bos_token_id\":-2}", "field 'bos_token_id' must be a whole number from 0 to 99" },
};

static int load(const char *dir, const char *config, struct model_conf *c, struct err *e) {
    test_text(dir, "config.json", config);
    *e = (struct err){ 0 };
    return model_conf_load(c, dir, e);
}

Test(model_conf, refuses, .description = "each unsupported or missing field is named") {
    char dir[64], want[512];
    struct model_conf c;
    struct err e;
    test_dir(dir);
    for (size_t i = 0; i < COUNT_OF(bad); i++) {
        cr_expect_eq(load(dir, bad[i].config, &c, &e), -1, "accepted %s", bad[i].config);
        snprintf(want, sizeof want, "%s/config.json: %s", dir, bad[i].message);
        expect_err(&e, want);
    }
    cr_expect_eq(load(dir, LLAMA ",\"rope_scaling\":{\"type\":\"yarn\",\"factor\":4}}", &c, &e),
                 -1);
    snprintf(
        want, sizeof want,
        "%s/config.json: 'rope_scaling': type 'yarn' is not supported (default and llama3 are)",
        dir);
    expect_err(&e, want);
    cr_expect_eq(
        load(dir, LLAMA ",\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":4}}", &c, &e), -1);
    snprintf(want, sizeof want,
             "%s/config.json: 'rope_scaling': field 'low_freq_factor' is missing", dir);
    expect_err(&e, want);
    cr_expect_eq(load(dir, LLAMA ",}", &c, &e), -1);
    cr_expect(strstr(e.text, "not valid JSON") && e.code == EXIT_ENV, "%s", e.text);
    cr_expect_eq(model_conf_load(&c, "/nowhere/at/all", &e), -1);
    expect_err(&e, "there is no model at '/nowhere/at/all'");
    cr_assert(fs_remove_tree(dir, &e) == 0);
}

Test(model_conf, hf, .description = "defaults, both spellings of rope, ids of both files") {
    char dir[64];
    struct model_conf c;
    struct err e;
    test_dir(dir);
    cr_assert(load(dir, LLAMA "}", &c, &e) == 0, "%s", e.text);
    cr_expect(c.kv_heads == 4 && c.head_dim == 8 && c.norm_eps == 1e-6f && c.rope_theta == 10000 &&
              !c.tied && !c.qkv_bias);
    cr_expect(c.bos == -1 && c.eos_count == 0 && !c.rope_llama3.on);
    test_text(dir, "generation_config.json", "{\"eos_token_id\":[7,3]}");
    cr_assert(
        load(dir,
             "{\"model_type\":\"qwen2\"," SIZES
             ",\"num_key_value_heads\":2,\"head_dim\":16,\"rope_scaling\":null,"
             "\"eos_token_id\":[5,7],\"bos_token_id\":null,\"tie_word_embeddings\":true,\"rope_"
             "parameters\":"
             "{\"rope_theta\":1000000.0,\"rope_type\":\"default\"},\"use_sliding_window\":false,"
             "\"sliding_window\":4096}",
             &c, &e) == 0,
        "%s", e.text);
    cr_expect(c.arch == MODEL_ARCH_QWEN2 && c.qkv_bias && c.tied && c.kv_heads == 2 &&
              c.head_dim == 16);
    cr_expect(c.rope_theta == 1e6f && c.bos == -1);
    cr_expect(c.eos_count == 3 && c.eos[0] == 7 && c.eos[1] == 3 && c.eos[2] == 5);
    cr_assert(
        load(dir,
             LLAMA
             ",\"rope_theta\":500000,\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":32.0,"
             "\"low_freq_factor\":1.0,\"high_freq_factor\":4.0,\"original_max_position_"
             "embeddings\":8192}}",
             &c, &e) == 0,
        "%s", e.text);
    cr_expect(c.rope_llama3.on && c.rope_llama3.factor == 32 &&
              c.rope_llama3.original_positions == 8192);
    cr_assert(fs_remove_tree(dir, &e) == 0);
}

/* --- GGUF --- */

static void gguf_conf(struct str *b, const char *arch, bool with_eps, int freqs,
                      const float *divisor) {
    g_start(b, freqs ? 2 : 1, with_eps ? 10 : 9);
    g_key_text(b, "general.architecture", arch);
    g_key_u32(b, "llama.block_count", 2);
    g_key_u32(b, "llama.embedding_length", 256);
    g_key_u32(b, "llama.feed_forward_length", 64);
    g_key_u32(b, "llama.attention.head_count", 4);
    g_key_u32(b, "llama.context_length", 512);
    g_key_f32(b, "llama.rope.freq_base", 500000);
    g_key_u32(b, "tokenizer.ggml.eos_token_id", 3);
    g_key_u32(b, "tokenizer.ggml.eot_token_id", 5);
    if (with_eps) g_key_f32(b, "llama.attention.layer_norm_rms_epsilon", 1e-5f);
    g_tensor(b, "token_embd.weight", 2, 256, 10, GGUF_TYPE_F32, 0);
    if (freqs) g_tensor(b, "rope_freqs.weight", 1, (uint64_t)freqs, 1, GGUF_TYPE_F32, 10240);
    g_pad(b, 32);
    g_zeros(b, 10240);
    if (freqs) str_add(b, divisor, (size_t)freqs * sizeof *divisor);
}

static int conf_of(struct str *b, struct model_conf *c, struct err *e) {
    struct gguf g;
    *e = (struct err){ 0 };
    cr_assert(gguf_open_memory(&g, b->s, b->len, "f", e) == 0, "%s", e->text);
    int rc = conf_from_gguf(c, &g, e);
    gguf_close(&g);
    str_release(b);
    return rc;
}

Test(model_conf, gguf, .description = "GGUF metadata; llama3 divisors are recognised or refused") {
    struct str b;
    struct model_conf c;
    struct err e;
    gguf_conf(&b, "llama", true, 0, NULL);
    cr_assert(conf_of(&b, &c, &e) == 0, "%s", e.text);
    cr_expect(c.vocab == 10 && c.dim == 256 && c.kv_heads == 4 && c.head_dim == 64 && c.tied &&
              c.positions_max == 512);
    cr_expect(c.eos_count == 2 && c.eos[0] == 3 && c.eos[1] == 5 && c.bos == -1 &&
              c.rope_theta == 500000);
    gguf_conf(&b, "gemma", true, 0, NULL);
    cr_expect_eq(conf_of(&b, &c, &e), -1);
    cr_expect_str_eq(e.text, "'f': architecture 'gemma' is not supported (llama and qwen2 are)");
    gguf_conf(&b, "llama", false, 0, NULL);
    cr_expect_eq(conf_of(&b, &c, &e), -1);
    cr_expect_str_eq(e.text, "'f': key 'llama.attention.layer_norm_rms_epsilon' is missing");

    /* transformers' llama3 rule, factor 8 */
    float divisor[32];
    for (int i = 0; i < 32; i++) {
        double wave = 2 * acos(-1) * pow(500000, i / 32.0), smooth = (8192 / wave - 1) / 3;
        divisor[i] = (float)(wave < 2048 ? 1 : wave > 8192 ? 8 : 1 / ((1 - smooth) / 8 + smooth));
    }
    gguf_conf(&b, "llama", true, 32, divisor);
    cr_assert(conf_of(&b, &c, &e) == 0, "%s", e.text);
    cr_expect(c.rope_llama3.on && c.rope_llama3.factor == 8 &&
              c.rope_llama3.original_positions == 8192);
    divisor[0] = 2;
    gguf_conf(&b, "llama", true, 32, divisor);
    cr_expect_eq(conf_of(&b, &c, &e), -1);
    cr_expect_str_eq(
        e.text, "'f': tensor 'rope_freqs.weight' is no llama3 scaling (low 1, high 4, original "
                "8192); use the "
                "model's safetensors");
    gguf_conf(&b, "llama", true, 31, divisor);
    cr_expect_eq(conf_of(&b, &c, &e), -1);
    cr_expect_str_eq(e.text, "'f': tensor 'rope_freqs.weight' must be F32 with 32 elements");
}
