/* packed.c - see packed.h. Order: the plan, one tensor, all of them, the file, checking it.
 *
 * A tensor is packed in chunks of whole panels, which lie one after the other: a chunk needs little
 * memory, and chunks can be spread over threads without changing a bit. What the base model's
 * weights are: the source's values rounded to bf16. They are stored so, or quantised from there;
 * only MODEL_QUANT_F32 keeps the source's own precision. Vectors are never rounded.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/packed.h"

#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <math.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kernels/pack.h"
#include "lib/base/fs.h"

enum { CHUNK_VALUES = 1 << 18 };

/* --- the plan --- */

static size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

static enum kern_format format_of(const struct source_item *x, enum model_quant q,
                                  const struct model_exclude *ex) {
    if (!source_is_matrix(x) || q == MODEL_QUANT_F32) return KERN_FORMAT_F32;
    if (x->kind != SOURCE_KIND_PROJ || !model_quant_rounds(q)) return KERN_FORMAT_BF16;
    if (ex && ex->on[x->layer][x->proj]) return KERN_FORMAT_BF16;
    return q == MODEL_QUANT_MXFP4 ? KERN_FORMAT_MXFP4 : KERN_FORMAT_NVFP4;
}

void packed_plan_init(struct packed_plan *p, const struct model_conf *c, enum model_quant q,
                      enum model_rounding r, const struct model_exclude *ex) {
    *p = (struct packed_plan){ .conf = *c, .quant = q, .rounding = MODEL_ROUNDING_OCP };
    if (model_quant_rounds(q)) {
        p->rounding = r;
        if (ex) model_exclude_id(ex, p->exclude);
    }
    p->items = source_items(c, &p->item);
    p->entry = mem_alloc((size_t)p->items * sizeof *p->entry);
    p->header_bytes = round_up(sizeof(struct packed_header) + (size_t)p->items * sizeof *p->entry,
                               PACKED_HEADER_ALIGN);
    size_t at = p->header_bytes;
    for (int i = 0; i < p->items; i++) {
        const struct source_item *x = &p->item[i];
        enum kern_format f = format_of(x, q, ex);
        size_t bytes = source_is_matrix(x) ? kern_weight_bytes(f, x->rows, x->cols)
                                           : (size_t)x->cols * sizeof(float);
        p->entry[i] = (struct packed_entry){
            .offset = at, .bytes = bytes, .format = (uint32_t)f, .scale = 1
        };
        at = round_up(at + bytes, PACKED_ALIGN);
    }
    p->file_bytes = at;
}

void packed_plan_release(struct packed_plan *p) {
    free(p->item);
    free(p->entry);
    *p = (struct packed_plan){ 0 };
}

/* --- one tensor --- */

struct job {
    const struct packed_plan *p;
    const struct source *s;
    int item, rows_chunk;
    uint8_t *to;
    float *amax;                                             /* [chunks], of run_amax */
    struct quant_stats *stats;                               /* [chunks] or NULL */
    struct err *err;                                         /* [chunks]; text "" = fine */
};

static int chunk_floats(const struct job *j, int row, int n, float *values, struct err *e) {
    const struct source_item *x = &j->p->item[j->item];
    if (source_rows(j->s, j->item, row, n, values, e) < 0) return -1;
    int64_t count = (int64_t)n * x->cols, bad = quant_not_finite(values, count);
    if (bad >= 0)
        return err_code(e, EXIT_ENV,
                        "tensor '%s' holds a value that is not finite (row %lld, column %lld)",
                        source_name(j->s, j->item), (long long)(row + bad / x->cols),
                        (long long)(bad % x->cols));
    if (j->p->quant != MODEL_QUANT_F32 && source_is_matrix(x))
        for (int64_t i = 0; i < count; i++) {
            values[i] = bf16_to_f32(f32_to_bf16(values[i]));
            if (values[i] - values[i] != 0)
                return err_code(e, EXIT_ENV, "tensor '%s' holds a value too large for bf16",
                                source_name(j->s, j->item));
        }
    return 0;
}

