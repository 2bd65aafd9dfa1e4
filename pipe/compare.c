/* compare.c - the command compare: runs, arms, what forbids it, what was found.
 *
 * Order: arms, what is found, the command.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/compare.h"

#include "pipe/commands.h"
#include "pipe/stop.h"

double look_alpha(const struct contrast *c) {
    return CONTRAST_ALPHA / (c->looks > 1 ? c->looks : 1);
}

double final_alpha(const struct comparison *c) {
    return CONTRAST_ALPHA / (c->arms > 2 ? c->arms - 1 : 1);
}

double look_reward(const struct comparison *c, int arm, const struct look *l) {
    return arm_reward(&c->arm[arm], l->step) - arm_reward(&c->arm[0], l->base_step);
}

bool contrast_of_treatments(const struct effect *e) {
    return e->basis == BASIS_SEEDS || e->basis == BASIS_SEEDS_PAIRED;
}

/* ---- arms ---- */

static bool same_run(const struct result *a, const struct result *b) {
    if (a->reference != b->reference) return false;
    return a->reference ? !strcmp(a->f.id, b->f.id) : !strcmp(a->f.dir, b->f.dir);
}

static int add_run(struct arm *a, struct result *r, struct err *e) {
    for (int i = 0; i < a->n; i++) {
        if (a->run[i]->seed == r->seed && !r->reference)
            return err_code(e, EXIT_USAGE,
                            "runs '%s' and '%s' have the same settings and the same seed: they "
                            "are one run done twice; name one of them, or part them by 'vs'",
                            a->run[i]->f.id, r->f.id);
    }
    if (a->n == ARM_RUNS_MAX) return err_code(e, EXIT_USAGE, "more than %d seeds", ARM_RUNS_MAX);
    a->run[a->n++] = r;
    return 0;
}

static int new_arm(struct comparison *c, struct err *e) {
    if (c->arms == ARMS_MAX) return err_code(e, EXIT_USAGE, "more than %d arms", ARMS_MAX);
    return c->arms++;
}

/* By settings, in the order of the words; `own` >= 0 puts it into that arm (the word 'vs'). */
static int place_run(struct comparison *c, struct result *r, int own, struct err *e) {
    int at = own;
    for (int i = 0; i < c->arms; i++)
        for (int j = 0; j < c->arm[i].n; j++)
            if (same_run(c->arm[i].run[j], r))
                return err_code(e, EXIT_USAGE, "'%s' is named twice: there is nothing to compare",
                                r->f.id);
    for (int i = 0; i < c->arms && at < 0; i++)
        if (result_same_settings(c->arm[i].run[0], r)) at = i;
    if (at < 0 && (at = new_arm(c, e)) < 0) return -1;
    if (own >= 0 && c->arm[at].n && !result_same_settings(c->arm[at].run[0], r))
        return err_code(e, EXIT_USAGE,
                        "'%s' and '%s' stand on one side of 'vs' but differ in more than the seed",
                        c->arm[at].run[0]->f.id, r->f.id);
    return add_run(&c->arm[at], r, e);
}

static void name_arm(struct arm *a) {
    size_t n = (size_t)snprintf(a->label, sizeof a->label, "%s", a->run[0]->f.id);
    if (a->n > 1) n += (size_t)snprintf(a->label + n, sizeof a->label - n, " (%d seeds:", a->n);
    for (int i = 0; i < a->n && a->n > 1 && n + 24 < sizeof a->label; i++)
        n += (size_t)snprintf(a->label + n, sizeof a->label - n, " %lld%s",
                              (long long)a->run[i]->seed, i + 1 < a->n ? "," : ")");
}

