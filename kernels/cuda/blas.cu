/* blas.cu - linear and linear_t of many rows by cuBLAS: the table cuda-blas.
 *
 * Knows: how a product of kern.h becomes cuBLAS's (bf16 in, sums in f32), what is unpacked for it,
 * in which bounds, and what makes it repeat: one stream, a workspace of its own, no atomics, and
 * shapes and addresses' alignment that follow from the operation alone. cuBLAS then gives the same
 * bits on devices of one architecture and one number of SMs, by one version of the library.
 * Does not know: cuBLAS's order of sums, which changes with the number of rows. So few rows, and
 * rows that chance put together (`apart`), go to linear_mma.cu, where a row has one result; so does
 * outer, whose sums end with each sequence: cuBLAS would take a call for each, with as few rows of
 * the result as the adapter has ranks, where that kernel takes one for all.
 * Packed weights become rows of bf16, exactly, a slab of outputs at a time; a record's own layout,
 * 16 outputs side by side, would be 16 rows of a product a call.
 * Order: the library, scratch, kernels, linear, linear_t.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cuda/blas.h"
#include "kernels/cuda/library.h"
#include "kernels/cuda/linears.h"
#include "kernels/cuda/mma_tile.h"

/* Up to so many rows linear_mma.cu reads a weight once, and unpacking it would, too. */
enum { FEW_ROWS = MMA_COLUMNS };

/* ---- the library ---- */

static struct blas_api blas;
#define FUNCTION(name, field) { name, (void **)&blas.field }
static const struct cuda_function functions[] = {
    FUNCTION("cublasCreate_v2", create),
    FUNCTION("cublasDestroy_v2", destroy),
    FUNCTION("cublasGetVersion_v2", version),
    FUNCTION("cublasSetStream_v2", stream),
    FUNCTION("cublasSetWorkspace_v2", workspace),
    FUNCTION("cublasSetAtomicsMode", atomics),
    FUNCTION("cublasSetMathMode", math),
    FUNCTION("cublasGetStatusName", status_name),
    FUNCTION("cublasGemmEx", gemm),
};

static int library(struct err *e) {
    const int major = CUDART_VERSION / 1000, minor = CUDART_VERSION % 1000 / 10;
    char file[32], package[32];
    snprintf(file, sizeof file, "libcublas.so.%d", major);
    snprintf(package, sizeof package, "libcublas-%d-%d", major, minor);
    const struct cuda_library l = { file, "QERL_CUBLAS", package, functions,
                                    sizeof functions / sizeof *functions };
    return cuda_library_load(&l, e);
}

/* The stream first: setting it takes the workspace away. */
static int configure(blas_handle h, cudaStream_t stream, void *workspace) {
    int rc = blas.stream(h, stream);
    if (rc == BLAS_OK) rc = blas.workspace(h, workspace, CUDA_BLAS_WORKSPACE);
    if (rc == BLAS_OK) rc = blas.atomics(h, BLAS_NO_ATOMICS);
    if (rc == BLAS_OK) rc = blas.math(h, BLAS_NO_REDUCED_SUMS);
    return rc;
}

int cuda_blas_open(struct kern *k, const char *arch, int sms, struct err *e) {
    static char name[CUDA_DEVICES_MAX][24], bits[CUDA_DEVICES_MAX][64];
    struct cuda_state *s = cuda_of(k);
    blas_handle h = NULL;
    void *workspace = NULL;
    int version = 0;
    if (library(e) < 0) return -1;
    if (cudaMalloc(&workspace, CUDA_BLAS_WORKSPACE) != cudaSuccess)
        return cuda_fail(e, EXIT_ENV, "no room for cuBLAS's workspace of %d bytes on %s: %s",
                         CUDA_BLAS_WORKSPACE, k->name, cudaGetErrorName(cudaGetLastError()));
    int rc = blas.create(&h);
    if (rc == BLAS_OK) rc = configure(h, s->stream, workspace);
    if (rc == BLAS_OK) rc = blas.version(h, &version);
    if (rc != BLAS_OK) {
        (void)cudaFree(workspace);
        if (h) blas.destroy(h);
        return cuda_fail(e, EXIT_ENV, "cannot use cuBLAS on %s: %s", k->name,
                         blas.status_name(rc));
    }
    s->blas = h;
    snprintf(name[s->device], sizeof *name, "cuda-blas:%d", s->device);
    snprintf(bits[s->device], sizeof *bits, "cuda-blas %s %d SMs cublas %d.%d.%d", arch, sms,
             version / 10000, version / 100 % 100, version % 100);
    k->name = name[s->device];
    k->bits = bits[s->device];
    k->linear = cuda_blas_linear;
    k->linear_t = cuda_blas_linear_t;
    k->outer = cuda_mma_outer;
    return 0;
}

