/* half.h - IEEE binary16 to f32, exactly (files only: nothing here computes in binary16).
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_HALF_H
#define QERL_HALF_H
#include "lib/base/sys.h"

KERN_FN float f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exp = (uint32_t)h >> 10 & 31, man = h & 0x3ffu;
    union { uint32_t u; float f; } v;
    if (exp == 31) v.u = sign | 0x7f800000u | man << 13;
    else if (exp) v.u = sign | (exp + 112) << 23 | man << 13;
    else {
        v.f = (float)man * 0x1p-24f;                 /* subnormals and zero: exact */
        v.u |= sign;
    }
    return v.f;
}
#endif
