/* tally.c - see tally.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "stages/eval/tally.h"
#include "lib/base/hash.h"
#include "lib/base/stat.h"

void tally_release(struct tally_set *s) {
    for (int i = 0; i < s->n; i++) {
        free(s->t[i].run);
        free(s->t[i].split);
        free(s->t[i].quant);
        free(s->t[i].noise);
    }
    free(s->t);
    *s = (struct tally_set){ 0 };
}

static struct tally *row_of(struct tally_set *s, const struct rec_answer *a) {
    for (int i = 0; i < s->n; i++) {
        struct tally *t = &s->t[i];
        if (t->step == a->step && t->version == a->version && strcmp(t->run, a->run) == 0 &&
            strcmp(t->split, a->split) == 0 && strcmp(t->quant, a->quant) == 0 &&
            strcmp(t->noise, a->noise) == 0)
            return t;
    }
    s->t = mem_grow(s->t, (size_t)(s->n + 1) * sizeof *s->t);
    struct tally *t = &s->t[s->n++];
    *t = (struct tally){ .run = mem_dup(a->run), .split = mem_dup(a->split),
                         .quant = mem_dup(a->quant), .noise = mem_dup(a->noise),
                         .version = a->version, .step = a->step };
    return t;
}

static uint32_t checksum(const struct rec_answer *a) {
    const uint32_t crc = crc32c(crc32c(0, a->question_id, strlen(a->question_id)), &a->k,
                                sizeof a->k);
    return crc32c(crc, a->text, strlen(a->text));
}

void tally_add(struct tally_set *s, const struct rec_answer *a, enum task_rule rule) {
    struct tally *t = row_of(s, a);
    struct str read;
    str_init(&read);
    t->n++;
    t->right += task_right(rule, a->text, a->answer, &read);
    t->parsed += read.len > 0;
    t->right_strict += task_right(TASK_RULE_STRICT, a->text, a->answer, NULL);
    t->right_flexible += task_right(TASK_RULE_FLEXIBLE, a->text, a->answer, NULL);
    t->tokens += a->tokens;
    t->truncated += strcmp(a->stop, "length") == 0;
    t->texts += checksum(a);
    str_release(&read);
}

void tally_score(struct rec *out, const struct tally *t, enum task_rule rule) {
    rec_init(out, REC_SCORE);
    struct rec_score *s = &out->score;
    *s = (struct rec_score){ .run = t->run,
                             .version = t->version,
                             .step = t->step,
                             .split = t->split,
                             .n = t->n,
                             .right = t->right,
                             .rule = (char *)(uintptr_t)task_rule_name[rule],
                             .parsed = t->parsed,
                             .right_strict = t->right_strict,
                             .right_flexible = t->right_flexible,
                             .quant = t->quant,
                             .noise = t->noise,
                             .samples_per_question = 1,
                             .length_mean = t->n ? (double)t->tokens / (double)t->n : 0,
                             .truncated = t->n ? (double)t->truncated / (double)t->n : 0 };
    stat_interval(t->right, t->n, &s->low, &s->high);
}

void tally_line(struct str *out, const struct rec_score *s, const char *who) {
    double n = s->n > 0 ? (double)s->n : 1;
    if (who && *who) str_printf(out, "%s  ", who);
    else str_printf(out, "step %-5lld ", (long long)s->step);
    str_printf(out, "%s  %lld of %lld = %.2f %% [%.2f, %.2f]  rule %s  ", s->split,
               (long long)s->right, (long long)s->n, 100. * (double)s->right / n, 100 * s->low,
               100 * s->high, s->rule);
    str_printf(
        out, "(strict %.2f %%, flexible %.2f %%, parsed %.1f %%, cut off %.1f %%)  %s, noise %s\n",
        100. * (double)s->right_strict / n, 100. * (double)s->right_flexible / n,
        100. * (double)s->parsed / n, 100 * s->truncated, s->quant, s->noise);
}
