/* mma.c - the products on tensor cores (cuda-mma): exact where sums are, near double arithmetic, and one result for a
 * row whatever rows come with it. Every test runs on the device that carry.h finds, emulated or real.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/kernels/carry.h"
#include "tests/kernels/kt.h"

static struct kt t;
static struct kern mma;
static void begin(void) {
    struct err e = { 0 };
    t.seed = 7;
    if (!carry_plugin()) cr_skip_test("no plugin was built");
    cr_assert(kern_open(&t.ref, "ref", NULL, &e) == 0, "%s", e.text);
    mma = t.ref;
    carry_open(&mma, "cuda-mma:0");
}
static void finish(void) { kt_drop(&t); }
TestSuite(mma, .init = begin, .fini = finish);

static const enum kern_format formats[] = { KERN_FORMAT_BF16, KERN_FORMAT_MXFP4, KERN_FORMAT_NVFP4 };
/* a multiple of 16, 32, 128 and not; more than eight chunks of 128 k */
static const struct { int out, in; } shape[] = {
    { 1, 1 }, { 7, 9 }, { 16, 16 }, { 17, 33 }, { 15, 31 }, { 48, 160 }, { 65, 520 }, { 33, 700 }, { 130, 129 }, { 18, 1300 },
};
static const int rows_of[] = { 1, 2, 7, 8, 9, 16, 17, 33, 64, 70, 0 };

Test(mma, is_a_path_of_its_own) {
    cr_assert_str_eq(mma.name, "cuda-mma:0");
    cr_assert_eq(strncmp(mma.bits, "cuda-mma ", 9), 0, "%s", mma.bits);
}

/* Where every sum is exact its order does not matter: what is not equal then sits in a wrong place. */
Test(mma, linear_is_exact_where_sums_are) {
    for (size_t f = 0; f < COUNT_OF(formats); f++)
        for (size_t s = 0; s < COUNT_OF(shape); s++)
            for (int i = 0; rows_of[i]; i++) {
                const int out = shape[s].out, in = shape[s].in, rows = rows_of[i], y_ld = out + i % 2,
                          x_ld = i % 3 == 2 ? (in + 7) / 8 * 8 : in + i % 3, rank = i % 2 ? 0 : i % 4 ? 5 : 136;
                const enum kern_type yt = i % 3 == 1 ? KERN_BF16 : KERN_F32;
                const size_t n = (size_t)rows * (size_t)y_ld, bytes = kt_bytes(yt, n);
                void *want = kt_typed(&t, yt, n, 1.0), *got = kt_copy(&t, want, bytes);
                struct kern_linear a = { .x = kt_p(kt_wholes(&t, KERN_BF16, (size_t)rows * (size_t)x_ld, 8)), .x_type = KERN_BF16,
                                         .x_ld = x_ld, .w = kt_weight_whole(&t, formats[f], out, in),
                                         .bias = kt_p(i % 3 ? kt_f32(&t, (size_t)out, 1.0) : NULL), .scale = 0.7f,
                                         .accumulate = yt == KERN_F32 && i % 4 < 2, .y = kt_p(want), .y_type = yt,
                                         .y_ld = y_ld, .rows = rows };
                if (rank) {
                    a.u = kt_p(kt_wholes(&t, KERN_BF16, (size_t)rows * (size_t)rank, 8)), a.u_ld = rank;
                    a.b = kt_weight_whole(&t, KERN_FORMAT_BF16, out, rank);
                }
                t.ref.linear(&t.ref, &a, 1);
                a.y = kt_p(got);
                mma.linear(&mma, &a, 1);
                kt_equal(got, want, yt, n, "linear", formats[f], out, in, rows);
                kt_drop(&t);
            }
}

