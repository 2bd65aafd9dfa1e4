/* source.c - see source.h. Order: the list of tensors, their names, the files, finding and
 * checking, reading rows.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/source.h"

#include "lib/base/fs.h"
#include "lib/base/json.h"
#include "lib/model/conf.h"

struct found {
    const struct st_tensor *st;
    const struct gguf_tensor *g;
    char name[SOURCE_NAME_BYTES];
};
struct source {
    struct model_conf conf;
    struct source_item *item;
    struct found *found;                                     /* [items] */
    int items;
    bool is_gguf;
    struct gguf gguf;
    struct st_file *st;
    int st_count;
    char path[FS_PATH_MAX];
};

/* --- the list of tensors --- */

bool source_is_matrix(const struct source_item *x) {
    return x->kind == SOURCE_KIND_EMBED || x->kind == SOURCE_KIND_HEAD ||
           x->kind == SOURCE_KIND_PROJ;
}

int source_items(const struct model_conf *c, struct source_item **out) {
    int per_layer = 2 + PROJ_COUNT + (c->qkv_bias ? 3 : 0), n = 0;
    struct source_item *x = *out = mem_alloc((size_t)(3 + c->layers * per_layer) * sizeof *x);
    x[n++] = (struct source_item){ SOURCE_KIND_EMBED, 0, -1, c->vocab, c->dim };
    if (!c->tied) x[n++] = (struct source_item){ SOURCE_KIND_HEAD, 0, -1, c->vocab, c->dim };
    x[n++] = (struct source_item){ SOURCE_KIND_NORM_FINAL, 0, -1, 1, c->dim };
    for (int l = 0; l < c->layers; l++) {
        int rows, cols;
        x[n++] = (struct source_item){ SOURCE_KIND_NORM_IN, 0, l, 1, c->dim };
        x[n++] = (struct source_item){ SOURCE_KIND_NORM_POST, 0, l, 1, c->dim };
        for (int p = 0; p < PROJ_COUNT; p++) {
            model_proj_shape(c, (enum proj)p, &rows, &cols);
            if (c->qkv_bias && p <= PROJ_V)
                x[n++] = (struct source_item){ SOURCE_KIND_BIAS, (enum proj)p, l, 1, rows };
            x[n++] = (struct source_item){ SOURCE_KIND_PROJ, (enum proj)p, l, rows, cols };
        }
    }
    return n;
}

/* --- names --- */

static void name_hf(char *out, const struct source_item *x) {
    const char *block = x->proj <= PROJ_O ? "self_attn" : "mlp";
    switch (x->kind) {
    case SOURCE_KIND_EMBED: snprintf(out, SOURCE_NAME_BYTES, "model.embed_tokens.weight"); break;
    case SOURCE_KIND_HEAD: snprintf(out, SOURCE_NAME_BYTES, "lm_head.weight"); break;
    case SOURCE_KIND_NORM_FINAL: snprintf(out, SOURCE_NAME_BYTES, "model.norm.weight"); break;
    case SOURCE_KIND_NORM_IN:
        snprintf(out, SOURCE_NAME_BYTES, "model.layers.%d.input_layernorm.weight", x->layer);
        break;
    case SOURCE_KIND_NORM_POST:
        snprintf(out, SOURCE_NAME_BYTES, "model.layers.%d.post_attention_layernorm.weight",
                 x->layer);
        break;
    case SOURCE_KIND_BIAS:
    case SOURCE_KIND_PROJ:
        snprintf(out, SOURCE_NAME_BYTES, "model.layers.%d.%s.%s.%s", x->layer, block,
                 model_proj_name[x->proj], x->kind == SOURCE_KIND_BIAS ? "bias" : "weight");
        break;
    }
}

