/* gen.h - batched decoding: groups of samples of one prompt, refilled as they finish. Rollout and
 * eval share it.
 *
 * A sample is a pure function of (weights, adapter, noise, key, prompt id, sample index, sampler):
 * batch size, order and threads change nothing. A group's prompt is computed once and its full KV
 * pages are shared.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_GEN_H
#define QERL_GEN_H
#include "lib/model/net.h"
#include "lib/model/tok.h"

enum gen_stop { GEN_STOP_EOS, GEN_STOP_STRING, GEN_STOP_LENGTH };
extern const char *const gen_stop_name[];              /* "eos", "stop_string", "length" */
enum { GEN_STOPS_MAX = 4, GEN_SAMPLES_MAX = 256 };

struct gen_request {                                   /* gen_submit copies it, prompt included */
    uint64_t tag;                                      /* handed back with every sample */
    const int32_t *prompt; int prompt_n;
    int samples;                                       /* 1 .. GEN_SAMPLES_MAX */
    int new_max;                                       /* most tokens to make */
    float temperature; int top_k; float top_p;         /* 0 = greedy; 0 = off; 1 = off */
    uint32_t key[2];                                   /* rng_key(seed, purpose, step) */
    /* counter = (uid lo, uid hi, sample, position of the new token from 0) */
    uint64_t prompt_uid;
};
struct gen_sample {                                    /* lent during the callback */
    uint64_t tag; int k;                               /* sample index */
    const int32_t *ids; int n;                         /* new tokens, the EOS included */
    /* under what was sampled from; under temperature 1, nothing cut */
    const float *lp, *lp_raw;
    enum gen_stop stop;
};
typedef void gen_take(void *ud, const struct gen_sample *s);

struct gen;
struct gen_opts {
    /* samples decoded together (also bounds prefill chunks below) */
    int rows;
    int positions_max;                                 /* prompt + new tokens */
    /* stop strings; checked on the decoded text */
    const char *stop[GEN_STOPS_MAX]; int stops;
    struct lora_shape lora;                            /* rank 0 = base only */
    enum model_quant activations;                      /* for gen_plan: as model.activations */
    bool noise, graphs;                                /* as net_opts.noise, net_opts.graphs */
};
size_t gen_plan(const struct model_conf *c, enum model_quant q, const struct gen_opts *o);
/* of these, the KV pages */
size_t gen_plan_pages(const struct model_conf *c, enum model_quant q, const struct gen_opts *o);
int gen_create(struct gen **out, const struct model *m, const struct tok *t,
               const struct gen_opts *o, struct err *e);
void gen_destroy(struct gen **g);
/* only when idle */
int gen_adopt(struct gen *g, const struct lora *l, const struct noise_view *v, struct err *e);
/* As net_set_noise, when idle, and net_take_noise. */
void gen_set_noise(struct gen *g, const struct noise_plan *plan, enum noise_phase phase,
                   uint64_t seed, uint64_t fixed_seed);
int gen_take_noise(struct gen *g, struct noise_evidence *to, struct err *e);
/* Refuses (-1) a prompt that is empty, holds ids outside the vocabulary, or does not fit
 * positions_max with new_max. */
int gen_submit(struct gen *g, const struct gen_request *r, struct err *e);
bool gen_idle(const struct gen *g);
int64_t gen_tokens_total(const struct gen *g);         /* new tokens made since create: progress */
/* One round: admit what fits, prefill it, one decode step; calls take for each finished sample. */
int gen_step(struct gen *g, gen_take *take, void *ud, struct err *e);
#endif
