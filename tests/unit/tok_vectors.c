/* tok_vectors.c - the ids of 2,000 strings of every script, against those of the `tokenizers`
 * library (tests/vectors/make_tok.py): three small vocabularies, one a family, and SmolLM2's own
 * where the model is there.
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>

#include "lib/base/fs.h"
#include "lib/base/json.h"
#include "lib/model/tok.h"

#define VECTORS "tests/vectors/tok/"
#define REAL_MODEL "models/smollm2-135m-instruct/model.gguf"
enum { STRINGS = 2000, PLAIN = 200, LINES_BYTES_MAX = 16 << 20 };

static struct tok *must_open(const char *path) {
    struct tok *t = NULL;
    struct err e = { 0 };
    cr_assert(tok_open(&t, path, &e) == 0, "%s", e.text);
    return t;
}

/* The lines of a JSONL file as one array. */
static json_t *read_lines(const char *name) {
    char path[FS_PATH_MAX];
    struct str text;
    struct err e = { 0 };
    json_t *all = json_array();
    str_init(&text);
    fs_join(path, sizeof path, VECTORS, name);
    cr_assert(fs_read(&text, path, LINES_BYTES_MAX, &e) == 0, "%s", e.text);
    for (char *line = text.s, *end; (end = strchr(line, '\n')); line = end + 1) {
        json_t *v = json_parse(line, (size_t)(end - line), path, &e);
        cr_assert(v, "%s", e.text);
        json_array_append_new(all, v);
    }
    str_release(&text);
    return all;
}

static bool same(const struct tok_ids *got, const json_t *want) {
    if ((size_t)got->n != json_array_size(want)) return false;
    for (int i = 0; i < got->n; i++)
        if (json_integer_value(json_array_get(want, (size_t)i)) != got->id[i]) return false;
    return true;
}

static void compare(const struct tok *t, const json_t *strings, size_t first, const char *family,
                    bool specials) {
    char name[64];
    snprintf(name, sizeof name, "%s.%s.jsonl", family, specials ? "ids" : "plain");
    json_t *want = read_lines(name);
    size_t n = json_array_size(want), wrong = 0, i;
    json_t *row;
    cr_assert(n == json_array_size(strings) - first);
    json_array_foreach(want, i, row) {
        const json_t *s = json_array_get(strings, first + i);
        struct tok_ids got = { 0 };
        tok_encode(t, json_string_value(s), json_string_length(s), specials, &got);
        if (!same(&got, row) && wrong++ < 5) {
            char *text = json_dumps(s, JSON_ENCODE_ANY | JSON_ENSURE_ASCII),
                 *ids = json_dumps(row, JSON_COMPACT);
            cr_log_error("%s line %zu: %s want %s", name, i + 1, text, ids);
            for (int k = 0; k < got.n; k++) fprintf(stderr, "%d,", got.id[k]);
            fprintf(stderr, "\n");
            free(text);
            free(ids);
        }
        free(got.id);
    }
    cr_expect(wrong == 0, "%s: %zu of %zu differ", name, wrong, n);
    fprintf(stderr, "%s: %zu of %zu equal\n", name, n - wrong, n);
    json_decref(want);
}

static void family(const char *path, const char *name) {
    struct tok *t = must_open(path);
    json_t *strings = read_lines("strings.jsonl");
    cr_assert(json_array_size(strings) == STRINGS);
    compare(t, strings, 0, name, true);
    compare(t, strings, STRINGS - PLAIN, name, false);
    json_decref(strings);
    tok_close(&t);
}

Test(tok_vectors, smollm2_ids_are_those_of_tokenizers) { family(VECTORS "smollm2", "smollm2"); }
Test(tok_vectors, llama3_ids_are_those_of_tokenizers) { family(VECTORS "llama3", "llama3"); }
Test(tok_vectors, qwen2_ids_are_those_of_tokenizers) { family(VECTORS "qwen2", "qwen2"); }

Test(tok_vectors, gguf_metadata_give_the_same_ids) {
    const struct chat_message m = { "user", " hi " };
    struct err e = { 0 };
    struct str text;
    family(VECTORS "llama3.gguf", "llama3");
    struct tok *t = must_open(VECTORS "llama3.gguf");
    str_init(&text);
    cr_assert(tok_chat(t, NULL, &m, 1, true, &text, &e) == 0, "%s", e.text);
    cr_expect(strcmp(text.s,
                     "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
                     "<|start_header_id|>assistant<|end_header_id|>\n\n") == 0,
              "%s", text.s);
    str_release(&text);
    tok_close(&t);
}

Test(tok_vectors, smollm2_real_vocabulary_from_gguf) {
    if (!fs_exists(REAL_MODEL))
        cr_skip_test("SKIPPED: '%s' is absent (tools/fetch smollm2-135m-instruct)", REAL_MODEL);
    family(REAL_MODEL, "smollm2-real");
}

/* Where the vocabulary has every byte and nothing is normalised, decoding gives back any bytes at
 * all. */
Test(tok_vectors, llama3_decodes_to_what_was_encoded) {
    struct tok *t = must_open(VECTORS "llama3");
    json_t *strings = read_lines("strings.jsonl"), *s;
    size_t i;
    json_array_foreach(strings, i, s) {
        struct tok_ids ids = { 0 };
        struct str back;
        str_init(&back);
        tok_encode(t, json_string_value(s), json_string_length(s), i & 1, &ids);
        tok_decode(t, ids.id, ids.n, true, &back);
        cr_expect(back.len == json_string_length(s) &&
                  (!back.len || !memcmp(back.s, json_string_value(s), back.len)));
        str_release(&back);
        free(ids.id);
    }
    json_decref(strings);
    tok_close(&t);
}
