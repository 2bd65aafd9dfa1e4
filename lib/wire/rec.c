/* rec.c - what a record is made of: the tables of fields, and what follows from them alone.
 *
 * Knows: names, kinds, limits and JSON defaults of every field; rules between fields; how to free a
 * record. Does not know: bytes (rec_pack.c), text (rec_json.c).
 * Order: tables, look-ups, release, rules, check.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/wire/rec.h"

#include <math.h>

#include "lib/wire/fields.h"

const char *const rec_name[REC_TYPE_COUNT] = { "none",    "ticket", "traj",   "group",
                                               "ack",     "nack",   "end",    "want",
                                               "adapter", "score",  "answer", "beat" };

#define TEXT(s, m, ...) { .name = #m, .kind = FIELD_TEXT, .at = offsetof(struct s, m), __VA_ARGS__ }
#define INT(s, m, ...) { .name = #m, .kind = FIELD_INT, .at = offsetof(struct s, m), __VA_ARGS__ }
#define SEED(s, m) { .name = #m, .kind = FIELD_SEED, .at = offsetof(struct s, m) }
#define NUM(s, m, ...) { .name = #m, .kind = FIELD_NUM, .at = offsetof(struct s, m), __VA_ARGS__ }
#define FLAG(s, m) { .name = #m, .kind = FIELD_FLAG, .at = offsetof(struct s, m) }
#define I32(s, m, ...) { .name = #m, .kind = FIELD_I32, .at = offsetof(struct s, m), __VA_ARGS__ }
#define F32(s, m, ...) { .name = #m, .kind = FIELD_F32, .at = offsetof(struct s, m), __VA_ARGS__ }
#define IDS(s, m, n, ...)                                                                          \
    {                                                                                              \
        .name = #m, .kind = FIELD_I64, .at = offsetof(struct s, m),                                \
        .count_at = offsetof(struct s, n), __VA_ARGS__                                             \
    }
#define TREATMENT(s, m) { .name = #m, .kind = FIELD_TREATMENT, .at = offsetof(struct s, m), .sub = treatment_fields }
#define LAST { .name = NULL }
#define NEED .need = true
#define RANGE(a, b) .least = (a), .most = (b)

static const struct field treatment_fields[] = {
    TEXT(rec_treatment, hash), NUM(rec_treatment, sigma), SEED(rec_treatment, noise_seed),
    TEXT(rec_treatment, ops, .text = "none"), LAST,
};

static const struct field ticket_fields[] = {
    TEXT(rec_ticket, run),
    INT(rec_ticket, fence),
    INT(rec_ticket, step),
    INT(rec_ticket, group, .numbered = true),
    TEXT(rec_ticket, question_id),
    TEXT(rec_ticket, prompt),
    I32(rec_ticket, prompt_ids),
    TEXT(rec_ticket, question),
    TEXT(rec_ticket, answer),
    INT(rec_ticket, samples, RANGE(0, REC_SAMPLES_MAX)),
    INT(rec_ticket, new_max, RANGE(0, REC_TOKENS_MAX)),
    NUM(rec_ticket, temperature, .def = -1),
    NUM(rec_ticket, top_p, .def = 1),
    INT(rec_ticket, top_k, RANGE(0, REC_TOKENS_MAX)),
    SEED(rec_ticket, seed),
    INT(rec_ticket, version),
    TEXT(rec_ticket, adapter),
    TEXT(rec_ticket, adapter_sha256),
    TREATMENT(rec_ticket, treatment),
    LAST,
};

/* What a rollout knows of a sample, and what the reward stage adds. Only the need of JSON differs:
 * a reader of hand-written trajectories wants a text, a learner wants ids and a score. */
#define SAMPLE_MADE(text_need, ids_need)                                                           \
    INT(rec_sample, k, RANGE(0, INT32_MAX), .numbered = true), INT(rec_sample, attempt),           \
        I32(rec_sample, ids, .need = ids_need), F32(rec_sample, lp), F32(rec_sample, lp_raw),      \
        TEXT(rec_sample, stop, .text = "eos", .choices = "eos|stop_string|length"),                \
        TEXT(rec_sample, text, .need = text_need)
