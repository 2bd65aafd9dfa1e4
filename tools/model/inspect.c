/* inspect.c - qerl-model inspect: what a model is, without packing or running it.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/sys.h"

#include <jansson.h>
#include <sys/stat.h>

#include "lib/model/conf.h"
#include "lib/model/packed.h"
#include "tools/model/args.h"
#include "tools/model/cmd.h"

static const char HELP[] =
    "usage: qerl-model inspect MODEL [--exclude PATTERNS] [--tensors] [--json]\n\n"
    "Shape, parameters, types of the tensors, files with their sha256 (as sha256sum prints it), "
    "and the\n"
    "memory a packed model takes. Every tensor's name, shape and type is checked; the weights "
    "themselves\n"
    "are not (see verify).\n\n"
    "  --exclude   with these projections left in bf16 (see pack): the memory, and how many are "
    "left\n"
    "  --tensors   list every tensor\n"
    "  --json      everything as one JSON object\n\n"
    "examples:\n"
    "  qerl-model inspect models/tiny\n"
    "  qerl-model inspect SmolLM2-135M-Instruct.Q4_1.gguf --json | jq .params\n";

static json_t *shape_json(const struct model_conf *c) {
    json_t *o = json_pack(
        "{s:s, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:f, s:f, s:b, s:b, s:i}", "architecture",
        conf_arch_name(c->arch), "vocab", c->vocab, "dim", c->dim, "layers", c->layers, "heads",
        c->heads, "kv_heads", c->kv_heads, "head_dim", c->head_dim, "ffn_dim", c->ffn_dim,
        "positions", c->positions_max, "norm_eps", (double)c->norm_eps, "rope_theta",
        (double)c->rope_theta, "tied", c->tied, "qkv_bias", c->qkv_bias, "bos", c->bos);
    json_t *eos = json_array();
    for (int i = 0; i < c->eos_count; i++) json_array_append_new(eos, json_integer(c->eos[i]));
    json_object_set_new(o, "eos", eos);
    if (c->rope_llama3.on)
        json_object_set_new(o, "rope_llama3",
                            json_pack("{s:f, s:f, s:f, s:i}", "factor",
                                      (double)c->rope_llama3.factor, "low_freq_factor",
                                      (double)c->rope_llama3.low_freq_factor, "high_freq_factor",
                                      (double)c->rope_llama3.high_freq_factor, "original_positions",
                                      c->rope_llama3.original_positions));
    return o;
}

static json_t *files_json(const char *path, struct err *e) {
    struct source_files files;
    char file[FS_PATH_MAX];
    if (source_files(&files, model_path_resolve(path, file), e) < 0) return NULL;
    json_t *list = json_array();
    for (int i = 0; i < files.n; i++) {
        struct stat st = { 0 };
        char hex[SHA256_HEX];
        if (sha256_file(files.path[i], hex, e) < 0 || stat(files.path[i], &st) < 0) {
            json_decref(list);
            list = NULL;
            break;
        }
        json_array_append_new(list, json_pack("{s:s, s:I, s:s}", "path", files.path[i], "bytes",
                                              (json_int_t)st.st_size, "sha256", hex));
    }
    source_files_release(&files);
    return list;
}

static json_t *tensors_json(const struct source *s, int64_t *params, json_t *dtypes) {
    json_t *list = json_array();
    *params = 0;
    for (int i = 0; i < source_count(s); i++) {
        const struct source_item *x = source_at(s, i);
        const char *dtype = source_dtype(s, i);
        json_t *shape = source_is_matrix(x) ? json_pack("[i, i]", x->rows, x->cols)
                                            : json_pack("[i]", x->cols);
        json_array_append_new(list, json_pack("{s:s, s:s, s:o}", "name", source_name(s, i), "dtype",
                                              dtype, "shape", shape));
        json_object_set_new(dtypes, dtype,
                            json_integer(json_integer_value(json_object_get(dtypes, dtype)) + 1));
        *params += (int64_t)x->rows * x->cols;
    }
    return list;
}

static json_t *packed_json(const struct model_conf *c, const struct model_exclude *x) {
    json_t *o = json_object();
    for (int q = 0; q <= MODEL_QUANT_F32; q++) {
        struct packed_plan p;
        packed_plan_init(&p, c, (enum model_quant)q, MODEL_ROUNDING_OCP, x);
        json_object_set_new(o, model_quant_name((enum model_quant)q),
                            json_integer((json_int_t)p.file_bytes));
        packed_plan_release(&p);
    }
    return o;
}

/* Everything known, as one object; NULL with e. The text form prints the same object. */
static json_t *gather(const char *path, const char *patterns, struct err *e) {
    struct model_conf c;
    struct model_exclude exclude;
    struct source *s;
    char sha256[SHA256_HEX];
    int64_t params;
    if (model_conf_load(&c, path, e) < 0 || model_exclude_make(&exclude, patterns, &c, e) < 0 ||
        source_open(&s, path, &c, e) < 0) return NULL;
    json_t *o = shape_json(&c), *dtypes = json_object(), *files = NULL;
    json_object_set_new(o, "tensors", tensors_json(s, &params, dtypes));
    json_object_set_new(o, "dtypes", dtypes);
    json_object_set_new(o, "params", json_integer(params));
    json_object_set_new(o, "packed_bytes", packed_json(&c, &exclude));
    json_object_set_new(o, "projections", json_integer(c.layers * PROJ_COUNT));
    json_object_set_new(o, "quantised", json_integer(c.layers * PROJ_COUNT - exclude.count));
    source_close(&s);
    if (model_sha256(path, NULL, sha256, e) == 0) files = files_json(path, e);
    if (!files) {
        json_decref(o);
        return NULL;
    }
    json_object_set_new(o, "files", files);
    json_object_set_new(o, "sha256", json_string(sha256));
    return o;
}

