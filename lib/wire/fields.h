/* fields.h - inside lib/wire only: the tables of fields that drive every form of a record.
 *
 * One row says name, kind, place in the C struct, limits, and what JSON may leave out. MessagePack
 * leaves nothing out: every row of the table is there exactly once, so a frame of another version
 * cannot be read half.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_FIELDS_H
#define QERL_FIELDS_H
#include "lib/wire/rec.h"

enum field_kind {
    FIELD_TEXT,        /* char *            str            "text" */
    FIELD_INT,         /* int64_t           int            number */
    FIELD_SEED,        /* uint64_t          uint           number; decimal string above INT64_MAX */
    /* double            float64        number, shortest that reads back the same */
    FIELD_NUM,
    FIELD_FLAG,        /* bool              bool           true, false */
    FIELD_I32,         /* struct rec_i32    bin            [numbers], each >= 0 */
    FIELD_F32,         /* struct rec_f32    bin            [numbers], finite */
    FIELD_I64,         /* int64_t * + int   bin            [numbers], each >= 0 */
    FIELD_TREATMENT,   /* struct            map            {} */
    FIELD_SAMPLES,     /* array of structs  array of maps  [{}] */
};

struct field {
    const char *name;              /* NULL ends a table */
    enum field_kind kind;
    size_t at;                     /* offset in the struct */
    size_t count_at;               /* FIELD_I64, FIELD_SAMPLES: offset of the int that counts */
    bool need;                     /* JSON must have it */
    bool later;                    /* FIELD_TEXT: records of version 1 lack it; "" then */
    bool numbered;                 /* absent in JSON: the number of the line, from 0 (FIELD_INT) */
    int64_t least, most;           /* FIELD_INT; both 0 = 0 .. 2^53 */
    double def;                    /* FIELD_INT, FIELD_NUM absent in JSON */
    const char *text;              /* FIELD_TEXT absent in JSON; NULL = "" */
    const char *choices;           /* FIELD_TEXT: "a|b|c" and nothing else; NULL = any */
    const struct field *sub;       /* FIELD_TREATMENT, FIELD_SAMPLES: fields of each */
};
enum { FIELDS_MAX = 64 };          /* rows of a table: one bit each in "seen" */

const struct field *field_table(enum rec_type type);
const struct field *field_find(const struct field *table, const char *name, size_t bytes);
void field_release(void *base, const struct field *table);
bool field_in_choices(const char *choices, const char *word, size_t bytes);
int64_t field_least(const struct field *f);
int64_t field_most(const struct field *f);
/* REC_NONE if there is no such record */
enum rec_type rec_type_of(const char *name, size_t bytes);
/* bytes of the valid character at p; 0 = broken here */
size_t utf8_good(const char *p, const char *end);
/* Rules between fields, the same for what is read and what is written. */
int rec_rules(const struct rec *r, struct err *e);
/* rec_from_json that knows which line of a file it reads (from 0). */
int rec_from_json_line(struct rec *r, const char *line, size_t bytes, enum rec_type expected,
                       const char *where, int64_t number, struct err *e);

/* Typed views of a row's value; one place for the casts. */
static inline char **at_text(void *b, const struct field *f) {
    return (char **)((char *)b + f->at);
}
static inline int64_t *at_int(void *b, const struct field *f) {
    return (int64_t *)((char *)b + f->at);
}
static inline uint64_t *at_seed(void *b, const struct field *f) {
    return (uint64_t *)((char *)b + f->at);
}
static inline double *at_num(void *b, const struct field *f) {
    return (double *)((char *)b + f->at);
}
static inline bool *at_flag(void *b, const struct field *f) { return (bool *)((char *)b + f->at); }
static inline struct rec_i32 *at_i32(void *b, const struct field *f) {
    return (struct rec_i32 *)((char *)b + f->at);
}
static inline struct rec_f32 *at_f32(void *b, const struct field *f) {
    return (struct rec_f32 *)((char *)b + f->at);
}
static inline int64_t **at_i64(void *b, const struct field *f) {
    return (int64_t **)((char *)b + f->at);
}
static inline struct rec_sample **at_samples(void *b, const struct field *f) {
    return (struct rec_sample **)((char *)b + f->at);
}
static inline int *at_count(void *b, const struct field *f) {
    return (int *)((char *)b + f->count_at);
}
/* Writers read through the same views; they never write. */
static inline void *rec_body(const struct rec *r) { return (void *)(uintptr_t)&r->ticket; }
#endif
