/* gemm.h - linear, linear_t and outer on the multiplier of mul.h, whichever it is.
 *
 * linear and linear_t are one driver: lanes are outputs and k the inputs, or lanes are inputs and k
 * the outputs. A part owns rows x panels of one result and does all of its sum: the rows of x once
 * into lhs blocks, the records of a few panels at a time into rhs blocks, the multiplier over both,
 * then scale, bias, adapter and rounding. Several products share one entry into the threads.
 * Does not know: how a block looks inside, nor what a multiplier's instructions are.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_SIMD_GEMM_H
#define QERL_SIMD_GEMM_H
#include "kernels/simd/mul.h"

enum {
    GEMM_ROWS = 192,                   /* rows of a part: reuse of unpacked weights */
#if defined(MUL_FUSED)
    GEMM_LHS_BYTES = 384 * 1024,       /* lhs blocks of a part: tiles wait for whatever is not L2 */
    GEMM_ACC_BYTES = 384 * 1024,       /* sums of a part: another share of it */
#else
    GEMM_LHS_BYTES = 2 << 20,          /* the registers' loops can wait for L3 */
    GEMM_ACC_BYTES = 1 << 20,
#endif
    GEMM_PANELS = MUL_PANELS,          /* unpacked together; even: a record transposed is two */
    GEMM_BLOCKS = 16 / (int)sizeof(mul_t),           /* so many blocks of them: L1 */
    GEMM_PARTS = 4,                    /* of a thread: whoever is late has the others take over */
    GEMM_WAKE = 1 << 18,               /* products that are done sooner than a thread wakes */
};

/* rows x lanes of y, summed over k */
struct gemm {
    struct mul_source x; const struct kern_weight *w; bool across;     /* across: linear_t */
    float scale; const float *bias; bool accumulate;
    struct mul_source u; const struct kern_weight *b;                  /* NULL: no adapter */
    kptr y; enum kern_type y_type; size_t y_ld;
    int rows, lanes, k;
    int part_rows, part_panels, row_parts;
};
struct gemms { struct gemm g[KERN_LINEARS_MAX]; int parts[KERN_LINEARS_MAX]; };

INLINE int blocks_of(int k) { return (k + MUL_K - 1) / MUL_K; }
INLINE int at_most(int n, int most) { return n < most ? n : most; }
INLINE int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

/* The work runs on this thread alone when it is over before another would have woken. */
static void parts_run(struct kern *k, int parts, size_t work, void (*fn)(void *, int, int),
                      void *arg) {
    struct kern here = { .pool = work >= GEMM_WAKE ? k->pool : NULL };
    cpu_run(&here, parts, fn, arg);
}

INLINE void record_fetch(const uint8_t *record, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64)
        _mm_prefetch((const char *)record + i, _MM_HINT_T0);
}

/* Where the records of a weight lie that a step of the work needs, and how many records further on
 * those that are fetched meanwhile (0: none), as pages of 4 KiB stop the hardware. */
struct records {
    const struct kern_weight *w; bool across;
    int panel, count, block, blocks;
    long next;
};

/* Panels [panel, panel + count), `blocks` blocks of k from `block`, as [panel][block] at `to`. */
static void records_get(mul_t *to, const struct records *g) {
    const struct kern_weight *w = g->w;
    const size_t bytes = kern_record_bytes(w->format), per_panel = (size_t)blocks_of(w->in),
                 panel = (size_t)g->blocks * MUL_RHS;
    const long next = g->next * (long)bytes;
    const uint8_t *data = w->data.p;
    if (!g->across) {
        for (int c = 0; c < g->count; c++)
            for (int i = 0; i < g->blocks; i++) {
                const uint8_t *record = data + ((size_t)(g->panel + c) * per_panel +
                                                (size_t)(g->block + i)) * bytes;
                if (next) record_fetch(record + next, bytes);
                rhs_record(to + (size_t)c * panel + (size_t)i * MUL_RHS, record, w->format);
            }
        return;
    }
    const int last = (w->out - 1) / KERN_OUT_BLOCK;         /* a record is two panels of inputs */
    for (int i = 0; i < g->blocks; i++)
        for (int c = 0; c < g->count; c += 2) {
            const int out = 2 * (g->block + i);
            const uint8_t *a = data + ((size_t)out * per_panel + (size_t)((g->panel + c) / 2)) *
                                          bytes;
            const uint8_t *b = out < last ? a + per_panel * bytes : NULL;
            mul_t *at = to + (size_t)c * panel + (size_t)i * MUL_RHS;
            if (next) {
                record_fetch(a + next, bytes);
                record_fetch(a + (long)(per_panel * bytes) + next, bytes);
            }
            rhs_record_t(at, at + panel, a, b, w->format);
        }
}

