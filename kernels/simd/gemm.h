/* gemm.h - linear, linear_t and outer: packed weights unpacked to f32 in L1, multiplied by tile.h.
 *
 * linear and linear_t are one driver: lanes are outputs and k the inputs, or lanes are inputs and k
 * the outputs (then the records are transposed while they are unpacked). A part owns rows x lanes
 * of the result; k is cut in blocks of TILE_K so that a block of weights stays in L1, and partial
 * sums go through memory, which keeps their bits.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_SIMD_GEMM_H
#define QERL_SIMD_GEMM_H
#include "kernels/simd/tile.h"

enum {
    GEMM_ROWS = 192,                   /* rows of a part: reuse of unpacked weights */
    GEMM_ACC_BYTES = 256 * 1024,       /* partial sums of a part: a share of L2 */
    GEMM_X_BYTES = 384 * 1024,         /* rows of x as f32 in a part: another share */
    GEMM_GROUP = 4,                    /* panels unpacked together */
    GEMM_AHEAD = 4,                    /* records fetched ahead: pages of 4 KiB stop the hardware */
};

struct gemm {
    kptr x; enum kern_type x_type; size_t x_ld; bool round;
    /* across: lanes are inputs, k is outputs */
    const struct kern_weight *w; bool across;
    const float *bias; float scale; bool accumulate;
    kptr y; enum kern_type y_type; size_t y_ld;
    int rows, lanes, k;
    int part_rows, part_panels, row_parts;
};

/* One record to f32 [32][16]. */
INLINE void record_unpack(float *to, const uint8_t *record, enum kern_format format) {
    if (format == KERN_FORMAT_BF16) {
        for (int k = 0; k < KERN_IN_BLOCK; k++)
            v_store(to + k * 16, v_load_h((const uint16_t *)(const void *)record + k * 16));
    } else if (format == KERN_FORMAT_F32) {
        memcpy(to, record, 2048);
    } else {
        bool mx = format == KERN_FORMAT_MXFP4;
        float scale[32];
        for (int i = 0; i < (mx ? 0 : 32); i++) scale[i] = pack_e4m3(record[256 + i]);
        vf s0 = mx ? v_e8m0(record + 256) : v_load(scale), s1 = mx ? s0 : v_load(scale + 16);
        __typeof__(v_e2m1_table()) table = v_e2m1_table();
        for (int k = 0; k < 16; k++) v_store(to + k * 16, v_mul(v_e2m1(record + k * 8, table), s0));
        for (int k = 16; k < 32; k++)
            v_store(to + k * 16, v_mul(v_e2m1(record + k * 8, table), s1));
    }
}

/* Panels [p, p + count) of lanes, k in [k0, k0 + n), as [panel][TILE_K][16] floats at `to`. */
static void unpack(const struct gemm *g, float *to, int p, int count, int k0, int n) {
    const struct kern_weight *w = g->w;
    size_t bytes = kern_record_bytes(w->format),
           per_panel = ((size_t)w->in + KERN_IN_BLOCK - 1) / KERN_IN_BLOCK;
    const uint8_t *data = w->data.p;
    if (!g->across) {
        for (int c = 0; c < count; c++)
            for (int k = 0; k < n; k += KERN_IN_BLOCK) {
                const uint8_t *record = data + ((size_t)(p + c) * per_panel +
                                                (size_t)((k0 + k) / KERN_IN_BLOCK)) *
                                                   bytes;
                for (size_t i = 0; i < bytes; i += 64)
                    _mm_prefetch((const char *)record + GEMM_AHEAD * bytes + i, _MM_HINT_T0);
                record_unpack(to + ((size_t)c * TILE_K + (size_t)k) * 16, record, w->format);
            }
        return;
    }
    float flat[512];
    /* a record is two panels of inputs; p is even */
    for (int c = 0; c < count; c += 2)
        for (int k = 0; k < n; k += KERN_OUT_BLOCK) {
            record_unpack(
                flat,
                data + ((size_t)((k0 + k) / KERN_OUT_BLOCK) * per_panel + (size_t)((p + c) / 2)) *
                           bytes,
                w->format);
            for (int half = 0; half < 2; half++) {
                if (c + half >= count) break;
                float *out = to + ((size_t)(c + half) * TILE_K + (size_t)k) * 16;
                const float *in = flat + half * 256;
                v_transpose8(out, 16, in, 16);
                v_transpose8(out + 8, 16, in + 128, 16);
                v_transpose8(out + 128, 16, in + 8, 16);
                v_transpose8(out + 136, 16, in + 136, 16);
            }
        }
}

/* x[r0 .. r0 + rows), k0 .. k0 + n as f32: blocks of TILE_K, in each rows of TILE_K. */
static void rows_get(const struct gemm *g, float *to, int r0, int rows, int k0, int n) {
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < n; k += 16) {
            vf v = v_get_n(g->x.p, g->x_type, (size_t)(r0 + r) * g->x_ld + (size_t)(k0 + k),
                           v_left(k, n));
            v_store(to + ((size_t)(k / TILE_K) * (size_t)rows + (size_t)r) * TILE_K + k % TILE_K,
                    g->round ? v_round(v) : v);
        }
}

