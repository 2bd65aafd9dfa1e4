/* tiny.h - `matrix --tiny`: any training pipeline on the embedded model in seconds.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_TINY_H
#define QERL_TINY_H
#include "pipe/resolve.h"

enum { TINY_SETS_MAX = 40 };
/* The options that shrink p, in the form of --set; lent until p is released. Returns how many. */
int tiny_sets(struct pipeline *p, const char *set[TINY_SETS_MAX]);
#endif