Test(mma, linear_t_is_exact_where_sums_are) {
    for (size_t f = 0; f < COUNT_OF(formats); f++)
        for (size_t s = 0; s < COUNT_OF(shape); s++)
            for (int i = 0; rows_of[i]; i++) {
                const int out = shape[s].in, in = shape[s].out, rows = rows_of[i], dx_ld = in + i % 2,
                          dy_ld = i % 3 == 2 ? (out + 3) / 4 * 4 : out + i % 3;
                const size_t n = (size_t)rows * (size_t)dx_ld;
                float *want = kt_f32(&t, n, 1.0), *got = kt_copy(&t, want, n * 4);
                struct kern_linear_t a = { .dy = kt_p(kt_wholes(&t, KERN_F32, (size_t)rows * (size_t)dy_ld, 8)), .dy_ld = dy_ld,
                                           .w = kt_weight_whole(&t, formats[f], out, in), .scale = 1.3f, .accumulate = i & 1,
                                           .round = true, .dx = kt_p(want), .dx_ld = dx_ld, .rows = rows };
                t.ref.linear_t(&t.ref, &a);
                a.dx = kt_p(got);
                mma.linear_t(&mma, &a);
                kt_equal(got, want, KERN_F32, n, "linear_t", formats[f], out, in, rows);
                kt_drop(&t);
            }
}

static const int32_t seqs[] = { 0, 0, 1, 32, 160, 160, 289, 320 };
enum { SEQS = COUNT_OF(seqs) - 1, SEQ_ROWS = 320 };
Test(mma, outer_is_exact_where_sums_are) {
    static const struct { int m, n; } of[] = { { 1, 1 }, { 8, 65 }, { 64, 64 }, { 70, 9 }, { 17, 130 } };
    for (size_t s = 0; s < COUNT_OF(of); s++) {
        const int m = of[s].m, n = of[s].n, a_ld = m + (int)s % 2, b_ld = n + (int)s % 3;
        float *want = kt_wholes(&t, KERN_F32, (size_t)m * (size_t)n, 8), *got = kt_copy(&t, want, (size_t)m * (size_t)n * 4);
        struct kern_outer a = { .a = kt_p(kt_wholes(&t, KERN_F32, (size_t)SEQ_ROWS * (size_t)a_ld, 8)), .a_ld = a_ld,
                                .b = kt_p(kt_wholes(&t, KERN_BF16, (size_t)SEQ_ROWS * (size_t)b_ld, 8)), .b_type = KERN_BF16,
                                .b_ld = b_ld, .scale = 0.5f, .round = true, .g = kt_p(want), .m = m, .n = n,
                                .seq_start = seqs, .seqs = SEQS };
        t.ref.outer(&t.ref, &a);
        a.g = kt_p(got);
        mma.outer(&mma, &a);
        kt_equal(got, want, KERN_F32, (size_t)m * (size_t)n, "outer", KERN_FORMAT_F32, m, n, SEQ_ROWS);
        kt_drop(&t);
    }
}

/* Products of bf16 are exact. At most one addition a product and one a chunk follow, each of which loses at most 2^-23 of
 * what stands there (a device may cut off instead of rounding), and what stands there is at most the sum of magnitudes. */
static double bound(int k, double magnitude) { return (k + (k + 127) / 128 + 1) * 0x1p-23 * magnitude; }