static void name_gguf(char *out, const struct source_item *x) {
    static const char *const proj[PROJ_COUNT] = { "attn_q",   "attn_k", "attn_v",  "attn_output",
                                                  "ffn_gate", "ffn_up", "ffn_down" };
    switch (x->kind) {
    case SOURCE_KIND_EMBED: snprintf(out, SOURCE_NAME_BYTES, "token_embd.weight"); break;
    case SOURCE_KIND_HEAD: snprintf(out, SOURCE_NAME_BYTES, "output.weight"); break;
    case SOURCE_KIND_NORM_FINAL: snprintf(out, SOURCE_NAME_BYTES, "output_norm.weight"); break;
    case SOURCE_KIND_NORM_IN:
        snprintf(out, SOURCE_NAME_BYTES, "blk.%d.attn_norm.weight", x->layer);
        break;
    case SOURCE_KIND_NORM_POST:
        snprintf(out, SOURCE_NAME_BYTES, "blk.%d.ffn_norm.weight", x->layer);
        break;
    case SOURCE_KIND_BIAS:
    case SOURCE_KIND_PROJ:
        snprintf(out, SOURCE_NAME_BYTES, "blk.%d.%s.%s", x->layer, proj[x->proj],
                 x->kind == SOURCE_KIND_BIAS ? "bias" : "weight");
        break;
    }
}

/* Tensors that files carry and that change nothing: buffers of old exports, a copy of a tied head,
 * GGUF's rope divisors (read by conf.c). */
static bool is_known_extra(const struct model_conf *c, const char *name) {
    return str_ends(name, ".rotary_emb.inv_freq") || str_ends(name, ".attn_rot_embd") ||
           strcmp(name, "rope_freqs.weight") == 0 ||
           (c->tied && strcmp(name, "lm_head.weight") == 0);
}

/* --- the files --- */

