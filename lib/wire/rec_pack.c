/* rec_pack.c - records as MessagePack.
 *
 * Writing goes through msgpack-c. Reading does not: its reader reserves memory for what a header
 * claims (4 GiB for five bytes), so a linear validator looks at every header first, and a cursor
 * over the same bytes then fills the struct. Memory taken is at most the bytes present plus 256
 * empty samples. Order: writer, validator, cursor, reader.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/wire/rec.h"

#include <math.h>
#include <msgpack.h>

#include "lib/wire/fields.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
               "arrays travel little endian and are copied as they lie");

/* ---- writing ---- */

static int write_str(void *data, const char *buf, size_t len) {
    str_add(data, buf, len);
    return 0;
}

static void pack_bytes(msgpack_packer *p, const char *text, size_t n) {
    msgpack_pack_str(p, n);
    msgpack_pack_str_body(p, text, n);
}

static void pack_text(msgpack_packer *p, const char *text) {
    if (!text) text = "";
    size_t n = strlen(text);
    if (utf8_valid(text, n)) {
        pack_bytes(p, text, n);
        return;
    }
    struct str clean;
    str_init(&clean);
    for (const char *c = text, *end = text + n; c < end;) {
        size_t good = utf8_good(c, end);
        str_add(&clean, good ? c : "\xEF\xBF\xBD", good ? good : 3);
        c += good ? good : 1;
    }
    pack_bytes(p, clean.s, clean.len);
    str_release(&clean);
}

static void pack_array(msgpack_packer *p, const void *v, size_t count, size_t bytes_each) {
    msgpack_pack_bin(p, count * bytes_each);
    if (count) msgpack_pack_bin_body(p, v, count * bytes_each);
}

static size_t rows(const struct field *table) {
    size_t n = 0;
    while (table[n].name) n++;
    return n;
}

static void pack_fields(msgpack_packer *p, void *base, const struct field *table);

static void pack_field(msgpack_packer *p, void *base, const struct field *f) {
    pack_bytes(p, f->name, strlen(f->name));
    switch (f->kind) {
    case FIELD_TEXT: pack_text(p, *at_text(base, f)); break;
    case FIELD_INT: msgpack_pack_int64(p, *at_int(base, f)); break;
    case FIELD_SEED: msgpack_pack_uint64(p, *at_seed(base, f)); break;
    case FIELD_NUM: msgpack_pack_double(p, *at_num(base, f)); break;
    case FIELD_FLAG: *at_flag(base, f) ? msgpack_pack_true(p) : msgpack_pack_false(p); break;
    case FIELD_I32:
        pack_array(p, at_i32(base, f)->v, (size_t)at_i32(base, f)->n, sizeof(int32_t));
        break;
    case FIELD_F32:
        pack_array(p, at_f32(base, f)->v, (size_t)at_f32(base, f)->n, sizeof(float));
        break;
    case FIELD_I64:
        pack_array(p, *at_i64(base, f), (size_t)*at_count(base, f), sizeof(int64_t));
        break;
    case FIELD_TREATMENT:
        msgpack_pack_map(p, rows(f->sub));
        pack_fields(p, (char *)base + f->at, f->sub);
        break;
    case FIELD_SAMPLES:
        msgpack_pack_array(p, (size_t)*at_count(base, f));
        for (int i = 0; i < *at_count(base, f); i++) {
            msgpack_pack_map(p, rows(f->sub));
            pack_fields(p, *at_samples(base, f) + i, f->sub);
        }
        break;
    }
}

static void pack_fields(msgpack_packer *p, void *base, const struct field *table) {
    for (const struct field *f = table; f->name; f++) pack_field(p, base, f);
}

void rec_pack(struct str *out, const struct rec *r) {
    const struct field *table = field_table(r->type);
    msgpack_packer p;
    msgpack_packer_init(&p, out, write_str);
    msgpack_pack_map(&p, 2 + rows(table));
    pack_bytes(&p, "rec", 3);
    pack_text(&p, rec_name[r->type]);
    pack_bytes(&p, "v", 1);
    msgpack_pack_int64(&p, REC_VERSION);
    pack_fields(&p, rec_body(r), table);
}

