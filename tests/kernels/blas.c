/* blas.c - the products by cuBLAS (cuda-blas): exact where sums are, near double arithmetic, the same bits whenever the
 * same is asked, and cuda-mma's for few rows. Every test runs on the device that carry.h finds, emulated or real.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/kernels/carry.h"
#include "tests/kernels/kt.h"

static struct kt t;
static struct kern blas;
static void begin(void) {
    struct err e = { 0 };
    t.seed = 7;
    if (!carry_plugin()) cr_skip_test("no plugin was built");
    cr_assert(kern_open(&blas, "cuda-blas:0", NULL, &e) == 0 || strstr(e.text, "libcublas"), "%s", e.text);
    if (e.text[0]) cr_skip_test("%s", e.text);
    cr_assert(kern_open(&t.ref, "ref", NULL, &e) == 0, "%s", e.text);
    blas = t.ref;
    carry_open(&blas, "cuda-blas:0");
}
static void finish(void) { kt_drop(&t); }
TestSuite(blas, .init = begin, .fini = finish);
TestSuite(blas_opens);

static const enum kern_format formats[] = { KERN_FORMAT_BF16, KERN_FORMAT_MXFP4, KERN_FORMAT_NVFP4 };
static const struct { int out, in; } shape[] = {
    { 1, 1 }, { 7, 9 }, { 16, 16 }, { 17, 33 }, { 15, 31 }, { 48, 160 }, { 65, 520 }, { 130, 129 }, { 18, 1300 },
};
/* up to 64 rows cuda-mma's kernels compute */
static const int rows_of[] = { 1, 16, 64, 65, 70, 129, 0 };

static bool emulated(void) { return strstr(blas.bits, "emulated"); }

Test(blas, is_a_path_of_its_own) {
    cr_assert_str_eq(blas.name, "cuda-blas:0");
    int sms, major, minor, patch;
    char arch[16];
    cr_assert_eq(sscanf(blas.bits, "cuda-blas %15s %d SMs cublas %d.%d.%d", arch, &sms, &major, &minor, &patch), 5, "%s", blas.bits);
}

Test(blas_opens, without_the_library_it_says_so) {
    struct kern k;
    struct err e = { 0 };
    if (!carry_plugin()) cr_skip_test("no plugin was built");
    setenv("QERL_CUBLAS", "/nothing/libcublas.so", 1);
    cr_assert_eq(kern_open(&k, "cuda-blas", NULL, &e), -1);
    cr_assert_eq(e.code, EXIT_ENV);
    cr_assert(!strncmp(e.text, "kernels 'cuda-blas': libcublas.so.", 34) && strstr(e.text, "is not there") &&
              strstr(e.text, ": install libcublas-") && !strchr(e.text, '\n'), "%s", e.text);
    setenv("QERL_CUBLAS", "libm.so.6", 1);
    cr_assert_eq(kern_open(&k, "cuda-blas", NULL, &e), -1);
    cr_assert(strstr(e.text, "'libm.so.6' has no function cublasCreate_v2"), "%s", e.text);
    cr_assert_eq(kern_open(&k, "cuda-mma", NULL, &e), 0, "the other forms need no cuBLAS: %s", e.text);
}

Test(blas, linear_is_exact_where_sums_are, .timeout = 120) {
    for (size_t f = 0; f < COUNT_OF(formats); f++)
        for (size_t s = 0; s < COUNT_OF(shape); s++)
            for (int i = 0; rows_of[i]; i++) {
                const int out = shape[s].out, in = shape[s].in, rows = rows_of[i], y_ld = out + i % 2,
                          x_ld = i % 3 == 2 ? (in + 7) / 8 * 8 : in + i % 3, rank = i % 2 ? 0 : i % 4 ? 5 : 136;
                const enum kern_type yt = i % 3 == 1 ? KERN_BF16 : KERN_F32;
                const size_t n = (size_t)rows * (size_t)y_ld, bytes = kt_bytes(yt, n);
                void *want = kt_wholes(&t, yt, n, 8), *got = kt_copy(&t, want, bytes);
                struct kern_linear a = { .x = kt_p(kt_wholes(&t, KERN_BF16, (size_t)rows * (size_t)x_ld, 8)), .x_type = KERN_BF16,
                                         .x_ld = x_ld, .w = kt_weight_whole(&t, formats[f], out, in),
                                         .bias = kt_p(i % 3 ? kt_wholes(&t, KERN_F32, (size_t)out, 8) : NULL), .scale = 0.5f,
                                         .accumulate = yt == KERN_F32 && i % 4 < 2, .y = kt_p(want), .y_type = yt,
                                         .y_ld = y_ld, .rows = rows };
                if (rank) {
                    a.u = kt_p(kt_wholes(&t, KERN_BF16, (size_t)rows * (size_t)rank, 8)), a.u_ld = rank;
                    a.b = kt_weight_whole(&t, KERN_FORMAT_BF16, out, rank);
                }
                t.ref.linear(&t.ref, &a, 1);
                a.y = kt_p(got);
                blas.linear(&blas, &a, 1);
                kt_equal(got, want, yt, n, "linear", formats[f], out, in, rows);
                kt_drop(&t);
            }
}

