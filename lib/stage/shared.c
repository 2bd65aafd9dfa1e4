/* shared.c - see shared.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/stage/shared.h"

#include <sys/stat.h>

#include "lib/base/fs.h"
#include "lib/base/hash.h"
#include "lib/stage/conf.h"

#define AT(field) offsetof(struct shared, field)

static const char shared_kernel_choices[] =
    "auto|ref|avx2|avx512|avx512bf16|amx|amx-emulated|cuda|cuda-mma|cuda-blas";

const char *shared_kernels(int choice, char *buf, size_t bytes) {
    const char *at = shared_kernel_choices;
    for (; choice > 0; choice--) at = strchr(at, '|') + 1;
    snprintf(buf, bytes, "%.*s", (int)strcspn(at, "|"), at);
    return buf;
}

const struct stage_key shared_run_keys[] = {
    { "run.dir", KEY_TEXT, AT(run.dir), "", 0, 0, NULL, "run folder, written by the launcher" },
    { "run.id", KEY_TEXT, AT(run.id), "alone", 0, 0, NULL, "run id, carried by every record" },
    { "run.seed", KEY_INT, AT(run.seed), "1", 0, 9e18, NULL, "seed of every random draw" },
    { "run.steps", KEY_INT, AT(run.steps), "100", 1, 1e9, NULL,
      "steps of the run, skipped ones included" },
    { "run.score_every", KEY_INT, AT(run.score_every), "20", 1, 1e9, NULL,
      "steps between scores; step 0 and the last are always scored" },
    { "run.kernels", KEY_CHOICE, AT(run.kernels), "auto", 0, 0,
      shared_kernel_choices,
      "kernel path; all but cuda-mma (tensor cores) and cuda-blas (cuBLAS: rollout and learner "
      "differ) give the same bits, auto is the fastest this CPU has, or cuda on a GPU" },
    { "run.threads", KEY_INT, AT(run.threads), "0", 0, 256, NULL,
      "threads of a stage; 0 = the cores it was given" },
    { 0 },
};
/* Beside these, of stages that decode. */
const struct stage_key shared_graphs_keys[] = {
    { "run.graphs", KEY_BOOL, AT(run.graphs), "on", 0, 0, NULL,
      "on a GPU a decode step is captured once and replayed as one launch; changes no bit" },
    { 0 },
};
const struct stage_key shared_model_keys[] = {
    { "model.path", KEY_TEXT, AT(model.path), "", 0, 0, NULL,
      "model folder (Hugging Face layout) or GGUF file" },
    { "model.packed_dir", KEY_TEXT, AT(model.packed_dir), "models/.packed", 0, 0, NULL,
      "where packed weights are kept" },
    { "model.chat", KEY_TEXT, AT(model.chat), "", 0, 0, NULL,
      "chat template family; empty = recognise the model's own" },
    { 0 },
};
const struct stage_key shared_quant_keys[] = {
    { "quant.weights", KEY_CHOICE, AT(quant.weights), "mxfp4", 0, 0, "bf16|mxfp4|nvfp4|f32",
      "base weights of the seven projections; head and embeddings stay bf16 (f32: for "
      "comparisons, slow)" },
    { "quant.parity", KEY_CHOICE, AT(quant.parity), "ocp", 0, 0, "ocp|seed",
      "rounding: OCP standard, or the earlier system's" },
    { "quant.activations", KEY_CHOICE, AT(quant.activations), "none", 0, 0, "none|mxfp4|nvfp4",
      "what the seven projections read, quantised by token; gradients pass straight through" },
    { "quant.adapter", KEY_CHOICE, AT(quant.adapter), "none", 0, 0, "none|mxfp4|nvfp4",
      "A and B of the adapter, and what they read where quant.activations is on; the trained "
      "values stay f32, gradients pass straight through" },
    { "quant.exclude", KEY_TEXT, AT(quant.exclude), "", 0, 0, NULL,
      "stay bf16, weights, activations and adapters: \"layers.0, layers.14-17, down_proj, "
      "layers.27.q_proj\"" },
    { 0 },
};
const struct stage_key shared_lora_keys[] = {
    { "lora.rank", KEY_INT, AT(lora.rank), "32", 1, 512, NULL, "rank of the adapter" },
    { "lora.alpha", KEY_NUM, AT(lora.alpha), "16", 0, 1e6, NULL, "scale is alpha / rank" },
    { "lora.targets", KEY_TEXT, AT(lora.targets), "q,k,v,o,gate,up,down", 0, 0, NULL,
      "adapted projections" },
    { 0 },
};
const struct stage_key shared_aqn_keys[] = {
    { "noise.aqn.sigma_start", KEY_NUM, AT(aqn.sigma_start), "0", 0, 10, NULL,
      "standard deviation of the noise on the rollout's weights where it begins; 0 = no noise" },
    { "noise.aqn.sigma_end", KEY_NUM, AT(aqn.sigma_end), "0", 0, 10, NULL,
      "the same where it ends; 0 or left out with noise.aqn.schedule = constant" },
    { "noise.aqn.stages", KEY_INT, AT(aqn.stages), "10", 1, 1000, NULL,
      "step, epoch: intervals of the schedule; the first is silent" },
    { "noise.aqn.schedule", KEY_CHOICE, AT(aqn.schedule), "step", 0, 0,
      "step|epoch|constant|linear|exponential",
      "step, epoch: intervals with a geometric decay over the run, inside each epoch; the others "
      "have no silent start" },
    { "noise.aqn.epochs", KEY_INT, AT(aqn.epochs), "1", 1, 1000, NULL,
      "epoch: equal parts of the run" },
    { "noise.aqn.targets", KEY_TEXT, AT(aqn.targets), "norms", 0, 0, NULL,
      "weights that are hit: norms, linears, or names like \"input_layernorm, down_proj\"" },
    { "noise.aqn.exclude", KEY_TEXT, AT(aqn.exclude), "", 0, 0, NULL, "names left out of targets" },
    { "noise.aqn.layers", KEY_TEXT, AT(aqn.layers), "", 0, 0, NULL,
      "multiplier of sigma by layer: \"14-17 of 28:1, 0-13:0.5\"; empty = 1 everywhere" },
    { "noise.aqn.others", KEY_NUM, AT(aqn.others), "1", 0, 1000, NULL,
      "multiplier of the layers that noise.aqn.layers does not name" },
    { "noise.aqn.zone_edge", KEY_TEXT, AT(aqn.zone_edge), "", 0, 0, NULL,
      "multipliers of the outer layers, constant over the run: \"0-9:1, 18-27:1\"; empty = none" },
    { "noise.aqn.zone_middle", KEY_TEXT, AT(aqn.zone_middle), "", 0, 0, NULL,
      "layers whose multiplier changes once in a run; empty = none" },
    { "noise.aqn.zone_switch", KEY_NUM, AT(aqn.zone_switch), "0.5", 0, 1, NULL,
      "share of the run's steps after which the middle zone changes" },
    { "noise.aqn.zone_early", KEY_NUM, AT(aqn.zone_early), "1", 0, 1000, NULL,
      "multiplier of the middle zone before that" },
    { "noise.aqn.zone_late", KEY_NUM, AT(aqn.zone_late), "0.5", 0, 1000, NULL,
      "multiplier of the middle zone from then on" },
    { 0 },
};

