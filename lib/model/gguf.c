/* gguf.c - see gguf.h.
 *
 * Order: a bounded view, metadata, tensor table, layout, open, look up.
 * The part before the data is walked by the same code over the mapping, only to learn where it
 * ends, then over a private copy of exactly those bytes, to count and to fill the tables, which
 * point into it. Every count is compared with the bytes left before anything is multiplied or
 * allocated.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/gguf.h"

static const int KIND_BYTES[GGUF_KIND_COUNT] = {          /* strings and arrays: as they come */
    [GGUF_KIND_U8] = 1,   [GGUF_KIND_I8] = 1,  [GGUF_KIND_BOOL] = 1, [GGUF_KIND_U16] = 2,
    [GGUF_KIND_I16] = 2,  [GGUF_KIND_U32] = 4, [GGUF_KIND_I32] = 4,  [GGUF_KIND_F32] = 4,
    [GGUF_KIND_U64] = 8,  [GGUF_KIND_I64] = 8, [GGUF_KIND_F64] = 8,
};

enum {
    KEY_RECORD_LEAST = 8 + 1 + 4 + 1,
    TENSOR_RECORD_LEAST = 8 + 1 + 4 + 8 + 4 + 8,
    ALIGN_DEFAULT = 32
};

struct view {
    const uint8_t *start, *p, *end;
    struct gguf *g;
    bool build;                                           /* last walk: fill the tables */
    uint64_t alignment;
    char *name_at;                                        /* next free byte of g->names */
    size_t name_bytes;
    struct err *e;
};

static uint64_t load(const uint8_t *p, int bytes) {
    uint64_t v = 0;
    for (int i = bytes - 1; i >= 0; i--) v = v << 8 | p[i];
    return v;
}

static size_t left(const struct view *v) { return (size_t)(v->end - v->p); }

static int fail(const struct view *v, const char *what) {
    return err_code(v->e, EXIT_ENV, "'%s': byte %zu: %s", v->g->path, (size_t)(v->p - v->start),
                    what);
}

static int take(struct view *v, int bytes, uint64_t *out, const char *field) {
    *out = 0;
    if (left(v) < (size_t)bytes)
        return err_code(v->e, EXIT_ENV,
                        "'%s': byte %zu: the file ends inside %s (is the download complete?)",
                        v->g->path, (size_t)(v->p - v->start), field);
    *out = load(v->p, bytes);
    v->p += bytes;
    return 0;
}

static int take_string(struct view *v, struct gguf_string *out, size_t most, const char *field) {
    uint64_t n;
    if (take(v, 8, &n, field) < 0) return -1;
    if (n > left(v) || n > most)
        return err_code(
            v->e, EXIT_ENV, "'%s': byte %zu: %s claims %llu bytes (%zu are left, the most is %zu)",
            v->g->path, (size_t)(v->p - v->start - 8), field, (unsigned long long)n, left(v), most);
    *out = (struct gguf_string){ (const char *)v->p, (size_t)n };
    v->p += n;
    return 0;
}

/* --- metadata --- */

static int skip_values(struct view *v, enum gguf_kind kind, uint64_t count) {
    struct gguf_string s;
    size_t least = kind == GGUF_KIND_STRING ? 8 : (size_t)KIND_BYTES[kind];
    if (count > left(v) / least)
        return fail(v, "a metadata value claims more elements than the file has bytes");
    if (kind != GGUF_KIND_STRING) {
        v->p += count * least;
        return 0;
    }
    for (uint64_t i = 0; i < count; i++)
        if (take_string(v, &s, GGUF_STRING_BYTES_MAX, "a metadata string") < 0) return -1;
    return 0;
}

static int take_kind(struct view *v, enum gguf_kind *out) {
    uint64_t kind;
    if (take(v, 4, &kind, "a metadata type") < 0) return -1;
    if (kind >= GGUF_KIND_COUNT) return fail(v, "unknown metadata type");
    *out = (enum gguf_kind)kind;
    return 0;
}

