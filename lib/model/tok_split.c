/* tok_split.c - the three pre-tokenizers, written by hand from the patterns they stand for; see
 * tok_int.h.
 *
 *   smollm  every number alone, and the rest by GPT-2's pattern
 *           's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
 *   llama3  (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|
 *            ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
 *   qwen2   as llama3 with \p{N} for \p{N}{1,3}
 * `tokenizers` runs these with Oniguruma: \p{L} and \p{N} are general categories, \s is the
 * property White_Space, and among all characters only U+017F folds to a letter of the contractions.
 * utf8proc knows Unicode 15; letters and numbers that are newer, as far as Oniguruma 6.9 knows
 * them, are listed here. Every character falls into one class, so a run is found by one scan, and
 * each character is looked at a bounded number of times.
 * SPDX-License-Identifier: Apache-2.0 */
#include <utf8proc.h>

#include "lib/model/tok_int.h"

/* \s = SPACE or NEWLINE */
enum cls { CLS_END, CLS_OTHER, CLS_LETTER, CLS_NUMBER, CLS_SPACE, CLS_NEWLINE };

struct range { int32_t first, last; };
static const struct range newer_letters[] = {
    /* Unicode 15.1 and 16 */
    { 0x1c89, 0x1c8a },   { 0xa7cb, 0xa7cd },   { 0xa7da, 0xa7dc },   { 0x105c0, 0x105f3 },
    { 0x10d4a, 0x10d65 }, { 0x10d6f, 0x10d85 }, { 0x10ec2, 0x10ec4 }, { 0x11380, 0x11389 },
    { 0x1138b, 0x1138b }, { 0x1138e, 0x1138e }, { 0x11390, 0x113b5 }, { 0x113b7, 0x113b7 },
    { 0x113d1, 0x113d1 }, { 0x113d3, 0x113d3 }, { 0x11bc0, 0x11be0 }, { 0x13460, 0x143fa },
    { 0x16100, 0x1611d }, { 0x16d40, 0x16d6c }, { 0x18cff, 0x18cff }, { 0x1e5d0, 0x1e5ed },
    { 0x1e5f0, 0x1e5f0 }, { 0x2ebf0, 0x2ee5d },
};
static const struct range newer_numbers[] = {
    { 0x10d40, 0x10d49 }, { 0x116d0, 0x116e3 }, { 0x11bf0, 0x11bf9 }, { 0x16130, 0x16139 },
    { 0x16d70, 0x16d79 }, { 0x1ccf0, 0x1ccf9 }, { 0x1e5f1, 0x1e5fa },
};

static bool in_ranges(const struct range *r, size_t n, int32_t cp) {
    for (size_t i = 0; i < n && r[i].first <= cp; i++)
        if (cp <= r[i].last) return true;
    return false;
}

static bool white_space(int32_t cp) {
    return (cp >= 9 && cp <= 13) || cp == 0x20 || cp == 0x85 || cp == 0xa0 || cp == 0x1680 ||
           (cp >= 0x2000 && cp <= 0x200a) || cp == 0x2028 || cp == 0x2029 || cp == 0x202f ||
           cp == 0x205f || cp == 0x3000;
}

static enum cls classify(int32_t cp) {
    if (cp < 0) return CLS_OTHER;
    if (cp == '\r' || cp == '\n') return CLS_NEWLINE;
    if (cp < 0x80) {
        if ((cp | 0x20) >= 'a' && (cp | 0x20) <= 'z') return CLS_LETTER;
        if (cp >= '0' && cp <= '9') return CLS_NUMBER;
    }
    if (white_space(cp)) return CLS_SPACE;
    if (cp < 0x80) return CLS_OTHER;
    utf8proc_category_t c = utf8proc_category(cp);
    if (c >= UTF8PROC_CATEGORY_LU && c <= UTF8PROC_CATEGORY_LO) return CLS_LETTER;
    if (c >= UTF8PROC_CATEGORY_ND && c <= UTF8PROC_CATEGORY_NO) return CLS_NUMBER;
    if (c == UTF8PROC_CATEGORY_CN) {
        if (in_ranges(newer_letters, COUNT_OF(newer_letters), cp)) return CLS_LETTER;
        if (in_ranges(newer_numbers, COUNT_OF(newer_numbers), cp)) return CLS_NUMBER;
    }
    return CLS_OTHER;
}

