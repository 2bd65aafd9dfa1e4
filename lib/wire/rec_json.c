/* rec_json.c - records as lines of JSON: the form that people read and write by hand.
 *
 * Numbers are printed so that they read back to the same bits: float32 with %.9g, doubles with as
 * few digits as do, whole numbers above INT64_MAX (seeds only) as strings. A field with a default
 * may be left out; an unknown one may not be there. Order: writer, reader.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/wire/rec.h"

#include <errno.h>
#include <math.h>

#include "lib/base/json.h"
#include "lib/wire/fields.h"

/* ---- writing ---- */

/* "-0" would be read as the whole number 0, so a real always shows that it is one. */
static void put_real(struct str *out, const char *digits) {
    str_puts(out, digits);
    if (!strpbrk(digits, ".e")) str_puts(out, ".0");
}

static void put_num(struct str *out, double v) {
    char text[40];
    assert(isfinite(v));                         /* rec_check comes first */
    for (int digits = 15; digits <= 17; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, v);
        double back = strtod(text, NULL);
        if (memcmp(&back, &v, sizeof v) == 0) break;
    }
    put_real(out, text);
}

static void put_f32(struct str *out, float v) {
    char text[40];
    assert(isfinite(v));
    snprintf(text, sizeof text, "%.9g", (double)v);
    put_real(out, text);
}

static void put_seed(struct str *out, uint64_t v) {
    const char *quote = v > INT64_MAX ? "\"" : "";
    str_printf(out, "%s%llu%s", quote, (unsigned long long)v, quote);
}

static void put_fields(struct str *out, void *base, const struct field *table, const char *before);

static void put_array(struct str *out, void *base, const struct field *f) {
    int n = f->kind == FIELD_I32   ? at_i32(base, f)->n
            : f->kind == FIELD_F32 ? at_f32(base, f)->n
                                   : *at_count(base, f);
    str_puts(out, "[");
    for (int i = 0; i < n; i++) {
        if (i) str_puts(out, ",");
        if (f->kind == FIELD_I32) str_printf(out, "%d", at_i32(base, f)->v[i]);
        else if (f->kind == FIELD_F32) put_f32(out, at_f32(base, f)->v[i]);
        else if (f->kind == FIELD_I64) str_printf(out, "%lld", (long long)(*at_i64(base, f))[i]);
        else {
            put_fields(out, *at_samples(base, f) + i, f->sub, "{");
            str_puts(out, "}");
        }
    }
    str_puts(out, "]");
}

static void put_fields(struct str *out, void *base, const struct field *table, const char *before) {
    for (const struct field *f = table; f->name; f++) {
        str_printf(out, "%s\"%s\":", before, f->name);
        before = ",";
        switch (f->kind) {
        case FIELD_TEXT: {
            const char *t = *at_text(base, f) ? *at_text(base, f) : "";
            json_quote(out, t, strlen(t));
            break;
        }
        case FIELD_INT: str_printf(out, "%lld", (long long)*at_int(base, f)); break;
        case FIELD_SEED: put_seed(out, *at_seed(base, f)); break;
        case FIELD_NUM: put_num(out, *at_num(base, f)); break;
        case FIELD_FLAG: str_puts(out, *at_flag(base, f) ? "true" : "false"); break;
        case FIELD_I32:
        case FIELD_F32:
        case FIELD_I64:
        case FIELD_SAMPLES: put_array(out, base, f); break;
        case FIELD_TREATMENT:
            put_fields(out, (char *)base + f->at, f->sub, "{");
            str_puts(out, "}");
            break;
        }
    }
}

void rec_to_json(struct str *out, const struct rec *r) {
    str_printf(out, "{\"rec\":\"%s\",\"v\":%d", rec_name[r->type], REC_VERSION);
    put_fields(out, rec_body(r), field_table(r->type), ",");
    str_puts(out, "}\n");
}

/* ---- reading ---- */

struct reader {
    const char *where, *rec;     /* "file:12", "ticket" */
    int sample;                  /* inside which sample, -1 = none */
    int64_t number;              /* of the line, from 0 */
    struct err *e;
};

static int bad(const struct reader *j, const struct field *f, const char *must) {
    char sample[32] = "";
    if (j->sample >= 0) snprintf(sample, sizeof sample, "samples[%d].", j->sample);
    return err_set(j->e, "%s: %s: field '%s%s' %s", j->where, j->rec, sample, f->name, must);
}

static int get_text(const struct reader *j, char **out, const struct field *f, const json_t *v) {
    if (!json_is_string(v)) return bad(j, f, "must be a string");
    const char *text = json_string_value(v);
    if (strlen(text) != json_string_length(v)) return bad(j, f, "must not hold a NUL character");
    if (f->choices && !field_in_choices(f->choices, text, strlen(text))) {
        char must[128];
        snprintf(must, sizeof must, "must be one of %s", f->choices);
        return bad(j, f, must);
    }
    *out = mem_dup(text);
    return 0;
}

