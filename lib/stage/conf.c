/* conf.c - see conf.h.
 * Order: settings as text, the file, keys, ports.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/stage/conf.h"

#include <stdarg.h>

#include "lib/base/fs.h"

enum { CONF_BYTES_MAX = 4 << 20, NAMES_MAX = 512 };

/* ---- settings as text ---- */

void settings_release(struct settings *s) {
    for (int i = 0; i < s->n; i++) {
        free(s->v[i].name);
        free(s->v[i].text);
    }
    free(s->v);
    *s = (struct settings){ 0 };
}

void settings_add(struct settings *s, const char *name, const char *text, const char *from,
                  int line) {
    if (s->n == s->cap) {
        s->cap = s->cap ? 2 * s->cap : 64;
        s->v = mem_grow(s->v, (size_t)s->cap * sizeof *s->v);
    }
    s->v[s->n++] = (struct setting){ mem_dup(name), mem_dup(text), from, line };
}

const struct setting *settings_find(const struct settings *s, const char *name) {
    for (int i = s->n; i-- > 0;)
        if (strcmp(s->v[i].name, name) == 0) return &s->v[i];
    return NULL;
}

int complain(struct err *e, const struct setting *at, const char *fmt, ...) {
    char text[1024];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    if (at && at->line) return err_at(e, at->from, at->line, "%s", text);
    size_t used = strlen(e->text);
    snprintf(e->text + used, sizeof e->text - used, "%s%s%s%s%s%s", used ? "\n" : "",
             at ? at->from : "", at ? " " : "", at ? at->name : "", at ? ": " : "", text);
    return -1;
}

static char *trim(char *text) {
    text += strspn(text, " \t\r");
    size_t n = strlen(text);
    while (n && strchr(" \t\r", text[n - 1])) n--;
    text[n] = 0;
    return text;
}

static bool name_ok(const char *name) {
    size_t n = strlen(name);
    return n &&
           strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-") == n;
}

static int take_line(struct settings *s, char *line, const char *path, int number, struct err *e) {
    line = trim(line);
    if (!*line || *line == '#') return 0;
    char *equals = strchr(line, '=');
    if (!equals) return err_at(e, path, number, "not a line 'section.name = value': '%.60s'", line);
    *equals = 0;
    char *name = trim(line), *text = trim(equals + 1);
    if (!name_ok(name))
        return err_at(e, path, number, "'%.60s' is not a name like 'section.name'", name);
    const struct setting *before = settings_find(s, name);
    if (before && before->from == path)
        return err_at(e, path, number, "'%s' is given twice, first on line %d", name, before->line);
    settings_add(s, name, text, path, number);
    return 0;
}

int settings_read(struct settings *s, const char *path, struct err *e) {
    struct str file = { 0 };
    struct err cannot = { 0 };
    if (fs_read(&file, path, CONF_BYTES_MAX, &cannot) < 0) {
        str_release(&file);
        return complain(e, NULL, "%s", cannot.text);
    }
    int rc = 0, number = 0;
    if (!utf8_valid(file.s, file.len) || strlen(file.s) != file.len) {
        str_release(&file);
        return complain(e, NULL, "'%s' is not text (UTF-8 without NUL)", path);
    }
    for (char *p = str_starts(file.s, "\xEF\xBB\xBF") ? file.s + 3 : file.s, *next; p; p = next) {
        char *nl = strchr(p, '\n');
        next = nl ? nl + 1 : NULL;
        if (nl) *nl = 0;
        if (take_line(s, p, path, ++number, e) < 0) rc = -1;
    }
    str_release(&file);
    return rc;
}

int settings_arg(struct settings *s, const char *arg, struct err *e) {
    char *copy = mem_dup(arg), *equals = strchr(copy, '=');
    int rc = -1;
    if (equals) *equals = 0;
    if (!equals || !name_ok(trim(copy))) complain(e, NULL, "--set '%s': must be NAME=VALUE", arg);
    else {
        settings_add(s, trim(copy), trim(equals + 1), "--set", 0);
        rc = 0;
    }
    free(copy);
    return rc;
}

/* ---- keys ---- */

static const struct stage_key *next_key(const struct stage_about *about, int *table, int *row) {
    for (; about->keys && about->keys[*table]; (*table)++, *row = 0)
        if (about->keys[*table][*row].name) return &about->keys[*table][(*row)++];
    return NULL;
}

static int choice_index(const char *choices, const char *word) {
    size_t n = strlen(word);
    int i = 0;
    for (const char *p = choices; p; i++) {
        if (strcspn(p, "|") == n && memcmp(p, word, n) == 0 && n) return i;
        p = strchr(p, '|');
        if (p) p++;
    }
    return -1;
}

static int word_bool(const char *t) {
    if (strcmp(t, "true") == 0 || strcmp(t, "yes") == 0 || strcmp(t, "on") == 0) return 1;
    return strcmp(t, "false") == 0 || strcmp(t, "no") == 0 || strcmp(t, "off") == 0 ? 0 : -1;
}

static bool ranged(const struct stage_key *k) { return k->least < k->most; }

