/* tok_hostile.c - tokenizer files that must be refused with a reason, words that must not take for
 * ever, bytes that are not UTF-8.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/fs.h"

#include <criterion/criterion.h>
#include <unistd.h>

#include "lib/base/json.h"
#include "lib/base/rng.h"
#include "lib/model/tok_int.h"

#define VECTORS "tests/vectors/tok/"
enum { BYTES_MAX = 4 << 20, WORD_BYTES = 1 << 20 };

/* The small tokenizer of a family, changed by whoever calls. */
static json_t *load(const char *family) {
    char path[FS_PATH_MAX];
    struct err e = { 0 };
    snprintf(path, sizeof path, VECTORS "%s/tokenizer.json", family);
    json_t *root = json_parse_file(path, BYTES_MAX, &e);
    cr_assert(root, "%s", e.text);
    return root;
}

static int open_text(struct tok **t, const char *text, size_t bytes, struct err *e) {
    char dir[] = "/tmp/qerl-tok-XXXXXX", path[FS_PATH_MAX];
    struct err ignored;
    cr_assert(mkdtemp(dir));
    fs_join(path, sizeof path, dir, "tokenizer.json");
    cr_assert(fs_replace(path, text, bytes, e) == 0, "%s", e->text);
    int rc = tok_open(t, dir, e);
    fs_remove_tree(dir, &ignored);
    return rc;
}

static void expect_refused_text(const char *text, size_t bytes, const char *why) {
    struct tok *t = NULL;
    struct err e = { 0 };
    int rc = open_text(&t, text, bytes, &e);
    cr_expect(rc < 0 && !t && e.code == EXIT_ENV, "opened: %s", why);
    cr_expect(strstr(e.text, why), "want '%s', got: %.300s", why, e.text);
    if (rc == 0) tok_close(&t);
}

/* Takes root. */
static void expect_refused(json_t *root, const char *why) {
    char *text = json_dumps(root, JSON_COMPACT);
    expect_refused_text(text, strlen(text), why);
    free(text);
    json_decref(root);
}

static json_t *model(json_t *root) { return json_object_get(root, "model"); }
static json_t *vocab(json_t *root) { return json_object_get(model(root), "vocab"); }
static json_t *merges(json_t *root) { return json_object_get(model(root), "merges"); }
static json_t *step(json_t *root, size_t i) {
    return json_array_get(json_object_get(json_object_get(root, "pre_tokenizer"), "pretokenizers"),
                          i);
}
static json_t *added(json_t *root, size_t i) {
    return json_array_get(json_object_get(root, "added_tokens"), i);
}

Test(tok_hostile, refuses_pipelines_that_it_does_not_know) {
    json_t *r = load("qwen2");
    json_object_set_new(json_object_get(step(r, 0), "pattern"), "Regex", json_string("(a+)+$"));
    expect_refused(r, "(a+)+$");
    r = load("qwen2");
    json_object_set_new(step(r, 0), "behavior", json_string("Removed"));
    expect_refused(r, "pre_tokenizer");
    r = load("qwen2");
    json_object_set_new(step(r, 0), "invert", json_true());
    expect_refused(r, "pre_tokenizer");
    r = load("llama3");
    json_object_set_new(step(r, 1), "add_prefix_space", json_true());
    expect_refused(r, "pre_tokenizer");
    r = load("llama3");
    json_object_set_new(step(r, 1), "use_regex", json_true());
    expect_refused(r, "pre_tokenizer");
    r = load("smollm2");
    json_object_set_new(step(r, 0), "individual_digits", json_false());
    expect_refused(r, "pre_tokenizer");
    r = load("smollm2");
    json_object_set_new(r, "pre_tokenizer", json_null());
    expect_refused(r, "pre_tokenizer");
    r = load("smollm2");
    json_object_set_new(r, "normalizer", json_pack("{s:s}", "type", "NFKC"));
    expect_refused(r, "NFKC");
    r = load("smollm2");
    json_object_set_new(r, "decoder", json_pack("{s:s}", "type", "Metaspace"));
    expect_refused(r, "Metaspace");
    r = load("smollm2");
    json_object_set_new(model(r), "type", json_string("Unigram"));
    expect_refused(r, "Unigram");
    r = load("smollm2");
    json_object_set_new(model(r), "byte_fallback", json_true());
    expect_refused(r, "byte_fallback");
    r = load("smollm2");
    json_object_set_new(added(r, 0), "lstrip", json_true());
    expect_refused(r, "lstrip");
}

