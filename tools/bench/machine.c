/* machine.c - the machine's own limits: multiply-adds by each instruction it has, reading, one
 * core's clock.
 *
 * Every probe runs several times. The report shows how they spread; the limit is their best, since
 * others can only take away from it. Order: lanes, probes, reading, what follows for the path.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tools/bench/bench.h"

#include <pthread.h>

#include "lib/base/clock.h"
#include "tools/bench/host.h"
#include "tools/bench/probe.h"

enum { REPEATS_MAX = 9 };

/* ---- lanes: the same work on several threads at once ---- */

struct lane {
    void (*fn)(void *arg, int index);
    void *arg;
    int index;
    pthread_barrier_t *go;
    double begun, ended;
};

static void *lane_main(void *arg) {
    struct lane *l = arg;
    if (l->go) pthread_barrier_wait(l->go);
    l->begun = clock_seconds();
    l->fn(l->arg, l->index);
    l->ended = clock_seconds();
    return NULL;
}

/* Seconds from the first lane's begin to the last one's end. */
static double together(int threads, void (*fn)(void *, int), void *arg) {
    struct lane lane[POOL_THREADS_MAX] = { 0 };
    pthread_t id[POOL_THREADS_MAX];
    pthread_barrier_t go;
    pthread_barrier_init(&go, NULL, (unsigned)threads);
    for (int i = 0; i < threads; i++)
        lane[i] = (struct lane){ fn, arg, i, threads > 1 ? &go : NULL, 0, 0 };
    for (int i = 1; i < threads; i++)
        if (pthread_create(&id[i], NULL, lane_main, &lane[i]) != 0) abort();
    lane_main(&lane[0]);
    double begun = lane[0].begun, ended = lane[0].ended;
    for (int i = 1; i < threads; i++) {
        pthread_join(id[i], NULL);
        begun = lane[i].begun < begun ? lane[i].begun : begun;
        ended = lane[i].ended > ended ? lane[i].ended : ended;
    }
    pthread_barrier_destroy(&go);
    return ended - begun;
}

static struct spread repeat(const struct bench *b, int threads, double amount,
                            void (*fn)(void *, int), void *arg) {
    double v[REPEATS_MAX];
    int n = b->quick ? 3 : REPEATS_MAX;
    for (int i = 0; i < n; i++) v[i] = together(threads, fn, arg);
    return spread_rate(spread_of(v, n), amount * threads);
}

/* ---- probes ---- */

struct spin { void (*run)(long turns); long turns; bool tiles; };

static void spin_lane(void *arg, int index) {
    struct spin *s = arg;
    (void)index;
    if (s->tiles) probe_amx_begin();
    s->run(s->turns);
    if (s->tiles) probe_amx_end();
}

/* `flops` (or cycles) of one turn a second; turns are chosen so that a repeat takes 10 ms. */
static struct spread spinning(const struct bench *b, int threads, struct spin s, double flops) {
    double seconds = 0;
    for (s.turns = 4096; s.turns < 1L << 40; s.turns *= 4) {
        seconds = together(1, spin_lane, &s);
        if (seconds > 2e-3) break;
    }
    s.turns = (long)((double)s.turns * 1e-2 / seconds) + 1;
    return repeat(b, threads, flops * (double)s.turns, spin_lane, &s);
}

struct reading { char *at; size_t bytes; int passes; void (*read)(const void *, size_t); };

static void read_lane(void *arg, int index) {
    const struct reading *r = arg;
    for (int i = 0; i < r->passes; i++) r->read(r->at + (size_t)index * r->bytes, r->bytes);
}

static void read_plain(const void *p, size_t bytes) {
    const uint64_t *v = p;
    uint64_t acc = 0;
    for (size_t i = 0; i < bytes / sizeof *v; i++) acc ^= v[i];
    *(volatile uint64_t *)&(uint64_t){ 0 } = acc;
}

static void figure_of(struct bench *b, bool show, const char *name, int threads, struct spread s,
                      const char *unit, double factor, const char *what) {
    char key[BENCH_KEY_MAX];
    snprintf(key, sizeof key, "machine/%s/%s", name, threads == 1 ? "1" : "all");
    s = spread_times(s, factor);
    if (show && bench_wants(b, key))
        bench_report(b, key, &(struct figure){ .unit = unit, .what = what, .s = s });
}

struct peak { const char *name; struct spin spin; double flops; bool have; const char *what; };

/* Best rate of all threads; 0 where the CPU lacks the instruction. */
static double peak_of(struct bench *b, bool show, const struct peak *p) {
    char key[BENCH_KEY_MAX];
    double best = 0;
    for (int all = 0; all < 2; all++) {
        int threads = all ? b->threads : 1;
        snprintf(key, sizeof key, "machine/%s/%s", p->name, all ? "all" : "1");
        if (!p->have) {
            if (show && bench_wants(b, key)) bench_absent(b, key, "this CPU does not have it");
            continue;
        }
        struct spread s = spinning(b, threads, p->spin, p->flops);
        if (all && threads > 1 && s.max < 1.3 * best) b->limits.shared_core = true;
        best = s.max;
        if (show && bench_wants(b, key))
            bench_report(b, key, &(struct figure){ .unit = "GFLOP/s", .what = p->what,
                                                   .s = spread_times(s, 1e-9) });
    }
    return best;
}

/* What unpacking costs beside multiplying: cycles of twelve instructions, alone and in turn with
 * twelve others. */
