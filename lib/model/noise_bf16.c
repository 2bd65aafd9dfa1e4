/* noise_bf16.c - see noise_bf16.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/noise_bf16.h"

#include <math.h>

#include "kernels/noise_math.h"

/* |z| as bf16: from 2^-10, below which r^2 is at most 2^-18, up to 6, which no draw of 24 bits
 * reaches. */
enum { Z_FIRST = 0x3a80, Z_LAST = 0x40c0 };

/* Share of draws between a and b, 0 <= a < b. */
static double share_between(enum kern_noise_type type, double a, double b) {
    if (type == KERN_NOISE_RELATIVE_UNIFORM)
        return (fmin(b, sqrt(3)) - fmin(a, sqrt(3))) / (2 * sqrt(3));
    return (erfc(a / sqrt(2)) - erfc(b / sqrt(2))) / 2;
}

struct moments { double r, r2, r4, size; };

static void add(struct moments *m, const struct kern_noise *n, float t, float z, double share) {
    const float y = kern_noise_add(n, t, z, 0, 0, NULL);
    const double r = (double)(y - t) / ((double)t * (double)n->scale);
    if (share <= 0) return;
    m->r += share * r;
    m->r2 += share * r * r;
    m->r4 += share * r * r * r * r;
    m->size = fmax(m->size, fabs(r));
}

static void take(struct noise_bf16 *to, const struct moments *m) {
    to->r2_least = fmin(to->r2_least, m->r2);
    to->r2_most = fmax(to->r2_most, m->r2);
    to->r_most = fmax(to->r_most, fabs(m->r));
    to->r4_most = fmax(to->r4_most, m->r4);
    to->size_most = fmax(to->size_most, m->size);
}

/* Of one mantissa: all draws, but of type systematic, whose signs nobody draws again, each. */
static void mantissa(struct noise_bf16 *to, const struct kern_noise *n, float t) {
    struct moments m = { 0 };
    if (n->type == KERN_NOISE_SYSTEMATIC || n->type == KERN_NOISE_SPARSE) {
        const bool fixed = n->type == KERN_NOISE_SYSTEMATIC;
        add(&m, n, t, 1, fixed ? 1 : .5);
        if (fixed) take(to, &m), m = (struct moments){ 0 };
        add(&m, n, t, -1, fixed ? 1 : .5);
        take(to, &m);
        return;
    }
    for (uint16_t i = Z_FIRST; i <= Z_LAST; i++) {
        const float z = bf16_to_f32(i);
        const double below = (double)bf16_to_f32((uint16_t)(i - 1)),
                     above = (double)bf16_to_f32((uint16_t)(i + 1)),
                     share = share_between(n->type, ((double)z + below) / 2,
                                           ((double)z + above) / 2);
        add(&m, n, t, z, share);
        add(&m, n, t, -z, share);
    }
    take(to, &m);
}

struct noise_bf16 noise_bf16_of(enum kern_noise_type type, double scale) {
    struct noise_bf16 to = { .r2_least = INFINITY };
    const struct kern_noise n = { .type = type, .scale = (float)scale, .bf16 = true };
    if (!type || !kern_noise_relative(&n)) return (struct noise_bf16){ 0 };
    for (int i = 0; i < 128; i++) mantissa(&to, &n, 1 + (float)i / 128);
    return to;
}
