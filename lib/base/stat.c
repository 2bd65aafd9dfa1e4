/* stat.c - see stat.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/stat.h"

#include <math.h>

void stat_interval(int64_t right, int64_t n, double *low, double *high) {
    *low = 0;
    *high = 1;
    if (n <= 0) return;
    const double z = 1.959963984540054;              /* 97.5 % point of the standard normal */
    double p = (double)right / (double)n, m = (double)n;
    double middle = (p + z * z / (2 * m)) / (1 + z * z / m);
    double half = z / (1 + z * z / m) * sqrt(p * (1 - p) / m + z * z / (4 * m * m));
    *low = right == 0 ? 0 : middle - half;
    *high = right == n ? 1 : middle + half;
}
