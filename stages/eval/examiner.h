/* examiner.h - asks a policy the test questions: one adapter and one treatment in, one answer
 * record per question and sample out, with what was measured of the treatment.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_EXAMINER_H
#define QERL_EXAMINER_H
#include "lib/wire/rec.h"
#include "stages/eval/conf.h"

struct examiner;
struct gen_opts examiner_gen_opts(const struct eval_conf *c, const struct lora_shape *shape);
/* Model, questions, and in rank 0 the other ranks, each with its own; NULL with s->err. */
struct examiner *examiner_create(struct stage *s);
void examiner_destroy(struct examiner **x);
/* In another rank: its share of each exam that rank 0 asks for, until that leaves. 0 or -1. */
int examiner_serve(struct examiner *x);

struct exam {
    const char *dir, *sha256;        /* adapter's folder, "" = base; its hash, "" = any */
    int64_t version, step;
    const struct noise_plan *plan;   /* as it acts in phase eval */
    double sigma;                    /* AQN; 0 = none */
    uint64_t noise_seed;
};
/* The exam of an adapter: as the settings say (noisy only where noise.ops.eval or
 * noise.modules.eval are yes), or under all noise that it trains under at this step. Lends a's
 * texts. */
struct exam examiner_exam(const struct examiner *x, const struct rec_adapter *a, bool noisy);
/* The settings' noise on operations and modules, as records name it; the hash over all of them. */
const char *examiner_ops(const struct examiner *x);
const char *examiner_treatment(const struct examiner *x);
/* Says aloud, in capitals, that an adapter was trained under another treatment than ours. */
void examiner_warn(const struct examiner *x, const struct rec_adapter *a);
/* How its score is labelled: treatment_text. Appends. */
void exam_noise(struct str *out, const struct examiner *x, const struct exam *m);

struct answers {
    struct rec *v;                   /* ordered by question and sample */
    int64_t n;
    char *evidence;                  /* for the score; "" = no noise was intended */
};
void answers_release(struct answers *a);
/* 0, 1 asked to stop, -1: also where the noise in force was not what the exam says. */
int examiner_ask(struct examiner *x, const struct exam *m, struct answers *out);
int64_t examiner_answers(const struct examiner *x);      /* per scored step */
/* What a score says besides its numbers: hashes, sampling. Lends. */
void examiner_label(const struct examiner *x, struct rec_score *s);
#endif
