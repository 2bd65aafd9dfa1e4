/* conf.c - a model's shape out of config.json (Hugging Face) or GGUF metadata.
 *
 * Order: what both share, config.json, generation_config.json, GGUF, the public entry.
 * A field that would change the computation and is not supported is refused by name; unknown fields
 * are ignored, since every release of transformers adds some.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/conf.h"

#include <dirent.h>
#include <math.h>

#include "lib/base/fs.h"
#include "lib/base/json.h"

static const char *const ARCH[] = { [MODEL_ARCH_LLAMA] = "llama", [MODEL_ARCH_QWEN2] = "qwen2" };

const char *conf_arch_name(enum model_arch a) { return ARCH[a]; }
bool conf_is_gguf(const char *path) { return str_ends(path, ".gguf"); }

static int arch_find(const char *name, size_t bytes) {
    for (int a = 0; a < (int)COUNT_OF(ARCH); a++)
        if (strlen(ARCH[a]) == bytes && memcmp(ARCH[a], name, bytes) == 0) return a;
    return -1;
}

static void eos_add(struct model_conf *c, int64_t id) {
    for (int i = 0; i < c->eos_count; i++)
        if (c->eos[i] == id) return;
    if (c->eos_count < MODEL_EOS_MAX) c->eos[c->eos_count++] = (int32_t)id;
}

/* What must hold between the numbers, wherever they came from. */
static int check(const struct model_conf *c, const char *where, struct err *e) {
    if (c->heads % c->kv_heads)
        return err_set(e, "%s: %d attention heads cannot share %d key-value heads evenly", where,
                       c->heads, c->kv_heads);
    if (c->head_dim % 2)
        return err_set(e, "%s: the head dimension %d must be even", where, c->head_dim);
    if (!(c->norm_eps > 0 && c->norm_eps < 1))
        return err_set(e, "%s: the norm's epsilon must lie between 0 and 1", where);
    if (!(c->rope_theta >= 1 && isfinite(c->rope_theta)))
        return err_set(e, "%s: the rotary base (rope theta) must be at least 1", where);
    for (int i = 0; i < c->eos_count; i++)
        if (c->eos[i] < 0 || c->eos[i] >= c->vocab)
            return err_set(e, "%s: end-of-sequence id %d is outside the vocabulary of %d", where,
                           c->eos[i], c->vocab);
    if (c->bos < -1 || c->bos >= c->vocab)
        return err_set(e, "%s: begin-of-sequence id %d is outside the vocabulary of %d", where,
                       c->bos, c->vocab);
    return 0;
}

/* --- config.json --- */

/* `may`: absent keeps the value */
struct want { const char *key; int *to; int64_t most; bool may; };

static int read_sizes(struct model_conf *c, const json_t *o, const char *where, struct err *e) {
    const struct want first[] = {
        { "vocab_size", &c->vocab, CONF_VOCAB_MAX, false },
        { "hidden_size", &c->dim, CONF_DIM_MAX, false },
        { "intermediate_size", &c->ffn_dim, CONF_FFN_MAX, false },
        { "num_hidden_layers", &c->layers, MODEL_LAYERS_MAX, false },
        { "num_attention_heads", &c->heads, CONF_HEADS_MAX, false },
        { "max_position_embeddings", &c->positions_max, CONF_POSITIONS_MAX, false },
        { "num_key_value_heads", &c->kv_heads, CONF_HEADS_MAX, true },
        { "head_dim", &c->head_dim, CONF_HEAD_DIM_MAX, true },
    };
    for (size_t i = 0; i < COUNT_OF(first); i++) {
        int64_t v = 0;
        int rc = first[i].may ? json_may_int(o, first[i].key, &v, 1, first[i].most, where, e)
                              : json_need_int(o, first[i].key, &v, 1, first[i].most, where, e);
        if (rc < 0) return -1;
        *first[i].to = (int)v;
    }
    if (!c->kv_heads) c->kv_heads = c->heads;
    if (!c->head_dim) {
        if (c->dim % c->heads)
            return err_set(
                e,
                "%s: hidden_size %d is no multiple of num_attention_heads %d and there is no "
                "head_dim",
                where, c->dim, c->heads);
        c->head_dim = c->dim / c->heads;
    }
    if (c->head_dim > CONF_HEAD_DIM_MAX)
        return err_set(e, "%s: the head dimension %d is above %d", where, c->head_dim,
                       CONF_HEAD_DIM_MAX);
    return 0;
}

