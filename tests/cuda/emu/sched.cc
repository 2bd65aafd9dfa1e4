/* sched.cc - the threads of one launch, their barriers and warp operations.
 *
 * Threads share one fiber for as long as none has to wait: a kernel without barriers is a plain
 * loop. A thread that waits keeps its fiber, and the next thread begins on another; whoever waits
 * or ends picks who goes on, so nothing goes through the host's stack. EMU_SCHED=fwd|rev|rand:N is
 * the order of blocks, threads and wake-ups; a right kernel gives the same result under each.
 * No stdio and no allocation on a fiber.
 * Order: fibers, picking, waiting, the block's barrier, the warp's operations, a launch.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/cuda/emu/emu.h"

#include <numeric>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#ifdef EMU_ASAN
extern "C" void __sanitizer_start_switch_fiber(void **fake, const void *bottom, size_t bytes);
extern "C" void __sanitizer_finish_switch_fiber(void *fake, const void **bottom, size_t *bytes);
extern "C" void __asan_poison_memory_region(const volatile void *p, size_t bytes);
extern "C" void __asan_unpoison_memory_region(const volatile void *p, size_t bytes);
enum { STACK_BYTES = 1 << 20 };                       /* a report is written on the fiber */
#else
enum { STACK_BYTES = 256 << 10 };
#endif
enum { PAGE = 4096, WARPS = EMU_THREADS_MAX / 32 };

struct emu_thread *emu_self;
uint3 emu_block_index;
dim3 emu_block_dim, emu_grid_dim;

/* ---- fibers ---- */

struct fiber {
    void *sp;
    char *stack;
    size_t bytes;
    void *fake;                                       /* AddressSanitizer's */
    struct fiber *next;                               /* in the list of free ones */
};
static struct fiber host, *here = &host, *idle;
static struct fiber fibers[EMU_THREADS_MAX];
static int fibers_made;

extern "C" __attribute__((visibility("hidden"))) void emu_switch(void **leave, void *enter);
asm(".text\n"
    ".hidden emu_switch\n"
    ".globl emu_switch\n"
    ".type emu_switch, @function\n"
    "emu_switch:\n"
    "    pushq %rbp\n    pushq %rbx\n    pushq %r12\n    pushq %r13\n    pushq %r14\n    pushq %r15\n"
    "    movq %rsp, (%rdi)\n"
    "    movq %rsi, %rsp\n"
    "    popq %r15\n    popq %r14\n    popq %r13\n    popq %r12\n    popq %rbx\n    popq %rbp\n"
    "    ret\n"
    ".size emu_switch, .-emu_switch\n");

static void arrive(void) {
#ifdef EMU_ASAN
    const void *bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(here->fake, &bottom, &bytes);
    if (!host.stack) { host.stack = (char *)bottom; host.bytes = bytes; }
#endif
}
static void go(struct fiber *to) {
    struct fiber *from = here;
    here = to;
#ifdef EMU_ASAN
    __sanitizer_start_switch_fiber(&from->fake, to->stack, to->bytes);
#endif
    emu_switch(&from->sp, to->sp);
    arrive();
}
static void worker(void);
static struct fiber *fiber_free(void) {
    struct fiber *f = idle;
    if (f) {
        idle = f->next;
        return f;
    }
    f = &fibers[fibers_made++];
    char *map = (char *)mmap(nullptr, STACK_BYTES + PAGE, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) emu_die(__FILE__, __LINE__, "no memory for a thread's stack");
    mprotect(map, PAGE, PROT_NONE);
    f->stack = map + PAGE;
    f->bytes = STACK_BYTES;
    /* Stacks a power of two apart would all lie in the same lines of the cache. */
    void **top = (void **)(f->stack + STACK_BYTES - fibers_made % 128 * 256);
    top[-2] = (void *)worker;                         /* `ret` leaves rsp % 16 == 8, as a call */
    f->sp = top - 8;
    return f;
}
/* ---- who goes on ---- */

struct wait { const char *what, *file; int line; unsigned mask; unsigned bytes; };
static const struct emu_launch *launch;
static struct emu_thread threads[EMU_THREADS_MAX];
static struct fiber *fiber_of[EMU_THREADS_MAX];       /* NULL: has not begun */
static struct wait waits[EMU_THREADS_MAX];            /* what NULL: does not wait */
static uint64_t runnable[EMU_THREADS_MAX / 64];
static int alive, count, words;                       /* threads left, of the block, / 64 */

