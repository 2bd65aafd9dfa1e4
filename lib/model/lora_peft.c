/* lora_peft.c - adapters as PEFT folders: adapter_config.json and adapter_model.safetensors.
 *
 * A folder appears whole or not at all: it is written under another name, made durable, then
 * renamed. Reading trusts nothing: every tensor must have the one right name, shape and finite
 * values, and no other tensor may be there.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/lora.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <unistd.h>

#include "lib/base/json.h"
#include "lib/model/safetensors.h"

enum { LORA_RANK_MAX = 512, CONFIG_BYTES_MAX = 1 << 20, NAME_MAX_LORA = 160 };
static const char WEIGHTS[] = "adapter_model.safetensors", CONFIG[] = "adapter_config.json";

static void tensor_name(char out[NAME_MAX_LORA], int layer, enum proj p, char matrix) {
    const char *block = p <= PROJ_O ? "self_attn" : "mlp";
    snprintf(out, NAME_MAX_LORA, "base_model.model.model.layers.%d.%s.%s.lora_%c.weight", layer,
             block, model_proj_name[p], matrix);
}

/* ---- save ---- */

static void config_text(struct str *t, const struct lora *l, const char *base_name) {
    str_puts(t, "{\n  \"peft_type\": \"LORA\",\n  \"task_type\": \"CAUSAL_LM\",\n  "
                "\"base_model_name_or_path\": ");
    json_quote(t, base_name, strlen(base_name));
    str_printf(t,
               ",\n  \"r\": %d,\n  \"lora_alpha\": %.9g,\n  \"lora_dropout\": 0.0,\n  "
               "\"target_modules\": [",
               l->shape.rank, (double)l->shape.alpha);
    const char *comma = "";
    for (enum proj p = 0; p < PROJ_COUNT; p++) {
        if (!l->shape.on[p]) continue;
        str_printf(t, "%s\"%s\"", comma, model_proj_name[p]);
        comma = ", ";
    }
    str_puts(
        t,
        "],\n  \"bias\": \"none\",\n  \"fan_in_fan_out\": false,\n  \"inference_mode\": true,\n"
        "  \"init_lora_weights\": true,\n  \"modules_to_save\": null,\n  \"use_rslora\": false,\n"
        "  \"use_dora\": false,\n  \"rank_pattern\": {},\n  \"alpha_pattern\": {}\n}\n");
}

static int write_weights(const struct lora *l, const char *path, struct err *e) {
    const int tensors_max = l->conf.layers * PROJ_COUNT * 2;
    struct st_out *t = mem_alloc((size_t)tensors_max * sizeof *t);
    char (*name)[NAME_MAX_LORA] = mem_alloc((size_t)tensors_max * sizeof *name);
    int n = 0;
    for (int layer = 0; layer < l->conf.layers; layer++)
        for (enum proj p = 0; p < PROJ_COUNT; p++) {
            if (!l->shape.on[p]) continue;
            size_t a, b;
            int out, in;
            model_proj_shape(&l->conf, p, &out, &in);
            lora_offsets(l, layer, p, &a, &b);
            tensor_name(name[n], layer, p, 'A');
            tensor_name(name[n + 1], layer, p, 'B');
            t[n] = (struct st_out){ name[n], 2, { l->shape.rank, in }, l->value + a };
            t[n + 1] = (struct st_out){ name[n + 1], 2, { out, l->shape.rank }, l->value + b };
            n += 2;
        }
    int rc = st_write(path, t, n, "{\"format\":\"pt\"}", e);
    free(t);
    free(name);
    return rc;
}

static bool same_file(const char *dir_a, const char *dir_b, const char *name) {
    char a[FS_PATH_MAX], b[FS_PATH_MAX];
    struct fs_map ma, mb;
    fs_join(a, sizeof a, dir_a, name);
    fs_join(b, sizeof b, dir_b, name);
    if (fs_map(&ma, a, NULL) < 0) return false;
    bool same = fs_map(&mb, b, NULL) == 0;
    if (same) {
        same = ma.bytes == mb.bytes && (!ma.bytes || memcmp(ma.data, mb.data, ma.bytes) == 0);
        fs_unmap(&mb);
    }
    fs_unmap(&ma);
    return same;
}

/* Both names change hands in one step, so a reader sees the old folder or the new one. A file
 * system that cannot do that gets two renames: for a moment dir is absent. */
static int swap_names(const char *tmp, const char *dir) {
    if (renameat2(AT_FDCWD, tmp, AT_FDCWD, dir, RENAME_EXCHANGE) == 0) return 0;
    if (errno != EINVAL && errno != ENOSYS) return -1;
    char old[FS_PATH_MAX + 8];
    snprintf(old, sizeof old, "%s.old", tmp);
    return rename(dir, old) == 0 && rename(tmp, dir) == 0 && rename(old, tmp) == 0 ? 0 : -1;
}

