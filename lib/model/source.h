/* source.h - inside lib/model: a model's tensors where they were downloaded, whatever the file
 * format.
 *
 * Knows: which tensors a model of a shape has, what HF and GGUF call them, their shapes, GGUF's
 * order of q and k rows. Does not know: packing. Everything is given in HF's order: [out, in], rope
 * by halves.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_SOURCE_H
#define QERL_SOURCE_H
#include "lib/model/gguf.h"
#include "lib/model/model.h"
#include "lib/model/safetensors.h"

enum { SOURCE_FILES_MAX = 1024, SOURCE_NAME_BYTES = 96 };
enum source_kind {
    SOURCE_KIND_EMBED,
    SOURCE_KIND_HEAD,
    SOURCE_KIND_NORM_FINAL,
    SOURCE_KIND_NORM_IN,
    SOURCE_KIND_NORM_POST,
    SOURCE_KIND_BIAS,
    SOURCE_KIND_PROJ
};
struct source_item {
    enum source_kind kind;
    enum proj proj;                                  /* of BIAS (q, k, v) and PROJ */
    int layer;                                       /* -1 outside the layers */
    int rows, cols;                                  /* a vector is one row */
};

/* Every tensor of the model in packing order; the head is absent when tied. The caller frees
 * *out. */
int source_items(const struct model_conf *c, struct source_item **out);
bool source_is_matrix(const struct source_item *x);  /* embed, head, projections */

/* Weight files of a model, sorted by name (full paths). The caller frees with
 * source_files_release. */
struct source_files { char **path; int n; };
int source_files(struct source_files *f, const char *path, struct err *e);
void source_files_release(struct source_files *f);

struct source;
/* Maps the files and finds every tensor of `c`, with its shape and a type that can be read; refuses
 * tensors that a model of this kind does not have, since leaving them out would compute something
 * else. */
int source_open(struct source **out, const char *path, const struct model_conf *c, struct err *e);
void source_close(struct source **s);
int source_count(const struct source *s);
const struct source_item *source_at(const struct source *s, int item);
const char *source_name(const struct source *s, int item);           /* as in the file */
const char *source_dtype(const struct source *s, int item); /* as in the file: "BF16", "Q4_1" */
/* Rows row .. row+n-1 as floats [n, cols]. Thread-safe. */
int source_rows(const struct source *s, int item, int row, int n, float *out, struct err *e);
/* MXFP4 blocks of a GGUF file, kept as they are: codes [n, cols], scales [n, cols/32]. */
bool source_is_mxfp4(const struct source *s, int item);
int source_rows_mxfp4(const struct source *s, int item, int row, int n, uint8_t *codes,
                      uint8_t *scales, struct err *e);
#endif
