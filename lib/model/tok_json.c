/* tok_json.c - reads tokenizer.json (+ tokenizer_config.json, chat_template.jinja) of a Hugging
 * Face folder.
 *
 * What the file would have `tokenizers` do is compared with what tok_split.c and tok_bpe.c do,
 * field by field; anything else is refused by name. Patterns are compared byte for byte and never
 * executed.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/fs.h"
#include "lib/base/json.h"
#include "lib/model/tok_int.h"

static const char pattern_llama3[] =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|"
    " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
static const char pattern_qwen2[] =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}|"
    " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

static const char *type_of(const json_t *o) {
    const char *s = json_string_value(json_object_get(o, "type"));
    return s ? s : json_is_null(o) || !o ? "null" : "(no type)";
}

static bool is_type(const json_t *o, const char *type) { return strcmp(type_of(o), type) == 0; }
static bool is_true(const json_t *o, const char *key) {
    return json_is_true(json_object_get(o, key));
}
static bool is_false(const json_t *o, const char *key) {
    return json_is_false(json_object_get(o, key));
}

/* null, "" and absent mean the same in these files. */
static bool is_nothing(const json_t *v) {
    return !v || json_is_null(v) || (json_is_string(v) && !json_string_length(v));
}

static int unknown(struct err *e, const char *part, const json_t *found) {
    char *text = found ? json_dumps(found, JSON_COMPACT | JSON_ENCODE_ANY) : NULL;
    err_set(e,
            "%s is not one that we know: found %.600s (known: those of SmolLM2, Llama 3 and Qwen2)",
            part, text ? text : "null");
    free(text);
    return -1;
}

static int read_normalizer(struct tok *t, const json_t *n, struct err *e) {
    t->nfc = is_type(n, "NFC");
    return t->nfc || !n || json_is_null(n) ? 0 : unknown(e, "normalizer", n);
}

/* Two steps, the second ByteLevel: Digits + GPT-2's pattern, or Split by one of two patterns +
 * none. */
static int read_pre_tokenizer(struct tok *t, const json_t *p, struct err *e) {
    const json_t *steps = json_object_get(p, "pretokenizers");
    const json_t *first = json_array_get(steps, 0), *second = json_array_get(steps, 1);
    if (!is_type(p, "Sequence") || json_array_size(steps) != 2 || !is_type(second, "ByteLevel") ||
        !is_false(second, "add_prefix_space"))
        return unknown(e, "pre_tokenizer", p);
    bool gpt2 = !is_false(second, "use_regex");                 /* absent means true */
    if (is_type(first, "Digits")) {
        t->split = TOK_SPLIT_SMOLLM;
        return gpt2 && is_true(first, "individual_digits") ? 0 : unknown(e, "pre_tokenizer", p);
    }
    const char *pattern = json_string_value(
        json_object_get(json_object_get(first, "pattern"), "Regex"));
    const char *behavior = json_string_value(json_object_get(first, "behavior"));
    if (!is_type(first, "Split") || gpt2 || !pattern || !behavior || strcmp(behavior, "Isolated") ||
        is_true(first, "invert"))
        return unknown(e, "pre_tokenizer", p);
    if (strcmp(pattern, pattern_llama3) == 0) t->split = TOK_SPLIT_LLAMA3;
    else if (strcmp(pattern, pattern_qwen2) == 0) t->split = TOK_SPLIT_QWEN2;
    else return unknown(e, "pre_tokenizer pattern", json_object_get(first, "pattern"));
    return 0;
}

static int read_vocab(struct tok *t, const json_t *vocab, struct err *e) {
    const char *name;
    size_t bytes;
    json_t *id;
    json_object_keylen_foreach((json_t *)vocab, name, bytes, id) {
        if (!json_is_integer(id))
            return err_set(e, "token '%.40s': its id is not a whole number", name);
        if (tok_put(t, json_integer_value(id), name, bytes, TOK_FLAG_MODEL, e) < 0) return -1;
    }
    return 0;
}

static int read_merges(struct tok *t, const json_t *merges, struct err *e) {
    size_t i;
    json_t *m;
    json_array_foreach((json_t *)merges, i, m) {
        const json_t *a = json_array_get(m, 0), *b = json_array_get(m, 1);
        int rc;
        if (json_is_string(m))
            rc = tok_merge_text(t, json_string_value(m), json_string_length(m), e);
        else if (json_array_size(m) == 2 && json_is_string(a) && json_is_string(b))
            rc = tok_merge(t, json_string_value(a), json_string_length(a), json_string_value(b),
                           json_string_length(b), e);
        else
            rc = err_set(e, "merge %zu is neither \"a b\" nor [\"a\", \"b\"]", i);
        if (rc < 0) return -1;
    }
    return 0;
}

static int read_added(struct tok *t, const json_t *added, struct err *e) {
    size_t i;
    json_t *a;
    json_array_foreach((json_t *)added, i, a) {
        const json_t *content = json_object_get(a, "content"), *id = json_object_get(a, "id");
        if (!json_is_string(content) || !json_is_integer(id))
            return err_set(e, "added token %zu lacks its content or id", i);
        const char *name = json_string_value(content);
        if (is_true(a, "lstrip") || is_true(a, "rstrip") || is_true(a, "single_word"))
            return err_set(
                e, "added token '%.40s' sets lstrip, rstrip or single_word, which we do not do",
                name);
        unsigned flags = TOK_FLAG_ADDED | (is_true(a, "special") ? TOK_FLAG_SPECIAL : 0u) |
                         (is_true(a, "normalized") ? TOK_FLAG_NORMALIZED : 0u);
        if (tok_add_flags(t, json_integer_value(id), name, json_string_length(content), flags, e) <
            0)
            return -1;
    }
    return 0;
}

