/* model.c - see model.h. Order: names and shapes, the sum that names the weights, opening, closing.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/model.h"

#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "kernels/pack.h"
#include "lib/base/clock.h"
#include "lib/base/fs.h"
#include "lib/base/log.h"
#include "lib/model/exclude.h"
#include "lib/model/packed.h"

struct model_store {
    struct fs_map map;                               /* the packed file, or */
    void *memory;                                    /* packed in memory, or */
    kptr device;                                     /* a device's copy */
};

/* --- names and shapes --- */

const char *const model_proj_name[PROJ_COUNT] = { "q_proj",    "k_proj",  "v_proj",   "o_proj",
                                                  "gate_proj", "up_proj", "down_proj" };
static const char *const QUANT[][2] = { [MODEL_QUANT_BF16] = { "bf16", "bf16" },
                                        [MODEL_QUANT_MXFP4] = { "mxfp4", "mxfp4-seed" },
                                        [MODEL_QUANT_NVFP4] = { "nvfp4", "nvfp4-seed" },
                                        [MODEL_QUANT_F32] = { "f32", "f32" } };

const char *model_quant_name(enum model_quant q) { return QUANT[q][0]; }

bool model_quant_rounds(enum model_quant q) {
    return q == MODEL_QUANT_MXFP4 || q == MODEL_QUANT_NVFP4;
}

const char *model_quant_label(enum model_quant q, enum model_rounding r) {
    return QUANT[q][r == MODEL_ROUNDING_SEED];
}

/* [weights][activations][adapter][rounding][excluded] */
#define EACH_ROUNDING(before, after)                                                               \
    { { before after, before after "-x" }, { before "-seed" after, before "-seed" after "-x" } }
#define WITH_ADAPTER(before, after)                                                                \
    EACH_ROUNDING(before, after "-lora-mxfp4"), EACH_ROUNDING(before, after "-lora-nvfp4")
#define EACH_ADAPTER(before, after) { EACH_ROUNDING(before, after), WITH_ADAPTER(before, after) }
#define UNROUNDED(text) { { { text, text }, { text, text } }, WITH_ADAPTER(text, "") }
static const char *const FORMAT[4][3][3][2][2] = {
    [MODEL_QUANT_BF16] = { UNROUNDED("bf16"), EACH_ADAPTER("mxfp4", "-w16a4"),
                           EACH_ADAPTER("nvfp4", "-w16a4") },
    [MODEL_QUANT_MXFP4] = { EACH_ADAPTER("mxfp4", ""), EACH_ADAPTER("mxfp4", "-w4a4"),
                            EACH_ADAPTER("mxfp4-nvfp4", "-w4a4") },
    [MODEL_QUANT_NVFP4] = { EACH_ADAPTER("nvfp4", ""), EACH_ADAPTER("nvfp4-mxfp4", "-w4a4"),
                            EACH_ADAPTER("nvfp4", "-w4a4") },
    [MODEL_QUANT_F32] = { UNROUNDED("f32"), EACH_ADAPTER("mxfp4", "-w32a4"),
                          EACH_ADAPTER("nvfp4", "-w32a4") }
};

const char *model_format_label(enum model_quant weights, enum model_quant activations,
                               enum model_quant adapter, enum model_rounding r, bool excluded) {
    assert(activations <= MODEL_QUANT_NVFP4 && adapter <= MODEL_QUANT_NVFP4);
    return FORMAT[weights][activations][adapter][r == MODEL_ROUNDING_SEED][excluded];
}

int model_quant_parse(const char *text) {
    for (int q = 0; q < (int)COUNT_OF(QUANT); q++)
        if (strcmp(QUANT[q][0], text) == 0) return q;
    return -1;
}

void model_proj_shape(const struct model_conf *c, enum proj p, int *out, int *in) {
    int q_dim = c->heads * c->head_dim, kv_dim = c->kv_heads * c->head_dim;
    bool kv = p == PROJ_K || p == PROJ_V, wide = p == PROJ_GATE || p == PROJ_UP;
    *out = p == PROJ_Q ? q_dim : kv ? kv_dim : wide ? c->ffn_dim : c->dim;
    *in = p == PROJ_O ? q_dim : p == PROJ_DOWN ? c->ffn_dim : c->dim;
}

