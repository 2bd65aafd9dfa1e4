/* avx512.c - placeholder of the avx512 path: fills nothing yet, so the reference runs.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cpu.h"
void kern_avx512_fill(struct kern *k) { (void)k; }
