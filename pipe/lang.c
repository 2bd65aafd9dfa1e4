/* lang.c - see lang.h.
 *
 * Order: memory and errors, one statement of each kind, a file, --set. A statement is one line; a
 * comment starts with '#' at the start of a line or after a blank, so that "####" inside a value
 * survives.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/lang.h"

#include <ctype.h>
#include <errno.h>
#include <limits.h>
#include <stdarg.h>

#include "lib/base/fs.h"

enum section_kind { SECTION_NONE, SECTION_SHARED, SECTION_STAGE, SECTION_LINKS, SECTION_BAD };
struct reader {                              /* one open file */
    struct lang *l;
    const char *file;                        /* as shown */
    char real[PATH_MAX];
    const struct reader *includer;
    int depth, line;
    enum section_kind kind;
    const char *section;                     /* "run", "noise.aqn", "learner" */
    bool versioned;
};

const char *lang_keep(struct lang *l, const char *text, size_t bytes) {
    char *copy = mem_alloc(bytes + 1);
    memcpy(copy, text, bytes);
    if (l->kepts % 64 == 0) l->kept = mem_grow(l->kept, (size_t)(l->kepts + 64) * sizeof *l->kept);
    return l->kept[l->kepts++] = copy;
}

static const char *keep(struct lang *l, const char *text) {
    return lang_keep(l, text, strlen(text));
}

void origin_text(char *out, size_t size, struct origin at) {
    if (at.line > 0) snprintf(out, size, "%s:%d", at.file, at.line);
    else snprintf(out, size, "%s", at.file ? at.file : "default");
}

void lang_error(struct lang *l, struct origin at, const char *fmt, ...) {
    if (l->errors >= LANG_ERRORS_MAX) return;
    struct str text;
    str_init(&text);
    char head[FS_PATH_MAX];
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(head, sizeof head, fmt, ap);
    va_end(ap);
    str_add(&text, head, n < 0 ? 0 : (size_t)n < sizeof head ? (size_t)n : sizeof head - 1);
    l->error = mem_grow(l->error, (size_t)(l->errors + 1) * sizeof *l->error);
    l->error[l->errors++] = (struct lang_error){ at, text.s };
}

static int file_rank(const struct lang *l, const char *file) {
    for (int i = 0; i < l->files; i++)
        if (strcmp(l->file[i], file) == 0) return i;
    return l->files;
}

void lang_print_errors(struct lang *l, struct str *out) {
    /* insertion sort: stable, and the list is short */
    for (int i = 1; i < l->errors; i++)
        for (int j = i; j > 0; j--) {
            struct lang_error *a = &l->error[j - 1], *b = &l->error[j];
            int ra = file_rank(l, a->at.file), rb = file_rank(l, b->at.file);
            if (ra < rb || (ra == rb && a->at.line <= b->at.line)) break;
            struct lang_error t = *a;
            *a = *b;
            *b = t;
        }
    for (int i = 0; i < l->errors; i++) {
        char at[FS_PATH_MAX + 16];
        origin_text(at, sizeof at, l->error[i].at);
        str_printf(out, "%s: %s\n", at, l->error[i].text);
    }
    if (l->errors >= LANG_ERRORS_MAX)
        str_printf(out, "(more than %d errors; the rest is not shown)\n", LANG_ERRORS_MAX);
}

const struct lang_value *lang_get(const struct lang *l, const char *name) {
    for (int i = 0; i < l->values; i++)
        if (strcmp(l->value[i].name, name) == 0) return &l->value[i];
    return NULL;
}

const struct lang_stage *lang_stage_named(const struct lang *l, const char *name) {
    for (int i = 0; i < l->stages; i++)
        if (strcmp(l->stage[i].name, name) == 0) return &l->stage[i];
    return NULL;
}

void lang_release(struct lang *l) {
    for (int i = 0; i < l->kepts; i++) free(l->kept[i]);
    for (int i = 0; i < l->errors; i++) free(l->error[i].text);
    free(l->kept);
    free(l->error);
    free(l->value);
    free(l->link);
    free(l->stage);
    free(l->file);
    *l = (struct lang){ 0 };
}

/* ---- statements ---- */

static struct origin here(const struct reader *r) { return (struct origin){ r->file, r->line }; }

static bool word_ok(const char *s) {
    if (!isalpha((unsigned char)*s) && *s != '_') return false;
    for (; *s; s++)
        if (!isalnum((unsigned char)*s) && !strchr("_.-", *s)) return false;
    return true;
}