/* Switches that would change the computation: each must stand as we compute. */
static int read_switches(struct model_conf *c, const json_t *o, const char *where, struct err *e) {
    static const struct { const char *key, *what; } off[] = {
        { "use_sliding_window", "sliding-window attention is" },
        { "attention_bias", "biases on the attention's projections are" },
        { "mlp_bias", "biases on the feed-forward projections are" },
    };
    for (size_t i = 0; i < COUNT_OF(off); i++) {
        bool on = false;
        if (json_may_bool(o, off[i].key, &on, where, e) < 0) return -1;
        if (on)
            return err_set(e, "%s: field '%s' is true, but %s not supported", where, off[i].key,
                           off[i].what);
    }
    const char *act = "silu";
    if (json_may_str(o, "hidden_act", &act, where, e) < 0) return -1;
    if (strcmp(act, "silu") != 0)
        return err_set(e, "%s: field 'hidden_act' is '%.40s', only 'silu' is supported", where,
                       act);
    const json_t *quantised = json_object_get(o, "quantization_config");
    if (quantised && !json_is_null(quantised))
        return err_set(
            e,
            "%s: field 'quantization_config' is set: these weights are quantised already; use the "
            "unquantised model",
            where);
    double part = 1;
    if (json_may_num(o, "partial_rotary_factor", &part, where, e) < 0) return -1;
    if (part != 1)
        return err_set(e, "%s: field 'partial_rotary_factor' is %g, only 1 is supported", where,
                       part);
    return json_may_bool(o, "tie_word_embeddings", &c->tied, where, e);
}

static int read_llama3(struct model_conf *c, const json_t *o, const char *where, struct err *e) {
    double factor, low, high;
    int64_t original;
    if (json_need_num(o, "factor", &factor, where, e) < 0 ||
        json_need_num(o, "low_freq_factor", &low, where, e) < 0 ||
        json_need_num(o, "high_freq_factor", &high, where, e) < 0 ||
        json_need_int(o, "original_max_position_embeddings", &original, 1, CONF_POSITIONS_MAX,
                      where, e) < 0)
        return -1;
    if (!(factor >= 1 && factor <= 1024 && low > 0 && high > low && high <= 1024))
        return err_set(
            e,
            "%s: llama3 rope scaling needs 1 <= factor <= 1024 and 0 < low_freq_factor < "
            "high_freq_factor",
            where);
    c->rope_llama3.on = true;
    c->rope_llama3.factor = (float)factor;
    c->rope_llama3.low_freq_factor = (float)low;
    c->rope_llama3.high_freq_factor = (float)high;
    c->rope_llama3.original_positions = (int)original;
    return 0;
}

/* "rope_scaling" (null or an object) and, of newer transformers, "rope_parameters", which holds the
 * base too. */
static int read_rope(struct model_conf *c, const json_t *o, const char *path, struct err *e) {
    static const char *const keys[] = { "rope_scaling", "rope_parameters" };
    double theta = 10000;
    if (json_may_num(o, "rope_theta", &theta, path, e) < 0) return -1;
    for (int i = 0; i < 2; i++) {
        const json_t *r = json_object_get(o, keys[i]);
        if (!r || json_is_null(r)) continue;
        char where[FS_PATH_MAX + 32];
        snprintf(where, sizeof where, "%s: '%s'", path, keys[i]);
        if (!json_is_object(r)) return err_set(e, "%s must be an object", where);
        const char *type = "default";
        if (json_may_str(r, "type", &type, where, e) < 0 ||
            json_may_str(r, "rope_type", &type, where, e) < 0 ||
            json_may_num(r, "rope_theta", &theta, where, e) < 0)
            return -1;
        if (strcmp(type, "llama3") == 0) {
            if (read_llama3(c, r, where, e) < 0) return -1;
        } else if (strcmp(type, "default") != 0)
            return err_set(e, "%s: type '%.40s' is not supported (default and llama3 are)", where,
                           type);
    }
    c->rope_theta = (float)theta;
    return 0;
}