static int read_runs(struct comparison *c, const struct command_line *l, struct err *e) {
    bool by_hand = false;
    int own = -1;
    for (int i = 0; i < l->words; i++) by_hand = by_hand || !strcmp(l->word[i], "vs");
    c->run = mem_alloc((size_t)l->words * sizeof *c->run);
    if (by_hand && (own = new_arm(c, e)) < 0) return -1;
    for (int i = 0; i < l->words; i++) {
        if (strcmp(l->word[i], "vs") == 0) {
            if ((own = new_arm(c, e)) < 0) return -1;
            continue;
        }
        struct result *r = &c->run[c->runs++];
        if (stop_came())
            return err_code(e, EXIT_FAILED, "stopped; compare only reads: nothing was changed, "
                                            "and the same command compares");
        if (result_read(r, l->runs_dir, l->word[i], e) < 0) return -1;
        if (l->noisy && result_use_noisy(r, e) < 0) return -1;
        if (place_run(c, r, own, e) < 0) return -1;
    }
    for (int i = 0; i < c->arms; i++) {
        if (!c->arm[i].n) return err_code(e, EXIT_USAGE, "nothing stands on one side of 'vs'");
        name_arm(&c->arm[i]);
    }
    if (c->arms > 1) return 0;
    return err_code(e, EXIT_USAGE,
                    "these runs differ in nothing but the seed: they are one arm. Set it against "
                    "another, or part it by hand: compare A1 A2 A3 vs B1 B2 B3");
}

/* ---- what is found ---- */

/* Batches that differ make a step another amount of data; a reference has steps only. */
static enum align alignment(const struct arm *base, const struct arm *other, enum align asked) {
    const struct result *a = base->run[0], *b = other->run[0];
    if (a->reference || b->reference) return ALIGN_STEP;
    if (asked != ALIGN_AUTO) return asked;
    const char *x = result_value(a, "learner.batch"), *y = result_value(b, "learner.batch");
    return x && y && strcmp(x, y) != 0 ? ALIGN_PROMPTS : ALIGN_STEP;
}

static void choose_alignments(struct comparison *c, enum align asked) {
    c->align = ALIGN_STEP;
    for (int i = 1; i < c->arms; i++) {
        c->contrast[i].align = alignment(&c->arm[0], &c->arm[i], asked);
        if (c->contrast[i].align != ALIGN_STEP) c->align = c->contrast[i].align;
        if (asked > ALIGN_STEP && c->contrast[i].align != asked)
            str_puts(&c->notes, "a reference has steps only: aligned by step\n");
    }
}

static void find_reasons(struct comparison *c) {
    const struct result *first = c->arm[0].run[0];
    for (int i = 0; i < c->runs; i++) {
        struct str lines;
        str_init(&lines);
        if (&c->run[i] == first) continue;
        result_reasons(first, &c->run[i], &lines);
        for (char *line = lines.s, *end; line && *line; line = end + 1) {
            end = strchr(line, '\n');
            *end = 0;
            /* what is said of the first run is said once */
            if (!c->reasons.s || !strstr(c->reasons.s, line))
                str_printf(&c->reasons, "%s\n", line);
        }
        str_release(&lines);
    }
}

/* What could not be read, and what follows from it. */
static void note_files(struct comparison *c, const struct result *r) {
    if (r->reference) return;
    if (r->damaged)
        str_printf(&c->notes, "%s: %d line%s of metrics.jsonl cannot be read: rewards and tokens "
                              "of these steps are missing\n", r->f.id, r->damaged,
                   r->damaged == 1 ? "" : "s");
    if (r->points < 2 && r->score_n > 1)
        str_printf(&c->notes, "%s: metrics.jsonl is missing or empty: no rewards, prompts and "
                              "tokens\n", r->f.id);
    if (r->scores.damaged)
        str_printf(&c->notes, "%s: %d line%s of scores.jsonl cannot be read: left out\n", r->f.id,
                   r->scores.damaged, r->scores.damaged == 1 ? "" : "s");
    if (r->score_n && !r->marks)
        str_printf(&c->notes, "%s: no answers are kept with a score by this rule "
                              "(tape/answers.tape): compared as unpaired, with wider intervals\n",
                   r->f.id);
}

/* Scores of other numbers of questions; scores under noise that nobody asked for. */
static void note_questions(struct comparison *c, const struct result *r) {
    const struct result *first = &c->run[0];
    if (r->score_n && first->score_n && first->marks && r->marks && r->score->n != first->score->n)
        str_printf(&c->notes, "%s was scored on %lld questions, %s on %lld: differences are over "
                              "those that both answered, accuracies over all\n", first->f.id,
                   (long long)first->score->n, r->f.id, (long long)r->score->n);
    if (c->noisy || !r->score_n || r->score_n == r->scores.n || r->reference) return;
    str_printf(&c->notes, "%s has scores under noise too, which are compared by --noisy\n",
               r->f.id);
}