Test(blas, linear_t_is_exact_where_sums_are, .timeout = 120) {
    for (size_t f = 0; f < COUNT_OF(formats); f++)
        for (size_t s = 0; s < COUNT_OF(shape); s++)
            for (int i = 0; rows_of[i]; i++) {
                const int out = shape[s].in, in = shape[s].out, rows = rows_of[i], dx_ld = in + i % 2,
                          dy_ld = i % 3 == 2 ? (out + 3) / 4 * 4 : out + i % 3;
                const size_t n = (size_t)rows * (size_t)dx_ld;
                float *want = kt_wholes(&t, KERN_F32, n, 8), *got = kt_copy(&t, want, n * 4);
                struct kern_linear_t a = { .dy = kt_p(kt_wholes(&t, KERN_F32, (size_t)rows * (size_t)dy_ld, 8)), .dy_ld = dy_ld,
                                           .w = kt_weight_whole(&t, formats[f], out, in), .scale = 2.0f, .accumulate = i & 1,
                                           .round = true, .dx = kt_p(want), .dx_ld = dx_ld, .rows = rows };
                t.ref.linear_t(&t.ref, &a);
                a.dx = kt_p(got);
                blas.linear_t(&blas, &a);
                kt_equal(got, want, KERN_F32, n, "linear_t", formats[f], out, in, rows);
                kt_drop(&t);
            }
}

/* ---- arrays that stay on the device, for two tables of one device ---- */

static struct kern mma, plain;                        /* cuda-mma:0, and cuda-blas:0 without carry.h */
static kptr there[64];
static int theres;
static void open_both(void) {
    struct err e = { 0 };
    cr_assert(kern_open(&mma, "cuda-mma:0", NULL, &e) == 0, "%s", e.text);
    cr_assert(kern_open(&plain, "cuda-blas:0", NULL, &e) == 0, "%s", e.text);
}
static void done(struct kern *k) {
    struct err e = { 0 };
    cr_assert(k->sync(k, &e) == 0, "%s", e.text);
}
static kptr send(const void *from, size_t bytes) {
    struct err e = { 0 };
    kptr *p = &there[theres++];
    cr_assert(theres <= (int)COUNT_OF(there) && plain.alloc(&plain, p, bytes, &e) == 0, "%s", e.text);
    plain.upload(&plain, *p, from, bytes);
    done(&plain);
    return *p;
}
static void *fetch(struct kern *k, kptr from, size_t bytes) {
    void *to = kt_new(&t, bytes);
    k->download(k, to, from, bytes);
    done(k);
    return to;
}
static void drop_all(void) {
    while (theres) plain.free(&plain, &there[--theres]);
    kt_drop(&t);
}
static struct kern_weight send_weight(struct kern_weight w) {
    w.data = send(w.data.p, kern_weight_bytes(w.format, w.out, w.in));
    return w;
}