/* Puts the finished folder tmp in the place of dir. What lies under tmp afterwards is the old one,
 * and goes. */
static int put_in_place(const char *tmp, const char *dir, struct err *e) {
    if (rename(tmp, dir) == 0) return fs_sync_parent(dir, e);
    if (errno != EEXIST && errno != ENOTEMPTY && errno != ENOTDIR)
        return err_set(e, "cannot rename '%s' to '%s': %s", tmp, dir, strerror(errno));
    if (!same_file(tmp, dir, WEIGHTS) || !same_file(tmp, dir, CONFIG)) {
        if (swap_names(tmp, dir) < 0)
            return err_set(e, "cannot replace folder '%s': %s", dir, strerror(errno));
        if (fs_sync_parent(dir, e) < 0) return -1;
    }
    return fs_remove_tree(tmp, e);
}

int lora_save(const struct lora *l, const char *dir_given, const char *base_name, struct err *e) {
    char dir[FS_PATH_MAX], tmp[FS_PATH_MAX], path[FS_PATH_MAX];
    size_t len = strlen(dir_given);
    while (len > 1 && dir_given[len - 1] == '/') len--; /* "x/" and "x" name one folder */
    if (len == 0 || len + 64 > sizeof dir)
        return err_set(e, "cannot save adapter: path of %zu bytes", len);
    snprintf(dir, sizeof dir, "%.*s", (int)len, dir_given);
    if ((size_t)snprintf(tmp, sizeof tmp, "%s.tmp.%ld", dir, (long)getpid()) + 40 > sizeof tmp)
        return err_set(e, "cannot save adapter: path too long");
    struct str text;
    str_init(&text);
    config_text(&text, l, base_name);
    int rc = fs_remove_tree(tmp, e);
    if (rc == 0) rc = fs_mkdirs(tmp, e);
    fs_join(path, sizeof path, tmp, CONFIG);
    if (rc == 0) rc = fs_replace(path, text.s, text.len, e);
    fs_join(path, sizeof path, tmp, WEIGHTS);
    if (rc == 0) rc = write_weights(l, path, e);
    if (rc == 0) rc = fs_sync_dir(tmp, e);
    if (rc == 0) rc = put_in_place(tmp, dir, e);
    str_release(&text);
    if (rc == 0) return 0;
    fs_remove_tree(tmp, NULL);
    return err_wrap(e, "cannot save adapter '%s'", dir);
}

/* ---- load ---- */

/* Options of PEFT that change what the tensors mean; each must be absent, null, false, empty or its
 * neutral word. */
static int refuse_variants(const json_t *o, const char *where, struct err *e) {
    static const char *const off[] = { "use_dora",
                                       "fan_in_fan_out",
                                       "lora_bias",
                                       "modules_to_save",
                                       "rank_pattern",
                                       "alpha_pattern",
                                       "layers_to_transform",
                                       "layer_replication",
                                       "trainable_token_indices",
                                       "exclude_modules",
                                       "target_parameters",
                                       "use_qalora",
                                       "use_bdlora",
                                       "alora_invocation_tokens" };
    for (size_t i = 0; i < COUNT_OF(off); i++) {
        const json_t *v = json_object_get(o, off[i]);
        bool neutral = !v || json_is_null(v) || json_is_false(v) ||
                       (json_is_array(v) && json_array_size(v) == 0) ||
                       (json_is_object(v) && json_object_size(v) == 0);
        if (!neutral)
            return err_set(e, "%s: field '%s' is set; adapters that use it are not supported",
                           where, off[i]);
    }
    const char *bias = "none";
    if (json_may_str(o, "bias", &bias, where, e) < 0) return -1;
    if (strcmp(bias, "none") != 0)
        return err_set(e, "%s: field 'bias' is '%s'; only 'none' is supported", where, bias);
    return 0;
}

