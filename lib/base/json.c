/* json.c - see json.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/json.h"

#include "lib/base/fs.h"

json_t *json_parse(const char *text, size_t bytes, const char *where, struct err *e) {
    json_error_t je;
    json_t *v = json_loadb(text, bytes, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY | JSON_ALLOW_NUL,
                           &je);
    if (!v) err_set(e, "%s:%d:%d: not valid JSON: %s", where, je.line, je.column, je.text);
    return v;
}

json_t *json_parse_file(const char *path, size_t bytes_max, struct err *e) {
    struct str text;
    str_init(&text);
    json_t *v = NULL;
    if (fs_read(&text, path, bytes_max, e) == 0) v = json_parse(text.s, text.len, path, e);
    str_release(&text);
    return v;
}

static const json_t *field(const json_t *o, const char *key) {
    const json_t *v = json_object_get(o, key);
    return json_is_null(v) ? NULL : v;
}

static int missing(const char *key, const char *where, struct err *e) {
    return err_set(e, "%s: field '%s' is missing", where, key);
}

int json_may_str(const json_t *o, const char *key, const char **out, const char *where,
                 struct err *e) {
    const json_t *v = field(o, key);
    if (!v) return 0;
    if (!json_is_string(v)) return err_set(e, "%s: field '%s' must be a string", where, key);
    *out = json_string_value(v);
    return 0;
}

int json_may_int(const json_t *o, const char *key, int64_t *out, int64_t least, int64_t most,
                 const char *where, struct err *e) {
    const json_t *v = field(o, key);
    if (!v) return 0;
    if (!json_is_integer(v) || json_integer_value(v) < least || json_integer_value(v) > most)
        return err_set(e, "%s: field '%s' must be a whole number from %lld to %lld", where, key,
                       (long long)least, (long long)most);
    *out = json_integer_value(v);
    return 0;
}

int json_may_num(const json_t *o, const char *key, double *out, const char *where, struct err *e) {
    const json_t *v = field(o, key);
    if (!v) return 0;
    if (!json_is_number(v)) return err_set(e, "%s: field '%s' must be a number", where, key);
    *out = json_number_value(v);
    return 0;
}

int json_may_bool(const json_t *o, const char *key, bool *out, const char *where, struct err *e) {
    const json_t *v = field(o, key);
    if (!v) return 0;
    if (!json_is_boolean(v)) return err_set(e, "%s: field '%s' must be true or false", where, key);
    *out = json_is_true(v);
    return 0;
}

int json_need_str(const json_t *o, const char *key, const char **out, const char *where,
                  struct err *e) {
    return field(o, key) ? json_may_str(o, key, out, where, e) : missing(key, where, e);
}

int json_need_int(const json_t *o, const char *key, int64_t *out, int64_t least, int64_t most,
                  const char *where, struct err *e) {
    return field(o, key) ? json_may_int(o, key, out, least, most, where, e)
                         : missing(key, where, e);
}

int json_need_num(const json_t *o, const char *key, double *out, const char *where, struct err *e) {
    return field(o, key) ? json_may_num(o, key, out, where, e) : missing(key, where, e);
}

void json_quote(struct str *out, const char *text, size_t bytes) {
    str_puts(out, "\"");
    const char *p = text, *end = text + bytes;
    while (p < end) {
        unsigned char c = (unsigned char)*p;
        size_t n = c < 0x80 ? 1 : c < 0xE0 ? 2 : c < 0xF0 ? 3 : 4;
        if (c == '"' || c == '\\') str_printf(out, "\\%c", c);
        else if (c == '\n') str_puts(out, "\\n");
        else if (c < 0x20 || c == 0x7F) str_printf(out, "\\u%04x", c);
        else if ((size_t)(end - p) >= n && utf8_valid(p, n)) str_add(out, p, n);
        else {
            str_puts(out, "\\ufffd");
            n = 1;
        }
        p += n;
    }
    str_puts(out, "\"");
}
