/* graph.c - sequences of operations that the device keeps and runs again (kern.h: record, keep, replay, forget): what is in
 * memory at the replay counts, what was an argument stays; and what cannot be kept is not. Runs on the device that carry.h
 * finds, emulated or real.
 * SPDX-License-Identifier: Apache-2.0 */
#include <criterion/criterion.h>

#include "kernels/cuda/plugin.h"
#include "tests/kernels/carry.h"

enum { N = 100, MANY = 256 };                          /* MANY: what the plugin keeps at most */
static struct kern k;

static void begin(void) {
    struct err e = { 0 };
    const char *only = getenv("QERL_KERNELS");
    if (!carry_plugin()) cr_skip_test("no plugin was built");
    if (only && *only && strcmp(only, "cuda:0")) cr_skip_test("QERL_KERNELS leaves the device out");
    cr_assert(kern_open(&k, "cuda:0", NULL, &e) == 0, "%s", e.text);
}
TestSuite(graph, .init = begin);

static kptr new(size_t bytes) {
    kptr p;
    struct err e = { 0 };
    cr_assert(k.alloc(&k, &p, bytes, &e) == 0, "%s", e.text);
    return p;
}
static kptr numbers(float first, float step) {
    float x[N];
    kptr p = new(sizeof x);
    for (int i = 0; i < N; i++) x[i] = first + step * (float)i;
    k.upload(&k, p, x, sizeof x);
    return p;
}
static float at(kptr p, int i) {
    float x[N];
    k.download(&k, x, p, sizeof x);
    return x[i];
}
static void sound(void) {
    struct err e = { 0 };
    cr_assert(k.sync(&k, &e) == 0, "%s", e.text);
}
static void add(kptr x, kptr y) { k.add(&k, &(struct kern_add){ .x = x, .y = y, .n = N }); }
/* x += y, kept. */
static void keep_add(uint64_t key, kptr x, kptr y) {
    k.record(&k);
    add(x, y);
    cr_assert(k.keep(&k, key), "the sum of key %llu is not kept", (unsigned long long)key);
}

Test(graph, runs_when_it_is_replayed_and_not_before) {
    kptr x = numbers(1, 0), y = numbers(0, 1), z = numbers(-1, 0);
    cr_assert_not(k.replay(&k, 7), "nothing is kept yet");
    k.record(&k);
    add(x, y);
    k.copy(&k, z, x, N * sizeof(float));
    k.zero(&k, x, sizeof(float));
    cr_assert(k.keep(&k, 7));
    cr_expect_eq(at(x, 5), 1, "the recording ran what it should note");
    for (int i = 0; i < 3; i++) cr_assert(k.replay(&k, 7));
    cr_expect(at(x, 5) == 16 && at(z, 5) == 16 && at(x, 0) == 0 && at(z, 0) == 0);
    kptr other = numbers(0, 10);
    k.copy(&k, y, other, N * sizeof(float));          /* what lies there now counts */
    cr_assert(k.replay(&k, 7));
    cr_expect_eq(at(z, 5), 66);
    cr_assert_not(k.replay(&k, 8));
    keep_add(7, z, y);                                /* in place of what was there */
    cr_assert(k.replay(&k, 7));
    cr_expect(at(z, 5) == 116 && at(x, 5) == 66);
    k.forget(&k);
    cr_assert_not(k.replay(&k, 7));
    sound();
}

/* The key is read when the step runs, and the sums grow: a replay draws, and draws anew under a new key. */
Test(graph, noise_is_drawn_at_each_replay) {
    uint32_t key[2] = { 3, 4 }, other[2] = { 3, 5 };
    float want[2][N], got[2][N];
    kptr x = numbers(1, 1), y = numbers(0, 0), at_key = new(sizeof key);
    kptr sums = new(KERN_NOISE_SUMS * sizeof(int64_t));
    int64_t sum[KERN_NOISE_SUMS];
    struct kern_perturb a = { .noise = { .type = KERN_NOISE_RELATIVE_GAUSSIAN, .scale = .1f, .site = 5, .key_at = at_key,
                                         .sums = sums },
                              .x = x, .x_ld = N, .y = y, .y_ld = N, .rows = 1, .dim = N };
    for (int i = 0; i < 2; i++) {
        k.upload(&k, at_key, i ? other : key, sizeof key);
        k.perturb(&k, &a);
        k.download(&k, want[i], y, sizeof want[i]);
    }
    k.zero(&k, sums, sizeof sum);
    k.record(&k);
    k.perturb(&k, &a);
    cr_assert(k.keep(&k, 1));
    for (int i = 0; i < 2; i++) {
        k.upload(&k, at_key, i ? other : key, sizeof key);
        cr_assert(k.replay(&k, 1));
        k.download(&k, got[i], y, sizeof got[i]);
    }
    k.download(&k, sum, sums, sizeof sum);
    sound();
    cr_expect(!memcmp(got, want, sizeof got), "other draws than from the same operation called");
    cr_expect(memcmp(got[0], got[1], sizeof got[0]) != 0, "another key, the same draws");
    cr_expect_eq(sum[KERN_NOISE_ELEMENTS], 2 * N);
    cr_expect_eq(sum[KERN_NOISE_CHANGED], 2 * N);
}

