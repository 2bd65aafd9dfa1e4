/* net.h - the one forward (and backward) of the network, for every stage.
 *
 * Input is a list of rows {token, slot, position}; prefill, decode and training differ in nothing
 * else. Keys and values live in pages of 32 positions; a slot is one sequence's page list. A group
 * shares the full pages of its prompt. Rounding: linears read bf16 activations; the residual
 * stream, norms, softmax and log-softmax are f32; KV is bf16 (all f32 when the model is
 * MODEL_QUANT_F32). Ownership: net lends model and kern; it copies adapters on adopt.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_NET_H
#define QERL_NET_H
#include "lib/model/lora.h"
#include "lib/model/noise.h"
#include "lib/model/noise_ops.h"

struct net;
struct net_opts {
    int rows_max;                /* rows of one call (training: tokens of a micro-batch) */
    int slots_max;               /* sequences alive at once */
    int positions_max;           /* longest sequence */
    int pages_max;               /* KV pages of 32; 0 = slots_max * ceil(positions_max / 32) */
    bool train;                  /* keep what the backward needs */
    struct lora_shape lora;      /* rank 0 = this net never sees an adapter */
    enum model_quant activations;    /* as model.activations, which net_create takes itself */
    bool noise;                  /* make room for noise on operations and modules */
    bool noise_peaks;            /* and for what noise_plan_peaks asks for */
    bool graphs;                 /* net_step keeps steps and replays them, where the table can */
};
/* The bill that `check` prints, by the code that allocates: bytes of net_create with these
 * options. */
size_t net_plan(const struct model_conf *c, enum model_quant q, const struct net_opts *o);
/* of these, the KV pages */
size_t net_plan_pages(const struct model_conf *c, enum model_quant q, const struct net_opts *o);
int net_create(struct net **out, const struct model *m, const struct net_opts *o, struct err *e);
void net_destroy(struct net **n);

/* From now on: base + lora (NULL = none) with noise (NULL = clean). lora is packed (copied); noise
 * is lent until the next adopt.
 *
 * Where model.adapter says so, A and B of a projection are read as MXFP4 or NVFP4 holds them: each
 * matrix by itself, blocks along its inputs, then bf16 as always (exact but for NVFP4's tensor
 * scale). Where the projection also reads its input in model.activations, so do both: A the same
 * rounded input as the weights, B its rows of rank values rounded alike. lora itself stays f32, and
 * its gradient is that of the rounded values: straight through. All adapted projections that share
 * an input must then agree (policy_plan). */
int net_adopt(struct net *n, const struct lora *l, const struct noise_view *v, struct err *e);
/* From the next adopt on, inputs and adapters are read as they are, whatever the model says: the
 * network that a straight-through gradient is compared with. */
void net_set_plain(struct net *n, bool plain);
/* What rounding did to all A and to all B of the adapter in use; elements 0 where they are as they
 * were. */
struct quant_stats;
void net_adapter_stats(const struct net *n, struct quant_stats *a, struct quant_stats *b);

/* From now on passes add the plan's noise of `phase`: the same draws for the same seed, token and
 * place, in every phase. fixed_seed is that of type systematic, whose draws should not change from
 * step to step. plan is lent; NULL, or one that is off in that phase, is clean: then not one
 * operation differs. Needs net_opts.noise where it is on. */
void net_set_noise(struct net *n, const struct noise_plan *plan, enum noise_phase phase,
                   uint64_t seed, uint64_t fixed_seed);
/* Bytes of noise on weights of modules, which a net makes when a plan has it: not in net_plan. */
size_t net_plan_weights(const struct model_conf *c, enum model_quant q,
                        const struct noise_plan *plan);
/* Adds what was counted since the last take (passes are counted always). */
int net_take_noise(struct net *n, struct noise_evidence *to, struct err *e);
/* Backward noise on net_grad, once it holds an update's whole gradient: each layer's part in rows
 * of 4096, keyed by the update's number. Nothing where the plan has none. */
void net_noise_grad(struct net *n, uint64_t update);

/* Slots. open gives an empty one, -1 when none (or no page) is free; fork shares the full pages of
 * the first `positions` of `from` and copies the partial one; close gives the pages back when the
 * last sharer is gone. reserve makes room. */
int net_slot_open(struct net *n);
int net_slot_fork(struct net *n, int from, int positions);
int net_slot_reserve(struct net *n, int slot, int positions);    /* 0, or -1: no page free */
void net_slot_close(struct net *n, int slot);

/* prompt and sample name the row in the draws of noise; sample is KERN_NOISE_NO_SAMPLE for tokens
 * of the prompt, which all samples of a group share. */
struct net_row { int32_t token, slot, pos; uint32_t prompt, sample; };
static inline uint32_t net_prompt_id(uint64_t uid) { return (uint32_t)(uid ^ uid >> 32); }

/* Runs rows (<= rows_max) and leaves logits of the rows named by want[] (ascending indices, wants
 * <= rows) ready for net_sample. Rows of one slot must be in ascending position and follow what the
 * slot holds; pages are reserved here. */
int net_forward(struct net *n, const struct net_row *rows, int count, const int32_t *want,
                int wants, struct err *e);
/* Draws one token per wanted row of the last forward (head and sampling in chunks: the full logits
 * never exist). */
int net_sample(struct net *n, const struct kern_sampler *s, int32_t *token, float *lp,
               float *lp_raw, struct err *e);
/* Draws `count` tokens, each with its own sampler, from the logits of one wanted row: first tokens
 * of a group. */
int net_sample_row(struct net *n, int want, const struct kern_sampler *s, int count, int32_t *token,
                   float *lp, float *lp_raw, struct err *e);
/* A decode step: net_forward of rows that are all wanted, and net_sample, with their bits; one wait
 * in all. With net_opts.graphs a number of rows that comes again is replayed, which changes no bit
 * and no count. */
int net_step(struct net *n, const struct net_row *rows, int count, const struct kern_sampler *s,
             int32_t *token, float *lp, float *lp_raw, struct err *e);
/* Copies logits of the wanted rows [wants, vocab] to the host (tools and tests). */
int net_logits(struct net *n, float *out, struct err *e);

struct net_seq {
    const int32_t *ids;          /* prompt then response */
    /* tokens in all; of the prompt. Response tokens prompt_n .. n-1 are scored. */
    int n, prompt_n;
    uint64_t uid;                /* of the prompt, and which sample of it: as in net_row */
    int sample;
};
/* Log-prob of each response token at temperature T (and entropy, or NULL), sequences one after the
 * other. Splits into micro-batches of whole sequences by itself. */
int net_logprobs(struct net *n, const struct net_seq *s, int seqs, float temperature, float *lp,
                 float *entropy, struct err *e);
/* coef[i] = dL/dlp of response tokens [first, first + count) of sequence `seq`, given their lp (and
 * entropy). */
typedef void net_loss(void *ud, int seq, int first, int count, const float *lp,
                      const float *entropy, float *coef);
/* Forward and backward of all sequences in order; adds dL/d(lora value) to grad (host, lora->params
 * floats), or, where grad is NULL, leaves it in net_grad, from zero. Neither the micro-batch size
 * nor the thread count changes a bit of the result. */
int net_train(struct net *n, const struct net_seq *s, int seqs, float temperature, net_loss *loss,
              void *ud, float *grad, struct err *e);
/* The gradient of the last net_train on the backend: lora->params f32, lent until the next. */
kptr net_grad(const struct net *n);
#endif
