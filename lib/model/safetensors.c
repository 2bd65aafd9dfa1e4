/* safetensors.c - see safetensors.h.
 *
 * Order: the header's JSON subset, one tensor's checks, the layout of all, open and look up, to
 * floats, writing.
 * The header is copied once and parsed by hand: objects of objects, whole numbers, depth 3. A
 * general JSON reader would take a hundred times the bytes of a hostile header. Nothing is
 * repaired: a file that breaks a rule is refused.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/safetensors.h"

#include "kernels/pack.h"
#include "lib/base/json.h"
#include "lib/model/half.h"

static const struct { const char *name; int bytes; } DTYPE[ST_DTYPE_COUNT] = {
    [ST_DTYPE_F32] = { "F32", 4 },   [ST_DTYPE_F16] = { "F16", 2 }, [ST_DTYPE_BF16] = { "BF16", 2 },
    [ST_DTYPE_F64] = { "F64", 8 },   [ST_DTYPE_I64] = { "I64", 8 }, [ST_DTYPE_I32] = { "I32", 4 },
    [ST_DTYPE_I16] = { "I16", 2 },   [ST_DTYPE_I8] = { "I8", 1 },   [ST_DTYPE_U64] = { "U64", 8 },
    [ST_DTYPE_U32] = { "U32", 4 },   [ST_DTYPE_U16] = { "U16", 2 }, [ST_DTYPE_U8] = { "U8", 1 },
    [ST_DTYPE_BOOL] = { "BOOL", 1 }, [ST_DTYPE_F8_E4M3] = { "F8_E4M3", 1 },
    [ST_DTYPE_F8_E5M2] = { "F8_E5M2", 1 },
};

const char *st_dtype_name(enum st_dtype d) { return DTYPE[d].name; }
int st_dtype_bytes(enum st_dtype d) { return DTYPE[d].bytes; }

/* --- the header's JSON subset --- */

struct cursor {
    char *start, *p, *end;
    const char *path;
    struct err *e;
};

static int fail(const struct cursor *c, const char *what) {
    return err_code(c->e, EXIT_ENV, "'%s': byte %zu of the header: %s", c->path,
                    (size_t)(c->p - c->start), what);
}

static void skip_space(struct cursor *c) {
    while (c->p < c->end && (*c->p == ' ' || *c->p == '\n' || *c->p == '\r' || *c->p == '\t'))
        c->p++;
}

static bool take(struct cursor *c, char want) {
    skip_space(c);
    if (c->p >= c->end || *c->p != want) return false;
    c->p++;
    return true;
}

static int hex4(struct cursor *c, uint32_t *out) {
    *out = 0;
    if (c->end - c->p < 4) return fail(c, "escape is cut off");
    for (int i = 0; i < 4; i++) {
        char h = *c->p++;
        int v = h >= '0' && h <= '9'   ? h - '0'
                : h >= 'a' && h <= 'f' ? h - 'a' + 10
                : h >= 'A' && h <= 'F' ? h - 'A' + 10
                                       : -1;
        if (v < 0) return fail(c, "escape is not hexadecimal");
        *out = *out * 16 + (uint32_t)v;
    }
    return 0;
}

static int unicode_escape(struct cursor *c, char **w) {
    uint32_t u, low;
    if (hex4(c, &u) < 0) return -1;
    if (u >= 0xD800 && u < 0xDC00) {
        if (c->end - c->p < 2 || c->p[0] != '\\' || c->p[1] != 'u')
            return fail(c, "lone surrogate");
        c->p += 2;
        if (hex4(c, &low) < 0) return -1;
        if (low < 0xDC00 || low > 0xDFFF) return fail(c, "lone surrogate");
        u = 0x10000 + ((u - 0xD800) << 10) + (low - 0xDC00);
    } else if (u >= 0xDC00 && u < 0xE000) return fail(c, "lone surrogate");
    if (u == 0) return fail(c, "string holds a NUL");
    char *o = *w;
    if (u < 0x80) *o++ = (char)u;
    else if (u < 0x800) *o++ = (char)(0xC0 | u >> 6), *o++ = (char)(0x80 | (u & 63));
    else if (u < 0x10000) {
        *o++ = (char)(0xE0 | u >> 12);
        *o++ = (char)(0x80 | (u >> 6 & 63));
        *o++ = (char)(0x80 | (u & 63));
    } else {
        *o++ = (char)(0xF0 | u >> 18), *o++ = (char)(0x80 | (u >> 12 & 63));
        *o++ = (char)(0x80 | (u >> 6 & 63)), *o++ = (char)(0x80 | (u & 63));
    }
    *w = o;
    return 0;
}

