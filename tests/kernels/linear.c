/* linear.c - products with packed weights: the same bits on every path, near double arithmetic on
 * ref.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/kernels/kt.h"

static const int rows_of[] = { 1, 2, 3, 5, 6, 7, 8, 9, 13, 16, 17, 25, 33, 70, 0 };
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


Test(linear, adapter_and_several_at_once) {
    struct kt t;
    kt_open(&t);
    enum { IN = 96, LD = 2 * IN };
    static const int out_of[] = { 48, 17, 130 }, rank_of[] = { 8, 32, 40 };
    static const enum kern_format w_of[] = { KERN_FORMAT_MXFP4, KERN_FORMAT_BF16,
                                             KERN_FORMAT_NVFP4, KERN_FORMAT_F32 };
    for (int i = 0; rows_of[i]; i++)
        for (int variant = 0; variant < 8; variant++) {
            const enum kern_type xt = variant & 1 ? KERN_F32 : KERN_BF16;
            const int rows = rows_of[i], n = 1 + (i + variant) % 3;
            struct kern_linear a[3];
            void *y0[3], *want[3];
            size_t bytes[3];
            for (int j = 0; j < n; j++) {
                const int out = out_of[j], rank = rank_of[(i + j) % 3], ld = out + j;
                const bool lora = j != 1 || variant & 2;
                bytes[j] = (size_t)rows * (size_t)ld * 4;
                y0[j] = kt_f32(&t, (size_t)rows * (size_t)ld, 1.0);
                a[j] = (struct kern_linear){
                    .x = kt_p(kt_typed(&t, xt, (size_t)rows * LD, 1.0)), .x_type = xt, .x_ld = LD,
                    .w = kt_weight(&t, w_of[(variant + j) % 4], out, IN), .scale = 0.7f,
                    .bias = kt_p(j ? kt_f32(&t, (size_t)out, 1.0) : NULL),
                    .accumulate = variant & 4,
                    .u = kt_p(kt_typed(&t, xt, (size_t)(rows * (rank + j)), 1.0)),
                    .u_ld = rank + j, .y = kt_p(kt_copy(&t, y0[j], bytes[j])),
                    .y_type = KERN_F32, .y_ld = ld, .rows = rows };
                if (lora)
                    a[j].b = kt_weight(&t, variant & 2 ? KERN_FORMAT_BF16 : KERN_FORMAT_F32, out,
                                       rank);
                /* by two calls: first v, then what the adapter adds */
                want[j] = kt_copy(&t, y0[j], bytes[j]);
                struct kern_linear one = a[j];
                one.b.out = 0;
                one.y = kt_p(want[j]);
                t.ref.linear(&t.ref, &one, 1);
                one.x = a[j].u, one.x_ld = a[j].u_ld, one.w = a[j].b, one.scale = 1.0f;
                one.bias.p = NULL;
                one.accumulate = true;
                if (lora) t.ref.linear(&t.ref, &one, 1);
            }
            t.ref.linear(&t.ref, a, n);
            for (int j = 0; j < n; j++)
                KT_SAME(&t.ref, (float *)a[j].y.p, (float *)want[j], bytes[j],
                        "%d linears, the adapter of %d beside it", n, j);
            KT_EACH(&t, k) {
                for (int j = 0; j < n; j++) memcpy(a[j].y.p, y0[j], bytes[j]);
                k->linear(k, a, n);
                for (int j = 0; j < n; j++)
                    KT_SAME(k, (float *)a[j].y.p, (float *)want[j], bytes[j],
                            "%d of %d linears, variant %d, rows %d", j, n, variant, rows);
            }
            /* rounded once, at the end */
            struct kern_linear *last = &a[n - 1];
            const size_t count = (size_t)rows * (size_t)last->y_ld;
            uint16_t *half = kt_new(&t, count * 2);
            for (size_t e = 0; e < count; e++) half[e] = f32_to_bf16(((float *)want[n - 1])[e]);
            last->y = kt_p(kt_new(&t, count * 2));
            last->y_type = KERN_BF16;
            KT_EACH(&t, k) {
                if (last->accumulate) break;
                k->linear(k, last, 1);
                for (int r = 0; r < rows; r++)
                    KT_SAME(k, (uint16_t *)last->y.p + r * last->y_ld, half + r * last->y_ld,
                            (size_t)last->w.out * 2, "adapter rounded once, row %d", r);
            }
            kt_drop(&t);
        }
    kt_close(&t);
}

/* Numbers at one end of the range or the other: what underflows with zeros of both signs, or what
 * overflows, now and then infinite itself. */
