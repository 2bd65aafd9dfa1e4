/* tok_template.c - says which chat family a Jinja template belongs to, without executing it; see
 * tok_int.h.
 *
 * The template is cut into tags, built into a tree and pruned of the branches that our
 * conversations never take: no tools, no tool calls, roles system, user and assistant only, no date
 * given. What is left is spelled out in one canonical line, and that line must equal one of the few
 * below. So a template that does anything else, however small, is refused, while its passages about
 * tools may say what they like.
 *   literals are unescaped and joined, a['b'] is a.b, blanks go, quotes are '; $S is a default
 *   system text
 * Order: tags, canonical expressions, conditions, the tree, the families.
 * SPDX-License-Identifier: Apache-2.0 */
#include <ctype.h>

#include "lib/model/tok_int.h"

enum { TAGS_MAX = 1024, NEST_MAX = 32 };

/* ---- tags ---- */

enum tag_kind {
    TAG_TEXT,
    TAG_PRINT,
    TAG_IF,
    TAG_ELIF,
    TAG_ELSE,
    TAG_ENDIF,
    TAG_FOR,
    TAG_ENDFOR,
    TAG_SET,
    TAG_END
};
/* what follows the keyword, or the text */
struct tag { enum tag_kind kind; const char *s; size_t bytes; };
struct tags { struct tag tag[TAGS_MAX + 1]; int n; };

