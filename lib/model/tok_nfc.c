/* tok_nfc.c - Unicode normal form C as the `tokenizers` library computes it; see tok_int.h.
 *
 * That library's tables are of Unicode 9: to it, marks that came later are starters, and U+11938
 * has no parts. Both are listed here and set right, so that ids agree; otherwise utf8proc does the
 * work. Marks are sorted by a merge sort of each run, because utf8proc's own sort is quadratic on a
 * hostile run.
 * SPDX-License-Identifier: Apache-2.0 */
#include <utf8proc.h>

#include "lib/model/tok_int.h"

static const struct { int32_t first, last;
} newer_marks[] = {
    /* combining class taken as 0 */
    { 0x7fd, 0x7fd },     { 0x898, 0x89f },     { 0x8ca, 0x8d3 },     { 0x9fe, 0x9fe },
    { 0xc3c, 0xc3c },     { 0xd3b, 0xd3c },     { 0xeba, 0xeba },     { 0x1715, 0x1715 },
    { 0x1abf, 0x1ace },   { 0x1df6, 0x1dfa },   { 0xa82c, 0xa82c },   { 0x10d24, 0x10d27 },
    { 0x10eab, 0x10eac }, { 0x10f46, 0x10f50 }, { 0x10f82, 0x10f85 }, { 0x11070, 0x11070 },
    { 0x1133b, 0x1133b }, { 0x1145e, 0x1145e }, { 0x11839, 0x1183a }, { 0x1193d, 0x1193e },
    { 0x11943, 0x11943 }, { 0x119e0, 0x119e0 }, { 0x11a34, 0x11a34 }, { 0x11a47, 0x11a47 },
    { 0x11a99, 0x11a99 }, { 0x11d42, 0x11d42 }, { 0x11d44, 0x11d45 }, { 0x11d97, 0x11d97 },
    { 0x16ff0, 0x16ff1 }, { 0x1e130, 0x1e136 }, { 0x1e2ae, 0x1e2ae }, { 0x1e2ec, 0x1e2ef },
};
/* code points in one canonical decomposition: at most 4 */
enum { PARTS_MAX = 8 };

struct point { int32_t cp; int32_t ccc; };
struct points { struct point *p; size_t n, cap; };

static int32_t combining_class(int32_t cp) {
    if (cp < 0x300) return 0;
    const utf8proc_property_t *p = utf8proc_get_property(cp);
    if (!p->combining_class || p->category == UTF8PROC_CATEGORY_CN) return 0;
    for (size_t i = 0; i < COUNT_OF(newer_marks) && newer_marks[i].first <= cp; i++)
        if (cp <= newer_marks[i].last) return 0;
    return p->combining_class;
}

static void point_add(struct points *v, int32_t cp) {
    if (v->n == v->cap) {
        v->cap = v->cap ? 2 * v->cap : 256;
        v->p = mem_grow(v->p, v->cap * sizeof *v->p);
    }
    v->p[v->n++] = (struct point){ cp, combining_class(cp) };
}

static void decompose(struct points *v, int32_t cp) {
    utf8proc_int32_t part[PARTS_MAX];
    int boundary = 0;
    utf8proc_ssize_t n = 0;
    if (cp != 0x11938)
        n = utf8proc_decompose_char(cp, part, PARTS_MAX, UTF8PROC_DECOMPOSE | UTF8PROC_STABLE,
                                    &boundary);
    if (n < 1 || n > PARTS_MAX) point_add(v, cp);
    for (utf8proc_ssize_t i = 0; n <= PARTS_MAX && i < n; i++) point_add(v, part[i]);
}

/* Stable merge sort by class; tmp has room for n. */
static void sort_marks(struct point *p, size_t n, struct point *tmp) {
    if (n < 2) return;
    size_t half = n / 2, i = 0, j = half, k = 0;
    sort_marks(p, half, tmp);
    sort_marks(p + half, n - half, tmp);
    if (p[half - 1].ccc <= p[half].ccc) return;
    while (i < half && j < n) tmp[k++] = p[j].ccc < p[i].ccc ? p[j++] : p[i++];
    while (i < half) tmp[k++] = p[i++];
    memcpy(p, tmp, k * sizeof *p);           /* what is left of the right half stands already */
}

static void order(struct points *v) {
    struct point *tmp = mem_alloc((v->n + 1) * sizeof *tmp);
    for (size_t i = 0, end; i < v->n; i = end) {
        end = i + 1;
        if (!v->p[i].ccc) continue;
        while (end < v->n && v->p[end].ccc) end++;
        sort_marks(v->p + i, end - i, tmp);
    }
    free(tmp);
}

/* Starter + mark to one code point, or -1: found by composing the two alone. */
static int32_t compose_two(int32_t a, int32_t b) {
    if (a == 0x11935 && b == 0x11930) return -1;
    utf8proc_int32_t two[2] = { a, b };
    return utf8proc_normalize_utf32(two, 2, UTF8PROC_COMPOSE | UTF8PROC_STABLE) == 1 ? two[0] : -1;
}

static void compose(struct points *v) {
    size_t out = 0, starter = SIZE_MAX;
    /* class of the last point kept after the starter; -1: none */
    int32_t last = -1;
    for (size_t i = 0; i < v->n; i++) {
        struct point c = v->p[i];
        if (starter != SIZE_MAX && last < c.ccc) {
            int32_t both = compose_two(v->p[starter].cp, c.cp);
            if (both >= 0) {
                v->p[starter].cp = both;
                continue;
            }
        }
        if (c.ccc == 0) {
            starter = out;
            last = -1;
        } else {
            last = c.ccc;
        }
        v->p[out++] = c;
    }
    v->n = out;
}

static void flush(struct str *out, struct points *v) {
    order(v);
    compose(v);
    for (size_t i = 0; i < v->n; i++) {
        utf8proc_uint8_t b[4];
        utf8proc_ssize_t n = utf8proc_encode_char(v->p[i].cp, b);
        str_add(out, b, (size_t)n);
    }
    v->n = 0;
}

void tok_nfc(struct str *out, const char *s, size_t bytes) {
    size_t i = 0;
    while (i < bytes && (uint8_t)s[i] < 0xcc) i++;       /* below U+0300 nothing changes */
    if (i == bytes) {
        str_add(out, s, bytes);
        return;
    }
    struct points v = { 0 };
    for (i = 0; i < bytes;) {
        int32_t cp;
        size_t n = tok_utf8(s + i, bytes - i, &cp);
        if (cp >= 0) {
            decompose(&v, cp);
        } else {
            flush(out, &v);
            str_add(out, s + i, n);
        }
        i += n;
    }
    flush(out, &v);
    free(v.p);
}