static void mixes(struct bench *b, bool have, double hertz) {
    static const struct { const char *name; void (*run)(long); } mix[] = {
        { "mix/dot", probe_dots },
        { "mix/permute", probe_permutes },
        { "mix/store", probe_stores },
        { "mix/dot+permute", probe_dots_permutes },
        { "mix/dot+store", probe_dots_stores },
    };
    for (size_t i = 0; i < COUNT_OF(mix); i++) {
        char key[BENCH_KEY_MAX];
        snprintf(key, sizeof key, "machine/%s/1", mix[i].name);
        if (!bench_wants(b, key)) continue;
        if (!have) {
            bench_absent(b, key, "this CPU does not have it");
            continue;
        }
        const struct spread s = spinning(b, 1, (struct spin){ .run = mix[i].run }, 1);
        figure_of(b, true, mix[i].name, 1, spread_rate(s, hertz), "cycles", 1,
                  "of twelve, or twelve of each");
    }
}

/* ---- reading ---- */

static void reads(struct bench *b, bool show, const struct probe_cpu *cpu) {
    const size_t l2 = host_l2_bytes() * 3 / 4 / 512 * 512;
    const struct { const char *name; size_t bytes; } size[LIMITS_READ_COUNT] = {
        { "read/l2", l2 * (size_t)b->threads },
        { "read/16mb", 16000000 },
        { "read/64mb", 64000000 },
        { "read/200mb", 200000000 },
        { "read/600mb", 600000000 },
    };
    struct reading r = { 0 };
#if defined(__x86_64__)
    r.read = cpu->avx512 ? probe_read512 : cpu->avx2 ? probe_read256 : read_plain;
#else
    (void)cpu;
    r.read = read_plain;
#endif
    const size_t most = size[LIMITS_READ_COUNT - 1].bytes / 4096 * 4096 + 4096;
    r.at = aligned_alloc(4096, most);
    if (!r.at) return;
    for (size_t i = 0; i < most; i += 8) {
        uint64_t x = (i + 1) * 0x9e3779b97f4a7c15u;
        memcpy(r.at + i, &x, 8);
    }
    for (int i = 0; i < LIMITS_READ_COUNT; i++)
        for (int all = 0; all < 2; all++) {
            int threads = all ? b->threads : 1;
            r.bytes = size[i].bytes / (size_t)(i == 0 ? b->threads : threads) / 512 * 512;
            r.passes = 1 + (int)(64000000 / (r.bytes * (size_t)threads));
            struct spread s = repeat(b, threads, (double)r.bytes * r.passes, read_lane, &r);
            if (all) {
                b->limits.read[i].bytes = (double)size[i].bytes;
                b->limits.read[i].per_second = s.max;
            }
            figure_of(b, show, size[i].name, all ? 0 : 1, s, "GB/s", 1e-9,
                      i == 0 ? "three quarters of L2 on each thread" : NULL);
        }
    free(r.at);
}

/* ---- what follows ---- */

static void probe_all(struct bench *b, bool show) {
    struct probe_cpu cpu = probe_cpu();
    bool amx = cpu.amx && probe_amx_allow();
    struct limits *l = &b->limits;
    struct spread clock = spinning(b, 1, (struct spin){ .run = probe_cycles }, 64);
    l->threads = b->threads;
    l->hertz = clock.max;
    figure_of(b, show, "clock", 1, clock, "GHz", 1e-9, "one thread busy: a chain of additions");
    const struct peak peak[] = {
        { "fma256", { .run = probe_fma256 }, PROBE_FMA256_FLOPS, cpu.avx2, "f32 FMA, 8 lanes" },
        { "fma512", { .run = probe_fma512 }, PROBE_FMA512_FLOPS, cpu.avx512, "f32 FMA, 16 lanes" },
        { "bf16dot", { .run = probe_bf16 }, PROBE_BF16_FLOPS, cpu.bf16, "VDPBF16PS" },
        { "amx-registers", { .run = probe_amx_registers, .tiles = true }, PROBE_AMX_FLOPS, amx,
          "TDPBF16PS, no loads" },
        { "amx-l1", { .run = probe_amx_l1, .tiles = true }, PROBE_AMX_FLOPS, amx,
          "TDPBF16PS, 2x2 tiles, four loads a turn" },
    };
    double best[COUNT_OF(peak)];
    for (size_t i = 0; i < COUNT_OF(peak); i++) best[i] = peak_of(b, show, &peak[i]);
    if (show && bench_enters(b, "machine/mix")) mixes(b, cpu.bf16, clock.max);
    reads(b, show, &cpu);
    const char *path = b->kern.name;
    const struct { const char *path, *by; double flops; int rows; } uses[] = {
        { "ref", "scalar FMA", best[0] / 8, 1 },
        { "amx-emulated", "scalar FMA", best[0] / 8, 1 },
        { "avx2", "FMA, 8 lanes", best[0], 1 },
        { "avx512", "FMA, 16 lanes", best[1], 1 },
        { "avx512bf16", "VDPBF16PS", best[2], 1 },
        { "amx", "TDPBF16PS from L1", best[4], 16 },
    };
    for (size_t i = 0; i < COUNT_OF(uses); i++)
        if (strcmp(path, uses[i].path) == 0)
            l->flops = uses[i].flops, l->by = uses[i].by, l->tile_rows = uses[i].rows;
    b->limits_known = true;
    if (show && bench_wants(b, "machine/peak"))
        bench_report(b, "machine/peak",
                     &(struct figure){ .unit = "GFLOP/s", .what = l->by,
                                       .s = spread_of(&(double){ l->flops * 1e-9 }, 1) });
}

const struct limits *bench_limits(struct bench *b) {
    if (!b->limits_known && !b->plugin) probe_all(b, false);
    assert(b->limits_known);
    return &b->limits;
}

int part_machine(struct bench *b, struct err *e) {
    (void)e;
    if (bench_enters(b, "machine")) probe_all(b, true);
    return 0;
}
