/* cpu.h - what the CPU paths share among themselves: not for anybody above kern.h.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_CPU_H
#define QERL_CPU_H
#include "kernels/kern.h"
#include "kernels/math.h"
#include "kernels/noise_math.h"
#include "kernels/pack.h"

/* complete; every faster path starts as its copy */
extern const struct kern kern_ref_table;
/* overwrite slots; only on a machine that has the ISA */
void kern_avx2_fill(struct kern *k);
void kern_avx512_fill(struct kern *k);
void kern_avx512bf16_fill(struct kern *k);
void kern_amx_fill(struct kern *k);
void kern_amx_emulated_fill(struct kern *k);

/* kernels/cuda/load.c: kern_open of "cuda" (cuda:0) and "cuda:N". */
int cuda_open(struct kern *k, const char *name, struct pool *pool, struct err *e);

size_t kern_record_bytes(enum kern_format format);
/* This thread's scratch, at least `bytes`, 64-byte aligned; valid until its next call on this
 * thread. Grows, never shrinks. */
void *cpu_scratch(size_t bytes);
/* pool_run, or the plain loop when the table has no pool. */
static inline void cpu_run(struct kern *k, int parts, void (*fn)(void *, int, int), void *arg) {
    if (k->pool) pool_run(k->pool, parts, fn, arg);
    else for (int i = 0; i < parts; i++) fn(arg, i, parts);
}
static inline int cpu_threads(const struct kern *k) { return k->pool ? pool_threads(k->pool) : 1; }

static inline float cpu_get(kptr p, enum kern_type t, size_t i) {
    return t == KERN_F32 ? ((const float *)p.p)[i] : bf16_to_f32(((const uint16_t *)p.p)[i]);
}
static inline void cpu_put(kptr p, enum kern_type t, size_t i, float v) {
    if (t == KERN_F32) ((float *)p.p)[i] = v;
    else ((uint16_t *)p.p)[i] = f32_to_bf16(v);
}
static inline float cpu_round(float v, bool round) {
    return round ? bf16_to_f32(f32_to_bf16(v)) : v;
}

/* First element of kv head h's K (or V) in a page; in the one of `slot` that holds position pos. */
static inline size_t cpu_kv_in_page(const struct kern_kv *kv, int layer, int page, int h,
                                    int is_v) {
    size_t head = (((size_t)page * (size_t)kv->layers + (size_t)layer) * 2 + (size_t)is_v) *
                      (size_t)kv->kv_heads +
                  (size_t)h;
    return head * KERN_PAGE * (size_t)kv->head_dim;
}
static inline size_t cpu_kv_page(const struct kern_kv *kv, int layer, int slot, int pos, int h,
                                 int is_v) {
    const int32_t *table = kv->table.p;
    int page = table[(size_t)slot * (size_t)kv->slot_pages + (size_t)(pos / KERN_PAGE)];
    return cpu_kv_in_page(kv, layer, page, h, is_v);
}
/* Element i of position pos. */
static inline size_t cpu_kv_at(const struct kern_kv *kv, int layer, int slot, int pos, int h,
                               int is_v, int i) {
    int j = pos % KERN_PAGE, in = is_v ? (j / 2 * kv->head_dim + i) * 2 + j % 2
                                       : (i / 2 * KERN_PAGE + j) * 2 + i % 2;
    return cpu_kv_page(kv, layer, slot, pos, h, is_v) + (size_t)in;
}

/* Softmax statistics of one row, z = logits * inv_temp, most = the largest logit (not scaled):
 * returns the sum of exp(z - most * inv_temp) in 16 lanes; blocks (or NULL) gets the same sum of
 * each CPU_BLOCK ids by themselves; *tilt (or NULL) the sum of e * (z - zmax). A path gives its own
 * to cpu_sample_row. */
enum { CPU_BLOCK = 256, CPU_VOCAB_MAX = 1 << 20 };
typedef float cpu_row_sum(const float *logits, int vocab, float inv_temp, float most, float *blocks,
                          float *tilt);
typedef float cpu_row_most(const float *logits, int vocab);
void cpu_sample_row(const struct kern_sample *a, int row, cpu_row_most *most_of,
                    cpu_row_sum *sum_of);

/* Adds what one part measured; parts may do so at once: sums of integers have no order. */
static inline void cpu_noise_take(const struct kern_noise *n, const int64_t sum[KERN_NOISE_SUMS]) {
    for (int i = 0; i < KERN_NOISE_SUMS && n->sums.p; i++)
        __atomic_fetch_add((int64_t *)n->sums.p + i, sum[i], __ATOMIC_RELAXED);
}
static inline void cpu_weight_take(const struct kern_weight_noise *a,
                                   const int64_t count[KERN_WEIGHT_COUNTS]) {
    for (int i = 0; i < KERN_WEIGHT_COUNTS; i++)
        __atomic_fetch_add((int64_t *)a->counts.p + i, count[i], __ATOMIC_RELAXED);
}
/* t += e of elements [first, first + count) of a row, first a multiple of 16, as one span; counter
 * is the row's. l may be NULL. */
void ref_noise_add(const struct kern_noise *n, const uint32_t counter[4], float edge, float *t,
                   int first, int count, struct kern_noise_lanes *l);

/* Slots of the reference table, one file each group. */
void ref_embed(struct kern *k, const struct kern_embed *a);
void ref_rmsnorm(struct kern *k, const struct kern_rmsnorm *a);
void ref_rmsnorm_bwd(struct kern *k, const struct kern_rmsnorm_bwd *a);
void ref_linear(struct kern *k, const struct kern_linear *a, int n);
void ref_linear_t(struct kern *k, const struct kern_linear_t *a);
void ref_outer(struct kern *k, const struct kern_outer *a);
void ref_rope(struct kern *k, const struct kern_rope *a);
void ref_kv_put(struct kern *k, const struct kern_kv_put *a);
void ref_attn(struct kern *k, const struct kern_attn *a);
void ref_attn_bwd(struct kern *k, const struct kern_attn_bwd *a);
void ref_swiglu(struct kern *k, const struct kern_swiglu *a);
void ref_swiglu_bwd(struct kern *k, const struct kern_swiglu_bwd *a);
void ref_silu(struct kern *k, const struct kern_silu *a);
void ref_perturb(struct kern *k, const struct kern_perturb *a);
void ref_quant_rows(struct kern *k, const struct kern_quant_rows *a);
void ref_add(struct kern *k, const struct kern_add *a);
void ref_gather(struct kern *k, const struct kern_gather *a);
void ref_scatter_add(struct kern *k, const struct kern_scatter_add *a);
void ref_logprob(struct kern *k, const struct kern_logprob *a);
void ref_logprob_bwd(struct kern *k, const struct kern_logprob_bwd *a);
void ref_sample(struct kern *k, const struct kern_sample *a);
void ref_adamw(struct kern *k, const struct kern_adamw *a);
double ref_sum_squares(struct kern *k, kptr x, size_t n);
void ref_pack(struct kern *k, const struct kern_weight *w, const float *values);
void ref_unpack(struct kern *k, const struct kern_weight_rows *a);
void ref_pack_rows(struct kern *k, const struct kern_weight_rows *a);
void ref_weight_noise(struct kern *k, const struct kern_weight_noise *a);
#endif
