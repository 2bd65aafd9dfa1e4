/* carry.c - see carry.h. Order: spans of memory, what several operations take, the operations.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/kernels/carry.h"

#include <criterion/criterion.h>
#include <unistd.h>

#include "kernels/cpu.h"

static struct kern device;                            /* opened once: LeakSanitizer sees it here */

/* ---- spans ---- */

enum { TAKEN_MAX = 48, ALIGN = 16 };
/* An array of the operation under way, and where its address stands. */
static struct taken { kptr *at; size_t bytes; bool out; } taken[TAKEN_MAX];
/* Arrays that overlap lie in one span. */
static struct span { char *host; size_t bytes; bool out; kptr memory; char *there; } span[TAKEN_MAX];
static int takes, spans;

static void take(kptr *at, size_t bytes, bool out) {
    if (!at->p || !bytes) return;
    cr_assert(takes < TAKEN_MAX);
    taken[takes++] = (struct taken){ at, bytes, out };
}
static void in(const kptr *at, size_t bytes) { take((kptr *)(uintptr_t)at, bytes, false); }
static void out(const kptr *at, size_t bytes) { take((kptr *)(uintptr_t)at, bytes, true); }

static int by_address(const void *a, const void *b) {
    const char *x = ((const struct taken *)a)->at->p, *y = ((const struct taken *)b)->at->p;
    return x < y ? -1 : x > y;
}
static void say(const char *what, const struct err *e) {
    cr_assert(false, "%s on %s: %s", what, device.name, e->text);
}

/* The device's place for a span keeps the host's alignment and ends where its buffer ends. */
static void send(struct span *s) {
    struct err e = { 0 };
    const size_t skip = (uintptr_t)s->host % ALIGN;
    if (device.alloc(&device, &s->memory, skip + s->bytes, &e) < 0) say("alloc", &e);
    s->there = (char *)s->memory.p + skip;
    device.upload(&device, (kptr){ s->there }, s->host, s->bytes);
}

/* What was taken goes to the device; addresses become the device's. */
static void begin(void) {
    qsort(taken, (size_t)takes, sizeof *taken, by_address);
    spans = 0;
    for (int i = 0; i < takes; i++) {
        char *from = taken[i].at->p, *end = from + taken[i].bytes;
        struct span *s = spans ? &span[spans - 1] : NULL;
        if (!s || from >= s->host + s->bytes) {
            span[spans++] = (struct span){ from, taken[i].bytes, taken[i].out, { NULL }, NULL };
            continue;
        }
        if (end > s->host + s->bytes) s->bytes = (size_t)(end - s->host);
        s->out |= taken[i].out;
    }
    for (int i = 0; i < spans; i++) send(&span[i]);
    for (int i = 0, j = 0; i < takes; i++) {
        char *from = taken[i].at->p;
        while (from >= span[j].host + span[j].bytes) j++;
        taken[i].at->p = span[j].there + (from - span[j].host);
    }
    takes = 0;
}

/* Brings back what may have been written, and looks whether the rest was. */
static void end(const char *what) {
    struct err e = { 0 };
    for (int i = 0; i < spans; i++) {
        struct span *s = &span[i];
        char *back = s->out ? s->host : malloc(s->bytes);
        device.download(&device, back, (kptr){ s->there }, s->bytes);
        if (!s->out) {
            cr_assert(!memcmp(back, s->host, s->bytes), "%s on %s wrote to what it reads", what,
                      device.name);
            free(back);
        }
        device.free(&device, &s->memory);
    }
    if (device.sync(&device, &e) < 0) say(what, &e);
}

/* ---- what several operations take ---- */