static void find_notes(struct comparison *c) {
    const char *commit = NULL;
    for (int i = 0; i < c->runs; i++) {
        const struct result *r = &c->run[i];
        const char *of = json_string_value(json_object_get(r->manifest, "commit"));
        if (commit && of && strcmp(of, commit) != 0)
            str_printf(&c->notes, "%s was made by another version of the programs (%s) than %s "
                                  "(%s)\n", r->f.id, of, c->run[0].f.id, commit);
        if (!commit) commit = of;
        note_files(c, r);
        note_questions(c, r);
        if (r->no_update)
            str_printf(&c->notes, "%s made no update: %d of %d steps skipped; its treatment was "
                                  "never trained under\n", r->f.id, r->points - 1, r->points - 1);
        if (r->b_zeroed > B_ZEROED_SAID)
            str_printf(&c->notes, "%s: in its last step quant.adapter read %.0f %% of B as 0: what "
                                  "was learnt there is in no answer\n", r->f.id,
                       100 * r->b_zeroed);
        if (i && !r->reference && !c->run[0].reference && formats_differ(&c->run[0], r) &&
            r->score_n && c->run[0].score_n &&
            strcmp(c->run[0].score->quant, r->score->quant) != 0)
            str_printf(&c->notes, "%s was trained and scored in %s, %s in %s: the difference is "
                                  "that of both. What the format does in scoring alone: qerl-pipe "
                                  "eval %s --quant trained,%s\n", c->run[0].f.id,
                       c->run[0].score->quant, r->f.id, r->score->quant, r->f.id,
                       c->run[0].score->quant);
        if (r->reference && r->remarks.len) {
            str_printf(&c->notes, "%s, as the study reports it; compared as unpaired, one run of "
                                  "unknown spread between seeds:\n", r->f.id);
            str_puts(&c->notes, r->remarks.s);
        }
    }
    if (c->factors > 1)
        str_printf(&c->notes, "%d factors differ (%s): a difference cannot be put down to one of "
                              "them\n", c->factors, c->factor_names.s);
}

/* The last look with something to test; the last of all where none has. */
static const struct look *testable(const struct contrast *k) {
    for (int i = k->looks - 1; i >= 0; i--)
        if (k->at[i].basis != BASIS_NONE) return &k->look[i];
    return k->looks ? &k->look[k->looks - 1] : NULL;
}

static void scored_text(struct str *out, const struct result *r) {
    str_printf(out, "%s at ", r->f.id);
    for (int i = 0; i < r->score_n; i++)
        if (i < 3 || i == r->score_n - 1)
            str_printf(out, "%s%lld", i == 0 ? "" : i > 3 && i == r->score_n - 1 ? ", ..., " : ", ",
                       (long long)r->score[i].step);
}

/* No two scores that belong together, or none after training began. What has no score at all is
 * said elsewhere. */
static void say_apart(struct comparison *c, int i, bool any) {
    const struct result *a = c->arm[0].run[0], *b = c->arm[i].run[0];
    const struct contrast *k = &c->contrast[i];
    struct str where;
    if (!a->score_n || !b->score_n) return;
    str_init(&where);
    scored_text(&where, a);
    str_puts(&where, ", ");
    scored_text(&where, b);
    str_printf(&c->reasons, "no two scores after the start belong together, by %s%s: scored were "
                            "%s%s\n", align_name[k->align], any ? " (only step 0)" : "", where.s,
               a->reference || b->reference ? "" : "; another --align may help");
    str_release(&where);
}

/* A curve of the study often has its final score alone, at a step that a run has not: the ends are
 * set beside each other then, and that is said. */
static void add_ends(struct comparison *c, int i) {
    const struct result *a = c->arm[0].run[0], *b = c->arm[i].run[0];
    struct contrast *k = &c->contrast[i];
    if (k->ends || !(a->reference || b->reference) || !a->score_n || !b->score_n) return;
    const int64_t base_step = a->score[a->score_n - 1].step, step = b->score[b->score_n - 1].step;
    if (!base_step || !step) return;
    k->look[k->looks++] = (struct look){ base_step, step, (double)base_step, (double)step };
    k->ends = true;
    str_printf(&c->notes, "the ends are set beside each other, at other steps: %s at %lld, %s at "
                          "%lld\n", a->f.id, (long long)base_step, b->f.id, (long long)step);
}