/* What waits, or reads host memory, spoils its recording: nothing ran, nothing failed. */
Test(graph, what_cannot_be_kept_is_not) {
    kptr x = numbers(1, 0), y = numbers(2, 0);
    const int32_t start[2] = { 0, 1 };
    cr_assert_eq(k.sum_squares(&k, x, N), N);
    for (int i = 0; i < 3; i++) {
        keep_add(1, x, y);
        k.record(&k);
        add(x, y);
        if (i == 0) cr_expect_eq(k.sum_squares(&k, x, N), 0);
        if (i == 1)
            k.outer(&k, &(struct kern_outer){ .a = x, .a_ld = N, .b = y, .b_ld = N, .scale = 1, .g = x, .m = 1, .n = 1,
                                              .seq_start = start, .seqs = 1 });
        if (i == 2) k.upload(&k, x, start, sizeof start);
        cr_expect_not(k.keep(&k, 1), "%d", i);
        sound();
        cr_expect_eq(at(x, 5), 1, "a recording that was not kept ran");
        cr_expect(k.replay(&k, 1), "what was kept before is gone");
        cr_expect_eq(at(x, 5), 3);
        k.zero(&k, y, sizeof(float[N]));
        k.copy(&k, x, y, sizeof(float[N]));
        kptr one = numbers(1, 0), two = numbers(2, 0);
        k.copy(&k, x, one, sizeof(float[N])), k.copy(&k, y, two, sizeof(float[N]));
    }
    sound();
}

/* A graph holds the scratch's address: when that has moved it is dropped, and can be kept again. */
Test(graph, another_scratch_drops_it) {
    enum { VOCAB = 3000, ROWS = 40 };
    struct kern_sampler s[ROWS];
    int32_t token[2][ROWS];
    kptr logits = new(ROWS * VOCAB * sizeof(float)), samplers = new(sizeof s), drawn = new(3 * sizeof token[0]);
    kptr x = numbers(1, 0), y = numbers(2, 0);
    for (int i = 0; i < ROWS; i++) s[i] = (struct kern_sampler){ .temperature = 1, .top_p = .9f, .u = (float)i / ROWS };
    k.upload(&k, samplers, s, sizeof s);
    struct kern_sample few = { logits, 2, VOCAB, samplers, true, drawn, kptr_at(drawn, sizeof token[0]),
                               kptr_at(drawn, 2 * sizeof token[0]) }, many = few;
    many.rows = ROWS;
    k.record(&k);
    k.sample(&k, &few);
    cr_assert_not(k.keep(&k, 1), "the scratch had to grow in a recording");
    k.sample(&k, &few);
    k.download(&k, token[0], drawn, sizeof token[0]);
    k.record(&k);
    k.sample(&k, &few);
    cr_assert(k.keep(&k, 1));
    keep_add(2, x, y);
    cr_assert(k.replay(&k, 1));
    k.sample(&k, &many);                              /* wants more */
    cr_expect_not(k.replay(&k, 1), "it would have run in scratch that was freed");
    cr_expect_not(k.replay(&k, 1));
    k.zero(&k, drawn, 3 * sizeof token[0]);
    k.record(&k);
    k.sample(&k, &few);
    cr_assert(k.keep(&k, 1));
    cr_assert(k.replay(&k, 1));
    k.download(&k, token[1], drawn, sizeof token[1]);
    sound();
    cr_expect(token[0][0] == token[1][0] && token[0][1] == token[1][1] && token[1][1] > 0);
}

/* A bounded number is kept, and no other in its place: whoever goes through one more of them by turns would have each
 * recorded again each time. Who is kept is recorded anew under its own key, and after `forget` there is room. */
Test(graph, keeps_a_bounded_number) {
    kptr x = numbers(0, 0), y = numbers(1, 0);
    for (uint64_t i = 0; i < MANY; i++) keep_add(i, x, y);
    k.record(&k);
    add(x, y);
    cr_expect_not(k.keep(&k, MANY), "more than %d are kept", MANY);
    cr_expect_not(k.replay(&k, MANY));
    for (uint64_t i = MANY; i-- > 0;) cr_assert(k.replay(&k, i), "key %d", (int)i);
    cr_expect_eq(at(x, 3), MANY);
    keep_add(3, y, x);
    cr_expect(k.replay(&k, 3));
    cr_expect_eq(at(y, 3), MANY + 1);
    k.forget(&k);
    keep_add(MANY, x, y);
    cr_expect(k.replay(&k, MANY) && !k.replay(&k, 3));
    sound();
}

static size_t free_bytes(void) {
    struct cuda_device d;
    struct err e = { 0 };
    cr_assert(cuda_load(&e)->describe(&d, 0, &e) == 0, "%s", e.text);
    return d.free_bytes;
}

/* An error on the way is said with the operation's name, once; a replay takes no memory of the device. */
Test(graph, errors_have_the_operations_name) {
    struct err e = { 0 };
    kptr x = numbers(0, 0), y = numbers(1, 0), no;
    keep_add(1, x, y);
    const size_t before = free_bytes();
    for (int i = 0; i < 20; i++) cr_assert(k.replay(&k, 1));
    sound();
    cr_expect_geq(free_bytes(), before, "replays allocate");
    k.record(&k);
    add(x, y);
    cr_expect_eq(k.alloc(&k, &no, 100, &e), -1, "memory in a recording");
    cr_expect_not(k.keep(&k, 2));
    cr_expect_eq(k.sync(&k, &e), -1);
    cr_expect(strstr(e.text, "keep on cuda:0: cudaErrorStreamCapture"), "%s", e.text);
    add(x, y);                                        /* nobody else is blamed */
    sound();
    cr_assert(k.replay(&k, 1));
    sound();
}