static void print_shape(const json_t *o) {
    static const char *const order[] = { "architecture", "params",    "vocab",    "dim",
                                         "layers",       "heads",     "kv_heads", "head_dim",
                                         "ffn_dim",      "positions", "norm_eps", "rope_theta",
                                         "rope_llama3",  "tied",      "qkv_bias", "bos",
                                         "eos",          "projections", "quantised", "sha256" };
    for (size_t i = 0; i < COUNT_OF(order); i++) {
        const json_t *v = json_object_get(o, order[i]);
        if (!v) continue;
        char *text = json_dumps(v, JSON_ENCODE_ANY | JSON_COMPACT | JSON_REAL_PRECISION(6));
        printf("%-14s %s\n", order[i], json_is_string(v) ? json_string_value(v) : text);
        free(text);
    }
}

static void print_text(json_t *o, bool tensors) {
    const char *key;
    json_t *v;
    size_t i;
    print_shape(o);
    json_object_foreach(json_object_get(o, "dtypes"), key, v)
        printf("%-14s %lld tensors of %s\n", "dtype", (long long)json_integer_value(v), key);
    json_object_foreach(json_object_get(o, "packed_bytes"), key, v)
        printf("%-14s %.1f MB as %s\n", "packed", (double)json_integer_value(v) / 1e6, key);
    json_array_foreach(json_object_get(o, "files"), i, v) printf(
        "%-14s %s  %s (%lld bytes)\n", "file", json_string_value(json_object_get(v, "sha256")),
        json_string_value(json_object_get(v, "path")),
        (long long)json_integer_value(json_object_get(v, "bytes")));
    if (tensors) json_array_foreach(json_object_get(o, "tensors"), i, v) {
        char *shape = json_dumps(json_object_get(v, "shape"), 0);
        printf("%-14s %-6s %-16s %s\n", "tensor", json_string_value(json_object_get(v, "dtype")),
               shape, json_string_value(json_object_get(v, "name")));
        free(shape);
    }
}

int cmd_inspect(int argc, char **argv) {
    const char *path, *exclude = NULL;
    bool json = false, tensors = false;
    const struct arg arg[] = { { "exclude", &exclude, NULL },
                               { "json", NULL, &json },
                               { "tensors", NULL, &tensors } };
    struct err e = { 0 };
    int go = args_parse(argc, argv, HELP, arg, COUNT_OF(arg), &path);
    if (go < 1) return go < 0 ? EXIT_USAGE : EXIT_DONE;
    json_t *o = gather(path, exclude, &e);
    if (!o) {
        fprintf(stderr, "qerl-model inspect: %s\n", e.text);
        return e.code ? e.code : EXIT_ENV;
    }
    if (json) json_dumpf(o, stdout, JSON_INDENT(1) | JSON_REAL_PRECISION(9)), putchar('\n');
    else print_text(o, tensors);
    json_decref(o);
    return EXIT_DONE;
}