static void find_contrast(struct comparison *c, int i) {
    struct contrast *k = &c->contrast[i];
    const struct arm *base = &c->arm[0], *other = &c->arm[i];
    k->look = mem_alloc((LOOKS_MAX + 1) * sizeof *k->look);
    k->looks = looks_find(k->look, base, other, k->align, &k->ends);
    add_ends(c, i);
    k->at = mem_alloc(((size_t)k->looks + 1) * sizeof *k->at);
    for (int j = 0; j < k->looks; j++)
        k->at[j] = effect_of_arms(base, k->look[j].base_step, other, k->look[j].step,
                                  look_alpha(k));
    arms_pick(base, other, &k->a, &k->b);
    const struct look *last = testable(k);
    if (!last || (last->step == 0 && !k->ends)) say_apart(c, i, last != NULL);
    if (!last) return;
    k->last = *last;
    k->final = effect_of_arms(base, last->base_step, other, last->step, final_alpha(c));
    const struct score *x = result_score(k->a, last->base_step),
                       *y = result_score(k->b, last->step);
    k->same_adapter = x && y && *x->adapter_sha256 && last->step > 0 &&
                      strcmp(x->adapter_sha256, y->adapter_sha256) == 0;
    if (k->same_adapter)
        str_printf(&c->notes, "%s and %s ended with the same adapter, byte for byte: the treatment "
                              "changed nothing, or one run was copied\n", k->a->f.id, k->b->f.id);
}

static void release(struct comparison *c) {
    for (int i = 0; i < c->runs; i++) result_release(&c->run[i]);
    for (int i = 0; i < ARMS_MAX; i++) {
        free(c->contrast[i].look);
        free(c->contrast[i].at);
    }
    free(c->run);
    free(c->difference);
    str_release(&c->factor_names);
    str_release(&c->reasons);
    str_release(&c->notes);
}

static int align_of(const char *word, enum align *align, struct err *e) {
    *align = ALIGN_AUTO;
    for (int i = ALIGN_STEP; word && i <= ALIGN_TOKENS; i++)
        if (strcmp(word, align_name[i]) == 0) *align = (enum align)i;
    if (!word || *align != ALIGN_AUTO) return 0;
    return err_code(e, EXIT_USAGE, "--align takes step, prompts or tokens, not '%s'", word);
}

static int find(struct comparison *c, const struct command_line *l, struct err *e) {
    enum align asked;
    if (align_of(l->align, &asked, e) < 0) return -1;
    if (l->json && l->markdown)
        return err_code(e, EXIT_USAGE, "--json and --markdown: give one of them");
    str_add(&c->factor_names, "", 0);
    c->noisy = l->noisy;
    if (read_runs(c, l, e) < 0) return -1;
    c->differences = differences_find(&c->difference, c->arm, c->arms);
    c->factors = differences_factors(c->difference, c->differences, &c->factor_names);
    choose_alignments(c, asked);
    find_reasons(c);
    for (int i = 1; i < c->arms; i++) find_contrast(c, i);
    find_notes(c);
    return 0;
}

/* ---- the command ---- */

int command_compare(const struct command_line *l) {
    struct comparison *c = mem_alloc(sizeof *c);
    struct err e = { 0 };
    int code = EXIT_DONE;
    stop_catch();
    if (find(c, l, &e) < 0) {
        code = complain_once(&e, EXIT_FAILED);
    } else if (c->reasons.len && !l->force) {
        fprintf(stderr, "qerl-pipe: these runs must not be compared:\n%s", c->reasons.s);
        if (c->notes.len) fprintf(stderr, "besides:\n%s", c->notes.s);
        fprintf(stderr, "--force does it all the same and prints this on top\n");
        code = EXIT_USAGE;
    } else {
        if (l->json) compare_json(c, stdout);
        else compare_text(c, l->markdown, stdout);
        if (l->picture && compare_picture(c, l->picture, &e) < 0)
            code = complain_once(&e, EXIT_ENV);
    }
    release(c);
    free(c);
    return code;
}