#if !defined(MUL_FUSED)
/* The memory of the records that lie `next` further on. */
static struct mul_ahead records_ahead(const struct records *g, long next) {
    const size_t bytes = kern_record_bytes(g->w->format), per_panel = (size_t)blocks_of(g->w->in);
    const size_t first = g->across ? 2 * (size_t)g->block * per_panel + (size_t)g->panel / 2
                                   : (size_t)g->panel * per_panel + (size_t)g->block;
    return (struct mul_ahead){
        .at = (const uint8_t *)g->w->data.p + ((long)first + next) * (long)bytes,
        .row_bytes = (size_t)(g->across ? (g->count + 1) / 2 : g->blocks) * bytes,
        .row_stride = per_panel * bytes,
        .rows = g->across ? 2 * g->blocks : g->count };
}
#endif

#if defined(MUL_FUSED)
static void records_step(void *arg, mul_t *to, int panel, int count, int block) {
    struct records step = *(const struct records *)arg;
    step.panel += panel, step.count = count, step.block += block;
    records_get(to, &step);
}
#endif

/* Rows of x as lhs blocks, one block of all rows after another; whether they meet a weight's
 * records as these lie. */
struct gemm_lhs { const mul_t *at; size_t block; int rows; bool direct; };
static struct gemm_lhs lhs_of(const mul_t *at, size_t block, int rows, int blocks,
                              const struct kern_weight *w, bool across) {
    struct gemm_lhs x = { at, block, rows, false };
#if defined(MUL_RECORDS)
    x.direct = !across && records_take(w->format, at, rows, (size_t)blocks * block);
#else
    (void)blocks, (void)w, (void)across;
#endif
    return x;
}

/* acc += lhs blocks x the weight's panels [panel, panel + count), k blocks [block, block + blocks).
 * Afterwards come the panels that follow, from block `then`. */
static void panels_sum(const struct gemm_lhs *x, mul_t *rhs, const struct kern_weight *w,
                       bool across, float *acc, int panel, int count, int block, int blocks,
                       int then) {
    struct mul m = { .lhs = x->at, .lhs_row = MUL_LHS, .lhs_block = x->block, .rhs = rhs,
                     .rhs_block = MUL_RHS, .acc = acc, .acc_row = MUL_COLS,
                     .acc_panel = (size_t)x->rows * MUL_COLS, .rows = x->rows, .panels = count,
                     .blocks = blocks };
    const long per_panel = blocks_of(w->in), block_step = across ? 2 * per_panel : 1;
#if defined(MUL_FUSED)
    struct records first = { w, across, panel, count, block, 1, GEMM_BLOCKS * block_step };
    (void)then;
    mul_fused(&m, rhs, records_step, &first, across);
#else
    const long panels_step = across ? GEMM_PANELS / 2 : GEMM_PANELS * per_panel;
    const int steps = (blocks + GEMM_BLOCKS - 1) / GEMM_BLOCKS;
    for (int i = 0; i < steps; i++) {
        const int from = blocks * i / steps, n = blocks * (i + 1) / steps - from;
        const long next = i + 1 < steps ? n * block_step
                                        : panels_step + (then - block - from) * block_step;
        const struct records here = { w, across, panel, count, block + from, n, 0 };
        m.ahead = records_ahead(&here, next);
        m.blocks = n;
        m.lhs = x->at + (size_t)from * x->block;
#if defined(MUL_RECORDS)
        if (x->direct) {
            const struct mul_ahead at = records_ahead(&here, 0);
            mul_records(&m, &(struct mul_packed){ at.at, at.row_stride, w->format });
            continue;
        }
#endif
        records_get(rhs, &here);
        m.rhs_panel = (size_t)n * MUL_RHS;
        mul_run(&m);
    }
#endif
}