/* ---- the validator ---- */

enum item_kind {
    ITEM_INT,
    ITEM_UINT,
    ITEM_NUM,
    ITEM_FLAG,
    ITEM_STR,
    ITEM_BIN,
    ITEM_ARRAY,
    ITEM_MAP
};
static const char *const item_name[] = { "a number",   "a number", "a float",  "a flag",
                                         "a string", "binary",   "an array", "a map" };
struct item {
    enum item_kind kind;
    uint64_t count;              /* bytes of a string or binary, entries of an array or map */
    union { int64_t i; uint64_t u; double num; bool flag; };
    const char *data;            /* string, binary: lent by the buffer */
};
struct cursor { const uint8_t *start, *p, *end; int64_t version; };

static uint64_t big_endian(const uint8_t *p, int bytes) {
    uint64_t v = 0;
    for (int i = 0; i < bytes; i++) v = v << 8 | p[i];
    return v;
}

static int broken(const struct cursor *c, const char *what, struct err *e) {
    return err_set(e, "MessagePack: %s at byte %zu", what, (size_t)(c->p - c->start));
}

/* Which kind a first byte opens, and how many bytes of header follow it; -1 = not used by records
 * (nil, ext, float32). */
static int classify(uint8_t b, enum item_kind *kind, int *more) {
    *more = 0;
    if (b <= 0x7F) *kind = ITEM_UINT;
    else if (b <= 0x8F) *kind = ITEM_MAP;
    else if (b <= 0x9F) *kind = ITEM_ARRAY;
    else if (b <= 0xBF) *kind = ITEM_STR;
    else if (b == 0xC2 || b == 0xC3) *kind = ITEM_FLAG;
    else if (b >= 0xC4 && b <= 0xC6) *kind = ITEM_BIN, *more = 1 << (b - 0xC4);
    else if (b == 0xCB) *kind = ITEM_NUM, *more = 8;
    else if (b >= 0xCC && b <= 0xCF) *kind = ITEM_UINT, *more = 1 << (b - 0xCC);
    else if (b >= 0xD0 && b <= 0xD3) *kind = ITEM_INT, *more = 1 << (b - 0xD0);
    else if (b >= 0xD9 && b <= 0xDB) *kind = ITEM_STR, *more = 1 << (b - 0xD9);
    else if (b == 0xDC || b == 0xDD) *kind = ITEM_ARRAY, *more = 2 << (b - 0xDC);
    else if (b == 0xDE || b == 0xDF) *kind = ITEM_MAP, *more = 2 << (b - 0xDE);
    else if (b >= 0xE0) *kind = ITEM_INT;
    else return -1;
    return 0;
}

static int64_t sign_extended(uint64_t v, int bytes) {
    int shift = 64 - 8 * bytes;
    return (int64_t)(v << shift) >> shift;
}

/* Reads one header; a string or binary is stepped over whole. Allocates nothing. */
static int next_item(struct cursor *c, struct item *it, struct err *e) {
    int more;
    if (c->p >= c->end) return broken(c, "ends inside a value", e);
    uint8_t b = *c->p;
    if (classify(b, &it->kind, &more) < 0) return broken(c, "a type that records do not use", e);
    if (c->end - c->p - 1 < more) return broken(c, "ends inside a header", e);
    uint64_t v = more ? big_endian(c->p + 1, more) : 0;
    switch (it->kind) {
    case ITEM_UINT: it->u = more ? v : b; break;
    case ITEM_INT: it->i = more ? sign_extended(v, more) : (int8_t)b; break;
    case ITEM_NUM: memcpy(&it->num, &v, sizeof it->num); break;
    case ITEM_FLAG: it->flag = b == 0xC3; break;
    case ITEM_STR: it->count = more ? v : b & 0x1Fu; break;
    case ITEM_BIN: it->count = v; break;
    case ITEM_ARRAY: case ITEM_MAP: it->count = more ? v : b & 0x0Fu; break;
    }
    uint64_t left = (uint64_t)(c->end - c->p - 1 - more);
    bool whole = it->kind == ITEM_STR || it->kind == ITEM_BIN;
    if ((whole || it->kind == ITEM_ARRAY) && it->count > left)
        return broken(c, "a count that does not fit", e);
    if (it->kind == ITEM_MAP && it->count > left / 2)
        return broken(c, "a count that does not fit", e);
    it->data = (const char *)c->p + 1 + more;
    if (it->kind == ITEM_STR &&
        (!utf8_valid(it->data, it->count) || memchr(it->data, 0, it->count)))
        return broken(c, "a string that is not text (UTF-8 without NUL)", e);
    c->p += 1 + more + (whole ? it->count : 0);
    return 0;
}