static const struct field traj_sample_fields[] = { SAMPLE_MADE(true, false), LAST };
static const struct field group_sample_fields[] = {
    SAMPLE_MADE(false, true),  NUM(rec_sample, score, NEED), NUM(rec_sample, acc),
    NUM(rec_sample, strict),   NUM(rec_sample, flexible),    NUM(rec_sample, format),
    NUM(rec_sample, overlong), TEXT(rec_sample, extracted),  LAST,
};

#define GROUP_FIELDS(answer_need, ids_need, sample_fields)                                         \
    TEXT(rec_group, run), INT(rec_group, fence), INT(rec_group, step),                             \
        INT(rec_group, group, .numbered = true), TEXT(rec_group, question_id),                     \
        TEXT(rec_group, question), TEXT(rec_group, prompt),                                        \
        TEXT(rec_group, answer, .need = answer_need),                                              \
        I32(rec_group, prompt_ids, .need = ids_need), NUM(rec_group, temperature, .def = 1),       \
        NUM(rec_group, top_p, .def = 1), INT(rec_group, top_k, RANGE(0, REC_TOKENS_MAX)),          \
        INT(rec_group, new_max, RANGE(0, REC_TOKENS_MAX)), SEED(rec_group, seed),                  \
        INT(rec_group, version), TEXT(rec_group, adapter_sha256), TREATMENT(rec_group, treatment), \
        NUM(rec_group, sigma_realised), INT(rec_group, noise_elements),                            \
        INT(rec_group, noise_changed), TEXT(rec_group, evidence, .later = true),                  \
        TEXT(rec_group, rollout), TEXT(rec_group, rule), {                                         \
        .name = "samples", .kind = FIELD_SAMPLES, .at = offsetof(struct rec_group, sample),        \
        .count_at = offsetof(struct rec_group, samples), .need = true, .sub = sample_fields        \
    }
static const struct field traj_fields[] = { GROUP_FIELDS(true, false, traj_sample_fields), LAST };
static const struct field group_fields[] = { GROUP_FIELDS(false, true, group_sample_fields), LAST };

static const struct field ack_fields[] = {
    TEXT(rec_ack, run),
    INT(rec_ack, fence),
    IDS(rec_ack, group, groups, NEED),
    TEXT(rec_ack, why),
    LAST,
};
static const struct field end_fields[] = { TEXT(rec_end, run), INT(rec_end, fence),
                                           INT(rec_end, step), LAST };
static const struct field want_fields[] = {
    TEXT(rec_want, rollout, NEED), TEXT(rec_want, incarnation), INT(rec_want, credit, NEED),
    IDS(rec_want, group, groups), LAST,
};
static const struct field adapter_fields[] = {
    TEXT(rec_adapter, run),
    INT(rec_adapter, version, NEED),
    INT(rec_adapter, step),
    TEXT(rec_adapter, path, NEED),
    TEXT(rec_adapter, sha256),
    FLAG(rec_adapter, final),
    TREATMENT(rec_adapter, treatment),
    LAST,
};
static const struct field score_fields[] = {
    TEXT(rec_score, run),
    INT(rec_score, version),
    INT(rec_score, step, NEED),
    TEXT(rec_score, split, NEED),
    INT(rec_score, n, NEED),
    INT(rec_score, right, NEED),
    TEXT(rec_score, rule, NEED),
    INT(rec_score, parsed),
    INT(rec_score, right_strict),
    INT(rec_score, right_flexible),
    TEXT(rec_score, quant),
    TEXT(rec_score, noise),
    TEXT(rec_score, evidence, .later = true),
    INT(rec_score, samples_per_question, .def = 1),
    NUM(rec_score, temperature),
    NUM(rec_score, length_mean),
    NUM(rec_score, truncated),
    NUM(rec_score, low, NEED),
    NUM(rec_score, high, NEED),
    TEXT(rec_score, adapter_sha256),
    TEXT(rec_score, model_sha256),
    TEXT(rec_score, data_sha256),
    TEXT(rec_score, treatment_trained),
    LAST,
};
static const struct field answer_fields[] = {
    TEXT(rec_answer, run),
    INT(rec_answer, version),
    INT(rec_answer, step),
    TEXT(rec_answer, split),
    TEXT(rec_answer, question_id, NEED),
    TEXT(rec_answer, question),
    TEXT(rec_answer, answer, NEED),
    INT(rec_answer, k),
    TEXT(rec_answer, text, NEED),
    TEXT(rec_answer, stop, .text = "eos", .choices = "eos|stop_string|length"),
    INT(rec_answer, tokens),
    NUM(rec_answer, strict),
    NUM(rec_answer, flexible),
    TEXT(rec_answer, quant),
    TEXT(rec_answer, noise),
    LAST,
};
static const struct field beat_fields[] = {
    TEXT(rec_beat, stage, NEED), INT(rec_beat, pid),
    TEXT(rec_beat, state, NEED, .choices = "start|ready|work|wait|done"), TEXT(rec_beat, waits_for),
    INT(rec_beat, progress), INT(rec_beat, step), TEXT(rec_beat, metrics), LAST,
};

