/* net_step.c - decode steps that a table keeps and runs again: the same bits and the same counts as steps that are called
 * anew, whatever changes between them; and that a kept step which lost its noise, or froze it, is found.
 *
 * The table is a CPU's whose slots note their arguments while it records: what a graph does, with its faults to order.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/unit/net_fixture.h"

#include <criterion/criterion.h>

#include "lib/base/rng.h"
#include "lib/base/str.h"
#include "lib/stage/treatment.h"

/* ---- a table that keeps ---- */

#define EACH(X) X(embed) X(rmsnorm) X(rope) X(kv_put) X(swiglu) X(silu) X(quant_rows) X(gather) X(sample)
#define MEMBER(op) struct kern_##op op;
struct noted {
    void (*run)(struct kern *k, struct noted *x);
    union {
        EACH(MEMBER)
        struct kern_perturb perturb;
        struct { struct kern_linear a[KERN_LINEARS_MAX]; int n; } linear;
        struct { struct kern_attn a; struct kern_attn_noise noise; } attn;
    };
};
enum { NOTES_MAX = 900, PLACES_MAX = 8 };
/* LOSE: noise is left out of what is kept; FREEZE: keys become constants of it. */
static enum fault { NONE, LOSE, FREEZE, REFUSE } fault;
static struct kern real;
static bool noting;
static struct noted notes[NOTES_MAX];
static int note_count, records, replays, places;
static struct place { uint64_t key; bool used; struct noted note[NOTES_MAX]; int n, turn; } place[PLACES_MAX];

static struct noted *note(void (*run)(struct kern *k, struct noted *x)) {
    cr_assert(note_count < NOTES_MAX);
    notes[note_count] = (struct noted){ .run = run };
    return &notes[note_count++];
}
static void bend(struct kern_noise *n) {
    if (fault == LOSE) n->type = KERN_NOISE_OFF;
    if (fault != FREEZE || !n->key_at.p) return;
    memcpy(n->key, n->key_at.p, sizeof n->key);
    n->key_at.p = NULL;
}
#define SLOT(op)                                                                                   \
    static void run_##op(struct kern *k, struct noted *x) { real.op(k, &x->op); }                  \
    static void take_##op(struct kern *k, const struct kern_##op *a) {                             \
        if (noting) note(run_##op)->op = *a;                                                       \
        else real.op(k, a);                                                                        \
    }
EACH(SLOT)
static void run_perturb(struct kern *k, struct noted *x) { real.perturb(k, &x->perturb); }
static void take_perturb(struct kern *k, const struct kern_perturb *a) {
    if (!noting) { real.perturb(k, a); return; }
    struct noted *x = note(run_perturb);
    x->perturb = *a;
    bend(&x->perturb.noise);
}
static void run_linear(struct kern *k, struct noted *x) { real.linear(k, x->linear.a, x->linear.n); }
static void take_linear(struct kern *k, const struct kern_linear *a, int n) {
    if (!noting) { real.linear(k, a, n); return; }
    struct noted *x = note(run_linear);
    memcpy(x->linear.a, a, (size_t)n * sizeof *a);
    x->linear.n = n;
}
static void run_attn(struct kern *k, struct noted *x) {
    if (x->attn.a.noise) x->attn.a.noise = &x->attn.noise;
    real.attn(k, &x->attn.a);
}
static void take_attn(struct kern *k, const struct kern_attn *a) {
    if (!noting) { real.attn(k, a); return; }
    struct noted *x = note(run_attn);
    x->attn.a = *a;
    if (!a->noise) return;
    x->attn.noise = *a->noise;
    bend(&x->attn.noise.scores);
    bend(&x->attn.noise.probs);
}
/* What cannot be kept must not be called then. */
static void take_upload(struct kern *k, kptr to, const void *from, size_t bytes) {
    cr_assert(!noting);
    real.upload(k, to, from, bytes);
}
static void take_download(struct kern *k, void *to, kptr from, size_t bytes) {
    cr_assert(!noting);
    real.download(k, to, from, bytes);
}
static int take_sync(struct kern *k, struct err *e) {
    cr_assert(!noting);
    return real.sync(k, e);
}