static size_t size_of(enum kern_type type) { return type == KERN_F32 ? 4 : 2; }
static size_t dense(int rows, int dim) { return (size_t)rows * (size_t)dim; }
/* Elements of a matrix whose rows are ld apart. */
static size_t strided(int rows, int dim, int ld) {
    return rows > 0 ? dense(rows - 1, ld) + (size_t)dim : 0;
}
static int most(const int32_t *x, int n) {
    int top = -1;
    for (int i = 0; i < n; i++) top = x[i] > top ? x[i] : top;
    return top;
}
static void weight(const struct kern_weight *w, bool written) {
    if (w->out) take((kptr *)(uintptr_t)&w->data, kern_weight_bytes(w->format, w->out, w->in), written);
}

/* Pages and table, as far as positions below end[i] of slot[i] need them. */
static void pages(const struct kern_kv *kv, const int32_t *slot, const int32_t *last, int n,
                  bool written) {
    const int32_t *table = kv->table.p;
    int top = -1;
    for (int i = 0; i < n; i++)
        for (int j = 0; j <= last[i] / KERN_PAGE; j++) {
            int page = table[slot[i] * kv->slot_pages + j];
            top = page > top ? page : top;
        }
    take((kptr *)(uintptr_t)&kv->pages, dense(top + 1, kv->layers * 2 * kv->kv_heads) * KERN_PAGE *
                                            (size_t)kv->head_dim * size_of(kv->type), written);
    in(&kv->table, dense(most(slot, n) + 1, kv->slot_pages) * 4);
}
static void noise(const struct kern_noise *n, int rows) {
    in(&n->id, (size_t)rows * 8);
    in(&n->pos, (size_t)rows * 4);
    in(&n->key_at, sizeof n->key);
    out(&n->sums, KERN_NOISE_SUMS * sizeof(int64_t));
}

/* ---- operations ---- */

/* Declares b, this call's copy of a, for the device. */
#define COPY(name) struct kern_##name b = *a; (void)k
#define RUN(name) begin(); device.name(&device, &b); end(#name)

