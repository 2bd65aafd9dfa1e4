/* weights.c - operations on whole packed weights: every path has the reference's bits, sums and
 * counts; the draws are the C library's law rounded to bf16.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/kernels/kt.h"

#include "kernels/normal.h"

static const int outs[] = { 1, 15, 16, 17, 40 };
static const int ins[] = { 1, 3, 4, 30, 32, 36, 64, 130 };
static const enum kern_format packed[] = { KERN_FORMAT_F32, KERN_FORMAT_BF16 };

static struct kern_weight room_for(struct kt *t, enum kern_format format, int out, int in) {
    return (struct kern_weight){ .data = kt_p(kt_new(t, kern_weight_bytes(format, out, in))),
                                 .format = format, .out = out, .in = in, .scale = 1 };
}

/* ---- the draw ---- */

/* rng_normal4 asks the C library for log, cos and sin: the same numbers but for its last bits. */
Test(weights, draws_are_the_librarys_law) {
    enum { QUADS = 1 << 19 };
    const uint32_t key[2] = { 11, 22 };
    double worst = 0;
    int parted = 0;
    for (uint32_t q = 0; q < QUADS; q++) {
        double z[4], want[4];
        kern_weight_draw4(z, key, 5, q);
        rng_normal4(want, rng_philox((uint32_t[4]){ q, 5, 0, 0 }, key));
        for (int i = 0; i < 4; i++) {
            worst = fmax(worst, fabs(z[i] - want[i]) / fabs(want[i]));
            parted += kern_weight_dw(.01, z[i]) != bf16_to_f32(f32_to_bf16((float)(.01 * want[i])));
        }
    }
    cr_expect(worst < 6 * 0x1p-52, "parts by %g", worst);
    cr_expect(parted == 0, "%d of %d in bf16", parted, 4 * QUADS);
}
Test(weights, draws_at_the_ends_of_words_are_numbers) {
    static const uint32_t word[] = { 0, 1, 0x3fffffff, 0x40000000, 0x7fffffff, 0x80000000, 0xb504f333, 0xfffffffe,
                                     0xffffffff };
    for (size_t i = 0; i < COUNT_OF(word); i++)
        for (size_t j = 0; j < COUNT_OF(word); j++) {
            double z[2], want[4];
            const struct rng4 r = { { word[i], word[j], word[i], word[j] } };
            kern_normal2(z, word[i], word[j]);
            rng_normal4(want, r);
            for (int k = 0; k < 2; k++)
                cr_expect(fabs(z[k] - want[k]) <= 6 * 0x1p-52 * fabs(want[k]) && z[k] != 0, "%08x %08x: %.17g, want %.17g",
                          word[i], word[j], z[k], want[k]);
        }
}

/* ---- AQN ---- */

struct made { struct kern_weight_noise a; size_t bytes, squares; };

static struct made made_of(struct kt *t, enum kern_format from, enum kern_format to, int out, int in, double times) {
    struct made m = { .a = { .w = kt_weight(t, from, out, in), .to = room_for(t, to, out, in), .sd = .01 * times,
                             .times = times, .key = { 7, 1u << 31 }, .tensor = 12 } };
    m.bytes = kern_weight_bytes(to, out, in);
    m.squares = (size_t)out * KERN_WEIGHT_SQUARES * sizeof(double);
    m.a.squares = kt_p(kt_new(t, m.squares));
    m.a.counts = kt_p(kt_new(t, KERN_WEIGHT_COUNTS * sizeof(int64_t)));
    memset(m.a.counts.p, 0, KERN_WEIGHT_COUNTS * sizeof(int64_t));
    return m;
}

static void expect_same(struct kt *t, struct kern *k, const struct made *want, const char *what) {
    struct made got = *want;
    int64_t *count = kt_new(t, KERN_WEIGHT_COUNTS * sizeof *count);
    const int64_t *ref = want->a.counts.p;
    got.a.to.data = kt_p(kt_new(t, got.bytes));
    got.a.squares = kt_p(kt_new(t, got.squares));
    memset(got.a.to.data.p, 0xa5, got.bytes);
    memset(got.a.squares.p, 0xa5, got.squares);
    count[0] = 100, count[1] = 200;                   /* added to */
    got.a.counts = kt_p(count);
    k->weight_noise(k, &got.a);
    KT_SAME(k, (uint8_t *)got.a.to.data.p, want->a.to.data.p, got.bytes, "%s", what);
    KT_SAME(k, (double *)got.a.squares.p, want->a.squares.p, got.squares, "squares of %s", what);
    for (int i = 0; i < KERN_WEIGHT_COUNTS; i++)
        cr_assert(count[i] - 100 * (i + 1) == ref[i], "%s: %s: count %d is %lld, ref %lld", k->name, what, i,
                  (long long)count[i] - 100 * (i + 1), (long long)ref[i]);
}

Test(weights, noise_has_the_same_bits_sums_and_counts_on_every_path) {
    struct kt t;
    kt_open(&t);
    for (size_t o = 0; o < COUNT_OF(outs); o++)
        for (size_t i = 0; i < COUNT_OF(ins); i++)
            for (int mix = 0; mix < 8; mix++) {
                const enum kern_format from = (enum kern_format)(mix % 4), to = packed[(mix + mix / 4) % 2];
                struct made m = made_of(&t, from, to, outs[o], ins[i], mix & 2 ? 1 : .3);
                char what[80];
                snprintf(what, sizeof what, "noise on format %d [%d, %d], mix %d", from, outs[o], ins[i], mix);
                t.ref.weight_noise(&t.ref, &m.a);
                KT_EACH(&t, k) if (!kt_slow(k) || (o + i) % 3 == 0) expect_same(&t, k, &m, what);
                kt_drop(&t);
            }
    kt_close(&t);
}