Test(mma, near_double_arithmetic) {
    static const struct { int out, in, rows; } of[] = { { 40, 700, 5 }, { 40, 700, 12 }, { 33, 300, 70 } };
    for (size_t f = 0; f < COUNT_OF(formats); f++)
        for (size_t s = 0; s < COUNT_OF(of); s++) {
            const int out = of[s].out, in = of[s].in, rows = of[s].rows;
            const struct kern_weight w = kt_weight(&t, formats[f], out, in);
            uint16_t *x = kt_bf16(&t, (size_t)rows * (size_t)in, 1.0);
            float *dy = kt_f32(&t, (size_t)rows * (size_t)out, 1.0), *y = kt_new(&t, (size_t)rows * (size_t)out * 4),
                  *dx = kt_new(&t, (size_t)rows * (size_t)in * 4);
            mma.linear(&mma, &(struct kern_linear){ .x = kt_p(x), .x_type = KERN_BF16, .x_ld = in, .w = w, .scale = 1.0f,
                                                    .y = kt_p(y), .y_type = KERN_F32, .y_ld = out, .rows = rows }, 1);
            mma.linear_t(&mma, &(struct kern_linear_t){ .dy = kt_p(dy), .dy_ld = out, .w = w, .scale = 1.0f, .round = true,
                                                        .dx = kt_p(dx), .dx_ld = in, .rows = rows });
            for (int r = 0; r < rows; r++) {
                for (int o = 0; o < out; o++) {
                    double sum = 0, all = 0;
                    for (int i = 0; i < in; i++) {
                        const double p = (double)bf16_to_f32(x[r * in + i]) * kt_at(&w, o, i);
                        sum += p, all += fabs(p);
                    }
                    KT_NEAR(y[r * out + o], sum, bound(in, all), "linear %s row %d output %d", kt_format_name[formats[f]], r, o);
                }
                for (int i = 0; i < in; i++) {
                    double sum = 0, all = 0;
                    for (int o = 0; o < out; o++) {
                        const double p = (double)cpu_round(dy[r * out + o], true) * kt_at(&w, o, i);
                        sum += p, all += fabs(p);
                    }
                    KT_NEAR(dx[r * in + i], sum, bound(out, all), "linear_t %s row %d input %d", kt_format_name[formats[f]], r, i);
                }
            }
            kt_drop(&t);
        }
}

/* The zero-bit rule: a row's bits do not depend on the rows beside it, nor on the kernel that takes so many. A row of
 * NaNs and one of infinities among them change nothing either, but themselves. */
enum { ROWS = 300, OUT = 35, IN = 1300, RANK = 9 };
static void rows_in_parts(const struct kern_linear *a, int part, bool backward, const struct kern_linear_t *b) {
    for (int r = 0; r < ROWS; r += part) {
        struct kern_linear one = *a;
        struct kern_linear_t back = *b;
        one.rows = back.rows = part < ROWS - r ? part : ROWS - r;
        one.x = kptr_at(a->x, (size_t)r * IN * 2), one.u = kptr_at(a->u, (size_t)r * RANK * 2);
        one.y = kptr_at(a->y, (size_t)r * OUT * 4);
        back.dy = kptr_at(b->dy, (size_t)r * OUT * 4), back.dx = kptr_at(b->dx, (size_t)r * IN * 4);
        if (backward) mma.linear_t(&mma, &back);
        else mma.linear(&mma, &one, 1);
    }
}
Test(mma, a_row_has_one_result, .timeout = 120) {
    static const int parts[] = { ROWS, 1, 7, 16, 33 };
    for (size_t f = 0; f < COUNT_OF(formats); f++) {
        uint16_t *x = kt_bf16(&t, ROWS * IN, 1.0);
        float *dy = kt_f32(&t, ROWS * OUT, 1.0), *y = kt_new(&t, ROWS * OUT * 4), *dx = kt_new(&t, ROWS * IN * 4), *y0 = NULL, *dx0 = NULL;
        struct kern_linear a = { .x = kt_p(x), .x_type = KERN_BF16, .x_ld = IN, .w = kt_weight(&t, formats[f], OUT, IN),
                                 .bias = kt_p(kt_f32(&t, OUT, 1.0)), .scale = 0.7f, .u = kt_p(kt_bf16(&t, ROWS * RANK, 1.0)),
                                 .u_ld = RANK, .b = kt_weight(&t, KERN_FORMAT_BF16, OUT, RANK), .y = kt_p(y),
                                 .y_type = KERN_F32, .y_ld = OUT, .rows = ROWS };
        struct kern_linear_t b = { .dy = kt_p(dy), .dy_ld = OUT, .w = a.w, .scale = 0.9f, .round = true, .dx = kt_p(dx),
                                   .dx_ld = IN, .rows = ROWS };
        for (size_t p = 0; p < COUNT_OF(parts); p++) {
            memset(y, 0xa5, ROWS * OUT * 4), memset(dx, 0xa5, ROWS * IN * 4);
            rows_in_parts(&a, parts[p], false, &b);
            if (parts[p] != 1) rows_in_parts(&a, parts[p], true, &b);
            if (!p) y0 = kt_copy(&t, y, ROWS * OUT * 4), dx0 = kt_copy(&t, dx, ROWS * IN * 4);
            KT_SAME(&mma, y, y0, ROWS * OUT * 4, "linear %s, %d rows at once", kt_format_name[formats[f]], parts[p]);
            if (parts[p] != 1) KT_SAME(&mma, dx, dx0, ROWS * IN * 4, "linear_t %s, %d rows at once", kt_format_name[formats[f]], parts[p]);
        }
        for (int i = 0; i < IN; i += 3) x[12 * IN + i] = 0x7fc0, x[201 * IN + i] = 0x7f80;
        for (int i = 0; i < OUT; i += 3) dy[12 * OUT + i] = NAN, dy[201 * OUT + i] = INFINITY;
        static const int spoilt[] = { ROWS, 16 };
        for (size_t p = 0; p < COUNT_OF(spoilt); p++) {
            rows_in_parts(&a, spoilt[p], false, &b), rows_in_parts(&a, spoilt[p], true, &b);
            for (int i = 0; i < OUT; i++) cr_assert(isnan(y[12 * OUT + i]) && !isfinite(y[201 * OUT + i]));
            for (int i = 0; i < IN; i++) cr_assert(isnan(dx[12 * IN + i]) && !isfinite(dx[201 * IN + i]));
            for (int r = 0; r < ROWS; r++)
                if (r != 12 && r != 201) {
                    KT_SAME(&mma, y + r * OUT, y0 + r * OUT, OUT * 4, "linear, row %d beside a NaN", r);
                    KT_SAME(&mma, dx + r * IN, dx0 + r * IN, IN * 4, "linear_t, row %d beside a NaN", r);
                }
        }
        kt_drop(&t);
    }
}

