/* amx.c - the emulated tile instruction against its description, the start-up check against wrong
 * instructions, and the multiplier on emulated tiles against plain loops, function by function.
 *
 * Compiled for AVX-512 and VBMI: nothing here runs where the path "amx-emulated" cannot.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/kernels/kt.h"

#if defined(__AVX512VBMI__)
#define QERL_MUL_AMX
#define QERL_AMX_EMULATED
#include "kernels/simd/mul.h"

#define SKIP_UNLESS_EMULATED()                                                                     \
    if (!amx_emulates()) cr_skip_test("this machine lacks AVX-512 with VBMI")

/* The instruction as its pseudo-code reads, one float at a time. A sum is tiny by what it would be
 * with an unbounded exponent: computed 2^64 times as large. */
static float flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }
static float fma_flush(float a, float b, float c) {
    a = flush(a), b = flush(b), c = flush(c);
    float y = fmaf(a, b, c), large = fmaf(a * 0x1p32f, b * 0x1p32f, c * 0x1p64f);
    return fabsf(large) < 0x1p-62f ? copysignf(0.0f, y) : y;
}
static float add_flush(float a, float b) { return flush(flush(a) + flush(b)); }

enum order { ORDER_TILE, ORDER_ONE_CHAIN, ORDER_SUM_FIRST, ORDER_SUBNORMALS, ORDER_PAIR };
static void scalar_product(float *c, const uint16_t *a, const uint16_t *b, enum order order) {
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++) {
            float even = 0.0f, odd = 0.0f, *to = c + m * 16 + n;
            for (int k = 0; k < 16; k++) {
                float a0 = bf16_to_f32(a[m * 32 + 2 * k]), a1 = bf16_to_f32(a[m * 32 + 2 * k + 1]),
                      b0 = bf16_to_f32(b[k * 32 + 2 * n]), b1 = bf16_to_f32(b[k * 32 + 2 * n + 1]);
                switch (order) {
                case ORDER_ONE_CHAIN: even = fma_flush(a1, b1, fma_flush(a0, b0, even)); break;
                case ORDER_SUBNORMALS: even = fmaf(a0, b0, even), odd = fmaf(a1, b1, odd); break;
                case ORDER_PAIR: *to = fma_flush(a1, b1, fma_flush(a0, b0, *to)); break;
                default: even = fma_flush(a0, b0, even), odd = fma_flush(a1, b1, odd);
                }
            }
            if (order == ORDER_SUBNORMALS) *to += even + odd;
            else if (order == ORDER_SUM_FIRST) *to = add_flush(add_flush(*to, even), odd);
            else if (order != ORDER_PAIR) *to = add_flush(*to, add_flush(even, odd));
        }
}
static void right(float *c, const uint16_t *a, const uint16_t *b) {
    scalar_product(c, a, b, ORDER_TILE);
}
static void one_chain(float *c, const uint16_t *a, const uint16_t *b) {
    scalar_product(c, a, b, ORDER_ONE_CHAIN);
}
static void sum_first(float *c, const uint16_t *a, const uint16_t *b) {
    scalar_product(c, a, b, ORDER_SUM_FIRST);
}
static void subnormals(float *c, const uint16_t *a, const uint16_t *b) {
    scalar_product(c, a, b, ORDER_SUBNORMALS);
}
static void pair(float *c, const uint16_t *a, const uint16_t *b) {
    scalar_product(c, a, b, ORDER_PAIR);
}
static void swapped(float *c, const uint16_t *a, const uint16_t *b) {
    amx_emulated_product(c, b, a);
}
static void nothing(float *c, const uint16_t *a, const uint16_t *b) { (void)c, (void)a, (void)b; }

static const int exponents[][4] = {      /* factors from, how many; sums from, how many */
    { 124, 6, 120, 16 }, { 64, 126, 1, 253 }, { 50, 30, 0, 40 }, { 60, 8, 0, 12 }, { 0, 254, 0, 254 },
};
static uint32_t bits_of(struct kt *t, int from, int many) {
    uint32_t e = (uint32_t)(from + (int)(kt_unit(t) * many)), r = (uint32_t)(kt_unit(t) * 65536.0);
    return (r & 0x8000) | (kt_unit(t) < 0.06 ? (r & 0x4000 ? r & 0x7f : 0) : e << 7 | (r & 0x7f));
}

