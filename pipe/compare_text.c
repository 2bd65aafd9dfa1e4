/* compare_text.c - a comparison for people: text or markdown.
 *
 * Order: what differs, curves, final scores, verdicts.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/compare.h"

#include <math.h>

#include "lib/base/stat.h"
#include "pipe/expect.h"
#include "pipe/table.h"

struct page { FILE *to; bool markdown; };

static void heading(const struct page *p, const char *text) {
    fprintf(p->to, p->markdown ? "\n## %s\n\n" : "\n%s\n", text);
}

static void lines(const struct page *p, const char *text) {
    for (const char *end; text && *text; text = end + 1) {
        end = strchr(text, '\n');
        fprintf(p->to, p->markdown ? "- %.*s\n" : "  %.*s\n", (int)(end - text), text);
    }
}

/* A line of prose; markdown wants an empty one before it. */
#define SAY(p, ...) (fputs((p)->markdown ? "\n" : "  ", (p)->to), fprintf((p)->to, __VA_ARGS__))

/* ---- what differs ---- */

static void print_head(const struct comparison *c, const struct page *p) {
    if (p->markdown) fputs("# ", p->to);
    fprintf(p->to, "%s", c->arm[0].label);
    for (int i = 1; i < c->arms; i++) fprintf(p->to, " | %s", c->arm[i].label);
    fputc('\n', p->to);
    if (!c->reasons.len) return;
    heading(p, "MUST NOT BE COMPARED, shown because of --force");
    lines(p, c->reasons.s);
}

static void print_differences(const struct comparison *c, const struct page *p) {
    struct table t;
    struct str head;
    str_init(&head);
    str_puts(&head, "<setting");
    for (int i = 0; i < c->arms; i++) str_printf(&head, "|<%s", c->arm[i].run[0]->f.id);
    heading(p, "what differs");
    table_init(&t, head.s);
    for (int i = 0; i < c->differences; i++) {
        table_cell(&t, "%s", c->difference[i].key);
        for (int j = 0; j < c->arms; j++) {
            const char *v = c->difference[i].value[j];
            table_cell(&t, "%s", v ? *v ? v : "(empty)" : "-");
        }
    }
    if (c->differences) table_print(&t, p->markdown, p->to);
    else if (c->reasons.len) SAY(p, "no setting\n");
    else SAY(p, c->runs > c->arms || !c->arm[c->arms - 1].run[0]->reference
                ? "nothing but the seeds\n" : "a reference has no settings to compare\n");
    if (c->factors == 1) SAY(p, "one factor: %s\n", c->factor_names.s);
    table_release(&t);
    str_release(&head);
    if (!c->notes.len) return;
    heading(p, "to be known");
    lines(p, c->notes.s);
}

/* ---- curves ---- */

static void percent_cell(struct table *t, double share) {
    if (isnan(share)) table_cell(t, "-");
    else table_cell(t, "%.1f %%", 100 * share);
}

static void reward_cell(struct table *t, double reward) {
    if (isnan(reward)) table_cell(t, "-");
    else table_cell(t, "%.3f", reward);
}

static void print_baseline(const struct comparison *c, const struct page *p) {
    struct table t;
    const struct arm *a = &c->arm[0];
    heading(p, a->label);
    if (!a->run[0]->score_n) {
        SAY(p, "no scores\n");
        return;
    }
    table_init(&t, "step|OOD accuracy|ID reward");
    for (int i = 0; i < a->run[0]->score_n; i++) {
        const int64_t step = a->run[0]->score[i].step;
        table_cell(&t, "%lld", (long long)step);
        percent_cell(&t, arm_accuracy(a, step));
        reward_cell(&t, arm_reward(a, step));
    }
    table_print(&t, p->markdown, p->to);
    table_release(&t);
}

static const char *basis_text(const struct effect *e) {
    return e->basis == BASIS_SEEDS_PAIRED ? "by seed, paired"
           : e->basis == BASIS_SEEDS      ? "over seeds, unpaired"
           : e->basis == BASIS_QUESTIONS  ? "paired by question"
                                          : "unpaired";
}

static bool same_steps(const struct contrast *k) {
    for (int i = 0; i < k->looks; i++)
        if (k->look[i].step != k->look[i].base_step) return false;
    return true;
}