enum { DEPTH_MAX = 8 };

int rec_validate(const void *data, size_t bytes, struct err *e) {
    if (bytes > REC_BYTES_MAX)
        return err_set(e, "MessagePack: %zu bytes, a record has at most %d", bytes, REC_BYTES_MAX);
    struct cursor c = { data, data, (const uint8_t *)data + bytes, 0 };
    uint64_t left[DEPTH_MAX + 1] = { 1 };
    int depth = 0;
    while (depth >= 0) {
        if (left[depth] == 0) {
            depth--;
            continue;
        }
        left[depth]--;
        struct item it;
        if (next_item(&c, &it, e) < 0) return -1;
        if (it.kind != ITEM_ARRAY && it.kind != ITEM_MAP) continue;
        if (depth == DEPTH_MAX) return broken(&c, "nested deeper than 8", e);
        left[++depth] = it.kind == ITEM_MAP ? 2 * it.count : it.count;
    }
    return c.p == c.end ? 0 : broken(&c, "bytes after the record", e);
}

/* ---- reading ---- */

static int want(struct cursor *c, struct item *it, enum item_kind kind, const char *rec,
                const char *name, struct err *e) {
    if (next_item(c, it, e) < 0) return err_wrap(e, "%s: field '%s'", rec, name);
    if (it->kind != kind)
        return err_set(e, "%s: field '%s' is %s, must be %s", rec, name, item_name[it->kind],
                       item_name[kind]);
    return 0;
}

static char *text_copy(const struct item *it) {
    char *t = mem_alloc(it->count + 1);
    memcpy(t, it->data, it->count);
    return t;
}

static int read_int(struct cursor *c, int64_t *out, int64_t least, int64_t most, const char *rec,
                    const char *name, struct err *e) {
    struct item it;
    if (next_item(c, &it, e) < 0) return err_wrap(e, "%s: field '%s'", rec, name);
    if (it.kind != ITEM_INT && it.kind != ITEM_UINT)
        return err_set(e, "%s: field '%s' is %s, must be a whole number", rec, name,
                       item_name[it.kind]);
    bool fits = it.kind == ITEM_INT
                    ? it.i >= least && it.i <= most
                    : it.u <= INT64_MAX && (int64_t)it.u >= least && (int64_t)it.u <= most;
    if (!fits)
        return err_set(e, "%s: field '%s' is outside %lld .. %lld", rec, name, (long long)least,
                       (long long)most);
    *out = it.kind == ITEM_INT ? it.i : (int64_t)it.u;
    return 0;
}

static int read_seed(struct cursor *c, uint64_t *out, const char *rec, const char *name,
                     struct err *e) {
    struct item it;
    if (want(c, &it, ITEM_UINT, rec, name, e) < 0) return -1;
    *out = it.u;
    return 0;
}

