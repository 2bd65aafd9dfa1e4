/* noise_evidence.c - what was measured of a plan's noise: sums, the object for records, a verdict.
 *
 * Knows: how far a realised size may lie from the intended one. Does not know: who counted.
 * SPDX-License-Identifier: Apache-2.0 */
#include <math.h>
#include <stddef.h>

#include "lib/model/noise_ops.h"

static void tally_add(struct noise_tally *to, const struct noise_tally *t) {
    to->sites += t->sites;
    to->elements += t->elements;
    to->measured += t->measured;
    to->coarse += t->coarse;
    to->changed += t->changed;
    to->changed_bf16 += t->changed_bf16;
    to->r += t->r;
    to->r2 += t->r2;
}

void noise_evidence_add(struct noise_evidence *to, const struct noise_evidence *e) {
    for (int d = 0; d < NOISE_DIRECTION_COUNT; d++) {
        to->passes[d] += e->passes[d];
        for (int op = 0; op < NOISE_OP_COUNT; op++) tally_add(&to->op[op][d], &e->op[op][d]);
    }
    to->wanted += e->wanted;
    to->updates += e->updates;
    to->rows += e->rows;
    to->rows_squared += e->rows_squared;
    for (int m = 0; m < NOISE_MODULE_COUNT; m++) tally_add(&to->module[m], &e->module[m]);
    tally_add(&to->grad, &e->grad);
}

struct noise_evidence noise_evidence_since(const struct noise_evidence *e,
                                           const struct noise_evidence *before) {
    struct noise_evidence since = *e;
    const int64_t *was = (const int64_t *)before;
    int64_t *v = (int64_t *)&since;
    for (size_t i = 0; i < sizeof since / sizeof *v; i++) v[i] -= was[i];
    since.weights_draw = e->weights_draw;
    for (int m = 0; m < NOISE_MODULE_COUNT && e->weights_draw; m++) {
        const int64_t sites = since.module[m].sites;
        since.module[m] = e->module[m];
        since.module[m].sites = sites;
    }
    return since;
}

static double mean_of(int64_t sum, int64_t n) { return n ? (double)sum * 0x1p-20 / (double)n : 0; }

double noise_tally_mean(const struct noise_tally *t, double scale) {
    return scale * mean_of(t->r, t->measured);
}
double noise_tally_rms(const struct noise_tally *t, double scale) {
    return scale * sqrt(mean_of(t->r2, t->measured));
}

/* ---- what is looked at ---- */

/* One entry of the table phase x kind x name x direction. */
struct entry {
    char key[NOISE_KEY_MAX];
    enum noise_direction direction;
    const struct noise_text *text;
    const struct noise_bf16 *bf16;                   /* what bf16 makes of text's size */
    const struct noise_tally *tally;
    bool intended;
    int64_t passes, sites;                           /* made; expected */
    double repeat;                                   /* how often each draw was used, on average */
};
enum { ENTRIES_MAX = NOISE_OP_COUNT * NOISE_DIRECTION_COUNT + 1 + NOISE_MODULE_COUNT };

/* Final norm and head are met only by passes that wanted logits. */
static int64_t forward_sites(const struct noise_evidence *ev, int sites, int last) {
    return ev->passes[NOISE_FORWARD] * (sites - last) + ev->wanted * last;
}

static int entries_of(struct entry list[ENTRIES_MAX], const struct noise_plan *p,
                      enum noise_phase phase, const struct noise_evidence *ev) {
    const double repeat = ev->rows ? (double)ev->rows_squared / (double)ev->rows : 1;
    struct entry *x = list;
    for (int op = 0; op < NOISE_OP_COUNT; op++)
        for (int d = 0; d < NOISE_DIRECTION_COUNT; d++, x++) {
            const int last = p->op_whole && (op == NOISE_OP_NORM || op == NOISE_OP_HEAD);
            *x = (struct entry){ .direction = d, .text = &p->op_text, .bf16 = &p->op_bf16,
                                 .tally = &ev->op[op][d], .repeat = repeat };
            x->intended = noise_plan_op_on(p, op, d, phase);
            x->passes = ev->passes[d];
            x->sites = d == NOISE_FORWARD ? forward_sites(ev, p->op_sites[op][d], last)
                                          : ev->passes[d] * p->op_sites[op][d];
            noise_key(x->key, "op", noise_op_name[op], (enum noise_direction)d);
        }
    *x = (struct entry){ .direction = NOISE_BACKWARD, .text = &p->op_text, .bf16 = &p->op_bf16,
                         .tally = &ev->grad, .repeat = 1 };
    x->intended = noise_plan_op_on(p, NOISE_OP_MATMUL, NOISE_BACKWARD, phase);
    x->passes = ev->passes[NOISE_BACKWARD];
    x->sites = ev->updates;
    noise_key(x->key, "op", noise_site_about[NOISE_SITE_GRAD].name, NOISE_BACKWARD);
    x++;
    for (int m = 0; m < NOISE_MODULE_COUNT; m++, x++) {
        *x = (struct entry){ .text = &p->module_text, .bf16 = &p->module_bf16,
                             .tally = &ev->module[m],
                             .repeat = p->module_text.point == NOISE_POINT_WEIGHT ? 1 : repeat };
        x->intended = p->module_text.type && p->module_text.phase[phase] && p->module_sites[m];
        x->passes = ev->passes[NOISE_FORWARD];
        x->sites = forward_sites(ev, p->module_sites[m],
                                 noise_module_in_layer(m) ? 0 : p->module_sites[m]);
        noise_key(x->key, "module", noise_module_name[m], NOISE_FORWARD);
    }
    return (int)(x - list);
}

