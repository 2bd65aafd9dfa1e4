/* decode.cu - linear for at most 16 rows, as decoding asks for it: a launch reads each packed
 * weight once, decodes it into registers and multiplies it with all rows.
 *
 * Knows: a thread block has one panel of 16 outputs and walks over its records some at a time,
 * LANES threads a record: each has the even or the odd chains of OUTS outputs. What a record adds
 * to its outputs goes to shared memory, where one thread an output and row adds it up, records
 * ascending: that is the tile order, and linear.cu's bits.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cuda/linears.h"

template <int ROWS> struct __align__(16) few {
    static constexpr int OUTS = ROWS > 8 ? 4 : 8, LANES = 2 * KERN_OUT_BLOCK / OUTS,
                         THREADS = ROWS < 8 ? 128 : 64, RECORDS = THREADS / LANES,
                         SUMS = ROWS * KERN_OUT_BLOCK, MINE = (SUMS + THREADS - 1) / THREADS,
                         BLOCKS = ROWS < 4 ? 6 : 5;    /* of an SM: their registers suffice */
    /* all rows of an input side by side; the slack keeps records out of each other's banks */
    float x[RECORDS][(KERN_IN_BLOCK + 2) * ROWS];
    float sum[RECORDS][ROWS][KERN_OUT_BLOCK];
};

template <int ROWS>
__device__ static void few_stage(struct few<ROWS> *s, kptr x, enum kern_type type, int ld, int rows,
                                 int from, int in) {
    typedef struct few<ROWS> few;
    for (int e = (int)threadIdx.x; e < few::RECORDS * KERN_IN_BLOCK; e += few::THREADS) {
        float *to = s->x[e / KERN_IN_BLOCK] + e % KERN_IN_BLOCK * ROWS;
        for (int r = 0; r < ROWS; r++)
            to[r] = r < rows && from + e < in
                        ? cuda_get(x, type, (size_t)r * (size_t)ld + (size_t)(from + e))
                        : 0.0f;
    }
}

template <int ROWS> __device__ static void few_rows(float v[ROWS], const float *x) {
    if constexpr (ROWS == 1) {
        v[0] = x[0];
    } else if constexpr (ROWS == 2) {
        const float2 both = *(const float2 *)x;
        v[0] = both.x, v[1] = both.y;
    } else {
        for (int r = 0; r < ROWS; r += 4) {
            const float4 four = *(const float4 *)(x + r);
            v[r] = four.x, v[r + 1] = four.y, v[r + 2] = four.z, v[r + 3] = four.w;
        }
    }
}

/* One record's chains of parity `odd` for outputs first .. first + OUTS - 1. */
template <int ROWS, enum kern_format FORMAT>
__device__ static void few_chains(float chain[ROWS][few<ROWS>::OUTS], const float *x,
                                  const uint8_t *record, int odd, int first) {
    constexpr int OUTS = few<ROWS>::OUTS;
    float scale[OUTS], w[OUTS], v[ROWS];
#pragma unroll 1
    for (int half16 = 0; half16 < KERN_IN_BLOCK; half16 += 16) {
        record_scales<OUTS>(scale, record, FORMAT, half16, first);
#pragma unroll
        for (int step = 0; step < 8; step++) {
            const int k = half16 + 2 * step + odd;
            record_values<OUTS>(w, record, FORMAT, k, first, scale);
            few_rows<ROWS>(v, x + k * ROWS);
            for (int r = 0; r < ROWS; r++)
                for (int j = 0; j < OUTS; j++) chain[r][j] = fma_ftz(v[r], w[j], chain[r][j]);
        }
    }
}