static enum { FORWARD, REVERSE, RANDOM } order;
static uint64_t random_state;
static uint64_t draw(void) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}
static void order_read(void) {
    const char *s = getenv("EMU_SCHED");
    if (!s || !*s || !strcmp(s, "fwd")) order = FORWARD;
    else if (!strcmp(s, "rev")) order = REVERSE;
    else if (!strncmp(s, "rand:", 5)) order = RANDOM;
    else emu_die(__FILE__, __LINE__, "EMU_SCHED is '%s': fwd, rev or rand:N", s);
    if (order == RANDOM && !random_state)
        random_state = 0x9e3779b97f4a7c15u * (2 * strtoul(s + 5, nullptr, 10) + 1);
}
static void runnable_set(int t) { runnable[t / 64] |= (uint64_t)1 << (t % 64); }
static int take(int word, int bit) {
    runnable[word] &= ~((uint64_t)1 << bit);
    return word * 64 + bit;
}
static int pick_random(void) {
    int start = (int)(draw() % (unsigned)words), turn = (int)(draw() % 64);
    for (int i = 0; i < words; i++) {
        int w = (start + i) % words;
        uint64_t v = runnable[w], turned = turn ? v >> turn | v << (64 - turn) : v;
        if (v) return take(w, (__builtin_ctzll(turned) + turn) % 64);
    }
    return -1;
}
static int pick(void) {                               /* and takes it; -1: nobody can go on */
    if (order == RANDOM) return pick_random();
    if (order == REVERSE) {
        for (int w = words - 1; w >= 0; w--)
            if (runnable[w]) return take(w, 63 - __builtin_clzll(runnable[w]));
        return -1;
    }
    for (int w = 0; w < words; w++)
        if (runnable[w]) return take(w, __builtin_ctzll(runnable[w]));
    return -1;
}

static void say(const char *text, ...) __attribute__((format(printf, 1, 2)));
static void say(const char *text, ...) {
    char line[1024];
    va_list ap;
    va_start(ap, text);
    int n = vsnprintf(line, sizeof line, text, ap);
    va_end(ap);
    if (n > (int)sizeof line - 1) n = (int)sizeof line - 1;
    if (write(2, line, (size_t)n) < 0) abort();
}
const char *emu_where(void) {
    static char text[256];
    text[0] = 0;
    if (!launch || !emu_self) return text;
    snprintf(text, sizeof text, " [kernel '%.100s', block %u,%u,%u, thread %u,%u,%u]", launch->name,
             emu_block_index.x, emu_block_index.y, emu_block_index.z, emu_self->index.x,
             emu_self->index.y, emu_self->index.z);
    return text;
}
void emu_die(const char *file, int line, const char *text, ...) {
    char words[768];
    va_list ap;
    va_start(ap, text);
    vsnprintf(words, sizeof words, text, ap);
    va_end(ap);
    say("emu: %s:%d: %s%s\n", file, line, words, emu_where());
    abort();
}
static bool same_wait(int a, int b) {
    return waits[a].what == waits[b].what && waits[a].line == waits[b].line &&
           waits[a].file == waits[b].file && waits[a].mask == waits[b].mask;
}
[[noreturn]] static void deadlock(void) {
    int n = count;
    say("emu: deadlock: no thread of the block can go on%s\n", emu_where());
    for (int a = 0, b; a < n; a = b) {
        for (b = a + 1; b < n && same_wait(a, b); b++) {}
        if (!waits[a].what) continue;
        say("emu:   threads %d to %d wait at %s:%d in %s", a, b - 1, waits[a].file, waits[a].line,
            waits[a].what);
        if (waits[a].mask) say(" with mask 0x%08x", waits[a].mask);
        say("\n");
    }
    abort();
}

