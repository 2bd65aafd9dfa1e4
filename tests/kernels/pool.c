/* pool.c - the thread pool under what kernels do to it: thousands of short rounds, more threads
 * than cores.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/kernels/kt.h"

#include <stdatomic.h>
#include <unistd.h>

enum { PARTS_MAX = 64 };
struct count { _Atomic int done[PARTS_MAX]; _Atomic int wrong; int parts; };

static void count_part(void *arg, int part, int parts) {
    struct count *c = arg;
    if (parts != c->parts || part < 0 || part >= parts) atomic_fetch_add(&c->wrong, 1);
    else atomic_fetch_add(&c->done[part], 1);
}

static void rounds(int threads, int count, int pause_each) {
    struct pool *p = pool_create(threads);
    for (int i = 0; i < count; i++) {
        struct count c = { .parts = 1 + i * 7 % PARTS_MAX };
        pool_run(p, c.parts, count_part, &c);
        cr_assert(atomic_load(&c.wrong) == 0);
        for (int j = 0; j < PARTS_MAX; j++)
            cr_assert(atomic_load(&c.done[j]) == (j < c.parts),
                      "round %d part %d of %d ran %d times", i, j, c.parts,
                      atomic_load(&c.done[j]));
        /* long enough for workers to sleep */
        if (pause_each && i % pause_each == 0) usleep(300);
    }
    pool_destroy(&p);
    cr_assert(!p);
}

Test(pool, every_part_runs_once_2_threads) { rounds(2, 100000, 0); }
Test(pool, every_part_runs_once_3_threads) { rounds(3, 20000, 0); }
Test(pool, every_part_runs_once_7_threads) { rounds(7, 5000, 0); }
Test(pool, workers_that_sleep_wake_up) { rounds(3, 3000, 3); }
Test(pool, no_parts_is_nothing) {
    struct pool *p = pool_create(2);
    pool_run(p, 0, count_part, NULL);
    pool_destroy(&p);
    pool_destroy(&p);
    cr_assert(pool_cores() >= 1);
}