static int get_int(const struct reader *j, int64_t *out, const struct field *f, const json_t *v) {
    int64_t least = field_least(f), most = field_most(f);
    if (!json_is_integer(v) || json_integer_value(v) < least || json_integer_value(v) > most) {
        char must[96];
        snprintf(must, sizeof must, "must be a whole number from %lld to %lld", (long long)least,
                 (long long)most);
        return bad(j, f, must);
    }
    *out = json_integer_value(v);
    return 0;
}

static int get_seed(const struct reader *j, uint64_t *out, const struct field *f, const json_t *v) {
    static const char must[] = "must be a whole number from 0 to 2^64-1 (above 2^63-1 as a string)";
    if (json_is_string(v)) {
        const char *text = json_string_value(v);
        char *end;
        errno = 0;
        if (*text < '0' || *text > '9') return bad(j, f, must);
        *out = strtoull(text, &end, 10);
        return *end || errno || strlen(text) != json_string_length(v) ? bad(j, f, must) : 0;
    }
    if (!json_is_integer(v) || json_integer_value(v) < 0) return bad(j, f, must);
    *out = (uint64_t)json_integer_value(v);
    return 0;
}

static int get_numbers(const struct reader *j, void *base, const struct field *f, const json_t *v) {
    if (!json_is_array(v)) return bad(j, f, "must be an array of numbers");
    size_t n = json_array_size(v), i;
    if (n > REC_TOKENS_MAX) return bad(j, f, "has more than 2^20 entries");
    if (n == 0) return 0;
    json_t *x;
    if (f->kind == FIELD_F32) {
        struct rec_f32 *out = at_f32(base, f);
        *out = (struct rec_f32){ mem_alloc(n * sizeof *out->v), (int)n };
        json_array_foreach(v, i, x) {
            out->v[i] = json_is_number(x) ? (float)json_number_value(x) : NAN;
            if (!isfinite(out->v[i])) return bad(j, f, "must hold finite float32 numbers only");
        }
        return 0;
    }
    int64_t most = f->kind == FIELD_I32 ? INT32_MAX : INT64_MAX;
    void *out = mem_alloc(n * (f->kind == FIELD_I32 ? sizeof(int32_t) : sizeof(int64_t)));
    if (f->kind == FIELD_I32) *at_i32(base, f) = (struct rec_i32){ out, (int)n };
    else *at_i64(base, f) = out, *at_count(base, f) = (int)n;
    json_array_foreach(v, i, x) {
        if (!json_is_integer(x) || json_integer_value(x) < 0 || json_integer_value(x) > most)
            return bad(j, f, "must hold whole numbers >= 0 only");
        if (f->kind == FIELD_I32) ((int32_t *)out)[i] = (int32_t)json_integer_value(x);
        else ((int64_t *)out)[i] = json_integer_value(x);
    }
    return 0;
}

static int get_fields(struct reader *j, void *base, const struct field *table, const json_t *o,
                      bool top);

static int get_samples(struct reader *j, void *base, const struct field *f, const json_t *v) {
    if (!json_is_array(v)) return bad(j, f, "must be an array of samples");
    size_t n = json_array_size(v);
    if (n > REC_SAMPLES_MAX) return bad(j, f, "has more than 256 samples");
    if (n == 0) return 0;
    struct rec_sample *s = mem_alloc(n * sizeof *s);
    *at_samples(base, f) = s;
    *at_count(base, f) = (int)n;
    struct reader in = *j;
    for (size_t i = 0; i < n; i++) {
        in.number = in.sample = (int)i;
        if (!json_is_object(json_array_get(v, i))) return bad(j, f, "must hold objects only");
        if (get_fields(&in, s + i, f->sub, json_array_get(v, i), false) < 0) return -1;
    }
    return 0;
}

static int get_field(struct reader *j, void *base, const struct field *f, const json_t *v) {
    switch (f->kind) {
    case FIELD_TEXT: return get_text(j, at_text(base, f), f, v);
    case FIELD_INT: return get_int(j, at_int(base, f), f, v);
    case FIELD_SEED: return get_seed(j, at_seed(base, f), f, v);
    case FIELD_NUM:
        if (!json_is_number(v)) return bad(j, f, "must be a number");
        *at_num(base, f) = json_number_value(v);
        return isfinite(*at_num(base, f)) ? 0 : bad(j, f, "must be finite");
    case FIELD_FLAG:
        if (!json_is_boolean(v)) return bad(j, f, "must be true or false");
        *at_flag(base, f) = json_is_true(v);
        return 0;
    case FIELD_I32: case FIELD_F32: case FIELD_I64: return get_numbers(j, base, f, v);
    case FIELD_TREATMENT:
        if (!json_is_object(v)) return bad(j, f, "must be an object");
        return get_fields(j, (char *)base + f->at, f->sub, v, false);
    case FIELD_SAMPLES: return get_samples(j, base, f, v);
    }
    return -1;
}

