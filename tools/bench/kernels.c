/* kernels.c - each operation alone, as a share of its roofline: the larger of (bytes it must move
 * at the speed probed for its working set) and (its FLOPs at the peak of the path's instruction).
 *
 * Weights rotate over the layers as in a step, so they come from where they come from there.
 * Order: room, products, attention, rows, the threads themselves.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/rng.h"
#include "lib/base/str.h"
#include "tools/bench/bench.h"
#include "tools/bench/synth.h"

enum { ROWS = 1200, SEQ = 300, SEQS = ROWS / SEQ, SEQS_DECODE = 16, CONTEXT = 200, RANK = 32,
       HEAD_ROWS = 64, SHARED_PAGES = 3 };

/* ---- room: one set of arrays for all operations of a model ---- */

struct room {
    struct bench *b;
    struct synth *s;
    struct kern *k;
    const struct model_conf *c;
    kptr x, y, y2, y3;                   /* bf16 or f32 [ROWS, widest] */
    kptr logits, lp, slots, pos, targets, table;
    struct kern_kv kv;
    size_t params;                       /* of the adapter: p, m, v, g */
    kptr adam[4];
    int turn;                            /* which layer is next */
    bool hot;                            /* the first layer's weights each time, from a cache */
    /* the operation in hand */
    int group, rows;
    enum target target;
    bool transposed;
    struct kern_weight head;
    int32_t seq_start[SEQS + 1], slot[ROWS], at[ROWS];
    kptr sampler, drawn;                 /* [SEQS_DECODE]: draws are token, lp, lp_raw */
    struct err err;
};

/* Target tokens, the pages of each slot, AdamW's second moments. */
static int room_fill(struct room *r, struct err *e) {
    struct kern *k = r->k;
    const int slot_pages = r->kv.slot_pages;
    int32_t target[ROWS], table[SEQS_DECODE * ((SEQ + KERN_PAGE - 1) / KERN_PAGE)];
    for (int i = 0; i < ROWS; i++)
        target[i] = (int32_t)(rng_mix64((uint64_t)i) % (uint64_t)r->c->vocab);
    for (int s = 0; s < SEQS_DECODE; s++)            /* a group of 8 shares its first pages */
        for (int p = 0; p < slot_pages; p++)
            table[s * slot_pages + p] = (p < SHARED_PAGES ? s / 8 * 8 : s) * slot_pages + p;
    float *v = mem_alloc(r->params * sizeof *v);
    for (size_t i = 0; i < r->params; i++) v[i] = 1e-4f;
    k->upload(k, r->targets, target, sizeof target);
    k->upload(k, r->kv.table, table, sizeof table);
    k->upload(k, r->adam[2], v, r->params * sizeof *v);
    free(v);
    return k->sync(k, e);
}

static int room_open(struct room *r, struct bench *b, struct err *e) {
    struct kern *k = &b->synth->kern;
    const struct model_conf *c = &b->synth->model.conf;
    struct lora_shape shape = shape_lora(RANK);
    const int wide = 2 * c->ffn_dim, slot_pages = (SEQ + KERN_PAGE - 1) / KERN_PAGE;
    const size_t rows = (size_t)ROWS * (size_t)wide * sizeof(float), ints = ROWS * sizeof(int32_t);
    *r = (struct room){ .b = b, .s = b->synth, .k = k, .c = c,
                        .params = lora_params(c, &shape) };
    r->kv = (struct kern_kv){ .type = KERN_BF16, .layers = c->layers, .kv_heads = c->kv_heads,
                              .head_dim = c->head_dim, .slot_pages = slot_pages };
    const size_t page = (size_t)c->layers * 2 * (size_t)(c->kv_heads * c->head_dim) * KERN_PAGE * 2;
    const struct { kptr *p; size_t bytes; } all[] = {
        { &r->x, rows }, { &r->y, rows }, { &r->y2, rows }, { &r->y3, rows },
        { &r->logits, (size_t)HEAD_ROWS * (size_t)c->vocab * sizeof(float) },
        { &r->lp, ROWS * (size_t)c->heads * sizeof(float) },
        { &r->slots, ints }, { &r->pos, ints }, { &r->targets, ints },
        { &r->kv.table, (size_t)SEQS_DECODE * (size_t)slot_pages * sizeof(int32_t) },
        { &r->kv.pages, (size_t)(SEQS_DECODE * slot_pages) * page },
        { &r->adam[0], r->params * 4 }, { &r->adam[1], r->params * 4 },
        { &r->adam[2], r->params * 4 }, { &r->adam[3], r->params * 4 },
        { &r->sampler, SEQS_DECODE * sizeof(struct kern_sampler) },
        { &r->drawn, 3 * SEQS_DECODE * sizeof(float) },
    };
    for (size_t i = 0; i < COUNT_OF(all); i++)
        if (k->alloc(k, all[i].p, all[i].bytes, e) < 0) return -1;
    return room_fill(r, e);
}

