/* loss.h - what follows the logits: log-probs, their backward, draws. Parts own rows.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_SIMD_LOSS_H
#define QERL_SIMD_LOSS_H
#include "kernels/simd/rows.h"

static float simd_row_most(const float *logits, int vocab) {
    vf most = v_set(-INFINITY);
    for (int i = 0; i < vocab; i += 16) {
        int n = v_left(i, vocab);
        vf x = v_load_n(logits + i, n);
        most = v_max(n == 16 ? x : v_pick(x, most, n), most);
    }
    return v_fold_max(most);
}

static float simd_row_sum(const float *logits, int vocab, float inv_temp, float most, float *blocks,
                          float *tilt) {
    vf all = v_zero(), turn = v_zero(), inv = v_set(inv_temp), zmost = v_set(most * inv_temp);
    for (int b = 0; b < vocab; b += CPU_BLOCK) {
        int end = vocab - b < CPU_BLOCK ? vocab : b + CPU_BLOCK;
        vf part = v_zero();
        for (int i = b; i < end; i += 16) {
            int n = v_left(i, end);
            vf d = v_sub(v_mul(v_load_n(logits + i, n), inv), zmost), e = v_exp(d);
            all = v_add_n(all, e, n);
            part = v_add_n(part, e, n);
            if (tilt) turn = v_fma_n(e, v_zero_unless_positive(e, d), turn, n);
        }
        if (blocks) blocks[b / CPU_BLOCK] = v_fold(part);
    }
    if (tilt) *tilt = v_fold(turn);
    return v_fold(all);
}

static void logprob_part(void *arg, int part, int parts) {
    ROWS_RANGE(logprob, a->rows);
    for (; row < end; row++) {
        const float *logits = (const float *)a->logits.p + row * (size_t)a->vocab;
        float most = simd_row_most(logits, a->vocab), tilt = 0.0f;
        float sum = simd_row_sum(logits, a->vocab, a->inv_temp, most, NULL,
                                 a->entropy.p ? &tilt : NULL);
        float log_sum = kern_logf(sum), lse = most * a->inv_temp + log_sum;
        ((float *)a->lp.p)[row] = logits[((const int32_t *)a->targets.p)[row]] * a->inv_temp - lse;
        if (a->lse.p) ((float *)a->lse.p)[row] = lse;
        if (a->entropy.p) ((float *)a->entropy.p)[row] = log_sum - tilt / sum;
    }
}
ROWS_OP(logprob, a->rows, a->vocab * 4)

static void logprob_bwd_part(void *arg, int part, int parts) {
    ROWS_RANGE(logprob_bwd, a->rows);
    for (; row < end; row++) {
        float *logits = (float *)a->logits.p + row * (size_t)a->vocab;
        float coef = ((const float *)a->coef.p)[row] * a->inv_temp,
              lse = ((const float *)a->lse.p)[row];
        int target = ((const int32_t *)a->targets.p)[row];
        float at_target = coef * (1.0f - kern_expf(logits[target] * a->inv_temp - lse));
        for (int i = 0; i < a->vocab; i += 16) {
            int n = v_left(i, a->vocab);
            vf p = v_exp(v_sub(v_mul(v_load_n(logits + i, n), v_set(a->inv_temp)), v_set(lse)));
            v_store_n(logits + i, v_mul(v_set(coef), v_sub(v_zero(), p)), n);
        }
        logits[target] = at_target;
    }
}
ROWS_OP(logprob_bwd, a->rows, a->vocab * 4)

static void sample_part(void *arg, int part, int parts) {
    ROWS_RANGE(sample, a->rows);
    for (; row < end; row++) cpu_sample_row(a, (int)row, simd_row_most, simd_row_sum);
}
ROWS_OP(sample, a->rows, a->vocab * 8)
#endif