static void c_embed(struct kern *k, const struct kern_embed *a) {
    COPY(embed);
    in(&b.tokens, (size_t)b.rows * 4);
    weight(&b.w, false);
    out(&b.y, dense(b.rows, b.w.in) * 4);
    RUN(embed);
}
static void c_rmsnorm(struct kern *k, const struct kern_rmsnorm *a) {
    COPY(rmsnorm);
    in(&b.x, dense(b.rows, b.dim) * 4);
    in(&b.w, (size_t)b.dim * 4), in(&b.dw, (size_t)b.dim * 4);
    out(&b.y, dense(b.rows, b.dim) * size_of(b.y_type));
    out(&b.rstd, (size_t)b.rows * 4);
    RUN(rmsnorm);
}
static void c_rmsnorm_bwd(struct kern *k, const struct kern_rmsnorm_bwd *a) {
    COPY(rmsnorm_bwd);
    const size_t n = dense(b.rows, b.dim) * 4;
    in(&b.dy, n), in(&b.x, n), out(&b.dx, n);
    in(&b.rstd, (size_t)b.rows * 4);
    in(&b.w, (size_t)b.dim * 4), in(&b.dw, (size_t)b.dim * 4);
    RUN(rmsnorm_bwd);
}
static void c_linear(struct kern *k, const struct kern_linear *a, int n) {
    struct kern_linear b[KERN_LINEARS_MAX];
    (void)k;
    for (int i = 0; i < n; i++) {
        b[i] = a[i];
        in(&b[i].x, strided(a[i].rows, a[i].w.in, a[i].x_ld) * size_of(a[i].x_type));
        weight(&b[i].w, false);
        in(&b[i].bias, (size_t)a[i].w.out * 4);
        if (a[i].b.out) in(&b[i].u, strided(a[i].rows, a[i].b.in, a[i].u_ld) * size_of(a[i].x_type));
        weight(&b[i].b, false);
        out(&b[i].y, strided(a[i].rows, a[i].w.out, a[i].y_ld) * size_of(a[i].y_type));
    }
    begin();
    device.linear(&device, b, n);
    end("linear");
}
static void c_linear_t(struct kern *k, const struct kern_linear_t *a) {
    COPY(linear_t);
    in(&b.dy, strided(b.rows, b.w.out, b.dy_ld) * 4);
    weight(&b.w, false);
    out(&b.dx, strided(b.rows, b.w.in, b.dx_ld) * 4);
    RUN(linear_t);
}
static void c_outer(struct kern *k, const struct kern_outer *a) {
    COPY(outer);
    const int rows = b.seq_start[b.seqs];
    in(&b.a, strided(rows, b.m, b.a_ld) * 4);
    in(&b.b, strided(rows, b.n, b.b_ld) * size_of(b.b_type));
    out(&b.g, dense(b.m, b.n) * 4);
    RUN(outer);
}
static void c_rope(struct kern *k, const struct kern_rope *a) {
    COPY(rope);
    const size_t n = dense(b.rows, b.heads) * (size_t)b.head_dim;
    const size_t angles = dense(most(b.pos.p, b.rows) + 1, b.head_dim / 2) * 4;
    in(&b.x, n * 4), out(&b.y, n * size_of(b.y_type));
    in(&b.pos, (size_t)b.rows * 4);
    in(&b.cos, angles), in(&b.sin, angles);
    RUN(rope);
}
static void c_kv_put(struct kern *k, const struct kern_kv_put *a) {
    COPY(kv_put);
    const size_t n = dense(b.rows, b.kv.kv_heads) * (size_t)b.kv.head_dim;
    pages(&b.kv, b.slots.p, b.pos.p, b.rows, true);
    in(&b.k, n * size_of(b.k_type)), in(&b.v, n * 4);
    in(&b.slots, (size_t)b.rows * 4), in(&b.pos, (size_t)b.rows * 4);
    RUN(kv_put);
}
static void c_attn(struct kern *k, const struct kern_attn *a) {
    COPY(attn);
    struct kern_attn_noise own;
    const size_t queries = dense(b.rows, b.heads), n = queries * (size_t)b.kv.head_dim;
    pages(&b.kv, b.slots.p, b.pos.p, b.rows, false);
    in(&b.q, n * size_of(b.q_type)), out(&b.y, n * size_of(b.y_type));
    out(&b.lse, queries * 4), out(&b.peaks, queries * 8);
    in(&b.slots, (size_t)b.rows * 4), in(&b.pos, (size_t)b.rows * 4);
    if (a->noise) {
        b.noise = &own, own = *a->noise;
        noise(&own.scores, b.rows), noise(&own.probs, b.rows);
    }
    RUN(attn);
}
static void c_attn_bwd(struct kern *k, const struct kern_attn_bwd *a) {
    COPY(attn_bwd);
    struct kern_attn_noise own;
    const int rows = b.seq_start[b.seqs];
    const size_t queries = dense(rows, b.heads), n = queries * (size_t)b.kv.head_dim,
                 n_kv = dense(rows, b.kv.kv_heads) * (size_t)b.kv.head_dim * 4;
    const int32_t *slots = b.slots.p;
    int32_t slot[16], last[16];
    int seqs = 0;
    for (int s = 0; s < b.seqs; s++) {
        if (b.seq_start[s + 1] <= b.seq_start[s]) continue;
        cr_assert(seqs < 16);
        slot[seqs] = slots[b.seq_start[s]];
        last[seqs++] = b.seq_start[s + 1] - b.seq_start[s] - 1;
    }
    pages(&b.kv, slot, last, seqs, false);
    in(&b.q, n * size_of(b.q_type)), in(&b.y, n * size_of(b.y_type)), in(&b.dy, n * 4);
    in(&b.lse, queries * 4), in(&b.peaks, queries * 8), in(&b.slots, (size_t)rows * 4);
    out(&b.dq, n * 4), out(&b.dk, n_kv), out(&b.dv, n_kv);
    if (a->noise) {
        b.noise = &own, own = *a->noise;
        noise(&own.scores, rows), noise(&own.probs, rows);
        noise(&own.dprobs, rows), noise(&own.dscores, rows);
    }
    RUN(attn_bwd);
}
static void c_swiglu(struct kern *k, const struct kern_swiglu *a) {
    COPY(swiglu);
    const size_t n = dense(b.rows, b.dim);
    in(&b.gate, n * 4), in(&b.up, n * 4);
    out(&b.y, n * size_of(b.y_type));
    out(&b.gate_kept, n * size_of(b.y_type)), out(&b.up_kept, n * size_of(b.y_type));
    RUN(swiglu);
}
static void c_swiglu_bwd(struct kern *k, const struct kern_swiglu_bwd *a) {
    COPY(swiglu_bwd);
    const size_t n = dense(b.rows, b.dim);
    in(&b.dy, n * 4), in(&b.gate, n * size_of(b.type)), in(&b.up, n * size_of(b.type));
    out(&b.dgate, n * 4), out(&b.dup, n * 4);
    RUN(swiglu_bwd);
}
static void c_silu(struct kern *k, const struct kern_silu *a) {
    COPY(silu);
    in(&b.x, dense(b.rows, b.dim) * size_of(b.x_type));
    out(&b.y, dense(b.rows, b.dim) * 4);
    RUN(silu);
}
static void c_perturb(struct kern *k, const struct kern_perturb *a) {
    COPY(perturb);
    noise(&b.noise, b.rows);
    in(&b.x, strided(b.rows, b.dim, b.x_ld) * size_of(b.x_type));
    in(&b.bias, (size_t)b.dim * 4), in(&b.mul, dense(b.rows, b.dim) * 4);
    out(&b.y, strided(b.rows, b.dim, b.y_ld) * size_of(b.y_type));
    RUN(perturb);
}
static void c_quant_rows(struct kern *k, const struct kern_quant_rows *a) {
    COPY(quant_rows);
    const size_t n = dense(b.rows, b.dim) * size_of(b.type);
    in(&b.x, n), out(&b.y, n);
    RUN(quant_rows);
}
static void c_add(struct kern *k, const struct kern_add *a) {
    COPY(add);
    out(&b.x, b.n * 4), in(&b.y, b.n * 4);
    RUN(add);
}
static void c_gather(struct kern *k, const struct kern_gather *a) {
    COPY(gather);
    in(&b.x, dense(most(b.index.p, b.rows) + 1, b.dim) * size_of(b.type));
    in(&b.index, (size_t)b.rows * 4);
    out(&b.y, dense(b.rows, b.dim) * size_of(b.type));
    RUN(gather);
}
static void c_scatter_add(struct kern *k, const struct kern_scatter_add *a) {
    COPY(scatter_add);
    out(&b.x, dense(most(b.index.p, b.rows) + 1, b.dim) * 4);
    in(&b.index, (size_t)b.rows * 4);
    in(&b.y, dense(b.rows, b.dim) * 4);
    RUN(scatter_add);
}
static void c_logprob(struct kern *k, const struct kern_logprob *a) {
    COPY(logprob);
    const size_t n = (size_t)b.rows * 4;
    in(&b.logits, dense(b.rows, b.vocab) * 4), in(&b.targets, n);
    out(&b.lp, n), out(&b.lse, n), out(&b.entropy, n);
    RUN(logprob);
}
static void c_logprob_bwd(struct kern *k, const struct kern_logprob_bwd *a) {
    COPY(logprob_bwd);
    const size_t n = (size_t)b.rows * 4;
    out(&b.logits, dense(b.rows, b.vocab) * 4);
    in(&b.targets, n), in(&b.lse, n), in(&b.coef, n);
    RUN(logprob_bwd);
}
static void c_sample(struct kern *k, const struct kern_sample *a) {
    COPY(sample);
    const size_t n = (size_t)b.rows * 4;
    in(&b.logits, dense(b.rows, b.vocab) * 4);
    in(&b.sampler, (size_t)b.rows * sizeof(struct kern_sampler));
    out(&b.token, n), out(&b.lp, n), out(&b.lp_raw, n);
    RUN(sample);
}
static void c_adamw(struct kern *k, const struct kern_adamw *a) {
    COPY(adamw);
    out(&b.p, b.n * 4), out(&b.m, b.n * 4), out(&b.v, b.n * 4), in(&b.g, b.n * 4);
    RUN(adamw);
}
static double c_sum_squares(struct kern *k, kptr x, size_t n) {
    (void)k;
    in(&x, n * 4);
    begin();
    const double sum = device.sum_squares(&device, x, n);
    end("sum_squares");
    return sum;
}
static void c_pack(struct kern *k, const struct kern_weight *w, const float *values) {
    struct kern_weight b = *w;
    (void)k;
    weight(&b, true);
    begin();
    device.pack(&device, &b, values);
    end("pack");
}
static void c_unpack(struct kern *k, const struct kern_weight_rows *a) {
    COPY(weight_rows);
    weight(&b.w, false);
    out(&b.values, dense(b.rows, b.w.in) * 4);
    RUN(unpack);
}
static void c_pack_rows(struct kern *k, const struct kern_weight_rows *a) {
    COPY(weight_rows);
    weight(&b.w, true);
    in(&b.values, dense(b.rows, b.w.in) * 4);
    RUN(pack_rows);
}
static void c_weight_noise(struct kern *k, const struct kern_weight_noise *a) {
    COPY(weight_noise);
    weight(&b.w, false), weight(&b.to, true);
    out(&b.squares, dense(b.w.out, KERN_WEIGHT_SQUARES) * sizeof(double));
    out(&b.counts, KERN_WEIGHT_COUNTS * sizeof(int64_t));
    RUN(weight_noise);
}

