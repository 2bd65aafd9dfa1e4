/* draws.c - what noise draws and what it measures: known answers, distributions, magnitudes.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/kernels/kt.h"

enum { WIDE = 1 << 18 };
static struct kern_perturb wide(enum kern_noise_type type, float scale, const float *x, float *y,
                                int rows, int64_t *sums) {
    return (struct kern_perturb){ .noise = { .type = type, .scale = scale, .rate = 0.25f,
                                             .key = { 7, 1u << 31 },
                                             .site = KERN_NOISE_SITE(3, 129),
                                             .sums = kt_p(sums) },
                                  .x = kt_p(x), .x_ld = 0, .y = kt_p(y), .y_ld = WIDE,
                                  .rows = rows, .dim = WIDE };
}
static float *ones(struct kt *t) {
    float *x = kt_new(t, WIDE * 4);
    for (int i = 0; i < WIDE; i++) x[i] = 1.0f;
    return x;
}
/* the fastest path */
static struct kern *best(struct kt *t) { return &t->k[t->n - 1]; }

/* Elements 0 .. 7 of prompt 1000, sample 3, position 17, layer 3, site 129 under key 7, 2^31: Philox
 * and Box-Muller written a second time with 30 digits. */
Test(draws, known_answers) {
    static const double want[KERN_NOISE_TYPE_COUNT][8] = {
        [KERN_NOISE_RELATIVE_GAUSSIAN] = { -1.40519548, 1.12537455, -1.628905, 1.07099077,
                                           -0.133502838, 0.385101232, 0.166680541, -0.354509686 },
        [KERN_NOISE_RELATIVE_UNIFORM] = { -1.04686675, -0.372295486, -1.21402128, -0.320665819,
                                          1.45593829, -0.682044374, 1.47619261, 1.10833544 },
        [KERN_NOISE_SYSTEMATIC] = { 1, 1, -1, -1, -1, -1, 1, 1 },
        [KERN_NOISE_SPARSE] = { -1, 0, 1, 0, 0, 0, 0, 0 },
        [KERN_NOISE_ABSOLUTE_GAUSSIAN] = { -1.40519548, 1.12537455, -1.628905, 1.07099077,
                                           -0.133502838, 0.385101232, 0.166680541, -0.354509686 },
    };
    uint32_t id[2] = { 1000, 3 };
    int32_t pos = 17;
    float x[8], y[8];
    struct kt t;
    kt_open(&t);
    for (enum kern_noise_type type = 1; type < KERN_NOISE_TYPE_COUNT; type++) {
        bool flat = type == KERN_NOISE_ABSOLUTE_GAUSSIAN;
        if (!kern_noise_draws(type)) continue;
        for (int i = 0; i < 8; i++) x[i] = flat ? 0.0f : 2.0f;
        struct kern_perturb a = wide(type, flat ? 1.0f : 0.5f, x, y, 1, NULL);
        a.noise.id = kt_p(id), a.noise.pos = kt_p(&pos), a.dim = 8;
        KT_EACH(&t, k) {
            k->perturb(k, &a);
            for (int i = 0; i < 8; i++)
                KT_NEAR((double)y[i] - (double)x[i], want[type][i], 1e-6, "%s, type %d, element %d",
                        k->name, type, i);
        }
    }
    kt_close(&t);
}

Test(draws, sine_and_cosine) {
    double worst = 0.0;
    for (uint32_t w = 0; w < 1u << 24; w += 7) {
        float u = kern_unitf(w << 8), c, s;
        kern_turnf(u, &c, &s);
        double angle = 2.0 * M_PI * (double)u, a = fabs((double)c - cos(angle)),
               b = fabs((double)s - sin(angle));
        if (a > worst) worst = a;
        if (b > worst) worst = b;
    }
    cr_assert(worst <= 0x1p-23, "worst %.3g", worst);
}