/* Phases, layers and arithmetic are asked of both kinds of noise in the same words. */
#define PHASES(section, member)                                                                    \
    { section ".rollout", KEY_BOOL, AT(member.rollout), "yes", 0, 0, NULL, "while sampling" },     \
    { section ".logprob", KEY_BOOL, AT(member.logprob), "yes", 0, 0, NULL,                         \
      "while the learner takes old log-probs" },                                                   \
    { section ".update", KEY_BOOL, AT(member.update), "yes", 0, 0, NULL,                           \
      "while the learner trains" },                                                                \
    { section ".eval", KEY_BOOL, AT(member.eval), "no", 0, 0, NULL,                                \
      "in every score; a second, noisy score beside the clean one is eval.also_noisy" }
#define LAYERS(section, member)                                                                    \
    { section ".layers", KEY_TEXT, AT(member.layers), "all", 0, 0, NULL,                           \
      "layers hit: \"0,3,14-17\", or \"14-17 of 28\", scaled to the model's depth" }
#define DTYPE(section, member)                                                                     \
    { section ".dtype", KEY_CHOICE, AT(member.dtype), "f32", 0, 0, "f32|bf16",                     \
      "arithmetic of the noise itself; bf16 is the earlier system's, where small scales vanish" }

const struct stage_key shared_ops_keys[] = {
    { "noise.ops.type", KEY_CHOICE, AT(ops.type), "off", 0, 0,
      "off|relative_gaussian|relative_uniform|systematic|sparse|deadzone",
      "noise on what operations return, before it is rounded to storage" },
    { "noise.ops.scale", KEY_NUM, AT(ops.scale), "0", 0, 10, NULL,
      "size relative to each element; deadzone: share of the row's largest below which is 0" },
    { "noise.ops.rate", KEY_NUM, AT(ops.rate), "0", 0, 1, NULL,
      "sparse: share of elements that are hit" },
    { "noise.ops.ops", KEY_TEXT, AT(ops.ops), "matmul", 0, 0, NULL,
      "list of matmul, bmm, softmax, silu, gelu, norm, rope, head; or all" },
    { "noise.ops.direction", KEY_CHOICE, AT(ops.direction), "both", 0, 0, "both|forward|backward",
      "results, or gradients, or both" },
    LAYERS("noise.ops", ops),
    PHASES("noise.ops", ops),
    DTYPE("noise.ops", ops),
    { 0 },
};
const struct stage_key shared_modules_keys[] = {
    { "noise.modules.type", KEY_CHOICE, AT(modules.type), "off", 0, 0,
      "off|relative_gaussian|absolute_gaussian|systematic_bias|deadzone|fp8",
      "noise on whole modules, forward only" },
    { "noise.modules.scale", KEY_NUM, AT(modules.scale), "0", 0, 10, NULL,
      "size, relative to each element or absolute as the type says; deadzone: share of the row's "
      "largest below which is 0; fp8 has none" },
    { "noise.modules.targets", KEY_TEXT, AT(modules.targets), "", 0, 0, NULL,
      "linear, rmsnorm, or names like \"q_proj, down_proj, input_layernorm, lm_head\"" },
    { "noise.modules.exclude", KEY_TEXT, AT(modules.exclude), "lm_head", 0, 0, NULL,
      "names left out of targets" },
    { "noise.modules.at", KEY_CHOICE, AT(modules.at), "input", 0, 0, "input|output|weight",
      "where it is added" },
    LAYERS("noise.modules", modules),
    PHASES("noise.modules", modules),
    DTYPE("noise.modules", modules),
    { 0 },
};
const struct stage_key shared_data_keys[] = {
    { "data.train", KEY_TEXT, AT(data.train), "data/gsm8k/train.jsonl", 0, 0, NULL,
      "training questions, JSON lines" },
    { "data.test", KEY_TEXT, AT(data.test), "data/gsm8k/test.jsonl", 0, 0, NULL,
      "test questions, JSON lines" },
    { "data.prompt_max", KEY_INT, AT(data.prompt_max), "1024", 1, 1 << 20, NULL,
      "tokens; longer prompts are an error" },
    { 0 },
};
const struct stage_key shared_sample_keys[] = {
    { "sample.n", KEY_INT, AT(sample.n), "8", 1, 256, NULL, "answers per question (the group)" },
    { "sample.new_max", KEY_INT, AT(sample.new_max), "1024", 1, 1 << 20, NULL,
      "tokens of an answer at most" },
    { "sample.temperature", KEY_NUM, AT(sample.temperature), "1", 0, 100, NULL, "0 = greedy" },
    { "sample.top_k", KEY_INT, AT(sample.top_k), "0", 0, 1 << 20, NULL, "0 = off" },
    { "sample.top_p", KEY_NUM, AT(sample.top_p), "1", 1e-6, 1, NULL, "1 = off" },
    { 0 },
};

