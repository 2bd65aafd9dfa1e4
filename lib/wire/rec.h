/* rec.h - THE WAIST between processes: what one stage tells another, as C structs.
 *
 * A record travels as one MessagePack map by socket, as a frame of a tape (tape.h), or as one line
 * of JSON; the same table of fields (rec.c) drives all three, so the forms cannot drift. Arrays of
 * ids and log-probs are `bin` in MessagePack (little endian) and number arrays in JSON (float32
 * with %.9g: exact both ways). Unknown and duplicate fields, wrong types, non-finite numbers,
 * missing required fields and arrays that do not fit the bytes present are refused, naming record
 * and field. Every record map starts with "rec" (its name) and "v" (REC_VERSION; version 1, without
 * evidence, is read and never written). Ownership: decode allocates what a record points to
 * (strings, arrays, samples); rec_release frees it. Encoding lends.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_REC_H
#define QERL_REC_H
#include "lib/base/err.h"
#include "lib/base/str.h"

enum { REC_VERSION = 2, REC_BYTES_MAX = 64 << 20, REC_SAMPLES_MAX = 256, REC_TOKENS_MAX = 1 << 20 };
enum rec_type {
    REC_NONE,
    REC_TICKET,
    REC_TRAJ,
    REC_GROUP,
    REC_ACK,
    REC_NACK,
    REC_END,
    REC_WANT,
    REC_ADAPTER,
    REC_SCORE,
    REC_ANSWER,
    REC_BEAT,
    REC_TYPE_COUNT
};
extern const char *const rec_name[REC_TYPE_COUNT];     /* "ticket", "traj", ... */

struct rec_i32 { int32_t *v; int n; };
struct rec_f32 { float *v; int n; };

/* What was done to the arithmetic; a record whose hash is not the reader's own is refused by
 * rollout and learner. */
struct rec_treatment {
    char *hash;              /* 16 hex digits over model, quant, LoRA shape, noise configuration */
    double sigma;            /* AQN: intended */
    uint64_t noise_seed;     /* its key */
    char *ops;               /* operator and module noise: noise_plan_text; "none" */
};

struct rec_ticket {          /* learner -> rollout: make this group */
    /* run id; learner start number; completed steps; group id */
    char *run; int64_t fence, step, group;
    char *question_id;       /* "train:17" */
    char *prompt;
    /* ids of the rendered text; may be empty in hand-written tickets: then `question` is rendered
     * and encoded by the rollout */
    struct rec_i32 prompt_ids;
    char *question;
    char *answer; /* question as in the data; the right answer's text after "#### " */
    int64_t samples, new_max;                          /* 0 (absent in JSON): the rollout's own */
    /* temperature -1 (absent in JSON): all three are the rollout's own */
    double temperature, top_p; int64_t top_k;
    uint64_t seed;                                     /* sampling seed of the run */
    int64_t version;
    char *adapter;
    char *adapter_sha256; /* policy needed: version, folder ("" = base model), hash */
    struct rec_treatment treatment;
};

struct rec_sample {
    int64_t k, attempt;
    struct rec_i32 ids;                                /* response tokens, EOS included */
    /* under what was sampled from; lp_raw empty where it is the same */
    struct rec_f32 lp, lp_raw;
    char *stop;                                        /* "eos" | "stop_string" | "length" */
    char *text;
    /* filled in by the reward stage (absent in a traj) */
    /* score = what training uses; the parts it is made of */
    double score, acc, strict, flexible, format, overlong;
    char *extracted; /* answer read from the text by the rule in force; "" = none found */
};