/* A linear with all that belongs to it, and the linear_t of the same weight. */
struct both { struct kern_linear a; struct kern_linear_t b; size_t y_bytes, dx_bytes; };
static struct both both_of(enum kern_format f, int out, int in, int rank, int rows) {
    const size_t y = (size_t)rows * (size_t)out * 4, dx = (size_t)rows * (size_t)in * 4;
    struct both o = { .y_bytes = y, .dx_bytes = dx };
    o.a = (struct kern_linear){ .x = send(kt_bf16(&t, dx / 4, 1.0), dx / 2), .x_type = KERN_BF16, .x_ld = in,
                                .w = send_weight(kt_weight(&t, f, out, in)), .bias = send(kt_f32(&t, (size_t)out, 1.0), (size_t)out * 4),
                                .scale = 0.7f, .y = send(kt_f32(&t, y / 4, 1.0), y), .y_type = KERN_F32, .y_ld = out, .rows = rows };
    if (rank) {
        const size_t u = (size_t)rows * (size_t)rank * 2;
        o.a.u = send(kt_bf16(&t, u / 2, 1.0), u), o.a.u_ld = rank;
        o.a.b = send_weight(kt_weight(&t, KERN_FORMAT_BF16, out, rank));
    }
    o.b = (struct kern_linear_t){ .dy = send(kt_f32(&t, y / 4, 1.0), y), .dy_ld = out, .w = o.a.w, .scale = 0.9f, .round = true,
                                  .dx = send(kt_f32(&t, dx / 4, 1.0), dx), .dx_ld = in, .rows = rows };
    return o;
}
static void *run_a(struct kern *k, const struct both *o) {
    k->linear(k, &o->a, 1);
    return fetch(k, o->a.y, o->y_bytes);
}
static void *run_b(struct kern *k, const struct both *o) {
    k->linear_t(k, &o->b);
    return fetch(k, o->b.dx, o->dx_bytes);
}

/* The same bits twice, after other work of other sizes, and from another handle. */
Test(blas, results_repeat, .timeout = 120) {
    open_both();
    for (size_t f = 0; f < COUNT_OF(formats); f++) {
        const struct both o = both_of(formats[f], 300, 520, 9, 150), other = both_of(formats[f], 40, 1700, 0, 333);
        const float *y = run_a(&plain, &o), *dx = run_b(&plain, &o);
        for (int i = 0; i < 3; i++) {
            struct kern again;
            struct err e = { 0 };
            cr_assert(kern_open(&again, "cuda-blas:0", NULL, &e) == 0, "%s", e.text);
            struct kern *k = i == 2 ? &again : &plain;
            if (i == 1) (void)run_b(k, &other), (void)run_a(k, &other);
            const float *y2 = run_a(k, &o), *dx2 = run_b(k, &o);
            KT_SAME(k, y2, y, o.y_bytes, "linear %s again (%d)", kt_format_name[formats[f]], i);
            KT_SAME(k, dx2, dx, o.dx_bytes, "linear_t %s again (%d)", kt_format_name[formats[f]], i);
        }
        drop_all();
    }
}

/* 64 rows have cuda-mma's bits; 65 have not, which also says that cuBLAS was asked. */
Test(blas, few_rows_are_those_of_cuda_mma, .timeout = 120) {
    open_both();
    cr_assert(plain.outer == mma.outer, "the adapters' gradients are cuda-mma's");
    for (size_t f = 0; f < COUNT_OF(formats); f++)
        for (int rows = 64; rows <= 65; rows++) {
            const struct both o = both_of(formats[f], 300, 520, 9, rows);
            const float *want = run_a(&mma, &o), *got = run_a(&plain, &o), *back = run_b(&mma, &o), *dx = run_b(&plain, &o);
            if (rows == 64) {
                KT_SAME(&plain, got, want, o.y_bytes, "linear %s, %d rows", kt_format_name[formats[f]], rows);
                KT_SAME(&plain, dx, back, o.dx_bytes, "linear_t %s, %d rows", kt_format_name[formats[f]], rows);
            } else {
                cr_assert(memcmp(got, want, o.y_bytes), "linear %s: all bits of cuda-mma", kt_format_name[formats[f]]);
                cr_assert(memcmp(dx, back, o.dx_bytes), "linear_t %s: all bits of cuda-mma", kt_format_name[formats[f]]);
            }
            drop_all();
        }
}

