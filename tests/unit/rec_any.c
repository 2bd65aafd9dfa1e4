/* rec_any.c - see rec_any.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/unit/rec_any.h"

#include <float.h>

#include "lib/wire/fields.h"

uint64_t any_bits(struct any *a) {
    a->state ^= a->state << 13;
    a->state ^= a->state >> 7;
    a->state ^= a->state << 17;
    return a->state;
}

static const char *const texts[] = { "",
                                     "a",
                                     "What is 2+2?",
                                     "line\nline\ttab \"quote\" \\ /",
                                     "\x01\x1f\x7f",
                                     "\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80",
                                     "#### 1,234",
                                     "\xEF\xBF\xBD",
                                     "\xE2\x80\xA8 line separator, \xF4\x8F\xBF\xBF" };

static float any_f32(struct any *a) {
    static const float special[] = { 0.f,      -0.f,    1.f,        -1.f,       FLT_MAX,
                                     -FLT_MAX, FLT_MIN, 0x1p-149f,  -0x1p-149f, 0x1.fffffcp-127f,
                                     0.1f,     -1e-6f,  16777216.f, 1.f / 3 };
    uint32_t bits = (uint32_t)any_bits(a);
    float v;
    if (bits % 3 == 0) return special[bits / 3 % COUNT_OF(special)];
    /* infinities and NaN are refused */
    if ((bits & 0x7F800000u) == 0x7F800000u) bits ^= 0x00800000u;
    memcpy(&v, &bits, sizeof v);
    return v;
}

static double any_f64(struct any *a) {
    static const double special[] = { 0.,
                                      -0.,
                                      1.,
                                      -1.,
                                      DBL_MAX,
                                      -DBL_MAX,
                                      DBL_MIN,
                                      0x1p-1074,
                                      -0x1p-1074,
                                      0.1,
                                      1e22,
                                      5e-2,
                                      1e100,
                                      0x1.fffffffffffffp-1023,
                                      123456789012345678. };
    uint64_t bits = any_bits(a);
    double v;
    if (bits % 3 == 0) return special[bits / 3 % COUNT_OF(special)];
    if ((bits & 0x7FF0000000000000u) == 0x7FF0000000000000u) bits ^= 0x0010000000000000u;
    memcpy(&v, &bits, sizeof v);
    return v;
}

static int64_t any_int(struct any *a, int64_t least, int64_t most) {
    uint64_t bits = any_bits(a), width = (uint64_t)(most - least);
    if (bits % 4 == 0) return bits / 4 % 2 ? most : least;
    return least + (int64_t)((bits >> (bits % 64)) % (width + 1));
}

static char *any_text(struct any *a, const struct field *f) {
    if (!f->choices) return mem_dup(texts[any_bits(a) % COUNT_OF(texts)]);
    char *all = mem_dup(f->choices), *word = all;
    for (uint64_t i = any_bits(a) % 3; i && strchr(word, '|'); i--) word = strchr(word, '|') + 1;
    word[strcspn(word, "|")] = 0;
    word = mem_dup(word);
    free(all);
    return word;
}

static void fill(void *base, const struct field *table, struct any *a);

static void fill_array(void *base, const struct field *f, struct any *a, int n) {
    if (f->kind == FIELD_I32) {
        *at_i32(base, f) = (struct rec_i32){ n ? mem_alloc((size_t)n * sizeof(int32_t)) : NULL, n };
        for (int i = 0; i < n; i++) at_i32(base, f)->v[i] = (int32_t)any_int(a, 0, INT32_MAX);
    } else if (f->kind == FIELD_F32) {
        *at_f32(base, f) = (struct rec_f32){ n ? mem_alloc((size_t)n * sizeof(float)) : NULL, n };
        for (int i = 0; i < n; i++) at_f32(base, f)->v[i] = any_f32(a);
    } else if (f->kind == FIELD_I64) {
        *at_count(base, f) = n;
        *at_i64(base, f) = n ? mem_alloc((size_t)n * sizeof(int64_t)) : NULL;
        for (int i = 0; i < n; i++) (*at_i64(base, f))[i] = any_int(a, 0, INT64_MAX - 1);
    } else {
        *at_count(base, f) = n;
        *at_samples(base, f) = n ? mem_alloc((size_t)n * sizeof(struct rec_sample)) : NULL;
        for (int i = 0; i < n; i++) fill(*at_samples(base, f) + i, f->sub, a);
    }
}