static int take_kv(struct view *v, struct gguf_kv *kv) {
    if (take_string(v, &kv->key, GGUF_KEY_BYTES_MAX, "a metadata key") < 0) return -1;
    if (kv->key.bytes == 0) return fail(v, "a metadata key is empty");
    if (take_kind(v, &kv->kind) < 0) return -1;
    kv->of = kv->kind;
    kv->count = 1;
    if (kv->kind == GGUF_KIND_ARRAY) {
        if (take_kind(v, &kv->of) < 0 || take(v, 8, &kv->count, "an array's length") < 0) return -1;
        if (kv->of == GGUF_KIND_ARRAY) return fail(v, "arrays of arrays are not supported");
    }
    kv->data = v->p;
    if (skip_values(v, kv->of, kv->count) < 0) return -1;
    static const char align[] = "general.alignment";
    if (kv->key.bytes == sizeof align - 1 && memcmp(kv->key.s, align, sizeof align - 1) == 0) {
        if (kv->kind != GGUF_KIND_U32) return fail(v, "'general.alignment' must be a uint32");
        v->alignment = load(kv->data, 4);
        if (v->alignment == 0 || (v->alignment & (v->alignment - 1)) ||
            v->alignment > GGUF_ALIGN_MAX)
            return err_code(v->e, EXIT_ENV,
                            "'%s': 'general.alignment' is %llu; it must be a power of two up to %d",
                            v->g->path, (unsigned long long)v->alignment, GGUF_ALIGN_MAX);
    }
    return 0;
}

/* --- tensor table --- */

static int bad_tensor(const struct view *v, struct gguf_string name, const char *what) {
    return err_code(v->e, EXIT_ENV, "'%s': tensor '%.*s': %s", v->g->path,
                    (int)(name.bytes > 200 ? 200 : name.bytes), name.s, what);
}

static int take_type(struct view *v, struct gguf_tensor *t, struct gguf_string name) {
    uint64_t type;
    int elements, bytes;
    if (take(v, 4, &type, "a tensor's type") < 0) return -1;
    const char *text = type < GGUF_TYPE_COUNT ? gguf_type_name((int)type) : NULL;
    if (text) gguf_type_block((enum gguf_type)type, &elements, &bytes);
    if (!text || !elements)
        return err_code(v->e, EXIT_ENV, "'%s': tensor '%.*s': type %llu (%s) is not supported",
                        v->g->path, (int)(name.bytes > 200 ? 200 : name.bytes), name.s,
                        (unsigned long long)type, text ? text : "unknown");
    t->type = (enum gguf_type)type;
    int64_t size;
    if (t->ne[0] % elements) return bad_tensor(v, name, "its rows are no whole number of blocks");
    if (__builtin_mul_overflow(t->elements / elements, (int64_t)bytes, &size))
        return bad_tensor(v, name, "its shape overflows");
    t->bytes = (size_t)size;
    return 0;
}

static int take_tensor(struct view *v, struct gguf_tensor *t, uint64_t *offset) {
    struct gguf_string name;
    uint64_t rank, ne;
    if (take_string(v, &name, GGUF_NAME_BYTES_MAX, "a tensor's name") < 0) return -1;
    if (name.bytes == 0 || memchr(name.s, 0, name.bytes))
        return fail(v, "a tensor's name is empty or holds a NUL");
    if (take(v, 4, &rank, "a tensor's rank") < 0) return -1;
    if (rank < 1 || rank > GGUF_RANK_MAX) return bad_tensor(v, name, "its rank must be 1 to 4");
    t->rank = (int)rank;
    t->elements = 1;
    for (int i = 0; i < GGUF_RANK_MAX; i++) t->ne[i] = 1;
    for (int i = 0; i < t->rank; i++) {
        if (take(v, 8, &ne, "a tensor's shape") < 0) return -1;
        if (ne == 0) return bad_tensor(v, name, "a dimension is 0");
        if (ne > INT64_MAX || __builtin_mul_overflow(t->elements, (int64_t)ne, &t->elements))
            return bad_tensor(v, name, "its shape overflows");
        t->ne[i] = (int64_t)ne;
    }
    if (take_type(v, t, name) < 0 || take(v, 8, offset, "a tensor's offset") < 0) return -1;
    if (*offset % v->alignment) return bad_tensor(v, name, "its offset is not aligned");
    v->name_bytes += name.bytes + 1;
    if (v->build) {
        t->name = v->name_at;
        memcpy(v->name_at, name.s, name.bytes);
        v->name_at += name.bytes + 1;                     /* the pool is zeroed */
    }
    return 0;
}