/* Codes and, after them, scales of n rows in a 4-bit format. */
static int chunk_codes(const struct job *j, int row, int n, float *values, uint8_t *codes,
                       struct quant_stats *stats, struct err *e) {
    const struct packed_entry *x = &j->p->entry[j->item];
    const enum model_rounding r = j->p->rounding;
    const int cols = j->p->item[j->item].cols;
    uint8_t *scales = codes + (size_t)n * (size_t)cols;
    if (x->format == KERN_FORMAT_MXFP4 && source_is_mxfp4(j->s, j->item))
        return source_rows_mxfp4(j->s, j->item, row, n, codes, scales, e);
    if (chunk_floats(j, row, n, values, e) < 0) return -1;
    if (x->format == KERN_FORMAT_MXFP4)
        return quant_mxfp4(values, n, cols, r, codes, scales, stats, e);
    return quant_nvfp4(values, n, cols, r, x->scale, codes, scales, stats, e);
}

static int chunk(const struct job *j, int row, int n, uint8_t *to, struct quant_stats *stats,
                 struct err *e) {
    const struct source_item *x = &j->p->item[j->item];
    enum kern_format f = (enum kern_format)j->p->entry[j->item].format;
    const size_t count = (size_t)n * (size_t)x->cols;
    float *values = mem_alloc(count * sizeof *values);
    int rc;
    if (f == KERN_FORMAT_MXFP4 || f == KERN_FORMAT_NVFP4) {
        const int block = f == KERN_FORMAT_MXFP4 ? QUANT_BLOCK : QUANT_BLOCK_NVFP4;
        uint8_t *codes = mem_alloc(count + (size_t)n * (size_t)((x->cols + block - 1) / block));
        rc = chunk_codes(j, row, n, values, codes, stats, e);
        if (rc == 0) pack_codes(to, f, codes, codes + count, n, x->cols);
        free(codes);
    } else {
        rc = chunk_floats(j, row, n, values, e);
        if (rc == 0 && source_is_matrix(x)) pack_f32(to, f, values, n, x->cols);
        else if (rc == 0) memcpy(to, values, count * sizeof *values);
    }
    free(values);
    return rc;
}

static int chunk_rows(const struct job *j, int part, int *row) {
    const int left = j->p->item[j->item].rows - (*row = part * j->rows_chunk);
    return left < j->rows_chunk ? left : j->rows_chunk;
}

static void run_chunk(void *arg, int part, int parts) {
    const struct job *j = arg;
    int row, n = chunk_rows(j, part, &row);
    enum kern_format f = (enum kern_format)j->p->entry[j->item].format;
    (void)parts;
    /* rows_chunk is a multiple of a panel */
    size_t at = row ? kern_weight_bytes(f, row, j->p->item[j->item].cols) : 0;
    chunk(j, row, n, j->to + at, j->stats ? &j->stats[part] : NULL, &j->err[part]);
}

static void run_amax(void *arg, int part, int parts) {
    const struct job *j = arg;
    int row, n = chunk_rows(j, part, &row);
    const size_t count = (size_t)n * (size_t)j->p->item[j->item].cols;
    float *values = mem_alloc(count * sizeof *values), amax = 0;
    (void)parts;
    if (chunk_floats(j, row, n, values, &j->err[part]) == 0)
        for (size_t i = 0; i < count; i++) amax = fabsf(values[i]) > amax ? fabsf(values[i]) : amax;
    j->amax[part] = amax;
    free(values);
}

/* -1 with the error of the first chunk that has one. */
static int run_chunks(struct job *j, int chunks, void (*fn)(void *, int, int), struct pool *pool,
                      struct err *e) {
    if (pool && chunks > 1) pool_run(pool, chunks, fn, j);
    else
        for (int i = 0; i < chunks; i++) fn(j, i, chunks);
    for (int i = 0; i < chunks; i++)
        if (j->err[i].text[0]) {
            if (e) *e = j->err[i];
            return -1;
        }
    return 0;
}

