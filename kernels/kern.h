/* kern.h - THE WAIST between maths and machines: one table of operations on raw arrays.
 *
 * lib/model says what a network computes; a backend says how. Nobody above this header dereferences
 * a kptr: memory is made, filled and read back through the table, so the same model code drives CPU
 * paths and devices. Operations return nothing, run in the order they were called, and latch their
 * first error until sync(). Threads live inside an operation and split its output elements, never a
 * sum.
 *
 * Bits. One order of accumulation per output element: it does not depend on the number of rows in
 * the call, on a row's place in it, on the number of threads, or on whether the row is prefilled,
 * decoded or trained on (but in cuda-blas: kernels/cuda/blas.cu). All CPU paths share the very
 * same order and the same polynomials, so they give the same bits:
 *   products           linear, linear_t, outer, scores and values of attention: the tile order,
 *                      which
 *       is that of AMX's TDPBF16PS. acc = 0; for blocks of 32 k ascending (the last one padded with
 *       zeros): acc += even + odd, where even and odd are the chains of fma(x[k], w[k], chain) over
 *       the block's even and odd k ascending, each from +0. In these sums, and in attention's o,
 *       subnormal operands and results are taken as zero.
 *   row sums           norms, softmax, delta of attention: 16 lanes, lane i takes elements i, i+16,
 *       ... by fma or add in ascending order, then the lanes are folded 8, 4, 2, 1 (lane i += lane
 *       i + half)
 *   exp, log           kern_expf / kern_logf of kernels/math.h
 *   max                exact in any order, NaN skipped
 *   NaN                is one wherever the CPU's is; its sign and payload are promised by CPU paths
 *       alone (a GPU's arithmetic has a single NaN, 0x7fffffff)
 *   left over          kernels/ref is the text: where a formula below leaves an order open, ref's
 *                      is meant
 *
 * Rounding points ("bf16" = round to nearest even to bfloat16). Everything else is float32.
 *   outputs typed KERN_BF16 are rounded once when stored; KERN_F32 is never rounded (vectors and
 *   gradient checks).
 *   linear             x is read as stored; products and sums in f32; bias and scale in f32
 *   linear_t, outer    their f32 operand dy is rounded to bf16 on reading when `round` is set
 *   attention          q, k and v as stored; scores, maximum, sum of probabilities and outputs in
 *       f32; where the pages are bf16, what is multiplied is bf16: probabilities before they meet
 *       values; in the backward also dy and the gradient of the scores
 * Ownership: the table's owner frees what alloc gave; operations keep nothing between calls.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_KERN_H
#define QERL_KERN_H
#include "lib/base/err.h"
#include "lib/base/pool.h"

enum { KERN_ABI = 6, KERN_OUT_BLOCK = 16, KERN_IN_BLOCK = 32, KERN_PAGE = 32 };
enum kern_type { KERN_F32, KERN_BF16 };
enum kern_format { KERN_FORMAT_F32, KERN_FORMAT_BF16, KERN_FORMAT_MXFP4, KERN_FORMAT_NVFP4 };

/* an address of the backend's memory; {NULL} = absent */
typedef struct { void *p; } kptr;
KERN_FN kptr kptr_at(kptr k, size_t bytes) {
    kptr at = { (char *)k.p + bytes };
    return at;
}

#include "kernels/noise.h"

/* A packed linear weight [out, in]: ceil(out/16) panels, each ceil(in/32) records of 16 outputs x
 * 32 inputs, zero padded (layout: kernels/pack.h). */
struct kern_weight {
    kptr data;
    enum kern_format format;
    int out, in;
    float scale;                                      /* NVFP4's tensor scale; 1 otherwise */
};

#include "kernels/weights.h"

/* Keys and values in pages of 32 positions: page p, layer l, kv head h holds K, then all heads' V,
 * 32 * head_dim elements each, from (((p * layers + l) * 2 + is_v) * kv_heads + h) * 32 * head_dim.
 * Inside, with j = pos % 32, in pairs along what a product sums over (head_dim is even):
 *   K element i of position j   (i / 2 * 32 + j) * 2 + i % 2
 *   V element i of position j   (j / 2 * head_dim + i) * 2 + j % 2 */