enum end { TINY, MIXED, HUGE_NOW_AND_THEN, INFINITE, ENDS };
static float extreme(struct kt *t, enum end end) {
    static const float size[] = { 1.0f,      0x1p-127f, 0x1p-133f, 0x1p-126f, 0x1p-64f, 0x1p-62f,
                                  0x1p-60f,  0.0f,      1.0f,      0x1p62f,   0x1p64f,  0x1p126f };
    const float sign = kt_unit(t) < 0.5 ? -1.0f : 1.0f, x = 1.0f + (float)kt_unit(t);
    const double pick = kt_unit(t);
    if (end == TINY) return sign * x * size[1 + (int)(pick * 7)];
    if (end == MIXED) return sign * x * size[(int)(pick * 10)];
    if (end == INFINITE && pick < 0.002) return sign * INFINITY;
    return sign * x * (pick < 0.02 ? size[9 + (int)(kt_unit(t) * 3)] : size[(int)(pick * 8)]);
}
static void *extremes(struct kt *t, enum kern_type type, size_t n, enum end end) {
    void *p = kt_new(t, kt_bytes(type, n));
    for (size_t i = 0; i < n; i++) cpu_put(kt_p(p), type, i, extreme(t, end));
    return p;
}
/* All codes, and all scales there are: of one kind in a weight, so that plain ones are met too. */
static struct kern_weight extreme_weight(struct kt *t, enum kern_format f, int out, int in,
                                         enum end kind) {
    struct kern_weight w = { .format = f, .out = out, .in = in, .scale = 1.0f };
    const size_t n = (size_t)out * (size_t)in;
    w.data.p = kt_new(t, kern_weight_bytes(f, out, in));
    if (f == KERN_FORMAT_F32 || f == KERN_FORMAT_BF16) {
        pack_f32(w.data.p, f, extremes(t, KERN_F32, n, (enum end)kind), out, in);
        return w;
    }
    static const uint8_t edge[] = { 0, 1, 2, 3, 251, 252, 253, 254 };
    const bool mx = f == KERN_FORMAT_MXFP4;
    const size_t scales_n = (size_t)out * (size_t)((in + (mx ? 31 : 15)) / (mx ? 32 : 16));
    uint8_t *codes = kt_new(t, n), *scales = kt_new(t, scales_n);
    for (size_t i = 0; i < n; i++) codes[i] = (uint8_t)(kt_unit(t) * 16);
    for (size_t i = 0; i < scales_n; i++)
        scales[i] = (uint8_t)(kind == TINY    ? kt_unit(t) * (mx ? 70 : 16)
                              : kind == MIXED ? 2 + kt_unit(t) * (mx ? 200 : 124)
                              : kind == HUGE_NOW_AND_THEN && kt_unit(t) < 0.5 ? 120
                              : kind == INFINITE ? kt_unit(t) * 256
                                                 : edge[(int)(kt_unit(t) * 8)]);
    pack_codes(w.data.p, f, codes, scales, out, in);
    return w;
}

/* at most so many rows a call, as decoding has few */
static void linear_in_parts(struct kern *k, const struct kern_linear *a, int most) {
    struct kern_linear part = *a;
    for (int r = 0; r < a->rows; r += most) {
        part.rows = a->rows - r < most ? a->rows - r : most;
        part.x = kptr_at(a->x, kt_bytes(a->x_type, (size_t)r * (size_t)a->x_ld));
        part.u = kptr_at(a->u, kt_bytes(a->x_type, (size_t)r * (size_t)a->u_ld));
        part.y = kptr_at(a->y, kt_bytes(a->y_type, (size_t)r * (size_t)a->y_ld));
        k->linear(k, &part, 1);
    }
}