/* The result's rows and panels, from the sums of the product and of the adapter (or NULL). */
static void result_put(const struct gemm *g, const float *acc, const float *more, int r0, int rows,
                       int p0, int panels) {
    const vf scale = v_set(g->scale);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < panels; c++) {
            const int lane = (p0 + c) * 16, n = v_left(lane, g->lanes);
            const size_t at = (size_t)(r0 + r) * g->y_ld + (size_t)lane,
                         sum = ((size_t)c * (size_t)rows + (size_t)r) * MUL_COLS;
            vf v = v_mul(v_load(acc + sum), scale);
            if (g->bias) v = v_add(v, v_load_n(g->bias + lane, n));
            if (g->accumulate) v = v_add(v, v_load_n((const float *)g->y.p + at, n));
            if (more) v = v_add(v, v_load(more + sum));
            v_put_n(g->y.p, g->y_type, at, v, n);
        }
}

/* A part's place in the result and its memory. All of its rows' lhs blocks lie there when they fit,
 * and sums are held for a few panels at a time; else `span` blocks, and sums for all its panels. */
struct gemm_part {
    int r0, rows, p0, panels, blocks, span, more_blocks;
    float *acc, *more;
    mul_t *lhs, *rhs;
    size_t lhs_block;
};

static struct gemm_part part_carve(const struct gemm *g, int part) {
    struct gemm_part t = { .r0 = part % g->row_parts * g->part_rows,
                           .p0 = part / g->row_parts * g->part_panels,
                           .blocks = blocks_of(g->k),
                           .more_blocks = g->b ? blocks_of(g->b->in) : 0 };
    t.rows = at_most(g->rows - t.r0, g->part_rows);
    t.panels = at_most((g->lanes + 15) / 16 - t.p0, g->part_panels);
    t.lhs_block = (size_t)round_up(t.rows, MUL_ROWS) * MUL_LHS;
    const size_t block = t.lhs_block * sizeof(mul_t),
                 sums = (size_t)t.rows * MUL_COLS * sizeof(float);
    t.span = at_most(t.blocks, (int)(GEMM_LHS_BYTES / block) / GEMM_BLOCKS * GEMM_BLOCKS);
    const size_t acc = sums * (size_t)(t.span < t.blocks ? t.panels : GEMM_PANELS),
                 more = t.more_blocks ? sums * GEMM_PANELS : 0;
    const size_t lhs = (size_t)(t.span + t.more_blocks) * block;
    char *at = cpu_scratch(acc + more + lhs + GEMM_PANELS * GEMM_BLOCKS * MUL_RHS * sizeof(mul_t));
    t.acc = (float *)(void *)at;
    t.more = more ? (float *)(void *)(at + acc) : NULL;
    t.lhs = (mul_t *)(void *)(at + acc + more);
    t.rhs = (mul_t *)(void *)(at + acc + more + lhs);
    return t;
}

/* The sums of `panels` panels from p0 on are whole: the adapter's, and out. */
static void part_put(const struct gemm *g, const struct gemm_part *t, int p0, int panels) {
    const size_t sum = (size_t)t->rows * MUL_COLS;
    for (int c = 0; c < panels; c += GEMM_PANELS) {
        const int count = at_most(panels - c, GEMM_PANELS);
        if (t->more) {
            memset(t->more, 0, (size_t)count * sum * sizeof *t->more);
            const struct gemm_lhs u = lhs_of(t->lhs + (size_t)t->span * t->lhs_block, t->lhs_block,
                                             t->rows, t->more_blocks, g->b, false);
            panels_sum(&u, t->rhs, g->b, false, t->more, p0 + c, count, 0, t->more_blocks, 0);
        }
        result_put(g, t->acc + (size_t)c * sum, t->more, t->r0, t->rows, p0 + c, count);
    }
}