Test(amx, emulated_instruction_is_its_description) {
    SKIP_UNLESS_EMULATED();
    struct kt t = { .seed = 5 };
    float c[256], want[256];
    uint16_t a[512], b[512];
    unsigned csr = _mm_getcsr();
    for (int round = 0; round < 200; round++) {
        const int *e = exponents[(size_t)round % COUNT_OF(exponents)];
        for (int i = 0; i < 512; i++) {
            a[i] = (uint16_t)bits_of(&t, e[0], e[1]);
            b[i] = (uint16_t)bits_of(&t, e[0], e[1]);
        }
        for (int i = 0; i < 256; i++) {
            uint32_t u = bits_of(&t, e[2], e[3]) << 16 | (uint32_t)(kt_unit(&t) * 65536.0);
            memcpy(&c[i], &u, 4);
        }
        memcpy(want, c, sizeof c);
        scalar_product(want, a, b, ORDER_TILE);
        amx_emulated_product(c, a, b);
        for (int i = 0; i < 256; i++)
            cr_assert(!memcmp(&c[i], &want[i], 4) || (isnan(c[i]) && isnan(want[i])),
                      "round %d element %d: %a, described %a", round, i, (double)c[i],
                      (double)want[i]);
    }
    cr_assert_eq(_mm_getcsr() & ~0x3fu, csr & ~0x3fu, "the thread's own rounding and masks come back");
}

Test(amx, check_at_start_finds_wrong_instructions) {
    SKIP_UNLESS_EMULATED();
    cr_assert(amx_agrees(right));
    cr_assert(amx_agrees(amx_emulated_product));
    cr_assert(!amx_agrees(one_chain));
    cr_assert(!amx_agrees(sum_first));
    cr_assert(!amx_agrees(subnormals));
    cr_assert(!amx_agrees(pair));
    cr_assert(!amx_agrees(swapped));
    cr_assert(!amx_agrees(nothing));
}

/* Makes blocks by copying them; where pairs are made the one too many is nonsense. */
struct copies { const mul_t *b; int blocks; bool pairs; };
static void copy_get(void *arg, mul_t *to, int panel, int count, int block) {
    const struct copies *from = arg;
    for (int c = 0; c < count; c++, to += MUL_RHS)
        memcpy(to, from->b + (size_t)((panel + c) * from->blocks + block) * MUL_RHS, 1024);
    if (from->pairs && count % 2) memset(to, 0xff, 1024);
}

/* A lhs of blocks [block][row][32] and a rhs of [panel][block][16][32] with random values, their
 * sums in rows of `ld` floats with a margin that must stay as it is. */
static void run_case(struct kt *t, int rows, int panels, int blocks, bool by_panel) {
    enum { MARGIN = 3 };
    const int tiles = (rows + 15) / 16 * 16;
    const size_t ld = by_panel ? 16 : (size_t)panels * 16 + MARGIN,
                 panel = by_panel ? (size_t)rows * 16 + MARGIN : 16,
                 n = (size_t)rows * ((size_t)panels * 16 + MARGIN) + (size_t)panels * MARGIN;
    uint16_t *a = kt_bf16(t, (size_t)(tiles * blocks) * 32, 1.0),
             *b = kt_bf16(t, (size_t)(panels * blocks) * 512, 1.0);
    float *got = kt_f32(t, n, 1.0), *want = kt_copy(t, got, n * 4);
    struct mul m = { .lhs = a, .lhs_row = 32, .lhs_block = (size_t)tiles * 32,
                     .rhs = b, .rhs_panel = (size_t)blocks * 512, .rhs_block = 512,
                     .acc = got, .acc_row = ld, .acc_panel = panel,
                     .rows = rows, .panels = panels, .blocks = blocks };
    for (int r = 0; r < rows; r++)
        for (int p = 0; p < panels; p++)
            for (int c = 0; c < 16; c++) {
                float *acc = want + (size_t)r * ld + (size_t)p * panel + c;
                for (int i = 0; i < blocks; i++) {
                    float even = 0.0f, odd = 0.0f;
                    const uint16_t *x = a + (size_t)(i * tiles + r) * 32,
                                   *w = b + (size_t)(p * blocks + i) * 512 + c * 2;
                    for (int k = 0; k < 16; k++) {
                        even = fma_flush(bf16_to_f32(x[2 * k]), bf16_to_f32(w[k * 32]), even);
                        odd = fma_flush(bf16_to_f32(x[2 * k + 1]), bf16_to_f32(w[k * 32 + 1]), odd);
                    }
                    *acc = add_flush(*acc, add_flush(even, odd));
                }
            }
    float *other = kt_copy(t, got, n * 4);
    tiles_open();
    mul_run(&m);
    tiles_close();
    cr_assert(!memcmp(got, want, n * 4), "%d rows, %d panels, %d blocks", rows, panels, blocks);
    struct copies from = { b, blocks, (rows + panels) % 2 };
    m.acc = other;
    tiles_open();
    mul_fused(&m, kt_new(t, MUL_FUSED * 1024), copy_get, &from, from.pairs);
    tiles_close();
    cr_assert(!memcmp(other, want, n * 4), "fused: %d rows, %d panels, %d blocks", rows, panels,
              blocks);
    kt_drop(t);
}
Test(amx, run_multiplies_every_shape) {
    SKIP_UNLESS_EMULATED();
    struct kt t = { .seed = 6 };
    static const int rows[] = { 1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 70, 97, 112 };
    for (size_t r = 0; r < COUNT_OF(rows); r++)
        for (int panels = 1; panels <= 7; panels++)
            run_case(&t, rows[r], panels, 1 + (rows[r] + panels) % 3, panels % 2);
    for (size_t r = 0; r < COUNT_OF(rows); r++)
        for (int panels = 1; panels <= 5; panels++)
            run_case(&t, rows[r], panels, 7 + (panels * 5 + rows[r]) % 13, true);
    run_case(&t, 5, 3, 0, true);
}