/* Decodes in place: no escape is longer than what it stands for. *out stays inside the header. */
static int take_string(struct cursor *c, const char **out) {
    if (!take(c, '"')) return fail(c, "expected a string");
    char *w = c->p;
    *out = w;
    while (c->p < c->end) {
        char ch = *c->p++;
        if (ch == '"') {
            *w = 0;
            return 0;
        }
        if ((unsigned char)ch < 0x20) return fail(c, "control character in a string");
        if (ch != '\\') {
            *w++ = ch;
            continue;
        }
        if (c->p >= c->end) break;
        char esc = *c->p++;
        static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
        const char *at = esc ? strchr(from, esc) : NULL;
        if (at) *w++ = to[at - from];
        else if (esc != 'u') return fail(c, "unknown escape");
        else if (unicode_escape(c, &w) < 0) return -1;
    }
    return fail(c, "string is cut off");
}

static int take_count(struct cursor *c, int64_t *out) {
    skip_space(c);
    const char *first = c->p;
    uint64_t v = 0;
    while (c->p < c->end && *c->p >= '0' && *c->p <= '9') {
        if (__builtin_mul_overflow(v, (uint64_t)10, &v) ||
            __builtin_add_overflow(v, (uint64_t)(*c->p - '0'), &v) || v > INT64_MAX)
            return fail(c, "number is too large");
        c->p++;
    }
    if (c->p == first) return fail(c, "expected a whole number of at least 0");
    if (*first == '0' && c->p - first > 1) return fail(c, "number starts with 0");
    *out = (int64_t)v;
    return 0;
}

/* [n, n, ...] of at most `most`. */
static int take_counts(struct cursor *c, int64_t *out, int most, int *n) {
    *n = 0;
    if (!take(c, '[')) return fail(c, "expected a list");
    if (take(c, ']')) return 0;
    do {
        if (*n == most) return fail(c, "list is too long");
        if (take_count(c, &out[(*n)++]) < 0) return -1;
    } while (take(c, ','));
    return take(c, ']') ? 0 : fail(c, "expected ',' or ']'");
}

static int skip_metadata(struct cursor *c) {
    const char *ignored;
    if (!take(c, '{')) return fail(c, "'__metadata__' must be an object of strings");
    if (take(c, '}')) return 0;
    do {
        if (take_string(c, &ignored) < 0) return -1;
        if (!take(c, ':')) return fail(c, "expected ':'");
        if (take_string(c, &ignored) < 0) return -1;
    } while (take(c, ','));
    return take(c, '}') ? 0 : fail(c, "expected ',' or '}'");
}

/* --- one tensor --- */

struct entry { struct st_tensor t; uint64_t begin, end; };

static int bad_tensor(const struct cursor *c, const char *name, const char *what) {
    return err_code(c->e, EXIT_ENV, "'%s': tensor '%.200s': %s", c->path, name, what);
}

static int check_size(const struct cursor *c, struct entry *x) {
    int64_t n = 1, bytes;
    bool over = false, empty = false;
    for (int i = 0; i < x->t.rank; i++) {
        if (x->t.shape[i] == 0) empty = true;
        else over |= __builtin_mul_overflow(n, x->t.shape[i], &n);
    }
    over |= __builtin_mul_overflow(n, (int64_t)DTYPE[x->t.dtype].bytes, &bytes);
    if (over) return bad_tensor(c, x->t.name, "field 'shape' overflows");
    if (empty) n = bytes = 0;
    x->t.elements = n;
    if (x->end < x->begin)
        return bad_tensor(c, x->t.name, "field 'data_offsets' ends before it begins");
    if (x->end - x->begin != (uint64_t)bytes)
        return err_code(
            c->e, EXIT_ENV,
            "'%s': tensor '%.200s': field 'data_offsets' spans %llu bytes, its shape needs %lld",
            c->path, x->t.name, (unsigned long long)(x->end - x->begin), (long long)bytes);
    return 0;
}