int packed_tensor(struct packed_plan *p, const struct source *s, int item, void *to,
                  struct quant_stats *stats, struct pool *pool, struct err *e) {
    const struct source_item *x = &p->item[item];
    struct job j = { .p = p, .s = s, .item = item, .to = to };
    j.rows_chunk = CHUNK_VALUES / x->cols / KERN_OUT_BLOCK * KERN_OUT_BLOCK;
    if (j.rows_chunk < KERN_OUT_BLOCK) j.rows_chunk = KERN_OUT_BLOCK;
    int chunks = (x->rows + j.rows_chunk - 1) / j.rows_chunk, rc = 0;
    j.err = mem_alloc((size_t)chunks * sizeof *j.err);
    j.stats = stats ? mem_alloc((size_t)chunks * sizeof *j.stats) : NULL;
    j.amax = mem_alloc((size_t)chunks * sizeof *j.amax);
    if (p->entry[item].format == KERN_FORMAT_NVFP4) {
        float amax = 0;
        rc = run_chunks(&j, chunks, run_amax, pool, e);
        for (int i = 0; i < chunks; i++) amax = j.amax[i] > amax ? j.amax[i] : amax;
        p->entry[item].scale = quant_nvfp4_tensor_scale(amax, p->rounding);
    }
    if (rc == 0) rc = run_chunks(&j, chunks, run_chunk, pool, e);
    for (int i = 0; stats && i < chunks; i++) quant_stats_add(stats, &j.stats[i]);
    free(j.amax);
    free(j.stats);
    free(j.err);
    return rc;
}

/* --- all of them --- */

static void header_fill(struct packed_header *h, const struct packed_plan *p, const char *sha256) {
    const struct model_conf *c = &p->conf;
    memset(h, 0, sizeof *h);
    memcpy(h->magic, "QERLPACK", 8);
    h->version = PACKED_VERSION;
    h->quant = (uint32_t)p->quant;
    h->rounding = (uint32_t)p->rounding;
    h->arch = (int32_t)c->arch;
    h->vocab = c->vocab;
    h->dim = c->dim;
    h->layers = c->layers;
    h->heads = c->heads;
    h->kv_heads = c->kv_heads;
    h->head_dim = c->head_dim;
    h->ffn_dim = c->ffn_dim;
    h->tied = c->tied;
    h->qkv_bias = c->qkv_bias;
    h->entries = (uint32_t)p->items;
    h->header_bytes = p->header_bytes;
    h->file_bytes = p->file_bytes;
    memcpy(h->sha256, sha256, strnlen(sha256, SHA256_HEX - 1));
}

int packed_fill(struct packed_plan *p, const struct source *s, const char *sha256, uint8_t *to,
                struct pool *pool, packed_each *each, void *ud, struct err *e) {
    for (int i = 0; i < p->items; i++) {
        struct packed_entry *x = &p->entry[i];
        struct quant_stats stats = { 0 };
        if (packed_tensor(p, s, i, to + x->offset, each ? &stats : NULL, pool, e) < 0) return -1;
        x->crc = crc32c(0, to + x->offset, x->bytes);
        if (each) each(ud, s, i, &stats);
    }
    struct packed_header h;
    size_t table = (size_t)p->items * sizeof *p->entry;
    header_fill(&h, p, sha256);
    h.entries_crc = crc32c(0, p->entry, table);
    h.crc = crc32c(0, &h, offsetof(struct packed_header, crc));
    memcpy(to, &h, sizeof h);
    memcpy(to + sizeof h, p->entry, table);
    return 0;
}

/* --- the file --- */

void packed_path(char out[FS_PATH_MAX], const char *dir, const char *sha256,
                 const struct packed_plan *p) {
    char name[SHA256_HEX + 32];
    snprintf(name, sizeof name, "%s-%s%s%s", sha256, model_quant_label(p->quant, p->rounding),
             *p->exclude ? "-x-" : "", p->exclude);
    fs_join(out, FS_PATH_MAX, dir, name);
}

static int sync_dir_of(const char *path, struct err *e) {
    char dir[FS_PATH_MAX];
    snprintf(dir, sizeof dir, "%s", path);
    char *slash = strrchr(dir, '/');
    if (!slash) return fs_sync_dir(".", e);
    slash[slash == dir] = 0;
    return fs_sync_dir(dir, e);
}

