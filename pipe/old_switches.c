/* old_switches.c - see old_switches.h. The table for readers is docs/old-switches.md.
 *
 * Order: which variables count, what they said together, the same as keys, the message.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/old_switches.h"

#include <strings.h>

static const char *const prefixes[] = { "VERL_NOISY_OPS_", "VERL_HW_ERROR", "VERL_AQN",
                                        "VERL_NOISE", "QERL_AQN", "QERL_NOISE" };
static const char noisy_ops[] = "VERL_NOISY_OPS_";
enum { SWITCH_ENABLED, SWITCH_SCALE, SWITCH_TYPE, SWITCH_ALL_OPS, SWITCH_FORWARD_ONLY,
       SWITCH_BACKWARD_ONLY, SWITCH_TRAINING_ONLY, SWITCH_COUNT };
static const char *const switch_name[SWITCH_COUNT] = { "ENABLED",      "SCALE",
                                                       "TYPE",         "ALL_OPS",
                                                       "FORWARD_ONLY", "BACKWARD_ONLY",
                                                       "TRAINING_ONLY" };
struct switches {
    const char *text[SWITCH_COUNT];          /* NULL = not set */
    struct str names, strangers;             /* all that count; those without a counterpart */
};

static bool is_old(const char *variable) {
    for (size_t i = 0; i < COUNT_OF(prefixes); i++)
        if (str_starts(variable, prefixes[i])) return true;
    return false;
}

static void take(struct switches *s, const char *variable) {
    const char *eq = strchr(variable, '=');
    const size_t n = eq ? (size_t)(eq - variable) : strlen(variable), skip = sizeof noisy_ops - 1;
    str_printf(&s->names, "%s%.*s", s->names.len ? ", " : "", (int)n, variable);
    for (int i = 0; i < SWITCH_COUNT && str_starts(variable, noisy_ops); i++)
        if (n - skip == strlen(switch_name[i]) &&
            strncmp(variable + skip, switch_name[i], n - skip) == 0) {
            s->text[i] = eq ? eq + 1 : "";
            return;
        }
    str_printf(&s->strangers, "%s%.*s", s->strangers.len ? ", " : "", (int)n, variable);
}

/* The earlier system's own reading of a flag. */
static bool on(const struct switches *s, int which) {
    const char *t = s->text[which];
    return t && (!strcmp(t, "1") || !strcasecmp(t, "true") || !strcasecmp(t, "yes"));
}

static void note(struct str *out, const char *text) { str_printf(out, "  note: %s\n", text); }

static void set(struct str *out, const char *key, const char *value) {
    str_printf(out, " --set %s=%s", key, value);
}

/* The options, and notes where the earlier system did something else than its switch said. */
static void equivalent(const struct switches *s, struct str *options, struct str *notes) {
    const char *type = s->text[SWITCH_TYPE] && *s->text[SWITCH_TYPE] ? s->text[SWITCH_TYPE]
                                                                     : "relative_gaussian";
    const char *scale = s->text[SWITCH_SCALE] && *s->text[SWITCH_SCALE] ? s->text[SWITCH_SCALE]
                                                                        : "1e-4";
    const bool all = on(s, SWITCH_ALL_OPS), training = on(s, SWITCH_TRAINING_ONLY);
    const bool forward = on(s, SWITCH_FORWARD_ONLY), backward = on(s, SWITCH_BACKWARD_ONLY);
    if (!on(s, SWITCH_ENABLED) && !training) {
        note(notes, "VERL_NOISY_OPS_ENABLED is not 1, true or yes: these switches meant no noise, "
                    "and no option is needed");
        return;
    }
    if (strcmp(type, "absolute_gaussian") == 0) {
        set(options, "noise.modules.type", type);
        set(options, "noise.modules.scale", scale);
        set(options, "noise.modules.targets", "linear");
        set(options, "noise.modules.at", "output");
        note(notes, "absolute noise is added to modules here, not to operators");
        return;
    }
    set(options, "noise.ops.type", type);
    set(options, "noise.ops.scale", scale);
    set(options, "noise.ops.ops", all ? "matmul,bmm,softmax,silu,gelu,norm,head"
                                      : "matmul,bmm,head");
    if (forward != backward) set(options, "noise.ops.direction", forward ? "forward" : "backward");
    if (forward && backward)
        note(notes, "FORWARD_ONLY and BACKWARD_ONLY together meant both directions");
    if (training) set(options, "noise.ops.rollout", "no");
    else set(options, "eval.also_noisy", "yes");
    if (training && (all || forward || backward))
        note(notes, "with TRAINING_ONLY the earlier system ignored ALL_OPS, FORWARD_ONLY and "
                    "BACKWARD_ONLY; these options do what was asked");
    if (all)
        note(notes, "ALL_OPS never reached attention and norms there; what ran was "
                    "noise.ops.ops=matmul,silu,head");
    if (!training)
        note(notes, "validation ran with the noise there; here scores are clean, and "
                    "eval.also_noisy adds the noisy ones");
}

int old_switches_refuse(char *const *environment, struct str *said) {
    struct switches s = { 0 };
    for (; *environment; environment++)
        if (is_old(*environment)) take(&s, *environment);
    if (!s.names.len) return 0;
    struct str options, notes;
    str_init(&options);
    str_init(&notes);
    bool ops = false;
    for (int i = 0; i < SWITCH_COUNT; i++) ops = ops || s.text[i];
    if (ops) equivalent(&s, &options, &notes);
    str_printf(said,
               "qerl-pipe: the environment sets %s: switches of the earlier system, which no stage "
               "here reads; unset them\n", s.names.s);
    if (options.len) str_printf(said, "the same as options:%s\n", options.s);
    if (s.strangers.len)
        str_printf(said, "  note: %s has no counterpart by that name; the nearest keys are in the "
                         "table\n", s.strangers.s);
    if (notes.len) str_puts(said, notes.s);
    str_puts(said, "the table of old switches and keys: docs/old-switches.md\n");
    str_release(&options);
    str_release(&notes);
    str_release(&s.names);
    str_release(&s.strangers);
    return EXIT_USAGE;
}