/* The largest of its arrays. */
static double room_bytes(const struct model_conf *c) {
    const struct lora_shape shape = shape_lora(RANK);
    return 4. * ROWS * 2 * c->ffn_dim * sizeof(float) + 4. * HEAD_ROWS * c->vocab +
           4. * SEQS_DECODE * (SEQ + KERN_PAGE) * c->layers * c->kv_heads * c->head_dim +
           4. * sizeof(float) * (double)lora_params(c, &shape);
}

static void room_close(struct room *r) {
    kptr *all[] = { &r->x, &r->y, &r->y2, &r->y3, &r->logits, &r->lp, &r->slots, &r->pos,
                    &r->targets, &r->kv.table, &r->kv.pages, &r->adam[0], &r->adam[1],
                    &r->adam[2], &r->adam[3], &r->sampler, &r->drawn };
    for (size_t i = 0; i < COUNT_OF(all); i++)
        if (all[i]->p) r->k->free(r->k, all[i]);
}

/* Times fn and reports it against max(bytes at the speed of `set`, flops, seconds). */
static void roof(struct room *r, const char *key, void (*fn)(void *), double bytes, double set,
                 double flops, double seconds) {
    const struct limits *l = bench_limits(r->b);
    bool kept;
    struct spread s = timing_kept(r->k, fn, r, r->b->quick ? .03 : .12, &kept, &r->err);
    if (s.n == 0) {
        bench_failed(r->b, key, &r->err);
        return;
    }
    double limit = bytes / limits_read(l, set), calc = flops / l->flops;
    limit = limit > calc ? limit : calc;
    limit = limit > seconds ? limit : seconds;
    char what[64];
    snprintf(what, sizeof what, "%.0f GFLOP/s, %.1f GB/s%s", flops / s.median * 1e-9,
             bytes / s.median * 1e-9, kept ? ", replayed" : "");
    bench_report(r->b, key, &(struct figure){ .unit = "us", .what = what,
                                              .s = spread_times(s, 1e6), .limit = limit * 1e6,
                                              .work = { bytes, flops, 0 }, .set = set,
                                              .seconds = s.median, .target = r->target });
}

static bool wants(const struct room *r, char key[BENCH_KEY_MAX], const char *name, int rows) {
    snprintf(key, BENCH_KEY_MAX, "kernels/%s/%s/%d", shape_name[r->s->shape], name, rows);
    return bench_begins(r->b, key);
}

/* ---- products ---- */

static const struct { const char *name; enum proj first; int n; } groups[] = {
    { "qkv", PROJ_Q, 3 }, { "o", PROJ_O, 1 }, { "gate_up", PROJ_GATE, 2 }, { "down", PROJ_DOWN, 1 },
};

static void linear_call(void *arg) {
    struct room *r = arg;
    const struct model_layer *l = &r->s->model.layer[r->hot ? 0 : r->turn++ % r->c->layers];
    struct kern_linear a[KERN_LINEARS_MAX];
    const kptr y[] = { r->y, r->y2, r->y3 };
    const int n = groups[r->group].n;
    for (int i = 0; i < n; i++) {
        const struct kern_weight *w = &l->w[(int)groups[r->group].first + i];
        a[i] = (struct kern_linear){ .x = r->x, .x_type = KERN_BF16, .x_ld = w->in, .w = *w,
                                     .scale = 1, .y = y[i], .y_type = KERN_F32, .y_ld = w->out,
                                     .rows = r->rows };
    }
    if (!r->transposed) {
        r->k->linear(r->k, a, n);
        return;
    }
    for (int i = 0; i < n; i++)
        r->k->linear_t(r->k, &(struct kern_linear_t){ .dy = y[i], .dy_ld = a[i].w.out, .w = a[i].w,
                                                      .scale = 1, .round = true,
                                                      .accumulate = i > 0, .dx = r->x,
                                                      .dx_ld = a[i].w.in, .rows = r->rows });
}