static int make_at(struct packed_plan *p, const struct source *s, const char *sha256, int fd,
                   const char *tmp, struct pool *pool, packed_each *each, void *ud, struct err *e) {
    /* a full disk is told here, not by SIGBUS */
    int failed = posix_fallocate(fd, 0, (off_t)p->file_bytes);
    if (failed)
        return err_code(e, EXIT_ENV, "cannot make '%s' (%zu bytes): %s", tmp, p->file_bytes,
                        strerror(failed));
    void *to = mmap(NULL, p->file_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (to == MAP_FAILED) return err_code(e, EXIT_ENV, "cannot map '%s': %s", tmp, strerror(errno));
    int rc = packed_fill(p, s, sha256, to, pool, each, ud, e);
    if (rc == 0 && msync(to, p->file_bytes, MS_SYNC) < 0)
        rc = err_code(e, EXIT_ENV, "cannot write '%s': %s", tmp, strerror(errno));
    munmap(to, p->file_bytes);
    if (rc == 0 && fsync(fd) < 0)
        rc = err_code(e, EXIT_ENV, "cannot make '%s' durable: %s", tmp, strerror(errno));
    return rc;
}

int packed_make(struct packed_plan *p, const struct source *s, const char *sha256, const char *path,
                struct pool *pool, packed_each *each, void *ud, struct err *e) {
    char tmp[FS_PATH_MAX];
    if (snprintf(tmp, sizeof tmp, "%s.%ld.tmp", path, (long)getpid()) >= (int)sizeof tmp)
        return err_code(e, EXIT_ENV, "path too long: '%s'", path);
    int fd = open(tmp, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0) return err_code(e, EXIT_ENV, "cannot create '%s': %s", tmp, strerror(errno));
    int rc = make_at(p, s, sha256, fd, tmp, pool, each, ud, e);
    close(fd);
    if (rc == 0 && rename(tmp, path) < 0)
        rc = err_code(e, EXIT_ENV, "cannot rename '%s' to '%s': %s", tmp, path, strerror(errno));
    if (rc < 0) unlink(tmp);
    return rc < 0 ? rc : sync_dir_of(path, e);
}

/* --- checking it --- */

int packed_check(struct packed_plan *p, const char *sha256, const struct fs_map *m,
                 bool data_too, struct err *e) {
    struct packed_header h, want;
    size_t table = (size_t)p->items * sizeof *p->entry;
    if (m->bytes < sizeof h) return err_code(e, EXIT_ENV, "%zu bytes are too few", m->bytes);
    memcpy(&h, m->data, sizeof h);
    header_fill(&want, p, sha256);
    if (memcmp(h.magic, want.magic, sizeof h.magic) != 0)
        return err_code(e, EXIT_ENV, "it is no packed model");
    if (h.version != want.version)
        return err_code(e, EXIT_ENV, "it has version %u, this program makes version %u", h.version,
                        want.version);
    if (h.crc != crc32c(0, &h, offsetof(struct packed_header, crc)))
        return err_code(e, EXIT_ENV, "its header is damaged");
    if (memcmp(&h, &want, offsetof(struct packed_header, entries_crc)) != 0)
        return err_code(e, EXIT_ENV, "it was packed from another model or shape");
    if (m->bytes != p->file_bytes)
        return err_code(e, EXIT_ENV, "it has %zu bytes instead of %zu", m->bytes, p->file_bytes);
    if (h.entries_crc != crc32c(0, m->data + sizeof h, table))
        return err_code(e, EXIT_ENV, "its table is damaged");
    for (int i = 0; i < p->items; i++) {
        struct packed_entry x;
        memcpy(&x, m->data + sizeof h + (size_t)i * sizeof x, sizeof x);
        if (x.offset != p->entry[i].offset || x.bytes != p->entry[i].bytes ||
            x.format != p->entry[i].format || !(x.scale > 0) || x.scale > FLT_MAX)
            return err_code(e, EXIT_ENV, "its table does not fit the shape");
        if (data_too && x.crc != crc32c(0, m->data + x.offset, x.bytes))
            return err_code(e, EXIT_ENV, "tensor %d of %d is damaged (checksum)", i, p->items);
        p->entry[i].scale = x.scale;
    }
    return 0;
}
