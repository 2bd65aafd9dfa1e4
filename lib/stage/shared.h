/* shared.h - settings that more than one stage reads, so that two stages cannot disagree about
 * them.
 *
 * A stage's configuration struct begins with `struct shared`; it declares the sections it reads by
 * listing their key tables in its stage_about. A section that no stage of a pipeline lists is an
 * error there.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_SHARED_H
#define QERL_SHARED_H
#include "lib/stage/stage.h"

enum shared_direction { SHARED_DIRECTION_BOTH, SHARED_DIRECTION_FORWARD,
                        SHARED_DIRECTION_BACKWARD };

struct shared {
    struct {
        char *dir, *id;
        int64_t seed, steps, score_every;
        int kernels;                 /* see shared_kernels */
        int64_t threads;
        bool graphs;                 /* of stages that list shared_graphs_keys */
    } run;
    struct { char *path, *packed_dir, *chat; } model;
    /* enum model_quant (bf16 | mxfp4 | nvfp4 | f32), enum model_rounding; none | mxfp4 | nvfp4 */
    struct { int weights, parity, activations, adapter; char *exclude; } quant;
    struct { int64_t rank; double alpha; char *targets; } lora;
    struct {
        double sigma_start, sigma_end;
        int64_t stages, epochs;
        int schedule;                /* step | epoch | constant | linear | exponential */
        char *targets, *exclude, *layers, *zone_edge, *zone_middle;
        double others, zone_switch, zone_early, zone_late;
    } aqn;
    struct {
        int type;                    /* enum kern_noise_type, as far as deadzone */
        double scale, rate;
        char *ops, *layers;
        int direction, dtype;        /* enum shared_direction; f32 | bf16 */
        bool rollout, logprob, update, eval;
    } ops;
    struct {
        int type;                    /* an order of its own: see shared_modules_keys */
        double scale;
        char *targets, *exclude, *layers;
        int at, dtype;               /* enum noise_point; f32 | bf16 */
        bool rollout, logprob, update, eval;
    } modules;
    struct { char *train, *test; int64_t prompt_max; } data;
    struct { int64_t n, new_max, top_k; double temperature, top_p; } sample;
};
/* The name that kern_open takes for a value of run.kernels, in buf. */
const char *shared_kernels(int choice, char *buf, size_t bytes);
extern const struct stage_key shared_run_keys[], shared_model_keys[], shared_quant_keys[],
    shared_lora_keys[], shared_aqn_keys[], shared_ops_keys[], shared_modules_keys[],
    shared_data_keys[], shared_sample_keys[], shared_graphs_keys[];
/* The tables of a stage that computes with the policy. */
#define SHARED_POLICY_KEYS                                                                         \
    shared_run_keys, shared_model_keys, shared_quant_keys, shared_lora_keys, shared_aqn_keys,      \
        shared_ops_keys, shared_modules_keys, shared_data_keys, shared_sample_keys

/* The shared settings in the file of a stage as a run folder keeps it (conf/rollout.conf); the
 * stage's own keys and ports are passed over. EXIT_ENV where there is none. */
int shared_load(struct shared *c, const char *path, struct err *e);
void shared_release(struct shared *c);
/* True for the steps (completed updates) that are scored: 0, every run.score_every, the last. */
bool shared_is_scored(const struct shared *c, int64_t step);
/* Adds {"path","role","bytes","sha256"|null,"lines","absent"} to array. get: what to run when the
 * file is absent. */
void shared_plan_file(json_t *files, const char *path, const char *role, const char *get);
#endif