/* c, of columns c_ld apart, becomes alpha w x + beta c; c's columns are x's, a column a row of
 * activations. */
struct product {
    enum blas_turn w_turn;
    const uint16_t *w;
    int w_ld;
    const uint16_t *x;
    int x_ld;
    float *c;
    int c_ld;
    float alpha, beta;
};
static void multiply(struct kern *k, const char *operation, const struct product *p, int results,
                     int rows, int depth) {
    struct err *e = &k->latched;
    (void)cuda_stream(k);
    const int rc = blas.gemm((blas_handle)cuda_of(k)->blas, p->w_turn, BLAS_AS_STORED, results,
                             rows, depth, &p->alpha, p->w, CUDA_R_16BF, p->w_ld, p->x, CUDA_R_16BF,
                             p->x_ld, &p->beta, p->c, CUDA_R_32F, p->c_ld, BLAS_SUMS_IN_F32,
                             BLAS_ALGORITHM_DEFAULT);
    if (rc == BLAS_OK) CUDA_TRY(k, operation, cudaGetLastError());
    if (rc == BLAS_OK || e->text[0]) return;
    e->code = EXIT_FAILED;
    snprintf(e->text, sizeof e->text, "%s on %s: cublasGemmEx: %s", operation, k->name,
             blas.status_name(rc));
}

/* ---- scratch ---- */

/* In emulation so little that tests come to several slabs, and to several blocks of rows. */
#ifdef QERL_CUDA_EMU
enum { SLAB_BYTES = 4 << 20 };
#else
enum { SLAB_BYTES = CUDA_BLAS_SLAB };
#endif
/* A whole number of steps, so that cuBLAS's tiles come out even. */
enum { SLAB_STEP = 128 };
struct slab {
    uint16_t *w, *b;                     /* outs rows of unpacked weight, and of an adapter's B */
    int w_ld, b_ld, outs;
    void *block;                         /* rows times outs elements: dy rounded, or sums */
    int rows;
};
static int padded(const struct kern_weight *w) { return record_blocks(w) * KERN_IN_BLOCK; }
static int least(size_t a, int b) { return a < (size_t)b ? (int)a : b; }

/* element: bytes of each of the block's; 0 = none is needed */
static bool slab_open(struct slab *s, struct kern *k, const char *operation,
                      const struct kern_weight *w, const struct kern_weight *b, int rows,
                      size_t element) {
    s->w_ld = padded(w);
    s->b_ld = b && b->out ? padded(b) : 0;
    const size_t line = ((size_t)s->w_ld + (size_t)s->b_ld) * sizeof *s->w,
                 fit = SLAB_BYTES / line / SLAB_STEP * SLAB_STEP;
    assert(fit);                         /* or a weight has more than 262,144 inputs */
    s->outs = least(fit, record_panels(w) * KERN_OUT_BLOCK);
    const size_t outs = (size_t)s->outs, across = outs * element;
    s->rows = across ? least(SLAB_BYTES / across, rows) : rows;
    s->w = (uint16_t *)cuda_scratch(k, operation, outs * line + across * (size_t)s->rows);
    if (!s->w) return false;
    s->b = s->w + outs * (size_t)s->w_ld;
    s->block = s->b + outs * (size_t)s->b_ld;
    return true;
}

/* ---- kernels ---- */

enum { THREADS = 256 };