static int read_config(struct lora_shape *s, const char *dir, struct err *e) {
    char path[FS_PATH_MAX];
    fs_join(path, sizeof path, dir, CONFIG);
    json_t *o = json_parse_file(path, CONFIG_BYTES_MAX, e);
    if (!o) return -1;
    const char *type = "";
    int64_t rank = 0;
    double alpha = 0;
    bool rslora = false;
    int rc = json_need_str(o, "peft_type", &type, path, e);
    if (rc == 0 && strcmp(type, "LORA") != 0)
        rc = err_set(e, "%s: field 'peft_type' is '%s'; only 'LORA' is supported", path, type);
    if (rc == 0) rc = json_need_int(o, "r", &rank, 1, LORA_RANK_MAX, path, e);
    if (rc == 0) rc = json_need_num(o, "lora_alpha", &alpha, path, e);
    if (rc == 0) rc = json_may_bool(o, "use_rslora", &rslora, path, e);
    if (rc == 0) rc = refuse_variants(o, path, e);
    if (rc == 0 && !(isfinite(alpha) && fabs(alpha) < 1e6))
        rc = err_set(e, "%s: field 'lora_alpha' is out of range", path);
    json_decref(o);
    s->rank = (int)rank;
    /* s = alpha / rank either way */
    s->alpha = (float)(rslora ? alpha * sqrt((double)rank) : alpha);
    return rc;
}

/* A projection is adapted where its first layer has an A. */
static void find_targets(struct lora_shape *s, const struct st_file *f) {
    char name[NAME_MAX_LORA];
    for (enum proj p = 0; p < PROJ_COUNT; p++) {
        tensor_name(name, 0, p, 'A');
        s->on[p] = st_find(f, name) != NULL;
    }
}

static int read_matrix(const struct st_file *f, const char *name, int64_t rows, int64_t cols,
                       float *to, struct err *e) {
    const struct st_tensor *t = st_find(f, name);
    if (!t) return err_set(e, "'%s' lacks tensor '%s'", f->path, name);
    if (t->rank != 2 || t->shape[0] != rows || t->shape[1] != cols)
        return err_set(e, "'%s': tensor '%s' is not [%lld, %lld] as this model and rank need",
                       f->path, name, (long long)rows, (long long)cols);
    if (st_to_f32(t, to, e) < 0) return -1;
    for (int64_t i = 0; i < rows * cols; i++)
        if (!isfinite(to[i]))
            return err_set(e, "'%s': tensor '%s' holds a value that is not finite", f->path, name);
    return 0;
}

static int read_weights(struct lora *l, const struct st_file *f, struct err *e) {
    char name[NAME_MAX_LORA];
    int n = 0;
    for (int layer = 0; layer < l->conf.layers; layer++)
        for (enum proj p = 0; p < PROJ_COUNT; p++) {
            if (!l->shape.on[p]) continue;
            size_t a, b;
            int out, in;
            model_proj_shape(&l->conf, p, &out, &in);
            lora_offsets(l, layer, p, &a, &b);
            tensor_name(name, layer, p, 'A');
            if (read_matrix(f, name, l->shape.rank, in, l->value + a, e) < 0) return -1;
            tensor_name(name, layer, p, 'B');
            if (read_matrix(f, name, out, l->shape.rank, l->value + b, e) < 0) return -1;
            n += 2;
        }
    if (n == f->count) return 0;
    /* name one that we did not ask for */
    for (int i = 0; i < f->count; i++) {
        int layer = -1;
        bool known = false;
        sscanf(f->tensor[i].name, "base_model.model.model.layers.%d.", &layer);
        for (enum proj p = 0; layer >= 0 && layer < l->conf.layers && p < PROJ_COUNT; p++)
            for (char m = 'A'; l->shape.on[p] && m <= 'B'; m++) {
                tensor_name(name, layer, p, m);
                known |= strcmp(name, f->tensor[i].name) == 0;
            }
        if (!known) return err_set(e, "'%s': unknown tensor '%.200s'", f->path, f->tensor[i].name);
    }
    return err_set(e, "'%s': %d tensors where %d were expected", f->path, f->count, n);
}

int lora_load(struct lora **out, const struct model_conf *c, const char *dir, struct err *e) {
    struct lora_shape s = { 0 };
    struct st_file f = { 0 };
    char path[FS_PATH_MAX];
    *out = NULL;
    if (strlen(dir) + sizeof WEIGHTS + 1 > sizeof path)
        return err_set(e, "cannot load adapter: path too long");
    if (read_config(&s, dir, e) < 0) return err_wrap(e, "cannot load adapter '%s'", dir);
    fs_join(path, sizeof path, dir, WEIGHTS);
    if (st_open(&f, path, e) < 0) return err_wrap(e, "cannot load adapter '%s'", dir);
    find_targets(&s, &f);
    struct lora *l = mem_alloc(sizeof *l);
    *l = (struct lora){ .shape = s, .conf = *c, .params = lora_params(c, &s) };
    l->value = mem_alloc(l->params * sizeof(float) + 1);
    int rc = l->params ? read_weights(l, &f, e)
                       : err_set(e, "'%s' adapts none of this model's projections", path);
    st_close(&f);
    if (rc < 0) {
        lora_destroy(&l);
        return err_wrap(e, "cannot load adapter '%s'", dir);
    }
    *out = l;
    return 0;
}
