/* packed.h - inside lib/model: the packed file, where every tensor lies in it, making it, checking
 * it.
 *
 * Layout: a header block (struct packed_header, then a struct packed_entry per tensor in
 * source_items' order), padded to 4096 bytes; then each tensor at a multiple of 64. Matrices are
 * kernel records (kernels/pack.h), vectors f32. Little endian.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_PACKED_H
#define QERL_PACKED_H
#include "lib/model/exclude.h"
#include "lib/model/quant.h"
#include "lib/model/source.h"

enum { PACKED_VERSION = 2, PACKED_ALIGN = 64, PACKED_HEADER_ALIGN = 4096 };

struct packed_header {
    char magic[8];                                   /* "QERLPACK" */
    uint32_t version, quant, rounding;
    int32_t arch, vocab, dim, layers, heads, kv_heads, head_dim, ffn_dim, tied, qkv_bias;
    uint32_t entries;
    uint64_t header_bytes, file_bytes;
    char sha256[SHA256_HEX + 7];                     /* of the source weights, NUL padded */
    /* CRC-32C of the table; of this struct up to here */
    uint32_t entries_crc, crc;
};
_Static_assert(sizeof(struct packed_header) == 160, "the packed header is 160 bytes on disk");
struct packed_entry {
    uint64_t offset, bytes;
    uint32_t format, crc;                            /* enum kern_format; of the bytes */
    float scale;                                     /* NVFP4's tensor scale; 1 otherwise */
    uint32_t zero;
};
_Static_assert(sizeof(struct packed_entry) == 32, "a packed entry is 32 bytes on disk");

/* where everything goes; a pure function of shape, quant, rounding, exclusions */
struct packed_plan {
    struct model_conf conf;
    enum model_quant quant;
    enum model_rounding rounding;
    char exclude[9];                                 /* model_exclude_id; "" where none counts */
    struct source_item *item;
    struct packed_entry *entry;
    int items;
    size_t header_bytes, file_bytes;
};
/* x: NULL = no exclusions. They count under a 4-bit format only. */
void packed_plan_init(struct packed_plan *p, const struct model_conf *c, enum model_quant q,
                      enum model_rounding r, const struct model_exclude *x);
void packed_plan_release(struct packed_plan *p);

/* Reads the source and packs one tensor to `to` (entry[item].bytes long); its tensor scale goes
 * into the plan's entry. stats is added to where values are quantised (an MXFP4 source is kept as
 * it is); or NULL. pool may be NULL. The bits do not depend on the number of threads. */
int packed_tensor(struct packed_plan *p, const struct source *s, int item, void *to,
                  struct quant_stats *stats, struct pool *pool, struct err *e);
/* Packs all tensors into memory of file_bytes bytes, the header last. `each` (or NULL) sees the
 * loss of each tensor. */
typedef void packed_each(void *ud, const struct source *s, int item,
                         const struct quant_stats *stats);
int packed_fill(struct packed_plan *p, const struct source *s, const char *sha256, uint8_t *to,
                struct pool *pool, packed_each *each, void *ud, struct err *e);
/* Makes `path` from the source: temporary file of this process, packed through a mapping, fsync,
 * rename. */
int packed_make(struct packed_plan *p, const struct source *s, const char *sha256, const char *path,
                struct pool *pool, packed_each *each, void *ud, struct err *e);
/* -1 with the reason when the mapping is not a whole packed file of this plan and source; 0 leaves
 * its tensor scales in the plan. `data_too`: the tensors' own checksums are compared as well (reads
 * everything). */
int packed_check(struct packed_plan *p, const char *sha256, const struct fs_map *m,
                 bool data_too, struct err *e);
/* "DIR/SHA-quant[-seed][-x-ID]" */
void packed_path(char out[FS_PATH_MAX], const char *dir, const char *sha256,
                 const struct packed_plan *p);
#endif
