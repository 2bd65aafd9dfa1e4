/* stage_rank.c - what each process of a stage gets of its cores and GPUs.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/stage/rank.h"

#include <criterion/criterion.h>
#include <sched.h>

#include "lib/base/pool.h"

enum { AUTO = 0, CUDA = 7 };         /* of run.kernels */
static cpu_set_t all;
static void start(void) {
    char name[32];
    sched_getaffinity(0, sizeof all, &all);
    unsetenv("CUDA_VISIBLE_DEVICES");
    cr_assert_str_eq(shared_kernels(CUDA, name, sizeof name), "cuda");
}
static void stop(void) { sched_setaffinity(0, sizeof all, &all); }
TestSuite(rank, .init = start, .fini = stop, .timeout = 60);

static cpu_set_t share(int rank, int ranks, int threads) {
    const struct shared c = { .run = { .threads = threads } };
    struct err e = { 0 };
    cpu_set_t own;
    sched_setaffinity(0, sizeof all, &all);
    cr_expect(rank_take_share(&c, rank, ranks, &e) == 0, "%s", e.text);
    sched_getaffinity(0, sizeof own, &own);
    return own;
}

Test(rank, cores_are_parted) {
    const int cores = pool_cores();
    for (int ranks = 1; ranks <= 2 * cores && ranks <= 32; ranks++) {
        cpu_set_t seen;
        CPU_ZERO(&seen);
        int sum = 0;
        for (int r = 0; r < ranks; r++) {
            cpu_set_t own = share(r, ranks, 0), both;
            CPU_AND(&both, &seen, &own);
            cr_expect(ranks > cores || CPU_COUNT(&both) == 0, "%d ranks: %d shares a core", ranks,
                      r);
            CPU_OR(&seen, &seen, &own);
            sum += CPU_COUNT(&own);
        }
        cr_expect_eq(sum, cores / ranks > 0 ? cores / ranks * ranks : ranks);
        cr_expect(CPU_COUNT(&seen) >= (ranks < cores ? cores / ranks * ranks : cores),
                  "%d ranks use %d of %d cores", ranks, CPU_COUNT(&seen), cores);
    }
}

Test(rank, more_threads_than_a_share_overlap) {
    const int cores = pool_cores();
    for (int r = 0; r < 3; r++) {
        cpu_set_t own = share(r, 3, cores + 5);
        cr_expect_eq(CPU_COUNT(&own), cores);
        cr_expect_eq(pool_cores(), cores);
    }
    const struct shared c = { .run = { .threads = 1 } };
    sched_setaffinity(0, sizeof all, &all);
    cr_expect_eq(rank_cores(&c, 1), cores);
}

static const char *gpu_of(int rank, const char *visible) {
    const struct shared c = { .run = { .kernels = CUDA } };
    struct err e = { 0 };
    if (visible) setenv("CUDA_VISIBLE_DEVICES", visible, 1);
    else unsetenv("CUDA_VISIBLE_DEVICES");
    sched_setaffinity(0, sizeof all, &all);
    if (rank_take_share(&c, rank, 2, &e) == 0) return getenv("CUDA_VISIBLE_DEVICES");
    cr_expect(e.code == EXIT_ENV && strstr(e.text, "no GPU for rank"), "%s", e.text);
    return "none";
}

Test(rank, each_gets_the_gpu_of_its_number) {
    static const struct { const char *visible; int rank; const char *own; } t[] = {
        { "5,7", 0, "5" }, { "5,7", 1, "7" },       { "5,7", 2, "none" }, { "", 0, "none" },
        { NULL, 1, "1" },  { "GPU-a,GPU-b", 1, "GPU-b" }, { "3", 0, "3" },      { "3", 1, "none" },
        { "-1", 0, "none" }, { "4,-1,2", 0, "4" }, { "4,-1,2", 1, "none" }, { "4,,2", 1, "none" },
    };
    for (size_t i = 0; i < COUNT_OF(t); i++)
        cr_expect_str_eq(gpu_of(t[i].rank, t[i].visible), t[i].own, "row %zu", i);
}

Test(rank, as_many_as_there_are_gpus) {
    struct shared c = { .run = { .kernels = CUDA } };
    struct err e = { 0 };
    cr_expect_eq(rank_default(&c), 1);
    cr_expect(rank_check(&c, "a.ranks", 9, &e) == 0, "nobody said how many there are");
    setenv("CUDA_VISIBLE_DEVICES", "0,1,6", 1);
    cr_expect_eq(rank_default(&c), 3);
    cr_expect(rank_check(&c, "a.ranks", 3, &e) == 0 && rank_check(&c, "a.ranks", 1, &e) == 0);
    cr_expect(rank_check(&c, "a.ranks", 4, &e) < 0 && e.code == EXIT_CONFIG);
    cr_expect(strstr(e.text, "a.ranks = 4, but the stage has 3 GPUs") &&
                  strstr(e.text, "gpu:0-3"), "%s", e.text);
    static const struct { const char *visible; int ranks; } t[] = {
        { "", 1 }, { "-1", 1 }, { "0,1,-1,2", 2 }, { "GPU-a,MIG-b,3", 3 }, { "0,1,", 2 },
    };
    for (size_t i = 0; i < COUNT_OF(t); i++) {
        setenv("CUDA_VISIBLE_DEVICES", t[i].visible, 1);
        cr_expect_eq(rank_default(&c), t[i].ranks, "'%s'", t[i].visible);
    }
    setenv("CUDA_VISIBLE_DEVICES", "-1", 1);
    cr_expect(rank_check(&c, "a.ranks", 1, &e) == 0, "that there is no GPU is for others to say");
    c.run.kernels = AUTO;                            /* on cores the GPUs that are seen are none */
    cr_expect_eq(rank_default(&c), 1);
    cr_expect(rank_check(&c, "a.ranks", 4, &e) == 0);
}

/* What rank_note says, "" for nothing. */
static const char *note_of(const struct shared *c, int64_t ranks) {
    static char text[200];
    json_t *notes = json_array();
    rank_note(notes, c, "a.ranks", ranks);
    const char *s = json_string_value(json_array_get(notes, 0));
    snprintf(text, sizeof text, "%s", s ? s : "");
    json_decref(notes);
    return text;
}

Test(rank, idle_gpus_and_too_few_cores_are_noted) {
    struct shared c = { .run = { .kernels = AUTO } };
    const int cores = pool_cores();
    cr_expect_str_empty(note_of(&c, 1));
    cr_expect_str_empty(note_of(&c, cores));
    cr_expect(strstr(note_of(&c, cores + 1), "the stage has"), "%s", note_of(&c, cores + 1));
    c.run.kernels = CUDA;
    setenv("CUDA_VISIBLE_DEVICES", "0,1", 1);
    cr_expect(strstr(note_of(&c, 1), "the stage has 2 GPUs: the last 1 is taken and idle"), "%s",
              note_of(&c, 1));
    if (cores >= 2) cr_expect_str_empty(note_of(&c, 2));
}