static void head_call(void *arg) {
    struct room *r = arg;
    const struct kern_weight *w = &r->head;
    if (r->transposed)
        r->k->linear_t(r->k, &(struct kern_linear_t){ .dy = r->logits, .dy_ld = w->out, .w = *w,
                                                      .scale = 1, .round = true, .dx = r->x,
                                                      .dx_ld = w->in, .rows = r->rows });
    else
        r->k->linear(r->k, &(struct kern_linear){ .x = r->x, .x_type = KERN_BF16, .x_ld = w->in,
                                                  .w = *w, .scale = 1, .y = r->logits,
                                                  .y_type = KERN_F32, .y_ld = w->out,
                                                  .rows = r->rows }, 1);
}

static double tiled(const struct room *r, int rows) {
    const int t = bench_limits(r->b)->tile_rows;
    return (rows + t - 1) / t * t;
}

/* Group g, and what its weights take of the machine. */
static void linear_figure(struct room *r, const char *key, int g, int rows, bool transposed,
                          bool hot) {
    double bytes = 0, flops = 0;
    for (int p = 0; p < groups[g].n; p++) {
        const struct kern_weight *w = &r->s->model.layer[0].w[(int)groups[g].first + p];
        bytes += (double)kern_weight_bytes(w->format, w->out, w->in);
        flops += 2. * w->out * w->in * tiled(r, rows);
    }
    r->group = g;
    r->rows = rows;
    r->transposed = transposed;
    r->hot = hot;
    r->target = rows == ROWS ? TARGET_PEAK : TARGET_NONE;      /* a GEMM of the training */
    roof(r, key, linear_call, bytes, hot ? bytes : bytes * r->c->layers, flops, 0);
    r->target = TARGET_NONE;
}

static void linears(struct room *r) {
    static const int rows[] = { 1, 16, 64, ROWS };
    char key[BENCH_KEY_MAX], name[32];
    for (int t = 0; t < 2; t++)
        for (size_t g = 0; g < COUNT_OF(groups); g++)
            for (size_t i = t ? COUNT_OF(rows) - 1 : 0; i < COUNT_OF(rows); i++) {
                snprintf(name, sizeof name, "%s/%s", t ? "linear_t" : "linear", groups[g].name);
                if (!wants(r, key, name, rows[i])) continue;
                linear_figure(r, key, (int)g, rows[i], t, false);
            }
    for (size_t g = 0; g < COUNT_OF(groups); g++)
        for (size_t i = 1; i < 3; i++) {
            snprintf(name, sizeof name, "linear/%s/hot", groups[g].name);
            if (wants(r, key, name, rows[i])) linear_figure(r, key, (int)g, rows[i], false, true);
        }
}

static void heads(struct room *r) {
    static const struct { const char *name; int rows; bool mxfp4, transposed; } head[] = {
        { "head-bf16", 1, false, false },   { "head-bf16", 16, false, false },
        { "head-bf16", 64, false, false },  { "head-mxfp4", 1, true, false },
        { "head-mxfp4", 16, true, false },  { "head-mxfp4", 64, true, false },
        { "head-bf16_t", 64, false, true },
    };
    char key[BENCH_KEY_MAX];
    for (size_t i = 0; i < COUNT_OF(head); i++) {
        if (!wants(r, key, head[i].name, head[i].rows)) continue;
        r->head = head[i].mxfp4 ? r->s->head_mxfp4 : r->s->head_bf16;
        r->rows = head[i].rows;
        r->transposed = head[i].transposed;
        double bytes = (double)kern_weight_bytes(r->head.format, r->head.out, r->head.in);
        roof(r, key, head_call, bytes, bytes,
             2. * r->head.out * r->head.in * tiled(r, r->rows), 0);
    }
}

/* B of gate: gradient [ffn, RANK]; A of gate: [RANK, dim]. */
static void outer_call(void *arg) {
    struct room *r = arg;
    const int m = r->transposed ? RANK : r->c->ffn_dim, n = r->transposed ? r->c->dim : RANK;
    r->k->outer(r->k, &(struct kern_outer){ .a = r->y, .a_ld = m, .b = r->x, .b_type = KERN_BF16,
                                            .b_ld = n, .scale = 1, .round = true, .g = r->y2,
                                            .m = m, .n = n, .seq_start = r->seq_start,
                                            .seqs = SEQS });
}