static int take_dtype(struct cursor *c, struct entry *x) {
    const char *text;
    if (take_string(c, &text) < 0) return -1;
    for (int d = 0; d < ST_DTYPE_COUNT; d++)
        if (strcmp(text, DTYPE[d].name) == 0) {
            x->t.dtype = (enum st_dtype)d;
            return 0;
        }
    return err_code(c->e, EXIT_ENV,
                    "'%s': tensor '%.200s': field 'dtype' is '%.40s', which is not supported",
                    c->path, x->t.name, text);
}

static int take_tensor(struct cursor *c, struct entry *x) {
    enum { HAS_DTYPE = 1, HAS_SHAPE = 2, HAS_OFFSETS = 4, HAS_ALL = 7 };
    int seen = 0, has, n;
    int64_t offsets[2];
    if (!take(c, '{')) return bad_tensor(c, x->t.name, "must be an object");
    do {
        const char *key;
        if (take_string(c, &key) < 0) return -1;
        if (!take(c, ':')) return fail(c, "expected ':'");
        has = strcmp(key, "dtype") == 0 ? HAS_DTYPE : strcmp(key, "shape") == 0 ? HAS_SHAPE
            : strcmp(key, "data_offsets") == 0 ? HAS_OFFSETS : 0;
        if (!has)
            return err_code(c->e, EXIT_ENV, "'%s': tensor '%.200s': unknown field '%.40s'", c->path,
                            x->t.name, key);
        if (seen & has)
            return err_code(c->e, EXIT_ENV, "'%s': tensor '%.200s': field '%s' comes twice",
                            c->path, x->t.name, key);
        seen |= has;
        if (has == HAS_DTYPE && take_dtype(c, x) < 0) return -1;
        if (has == HAS_SHAPE && take_counts(c, x->t.shape, ST_RANK_MAX, &x->t.rank) < 0) return -1;
        if (has == HAS_OFFSETS) {
            if (take_counts(c, offsets, 2, &n) < 0) return -1;
            if (n != 2)
                return bad_tensor(c, x->t.name, "field 'data_offsets' must hold two numbers");
        }
    } while (take(c, ','));
    if (!take(c, '}')) return fail(c, "expected ',' or '}'");
    if (!(seen & HAS_DTYPE)) return bad_tensor(c, x->t.name, "field 'dtype' is missing");
    if (!(seen & HAS_SHAPE)) return bad_tensor(c, x->t.name, "field 'shape' is missing");
    if (!(seen & HAS_OFFSETS)) return bad_tensor(c, x->t.name, "field 'data_offsets' is missing");
    x->begin = (uint64_t)offsets[0];
    x->end = (uint64_t)offsets[1];
    return check_size(c, x);
}

/* --- all of them --- */

struct table { struct entry *x; int n, cap; };

static int take_header(struct cursor *c, struct table *t) {
    bool metadata = false;
    if (c->p == c->end || *c->p != '{') return fail(c, "the header must start with '{'");
    c->p++;
    if (!take(c, '}')) {
        do {
            const char *name;
            if (take_string(c, &name) < 0) return -1;
            if (!take(c, ':')) return fail(c, "expected ':'");
            if (strcmp(name, "__metadata__") == 0) {
                if (metadata) return fail(c, "'__metadata__' comes twice");
                metadata = true;
                if (skip_metadata(c) < 0) return -1;
                continue;
            }
            if (strlen(name) > ST_NAME_MAX) return fail(c, "tensor name is too long");
            if (t->n == ST_TENSORS_MAX) return fail(c, "too many tensors");
            if (t->n == t->cap) {
                t->cap = t->cap ? 2 * t->cap : 64;
                t->x = mem_grow(t->x, (size_t)t->cap * sizeof *t->x);
            }
            t->x[t->n] = (struct entry){ .t = { .name = name } };
            if (take_tensor(c, &t->x[t->n++]) < 0) return -1;
        } while (take(c, ','));
        if (!take(c, '}')) return fail(c, "expected ',' or '}'");
    }
    skip_space(c);
    return c->p == c->end ? 0 : fail(c, "bytes after the end of the JSON");
}