static int bind_int(int64_t *to, const struct stage_key *k, const char *t, const struct setting *at,
                    struct err *e) {
    int64_t v;
    if (!str_to_i64(t, &v))
        return complain(e, at, "%s must be a whole number, not '%s'", k->name, t);
    if (ranged(k) && ((double)v < k->least || (double)v > k->most))
        return complain(e, at, "%s must be from %.15g to %.15g, not %s", k->name, k->least, k->most,
                        t);
    *to = v;
    return 0;
}

static int bind_num(double *to, const struct stage_key *k, const char *t, const struct setting *at,
                    struct err *e) {
    double v;
    if (!str_to_f64(t, &v)) return complain(e, at, "%s must be a number, not '%s'", k->name, t);
    if (ranged(k) && (v < k->least || v > k->most))
        return complain(e, at, "%s must be from %.15g to %.15g, not %s", k->name, k->least, k->most,
                        t);
    *to = v;
    return 0;
}

static int bind_key(void *conf, const struct stage_key *k, const char *t, const struct setting *at,
                    struct err *e) {
    void *to = (char *)conf + k->offset;
    int v;
    switch (k->type) {
    case KEY_INT: return bind_int(to, k, t, at, e);
    case KEY_NUM: return bind_num(to, k, t, at, e);
    case KEY_BOOL:
        if ((v = word_bool(t)) < 0)
            return complain(e, at, "%s must be true or false, not '%s'", k->name, t);
        *(bool *)to = v;
        return 0;
    case KEY_TEXT:
        free(*(char **)to);
        *(char **)to = mem_dup(t);
        return 0;
    case KEY_CHOICE:
        if ((v = choice_index(k->choices, t)) < 0)
            return complain(e, at, "%s must be one of %s, not '%s'", k->name, k->choices, t);
        *(int *)to = v;
        return 0;
    }
    return -1;
}

static bool is_port_setting(const char *name) {
    return str_starts(name, "in.") || str_starts(name, "out.");
}

static const char *near_key(const struct stage_about *about, const char *word) {
    const char *names[NAMES_MAX] = { NULL };
    size_t n = 0;
    int table = 0, row = 0;
    const struct stage_key *k;
    while (n < NAMES_MAX && (k = next_key(about, &table, &row))) names[n++] = k->name;
    return str_nearest(word, names, n);
}

static bool known(const struct stage_about *about, const char *name) {
    int table = 0, row = 0;
    const struct stage_key *k;
    while ((k = next_key(about, &table, &row)))
        if (strcmp(k->name, name) == 0) return true;
    return false;
}

static int refuse_unknown(const struct stage_about *about, const struct settings *s,
                          struct err *e) {
    int rc = 0;
    for (int i = 0; i < s->n; i++) {
        const struct setting *v = &s->v[i];
        if (is_port_setting(v->name)) {
            bool output = v->name[0] == 'o';
            if (!port_find(about, v->name + (output ? 4 : 3), output, v, e)) rc = -1;
        } else if (!known(about, v->name)) {
            const char *near = near_key(about, v->name);
            rc = complain(e, v, "unknown key '%s'%s%s%s", v->name, near ? ", did you mean '" : "",
                          near ? near : "", near ? "'?" : "");
        }
    }
    return rc;
}

int conf_bind(void *conf, const struct stage_about *about, const struct settings *s,
              struct err *e) {
    int rc = refuse_unknown(about, s, e), table = 0, row = 0;
    const struct stage_key *k;
    while ((k = next_key(about, &table, &row))) {
        const struct setting *v = settings_find(s, k->name);
        if (k->def) {
            struct err wrong = { 0 };
            int def = bind_key(conf, k, k->def, NULL, &wrong);
            assert(def == 0 && "the default of a key is within its own range");
            (void)def;
        }
        if (v && bind_key(conf, k, v->text, v, e) < 0) rc = -1;
        if (!v && !k->def)
            rc = complain(e, NULL, "key '%s' is missing: %s", k->name, k->help ? k->help : "");
    }
    return rc;
}

void conf_release(void *conf, const struct stage_about *about) {
    int table = 0, row = 0;
    const struct stage_key *k;
    while (conf && (k = next_key(about, &table, &row)))
        if (k->type == KEY_TEXT) {
            free(*(char **)((char *)conf + k->offset));
            *(char **)((char *)conf + k->offset) = NULL;
        }
}

/* ---- values and where they come from ---- */

static bool same_as_text(const void *at, const struct stage_key *k, const char *text) {
    int64_t whole;
    double num;
    switch (k->type) {
    case KEY_INT: return str_to_i64(text, &whole) && *(const int64_t *)at == whole;
    case KEY_NUM: return str_to_f64(text, &num) && *(const double *)at == num;
    case KEY_BOOL: return *(const bool *)at == (word_bool(text) == 1);
    case KEY_TEXT: return strcmp(*(char *const *)at, text) == 0;
    case KEY_CHOICE: return *(const int *)at == choice_index(k->choices, text);
    }
    return false;
}

bool conf_at_default(const void *conf, const struct stage_key *k) {
    return k->def && same_as_text((const char *)conf + k->offset, k, k->def);
}