Test(tok_hostile, refuses_broken_vocabularies) {
    json_t *r = load("qwen2");
    json_object_set_new(vocab(r), "a", json_incref(json_object_get(vocab(r), "b")));
    expect_refused(r, "two tokens");
    r = load("qwen2");
    json_object_set_new(vocab(r), "gap", json_integer(1 << 19));
    expect_refused(r, "dense");
    r = load("qwen2");
    json_object_set_new(vocab(r), "far", json_integer(INT64_MAX));
    expect_refused(r, "dense");
    r = load("qwen2");
    json_object_set_new(vocab(r), "below", json_integer(-1));
    expect_refused(r, "dense");
    r = load("qwen2");
    json_object_set_new(vocab(r), "half", json_real(0.5));
    expect_refused(r, "not a whole number");
    r = load("qwen2");
    json_object_set_new(vocab(r), "", json_integer((json_int_t)json_object_size(vocab(r))));
    expect_refused(r, "0 bytes");
    r = load("qwen2");
    json_object_set_new(added(r, 0), "id", json_integer(5));
    expect_refused(r, "two tokens");
    r = load("qwen2");
    json_array_append(json_object_get(r, "added_tokens"), added(r, 0));
    expect_refused(r, "listed twice");
    r = load("qwen2");
    json_object_set_new(added(r, 0), "content", json_string("a"));
    expect_refused(r, "the vocabulary gives it id");
    r = load("qwen2");
    json_object_set_new(model(r), "vocab", json_array());
    expect_refused(r, "no vocab");
    r = load("qwen2");
    json_object_set_new(model(r), "unk_token", json_string("<none>"));
    expect_refused(r, "unk_token");
}

/* Without the byte 'A' text is lost; SmolLM2 really lacks 0x04, and what it drops is what
 * `tokenizers` drops. */
Test(tok_hostile, refuses_a_vocabulary_that_would_lose_text) {
    json_t *r = load("llama3");
    json_int_t id = json_integer_value(json_object_get(vocab(r), "A"));
    json_object_del(vocab(r), "A");
    json_object_set_new(vocab(r), "~~~", json_integer(id));
    json_array_clear(merges(r));
    expect_refused(r, "byte 0x41");
}

Test(tok_hostile, refuses_broken_merges) {
    json_t *r = load("smollm2");
    json_array_append_new(merges(r), json_string("nosuchpart a"));
    expect_refused(r, "'nosuchpart' is not in the vocabulary");
    r = load("smollm2");
    json_array_append_new(merges(r), json_string("~ ^"));
    expect_refused(r, "its result '~^'");
    r = load("smollm2");
    json_array_append(merges(r), json_array_get(merges(r), 0));
    expect_refused(r, "are the same");
    r = load("smollm2");
    json_array_append_new(merges(r), json_string("a b c"));
    expect_refused(r, "not two parts");
    r = load("smollm2");
    json_array_append_new(merges(r), json_string("ab"));
    expect_refused(r, "not two parts");
    r = load("llama3");
    json_array_append_new(merges(r), json_pack("[s,s,s]", "a", "b", "c"));
    expect_refused(r, "is neither");
    r = load("llama3");
    json_array_append_new(merges(r), json_integer(3));
    expect_refused(r, "is neither");
}

Test(tok_hostile, refuses_texts_that_are_no_tokenizer) {
    static char deep[200000];
    memset(deep, '[', sizeof deep);
    expect_refused_text(deep, sizeof deep, "not valid JSON");
    expect_refused_text("", 0, "not valid JSON");
    expect_refused_text("[]", 2, "not a JSON object");
    expect_refused_text("{}", 2, "pre_tokenizer");
    expect_refused_text("{\"a\":1,\"a\":2}", 13, "duplicate");
    char *long_name = mem_alloc(TOK_NAME_BYTES_MAX + 2);
    memset(long_name, 'x', TOK_NAME_BYTES_MAX + 1);
    json_t *r = load("smollm2");
    json_object_set_new(added(r, 0), "content", json_string(long_name));
    expect_refused(r, "4097 bytes");
    free(long_name);
}

/* Every prefix of a good file, and the file with single bytes changed, is opened or refused;
 * nothing else happens. */
Test(tok_hostile, survives_damaged_files) {
    struct str text;
    struct err e = { 0 };
    str_init(&text);
    cr_assert(fs_read(&text, VECTORS "smollm2/tokenizer.json", BYTES_MAX, &e) == 0, "%s", e.text);
    for (int i = 0; i < 200; i++) {
        uint64_t r = rng_mix64((uint64_t)i);
        size_t at = (size_t)(r % text.len);
        struct tok *t = NULL;
        char old = text.s[at];
        if (i & 1) text.s[at] = (char)(r >> 40);
        if (open_text(&t, text.s, i & 1 ? text.len : at, &e) == 0) tok_close(&t);
        text.s[at] = old;
    }
    str_release(&text);
}

