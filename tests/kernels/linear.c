/* linear.c - products with packed weights: the same bits on every path, near double arithmetic on
 * ref.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/kernels/kt.h"

static const int rows_of[] = { 1, 2, 3, 5, 6, 7, 8, 9, 13, 16, 17, 25, 70, 0 };
static const struct { int out, in;
} shape[] = {
    { 1, 1 },   { 7, 9 },    { 16, 32 },   { 17, 33 },  { 15, 31 },  { 48, 160 },
    { 65, 63 }, { 33, 129 }, { 130, 257 }, { 64, 576 }, { 31, 127 },
};
static const char *const format_name[] = { "f32", "bf16", "mxfp4", "nvfp4" };

Test(linear, same_bits_on_every_path_for_any_batch_and_threads) {
    struct kt t;
    kt_open(&t);
    for (enum kern_format f = KERN_FORMAT_F32; f <= KERN_FORMAT_NVFP4; f++)
        for (size_t s = 0; s < COUNT_OF(shape); s++)
            for (int i = 0; rows_of[i]; i++) {
                int out = shape[s].out, in = shape[s].in, rows = rows_of[i], x_ld = in + i % 3,
                    y_ld = out + i % 2;
                enum kern_type xt = i & 1 ? KERN_BF16 : KERN_F32,
                               yt = i % 3 == 2 ? KERN_BF16 : KERN_F32;
                bool add = yt == KERN_F32 && i % 4 < 2;
                size_t n = (size_t)rows * (size_t)y_ld, bytes = kt_bytes(yt, n);
                void *y0 = kt_typed(&t, yt, n, 1.0), *want = kt_copy(&t, y0, bytes);
                struct kern_linear a = { .x = kt_p(
                                             kt_typed(&t, xt, (size_t)rows * (size_t)x_ld, 1.0)),
                                         .x_type = xt,
                                         .x_ld = x_ld,
                                         .w = kt_weight(&t, f, out, in),
                                         .bias = kt_p(i % 3 ? kt_f32(&t, (size_t)out, 1.0) : NULL),
                                         .scale = 0.7f,
                                         .accumulate = add,
                                         .y = kt_p(want),
                                         .y_type = yt,
                                         .y_ld = y_ld,
                                         .rows = rows };
                t.ref.linear(&t.ref, &a, 1);
                KT_EACH(&t, k) {
                    char *got = kt_copy(&t, y0, bytes);
                    a.y = kt_p(got);
                    k->linear(k, &a, 1);
                    KT_SAME(k, got, (char *)want, bytes, "linear %s %dx%d rows %d", format_name[f],
                            out, in, rows);
                    memcpy(got, y0, bytes);
                    struct kern_linear one = a;                           /* row by row: decode */
                    one.rows = 1;
                    for (int r = 0; r < rows; r++) {
                        one.x = kptr_at(a.x, kt_bytes(xt, (size_t)r * (size_t)x_ld));
                        one.y = kptr_at(a.y, kt_bytes(yt, (size_t)r * (size_t)y_ld));
                        k->linear(k, &one, 1);
                    }
                    KT_SAME(k, got, (char *)want, bytes, "linear %s %dx%d row by row",
                            format_name[f], out, in);
                }
                kt_drop(&t);
            }
    kt_close(&t);
}

Test(linear_t, same_bits_on_every_path_for_any_batch_and_threads) {
    struct kt t;
    kt_open(&t);
    for (enum kern_format f = KERN_FORMAT_F32; f <= KERN_FORMAT_NVFP4; f++)
        for (size_t s = 0; s < COUNT_OF(shape); s++)
            for (int i = 0; rows_of[i]; i++) {
                int out = shape[s].out, in = shape[s].in, rows = rows_of[i], dx_ld = in + i % 3,
                    dy_ld = out + i % 2;
                size_t bytes = (size_t)rows * (size_t)dx_ld * 4;
                float *dx0 = kt_f32(&t, (size_t)rows * (size_t)dx_ld, 1.0),
                      *want = kt_copy(&t, dx0, bytes);
                struct kern_linear_t a = { .dy = kt_p(
                                               kt_f32(&t, (size_t)rows * (size_t)dy_ld, 1.0)),
                                           .dy_ld = dy_ld,
                                           .w = kt_weight(&t, f, out, in),
                                           .scale = 1.3f,
                                           .accumulate = i & 1,
                                           .round = i % 3 != 0,
                                           .dx = kt_p(want),
                                           .dx_ld = dx_ld,
                                           .rows = rows };
                t.ref.linear_t(&t.ref, &a);
                KT_EACH(&t, k) {
                    float *got = kt_copy(&t, dx0, bytes);
                    a.dx = kt_p(got);
                    k->linear_t(k, &a);
                    KT_SAME(k, got, want, bytes, "linear_t %s %dx%d rows %d", format_name[f], out,
                            in, rows);
                    memcpy(got, dx0, bytes);
                    struct kern_linear_t one = a;
                    one.rows = 1;
                    for (int r = 0; r < rows; r++) {
                        one.dy = kptr_at(a.dy, (size_t)r * (size_t)dy_ld * 4);
                        one.dx = kptr_at(a.dx, (size_t)r * (size_t)dx_ld * 4);
                        k->linear_t(k, &one);
                    }
                    KT_SAME(k, got, want, bytes, "linear_t %s %dx%d row by row", format_name[f],
                            out, in);
                }
                kt_drop(&t);
            }
    kt_close(&t);
}

