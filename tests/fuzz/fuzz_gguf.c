/* fuzz_gguf.c - any bytes as a GGUF file: refused with a message, or all metadata and tensors
 * readable and a configuration accepted or refused. Built like fuzz_safetensors.c.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/conf.h"
#include "tests/fuzz/replay.h"

static void read_all(const struct gguf *g) {
    static float block[256];
    struct gguf_string s;
    for (int i = 0; i < g->keys; i++) {
        const struct gguf_kv *kv = &g->kv[i];
        const uint8_t *at = kv->data;
        for (uint64_t k = 0; k < kv->count; k++)
            if (kv->of == GGUF_KIND_STRING) at = gguf_string_next(at, &s);
            else (void)(gguf_int_at(kv, k) + (int64_t)(gguf_num_at(kv, k) > 0));
    }
    for (int i = 0; i < g->tensors; i++) {
        const struct gguf_tensor *t = &g->tensor[i];
        int elements, bytes;
        gguf_type_block(t->type, &elements, &bytes);
        if (gguf_tensor_find(g, t->name) != t) abort();
        gguf_dequant(t->type, t->data + t->bytes - bytes, elements, block);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
    struct gguf g;
    struct err e = { 0 };
    struct model_conf c;
    if (gguf_open_memory(&g, data, bytes, "fuzz", &e) < 0) {
        if (!e.text[0]) abort();
        return 0;
    }
    read_all(&g);
    if (conf_from_gguf(&c, &g, &e) < 0 && !e.text[0]) abort();
    gguf_close(&g);
    return 0;
}
