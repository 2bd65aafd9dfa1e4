/* safetensors.h - named tensors in one file: read through a mapping, written durably.
 *
 * Knows: the format (u64 length, JSON header, packed data) and every rule a file must keep before a
 * byte of it is used. Does not know: what a name means or which shape a model wants.
 * Ownership: st_open owns the mapping and a private copy of the header; names and data are lent
 * until st_close.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_SAFETENSORS_H
#define QERL_SAFETENSORS_H
#include "lib/base/fs.h"

enum { ST_RANK_MAX = 8, ST_TENSORS_MAX = 65536, ST_NAME_MAX = 1024, ST_HEADER_MAX = 100000000 };
enum st_dtype {
    ST_DTYPE_F32,
    ST_DTYPE_F16,
    ST_DTYPE_BF16,
    ST_DTYPE_F64,
    ST_DTYPE_I64,
    ST_DTYPE_I32,
    ST_DTYPE_I16,
    ST_DTYPE_I8,
    ST_DTYPE_U64,
    ST_DTYPE_U32,
    ST_DTYPE_U16,
    ST_DTYPE_U8,
    ST_DTYPE_BOOL,
    ST_DTYPE_F8_E4M3,
    ST_DTYPE_F8_E5M2,
    ST_DTYPE_COUNT
};

struct st_tensor {
    const char *name;
    enum st_dtype dtype;
    int rank;                                        /* 0 = a scalar */
    int64_t shape[ST_RANK_MAX];
    int64_t elements;
    /* elements * width bytes, little endian, any alignment */
    const uint8_t *data;
};

struct st_file {
    struct fs_map map;
    char *header;                                    /* private copy: the names live in it */
    struct st_tensor *tensor;                        /* sorted by name */
    int count;
    char path[FS_PATH_MAX];
};

/* Maps and checks the whole header; -1 (EXIT_ENV) with the file, and the tensor and field at
 * fault. */
int st_open(struct st_file *f, const char *path, struct err *e);
void st_close(struct st_file *f);                    /* back to zeroes; fine on a zeroed struct */
/* The same over bytes in memory (tests, fuzzing): `path` only names them; lends `data`. */
int st_open_memory(struct st_file *f, const void *data, size_t bytes, const char *path,
                   struct err *e);

const struct st_tensor *st_find(const struct st_file *f, const char *name);   /* NULL if absent */
/* F32, F16 and BF16 only. out has t->elements floats. */
int st_to_f32(const struct st_tensor *t, float *out, struct err *e);
/* Part of it: elements first .. first+n-1. */
int st_to_f32_part(const struct st_tensor *t, int64_t first, int64_t n, float *out, struct err *e);
const char *st_dtype_name(enum st_dtype d);
int st_dtype_bytes(enum st_dtype d);

struct st_out {
    const char *name;
    int rank;
    int64_t shape[ST_RANK_MAX];
    const float *data;                               /* row-major */
};
/* Writes an f32 file by fs_replace: the old file or the new one, never a mixture. metadata_json: an
 * object of strings for "__metadata__", or NULL. Data starts at a multiple of 8 bytes; tensors keep
 * the caller's order. */
int st_write(const char *path, const struct st_out *tensors, int n, const char *metadata_json,
             struct err *e);
#endif