Test(linear, more_rows_than_a_part_takes) {
    struct kt t;
    kt_open(&t);
    int out = 80, in = 300, rows = 421;
    float *want = kt_new(&t, (size_t)rows * (size_t)out * 4),
          *back = kt_new(&t, (size_t)rows * (size_t)in * 4);
    struct kern_linear a = { .x = kt_p(kt_bf16(&t, (size_t)rows * (size_t)in, 1.0)),
                             .x_type = KERN_BF16,
                             .x_ld = in,
                             .w = kt_weight(&t, KERN_FORMAT_MXFP4, out, in),
                             .scale = 1.0f,
                             .y = kt_p(want),
                             .y_type = KERN_F32,
                             .y_ld = out,
                             .rows = rows };
    struct kern_linear_t b = { .dy = kt_p(want),
                               .dy_ld = out,
                               .w = a.w,
                               .scale = 1.0f,
                               .round = true,
                               .dx = kt_p(back),
                               .dx_ld = in,
                               .rows = rows };
    t.ref.linear(&t.ref, &a, 1);
    t.ref.linear_t(&t.ref, &b);
    KT_EACH(&t, k) {
        float *got = kt_new(&t, (size_t)rows * (size_t)out * 4),
              *dx = kt_new(&t, (size_t)rows * (size_t)in * 4);
        a.y = kt_p(got);
        k->linear(k, &a, 1);
        KT_SAME(k, got, want, (size_t)rows * (size_t)out * 4, "linear of %d rows", rows);
        b.dx = kt_p(dx);
        k->linear_t(k, &b);
        KT_SAME(k, dx, back, (size_t)rows * (size_t)in * 4, "linear_t of %d rows", rows);
    }
    /* nothing: touches nothing */
    a.rows = b.rows = 0;
    a.y = b.dx = kt_p(NULL);
    KT_EACH(&t, k) {
        k->linear(k, &a, 1);
        k->linear_t(k, &b);
    }
    kt_close(&t);
}

Test(linear, ref_is_near_double) {
    struct kt t;
    kt_open(&t);
    for (enum kern_format f = KERN_FORMAT_F32; f <= KERN_FORMAT_NVFP4; f++) {
        enum { OUT = 50, IN = 200, ROWS = 3 };
        struct kern_weight w = kt_weight(&t, f, OUT, IN);
        float *x = kt_f32(&t, ROWS * IN, 1.0), *y = kt_new(&t, ROWS * OUT * 4),
              *bias = kt_f32(&t, OUT, 1.0);
        float *dy = kt_f32(&t, ROWS * OUT, 1.0), *dx = kt_new(&t, ROWS * IN * 4);
        struct kern_linear a = { .x = kt_p(x), .x_type = KERN_F32, .x_ld = IN, .w = w,
                                 .bias = kt_p(bias), .scale = 0.5f, .y = kt_p(y),
                                 .y_type = KERN_F32, .y_ld = OUT, .rows = ROWS };
        struct kern_linear_t b = { kt_p(dy), OUT, w, 0.5f, false, false, kt_p(dx), IN, ROWS };
        t.ref.linear(&t.ref, &a, 1);
        t.ref.linear_t(&t.ref, &b);
        for (int r = 0; r < ROWS; r++) {
            for (int o = 0; o < OUT; o++) {
                double sum = 0.0, size = 0.0;
                for (int i = 0; i < IN; i++) {
                    sum += (double)x[r * IN + i] * (double)kt_at(&w, o, i);
                    size += fabs((double)x[r * IN + i] * (double)kt_at(&w, o, i));
                }
                KT_NEAR((double)y[r * OUT + o], 0.5 * sum + (double)bias[o], size * 1e-5 + 1e-6,
                        "%s row %d out %d", format_name[f], r, o);
            }
            for (int i = 0; i < IN; i++) {
                double sum = 0.0, size = 0.0;
                for (int o = 0; o < OUT; o++) {
                    sum += (double)dy[r * OUT + o] * (double)kt_at(&w, o, i);
                    size += fabs((double)dy[r * OUT + o] * (double)kt_at(&w, o, i));
                }
                KT_NEAR((double)dx[r * IN + i], 0.5 * sum, size * 1e-5 + 1e-6, "%s row %d in %d",
                        format_name[f], r, i);
            }
        }
        kt_drop(&t);
    }
    kt_close(&t);
}