static char *trim(char *s) {
    while (*s == ' ' || *s == '\t') s++;
    size_t n = strlen(s);
    while (n && (s[n - 1] == ' ' || s[n - 1] == '\t' || s[n - 1] == '\r')) s[--n] = 0;
    return s;
}

static void cut_comment(char *s) {
    for (char *p = s; *p; p++)
        if (*p == '#' && (p == s || p[-1] == ' ' || p[-1] == '\t')) {
            *p = 0;
            return;
        }
}

static void value_set(struct lang *l, const char *name, const char *text, struct origin at,
                      bool append) {
    for (int i = 0; i < l->values; i++) {
        struct lang_value *v = &l->value[i];
        if (strcmp(v->name, name) != 0) continue;
        /* same reader, hence the same pointer */
        if (!append && v->at.line > 0 && v->at.file == at.file)
            lang_error(l, at, "'%s' is set twice in this file, first in line %d: keep one", name,
                       v->at.line);
        struct str both;
        str_init(&both);
        if (append && *v->text) str_printf(&both, "%s ", v->text);
        str_puts(&both, text);
        v->text = keep(l, both.s);
        v->at = at;
        str_release(&both);
        return;
    }
    if (l->values % 32 == 0)
        l->value = mem_grow(l->value, (size_t)(l->values + 32) * sizeof *l->value);
    l->value[l->values++] = (struct lang_value){ keep(l, name), keep(l, text), at };
}

static void value_unset(struct lang *l, const char *name, struct origin at) {
    for (int i = 0; i < l->values; i++)
        if (strcmp(l->value[i].name, name) == 0) {
            memmove(&l->value[i], &l->value[i + 1], (size_t)(l->values - i - 1) * sizeof *l->value);
            l->values--;
            return;
        }
    const char *names[512];
    size_t n = 0;
    for (int i = 0; i < l->values && n < 512; i++) names[n++] = l->value[i].name;
    const char *near = str_nearest(name, names, n);
    if (near)
        lang_error(l, at, "cannot unset '%s': nothing before set it; did you mean '%s'?", name,
                   near);
    else lang_error(l, at, "cannot unset '%s': nothing before set it", name);
}

static void read_section(struct reader *r, char *s) {
    struct lang *l = r->l;
    size_t n = strlen(s);
    r->kind = SECTION_BAD;
    if (n < 3 || s[n - 1] != ']') {
        lang_error(l, here(r), "section '%s' does not end with ']'", s);
        return;
    }
    s[n - 1] = 0;
    s = trim(s + 1);
    if (strcmp(s, "links") == 0) {
        r->kind = SECTION_LINKS;
    } else if (strncmp(s, "stage", 5) == 0 && (s[5] == ' ' || s[5] == '\t' || !s[5])) {
        s = trim(s + 5);
        if (!word_ok(s) || strchr(s, '.')) {
            lang_error(l, here(r),
                       "'%s' cannot name a stage: write [stage NAME] with letters, digits, '_' and "
                       "'-'",
                       s);
            return;
        }
        r->kind = SECTION_STAGE;
        r->section = keep(l, s);
        if (lang_stage_named(l, s)) return;
        l->stage = mem_grow(l->stage, (size_t)(l->stages + 1) * sizeof *l->stage);
        l->stage[l->stages++] = (struct lang_stage){ r->section, here(r) };
    } else if (word_ok(s)) {
        r->kind = SECTION_SHARED;
        r->section = keep(l, s);
    } else {
        lang_error(l, here(r), "'%s' cannot name a section: letters, digits, '_', '-' and '.'", s);
    }
}

/* "name.port" -> its two halves, kept. */
static bool split_port(struct reader *r, char *s, const char **stage, const char **port) {
    char *dot = strchr(s, '.');
    if (!dot || dot == s || !dot[1] || !word_ok(s)) {
        lang_error(r->l, here(r), "'%s' is not STAGE.PORT", s);
        return false;
    }
    *stage = lang_keep(r->l, s, (size_t)(dot - s));
    *port = keep(r->l, dot + 1);
    return true;
}