static void gemm_part(const struct gemm *g, int part) {
    const struct gemm_part t = part_carve(g, part);
    const size_t sum = (size_t)t.rows * MUL_COLS;
    const bool whole = t.span == t.blocks;
    if (t.more) {
        const struct mul_source u = source_at(g->u, (size_t)t.r0, 0);
        lhs_rows(t.lhs + (size_t)t.span * t.lhs_block, MUL_LHS, t.lhs_block, &u, t.rows, g->b->in);
    }
    memset(t.acc, 0, (size_t)(whole ? 0 : t.panels) * sum * sizeof *t.acc);
    for (int b = 0; b < t.blocks; b += t.span) {
        const int n = at_most(t.blocks - b, t.span), k0 = b * MUL_K;
        const struct mul_source x = source_at(g->x, (size_t)t.r0, (size_t)k0);
        lhs_rows(t.lhs, MUL_LHS, t.lhs_block, &x, t.rows, at_most(g->k - k0, n * MUL_K));
        const struct gemm_lhs lhs = lhs_of(t.lhs, t.lhs_block, t.rows, n, g->w, g->across);
        for (int c = 0; c < t.panels; c += GEMM_PANELS) {
            const int count = at_most(t.panels - c, GEMM_PANELS);
            float *acc = t.acc + (whole ? 0 : (size_t)c * sum);
            if (whole) memset(acc, 0, (size_t)count * sum * sizeof *acc);
            panels_sum(&lhs, t.rhs, g->w, g->across, acc, t.p0 + c, count, b, n, b);
            if (whole) part_put(g, &t, t.p0 + c, count);
        }
    }
    if (!whole) part_put(g, &t, t.p0, t.panels);
}
#if defined(MUL_FUSED)
_Static_assert(GEMM_PANELS * GEMM_BLOCKS >= (int)MUL_FUSED, "what mul_fused makes has room");
#endif
_Static_assert(GEMM_LHS_BYTES / (GEMM_ROWS * MUL_LHS * sizeof(mul_t)) >= GEMM_BLOCKS,
               "some blocks of x fit");

static void gemms_part(void *arg, int part, int parts) {
    (void)parts;
    const struct gemms *all = arg;
    int i = 0;
    for (; part >= all->parts[i]; i++) part -= all->parts[i];
    gemm_part(&all->g[i], part);
}

/* Cuts every product into parts of about the same work and runs them all. */
static void gemms_run(struct kern *k, struct gemms *all, int n) {
    size_t panels = 0, work = 0;
    for (int i = 0; i < n; i++) {
        struct gemm *g = &all->g[i];
        g->row_parts = (g->rows + GEMM_ROWS - 1) / GEMM_ROWS;
        if (!g->row_parts) continue;
        g->part_rows = round_up((g->rows + g->row_parts - 1) / g->row_parts, 16);
        g->row_parts = (g->rows + g->part_rows - 1) / g->part_rows;
        panels += (size_t)((g->lanes + 15) / 16) * (size_t)g->row_parts;
        work += (size_t)(g->rows + 8) * (size_t)g->lanes * (size_t)g->k;      /* 8: unpacking */
    }
    const int threads = cpu_threads(k);
    const size_t wanted = threads > 1 && work >= GEMM_WAKE ? (size_t)threads * GEMM_PARTS : 1;
    const int share = round_up((int)((panels + wanted - 1) / wanted), GEMM_PANELS);
    int parts = 0;
    for (int i = 0; i < n; i++) {
        struct gemm *g = &all->g[i];
        if (!g->row_parts) continue;
        const int most = GEMM_ACC_BYTES / (g->part_rows * MUL_COLS * 4) / GEMM_PANELS * GEMM_PANELS;
        g->part_panels = at_most(share, most);
        all->parts[i] = g->row_parts *
                        (((g->lanes + 15) / 16 + g->part_panels - 1) / g->part_panels);
        parts += all->parts[i];
    }
    parts_run(k, parts, work, gemms_part, all);
}

/* Whether the bf16 multipliers take these operands. */
INLINE bool linear_is_bf16(const struct kern_linear *a) {
    return a->x_type == KERN_BF16 && a->w.format != KERN_FORMAT_F32 &&
           (!a->b.out || a->b.format != KERN_FORMAT_F32);
}

static void simd_linear(struct kern *k, const struct kern_linear *a, int n) {
    struct gemms all = { 0 };
    assert(n <= KERN_LINEARS_MAX);
    for (int i = 0; i < n; i++) {
        const struct kern_linear *l = &a[i];
        if (MUL_IS_BF16 && !linear_is_bf16(l)) {
            mul_wide().linear(k, a, n);
            return;
        }
        all.g[i] = (struct gemm){
            .x = { l->x.p, l->x_type, (size_t)l->x_ld, 1.0f, false }, .w = &l->w,
            .scale = l->scale * l->w.scale, .bias = l->bias.p, .accumulate = l->accumulate,
            .u = { l->u.p, l->x_type, (size_t)l->u_ld, 1.0f, false },
            .b = l->b.out ? &l->b : NULL, .y = l->y, .y_type = l->y_type, .y_ld = (size_t)l->y_ld,
            .rows = l->rows, .lanes = l->w.out, .k = l->w.in };
    }
    gemms_run(k, &all, n);
}