static bool blank(char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r'; }
static bool word_char(char c) { return isalnum((unsigned char)c) || c == '_'; }

/* End of the tag that opens at s[at] ("{{", "{%", "{#"): index of its closing brace pair, or 0.
 * Quotes hide braces. */
static size_t tag_close(const char *s, size_t bytes, size_t at) {
    char close = s[at + 1] == '{' ? '}' : s[at + 1], quote = 0;
    for (size_t i = at + 2; i + 1 < bytes; i++) {
        if (quote && s[i] == '\\') i++;
        else if (quote) quote = s[i] == quote ? 0 : quote;
        else if (close != '#' && (s[i] == '\'' || s[i] == '"')) quote = s[i];
        else if (s[i] == close && s[i + 1] == '}') return i;
    }
    return 0;
}

static int tag_add(struct tags *t, enum tag_kind kind, const char *s, size_t bytes) {
    if (t->n == TAGS_MAX) return -1;
    t->tag[t->n++] = (struct tag){ kind, s, bytes };
    return 0;
}

/* "if x" and its like. */
static int statement_add(struct tags *t, const char *s, size_t bytes) {
    static const struct { const char *word; enum tag_kind kind; } words[] = {
        { "if", TAG_IF }, { "elif", TAG_ELIF }, { "else", TAG_ELSE }, { "endif", TAG_ENDIF },
        { "for", TAG_FOR }, { "endfor", TAG_ENDFOR }, { "set", TAG_SET },
    };
    while (bytes && blank(*s)) s++, bytes--;
    for (size_t i = 0; i < COUNT_OF(words); i++) {
        size_t n = strlen(words[i].word);
        if (bytes < n || memcmp(s, words[i].word, n) || (bytes > n && word_char(s[n]))) continue;
        return tag_add(t, words[i].kind, s + n, bytes - n);
    }
    return -1;
}

/* Text between tags as Jinja prints it with trim_blocks and lstrip_blocks, which is how
 * transformers sets it: after a statement one newline goes, before one the blanks of its line go;
 * "-" takes all blank space. */
static int text_add(struct tags *t, const char *s, size_t bytes, char before, bool eat_before,
                    char after, bool eat_after) {
    bool line_start = before == 0;
    if (eat_before)
        while (bytes && blank(*s)) s++, bytes--;
    else if ((before == '%' || before == '#') && bytes && *s == '\n')
        s++, bytes--, line_start = true;
    /* keep_trailing_newline is off */
    if (!after && bytes && s[bytes - 1] == '\n') bytes--;
    if (eat_after) {
        while (bytes && blank(s[bytes - 1])) bytes--;
    } else if (after == '%' || after == '#') {
        size_t n = bytes;
        while (n && (s[n - 1] == ' ' || s[n - 1] == '\t')) n--;
        if (n ? s[n - 1] == '\n' : line_start) bytes = n;
    }
    return bytes ? tag_add(t, TAG_TEXT, s, bytes) : 0;
}

static int tags_read(struct tags *t, const char *s, size_t bytes) {
    size_t from = 0;
    char before = 0;
    bool eat_before = false;
    for (size_t at = 0; at + 1 < bytes; at++) {
        if (s[at] != '{' || !strchr("{%#", s[at + 1]) || !s[at + 1]) continue;
        size_t end = tag_close(s, bytes, at), first = at + 2, last = end;
        if (!end) return -1;
        char kind = s[at + 1];
        bool eat_after = s[first] == '-' && first < last;
        if (text_add(t, s + from, at - from, before, eat_before, kind, eat_after) < 0) return -1;
        first += eat_after;
        eat_before = last > first && s[last - 1] == '-';
        last -= eat_before;
        if (kind == '{' && tag_add(t, TAG_PRINT, s + first, last - first) < 0) return -1;
        if (kind == '%' && statement_add(t, s + first, last - first) < 0) return -1;
        before = kind;
        from = end + 2;
        at = end + 1;
    }
    if (from < bytes && text_add(t, s + from, bytes - from, before, eat_before, 0, false) < 0)
        return -1;
    t->tag[t->n] = (struct tag){ TAG_END, "", 0 };
    return 0;
}

/* ---- canonical expressions ---- */

static void literal_char(struct str *out, char c) {
    if (c == '\'' || c == '\\' || c == '$') str_add(out, "\\", 1);
    str_add(out, c == '\n' ? "\\n" : &c, c == '\n' ? 2 : 1);
}

/* A quoted literal at s[0] is appended as '...'; its length in the source, or 0 if we do not read
 * its escapes. */
static size_t literal(struct str *out, const char *s, size_t bytes) {
    char quote = s[0];
    str_add(out, "'", 1);
    for (size_t i = 1; i < bytes; i++) {
        char c = s[i];
        if (c == quote) {
            str_add(out, "'", 1);
            return i + 1;
        }
        if (c == '\\' && i + 1 < bytes) {
            c = s[++i];
            if (c == 'n') c = '\n';
            else if (c == 't') c = '\t';
            /* Jinja keeps an unknown escape: \boxed */
            else if (c != '\\' && c != '\'' && c != '"') {
                if (strchr("abfrvxuUN01234567", c)) return 0;
                literal_char(out, '\\');
            }
        }
        literal_char(out, c);
    }
    return 0;
}

/* Blanks out, quotes to ', x['y'] to x.y. */
static int canonical(struct str *out, const char *s, size_t bytes) {
    for (size_t i = 0; i < bytes;) {
        char c = s[i];
        if (c == '\'' || c == '"') {
            size_t n = literal(out, s + i, bytes - i);
            if (!n) return -1;
            i += n;
        } else if (blank(c)) {
            while (i < bytes && blank(s[i])) i++;
            bool words = out->len && word_char(out->s[out->len - 1]) && i < bytes &&
                         word_char(s[i]);
            if (words) str_add(out, " ", 1);
        } else if (c == '[' && i + 3 < bytes && (s[i + 1] == '\'' || s[i + 1] == '"')) {
            size_t k = i + 2;
            while (k < bytes && word_char(s[k])) k++;
            if (k + 1 >= bytes || s[k] != s[i + 1] || s[k + 1] != ']') return -1;
            str_add(out, ".", 1);
            str_add(out, s + i + 2, k - i - 2);
            i = k + 2;
        } else {
            if (c == '$') return -1;
            str_add(out, &c, 1);
            i++;
        }
    }
    return 0;
}

/* Appends a printed expression to the canonical line: a + b is two items, and literals side by side
 * become one. */
static void print_item(struct str *out, const char *s, size_t n, bool text) {
    if (text && out->len && out->s[out->len - 1] == '\'') {
        out->s[--out->len] = 0;
        str_add(out, s + 1, n - 1);
    } else if (!text) {
        str_add(out, "{", 1);
        str_add(out, s, n);
        str_add(out, "}", 1);
    } else if (n > 2) {
        str_add(out, s, n);
    }
}

static void print_items(struct str *out, const char *s, size_t bytes) {
    int depth = 0;
    size_t from = 0, end = 0;                  /* end: past the literal that begins the item */
    for (size_t i = 0; i < bytes; i++) {
        if (s[i] == '\'') {
            size_t open = i++;
            while (i < bytes && s[i] != '\'') i += s[i] == '\\' ? 2 : 1;
            if (open == from) end = i + 1;
        } else if (s[i] == '(' || s[i] == '[') {
            depth++;
        } else if (s[i] == ')' || s[i] == ']') {
            depth--;
        } else if (s[i] == '+' && !depth) {
            print_item(out, s + from, i - from, end == i && from < i);
            from = i + 1;
        }
    }
    print_item(out, s + from, bytes - from, end == bytes && from < bytes);
}

/* ---- conditions that our conversations decide ---- */

enum verdict { VERDICT_OPEN, VERDICT_TRUE, VERDICT_FALSE };
static const char *const always_false[] = {
    "tools",
    "tools is not none",
    "builtin_tools is defined",
    "custom_tools is defined",
    "builtin_tools is defined or tools is not none",
    "tools is not none and not tools_in_user_message",
    "tools_in_user_message and not tools is none",
    "'tool_calls'in message",
    "message.tool_calls",
    "message.role=='tool'",
    "message.role=='tool'or message.role=='ipython'",
    /* transformers always passes both */
    "not tools is defined",
    "not add_generation_prompt is defined",
    /* it would print today's date: the template's own fixed date is taken */
    "strftime_now is defined",
};
static const char *const always_true[] = {
    "not tools_in_user_message is defined", "not date_string is defined",
    "not(message.role=='ipython'or message.role=='tool'or'tool_calls'in message)",
};
/* Qwen2.5: what is left of the roles after a system message in front is every message but that
 * one. */
static const char *const not_first_system[] = {
    "(message.role=='user')or(message.role=='system'and not "
    "loop.first)or(message.role=='assistant'and not "
    "message.tool_calls)",
    "(message.role=='user')or(message.role=='system'and not "
    "loop.first)or(message.role=='assistant')",
};

static bool among(const char *const *list, size_t n, const char *text) {
    for (size_t i = 0; i < n; i++)
        if (strcmp(list[i], text) == 0) return true;
    return false;
}

static enum verdict decide(const char *cond) {
    if (among(always_false, COUNT_OF(always_false), cond)) return VERDICT_FALSE;
    return among(always_true, COUNT_OF(always_true), cond) ? VERDICT_TRUE : VERDICT_OPEN;
}

/* A name that only pruned branches read. */
static bool inert_set(const char *text) { return strcmp(text, "tools_in_user_message=true") == 0; }

/* ---- the tree, walked once ---- */

struct walk { const struct tags *tags; int at, depth; };

static int walk_body(struct walk *w, struct str *out, bool live);

static int walk_if(struct walk *w, struct str *out, bool live) {
    /* done: a branch was certain; open: some were written */
    bool done = false, open = false, roles = false;
    struct str cond;
    str_init(&cond);
    int rc = 0;
    for (enum tag_kind kind = TAG_IF; rc == 0 && kind != TAG_ENDIF;) {
        const struct tag *t = &w->tags->tag[w->at++];
        enum verdict v = kind == TAG_ELSE ? VERDICT_TRUE : VERDICT_OPEN;
        str_clear(&cond);
        str_add(&cond, "", 0);
        bool take = live && !done;
        if (kind != TAG_ELSE && take) {
            if (canonical(&cond, t->s, t->bytes) < 0) rc = -1;
            v = decide(cond.s);
            if (roles && strcmp(cond.s, "message.role=='assistant'") == 0)
                v = VERDICT_FALSE; /* taken already */
            if (among(not_first_system, COUNT_OF(not_first_system), cond.s)) {
                roles = true;
                str_clear(&cond);
                str_puts(&cond, "$not_first_system");
            }
        }
        take = take && v != VERDICT_FALSE;
        done = done || (take && v == VERDICT_TRUE);
        if (take && v == VERDICT_OPEN) str_printf(out, "%s(%s)", open ? "%elif" : "%if", cond.s);
        if (take && v == VERDICT_TRUE && open) str_puts(out, "%else");
        open = open || (take && v == VERDICT_OPEN);
        if (rc == 0) rc = walk_body(w, out, take);
        kind = w->tags->tag[w->at].kind;
        if (kind != TAG_ELIF && kind != TAG_ELSE && kind != TAG_ENDIF) rc = -1;
    }
    w->at++;
    if (open) str_puts(out, "%endif");
    str_release(&cond);
    return rc;
}

static int walk_for(struct walk *w, struct str *out, bool live) {
    const struct tag *t = &w->tags->tag[w->at++];
    if (live) {
        str_puts(out, "%for(");
        if (canonical(out, t->s, t->bytes) < 0) return -1;
        str_puts(out, ")");
    }
    if (walk_body(w, out, live) < 0 || w->tags->tag[w->at].kind != TAG_ENDFOR) return -1;
    w->at++;
    if (live) str_puts(out, "%endfor");
    return 0;
}

/* A print or set tag, or text. */
static int walk_leaf(struct walk *w, struct str *out, bool live) {
    const struct tag *t = &w->tags->tag[w->at++];
    struct str text;
    str_init(&text);
    int rc = 0;
    if (live && t->kind == TAG_TEXT) {
        str_puts(&text, "'");
        for (size_t i = 0; i < t->bytes; i++) literal_char(&text, t->s[i]);
        str_puts(&text, "'");
        print_items(out, text.s, text.len);
    } else if (live) {
        rc = canonical(&text, t->s, t->bytes);
        if (rc == 0 && text.len && t->kind == TAG_PRINT) print_items(out, text.s, text.len);
        else if (rc == 0 && text.len && !inert_set(text.s)) str_printf(out, "%%set(%s)", text.s);
    }
    str_release(&text);
    return rc;
}

static int walk_body(struct walk *w, struct str *out, bool live) {
    if (++w->depth > NEST_MAX) return -1;
    for (int rc = 0;;) {
        switch (w->tags->tag[w->at].kind) {
        case TAG_IF: rc = walk_if(w, out, live); break;
        case TAG_FOR: rc = walk_for(w, out, live); break;
        case TAG_TEXT: case TAG_PRINT: case TAG_SET: rc = walk_leaf(w, out, live); break;
        default: w->depth--; return 0;
        }
        if (rc < 0) return -1;
    }
}

/* ---- the families ---- */

#define SAY "'<|im_start|>'{message.role}'\\n'{message.content}'<|im_end|>\\n'"
#define PROMPT "%if(add_generation_prompt)'<|im_start|>assistant\\n'%endif"
#define TURN "'<|start_header_id|>'{message.role}'<|end_header_id|>\\n\\n'{message.content|trim}'<|eot_id|>'"
#define LLAMA_PROMPT "%if(add_generation_prompt)'<|start_header_id|>assistant<|end_header_id|>\\n\\n'%endif"

static const struct { enum chat_kind kind; const char *line;
} families[] = {
    { CHAT_KIND_CHATML, "%for(message in messages)" SAY "%endfor" PROMPT },
    { CHAT_KIND_CHATML,
      "%for(message in messages)%if(loop.first and "
      "messages[0].role!='system')'<|im_start|>system\\n$S<|im_end|>\\n'%endif" SAY
      "%endfor" PROMPT },
    { CHAT_KIND_CHATML, "%if(messages[0].role=='system')'<|im_start|>system\\n'{messages[0]."
                        "content}'<|im_end|>\\n'%else"
                        "'<|im_start|>system\\n$S<|im_end|>\\n'%endif%for(message in "
                        "messages)%if($not_first_system)" SAY "%endif%endfor" PROMPT },
    { CHAT_KIND_LLAMA3,
      "%set(loop_messages=messages)%for(message in "
      "loop_messages)%set(content='<|start_header_id|>'+message.role+"
      "'<|end_header_id|>\\n\\n'+message.content|trim+'<|eot_id|>')%if(loop.index0==0)%set("
      "content=bos_token+content)%endif"
      "{content}%endfor" LLAMA_PROMPT },
    { CHAT_KIND_LLAMA31,
      "{bos_token}%set(date_string='$D')%if(messages[0].role=='system')%set(system_message="
      "messages[0]."
      "content|trim)"
      "%set(messages=messages[1:])%else%set(system_message='')%endif"
      "'<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: $K\\nToday Date: "
      "'{date_string}'\\n\\n'"
      "{system_message}'<|eot_id|>'%for(message in messages)" TURN "%endfor" LLAMA_PROMPT },
};

/* Unescapes a stretch of a canonical literal. */
static char *unescaped(const char *s, size_t bytes) {
    char *out = mem_alloc(bytes + 1), *to = out;
    for (size_t i = 0; i < bytes; i++) {
        if (s[i] != '\\' || i + 1 == bytes) *to++ = s[i];
        else if (s[++i] == 'n') *to++ = '\n';
        else *to++ = s[i];
    }
    return out;
}

/* Compares with one family's line; $S, $D, $K take the shortest text inside one literal that lets
 * the rest agree. */
static bool agree(struct chat_family *f, const char *line, const char *got) {
    for (; *line; line++, got++) {
        char **slot = line[0] != '$'   ? NULL
                      : line[1] == 'S' ? &f->system
                      : line[1] == 'D' ? &f->date
                      : line[1] == 'K' ? &f->knowledge
                                       : NULL;
        if (slot) {
            size_t n = 0, tail = strcspn(line + 2, "$'");
            tail += line[2 + tail] == '\'';
            while (got[n] && got[n] != '\'' && strncmp(got + n, line + 2, tail))
                n += got[n] == '\\' && got[n + 1] ? 2 : 1;
            if (strncmp(got + n, line + 2, tail)) return false;
            free(*slot);
            *slot = unescaped(got, n);
            line += 1;
            got += n;
            got--;
        } else if (*line != *got) {
            return false;
        }
    }
    return *got == 0;
}

void chat_family_release(struct chat_family *f) {
    free(f->system);
    free(f->date);
    free(f->knowledge);
    *f = (struct chat_family){ 0 };
}

int chat_recognise(struct chat_family *f, const char *text, size_t bytes, struct err *e) {
    struct tags *tags = mem_alloc(sizeof *tags);
    struct str line;
    str_init(&line);
    str_puts(&line, "");
    struct walk w = { tags, 0, 0 };
    bool found = false, read = tags_read(tags, text, bytes) == 0 &&
                               walk_body(&w, &line, true) == 0 && w.at == tags->n &&
                               strlen(line.s) == line.len;
    for (size_t i = 0; read && !found && i < COUNT_OF(families); i++) {
        found = agree(f, families[i].line, line.s);
        if (found) f->kind = families[i].kind;
        else chat_family_release(f);
    }
    free(tags);
    if (!found)
        err_set(e,
                "the model's chat template is not one that we know%s%.300s; set model.chat to one "
                "of chatml, "
                "qwen2, qwen2.5, "
                "smollm2, llama3, llama3.1",
                read ? ": without tools it comes to " : "", read ? line.s : "");
    str_release(&line);
    return found ? 0 : -1;
}
