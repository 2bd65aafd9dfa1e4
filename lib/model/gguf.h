/* gguf.h - GGUF files (versions 2 and 3, little endian): metadata and tensors, read through a
 * mapping.
 *
 * Knows: the container and the block formats that dequant.c turns into floats.
 * Does not know: what a key or a tensor name means.
 * Ownership: the file owns a private copy of everything before the tensor data; keys, strings and
 * tensors are lent until gguf_close. Tensor data is lent out of the mapping.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_GGUF_H
#define QERL_GGUF_H
#include "lib/base/fs.h"

enum {
    GGUF_RANK_MAX = 4, GGUF_TENSORS_MAX = 65536, GGUF_KEYS_MAX = 65536, GGUF_KEY_BYTES_MAX = 65535,
    GGUF_NAME_BYTES_MAX = 1024, GGUF_STRING_BYTES_MAX = 1 << 24, GGUF_ALIGN_MAX = 1 << 20,
};
/* of a metadata value; numbers of the format */
enum gguf_kind {
    GGUF_KIND_U8,
    GGUF_KIND_I8,
    GGUF_KIND_U16,
    GGUF_KIND_I16,
    GGUF_KIND_U32,
    GGUF_KIND_I32,
    GGUF_KIND_F32,
    GGUF_KIND_BOOL,
    GGUF_KIND_STRING,
    GGUF_KIND_ARRAY,
    GGUF_KIND_U64,
    GGUF_KIND_I64,
    GGUF_KIND_F64,
    GGUF_KIND_COUNT
};
enum gguf_type { /* of a tensor; numbers of ggml */
                 GGUF_TYPE_F32 = 0,
                 GGUF_TYPE_F16 = 1,
                 GGUF_TYPE_Q4_0 = 2,
                 GGUF_TYPE_Q4_1 = 3,
                 GGUF_TYPE_Q5_0 = 6,
                 GGUF_TYPE_Q5_1 = 7,
                 GGUF_TYPE_Q8_0 = 8,
                 GGUF_TYPE_Q4_K = 12,
                 GGUF_TYPE_Q5_K = 13,
                 GGUF_TYPE_Q6_K = 14,
                 GGUF_TYPE_BF16 = 30,
                 GGUF_TYPE_MXFP4 = 39,
                 GGUF_TYPE_COUNT = 40
};

/* not NUL-terminated; bytes are not checked to be UTF-8 */
struct gguf_string { const char *s; size_t bytes; };
struct gguf_kv {
    struct gguf_string key;
    /* GGUF_KIND_ARRAY: `of` is the elements' kind, never ARRAY */
    enum gguf_kind kind;
    enum gguf_kind of;
    uint64_t count;                                  /* elements; 1 for a plain value */
    const uint8_t *data;                             /* first element, as stored */
};
struct gguf_tensor {
    const char *name;                                /* NUL-terminated */
    enum gguf_type type;
    int rank;
    /* ne[0] runs fastest: an HF weight [out, in] is ne = {in, out} */
    int64_t ne[GGUF_RANK_MAX];
    int64_t elements;
    size_t bytes;
    const uint8_t *data;
};
struct gguf {
    struct fs_map map;
    uint8_t *header;                                 /* private copy of all before the data */
    char *names;
    struct gguf_kv *kv;                              /* sorted by key */
    struct gguf_tensor *tensor;                      /* sorted by name */
    int keys, tensors;
    uint32_t version;
    char path[FS_PATH_MAX];
};

/* -1 (EXIT_ENV) with the file, the field or tensor at fault, and the byte where it stands. */
int gguf_open(struct gguf *g, const char *path, struct err *e);
int gguf_open_memory(struct gguf *g, const void *data, size_t bytes, const char *path,
                     struct err *e);
void gguf_close(struct gguf *g);                     /* back to zeroes; fine on a zeroed struct */

/* NULL if absent */
const struct gguf_kv *gguf_find(const struct gguf *g, const char *key);
/* NULL if absent */
const struct gguf_tensor *gguf_tensor_find(const struct gguf *g, const char *name);
/* Plain values: false when absent or of another kind. An integer of any width that fits, bool as 0
 * or 1; F32 or F64. */
bool gguf_int(const struct gguf *g, const char *key, int64_t *out);
bool gguf_num(const struct gguf *g, const char *key, double *out);
bool gguf_text(const struct gguf *g, const char *key, struct gguf_string *out);
/* Elements of an array. Strings follow one another: start with at = kv->data and call kv->count
 * times. */
const uint8_t *gguf_string_next(const uint8_t *at, struct gguf_string *out);
/* integer and bool kinds; else 0 */
int64_t gguf_int_at(const struct gguf_kv *kv, uint64_t i);
/* F32, F64; else 0 */
double gguf_num_at(const struct gguf_kv *kv, uint64_t i);

const char *gguf_type_name(int type); /* "Q4_1"; NULL for a number ggml never gave out */
/* {0, 0} for a type we do not read */
void gguf_type_block(enum gguf_type type, int *elements, int *bytes);
/* Blocks to floats: n elements, a multiple of the block. Formulas of ggml, in f32 and in its
 * order. */
void gguf_dequant(enum gguf_type type, const uint8_t *blocks, int64_t n, float *out);
#endif