static void simd_linear_t(struct kern *k, const struct kern_linear_t *a) {
    if (MUL_IS_BF16 && (!a->round || a->w.format == KERN_FORMAT_F32)) {
        mul_wide().linear_t(k, a);
        return;
    }
    struct gemms all = { .g = { {
        .x = { a->dy.p, KERN_F32, (size_t)a->dy_ld, 1.0f, a->round }, .w = &a->w, .across = true,
        .scale = a->scale * a->w.scale, .accumulate = a->accumulate, .y = a->dx,
        .y_type = KERN_F32, .y_ld = (size_t)a->dx_ld, .rows = a->rows, .lanes = a->w.in,
        .k = a->w.out } } };
    gemms_run(k, &all, 1);
}

/* outer: a part owns OUTER_M x OUTER_N elements of g and runs over all rows. */
enum { OUTER_M = 64, OUTER_PANELS = 6, OUTER_N = OUTER_PANELS * 16, OUTER_BLOCKS = GEMM_BLOCKS };

static void outer_part(void *arg, int part, int parts) {
    (void)parts;
    const struct kern_outer *o = arg;
    const int across = (o->n + OUTER_N - 1) / OUTER_N, m0 = part / across * OUTER_M,
              n0 = part % across * OUTER_N;
    const int m = at_most(o->m - m0, OUTER_M), n = at_most(o->n - n0, OUTER_N);
    const int panels = (n + 15) / 16;
    float *sum = cpu_scratch(OUTER_M * OUTER_N * sizeof *sum +
                             (OUTER_M * MUL_LHS + OUTER_PANELS * MUL_RHS) * OUTER_BLOCKS *
                                 sizeof(mul_t));
    mul_t *lhs = (mul_t *)(void *)(sum + OUTER_M * OUTER_N),
          *rhs = lhs + OUTER_M * MUL_LHS * OUTER_BLOCKS;
    struct mul mul = { .lhs = lhs, .lhs_row = MUL_LHS, .lhs_block = OUTER_M * MUL_LHS,
                       .rhs = rhs, .rhs_panel = OUTER_BLOCKS * MUL_RHS, .rhs_block = MUL_RHS,
                       .acc = sum, .acc_row = OUTER_N, .acc_panel = MUL_COLS,
                       .rows = m, .panels = panels };
    const struct mul_source a = { o->a.p, KERN_F32, (size_t)o->a_ld, o->scale, o->round },
                            b = { o->b.p, o->b_type, (size_t)o->b_ld, 1.0f, false };
    for (int s = 0; s < o->seqs; s++) {
        memset(sum, 0, (size_t)m * OUTER_N * sizeof *sum);
        const int end = o->seq_start[s + 1];
        for (int row = o->seq_start[s]; row < end; row += OUTER_BLOCKS * MUL_K) {
            const int rows = at_most(end - row, OUTER_BLOCKS * MUL_K);
            mul.blocks = blocks_of(rows);
            const struct mul_source left = source_at(a, (size_t)row, (size_t)m0);
            lhs_cols(lhs, mul.lhs_row, mul.lhs_block, &left, m, rows);
            for (int i = 0; i < mul.blocks; i++)
                for (int c = 0; c < panels; c++) {
                    const struct mul_source right = source_at(b, (size_t)(row + i * MUL_K),
                                                              (size_t)(n0 + c * 16));
                    rhs_rows(rhs + (c * OUTER_BLOCKS + i) * MUL_RHS, &right,
                             at_most(rows - i * MUL_K, MUL_K), at_most(n - c * 16, 16));
                }
            mul_run(&mul);
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
    if (MUL_IS_BF16 && (!a->round || a->b_type != KERN_BF16)) {
        mul_wide().outer(k, a);
        return;
    }
    if (a->m <= 0 || a->n <= 0 || a->seqs <= 0) return;
    struct kern_outer o = *a;
    const size_t rows = (size_t)(a->seq_start[a->seqs] - a->seq_start[0]);
    parts_run(k, (a->m + OUTER_M - 1) / OUTER_M * ((a->n + OUTER_N - 1) / OUTER_N),
              rows * (size_t)a->m * (size_t)a->n, outer_part, &o);
}
#endif