static void result_put(const struct gemm *g, const float *acc, int r0, int rows, int p0,
                       int panels) {
    vf scale = v_set(g->scale);
    for (int c = 0; c < panels; c++) {
        int lane = (p0 + c) * 16, n = v_left(lane, g->lanes);
        vf bias = g->bias ? v_load_n(g->bias + lane, n) : v_zero();
        for (int r = 0; r < rows; r++) {
            size_t at = (size_t)(r0 + r) * g->y_ld + (size_t)lane;
            vf v = v_mul(v_load(acc + ((size_t)c * (size_t)rows + (size_t)r) * 16), scale);
            if (g->bias) v = v_add(v, bias);
            if (g->accumulate) v = v_add(v_load_n((const float *)g->y.p + at, n), v);
            v_put_n(g->y.p, g->y_type, at, v, n);
        }
    }
}

/* Where the f32 weights of `count` panels from p are, k in [k0, k0 + n): unpacked to `to`, or the
 * records themselves. */
INLINE void weights_get(const struct gemm *g, struct tile *t, float *to, int p, int count, int k0,
                        int n) {
    t->n = n;
    t->w_k = 16;
    if (!g->across && g->w->format == KERN_FORMAT_F32) {
        t->w_panel = ((size_t)g->w->in + KERN_IN_BLOCK - 1) / KERN_IN_BLOCK * 512;
        t->w = (const float *)g->w->data.p + (size_t)p * t->w_panel + (size_t)k0 * 16;
        return;
    }
    t->w_panel = TILE_K * 16;
    t->w = to;
    unpack(g, to, p, count, k0, n);
}

static void gemm_part(void *arg, int part, int parts) {
    (void)parts;
    const struct gemm *g = arg;
    int all = (g->lanes + 15) / 16, r0 = part % g->row_parts * g->part_rows,
        p0 = part / g->row_parts * g->part_panels;
    int rows = g->rows - r0 < g->part_rows ? g->rows - r0 : g->part_rows;
    int panels = all - p0 < g->part_panels ? all - p0 : g->part_panels;
    int blocks = (g->k + TILE_K - 1) / TILE_K,
        fit = GEMM_X_BYTES / (rows * TILE_K * (int)sizeof(float));
    /* of k, held as f32 at a time; fit >= 1 */
    if (blocks > fit) blocks = fit;
    size_t acc_size = (size_t)panels * (size_t)rows * 16, w_size = GEMM_GROUP * TILE_K * 16,
           x_block = (size_t)rows * TILE_K;
    float *acc = cpu_scratch((acc_size + w_size + x_block * (size_t)blocks) * sizeof *acc),
          *w = acc + acc_size, *x = w + w_size;
    memset(acc, 0, acc_size * sizeof *acc);
    int group = rows <= TILE_THIN ? GEMM_GROUP : 2, span = blocks * TILE_K;
    struct tile t = { .acc_row = 16, .acc_panel = (size_t)rows * 16 };
    for (int k0 = 0; k0 < g->k; k0 += span) {
        int k1 = g->k - k0 < span ? g->k : k0 + span;
        rows_get(g, x, r0, rows, k0, k1 - k0);
        for (int c = 0; c < panels; c += group) {
            int count = panels - c < group ? panels - c : group;
            t.acc = acc + (size_t)c * t.acc_panel;
            t.x = x;
            for (int k = k0; k < k1; k += TILE_K, t.x += x_block) {
                weights_get(g, &t, w, p0 + c, count, k, k1 - k < TILE_K ? k1 - k : TILE_K);
                tile_gemm(t, rows, count);
            }
        }
    }
    result_put(g, acc, r0, rows, p0, panels);
}
_Static_assert(GEMM_X_BYTES / ((GEMM_ROWS + 8) * TILE_K * 4) >= 1, "a block of x fits");

static void gemm_run(struct kern *k, struct gemm *g) {
    if (g->rows <= 0 || g->lanes <= 0) return;
    int panels = (g->lanes + 15) / 16, threads = cpu_threads(k);
    g->row_parts = (g->rows + GEMM_ROWS - 1) / GEMM_ROWS;
    g->part_rows = (g->rows + g->row_parts - 1) / g->row_parts;
    g->part_rows = (g->part_rows + TILE_R - 1) / TILE_R * TILE_R;
    g->row_parts = (g->rows + g->part_rows - 1) / g->part_rows;
    int most = GEMM_ACC_BYTES / (g->part_rows * 64), wanted = threads > 1 ? threads * 4 : 1;
    if ((size_t)g->rows * (size_t)g->lanes * (size_t)g->k < 65536) wanted = 1;
    int cuts = (wanted + g->row_parts - 1) / g->row_parts, each = (panels + cuts - 1) / cuts;
    if (each > most) each = most;
    each = (each + GEMM_GROUP - 1) / GEMM_GROUP * GEMM_GROUP;
    g->part_panels = each;
    cpu_run(k, g->row_parts * ((panels + each - 1) / each), gemm_part, g);
}