/* ---- the object ---- */

/* Counts travel as they are, so that sums of them stay exact: members in their order. */
static json_t *integers(const void *from, size_t bytes) {
    const int64_t *v = from;
    json_t *a = json_array();
    for (size_t i = 0; i < bytes / sizeof *v; i++) json_array_append_new(a, json_integer(v[i]));
    return a;
}
static bool integers_read(void *to, size_t bytes, const json_t *a) {
    int64_t *v = to;
    const size_t n = bytes / sizeof *v;
    bool whole = json_array_size(a) == n;
    for (size_t i = 0; whole && i < n; i++) {
        whole = json_is_integer(json_array_get(a, i));
        v[i] = json_integer_value(json_array_get(a, i));
    }
    return whole;
}
enum { PASSES_BYTES = offsetof(struct noise_evidence, weights_draw) };

static double share(int64_t part, int64_t n) { return n ? (double)part / (double)n : 0; }

/* Types that have no size to hold the realised one against: their r is relative to t. */
static bool no_size(const struct noise_text *t) {
    return t->type == KERN_NOISE_DEADZONE || t->type == KERN_NOISE_FP8;
}
static double unit_of(const struct noise_text *t) { return no_size(t) ? 1 : t->scale; }

static bool absolute(const struct noise_text *t) {
    return t->type == KERN_NOISE_ABSOLUTE_GAUSSIAN || t->type == KERN_NOISE_BIAS;
}
/* Of an absolute type: the share of elements at which the arithmetic may lose it. */
static double coarse_share(const struct noise_tally *t) { return share(t->coarse, t->measured); }

/* Whether bf16 may rightly make 0 of all of it: showing that is what the setting is for. */
static bool steps_leave_nothing(const struct entry *x) {
    return x->text->bf16 && !no_size(x->text) && (absolute(x->text) || x->bf16->r2_least <= 0);
}

static void add_warning(json_t *o, const struct entry *x) {
    const struct noise_tally *t = x->tally;
    char text[160];
    if (t->elements && !t->changed)
        snprintf(text, sizeof text, "%s here: not one element changed",
                 steps_leave_nothing(x) ? "bf16 arithmetic realises 0" : "realised 0");
    else if (absolute(x->text) && coarse_share(t) > .05)
        snprintf(text, sizeof text, "%s's steps are coarse for this size at %.0f %% of the "
                 "elements: what it realises there is not checked",
                 x->text->bf16 ? "bf16" : "f32", 100 * coarse_share(t));
    else return;
    json_object_set_new(o, "warning", json_string(text));
}

json_t *noise_evidence_json(const struct noise_plan *p, enum noise_phase phase,
                            const struct noise_evidence *ev) {
    struct entry list[ENTRIES_MAX];
    const int n = entries_of(list, p, phase, ev);
    json_t *all = json_object();
    for (int i = 0; i < n; i++) {
        const struct entry *x = &list[i];
        const struct noise_tally *t = x->tally;
        if (!x->intended) continue;
        json_t *o = json_object();
        if (noise_size_name(x->text))
            json_object_set_new(o, noise_size_name(x->text), json_real(noise_intended(x->text)));
        json_object_set_new(o, "realised", json_real(noise_tally_rms(t, unit_of(x->text))));
        json_object_set_new(o, "mean", json_real(noise_tally_mean(t, unit_of(x->text))));
        json_object_set_new(o, "sites", json_integer(t->sites));
        json_object_set_new(o, "elements", json_integer(t->elements));
        json_object_set_new(o, "changed", json_real(share(t->changed, t->elements)));
        json_object_set_new(o, "changed_bf16", json_real(share(t->changed_bf16, t->elements)));
        json_object_set_new(o, "sums", integers(t, sizeof *t));
        add_warning(o, x);
        json_object_set_new(all, x->key, o);
    }
    if (json_object_size(all)) json_object_set_new(all, "passes", integers(ev, PASSES_BYTES));
    return all;
}