/* So have rows that are apart, however many. */
Test(blas, rows_apart_are_those_of_cuda_mma) {
    open_both();
    struct both o = both_of(KERN_FORMAT_NVFP4, 300, 520, 9, 150);
    const float *want = run_a(&mma, &o), *other = run_a(&plain, &o);
    cr_assert(memcmp(other, want, o.y_bytes), "150 rows that are not apart have all bits of cuda-mma");
    o.a.apart = true;
    const float *got = run_a(&plain, &o);
    KT_SAME(&plain, got, want, o.y_bytes, "linear, rows apart");
    drop_all();
}

/* More than a slab of outputs, and than a block of rows: exact, so that cuda-mma says what is right. */
Test(blas, beyond_a_slab, .timeout = 300) {
    open_both();
    const int large = emulated() ? 1 : 16;
    const struct { int out, in, rows; } of[] = { { 1700 * large, 1290, 70 }, { 1000 * large, 40, 2100 } };
    for (size_t s = 0; s < COUNT_OF(of); s++)
        for (int round = 0; round < 2; round++) {
            const int out = of[s].out, in = of[s].in, rows = of[s].rows;
            const size_t ys = (size_t)rows * (size_t)out, xs = (size_t)rows * (size_t)in;
            const enum kern_type yt = round ? KERN_BF16 : KERN_F32;
            const struct kern_weight w = send_weight(kt_weight_whole(&t, KERN_FORMAT_MXFP4, out, in));
            struct kern_linear a = { .x = send(kt_wholes(&t, KERN_BF16, xs, 8), xs * 2), .x_type = KERN_BF16, .x_ld = in, .w = w,
                                     .u = send(kt_wholes(&t, KERN_BF16, (size_t)rows * 8, 8), (size_t)rows * 16), .u_ld = 8,
                                     .b = send_weight(kt_weight_whole(&t, KERN_FORMAT_BF16, out, 8)), .scale = 0.5f,
                                     .y = send(kt_wholes(&t, yt, ys, 8), kt_bytes(yt, ys)), .y_type = yt, .y_ld = out, .rows = rows };
            mma.linear(&mma, &a, 1);
            const void *want = fetch(&mma, a.y, kt_bytes(yt, ys));
            plain.linear(&plain, &a, 1);
            kt_equal(fetch(&plain, a.y, kt_bytes(yt, ys)), want, yt, ys, "linear", w.format, out, in, rows);
            const float *dx0 = kt_wholes(&t, KERN_F32, xs, 8);
            struct kern_linear_t b = { .dy = send(kt_wholes(&t, KERN_F32, ys, 8), ys * 4), .dy_ld = out, .w = w, .scale = 1.0f,
                                       .accumulate = round, .round = true, .dx = send(dx0, xs * 4), .dx_ld = in, .rows = rows };
            mma.linear_t(&mma, &b);
            const void *back = fetch(&mma, b.dx, xs * 4);
            b.dx = send(dx0, xs * 4);
            plain.linear_t(&plain, &b);
            kt_equal(fetch(&plain, b.dx, xs * 4), back, KERN_F32, xs, "linear_t", w.format, out, in, rows);
            drop_all();
        }
}

/* Products of bf16 are exact. Whatever the order, each of the k sums loses at most 2^-23 of what stands there (a device may
 * cut off instead of rounding), which is at most the sum of magnitudes; scale, bias and what was there take five more. */
static double bound(int k, double magnitude) { return (k + 5) * 0x1p-23 * magnitude; }