static const struct field *const tables[REC_TYPE_COUNT] = {
    [REC_TICKET] = ticket_fields, [REC_TRAJ] = traj_fields,       [REC_GROUP] = group_fields,
    [REC_ACK] = ack_fields,       [REC_NACK] = ack_fields,        [REC_END] = end_fields,
    [REC_WANT] = want_fields,     [REC_ADAPTER] = adapter_fields, [REC_SCORE] = score_fields,
    [REC_ANSWER] = answer_fields, [REC_BEAT] = beat_fields,
};
_Static_assert(COUNT_OF(group_fields) <= FIELDS_MAX && COUNT_OF(score_fields) <= FIELDS_MAX,
               "one bit a field");

const struct field *field_table(enum rec_type type) {
    assert(type > REC_NONE && type < REC_TYPE_COUNT);
    return tables[type];
}

const struct field *field_find(const struct field *table, const char *name, size_t bytes) {
    for (; table->name; table++)
        if (strlen(table->name) == bytes && memcmp(table->name, name, bytes) == 0) return table;
    return NULL;
}

bool field_in_choices(const char *choices, const char *word, size_t bytes) {
    for (const char *p = choices; p; p = strchr(p, '|') ? strchr(p, '|') + 1 : NULL)
        if (strcspn(p, "|") == bytes && memcmp(p, word, bytes) == 0) return true;
    return false;
}

/* 2^53: the whole numbers that every JSON reader keeps exactly. */
int64_t field_least(const struct field *f) { return f->least || f->most ? f->least : 0; }
int64_t field_most(const struct field *f) {
    return f->least || f->most ? f->most : (int64_t)1 << 53;
}

enum rec_type rec_type_of(const char *name, size_t bytes) {
    for (int t = REC_NONE + 1; t < REC_TYPE_COUNT; t++)
        if (strlen(rec_name[t]) == bytes && memcmp(rec_name[t], name, bytes) == 0)
            return (enum rec_type)t;
    return REC_NONE;
}

size_t utf8_good(const char *p, const char *end) {
    unsigned char c = (unsigned char)*p;
    size_t n = c < 0x80 ? 1 : c < 0xE0 ? 2 : c < 0xF0 ? 3 : 4;
    return (size_t)(end - p) >= n && utf8_valid(p, n) ? n : 0;
}

void rec_init(struct rec *r, enum rec_type type) {
    memset(r, 0, sizeof *r);
    r->type = type;
}

void field_release(void *base, const struct field *table) {
    for (const struct field *f = table; f->name; f++) switch (f->kind) {
        case FIELD_TEXT: free(*at_text(base, f)); break;
        case FIELD_I32: free(at_i32(base, f)->v); break;
        case FIELD_F32: free(at_f32(base, f)->v); break;
        case FIELD_I64: free(*at_i64(base, f)); break;
        case FIELD_TREATMENT: field_release((char *)base + f->at, f->sub); break;
        case FIELD_SAMPLES:
            for (int i = 0; i < *at_count(base, f); i++)
                field_release(*at_samples(base, f) + i, f->sub);
            free(*at_samples(base, f));
            break;
        case FIELD_INT: case FIELD_SEED: case FIELD_NUM: case FIELD_FLAG: break;
        }
}

/* A traj may hold what only a group says (its stage filled it in), so both are freed by the group's
 * table. */
void rec_release(struct rec *r) {
    if (r->type != REC_NONE)
        field_release(rec_body(r), field_table(r->type == REC_TRAJ ? REC_GROUP : r->type));
    rec_init(r, REC_NONE);
}