Test(linear, ends_of_the_range) {
    struct kt t;
    kt_open(&t);
    enum { OUT = 48, IN = 96, ROWS = 19 };
    for (enum kern_format f = KERN_FORMAT_F32; f <= KERN_FORMAT_NVFP4; f++)
        for (int round = 0; round < 2 * ENDS * ENDS; round++) {
            const enum kern_type xt = round & 16 ? KERN_F32 : KERN_BF16;
            float *want = kt_new(&t, ROWS * OUT * 4), *back = kt_new(&t, ROWS * IN * 4);
            struct kern_linear a = {
                .x = kt_p(extremes(&t, xt, ROWS * IN, round / 4 % ENDS)), .x_type = xt, .x_ld = IN,
                .w = extreme_weight(&t, f, OUT, IN, round % ENDS), .scale = 1.0f, .y = kt_p(want),
                .y_type = KERN_F32, .y_ld = OUT, .rows = ROWS };
            struct kern_linear_t b = { .dy = kt_p(extremes(&t, KERN_F32, ROWS * OUT,
                                                             round / 4 % ENDS)),
                                       .dy_ld = OUT, .w = a.w, .scale = 1.0f, .round = !(round & 16),
                                       .dx = kt_p(back), .dx_ld = IN, .rows = ROWS };
            t.ref.linear(&t.ref, &a, 1);
            t.ref.linear_t(&t.ref, &b);
            kt_one_nan(want, KERN_F32, ROWS * OUT);
            kt_one_nan(back, KERN_F32, ROWS * IN);
            KT_EACH(&t, k) {
                float *y = kt_new(&t, ROWS * OUT * 4), *dx = kt_new(&t, ROWS * IN * 4);
                a.y = kt_p(y);
                b.dx = kt_p(dx);
                k->linear(k, &a, 1);
                k->linear_t(k, &b);
                kt_one_nan(y, KERN_F32, ROWS * OUT);
                kt_one_nan(dx, KERN_F32, ROWS * IN);
                KT_SAME(k, y, want, ROWS * OUT * 4, "linear %s round %d", format_name[f], round);
                KT_SAME(k, dx, back, ROWS * IN * 4, "linear_t %s round %d", format_name[f], round);
                const int most = 1 << round % 5;
                linear_in_parts(k, &a, most);
                kt_one_nan(y, KERN_F32, ROWS * OUT);
                KT_SAME(k, y, want, ROWS * OUT * 4, "linear %s round %d, %d rows at a time",
                        format_name[f], round, most);
            }
            kt_drop(&t);
        }
    kt_close(&t);
}

/* Where codes may be multiplied first and scaled afterwards, and just outside: rows of one size
 * against scales about 2^-32 and 2^32. */
Test(linear, scales_at_the_ends_of_what_may_wait) {
    struct kt t;
    kt_open(&t);
    enum { OUT = 32, IN = 96, N = OUT * IN };
    static const int size[] = { -120, -100, -92, -88, -87, -86, -85, 0, 84, 85, 86, 87, 88, 100 };
    for (size_t s = 0; s < COUNT_OF(size); s++)
        for (int round = 0; round < 8; round++) {
            uint8_t *codes = kt_new(&t, N), *scales = kt_new(&t, N / 32);
            const int rows = 1 + round % 3, up = round & 4 ? 1 : -1, most = round & 2 ? 34 : 32;
            uint16_t *x = kt_new(&t, (size_t)rows * IN * 2);
            for (int i = 0; i < rows * IN; i++) {
                const float one = (1.0f + (float)kt_unit(&t)) * (kt_unit(&t) < 0.5 ? -1.0f : 1.0f);
                x[i] = kt_unit(&t) < 0.3 ? 0 : f32_to_bf16(ldexpf(one, size[s]));
            }
            for (int i = 0; i < N; i++) codes[i] = (uint8_t)(kt_unit(&t) * 16);
            for (int i = 0; i < N / 32; i++) scales[i] = (uint8_t)(127 + up * (most - (int)(kt_unit(&t) * 3)));
            struct kern_weight w = { .format = KERN_FORMAT_MXFP4, .out = OUT, .in = IN,
                                     .scale = 1.0f };
            w.data.p = kt_new(&t, kern_weight_bytes(w.format, OUT, IN));
            pack_codes(w.data.p, w.format, codes, scales, OUT, IN);
            const size_t bytes = (size_t)rows * OUT * 4;
            float *want = kt_new(&t, bytes);
            struct kern_linear a = { .x = kt_p(x), .x_type = KERN_BF16, .x_ld = IN, .w = w,
                                     .scale = 1.0f, .y = kt_p(want), .y_type = KERN_F32,
                                     .y_ld = OUT, .rows = rows };
            t.ref.linear(&t.ref, &a, 1);
            kt_one_nan(want, KERN_F32, (size_t)rows * OUT);
            KT_EACH(&t, k) {
                float *got = kt_new(&t, bytes);
                a.y = kt_p(got);
                k->linear(k, &a, 1);
                kt_one_nan(got, KERN_F32, (size_t)rows * OUT);
                KT_SAME(k, got, want, bytes, "x about 2^%d, scales up to 2^%d", size[s],
                        up * most);
            }
            kt_drop(&t);
        }
    kt_close(&t);
}

/* x = 1: y is the weight itself, to the last bit of it but that subnormals are zero; where there is
 * an infinity among what is summed, it is no number. */
