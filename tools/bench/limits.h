/* limits.h - what this machine, or a device of it, can do at most, measured by short probes, and
 * what follows for the product's work. Formulas: docs/benchmarks.md.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_BENCH_LIMITS_H
#define QERL_BENCH_LIMITS_H
#include "tools/bench/shapes.h"

enum { LIMITS_READ_COUNT = 5 };
struct limits {
    double hertz;                        /* one thread busy; a device: 0, not asked for */
    double flops;                        /* all threads, by what the path multiplies with */
    const char *by;                      /* that instruction: "VDPBF16PS", ... */
    double chip;                         /* a device's peak, by whatever means; else 0 */
    int tile_rows;      /* rows that cost as much as one: 16 with AMX, 8 on tensor cores, else 1 */
    int threads;
    bool shared_core;                    /* two threads were hardly faster than one */
    struct { double bytes, per_second; } read[LIMITS_READ_COUNT];   /* all threads, by size */
};

/* What a piece of work moves, computes and unpacks at least: bytes, FLOPs, 4-bit weights that
 * become bf16 first. */
struct work { double bytes, flops, coded; };

/* Bytes a second for a working set of this size: between probed sizes linear in its logarithm. */
double limits_read(const struct limits *l, double bytes);
/* 4-bit weights a second that can become bf16: 512 in 60 cycles on each thread. On a device nobody
 * asked: more than can be counted. */
double limits_unpack(const struct limits *l);
/* Seconds: the larger of moving `bytes` and of `flops`. */
double limits_roof(const struct limits *l, double bytes, double flops);
/* The larger of that and of unpacking. */
double limits_seconds(const struct limits *l, const struct work *w);

/* n sequences in groups of at most 8 sharing `prompt` tokens, `own` tokens each; LoRA active.
 * head_bytes: of one weight of the head. One decode step. */
struct work limits_decode(const struct limits *l, const struct shape_size *s, int n, int prompt,
                          int own, double head_bytes);
/* FLOPs of one trained token: sequences of `tokens`, `scored` of them in the loss. */
double limits_train_flops(const struct shape_size *s, double tokens, double scored);
/* `rows` prompt rows at average position `position`, logits of `wants` of them. */
struct work limits_prefill(const struct shape_size *s, int rows, int position, int wants);
extern const double limits_mxfp4_bytes;  /* of one weight: 272 / 512 */
#endif