/* A warp a record: outputs 16 panel .. as rows of bf16, with the zeros that pad a record. */
template <enum kern_format FORMAT>
__global__ void __launch_bounds__(THREADS)
    unpack(struct kern_weight w, int panel, uint16_t *to, int ld, size_t records) {
    const int lane = (int)threadIdx.x % 32, blocks = record_blocks(&w);
    const size_t at = cuda_index() / 32;
    if (at >= records) return;
    const int up = (int)(at / (size_t)blocks), block = (int)(at % (size_t)blocks);
    struct mma_line low, high;
    line_outputs<FORMAT>(&low, &high, record_of(&w, panel + up, block), lane);
    uint16_t *row = to + (size_t)(up * KERN_OUT_BLOCK + lane / 4 * 2) * (size_t)ld +
                    block * KERN_IN_BLOCK + lane % 4 * MMA_LANE_K;
    *(struct mma_line *)row = low;
    *(struct mma_line *)(row + ld) = high;
}
/* The slab's outputs from `first` on, which a panel begins with. */
static void unpack_slab(struct kern *k, const char *operation, const struct kern_weight *w,
                        int first, int outs, uint16_t *to, int ld) {
    const int panel = first / KERN_OUT_BLOCK,
              panels = (outs + KERN_OUT_BLOCK - 1) / KERN_OUT_BLOCK;
    const size_t records = (size_t)panels * (size_t)record_blocks(w);
    const unsigned grid = cuda_blocks(records * 32, THREADS);
    if (w->format == KERN_FORMAT_BF16)
        LAUNCH((unpack<KERN_FORMAT_BF16>), grid, THREADS, 0, cuda_stream(k), *w, panel, to, ld,
               records);
    else if (w->format == KERN_FORMAT_MXFP4)
        LAUNCH((unpack<KERN_FORMAT_MXFP4>), grid, THREADS, 0, cuda_stream(k), *w, panel, to, ld,
               records);
    else
        LAUNCH((unpack<KERN_FORMAT_NVFP4>), grid, THREADS, 0, cuda_stream(k), *w, panel, to, ld,
               records);
    CUDA_TRY(k, operation, cudaGetLastError());
}

/* to[r][c] = bf16 of from[r][c], eight at a time where both lie so */
__global__ static void __launch_bounds__(THREADS)
    round_rows(const float *from, int from_ld, uint16_t *to, int to_ld, int rows, int columns) {
    const int lines = (columns + MMA_LANE_K - 1) / MMA_LANE_K;
    const size_t at = cuda_index(), row = at / (size_t)lines;
    const int c = (int)(at % (size_t)lines) * MMA_LANE_K;
    if (row >= (size_t)rows) return;
    const bool aligned = line_aligned(from, from_ld, sizeof *from) &&
                         line_aligned(to, to_ld, sizeof *to);
    const struct mma_line v = line_f32(from + row * (size_t)from_ld, c, columns, aligned);
    uint16_t *y = to + row * (size_t)to_ld + c;
    if (aligned && c + MMA_LANE_K <= columns) {
        *(struct mma_line *)y = v;
        return;
    }
#pragma unroll
    for (int j = 0; j < MMA_LANE_K; j++)
        if (c + j < columns) y[j] = (uint16_t)(v.pair[j / 2] >> j % 2 * 16);
}
static void round_block(struct kern *k, const char *operation, const float *from, int from_ld,
                        uint16_t *to, int to_ld, int rows, int columns) {
    const size_t lines = (size_t)(columns + MMA_LANE_K - 1) / MMA_LANE_K;
    LAUNCH(round_rows, cuda_blocks(lines * (size_t)rows, THREADS), THREADS, 0, cuda_stream(k),
           from, from_ld, to, to_ld, rows, columns);
    CUDA_TRY(k, operation, cudaGetLastError());
}

/* c = bias in each row, or c + bias */
__global__ static void __launch_bounds__(THREADS)
    bias_rows(float *c, int ld, const float *bias, int rows, int columns, bool accumulate) {
    const size_t at = cuda_index(), row = at / (size_t)columns, column = at % (size_t)columns;
    if (row >= (size_t)rows) return;
    float *y = c + row * (size_t)ld + column;
    *y = accumulate ? *y + bias[column] : bias[column];
}

/* ---- linear ---- */

