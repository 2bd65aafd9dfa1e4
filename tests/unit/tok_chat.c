/* tok_chat.c - conversations against transformers' apply_chat_template (tests/vectors/make_tok.py),
 * and templates that must be refused.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/fs.h"

#include <criterion/criterion.h>
#include <unistd.h>

#include "lib/base/json.h"
#include "lib/model/tok.h"

#define VECTORS "tests/vectors/tok/"
enum { BYTES_MAX = 4 << 20, MESSAGES_MAX = 16 };

struct model_dir { char path[64]; };

/* A model folder with the small Llama vocabulary and this chat template. */
static struct tok *open_with(struct model_dir *d, const char *template, size_t bytes) {
    static const char config[] = "{\"bos_token\":{\"content\":\"<|begin_of_text|>\"}}";
    char path[FS_PATH_MAX];
    struct err e = { 0 };
    struct str tokenizer;
    struct tok *t = NULL;
    str_init(&tokenizer);
    strcpy(d->path, "/tmp/qerl-tok-chat-XXXXXX");
    cr_assert(mkdtemp(d->path));
    cr_assert(fs_read(&tokenizer, VECTORS "llama3/tokenizer.json", BYTES_MAX, &e) == 0, "%s",
              e.text);
    fs_join(path, sizeof path, d->path, "tokenizer.json");
    cr_assert(fs_replace(path, tokenizer.s, tokenizer.len, &e) == 0);
    fs_join(path, sizeof path, d->path, "tokenizer_config.json");
    cr_assert(fs_replace(path, config, sizeof config - 1, &e) == 0);
    fs_join(path, sizeof path, d->path, "chat_template.jinja");
    cr_assert(fs_replace(path, template, bytes, &e) == 0);
    cr_assert(tok_open(&t, d->path, &e) == 0, "%s", e.text);
    str_release(&tokenizer);
    return t;
}

static void close_with(struct model_dir *d, struct tok **t) {
    struct err e;
    tok_close(t);
    fs_remove_tree(d->path, &e);
}

static int read_messages(const json_t *list, struct chat_message m[MESSAGES_MAX]) {
    int n = (int)json_array_size(list);
    cr_assert(n <= MESSAGES_MAX);
    for (int i = 0; i < n; i++) {
        const json_t *o = json_array_get(list, (size_t)i);
        m[i] = (struct chat_message){ json_string_value(json_object_get(o, "role")),
                                      json_string_value(json_object_get(o, "content")) };
    }
    return n;
}

/* One row of chat.jsonl; chat NULL: the template is recognised. */
static void expect_row(const struct tok *t, const char *chat, const json_t *row) {
    struct chat_message m[MESSAGES_MAX];
    struct err e = { 0 };
    struct str got;
    const char *want = json_string_value(json_object_get(row, "text"));
    int n = read_messages(json_object_get(row, "messages"), m);
    str_init(&got);
    int rc = tok_chat(t, chat, m, n, json_is_true(json_object_get(row, "add_prompt")), &got, &e);
    cr_assert(rc == 0, "%s", e.text);
    cr_expect(strcmp(got.s, want) == 0, "%s: got\n%s\nwant\n%s",
              json_string_value(json_object_get(row, "template")), got.s, want);
    str_release(&got);
}

static json_t *read_rows(void) {
    struct str text;
    struct err e = { 0 };
    json_t *rows = json_array();
    str_init(&text);
    cr_assert(fs_read(&text, VECTORS "chat.jsonl", BYTES_MAX, &e) == 0, "%s", e.text);
    for (char *line = text.s, *end; (end = strchr(line, '\n')); line = end + 1)
        json_array_append_new(rows, json_parse(line, (size_t)(end - line), "chat.jsonl", &e));
    str_release(&text);
    return rows;
}

Test(tok_chat, renders_what_transformers_renders) {
    json_t *rows = read_rows(), *row;
    struct model_dir d = { "" };
    struct tok *t = NULL;
    char last[64] = "";
    size_t i;
    json_array_foreach(rows, i, row) {
        const char *name = json_string_value(json_object_get(row, "template"));
        if (strcmp(name, last)) {
            char path[FS_PATH_MAX];
            struct str text;
            struct err e = { 0 };
            str_init(&text);
            if (t) close_with(&d, &t);
            fs_join(path, sizeof path, VECTORS "templates", name);
            cr_assert(fs_read(&text, path, BYTES_MAX, &e) == 0, "%s", e.text);
            t = open_with(&d, text.s, text.len);
            str_release(&text);
            snprintf(last, sizeof last, "%s", name);
        }
        expect_row(t, NULL, row);
    }
    fprintf(stderr, "chat.jsonl: %zu conversations\n", json_array_size(rows));
    close_with(&d, &t);
    json_decref(rows);
}