struct kern_kv {
    kptr pages;
    enum kern_type type;
    int layers, kv_heads, head_dim;
    /* int32 [slots, slot_pages]: page of each slot's 32 positions */
    kptr table;
    int slot_pages;
};

/* y[r,:] = E[tokens[r],:]                            tokens int32 [rows]; w embedding [vocab, dim];
 *                                         y f32 [rows, dim] */
struct kern_embed { kptr tokens; struct kern_weight w; kptr y; int rows; };

/* y = x * rsqrt(mean(x^2) + eps) * (w + dw)          x f32 [rows, dim], w f32 [dim], dw f32 [dim]
 *                                         or absent (noise: never
 * written into w), y of y_type, rstd f32 [rows] or absent receives rsqrt(...). y may be x when both
 * are f32. */
struct kern_rmsnorm { kptr x, w, dw, y, rstd; enum kern_type y_type; int rows, dim; float eps; };
/* dx += m g - x m^3/dim * sum(g x), g = dy * (w + dw), m = rstd. */
struct kern_rmsnorm_bwd { kptr dy, x, rstd, w, dw, dx; int rows, dim; };

/* v = (scale * w.scale) * (x W') + bias; then y = v, or y + v when accumulate (y f32 then); then,
 * with an adapter (b.out != 0), y += u B'. x [rows, in] of x_type with row stride x_ld elements, y
 * [rows, out] with stride y_ld; bias f32 [out] or absent; u [rows, b.in] of x_type with stride
 * u_ld; b [out, b.in] with scale 1. The operation takes n of them that do not read each other's y:
 * one entry into the threads for q, k and v. apart: chance put these rows together (decoding), so
 * that a row's bits may not depend on the others; tables of which that is always true ignore it. */
struct kern_linear {
    kptr x; enum kern_type x_type; int x_ld;
    struct kern_weight w; kptr bias; float scale; bool accumulate;
    kptr u; int u_ld; struct kern_weight b;
    kptr y; enum kern_type y_type; int y_ld;
    int rows;
    bool apart;
};
enum { KERN_LINEARS_MAX = 3 };
/* dx = (scale * w.scale) * (dy W), or dx += that when accumulate. dy f32 [rows, out] stride dy_ld,
 * dx f32 [rows, in] stride dx_ld. Sum over outputs ascending. round: dy is rounded to bf16 on
 * reading. */
struct kern_linear_t {
    kptr dy; int dy_ld; struct kern_weight w; float scale; bool accumulate, round;
    kptr dx; int dx_ld; int rows;
};
/* g[m,n] += sum over sequences in order of (the sum over the sequence's rows of scale * a[r,m] *
 * b[r,n], in the tile order from the sequence's first row). Sequence s is rows seq_start[s] ..
 * seq_start[s+1]-1 (host array, seqs + 1). How sequences are spread over calls changes no bit. a
 * f32 [rows, m] (rounded to bf16 after scaling when round), b [rows, n] of b_type. */
struct kern_outer {
    kptr a; int a_ld; kptr b; enum kern_type b_type; int b_ld; float scale; bool round;
    kptr g; int m, n; const int32_t *seq_start; int seqs;
};

/* Half-split rotation by the row's position; inverse rotates back (the backward). x f32 [rows,
 * heads, head_dim] -> y of y_type, y may be x when f32. cos, sin f32 [positions, head_dim / 2]. */
struct kern_rope {
    kptr x, y;
    enum kern_type y_type;
    kptr pos, cos, sin;
    int rows, heads, head_dim;
    bool inverse;
};

/* Writes row r's k (k_type, [rows, kv_heads * head_dim]) and v (f32) at (slots[r], pos[r]) of
 * `layer`, rounded to the pages' type. slots, pos int32 [rows]. */
