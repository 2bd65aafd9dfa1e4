/* policy.c - see policy.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/stage/policy.h"

#include <sys/stat.h>

#include "kernels/cuda/plugin.h"
#include "lib/base/fs.h"
#include "lib/base/hash.h"
#include "lib/base/json.h"
#include "lib/base/log.h"
#include "lib/base/rng.h"
#include "lib/model/exclude.h"
#include "lib/stage/aqn.h"
#include "lib/task/task.h"

int policy_lora_shape(struct lora_shape *s, const struct shared *c, struct err *e) {
    static const char *const name[PROJ_COUNT] = { "q", "k", "v", "o", "gate", "up", "down" };
    *s = (struct lora_shape){ .rank = (int)c->lora.rank, .alpha = (float)c->lora.alpha };
    char *text = mem_dup(c->lora.targets), *at = text;
    int rc = 0, count = 0;
    for (char *word; (word = strsep(&at, ", "));) {
        if (!*word) continue;
        int p = 0;
        while (p < PROJ_COUNT && strcmp(word, name[p]) != 0) p++;
        if (p == PROJ_COUNT)
            rc = err_code(e, EXIT_CONFIG, "lora.targets: '%s' is not one of q,k,v,o,gate,up,down",
                          word);
        else s->on[p] = true;
        count++;
    }
    if (!count)
        rc = err_code(e, EXIT_CONFIG,
                      "lora.targets is empty: name at least one of q,k,v,o,gate,up,down");
    free(text);
    return rc;
}

/* Projections that share an input have one product A x: first and last of each. */
static const enum proj sharing[][2] = { { PROJ_Q, PROJ_V }, { PROJ_O, PROJ_O },
                                        { PROJ_GATE, PROJ_UP }, { PROJ_DOWN, PROJ_DOWN } };

/* Adapters read in quant.adapter; -1 where some of one product would be and some would not. */
static int rounded_adapters(const struct lora_shape *s, const struct model_exclude *x,
                            const struct model_conf *m) {
    int all = 0;
    bool mixed = false;
    for (int l = 0; l < m->layers; l++)
        for (size_t i = 0; i < COUNT_OF(sharing); i++) {
            int on = 0, rounded = 0;
            for (enum proj p = sharing[i][0]; p <= sharing[i][1]; p++) {
                on += s->on[p];
                rounded += s->on[p] && !x->on[l][p];
            }
            mixed |= rounded && rounded < on;
            all += rounded;
        }
    return mixed ? -1 : all;
}

/* What quant.adapter cannot do, or would not. */
static int check_adapter(const struct shared *c, const struct lora_shape *s,
                         const struct model_conf *m, struct err *e) {
    struct model_exclude x;
    int rc = 0;
    if (!c->quant.adapter || model_exclude_make(&x, c->quant.exclude, m, NULL) < 0) return 0;
    const int rounded = rounded_adapters(s, &x, m);
    if (rounded == 0)
        rc = err_more(e, EXIT_CONFIG, "quant.adapter would do nothing: quant.exclude = %s leaves "
                      "out every projection that lora.targets adapts; unset one of them",
                      c->quant.exclude);
    if (rounded < 0 && c->quant.activations)
        rc = err_more(e, EXIT_CONFIG, "quant.exclude parts projections that share an input (%s): "
                      "with quant.adapter and quant.activations their adapters read it in one "
                      "product, so leave out all of q, k, v (all of gate, up) of a layer or none",
                      c->quant.exclude);
    if (c->quant.activations && c->modules.type && c->modules.at == NOISE_POINT_INPUT)
        rc = err_more(e, EXIT_CONFIG, "noise.modules.at = input is not offered together with "
                      "quant.adapter and quant.activations: set noise.modules.at = output, or "
                      "quant.adapter = none");
    if (c->quant.adapter == MODEL_QUANT_MXFP4 && c->quant.parity == MODEL_ROUNDING_SEED &&
        s->rank % 32)
        rc = err_more(e, EXIT_CONFIG, "quant.adapter = mxfp4 with quant.parity = seed needs a "
                      "lora.rank that is a multiple of 32, not %d: its blocks would run over row "
                      "ends", s->rank);
    return rc;
}

