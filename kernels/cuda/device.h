/* device.h - what the CUDA operations share: the state behind a table, how a call that fails is
 * latched, memory that an operation may use, and the device's form of kernels/cpu.h.
 *
 * An operation queues its kernels on cuda_stream(k) and returns; it reads a kern_* struct on the
 * host and hands it to its kernel by value. Host arrays go up through cuda_small, results come
 * back through cuda_fetch. After each launch: CUDA_TRY(k, "name", cudaGetLastError()).
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_CUDA_DEVICE_H
#define QERL_CUDA_DEVICE_H
#include <cuda_runtime.h>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/plugin.h"
#include "kernels/cuda/ptx.h"
#include "kernels/math.h"
#include "kernels/noise_math.h"
#include "kernels/pack.h"
#include "kernels/quant.h"

/* graph.cu: a kept sequence, and what it was recorded with. */
enum { CUDA_GRAPHS_MAX = 256 };
struct cuda_graph {
    uint64_t key;
    cudaGraphExec_t exec;                /* NULL: nothing is kept here */
    const void *scratch;
};
struct cuda_graphs {
    struct cuda_graph kept[CUDA_GRAPHS_MAX];
    bool recording, spoilt;              /* spoilt: what is recorded cannot be kept */
};

struct cuda_state {
    cudaStream_t stream;                 /* everything of a table runs on it, in order */
    int device;
    void *scratch;                       /* cuda_scratch */
    size_t scratch_bytes;
    char *ring_host, *ring_device;       /* cuda_small: pinned, and its place on the device */
    size_t ring_bytes, ring_at;
    struct cuda_graphs graphs;
    void *blas;                          /* cuBLAS's handle, of the table cuda-blas */
};
static inline struct cuda_state *cuda_of(struct kern *k) {
    return (struct cuda_state *)k->self;
}
/* Its stream, and its device made this thread's current one: every launch and copy asks for it. */
cudaStream_t cuda_stream(struct kern *k);

/* true when rc is cudaSuccess; else k->latched becomes "operation: cudaErrorName: text" unless an
 * earlier error is there. */
bool cuda_ok(struct kern *k, const char *operation, cudaError_t rc);
#define CUDA_TRY(k, operation, call) cuda_ok(k, operation, call)

/* Fills e (NULL: nothing) with the code and a message; -1. */
int cuda_fail(struct err *e, int code, const char *fmt, ...) PRINTF_LIKE(3, 4);

/* Device memory of at least `bytes`, 256-byte aligned, for kernels of the calling operation: one
 * call an operation, valid until the next operation's. It grows, never shrinks, so a step that was
 * run before allocates nothing. NULL after a latched error, and where it would have to grow while
 * a sequence is recorded. */
void *cuda_scratch(struct kern *k, const char *operation, size_t bytes);
/* The device's copy of a small host array, 16-byte aligned; `from` may change on return. One call
 * an operation (a second may begin the ring again, over the first), valid for the kernels that it
 * queues. NULL after a latched error, and while a sequence is recorded: what it gives does not
 * last. */
const void *cuda_small(struct kern *k, const char *operation, const void *from, size_t bytes);
/* Waits for all queued work and copies its result to the host. false after a latched error or
 * while a sequence is recorded: `to` is then zero. */
bool cuda_fetch(struct kern *k, const char *operation, void *to, const void *from, size_t bytes);

/* true while a sequence is recorded (graph.cu), which is then not kept: the caller is about to do
 * what cannot be part of one. */
bool cuda_spoils(struct kern *k);

/* Blocks of `threads` that cover n elements, one each. */
static inline unsigned cuda_blocks(size_t n, unsigned threads) {
    return (unsigned)((n + threads - 1) / threads);
}
/* This thread's element of a one-dimensional launch. */
__device__ static inline size_t cuda_index(void) {
    return (size_t)blockIdx.x * blockDim.x + threadIdx.x;
}

