/* noise.c - noise on operations: every path has the reference's bits and sums, draws are what they
 * should be, what is measured is what was done.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/kernels/kt.h"

#define TYPES(type) for (enum kern_noise_type type = 1; type < KERN_NOISE_TYPE_COUNT; type++)
/* Each path on each pool, but ref, which knows no threads, once. */
#define EACH_ONCE(t, k)                                                                            \
    KT_EACH(t, k)                                                                                  \
    if (strcmp(k->name, "ref") || k->pool == (t)->pool[0])

static struct kern_noise noise_of(enum kern_noise_type type, float scale) {
    return (struct kern_noise){ .type = type, .scale = scale, .rate = 0.25f, .key = { 7, 1u << 31 },
                                .site = KERN_NOISE_SITE(3, 129) };
}
static struct kern_perturb flat_of(struct kern_noise n, float *x, float *y, int rows, int dim) {
    return (struct kern_perturb){ .noise = n, .x = kt_p(x), .x_ld = dim, .y = kt_p(y), .y_ld = dim,
                                  .rows = rows, .dim = dim };
}

/* ROWS rows of dim, in and out of a type, some with everything that may follow the noise. */
enum { ROWS = 5 };
struct bench {
    struct kern_perturb a;
    uint32_t *id;
    int32_t *pos;
    size_t y_bytes;
};
static struct bench bench_make(struct kt *t, enum kern_type x, enum kern_type y, int dim, int extra,
                               bool after, struct kern_noise n) {
    struct bench b = { .a = { .noise = n, .x_type = x, .y_type = y, .rows = ROWS, .dim = dim } };
    b.a.x_ld = dim + extra, b.a.y_ld = dim + 2 * extra;
    b.a.x = kt_p(kt_typed(t, x, (size_t)(ROWS * b.a.x_ld), 1.0));
    b.y_bytes = kt_bytes(y, (size_t)(ROWS * b.a.y_ld));
    b.id = kt_new(t, ROWS * 8), b.pos = kt_new(t, ROWS * 4);
    for (int r = 0; r < ROWS; r++)
        b.id[2 * r] = 1000u * (uint32_t)r, b.id[2 * r + 1] = r == 1 ? KERN_NOISE_NO_SAMPLE : 3,
        b.pos[r] = 17 * r;
    b.a.noise.id = kt_p(b.id), b.a.noise.pos = kt_p(b.pos);
    if (after) {
        b.a.bias = kt_p(kt_f32(t, (size_t)dim, 1.0));
        b.a.mul = kt_p(kt_f32(t, (size_t)(ROWS * dim), 1.0));
        b.a.accumulate = y == KERN_F32;
    }
    return b;
}

Test(perturb, every_path_has_the_same_bits_and_sums) {
    static const int dims[] = { 1, 3, 4, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1000 };
    struct kt t;
    kt_open(&t);
    for (size_t d = 0; d < COUNT_OF(dims); d++)
        TYPES(type)
            for (int mix = 0; mix < 8; mix++) {
                struct kern_noise n = noise_of(type, type == KERN_NOISE_DEADZONE ? 0.2f : 0.05f);
                n.bf16 = mix & 4;
                struct bench b = bench_make(&t, mix & 1 ? KERN_BF16 : KERN_F32,
                                            mix & 2 ? KERN_BF16 : KERN_F32, dims[d],
                                            (int)d % 3, mix == 0 || mix == 6, n);
                b.a.delta = mix == 3 || mix == 5 || mix == 6;
                int64_t *want = kt_new(&t, sizeof(int64_t[KERN_NOISE_SUMS])),
                        *got = kt_new(&t, sizeof(int64_t[KERN_NOISE_SUMS]));
                char *y = kt_new(&t, b.y_bytes), *z = kt_new(&t, b.y_bytes);
                memset(want, 0, sizeof(int64_t[KERN_NOISE_SUMS]));
                b.a.y = kt_p(y), b.a.noise.sums = kt_p(want);
                t.ref.perturb(&t.ref, &b.a);
                cr_assert(want[KERN_NOISE_ELEMENTS] == ROWS * dims[d]);
                b.a.y = kt_p(z), b.a.noise.sums = kt_p(got);
                EACH_ONCE(&t, k) {
                    memset(z, 0xa5, b.y_bytes);
                    memset(got, 0, sizeof(int64_t[KERN_NOISE_SUMS]));
                    k->perturb(k, &b.a);
                    KT_SAME(k, z, y, b.y_bytes, "perturb type %d, dim %d, mix %d", type, dims[d],
                            mix);
                    for (int i = 0; i < KERN_NOISE_SUMS; i++)
                        cr_assert(got[i] == want[i], "%s: type %d, dim %d, mix %d, sum %d: %lld, "
                                  "ref %lld", k->name, type, dims[d], mix, i, (long long)got[i],
                                  (long long)want[i]);
                }
                kt_drop(&t);
            }
    kt_close(&t);
}

