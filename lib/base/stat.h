/* stat.h - what an accuracy is worth.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_STAT_H
#define QERL_STAT_H
#include "lib/base/sys.h"

/* 95 % Wilson score interval of right/n, both ends in [0, 1]; n = 0 gives 0, 1. */
void stat_interval(int64_t right, int64_t n, double *low, double *high);
#endif