static void print_curve(const struct comparison *c, int i, const struct page *p) {
    const struct contrast *k = &c->contrast[i];
    const bool axis = k->align != ALIGN_STEP, both = axis || !same_steps(k);
    struct table t;
    heading(p, c->arm[i].label);
    if (!k->looks) {
        SAY(p, "no scores to align\n");
        return;
    }
    SAY(p, "aligned by %s; difference to %s in points, %s; ", align_name[k->align],
        c->arm[0].label, basis_text(&k->at[0]));
    if (k->looks > 1) fprintf(p->to, "the intervals of %d looks hold together at 95 %% "
                                     "(Bonferroni: %.4g %% each)", k->looks,
                              100 * (1 - look_alpha(k)));
    else fprintf(p->to, "one look, an interval of 95 %%");
    fprintf(p->to, "; reward's: the difference of the ID reward, untested\n");
    if (!contrast_of_treatments(&k->at[0]) && c->arm[0].n + c->arm[i].n > 2)
        SAY(p, "fewer than %d seeds on a side: differences are those of %s beside %s alone, "
               "accuracies are means\n", ARM_SEEDS_MIN, k->b->f.id, k->a->f.id);
    if (p->markdown) fputc('\n', p->to);
    char head[200];
    snprintf(head, sizeof head,
             "step|%s%s%sOOD accuracy|ID reward|difference|interval|reward's|<reading",
             both ? "baseline's|" : "", axis ? align_name[k->align] : "",
             axis ? "|baseline's|" : "");
    table_init(&t, head);
    for (int j = 0; j < k->looks; j++) {
        const struct look *l = &k->look[j];
        const struct effect *e = &k->at[j];
        table_cell(&t, "%lld", (long long)l->step);
        if (both) table_cell(&t, "%lld", (long long)l->base_step);
        if (axis) {
            table_cell(&t, "%.0f", l->at);
            table_cell(&t, "%.0f", l->base_at);
        }
        percent_cell(&t, arm_accuracy(&c->arm[i], l->step));
        reward_cell(&t, arm_reward(&c->arm[i], l->step));
        if (e->basis == BASIS_NONE) {
            table_cell(&t, "%+.1f", 100 * (arm_accuracy(&c->arm[i], l->step) -
                                           arm_accuracy(&c->arm[0], l->base_step)));
            table_cell(&t, "-");
        } else {
            table_cell(&t, "%+.1f", 100 * e->difference);
            table_cell(&t, "[%+.1f, %+.1f]", 100 * e->low, 100 * e->high);
        }
        const double reward = look_reward(c, i, l);
        table_cell(&t, isnan(reward) ? "-" : "%+.3f", reward);
        if (e->basis == BASIS_NONE) {
            table_cell(&t, "no test: n is not known");
            continue;
        }
        char reading[80];
        effect_reading(reading, e);
        table_cell(&t, "%s", reading);
    }
    table_print(&t, p->markdown, p->to);
    table_release(&t);
    if (k->ends) return;
    const struct look *l = &k->look[k->looks - 1];
    const struct result *a = c->arm[0].run[0], *b = c->arm[i].run[0];
    SAY(p, "NOT AT THE SAME END: the last scores that belong together are step %lld and, of the "
           "baseline, %lld; %s was scored until step %lld, the baseline until %lld\n",
        (long long)l->step, (long long)l->base_step, b->f.id,
        (long long)b->score[b->score_n - 1].step, (long long)a->score[a->score_n - 1].step);
}

/* ---- final scores ---- */

static void final_rows(struct table *t, const struct result *r) {
    for (int i = 0, end; i < r->scores.n; i = end) {
        end = scores_series_end(&r->scores, i);
        const struct score *s = &r->scores.v[end - 1];
        const struct point *at = result_point(r, s->step);
        table_cell(t, "%s", r->f.id);
        table_cell(t, "%lld", (long long)s->step);
        if (s->n) {
            table_cell(t, "%lld/%lld", (long long)s->right, (long long)s->n);
            table_cell(t, "%.1f %%", score_percent(s));
            table_cell(t, "[%.1f, %.1f]", 100 * s->low, 100 * s->high);
        } else {
            table_cell(t, "-");
            table_cell(t, "%.1f %%", 100 * s->low);
            table_cell(t, "-");
        }
        reward_cell(t, at ? at->reward : NAN);
        table_cell(t, "%s, %s", s->rule, s->quant);
        table_cell(t, "%s", r->reference ? "as published" : score_noise(s));
    }
}