static int sample_rules(const struct rec *r, struct err *e) {
    for (int i = 0; i < r->group.samples; i++) {
        const struct rec_sample *s = &r->group.sample[i];
        if (s->lp.n && s->lp.n != s->ids.n)
            return err_set(e, "%s: samples[%d] has %d log-probs for %d tokens", rec_name[r->type],
                           i, s->lp.n, s->ids.n);
        if (s->lp_raw.n && s->lp_raw.n != s->ids.n)
            return err_set(e, "%s: samples[%d] has %d raw log-probs for %d tokens",
                           rec_name[r->type], i, s->lp_raw.n, s->ids.n);
    }
    return 0;
}

int rec_rules(const struct rec *r, struct err *e) {
    if (r->type == REC_TICKET) {
        const struct rec_ticket *t = &r->ticket;
        if (!t->prompt_ids.n && !(t->prompt && *t->prompt) && !(t->question && *t->question))
            return err_set(e, "ticket: one of 'question', 'prompt' and 'prompt_ids' must be given");
    }
    if (r->type == REC_SCORE) {
        const struct rec_score *s = &r->score;
        if (s->right > s->n || s->parsed > s->n || s->right_strict > s->n ||
            s->right_flexible > s->n)
            return err_set(e, "score: more answers right or parsed than the %lld that were asked",
                           (long long)s->n);
    }
    return r->type == REC_TRAJ || r->type == REC_GROUP ? sample_rules(r, e) : 0;
}

static int check_fields(void *base, const struct field *table, const char *rec, struct err *e);

static int check_arrays(void *base, const struct field *f, const char *rec, struct err *e) {
    int n = f->kind == FIELD_I32   ? at_i32(base, f)->n
            : f->kind == FIELD_F32 ? at_f32(base, f)->n
                                   : *at_count(base, f);
    int most = f->kind == FIELD_SAMPLES ? REC_SAMPLES_MAX : REC_TOKENS_MAX;
    if (n < 0 || n > most)
        return err_set(e, "%s: field '%s' has %d entries, at most %d travel", rec, f->name, n,
                       most);
    for (int i = 0; i < n; i++) {
        if (f->kind == FIELD_I32 && at_i32(base, f)->v[i] < 0)
            return err_set(e, "%s: field '%s'[%d] is negative", rec, f->name, i);
        if (f->kind == FIELD_I64 && (*at_i64(base, f))[i] < 0)
            return err_set(e, "%s: field '%s'[%d] is negative", rec, f->name, i);
        if (f->kind == FIELD_F32 && !isfinite(at_f32(base, f)->v[i]))
            return err_set(e, "%s: field '%s'[%d] is not finite", rec, f->name, i);
        if (f->kind == FIELD_SAMPLES && check_fields(*at_samples(base, f) + i, f->sub, rec, e) < 0)
            return err_wrap(e, "sample %d", i);
    }
    return 0;
}

static int check_fields(void *base, const struct field *table, const char *rec, struct err *e) {
    for (const struct field *f = table; f->name; f++) switch (f->kind) {
        case FIELD_TEXT: {
            const char *t = *at_text(base, f) ? *at_text(base, f) : "";
            if (f->choices && !field_in_choices(f->choices, t, strlen(t)))
                return err_set(e, "%s: field '%s' is '%s', not one of %s", rec, f->name, t,
                               f->choices);
            break;
        }
        case FIELD_INT:
            if (*at_int(base, f) < field_least(f) || *at_int(base, f) > field_most(f))
                return err_set(e, "%s: field '%s' is %lld, outside %lld .. %lld", rec, f->name,
                               (long long)*at_int(base, f), (long long)field_least(f),
                               (long long)field_most(f));
            break;
        case FIELD_NUM:
            if (!isfinite(*at_num(base, f)))
                return err_set(e, "%s: field '%s' is not finite", rec, f->name);
            break;
        case FIELD_I32: case FIELD_F32: case FIELD_I64: case FIELD_SAMPLES:
            if (check_arrays(base, f, rec, e) < 0) return -1;
            break;
        case FIELD_TREATMENT:
            if (check_fields((char *)base + f->at, f->sub, rec, e) < 0) return -1;
            break;
        case FIELD_SEED: case FIELD_FLAG: break;
        }
    return 0;
}

int rec_check(const struct rec *r, struct err *e) {
    if (r->type <= REC_NONE || r->type >= REC_TYPE_COUNT)
        return err_set(e, "a record of no type cannot be sent");
    if (check_fields(rec_body(r), field_table(r->type), rec_name[r->type], e) < 0) return -1;
    return rec_rules(r, e);
}