/* --- layout --- */

struct span { uint64_t begin, end; const char *name; };

static int by_begin(const void *a, const void *b) {
    const struct span *x = a, *y = b;
    return (x->begin > y->begin) - (x->begin < y->begin);
}

/* Points the tensors at their data; s[i] belongs to tensor i and is sorted afterwards. */
static int place(const struct view *v, struct span *s, int n, const uint8_t *data, uint64_t bytes) {
    for (int i = 0; i < n; i++) {
        if (s[i].end > bytes)
            return bad_tensor(v, (struct gguf_string){ s[i].name, strlen(s[i].name) },
                              "its data ends after the file (is the download complete?)");
        v->g->tensor[i].data = data + s[i].begin;
    }
    qsort(s, (size_t)n, sizeof *s, by_begin);
    for (int i = 1; i < n; i++)
        if (s[i].begin < s[i - 1].end)
            return bad_tensor(v, (struct gguf_string){ s[i].name, strlen(s[i].name) },
                              "its data overlaps another tensor's");
    return 0;
}

static int by_key(const void *a, const void *b) {
    const struct gguf_string *x = &((const struct gguf_kv *)a)->key,
                             *y = &((const struct gguf_kv *)b)->key;
    int c = memcmp(x->s, y->s, x->bytes < y->bytes ? x->bytes : y->bytes);
    return c ? c : (x->bytes > y->bytes) - (x->bytes < y->bytes);
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const struct gguf_tensor *)a)->name, ((const struct gguf_tensor *)b)->name);
}

static int check_doubles(const struct view *v) {
    struct gguf *g = v->g;
    qsort(g->kv, (size_t)g->keys, sizeof *g->kv, by_key);
    qsort(g->tensor, (size_t)g->tensors, sizeof *g->tensor, by_name);
    for (int i = 1; i < g->keys; i++)
        if (by_key(&g->kv[i - 1], &g->kv[i]) == 0)
            return err_code(v->e, EXIT_ENV, "'%s': metadata key '%.*s' comes twice", g->path,
                            (int)(g->kv[i].key.bytes > 200 ? 200 : g->kv[i].key.bytes),
                            g->kv[i].key.s);
    for (int i = 1; i < g->tensors; i++)
        if (by_name(&g->tensor[i - 1], &g->tensor[i]) == 0)
            return err_code(v->e, EXIT_ENV, "'%s': tensor '%.200s' comes twice", g->path,
                            g->tensor[i].name);
    return 0;
}

/* --- the walk --- */

