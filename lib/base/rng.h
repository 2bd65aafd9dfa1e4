/* rng.h - Philox4x32-10 (Salmon et al., SC11): every draw is a pure function of a key and a
 * counter. No generator state exists, so nothing has to be saved and any draw can be made again.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_RNG_H
#define QERL_RNG_H
#include "lib/base/sys.h"

/* part of every key, so that no two uses share a stream; never renumber */
enum rng_purpose {
    RNG_PURPOSE_SAMPLE = 1,       /* tokens of training rollouts */
    RNG_PURPOSE_AQN = 2,          /* noise on weights */
    RNG_PURPOSE_LORA_INIT = 3,
    RNG_PURPOSE_PERMUTE = 4,      /* order of the questions in an epoch */
    RNG_PURPOSE_EVAL = 5,         /* sampled evaluation */
    RNG_PURPOSE_OP_NOISE = 6,     /* operator noise */
    RNG_PURPOSE_SHUFFLE = 7,      /* order inside an update, where asked for */
    RNG_PURPOSE_FAULT = 8,        /* tests only */
};

struct rng4 { uint32_t v[4]; };

KERN_FN struct rng4 rng_philox(const uint32_t counter[4], const uint32_t key[2]) {
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)c0 * 0xD2511F53u, p1 = (uint64_t)c2 * 0xCD9E8D57u;
        uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
        c0 = n0;
        c2 = n2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    struct rng4 r = { { c0, c1, c2, c3 } };
    return r;
}
/* Key of a stream: mixes a 64-bit seed, a purpose and a 64-bit stream number (step, version, ...)
 * by one Philox call. */
void rng_key(uint32_t key[2], uint64_t seed, enum rng_purpose purpose, uint64_t stream);
/* Top 24 bits as a float in [0, 1). */
KERN_FN float rng_unit(uint32_t x) { return (float)(x >> 8) * 0x1p-24f; }
/* Box-Muller on (v0,v1) and (v2,v3), u = (x + .5) * 2^-32: cos, sin, cos, sin. Standard normal, in
 * double. */
void rng_normal4(double out[4], struct rng4 r);
uint64_t rng_mix64(uint64_t x);   /* splitmix64 finaliser: a good 64-bit hash of one word */
#endif
