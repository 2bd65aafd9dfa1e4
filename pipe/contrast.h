/* contrast.h - runs set beside a baseline: what differs in what they were told, whether they may be
 * compared, and what their scores say.
 *
 * An arm is the runs of one configuration under several seeds. One run per arm compares two
 * adapters, question by question; ARM_SEEDS_MIN seeds per arm compare the treatments, seed by seed.
 * Differences are shares (0.01 is a point), other minus baseline.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_CONTRAST_H
#define QERL_CONTRAST_H
#include "pipe/result.h"

enum { ARMS_MAX = 16, ARM_RUNS_MAX = 64, LOOKS_MAX = 4096, ARM_SEEDS_MIN = 3 };
#define CONTRAST_ALPHA 0.05
#define CONTRAST_POWER 0.8

enum align { ALIGN_AUTO, ALIGN_STEP, ALIGN_PROMPTS, ALIGN_TOKENS };
extern const char *const align_name[];

struct arm {
    struct result *run[ARM_RUNS_MAX]; int n; /* lent */
    char label[200];
};
struct look {                                /* a scored step of each that belong together */
    int64_t base_step, step;
    double base_at, at;                      /* on the axis of the alignment */
};
enum basis {
    BASIS_NONE,                              /* nothing to test: no n, no scores */
    BASIS_UNPAIRED,                          /* two shares of other questions (a reference) */
    BASIS_QUESTIONS,                         /* two adapters on the same questions */
    BASIS_SEEDS_PAIRED,                      /* treatments: differences by seed */
    BASIS_SEEDS,                             /* treatments: other seeds, permutation */
};
enum verdict { VERDICT_NONE, VERDICT_BETTER, VERDICT_WORSE };
extern const char *const verdict_name[];     /* "not distinguishable", "better", "worse" */
struct effect {
    enum basis basis;
    double base, other, difference, low, high;       /* shares; the interval's level is asked for */
    double p;                                        /* NAN where only the interval decides */
    double alpha;
    int64_t questions, only_base, only_other;        /* BASIS_QUESTIONS */
    bool several;                                    /* more than one answer a question */
    double sd;                                       /* of differences by seed; unpaired: both */
    int seeds_base, seeds_other;
    enum verdict verdict;
};
/* The verdict as a cell of a table; where the test alone withholds it, with its p. */
void effect_reading(char out[80], const struct effect *e);
/* Two runs at their steps; two arms. An effect is called one only where both the exact test and the
 * interval say so. */
struct effect effect_of_runs(const struct result *base, int64_t base_step,
                             const struct result *other, int64_t step, double alpha);
struct effect effect_of_arms(const struct arm *base, int64_t base_step, const struct arm *other,
                             int64_t step, double alpha);
/* What noise in scoring does to one adapter: the last score of a run that uses its noisy ones, and
 * the clean one of that step, which *clean gets. False: there is none. */
bool effect_of_noise(struct effect *out, struct score *clean, const struct result *noisy,
                     double alpha, struct err *e);
/* From marks alone (of one step each, sorted). */
struct effect effect_of_marks(const struct mark *base, int base_n, const struct mark *other,
                              int other_n, double alpha);
/* "what would show 1, 2, 5 points": questions or seeds for each of the three, -1 = cannot say. */
void effect_needs(const struct effect *e, double needs[3]);
extern const double effect_points[3];                /* .01, .02, .05 */

/* The run of each arm that stands for it where seeds do not: the first seed both have. */
void arms_pick(const struct arm *base, const struct arm *other, const struct result **a,
               const struct result **b);
bool arms_same_seeds(const struct arm *a, const struct arm *b);
double result_accuracy(const struct result *r, int64_t step);     /* NAN = not scored */
double arm_accuracy(const struct arm *a, int64_t step);      /* mean over runs; NAN = not scored */
double arm_reward(const struct arm *a, int64_t step);        /* likewise */
/* Scored steps of both that belong together; *ends: they end at the same place. */
int looks_find(struct look *v, const struct arm *base, const struct arm *other, enum align align,
               bool *ends);

/* ---- likeness.c ---- */
struct difference {
    const char *key, *factor;                /* factor: section or key; "" = of the measurement */
    const char *value[ARMS_MAX];             /* NULL = an older program had no such key */
};
/* Keys whose values differ between arms (names, places and seeds aside); the caller frees *out. */
int differences_find(struct difference **out, const struct arm *arm, int arms);
/* Distinct factors: how many, and their names in *names. */
int differences_factors(const struct difference *d, int n, struct str *names);
bool result_same_settings(const struct result *a, const struct result *b);   /* seeds aside */
bool formats_differ(const struct result *a, const struct result *b);         /* by settings */
/* A line for each reason why the two must not be compared. */
void result_reasons(const struct result *a, const struct result *b, struct str *out);
#endif