static bool rounds_projections(const struct shared *c) {
    return model_quant_rounds((enum model_quant)c->quant.weights) || c->quant.activations;
}

static bool quantises(const struct shared *c) {
    return rounds_projections(c) || c->quant.adapter;
}

const char *policy_quant_label(const struct shared *c) {
    return model_format_label((enum model_quant)c->quant.weights,
                              (enum model_quant)c->quant.activations,
                              (enum model_quant)c->quant.adapter,
                              (enum model_rounding)c->quant.parity, *c->quant.exclude != 0);
}

void policy_treatment(char out[17], const struct shared *c, const struct noise_plan *plan,
                      const char *model_sha256) {
    struct str text;
    str_init(&text);
    str_printf(&text, "model %s\nquant %s", model_sha256, policy_quant_label(c));
    if (quantises(c) && *c->quant.exclude) str_printf(&text, " without %s", c->quant.exclude);
    str_printf(&text, "\nlora %lld %.17g %s\n", (long long)c->lora.rank, c->lora.alpha,
               c->lora.targets);
    str_puts(&text, "aqn ");
    aqn_text(c, &text);
    str_puts(&text, "\n");
    noise_plan_text(plan, &text);
    char hex[SHA256_HEX];
    sha256_of(text.s, text.len, hex);
    memcpy(out, hex, 16);
    out[16] = 0;
    str_release(&text);
}

static int require_files(const struct shared *c, struct err *e) {
    if (!*c->model.path) return err_code(e, EXIT_USAGE,
        "no model is named: --set model.path=FOLDER (models/tiny is in every clone)");
    if (fs_exists(c->model.path)) return 0;
    return err_code(e, EXIT_ENV,
                    "model '%s' is absent: fetch one (tools/fetch --list) or set model.path",
                    c->model.path);
}

int policy_kernels(json_t *out, const struct shared *c, struct err *e) {
    char name[32];
    struct kern k;
    if (kern_open(&k, shared_kernels(c->run.kernels, name, sizeof name), NULL, e) < 0) return -1;
    return device_plan(out, &k, e);
}

static bool by_cublas(const struct shared *c) {
    char name[32];
    return !strcmp(shared_kernels(c->run.kernels, name, sizeof name), "cuda-blas");
}

const char *policy_kernels_note(const struct shared *c) {
    return by_cublas(c) ? "run.kernels = cuda-blas: products of many rows go to cuBLAS, so the "
                          "learner's log-probs and the rollout's differ in their last bits, at "
                          "sigma 0 too: training/rollout_logp_differ counts them, rollout_corr/... "
                          "say how far; cuda and cuda-mma are strict"
                        : NULL;
}

struct model_opts policy_model_opts(const struct shared *c) {
    return (struct model_opts){ .path = c->model.path,
                                .quant = (enum model_quant)c->quant.weights,
                                .rounding = (enum model_rounding)c->quant.parity,
                                .packed_dir = *c->model.packed_dir ? c->model.packed_dir : NULL,
                                .activations = (enum model_quant)c->quant.activations,
                                .adapter = (enum model_quant)c->quant.adapter,
                                .exclude = c->quant.exclude };
}

