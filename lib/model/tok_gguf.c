/* tok_gguf.c - reads the tokenizer out of GGUF metadata.
 *
 * tokenizer.ggml.pre names the pre-tokenizer. GGUF leaves out what tokenizer.json says beside it,
 * so the rest is that of the model's family: Qwen2 normalises to NFC, Llama 3 takes whole words
 * first. Added tokens are those of type control (special) and user-defined (not special).
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/gguf.h"
#include "lib/model/tok_int.h"

enum { TYPE_NORMAL = 1, TYPE_UNKNOWN = 2, TYPE_CONTROL = 3, TYPE_USER = 4, TYPE_UNUSED = 5 };

static const struct pre {
    const char *name;
    enum tok_split split;
    bool nfc, whole_words;
} pres[] = {
    { "smollm", TOK_SPLIT_SMOLLM, false, false }, { "llama-bpe", TOK_SPLIT_LLAMA3, false, true },
    { "llama3", TOK_SPLIT_LLAMA3, false, true },  { "llama-v3", TOK_SPLIT_LLAMA3, false, true },
    { "qwen2", TOK_SPLIT_QWEN2, true, false },
};

static bool same(struct gguf_string a, const char *b) {
    return a.bytes == strlen(b) && memcmp(a.s, b, a.bytes) == 0;
}

static int read_pre(struct tok *t, const struct gguf *g, struct err *e) {
    struct gguf_string model = { "(none)", 6 }, pre = { "(none)", 6 };
    gguf_text(g, "tokenizer.ggml.model", &model);
    gguf_text(g, "tokenizer.ggml.pre", &pre);
    if (!same(model, "gpt2"))
        return err_set(e, "tokenizer.ggml.model is '%.*s', not gpt2 (byte-level BPE)",
                       SHOWN(model.s, model.bytes));
    for (size_t i = 0; i < COUNT_OF(pres); i++) {
        if (!same(pre, pres[i].name)) continue;
        t->split = pres[i].split;
        t->nfc = pres[i].nfc;
        t->whole_words = pres[i].whole_words;
        return 0;
    }
    return err_set(e, "tokenizer.ggml.pre '%.*s' is not one that we know: smollm, llama-bpe, qwen2",
                   SHOWN(pre.s, pre.bytes));
}

static const struct gguf_kv *array(const struct gguf *g, const char *key, enum gguf_kind of,
                                   uint64_t most, struct err *e) {
    const struct gguf_kv *kv = gguf_find(g, key);
    if (!kv || kv->kind != GGUF_KIND_ARRAY || kv->of != of || kv->count > most)
        return err_set(e, "%s is missing, of a wrong kind or longer than %llu", key,
                       (unsigned long long)most),
               NULL;
    return kv;
}

static unsigned flags_of(int64_t type) {
    switch (type) {
    case TYPE_CONTROL: return TOK_FLAG_ADDED | TOK_FLAG_SPECIAL;
    case TYPE_USER: return TOK_FLAG_ADDED;
    default: return TOK_FLAG_MODEL;
    }
}

static int read_tables(struct tok *t, const struct gguf *g, struct sha256 *sum, struct err *e) {
    const struct gguf_kv *tokens = array(g, "tokenizer.ggml.tokens", GGUF_KIND_STRING, TOK_IDS_MAX,
                                         e);
    const struct gguf_kv *types =
        tokens ? array(g, "tokenizer.ggml.token_type", GGUF_KIND_I32, TOK_IDS_MAX, e) : NULL;
    const struct gguf_kv *merges =
        types ? array(g, "tokenizer.ggml.merges", GGUF_KIND_STRING, TOK_MERGES_MAX, e) : NULL;
    if (!merges) return -1;
    if (types->count != tokens->count)
        return err_set(e, "there are not as many token types as tokens");
    tok_reserve(t, tokens->count, merges->count);
    struct gguf_string s;
    const uint8_t *at = tokens->data;
    for (uint64_t i = 0; i < tokens->count; i++) {
        at = gguf_string_next(at, &s);
        if (tok_put(t, (int64_t)i, s.s, s.bytes, flags_of(gguf_int_at(types, i)), e) < 0) return -1;
    }
    sha256_add(sum, tokens->data, (size_t)(at - tokens->data));
    sha256_add(sum, types->data, tokens->count * sizeof(int32_t));
    at = merges->data;
    for (uint64_t i = 0; i < merges->count; i++) {
        at = gguf_string_next(at, &s);
        if (tok_merge_text(t, s.s, s.bytes, e) < 0) return -1;
    }
    sha256_add(sum, merges->data, (size_t)(at - merges->data));
    return tok_seal(t, e);
}

/* The sum covers pre, tokens, types, merges (as stored) and the chat template. */
int tok_open_gguf(struct tok *t, const char *path, struct err *e) {
    struct gguf g = { 0 };
    struct sha256 sum;
    struct gguf_string text;
    int64_t bos;
    sha256_init(&sum);
    if (gguf_open(&g, path, e) < 0) return -1;
    int rc = read_pre(t, &g, e);
    if (rc == 0 && gguf_text(&g, "tokenizer.ggml.pre", &text)) sha256_add(&sum, text.s, text.bytes);
    if (rc == 0) rc = read_tables(t, &g, &sum, e);
    if (rc == 0 && gguf_text(&g, "tokenizer.chat_template", &text)) {
        if (text.bytes > TOK_TEMPLATE_BYTES_MAX)
            rc = err_set(e, "tokenizer.chat_template is too long");
        else str_add(&t->template, text.s, text.bytes);
        sha256_add(&sum, text.s, text.bytes);
    }
    if (rc == 0 && gguf_int(&g, "tokenizer.ggml.bos_token_id", &bos) && bos >= 0 && bos < t->ids) {
        struct str name;
        str_init(&name);
        str_add(&name, t->names.s + t->name[bos].at, t->name[bos].bytes);
        t->bos = name.s;
    }
    sha256_hex(&sum, t->sha256);
    if (rc < 0) err_wrap(e, "%s", path);
    gguf_close(&g);
    return rc;
}