static kptr element(kptr p, enum kern_type type, int row, int ld, int column) {
    const size_t bytes = type == KERN_F32 ? sizeof(float) : sizeof(uint16_t);
    return kptr_at(p, ((size_t)row * (size_t)ld + (size_t)column) * bytes);
}
/* Rows r .. of outputs o .., with bias and the adapter's share, into c. */
static void linear_block(struct kern *k, const struct kern_linear *a, const struct slab *s, int r,
                         int rows, int o, int outs, float *c, int c_ld) {
    struct product p = { BLAS_TURNED, s->w, s->w_ld,
                         (const uint16_t *)element(a->x, KERN_BF16, r, a->x_ld, 0).p, a->x_ld, c,
                         c_ld, a->scale * a->w.scale, a->accumulate || a->bias.p ? 1.0f : 0.0f };
    if (a->bias.p) {
        LAUNCH(bias_rows, cuda_blocks((size_t)rows * (size_t)outs, THREADS), THREADS, 0,
               cuda_stream(k), c, c_ld, (const float *)a->bias.p + o, rows, outs, a->accumulate);
        CUDA_TRY(k, "linear", cudaGetLastError());
    }
    multiply(k, "linear", &p, outs, rows, a->w.in);
    if (!a->b.out) return;
    p.w = s->b, p.w_ld = s->b_ld;
    p.x = (const uint16_t *)element(a->u, KERN_BF16, r, a->u_ld, 0).p, p.x_ld = a->u_ld;
    p.alpha = p.beta = 1.0f;
    multiply(k, "linear", &p, outs, rows, a->b.in);
}
static void linear_one(struct kern *k, const struct kern_linear *a) {
    const bool rounds = a->y_type == KERN_BF16;
    struct slab s;
    assert(!rounds || !a->accumulate);
    if (!slab_open(&s, k, "linear", &a->w, &a->b, a->rows, rounds ? sizeof(float) : 0)) return;
    for (int o = 0; o < a->w.out; o += s.outs) {
        const int outs = min(s.outs, a->w.out - o);
        unpack_slab(k, "linear", &a->w, o, outs, s.w, s.w_ld);
        if (a->b.out) unpack_slab(k, "linear", &a->b, o, outs, s.b, s.b_ld);
        for (int r = 0; r < a->rows; r += s.rows) {
            const int rows = min(s.rows, a->rows - r);
            const kptr y = element(a->y, a->y_type, r, a->y_ld, o);
            linear_block(k, a, &s, r, rows, o, outs, (float *)(rounds ? s.block : y.p),
                         rounds ? s.outs : a->y_ld);
            if (rounds)
                round_block(k, "linear", (const float *)s.block, s.outs, (uint16_t *)y.p, a->y_ld,
                            rows, outs);
        }
    }
}
void cuda_blas_linear(struct kern *k, const struct kern_linear *a, int n) {
    struct kern_linear rest[KERN_LINEARS_MAX];
    int count = 0;
    for (int i = 0; i < n; i++) {
        if (a[i].rows > FEW_ROWS && !a[i].apart && linear_takes_mma(&a[i]))
            linear_one(k, &a[i]);
        else rest[count++] = a[i];
    }
    if (count) cuda_mma_linear(k, rest, count);
}

/* ---- linear_t: the sum runs over a slab's outputs, slabs ascending ---- */

void cuda_blas_linear_t(struct kern *k, const struct kern_linear_t *a) {
    struct slab s;
    if (a->rows <= FEW_ROWS || !linear_t_takes_mma(a)) {
        cuda_mma_linear_t(k, a);
        return;
    }
    if (!slab_open(&s, k, "linear_t", &a->w, NULL, a->rows, sizeof(uint16_t))) return;
    for (int o = 0; o < a->w.out; o += s.outs) {
        const int outs = min(s.outs, a->w.out - o);
        unpack_slab(k, "linear_t", &a->w, o, outs, s.w, s.w_ld);
        for (int r = 0; r < a->rows; r += s.rows) {
            const int rows = min(s.rows, a->rows - r);
            round_block(k, "linear_t", (const float *)element(a->dy, KERN_F32, r, a->dy_ld, o).p,
                        a->dy_ld, (uint16_t *)s.block, s.outs, rows, outs);
            const struct product p = { BLAS_AS_STORED, s.w, s.w_ld, (const uint16_t *)s.block,
                                       s.outs,
                                       (float *)element(a->dx, KERN_F32, r, a->dx_ld, 0).p,
                                       a->dx_ld, a->scale * a->w.scale,
                                       a->accumulate || o ? 1.0f : 0.0f };
            multiply(k, "linear_t", &p, a->w.in, rows, outs);
        }
    }
}