/* Copies a binary of count x bytes_each; *v stays NULL where it is empty. */
static int read_array(struct cursor *c, void **v, int *n, size_t bytes_each, const char *rec,
                      const char *name, struct err *e) {
    struct item it;
    if (want(c, &it, ITEM_BIN, rec, name, e) < 0) return -1;
    if (it.count % bytes_each || it.count / bytes_each > REC_TOKENS_MAX)
        return err_set(e, "%s: field '%s' has %llu bytes, not 0 .. %d x %zu", rec, name,
                       (unsigned long long)it.count, REC_TOKENS_MAX, bytes_each);
    if (it.count == 0) return 0;
    *v = mem_alloc(it.count);
    memcpy(*v, it.data, it.count);
    *n = (int)(it.count / bytes_each);
    return 0;
}

static int read_i32(struct cursor *c, struct rec_i32 *out, const char *rec, const char *name,
                    struct err *e) {
    void *v = NULL;
    int rc = read_array(c, &v, &out->n, sizeof *out->v, rec, name, e);
    out->v = v;
    for (int i = 0; rc == 0 && i < out->n; i++)
        if (out->v[i] < 0) return err_set(e, "%s: field '%s'[%d] is negative", rec, name, i);
    return rc;
}

static int read_f32(struct cursor *c, struct rec_f32 *out, const char *rec, const char *name,
                    struct err *e) {
    void *v = NULL;
    int rc = read_array(c, &v, &out->n, sizeof *out->v, rec, name, e);
    out->v = v;
    for (int i = 0; rc == 0 && i < out->n; i++)
        if (!isfinite(out->v[i]))
            return err_set(e, "%s: field '%s'[%d] is not finite", rec, name, i);
    return rc;
}

static int read_i64(struct cursor *c, int64_t **out, int *n, const char *rec, const char *name,
                    struct err *e) {
    void *v = NULL;
    int rc = read_array(c, &v, n, sizeof **out, rec, name, e);
    *out = v;
    for (int i = 0; rc == 0 && i < *n; i++)
        if ((*out)[i] < 0) return err_set(e, "%s: field '%s'[%d] is negative", rec, name, i);
    return rc;
}

static int read_map(struct cursor *c, void *base, const struct field *table, uint64_t entries,
                    const char *rec, struct err *e);

static int read_samples(struct cursor *c, void *base, const struct field *f, const char *rec,
                        struct err *e) {
    struct item it;
    if (want(c, &it, ITEM_ARRAY, rec, f->name, e) < 0) return -1;
    if (it.count > REC_SAMPLES_MAX)
        return err_set(e, "%s: %llu samples, at most %d travel together", rec,
                       (unsigned long long)it.count, REC_SAMPLES_MAX);
    if (it.count == 0) return 0;
    struct rec_sample *s = mem_alloc(it.count * sizeof *s);
    *at_samples(base, f) = s;
    *at_count(base, f) = (int)it.count;
    for (int i = 0, n = (int)it.count; i < n; i++) {
        if (want(c, &it, ITEM_MAP, rec, f->name, e) < 0) return -1;
        if (read_map(c, s + i, f->sub, it.count, rec, e) < 0) return err_wrap(e, "sample %d", i);
    }
    return 0;
}

static int read_field(struct cursor *c, void *base, const struct field *f, const char *rec,
                      struct err *e) {
    struct item it;
    switch (f->kind) {
    case FIELD_TEXT:
        if (want(c, &it, ITEM_STR, rec, f->name, e) < 0) return -1;
        if (f->choices && !field_in_choices(f->choices, it.data, it.count))
            return err_set(e, "%s: field '%s' is not one of %s", rec, f->name, f->choices);
        *at_text(base, f) = text_copy(&it);
        return 0;
    case FIELD_INT:
        return read_int(c, at_int(base, f), field_least(f), field_most(f), rec, f->name, e);
    case FIELD_SEED: return read_seed(c, at_seed(base, f), rec, f->name, e);
    case FIELD_NUM:
        if (want(c, &it, ITEM_NUM, rec, f->name, e) < 0) return -1;
        if (!isfinite(it.num)) return err_set(e, "%s: field '%s' is not finite", rec, f->name);
        *at_num(base, f) = it.num;
        return 0;
    case FIELD_FLAG:
        if (want(c, &it, ITEM_FLAG, rec, f->name, e) < 0) return -1;
        *at_flag(base, f) = it.flag;
        return 0;
    case FIELD_I32: return read_i32(c, at_i32(base, f), rec, f->name, e);
    case FIELD_F32: return read_f32(c, at_f32(base, f), rec, f->name, e);
    case FIELD_I64: return read_i64(c, at_i64(base, f), at_count(base, f), rec, f->name, e);
    case FIELD_TREATMENT:
        if (want(c, &it, ITEM_MAP, rec, f->name, e) < 0) return -1;
        return read_map(c, (char *)base + f->at, f->sub, it.count, rec, e);
    case FIELD_SAMPLES: return read_samples(c, base, f, rec, e);
    }
    return -1;
}