static bool read_link_options(struct reader *r, struct lang_link *k, char *s) {
    char *save = NULL, *word = strtok_r(s, " \t", &save), *slash = word ? strchr(word, '/') : NULL;
    if (!slash) {
        lang_error(
            r->l, here(r),
            "link without socket kinds: write ': router/dealer', ': push/pull' or ': pub/sub'");
        return false;
    }
    k->from_kind = lang_keep(r->l, word, (size_t)(slash - word));
    k->to_kind = keep(r->l, slash + 1);
    while ((word = strtok_r(NULL, " \t", &save))) {
        char *eq = strchr(word, '=');
        int64_t n = 0;
        bool credit = eq && strncmp(word, "credit=", 7) == 0,
             hwm = eq && strncmp(word, "hwm=", 4) == 0;
        if (!credit && !hwm)
            lang_error(r->l, here(r), "unknown link option '%s'; a link has credit=N and hwm=N",
                       word);
        else if (!str_to_i64(eq + 1, &n) || n < 1 || n > 4096)
            lang_error(r->l, here(r), "'%s' is not a whole number from 1 to 4096", word);
        else if (credit) k->credit = (int)n;
        else k->hwm = (int)n;
    }
    return true;
}

static int link_find(const struct lang *l, const struct lang_link *k) {
    for (int i = 0; i < l->links; i++) {
        const struct lang_link *o = &l->link[i];
        if (!strcmp(o->from, k->from) && !strcmp(o->from_port, k->from_port) &&
            !strcmp(o->to, k->to) && !strcmp(o->to_port, k->to_port))
            return i;
    }
    return -1;
}

/* a.port -> b.port : kinds options; a link of a base file that is written again is replaced. */
static void read_link(struct reader *r, char *s, bool unset) {
    struct lang *l = r->l;
    struct lang_link k = { .credit = -1, .hwm = -1, .at = here(r) };
    char *arrow = strstr(s, "->");
    if (!arrow) {
        lang_error(l, here(r), "'%s' is not a link: write 'a.port -> b.port : push/pull hwm=64'",
                   s);
        return;
    }
    *arrow = 0;
    char *colon = strchr(arrow + 2, ':');
    if (colon) *colon = 0;
    bool ok = split_port(r, trim(s), &k.from, &k.from_port);
    if (!split_port(r, trim(arrow + 2), &k.to, &k.to_port) || !ok) return;
    int at = link_find(l, &k);
    if (unset) {
        if (at < 0)
            lang_error(l, here(r), "cannot unset link '%s.%s -> %s.%s': there is none", k.from,
                       k.from_port, k.to, k.to_port);
        else memmove(&l->link[at], &l->link[at + 1], (size_t)(--l->links - at) * sizeof *l->link);
        return;
    }
    char none[] = "";
    if (!read_link_options(r, &k, colon ? trim(colon + 1) : none)) return;
    if (at < 0) {
        l->link = mem_grow(l->link, (size_t)(l->links + 1) * sizeof *l->link);
        at = l->links++;
    }
    l->link[at] = k;
}

static void read_key(struct reader *r, char *s) {
    struct lang *l = r->l;
    char *eq = strchr(s, '=');
    bool unset = strncmp(s, "unset", 5) == 0 && (s[5] == ' ' || s[5] == '\t') && !eq,
         append = false;
    /* its header was reported; do not report every line of it */
    if (r->kind == SECTION_BAD) return;
    if (r->kind == SECTION_NONE) {
        lang_error(l, here(r), "'%s' stands before any section: start one, as in [run]", s);
        return;
    }
    if (!unset && !eq) {
        lang_error(l, here(r),
                   "'%s' is not a statement: write 'key = value', 'key += value' or 'unset key'",
                   s);
        return;
    }
    char *key = s, *text = NULL;
    if (unset) {
        key = trim(s + 5);
    } else {
        append = eq > s && eq[-1] == '+';
        eq[append ? -1 : 0] = 0;
        key = trim(s);
        text = trim(eq + 1);
    }
    if (!word_ok(key)) {
        lang_error(l, here(r), "'%s' cannot name a key: letters, digits, '_', '-' and '.'", key);
        return;
    }
    struct str name;
    str_init(&name);
    str_printf(&name, "%s.%s", r->section, key);
    if (unset) value_unset(l, name.s, here(r));
    else value_set(l, name.s, text, here(r), append);
    str_release(&name);
}

/* ---- files ---- */

static void read_path(struct lang *l, const char *path, const struct reader *includer);

static void read_base(struct reader *r, char *s) {
    char path[FS_PATH_MAX];
    const char *slash = strrchr(r->file, '/');
    s = trim(s);
    if (r->kind != SECTION_NONE)
        lang_error(r->l, here(r), "'base' must stand before the first section");
    else if (!*s) lang_error(r->l, here(r), "'base' without a file");
    else {
        if (*s == '/' || !slash) snprintf(path, sizeof path, "%s", s);
        else snprintf(path, sizeof path, "%.*s/%s", (int)(slash - r->file), r->file, s);
        read_path(r->l, path, r);
    }
}

