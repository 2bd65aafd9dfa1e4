/* ckpt.h - what the learner keeps on disk: checkpoints, published adapters, the fence.
 *
 * A checkpoint is a folder ckpt/step-NNNNNN with state.bin (f32: adapter, m, v), and manifest.json
 * written last (counters, names, sizes, sha256, what the run was made of). It is written as .tmp,
 * synced, renamed. Loading takes the newest whose manifest verifies, older ones loudly. "How far we
 * are" and the weights are thereby one commit.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_CKPT_H
#define QERL_CKPT_H
#include "lib/base/fs.h"
#include "lib/base/hash.h"
#include "stages/learner/update.h"

/* The first wave of a step and the policy that samples all of the step's groups. */
struct lease {
    int64_t first, version;          /* group id; published adapter */
    char sha256[SHA256_HEX];         /* of that adapter */
};
struct progress {                    /* committed counters */
    int64_t step;                    /* completed steps, skipped ones included */
    int64_t version;                 /* published adapters - 1; version 0 is the fresh adapter */
    int64_t cursor;                  /* next group id */
    int64_t groups_seen, groups_kept, groups_all_right, groups_all_wrong, groups_surplus;
    int64_t skipped_starved, skipped_nonfinite, nonfinite_in_a_row, updates_changed;
    /* by phase, elements that noise on operations and on modules changed so far; -1: none, though
     * it was tried */
    int64_t noise_changed[NOISE_PHASE_EVAL][2];
    struct lease lease[LAG_MAX + 1]; /* of the steps after `step`, as far as they are asked for */
    int leases;
};
struct ckpt_identity {
    const char *model_sha256, *tokenizer_sha256, *data_sha256, *treatment, *bits;
    const char *settings;            /* "key = value" lines of all that shapes the training */
};

int ckpt_save(const char *dir, const struct progress *p, const struct update_state *s,
              const struct ckpt_identity *id, struct err *e);
/* 1 loaded, 0 there is none, -1 refused: made with another model, data, treatment or kernels of
 * other bits (named). s->lora, m and v exist with their sizes. */
int ckpt_load(const char *dir, struct progress *p, struct update_state *s,
              const struct ckpt_identity *id, struct err *e);

void ckpt_adapter_path(char out[FS_PATH_MAX], const char *dir, int64_t version);
/* adapters/vNNNNNN (PEFT layout); idempotent. path receives it. */
int ckpt_publish(const char *dir, const struct lora *l, int64_t version, const char *model_path,
                 char path[FS_PATH_MAX], struct err *e);
/* adapters/at-NNNNNN.json: the adapter record of a scored step; the evaluator's truth. */
int ckpt_mark_scored(const char *dir, const struct rec *adapter, struct err *e);
/* Keeps the last two checkpoints, and of the adapters the last two, the scored, the checkpointed
 * and those that steps to come are sampled with. */
int ckpt_prune(const char *dir, const struct progress *p, struct err *e);
/* Number of this start of the learner, from 1; made durable before it returns. */
int ckpt_next_fence(const char *dir, int64_t *fence, struct err *e);
#endif
