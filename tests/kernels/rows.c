/* rows.c - norms, activations, rotations, moves of rows, AdamW.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/kernels/kt.h"

enum { ROWS = 37 };

Test(rmsnorm, same_bits_and_near_double) {
    struct kt t;
    kt_open(&t);
    for (int d = 0; kt_dims[d]; d++)
        for (int i = 0; i < 4; i++) {
            int dim = kt_dims[d];
            size_t n = (size_t)ROWS * (size_t)dim;
            enum kern_type yt = i & 1 ? KERN_BF16 : KERN_F32;
            float *x = kt_f32(&t, n, 2.0), *w = kt_f32(&t, (size_t)dim, 1.0),
                  *dw = i & 2 ? kt_f32(&t, (size_t)dim, 0.1) : NULL;
            float *rstd = kt_new(&t, ROWS * 4);
            void *want = kt_new(&t, kt_bytes(yt, n));
            struct kern_rmsnorm a = { kt_p(x), kt_p(w), kt_p(dw), kt_p(want), kt_p(rstd),
                                      yt,      ROWS,    dim,      1e-6f };
            t.ref.rmsnorm(&t.ref, &a);
            for (int r = 0; r < ROWS; r++) {
                double sum = 0.0;
                for (int j = 0; j < dim; j++) sum += pow((double)x[r * dim + j], 2);
                double m = 1.0 / sqrt(sum / dim + 1e-6);
                KT_NEAR((double)rstd[r], m, m * 1e-6, "rstd dim %d", dim);
                for (int j = 0; j < dim; j++) {
                    double y = (double)x[r * dim + j] * m *
                               ((double)w[j] + (dw ? (double)dw[j] : 0.0));
                    KT_NEAR((double)kt_get(want, yt, (size_t)(r * dim + j)), y,
                            fabs(y) * (yt == KERN_F32 ? 1e-6 : 0.004) + 1e-9, "rmsnorm");
                }
            }
            KT_EACH(&t, k) {
                char *got = kt_new(&t, kt_bytes(yt, n));
                float *rs = kt_new(&t, ROWS * 4);
                a.y = kt_p(got), a.rstd = kt_p(rs);
                k->rmsnorm(k, &a);
                KT_SAME(k, got, (char *)want, kt_bytes(yt, n), "rmsnorm dim %d", dim);
                KT_SAME(k, rs, rstd, ROWS * 4, "rmsnorm rstd dim %d", dim);
                if (yt == KERN_F32) {                                     /* in place, row by row */
                    float *same = kt_copy(&t, x, n * 4);
                    struct kern_rmsnorm b = {
                        .w = a.w, .dw = a.dw, .rows = 1, .dim = dim, .eps = a.eps
                    };
                    for (int r = 0; r < ROWS; r++) {
                        b.x = b.y = kt_p(same + r * dim);
                        k->rmsnorm(k, &b);
                    }
                    KT_SAME(k, same, (float *)want, n * 4, "rmsnorm in place dim %d", dim);
                }
            }
            kt_drop(&t);
        }
    kt_close(&t);
}

static double norm_loss(const double *x, const float *w, const float *dy, int dim) {
    double sum = 0.0, loss = 0.0;
    for (int j = 0; j < dim; j++) sum += x[j] * x[j];
    double m = 1.0 / sqrt(sum / dim + 1e-6);
    for (int j = 0; j < dim; j++) loss += x[j] * m * (double)w[j] * (double)dy[j];
    return loss;
}