int noise_evidence_read(struct noise_evidence *to, const struct noise_plan *p,
                        enum noise_phase phase, const json_t *o, struct err *e) {
    struct entry list[ENTRIES_MAX];
    *to = (struct noise_evidence){ 0 };
    const int n = entries_of(list, p, phase, to);
    bool any = false;
    for (int i = 0; i < n; i++) {
        const json_t *said = json_object_get(o, list[i].key);
        const char *size = noise_size_name(list[i].text);
        const double intended = noise_intended(list[i].text),
                     theirs = size ? json_number_value(json_object_get(said, size)) : intended;
        any |= list[i].intended;
        if (!list[i].intended && said)
            return err_set(e, "noise on %s was not intended while %s, its evidence has some",
                           list[i].key, noise_phase_name[phase]);
        if (!list[i].intended) continue;
        if (!integers_read((void *)(uintptr_t)list[i].tally, sizeof *list[i].tally,
                           json_object_get(said, "sums")))
            return err_set(e, "noise on %s was intended while %s, its evidence names no site",
                           list[i].key, noise_phase_name[phase]);
        if (fabs(theirs - intended) > 1e-7 * intended)
            return err_set(e, "noise on %s of size %.9g was intended while %s, its evidence is of "
                           "size %.9g", list[i].key, intended, noise_phase_name[phase], theirs);
    }
    if (any && !integers_read(to, PASSES_BYTES, json_object_get(o, "passes")))
        return err_set(e, "evidence of noise while %s does not say how many passes there were",
                       noise_phase_name[phase]);
    return 0;
}

/* ---- the verdict ---- */

/* Where the means of r^2 and r may lie: what is expected, 6 standard errors of independent draws,
 * `repeat` times as few as there are elements, a few times the largest draw over their number for
 * the tails of few, and what rounding may do. The floor is what f32 sums of long rows and the
 * draws' own f32 arithmetic leave. */
struct bounds { double r2_least, r2_most, r_most; };
static const double bounds_floor = 1e-5;

static double draw_variance(const struct noise_text *text, double share_hit) {
    switch (text->type) {
    case KERN_NOISE_RELATIVE_GAUSSIAN: return 2;
    case KERN_NOISE_RELATIVE_UNIFORM: return .8;
    case KERN_NOISE_SPARSE: return share_hit * (1 - share_hit);
    default: return 0;
    }
}

/* f32's step at t is up to `step` of the noise, the sum t + e is off by half of it. */
static struct bounds bounds_relative(const struct entry *x, double n, double hit) {
    const double step = 0x1p-23 / x->text->scale;
    double off = hit * (step * step / 4 + bounds_floor), r = hit * (step / 2 + bounds_floor);
    double variance = draw_variance(x->text, hit);
    r += 6 * sqrt((hit + off) / n) + 12 / n;
    variance += hit * step * step / 3;
    if (variance > 0) off += 6 * sqrt(variance / n) + 36 / n;
    return (struct bounds){ hit - off, hit + off, r };
}

/* Which mantissas the data had is not known: between the least and the most of noise_bf16.h. */
static struct bounds bounds_bf16(const struct entry *x, double n, double hit) {
    const struct noise_bf16 *m = x->bf16;
    const bool drawn = x->text->type != KERN_NOISE_SYSTEMATIC;
    const double square = m->size_most * m->size_most,
                 off = bounds_floor +
                       (drawn ? 6 * sqrt(hit * m->r4_most / n) + 3 * square / n : 0),
                 most = hit * m->r2_most + off;
    return (struct bounds){ hit * m->r2_least - off, most,
                            hit * m->r_most + 6 * sqrt(most / n) + 3 * m->size_most / n +
                                bounds_floor };
}

/* Near elements that are not coarse (kernels/noise.h) the steps are up to 1/8 of the noise and add
 * 1/12 of their square, or up to 2^-7 of a bias, which rounds the same way everywhere; bf16 rounds
 * the draw and its product too. A coarse element may lose all of the noise, or make up to 1.5 times
 * its square of it (4 times of a bias: half a step becomes a whole one). In f32 no more than half
 * of the size may be lost by all together: noise that is not there is none. */
