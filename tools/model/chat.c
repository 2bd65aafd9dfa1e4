/* chat.c - qerl-model chat: a conversation as the text and the ids that a model sees.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/json.h"
#include "lib/model/tok.h"
#include "tools/model/args.h"
#include "tools/model/cmd.h"

static const char HELP[] =
    "usage: qerl-model chat MODEL [--chat FAMILY] [--no-prompt] < messages.json\n\n"
    "Reads an array of {\"role\", \"content\"} (roles system, user, assistant) and prints\n"
    "{\"text\": ..., \"ids\": [...]}: the conversation by the model's own chat template, and its "
    "tokens.\n\n"
    "  --chat FAMILY   chatml, qwen2, qwen2.5, smollm2, llama3 or llama3.1 instead of the model's "
    "template\n"
    "  --no-prompt     leave out the opening of the assistant's next turn\n\n"
    "example:\n"
    "  echo '[{\"role\":\"user\",\"content\":\"What is 2+2?\"}]' | qerl-model chat models/tiny\n";

static int read_messages(const json_t *list, struct chat_message *m, struct err *e) {
    size_t i;
    json_t *o;
    json_array_foreach((json_t *)list, i, o) {
        char where[48];
        snprintf(where, sizeof where, "stdin: message %zu", i + 1);
        if (!json_is_object(o)) return err_set(e, "%s is not an object", where);
        if (json_need_str(o, "role", &m[i].role, where, e) < 0 ||
            json_need_str(o, "content", &m[i].content, where, e) < 0)
            return -1;
    }
    return 0;
}

static int print_chat(const struct tok *t, const char *family, const json_t *list, bool prompt,
                      struct err *e) {
    if (!json_is_array(list) || json_array_size(list) > INT32_MAX / 2)
        return err_set(e, "stdin: not an array of messages");
    struct chat_message *m = mem_alloc((json_array_size(list) + 1) * sizeof *m);
    struct tok_ids ids = { 0 };
    struct str text, quoted;
    str_init(&text);
    str_init(&quoted);
    int rc = read_messages(list, m, e);
    if (rc == 0) rc = tok_chat(t, family, m, (int)json_array_size(list), prompt, &text, e);
    if (rc == 0) {
        tok_encode(t, text.s, text.len, true, &ids);
        json_quote(&quoted, text.s, text.len);
        printf("{\"text\": %s, \"ids\": [", quoted.s);
        for (int i = 0; i < ids.n; i++) printf(i ? ",%d" : "%d", ids.id[i]);
        puts("]}");
    }
    free(ids.id);
    free(m);
    str_release(&text);
    str_release(&quoted);
    return rc;
}

int cmd_chat(int argc, char **argv) {
    const char *path, *family = NULL;
    bool no_prompt = false;
    const struct arg arg[] = { { "chat", &family, NULL }, { "no-prompt", NULL, &no_prompt } };
    struct err e = { 0 };
    struct tok *t = NULL;
    struct str input;
    int rc = args_parse(argc, argv, HELP, arg, COUNT_OF(arg), &path);
    if (rc <= 0) return rc < 0 ? EXIT_USAGE : EXIT_DONE;
    str_init(&input);
    rc = tok_open(&t, path, &e);
    if (rc == 0) {
        char buf[4096];
        for (size_t n; (n = fread(buf, 1, sizeof buf, stdin)) > 0;) str_add(&input, buf, n);
        json_t *list = json_parse(input.s ? input.s : "", input.len, "stdin", &e);
        rc = list ? print_chat(t, family, list, !no_prompt, &e) : -1;
        json_decref(list);
    }
    if (rc < 0) fprintf(stderr, "qerl-model chat: %s\n", e.text);
    str_release(&input);
    tok_close(&t);
    return rc == 0 ? EXIT_DONE : e.code ? e.code : EXIT_FAILED;
}
