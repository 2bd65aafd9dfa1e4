/* tiny.c - see tiny.h. The one table of what --tiny changes; treatments stay as the file says, with
 * layers scaled to the embedded model where the file says "of 28".
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/tiny.h"

/* IF_MORE: where the pipeline's number is larger; OR_ALL: or 0, which there means all. */
enum when { ALWAYS, IF_MORE, IF_MORE_OR_ALL };
static const struct { const char *key, *value; enum when when; } table[] = {
    { "model.path", "models/tiny", ALWAYS },
    { "model.chat", "", ALWAYS },
    { "data.train", "models/tiny/train.jsonl", ALWAYS },
    { "data.test", "models/tiny/test.jsonl", ALWAYS },
    { "data.prompt_max", "256", ALWAYS },
    { "run.steps", "8", IF_MORE },
    { "run.score_every", "4", ALWAYS },
    { "sample.n", "4", IF_MORE },
    { "sample.new_max", "40", IF_MORE },
    { "lora.rank", "8", IF_MORE },
    { "filter.waves_max", "2", IF_MORE },
    { "reward.overlong_buffer", "8", IF_MORE },
    { "learner.batch", "4", IF_MORE },
    { "learner.minibatch", "2", IF_MORE },
    { "learner.wave", "4", IF_MORE },
    { "learner.warmup", "1", IF_MORE },
    { "learner.save_every", "4", ALWAYS },
    { "noise.aqn.stages", "3", IF_MORE },
    { "noise.aqn.epochs", "2", IF_MORE },
    { "eval.questions", "32", IF_MORE_OR_ALL },
    { "eval.new_max", "0", ALWAYS },
    { "eval.rows", "64", IF_MORE },
    { "rollout.rows", "64", IF_MORE },
};

/* Where the stages refuse the key, since it would change nothing. */
static const struct { const char *key, *under, *value; } idle[] = {
    { "filter.waves_max", "filter.metric", "off" },
    { "noise.aqn.stages", "noise.aqn.schedule", "constant" },
    { "noise.aqn.stages", "noise.aqn.schedule", "linear" },
};

/* What some stage would be given for the key; NULL where no stage reads it. */
static const char *value_now(struct pipeline *p, const char *key) {
    for (int i = 0; i < p->stages; i++) {
        const struct about_key *k = about_key(&p->stage[i].about, key);
        struct origin at;
        const char *text = k ? pipeline_value(p, &p->stage[i], k, &at) : NULL;
        if (text) return text;
    }
    return NULL;
}

static bool is_idle(struct pipeline *p, const char *key) {
    for (size_t i = 0; i < COUNT_OF(idle); i++) {
        if (strcmp(idle[i].key, key) != 0) continue;
        const char *now = value_now(p, idle[i].under);
        if (now && strcmp(now, idle[i].value) == 0) return true;
    }
    return false;
}

static int add(struct pipeline *p, const char **set, int n, const char *key, const char *value) {
    char text[300];
    const int bytes = snprintf(text, sizeof text, "%s=%s", key, value);
    set[n] = lang_keep(&p->lang, text, (size_t)bytes);
    return n + 1;
}

int tiny_sets(struct pipeline *p, const char *set[TINY_SETS_MAX]) {
    int n = 0;
    _Static_assert(COUNT_OF(table) < TINY_SETS_MAX, "every row fits");
    for (size_t i = 0; i < COUNT_OF(table); i++) {
        double is, most;
        const char *now = value_now(p, table[i].key);
        if (!now || is_idle(p, table[i].key)) continue;
        if (table[i].when != ALWAYS &&
            !(str_to_f64(now, &is) && str_to_f64(table[i].value, &most) &&
              (is > most || (table[i].when == IF_MORE_OR_ALL && is == 0))))
            continue;
        n = add(p, set, n, table[i].key, table[i].value);
    }
    return n;
}
