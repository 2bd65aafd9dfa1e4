/* rec_any.h - records of any type filled by their tables, and compared bit by bit. For tests only.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_REC_ANY_H
#define QERL_REC_ANY_H
#include "lib/wire/rec.h"

/* xorshift: tests must not depend on lib/base/rng.c */
struct any { uint64_t state; };
uint64_t any_bits(struct any *a);
void any_fill(struct rec *r, enum rec_type type, struct any *a);
/* NULL when equal, else the name of the first field that differs. Floats by bits; NULL text equals
 * "". */
const char *any_differs(const struct rec *x, const struct rec *y);
#endif
