/* shared.c - see shared.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/stage/shared.h"

#include <sys/stat.h>

#include "lib/base/fs.h"
#include "lib/base/hash.h"

#define AT(field) offsetof(struct shared, field)

static const char shared_kernel_choices[] = "auto|ref|avx2|avx512|avx512bf16|amx|amx-emulated";

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
      "kernel path; all give the same bits, auto is the fastest this CPU has" },
    { "run.threads", KEY_INT, AT(run.threads), "0", 0, 256, NULL,
      "threads of a stage; 0 = the cores it was given" },
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
      "standard deviation of the noise on norm weights of the rollout in the second interval; 0 = "
      "no noise" },
    { "noise.aqn.sigma_end", KEY_NUM, AT(aqn.sigma_end), "0", 0, 10, NULL,
      "the same in the last interval (geometric decay)" },
    { "noise.aqn.stages", KEY_INT, AT(aqn.stages), "10", 2, 1000, NULL,
      "intervals of the schedule; the first is silent" },
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

int shared_check_aqn(const struct shared *c, struct err *e) {
    if ((c->aqn.sigma_start > 0) == (c->aqn.sigma_end > 0)) return 0;
    return err_more(
        e, EXIT_CONFIG,
        "noise.aqn.sigma_start is %g and noise.aqn.sigma_end %g: a geometric decay needs both "
        "above 0; set both to 0 for no noise",
        c->aqn.sigma_start, c->aqn.sigma_end);
}

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