Test(rmsnorm_bwd, same_bits_and_finite_differences) {
    struct kt t;
    kt_open(&t);
    for (int d = 0; kt_dims[d]; d++) {
        int dim = kt_dims[d];
        size_t n = (size_t)ROWS * (size_t)dim;
        float *x = kt_f32(&t, n, 1.0), *w = kt_f32(&t, (size_t)dim, 1.0),
              *dw = kt_f32(&t, (size_t)dim, 0.1), *dy = kt_f32(&t, n, 1.0);
        float *rstd = kt_new(&t, ROWS * 4), *y = kt_new(&t, n * 4), *dx0 = kt_f32(&t, n, 1.0),
              *want = kt_copy(&t, dx0, n * 4);
        struct kern_rmsnorm f = { kt_p(x),  kt_p(w), kt_p(dw), kt_p(y), kt_p(rstd),
                                  KERN_F32, ROWS,    dim,      1e-6f };
        t.ref.rmsnorm(&t.ref, &f);
        struct kern_rmsnorm_bwd a = { kt_p(dy), kt_p(x),    kt_p(rstd), kt_p(w),
                                      kt_p(dw), kt_p(want), ROWS,       dim };
        t.ref.rmsnorm_bwd(&t.ref, &a);
        KT_EACH(&t, k) {
            float *got = kt_copy(&t, dx0, n * 4);
            a.dx = kt_p(got);
            k->rmsnorm_bwd(k, &a);
            KT_SAME(k, got, want, n * 4, "rmsnorm_bwd dim %d", dim);
        }
        double row[256];
        float gain[256];
        for (int j = 0; j < dim; j++) row[j] = (double)x[j], gain[j] = w[j] + dw[j];
        for (int j = 0; j < dim; j++) {
            double h = 1e-5, at = row[j];
            row[j] = at + h;
            double up = norm_loss(row, gain, dy, dim);
            row[j] = at - h;
            double down = norm_loss(row, gain, dy, dim);
            row[j] = at;
            double slope = (up - down) / (2 * h);
            KT_NEAR((double)want[j] - (double)dx0[j], slope, 2e-5 * (1.0 + fabs(slope)),
                    "rmsnorm_bwd dim %d element %d", dim, j);
        }
        kt_drop(&t);
    }
    kt_close(&t);
}

/* rows longer than what a path may hold of them at once */
Test(rmsnorm, long_rows_have_the_same_bits) {
    enum { LONG = 5003, FEW = 3 };
    struct kt t;
    kt_open(&t);
    const size_t n = FEW * LONG;
    float *x = kt_f32(&t, n, 1.0), *w = kt_f32(&t, LONG, 1.0), *dw = kt_f32(&t, LONG, 0.1),
          *dy = kt_f32(&t, n, 1.0), *dx0 = kt_f32(&t, n, 1.0), *y = kt_new(&t, n * 4),
          *rstd = kt_new(&t, FEW * 4), *dx = kt_copy(&t, dx0, n * 4);
    struct kern_rmsnorm a = { kt_p(x),  kt_p(w), kt_p(dw), kt_p(y), kt_p(rstd),
                              KERN_F32, FEW,     LONG,     1e-6f };
    struct kern_rmsnorm_bwd b = { kt_p(dy), kt_p(x),  kt_p(rstd), kt_p(w),
                                  kt_p(dw), kt_p(dx), FEW,        LONG };
    t.ref.rmsnorm(&t.ref, &a);
    t.ref.rmsnorm_bwd(&t.ref, &b);
    KT_EACH(&t, k) {
        float *got = kt_new(&t, n * 4), *back = kt_copy(&t, dx0, n * 4);
        a.y = kt_p(got), b.dx = kt_p(back);
        k->rmsnorm(k, &a);
        k->rmsnorm_bwd(k, &b);
        KT_SAME(k, got, y, n * 4, "rmsnorm of a long row");
        KT_SAME(k, back, dx, n * 4, "rmsnorm_bwd of a long row");
    }
    kt_close(&t);
}