/* By hand, element by element. */
Test(weights, the_reference_does_what_the_header_says) {
    enum { OUT = 18, IN = 37 };
    struct kt t;
    kt_open(&t);
    struct made m = made_of(&t, KERN_FORMAT_NVFP4, KERN_FORMAT_BF16, OUT, IN, .5);
    int64_t count[KERN_WEIGHT_COUNTS] = { 0 };
    const double *square = m.a.squares.p;
    t.ref.weight_noise(&t.ref, &m.a);
    for (int o = 0; o < OUT; o++) {
        double sum[KERN_WEIGHT_SQUARES] = { 0 };
        for (int i = 0; i < IN; i++) {
            double z[4];
            const size_t at = (size_t)(o * IN + i);
            rng_normal4(z, rng_philox((uint32_t[4]){ (uint32_t)(at / 4), 12, 0, 0 }, m.a.key));
            const float dw = bf16_to_f32(f32_to_bf16((float)(m.a.sd * z[at % 4]))), w = kt_at(&m.a.w, o, i), noisy = w + dw;
            cr_assert(kt_at(&m.a.to, o, i) == dw);
            sum[KERN_WEIGHT_NOISE] += (double)dw * (double)dw;
            sum[KERN_WEIGHT_SCALED] += (double)dw / .5 * ((double)dw / .5);
            sum[KERN_WEIGHT_VALUE] += (double)w * (double)w;
            count[0] += noisy != w;
            count[1] += f32_to_bf16(noisy) != f32_to_bf16(w);
        }
        cr_assert(!memcmp(sum, square + o * KERN_WEIGHT_SQUARES, sizeof sum), "row %d", o);
    }
    cr_assert(!memcmp(count, m.a.counts.p, sizeof count));
    cr_assert(count[1] > 0 && count[1] < count[0]);
    kt_close(&t);
}

/* ---- rows ---- */

Test(weights, rows_come_out_and_go_in_the_same_on_every_path) {
    struct kt t;
    kt_open(&t);
    for (size_t o = 0; o < COUNT_OF(outs); o++)
        for (size_t i = 0; i < COUNT_OF(ins); i++)
            for (int format = 0; format < 4; format++) {
                const int out = outs[o], in = ins[i], first = out > 16 ? 16 : 0, rows = out - first;
                const size_t n = (size_t)rows * (size_t)in * sizeof(float);
                const enum kern_format to = packed[format % 2];
                struct kern_weight w = kt_weight(&t, (enum kern_format)format, out, in), want = room_for(&t, to, out, in),
                                   got = room_for(&t, to, out, in);
                const size_t bytes = kern_weight_bytes(to, out, in);
                float *x = kt_new(&t, n), *all = kt_f32(&t, (size_t)out * (size_t)in, 1);
                pack_f32(want.data.p, to, all, out, in);
                KT_EACH(&t, k) {
                    if (kt_slow(k) && (o + i) % 2) continue;
                    memset(x, 0xa5, n);
                    k->unpack(k, &(struct kern_weight_rows){ w, kt_p(x), first, rows });
                    for (int r = 0; r < rows; r++)
                        for (int j = 0; j < in; j++)
                            cr_assert(x[r * in + j] == kt_at(&w, first + r, j), "%s: format %d, row %d", k->name, format, r);
                    memset(got.data.p, 0xa5, bytes);
                    if (first) k->pack_rows(k, &(struct kern_weight_rows){ got, kt_p(all), 0, first });
                    k->pack_rows(k, &(struct kern_weight_rows){ got, kt_p(all + first * in), first, rows });
                    KT_SAME(k, (uint8_t *)got.data.p, want.data.p, bytes, "rows [%d, %d] packed", out, in);
                }
                kt_drop(&t);
            }
    kt_close(&t);
}

/* A device packs by blocks of rows, so that it needs little room of its own. */
Test(weights, a_weight_of_many_bytes_is_packed_by_blocks) {
    enum { OUT = 37, IN = 140000, ROW = IN * 4 };
    struct kt t;
    kt_open(&t);
    cr_assert((size_t)OUT * ROW > 16 << 20);
    const size_t bytes = kern_weight_bytes(KERN_FORMAT_BF16, OUT, IN);
    struct kern_weight want = room_for(&t, KERN_FORMAT_BF16, OUT, IN), got = room_for(&t, KERN_FORMAT_BF16, OUT, IN);
    float *x = kt_new(&t, (size_t)OUT * ROW);
    for (size_t i = 0; i < (size_t)OUT * IN; i++) x[i] = (float)(i % 4099);
    pack_f32(want.data.p, KERN_FORMAT_BF16, x, OUT, IN);
    KT_EACH(&t, k) {
        if (k != t.k && k->pool == t.pool[2]) continue;
        memset(got.data.p, 0xa5, bytes);
        k->pack(k, &got, x);
        KT_SAME(k, (uint16_t *)got.data.p, want.data.p, bytes, "packed");
    }
    kt_close(&t);
}