static void fill(void *base, const struct field *table, struct any *a) {
    int n = (int)(any_bits(a) % 9);              /* arrays of one sample are equally long */
    for (const struct field *f = table; f->name; f++) switch (f->kind) {
        case FIELD_TEXT: *at_text(base, f) = any_text(a, f); break;
        case FIELD_INT: *at_int(base, f) = any_int(a, field_least(f), field_most(f)); break;
        case FIELD_SEED: *at_seed(base, f) = any_bits(a) % 4 ? any_bits(a) : UINT64_MAX; break;
        case FIELD_NUM: *at_num(base, f) = any_f64(a); break;
        case FIELD_FLAG: *at_flag(base, f) = any_bits(a) % 2; break;
        case FIELD_I32:
        case FIELD_F32:
        case FIELD_I64:
        case FIELD_SAMPLES: fill_array(base, f, a, n); break;
        case FIELD_TREATMENT: fill((char *)base + f->at, f->sub, a); break;
        }
}

/* What rec_rules asks for on top of each field's own limits. */
void any_fill(struct rec *r, enum rec_type type, struct any *a) {
    rec_init(r, type);
    fill(&r->ticket, field_table(type), a);
    if (type == REC_TICKET && !*r->ticket.question) {
        free(r->ticket.question);
        r->ticket.question = mem_dup("q");
    }
    if (type == REC_SCORE) {
        struct rec_score *s = &r->score;
        s->n = (int64_t)1 << 53;
    }
}

static bool same_text(const char *x, const char *y) { return strcmp(x ? x : "", y ? y : "") == 0; }
static bool same_bytes(const void *x, int nx, const void *y, int ny, size_t each) {
    return nx == ny && (nx == 0 || memcmp(x, y, (size_t)nx * each) == 0);
}

static const char *differs(void *x, void *y, const struct field *table) {
    for (const struct field *f = table; f->name; f++) {
        bool same = true;
        const char *inner = NULL;
        switch (f->kind) {
        case FIELD_TEXT: same = same_text(*at_text(x, f), *at_text(y, f)); break;
        case FIELD_INT: same = *at_int(x, f) == *at_int(y, f); break;
        case FIELD_SEED: same = *at_seed(x, f) == *at_seed(y, f); break;
        case FIELD_NUM: same = memcmp(at_num(x, f), at_num(y, f), sizeof(double)) == 0; break;
        case FIELD_FLAG: same = *at_flag(x, f) == *at_flag(y, f); break;
        case FIELD_I32:
            same = same_bytes(at_i32(x, f)->v, at_i32(x, f)->n, at_i32(y, f)->v, at_i32(y, f)->n,
                              4);
            break;
        case FIELD_F32:
            same = same_bytes(at_f32(x, f)->v, at_f32(x, f)->n, at_f32(y, f)->v, at_f32(y, f)->n,
                              4);
            break;
        case FIELD_I64:
            same = same_bytes(*at_i64(x, f), *at_count(x, f), *at_i64(y, f), *at_count(y, f), 8);
            break;
        case FIELD_TREATMENT: inner = differs((char *)x + f->at, (char *)y + f->at, f->sub); break;
        case FIELD_SAMPLES:
            same = *at_count(x, f) == *at_count(y, f);
            for (int i = 0; same && !inner && i < *at_count(x, f); i++)
                inner = differs(*at_samples(x, f) + i, *at_samples(y, f) + i, f->sub);
            break;
        }
        if (inner) return inner;
        if (!same) return f->name;
    }
    return NULL;
}

const char *any_differs(const struct rec *x, const struct rec *y) {
    if (x->type != y->type) return "rec";
    return differs(rec_body(x), rec_body(y), field_table(x->type));
}
