/* gpus.h - the list in CUDA_VISIBLE_DEVICES: words between commas, numbers or names, which CUDA
 * reads up to the first that is empty or negative ("-1" is the usual way to say none).
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_GPUS_H
#define QERL_GPUS_H
#include "lib/base/sys.h"

enum { GPUS_WORD_MAX = 200 };
int gpus_count(const char *list);
/* The n-th, from 0; -1 where there are fewer, or it is too long. */
int gpus_word(char out[GPUS_WORD_MAX], const char *list, int n);
#endif
