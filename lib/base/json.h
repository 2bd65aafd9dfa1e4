/* json.h - jansson, with the checks that every reader here wants: one line of error that names
 * file, line and field.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_JSON_H
#define QERL_JSON_H
#include "lib/base/err.h"
#include "lib/base/str.h"

#include <jansson.h>

/* Strict parse of one whole value (duplicates refused). The caller owns the result (json_decref).
 * NULL on error, with "WHERE:line:column: what". */
json_t *json_parse(const char *text, size_t bytes, const char *where, struct err *e);
json_t *json_parse_file(const char *path, size_t bytes_max, struct err *e);

/* Fields of an object: -1 and "WHERE: field 'x' ..." when absent or of another type. Strings are
 * lent by the object. */
int json_need_str(const json_t *o, const char *key, const char **out, const char *where,
                  struct err *e);
int json_need_int(const json_t *o, const char *key, int64_t *out, int64_t least, int64_t most,
                  const char *where, struct err *e);
int json_need_num(const json_t *o, const char *key, double *out, const char *where, struct err *e);
/* As above, but an absent (or null) field leaves *out as it was. */
int json_may_str(const json_t *o, const char *key, const char **out, const char *where,
                 struct err *e);
int json_may_int(const json_t *o, const char *key, int64_t *out, int64_t least, int64_t most,
                 const char *where, struct err *e);
int json_may_num(const json_t *o, const char *key, double *out, const char *where, struct err *e);
int json_may_bool(const json_t *o, const char *key, bool *out, const char *where, struct err *e);

void json_quote(struct str *out, const char *text,
                size_t bytes); /* "text" with escapes; invalid UTF-8 becomes U+FFFD */
#endif
