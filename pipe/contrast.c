/* contrast.c - see contrast.h.
 *
 * Order: two adapters, two arms, what would be needed, looks.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/contrast.h"

#include <math.h>

#include "lib/base/stat.h"

const char *const align_name[] = { "auto", "step", "prompts", "tokens" };
const char *const verdict_name[] = { "not distinguishable", "better", "worse" };
const double effect_points[3] = { .01, .02, .05 };

static double accuracy(const struct score *s) {
    return s->n ? (double)s->right / (double)s->n : s->low;
}

static void judge(struct effect *e) {
    const bool test = isnan(e->p) || e->p < e->alpha;
    e->verdict = test && e->low > 0    ? VERDICT_BETTER
                 : test && e->high < 0 ? VERDICT_WORSE
                                       : VERDICT_NONE;
}

void effect_reading(char out[80], const struct effect *e) {
    const bool withheld = e->verdict == VERDICT_NONE && (e->low > 0 || e->high < 0);
    const int n = snprintf(out, 80, "%s", verdict_name[e->verdict]);
    if (withheld) snprintf(out + n, (size_t)(80 - n), " (p = %.3g, not < %.3g)", e->p, e->alpha);
}

/* ---- two adapters ---- */

/* Right answers of one question from *i on, k by k where both have them; moves both on. */
static int question_difference(const struct mark *a, int na, int *i, const struct mark *b, int nb,
                               int *j, int *common, int *right_a, int *right_b) {
    const char *question = a[*i].question;
    int d = 0;
    *common = 0;
    while (*i < na && *j < nb && !strcmp(a[*i].question, question) &&
           !strcmp(b[*j].question, question)) {
        if (a[*i].k != b[*j].k) {
            if (a[*i].k < b[*j].k) ++*i;
            else ++*j;
            continue;
        }
        *right_a += a[*i].right;
        *right_b += b[*j].right;
        d += b[(*j)++].right - a[(*i)++].right;
        ++*common;
    }
    while (*i < na && !strcmp(a[*i].question, question)) ++*i;
    while (*j < nb && !strcmp(b[*j].question, question)) ++*j;
    return d;
}

struct effect effect_of_marks(const struct mark *a, int na, const struct mark *b, int nb,
                              double alpha) {
    struct effect e = { .alpha = alpha, .p = NAN, .basis = BASIS_NONE, .low = -1, .high = 1 };
    const size_t most = (size_t)(na < nb ? na : nb);
    int *d = mem_alloc((most + 1) * sizeof *d), questions = 0, answers = 0, right_a = 0,
        right_b = 0;
    double *mean = mem_alloc((most + 1) * sizeof *mean);
    for (int i = 0, j = 0; i < na && j < nb;) {
        const int c = strcmp(a[i].question, b[j].question);
        int common;
        if (c) {
            if (c < 0) i++;
            else j++;
            continue;
        }
        const int by = question_difference(a, na, &i, b, nb, &j, &common, &right_a, &right_b);
        if (!common) continue;
        d[questions] = by;
        mean[questions++] = (double)by / common;
        answers += common;
        e.several = e.several || common > 1;
        e.only_other += by > 0;
        e.only_base += by < 0;
    }
    e.questions = questions;
    if (questions) {
        /* answers that are all alike have no spread, however many a question has */
        e.basis = BASIS_QUESTIONS;
        e.base = (double)right_a / answers;
        e.other = (double)right_b / answers;
        e.difference = e.other - e.base;
        e.p = stat_sign_flip(d, questions);
        const struct stat_span s =
            e.several && e.only_base + e.only_other
                ? stat_paired_mean(mean, questions, 0, alpha, &e.sd)
                : stat_paired_shares(e.only_base, e.only_other, questions, alpha);
        e.low = fmax(-1, s.low);
        e.high = fmin(1, s.high);
        judge(&e);
    }
    free(d);
    free(mean);
    return e;
}

struct effect effect_of_runs(const struct result *base, int64_t base_step,
                             const struct result *other, int64_t step, double alpha) {
    int na, nb;
    const struct mark *a = result_marks(base, base_step, &na), *b = result_marks(other, step, &nb);
    const struct score *x = result_score(base, base_step), *y = result_score(other, step);
    /* question 7 of another file is another question */
    if (x && y && *x->data_sha256 && *y->data_sha256 && strcmp(x->data_sha256, y->data_sha256))
        na = nb = 0;
    struct effect e = effect_of_marks(a, na, b, nb, alpha);
    if (e.basis != BASIS_NONE || !x || !y) return e;
    e.base = accuracy(x);
    e.other = accuracy(y);
    e.difference = e.other - e.base;
    if (!x->n || !y->n) return e;
    const struct stat_span s = stat_two_shares(x->right, x->n, y->right, y->n, alpha);
    e.basis = BASIS_UNPAIRED;
    e.low = s.low;
    e.high = s.high;
    judge(&e);
    return e;
}

