/* model.h - a frozen base model: its shape, its packed weights, where they came from.
 *
 * Knows: HF folders (config.json, safetensors, sharded or not) and GGUF files; Llama and Qwen2; how
 * a weight is quantised. Does not know: tokens as text (tok.h), LoRA (lora.h), what is computed
 * with the weights (net.h). The weights are never written after model_open; several stages map the
 * same packed file.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_MODEL_H
#define QERL_MODEL_H
#include "kernels/kern.h"
#include "lib/base/hash.h"

enum { MODEL_EOS_MAX = 8, MODEL_LAYERS_MAX = 256 };
enum model_arch { MODEL_ARCH_LLAMA, MODEL_ARCH_QWEN2 };
/* F32: vectors and gradient checks only */
enum model_quant { MODEL_QUANT_BF16, MODEL_QUANT_MXFP4, MODEL_QUANT_NVFP4, MODEL_QUANT_F32 };
/* SEED: the earlier system's, `parity = seed` */
enum model_rounding { MODEL_ROUNDING_OCP, MODEL_ROUNDING_SEED };
enum proj { PROJ_Q, PROJ_K, PROJ_V, PROJ_O, PROJ_GATE, PROJ_UP, PROJ_DOWN, PROJ_COUNT };

struct model_conf {
    enum model_arch arch;
    int vocab, dim, layers, heads, kv_heads, head_dim, ffn_dim, positions_max;
    float norm_eps, rope_theta;
    struct {
        bool on;
        float factor, low_freq_factor, high_freq_factor;
        int original_positions;
    } rope_llama3;
    bool tied, qkv_bias;
    /* from generation_config.json and config.json, or GGUF metadata */
    int32_t eos[MODEL_EOS_MAX];
    int eos_count;
    int32_t bos;                                     /* -1 = none */
};

struct model_layer {
    struct kern_weight w[PROJ_COUNT];
    kptr bias[3];                                    /* q, k, v; f32; absent in Llama */
    kptr norm_in, norm_post;                         /* f32 [dim] */
    bool quant_in[PROJ_COUNT];                       /* reads its input in model.activations */
    bool quant_adapter[PROJ_COUNT];                  /* its adapter is read in model.adapter */
};

struct model {
    struct model_conf conf;
    struct model_layer *layer;
    /* bf16 (f32 under MODEL_QUANT_F32); the same records when tied */
    struct kern_weight embed, head;
    kptr norm_final;
    enum model_quant quant;
    enum model_rounding rounding;                    /* of weights and activations */
    /* MXFP4 or NVFP4: what the projections read, by row; BF16: their input as it is */
    enum model_quant activations;
    enum model_quant adapter;                        /* MXFP4 or NVFP4: of A and B; BF16: as is */
    int excluded;                                    /* projections left alone by exclude.h */
    /* of the source weights: names the base in manifests and records */
    char sha256[SHA256_HEX];
    struct kern *kern;                               /* lent */
    struct model_store *store;                       /* mapping or memory behind the kptrs */
};

struct model_opts {
    const char *path;                                /* HF folder or .gguf file */
    enum model_quant quant;
    enum model_rounding rounding;
    const char *packed_dir; /* where packed files live, "models/.packed"; NULL = pack in memory */
    enum model_quant activations;                    /* MXFP4 or NVFP4, else as they are */
    enum model_quant adapter;                        /* the same of A and B: see net_adopt */
    const char *exclude;                             /* patterns of exclude.h; NULL = none */
};

/* A folder without config.json that holds exactly one .gguf file stands for that file: every
 * function that takes a model's path sees it so. Returns path, or buf (FS_PATH_MAX bytes) with the
 * file's path. */
const char *model_path_resolve(const char *path, char *buf);
/* Shape only; reads config.json or GGUF metadata. EXIT_ENV when the model is absent, unsupported or
 * damaged. */
int model_conf_load(struct model_conf *c, const char *path, struct err *e);
/* Bytes of the packed file, which the stages of a host map: there once for all of them. */
struct model_exclude;
size_t model_plan(const struct model_conf *c, enum model_quant q, const struct model_exclude *x);
/* sha256 over the weight files (sorted by name), cached beside the packed files by path, size and
 * time. */
int model_sha256(const char *path, const char *packed_dir, char out[SHA256_HEX], struct err *e);
/* Maps the packed file of (sha256, quant, rounding, exclusions), making it first where absent
 * (atomically, so two stages may race). */
int model_open(struct model **out, struct kern *k, const struct model_opts *o, struct err *e);
void model_close(struct model **m);

/* in and out width of a projection. */
void model_proj_shape(const struct model_conf *c, enum proj p, int *out, int *in);
/* A packed weight as it multiplies, scale and all: host values [out, in], row-major. The table's
 * threads share the rows. */
void model_values(struct kern *k, const struct kern_weight *w, float *values);
extern const char *const model_proj_name[PROJ_COUNT];   /* "q_proj", ... "down_proj" */
/* "bf16", "mxfp4", "nvfp4", "f32"; -1 */
int model_quant_parse(const char *text);
const char *model_quant_name(enum model_quant q);
/* The 4-bit formats: those that have two roundings. */
bool model_quant_rounds(enum model_quant q);
/* "mxfp4", "mxfp4-seed", "bf16", ...: names packed files */
const char *model_quant_label(enum model_quant q, enum model_rounding r);
/* The same for scores: "mxfp4", "mxfp4-seed-w4a4", "nvfp4-w16a4" (weights bf16),
 * "mxfp4-w4a4-lora-mxfp4" (the adapter too), "mxfp4-w4a4-x" (some modules excluded), ... */
const char *model_format_label(enum model_quant weights, enum model_quant activations,
                               enum model_quant adapter, enum model_rounding r, bool excluded);
#endif