static int by_offset(const void *a, const void *b) {
    const struct entry *x = a, *y = b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    return (x->end > y->end) - (x->end < y->end);
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const struct st_tensor *)a)->name, ((const struct st_tensor *)b)->name);
}

/* The data must be the tensors one after the other: no hole, no overlap, no rest. */
static int check_layout(const struct cursor *c, struct table *t, uint64_t data_bytes) {
    uint64_t at = 0;
    if (t->n) qsort(t->x, (size_t)t->n, sizeof *t->x, by_offset);
    for (int i = 0; i < t->n; i++) {
        const struct entry *x = &t->x[i];
        if (x->begin != at)
            return err_code(
                c->e, EXIT_ENV,
                "'%s': tensor '%.200s': field 'data_offsets' begins at %llu, expected %llu (%s)",
                c->path, x->t.name, (unsigned long long)x->begin, (unsigned long long)at,
                x->begin < at ? "tensors overlap" : "there is a hole");
        if (x->end > data_bytes)
            return err_code(
                c->e, EXIT_ENV,
                "'%s': tensor '%.200s': field 'data_offsets' ends at %llu, the file has %llu "
                "bytes of data (is the download complete?)",
                c->path, x->t.name, (unsigned long long)x->end, (unsigned long long)data_bytes);
        at = x->end;
    }
    if (at != data_bytes)
        return err_code(c->e, EXIT_ENV,
                        "'%s': the tensors end at byte %llu of the data, the file at byte %llu",
                        c->path, (unsigned long long)at, (unsigned long long)data_bytes);
    return 0;
}

static int parse(struct st_file *f, const uint8_t *data, size_t bytes, struct err *e) {
    if (bytes < 8)
        return err_code(e, EXIT_ENV, "'%s': %zu bytes are too few for a safetensors file", f->path,
                        bytes);
    uint64_t length = 0;
    for (int i = 7; i >= 0; i--) length = length << 8 | data[i];
    if (length > ST_HEADER_MAX || length > bytes - 8)
        return err_code(
            e, EXIT_ENV,
            "'%s': the header's length %llu does not fit (file has %zu bytes, the most is %d)",
            f->path, (unsigned long long)length, bytes, ST_HEADER_MAX);
    f->header = mem_alloc((size_t)length + 1);
    memcpy(f->header, data + 8, (size_t)length);
    if (!utf8_valid(f->header, (size_t)length))
        return err_code(e, EXIT_ENV, "'%s': the header is not valid UTF-8", f->path);
    struct cursor c = { f->header, f->header, f->header + length, f->path, e };
    struct table t = { 0 };
    if (take_header(&c, &t) < 0 || check_layout(&c, &t, bytes - 8 - length) < 0) {
        free(t.x);
        return -1;
    }
    f->tensor = mem_alloc((size_t)(t.n + 1) * sizeof *f->tensor);
    f->count = t.n;
    for (int i = 0; i < t.n; i++) {
        f->tensor[i] = t.x[i].t;
        f->tensor[i].data = data + 8 + length + t.x[i].begin;
    }
    free(t.x);
    qsort(f->tensor, (size_t)f->count, sizeof *f->tensor, by_name);
    for (int i = 1; i < f->count; i++)
        if (by_name(&f->tensor[i - 1], &f->tensor[i]) == 0)
            return err_code(e, EXIT_ENV, "'%s': tensor '%.200s' comes twice", f->path,
                            f->tensor[i].name);
    return 0;
}

/* --- open, look up --- */