bool effect_of_noise(struct effect *out, struct score *clean, const struct result *noisy,
                     double alpha, struct err *e) {
    struct result r;
    const int64_t step = noisy->score[noisy->score_n - 1].step;
    bool there = result_read(&r, "", noisy->f.dir, e) == 0;
    const struct score *s = there ? result_score(&r, step) : NULL;
    there = s && score_is_clean(s);
    if (there) {
        *clean = *s;
        *out = effect_of_runs(&r, step, noisy, step, alpha);
    }
    result_release(&r);
    return there;
}

/* ---- two arms ---- */

static const struct result *with_seed(const struct arm *a, int64_t seed) {
    for (int i = 0; i < a->n; i++)
        if (a->run[i]->seed == seed) return a->run[i];
    return NULL;
}

bool arms_same_seeds(const struct arm *a, const struct arm *b) {
    if (a->n != b->n) return false;
    for (int i = 0; i < a->n; i++)
        if (!with_seed(b, a->run[i]->seed)) return false;
    return true;
}

void arms_pick(const struct arm *base, const struct arm *other, const struct result **a,
               const struct result **b) {
    for (int i = 0; i < base->n; i++)
        if ((*b = with_seed(other, base->run[i]->seed))) {
            *a = base->run[i];
            return;
        }
    *a = base->run[0];
    *b = other->run[0];
}

double result_accuracy(const struct result *r, int64_t step) {
    const struct score *s = result_score(r, step);
    return s ? accuracy(s) : NAN;
}

double arm_accuracy(const struct arm *a, int64_t step) {
    double sum = 0;
    for (int i = 0; i < a->n; i++) sum += result_accuracy(a->run[i], step);
    return sum / a->n;
}

double arm_reward(const struct arm *a, int64_t step) {
    double sum = 0;
    for (int i = 0; i < a->n; i++) {
        const struct point *p = result_point(a->run[i], step);
        sum += p ? p->reward : NAN;
    }
    return sum / a->n;
}

/* What the number of questions alone leaves open in a difference of two runs, as a standard error;
 * 0 where nothing is known of it. The spread between seeds counts as no less. */
static double questions_error(const struct effect *e) {
    if (e->basis == BASIS_NONE) return 0;
    return (e->high - e->low) / (2 * stat_normal_quantile(1 - e->alpha / 2));
}

static double question_error_of_pairs(const struct arm *base, int64_t base_step,
                                      const struct arm *other, int64_t step) {
    double sum = 0;
    for (int i = 0; i < base->n; i++) {
        const struct effect e =
            effect_of_runs(base->run[i], base_step, with_seed(other, base->run[i]->seed), step,
                           CONTRAST_ALPHA);
        sum += questions_error(&e);
    }
    return sum / base->n;
}

static double question_error_of_arm(const struct arm *a, int64_t step) {
    const int64_t n = result_score(a->run[0], step)->n;
    const struct stat_span s = stat_wilson(llround(arm_accuracy(a, step) * (double)n), n,
                                           CONTRAST_ALPHA);
    return n ? (s.high - s.low) / (2 * stat_normal_quantile(1 - CONTRAST_ALPHA / 2)) : 0;
}

struct effect effect_of_arms(const struct arm *base, int64_t base_step, const struct arm *other,
                             int64_t step, double alpha) {
    if (base->n < ARM_SEEDS_MIN || other->n < ARM_SEEDS_MIN) {
        const struct result *a, *b;
        arms_pick(base, other, &a, &b);
        return effect_of_runs(a, base_step, b, step, alpha);
    }
    double x[ARM_RUNS_MAX], y[ARM_RUNS_MAX], d[ARM_RUNS_MAX];
    const bool paired = arms_same_seeds(base, other);
    struct effect e = { .alpha = alpha, .seeds_base = base->n, .seeds_other = other->n,
                        .base = arm_accuracy(base, base_step),
                        .other = arm_accuracy(other, step) };
    e.difference = e.other - e.base;
    if (isnan(e.difference)) return e;
    for (int i = 0; i < base->n; i++) {
        x[i] = result_accuracy(base->run[i], base_step);
        if (paired) d[i] = result_accuracy(with_seed(other, base->run[i]->seed), step) - x[i];
    }
    for (int i = 0; i < other->n; i++) y[i] = result_accuracy(other->run[i], step);
    struct stat_span s;
    if (paired) {
        const double least = question_error_of_pairs(base, base_step, other, step);
        s = stat_paired_mean(d, base->n, least, alpha, &e.sd);
        e.p = stat_paired_t(d, base->n, least);
    } else {
        double sx, sy;
        const double least_x = question_error_of_arm(base, base_step),
                     least_y = question_error_of_arm(other, step);
        stat_paired_mean(x, base->n, least_x, alpha, &sx);
        stat_paired_mean(y, other->n, least_y, alpha, &sy);
        s = stat_two_means(x, base->n, least_x, y, other->n, least_y, alpha);
        e.sd = hypot(sx, sy);
        e.p = stat_permutation(x, base->n, y, other->n);
    }
    e.basis = paired ? BASIS_SEEDS_PAIRED : BASIS_SEEDS;
    e.low = s.low;
    e.high = s.high;
    judge(&e);
    return e;
}