/* "eos_token_id": a number, a list of numbers, null or absent. */
static int read_eos(struct model_conf *c, const json_t *o, const char *where, struct err *e) {
    json_t *v = json_object_get(o, "eos_token_id");
    if (!v || json_is_null(v)) return 0;
    size_t n = json_is_array(v) ? json_array_size(v) : 1;
    if (n > MODEL_EOS_MAX)
        return err_set(e, "%s: field 'eos_token_id' lists more than %d ids", where, MODEL_EOS_MAX);
    for (size_t i = 0; i < n; i++) {
        const json_t *x = json_is_array(v) ? json_array_get(v, i) : v;
        if (!json_is_integer(x) || json_integer_value(x) < 0 || json_integer_value(x) >= c->vocab)
            return err_set(e, "%s: field 'eos_token_id' must hold ids from 0 to %d", where,
                           c->vocab - 1);
        eos_add(c, json_integer_value(x));
    }
    return 0;
}

static int read_generation(struct model_conf *c, const char *dir, struct err *e) {
    char path[FS_PATH_MAX];
    fs_join(path, sizeof path, dir, "generation_config.json");
    if (!fs_exists(path)) return 0;
    json_t *o = json_parse_file(path, CONF_FILE_BYTES_MAX, e);
    if (!o) return -1;
    int rc = json_is_object(o) ? read_eos(c, o, path, e)
                               : err_set(e, "%s: must hold an object", path);
    json_decref(o);
    return rc;
}

static int read_config(struct model_conf *c, const json_t *o, const char *where, struct err *e) {
    const char *type;
    double eps = 1e-6;
    int64_t bos = -1;
    if (!json_is_object(o)) return err_set(e, "%s: must hold an object", where);
    if (json_need_str(o, "model_type", &type, where, e) < 0) return -1;
    int arch = arch_find(type, strlen(type));
    if (arch < 0)
        return err_set(e, "%s: model type '%.80s' is not supported (llama and qwen2 are)", where,
                       type);
    c->arch = (enum model_arch)arch;
    c->qkv_bias = c->arch == MODEL_ARCH_QWEN2;
    if (read_sizes(c, o, where, e) < 0 || read_switches(c, o, where, e) < 0 ||
        read_rope(c, o, where, e) < 0 || json_may_num(o, "rms_norm_eps", &eps, where, e) < 0 ||
        json_may_int(o, "bos_token_id", &bos, 0, c->vocab - 1, where, e) < 0)
        return -1;
    c->norm_eps = (float)eps;
    c->bos = (int32_t)bos;
    return check(c, where, e);
}

int conf_from_hf(struct model_conf *c, const char *dir, struct err *e) {
    char path[FS_PATH_MAX];
    *c = (struct model_conf){ .bos = -1 };
    fs_join(path, sizeof path, dir, "config.json");
    json_t *o = json_parse_file(path, CONF_FILE_BYTES_MAX, e);
    if (!o) return -1;
    int rc = read_config(c, o, path, e);
    /* its ids first: they are what generate() stops at */
    if (rc == 0) rc = read_generation(c, dir, e);
    if (rc == 0) rc = read_eos(c, o, path, e);
    json_decref(o);
    return rc;
}

/* --- GGUF --- */

struct gguf_reader { const struct gguf *g; const char *arch; struct err *e; };

static void arch_key(const struct gguf_reader *r, char *out, size_t size, const char *key) {
    snprintf(out, size, "%s.%s", r->arch, key);
}

static int gguf_size(const struct gguf_reader *r, const char *key, int *to, int64_t most,
                     bool may) {
    char full[96];
    int64_t v;
    arch_key(r, full, sizeof full, key);
    const struct gguf_kv *kv = gguf_find(r->g, full);
    if (!kv && may) return 0;
    if (!kv) return err_set(r->e, "'%s': key '%s' is missing", r->g->path, full);
    if (!gguf_int(r->g, full, &v) || v < 1 || v > most)
        return err_set(r->e, "'%s': key '%s' must be one whole number from 1 to %lld", r->g->path,
                       full, (long long)most);
    *to = (int)v;
    return 0;
}