Test(rope, same_bits_and_back_again) {
    struct kt t;
    kt_open(&t);
    static const int dims[] = { 2, 4, 10, 20, 30, 32, 34, 48, 64, 96, 128, 0 };
    for (int d = 0; dims[d]; d++)
        for (int i = 0; i < 2; i++) {
            int dim = dims[d], half = dim / 2, heads = 3, positions = 50;
            size_t n = (size_t)(ROWS * heads * dim);
            enum kern_type yt = i ? KERN_BF16 : KERN_F32;
            float *x = kt_f32(&t, n, 1.0), *c = kt_new(&t, (size_t)(positions * half) * 4),
                  *s = kt_new(&t, (size_t)(positions * half) * 4);
            for (int j = 0; j < positions * half; j++) {
                double angle = j / half * pow(10000.0, -2.0 * (j % half) / dim);
                c[j] = (float)cos(angle), s[j] = (float)sin(angle);
            }
            int32_t *pos = kt_new(&t, ROWS * 4);
            for (int r = 0; r < ROWS; r++) pos[r] = (int32_t)(kt_unit(&t) * positions);
            void *want = kt_new(&t, kt_bytes(yt, n));
            struct kern_rope a = { kt_p(x), kt_p(want), yt,    kt_p(pos), kt_p(c),
                                   kt_p(s), ROWS,       heads, dim,       false };
            t.ref.rope(&t.ref, &a);
            for (size_t e = 0; e < n; e++) {
                int r = (int)(e / (size_t)(heads * dim)), j = (int)(e % (size_t)dim), k = j % half;
                double angle = pos[r] * pow(10000.0, -2.0 * k / dim),
                       x0 = (double)x[e - (size_t)(j - k)],
                       x1 = (double)x[e - (size_t)(j - k) + (size_t)half];
                double y = j < half ? x0 * cos(angle) - x1 * sin(angle)
                                    : x1 * cos(angle) + x0 * sin(angle);
                KT_NEAR((double)kt_get(want, yt, e), y, yt == KERN_F32 ? 2e-6 : 0.02, "rope dim %d",
                        dim);
            }
            KT_EACH(&t, k) {
                char *got = yt == KERN_F32 ? kt_copy(&t, x, n * 4) : kt_new(&t, n * 2);
                struct kern_rope b = a;
                b.y = kt_p(got);
                if (yt == KERN_F32) b.x = b.y;                            /* in place */
                k->rope(k, &b);
                KT_SAME(k, got, (char *)want, kt_bytes(yt, n), "rope dim %d", dim);
                if (yt != KERN_F32) continue;
                b.inverse = true;
                k->rope(k, &b);
                for (size_t e = 0; e < n; e++)
                    KT_NEAR((double)((float *)(void *)got)[e], (double)x[e], 2e-6,
                            "rope there and back");
            }
            kt_drop(&t);
        }
    kt_close(&t);
}

static double silu_mul(double g, double u) { return g / (1.0 + exp(-g)) * u; }

Test(swiglu, same_bits_near_double_and_finite_differences) {
    struct kt t;
    kt_open(&t);
    for (int d = 0; kt_dims[d]; d++)
        for (int i = 0; i < 2; i++) {
            int dim = kt_dims[d];
            size_t n = (size_t)(ROWS * dim);
            enum kern_type yt = i ? KERN_BF16 : KERN_F32;
            float *gate = kt_f32(&t, n, 3.0), *up = kt_f32(&t, n, 1.0), *dy = kt_f32(&t, n, 1.0);
            float *dgate = kt_new(&t, n * 4), *dup = kt_new(&t, n * 4);
            void *kept[2] = { kt_new(&t, kt_bytes(yt, n)), kt_new(&t, kt_bytes(yt, n)) };
            /* exp overflows, as it may */
            gate[0] = -200.0f;
            void *want = kt_new(&t, kt_bytes(yt, n));
            struct kern_swiglu a = { .gate = kt_p(gate), .up = kt_p(up), .y = kt_p(want),
                                     .gate_kept = kt_p(kept[0]), .up_kept = kt_p(kept[1]),
                                     .y_type = yt, .rows = ROWS, .dim = dim };
            struct kern_swiglu_bwd b = { .dy = kt_p(dy), .gate = kt_p(kept[0]),
                                         .up = kt_p(kept[1]), .type = yt, .dgate = kt_p(dgate),
                                         .dup = kt_p(dup), .rows = ROWS, .dim = dim };
            t.ref.swiglu(&t.ref, &a);
            t.ref.swiglu_bwd(&t.ref, &b);
            for (size_t at = 0; at < n; at++) {
                double rounding = yt == KERN_F32 ? 0 : 1.0 / 256;
                KT_NEAR((double)kt_get(want, yt, at), silu_mul((double)gate[at], (double)up[at]),
                        fabs(silu_mul((double)gate[at], (double)up[at])) * (1e-6 + rounding) +
                            1e-30,
                        "swiglu");
                double g = (double)kt_get(kept[0], yt, at), u = (double)kt_get(kept[1], yt, at);
                double e = 1e-5, d0 = (double)dy[at];
                KT_NEAR(g, (double)gate[at], rounding * fabs(g), "gate kept");
                KT_NEAR(u, (double)up[at], rounding * fabs(u), "up kept");
                double dydg = (silu_mul(g + e, u) - silu_mul(g - e, u)) / (2 * e);
                KT_NEAR((double)dgate[at], d0 * dydg, 1e-5 * (1 + fabs(d0 * dydg)), "dgate");
                KT_NEAR((double)dup[at], d0 * silu_mul(g, 1.0), 1e-5 * (1 + fabs(d0 * g)), "dup");
            }
            KT_EACH(&t, k) {
                char *got[3];
                for (int j = 0; j < 3; j++) got[j] = kt_new(&t, kt_bytes(yt, n));
                a.y = kt_p(got[0]), a.gate_kept = kt_p(got[1]), a.up_kept = kt_p(got[2]);
                k->swiglu(k, &a);
                KT_SAME(k, got[0], (char *)want, kt_bytes(yt, n), "swiglu dim %d", dim);
                KT_SAME(k, got[1], (char *)kept[0], kt_bytes(yt, n), "gate kept, dim %d", dim);
                KT_SAME(k, got[2], (char *)kept[1], kt_bytes(yt, n), "up kept, dim %d", dim);
                float *dg = kt_new(&t, n * 4), *du = kt_new(&t, n * 4);
                b.dgate = kt_p(dg), b.dup = kt_p(du);
                k->swiglu_bwd(k, &b);
                KT_SAME(k, dg, dgate, n * 4, "swiglu_bwd dgate dim %d", dim);
                KT_SAME(k, du, dup, n * 4, "swiglu_bwd dup dim %d", dim);
            }
            kt_drop(&t);
        }
    kt_close(&t);
}

