/* policy.h - a base model with everything that computes it, opened the same way by rollout, learner
 * and evaluator.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_POLICY_H
#define QERL_POLICY_H
#include "lib/model/lora.h"
#include "lib/model/tok.h"
#include "lib/stage/device.h"
#include "lib/stage/treatment.h"

struct policy {
    struct pool *pool;
    struct kern kern;
    char device[DEVICE_TEXT_MAX];    /* device_text of the kernels */
    struct model *model;
    struct tok *tok;
    struct lora_shape shape;
    struct noise_plan plan;          /* of operations and modules; its texts are lent by shared */
    struct str ops;                  /* the plan's text, as records carry it */
    char treatment[17];              /* hash of what shapes the arithmetic: see policy_treatment */
};
/* Threads, kernels, model, tokenizer as the shared configuration says. EXIT_ENV when the machine or
 * a file lacks something. */
int policy_open(struct policy *p, const struct shared *c, struct err *e);
void policy_close(struct policy *p);
/* The model that the configuration names; texts are lent by c. */
struct model_opts policy_model_opts(const struct shared *c);

/* "q,k,v" -> shape.on; EXIT_CONFIG with the valid names. */
int policy_lora_shape(struct lora_shape *s, const struct shared *c, struct err *e);
/* 16 hex digits over base model, formats, adapter shape and noise settings: what a record must
 * agree on. */
void policy_treatment(char out[17], const struct shared *c, const struct noise_plan *plan,
                      const char *model_sha256);
/* "mxfp4", "mxfp4-seed-w4a4-x", "bf16", ...: how scores are labelled; see model_format_label. */
const char *policy_quant_label(const struct shared *c);
/* Renders a question with the model's own chat template and encodes it. EXIT_ENV on an unknown
 * template. */
int policy_prompt(const struct policy *p, const struct shared *c, const char *question,
                  struct str *text, struct tok_ids *ids, struct err *e);
/* Whether this machine has the kernels that run.kernels names, EXIT_ENV with those it has; of a GPU
 * "devices" is added to out. */
int policy_kernels(json_t *out, const struct shared *c, struct err *e);
/* What run.kernels means for a run beyond its bits, or NULL: said at the start and by check. */
const char *policy_kernels_note(const struct shared *c);
/* What every stage with a policy says of it for --plan: the model's files into out's "files", the
 * table of noise on operations and modules as "treatment" (in_eval: as in treatment_plan), and what
 * cannot work. 1 with shape and m filled in, 0 where the model is absent, -1. */
int policy_plan(json_t *out, const struct shared *c, bool in_eval, struct lora_shape *shape,
                struct model_conf *m, struct err *e);
/* The memory for --plan: what the stage makes, KV pages and what its kernels take included, the
 * weights it maps, and how many projections are quantised. EXIT_CONFIG where quant.exclude hits
 * nothing. */
int policy_plan_memory(json_t *out, const struct shared *c, const struct model_conf *m,
                       size_t bytes, size_t pages_bytes, struct err *e);
/* One key per sampled step: what rollout and offline replays use. */
void policy_sample_key(uint32_t key[2], uint64_t seed, int64_t step);
/* AQN key of a step. */
uint64_t policy_noise_seed(uint64_t seed, int64_t step);
#endif