static int gguf_sizes(struct model_conf *c, const struct gguf_reader *r) {
    int rotated = 0;
    if (gguf_size(r, "block_count", &c->layers, MODEL_LAYERS_MAX, false) < 0 ||
        gguf_size(r, "embedding_length", &c->dim, CONF_DIM_MAX, false) < 0 ||
        gguf_size(r, "feed_forward_length", &c->ffn_dim, CONF_FFN_MAX, false) < 0 ||
        gguf_size(r, "attention.head_count", &c->heads, CONF_HEADS_MAX, false) < 0 ||
        gguf_size(r, "context_length", &c->positions_max, CONF_POSITIONS_MAX, false) < 0 ||
        gguf_size(r, "attention.head_count_kv", &c->kv_heads, CONF_HEADS_MAX, true) < 0 ||
        gguf_size(r, "attention.key_length", &c->head_dim, CONF_HEAD_DIM_MAX, true) < 0 ||
        gguf_size(r, "rope.dimension_count", &rotated, CONF_HEAD_DIM_MAX, true) < 0)
        return -1;
    if (!c->kv_heads) c->kv_heads = c->heads;
    if (!c->head_dim) {
        if (c->dim % c->heads || c->dim / c->heads > CONF_HEAD_DIM_MAX)
            return err_set(r->e,
                           "'%s': embedding length %d does not divide into %d heads of at most %d",
                           r->g->path, c->dim, c->heads, CONF_HEAD_DIM_MAX);
        c->head_dim = c->dim / c->heads;
    }
    if (rotated && rotated != c->head_dim)
        return err_set(
            r->e, "'%s': only %d of %d dimensions of a head are rotated, which is not supported",
            r->g->path, rotated, c->head_dim);
    const struct gguf_tensor *embed = gguf_tensor_find(r->g, "token_embd.weight");
    if (!embed || embed->rank != 2 || embed->ne[1] < 1 || embed->ne[1] > CONF_VOCAB_MAX)
        return err_set(
            r->e,
            "'%s': tensor 'token_embd.weight' is missing or has no vocabulary of 1 to %d rows",
            r->g->path, CONF_VOCAB_MAX);
    c->vocab = (int)embed->ne[1];
    c->tied = !gguf_tensor_find(r->g, "output.weight");
    return 0;
}

static double llama3_divisor(const struct model_conf *c, int i, double factor) {
    double low = 8192.0 / 1.0, high = 8192.0 / 4.0;
    double wave = 2 * 3.14159265358979323846 * pow(c->rope_theta, 2.0 * i / c->head_dim);
    if (wave < high) return 1;
    if (wave > low) return factor;
    double smooth = (8192.0 / wave - 1) / (4.0 - 1);
    return 1 / ((1 - smooth) / factor + smooth);
}

/* Llama 3.1 and later: the converter stores each frequency's divisor and drops the rule's
 * parameters. All released models use low 1, high 4, original 8192 and differ in the factor (the
 * largest divisor): accepted when that gives these numbers. */
static int gguf_rope_freqs(struct model_conf *c, const struct gguf_reader *r) {
    const struct gguf_tensor *t = gguf_tensor_find(r->g, "rope_freqs.weight");
    if (!t) return 0;
    int n = c->head_dim / 2;
    if (t->type != GGUF_TYPE_F32 || t->elements != n)
        return err_set(r->e, "'%s': tensor 'rope_freqs.weight' must be F32 with %d elements",
                       r->g->path, n);
    float got[CONF_HEAD_DIM_MAX / 2], factor = 1;
    memcpy(got, t->data, (size_t)n * sizeof *got);
    for (int i = 0; i < n; i++)
        if (got[i] > factor) factor = got[i];
    for (int i = 0; i < n; i++)
        if (!(fabs(got[i] - llama3_divisor(c, i, factor)) <= 1e-3 * fabs((double)got[i])))
            return err_set(r->e,
                           "'%s': tensor 'rope_freqs.weight' is no llama3 scaling (low 1, high 4, "
                           "original 8192); use the model's safetensors",
                           r->g->path);
    c->rope_llama3.on = factor > 1;
    c->rope_llama3.factor = factor;
    c->rope_llama3.low_freq_factor = 1;
    c->rope_llama3.high_freq_factor = 4;
    c->rope_llama3.original_positions = 8192;
    return 0;
}

