/* pool.c - see pool.h.
 *
 * One 64-bit ticket word {round, next part} hands out parts: a worker that wakes late finds the
 * round over and takes nothing. `left` counts parts not yet finished; the caller works too, then
 * waits for it to reach zero.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "lib/base/clock.h"
#include "lib/base/str.h"

/* A pause is 40 to 140 cycles long, by the CPU's make: the clock bounds the spinning. */
enum { SPIN_US = 50, SPIN_TURNS = 64 };

struct pool {
    int threads;
    pthread_t worker[POOL_THREADS_MAX];
    void (*fn)(void *, int, int);
    void *arg;
    _Atomic uint64_t ticket;      /* round << 32 | next part */
    _Atomic int parts;
    _Atomic int left;
    _Atomic uint32_t round;       /* futex word of the workers */
    _Atomic uint32_t finished;    /* futex word of the caller: last round done */
    _Atomic int sleepers;
    _Atomic int caller_sleeps;
    _Atomic bool stop;
};

static void cpu_relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    sched_yield();
#endif
}

static void futex_wait(_Atomic uint32_t *word, uint32_t seen) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
}
static void futex_wake(_Atomic uint32_t *word) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

static void work(struct pool *p, uint32_t round) {
    uint64_t t = atomic_load(&p->ticket);
    while ((uint32_t)(t >> 32) == round) {
        int part = (int)(uint32_t)t, parts = atomic_load(&p->parts);
        if (part >= parts) return;
        if (!atomic_compare_exchange_weak(&p->ticket, &t, t + 1)) continue;
        p->fn(p->arg, part, parts);
        if (atomic_fetch_sub(&p->left, 1) == 1) {
            atomic_store(&p->finished, round);
            if (atomic_load(&p->caller_sleeps) > 0) futex_wake(&p->finished);
        }
        t = atomic_load(&p->ticket);
    }
}

static void wait_change(_Atomic uint32_t *word, uint32_t seen, _Atomic int *sleepers) {
    double end = 0;
    do {
        for (int i = 0; i < SPIN_TURNS; i++) {
            if (atomic_load_explicit(word, memory_order_acquire) != seen) return;
            cpu_relax();
        }
        if (end == 0) end = clock_seconds() + SPIN_US * 1e-6;
    } while (clock_seconds() < end);
    atomic_fetch_add(sleepers, 1);
    while (atomic_load(word) == seen) futex_wait(word, seen);
    atomic_fetch_sub(sleepers, 1);
}

static void *worker_main(void *arg) {
    struct pool *p = arg;
    uint32_t seen = 0;
    for (;;) {
        wait_change(&p->round, seen, &p->sleepers);
        seen = atomic_load(&p->round);
        if (atomic_load(&p->stop)) return NULL;
        work(p, seen);
    }
}

struct pool *pool_create(int threads) {
    assert(threads >= 1 && threads <= POOL_THREADS_MAX);
    struct pool *p = mem_alloc(sizeof *p);
    p->threads = 1;
    for (int i = 1; i < threads; i++) {
        /* fewer threads, same results */
        if (pthread_create(&p->worker[i], NULL, worker_main, p)) break;
        p->threads++;
    }
    return p;
}

void pool_destroy(struct pool **pp) {
    struct pool *p = *pp;
    if (!p) return;
    atomic_store(&p->stop, true);
    atomic_fetch_add(&p->round, 1);
    futex_wake(&p->round);
    for (int i = 1; i < p->threads; i++) pthread_join(p->worker[i], NULL);
    free(p);
    *pp = NULL;
}

int pool_threads(const struct pool *p) { return p->threads; }

void pool_run(struct pool *p, int parts, void (*fn)(void *arg, int part, int parts), void *arg) {
    if (parts <= 0) return;
    if (parts == 1 || p->threads == 1) {
        for (int i = 0; i < parts; i++) fn(arg, i, parts);
        return;
    }
    uint32_t round = atomic_load(&p->round) + 1;
    /* Close the ticket first: a worker late from the last round, holding its {round, parts}, must
     * not find the new, larger count of parts beside the old ticket and take a part that will be
     * handed out again. */
    atomic_store(&p->ticket, (uint64_t)round << 32 | INT32_MAX);
    p->fn = fn;
    p->arg = arg;
    atomic_store(&p->parts, parts);
    atomic_store(&p->left, parts);
    atomic_store(&p->ticket, (uint64_t)round << 32);
    atomic_store(&p->round, round);
    if (atomic_load(&p->sleepers) > 0) futex_wake(&p->round);
    work(p, round);
    uint32_t last = atomic_load(&p->finished);
    while (last != round) {
        wait_change(&p->finished, last, &p->caller_sleeps);
        last = atomic_load(&p->finished);
    }
}

int pool_cores(void) {
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof set, &set) < 0) return 1;
    int n = CPU_COUNT(&set);
    return n < 1 ? 1 : n > POOL_THREADS_MAX ? POOL_THREADS_MAX : n;
}
