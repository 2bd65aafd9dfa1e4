/* lang.h - the .pipe language: text files in, a flat list of values, stages and links out, each
 * with its origin.
 *
 * Knows: lines, sections, base files, '=', '+=', 'unset', --set, which file and line said what.
 * Does not know: which keys exist, what a stage is able to do, whether a value makes sense
 * (resolve.h does). A value's name is "section.key"; in [stage learner] the section is "learner".
 * Nothing is printed here and reading never stops at an error: all of them are collected and
 * lang_print_errors shows them in order of file and line. Ownership: everything lent by a struct
 * lang lives until lang_release.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_LANG_H
#define QERL_LANG_H
#include "lib/base/str.h"

enum {
    LANG_DEPTH_MAX = 8,
    LANG_FILE_BYTES_MAX = 1 << 20,
    LANG_LINE_MAX = 8192,
    LANG_ERRORS_MAX = 200
};

struct origin {
    /* as the user wrote it; "--set" for the command line, "default" for a stage's default */
    const char *file;
    int line;                    /* 0 where there is none */
};
struct lang_value {
    const char *name, *text;     /* "learner.lr", "1e-5" */
    struct origin at;
};
/* from.from_port -> to.to_port : from_kind/to_kind credit=N hwm=N */
struct lang_link {
    const char *from, *from_port, *to, *to_port, *from_kind, *to_kind;
    int credit, hwm;             /* -1 = not given */
    struct origin at;
};
struct lang_stage {
    const char *name;
    struct origin at;
};
struct lang_error {
    struct origin at;
    char *text;
};
struct lang {
    const char *path;
    struct lang_value *value; int values;
    struct lang_link *link; int links;
    struct lang_stage *stage; int stages;
    struct lang_error *error; int errors;
    /* in the order they were opened: errors are printed in it */
    const char **file; int files;
    char **kept; int kepts;
};

/* Reads `path` and its bases, then applies sets[n] ("section.key=value"). Problems are in l->error
 * afterwards. */
void lang_read(struct lang *l, const char *path, const char *const *sets, int n);
void lang_release(struct lang *l);
const struct lang_value *lang_get(const struct lang *l, const char *name);     /* NULL = not set */
const struct lang_stage *lang_stage_named(const struct lang *l, const char *name);
void lang_error(struct lang *l, struct origin at, const char *fmt, ...) PRINTF_LIKE(3, 4);
/* "file:line: message" lines, sorted; `out` gets them all. */
void lang_print_errors(struct lang *l, struct str *out);
/* a copy that lives as long as l */
const char *lang_keep(struct lang *l, const char *text, size_t bytes);
void origin_text(char *out, size_t size, struct origin at); /* "file:line", "--set", "default" */
#endif