struct kern_kv_put {
    struct kern_kv kv;
    int layer;
    kptr k;
    enum kern_type k_type;
    kptr v, slots, pos;
    int rows;
};
/* y[r,h] = softmax(scale * q[r,h] . K[0..pos[r]]) V of slot slots[r]; query head h reads kv head h
 * * kv_heads / heads. Keys are visited in pages of 32 from position 0, the running maximum and sum
 * are corrected once a page: m' = max(m, page's scores), fix = exp(m - m'), p = exp(score - m') (0
 * where the row does not see the key), l = fma(l, fix, row sum of p), o = o * fix + (even + odd
 * over the page's 32 keys of p v), where an o * fix smaller than 2^-126 is +0: then not even the
 * sign of a zero depends on keys that the row does not see. Neighbouring rows whose tables name the
 * same page read it once; a NaN in a key or value reaches only rows that see it. q [rows, heads *
 * head_dim] of q_type; y of y_type; lse f32 [rows, heads] or absent: log of the sum of
 * exp(score). */
struct kern_attn {
    kptr q; enum kern_type q_type; struct kern_kv kv; int layer; kptr slots, pos;
    kptr y; enum kern_type y_type; kptr lse; int rows, heads; float scale;
    const struct kern_attn_noise *noise;              /* NULL = clean */
    kptr peaks;                                       /* kernels/noise.h; absent: not kept */
};
/* Backward of attn for whole sequences: sequence s is rows seq_start[s] .. seq_start[s+1]-1 at
 * positions 0, 1, ... of its slot (slots int32 [rows], read at the sequence's first row). y, lse as
 * attn left them, dy f32; writes dq f32 [rows, heads * head_dim], dk and dv f32 [rows, kv_heads *
 * head_dim]. delta = row sum of dy y (unrounded), p = exp(scale * s - lse), ds = p * (dy . v -
 * delta) * scale. dq sums over keys, dk and dv over the sequence's queries (index = row within the
 * sequence * group + head within the group, group = heads of one kv head), all in the tile order
 * from index 0, with p = ds = 0 where the query does not see the key. A NaN may reach the whole
 * sequence. With noise, y is the output before any noise on it. */
struct kern_attn_bwd {
    kptr q; enum kern_type q_type; struct kern_kv kv; int layer; kptr slots;
    kptr y;
    enum kern_type y_type;
    kptr lse, dy, dq, dk, dv;
    const int32_t *seq_start;
    int seqs, heads;
    float scale;
    const struct kern_attn_noise *noise;              /* NULL = clean */
    kptr peaks;                                       /* as attn left them, or absent */
};

/* y = silu(gate) * up. gate, up f32 [rows, dim]; y of y_type, as are gate_kept and up_kept (or both
 * absent): copies for the backward. */
struct kern_swiglu { kptr gate, up, y, gate_kept, up_kept; enum kern_type y_type; int rows, dim; };
/* dy, dgate, dup f32; gate, up of type (as kept); all [rows, dim] */
struct kern_swiglu_bwd { kptr dy, gate, up; enum kern_type type; kptr dgate, dup; int rows, dim; };

/* What a 4-bit unit would read: each row of x (bf16 or f32, `type`) rounded to MXFP4 (blocks of 32
 * along the row) or NVFP4 (blocks of 16, the tensor scale is the row's) and back, as
 * lib/model/quant.h defines both roundings; y of type, y may be x. seed: the earlier system's
 * rounding. A row that holds a NaN or an infinity becomes NaN. */
struct kern_quant_rows {
    kptr x, y;
    enum kern_type type;
    enum kern_format format;
    bool seed;
    int rows, dim;
};

/* x[i] += y[i], f32 */
struct kern_add { kptr x, y; size_t n; };
/* out[i,:] = x[index[i],:]  f32 or bf16 rows of dim elements; scatter_add: x[index[i],:] += y[i,:]
 *                           (f32, indices distinct) */
struct kern_gather { kptr x, index, y; enum kern_type type; int rows, dim; };
struct kern_scatter_add { kptr y, index, x; int rows, dim; };