static void outers(struct room *r) {
    char key[BENCH_KEY_MAX];
    for (int a = 0; a < 2; a++) {
        if (!wants(r, key, a ? "outer/gate_a" : "outer/gate_b", ROWS)) continue;
        const double m = a ? RANK : r->c->ffn_dim, n = a ? r->c->dim : RANK;
        r->transposed = a;
        r->k->zero(r->k, r->y2, (size_t)(m * n) * sizeof(float));
        roof(r, key, outer_call, ROWS * (4 * m + 2 * n), ROWS * (4 * m + 2 * n),
             2. * ROWS * m * n, 0);
    }
}

/* ---- attention ---- */

static void attn_call(void *arg) {
    struct room *r = arg;
    r->k->attn(r->k, &(struct kern_attn){ .q = r->x, .q_type = KERN_BF16, .kv = r->kv,
                                          .layer = r->turn++ % r->c->layers, .slots = r->slots,
                                          .pos = r->pos, .y = r->y, .y_type = KERN_BF16,
                                          .lse = r->lp, .rows = r->rows, .heads = r->c->heads,
                                          .scale = .125f });
}

static void attn_bwd_call(void *arg) {
    struct room *r = arg;
    const size_t width = (size_t)ROWS * (size_t)(r->c->heads * r->c->head_dim) * sizeof(float);
    r->k->attn_bwd(r->k, &(struct kern_attn_bwd){ .q = r->x, .q_type = KERN_BF16, .kv = r->kv,
                                                  .layer = r->turn++ % r->c->layers,
                                                  .slots = r->slots, .y = r->y,
                                                  .y_type = KERN_BF16, .lse = r->lp,
                                                  .dy = kptr_at(r->y2, width), .dq = r->y2,
                                                  .dk = r->y3, .dv = kptr_at(r->y3, width),
                                                  .seq_start = r->seq_start, .seqs = SEQS,
                                                  .heads = r->c->heads, .scale = .125f });
}

static void places(struct room *r) {
    r->k->upload(r->k, r->slots, r->slot, sizeof r->slot);
    r->k->upload(r->k, r->pos, r->at, sizeof r->at);
}

static void attentions(struct room *r) {
    char key[BENCH_KEY_MAX];
    const double q = r->c->heads * r->c->head_dim, kv = 4. * r->c->kv_heads * r->c->head_dim;
    for (int i = 0; i < SEQS_DECODE; i++) r->slot[i] = i, r->at[i] = CONTEXT - 1;
    places(r);
    if (wants(r, key, "attn/decode", SEQS_DECODE)) {
        const double positions = (double)SEQS_DECODE / 8 * SHARED_PAGES * KERN_PAGE +
                                 SEQS_DECODE * (CONTEXT - SHARED_PAGES * KERN_PAGE);
        r->rows = SEQS_DECODE;
        roof(r, key, attn_call, positions * kv, positions * kv * r->c->layers,
             4 * q * CONTEXT * SEQS_DECODE, 0);
    }
    for (int i = 0; i < ROWS; i++) r->slot[i] = i / SEQ, r->at[i] = i % SEQ;
    places(r);
    r->rows = ROWS;
    if (wants(r, key, "attn/train", ROWS))
        roof(r, key, attn_call, ROWS * (kv + 4 * q), ROWS * (kv + 4 * q), 2 * q * SEQ * ROWS, 0);
    if (wants(r, key, "attn_bwd/train", ROWS)) {
        attn_call(r);
        roof(r, key, attn_bwd_call, ROWS * (2 * kv + 12 * q), ROWS * (2 * kv + 12 * q),
             5 * q * SEQ * ROWS, 0);
    }
}

/* ---- rows ---- */

static void rmsnorm_call(void *arg) {
    struct room *r = arg;
    r->k->rmsnorm(r->k, &(struct kern_rmsnorm){ .x = r->y, .w = r->s->model.norm_final, .y = r->x,
                                                .y_type = KERN_BF16, .rows = ROWS,
                                                .dim = r->c->dim, .eps = 1e-6f });
}
static void swiglu_call(void *arg) {
    struct room *r = arg;
    r->k->swiglu(r->k, &(struct kern_swiglu){ .gate = r->y, .up = r->y2, .y = r->x,
                                              .y_type = KERN_BF16, .rows = ROWS,
                                              .dim = r->c->ffn_dim });
}
static void sample_call(void *arg) {
    struct room *r = arg;
    const size_t column = SEQS_DECODE * sizeof(float);
    r->k->sample(r->k, &(struct kern_sample){ .logits = r->logits, .rows = SEQS_DECODE,
                                              .vocab = r->c->vocab, .sampler = r->sampler,
                                              .token = r->drawn, .lp = kptr_at(r->drawn, column),
                                              .lp_raw = kptr_at(r->drawn, 2 * column) });
}
static void logprob_call(void *arg) {
    struct room *r = arg;
    r->k->logprob(r->k, &(struct kern_logprob){ .logits = r->logits, .targets = r->targets,
                                                .lp = r->lp, .lse = r->y, .entropy = r->y2,
                                                .rows = HEAD_ROWS, .vocab = r->c->vocab,
                                                .inv_temp = 1 });
}
static void adamw_call(void *arg) {
    struct room *r = arg;
    r->k->adamw(r->k, &(struct kern_adamw){ .p = r->adam[0], .m = r->adam[1], .v = r->adam[2],
                                            .g = r->adam[3], .n = r->params, .lr = 1e-5f,
                                            .b1 = .9f, .b2 = .999f, .eps = 1e-8f, .wd = .01f,
                                            .g_scale = 1e-3f, .m_scale = 1, .v_scale = 1 });
}