/* --- values --- */

struct unpacking {
    const struct kern_weight *w;
    const void *records;                             /* of w, on the host */
    float *values;
};

static void unpack_rows(void *arg, int part, int parts) {
    const struct unpacking *x = arg;
    const struct kern_weight *w = x->w;
    for (int o = part; o < w->out; o += parts)
        for (int i = 0; i < w->in; i++)
            x->values[(size_t)o * (size_t)w->in + (size_t)i] =
                w->scale * pack_get(x->records, w->format, w->out, w->in, o, i);
}

void model_values(struct kern *k, const struct kern_weight *w, float *values) {
    const size_t bytes = kern_weight_bytes(w->format, w->out, w->in);
    void *records = mem_alloc(bytes);
    struct unpacking x = { w, records, values };
    k->download(k, records, w->data, bytes);
    if (k->pool) pool_run(k->pool, pool_threads(k->pool), unpack_rows, &x);
    else unpack_rows(&x, 0, 1);
    free(records);
}

/* --- the sum that names the weights --- */

/* One file: its own sum. Several: the sum of the lines "SUM  NAME\n", as `sha256sum * | sha256sum`
 *                                         prints
 * in their folder. */
static int sum_files(const struct source_files *f, char out[SHA256_HEX], struct err *e) {
    if (f->n == 1) return sha256_file(f->path[0], out, e);
    struct sha256 all;
    sha256_init(&all);
    for (int i = 0; i < f->n; i++) {
        const char *slash = strrchr(f->path[i], '/'), *name = slash ? slash + 1 : f->path[i];
        char hex[SHA256_HEX];
        if (sha256_file(f->path[i], hex, e) < 0) return -1;
        sha256_add(&all, hex, SHA256_HEX - 1);
        sha256_add(&all, "  ", 2);
        sha256_add(&all, name, strlen(name));
        sha256_add(&all, "\n", 1);
    }
    sha256_hex(&all, out);
    return 0;
}

/* What the cached sum holds for: full path, size and time of every file. */
static int sum_key(const struct source_files *f, struct str *key, struct err *e) {
    str_puts(key, "qerl-source 1\n");
    for (int i = 0; i < f->n; i++) {
        struct stat st;
        char *full = realpath(f->path[i], NULL);
        if (!full || stat(full, &st) < 0) {
            free(full);
            return err_code(e, EXIT_ENV, "cannot open '%s'", f->path[i]);
        }
        str_printf(key, "%lld %lld.%09ld %s\n", (long long)st.st_size, (long long)st.st_mtim.tv_sec,
                   st.st_mtim.tv_nsec, full);
        free(full);
    }
    return 0;
}

static bool sum_read(const char *path, const struct str *key, char out[SHA256_HEX]) {
    struct str text;
    str_init(&text);
    bool hit = fs_read(&text, path, key->len + SHA256_HEX, NULL) == 0 &&
               text.len == key->len + SHA256_HEX && memcmp(text.s, key->s, key->len) == 0 &&
               text.s[text.len - 1] == '\n' &&
               strspn(text.s + key->len, "0123456789abcdef") == SHA256_HEX - 1;
    if (hit) snprintf(out, SHA256_HEX, "%.64s", text.s + key->len);
    str_release(&text);
    return hit;
}

/* A lost cache only costs time, so a failure is told and forgotten. Other stages may write it too:
 * own name, then rename. */
static void sum_write(const char *path, struct str *key, const char *sum) {
    char own[FS_PATH_MAX];
    struct err e = { 0 };
    if (snprintf(own, sizeof own, "%s.%ld", path, (long)getpid()) >= (int)sizeof own) return;
    str_printf(key, "%s\n", sum);
    if (fs_replace(own, key->s, key->len, &e) == 0 && rename(own, path) == 0) return;
    unlink(own);
    log_warn("cannot keep the model's checksum in '%s': %s", path, e.text);
}