Test(mma, outer_does_not_depend_on_how_sequences_are_split) {
    enum { M = 20, N = 70 };
    float *a = kt_f32(&t, SEQ_ROWS * M, 1.0), *want = kt_f32(&t, M * N, 1.0), *got = kt_copy(&t, want, M * N * 4);
    uint16_t *b = kt_bf16(&t, SEQ_ROWS * N, 1.0);
    struct kern_outer o = { .a = kt_p(a), .a_ld = M, .b = kt_p(b), .b_type = KERN_BF16, .b_ld = N, .scale = 0.3f,
                            .round = true, .g = kt_p(want), .m = M, .n = N, .seq_start = seqs, .seqs = SEQS };
    float *g0 = kt_copy(&t, want, M * N * 4);
    mma.outer(&mma, &o);
    for (int i = 0; i < M * N; i++) {
        double sum = g0[i], all = fabs(sum);
        for (int r = 0; r < SEQ_ROWS; r++) {
            const double p = (double)cpu_round(0.3f * a[r * M + i / N], true) * bf16_to_f32(b[r * N + i % N]);
            sum += p, all += fabs(p);
        }
        KT_NEAR(want[i], sum, bound(SEQ_ROWS + SEQS, all), "outer, element %d", i);
    }
    o.g = kt_p(got), o.seqs = 1;
    for (int s = 0; s < SEQS; s++) {
        const int32_t own[] = { 0, seqs[s + 1] - seqs[s] };
        o.seq_start = own, o.a = kt_p(a + seqs[s] * M), o.b = kt_p(b + seqs[s] * N);
        mma.outer(&mma, &o);
    }
    KT_SAME(&mma, got, want, M * N * 4, "outer, one sequence a call");
}