static int float_cmp(const void *a, const void *b) {
    const float x = *(const float *)a, y = *(const float *)b;
    return x < y ? -1 : x > y;
}
static double normal_cdf(double x) { return 0.5 * erfc(-x / sqrt(2.0)); }
static double uniform_cdf(double x) {
    double u = 0.5 + x / sqrt(12.0);
    return u < 0.0 ? 0.0 : u > 1.0 ? 1.0 : u;
}

/* 2^20 draws of four positions: moments, neighbours, Kolmogorov-Smirnov; thresholds of four and, for
 * the last, 1.95 standard errors (one in a thousand). The draws are fixed: this passes or fails for
 * good. */
static void distribution(struct kt *t, enum kern_noise_type type, double (*cdf)(double),
                         double square_variance) {
    enum { ROWS = 4, N = ROWS * WIDE };
    float *x = kt_new(t, WIDE * 4), *y = kt_new(t, N * 4);
    for (int i = 0; i < WIDE; i++) x[i] = 1.0f;
    struct kern_perturb a = wide(type, 1.0f, x, y, ROWS, NULL);
    best(t)->perturb(best(t), &a);
    double sum = 0.0, sum2 = 0.0, next[5] = { 0.0 }, n = N, d = 0.0;
    for (int i = 0; i < N; i++) {
        y[i] -= 1.0f;
        sum += (double)y[i], sum2 += (double)y[i] * (double)y[i];
        for (int lag = 1; lag < 5; lag++)
            if (i >= lag) next[lag] += (double)y[i] * (double)y[i - lag];
    }
    KT_NEAR(sum / n, 0.0, 4.0 / sqrt(n), "mean of type %d", type);
    KT_NEAR(sum2 / n, 1.0, 4.0 * sqrt(square_variance / n), "mean square of type %d", type);
    for (int lag = 1; lag < 5; lag++)
        KT_NEAR(next[lag] / n, 0.0, 4.0 / sqrt(n), "neighbours %d apart, type %d", lag, type);
    qsort(y, N, sizeof *y, float_cmp);
    for (int i = 0; i < N; i++) {
        double at = cdf((double)y[i]);
        d = fmax(d, fmax(at - i / n, (i + 1) / n - at));
    }
    cr_assert(d * sqrt(n) < 1.95, "type %d: Kolmogorov-Smirnov %.3f", type, d * sqrt(n));
}
Test(draws, distributions) {
    struct kt t;
    kt_open(&t);
    distribution(&t, KERN_NOISE_RELATIVE_GAUSSIAN, normal_cdf, 2.0);
    distribution(&t, KERN_NOISE_RELATIVE_UNIFORM, uniform_cdf, 0.8);
    kt_close(&t);
}

Test(draws, signs_balance_and_faults_have_their_rate) {
    struct kt t;
    kt_open(&t);
    float *x = ones(&t), *y = kt_new(&t, WIDE * 4);
    for (int type = KERN_NOISE_SYSTEMATIC; type <= KERN_NOISE_SPARSE; type++) {
        struct kern_perturb a = wide(type, 0.5f, x, y, 1, NULL);
        double up = 0.0, down = 0.0, n = WIDE, rate = type == KERN_NOISE_SPARSE ? 0.25 : 1.0;
        best(&t)->perturb(best(&t), &a);
        for (int i = 0; i < WIDE; i++) {
            cr_assert(y[i] == 1.0f || y[i] == 1.5f || y[i] == 0.5f);
            up += y[i] > 1.0f, down += y[i] < 1.0f;
        }
        KT_NEAR((up + down) / n, rate, 4.0 * sqrt(rate * (1.0 - rate) / n), "share hit");
        KT_NEAR((up - down) / n, 0.0, 4.0 * sqrt(rate / n), "balance of signs");
        a.noise.rate = 0.0f;
        best(&t)->perturb(best(&t), &a);
        cr_assert(type == KERN_NOISE_SYSTEMATIC || !memcmp(y, x, WIDE * 4), "rate 0");
        a.noise.rate = 1.0f;
        best(&t)->perturb(best(&t), &a);
        for (int i = 0; i < WIDE; i++) cr_assert(y[i] != 1.0f);
    }
    kt_close(&t);
}