static void read_line(struct reader *r, char *s) {
    cut_comment(s);
    s = trim(s);
    if (!*s) return;
    if (!r->versioned) {
        r->versioned = true;
        if (strcmp(s, "pipe 1") == 0) return;
        if (strncmp(s, "pipe ", 5) == 0)
            lang_error(r->l, here(r), "'%s': this program reads 'pipe 1'", s);
        else
            lang_error(r->l, here(r), "a .pipe file starts with the line 'pipe 1', not with '%s'",
                       s);
        if (strncmp(s, "pipe", 4) == 0) return;
    }
    if (strncmp(s, "base", 4) == 0 && (s[4] == ' ' || s[4] == '\t' || !s[4])) read_base(r, s + 4);
    else if (*s == '[') read_section(r, s);
    else if (r->kind == SECTION_LINKS && strncmp(s, "unset ", 6) == 0)
        read_link(r, trim(s + 6), true);
    else if (r->kind == SECTION_LINKS) read_link(r, s, false);
    else read_key(r, s);
}

static void read_text(struct reader *r, const struct str *text) {
    char line[LANG_LINE_MAX];
    for (size_t from = 0; from < text->len;) {
        const char *p = text->s + from, *nl = memchr(p, '\n', text->len - from);
        size_t n = nl ? (size_t)(nl - p) : text->len - from;
        r->line++;
        from += n + 1;
        if (n >= sizeof line) {
            lang_error(r->l, here(r), "line longer than %d bytes", LANG_LINE_MAX - 1);
            continue;
        }
        memcpy(line, p, n);
        line[n] = 0;
        if (memchr(line, 0, n) || !utf8_valid(line, n)) lang_error(r->l, here(r), "not UTF-8 text");
        else read_line(r, line);
    }
    if (!r->versioned) lang_error(r->l, (struct origin){ r->file, r->line ? r->line : 1 },
                                  "empty file: it starts with the line 'pipe 1'");
}

static void read_path(struct lang *l, const char *path, const struct reader *includer) {
    struct reader r = { .l = l, .file = keep(l, path), .includer = includer };
    if (includer) r.depth = includer->depth + 1;
    struct origin at = includer ? here(includer) : (struct origin){ r.file, 0 };
    if (!realpath(path, r.real)) {
        lang_error(l, at, includer ? "cannot read base file '%s': %s" : "cannot read '%s': %s",
                   path, strerror(errno));
        return;
    }
    for (const struct reader *up = includer; up; up = up->includer)
        if (strcmp(up->real, r.real) == 0) {
            lang_error(l, at,
                       "'base %s' leads back to a file that is being read: remove the circle",
                       path);
            return;
        }
    if (r.depth > LANG_DEPTH_MAX) {
        lang_error(l, at, "base files are nested more than %d deep", LANG_DEPTH_MAX);
        return;
    }
    struct str text;
    struct err e = { 0 };
    str_init(&text);
    if (fs_read(&text, path, LANG_FILE_BYTES_MAX, &e) < 0) {
        lang_error(l, at, "%s", e.text);
    } else {
        l->file = mem_grow(l->file, (size_t)(l->files + 1) * sizeof *l->file);
        l->file[l->files++] = r.file;
        read_text(&r, &text);
    }
    str_release(&text);
}

static void apply_set(struct lang *l, const char *set) {
    struct origin at = { "--set", 0 };
    const char *eq = strchr(set, '=');
    char name[512];
    if (!eq || eq == set || (size_t)(eq - set) >= sizeof name) {
        lang_error(l, at, "'%s' is not section.key=value", set);
        return;
    }
    snprintf(name, sizeof name, "%.*s", (int)(eq - set), set);
    char *key = trim(name), *text = mem_dup(eq + 1), *value = trim(text);
    if (!word_ok(key) || !strchr(key, '.')) lang_error(l, at, "'%s' is not section.key", key);
    else if (strpbrk(value, "\n\r")) lang_error(l, at, "the value of '%s' holds a line break", key);
    else if (*value == '#' || strstr(value, " #") || strstr(value, "\t#"))
        lang_error(l, at, "the value of '%s' holds ' #', which a .pipe file reads as a comment",
                   key);
    else value_set(l, key, value, at, false);
    free(text);
}

void lang_read(struct lang *l, const char *path, const char *const *sets, int n) {
    *l = (struct lang){ 0 };
    l->path = keep(l, path);
    read_path(l, path, NULL);
    for (int i = 0; i < n; i++) apply_set(l, sets[i]);
}