static int get_default(struct reader *j, void *base, const struct field *f) {
    if (f->need) return bad(j, f, "is missing");
    if (f->kind == FIELD_TEXT) *at_text(base, f) = mem_dup(f->text ? f->text : "");
    if (f->kind == FIELD_INT) *at_int(base, f) = f->numbered ? j->number : (int64_t)f->def;
    if (f->kind == FIELD_NUM) *at_num(base, f) = f->def;
    if (f->kind != FIELD_TREATMENT) return 0;
    json_t *empty = json_object();
    int rc = get_fields(j, (char *)base + f->at, f->sub, empty, false);
    json_decref(empty);
    return rc;
}

static int unknown(struct reader *j, const struct field *table, const char *key) {
    const char *names[FIELDS_MAX];
    size_t n = 0;
    for (; table[n].name; n++) names[n] = table[n].name;
    const char *near = str_nearest(key, names, n);
    return err_set(j->e, "%s: %s: unknown field '%.64s'%s%s%s", j->where, j->rec, key,
                   near ? ", did you mean '" : "", near ? near : "", near ? "'?" : "");
}

static int get_fields(struct reader *j, void *base, const struct field *table, const json_t *o,
                      bool top) {
    const char *key;
    json_t *v;
    json_object_foreach((json_t *)(uintptr_t)o, key, v) {
        if (top && (strcmp(key, "rec") == 0 || strcmp(key, "v") == 0)) continue;
        if (!field_find(table, key, strlen(key))) return unknown(j, table, key);
    }
    for (const struct field *f = table; f->name; f++) {
        v = json_object_get(o, f->name);
        if ((v ? get_field(j, base, f, v) : get_default(j, base, f)) < 0) return -1;
    }
    return 0;
}

static int get_type(enum rec_type *type, const json_t *o, enum rec_type expected, const char *where,
                    struct err *e) {
    const json_t *rec = json_object_get(o, "rec"), *v = json_object_get(o, "v");
    *type = expected;
    if (rec) {
        if (!json_is_string(rec)) return err_set(e, "%s: field 'rec' must be a string", where);
        *type = rec_type_of(json_string_value(rec), json_string_length(rec));
        if (*type == REC_NONE)
            return err_set(e, "%s: unknown kind of record '%.64s'", where, json_string_value(rec));
        if (expected != REC_NONE && *type != expected)
            return err_set(e, "%s: a record '%s' where '%s' is expected", where, rec_name[*type],
                           rec_name[expected]);
    }
    if (*type == REC_NONE)
        return err_set(e, "%s: field 'rec' is missing: it says which record this is", where);
    if (v && (!json_is_integer(v) || json_integer_value(v) < 1 ||
              json_integer_value(v) > REC_VERSION))
        return err_set(e, "%s: %s: field 'v' must be %d, the version this program speaks", where,
                       rec_name[*type], REC_VERSION);
    return 0;
}

static int from_object(struct rec *r, const json_t *o, enum rec_type expected, const char *where,
                       int64_t number, struct err *e) {
    enum rec_type type;
    if (!json_is_object(o)) return err_set(e, "%s: a record is a JSON object", where);
    if (get_type(&type, o, expected, where, e) < 0) return -1;
    rec_init(r, type);
    struct reader j = { where, rec_name[type], -1, number, e };
    if (get_fields(&j, rec_body(r), field_table(type), o, true) == 0) {
        if (rec_rules(r, e) == 0) return 0;
        err_wrap(e, "%s", where);
    }
    rec_release(r);
    return -1;
}

int rec_from_json_line(struct rec *r, const char *line, size_t bytes, enum rec_type expected,
                       const char *where, int64_t number, struct err *e) {
    rec_init(r, REC_NONE);
    json_error_t je;
    json_t *o = json_loadb(line, bytes, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &je);
    if (!o) return err_set(e, "%s:%d: not valid JSON: %s", where, je.column, je.text);
    int rc = from_object(r, o, expected, where, number, e);
    json_decref(o);
    return rc;
}

int rec_from_json(struct rec *r, const char *line, size_t bytes, enum rec_type expected,
                  const char *where, struct err *e) {
    return rec_from_json_line(r, line, bytes, expected, where, 0, e);
}
