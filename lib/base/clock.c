/* clock.c - see clock.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/sys.h"

#include "lib/base/clock.h"

#include <time.h>

double clock_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