Test(blas, near_double_arithmetic) {
    enum { OUT = 40, IN = 700, ROWS = 70, RANK = 9 };
    for (size_t f = 0; f < COUNT_OF(formats); f++)
        for (int type = KERN_F32; type <= KERN_BF16; type++) {
            const struct kern_weight w = kt_weight(&t, formats[f], OUT, IN), b = kt_weight(&t, KERN_FORMAT_BF16, OUT, RANK);
            uint16_t *x = kt_bf16(&t, ROWS * IN, 1.0), *u = kt_bf16(&t, ROWS * RANK, 1.0);
            float *dy = kt_f32(&t, ROWS * OUT, 1.0), *bias = kt_f32(&t, OUT, 1.0), *y0 = kt_f32(&t, ROWS * OUT, 1.0),
                  *dx0 = kt_f32(&t, ROWS * IN, 1.0), *dx = kt_copy(&t, dx0, ROWS * IN * 4);
            void *y = kt_copy(&t, y0, ROWS * OUT * 4);
            const bool add = type == KERN_F32;
            blas.linear(&blas, &(struct kern_linear){ .x = kt_p(x), .x_type = KERN_BF16, .x_ld = IN, .w = w, .scale = 0.7f,
                                                      .bias = kt_p(bias), .accumulate = add, .u = kt_p(u), .u_ld = RANK, .b = b,
                                                      .y = kt_p(y), .y_type = (enum kern_type)type, .y_ld = OUT, .rows = ROWS }, 1);
            blas.linear_t(&blas, &(struct kern_linear_t){ .dy = kt_p(dy), .dy_ld = OUT, .w = w, .scale = 0.7f, .round = true,
                                                          .accumulate = add, .dx = kt_p(dx), .dx_ld = IN, .rows = ROWS });
            for (int r = 0; r < ROWS; r++) {
                for (int o = 0; o < OUT; o++) {
                    double sum = bias[o], all = fabs(sum);
                    if (add) sum += y0[r * OUT + o], all += fabs((double)y0[r * OUT + o]);
                    for (int i = 0; i < IN; i++) {
                        const double p = (double)0.7f * bf16_to_f32(x[r * IN + i]) * kt_at(&w, o, i);
                        sum += p, all += fabs(p);
                    }
                    for (int i = 0; i < RANK; i++) {
                        const double p = (double)bf16_to_f32(u[r * RANK + i]) * kt_at(&b, o, i);
                        sum += p, all += fabs(p);
                    }
                    const double stored = add ? 0 : fabs(sum) * 0x1.01p-8;
                    KT_NEAR(kt_get(y, (enum kern_type)type, (size_t)(r * OUT + o)), sum, bound(IN + RANK, all) + stored,
                            "linear %s row %d output %d", kt_format_name[formats[f]], r, o);
                }
                for (int i = 0; i < IN; i++) {
                    double sum = add ? dx0[r * IN + i] : 0, all = fabs(sum);
                    for (int o = 0; o < OUT; o++) {
                        const double p = (double)0.7f * cpu_round(dy[r * OUT + o], true) * kt_at(&w, o, i);
                        sum += p, all += fabs(p);
                    }
                    KT_NEAR(dx[r * IN + i], sum, bound(OUT, all), "linear_t %s row %d input %d", kt_format_name[formats[f]], r, i);
                }
            }
            kt_drop(&t);
        }
}

/* Rows of the unit matrix pick one input each, so that y is the weight itself: every code under every scale. */
Test(blas, every_code_and_scale) {
    enum { BLOCK = 32, SCALES = 256, ROWS = 3 * BLOCK };
    for (size_t f = 1; f < COUNT_OF(formats); f++) {
        const int groups = formats[f] == KERN_FORMAT_NVFP4 ? 2 : 1;
        struct kern_weight w = { .format = formats[f], .out = SCALES, .in = BLOCK, .scale = 1.0f };
        w.data.p = kt_new(&t, kern_weight_bytes(w.format, w.out, w.in));
        uint8_t codes[SCALES * BLOCK], scales[SCALES * 2];
        for (int i = 0; i < SCALES * BLOCK; i++) codes[i] = (uint8_t)(i % BLOCK % 16);
        for (int i = 0; i < SCALES * groups; i++) scales[i] = (uint8_t)(i / groups + i % groups * 100);
        pack_codes(w.data.p, w.format, codes, scales, w.out, w.in);
        uint16_t *x = kt_new(&t, ROWS * BLOCK * 2);
        float *y = kt_new(&t, ROWS * SCALES * 4);
        for (int i = 0; i < ROWS * BLOCK; i++) x[i] = i / BLOCK % BLOCK == i % BLOCK ? 0x3f80 : 0;
        blas.linear(&blas, &(struct kern_linear){ .x = kt_p(x), .x_type = KERN_BF16, .x_ld = BLOCK, .w = w, .scale = 1.0f,
                                                  .y = kt_p(y), .y_type = KERN_F32, .y_ld = SCALES, .rows = ROWS }, 1);
        int seen = 0;
        for (int o = 0; o < SCALES; o++) {
            bool finite = true;
            for (int i = 0; i < BLOCK; i++) finite &= isfinite(kt_at(&w, o, i));
            for (int r = 0; r < ROWS; r++) {
                const float v = kt_at(&w, o, r % BLOCK), is = y[r * SCALES + o];
                if (!finite) cr_assert(!isfinite(is) || isfinite(v), "%s scale %d", kt_format_name[w.format], o);
                else if (fabsf(v) < 0x1p-126f) cr_assert(is == v || is == 0, "%s scale %d: %g for %g", kt_format_name[w.format], o, (double)is, (double)v);
                else cr_assert(is == v && ++seen, "%s scale %d: %g for %g", kt_format_name[w.format], o, (double)is, (double)v);
            }
        }
        cr_assert(seen > SCALES * ROWS / 2);
        kt_drop(&t);
    }
}

