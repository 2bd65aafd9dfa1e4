/* synth.h - a model of a given shape with random weights, made in memory in a moment.
 *
 * All goes through the table, so that it may lie on a device: some 18 MB are made on the host, the
 * rest are copies of them. Weights are random codes and scales of the size that keeps activations
 * near 1: never zeros, never subnormal. Memory that the table gives to a net is filled with
 * ordinary numbers too, so that keys and values which were never computed are still fair to read.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_BENCH_SYNTH_H
#define QERL_BENCH_SYNTH_H
#include "lib/model/net.h"
#include "tools/bench/shapes.h"

struct synth {
    enum shape shape;
    struct model model;                  /* MXFP4 body, bf16 embedding and head */
    struct kern_weight head_bf16, head_mxfp4;
    struct kern kern;                    /* the bench's table with another alloc */
    void *memory;                        /* all weights, where the host computes */
    kptr device;                         /* or there */
};
/* Bytes of the weights of this shape. The embedding is the head, whether the model ties them or
 * not. */
size_t synth_bytes(enum shape m);
/* Takes threads and paths from `k`. */
int synth_open(struct synth **out, enum shape m, const struct kern *k, bool device,
               struct err *e);
void synth_close(struct synth **s);
/* Ordinary numbers, as bf16 pairs or as f32, in the backend's memory. */
void synth_fill(struct kern *k, kptr p, size_t bytes);
void synth_head(struct synth *s, bool mxfp4);
/* An adapter whose A and B are both random. */
struct lora *synth_lora(const struct synth *s, int rank);

/* Every operator of the model, forward and backward, Gaussian noise of 5 % in every phase. */
int synth_noise(const struct synth *s, struct noise_plan *p, struct err *e);

/* Between begin and end operations that compute do nothing: a net's slots get their positions, at
 * the price of its bookkeeping. */
void synth_skip_begin(struct synth *s, struct kern *kept);
void synth_skip_end(struct synth *s, const struct kern *kept);
#endif
