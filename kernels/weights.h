/* weights.h - operations on whole packed weights: their rows as plain numbers, and AQN's noise.
 *
 * Included by kern.h. kernels/ref/weights.c is the text; every path gives its bits.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_KERN_WEIGHTS_H
#define QERL_KERN_WEIGHTS_H

/* Rows first .. first + rows - 1 of w, and f32 [rows, in]. unpack: values = w.scale * what the
 * records hold. pack_rows: the other way, into a BF16 (rounded once) or F32 weight; first is a
 * multiple of KERN_OUT_BLOCK, and so is rows unless they end the weight, whose padding is zeroed
 * then. */
struct kern_weight_rows { struct kern_weight w; kptr values; int first, rows; };

/* dW of a weight: to[o,i] = bf16(f32(sd * z)), z standard normal in double (kernels/normal.h):
 * with at = o * in + i, number at % 4 of counter { at / 4 (its low 32 bits), tensor, 0, 0 }.
 * What was done is measured beside what it was done to, w with its scale. Of each row o, summed in
 * double over i ascending from +0, squares[3 o + ...]: */
enum kern_weight_square {
    KERN_WEIGHT_NOISE,                   /* dW^2 */
    KERN_WEIGHT_SCALED,                  /* (dW / times)^2 */
    KERN_WEIGHT_VALUE,                   /* w^2 */
    KERN_WEIGHT_SQUARES
};
/* and added to counts[]: how many elements */
enum kern_weight_count {
    KERN_WEIGHT_CHANGED,                 /* f32(w + dW) is not w */
    KERN_WEIGHT_CHANGED_BF16,            /* nor is it when both are rounded to bf16 */
    KERN_WEIGHT_COUNTS
};
struct kern_weight_noise {
    struct kern_weight w, to;            /* to: BF16 or F32, of w's shape; all is written */
    double sd, times;
    uint32_t key[2], tensor;
    kptr squares;                        /* double [out, KERN_WEIGHT_SQUARES] */
    kptr counts;                         /* int64 [KERN_WEIGHT_COUNTS] */
};
#endif
