/* gsm8k.c - the four rules that read a number out of an answer, and the shaping of long ones. See
 * task.h.
 *
 * The patterns are four fixed ones, so they are matched by hand: no engine, no backtracking, linear
 * time.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/task/task.h"

enum { WINDOW_CHARACTERS = 300 };

const char *const task_rule_name[TASK_RULE_COUNT] = { "strict", "flexible", "lm-strict",
                                                      "lm-flexible" };

struct span { const char *s; size_t n; };

static bool is_number_char(char c) { return (c >= '0' && c <= '9') || c == '.' || c == ','; }

/* Start of the last WINDOW_CHARACTERS characters of text. */
static const char *window(const char *text) {
    const char *p = text + strlen(text);
    int left = WINDOW_CHARACTERS;
    while (p > text && left-- > 0) {
        const char *q = p - 1;
        while (q > text && p - q < 4 && ((unsigned char)*q & 0xC0) == 0x80) q--;
        p = utf8_valid(q, (size_t)(p - q)) ? q : p - 1;
    }
    return p;
}

/* -?[0-9.,]+ at p; n = 0 when it does not match. */
static struct span number_at(const char *p) {
    const char *q = p + (*p == '-');
    if (!is_number_char(*q)) return (struct span){ p, 0 };
    while (is_number_char(*q)) q++;
    return (struct span){ p, (size_t)(q - p) };
}

/* "#### " followed by a number: the number, first or last in text. */
static struct span after_hashes(const char *text, bool last) {
    struct span found = { text, 0 };
    for (const char *p = text; (p = strstr(p, "#### "));) {
        struct span number = number_at(p + 5);
        if (!number.n) {
            p++;
            continue;
        }
        found = number;
        if (!last) break;
        p = number.s + number.n;
    }
    return found;
}

static struct span last_number(const char *text) {
    struct span found = { text, 0 };
    for (const char *p = text; *p;) {
        struct span number = number_at(p);
        if (number.n && !(number.n == 1 && *number.s == '.')) found = number;
        p += number.n ? number.n : 1;
    }
    return found;
}

static bool is_lm_char(char c) { return is_number_char(c) || c == '$'; }

/* Last match of (-?[$0-9.,]{2,})|(-?[0-9]+), alternatives tried in that order at each position. */
static struct span last_lm_number(const char *text) {
    struct span found = { text, 0 };
    for (const char *p = text; *p;) {
        const char *q = p + (*p == '-'), *end = q;
        while (is_lm_char(*end)) end++;
        if (end - q < 2) {
            end = q;
            while (*end >= '0' && *end <= '9') end++;
            if (end == q) {
                p++;
                continue;
            }
        }
        found = (struct span){ p, (size_t)(end - p) };
        p = end;
    }
    return found;
}

/* The harness stops generating at these, so its rules never see what follows them. */
static char *before_lm_stop(const char *text) {
    static const char *const stop[] = { "Question:", "</s>", "<|im_end|>" };
    char *cut = mem_dup(text);
    for (size_t i = 0; i < COUNT_OF(stop); i++) {
        char *p = strstr(cut, stop[i]);
        if (p) *p = 0;
    }
    return cut;
}

static void add_without(struct str *out, struct span s, const char *dropped) {
    for (size_t i = 0; i < s.n; i++)
        if (!strchr(dropped, s.s[i])) str_add(out, s.s + i, 1);
}

bool task_right(enum task_rule rule, const char *text, const char *gold, struct str *extracted) {
    struct str own;
    str_init(&own);
    struct str *answer = extracted ? extracted : &own;
    str_clear(answer);
    str_add(answer, "", 0);
    bool lm = rule == TASK_RULE_LM_STRICT || rule == TASK_RULE_LM_FLEXIBLE;
    char *cut = lm ? before_lm_stop(text) : NULL;
    switch (rule) {
    case TASK_RULE_STRICT: add_without(answer, after_hashes(window(text), true), ",$"); break;
    case TASK_RULE_FLEXIBLE: add_without(answer, last_number(window(text)), ""); break;
    case TASK_RULE_LM_STRICT: add_without(answer, after_hashes(cut, false), ",$"); break;
    case TASK_RULE_LM_FLEXIBLE: add_without(answer, last_lm_number(cut), ",$"); break;
    case TASK_RULE_COUNT: assert(!"not a rule");
    }
    if (lm && answer->len && answer->s[answer->len - 1] == '.') answer->s[--answer->len] = 0;
    free(cut);
    bool right = answer->len > 0 && strcmp(answer->s, gold) == 0;
    str_release(&own);
    return right;
}

double task_overlong(int64_t tokens, int64_t new_max, int64_t buffer, double factor) {
    int64_t over = tokens - (new_max - buffer);
    if (buffer <= 0 || over <= 0) return 0;
    return -(double)over / (double)buffer * factor;
}