static const struct stage_key *const shared_tables[] = { SHARED_POLICY_KEYS, NULL };
static const struct stage_about shared_about = { .keys = shared_tables };

static bool is_shared(const char *name) {
    for (int t = 0; shared_tables[t]; t++)
        for (const struct stage_key *k = shared_tables[t]; k->name; k++)
            if (strcmp(k->name, name) == 0) return true;
    return false;
}

int shared_load(struct shared *c, const char *path, struct err *e) {
    struct settings all = { 0 }, ours = { 0 };
    *c = (struct shared){ 0 };
    if (!fs_exists(path)) return err_code(e, EXIT_ENV, "'%s' is absent", path);
    int rc = settings_read(&all, path, e);
    for (int i = 0; rc == 0 && i < all.n; i++)
        if (is_shared(all.v[i].name))
            settings_add(&ours, all.v[i].name, all.v[i].text, path, all.v[i].line);
    if (rc == 0) rc = conf_bind(c, &shared_about, &ours, e);
    settings_release(&all);
    settings_release(&ours);
    return rc;
}

void shared_release(struct shared *c) { conf_release(c, &shared_about); }

bool shared_is_scored(const struct shared *c, int64_t step) {
    return step == 0 || step == c->run.steps ||
           (step < c->run.steps && step % c->run.score_every == 0);
}

static int64_t count_lines(const char *path) {
    FILE *f = fopen(path, "re");
    if (!f) return 0;
    int64_t n = 0;
    for (int c; (c = getc(f)) != EOF;) n += c == '\n';
    fclose(f);
    return n;
}

void shared_plan_file(json_t *files, const char *path, const char *role, const char *get) {
    struct stat st;
    char sha256[SHA256_HEX];
    json_t *o = json_object();
    json_object_set_new(o, "path", json_string(path));
    json_object_set_new(o, "role", json_string(role));
    if (stat(path, &st) == 0 && S_ISREG(st.st_mode) && sha256_file(path, sha256, NULL) == 0) {
        json_object_set_new(o, "bytes", json_integer(st.st_size));
        json_object_set_new(o, "sha256", json_string(sha256));
        if (str_ends(path, ".jsonl"))
            json_object_set_new(o, "lines", json_integer(count_lines(path)));
    } else {
        json_object_set_new(o, "sha256", json_null());
        json_object_set_new(o, "absent", json_string(get));
    }
    json_array_append_new(files, o);
}
