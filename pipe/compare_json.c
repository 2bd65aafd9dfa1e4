/* compare_json.c - a comparison for programs.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/compare.h"

#include <math.h>

static json_t *number(double v) { return isfinite(v) ? json_real(v) : json_null(); }

static json_t *text_lines(const char *text) {
    json_t *list = json_array();
    for (const char *end; text && *text; text = end + 1) {
        end = strchr(text, '\n');
        json_array_append_new(list, json_stringn(text, (size_t)(end - text)));
    }
    return list;
}

static json_t *arm_json(const struct arm *a) {
    json_t *runs = json_array(), *curve = json_array();
    for (int i = 0; i < a->n; i++) {
        const struct result *r = a->run[i];
        const struct score *last = r->score_n ? &r->score[r->score_n - 1] : NULL;
        json_t *o = json_pack("{s:s, s:s, s:I}", "run", r->f.id, "state", run_state_name[r->state],
                              "seed", (json_int_t)r->seed);
        if (last && last->n)
            json_object_set_new(o, "final", json_pack("{s:I, s:I, s:I, s:f, s:f, s:s, s:s}", "step",
                                                      (json_int_t)last->step, "right",
                                                      (json_int_t)last->right, "n",
                                                      (json_int_t)last->n, "low", last->low,
                                                      "high", last->high, "quant", last->quant,
                                                      "noise", r->reference ? "as published"
                                                                           : score_noise(last)));
        json_array_append_new(runs, o);
    }
    for (int i = 0; i < a->run[0]->score_n; i++) {
        const int64_t step = a->run[0]->score[i].step;
        json_array_append_new(curve, json_pack("{s:I, s:o, s:o}", "step", (json_int_t)step,
                                               "accuracy", number(arm_accuracy(a, step)), "reward",
                                               number(arm_reward(a, step))));
    }
    return json_pack("{s:s, s:o, s:o}", "label", a->label, "runs", runs, "curve", curve);
}

static json_t *effect_json(const struct effect *e) {
    static const char *const basis[] = { "none", "unpaired", "questions", "seeds paired", "seeds" };
    json_t *o = json_pack("{s:s, s:o, s:o, s:o, s:o, s:f, s:o, s:s}", "basis", basis[e->basis],
                          "base", number(e->base), "difference", number(e->difference), "low",
                          number(e->low), "high", number(e->high), "level", 1 - e->alpha, "p",
                          number(e->p), "verdict", verdict_name[e->verdict]);
    if (e->basis == BASIS_QUESTIONS)
        json_object_update_new(o, json_pack("{s:I, s:I, s:I}", "questions",
                                            (json_int_t)e->questions, "only_base",
                                            (json_int_t)e->only_base, "only_other",
                                            (json_int_t)e->only_other));
    if (contrast_of_treatments(e))
        json_object_update_new(o, json_pack("{s:i, s:i, s:o}", "seeds_base", e->seeds_base,
                                            "seeds_other", e->seeds_other, "sd", number(e->sd)));
    return o;
}

static json_t *contrast_json(const struct comparison *c, int i) {
    const struct contrast *k = &c->contrast[i];
    json_t *looks = json_array(), *needs = json_array();
    double need[3];
    for (int j = 0; j < k->looks; j++) {
        json_t *o = effect_json(&k->at[j]);
        json_object_set_new(o, "step", json_integer(k->look[j].step));
        json_object_set_new(o, "base_step", json_integer(k->look[j].base_step));
        json_object_set_new(o, "at", number(k->look[j].at));
        json_object_set_new(o, "base_at", number(k->look[j].base_at));
        json_object_set_new(o, "reward_difference", number(look_reward(c, i, &k->look[j])));
        json_array_append_new(looks, o);
    }
    effect_needs(&k->final, need);
    for (int j = 0; j < 3; j++)
        json_array_append_new(needs, json_pack("{s:f, s:o}", "points", 100 * effect_points[j],
                                               "needs", need[j] < 0 ? json_null()
                                                                    : json_real(need[j])));
    json_t *o = json_pack("{s:s, s:s, s:s, s:b, s:o, s:o, s:s, s:o}", "align",
                          align_name[k->align], "base", c->arm[0].label, "other",
                          c->arm[i].label, "same_end", (int)k->ends, "looks", looks, "final",
                          effect_json(&k->final), "about",
                          contrast_of_treatments(&k->final) ? "treatments" : "two adapters",
                          "power_80", needs);
    return o;
}

/* As the text's table of what noise in scoring costs each adapter. */
static json_t *noise_json(const struct comparison *c) {
    json_t *list = json_array();
    for (int i = 0; i < c->runs; i++) {
        struct effect e;
        struct score clean;
        struct err why = { 0 };
        if (!effect_of_noise(&e, &clean, &c->run[i], CONTRAST_ALPHA / c->runs, &why)) continue;
        json_t *o = effect_json(&e);
        json_object_set_new(o, "run", json_string(c->run[i].f.id));
        json_object_set_new(o, "step", json_integer(clean.step));
        json_array_append_new(list, o);
    }
    return list;
}

void compare_json(const struct comparison *c, FILE *to) {
    json_t *arms = json_array(), *differences = json_array(), *contrasts = json_array();
    for (int i = 0; i < c->arms; i++) json_array_append_new(arms, arm_json(&c->arm[i]));
    for (int i = 0; i < c->differences; i++) {
        json_t *values = json_array();
        for (int j = 0; j < c->arms; j++) {
            const char *v = c->difference[i].value[j];
            json_array_append_new(values, v ? json_string(v) : json_null());
        }
        json_array_append_new(differences, json_pack("{s:s, s:o}", "key", c->difference[i].key,
                                                     "values", values));
    }
    for (int i = 1; i < c->arms; i++) json_array_append_new(contrasts, contrast_json(c, i));
    json_t *o = json_pack("{s:o, s:o, s:o, s:i, s:s, s:o, s:o}", "must_not_be_compared",
                          text_lines(c->reasons.s), "notes", text_lines(c->notes.s), "differences",
                          differences, "factors", c->factors, "align", align_name[c->align],
                          "arms", arms, "contrasts", contrasts);
    if (c->noisy) json_object_set_new(o, "noise_in_scoring", noise_json(c));
    json_dumpf(o, to, JSON_INDENT(2));
    fputc('\n', to);
    json_decref(o);
}