/* x picks one input a row, so that y is the weight itself: every code under every scale, normal numbers exactly. */
Test(mma, every_code_and_scale) {
    enum { BLOCK = 32, SCALES = 256 };
    for (size_t f = 1; f < COUNT_OF(formats); f++) {
        const int groups = formats[f] == KERN_FORMAT_NVFP4 ? 2 : 1;
        struct kern_weight w = { .format = formats[f], .out = SCALES, .in = BLOCK, .scale = 1.0f };
        w.data.p = kt_new(&t, kern_weight_bytes(w.format, w.out, w.in));
        uint8_t codes[SCALES * BLOCK], scales[SCALES * 2];
        for (int i = 0; i < SCALES * BLOCK; i++) codes[i] = (uint8_t)(i % BLOCK % 16);
        for (int i = 0; i < SCALES * groups; i++) scales[i] = (uint8_t)(i / groups + i % groups * 100);
        pack_codes(w.data.p, w.format, codes, scales, w.out, w.in);
        uint16_t *x = kt_new(&t, BLOCK * BLOCK * 2);
        float *eye = kt_new(&t, SCALES * SCALES * 4), *y = kt_new(&t, BLOCK * SCALES * 4), *dx = kt_new(&t, SCALES * BLOCK * 4);
        for (int i = 0; i < BLOCK * BLOCK; i++) x[i] = i / BLOCK == i % BLOCK ? 0x3f80 : 0;
        for (int i = 0; i < SCALES * SCALES; i++) eye[i] = i / SCALES == i % SCALES;
        mma.linear(&mma, &(struct kern_linear){ .x = kt_p(x), .x_type = KERN_BF16, .x_ld = BLOCK, .w = w, .scale = 1.0f,
                                                .y = kt_p(y), .y_type = KERN_F32, .y_ld = SCALES, .rows = BLOCK }, 1);
        int seen = 0;
        for (int o = 0; o < SCALES; o++) {
            bool finite = true;
            for (int i = 0; i < BLOCK; i++) finite &= isfinite(kt_at(&w, o, i));
            for (int i = 0; i < BLOCK; i++) {
                const float v = kt_at(&w, o, i), is = y[i * SCALES + o];
                if (!finite) cr_assert(!isfinite(is) || isfinite(v), "%s scale %d", kt_format_name[w.format], o);
                else if (fabsf(v) < 0x1p-126f) cr_assert(is == v || is == 0, "%s scale %d: %g for %g", kt_format_name[w.format], o, (double)is, (double)v);
                else cr_assert(is == v && ++seen, "%s scale %d: %g for %g", kt_format_name[w.format], o, (double)is, (double)v);
            }
        }
        cr_assert(seen > SCALES * BLOCK / 2);
        /* one output at a time: others of the record must not spoil it where they are not finite */
        mma.linear_t(&mma, &(struct kern_linear_t){ .dy = kt_p(eye), .dy_ld = SCALES, .w = w, .scale = 1.0f, .round = true,
                                                    .dx = kt_p(dx), .dx_ld = BLOCK, .rows = SCALES });
        float *want = kt_new(&t, SCALES * BLOCK * 4);
        t.ref.linear_t(&t.ref, &(struct kern_linear_t){ .dy = kt_p(eye), .dy_ld = SCALES, .w = w, .scale = 1.0f, .round = true,
                                                        .dx = kt_p(want), .dx_ld = BLOCK, .rows = SCALES });
        for (int i = 0; i < SCALES * BLOCK; i++) {
            const float v = kt_at(&w, i / BLOCK, i % BLOCK);
            cr_assert((isnan(dx[i]) && isnan(want[i])) || dx[i] == want[i] || (fabsf(v) < 0x1p-126f && dx[i] == v),
                      "%s back, scale %d input %d: %g for %g", kt_format_name[w.format], i / BLOCK, i % BLOCK, (double)dx[i], (double)want[i]);
        }
        kt_drop(&t);
    }
}