static void print_finals(const struct comparison *c, const struct page *p) {
    struct table t;
    heading(p, "final scores");
    table_init(&t, "<run|step|right|OOD accuracy|95 % (Wilson)|ID reward|<rule, format|<noise");
    for (int i = 0; i < c->arms; i++)
        for (int j = 0; j < c->arm[i].n; j++) final_rows(&t, c->arm[i].run[j]);
    table_print(&t, p->markdown, p->to);
    table_release(&t);
}

/* ---- noise in scoring ---- */

static void print_noise(const struct comparison *c, const struct page *p) {
    const double alpha = CONTRAST_ALPHA / c->runs;
    struct table t;
    heading(p, "what the noise in scoring costs each adapter");
    table_init(&t, "<run|step|clean|noisy|noisy less clean|interval|<reading");
    for (int i = 0; i < c->arms; i++)
        for (int j = 0; j < c->arm[i].n; j++) {
            const struct result *r = c->arm[i].run[j];
            const struct score *noisy = &r->score[r->score_n - 1];
            struct effect e = { 0 };
            struct score clean;
            struct err why = { 0 };
            table_cell(&t, "%s", r->f.id);
            table_cell(&t, "%lld", (long long)noisy->step);
            const bool known = effect_of_noise(&e, &clean, r, alpha, &why);
            percent_cell(&t, known ? score_percent(&clean) / 100 : NAN);
            percent_cell(&t, score_percent(noisy) / 100);
            if (!known) {
                table_cell(&t, "-");
                table_cell(&t, "-");
                table_cell(&t, "no clean score of that step");
                continue;
            }
            table_cell(&t, "%+.1f", 100 * e.difference);
            table_cell(&t, "[%+.1f, %+.1f]", 100 * e.low, 100 * e.high);
            char reading[80];
            effect_reading(reading, &e);
            table_cell(&t, "%s", reading);
        }
    table_print(&t, p->markdown, p->to);
    table_release(&t);
    SAY(p, "paired by question; the intervals of %d runs hold together at 95 %% (Bonferroni)\n",
        c->runs);
}

/* ---- verdicts ---- */

/* "p = 0.031"; what is too small for a double is not 0. */
static const char *p_text(char out[32], double p) {
    snprintf(out, 32, p < 1e-300 ? "p < 1e-300" : "p = %.3g", p);
    return out;
}

static void print_pairs(const struct comparison *c, const struct result *a, const struct result *b,
                        const struct look *l, const struct page *p) {
    const struct effect e = effect_of_runs(a, l->base_step, b, l->step, final_alpha(c));
    if (e.basis != BASIS_QUESTIONS) return;
    char text[32];
    SAY(p, "%s, %s: of %lld questions %lld %s in %s, %lld in %s; %s %s\n", a->f.id, b->f.id,
        (long long)e.questions, (long long)e.only_base,
        e.several ? "were more often right" : "were right only", a->f.id,
        (long long)e.only_other, b->f.id,
        e.several ? "exact test of signs by question" : "McNemar's exact test", p_text(text, e.p));
}

/* Every pair of adapters that the design has: by seed, or the one that stands for both arms. */
static void print_all_pairs(const struct comparison *c, int i, const struct page *p) {
    const struct contrast *k = &c->contrast[i];
    const struct look *l = &k->last;
    const struct arm *base = &c->arm[0], *other = &c->arm[i];
    bool any = false;
    for (int x = 0; x < base->n; x++)
        for (int y = 0; y < other->n; y++) {
            if (base->run[x]->seed != other->run[y]->seed) continue;
            print_pairs(c, base->run[x], other->run[y], l, p);
            any = true;
        }
    if (!any && !contrast_of_treatments(&k->final)) print_pairs(c, k->a, k->b, l, p);
}