Test(draws, deadzone_flushes_what_is_below_the_edge) {
    struct kt t;
    kt_open(&t);
    float *x = kt_f32(&t, WIDE, 1.0), *y = kt_new(&t, WIDE * 4), most = 0.0f;
    int64_t sums[KERN_NOISE_SUMS] = { 0 }, flushed = 0;
    x[3] = NAN;
    for (int i = 0; i < WIDE; i++) most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
    struct kern_perturb a = wide(KERN_NOISE_DEADZONE, 0.01f, x, y, 1, sums);
    best(&t)->perturb(best(&t), &a);
    for (int i = 0; i < WIDE; i++) {
        bool small = fabsf(x[i]) < 0.01f * most;
        cr_assert(isnan(x[i]) ? isnan(y[i]) : y[i] == (small ? 0.0f : x[i]), "element %d", i);
        flushed += small && x[i] != 0.0f;
    }
    cr_assert(flushed > WIDE / 50 && sums[KERN_NOISE_CHANGED] == flushed);
    cr_assert(sums[KERN_NOISE_R2] == flushed << 20, "the share flushed is the mean of r^2");
    kt_close(&t);
}

/* E4M3 worked out by hand from the rules: no scale, 2^-6 at least, no carry, 240 at most. */
Test(draws, fp8_known_answers) {
    static const float in_out[][2] = {
        { 0.0f, 0.0f }, { -0.0f, -0.0f }, { 1.0f, 1.0f }, { -1.0f, -1.0f },
        { 1.0625f, 1.0f }, { 1.1875f, 1.25f },                /* halves go to even */
        { 1.0626f, 1.125f }, { 1.1874f, 1.125f }, { 1.9374f, 1.875f },
        { 1.9375f, 1.875f }, { 1.99f, 1.875f }, { -3.99f, -3.75f },       /* no carry */
        { 2.0f, 2.0f }, { 0x1p-6f, 0x1p-6f }, { 1e-30f, 0x1p-6f }, { -1e-45f, -0x1p-6f },
        { 0.0155f, 0x1p-6f }, { 0x1.1p-6f, 0x1p-6f }, { 0x1.3p-6f, 0x1.4p-6f },
        { 239.0f, 240.0f }, { 240.0f, 240.0f }, { 255.0f, 240.0f }, { 256.0f, 240.0f },
        { 448.0f, 240.0f }, { -1e30f, -240.0f }, { INFINITY, INFINITY },
    };
    enum { N = COUNT_OF(in_out) };
    struct kt t;
    float x[N], y[N];
    kt_open(&t);
    for (int i = 0; i < N; i++) x[i] = in_out[i][0];
    KT_EACH(&t, k)
        for (int bf16 = 0; bf16 < 2; bf16++) {
            int64_t sums[KERN_NOISE_SUMS] = { 0 };
            struct kern_perturb a = wide(KERN_NOISE_FP8, 0.0f, x, y, 1, sums);
            a.dim = N, a.noise.bf16 = bf16;
            k->perturb(k, &a);
            for (int i = 0; i < N; i++) {
                /* 255 and what lies just beside a half are the neighbours' in bf16 */
                const float near = kern_fp8f(cpu_round(x[i], bf16)), want = bf16 ? near : in_out[i][1];
                cr_assert(!memcmp(&y[i], &want, 4), "%s: fp8 of %a: %a, not %a", k->name,
                          (double)x[i], (double)y[i], (double)want);
            }
            cr_assert(sums[KERN_NOISE_ELEMENTS] == N);
            if (!bf16) {
                cr_assert(sums[KERN_NOISE_MEASURED] == N - 3);           /* zeros, infinity */
                cr_assert(sums[KERN_NOISE_COARSE] == 3 + 4, "%lld", (long long)sums[KERN_NOISE_COARSE]);
                cr_assert(sums[KERN_NOISE_CHANGED] == N - 3 - 5);
            }
        }
    kt_close(&t);
}