/* Every row of the table exactly once, in any order. */
static int read_map(struct cursor *c, void *base, const struct field *table, uint64_t entries,
                    const char *rec, struct err *e) {
    uint64_t seen = 0;
    for (uint64_t i = 0; i < entries; i++) {
        struct item key;
        if (want(c, &key, ITEM_STR, rec, "(name)", e) < 0) return -1;
        const struct field *f = field_find(table, key.data, key.count);
        if (!f)
            return err_set(e, "%s: unknown field '%.*s'", rec,
                           (int)(key.count < 64 ? key.count : 64), key.data);
        uint64_t bit = 1ull << (f - table);
        if (seen & bit) return err_set(e, "%s: field '%s' is there twice", rec, f->name);
        seen |= bit;
        if (read_field(c, base, f, rec, e) < 0) return -1;
    }
    for (const struct field *f = table; f->name; f++)
        if (seen & 1ull << (f - table)) continue;
        else if (f->later && c->version == 1) *at_text(base, f) = mem_dup("");
        else return err_set(e, "%s: field '%s' is missing", rec, f->name);
    return 0;
}

/* {"rec": name, "v": version, ...}: which record follows, and how many fields. */
static int read_head(struct cursor *c, enum rec_type *type, uint64_t *fields, struct err *e) {
    struct item it;
    if (want(c, &it, ITEM_MAP, "record", "(whole)", e) < 0) return -1;
    *fields = it.count - 2;
    if (it.count < 2) return err_set(e, "record: a map that does not start with 'rec' and 'v'");
    if (want(c, &it, ITEM_STR, "record", "rec", e) < 0) return -1;
    if (it.count != 3 || memcmp(it.data, "rec", 3))
        return err_set(e, "record: the first field must be 'rec'");
    if (want(c, &it, ITEM_STR, "record", "rec", e) < 0) return -1;
    *type = rec_type_of(it.data, it.count);
    if (*type == REC_NONE)
        return err_set(e, "record: unknown kind '%.*s'", (int)(it.count < 64 ? it.count : 64),
                       it.data);
    if (want(c, &it, ITEM_STR, "record", "v", e) < 0) return -1;
    if (it.count != 1 || *it.data != 'v') return err_set(e, "record: the second field must be 'v'");
    if (read_int(c, &c->version, 0, INT64_MAX, rec_name[*type], "v", e) < 0) return -1;
    if (c->version < 1 || c->version > REC_VERSION)
        return err_set(e, "%s: version %lld, this program speaks %d", rec_name[*type],
                       (long long)c->version, REC_VERSION);
    return 0;
}

int rec_unpack(struct rec *r, const void *data, size_t bytes, struct err *e) {
    rec_init(r, REC_NONE);
    if (rec_validate(data, bytes, e) < 0) return -1;
    struct cursor c = { data, data, (const uint8_t *)data + bytes, 0 };
    enum rec_type type = REC_NONE;
    uint64_t fields;
    if (read_head(&c, &type, &fields, e) < 0) return -1;
    rec_init(r, type);
    if (read_map(&c, rec_body(r), field_table(type), fields, rec_name[type], e) == 0 &&
        rec_rules(r, e) == 0)
        return 0;
    rec_release(r);
    return -1;
}