Test(linear, every_scale_of_a_record) {
    struct kt t;
    kt_open(&t);
    enum { OUT = 16, IN = 32 };
    for (enum kern_format f = KERN_FORMAT_MXFP4; f <= KERN_FORMAT_NVFP4; f++)
        for (int scale = 0; scale < 256; scale++) {
            uint8_t codes[OUT * IN], scales[OUT * 2], record[512];
            uint16_t x[IN * IN];
            float dy[OUT * OUT], y[IN * OUT], dx[OUT * IN];
            bool finite = true;
            for (int i = 0; i < IN * IN; i++) x[i] = i / IN == i % IN ? 0x3f80 : 0;
            for (int i = 0; i < OUT * OUT; i++) dy[i] = i / OUT == i % OUT ? 1.0f : 0.0f;
            for (int i = 0; i < OUT * IN; i++) codes[i] = (uint8_t)((i / IN * 5 + i % IN) % 16);
            memset(scales, scale, sizeof scales);
            const struct kern_weight w = { kt_p(record), f, OUT, IN, 1.0f };
            pack_codes(record, f, codes, scales, OUT, IN);
            for (int i = 0; i < OUT * IN; i++) finite &= isfinite(kt_at(&w, i / IN, i % IN)) != 0;
            const struct kern_linear a = { .x = kt_p(x), .x_type = KERN_BF16, .x_ld = IN, .w = w,
                                           .scale = 1.0f, .y = kt_p(y), .y_type = KERN_F32,
                                           .y_ld = OUT, .rows = IN };
            const struct kern_linear_t b = { .dy = kt_p(dy), .dy_ld = OUT, .w = w, .scale = 1.0f,
                                             .round = true, .dx = kt_p(dx), .dx_ld = IN,
                                             .rows = OUT };
            KT_EACH(&t, k) {
                k->linear(k, &a, 1);
                k->linear_t(k, &b);
                for (int i = 0; i < OUT * IN; i++) {
                    const float v = kern_flushf(kt_at(&w, i / IN, i % IN)), to = y[i % IN * OUT + i / IN];
                    cr_assert(finite ? to == v && dx[i] == v : !isfinite(to) && !isfinite(dx[i]),
                              "%s, %s scale %d code %d: %g and %g, wanted %g", k->name,
                              format_name[f], scale, codes[i], (double)to, (double)dx[i], (double)v);
                }
            }
        }
    kt_close(&t);
}

Test(linear, nan_stays_in_its_row) {
    struct kt t;
    kt_open(&t);
    enum { OUT = 70, IN = 160, ROWS = 21 };
    for (enum kern_format f = KERN_FORMAT_F32; f <= KERN_FORMAT_NVFP4; f++)
        for (int bad = 0; bad < ROWS; bad += 4) {
            uint16_t *x = kt_bf16(&t, ROWS * IN, 1.0);
            float *dy = kt_f32(&t, ROWS * OUT, 1.0), *y = kt_new(&t, ROWS * OUT * 4),
                  *dx = kt_new(&t, ROWS * IN * 4);
            x[bad * IN + 37] = 0x7fc0;
            dy[bad * OUT + 33] = NAN;
            struct kern_linear a = { .x = kt_p(x), .x_type = KERN_BF16, .x_ld = IN,
                                     .w = kt_weight(&t, f, OUT, IN), .scale = 1.0f, .y = kt_p(y),
                                     .y_type = KERN_F32, .y_ld = OUT, .rows = ROWS };
            struct kern_linear_t b = { .dy = kt_p(dy), .dy_ld = OUT, .w = a.w, .scale = 1.0f,
                                       .round = true, .dx = kt_p(dx), .dx_ld = IN, .rows = ROWS };
            KT_EACH(&t, k) {
                k->linear(k, &a, 1);
                k->linear_t(k, &b);
                for (int i = 0; i < ROWS * OUT; i++)
                    cr_assert(isnan(y[i]) == (i / OUT == bad), "%s: NaN of row %d, element %d",
                              k->name, bad, i);
                for (int i = 0; i < ROWS * IN; i++)
                    cr_assert(isnan(dx[i]) == (i / IN == bad), "%s: NaN of row %d back, element %d",
                              k->name, bad, i);
            }
            kt_drop(&t);
        }
    kt_close(&t);
}