static struct place *place_of(uint64_t key) {
    for (int i = 0; i < places; i++)
        if (place[i].used && place[i].key == key) return &place[i];
    return NULL;
}
static void table_record(struct kern *k) {
    (void)k;
    cr_assert(!noting);
    noting = true;
    note_count = 0;
}
static bool table_keep(struct kern *k, uint64_t key) {
    (void)k;
    struct place *p = place_of(key) ? place_of(key) : &place[records % places];
    cr_assert(noting);
    noting = false;
    records++;
    if (fault == REFUSE) return false;
    *p = (struct place){ .key = key, .used = true, .n = note_count };
    memcpy(p->note, notes, (size_t)note_count * sizeof *notes);
    return true;
}
static bool table_replay(struct kern *k, uint64_t key) {
    struct place *p = place_of(key);
    if (!p) return false;
    replays++;
    for (int i = 0; i < p->n; i++) p->note[i].run(k, &p->note[i]);
    return true;
}
static void table_forget(struct kern *k) {
    (void)k;
    for (int i = 0; i < places; i++) place[i].used = false;
}
static void table_open(struct kern *k) {
    real = *k;
#define FILL(op) k->op = take_##op;
    EACH(FILL)
    k->perturb = take_perturb, k->linear = take_linear, k->attn = take_attn;
    k->upload = take_upload, k->download = take_download, k->sync = take_sync;
    k->record = table_record, k->keep = table_keep, k->replay = table_replay, k->forget = table_forget;
    fault = NONE, noting = false, places = PLACES_MAX;
    records = replays = 0;
    table_forget(k);
}

/* ---- steps ---- */

/* More rows than the head takes at once. */
enum { SLOTS = 70, POSITIONS = 64, STEPS_MAX = 12, DRAWS_MAX = STEPS_MAX * SLOTS };
struct world { struct fix f; struct model_conf c; struct net *n; struct lora *l; struct noise_plan plan; int pos[SLOTS]; };
struct outcome { int32_t token[DRAWS_MAX]; float lp[DRAWS_MAX], raw[DRAWS_MAX]; int n; struct noise_evidence ev; };
static const int rows_of_step[STEPS_MAX] = { 5, 5, 5, 70, 5, 1, 70, 1, 70, 1, 5, 1 };

static void world_open(struct world *w, enum model_quant q, bool graphs) {
    struct err e = { 0 };
    *w = (struct world){ .c = fix_small_conf() };
    fix_open(&w->f, "auto", 2, &w->c, q, fix_small_value);
    table_open(&w->f.kern);
    w->l = fix_lora(&w->c, 4, 8, .2f, 7);
    const struct net_opts o = { .rows_max = SLOTS, .slots_max = SLOTS, .positions_max = POSITIONS, .lora = w->l->shape,
                                .noise = true, .graphs = graphs };
    cr_assert_eq(net_create(&w->n, &w->f.model, &o, &e), 0, "%s", e.text);
    cr_assert_eq(net_adopt(w->n, w->l, NULL, &e), 0, "%s", e.text);
    for (int s = 0; s < SLOTS; s++) cr_assert_eq(net_slot_open(w->n), s);
}
static void world_close(struct world *w) {
    net_destroy(&w->n);
    lora_destroy(&w->l);
    fix_close(&w->f);
}

/* Steps of changing size, some with cuts; split: net_forward and net_sample in place of net_step. */
static void decode(struct world *w, int steps, bool split, struct outcome *o) {
    struct net_row row[SLOTS];
    struct kern_sampler s[SLOTS];
    int32_t want[SLOTS];
    struct err e = { 0 };
    *o = (struct outcome){ 0 };
    for (int step = 0; step < steps; step++) {
        const int n = rows_of_step[step];
        for (int i = 0; i < n; i++) {
            const uint64_t draw = rng_mix64((uint64_t)(i * POSITIONS + w->pos[i]));
            row[i] = (struct net_row){ .token = (int32_t)(draw % 61), .slot = i, .pos = w->pos[i]++,
                                       .prompt = (uint32_t)(i / 4), .sample = (uint32_t)(i % 4) };
            s[i] = (struct kern_sampler){ .temperature = i % 3 ? 1 : .7f, .top_k = step == 4 ? 9 : 0, .top_p = 1,
                                          .u = rng_unit((uint32_t)(draw >> 32)) };
            want[i] = i;
        }
        int rc = split ? net_forward(w->n, row, n, want, n, &e)
                       : net_step(w->n, row, n, s, o->token + o->n, o->lp + o->n, o->raw + o->n, &e);
        if (rc == 0 && split) rc = net_sample(w->n, s, o->token + o->n, o->lp + o->n, o->raw + o->n, &e);
        cr_assert_eq(rc, 0, "%s", e.text);
        o->n += n;
    }
    cr_assert_eq(net_take_noise(w->n, &o->ev, &e), 0, "%s", e.text);
}
static bool same_draws(const struct outcome *a, const struct outcome *b) {
    return a->n == b->n && !memcmp(a->token, b->token, sizeof a->token) && !memcmp(a->lp, b->lp, sizeof a->lp) &&
           !memcmp(a->raw, b->raw, sizeof a->raw);
}
static bool same_counts(const struct outcome *a, const struct outcome *b) { return !memcmp(&a->ev, &b->ev, sizeof a->ev); }

