/* noise.h - qerl-model noise: what is asked for, and the two kinds of answer.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_MODEL_NOISE_H
#define QERL_MODEL_NOISE_H
#include "lib/stage/treatment.h"
#include "lib/wire/rec.h"

/* The command line, parsed; -1 where a number was not given. */
struct ask {
    const char *path;                        /* run folder or model */
    const char *model, *targets, *tensor, *write, *site, *type;
    int64_t step, version, element, count, prompt, sample, position, layer, head, update;
    bool score;                              /* --of score */
    uint64_t seed;
    bool seeded;
    double sigma, scale, rate;
};
enum { ASK_SAMPLE_PROMPT = -2 };             /* --sample prompt: tokens that all samples share */

/* Where the answer comes from: a run at a step, or the command line alone. */
struct origin {
    bool run;
    struct shared shared;                    /* of the run; else only what the command line says */
    struct rec group;                        /* of a step, not of a score: one made in it */
    int groups;                              /* made in that step */
    bool same;                               /* all of them realised the same */
    double sigma;
    uint64_t noise_seed, seed;               /* of the step; of the run (systematic) */
    int64_t version;
};
/* Reads conf/rollout.conf and the journal, for a score scores.jsonl. EXIT_ENV where they are
 * absent, EXIT_USAGE for a step that the run has not. */
int origin_open(struct origin *s, const struct ask *a, struct err *e);
void origin_close(struct origin *s);

/* The noise on one token of one result of an operation, on a row of a module's weights, on the
 * gradient of a layer's adapter: prints z and e / |t| of its elements. */
int noise_of_token(const struct origin *s, const struct ask *a, struct err *e);
/* Row --position of a module's weights and the noise on it, of a type that draws nothing. */
int noise_of_row(const struct kern_noise *n, const struct origin *s, const struct ask *a,
                 enum noise_module module, struct err *e);
#endif