int policy_open(struct policy *p, const struct shared *c, struct err *e) {
    char path[32];
    *p = (struct policy){ 0 };
    if (policy_lora_shape(&p->shape, c, e) < 0 || require_files(c, e) < 0) return -1;
    const int cores = pool_cores(), asked = (int)c->run.threads;
    if (asked > cores)
        log_warn("run.threads = %d, but this stage has %d cores: %d threads are used", asked, cores,
                 cores);
    p->pool = pool_create(asked > 0 && asked < cores ? asked : cores);
    const struct model_opts o = policy_model_opts(c);
    if (kern_open(&p->kern, shared_kernels(c->run.kernels, path, sizeof path), p->pool, e) < 0 ||
        device_text(p->device, &p->kern, e) < 0 ||
        model_open(&p->model, &p->kern, &o, e) < 0 ||
        check_adapter(c, &p->shape, &p->model->conf, e) < 0 ||
        tok_open(&p->tok, c->model.path, e) < 0 ||
        treatment_plan(&p->plan, c, &p->model->conf, false, e) < 0) {
        policy_close(p);
        return -1;
    }
    const struct noise_schedule aqn = aqn_schedule(c);
    struct noise_target target;
    if (noise_schedule_on(&aqn) &&
        aqn_target(&target, c, 0, &p->model->conf, e) < 0) {
        policy_close(p);
        return -1;
    }
    if (policy_kernels_note(c)) log_warn("%s", policy_kernels_note(c));
    noise_plan_text(&p->plan, &p->ops);
    policy_treatment(p->treatment, c, &p->plan, p->model->sha256);
    const int all = p->model->conf.layers * PROJ_COUNT;
    log_info("kernels %s%s%s%s, %d threads; model '%s' %s (%d of %d projections quantised), "
             "treatment %s",
             p->kern.name, *p->device ? " (" : "", p->device, *p->device ? ")" : "",
             pool_threads(p->pool), c->model.path, policy_quant_label(c),
             rounds_projections(c) ? all - p->model->excluded : 0, all, p->treatment);
    return 0;
}

void policy_close(struct policy *p) {
    tok_close(&p->tok);
    model_close(&p->model);
    pool_destroy(&p->pool);
    str_release(&p->ops);
}

int policy_prompt(const struct policy *p, const struct shared *c, const char *question,
                  struct str *text, struct tok_ids *ids, struct err *e) {
    struct str user;
    str_init(&user);
    task_user_message(&user, question);
    struct chat_message m = { "user", user.s };
    str_clear(text);
    ids->n = 0;
    int rc = tok_chat(p->tok, *c->model.chat ? c->model.chat : NULL, &m, 1, true, text, e);
    if (rc == 0) tok_encode(p->tok, text->s, text->len, true, ids);
    str_release(&user);
    return rc;
}

static void plan_model_file(json_t *files, const char *dir, const char *name, const char *get) {
    char path[FS_PATH_MAX];
    if (strlen(dir) + strlen(name) + 2 > sizeof path) return;
    fs_join(path, sizeof path, dir, name);
    shared_plan_file(files, path, "model", get);
}

/* The shards that the index names, each once. */
static void plan_shards(json_t *files, const char *dir, const char *index, const char *get) {
    const char *tensor;
    json_t *file, *o = json_parse_file(index, 64 << 20, NULL), *seen = json_object();
    json_object_foreach(json_object_get(o, "weight_map"), tensor, file) {
        const char *name = json_string_value(file);
        if (!name || json_object_get(seen, name)) continue;
        json_object_set_new(seen, name, json_true());
        plan_model_file(files, dir, name, get);
    }
    json_decref(seen);
    json_decref(o);
}

static void plan_files(json_t *files, const struct shared *c) {
    static const char *const needed[] = { "config.json", "tokenizer.json" };
    static const char *const optional[] = { "generation_config.json", "tokenizer_config.json",
                                            "chat_template.jinja" };
    char get[FS_PATH_MAX + 16], file[FS_PATH_MAX], path[FS_PATH_MAX];
    const char *base = strrchr(c->model.path, '/');
    snprintf(get, sizeof get, "tools/fetch %.1000s", base ? base + 1 : c->model.path);
    const char *model = model_path_resolve(c->model.path, file);
    if (!fs_is_dir(model) || strlen(model) + 40 > sizeof path) {
        shared_plan_file(files, model, "model", get);
        return;
    }
    for (size_t i = 0; i < COUNT_OF(needed); i++) plan_model_file(files, model, needed[i], get);
    for (size_t i = 0; i < COUNT_OF(optional); i++) {
        fs_join(path, sizeof path, model, optional[i]);
        if (fs_exists(path)) plan_model_file(files, model, optional[i], get);
    }
    fs_join(path, sizeof path, model, "model.safetensors.index.json");
    if (!fs_exists(path)) {
        plan_model_file(files, model, "model.safetensors", get);
        return;
    }
    plan_model_file(files, model, "model.safetensors.index.json", get);
    plan_shards(files, model, path, get);
}