/* ---- treatments ---- */

struct treatment { const char *what; int ops, modules; double scale; bool bf16; enum noise_point at; };
static const struct treatment treatments[] = {
    { "clean", 0, 0, 0, false, 0 },
    { "relative noise on all operations", KERN_NOISE_RELATIVE_GAUSSIAN, 0, .02, false, 0 },
    { "signs that stay", KERN_NOISE_SYSTEMATIC, 0, .02, false, 0 },
    { "sparse, in bf16", KERN_NOISE_SPARSE, 0, .1, true, 0 },
    { "a dead zone", KERN_NOISE_DEADZONE, 0, .01, false, 0 },
    { "modules' inputs", 0, KERN_NOISE_ABSOLUTE_GAUSSIAN, .01, false, NOISE_POINT_INPUT },
    { "modules' outputs", 0, KERN_NOISE_BIAS, .01, false, NOISE_POINT_OUTPUT },
    { "modules' weights beside operations", KERN_NOISE_RELATIVE_UNIFORM, KERN_NOISE_RELATIVE_GAUSSIAN, .02, false,
      NOISE_POINT_WEIGHT },
};
static void treat(struct world *w, const struct treatment *t, double factor) {
    const struct noise_text ops = { .type = t->ops, .scale = factor * t->scale, .rate = t->ops == KERN_NOISE_SPARSE ? .2 : 0,
                                    .names = "matmul, bmm, softmax, silu, norm, rope, head", .layers = "all", .forward = true,
                                    .phase = { true, false, false, true }, .bf16 = t->bf16 },
                            modules = { .type = t->modules, .scale = factor * t->scale, .names = "linear, rmsnorm, lm_head",
                                        .exclude = "", .layers = "all", .forward = true,
                                        .phase = { true, false, false, false }, .point = t->at };
    struct err e = { 0 };
    cr_assert_eq(noise_plan_make(&w->plan, t->ops ? &ops : NULL, t->modules ? &modules : NULL, &w->c, &e), 0, "%s: %s",
                 t->what, e.text);
}
static void set_noise(struct world *w, enum noise_phase phase, uint64_t seed) {
    net_set_noise(w->n, &w->plan, phase, seed, seed + 100);
}

/* Two policies, that is two seeds of noise, one after the other. */
static void two_policies(struct world *w, const struct treatment *t, bool split, struct outcome out[2]) {
    treat(w, t, 1);
    for (int i = 0; i < 2; i++) {
        set_noise(w, NOISE_PHASE_ROLLOUT, (uint64_t)i + 1);
        decode(w, STEPS_MAX, split, &out[i]);
    }
}

Test(net_step, is_a_forward_pass_and_its_draws) {
    struct outcome split[2], step[2];
    struct world w;
    for (size_t i = 0; i < COUNT_OF(treatments); i++) {
        world_open(&w, MODEL_QUANT_MXFP4, false);
        two_policies(&w, &treatments[i], true, split);
        world_close(&w);
        world_open(&w, MODEL_QUANT_MXFP4, false);
        two_policies(&w, &treatments[i], false, step);
        world_close(&w);
        cr_assert_eq(records, 0);
        for (int p = 0; p < 2; p++) {
            cr_expect(same_draws(&split[p], &step[p]), "%s: other draws", treatments[i].what);
            cr_expect(same_counts(&split[p], &step[p]), "%s: other counts", treatments[i].what);
        }
    }
}