void conf_value(const void *conf, const struct stage_key *k, struct str *out) {
    const void *at = (const char *)conf + k->offset;
    const char *word = k->choices;
    switch (k->type) {
    case KEY_INT: str_printf(out, "%lld", (long long)*(const int64_t *)at); break;
    case KEY_NUM: str_printf(out, "%.9g", *(const double *)at); break;
    case KEY_BOOL: str_puts(out, *(const bool *)at ? "yes" : "no"); break;
    case KEY_TEXT: str_puts(out, *(char *const *)at); break;
    case KEY_CHOICE:
        for (int i = *(const int *)at; i > 0; i--) word = strchr(word, '|') + 1;
        str_printf(out, "%.*s", (int)strcspn(word, "|"), word);
        break;
    }
}

/* Somebody's setting of the key `name`, or of the first key of the section that it is or is in. */
static const struct setting *set_by_somebody(const char *name, bool section,
                                             const struct stage_about *about,
                                             const struct settings *s) {
    const char *dot = strrchr(name, '.');
    const size_t whole = strlen(name), n = dot ? (size_t)(dot - name) : whole;
    int table = 0, row = 0;
    for (const struct stage_key *k; (k = next_key(about, &table, &row));) {
        const size_t own = (size_t)(strrchr(k->name, '.') - k->name);
        const bool in = (own == whole && strncmp(k->name, name, whole) == 0) ||
                        (own == n && strncmp(k->name, name, n) == 0);
        if (section ? !in : strcmp(k->name, name) != 0) continue;
        const struct setting *v = settings_find(s, k->name);
        if (v && !(k->def && strcmp(k->def, v->text) == 0)) return v;
    }
    return NULL;
}

/* The setting that the text speaks of: of the keys in it, the first that somebody set, or else the
 * first of their sections. */
static const struct setting *named_in(const char *text, const struct stage_about *about,
                                      const struct settings *s) {
    static const char in_name[] = "abcdefghijklmnopqrstuvwxyz0123456789_.", between[] = " ,:;'(";
    for (int section = 0; section < 2; section++)
        for (const char *p = text + strspn(text, between); *p;) {
            char name[100];
            const int n = (int)strspn(p, in_name);
            snprintf(name, sizeof name, "%.*s", n, p);
            const struct setting *v = memchr(p, '.', (size_t)n)
                                          ? set_by_somebody(name, section, about, s)
                                          : NULL;
            if (v) return v;
            p += strcspn(p, between);
            p += strspn(p, between);
        }
    return NULL;
}

void conf_place(struct err *e, const struct stage_about *about, const struct settings *s,
                const char *lines) {
    char *copy = mem_dup(lines), *rest = copy;
    for (char *line; (line = strsep(&rest, "\n"));) {
        const struct setting *at = named_in(line, about, s);
        complain(e, at && at->line ? at : NULL, "%s", line);
    }
    free(copy);
}

/* ---- ports ---- */

const struct stage_port *port_find(const struct stage_about *about, const char *name, bool output,
                                   const struct setting *at, struct err *e) {
    const char *names[16] = { NULL };
    size_t n = 0;
    for (const struct stage_port *p = about->ports; p && p->name; p++) {
        if (strcmp(p->name, name) == 0) {
            if (p->output == output) return p;
            complain(e, at, "port '%s' is an %s: give it as --%s %s=URL or '%s.%s = URL'", name,
                     p->output ? "output" : "input", p->output ? "out" : "in", name,
                     p->output ? "out" : "in", name);
            return NULL;
        }
        if (n < COUNT_OF(names)) names[n++] = p->name;
    }
    const char *near = str_nearest(name, names, n);
    if (near) complain(e, at, "there is no port '%s', did you mean '%s'?", name, near);
    else {
        struct str all = { 0 };
        for (size_t i = 0; i < n; i++) str_printf(&all, "%s%s", i ? ", " : "", names[i]);
        complain(e, at, "there is no port '%s'; ports: %s", name, n ? all.s : "none");
        str_release(&all);
    }
    return NULL;
}

/* ---- what a run was made of ---- */

static bool is_among(const char *name, const char *const *list) {
    for (; *list; list++)
        if (strcmp(name, *list) == 0) return true;
    return false;
}

void stage_settings(const struct stage *s, const char *const *but, struct str *out) {
    for (int t = 0; s->about->keys[t]; t++)
        for (const struct stage_key *k = s->about->keys[t]; k->name; k++) {
            const char *at = (const char *)s->conf + k->offset;
            if (is_among(k->name, but)) continue;
            str_printf(out, "%s = ", k->name);
            switch (k->type) {
            case KEY_INT:
                str_printf(out, "%lld\n", (long long)*(const int64_t *)(const void *)at);
                break;
            case KEY_NUM: str_printf(out, "%.17g\n", *(const double *)(const void *)at); break;
            case KEY_BOOL: str_printf(out, "%d\n", *(const bool *)(const void *)at); break;
            case KEY_CHOICE: str_printf(out, "%d\n", *(const int *)(const void *)at); break;
            case KEY_TEXT: str_printf(out, "%s\n", *(char *const *)(const void *)at); break;
            }
        }
}
