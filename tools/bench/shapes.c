/* shapes.c - see shapes.h. Numbers from the models' config.json; tiny is nobody's: every part
 * of the program runs on it in seconds, on an emulated device too.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tools/bench/shapes.h"

const char *const shape_name[SHAPE_COUNT] = { "tiny", "135m", "0.5b", "1.5b", "7b" };

const struct model_conf shape_conf[SHAPE_COUNT] = {
    [SHAPE_TINY] = { .arch = MODEL_ARCH_QWEN2, .vocab = 300, .dim = 64, .layers = 2, .heads = 4,
                     .kv_heads = 2, .head_dim = 16, .ffn_dim = 96, .positions_max = 1024,
                     .norm_eps = 1e-6f, .rope_theta = 1e6f, .tied = true, .qkv_bias = true,
                     .bos = -1 },
    [SHAPE_135M] = { .arch = MODEL_ARCH_LLAMA, .vocab = 49152, .dim = 576, .layers = 30,
                     .heads = 9, .kv_heads = 3, .head_dim = 64, .ffn_dim = 1536,
                     .positions_max = 8192, .norm_eps = 1e-5f, .rope_theta = 1e5f, .tied = true,
                     .bos = -1 },
    [SHAPE_05B] = { .arch = MODEL_ARCH_QWEN2, .vocab = 151936, .dim = 896, .layers = 24,
                    .heads = 14, .kv_heads = 2, .head_dim = 64, .ffn_dim = 4864,
                    .positions_max = 32768, .norm_eps = 1e-6f, .rope_theta = 1e6f, .tied = true,
                    .qkv_bias = true, .bos = -1 },
    [SHAPE_15B] = { .arch = MODEL_ARCH_QWEN2, .vocab = 151936, .dim = 1536, .layers = 28,
                    .heads = 12, .kv_heads = 2, .head_dim = 128, .ffn_dim = 8960,
                    .positions_max = 32768, .norm_eps = 1e-6f, .rope_theta = 1e6f, .tied = true,
                    .qkv_bias = true, .bos = -1 },
    [SHAPE_7B] = { .arch = MODEL_ARCH_QWEN2, .vocab = 152064, .dim = 3584, .layers = 28,
                   .heads = 28, .kv_heads = 4, .head_dim = 128, .ffn_dim = 18944,
                   .positions_max = 32768, .norm_eps = 1e-6f, .rope_theta = 1e6f,
                   .qkv_bias = true, .bos = -1 },
};

struct lora_shape shape_lora(int rank) {
    struct lora_shape s = { .rank = rank, .alpha = (float)rank };
    for (int p = 0; p < PROJ_COUNT; p++) s.on[p] = true;
    return s;
}

struct shape_size shape_size(const struct model_conf *c, int rank) {
    struct shape_size s = { .head = (double)c->vocab * c->dim,
                            .kv_bytes = 4. * c->layers * c->kv_heads * c->head_dim,
                            .layers = c->layers,
                            .q_dim = c->heads * c->head_dim };
    for (int p = 0; p < PROJ_COUNT; p++) {
        int out, in;
        model_proj_shape(c, (enum proj)p, &out, &in);
        s.body += (double)out * in * c->layers;
        s.lora += (double)rank * (out + in) * c->layers;
    }
    return s;
}