/* Every f32 between the ends of the range and a step beyond, against a text in double; what is measured is
 * bounded by half a step where the range reaches. */
Test(draws, fp8_of_all_magnitudes) {
    struct kt t;
    kt_open(&t);
    float *x = kt_new(&t, WIDE * 4), *y = kt_new(&t, WIDE * 4);
    for (uint32_t i = 0; i < WIDE; i++)
        x[i] = kern_float((i & 1) << 31 | (0x3b800000u + i * (0x08000000u / WIDE)));     /* 2^-8 .. 2^8 */
    int64_t sums[KERN_NOISE_SUMS] = { 0 };
    struct kern_perturb a = wide(KERN_NOISE_FP8, 0.0f, x, y, 1, sums);
    best(&t)->perturb(best(&t), &a);
    for (int i = 0; i < WIDE; i++) {
        const double v = (double)x[i], size = fmin(fmax(fabs(v), 0x1p-6), 448.0),
                     e = fmin(floor(log2(size)), 7.0),
                     eighths = fmin(nearbyint((size / exp2(e) - 1.0) * 8.0), 7.0);
        cr_assert((double)y[i] == copysign(exp2(e) * (1.0 + eighths / 8.0), v), "fp8 of %a: %a", v,
                  (double)y[i]);
        cr_assert(fabs((double)y[i] - v) <= fmax(fabs(v), 0x1p-6) * (fabs(v) < 0x1p-6 || fabs(v) > 240.0 ? 1.0 : 0x1p-4));
    }
    cr_assert(sums[KERN_NOISE_MEASURED] == WIDE && sums[KERN_NOISE_COARSE] > WIDE / 8);
    kt_close(&t);
}

/* The realised size: the intended one, but for sampling and for the rounding of t + e, whose size
 * beside |t| is at most 2^-24 and on average of squares above 2^-26. */
Test(draws, realised_size_is_the_intended_one) {
    struct kt t;
    kt_open(&t);
    float *x = kt_f32(&t, WIDE, 3.0), *y = kt_new(&t, WIDE * 4);
    for (int type = KERN_NOISE_RELATIVE_GAUSSIAN; type <= KERN_NOISE_SPARSE; type++)
        for (double scale = 1e-6; scale < 0.2; scale *= 10.0) {
            int64_t sums[KERN_NOISE_SUMS] = { 0 };
            struct kern_perturb a = wide(type, (float)scale, x, y, 1, sums);
            best(&t)->perturb(best(&t), &a);
            double n = WIDE, share = type == KERN_NOISE_SPARSE ? 0.25 : 1.0,
                   r = (double)sums[KERN_NOISE_R] * 0x1p-20 / n,
                   r2 = (double)sums[KERN_NOISE_R2] * 0x1p-20 / n,
                   rounding = 0x1p-48 / (scale * scale) * share, spread = 6.0 * sqrt(2.0 / n);
            cr_assert(sums[KERN_NOISE_MEASURED] == WIDE);
            KT_NEAR(r, 0.0, 6.0 * sqrt(share / n), "type %d, scale %g: mean", type, scale);
            KT_NEAR(r2, share, spread + rounding, "type %d, scale %g: square", type, scale);
            if (scale > 1e-3)
                cr_assert(sums[KERN_NOISE_CHANGED_BF16] > WIDE * share / 200,
                          "type %d, scale %g", type, scale);
            if (scale < 1e-4) cr_assert(sums[KERN_NOISE_CHANGED_BF16] < WIDE / 50);
        }
    kt_close(&t);
}

/* Absolute sizes beside t of many magnitudes: what is measured, what is coarse, and that the size of the others is
 * the intended one. */