static struct bounds bounds_absolute(const struct entry *x, double n) {
    const bool bias = x->text->type == KERN_NOISE_BIAS, bf16 = x->text->bf16;
    const double coarse = coarse_share(x->tally), wide = bf16 ? 0x1p-5 : bias ? 0x1p-6 : 0x1p-8,
                 chance = bias ? 0 : 6 * sqrt((2 + 8 * coarse) / n) + (36 + 108 * coarse) / n,
                 most = 1 + coarse * (bias ? 3 : .5) + wide + chance;
    return (struct bounds){ 1 - (bf16 ? coarse : fmin(coarse, .75)) - wide - chance, most,
                            coarse + (bf16 ? wide : bounds_floor) + 6 * sqrt(most / n) + 12 / n };
}

static struct bounds bounds_of(const struct entry *x) {
    const double n = (double)x->tally->measured / x->repeat,
                 hit = x->text->type == KERN_NOISE_SPARSE ? x->text->rate : 1;
    return absolute(x->text) ? bounds_absolute(x, n)
           : x->text->bf16   ? bounds_bf16(x, n, hit)
                             : bounds_relative(x, n, hit);
}

/* Their draws are fresh and as often positive as negative. */
static bool zero_mean(const struct noise_text *t) {
    return t->type != KERN_NOISE_SYSTEMATIC && t->type != KERN_NOISE_BIAS;
}

static int check_size(const struct entry *x, const char *phase, struct err *e) {
    const struct noise_tally *t = x->tally;
    const double scale = x->text->scale;
    if (!t->measured)
        return err_set(e, "noise %s in phase %s: none of %lld elements could be measured", x->key,
                       phase, (long long)t->elements);
    const struct bounds b = bounds_of(x);
    const double r2 = mean_of(t->r2, t->measured);
    if (r2 < b.r2_least || r2 > b.r2_most)
        return err_set(e, "noise %s in phase %s: intended %.9g, realised %.9g over %lld elements "
                       "(%.9g to %.9g would be chance and rounding)", x->key, phase,
                       noise_intended(x->text), noise_tally_rms(t, scale), (long long)t->measured,
                       scale * sqrt(fmax(0, b.r2_least)), scale * sqrt(b.r2_most));
    if (zero_mean(x->text) && fabs(mean_of(t->r, t->measured)) > b.r_most)
        return err_set(e, "noise %s in phase %s: its mean is %.9g over %lld elements, which "
                       "independent draws of size %.9g do not give (up to %.9g would be chance and "
                       "rounding); draws are shared", x->key, phase, noise_tally_mean(t, scale),
                       (long long)t->measured, noise_intended(x->text), scale * b.r_most);
    return 0;
}

/* What follows without a size. A dead zone makes 0 of what it changes, so r^2 is 1 there and 0
 * elsewhere: sums of whole numbers, equal to the last bit. E4M3 moves an element of its range by at
 * most 1/16 of it, and one outside by at most |t| or 2^-6. All outside move, and 15 of 16 inside
 * even where only bf16's mantissas occur; rounded evenly, r^2 is about 7e-4 on average. */
static int check_without_size(const struct entry *x, const char *phase, struct err *e) {
    const struct noise_tally *t = x->tally;
    const double range = (double)(t->measured - t->coarse), r2 = (double)t->r2 * 0x1p-20,
                 most = (range / 256 + (double)t->coarse) * (1 + bounds_floor),
                 moved = .75 * range + .9 * (double)t->coarse;
    enum { FEW = 200 };
    if (x->text->type == KERN_NOISE_DEADZONE && t->r2 != t->changed << 20)
        return err_set(e, "noise %s in phase %s: a dead zone makes 0 of each element that it "
                       "changes, but of %lld changed ones the squared relative changes add up to "
                       "%.9g", x->key, phase, (long long)t->changed, r2);
    if (x->text->type == KERN_NOISE_FP8 && r2 > most)
        return err_set(e, "noise %s in phase %s: realised %.9g over %lld elements, E4M3 gives at "
                       "most %.9g", x->key, phase, noise_tally_rms(t, 1), (long long)t->measured,
                       sqrt(most / (double)t->measured));
    if (x->text->type == KERN_NOISE_FP8 && range > FEW &&
        ((double)t->changed < moved || r2 < 7e-5 * range))
        return err_set(e, "noise %s in phase %s: realised %.9g, and %lld of %lld elements changed: "
                       "E4M3 changes at least %.0f, by %.9g", x->key, phase,
                       noise_tally_rms(t, 1), (long long)t->changed, (long long)t->measured, moved,
                       sqrt(7e-5 * range / (double)t->measured));
    return 0;
}