static int by_text(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

void source_files_release(struct source_files *f) {
    for (int i = 0; i < f->n; i++) free(f->path[i]);
    free(f->path);
    *f = (struct source_files){ 0 };
}

static void files_add(struct source_files *f, const char *path) {
    f->path = mem_grow(f->path, (size_t)(f->n + 1) * sizeof *f->path);
    f->path[f->n++] = mem_dup(path);
}

/* Shards named by model.safetensors.index.json; a shard's name is a plain file name. */
static int files_of_index(struct source_files *f, const char *dir, const char *index,
                          struct err *e) {
    json_t *o = json_parse_file(index, 1 << 26, e);
    if (!o) return -1;
    json_t *map = json_object_get(o, "weight_map"), *v;
    const char *name, *last = "";
    int rc = json_is_object(map) && json_object_size(map)
                 ? 0
                 : err_set(e, "%s: field 'weight_map' must be an object", index);
    char path[FS_PATH_MAX];
    if (rc == 0) json_object_foreach(map, name, v) {
        const char *file = json_string_value(v);
        if (!file || !*file || strchr(file, '/') || !str_ends(file, ".safetensors") ||
            strlen(file) > 255) {
            rc = err_set(e, "%s: tensor '%.200s' must name a .safetensors file in the same folder",
                         index, name);
            break;
        }
        if (strcmp(file, last) == 0) continue;
        last = file;
        fs_join(path, sizeof path, dir, file);
        bool known = false;
        for (int i = 0; i < f->n; i++) known |= strcmp(f->path[i], path) == 0;
        if (known) continue;
        if (f->n == SOURCE_FILES_MAX) {
            rc = err_set(e, "%s: more than %d files", index, SOURCE_FILES_MAX);
            break;
        }
        files_add(f, path);
    }
    json_decref(o);
    if (f->n) qsort(f->path, (size_t)f->n, sizeof *f->path, by_text);
    return rc;
}

int source_files(struct source_files *f, const char *path, struct err *e) {
    char file[FS_PATH_MAX];
    int rc = 0;
    *f = (struct source_files){ 0 };
    if (strlen(path) > FS_PATH_MAX - 300)
        return err_code(e, EXIT_ENV, "path too long: '%.200s...'", path);
    if (!fs_is_dir(path)) {
        if (!fs_exists(path)) return err_code(e, EXIT_ENV, "there is no model at '%s'", path);
        files_add(f, path);
        return 0;
    }
    fs_join(file, sizeof file, path, "model.safetensors.index.json");
    if (fs_exists(file)) rc = files_of_index(f, path, file, e);
    else {
        fs_join(file, sizeof file, path, "model.safetensors");
        if (fs_exists(file)) files_add(f, file);
        else
            rc = err_set(e, "'%s' holds neither model.safetensors nor model.safetensors.index.json",
                         path);
    }
    if (rc < 0) {
        if (e) e->code = EXIT_ENV;
        source_files_release(f);
    }
    return rc;
}

/* --- finding and checking --- */

static int shape_error(const struct source *s, const char *name, const char *got,
                       const struct source_item *x, struct err *e) {
    char want[48];
    if (source_is_matrix(x)) snprintf(want, sizeof want, "[%d, %d]", x->rows, x->cols);
    else snprintf(want, sizeof want, "[%d]", x->cols);
    return err_code(e, EXIT_ENV, "'%s': tensor '%s' has shape %s, the configuration says %s",
                    s->path, name, got, want);
}

static int find_st(struct source *s, int i, struct err *e) {
    const struct source_item *x = &s->item[i];
    struct found *f = &s->found[i];
    name_hf(f->name, x);
    for (int k = 0; k < s->st_count && !f->st; k++) f->st = st_find(&s->st[k], f->name);
    const struct st_tensor *t = f->st;
    if (!t)
        return err_code(e, EXIT_ENV, "'%s': tensor '%s' is missing%s", s->path, f->name,
                        x->kind == SOURCE_KIND_HEAD
                            ? " (and the configuration does not tie it to the embedding)"
                            : "");
    bool fits = source_is_matrix(x)
                    ? t->rank == 2 && t->shape[0] == x->rows && t->shape[1] == x->cols
                    : t->rank == 1 && t->shape[0] == x->cols;
    if (!fits) {
        char got[24 * ST_RANK_MAX] = "[";
        for (int d = 0; d < t->rank; d++)
            snprintf(got + strlen(got), sizeof got - strlen(got), "%s%lld", d ? ", " : "",
                     (long long)t->shape[d]);
        snprintf(got + strlen(got), sizeof got - strlen(got), "]");
        return shape_error(s, f->name, got, x, e);
    }
    if (t->dtype != ST_DTYPE_F32 && t->dtype != ST_DTYPE_F16 && t->dtype != ST_DTYPE_BF16)
        return err_code(e, EXIT_ENV,
                        "'%s': tensor '%s' is %s; only F32, F16 and BF16 weights are read", s->path,
                        f->name, st_dtype_name(t->dtype));
    return 0;
}

static int find_gguf(struct source *s, int i, struct err *e) {
    const struct source_item *x = &s->item[i];
    struct found *f = &s->found[i];
    name_gguf(f->name, x);
    const struct gguf_tensor *t = f->g = gguf_tensor_find(&s->gguf, f->name);
    if (!t) return err_code(e, EXIT_ENV, "'%s': tensor '%s' is missing", s->path, f->name);
    if (t->ne[0] == x->cols && t->ne[1] == x->rows && t->ne[2] == 1 && t->ne[3] == 1) return 0;
    char got[64];
    snprintf(got, sizeof got, t->rank == 1 ? "[%lld]" : "[%lld, %lld]",
             (long long)t->ne[t->rank == 1 ? 0 : 1], (long long)t->ne[0]);
    return shape_error(s, f->name, got, x, e);
}

static int by_found(const void *a, const void *b) {
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* Every tensor of the files must be one we use, or one known not to matter. */
static int check_extras(struct source *s, struct err *e) {
    const char **used = mem_alloc((size_t)s->items * sizeof *used);
    int rc = 0;
    for (int i = 0; i < s->items; i++) used[i] = s->found[i].name;
    qsort(used, (size_t)s->items, sizeof *used, by_found);
    int files = s->is_gguf ? 1 : s->st_count;
    for (int k = 0; k < files && rc == 0; k++) {
        int n = s->is_gguf ? s->gguf.tensors : s->st[k].count;
        for (int i = 0; i < n && rc == 0; i++) {
            const char *name = s->is_gguf ? s->gguf.tensor[i].name : s->st[k].tensor[i].name;
            if (!bsearch(&name, used, (size_t)s->items, sizeof *used, by_found) &&
                !is_known_extra(&s->conf, name))
                rc = err_code(
                    e, EXIT_ENV,
                    "'%s': tensor '%.200s' is not part of a %s model; leaving it out would compute "
                    "something else",
                    s->path, name, conf_arch_name(s->conf.arch));
        }
    }
    free(used);
    return rc;
}

static int open_files(struct source *s, struct err *e) {
    struct source_files files;
    int rc = 0;
    if (s->is_gguf) return gguf_open(&s->gguf, s->path, e);
    if (source_files(&files, s->path, e) < 0) return -1;
    s->st = mem_alloc((size_t)files.n * sizeof *s->st);
    for (int i = 0; i < files.n && rc == 0; i++) {
        rc = st_open(&s->st[i], files.path[i], e);
        if (rc == 0) s->st_count++;
    }
    source_files_release(&files);
    return rc;
}

int source_open(struct source **out, const char *path, const struct model_conf *c, struct err *e) {
    struct source *s = mem_alloc(sizeof *s);
    char file[FS_PATH_MAX];
    path = model_path_resolve(path, file);
    *out = NULL;
    s->conf = *c;
    s->is_gguf = conf_is_gguf(path);
    snprintf(s->path, sizeof s->path, "%s", path);
    int rc = open_files(s, e);
    if (rc == 0) {
        s->items = source_items(c, &s->item);
        s->found = mem_alloc((size_t)s->items * sizeof *s->found);
    }
    for (int i = 0; rc == 0 && i < s->items; i++)
        rc = s->is_gguf ? find_gguf(s, i, e) : find_st(s, i, e);
    if (rc == 0) rc = check_extras(s, e);
    if (rc < 0) source_close(&s);
    *out = s;
    return rc;
}

void source_close(struct source **sp) {
    struct source *s = *sp;
    if (!s) return;
    for (int i = 0; i < s->st_count; i++) st_close(&s->st[i]);
    free(s->st);
    gguf_close(&s->gguf);
    free(s->item);
    free(s->found);
    free(s);
    *sp = NULL;
}

int source_count(const struct source *s) { return s->items; }
const struct source_item *source_at(const struct source *s, int item) { return &s->item[item]; }
const char *source_name(const struct source *s, int item) { return s->found[item].name; }

const char *source_dtype(const struct source *s, int item) {
    return s->is_gguf ? gguf_type_name((int)s->found[item].g->type)
                      : st_dtype_name(s->found[item].st->dtype);
}

/* --- reading rows --- */

/* Converters store q and k of llama models with the two halves of each head interleaved (rope on
 * neighbours): HF's row (head, half, j) stands at (head, j, half). */
static int gguf_row(const struct source *s, const struct source_item *x, int row) {
    if (s->conf.arch != MODEL_ARCH_LLAMA || x->kind != SOURCE_KIND_PROJ || x->proj > PROJ_K)
        return row;
    int d = s->conf.head_dim, head = row / d, in_head = row % d;
    return head * d + 2 * (in_head % (d / 2)) + in_head / (d / 2);
}

static const uint8_t *gguf_row_at(const struct source *s, int item, int row) {
    const struct gguf_tensor *t = s->found[item].g;
    int elements, bytes;
    gguf_type_block(t->type, &elements, &bytes);
    return t->data + (size_t)gguf_row(s, &s->item[item], row) *
                         ((size_t)(t->ne[0] / elements) * (size_t)bytes);
}

int source_rows(const struct source *s, int item, int row, int n, float *out, struct err *e) {
    const struct source_item *x = &s->item[item];
    assert(row >= 0 && n >= 0 && row + n <= x->rows);
    if (!s->is_gguf)
        return st_to_f32_part(s->found[item].st, (int64_t)row * x->cols, (int64_t)n * x->cols, out,
                              e);
    for (int r = 0; r < n; r++)
        gguf_dequant(s->found[item].g->type, gguf_row_at(s, item, row + r), x->cols,
                     out + (size_t)r * (size_t)x->cols);
    return 0;
}

bool source_is_mxfp4(const struct source *s, int item) {
    return s->is_gguf && s->found[item].g->type == GGUF_TYPE_MXFP4;
}

int source_rows_mxfp4(const struct source *s, int item, int row, int n, uint8_t *codes,
                      uint8_t *scales, struct err *e) {
    const struct source_item *x = &s->item[item];
    assert(source_is_mxfp4(s, item) && x->cols % 32 == 0);
    for (int r = 0; r < n; r++) {
        const uint8_t *b = gguf_row_at(s, item, row + r);
        for (int k = 0; k < x->cols / 32; k++, b += 17, codes += 32) {
            if (b[0] == 255)
                return err_code(e, EXIT_ENV,
                                "'%s': tensor '%s' holds a value that is not finite (row %d)",
                                s->path, s->found[item].name, row + r);
            *scales++ = b[0];
            for (int j = 0; j < 16; j++) {
                codes[j] = b[1 + j] & 15;
                codes[j + 16] = b[1 + j] >> 4;
            }
        }
    }
    return 0;
}