/* "182 of 196 projections; embeddings and head bf16; adapters of 182 read in mxfp4" */
static json_t *quantised_json(const struct shared *c, const struct model_conf *m,
                              const struct model_exclude *x) {
    const int all = m->layers * PROJ_COUNT;
    const enum model_quant adapter = (enum model_quant)c->quant.adapter;
    struct lora_shape shape;
    char text[160];
    if (!quantises(c) || policy_lora_shape(&shape, c, NULL) < 0) return NULL;
    const int some = rounds_projections(c) ? all - x->count : 0;
    int adapters = 0;
    for (int l = 0; l < m->layers; l++)
        for (enum proj p = 0; p < PROJ_COUNT; p++) adapters += shape.on[p] && !x->on[l][p];
    int n = snprintf(text, sizeof text, "%d of %d projections; embeddings and head %s", some, all,
                     c->quant.weights == MODEL_QUANT_F32 ? "f32" : "bf16");
    if (adapter)
        snprintf(text + n, sizeof text - (size_t)n, "; adapters of %d read in %s", adapters,
                 model_quant_name(adapter));
    return json_string(text);
}

int policy_plan(json_t *out, const struct shared *c, bool in_eval, struct lora_shape *shape,
                struct model_conf *m, struct err *e) {
    struct noise_plan noise;
    json_t *files = json_object_get(out, "files");
    if (!files) json_object_set_new(out, "files", files = json_array());
    plan_files(files, c);
    if (policy_lora_shape(shape, c, e) < 0 || policy_kernels(out, c, e) < 0) return -1;
    if (model_conf_load(m, c->model.path, NULL) < 0) return 0;         /* absent: listed above */
    if (check_adapter(c, shape, m, e) < 0 || treatment_plan(&noise, c, m, in_eval, e) < 0)
        return -1;
    json_object_set_new(out, "treatment", noise_plan_json(&noise));
    return 1;
}

int policy_plan_memory(json_t *out, const struct shared *c, const struct model_conf *m,
                       size_t bytes, size_t pages_bytes, struct err *e) {
    struct model_exclude x;
    if (model_exclude_make(&x, c->quant.exclude, m, e) < 0) return err_wrap(e, "quant.exclude");
    const size_t weights = model_plan(m, (enum model_quant)c->quant.weights, &x);
    json_t *quantised = quantised_json(c, m, &x);
    if (by_cublas(c)) bytes += CUDA_BLAS_BYTES_MAX;
    if (quantised) json_object_set_new(out, "quantised", quantised);
    json_object_set_new(out, "memory_bytes", json_integer((json_int_t)bytes));
    json_object_set_new(out, "pages_bytes", json_integer((json_int_t)pages_bytes));
    json_object_set_new(out, "weights_bytes", json_integer((json_int_t)weights));
    json_object_set_new(out, "weights", json_string(policy_quant_label(c)));
    return 0;
}

void policy_sample_key(uint32_t key[2], uint64_t seed, int64_t step) {
    rng_key(key, seed, RNG_PURPOSE_SAMPLE, (uint64_t)step);
}

uint64_t policy_noise_seed(uint64_t seed, int64_t step) {
    return rng_mix64(seed ^ rng_mix64((uint64_t)step));
}