/* REC_TRAJ rollout -> reward, REC_GROUP reward -> learner: all samples of one prompt */
struct rec_group {
    char *run; int64_t fence, step, group; char *question_id;
    char *question, *prompt, *answer; struct rec_i32 prompt_ids;
    double temperature, top_p; int64_t top_k, new_max; uint64_t seed;
    int64_t version; char *adapter_sha256;
    /* as applied: sigma and seed in force when the tokens were drawn */
    struct rec_treatment treatment;
    /* measured on what the forward pass read */
    double sigma_realised; int64_t noise_elements, noise_changed;
    /* what was measured of the treatment since the group that this rollout finished before, as
     * compact JSON: see treatment_evidence; "" = no noise */
    char *evidence;
    char *rollout;                                     /* who made it, "rollout-0" */
    char *rule;                                        /* reward rule; "" in a traj */
    struct rec_sample *sample; int samples;
};

/* also nack (why says the reason) */
struct rec_ack { char *run; int64_t fence; int64_t *group; int groups; char *why; };
struct rec_end { char *run; int64_t fence, step; };
/* rollout -> learner: I am here, I hold these, I can take `credit` more */
struct rec_want {
    char *rollout, *incarnation; int64_t credit; int64_t *group; int groups;
};
struct rec_adapter {
    char *run;
    int64_t version, step;
    char *path, *sha256;
    bool final;
    struct rec_treatment treatment;
};
struct rec_score {           /* never a bare number */
    char *run; int64_t version, step; char *split; int64_t n, right; char *rule;
    /* answers from which the rule read a number; by both rules */
    int64_t parsed; int64_t right_strict, right_flexible;
    /* how the weights were stored; what was applied in this score: see treatment_text; measured,
     * as in a group */
    char *quant, *noise, *evidence;
    int64_t samples_per_question;
    double temperature;
    double length_mean;
    double truncated;
    double low, high;                                  /* 95 % Wilson interval of right/n */
    char *adapter_sha256; char *model_sha256; char *data_sha256; char *treatment_trained;
};
struct rec_answer {          /* one generation of one scored question */
    char *run; int64_t version, step; char *split; char *question_id, *question, *answer; int64_t k;
    char *text, *stop; int64_t tokens; double strict, flexible; char *quant, *noise;
};
struct rec_beat {            /* every stage -> launcher */
    char *stage;
    int64_t pid;
    char *state;     /* "start" | "ready" | "work" | "wait" | "done" */
    char *waits_for; /* port or file it waits on; "" when working */
    /* from the work loop; a stage that is stuck stops counting */
    int64_t progress;
    int64_t step; char *metrics;                       /* JSON object text, or "" */
};

struct rec {                                           /* one record of any type */
    enum rec_type type;
    union {
        struct rec_ticket ticket;
        struct rec_group group;
        struct rec_ack ack;
        struct rec_end end;
        struct rec_want want;
        struct rec_adapter adapter;
        struct rec_score score;
        struct rec_answer answer;
        struct rec_beat beat;
    };
};
void rec_init(struct rec *r, enum rec_type type);      /* all zero; NULL strings encode as "" */
/* frees what decode (or the setters of the caller, via mem_dup) gave */
void rec_release(struct rec *r);

/* What a reader would refuse (non-finite numbers, too many samples, a stop reason that does not
 * exist), found before it is sent. link_send and tape_append call it; text that is not UTF-8 is no
 * error: encoding replaces bad bytes by U+FFFD. */
int rec_check(const struct rec *r, struct err *e);
/* appends MessagePack bytes */
void rec_pack(struct str *out, const struct rec *r);
/* whole buffer, one record */
int rec_unpack(struct rec *r, const void *data, size_t bytes, struct err *e);
/* appends one line, '\n' included */
void rec_to_json(struct str *out, const struct rec *r);
/* One line. `where` ("file:line") begins every message. expected REC_NONE = any. Fields with a
 * default may be absent in JSON (hand-written tickets need only question or prompt); a "rec" field
 * may be absent when expected is given. */
int rec_from_json(struct rec *r, const char *line, size_t bytes, enum rec_type expected,
                  const char *where, struct err *e);
/* Bounded validator, run by rec_unpack before any allocation: depth <= 8, every count fits the
 * bytes left, strings are UTF-8, nothing trails. */
int rec_validate(const void *data, size_t bytes, struct err *e);
#endif