Test(draws, absolute_sizes_beside_large_results) {
    static const float size[] = { 0.0f, 1e-3f, 1.0f, 40.0f, 3000.0f, -1.0f, -3000.0f, 0.0f };
    struct kt t;
    kt_open(&t);
    float *x = kt_new(&t, WIDE * 4), *y = kt_new(&t, WIDE * 4);
    for (int i = 0; i < WIDE; i++) x[i] = size[i % 8] * (1.0f + 0.5f * (float)(i % 1001) / 1001.0f);
    for (int type = KERN_NOISE_ABSOLUTE_GAUSSIAN; type <= KERN_NOISE_BIAS; type++)
        KT_EACH(&t, k) {
            const bool bias = type == KERN_NOISE_BIAS;
            int64_t sums[KERN_NOISE_SUMS] = { 0 };
            struct kern_perturb a = wide(type, bias ? 1e-3f : 1e-4f, x, y, 1, sums);
            k->perturb(k, &a);
            cr_assert(sums[KERN_NOISE_MEASURED] == (bias ? WIDE / 4 * 3 : WIDE));
            /* at and above 65.5 or 105 */
            cr_assert(sums[KERN_NOISE_COARSE] == WIDE / 4, "%s: %lld", k->name,
                      (long long)sums[KERN_NOISE_COARSE]);
            cr_assert(bias ? sums[KERN_NOISE_CHANGED] == sums[KERN_NOISE_MEASURED]
                           : sums[KERN_NOISE_CHANGED] < WIDE);
        }
    kt_close(&t);
}

/* The earlier system's arithmetic loses what is below bf16's steps: its own table. */
Test(draws, bf16_absorbs) {
    static const struct { float scale; double changed, realised, tolerance; } row[] = {
        { 1e-5f, 0.0, 0.0, 0.0 },     { 1e-4f, 0.0, 0.0, 0.0 },     { 1e-3f, 0.012, 5e-4, 5e-5 },
        { 1e-2f, 0.78, 1.01e-2, 1e-4 }, { 5e-2f, 0.955, 5.0e-2, 5e-4 },
    };
    struct kt t;
    kt_open(&t);
    uint16_t *x = kt_bf16(&t, WIDE, 1.0), *y = kt_new(&t, WIDE * 2);
    for (size_t i = 0; i < COUNT_OF(row); i++) {
        int64_t sums[KERN_NOISE_SUMS] = { 0 }, differ = 0;
        struct kern_perturb a = wide(KERN_NOISE_RELATIVE_GAUSSIAN, row[i].scale, NULL, NULL, 1,
                                     sums);
        a.x = kt_p(x), a.y = kt_p(y), a.x_type = a.y_type = KERN_BF16, a.noise.bf16 = true;
        best(&t)->perturb(best(&t), &a);
        for (int j = 0; j < WIDE; j++) differ += x[j] != y[j];
        double n = WIDE, changed = (double)sums[KERN_NOISE_CHANGED] / n,
               realised = (double)row[i].scale * sqrt((double)sums[KERN_NOISE_R2] * 0x1p-20 /
                                                      (double)sums[KERN_NOISE_MEASURED]);
        cr_assert(sums[KERN_NOISE_CHANGED] == differ && sums[KERN_NOISE_CHANGED_BF16] == differ);
        KT_NEAR(changed, row[i].changed, 0.005, "share changed at %g", (double)row[i].scale);
        KT_NEAR(realised, row[i].realised, row[i].tolerance, "realised at %g",
                (double)row[i].scale);
    }
    kt_close(&t);
}

