/* chat.c - renders a conversation as the model's own chat template would; see tok_chat in tok.h.
 *
 * Only the roles system, user and assistant: the families' templates treat others (tools) each in
 * its own way.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/tok_int.h"

static const struct known {
    const char *name;
    enum chat_kind kind;
    const char *system, *date, *knowledge;
} known[] = {
    { "chatml", CHAT_KIND_CHATML, NULL, NULL, NULL },
    { "qwen2", CHAT_KIND_CHATML, "You are a helpful assistant.", NULL, NULL },
    { "qwen2.5", CHAT_KIND_CHATML,
      "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", NULL, NULL },
    { "smollm2", CHAT_KIND_CHATML,
      "You are a helpful AI assistant named SmolLM, trained by Hugging Face", NULL, NULL },
    { "llama3", CHAT_KIND_LLAMA3, NULL, NULL, NULL },
    { "llama3.1", CHAT_KIND_LLAMA31, NULL, "26 Jul 2024", "December 2023" },
    { "llama3.2", CHAT_KIND_LLAMA31, NULL, "26 Jul 2024", "December 2023" },
};

static int family_by_name(struct chat_family *f, const char *name, struct err *e) {
    const char *names[COUNT_OF(known)];
    for (size_t i = 0; i < COUNT_OF(known); i++) {
        names[i] = known[i].name;
        if (strcmp(name, known[i].name)) continue;
        *f = (struct chat_family){ known[i].kind, NULL, NULL, NULL };
        if (known[i].system) f->system = mem_dup(known[i].system);
        if (known[i].date) f->date = mem_dup(known[i].date);
        if (known[i].knowledge) f->knowledge = mem_dup(known[i].knowledge);
        return 0;
    }
    const char *near = str_nearest(name, names, COUNT_OF(known));
    return err_code(
        e, EXIT_CONFIG,
        "unknown chat family '%s'%s%s%s (chatml, qwen2, qwen2.5, smollm2, llama3, llama3.1)", name,
        near ? "; did you mean '" : "", near ? near : "", near ? "'?" : "");
}

/* Python's str.isspace, which Jinja's trim uses. */
static bool is_space(int32_t c) {
    return (c >= 9 && c <= 13) || (c >= 0x1c && c <= 0x20) || c == 0x85 || c == 0xa0 ||
           c == 0x1680 || (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 ||
           c == 0x202f || c == 0x205f || c == 0x3000;
}

static void add_trimmed(struct str *out, const char *s) {
    size_t bytes = strlen(s), end = 0;
    for (size_t i = 0, n; i < bytes; i += n) {
        int32_t cp;
        n = tok_utf8(s + i, bytes - i, &cp);
        if (!is_space(cp)) end = i + n;
        /* still in front of the text */
        else if (end == 0) s += n, bytes -= n, i = 0, n = 0;
    }
    str_add(out, s, end);
}

static void chatml(const struct chat_family *f, const struct chat_message *m, int n,
                   bool add_prompt, struct str *out) {
    if (f->system && strcmp(m[0].role, "system"))
        str_printf(out, "<|im_start|>system\n%s<|im_end|>\n", f->system);
    for (int i = 0; i < n; i++) {
        str_printf(out, "<|im_start|>%s\n", m[i].role);
        str_puts(out, m[i].content);
        str_puts(out, "<|im_end|>\n");
    }
    if (add_prompt) str_puts(out, "<|im_start|>assistant\n");
}

static void llama3_turn(const char *role, const char *content, struct str *out) {
    str_printf(out, "<|start_header_id|>%s<|end_header_id|>\n\n", role);
    add_trimmed(out, content);
    str_puts(out, "<|eot_id|>");
}

static void llama3(const struct chat_family *f, const char *bos, const struct chat_message *m,
                   int n, bool add_prompt, struct str *out) {
    str_puts(out, bos);
    if (f->kind == CHAT_KIND_LLAMA31) {
        bool own = strcmp(m[0].role, "system") == 0;
        str_printf(out,
                   "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: "
                   "%s\nToday Date: %s\n\n",
                   f->knowledge, f->date);
        add_trimmed(out, own ? m[0].content : "");
        str_puts(out, "<|eot_id|>");
        m += own, n -= own;
    }
    for (int i = 0; i < n; i++) llama3_turn(m[i].role, m[i].content, out);
    if (add_prompt) str_puts(out, "<|start_header_id|>assistant<|end_header_id|>\n\n");
}

static int check(const struct chat_message *m, int n, struct err *e) {
    if (n < 1) return err_set(e, "a conversation needs at least one message");
    for (int i = 0; i < n; i++)
        if (strcmp(m[i].role, "system") && strcmp(m[i].role, "user") &&
            strcmp(m[i].role, "assistant"))
            return err_set(e, "message %d has role '%.40s' (known: system, user, assistant)", i + 1,
                           m[i].role);
    return 0;
}

int tok_chat(const struct tok *t, const char *chat, const struct chat_message *m, int n,
             bool add_prompt, struct str *out, struct err *e) {
    struct chat_family f = { 0 };
    if (check(m, n, e) < 0) return -1;
    if (chat && family_by_name(&f, chat, e) < 0) return -1;
    if (!chat && !t->template.len)
        return err_code(e, EXIT_CONFIG,
                        "the model has no chat template; set model.chat to one of chatml, qwen2, "
                        "qwen2.5, smollm2, "
                        "llama3, llama3.1");
    if (!chat && chat_recognise(&f, t->template.s, t->template.len, e) < 0) {
        if (e) e->code = EXIT_CONFIG;
        return -1;
    }
    if (f.kind == CHAT_KIND_CHATML) chatml(&f, m, n, add_prompt, out);
    else llama3(&f, t->bos ? t->bos : "<|begin_of_text|>", m, n, add_prompt, out);
    chat_family_release(&f);
    return 0;
}
