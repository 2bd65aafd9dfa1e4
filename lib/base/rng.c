/* rng.c - see rng.h. Known answers are in tests/unit/rng.c.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/rng.h"

#include <math.h>

void rng_key(uint32_t key[2], uint64_t seed, enum rng_purpose purpose, uint64_t stream) {
    const uint32_t counter[4] = { (uint32_t)stream, (uint32_t)(stream >> 32), (uint32_t)purpose,
                                  0x716572u };
    const uint32_t seed_key[2] = { (uint32_t)seed, (uint32_t)(seed >> 32) };
    struct rng4 r = rng_philox(counter, seed_key);
    key[0] = r.v[0];
    key[1] = r.v[1];
}

void rng_normal4(double out[4], struct rng4 r) {
    for (int i = 0; i < 4; i += 2) {
        double u = ((double)r.v[i] + .5) * 0x1p-32, v = ((double)r.v[i + 1] + .5) * 0x1p-32;
        double radius = sqrt(-2. * log(u)), angle = 6.283185307179586476925286766559 * v;
        out[i] = radius * cos(angle);
        out[i + 1] = radius * sin(angle);
    }
}

uint64_t rng_mix64(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}