static void print_difference(const struct comparison *c, int i, const struct page *p) {
    const struct contrast *k = &c->contrast[i];
    const struct effect *e = &k->final;
    char test[80] = "", text[32];
    if (!isnan(e->p))
        snprintf(test, sizeof test, ", %s %s",
                 e->basis == BASIS_SEEDS_PAIRED ? "paired t" :
                 e->basis == BASIS_SEEDS        ? "permutation"
                                                : "exact", p_text(text, e->p));
    SAY(p, "%s: %+.1f points [%+.1f, %+.1f] (%.4g %%)%s at step %lld",
        verdict_name[e->verdict], 100 * e->difference, 100 * e->low, 100 * e->high,
        100 * (1 - final_alpha(c)), test, (long long)k->last.step);
    if (k->last.step != k->last.base_step)
        fprintf(p->to, " (of the baseline: %lld)", (long long)k->last.base_step);
    fprintf(p->to, k->ends ? "\n" : ", which is NOT THE END of both\n");
}

static void print_needs(const struct effect *e, const struct page *p) {
    double needs[3];
    effect_needs(e, needs);
    const bool seeds = contrast_of_treatments(e);
    if (needs[0] < 0 && needs[1] < 0 && needs[2] < 0) return;
    SAY(p, "to show 1, 2, 5 points (80 %% power):");
    for (int i = 0; i < 3; i++)
        if (needs[i] < 0) fprintf(p->to, "%s more than 10000", i ? "," : "");
        else fprintf(p->to, "%s %.0f", i ? "," : "", needs[i]);
    fputs(seeds                        ? " seeds per arm, at the spread seen here\n"
          : e->basis == BASIS_UNPAIRED ? " questions in each, unpaired, at these accuracies\n"
          : e->several ? " questions, with as many answers each, at the spread seen here\n"
                       : " questions, at the share answered differently here\n", p->to);
}

static void print_verdict(const struct comparison *c, int i, const struct page *p) {
    const struct contrast *k = &c->contrast[i];
    const struct arm *base = &c->arm[0], *other = &c->arm[i];
    char title[500];
    const bool treatments = contrast_of_treatments(&k->final);
    snprintf(title, sizeof title, "verdict: %s beside %s", other->label, base->label);
    heading(p, title);
    if (!k->looks || k->final.basis == BASIS_NONE) {
        SAY(p, "none: there is nothing to test\n");
        return;
    }
    print_all_pairs(c, i, p);
    print_difference(c, i, p);
    if (treatments) {
        SAY(p, "about the treatments, over %d and %d seeds (%s), on these questions\n",
            k->final.seeds_base, k->final.seeds_other,
            k->final.basis == BASIS_SEEDS_PAIRED ? "the same seeds" : "other seeds");
        const double least = stat_permutation_least(base->n, other->n);
        if (k->final.basis == BASIS_SEEDS && least >= final_alpha(c))
            SAY(p, "%d and %d seeds dealt out anew can never give p below %.3g: use the same seeds "
                   "in both arms, or more\n", base->n, other->n, least);
    } else {
        SAY(p, "about these two %s, not about the treatment: that takes %d seeds per arm "
               "(qerl-pipe matrix FILE... --seeds %d)\n",
            other->run[0]->reference || base->run[0]->reference ? "results" : "adapters",
            ARM_SEEDS_MIN, ARM_SEEDS_MIN);
    }
    print_needs(&k->final, p);
}

static void print_expected(const struct comparison *c, const struct page *p) {
    struct expectation x;
    bool begun = false;
    for (int i = 0; i < c->runs; i++) {
        const struct result *r = &c->run[i];
        if (r->reference || expect_read(&x, &r->conf, NULL) < 0 || (!x.set && !*x.hypothesis))
            continue;
        if (!begun) heading(p, "what was expected");
        begun = true;
        SAY(p, "%s\n", r->f.id);
        expect_print(&r->f, p->markdown ? "- " : "    ", p->to);
    }
}

void compare_text(const struct comparison *c, bool markdown, FILE *to) {
    const struct page p = { to, markdown };
    print_head(c, &p);
    print_differences(c, &p);
    print_baseline(c, &p);
    for (int i = 1; i < c->arms; i++) print_curve(c, i, &p);
    print_finals(c, &p);
    if (c->noisy) print_noise(c, &p);
    for (int i = 1; i < c->arms; i++) print_verdict(c, i, &p);
    print_expected(c, &p);
}