static void linear_one(struct kern *k, const struct kern_linear *a) {
    struct gemm g = { .x = a->x,
                      .x_type = a->x_type,
                      .x_ld = (size_t)a->x_ld,
                      .w = &a->w,
                      .bias = a->bias.p,
                      .scale = a->scale * a->w.scale,
                      .accumulate = a->accumulate,
                      .y = a->y,
                      .y_type = a->y_type,
                      .y_ld = (size_t)a->y_ld,
                      .rows = a->rows,
                      .lanes = a->w.out,
                      .k = a->w.in };
    gemm_run(k, &g);
}

static void simd_linear(struct kern *k, const struct kern_linear *a, int n) {
    for (int i = 0; i < n; i++) {
        linear_one(k, &a[i]);
        if (!a[i].b.out) continue;
        struct kern_linear lora = a[i];
        lora.x = a[i].u, lora.x_ld = a[i].u_ld, lora.w = a[i].b;
        lora.bias = (kptr){ NULL }, lora.scale = 1, lora.accumulate = true;
        linear_one(k, &lora);
    }
}

static void simd_linear_t(struct kern *k, const struct kern_linear_t *a) {
    struct gemm g = { .x = a->dy,
                      .x_type = KERN_F32,
                      .x_ld = (size_t)a->dy_ld,
                      .round = a->round,
                      .w = &a->w,
                      .across = true,
                      .scale = a->scale * a->w.scale,
                      .accumulate = a->accumulate,
                      .y = a->dx,
                      .y_type = KERN_F32,
                      .y_ld = (size_t)a->dx_ld,
                      .rows = a->rows,
                      .lanes = a->w.in,
                      .k = a->w.out };
    gemm_run(k, &g);
}

/* outer: a part owns OUTER_M x OUTER_N elements of g and runs over all rows. */
enum { OUTER_M = 64, OUTER_N = 64, OUTER_TILE = 32 };

static void outer_part(void *arg, int part, int parts) {
    (void)parts;
    const struct kern_outer *o = arg;
    int across = (o->n + OUTER_N - 1) / OUTER_N, m0 = part / across * OUTER_M,
        n0 = part % across * OUTER_N;
    int m = o->m - m0 < OUTER_M ? o->m - m0 : OUTER_M,
        n = o->n - n0 < OUTER_N ? o->n - n0 : OUTER_N;
    int panels = (n + 15) / 16;
    _Alignas(64) float a[OUTER_TILE * OUTER_M], b[OUTER_TILE * OUTER_N], tile[OUTER_M * OUTER_N],
        sum[OUTER_M * OUTER_N];
    struct tile t = { .x = a,
                      .x_k = OUTER_M,
                      .w = b,
                      .w_k = OUTER_N,
                      .w_panel = 16,
                      .acc = tile,
                      .acc_row = OUTER_N,
                      .acc_panel = 16 };
    vf scale = v_set(o->scale);
    for (int s = 0; s < o->seqs; s++) {
        memset(sum, 0, (size_t)m * OUTER_N * sizeof *sum);
        for (int row = o->seq_start[s]; row < o->seq_start[s + 1]; row += OUTER_TILE) {
            t.n = o->seq_start[s + 1] - row < OUTER_TILE ? o->seq_start[s + 1] - row : OUTER_TILE;
            for (int r = 0; r < t.n; r++) {
                const float *from = (const float *)o->a.p + (size_t)(row + r) * (size_t)o->a_ld +
                                    m0;
                for (int i = 0; i < m; i += 16) {
                    vf v = v_mul(scale, v_load_n(from + i, v_left(i, m)));
                    v_store(a + r * OUTER_M + i, o->round ? v_round(v) : v);
                }
                for (int i = 0; i < n; i += 16)
                    v_store(b + r * OUTER_N + i,
                            v_get_n(o->b.p, o->b_type,
                                    (size_t)(row + r) * (size_t)o->b_ld + (size_t)(n0 + i),
                                    v_left(i, n)));
            }
            memset(tile, 0, (size_t)m * OUTER_N * sizeof *tile);
            tile_by_k(t, m, panels);
            for (int i = 0; i < m; i++)
                for (int j = 0; j < panels * 16; j += 16)
                    v_store(sum + i * OUTER_N + j,
                            v_add(v_load(sum + i * OUTER_N + j), v_load(tile + i * OUTER_N + j)));
        }
        for (int i = 0; i < m; i++)
            for (int j = 0; j < n; j += 16) {
                float *g = (float *)o->g.p + (size_t)(m0 + i) * (size_t)o->n + n0 + j;
                v_store_n(g, v_add(v_load_n(g, v_left(j, n)), v_load(sum + i * OUTER_N + j)),
                          v_left(j, n));
            }
    }
}

static void simd_outer(struct kern *k, const struct kern_outer *a) {
    struct kern_outer o = *a;
    if (a->m <= 0 || a->n <= 0) return;
    cpu_run(k, (a->m + OUTER_M - 1) / OUTER_M * ((a->n + OUTER_N - 1) / OUTER_N), outer_part, &o);
}
#endif