static int take_start(struct view *v, uint64_t *tensors, uint64_t *keys) {
    uint64_t magic, version;
    if (take(v, 4, &magic, "the magic") < 0 || take(v, 4, &version, "the version") < 0) return -1;
    if (magic != 0x46554747) return err_code(v->e, EXIT_ENV, "'%s' is not a GGUF file", v->g->path);
    if (version != 2 && version != 3)
        return err_code(v->e, EXIT_ENV, "'%s': GGUF version %llu is not supported%s", v->g->path,
                        (unsigned long long)version,
                        version == 0x02000000 || version == 0x03000000 ? " (the file is big-endian)"
                                                                       : "");
    v->g->version = (uint32_t)version;
    if (take(v, 8, tensors, "the number of tensors") < 0 ||
        take(v, 8, keys, "the number of keys") < 0)
        return -1;
    if (*tensors > GGUF_TENSORS_MAX || *tensors > left(v) / TENSOR_RECORD_LEAST)
        return err_code(v->e, EXIT_ENV,
                        "'%s': the header claims %llu tensors (%zu bytes follow, the most is %d)",
                        v->g->path, (unsigned long long)*tensors, left(v), GGUF_TENSORS_MAX);
    if (*keys > GGUF_KEYS_MAX || *keys > left(v) / KEY_RECORD_LEAST)
        return err_code(v->e, EXIT_ENV,
                        "'%s': the header claims %llu keys (%zu bytes follow, the most is %d)",
                        v->g->path, (unsigned long long)*keys, left(v), GGUF_KEYS_MAX);
    return 0;
}

static int walk(struct view *v, struct span *spans) {
    uint64_t tensors = 0, keys = 0;
    v->p = v->start;
    v->alignment = ALIGN_DEFAULT;
    v->name_bytes = 0;
    if (take_start(v, &tensors, &keys) < 0) return -1;
    for (uint64_t i = 0; i < keys; i++) {
        struct gguf_kv kv;
        if (take_kv(v, &kv) < 0) return -1;
        if (v->build) v->g->kv[i] = kv;
    }
    for (uint64_t i = 0; i < tensors; i++) {
        struct gguf_tensor t = { 0 };
        uint64_t offset = 0;
        if (take_tensor(v, &t, &offset) < 0) return -1;
        if (offset > INT64_MAX || t.bytes > INT64_MAX - offset)
            return fail(v, "a tensor's offset overflows");
        if (!v->build) continue;
        v->g->tensor[i] = t;
        spans[i] = (struct span){ offset, offset + t.bytes, t.name };
    }
    v->g->keys = (int)keys;
    v->g->tensors = (int)tensors;
    return 0;
}

static int build(struct view *v, const uint8_t *data, size_t bytes) {
    struct gguf *g = v->g;
    size_t header = (size_t)(v->end - v->start), tensors = (size_t)g->tensors;
    size_t begin = header + (size_t)(-(uint64_t)header & (v->alignment - 1));
    g->names = v->name_at = mem_alloc(v->name_bytes + 1);
    g->kv = mem_alloc(((size_t)g->keys + 1) * sizeof *g->kv);
    g->tensor = mem_alloc((tensors + 1) * sizeof *g->tensor);
    struct span *spans = mem_alloc((tensors + 1) * sizeof *spans);
    v->build = true;
    int rc = walk(v, spans);
    if (rc == 0 && tensors && begin > bytes) rc = fail(v, "the file ends before the tensor data");
    if (rc == 0 && tensors) rc = place(v, spans, (int)tensors, data + begin, bytes - begin);
    if (rc == 0) rc = check_doubles(v);
    free(spans);
    return rc;
}

/* Where it ends is measured over the mapping, what it holds over the copy: the file may change at
 * any time. */
static int parse(struct gguf *g, const uint8_t *data, size_t bytes, struct err *e) {
    struct view v = { .start = data, .end = data + bytes, .g = g, .e = e };
    if (walk(&v, NULL) < 0) return -1;
    size_t header = (size_t)(v.p - data);
    g->header = mem_alloc(header);
    memcpy(g->header, data, header);
    v.start = g->header;
    v.end = g->header + header;
    if (walk(&v, NULL) < 0) return -1;
    if (v.p != v.end) return err_code(e, EXIT_ENV, "'%s' changed while it was read", g->path);
    return build(&v, data, bytes);
}

/* --- open --- */

int gguf_open_memory(struct gguf *g, const void *data, size_t bytes, const char *path,
                     struct err *e) {
    *g = (struct gguf){ 0 };
    snprintf(g->path, sizeof g->path, "%s", path);
    if (parse(g, data, bytes, e) == 0) return 0;
    gguf_close(g);
    return -1;
}