static void leave_warp(int lane);
static void barrier_check(void);
static void begin(int t) {
    emu_self = &threads[t];
    waits[t].what = nullptr;
}
static void worker(void) {
    arrive();
    for (;;) {
        launch->run(launch->args);
        int done = emu_self->id;
        fiber_of[done] = nullptr;
        alive--;
        leave_warp(done);
        barrier_check();
        int t = pick();
        if (t < 0 && alive) deadlock();
        struct fiber *to = t < 0 ? &host : fiber_of[t];
        if (t >= 0) begin(t);
        if (to) {
            here->next = idle;
            idle = here;
            go(to);                                   /* comes back for a thread that begins */
        }
        fiber_of[emu_self->id] = here;
    }
}
/* Lets others run until this thread is runnable again and its turn comes. */
static void yield(void) {
    int self = emu_self->id, t = pick();
    if (t < 0) deadlock();
    if (t == self) {
        begin(t);
        return;
    }
    begin(t);
    struct fiber *to = fiber_of[t];
    if (!to) to = fiber_of[t] = fiber_free();
    go(to);
}

/* ---- the block's barrier ---- */

static struct { int arrived, votes, result; const char *file; int line, first; } barrier;

static void barrier_check(void) {                     /* whether all who are left have come */
    if (!barrier.arrived || barrier.arrived < alive) return;
    for (int t = 0; t < count; t++)
        if (waits[t].what && !waits[t].mask) runnable_set(t);
    barrier.result = barrier.votes;
    barrier.arrived = barrier.votes = 0;
    emu_race_barrier();
}
int emu_barrier(bool vote, const char *file, int line) {
    int self = emu_self->id;
    if (barrier.arrived && (barrier.line != line || strcmp(barrier.file, file)))
        emu_die(file, line, "divergent barrier: thread %d is here, thread %d waits at %s:%d", self,
                barrier.first, barrier.file, barrier.line);
    if (!barrier.arrived++) {
        barrier.file = file;
        barrier.line = line;
        barrier.first = self;
    }
    barrier.votes += vote;
    waits[self] = { "__syncthreads", file, line, 0, 0 };
    barrier_check();
    yield();
    return barrier.result;
}

/* ---- the warp's operations ---- */

static struct { unsigned live, arrived; unsigned char data[32 * 16]; } warps[WARPS];

static void leave_warp(int t) {
    unsigned w = (unsigned)t / 32, bit = 1u << (t % 32);
    warps[w].live &= ~bit;
    for (unsigned rest = warps[w].arrived; rest; rest &= rest - 1) {
        const struct wait *o = &waits[w * 32 + (unsigned)__builtin_ctz(rest)];
        if (o->mask & bit)
            emu_die(o->file, o->line, "%s: mask 0x%08x names lane %d, which ends without coming",
                    o->what, o->mask, t % 32);
    }
}
static void exchange_check(unsigned w, int lane, const struct wait *now) {
    unsigned gone = now->mask & ~warps[w].live;
    if (!(now->mask >> lane & 1))
        emu_die(now->file, now->line, "%s: lane %d calls, but mask 0x%08x does not name it",
                now->what, lane, now->mask);
    if (gone)
        emu_die(now->file, now->line, "%s: mask 0x%08x names lane %d, which has left or never was",
                now->what, now->mask, __builtin_ctz(gone));
    unsigned rest = warps[w].arrived;
    for (const struct wait *o; rest; rest &= ~o->mask) {   /* those of one mask agree already */
        int i = __builtin_ctz(rest);
        o = &waits[w * 32 + (unsigned)i];
        if (!(o->mask & now->mask)) continue;
        if (o->mask != now->mask || o->bytes != now->bytes || strcmp(o->what, now->what))
            emu_die(now->file, now->line,
                    "%s of %u bytes with mask 0x%08x, but lane %d waits at %s:%d in %s of %u bytes "
                    "with mask 0x%08x",
                    now->what, now->bytes, now->mask, i, o->file, o->line, o->what, o->bytes,
                    o->mask);
    }
}
const unsigned char *emu_exchange(unsigned mask, const char *what, const void *data, size_t bytes,
                                  const char *file, int line) {
    int self = emu_self->id, lane = self % 32;
    unsigned w = (unsigned)self / 32;
    struct wait now = { what, file, line, mask, (unsigned)bytes };
    exchange_check(w, lane, &now);
    waits[self] = now;
    memcpy(warps[w].data + (size_t)lane * bytes, data, bytes);
    warps[w].arrived |= 1u << lane;
    if ((warps[w].arrived & mask) == mask) {
        for (unsigned rest = mask; rest; rest &= rest - 1) {
            unsigned t = w * 32 + (unsigned)__builtin_ctz(rest);
            memcpy(threads[t].got, warps[w].data, 32 * bytes);
            runnable_set((int)t);
        }
        warps[w].arrived &= ~mask;
        if (!bytes) emu_race_warp((int)w, mask);      /* a shuffle orders no memory */
    }
    yield();
    return emu_self->got;
}
void emu_syncwarp(unsigned mask, const char *file, int line) {
    emu_exchange(mask, "__syncwarp", nullptr, 0, file, line);
}
#ifndef EMU_RACE
void emu_atomic(const void *, size_t) {}
#endif