/* NaN and infinities stay, 0 stays under relative types, nothing else breaks; all paths agree. */
Test(draws, wild_inputs) {
    static const float in[] = { NAN, -NAN, INFINITY, -INFINITY, 0.0f, -0.0f, 1e-45f, -1e-45f,
                                1e-39f, 1.2e-38f, -3e38f, 3.4e38f, 1.0f, -1.0f, 1e-20f, 65504.0f,
                                NAN, 2.0f, -1e-42f };
    enum { N = COUNT_OF(in) };
    struct kt t;
    kt_open(&t);
    for (enum kern_noise_type type = 1; type < KERN_NOISE_TYPE_COUNT; type++)
        for (int mode = 0; mode < 4; mode++) {
            bool flat = type == KERN_NOISE_ABSOLUTE_GAUSSIAN || type == KERN_NOISE_BIAS;
            float y[N], want[N];
            int64_t sums[KERN_NOISE_SUMS] = { 0 }, got[KERN_NOISE_SUMS];
            struct kern_perturb a = wide(type, mode & 1 ? 8.0f : 0.01f, in, want, 1, sums);
            a.dim = N, a.noise.bf16 = mode & 2;
            t.ref.perturb(&t.ref, &a);
            for (int i = 0; i < N; i++) {
                float x = cpu_round(in[i], mode & 2);
                if (isnan(x)) cr_assert(isnan(want[i]));
                else if (isinf(x)) cr_assert(want[i] == x);
                else if (x == 0.0f && !flat) cr_assert(want[i] == 0.0f);
                else cr_assert(!isnan(want[i]), "type %d, %g", type, (double)x);
            }
            cr_assert(sums[KERN_NOISE_ELEMENTS] == N && sums[KERN_NOISE_MEASURED] <= N - 5);
            KT_EACH(&t, k) {
                memset(got, 0, sizeof got);
                a.y = kt_p(y), a.noise.sums = kt_p(got);
                k->perturb(k, &a);
                float plain[N];
                memcpy(plain, want, sizeof plain);
                if (kt_slow(k)) kt_one_nan(plain, KERN_F32, N), kt_one_nan(y, KERN_F32, N);
                KT_SAME(k, y, plain, sizeof y, "type %d, mode %d", type, mode);
                for (int i = 0; i < KERN_NOISE_SUMS; i++)
                    cr_assert(got[i] == sums[i], "%s: type %d, mode %d, sum %d", k->name, type,
                              mode, i);
            }
        }
    kt_close(&t);
}

/* Every logarithm and angle a draw can need: a quarter of a million elements, each path. */
Test(draws, long_rows_have_the_same_bits) {
    struct kt t;
    kt_open(&t);
    float *x = kt_f32(&t, WIDE, 1.0), *y = kt_new(&t, WIDE * 4), *z = kt_new(&t, WIDE * 4);
    int64_t sums[KERN_NOISE_SUMS] = { 0 };
    struct kern_perturb a = wide(KERN_NOISE_RELATIVE_GAUSSIAN, 0.3f, x, y, 1, sums);
    t.ref.perturb(&t.ref, &a);
    KT_EACH(&t, k) {
        int64_t got[KERN_NOISE_SUMS] = { 0 };
        a.y = kt_p(z), a.noise.sums = kt_p(got);
        if (k->pool != t.pool[0]) continue;
        k->perturb(k, &a);
        KT_SAME(k, z, y, WIDE * 4, "a row of %d", WIDE);
        for (int i = 0; i < KERN_NOISE_SUMS; i++) cr_assert(got[i] == sums[i]);
    }
    kt_close(&t);
}

Test(draws, silu) {
    struct kt t;
    kt_open(&t);
    for (int d = 0; kt_dims[d]; d++)
        for (enum kern_type type = KERN_F32; type <= KERN_BF16; type++) {
            size_t n = (size_t)(3 * kt_dims[d]);
            void *x = kt_typed(&t, type, n, 20.0);
            float *want = kt_new(&t, n * 4), *got = kt_new(&t, n * 4);
            struct kern_silu a = { kt_p(x), type, kt_p(want), 3, kt_dims[d] };
            t.ref.silu(&t.ref, &a);
            for (size_t i = 0; i < n; i++) {
                double v = (double)kt_get(x, type, i), y = v / (1.0 + exp(-v));
                KT_NEAR((double)want[i], y, fabs(y) * 1e-6 + 1e-37, "silu(%g)", v);
            }
            a.y = kt_p(got);
            KT_EACH(&t, k) {
                memset(got, 0xa5, n * 4);
                k->silu(k, &a);
                KT_SAME(k, got, want, n * 4, "silu dim %d", kt_dims[d]);
            }
            kt_drop(&t);
        }
    kt_close(&t);
}