/* The kernels' sums are how many draws there were: KERN_NOISE_ELEMENTS of all sites. */
static int64_t elements(const struct noise_evidence *ev) {
    int64_t n = 0;
    for (int op = 0; op < NOISE_OP_COUNT; op++) n += ev->op[op][NOISE_FORWARD].elements;
    for (int m = 0; m < NOISE_MODULE_COUNT; m++) n += ev->module[m].elements;
    return n;
}

Test(net_step, replayed_steps_have_the_same_draws_and_counts) {
    struct outcome off[2], on[2];
    struct world w;
    struct err e = { 0 };
    for (size_t i = 0; i < COUNT_OF(treatments); i++) {
        const struct treatment *t = &treatments[i];
        const bool clean = !t->ops && !t->modules;
        world_open(&w, MODEL_QUANT_BF16, false);
        two_policies(&w, t, false, off);
        world_close(&w);
        world_open(&w, MODEL_QUANT_BF16, true);
        two_policies(&w, t, false, on);
        /* of 24 steps the first of 5, of 5 with cuts, of 70 and of 1 row are called; weights drawn anew may lie elsewhere */
        cr_expect_geq(replays, t->modules && t->at == NOISE_POINT_WEIGHT ? 14 : 19, "%s: %d replays", t->what, replays);
        if (!(t->modules && t->at == NOISE_POINT_WEIGHT))
            cr_expect_leq(records, 4, "%s: another seed made new recordings: %d", t->what, records);
        for (int p = 0; p < 2; p++) {
            cr_expect(same_draws(&off[p], &on[p]), "%s: policy %d: other draws", t->what, p);
            cr_expect(same_counts(&off[p], &on[p]), "%s: policy %d: other counts", t->what, p);
            cr_expect_eq(elements(&on[p].ev) > 0, !clean, "%s: %lld elements", t->what, (long long)elements(&on[p].ev));
            cr_expect_eq(treatment_check(&w.plan, NOISE_PHASE_ROLLOUT, &on[p].ev, &e), 0, "%s: %s", t->what, e.text);
        }
        world_close(&w);
    }
}

/* What the earlier system did unseen: compiled steps without their noise. The host counts sites as ever; the kernels' sums
 * do not grow, and the treatment is refused. */
Test(net_step, a_kept_step_that_lost_its_noise_is_found) {
    struct outcome o[2];
    struct world w;
    struct err e = { 0 };
    for (size_t i = 1; i < COUNT_OF(treatments) - 1; i++) {
        world_open(&w, MODEL_QUANT_BF16, true);
        fault = LOSE;
        two_policies(&w, &treatments[i], false, o);
        cr_assert_gt(replays, 18);
        cr_expect_lt(elements(&o[1].ev), elements(&o[0].ev));
        cr_expect_eq(treatment_check(&w.plan, NOISE_PHASE_ROLLOUT, &o[1].ev, &e), -1,
                     "%s was lost in all steps but the first of a kind, and nobody says so", treatments[i].what);
        world_close(&w);
    }
}

/* A key that became a constant draws the first policy's noise for the second: other draws than without graphs. */
Test(net_step, a_kept_step_that_froze_its_key_is_found) {
    struct outcome off[2], on[2];
    struct world w;
    for (size_t i = 1; i < 4; i++) {
        world_open(&w, MODEL_QUANT_BF16, false);
        two_policies(&w, &treatments[i], false, off);
        world_close(&w);
        world_open(&w, MODEL_QUANT_BF16, true);
        fault = FREEZE;
        two_policies(&w, &treatments[i], false, on);
        world_close(&w);
        cr_expect(same_draws(&off[0], &on[0]), "%s", treatments[i].what);
        cr_expect(!same_draws(&off[1], &on[1]), "%s: a frozen key changed nothing", treatments[i].what);
    }
}

/* ---- what changes between steps ---- */

enum change { FIRST, NEW_VALUES, OTHER_ALPHA, NO_ADAPTER, ADAPTER_AGAIN, AQN, AQN_OFF, PLAN, SEED, OTHER_SCALE, OTHER_PHASE,
              PLAN_OFF, CHANGES };