/* ---- a launch ---- */

bool emu_private(const void *p) {
    const char *c = (const char *)p, *args = (const char *)launch->args;
    if (c >= here->stack && c < here->stack + here->bytes) return true;
    return c >= args && c < args + launch->args_bytes;
}
static char *dyn, *dyn_end;                           /* dyn_end is an unmapped page */
static size_t dyn_body(void) { return (launch->smem + 127) / 128 * 128; }
void *emu_dyn_shared(void) { return dyn_end - dyn_body(); }
bool emu_shared(const void *p, char **first, size_t *bytes) {
    const char *c = (const char *)p;
    char *d = dyn_end - dyn_body();
    bool is_static = c >= launch->shared && c < launch->shared_end;
    *first = is_static ? launch->shared : d;
    *bytes = is_static ? (size_t)(launch->shared_end - launch->shared) : launch->smem;
    return is_static || (c >= d && c < d + launch->smem);
}
static void fill(char *p, char *end) {                /* no memset: AddressSanitizer watches that */
    for (; p < end && (uintptr_t)p % 8; p++) *p = (char)0xff;
    for (; p + 8 <= end; p += 8) *(uint64_t *)p = ~(uint64_t)0;
    for (; p < end; p++) *p = (char)0xff;
}
static void shared_fill(void) {
    if (!dyn) {
        dyn = (char *)mmap(nullptr, (228 << 10) + PAGE, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (dyn == MAP_FAILED) emu_die(__FILE__, __LINE__, "no memory for shared memory");
        dyn_end = dyn + (228 << 10);
        mprotect(dyn_end, PAGE, PROT_NONE);
    }
    char *d = (char *)emu_dyn_shared();
#ifdef EMU_ASAN
    __asan_poison_memory_region(dyn, 228 << 10);
    __asan_unpoison_memory_region(d, launch->smem);
#endif
    fill(launch->shared, launch->shared_end);
    fill(d, d + launch->smem);
}
static void block_run(uint64_t index) {
    dim3 g = launch->grid, b = launch->block;
    int n = count = (int)(b.x * b.y * b.z);
    words = (n + 63) / 64;
    emu_block_index = { (unsigned)(index % g.x), (unsigned)(index / g.x % g.y),
                        (unsigned)(index / g.x / g.y) };
    shared_fill();
    emu_race_block();
    for (int t = 0; t < n; t++) {
        unsigned u = (unsigned)t;
        threads[t].id = t;
        threads[t].index = { u % b.x, u / b.x % b.y, u / b.x / b.y };
        runnable_set(t);
    }
    for (int w = 0; w < WARPS; w++) {
        int lanes = n - w * 32;
        warps[w].live = lanes >= 32 ? ~0u : lanes > 0 ? (1u << lanes) - 1 : 0;
        warps[w].arrived = 0;
    }
    alive = n;
    barrier.arrived = barrier.votes = 0;
    int first = pick();
    begin(first);
    fiber_of[first] = fiber_free();
    go(fiber_of[first]);                              /* comes back when all have ended */
    emu_self = nullptr;
}
void emu_run(const struct emu_launch *l, int device) {
    uint64_t blocks = (uint64_t)l->grid.x * l->grid.y * l->grid.z, start = 0, step = 1;
    order_read();
    launch = l;
    emu_race_launch(device);
    emu_grid_dim = l->grid;
    emu_block_dim = l->block;
    if (order == REVERSE) { start = blocks - 1; step = blocks - 1; }
    if (order == RANDOM) {
        start = draw() % blocks;
        while (blocks > 1 && std::gcd(step = draw() % blocks, blocks) != 1) {}
    }
    for (uint64_t i = 0, at = start; i < blocks; i++, at = (at + step) % blocks) block_run(at);
    launch = nullptr;
}