Test(perturb, off_converts_and_nothing_else) {
    struct kt t;
    kt_open(&t);
    for (int mix = 0; mix < 4; mix++) {
        struct kern_noise n = noise_of(KERN_NOISE_OFF, 0.5f);
        struct bench b = bench_make(&t, mix & 1 ? KERN_BF16 : KERN_F32,
                                    mix & 2 ? KERN_BF16 : KERN_F32, 37, 1, false, n);
        int64_t sums[KERN_NOISE_SUMS] = { 0 };
        char *y = kt_new(&t, b.y_bytes);
        b.a.y = kt_p(y), b.a.noise.sums = kt_p(sums), b.a.noise.bf16 = true;
        EACH_ONCE(&t, k) {
            memset(y, 0xa5, b.y_bytes);
            k->perturb(k, &b.a);
            for (int r = 0; r < ROWS; r++)
                for (int i = 0; i < 37; i++) {
                    float x = kt_get(b.a.x.p, b.a.x_type, (size_t)(r * b.a.x_ld + i));
                    cr_assert(kt_get(y, b.a.y_type, (size_t)(r * b.a.y_ld + i)) ==
                              cpu_round(x, b.a.y_type == KERN_BF16));
                }
            for (int i = 0; i < KERN_NOISE_SUMS; i++) cr_assert(sums[i] == 0);
        }
        kt_drop(&t);
    }
    kt_close(&t);
}

Test(perturb, delta_is_the_noise_alone) {
    enum { DIM = 100 };
    struct kt t;
    kt_open(&t);
    float *x = kt_f32(&t, ROWS * DIM, 1.0), *y = kt_new(&t, ROWS * DIM * 4),
          *e = kt_new(&t, ROWS * DIM * 4);
    struct kern_perturb a = flat_of(noise_of(KERN_NOISE_RELATIVE_GAUSSIAN, 1e-5f), x, y, ROWS, DIM);
    t.ref.perturb(&t.ref, &a);
    a.delta = true;
    a.y = kt_p(e);
    EACH_ONCE(&t, k) {
        k->perturb(k, &a);
        int zero = 0;
        for (int i = 0; i < ROWS * DIM; i++) {
            cr_assert(e[i] == y[i] - x[i]);
            zero += e[i] == 0;
        }
        cr_assert(zero < ROWS * DIM / 10);
    }
    kt_close(&t);
}

/* Rows in another order, one by one and in place: each keeps its bits, and the sums theirs. */
Test(perturb, a_row_is_its_own_whatever_the_batch) {
    static const int order[ROWS] = { 3, 0, 4, 2, 1 };
    enum { DIM = 77 };
    struct kt t;
    kt_open(&t);
    TYPES(type) {
        struct bench b = bench_make(&t, KERN_F32, KERN_F32, DIM, 0, false, noise_of(type, 0.1f));
        float *y = kt_new(&t, b.y_bytes), *in = b.a.x.p;
        int64_t want[KERN_NOISE_SUMS] = { 0 };
        b.a.y = kt_p(y), b.a.noise.sums = kt_p(want);
        t.ref.perturb(&t.ref, &b.a);
        EACH_ONCE(&t, k) {
            int64_t got[KERN_NOISE_SUMS] = { 0 };
            float x[ROWS * DIM];
            uint32_t id[ROWS * 2];
            int32_t pos[ROWS];
            for (int i = 0; i < ROWS; i++) {
                memcpy(x + i * DIM, in + order[i] * DIM, sizeof(float[DIM]));
                memcpy(id + 2 * i, b.id + 2 * order[i], 8);
                pos[i] = b.pos[order[i]];
            }
            for (int from = 0, n = 1; from < ROWS; from += n, n++) {     /* 1, 2, 2 rows */
                if (n > ROWS - from) n = ROWS - from;
                struct kern_perturb a = flat_of(b.a.noise, x + from * DIM, x + from * DIM, n, DIM);
                a.noise.id = kt_p(id + 2 * from), a.noise.pos = kt_p(pos + from);
                a.noise.sums = kt_p(got);
                k->perturb(k, &a);
            }
            for (int i = 0; i < ROWS; i++)
                KT_SAME(k, x + i * DIM, y + order[i] * DIM, sizeof(float[DIM]), "type %d row %d",
                        type, order[i]);
            for (int i = 0; i < KERN_NOISE_SUMS; i++) cr_assert(got[i] == want[i]);
        }
        kt_drop(&t);
    }
    kt_close(&t);
}