/* What a lhs or rhs block holds, element by element. */
static float lhs_at(const mul_t *block, int k) { return bf16_to_f32(block[k]); }
static float rhs_at(const mul_t *block, int k, int c) {
    return bf16_to_f32(block[k / 2 * 32 + c * 2 + k % 2]);
}
static void same(float got, float want, const char *what, int a, int b, int c) {
    cr_assert((isnan(got) && isnan(want)) || !memcmp(&got, &want, 4), "%s %d %d %d: %a, wanted %a",
              what, a, b, c, (double)got, (double)want);
}

static const int lens[] = { 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100 };
Test(amx, lhs_blocks_hold_what_they_should) {
    SKIP_UNLESS_EMULATED();
    struct kt t = { .seed = 7 };
    for (size_t i = 0; i < COUNT_OF(lens); i++)
        for (size_t j = 0; j < COUNT_OF(lens); j++)
            for (int kind = 0; kind < 6; kind++) {
                const int rows = lens[i], k = lens[j], blocks = (k + 31) / 32, cols = kind & 1;
                const size_t ld = (size_t)(cols ? rows : k) + i % 3,
                             lines = (size_t)(cols ? k : rows), n = (lines - 1) * ld +
                                                                    (size_t)(cols ? rows : k);
                const enum kern_type type = kind < 2 ? KERN_BF16 : KERN_F32;
                struct mul_source s = { kt_typed(&t, type, n, 1.0), type, ld,
                                        kind < 4 ? 1.0f : 0.3f, kind >= 2 };
                mul_t *to = kt_new(&t, (size_t)(rows * blocks) * 64);
                (cols ? lhs_cols : lhs_rows)(to, 32, (size_t)rows * 32, &s, rows, k);
                for (int r = 0; r < rows; r++)
                    for (int at = 0; at < blocks * 32; at++) {
                        const size_t e = cols ? (size_t)at * ld + (size_t)r
                                              : (size_t)r * ld + (size_t)at;
                        const float want = at >= k ? 0.0f
                                           : cpu_round(s.scale * kt_get(s.from, type, e), true);
                        same(lhs_at(to + ((size_t)(at / 32 * rows + r)) * 32, at % 32), want,
                             cols ? "lhs_cols" : "lhs_rows", rows, r, at);
                    }
                kt_drop(&t);
            }
}