/* How many ids there are: the vocabulary and those added tokens that it lacks. */
static size_t ids_count(const json_t *vocab, const json_t *added) {
    size_t n = json_object_size(vocab), i;
    json_t *a;
    json_array_foreach((json_t *)added, i, a) {
        const json_t *c = json_object_get(a, "content");
        n += !json_is_string(c) ||
             !json_object_getn(vocab, json_string_value(c), json_string_length(c));
    }
    return n;
}

static int read_model(struct tok *t, const json_t *model, const json_t *added, struct err *e) {
    const json_t *vocab = json_object_get(model, "vocab"),
                 *merges = json_object_get(model, "merges");
    if (json_is_object(model) && !json_object_get(model, "type") && vocab && merges) {
        /* files of 2020-2022 leave the type out */
    } else if (!is_type(model, "BPE")) {
        return err_set(e, "model type '%s' is not BPE", type_of(model));
    }
    if (!json_is_object(vocab) || !json_is_array(merges))
        return err_set(e, "model has no vocab object or no merges array");
    const json_t *dropout = json_object_get(model, "dropout");
    if ((dropout && !json_is_null(dropout)) || is_true(model, "byte_fallback") ||
        !is_nothing(json_object_get(model, "continuing_subword_prefix")) ||
        !is_nothing(json_object_get(model, "end_of_word_suffix")))
        return err_set(
            e,
            "model sets dropout, byte_fallback, continuing_subword_prefix or end_of_word_suffix, "
            "which byte-level BPE does not have");
    size_t ids = ids_count(vocab, added), rows = json_array_size(merges);
    if (ids > TOK_IDS_MAX || rows > TOK_MERGES_MAX)
        return err_set(e, "%zu tokens and %zu merges are more than %d and %d", ids, rows,
                       TOK_IDS_MAX, TOK_MERGES_MAX);
    tok_reserve(t, ids, rows);
    t->whole_words = is_true(model, "ignore_merges");
    t->unk_fuse = is_true(model, "fuse_unk");
    if (read_vocab(t, vocab, e) < 0 || read_merges(t, merges, e) < 0) return -1;
    const json_t *unk = json_object_get(model, "unk_token");
    if (json_is_string(unk)) {
        t->unk = tok_find(t, json_string_value(unk), json_string_length(unk));
        if (t->unk < 0)
            return err_set(e, "unk_token '%.40s' is not in the vocabulary", json_string_value(unk));
    }
    return 0;
}

static int read_tokenizer(struct tok *t, const json_t *root, struct err *e) {
    const json_t *added = json_object_get(root, "added_tokens"),
                 *decoder = json_object_get(root, "decoder");
    if (!json_is_object(root)) return err_set(e, "not a JSON object");
    if (read_normalizer(t, json_object_get(root, "normalizer"), e) < 0) return -1;
    if (read_pre_tokenizer(t, json_object_get(root, "pre_tokenizer"), e) < 0) return -1;
    if (!is_type(decoder, "ByteLevel")) return unknown(e, "decoder", decoder);
    if (read_model(t, json_object_get(root, "model"), added, e) < 0) return -1;
    if (read_added(t, added, e) < 0) return -1;
    return tok_seal(t, e);
}

/* ---- tokenizer_config.json ---- */

/* "chat_template": text, or a list of {name, template} of which "default" counts. */
static const json_t *template_of(const json_t *config) {
    const json_t *v = json_object_get(config, "chat_template");
    size_t i;
    json_t *row;
    json_array_foreach((json_t *)v, i, row) {
        const char *name = json_string_value(json_object_get(row, "name"));
        if (name && strcmp(name, "default") == 0) return json_object_get(row, "template");
    }
    return v;
}

static int read_config(struct tok *t, const char *dir, struct err *e) {
    char path[FS_PATH_MAX];
    fs_join(path, sizeof path, dir, "tokenizer_config.json");
    if (fs_exists(path)) {
        json_t *config = json_parse_file(path, TOK_CONFIG_BYTES_MAX, e);
        if (!config) return -1;
        const json_t *text = template_of(config), *bos = json_object_get(config, "bos_token");
        if (json_is_object(bos)) bos = json_object_get(bos, "content");
        if (json_is_string(text))
            str_add(&t->template, json_string_value(text), json_string_length(text));
        if (json_is_string(bos)) t->bos = mem_dup(json_string_value(bos));
        json_decref(config);
    }
    fs_join(path, sizeof path, dir, "chat_template.jinja");
    if (!fs_exists(path)) return 0;
    str_clear(&t->template);
    return fs_read(&t->template, path, TOK_TEMPLATE_BYTES_MAX, e);
}

int tok_read_json(struct tok *t, const char *text, size_t bytes, const char *where, struct err *e) {
    json_t *root = json_parse(text, bytes, where, e);
    if (!root) return -1;
    sha256_of(text, bytes, t->sha256);
    int rc = read_tokenizer(t, root, e);
    json_decref(root);
    return rc < 0 ? err_wrap(e, "%s", where) : 0;
}

int tok_open_json(struct tok *t, const char *dir, struct err *e) {
    char path[FS_PATH_MAX];
    struct str text;
    str_init(&text);
    fs_join(path, sizeof path, dir, "tokenizer.json");
    int rc = fs_read(&text, path, TOK_JSON_BYTES_MAX, e);
    if (rc == 0) rc = tok_read_json(t, text.s ? text.s : "", text.len, path, e);
    str_release(&text);
    return rc < 0 ? -1 : read_config(t, dir, e);
}