static void rows_alone(struct room *r) {
    const struct limits *l = bench_limits(r->b);
    const double dim = r->c->dim, ffn = r->c->ffn_dim, vocab = r->c->vocab;
    /* an exponential of 16 lanes takes 8 cycles; on a device nobody counted */
    const double exps = l->hertz > 0 ? 8. / 16. / (l->hertz * l->threads) : 0;
    char key[BENCH_KEY_MAX];
    struct kern_sampler sampler[SEQS_DECODE];
    for (int i = 0; i < SEQS_DECODE; i++)
        sampler[i] = (struct kern_sampler){ 1, 0, 1, (float)i / SEQS_DECODE };
    r->k->upload(r->k, r->sampler, sampler, sizeof sampler);
    if (wants(r, key, "rmsnorm", ROWS))
        roof(r, key, rmsnorm_call, ROWS * dim * 6, ROWS * dim * 6, ROWS * dim * 4, 0);
    if (wants(r, key, "swiglu", ROWS))
        roof(r, key, swiglu_call, ROWS * ffn * 10, ROWS * ffn * 10, 0, ROWS * ffn * exps);
    if (wants(r, key, "sample", SEQS_DECODE))
        roof(r, key, sample_call, SEQS_DECODE * vocab * 4, SEQS_DECODE * vocab * 4, 0,
             SEQS_DECODE * vocab * exps);
    if (wants(r, key, "logprob", HEAD_ROWS))
        roof(r, key, logprob_call, HEAD_ROWS * vocab * 4, HEAD_ROWS * vocab * 4, 0,
             HEAD_ROWS * vocab * exps);
    const double params = (double)r->params;
    snprintf(key, sizeof key, "kernels/%s/adamw", shape_name[r->s->shape]);
    if (bench_begins(r->b, key)) roof(r, key, adamw_call, params * 28, params * 28, 0, 0);
}

void part_kernels(struct bench *b, enum shape m) {
    struct err e = { 0 };
    char path[BENCH_KEY_MAX];
    snprintf(path, sizeof path, "kernels/%s", shape_name[m]);
    if (!bench_enters(b, path) || !bench_room(b, m, path, room_bytes(&shape_conf[m]))) return;
    if (bench_synth(b, m, &e) < 0) {
        bench_failed(b, path, &e);
        return;
    }
    struct room *r = mem_alloc(sizeof *r);
    int rc = room_open(r, b, &e);
    for (int s = 0; s <= SEQS; s++) r->seq_start[s] = s * SEQ;
    if (rc == 0) {
        linears(r);
        heads(r);
        outers(r);
        attentions(r);
        rows_alone(r);
        rc = r->k->sync(r->k, &e);
    }
    if (rc < 0) bench_failed(b, path, &e);
    room_close(r);
    free(r);
}

/* ---- the threads themselves ---- */

static void nothing(void *arg, int part, int parts) { (void)arg, (void)part, (void)parts; }
static void fork_join(void *arg) {
    struct bench *b = arg;
    pool_run(b->pool, b->threads, nothing, NULL);
}

int part_pool(struct bench *b, struct err *e) {
    (void)e;
    if (!b->plugin && bench_wants(b, "kernels/pool/forkjoin"))
        bench_report(b, "kernels/pool/forkjoin",
                     &(struct figure){ .unit = "ns", .what = "an operation with nothing to do",
                                       .s = spread_times(timing_of(fork_join, b,
                                                                   b->quick ? .05 : .3), 1e9) });
    return 0;
}