/* What cuBLAS is not asked has the bits of every other path. */
Test(blas, f32_operands_have_the_strict_bits) {
    enum { R = 66, O = 20, I = 70 };
    float *y = kt_new(&t, R * O * 4), *want = kt_new(&t, R * O * 4), *dx = kt_new(&t, R * I * 4), *back = kt_new(&t, R * I * 4);
    struct kern_linear a = { .x = kt_p(kt_f32(&t, R * I, 1.0)), .x_type = KERN_F32, .x_ld = I,
                             .w = kt_weight(&t, KERN_FORMAT_BF16, O, I), .scale = 1.0f, .y = kt_p(want), .y_type = KERN_F32,
                             .y_ld = O, .rows = R }, b = a;
    b.x = kt_p(kt_bf16(&t, R * I, 1.0)), b.x_type = KERN_BF16, b.w = kt_weight(&t, KERN_FORMAT_F32, O, I);
    const struct kern_linear *const of[] = { &a, &b };
    for (size_t i = 0; i < COUNT_OF(of); i++) {
        struct kern_linear one = *of[i];
        t.ref.linear(&t.ref, &one, 1);
        one.y = kt_p(y);
        blas.linear(&blas, &one, 1);
        KT_SAME(&blas, y, want, R * O * 4, "linear of f32, %zu", i);
    }
    struct kern_linear_t d = { .dy = kt_p(kt_f32(&t, R * O, 1.0)), .dy_ld = O, .w = a.w, .scale = 1.0f, .dx = kt_p(back),
                               .dx_ld = I, .rows = R };
    t.ref.linear_t(&t.ref, &d);
    d.dx = kt_p(dx);
    blas.linear_t(&blas, &d);
    KT_SAME(&blas, dx, back, R * I * 4, "linear_t, not rounded");
}

/* Of three at once one goes to cuBLAS, one has few rows, one is f32; and none at all. */
Test(blas, several_at_once_and_nothing) {
    enum { IN = 96, OUT = 50 };
    struct kern_linear a[3];
    float *alone[3];
    for (int i = 0; i < 3; i++) {
        const int rows = i == 1 ? 20 : 80;
        const size_t bytes = (size_t)rows * OUT * 4;
        a[i] = (struct kern_linear){ .x = kt_p(kt_bf16(&t, (size_t)rows * IN, 1.0)), .x_type = KERN_BF16, .x_ld = IN,
                                     .w = kt_weight(&t, i == 2 ? KERN_FORMAT_F32 : KERN_FORMAT_MXFP4, OUT, IN), .scale = 1.0f,
                                     .y = kt_p(kt_new(&t, bytes)), .y_type = KERN_F32, .y_ld = OUT, .rows = rows };
        blas.linear(&blas, &a[i], 1);
        alone[i] = kt_copy(&t, a[i].y.p, bytes);
        memset(a[i].y.p, 0xa5, bytes);
    }
    blas.linear(&blas, a, 3);
    for (int i = 0; i < 3; i++) KT_SAME(&blas, (float *)a[i].y.p, alone[i], (size_t)a[i].rows * OUT * 4, "linear %d of three", i);
    for (int i = 0; i < 3; i++) a[i].rows = 0;
    blas.linear(&blas, a, 3);
    KT_SAME(&blas, (float *)a[0].y.p, alone[0], 80 * OUT * 4, "linear of no rows");
}