/* So few elements that a correct act may well have changed none of them: sparse noise hits them by
 * chance, a dead zone finds as few small ones as the data have, at least some part of scale. */
static bool too_few(const struct entry *x) {
    const double n = (double)x->tally->elements / x->repeat;
    return x->text->type == KERN_NOISE_SPARSE     ? n * x->text->rate < 36
           : x->text->type == KERN_NOISE_DEADZONE ? n * x->text->scale < 400
                                                  : false;
}

static int check_entry(const struct entry *x, const char *phase, struct err *e) {
    const struct noise_tally *t = x->tally;
    if (!x->intended && (t->sites || t->elements))
        return err_set(e, "noise %s in phase %s was not intended, but %lld sites were hit", x->key,
                       phase, (long long)t->sites);
    if (!x->intended) return 0;
    if (!t->sites || !t->elements)
        return err_set(e, "noise %s in phase %s was intended, but no site was visited in %lld "
                       "passes", x->key, phase, (long long)x->passes);
    if (t->sites != x->sites)
        return err_set(e, "noise %s in phase %s: %lld sites were visited in %lld passes, %lld were "
                       "expected", x->key, phase, (long long)t->sites, (long long)x->passes,
                       (long long)x->sites);
    if (too_few(x) && (!t->changed || x->text->type == KERN_NOISE_SPARSE)) return 0;
    if (!t->changed && (!x->text->bf16 || no_size(x->text)))
        return err_set(e, "noise %s of type %s and scale %.9g in phase %s: not one of %lld "
                       "elements changed", x->key, noise_type_name[x->text->type],
                       x->text->scale, phase, (long long)t->elements);
    return no_size(x->text) ? check_without_size(x, phase, e) : check_size(x, phase, e);
}

/* The entries of a kind as one: what each of them is too small for, all of them may show. */
static struct entry sum_of(const struct entry *list, int n, const struct noise_text *text,
                           struct noise_tally *sum) {
    struct entry x = { .text = text, .tally = sum, .repeat = 1 };
    for (int i = 0; i < n; i++) {
        if (!list[i].intended || list[i].text != text) continue;
        tally_add(sum, list[i].tally);
        x.intended = true;
        x.bf16 = list[i].bf16;
        x.repeat = fmax(x.repeat, list[i].repeat);
    }
    return x;
}

/* A score is a whole; what a step of training lacks, others may have. */
static int check_sum(const struct entry *x, enum noise_phase phase, struct err *e) {
    const struct noise_tally *t = x->tally;
    if (!x->intended || !t->elements || t->changed || steps_leave_nothing(x)) return 0;
    if (phase != NOISE_PHASE_EVAL && too_few(x)) return 0;
    return err_set(e, "noise of type %s and scale %.9g in phase %s was realised nowhere: not one "
                   "of %lld elements changed; give it more%s", noise_type_name[x->text->type],
                   x->text->scale, noise_phase_name[phase], (long long)t->elements,
                   phase == NOISE_PHASE_EVAL ? ", or score more questions" : "");
}

void noise_evidence_changed(int64_t changed[2], const struct noise_plan *p, enum noise_phase phase,
                            const struct noise_evidence *ev) {
    struct entry list[ENTRIES_MAX];
    const struct noise_text *const text[2] = { &p->op_text, &p->module_text };
    const int n = entries_of(list, p, phase, ev);
    for (int k = 0; k < 2; k++) {
        struct noise_tally sum = { 0 };
        const struct entry x = sum_of(list, n, text[k], &sum);
        changed[k] = sum.changed ? sum.changed
                     : !x.intended || !sum.elements || steps_leave_nothing(&x) ? 0 : -1;
    }
}

int noise_evidence_check(const struct noise_plan *p, enum noise_phase phase,
                         const struct noise_evidence *ev, struct err *e) {
    struct entry list[ENTRIES_MAX];
    const int n = entries_of(list, p, phase, ev);
    for (int i = 0; i < n; i++) {
        /* an update whose every loss was flat has no backward, and nothing there to hit */
        if (list[i].direction == NOISE_BACKWARD && !ev->passes[NOISE_BACKWARD] &&
            ev->passes[NOISE_FORWARD] && !list[i].tally->sites && !list[i].tally->elements)
            continue;
        if (check_entry(&list[i], noise_phase_name[phase], e) < 0) return -1;
    }
    const struct noise_text *const text[] = { &p->op_text, &p->module_text };
    for (size_t k = 0; k < COUNT_OF(text); k++) {
        struct noise_tally sum = { 0 };
        const struct entry x = sum_of(list, n, text[k], &sum);
        if (check_sum(&x, phase, e) < 0) return -1;
    }
    return 0;
}