/* With z = logits * inv_temp: lse = log sum exp z, lp = z[target] - lse, entropy = lse - sum p z
 * (summed as log s - sum e (z - zmax) / s with e = exp(z - zmax), s = sum e). logits f32
 * [rows, vocab]; targets int32 [rows]; lse, entropy f32 [rows] or absent. */
struct kern_logprob { kptr logits, targets, lp, lse, entropy; int rows, vocab; float inv_temp; };
/* In place: logits[r,k] = coef[r] * ([k == target] - p[k]) * inv_temp, p from lse. */
struct kern_logprob_bwd { kptr logits, targets, lse, coef; int rows, vocab; float inv_temp; };

struct kern_sampler {                                 /* one per row */
    /* 0 = greedy: the largest logit, lowest id among equals */
    float temperature;
    int top_k;                                        /* 0 = off */
    float top_p;                                      /* 1 = off */
    float u;                                          /* in [0,1) */
};
/* Whether such a row is drawn from a part of the vocabulary. */
KERN_FN bool kern_sampler_cuts(const struct kern_sampler *s, int vocab) {
    return s->temperature > 0.0f && ((s->top_k > 0 && s->top_k < vocab) || s->top_p < 1.0f);
}
/* Draws token[r]: logits / T, top-k, top-p (smallest prefix of the descending order whose mass
 * reaches top_p, at least one; ties to the lower id), renormalise, then invert the CDF in ascending
 * token-id order. lp = log-prob of the token under what was sampled from (greedy: under temperature
 * 1), lp_raw = under temperature 1, nothing cut. Without cuts lp has the bits that logprob gives at
 * the same temperature. sampler: struct kern_sampler [rows] in the backend's memory; token int32,
 * lp and lp_raw f32 [rows]. cuts: whether any row cuts (kern_sampler_cuts), which the caller knows
 * and a queue of operations must. */
struct kern_sample {
    kptr logits;
    int rows, vocab;
    kptr sampler;
    bool cuts;
    kptr token, lp, lp_raw;
};

/* p -= lr*wd*p; m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2; p -= lr * (m*m_scale) /
 * (sqrt(v*v_scale) + eps), with g multiplied by g_scale first; m_scale = 1/(1-b1^k), v_scale =
 * 1/(1-b2^k). All f32 [n]. */
struct kern_adamw {
    kptr p, m, v, g;
    size_t n;
    float lr, b1, b2, eps, wd, g_scale, m_scale, v_scale;
};

struct kern {
    const char *name;          /* "ref", "avx2", "avx512", "avx512bf16", "amx", "cuda-mma:0" */
    const char *bits;                                 /* tables of one name give the same bits */
    uint32_t abi;                                     /* KERN_ABI */
    struct pool *pool;                                /* CPU paths; lent */
    void *self;                                       /* the backend's own state */
    struct err latched;                               /* first error since the last sync */

    /* 64-byte aligned, zeroed */
    int  (*alloc)(struct kern *k, kptr *out, size_t bytes, struct err *e);
    /* sets p->p to NULL */
    void (*free)(struct kern *k, kptr *p);
    void (*upload)(struct kern *k, kptr to, const void *from, size_t bytes);
    /* implies sync of what wrote it */
    void (*download)(struct kern *k, void *to, kptr from, size_t bytes);
    void (*copy)(struct kern *k, kptr to, kptr from, size_t bytes);
    void (*zero)(struct kern *k, kptr p, size_t bytes);
    /* -1 with the first latched error */
    int  (*sync)(struct kern *k, struct err *e);