int gguf_open(struct gguf *g, const char *path, struct err *e) {
    struct fs_map map;
    *g = (struct gguf){ 0 };
    if (fs_map(&map, path, e) < 0) {
        if (e) e->code = EXIT_ENV;
        return -1;
    }
    if (gguf_open_memory(g, map.data, map.bytes, path, e) < 0) {
        fs_unmap(&map);
        return -1;
    }
    g->map = map;
    return 0;
}

void gguf_close(struct gguf *g) {
    fs_unmap(&g->map);
    free(g->header);
    free(g->names);
    free(g->kv);
    free(g->tensor);
    *g = (struct gguf){ 0 };
}

/* --- look up --- */

const struct gguf_kv *gguf_find(const struct gguf *g, const char *key) {
    struct gguf_kv k = { .key = { key, strlen(key) } };
    return g->keys ? bsearch(&k, g->kv, (size_t)g->keys, sizeof k, by_key) : NULL;
}

const struct gguf_tensor *gguf_tensor_find(const struct gguf *g, const char *name) {
    struct gguf_tensor t = { .name = name };
    return g->tensors ? bsearch(&t, g->tensor, (size_t)g->tensors, sizeof t, by_name) : NULL;
}

int64_t gguf_int_at(const struct gguf_kv *kv, uint64_t i) {
    assert(i < kv->count);
    uint64_t u = KIND_BYTES[kv->of]
                     ? load(kv->data + i * (uint64_t)KIND_BYTES[kv->of], KIND_BYTES[kv->of])
                     : 0;
    switch (kv->of) {
    case GGUF_KIND_U8:
    case GGUF_KIND_U16:
    case GGUF_KIND_U32:
    case GGUF_KIND_U64:
    case GGUF_KIND_I64: return (int64_t)u;
    case GGUF_KIND_I8: return (int8_t)u;
    case GGUF_KIND_I16: return (int16_t)u;
    case GGUF_KIND_I32: return (int32_t)u;
    case GGUF_KIND_BOOL: return u != 0;
    default: return 0;
    }
}

double gguf_num_at(const struct gguf_kv *kv, uint64_t i) {
    assert(i < kv->count);
    float f;
    double d;
    if (kv->of == GGUF_KIND_F32) return memcpy(&f, kv->data + 4 * i, 4), f;
    if (kv->of == GGUF_KIND_F64) return memcpy(&d, kv->data + 8 * i, 8), d;
    return 0;
}

bool gguf_int(const struct gguf *g, const char *key, int64_t *out) {
    const struct gguf_kv *kv = gguf_find(g, key);
    if (!kv || kv->kind == GGUF_KIND_ARRAY || kv->kind == GGUF_KIND_STRING ||
        kv->kind == GGUF_KIND_F32 || kv->kind == GGUF_KIND_F64)
        return false;
    int64_t v = gguf_int_at(kv, 0);
    if (kv->kind == GGUF_KIND_U64 && v < 0) return false;
    *out = v;
    return true;
}

bool gguf_num(const struct gguf *g, const char *key, double *out) {
    const struct gguf_kv *kv = gguf_find(g, key);
    if (!kv || (kv->kind != GGUF_KIND_F32 && kv->kind != GGUF_KIND_F64)) return false;
    *out = gguf_num_at(kv, 0);
    return true;
}

const uint8_t *gguf_string_next(const uint8_t *at, struct gguf_string *out) {
    uint64_t n = load(at, 8);
    *out = (struct gguf_string){ (const char *)at + 8, (size_t)n };
    return at + 8 + n;
}

bool gguf_text(const struct gguf *g, const char *key, struct gguf_string *out) {
    const struct gguf_kv *kv = gguf_find(g, key);
    if (!kv || kv->kind != GGUF_KIND_STRING) return false;
    gguf_string_next(kv->data, out);
    return true;
}