/* Words of 1 MiB: one letter, letters at random, marks in falling order (the worst case of sorting
 * them for NFC), blanks. */
Test(tok_hostile, encodes_a_word_of_a_megabyte, .timeout = 120) {
    static const char *const families[] = { "smollm2", "llama3", "qwen2" };
    char *word = mem_alloc(WORD_BYTES);
    for (size_t f = 0; f < COUNT_OF(families); f++) {
        for (int kind = 0; kind < 4; kind++) {
            char path[FS_PATH_MAX];
            struct tok *t = NULL;
            struct err e = { 0 };
            struct tok_ids ids = { 0 };
            struct str back;
            str_init(&back);
            for (size_t i = 0; i < WORD_BYTES; i += 2) {
                uint64_t r = rng_mix64(i);
                /* class 230, then 220 */
                const char *mark = i < WORD_BYTES / 2 ? "\xcc\x81" : "\xcc\xa3";
                word[i] = kind == 0   ? 'e'
                          : kind == 1 ? (char)('a' + r % 20)
                          : kind == 2 ? mark[0]
                                      : ' ';
                word[i + 1] = kind == 0   ? 'e'
                              : kind == 1 ? (char)('a' + (r >> 32) % 20)
                              : kind == 2 ? mark[1]
                                          : ' ';
            }
            snprintf(path, sizeof path, VECTORS "%s", families[f]);
            cr_assert(tok_open(&t, path, &e) == 0, "%s", e.text);
            tok_encode(t, word, WORD_BYTES, true, &ids);
            tok_decode(t, ids.id, ids.n, true, &back);
            cr_expect(back.len == WORD_BYTES);
            cr_expect(f == 2 || !memcmp(back.s, word, WORD_BYTES));
            str_release(&back);
            free(ids.id);
            tok_close(&t);
        }
    }
    free(word);
}

Test(tok_hostile, encodes_bytes_that_are_not_utf8_one_by_one) {
    static const char text[] = "a\xff\xfe e\xcc\x81\xc3(\xed\xa0\x80\xf8\x88 \xf0\x9f\x98";
    const char *const families[] = { "llama3", "qwen2" };
    for (size_t f = 0; f < 2; f++) {
        char path[FS_PATH_MAX];
        struct tok *t = NULL;
        struct err e = { 0 };
        struct tok_ids ids = { 0 };
        struct str back;
        str_init(&back);
        snprintf(path, sizeof path, VECTORS "%s", families[f]);
        cr_assert(tok_open(&t, path, &e) == 0, "%s", e.text);
        tok_encode(t, text, sizeof text - 1, true, &ids);
        tok_decode(t, ids.id, ids.n, true, &back);
        const char *want = f ? "a\xff\xfe \xc3\xa9\xc3(\xed\xa0\x80\xf8\x88 \xf0\x9f\x98" : text;
        cr_expect(strcmp(back.s, want) == 0);
        str_release(&back);
        free(ids.id);
        tok_close(&t);
    }
}

Test(tok, names_specials_and_leaves_them_out) {
    struct tok *t = NULL;
    struct err e = { 0 };
    struct str text;
    str_init(&text);
    cr_assert(tok_open(&t, VECTORS "qwen2", &e) == 0, "%s", e.text);
    int32_t start = tok_id(t, "<|im_start|>"), call = tok_id(t, "<tool_call>");
    cr_expect(start >= 0 && call >= 0 && tok_id(t, "<|nope|>") == -1);
    cr_expect(tok_is_special(t, start) && !tok_is_special(t, call) && !tok_is_special(t, -1) &&
              !tok_is_special(t, 1 << 30));
    cr_expect(tok_vocab(t) > start && strlen(tok_sha256(t)) == 64);
    const int32_t ids[] = { start, call, -5, 1 << 30, start };
    tok_decode(t, ids, COUNT_OF(ids), false, &text);
    cr_expect(strcmp(text.s, "<tool_call>") == 0);
    str_clear(&text);
    tok_decode(t, ids, COUNT_OF(ids), true, &text);
    cr_expect(strcmp(text.s, "<|im_start|><tool_call><|im_start|>") == 0);
    str_release(&text);
    tok_close(&t);
    cr_expect(t == NULL);
    tok_close(&t);
    cr_expect(tok_open(&t, "/nonexistent", &e) < 0 && e.code == EXIT_ENV);
}