static const struct { const char *what; bool other; } changes[CHANGES] = {
    { "the first adapter", true },         { "an update of the adapter", false },
    { "another alpha", true },             { "no adapter", true },
    { "an adapter again", true },          { "AQN", true },
    { "AQN off", true },                   { "a plan", true },
    { "another seed", false },             { "another scale", true },
    { "a phase in which modules rest", true }, { "no plan", true },
};
static struct noise_view view_of(struct world *w) {
    const struct noise_target_text text = { .targets = "norms, linears", .exclude = "", .layers = "", .others = 1, .zone_edge = "",
                                            .zone_middle = "" };
    struct noise_target target;
    struct noise_view v;
    struct err e = { 0 };
    cr_assert_eq(noise_target_make(&target, &text, 0, 1, &w->c, &e), 0, "%s", e.text);
    cr_assert_eq(noise_view_open(&v, &w->f.model, &target, .01, 5, 6, &e), 0, "%s", e.text);
    return v;
}
static void adopt(struct world *w, float alpha, const struct noise_view *v) {
    struct err e = { 0 };
    w->l->value[3] += .25f;                           /* other values at the same place */
    w->l->shape.alpha = alpha;
    cr_assert_eq(net_adopt(w->n, alpha > 0 ? w->l : NULL, v, &e), 0, "%s", e.text);
}
static void change(struct world *w, enum change c, const struct noise_view *v) {
    static const struct treatment both = { "both", KERN_NOISE_RELATIVE_GAUSSIAN, KERN_NOISE_RELATIVE_GAUSSIAN, .02, false,
                                           NOISE_POINT_OUTPUT };
    if (c <= AQN_OFF) adopt(w, c == NO_ADAPTER ? 0 : c == OTHER_ALPHA ? 6 : 8, c == AQN ? v : NULL);
    if (c == PLAN || c == OTHER_SCALE) treat(w, &both, c == PLAN ? 1 : 2);
    if (c >= PLAN && c < PLAN_OFF)
        set_noise(w, c == OTHER_PHASE ? NOISE_PHASE_EVAL : NOISE_PHASE_ROLLOUT, c >= SEED ? 2 : 1);
    if (c == PLAN_OFF) net_set_noise(w->n, NULL, NOISE_PHASE_ROLLOUT, 2, 2);
}

Test(net_step, what_a_recording_holds_is_compared_before_each_replay) {
    enum { STEPS = 3 };                               /* of five rows: called, recorded, replayed */
    static struct outcome off[CHANGES], on[CHANGES];
    for (int graphs = 0; graphs < 2; graphs++) {
        struct world w;
        world_open(&w, MODEL_QUANT_BF16, graphs);
        struct noise_view v = view_of(&w);
        for (enum change c = 0; c < CHANGES; c++) {
            const int before = records, replayed = replays;
            change(&w, c, &v);
            decode(&w, STEPS, false, graphs ? &on[c] : &off[c]);
            if (!graphs) continue;
            cr_expect_eq(records - before, changes[c].other, "%s: %d recordings", changes[c].what, records - before);
            cr_expect_eq(replays - replayed, changes[c].other ? 2 : 3, "%s: %d replays", changes[c].what,
                         replays - replayed);
        }
        noise_view_close(&v);
        world_close(&w);
    }
    for (enum change c = 0; c < CHANGES; c++) {
        cr_expect(same_draws(&off[c], &on[c]), "%s: other draws", changes[c].what);
        cr_expect(same_counts(&off[c], &on[c]), "%s: other counts", changes[c].what);
        if (c) cr_expect(!same_draws(&off[c], &off[c - 1]), "%s changed nothing", changes[c].what);
    }
}

/* A table may keep few, and may refuse: then steps are called, and counted once. */
Test(net_step, what_is_not_kept_is_called) {
    struct outcome off[2], on[2];
    struct world w;
    world_open(&w, MODEL_QUANT_BF16, false);
    two_policies(&w, &treatments[1], false, off);
    world_close(&w);
    for (int turn = 0; turn < 2; turn++) {
        world_open(&w, MODEL_QUANT_BF16, true);
        if (turn) fault = REFUSE;
        else places = 1;
        two_policies(&w, &treatments[1], false, on);
        if (turn) cr_expect(records == 4 && replays == 0, "asked %d times to keep what it refuses", records);
        else cr_expect(records > 4 && replays > records, "%d records, %d replays of one place", records, replays);
        world_close(&w);
        for (int p = 0; p < 2; p++) {
            cr_expect(same_draws(&off[p], &on[p]), "turn %d: other draws", turn);
            cr_expect(same_counts(&off[p], &on[p]), "turn %d: other counts", turn);
        }
    }
}