/* ---- kernels/cpu.h on the device ---- */

__device__ static inline float cuda_get(kptr p, enum kern_type t, size_t i) {
    return t == KERN_F32 ? ((const float *)p.p)[i] : bf16_to_f32(((const uint16_t *)p.p)[i]);
}
__device__ static inline void cuda_put(kptr p, enum kern_type t, size_t i, float v) {
    if (t == KERN_F32) ((float *)p.p)[i] = v;
    else ((uint16_t *)p.p)[i] = f32_to_bf16(v);
}
__device__ static inline float cuda_round(float v, bool round) {
    return round ? bf16_to_f32(f32_to_bf16(v)) : v;
}
__device__ static inline size_t cuda_kv_in_page(const struct kern_kv *kv, int layer, int page,
                                                int h, int is_v) {
    size_t head = (((size_t)page * (size_t)kv->layers + (size_t)layer) * 2 + (size_t)is_v) *
                      (size_t)kv->kv_heads +
                  (size_t)h;
    return head * KERN_PAGE * (size_t)kv->head_dim;
}
__device__ static inline size_t cuda_kv_page(const struct kern_kv *kv, int layer, int slot,
                                             int pos, int h, int is_v) {
    const int32_t *table = (const int32_t *)kv->table.p;
    int page = table[(size_t)slot * (size_t)kv->slot_pages + (size_t)(pos / KERN_PAGE)];
    return cuda_kv_in_page(kv, layer, page, h, is_v);
}
/* Element i of position pos. */
__device__ static inline size_t cuda_kv_at(const struct kern_kv *kv, int layer, int slot, int pos,
                                           int h, int is_v, int i) {
    int j = pos % KERN_PAGE, in = is_v ? (j / 2 * kv->head_dim + i) * 2 + j % 2
                                       : (i / 2 * KERN_PAGE + j) * 2 + i % 2;
    return cuda_kv_page(kv, layer, slot, pos, h, is_v) + (size_t)in;
}
__device__ static inline void cuda_noise_take(const struct kern_noise *n,
                                              const int64_t sum[KERN_NOISE_SUMS]) {
    unsigned long long *to = (unsigned long long *)n->sums.p;
    for (int i = 0; i < KERN_NOISE_SUMS && to; i++)
        atomicAdd(to + i, (unsigned long long)sum[i]);
}

/* ---- the tile order (kern.h) ---- */

/* acc + the n products a(k) * b(k): kern_dot_tile with its loads left to the caller. */
template <class A, class B>
__device__ static inline float cuda_dot(float acc, size_t n, A a, B b) {
    for (size_t at = 0; at < n; at += KERN_IN_BLOCK) {
        size_t end = at + KERN_IN_BLOCK < n ? at + KERN_IN_BLOCK : n, k = at;
        float even = 0.0f, odd = 0.0f;
        for (; k + 1 < end; k += 2) {
            even = fma_ftz(a(k), b(k), even);
            odd = fma_ftz(a(k + 1), b(k + 1), odd);
        }
        if (k < end) even = fma_ftz(a(k), b(k), even);
        if (end - at < KERN_IN_BLOCK) odd += 0.0f;            /* the padding's zeros: no -0 */
        if (end - at < KERN_IN_BLOCK - 1) even += 0.0f;
        acc = add_ftz(acc, add_ftz(even, odd));
    }
    return acc;
}
/* acc + the products of a[k * a_ld] and b[k * b_ld]. */
__device__ static inline float cuda_dot_tile(float acc, const float *a, size_t a_ld,
                                             const float *b, size_t b_ld, size_t n) {
    return cuda_dot(acc, n, [=](size_t k) { return a[k * a_ld]; },
                    [=](size_t k) { return b[k * b_ld]; });
}

/* ---- slots of the table, by file ---- */

