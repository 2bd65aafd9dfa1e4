/* effect.c - see effect.h. Order: values and defaults, rules, the shared ones, notes.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/stage/effect.h"

#include "lib/model/noise_ops.h"
#include "lib/model/noise_schedule.h"
#include "lib/model/noise_target.h"
#include "lib/stage/conf.h"

static const struct stage_key *find(const struct stage_key *const *tables, const char *name) {
    for (; *tables; tables++)
        for (const struct stage_key *k = *tables; k->name; k++)
            if (strcmp(k->name, name) == 0) return k;
    return NULL;
}

int effect_check(const void *conf, const struct stage_key *const *tables,
                 const struct effect_rule *rules, struct err *e) {
    int rc = 0;
    for (const struct effect_rule *r = rules; r->key; r++) {
        const struct stage_key *k = find(tables, r->key);
        struct str value;
        assert(k && "a rule is about a key that there is");
        if (conf_at_default(conf, k) || !r->idle(conf)) continue;
        str_init(&value);
        conf_value(conf, k, &value);
        rc = err_more(e, EXIT_CONFIG, "%s = %s would do nothing: %s", k->name, value.s, r->why);
        str_release(&value);
    }
    return rc;
}

/* ---- shared sections ---- */

static const struct stage_key *const shared_tables[] = { SHARED_POLICY_KEYS, NULL };

static bool nothing_rounded(const void *conf) {
    const struct shared *c = conf;
    return !model_quant_rounds((enum model_quant)c->quant.weights) && !c->quant.activations &&
           !c->quant.adapter;
}
/* as the f32 that multiplies */
static bool no_adapter(const void *conf) {
    const struct shared *c = conf;
    return (float)c->lora.alpha / (float)c->lora.rank <= 0;
}
static bool not_sparse(const void *conf) {
    const struct shared *c = conf;
    return c->ops.type && c->ops.type != KERN_NOISE_SPARSE;
}
static bool aqn_on(const struct shared *c) {
    return c->aqn.sigma_start > 0 || c->aqn.sigma_end > 0;
}
static bool not_staged(const void *conf) {
    const struct shared *c = conf;
    return aqn_on(c) && c->aqn.schedule != NOISE_AQN_STEP && c->aqn.schedule != NOISE_AQN_EPOCH;
}
static bool not_epochs(const void *conf) {
    const struct shared *c = conf;
    return aqn_on(c) && c->aqn.schedule != NOISE_AQN_EPOCH;
}
static bool no_middle(const void *conf) {
    return !*((const struct shared *)conf)->aqn.zone_middle;
}
static bool no_change(const void *conf) {
    const struct shared *c = conf;
    return no_middle(c) || c->aqn.zone_early == c->aqn.zone_late;
}
/* Completed steps at which the middle zone turns from early to late; -1: never. */
static int64_t switch_at(const struct shared *c) {
    const struct noise_target_text x = { .zone_middle = c->aqn.zone_middle,
                                         .zone_switch = c->aqn.zone_switch,
                                         .zone_early = c->aqn.zone_early,
                                         .zone_late = c->aqn.zone_late };
    return noise_target_switch(&x, c->run.steps);
}
static bool never_early(const void *conf) { return no_middle(conf) || switch_at(conf) == 0; }
static bool never_late(const void *conf) {
    const struct shared *c = conf;
    return no_middle(c) || switch_at(c) >= c->run.steps;
}

static const struct effect_rule shared_rules[] = {
    { "quant.parity", nothing_rounded,
      "quant.weights, quant.activations and quant.adapter round nothing to 4 bits; unset "
      "quant.parity, or give one of them a 4-bit format" },
    { "quant.exclude", nothing_rounded,
      "nothing is quantised that could be left out; unset quant.exclude, or give quant.weights, "
      "quant.activations or quant.adapter a 4-bit format" },
    { "lora.alpha", no_adapter,
      "the adapter would be multiplied by 0; give it a size above 0" },
    { "noise.ops.rate", not_sparse,
      "it is of noise.ops.type = sparse; set that type, or unset noise.ops.rate" },
    { "noise.aqn.stages", not_staged,
      "it is of noise.aqn.schedule = step and epoch; set one of these, or unset noise.aqn.stages" },
    { "noise.aqn.epochs", not_epochs,
      "it is of noise.aqn.schedule = epoch; set that, or unset noise.aqn.epochs" },
    { "noise.aqn.zone_switch", no_change,
      "nothing changes there; name layers in noise.aqn.zone_middle and give zone_early and "
      "zone_late different values, or unset it" },
    { "noise.aqn.zone_early", never_early,
      "there is no middle zone, or it is late from the first step on; name layers in "
      "noise.aqn.zone_middle and let noise.aqn.zone_switch x run.steps be at least 1, or unset "
      "it" },
    { "noise.aqn.zone_late", never_late,
      "there is no middle zone, or it is early until the last step; name layers in "
      "noise.aqn.zone_middle and set noise.aqn.zone_switch below 1, or unset it" },
    { 0 },
};

int effect_check_shared(const struct shared *c, struct err *e) {
    return effect_check(c, shared_tables, shared_rules, e);
}

/* ---- notes ---- */

/* switched off: keys that say so themselves, by their ends */
static void note_section(const struct shared *c, const struct stage_key *keys, const char *off,
                         const char *but_a, const char *but_b, json_t *notes) {
    struct str text;
    str_init(&text);
    for (const struct stage_key *k = keys; k->name; k++) {
        if (conf_at_default(c, k) || str_ends(k->name, but_a) || str_ends(k->name, but_b)) continue;
        str_printf(&text, "%s%s", text.len ? ", " : "", k->name);
    }
    if (text.len) {
        str_printf(&text, " do nothing: %s", off);
        json_array_append_new(notes, json_string(text.s));
    }
    str_release(&text);
}

void effect_notes(const struct shared *c, json_t *notes) {
    if (!c->ops.type)
        note_section(c, shared_ops_keys, "noise.ops.type is off", ".type", ".scale", notes);
    if (!c->modules.type)
        note_section(c, shared_modules_keys, "noise.modules.type is off", ".type", ".scale", notes);
    if (!aqn_on(c))
        note_section(c, shared_aqn_keys, "noise.aqn.sigma_start and sigma_end are 0",
                     ".sigma_start", ".sigma_end", notes);
}