Test(outer, same_bits_however_sequences_are_split) {
    struct kt t;
    kt_open(&t);
    static const int32_t start[] = { 0, 1, 33, 33, 97, 130 };             /* one of them empty */
    enum { SEQS = 5, ROWS = 130 };
    for (int i = 0; kt_dims[i]; i++)
        for (int j = 0; kt_dims[j]; j++) {
            if ((i + j) % 2) continue;
            int m = kt_dims[i], n = kt_dims[j], a_ld = m + j % 3, b_ld = n + i % 3;
            enum kern_type bt = j & 2 ? KERN_BF16 : KERN_F32;
            size_t bytes = (size_t)m * (size_t)n * 4;
            float *g0 = kt_f32(&t, (size_t)m * (size_t)n, 1.0), *want = kt_copy(&t, g0, bytes);
            struct kern_outer o = { .a = kt_p(kt_f32(&t, (size_t)ROWS * (size_t)a_ld, 1.0)),
                                    .a_ld = a_ld,
                                    .b = kt_p(kt_typed(&t, bt, (size_t)ROWS * (size_t)b_ld, 1.0)),
                                    .b_type = bt,
                                    .b_ld = b_ld,
                                    .scale = 0.6f,
                                    .round = i % 2,
                                    .g = kt_p(want),
                                    .m = m,
                                    .n = n,
                                    .seq_start = start,
                                    .seqs = SEQS };
            t.ref.outer(&t.ref, &o);
            KT_EACH(&t, k) {
                float *got = kt_copy(&t, g0, bytes);
                o.g = kt_p(got);
                k->outer(k, &o);
                KT_SAME(k, got, want, bytes, "outer %d x %d", m, n);
                memcpy(got, g0, bytes);
                /* two calls: micro-batches */
                struct kern_outer half = o;
                half.seqs = 2;
                k->outer(k, &half);
                half.seq_start = start + 2;
                half.seqs = SEQS - 2;
                k->outer(k, &half);
                KT_SAME(k, got, want, bytes, "outer %d x %d in two calls", m, n);
            }
            if (!o.round)
                for (int e = 0; e < m * n; e++) {
                    double sum = 0.0;
                    for (size_t r = 0; r < ROWS; r++)
                        sum += (double)((const float *)o.a.p)[r * (size_t)a_ld + (size_t)(e / n)] *
                               (double)kt_get(o.b.p, bt, r * (size_t)b_ld + (size_t)(e % n));
                    KT_NEAR((double)want[e], (double)g0[e] + 0.6 * sum, 1e-4,
                            "outer %d x %d element %d", m, n, e);
                }
            kt_drop(&t);
        }
    kt_close(&t);
}

Test(embed, same_rows_as_the_weight) {
    struct kt t;
    kt_open(&t);
    for (enum kern_format f = KERN_FORMAT_F32; f <= KERN_FORMAT_NVFP4; f++)
        for (int d = 0; kt_dims[d]; d++) {
            int dim = kt_dims[d], vocab = 37, rows = 23;
            int32_t *tokens = kt_new(&t, (size_t)rows * 4);
            for (int r = 0; r < rows; r++) tokens[r] = (int32_t)(kt_unit(&t) * vocab);
            float *want = kt_new(&t, (size_t)(rows * dim) * 4);
            struct kern_embed a = { kt_p(tokens), kt_weight(&t, f, vocab, dim), kt_p(want), rows };
            t.ref.embed(&t.ref, &a);
            cr_assert(want[dim * 5] == kt_at(&a.w, tokens[5], 0));
            KT_EACH(&t, k) {
                float *got = kt_new(&t, (size_t)(rows * dim) * 4);
                a.y = kt_p(got);
                k->embed(k, &a);
                KT_SAME(k, got, want, (size_t)(rows * dim) * 4, "embed dim %d", dim);
            }
            kt_drop(&t);
        }
    kt_close(&t);
}