Test(amx, rhs_blocks_hold_what_they_should) {
    SKIP_UNLESS_EMULATED();
    struct kt t = { .seed = 8 };
    for (int k = 1; k <= 32; k++)
        for (int cols = 1; cols <= 16; cols++) {
            const size_t ld = (size_t)cols + 1, ld_t = (size_t)k + 2;
            mul_t *to = kt_new(&t, 1024);
            for (int kind = 0; kind < 3; kind++) {
                const enum kern_type type = kind ? KERN_F32 : KERN_BF16;
                struct mul_source s = { kt_typed(&t, type, (size_t)(k - 1) * ld + (size_t)cols, 1.0),
                                        type, ld, kind == 2 ? 0.3f : 1.0f, kind > 0 };
                rhs_rows(to, &s, k, cols);
                for (int i = 0; i < 32; i++)
                    for (int c = 0; c < 16; c++)
                        same(rhs_at(to, i, c),
                             i < k && c < cols
                                 ? cpu_round(s.scale * kt_get(s.from, type, (size_t)i * ld +
                                                                                (size_t)c), true)
                                 : 0.0f,
                             "rhs_rows", k, i, c);
            }
            /* up to the last element named, not one more */
            const size_t last = ((size_t)((k - 1) / 2) * ld + (size_t)(cols - 1)) * 2 +
                                (size_t)((k - 1) % 2),
                         before = k > 1 ? ((size_t)((k - 2) / 2) * ld + (size_t)(cols - 1)) * 2 +
                                              (size_t)((k - 2) % 2) : 0,
                         last_t = ((size_t)((cols - 1) / 2) * ld_t + (size_t)(k - 1)) * 2 +
                                  (size_t)((cols - 1) % 2),
                         before_t = cols > 1 ? ((size_t)((cols - 2) / 2) * ld_t + (size_t)(k - 1)) *
                                                       2 + (size_t)((cols - 2) % 2) : 0;
            struct mul_source p = { kt_bf16(&t, (last > before ? last : before) + 1, 1.0),
                                    KERN_BF16, ld, 1.0f, false };
            struct mul_source q = { kt_bf16(&t, (last_t > before_t ? last_t : before_t) + 1, 1.0),
                                    KERN_BF16, ld_t, 1.0f, false };
            rhs_pairs(to, &p, k, cols);
            for (int i = 0; i < 32; i++)
                for (int c = 0; c < 16; c++)
                    same(rhs_at(to, i, c),
                         i < k && c < cols ? kt_get(p.from, KERN_BF16,
                                                    ((size_t)(i / 2) * ld + (size_t)c) * 2 +
                                                        (size_t)(i % 2))
                                           : 0.0f,
                         "rhs_pairs", k, i, c);
            rhs_pairs_t(to, &q, k, cols);
            for (int i = 0; i < 32; i++)
                for (int c = 0; c < 16; c++)
                    same(rhs_at(to, i, c),
                         i < k && c < cols ? kt_get(q.from, KERN_BF16,
                                                    ((size_t)(c / 2) * ld_t + (size_t)i) * 2 +
                                                        (size_t)(c % 2))
                                           : 0.0f,
                         "rhs_pairs_t", k, i, c);
            kt_drop(&t);
        }
}

Test(amx, records_are_decoded_exactly) {
    SKIP_UNLESS_EMULATED();
    struct kt t = { .seed = 9 };
    for (enum kern_format f = KERN_FORMAT_BF16; f <= KERN_FORMAT_NVFP4; f++)
        for (int round = 0; round < 40; round++) {
            const size_t bytes = kern_record_bytes(f);
            uint8_t *rec[2] = { kt_new(&t, bytes), kt_new(&t, bytes) };
            for (int i = 0; i < 2; i++)
                for (size_t j = 0; j < bytes; j++) {
                    rec[i][j] = (uint8_t)(kt_unit(&t) * 256.0);
                    /* half of the records: scales of every size; the others: plain ones */
                    if (f == KERN_FORMAT_MXFP4 && j >= 256 && round % 2)
                        rec[i][j] = (uint8_t)(2.0 + kt_unit(&t) * 251.0);
                    if (f == KERN_FORMAT_NVFP4 && j >= 256 && round % 2)
                        rec[i][j] = (uint8_t)(8.0 + kt_unit(&t) * 119.0);
                }
            mul_t *to = kt_new(&t, 1024), *low = kt_new(&t, 1024), *high = kt_new(&t, 1024);
            rhs_record(to, rec[0], f);
            for (int k = 0; k < 32; k++)
                for (int c = 0; c < 16; c++)
                    same(rhs_at(to, k, c), pack_get(rec[0], f, 16, 32, c, k), "rhs_record", (int)f,
                         k, c);
            for (int none = 0; none < 2; none++) {
                rhs_record_t(low, high, rec[0], none ? NULL : rec[1], f);
                for (int k = 0; k < 32; k++)
                    for (int i = 0; i < 32; i++)
                        same(rhs_at(i < 16 ? low : high, k, i % 16),
                             k < 16 ? pack_get(rec[0], f, 16, 32, k, i)
                             : none ? 0.0f
                                    : pack_get(rec[1], f, 16, 32, k - 16, i),
                             "rhs_record_t", (int)f, k, i);
            }
            kt_drop(&t);
        }
}
#endif