/* rows.cu */
void cuda_embed(struct kern *k, const struct kern_embed *a);
void cuda_rmsnorm(struct kern *k, const struct kern_rmsnorm *a);
void cuda_rmsnorm_bwd(struct kern *k, const struct kern_rmsnorm_bwd *a);
void cuda_rope(struct kern *k, const struct kern_rope *a);
void cuda_swiglu(struct kern *k, const struct kern_swiglu *a);
void cuda_swiglu_bwd(struct kern *k, const struct kern_swiglu_bwd *a);
void cuda_silu(struct kern *k, const struct kern_silu *a);
void cuda_add(struct kern *k, const struct kern_add *a);
void cuda_gather(struct kern *k, const struct kern_gather *a);
void cuda_scatter_add(struct kern *k, const struct kern_scatter_add *a);
void cuda_adamw(struct kern *k, const struct kern_adamw *a);
double cuda_sum_squares(struct kern *k, kptr x, size_t n);
/* linear.cu */
void cuda_linear(struct kern *k, const struct kern_linear *a, int n);
void cuda_linear_t(struct kern *k, const struct kern_linear_t *a);
void cuda_outer(struct kern *k, const struct kern_outer *a);
/* linear_mma.cu: the same on tensor cores, for the table cuda-mma */
void cuda_mma_linear(struct kern *k, const struct kern_linear *a, int n);
void cuda_mma_linear_t(struct kern *k, const struct kern_linear_t *a);
void cuda_mma_outer(struct kern *k, const struct kern_outer *a);
/* blas.cu: linear and linear_t by cuBLAS. Turns the table, whose stream is open, into cuda-blas;
 * -1 (EXIT_ENV) where cuBLAS is not there. */
int cuda_blas_open(struct kern *k, const char *arch, int sms, struct err *e);
void cuda_blas_linear(struct kern *k, const struct kern_linear *a, int n);
void cuda_blas_linear_t(struct kern *k, const struct kern_linear_t *a);
/* attn.cu */
void cuda_kv_put(struct kern *k, const struct kern_kv_put *a);
void cuda_attn(struct kern *k, const struct kern_attn *a);
void cuda_attn_bwd(struct kern *k, const struct kern_attn_bwd *a);
/* loss.cu, sample.cu */
void cuda_logprob(struct kern *k, const struct kern_logprob *a);
void cuda_logprob_bwd(struct kern *k, const struct kern_logprob_bwd *a);
void cuda_sample(struct kern *k, const struct kern_sample *a);
/* noise.cu */
void cuda_perturb(struct kern *k, const struct kern_perturb *a);
void cuda_quant_rows(struct kern *k, const struct kern_quant_rows *a);
/* graph.cu */
void cuda_record(struct kern *k);
bool cuda_keep(struct kern *k, uint64_t key);
bool cuda_replay(struct kern *k, uint64_t key);
void cuda_forget(struct kern *k);
/* probe.cu */
double cuda_probe(struct kern *k, enum cuda_probe what, kptr p, size_t bytes, int turns);
/* ranks.cu: the plugin's own functions */
int cuda_ranks_version(char out[16], struct err *e);
int cuda_ranks_id(char id[CUDA_RANKS_ID_BYTES], struct err *e);
int cuda_ranks_open(struct cuda_ranks **out, const struct cuda_ranks_opts *o, struct err *e);
int cuda_ranks_gather(struct cuda_ranks *r, kptr x, size_t n, struct err *e);
void cuda_ranks_add(struct cuda_ranks *r, kptr x, size_t n);
int cuda_ranks_wait(struct cuda_ranks *r, struct err *e);
void cuda_ranks_close(struct cuda_ranks **r);
/* weights.cu */
void cuda_unpack(struct kern *k, const struct kern_weight_rows *a);
void cuda_weight_noise(struct kern *k, const struct kern_weight_noise *a);
/* plugin.cu */
void cuda_pack(struct kern *k, const struct kern_weight *w, const float *values);
void cuda_pack_rows(struct kern *k, const struct kern_weight_rows *a);
#endif