Test(tok_chat, renders_the_same_by_the_family_s_name) {
    static const char *const named[] = { "chatml", "qwen2",    "qwen2.5", "smollm2",
                                         "llama3", "llama3.1", "llama3.2" };
    json_t *rows = read_rows(), *row;
    struct model_dir d;
    struct tok *t = open_with(&d, "{{ nonsense }}", 14);
    size_t i, seen = 0;
    json_array_foreach(rows, i, row) {
        const char *name = json_string_value(json_object_get(row, "template"));
        for (size_t k = 0; k < COUNT_OF(named); k++) {
            if (strncmp(name, named[k], strlen(named[k])) ||
                strcmp(name + strlen(named[k]), ".jinja"))
                continue;
            expect_row(t, named[k], row);
            seen++;
        }
    }
    cr_expect(seen == 7 * 22);
    close_with(&d, &t);
    json_decref(rows);
}

static void expect_refused(const char *template) {
    const struct chat_message m[] = { { "user", "hi" } };
    struct model_dir d;
    struct err e = { 0 };
    struct str out;
    struct tok *t = open_with(&d, template, strlen(template));
    str_init(&out);
    cr_expect(tok_chat(t, NULL, m, 1, true, &out, &e) < 0, "rendered: %s\nof: %s", out.s, template);
    cr_expect(e.code == EXIT_CONFIG && strstr(e.text, "set model.chat"), "%s", e.text);
    str_release(&out);
    close_with(&d, &t);
}

#define SAY "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
#define PROMPT "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"

Test(tok_chat, refuses_a_template_that_it_cannot_vouch_for) {
    expect_refused("");
    expect_refused("{");
    expect_refused("{{");
    expect_refused("{% if %}");
    expect_refused("{% endif %}{% endfor %}");
    expect_refused("{% include 'x' %}");
    expect_refused("{% for message in messages %}" SAY "{% endfor %}");
    expect_refused("{% for message in messages %}" SAY "{% endfor %}" PROMPT "{% endfor %}");
    expect_refused("{% for message in messages[1:] %}" SAY "{% endfor %}" PROMPT);
    /* a blank that is printed */
    expect_refused("{% for message in messages %}" SAY " {% endfor %}" PROMPT);
    expect_refused("{% for message in messages %}" SAY "\n\n{% endfor %}" PROMPT);
    expect_refused("{% for message in messages %}" SAY "{{ eos_token }}{% endfor %}" PROMPT);
    expect_refused("{% set add_generation_prompt = false %}{% for message in messages %}" SAY
                   "{% endfor %}" PROMPT);
    expect_refused("{% for message in messages %}" SAY
                   "{% endfor %}{% set messages = [] %}" PROMPT);
    expect_refused("{% for message in messages %}" SAY "{% endfor %}{% if add_generation_prompt %}"
                   "{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}");
    expect_refused("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + "
                   "message['content'] | trim + "
                   "'<|im_end|>' + '\\n'}}{% endfor %}" PROMPT);
    expect_refused("{% for message in messages %}{{'<\\x7cim_start|>' + message['role'] + '\\n' + "
                   "message['content'] + "
                   "'<|im_end|>' + '\\n'}}{% endfor %}" PROMPT);
}

Test(tok_chat, refuses_unknown_roles_families_and_empty_conversations) {
    static const struct { const char *chat; int n; struct chat_message m;
    } rows[] = {
        { "chatml", 0, { "user", "x" } },
        { "chatml", 1, { "tool", "x" } },
        { "chatlm", 1, { "user", "x" } },
    };
    struct model_dir d;
    struct tok *t = open_with(&d, "", 0);
    for (size_t i = 0; i < COUNT_OF(rows); i++) {
        struct err e = { 0 };
        struct str out;
        str_init(&out);
        cr_expect(tok_chat(t, rows[i].chat, &rows[i].m, rows[i].n, true, &out, &e) < 0 &&
                  e.text[0]);
        str_release(&out);
    }
    close_with(&d, &t);
}