Test(moves, add_gather_scatter) {
    struct kt t;
    kt_open(&t);
    for (int d = 0; kt_dims[d]; d++) {
        int dim = kt_dims[d], rows = 19;
        size_t n = (size_t)(rows * dim), all = (size_t)(ROWS * dim);
        float *x = kt_f32(&t, all, 1.0), *y = kt_f32(&t, n, 1.0);
        uint16_t *h = kt_bf16(&t, all, 1.0);
        int32_t *index = kt_new(&t, (size_t)rows * 4);
        /* distinct: 7 and 37 share no factor */
        for (int r = 0; r < rows; r++) index[r] = (r * 7 + 3) % ROWS;
        KT_EACH(&t, k) {
            float *got = kt_copy(&t, y, n * 4), *to = kt_copy(&t, x, all * 4);
            uint16_t *half = kt_new(&t, n * 2);
            k->add(k, &(struct kern_add){ kt_p(got), kt_p(x), n });
            for (size_t i = 0; i < n; i++) cr_assert(got[i] == y[i] + x[i]);
            k->gather(
                k, &(struct kern_gather){ kt_p(x), kt_p(index), kt_p(got), KERN_F32, rows, dim });
            k->gather(
                k, &(struct kern_gather){ kt_p(h), kt_p(index), kt_p(half), KERN_BF16, rows, dim });
            k->scatter_add(k,
                           &(struct kern_scatter_add){ kt_p(y), kt_p(index), kt_p(to), rows, dim });
            for (int r = 0; r < rows; r++)
                for (int i = 0; i < dim; i++) {
                    cr_assert(got[r * dim + i] == x[index[r] * dim + i] &&
                              half[r * dim + i] == h[index[r] * dim + i]);
                    cr_assert(to[index[r] * dim + i] == x[index[r] * dim + i] + y[r * dim + i]);
                }
            to = kt_copy(&t, x, all * 4);
            k->scatter_add(k, &(struct kern_scatter_add){ kt_p(y), kt_p(index), kt_p(to), 0, dim });
            KT_SAME(k, to, x, all * 4, "scatter of no rows");
        }
        kt_drop(&t);
    }
    kt_close(&t);
}