int st_open_memory(struct st_file *f, const void *data, size_t bytes, const char *path,
                   struct err *e) {
    *f = (struct st_file){ 0 };
    snprintf(f->path, sizeof f->path, "%s", path);
    if (parse(f, data, bytes, e) == 0) return 0;
    st_close(f);
    return -1;
}

int st_open(struct st_file *f, const char *path, struct err *e) {
    struct fs_map map;
    *f = (struct st_file){ 0 };
    if (fs_map(&map, path, e) < 0) {
        if (e) e->code = EXIT_ENV;
        return -1;
    }
    if (st_open_memory(f, map.data, map.bytes, path, e) < 0) {
        fs_unmap(&map);
        return -1;
    }
    f->map = map;
    return 0;
}

void st_close(struct st_file *f) {
    fs_unmap(&f->map);
    free(f->tensor);
    free(f->header);
    *f = (struct st_file){ 0 };
}

const struct st_tensor *st_find(const struct st_file *f, const char *name) {
    struct st_tensor key = { .name = name };
    return f->count ? bsearch(&key, f->tensor, (size_t)f->count, sizeof key, by_name) : NULL;
}

int st_to_f32(const struct st_tensor *t, float *out, struct err *e) {
    return st_to_f32_part(t, 0, t->elements, out, e);
}

int st_to_f32_part(const struct st_tensor *t, int64_t first, int64_t n, float *out, struct err *e) {
    assert(first >= 0 && n >= 0 && first <= t->elements - n);
    const uint8_t *from = t->data + (size_t)first * (size_t)DTYPE[t->dtype].bytes;
    uint16_t h;
    switch (t->dtype) {
    case ST_DTYPE_F32:
        if (n) memcpy(out, from, (size_t)n * 4);
        return 0;
    case ST_DTYPE_BF16:
        for (int64_t i = 0; i < n; i++) memcpy(&h, from + 2 * i, 2), out[i] = bf16_to_f32(h);
        return 0;
    case ST_DTYPE_F16:
        for (int64_t i = 0; i < n; i++) memcpy(&h, from + 2 * i, 2), out[i] = f16_to_f32(h);
        return 0;
    default:
        return err_code(e, EXIT_ENV,
                        "tensor '%.200s' is %s; only F32, F16 and BF16 weights are read", t->name,
                        DTYPE[t->dtype].name);
    }
}

/* --- writing --- */

int st_write(const char *path, const struct st_out *tensors, int n, const char *metadata_json,
             struct err *e) {
    struct str head;
    str_init(&head);
    str_puts(&head, "{");
    if (metadata_json) str_printf(&head, "\"__metadata__\":%s", metadata_json);
    size_t bytes = 0;
    for (int i = 0; i < n; i++) {
        const struct st_out *t = &tensors[i];
        assert(t->rank >= 0 && t->rank <= ST_RANK_MAX);
        size_t size = 4;
        str_puts(&head, head.len > 1 ? "," : "");
        json_quote(&head, t->name, strlen(t->name));
        str_puts(&head, ":{\"dtype\":\"F32\",\"shape\":[");
        for (int d = 0; d < t->rank; d++) {
            str_printf(&head, "%s%lld", d ? "," : "", (long long)t->shape[d]);
            size *= (size_t)t->shape[d];
        }
        str_printf(&head, "],\"data_offsets\":[%zu,%zu]}", bytes, bytes + size);
        bytes += size;
    }
    str_puts(&head, "}");
    while (head.len % 8) str_puts(&head, " ");
    uint8_t *file = mem_alloc(8 + head.len + bytes), *w = file + 8;
    for (int i = 0; i < 8; i++) file[i] = (uint8_t)((uint64_t)head.len >> 8 * i);
    memcpy(w, head.s, head.len);
    w += head.len;
    for (int i = 0; i < n; i++) {
        size_t size = 4;
        for (int d = 0; d < tensors[i].rank; d++) size *= (size_t)tensors[i].shape[d];
        if (size) memcpy(w, tensors[i].data, size);
        w += size;
    }
    int rc = fs_replace(path, file, (size_t)(w - file), e);
    free(file);
    str_release(&head);
    return rc;
}
