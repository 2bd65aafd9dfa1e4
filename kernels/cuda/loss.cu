/* loss.cu - what follows the logits: log-probs of given tokens, a block a row, and their backward.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cuda/softmax.cuh"

enum { LOSS_THREADS = 256 };

__global__ static void __launch_bounds__(ROW_THREADS) logprob_kernel(struct kern_logprob a) {
    __shared__ struct row_buf buf;
    const size_t r = blockIdx.x;
    const float *logits = (const float *)a.logits.p + r * (size_t)a.vocab;
    const float most = row_most(logits, a.vocab, &buf);
    float tilt;
    const float sum = row_sum(logits, a.vocab, a.inv_temp, most, NULL, &tilt, &buf);
    if (threadIdx.x) return;
    const float log_sum = kern_logf(sum), lse = most * a.inv_temp + log_sum;
    ((float *)a.lp.p)[r] = logits[((const int32_t *)a.targets.p)[r]] * a.inv_temp - lse;
    if (a.lse.p) ((float *)a.lse.p)[r] = lse;
    if (a.entropy.p) ((float *)a.entropy.p)[r] = log_sum - tilt / sum;
}

void cuda_logprob(struct kern *k, const struct kern_logprob *a) {
    if (a->rows <= 0) return;
    LAUNCH(logprob_kernel, (unsigned)a->rows, ROW_THREADS, 0, cuda_stream(k), *a);
    CUDA_TRY(k, "logprob", cudaGetLastError());
}

__global__ static void __launch_bounds__(LOSS_THREADS)
    logprob_bwd_kernel(struct kern_logprob_bwd a) {
    const size_t i = cuda_index(), r = i / (size_t)a.vocab;
    if (r >= (size_t)a.rows) return;
    float *logits = (float *)a.logits.p;
    const float coef = ((const float *)a.coef.p)[r] * a.inv_temp;
    const float p = kern_expf(logits[i] * a.inv_temp - ((const float *)a.lse.p)[r]);
    const bool target = (size_t)((const int32_t *)a.targets.p)[r] == i % (size_t)a.vocab;
    logits[i] = coef * ((target ? 1.0f : 0.0f) - p);
}

void cuda_logprob_bwd(struct kern *k, const struct kern_logprob_bwd *a) {
    const size_t n = (size_t)a->rows * (size_t)a->vocab;
    if (a->rows <= 0) return;
    LAUNCH(logprob_bwd_kernel, cuda_blocks(n, LOSS_THREADS), LOSS_THREADS, 0, cuda_stream(k), *a);
    CUDA_TRY(k, "logprob_bwd", cudaGetLastError());
}