static int gguf_rope(struct model_conf *c, const struct gguf_reader *r) {
    char key[96];
    double theta = 10000;
    struct gguf_string type;
    arch_key(r, key, sizeof key, "rope.freq_base");
    if (gguf_find(r->g, key) && !gguf_num(r->g, key, &theta))
        return err_set(r->e, "'%s': key '%s' must be a number", r->g->path, key);
    c->rope_theta = (float)theta;
    arch_key(r, key, sizeof key, "rope.scaling.type");
    if (gguf_text(r->g, key, &type) && !(type.bytes == 4 && memcmp(type.s, "none", 4) == 0))
        return err_set(r->e, "'%s': rope scaling '%.*s' is not supported", r->g->path,
                       (int)(type.bytes > 40 ? 40 : type.bytes), type.s);
    return gguf_rope_freqs(c, r);
}

static int gguf_ids(struct model_conf *c, const struct gguf_reader *r) {
    static const char *const ends[] = { "tokenizer.ggml.eos_token_id",
                                        "tokenizer.ggml.eot_token_id" };
    int64_t id;
    for (size_t i = 0; i < COUNT_OF(ends); i++)
        if (gguf_int(r->g, ends[i], &id)) {
            if (id < 0 || id >= c->vocab)
                return err_set(r->e, "'%s': key '%s' is outside the vocabulary of %d", r->g->path,
                               ends[i], c->vocab);
            eos_add(c, id);
        }
    if (gguf_int(r->g, "tokenizer.ggml.bos_token_id", &id)) {
        if (id < 0 || id >= c->vocab)
            return err_set(
                r->e, "'%s': key 'tokenizer.ggml.bos_token_id' is outside the vocabulary of %d",
                r->g->path, c->vocab);
        c->bos = (int32_t)id;
    }
    return 0;
}

int conf_from_gguf(struct model_conf *c, const struct gguf *g, struct err *e) {
    *c = (struct model_conf){ .bos = -1 };
    struct gguf_string name;
    double eps;
    char key[96];
    if (!gguf_text(g, "general.architecture", &name))
        return err_set(e, "'%s': key 'general.architecture' is missing", g->path);
    int arch = arch_find(name.s, name.bytes);
    if (arch < 0)
        return err_set(e, "'%s': architecture '%.*s' is not supported (llama and qwen2 are)",
                       g->path, (int)(name.bytes > 80 ? 80 : name.bytes), name.s);
    c->arch = (enum model_arch)arch;
    c->qkv_bias = c->arch == MODEL_ARCH_QWEN2;
    struct gguf_reader r = { g, ARCH[arch], e };
    arch_key(&r, key, sizeof key, "attention.layer_norm_rms_epsilon");
    if (!gguf_num(g, key, &eps)) return err_set(e, "'%s': key '%s' is missing", g->path, key);
    c->norm_eps = (float)eps;
    if (gguf_sizes(c, &r) < 0 || gguf_rope(c, &r) < 0 || gguf_ids(c, &r) < 0) return -1;
    return check(c, g->path, e);
}

/* --- the public entry --- */

const char *model_path_resolve(const char *path, char *buf) {
    char config[FS_PATH_MAX];
    int found = 0;
    if (strlen(path) + 16 > FS_PATH_MAX) return path;
    fs_join(config, sizeof config, path, "config.json");
    DIR *d = fs_exists(config) ? NULL : opendir(path);
    if (!d) return path;
    for (struct dirent *entry; (entry = readdir(d));) {
        if (!str_ends(entry->d_name, ".gguf") ||
            strlen(path) + strlen(entry->d_name) + 2 > FS_PATH_MAX)
            continue;
        fs_join(buf, FS_PATH_MAX, path, entry->d_name);
        found++;
    }
    closedir(d);
    return found == 1 ? buf : path;
}

int model_conf_load(struct model_conf *c, const char *path, struct err *e) {
    struct gguf g;
    char file[FS_PATH_MAX];
    path = model_path_resolve(path, file);
    int rc;
    if (fs_is_dir(path)) rc = conf_from_hf(c, path, e);
    else if (!fs_exists(path)) rc = err_set(e, "there is no model at '%s'", path);
    else if (!conf_is_gguf(path))
        rc = err_set(e, "'%s' is neither a model folder nor a .gguf file", path);
    else if ((rc = gguf_open(&g, path, e)) == 0) {
        rc = conf_from_gguf(c, &g, e);
        gguf_close(&g);
    }
    if (rc < 0 && e) e->code = EXIT_ENV;
    return rc;
}