/* By the power of the paired t test; other seeds are tested by permutation, which has a least p. */
static int seeds_needed(const struct effect *e, double delta) {
    const int n = stat_seeds_needed(e->sd, delta, e->alpha, CONTRAST_POWER);
    int least = ARM_SEEDS_MIN;
    while (e->basis == BASIS_SEEDS && stat_permutation_least(least, least) >= e->alpha) least++;
    return n > 0 && n < least ? least : n;
}

void effect_needs(const struct effect *e, double needs[3]) {
    for (int i = 0; i < 3; i++) {
        needs[i] = -1;
        if (e->basis == BASIS_QUESTIONS && !e->several)
            needs[i] = stat_questions_needed((double)(e->only_base + e->only_other) /
                                                 (double)e->questions,
                                             effect_points[i], e->alpha, CONTRAST_POWER);
        else if (e->basis == BASIS_QUESTIONS && e->sd > 0)
            needs[i] = stat_seeds_needed(e->sd, effect_points[i], e->alpha, CONTRAST_POWER);
        else if (e->basis == BASIS_UNPAIRED)         /* pairs of strangers, so to speak */
            needs[i] = stat_questions_needed(e->base * (1 - e->other) + e->other * (1 - e->base),
                                             effect_points[i], e->alpha, CONTRAST_POWER);
        else if (e->basis == BASIS_SEEDS_PAIRED || e->basis == BASIS_SEEDS)
            needs[i] = seeds_needed(e, effect_points[i]);
    }
}

/* ---- looks ---- */

static double place_of(const struct arm *a, int64_t step, enum align align) {
    double sum = 0;
    if (align == ALIGN_STEP) return (double)step;
    for (int i = 0; i < a->n; i++) {
        const struct point *p = result_point(a->run[i], step);
        sum += !p ? NAN : align == ALIGN_PROMPTS ? p->prompts : p->tokens;
    }
    return sum / a->n;
}

/* Scored steps that every run of the arm has. */
static int scored_steps(struct look *v, const struct arm *a, enum align align) {
    int n = 0;
    for (int i = 0; i < a->run[0]->score_n && n < LOOKS_MAX; i++) {
        const int64_t step = a->run[0]->score[i].step;
        if (isnan(arm_accuracy(a, step))) continue;
        v[n++] = (struct look){ .step = step, .at = place_of(a, step, align) };
    }
    return n;
}

static int nearest(const struct look *v, int n, double at) {
    int best = -1;
    for (int i = 0; i < n; i++)
        if (!isnan(v[i].at) && (best < 0 || fabs(v[i].at - at) < fabs(v[best].at - at))) best = i;
    return best;
}

static double gap(const struct look *v, int n) {
    return n > 1 ? (v[n - 1].at - v[0].at) / (n - 1) : INFINITY;
}

/* Steps must be equal; prompts and tokens, which depend on what was filtered, within half a gap
 * between scores, and each the other's nearest. */
int looks_find(struct look *v, const struct arm *base, const struct arm *other, enum align align,
               bool *ends) {
    struct look *a = mem_alloc(LOOKS_MAX * sizeof *a), *b = mem_alloc(LOOKS_MAX * sizeof *b);
    const int na = scored_steps(a, base, align), nb = scored_steps(b, other, align);
    const double reach = align == ALIGN_STEP ? 0 : .5 * fmin(gap(a, na), gap(b, nb));
    int n = 0, last_a = -1, last_b = -1;
    for (int i = 0; i < na; i++) {
        const int j = isnan(a[i].at) ? -1 : nearest(b, nb, a[i].at);
        if (j < 0 || fabs(b[j].at - a[i].at) > reach || nearest(a, na, b[j].at) != i) continue;
        v[n++] = (struct look){ a[i].step, b[j].step, a[i].at, b[j].at };
        last_a = i;
        last_b = j;
    }
    *ends = n && last_a == na - 1 && last_b == nb - 1;
    free(a);
    free(b);
    return n;
}