int model_sha256(const char *path, const char *packed_dir, char out[SHA256_HEX], struct err *e) {
    struct source_files files;
    struct str key;
    char hex[SHA256_HEX], name[SHA256_HEX + 8], cache[FS_PATH_MAX], file[FS_PATH_MAX];
    path = model_path_resolve(path, file);
    if (source_files(&files, path, e) < 0) return -1;
    str_init(&key);
    int rc = sum_key(&files, &key, e);
    if (rc == 0 && packed_dir) {
        char *full = realpath(path, NULL);
        sha256_of(full ? full : path, strlen(full ? full : path), hex);
        free(full);
        snprintf(name, sizeof name, "%.16s.source", hex);
        fs_join(cache, sizeof cache, packed_dir, name);
        if (!sum_read(cache, &key, out)) {
            rc = sum_files(&files, out, e);
            if (rc == 0 && fs_mkdirs(packed_dir, NULL) == 0) sum_write(cache, &key, out);
        }
    } else if (rc == 0) rc = sum_files(&files, out, e);
    source_files_release(&files);
    str_release(&key);
    if (rc < 0 && e && !e->code) e->code = EXIT_ENV;
    return rc;
}

/* --- opening --- */

size_t model_plan(const struct model_conf *c, enum model_quant q, const struct model_exclude *x) {
    struct packed_plan p;
    packed_plan_init(&p, c, q, MODEL_ROUNDING_OCP, x);
    const size_t bytes = p.file_bytes;
    packed_plan_release(&p);
    return bytes;
}

static int make_file(struct model *m, struct packed_plan *p, const struct model_opts *o,
                     const char *path, struct err *e) {
    struct source *s;
    double start = clock_seconds();
    if (fs_mkdirs(o->packed_dir, e) < 0 || source_open(&s, o->path, &m->conf, e) < 0) return -1;
    int rc = packed_make(p, s, m->sha256, path, m->kern ? m->kern->pool : NULL, NULL, NULL, e);
    source_close(&s);
    if (rc == 0)
        log_info("packed '%s' as %s: %.1f MB in %.1f s, kept in '%s'", o->path,
                 model_quant_name(o->quant), (double)p->file_bytes / 1e6, clock_seconds() - start,
                 path);
    return rc;
}

static int map_packed(struct model *m, struct packed_plan *p, const struct model_opts *o,
                      struct err *e) {
    char path[FS_PATH_MAX];
    struct err why = { 0 };
    packed_path(path, o->packed_dir, m->sha256, p);
    if (fs_exists(path)) {
        if (fs_map(&m->store->map, path, &why) == 0 &&
            packed_check(p, m->sha256, &m->store->map, false, &why) == 0)
            return 0;
        fs_unmap(&m->store->map);
        log_warn("packed model '%s' is made again: %s", path, why.text);
    }
    if (make_file(m, p, o, path, e) < 0 || fs_map(&m->store->map, path, e) < 0) return -1;
    if (packed_check(p, m->sha256, &m->store->map, false, e) == 0) return 0;
    return err_wrap(e, "packed model '%s' cannot be used", path);
}

static int pack_in_memory(struct model *m, struct packed_plan *p, const struct model_opts *o,
                          struct err *e) {
    struct source *s;
    m->store->memory = aligned_alloc(PACKED_HEADER_ALIGN,
                                     (p->file_bytes + PACKED_HEADER_ALIGN - 1) /
                                         PACKED_HEADER_ALIGN * PACKED_HEADER_ALIGN);
    if (!m->store->memory)
        return err_code(e, EXIT_ENV, "out of memory: packing '%s' takes %zu bytes", o->path,
                        p->file_bytes);
    memset(m->store->memory, 0, p->file_bytes);
    if (source_open(&s, o->path, &m->conf, e) < 0) return -1;
    int rc = packed_fill(p, s, m->sha256, m->store->memory, m->kern ? m->kern->pool : NULL, NULL,
                         NULL, e);
    source_close(&s);
    return rc;
}