/* This thread's share of the records from `from` on; without a record it hands on zeros. */
template <int ROWS>
__device__ static void few_record(struct few<ROWS> *s, const struct kern_weight *w, int panel,
                                  int from) {
    constexpr int OUTS = few<ROWS>::OUTS, PART = OUTS / 2;
    const int t = (int)threadIdx.x, local = t / few<ROWS>::LANES, odd = t % 2,
              first = t / 2 % (KERN_OUT_BLOCK / OUTS) * OUTS;
    float chain[ROWS][OUTS] = { };
    if (from + local < record_blocks(w)) {
        const uint8_t *record = record_of(w, panel, from + local);
        const float *x = s->x[local];
        switch (w->format) {
        case KERN_FORMAT_F32:
            few_chains<ROWS, KERN_FORMAT_F32>(chain, x, record, odd, first);
            break;
        case KERN_FORMAT_BF16:
            few_chains<ROWS, KERN_FORMAT_BF16>(chain, x, record, odd, first);
            break;
        case KERN_FORMAT_MXFP4:
            few_chains<ROWS, KERN_FORMAT_MXFP4>(chain, x, record, odd, first);
            break;
        case KERN_FORMAT_NVFP4:
            few_chains<ROWS, KERN_FORMAT_NVFP4>(chain, x, record, odd, first);
            break;
        }
    }
    /* the thread beside has the other chain: each gets the sums of half the outputs */
    for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < PART; j++) {
            const float mine = odd ? chain[r][PART + j] : chain[r][j],
                        other = odd ? chain[r][j] : chain[r][PART + j];
            s->sum[local][r][first + odd * PART + j] =
                add_ftz(mine, __shfl_xor_sync(0xffffffffu, other, 1));
        }
}

/* acc[i]: x W' of sum number t + i * THREADS, 16 outputs of a row after each other. */
template <int ROWS>
__device__ static void few_product(float acc[few<ROWS>::MINE], struct few<ROWS> *s, kptr x,
                                   enum kern_type type, int ld, int rows,
                                   const struct kern_weight *w, int panel) {
    typedef struct few<ROWS> few;
    const int blocks = record_blocks(w);
    for (int i = 0; i < few::MINE; i++) acc[i] = 0.0f;
    for (int from = 0; from < blocks; from += few::RECORDS) {
        few_stage<ROWS>(s, x, type, ld, rows, from * KERN_IN_BLOCK, w->in);
        __syncthreads();
        few_record<ROWS>(s, w, panel, from);
        __syncthreads();
        const int n = min((int)few::RECORDS, blocks - from);
        for (int i = 0; i < few::MINE; i++) {
            const int e = (int)threadIdx.x + i * few::THREADS;
            for (int b = 0; e < few::SUMS && b < n; b++)
                acc[i] = add_ftz(acc[i], s->sum[b][e / KERN_OUT_BLOCK][e % KERN_OUT_BLOCK]);
        }
    }
}

template <int ROWS>
__global__ void __launch_bounds__(few<ROWS>::THREADS, few<ROWS>::BLOCKS)
    linear_few(struct linears all) {
    typedef struct few<ROWS> few;
    __shared__ few s;
    const struct kern_linear &a = all.of[blockIdx.y];
    const int panel = (int)blockIdx.x;
    if (panel >= record_panels(&a.w)) return;
    float v[few::MINE], more[few::MINE];
    few_product<ROWS>(v, &s, a.x, a.x_type, a.x_ld, a.rows, &a.w, panel);
    if (a.b.out) few_product<ROWS>(more, &s, a.u, a.x_type, a.u_ld, a.rows, &a.b, panel);
    for (int i = 0; i < few::MINE; i++) {
        const int e = (int)threadIdx.x + i * few::THREADS, r = e / KERN_OUT_BLOCK,
                  o = panel * KERN_OUT_BLOCK + e % KERN_OUT_BLOCK;
        if (r >= a.rows || o >= a.w.out) continue;
        const float y = linear_value(&a, v[i], r, o);
        linear_put(&a, a.b.out ? y + more[i] : y, r, o);
    }
}

template <int ROWS> static void launch_few(struct kern *k, const struct linears *all) {
    const dim3 grid((unsigned)((all->outs + KERN_OUT_BLOCK - 1) / KERN_OUT_BLOCK),
                    (unsigned)all->n);
    LAUNCH((linear_few<ROWS>), grid, few<ROWS>::THREADS, 0, cuda_stream(k), *all);
}
void cuda_linear_few(struct kern *k, const struct linears *all) {
    if (all->rows <= 1) launch_few<1>(k, all);
    else if (all->rows <= 2) launch_few<2>(k, all);
    else if (all->rows <= 4) launch_few<4>(k, all);
    else if (all->rows <= 8) launch_few<8>(k, all);
    else launch_few<LINEAR_FEW>(k, all);
    CUDA_TRY(k, "linear", cudaGetLastError());
}