    void (*embed)(struct kern *k, const struct kern_embed *a);
    void (*rmsnorm)(struct kern *k, const struct kern_rmsnorm *a);
    void (*rmsnorm_bwd)(struct kern *k, const struct kern_rmsnorm_bwd *a);
    /* n <= KERN_LINEARS_MAX */
    void (*linear)(struct kern *k, const struct kern_linear *a, int n);
    void (*linear_t)(struct kern *k, const struct kern_linear_t *a);
    void (*outer)(struct kern *k, const struct kern_outer *a);
    void (*rope)(struct kern *k, const struct kern_rope *a);
    void (*kv_put)(struct kern *k, const struct kern_kv_put *a);
    void (*attn)(struct kern *k, const struct kern_attn *a);
    void (*attn_bwd)(struct kern *k, const struct kern_attn_bwd *a);
    void (*swiglu)(struct kern *k, const struct kern_swiglu *a);
    void (*swiglu_bwd)(struct kern *k, const struct kern_swiglu_bwd *a);
    void (*silu)(struct kern *k, const struct kern_silu *a);
    void (*perturb)(struct kern *k, const struct kern_perturb *a);
    void (*quant_rows)(struct kern *k, const struct kern_quant_rows *a);
    void (*add)(struct kern *k, const struct kern_add *a);
    void (*gather)(struct kern *k, const struct kern_gather *a);
    void (*scatter_add)(struct kern *k, const struct kern_scatter_add *a);
    void (*logprob)(struct kern *k, const struct kern_logprob *a);
    void (*logprob_bwd)(struct kern *k, const struct kern_logprob_bwd *a);
    void (*sample)(struct kern *k, const struct kern_sample *a);
    void (*adamw)(struct kern *k, const struct kern_adamw *a);
    /* In double: blocks of 4,096 elements (8 lanes, folded), blocks ascending; implies sync. */
    double (*sum_squares)(struct kern *k, kptr x, size_t n);
    /* Packs row-major host values [out, in] into a BF16 or F32 weight already allocated
     * (kern_weight_bytes): LoRA, once per version. Values are rounded to bf16 for
     * KERN_FORMAT_BF16. */
    void (*pack)(struct kern *k, const struct kern_weight *w, const float *values);
    /* kernels/weights.h */
    void (*unpack)(struct kern *k, const struct kern_weight_rows *a);
    void (*pack_rows)(struct kern *k, const struct kern_weight_rows *a);
    void (*weight_noise)(struct kern *k, const struct kern_weight_noise *a);

    /* Optional, all four or none (NULL: every sequence is called anew). A sequence of operations
     * is kept under a number and run again at one call, with the addresses, sizes and flags that it
     * was recorded with: what must change between runs lies in the backend's memory.
     * record: the calls that follow are noted, not run; only operations, copy and zero may come.
     * keep: ends that and keeps them under `key`, in place of what was there. false: they could
     *   not be kept (an operation needed more scratch than it had, waited, or read host memory;
     *   or a backend keeps no more): none of them ran; call them again.
     * replay: runs what `key` keeps. false: nothing is kept there, or not any more: a backend drops
     *   what its own memory has moved under. Nothing ran, then.
     * forget: drops all that is kept. Memory that a kept sequence names outlives it or is not
     *   replayed. Errors are latched like an operation's. */
    void (*record)(struct kern *k);
    bool (*keep)(struct kern *k, uint64_t key);
    bool (*replay)(struct kern *k, uint64_t key);
    void (*forget)(struct kern *k);
};

/* Fills the table. path: NULL or "auto" = the best this CPU has; a name forces one. -1 (EXIT_ENV)
 * when the machine lacks it, naming what it has. "cuda" is cuda:0, "cuda:N" the N-th device that
 * CUDA_VISIBLE_DEVICES shows (kernels/cuda/plugin.h), "cuda-mma" and "cuda-mma:N" the same on
 * tensor cores, with bits of their own, "cuda-blas" the same with cuBLAS for many rows, where a
 * row's bits change with how many there are; auto never takes a device, and where one is asked for
 * nothing else stands in. "amx-emulated" is the text of "amx" with its tile instructions done in
 * C, for tests where there is no AMX; never chosen by itself. The table lends
 * `pool`. */
int kern_open(struct kern *k, const char *path, struct pool *pool, struct err *e);
/* Names of the paths this machine can run, best last ("ref", "avx2", "avx512", "avx512bf16",
 * "amx"); returns how many (<= 8). */
int kern_paths(const char *names[8]);
/* Bytes of a packed weight. */
size_t kern_weight_bytes(enum kern_format format, int out, int in);
#endif