/* id and pos absent are what the header says. */
Test(perturb, absent_names) {
    enum { DIM = 9 };
    float x[2 * DIM], y[2 * DIM], z[2 * DIM];
    uint32_t id[4] = { ~0u, KERN_NOISE_NO_SAMPLE, ~0u, KERN_NOISE_NO_SAMPLE };
    int32_t pos[2] = { 0, 1 };
    struct kt t;
    kt_open(&t);
    for (int i = 0; i < 2 * DIM; i++) x[i] = (float)(i + 1);
    struct kern_perturb a = flat_of(noise_of(KERN_NOISE_RELATIVE_UNIFORM, 0.1f), x, y, 2, DIM);
    t.ref.perturb(&t.ref, &a);
    a.noise.id = kt_p(id), a.noise.pos = kt_p(pos), a.y = kt_p(z);
    t.ref.perturb(&t.ref, &a);
    cr_assert(!memcmp(y, z, sizeof y));
    pos[1] = 2;
    t.ref.perturb(&t.ref, &a);
    cr_assert(memcmp(y, z, sizeof y) != 0 && !memcmp(y, z, sizeof(float[DIM])));
    kt_close(&t);
}

/* A systematic bias knows key, site and element: rows share it, the key's change is another. */
Test(perturb, systematic_is_fixed) {
    enum { DIM = 200 };
    float x[2 * DIM], y[2 * DIM], z[2 * DIM];
    uint32_t id[4] = { 1, 2, 3, 4 };
    int32_t pos[2] = { 9, 5 };
    struct kt t;
    kt_open(&t);
    for (int i = 0; i < 2 * DIM; i++) x[i] = -2.0f;
    struct kern_perturb a = flat_of(noise_of(KERN_NOISE_SYSTEMATIC, 0.25f), x, y, 2, DIM);
    a.noise.id = kt_p(id), a.noise.pos = kt_p(pos);
    t.ref.perturb(&t.ref, &a);
    cr_assert(!memcmp(y, y + DIM, sizeof(float[DIM])));
    for (int i = 0; i < DIM; i++) cr_assert(y[i] == -1.5f || y[i] == -2.5f);
    a.noise.key[0]++, a.y = kt_p(z);
    t.ref.perturb(&t.ref, &a);
    cr_assert(memcmp(y, z, sizeof y) != 0);
    kt_close(&t);
}

/* A key in the backend's memory is read when the operation runs: what lies there then is the key, and `key` is
 * nothing. */
Test(noise, a_key_in_memory_is_read_at_the_run) {
    enum { DIM = 70 };
    float x[2 * DIM], by_value[2 * DIM], by_address[2 * DIM], other[2 * DIM];
    uint32_t id[4] = { 1, 2, 3, 4 }, key[2];
    struct kt t;
    kt_open(&t);
    for (int i = 0; i < 2 * DIM; i++) x[i] = 1.0f + (float)i;
    KT_EACH(&t, k)
        for (enum kern_noise_type type = KERN_NOISE_RELATIVE_GAUSSIAN; type < KERN_NOISE_DEADZONE; type++) {
            struct kern_perturb a = flat_of(noise_of(type, 0.25f), x, by_value, 2, DIM);
            a.noise.id = kt_p(id);
            memcpy(key, a.noise.key, sizeof key);
            k->perturb(k, &a);
            a.noise.key_at = kt_p(key), a.noise.key[0] ^= 5, a.y = kt_p(by_address);
            k->perturb(k, &a);
            KT_SAME(k, by_address, by_value, sizeof by_value, "type %d, its key in memory", type);
            key[1]++, a.y = kt_p(other);
            k->perturb(k, &a);
            cr_expect(memcmp(other, by_value, sizeof other) != 0, "%s: type %d: another key, the same draws", k->name,
                      type);
        }
    kt_close(&t);
}