/* What the instruction does not take has the bits of every other path. */
Test(mma, f32_operands_have_the_strict_bits) {
    enum { R = 9, O = 20, I = 70 };
    float *y = kt_new(&t, R * O * 4), *want = kt_new(&t, R * O * 4), *dx = kt_new(&t, R * I * 4), *back = kt_new(&t, R * I * 4);
    struct kern_linear a = { .x = kt_p(kt_f32(&t, R * I, 1.0)), .x_type = KERN_F32, .x_ld = I,
                             .w = kt_weight(&t, KERN_FORMAT_BF16, O, I), .scale = 1.0f, .y = kt_p(want), .y_type = KERN_F32,
                             .y_ld = O, .rows = R }, b = a;
    b.x = kt_p(kt_bf16(&t, R * I, 1.0)), b.x_type = KERN_BF16, b.w = kt_weight(&t, KERN_FORMAT_F32, O, I);
    struct kern_linear c = b;
    c.w = a.w, c.u = kt_p(kt_bf16(&t, R * 4, 1.0)), c.u_ld = 4, c.b = kt_weight(&t, KERN_FORMAT_F32, O, 4);
    const struct kern_linear *const of[] = { &a, &b, &c };
    for (size_t i = 0; i < COUNT_OF(of); i++) {
        struct kern_linear one = *of[i];
        t.ref.linear(&t.ref, &one, 1);
        one.y = kt_p(y);
        mma.linear(&mma, &one, 1);
        KT_SAME(&mma, y, want, R * O * 4, "linear of f32, %zu", i);
    }
    struct kern_linear_t d = { .dy = kt_p(kt_f32(&t, R * O, 1.0)), .dy_ld = O, .w = a.w, .scale = 1.0f, .dx = kt_p(back),
                               .dx_ld = I, .rows = R };
    t.ref.linear_t(&t.ref, &d);
    d.dx = kt_p(dx);
    mma.linear_t(&mma, &d);
    KT_SAME(&mma, dx, back, R * I * 4, "linear_t, not rounded");
    struct kern_outer g = { .a = kt_p(kt_f32(&t, R * O, 1.0)), .a_ld = O, .b = a.x, .b_type = KERN_F32, .b_ld = I,
                            .scale = 1.0f, .round = true, .g = kt_p(memset(kt_new(&t, O * I * 4), 0, O * I * 4)), .m = O,
                            .n = I, .seq_start = (const int32_t[]){ 0, R }, .seqs = 1 };
    float *sum = memset(kt_new(&t, O * I * 4), 0, O * I * 4);
    t.ref.outer(&t.ref, &g);
    const float *expected = g.g.p;
    g.g = kt_p(sum);
    mma.outer(&mma, &g);
    KT_SAME(&mma, sum, expected, O * I * 4, "outer of f32");
}

Test(mma, several_at_once_and_nothing) {
    enum { R = 20, I = 96 };
    static const int outs[] = { 50, 17, 33 };
    struct kern_linear a[3];
    float *alone[3];
    const kptr x = kt_p(kt_bf16(&t, R * I, 1.0));
    for (int rows = 3; rows <= R; rows += R - 3) {
        for (int i = 0; i < 3; i++) {
            const size_t bytes = (size_t)R * (size_t)outs[i] * 4;
            a[i] = (struct kern_linear){ .x = x, .x_type = KERN_BF16, .x_ld = I, .w = kt_weight(&t, formats[i], outs[i], I),
                                         .scale = 1.0f, .y = kt_p(kt_new(&t, bytes)), .y_type = KERN_F32, .y_ld = outs[i],
                                         .rows = rows };
            mma.linear(&mma, &a[i], 1);
            alone[i] = kt_copy(&t, a[i].y.p, bytes);
            memset(a[i].y.p, 0xa5, bytes);
        }
        mma.linear(&mma, a, 3);
        for (int i = 0; i < 3; i++)
            KT_SAME(&mma, (float *)a[i].y.p, alone[i], (size_t)rows * (size_t)outs[i] * 4, "linear %d of three", i);
    }
    float *before = kt_copy(&t, a[0].y.p, (size_t)R * (size_t)outs[0] * 4);
    for (int i = 0; i < 3; i++) a[i].rows = 0;
    mma.linear(&mma, a, 3);
    mma.linear_t(&mma, &(struct kern_linear_t){ .dy = x, .dy_ld = 50, .w = a[0].w, .scale = 1.0f, .round = true, .dx = a[0].y, .dx_ld = I });
    mma.outer(&mma, &(struct kern_outer){ .a = x, .a_ld = 1, .b = x, .b_type = KERN_BF16, .b_ld = 1, .scale = 1.0f, .round = true,
                                          .g = a[0].y, .m = 1, .n = 1, .seq_start = (const int32_t[]){ 0 } });
    KT_SAME(&mma, (float *)a[0].y.p, before, (size_t)R * (size_t)outs[0] * 4, "nothing was asked for");
}