size_t tok_utf8(const char *s, size_t bytes, int32_t *cp) {
    uint8_t b = (uint8_t)s[0];
    if (b < 0x80) return *cp = b, 1;
    utf8proc_ssize_t n = utf8proc_iterate((const utf8proc_uint8_t *)s,
                                          (utf8proc_ssize_t)(bytes < 4 ? bytes : 4), cp);
    if (n <= 0) return *cp = -1, 1;
    return (size_t)n;
}

/* Class and length of the character at `at`. */
static enum cls look(const char *s, size_t bytes, size_t at, size_t *len) {
    if (at >= bytes) return *len = 0, CLS_END;
    int32_t cp;
    *len = tok_utf8(s + at, bytes - at, &cp);
    return classify(cp);
}

/* End of the run of one class that begins at `at`, of at most `most` characters. */
static size_t run_end(const char *s, size_t bytes, size_t at, enum cls c, size_t most) {
    size_t len;
    for (; most && look(s, bytes, at, &len) == c; most--) at += len;
    return at;
}

/* "'s" and its like at s[0]: length or 0. */
static size_t contraction(const char *s, size_t bytes, bool fold) {
    if (bytes < 2 || s[0] != '\'') return 0;
    char c[2] = { s[1], bytes > 2 ? s[2] : 0 };
    if (fold) {
        if (c[0] == (char)0xc5 && c[1] == (char)0xbf) return 3;                /* U+017F, long s */
        for (int i = 0; i < 2; i++)
            if (c[i] >= 'A' && c[i] <= 'Z') c[i] = (char)(c[i] | 0x20);
    }
    if (strchr("stmd", c[0]) && c[0]) return 2;
    return (c[0] == 'r' && c[1] == 'e') || (c[0] == 'v' && c[1] == 'e') ||
                   (c[0] == 'l' && c[1] == 'l')
               ? 3
               : 0;
}

/* \s+(?!\S)|\s+ at s[0], which is white space: a run leaves its last character to what follows it,
 * if something does. qwen2, llama3: \s*[\r\n]+ comes first. smollm: the text was cut at every
 * number, so a number ends it. */
static size_t spaces(const char *s, size_t bytes, bool smollm) {
    size_t end = 0, last = 0, after_newline = 0, len;
    enum cls c;
    while ((c = look(s, bytes, end, &len)) == CLS_SPACE || c == CLS_NEWLINE) {
        last = end;
        end += len;
        if (c == CLS_NEWLINE) after_newline = end;
    }
    if (!smollm && after_newline) return after_newline;
    return c == CLS_END || (smollm && c == CLS_NUMBER) || last == 0 ? end : last;
}

static size_t next_smollm(const char *s, size_t bytes) {
    size_t n = contraction(s, bytes, false), len, len2;
    if (n) return n;
    enum cls c = look(s, bytes, 0, &len), c2 = look(s, bytes, len, &len2);
    if (c == CLS_NUMBER) return len;
    if (s[0] == ' ' && (c2 == CLS_LETTER || c2 == CLS_OTHER))
        return run_end(s, bytes, 1, c2, SIZE_MAX);
    if (c == CLS_SPACE || c == CLS_NEWLINE) return spaces(s, bytes, true);
    return run_end(s, bytes, 0, c, SIZE_MAX);
}

static size_t next_llama3(const char *s, size_t bytes, size_t digits) {
    size_t n = contraction(s, bytes, true), len, len2;
    if (n) return n;
    enum cls c = look(s, bytes, 0, &len), c2 = look(s, bytes, len, &len2);
    if (c == CLS_LETTER) return run_end(s, bytes, 0, c, SIZE_MAX);
    if ((c == CLS_SPACE || c == CLS_OTHER) && c2 == CLS_LETTER)
        return run_end(s, bytes, len, c2, SIZE_MAX);
    if (c == CLS_NUMBER) return run_end(s, bytes, 0, c, digits);
    if (c == CLS_OTHER || (s[0] == ' ' && c2 == CLS_OTHER)) {
        size_t end = run_end(s, bytes, c == CLS_OTHER ? 0 : 1, CLS_OTHER, SIZE_MAX);
        return run_end(s, bytes, end, CLS_NEWLINE, SIZE_MAX);
    }
    return spaces(s, bytes, false);
}

size_t tok_split_next(enum tok_split split, const char *s, size_t bytes) {
    if (split == TOK_SPLIT_SMOLLM) return next_smollm(s, bytes);
    return next_llama3(s, bytes, split == TOK_SPLIT_LLAMA3 ? 3 : 1);
}
