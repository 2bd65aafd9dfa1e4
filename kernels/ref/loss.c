/* loss.c - the reference for what follows the logits (log-probs, their backward) and what follows
 * the gradient (AdamW).
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cpu.h"

static float ref_row_most(const float *logits, int vocab) {
    float most = -INFINITY;
    for (int i = 0; i < vocab; i++) most = logits[i] > most ? logits[i] : most;
    return most;
}

static float ref_row_sum(const float *logits, int vocab, float inv_temp, float most, float *blocks,
                         float *tilt) {
    float all[16] = { 0 }, turn[16] = { 0 }, zmost = most * inv_temp;
    for (int b = 0; b < vocab; b += CPU_BLOCK) {
        int end = vocab - b < CPU_BLOCK ? vocab : b + CPU_BLOCK;
        float part[16] = { 0 };
        for (int i = b; i < end; i++) {
            float d = logits[i] * inv_temp - zmost, e = kern_expf(d);
            all[i & 15] += e;
            part[i & 15] += e;
            turn[i & 15] = fmaf(e, e > 0.0f ? d : 0.0f, turn[i & 15]);   /* 0 * -inf would be NaN */
        }
        if (blocks) blocks[b / CPU_BLOCK] = kern_fold16(part);
    }
    if (tilt) *tilt = kern_fold16(turn);
    return kern_fold16(all);
}

void ref_logprob(struct kern *k, const struct kern_logprob *a) {
    (void)k;
    for (int r = 0; r < a->rows; r++) {
        const float *logits = (const float *)a->logits.p + (size_t)r * (size_t)a->vocab;
        float most = ref_row_most(logits, a->vocab), tilt;
        float sum = ref_row_sum(logits, a->vocab, a->inv_temp, most, NULL, &tilt),
              log_sum = kern_logf(sum);
        float lse = most * a->inv_temp + log_sum;
        ((float *)a->lp.p)[r] = logits[((const int32_t *)a->targets.p)[r]] * a->inv_temp - lse;
        if (a->lse.p) ((float *)a->lse.p)[r] = lse;
        if (a->entropy.p) ((float *)a->entropy.p)[r] = log_sum - tilt / sum;
    }
}

void ref_logprob_bwd(struct kern *k, const struct kern_logprob_bwd *a) {
    (void)k;
    for (int r = 0; r < a->rows; r++) {
        float *logits = (float *)a->logits.p + (size_t)r * (size_t)a->vocab;
        float lse = ((const float *)a->lse.p)[r],
              coef = ((const float *)a->coef.p)[r] * a->inv_temp;
        int target = ((const int32_t *)a->targets.p)[r];
        for (int i = 0; i < a->vocab; i++) {
            float p = kern_expf(logits[i] * a->inv_temp - lse);
            logits[i] = coef * ((i == target ? 1.0f : 0.0f) - p);
        }
    }
}

void ref_sample(struct kern *k, const struct kern_sample *a) {
    (void)k;
    for (int r = 0; r < a->rows; r++) cpu_sample_row(a, r, ref_row_most, ref_row_sum);
}

void ref_adamw(struct kern *k, const struct kern_adamw *a) {
    (void)k;
    float *p = a->p.p, *m = a->m.p, *v = a->v.p;
    const float *grad = a->g.p;
    float decay = -(a->lr * a->wd), c1 = 1.0f - a->b1, c2 = 1.0f - a->b2;
    for (size_t i = 0; i < a->n; i++) {
        float g = grad[i] * a->g_scale, x = fmaf(decay, p[i], p[i]);
        m[i] = fmaf(a->b1, m[i], c1 * g);
        v[i] = fmaf(a->b2, v[i], c2 * g * g);
        float step = m[i] * a->m_scale / (sqrtf(v[i] * a->v_scale) + a->eps);
        p[i] = fmaf(-a->lr, step, x);
    }
}

/* Windows of blocks, so that the sums of a window fit on the stack and its blocks can be shared
 * out. */
enum { SQUARES_BLOCK = 4096, SQUARES_WINDOW = 256 };
struct squares { const float *x; size_t n; double sum[SQUARES_WINDOW]; };

static void squares_block(void *arg, int part, int parts) {
    (void)parts;
    struct squares *s = arg;
    size_t from = (size_t)part * SQUARES_BLOCK,
           to = s->n - from < SQUARES_BLOCK ? s->n : from + SQUARES_BLOCK;
    double lane[8] = { 0 };
    for (size_t i = from; i < to; i++) lane[i & 7] += (double)s->x[i] * (double)s->x[i];
    s->sum[part] = ((lane[0] + lane[4]) + (lane[2] + lane[6])) +
                   ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

double ref_sum_squares(struct kern *k, kptr x, size_t n) {
    double sum = 0.0;
    for (size_t at = 0; at < n; at += (size_t)SQUARES_BLOCK * SQUARES_WINDOW) {
        struct squares s = { .x = (const float *)x.p + at, .n = n - at };
        size_t most = (size_t)SQUARES_BLOCK * SQUARES_WINDOW;
        if (s.n > most) s.n = most;
        int blocks = (int)((s.n + SQUARES_BLOCK - 1) / SQUARES_BLOCK);
        cpu_run(k, blocks, squares_block, &s);
        for (int b = 0; b < blocks; b++) sum += s.sum[b];
    }
    return sum;
}