Test(linear, k_longer_than_a_part_holds) {
    struct kt t;
    kt_open(&t);
    enum { LONG = 5600, SHORT = 120, ROWS = 190 };
    uint16_t *x = kt_bf16(&t, ROWS * LONG, 1.0);
    float *dy = kt_f32(&t, ROWS * LONG, 1.0), *want = kt_new(&t, ROWS * SHORT * 4),
          *back = kt_new(&t, ROWS * SHORT * 4);
    struct kern_linear a = { .x = kt_p(x), .x_type = KERN_BF16, .x_ld = LONG,
                             .w = kt_weight(&t, KERN_FORMAT_MXFP4, SHORT, LONG), .scale = 1.0f,
                             .u = kt_p(x), .u_ld = LONG,
                             .b = kt_weight(&t, KERN_FORMAT_BF16, SHORT, 33), .y = kt_p(want),
                             .y_type = KERN_F32, .y_ld = SHORT, .rows = ROWS };
    struct kern_linear_t b = { .dy = kt_p(dy), .dy_ld = LONG,
                               .w = kt_weight(&t, KERN_FORMAT_MXFP4, LONG, SHORT), .scale = 1.0f,
                               .round = true, .dx = kt_p(back), .dx_ld = SHORT, .rows = ROWS };
    t.ref.linear(&t.ref, &a, 1);
    t.ref.linear_t(&t.ref, &b);
    KT_EACH(&t, k) {
        float *y = kt_new(&t, ROWS * SHORT * 4), *dx = kt_new(&t, ROWS * SHORT * 4);
        a.y = kt_p(y);
        b.dx = kt_p(dx);
        k->linear(k, &a, 1);
        k->linear_t(k, &b);
        KT_SAME(k, y, want, ROWS * SHORT * 4, "linear of %d inputs", LONG);
        KT_SAME(k, dx, back, ROWS * SHORT * 4, "linear_t of %d outputs", LONG);
        for (int most = 1; most <= 16; most *= 2) {
            const int rows = most + most / 4;             /* a call that is full, and the rest */
            memset(y, 0, (size_t)rows * SHORT * 4);
            a.rows = rows;
            linear_in_parts(k, &a, most);
            KT_SAME(k, y, want, (size_t)rows * SHORT * 4, "linear of %d inputs, %d rows at a time",
                    LONG, most);
        }
        a.rows = ROWS;
    }
    kt_close(&t);
}

/* A product of a sum over k passes through at most 16 roundings in its chain, one where the chains
 * meet, one a block, and `more` after that: each is off by 2^-24 of what it rounds. */
static double gamma_of(int k, int more) {
    const double n = 17 + (k + 31) / 32 + more, u = 0x1p-24;
    return n * u / (1.0 - n * u);
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
                size = 0.5 * size + fabs((double)bias[o]);
                KT_NEAR((double)y[r * OUT + o], 0.5 * sum + (double)bias[o],
                        size * gamma_of(IN, 2), "%s row %d out %d", format_name[f], r, o);
            }
            for (int i = 0; i < IN; i++) {
                double sum = 0.0, size = 0.0;
                for (int o = 0; o < OUT; o++) {
                    sum += (double)dy[r * OUT + o] * (double)kt_at(&w, o, i);
                    size += fabs((double)dy[r * OUT + o] * (double)kt_at(&w, o, i));
                }
                KT_NEAR((double)dx[r * IN + i], 0.5 * sum, 0.5 * size * gamma_of(OUT, 1),
                        "%s row %d in %d", format_name[f], r, i);
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

Test(outer, ends_of_the_range) {
    struct kt t;
    kt_open(&t);
    static const int32_t start[] = { 0, 3, 40, 75 };
    enum { ROWS = 75, M = 35, N = 50 };
    for (int round = 0; round < 4 * ENDS * ENDS; round++) {
        const enum kern_type bt = round & 1 ? KERN_F32 : KERN_BF16;
        float *want = kt_f32(&t, M * N, 1.0), *g0 = kt_copy(&t, want, M * N * 4);
        struct kern_outer o = { .a = kt_p(extremes(&t, KERN_F32, ROWS * M, round / 4 % ENDS)), .a_ld = M,
                                .b = kt_p(extremes(&t, bt, ROWS * N, round / 16)), .b_type = bt,
                                .b_ld = N, .scale = 0.6f, .round = !(round & 2), .g = kt_p(want),
                                .m = M, .n = N, .seq_start = start, .seqs = 3 };
        t.ref.outer(&t.ref, &o);
        kt_one_nan(want, KERN_F32, M * N);
        KT_EACH(&t, k) {
            float *got = kt_copy(&t, g0, M * N * 4);
            o.g = kt_p(got);
            k->outer(k, &o);
            kt_one_nan(got, KERN_F32, M * N);
            KT_SAME(k, got, want, M * N * 4, "outer round %d", round);
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
