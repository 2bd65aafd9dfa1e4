/* value.c - one value against its declaration: type, range, choice, unit.
 *
 * Units belong to the key's name, as in the house rules ("unit last"): a key ..._seconds takes s,
 * ms, min, h; a key ..._bytes takes KiB, MiB, GiB; a number that cannot exceed 1 takes %.
 * Everything else takes no unit, and says so.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/resolve.h"

#include <math.h>

static const struct unit {
    /* suffix that the key's name must end with; NULL: a share */
    const char *name, *suffix;
    double factor;
} unit_table[] = {
    { "s", "seconds", 1 },      { "ms", "seconds", 1e-3 },  { "min", "seconds", 60 },
    { "h", "seconds", 3600 },   { "KiB", "bytes", 0x1p10 }, { "MiB", "bytes", 0x1p20 },
    { "GiB", "bytes", 0x1p30 }, { "%", NULL, 1e-2 },
};

static bool unit_fits(const struct unit *u, const struct about_key *k) {
    return u->suffix ? str_ends(k->name, u->suffix) : k->type == ABOUT_NUM && k->most <= 1;
}

static int unit_error(const struct about_key *k, const char *text, const char *unit,
                      struct err *e) {
    struct str can;
    str_init(&can);
    for (size_t i = 0; i < COUNT_OF(unit_table); i++)
        if (unit_fits(&unit_table[i], k))
            str_printf(&can, "%s%s", can.len ? ", " : "", unit_table[i].name);
    if (can.len)
        err_set(e, "unknown unit '%s' in '%s' for '%s': it takes %s", unit, text, k->name, can.s);
    else
        err_set(e, "unknown unit '%s' in '%s' for '%s': it takes a plain number", unit, text,
                k->name);
    str_release(&can);
    return -1;
}

/* "30", "1e-5", "5 min" -> number; `plain` tells that no unit was there. */
static int read_number(const struct about_key *k, const char *text, double *v, bool *plain,
                       struct err *e) {
    char *end;
    bool starts = (*text >= '0' && *text <= '9') || *text == '-' || *text == '.' || *text == '+';
    *v = starts ? strtod(text, &end) : 0;
    if (!starts || end == text || !isfinite(*v))
        return err_set(e, "'%s' for '%s' is not %s", text, k->name, k->type == ABOUT_INT
                       ? "a whole number" : "a number");
    while (*end == ' ') end++;
    *plain = !*end;
    if (!*end) return 0;
    for (size_t i = 0; i < COUNT_OF(unit_table); i++)
        if (strcmp(end, unit_table[i].name) == 0 && unit_fits(&unit_table[i], k)) {
            *v *= unit_table[i].factor;
            return 0;
        }
    return unit_error(k, text, end, e);
}

static int check_number(const struct about_key *k, const char *text, struct str *out,
                        struct err *e) {
    double v;
    bool plain = false;
    if (read_number(k, text, &v, &plain, e) < 0) return -1;
    bool whole = k->type == ABOUT_INT;
    int64_t exact = 0;
    if (whole && plain && !str_to_i64(text, &exact))
        return err_set(e, "'%s' for '%s' is not a whole number", text, k->name);
    if (whole && v != floor(v))
        return err_set(e, "'%s' for '%s' is not a whole number", text, k->name);
    bool low = isfinite(k->least), high = isfinite(k->most);
    if ((low && v < k->least) || (high && v > k->most)) {
        if (low && high)
            return err_set(e, "'%s' for '%s' is outside %.10g .. %.10g", text, k->name, k->least,
                           k->most);
        return low ? err_set(e, "'%s' for '%s' is less than %.10g", text, k->name, k->least)
                   : err_set(e, "'%s' for '%s' is more than %.10g", text, k->name, k->most);
    }
    if (plain) str_puts(out, text);
    else str_printf(out, whole ? "%.0f" : "%.17g", v);
    return 0;
}

static int check_bool(const struct about_key *k, const char *text, struct str *out, struct err *e) {
    static const char *const yes[] = { "true", "yes", "on" }, *const no[] = { "false", "no",
                                                                              "off" };
    for (size_t i = 0; i < COUNT_OF(yes); i++) {
        if (strcmp(text, yes[i]) == 0) return str_puts(out, "true"), 0;
        if (strcmp(text, no[i]) == 0) return str_puts(out, "false"), 0;
    }
    return err_set(e, "'%s' for '%s' is neither true nor false", text, k->name);
}

static int check_choice(const struct about_key *k, const char *text, struct str *out,
                        struct err *e) {
    char copy[1024];
    const char *names[64];
    size_t n = 0;
    snprintf(copy, sizeof copy, "%s", k->choices);
    char *save = NULL;
    for (char *s = strtok_r(copy, "|", &save); s && n < 64; s = strtok_r(NULL, "|", &save)) {
        names[n++] = s;
        if (strcmp(s, text) == 0) return str_puts(out, text), 0;
    }
    const char *near = str_nearest(text, names, n);
    if (near)
        return err_set(e, "'%s' for '%s' is not one of %s; did you mean '%s'?", text, k->name,
                       k->choices, near);
    return err_set(e, "'%s' for '%s' is not one of %s", text, k->name, k->choices);
}

int value_check(const struct about_key *k, const char *text, struct str *out, struct err *e) {
    switch (k->type) {
    case ABOUT_INT:
    case ABOUT_NUM: return check_number(k, text, out, e);
    case ABOUT_BOOL: return check_bool(k, text, out, e);
    case ABOUT_CHOICE: return check_choice(k, text, out, e);
    case ABOUT_TEXT: break;
    }
    return str_puts(out, text), 0;
}
