/* zero_alloc.c - a decode step and a training step ask for no memory: after the first, malloc is not
 * called.
 *
 * The C library's functions are counted in front of themselves. One thread, because a worker's
 * scratch grows when it first gets a large part, whichever step that is.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/unit/net_fixture.h"

#include <criterion/criterion.h>
#include <stdatomic.h>

enum { SLOTS = 5, STEPS = 70, SEQS = 3, TOKENS = 50, VOCAB = 61 };

#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__)
enum { COUNTED = true };
static atomic_int calls;
void *__libc_malloc(size_t n);
void *__libc_calloc(size_t n, size_t size);
void *__libc_realloc(void *p, size_t n);
void *__libc_memalign(size_t align, size_t n);
#define COUNT_CALL(name, params, call) void *name params { calls++; return call; }
COUNT_CALL(malloc, (size_t n), __libc_malloc(n))
COUNT_CALL(calloc, (size_t n, size_t size), __libc_calloc(n, size))
COUNT_CALL(realloc, (void *p, size_t n), __libc_realloc(p, n))
COUNT_CALL(aligned_alloc, (size_t align, size_t n), __libc_memalign(align, n))
#else
enum { COUNTED = false };
static atomic_int calls;
#endif

static struct net *net_of(struct fix *f, const char *path, const struct lora *l, bool train) {
    struct err e = { 0 };
    struct net *n;
    struct net_opts o = { .rows_max = SEQS * TOKENS, .slots_max = SLOTS, .positions_max = STEPS + 1,
                          .train = train, .lora = l->shape };
    cr_assert_eq(net_create(&n, &f->model, &o, &e), 0, "%s: %s", path, e.text);
    cr_assert_eq(net_adopt(n, l, NULL, &e), 0);
    return n;
}

static int decode(struct net *n) {
    struct net_row row[SLOTS];
    struct kern_sampler draw[SLOTS];
    int32_t token[SLOTS];
    float lp[SLOTS], raw[SLOTS];
    struct err e = { 0 };
    int before = 0;
    for (int i = 0; i < SLOTS; i++) {
        row[i] = (struct net_row){ .token = i, .slot = net_slot_open(n), .pos = 0 };
        draw[i] = (struct kern_sampler){ .temperature = 1, .top_k = 20, .top_p = .9f, .u = .5f };
    }
    for (int step = 0; step < STEPS; step++) {
        if (step == 1) before = calls;
        cr_assert_eq(net_step(n, row, SLOTS, draw, token, lp, raw, &e), 0, "%s", e.text);
        for (int i = 0; i < SLOTS; i++) row[i].token = token[i], row[i].pos++;
    }
    return calls - before;
}

static void loss(void *ud, int seq, int first, int count, const float *lp, const float *entropy,
                 float *coef) {
    (void)ud, (void)seq, (void)first, (void)entropy;
    for (int i = 0; i < count; i++) coef[i] = lp[i];
}

static int train(struct net *n, float *grad) {
    int32_t ids[TOKENS];
    struct net_seq seq[SEQS];
    struct err e = { 0 };
    int before = 0;
    for (int i = 0; i < TOKENS; i++) ids[i] = i * 7 % VOCAB;
    for (int s = 0; s < SEQS; s++) seq[s] = (struct net_seq){ .ids = ids, .n = TOKENS - s, .prompt_n = 10 };
    for (int step = 0; step < 3; step++) {
        if (step == 1) before = calls;
        cr_assert_eq(net_train(n, seq, SEQS, 1, loss, NULL, grad, &e), 0, "%s", e.text);
    }
    return calls - before;
}

Test(zero_alloc, steps,
     .description = "decode steps and training steps after the first allocate nothing on one thread, any path") {
    if (!COUNTED) cr_skip_test("calls of malloc can only be counted with glibc and without ASan");
    static const enum model_quant quants[] = { MODEL_QUANT_MXFP4, MODEL_QUANT_NVFP4,
                                               MODEL_QUANT_BF16 };
    const char *names[8];
    const struct model_conf c = fix_small_conf();
    for (int i = 0, paths = kern_paths(names); i < paths; i++)
        for (size_t q = 0; q < COUNT_OF(quants); q++) {
            struct fix f;
            struct lora *l = fix_lora(&c, 4, 8, .2f, 7);
            float *grad = calloc(l->params, sizeof *grad);
            fix_open(&f, names[i], 1, &c, quants[q], fix_small_value);
            const int start = calls;
            struct net *n = net_of(&f, names[i], l, false);
            cr_assert_gt(calls, start, "calls are not counted");
            int made = decode(n);
            cr_expect_eq(made, 0, "path %s, %s: %d allocations in %d decode steps", names[i],
                         model_quant_name(quants[q]), made, STEPS - 1);
            net_destroy(&n);
            n = net_of(&f, names[i], l, true);
            made = train(n, grad);
            cr_expect_eq(made, 0, "path %s, %s: %d allocations in 2 training steps", names[i],
                         model_quant_name(quants[q]), made);
            net_destroy(&n);
            free(grad);
            lora_destroy(&l);
            fix_close(&f);
        }
}