const char *carry_plugin(void) {
    static char path[512];
    const char *own = getenv("QERL_CUDA");
    if (own && *own) return own;
    ssize_t n = readlink("/proc/self/exe", path, sizeof path - 1);
    if (n <= 0) return NULL;
    path[n] = 0;
    for (int i = 0; i < 3; i++) {                     /* obj/tests/kernels/run */
        char *slash = strrchr(path, '/');
        if (!slash) return NULL;
        *slash = 0;
    }
    snprintf(path + strlen(path), sizeof path - strlen(path), "/cuda-emu/qerl-cuda.so");
    if (access(path, R_OK) < 0) return NULL;
    setenv("QERL_CUDA", path, 1);
    return path;
}

void carry_open(struct kern *k, const char *name) {
    struct err e = { 0 };
    if (!device.self && kern_open(&device, name, NULL, &e) < 0) cr_assert(false, "%s", e.text);
    k->name = device.name, k->bits = device.bits;
    k->embed = c_embed, k->rmsnorm = c_rmsnorm, k->rmsnorm_bwd = c_rmsnorm_bwd;
    k->linear = c_linear, k->linear_t = c_linear_t, k->outer = c_outer, k->rope = c_rope;
    k->kv_put = c_kv_put, k->attn = c_attn, k->attn_bwd = c_attn_bwd;
    k->swiglu = c_swiglu, k->swiglu_bwd = c_swiglu_bwd, k->silu = c_silu;
    k->perturb = c_perturb, k->quant_rows = c_quant_rows, k->add = c_add, k->gather = c_gather;
    k->scatter_add = c_scatter_add, k->logprob = c_logprob, k->logprob_bwd = c_logprob_bwd;
    k->sample = c_sample, k->adamw = c_adamw, k->sum_squares = c_sum_squares, k->pack = c_pack;
    k->unpack = c_unpack, k->pack_rows = c_pack_rows, k->weight_noise = c_weight_noise;
}
