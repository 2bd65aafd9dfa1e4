/* score.c - see score.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "stages/reward/score.h"

#include "lib/task/task.h"

static void score_sample(struct rec_sample *s, const struct rec_group *g,
                         const struct score_conf *c) {
    struct str read;
    str_init(&read);
    s->strict = task_right(TASK_RULE_STRICT, s->text, g->answer, &read);
    s->format = c->format > 0 && read.len > 0;
    s->flexible = task_right(TASK_RULE_FLEXIBLE, s->text, g->answer, NULL);
    s->acc = task_right((enum task_rule)c->rule, s->text, g->answer, &read);
    s->overlong = task_overlong(s->ids.n, g->new_max, c->overlong_buffer, c->overlong_factor);
    s->score = s->acc + c->format * s->format + s->overlong;
    free(s->extracted);
    s->extracted = mem_dup(read.s);
    str_release(&read);
}

void score_group(struct rec *r, const struct score_conf *c) {
    struct rec_group *g = &r->group;
    r->type = REC_GROUP;
    free(g->rule);
    g->rule = mem_dup(task_rule_name[c->rule]);
    for (int i = 0; i < g->samples; i++) score_sample(&g->sample[i], g, c);
}

bool score_answer(struct rec_answer *a, const struct score_conf *c) {
    a->strict = task_right(TASK_RULE_STRICT, a->text, a->answer, NULL);
    a->flexible = task_right(TASK_RULE_FLEXIBLE, a->text, a->answer, NULL);
    return task_right((enum task_rule)c->rule, a->text, a->answer, NULL);
}