Test(adamw, same_bits) {
    struct kt t;
    kt_open(&t);
    for (int d = 0; d < 40; d++) {
        size_t n = d < 30 ? (size_t)d : (size_t)d * 211;
        float *p = kt_f32(&t, n, 0.1), *m = kt_f32(&t, n, 0.01), *v = kt_f32(&t, n, 0.01),
              *g = kt_f32(&t, n, 0.1);
        for (size_t i = 0; i < n; i++) v[i] = fabsf(v[i]);
        float *p1 = kt_copy(&t, p, n * 4), *m1 = kt_copy(&t, m, n * 4), *v1 = kt_copy(&t, v, n * 4);
        struct kern_adamw a = { kt_p(p1), kt_p(m1), kt_p(v1), kt_p(g), n,    1e-3f, 0.9f,
                                0.99f,    1e-8f,    0.1f,     0.7f,    5.0f, 40.0f };
        t.ref.adamw(&t.ref, &a);
        KT_EACH(&t, k) {
            float *p2 = kt_copy(&t, p, n * 4), *m2 = kt_copy(&t, m, n * 4),
                  *v2 = kt_copy(&t, v, n * 4);
            struct kern_adamw b = a;
            b.p = kt_p(p2), b.m = kt_p(m2), b.v = kt_p(v2);
            k->adamw(k, &b);
            KT_SAME(k, p2, p1, n * 4, "adamw p, n %zu", n);
            KT_SAME(k, m2, m1, n * 4, "adamw m, n %zu", n);
            KT_SAME(k, v2, v1, n * 4, "adamw v, n %zu", n);
        }
        kt_drop(&t);
    }
    kt_close(&t);
}

/* Three steps of AdamW (decoupled decay, bias correction) on p = (.5, -.25, 0), worked out in high
 * precision. */
Test(adamw, three_steps_by_hand) {
    static const struct { double lr, b1, b2, wd, want[3][3]; } table[] = {
        { 1e-5, 0.9, 0.99, 0.1, { { 0.499989500001, -0.249989750000, -0.000010000000 },
                                  { 0.499979665533, -0.249986833017, -0.000019999989 },
                                  { 0.499971933555, -0.249984516745, -0.000022619895 } } },
        { 1e-6, 0.9, 0.999, 0.01, { { 0.499998995000, -0.249998997500, -0.000001000000 },
                                    { 0.499998057821, -0.249998728663, -0.000002000000 },
                                    { 0.499997332243, -0.249998520284, -0.000002261993 } } },
    };
    static const float grad[3][3] = { { 0.1f, -0.2f, 0.3f },
                                      { 0.05f, 0.1f, 0.3f },
                                      { 0.0f, 0.0f, -0.3f } };
    struct kt t;
    kt_open(&t);
    for (size_t c = 0; c < COUNT_OF(table); c++)
        KT_EACH(&t, k) {
            float p[3] = { 0.5f, -0.25f, 0.0f }, m[3] = { 0 }, v[3] = { 0 }, g[3];
            for (int s = 0; s < 3; s++) {
                memcpy(g, grad[s], sizeof g);
                struct kern_adamw a = { kt_p(p),
                                        kt_p(m),
                                        kt_p(v),
                                        kt_p(g),
                                        3,
                                        (float)table[c].lr,
                                        (float)table[c].b1,
                                        (float)table[c].b2,
                                        1e-8f,
                                        (float)table[c].wd,
                                        1.0f,
                                        (float)(1.0 / (1.0 - pow(table[c].b1, s + 1))),
                                        (float)(1.0 / (1.0 - pow(table[c].b2, s + 1))) };
                k->adamw(k, &a);
                /* half a unit of f32 a step; 1 - b2 is not exact either */
                for (int i = 0; i < 3; i++)
                    KT_NEAR((double)p[i], table[c].want[s][i],
                            (i < 2 ? 3e-8 * (s + 1) : 0.0) + 1e-5 * (s + 1) * table[c].lr,
                            "step %d p[%d]", s + 1, i);
            }
        }
    kt_close(&t);
}

Test(sum_squares, fixed_order_and_near_double) {
    struct kt t;
    kt_open(&t);
    static const size_t sizes[] = { 0, 1, 7, 4095, 4096, 4097, 100003, 4096 * 256 + 5 };
    for (size_t i = 0; i < COUNT_OF(sizes); i++) {
        float *x = kt_f32(&t, sizes[i], 1.0);
        double want = t.ref.sum_squares(&t.ref, kt_p(x), sizes[i]), plain = 0.0;
        for (size_t j = 0; j < sizes[i]; j++) plain += (double)x[j] * (double)x[j];
        KT_NEAR(want, plain, plain * 1e-12, "sum_squares of %zu", sizes[i]);
        KT_EACH(&t, k) cr_assert(k->sum_squares(k, kt_p(x), sizes[i]) == want);
        kt_drop(&t);
    }
    kt_close(&t);
}