/* Hosts compute out of the mapping itself; a backend named "kind:number" is a device and gets a
 * copy. */
static int to_backend(struct model *m, const struct packed_plan *p, kptr *base, struct err *e) {
    struct model_store *s = m->store;
    const void *from = s->memory ? s->memory : s->map.data;
    *base = (kptr){ (void *)(uintptr_t)from };
    if (!m->kern || !strchr(m->kern->name, ':')) return 0;
    if (m->kern->alloc(m->kern, &s->device, p->file_bytes, e) < 0)
        return err_wrap(e, "cannot load the model");
    m->kern->upload(m->kern, s->device, from, p->file_bytes);
    if (m->kern->sync(m->kern, e) < 0) return err_wrap(e, "cannot load the model");
    *base = s->device;
    fs_unmap(&s->map);
    free(s->memory);
    s->memory = NULL;
    return 0;
}

static void point_at(struct model *m, const struct packed_plan *p, const struct model_exclude *ex,
                     kptr base) {
    m->layer = mem_alloc((size_t)m->conf.layers * sizeof *m->layer);
    for (int i = 0; i < p->items; i++) {
        const struct source_item *x = &p->item[i];
        kptr at = kptr_at(base, p->entry[i].offset);
        struct kern_weight w = { at, (enum kern_format)p->entry[i].format, x->rows, x->cols,
                                 p->entry[i].scale };
        struct model_layer *l = x->layer >= 0 ? &m->layer[x->layer] : NULL;
        switch (x->kind) {
        case SOURCE_KIND_EMBED: m->embed = w; break;
        case SOURCE_KIND_HEAD: m->head = w; break;
        case SOURCE_KIND_NORM_FINAL: m->norm_final = at; break;
        case SOURCE_KIND_NORM_IN: l->norm_in = at; break;
        case SOURCE_KIND_NORM_POST: l->norm_post = at; break;
        case SOURCE_KIND_BIAS: l->bias[x->proj] = at; break;
        case SOURCE_KIND_PROJ:
            l->w[x->proj] = w;
            l->quant_in[x->proj] = m->activations && !ex->on[x->layer][x->proj];
            l->quant_adapter[x->proj] = m->adapter && !ex->on[x->layer][x->proj];
            break;
        }
    }
    if (m->conf.tied) m->head = m->embed;
}

int model_open(struct model **out, struct kern *k, const struct model_opts *o, struct err *e) {
    struct model *m = mem_alloc(sizeof *m);
    struct packed_plan p = { 0 };
    struct model_exclude x;
    kptr base;
    *out = NULL;
    m->store = mem_alloc(sizeof *m->store);
    m->kern = k;
    m->quant = o->quant;
    m->rounding = o->rounding;
    m->activations = o->activations;
    m->adapter = o->adapter;
    int rc = model_conf_load(&m->conf, o->path, e);
    if (rc == 0 && (rc = model_exclude_make(&x, o->exclude, &m->conf, e)) < 0)
        err_wrap(e, "quant.exclude");
    if (rc == 0) rc = model_sha256(o->path, o->packed_dir, m->sha256, e);
    if (rc == 0) {
        m->excluded = x.count;
        packed_plan_init(&p, &m->conf, o->quant, o->rounding, &x);
        rc = o->packed_dir ? map_packed(m, &p, o, e) : pack_in_memory(m, &p, o, e);
    }
    if (rc == 0) rc = to_backend(m, &p, &base, e);
    if (rc == 0) point_at(m, &p, &x, base);
    packed_plan_release(&p);
    if (rc == 0) {
        *out = m;
        return 0;
    }
    model_close(&m);
    if (e && !e->code) e->code = EXIT_ENV;
    return -1;
}

/* --- closing --- */

void model_close(struct model **mp) {
    struct model *m = *mp;
    if (!m) return;
    if (m->store->device.p) m->kern->free(m->kern, &m->store->device);
    fs_unmap(&m->store->map);
    free(m->store->memory);
    free(m->store);
    free(m->layer);
    free(m);
    *mp = NULL;
}
