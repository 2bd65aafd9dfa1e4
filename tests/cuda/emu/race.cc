/* race.cc - tells when two threads of a launch touch one byte, one of them writing, with nothing
 * between them that orders the two; also host memory, other devices' memory and misaligned access.
 *
 * The kernels are compiled with -fsanitize=thread, which puts a call before every access; those
 * calls end here instead of in a library. Every byte of device and shared memory has a cell with
 * its last write and its last reads. Within a block __syncthreads orders; within a warp __syncwarp
 * does (each lane knows how far it has seen the others); a shuffle does not, and between blocks
 * only the end of the launch does. Two atomics never race. Patterns that order by an atomic and a
 * fence ("the last block adds up") are not understood.
 * SPDX-License-Identifier: Apache-2.0 */
#ifdef EMU_RACE
#include "tests/cuda/emu/emu.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

struct access {
    uint32_t block;                                   /* counts blocks of all launches, from 1 */
    uint32_t meeting;                                 /* barriers of the block before it */
    uint32_t own;                                     /* the lane's clock */
    uint32_t pc;                                      /* from the start of the image */
    uint16_t thread;
    bool atomic;
};
struct cell {
    struct access write, read;                        /* read: the last one */
    uint32_t lanes;                                   /* of its warp that have read since */
    bool warps, blocks;                               /* other warps, other blocks have */
    bool split;                                       /* of a word: its bytes have their own */
};
/* A cell a word of four bytes, and where part of a word was touched, one a byte. */
struct region {
    const char *first;
    size_t bytes, map_bytes;
    struct cell *word, *byte;
    bool shared;
    int device;
};

static struct region regions[8192];
static int region_count;
static uint32_t block_now, launch_first = 1, meeting;
static int launch_device;
static uint32_t known[EMU_THREADS_MAX / 32][32][32];  /* [warp][lane][other]: the clock it has seen */

void emu_race_launch(int device) {
    launch_device = device;
    launch_first = block_now + 1;
}
void emu_race_block(void) {
    block_now++;
    meeting = 0;
    for (auto &warp : known)
        for (int a = 0; a < 32; a++)
            for (int b = 0; b < 32; b++) warp[a][b] = a == b;
}
void emu_race_barrier(void) { meeting++; }
void emu_race_warp(int warp, unsigned mask) {
    uint32_t all[32] = { 0 };
    for (int a = 0; a < 32; a++)
        for (int b = 0; b < 32 && (mask >> a & 1); b++)
            if (known[warp][a][b] > all[b]) all[b] = known[warp][a][b];
    for (int a = 0; a < 32; a++) {
        if (!(mask >> a & 1)) continue;
        memcpy(known[warp][a], all, sizeof all);
        known[warp][a][a]++;
    }
}
void emu_race_forget(const void *p) {
    for (int i = 0; i < region_count; i++) {
        if (regions[i].first != p) continue;
        munmap(regions[i].word, regions[i].map_bytes);
        regions[i] = regions[--region_count];
    }
}

/* ---- where an address belongs ---- */

/* Constants and tables of the plugin itself; the linker knows where it begins and ends. */
extern "C" __attribute__((visibility("hidden"))) char __ehdr_start[], _end[];
static bool in_image(const char *p) { return p >= __ehdr_start && p < _end; }
static struct region *region_add(const char *first, size_t bytes, bool shared, int device) {
    if (region_count == (int)(sizeof regions / sizeof *regions))
        emu_die(__FILE__, __LINE__, "more than %d buffers", region_count);
    size_t words = (bytes + 3) / 4, map_bytes = 5 * words * sizeof(struct cell);
    void *map = mmap(nullptr, map_bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) emu_die(__FILE__, __LINE__, "no memory to watch %zu bytes", bytes);
    struct cell *word = (struct cell *)map;
    regions[region_count] = { first, bytes, map_bytes, word, word + words, shared, device };
    return &regions[region_count++];
}
static bool inside(const struct region *r, const char *p) {
    return p >= r->first && p < r->first + r->bytes;
}
static struct region *region_of(const char *p) {
    static struct region *last;
    if (last && last < regions + region_count && inside(last, p)) return last;
    for (int i = 0; i < region_count; i++)
        if (inside(&regions[i], p)) return last = &regions[i];
    char *first;
    size_t bytes;
    int device;
    if (emu_shared(p, &first, &bytes)) return region_add(first, bytes, true, 0);
    if (in_image(p) || !emu_buffer(p, &device, &first, &bytes)) return nullptr;
    return region_add(first, bytes, false, device);
}

/* ---- the verdict ---- */

static void say_place(const char *who, const struct access *a) {
    Dl_info in;
    char command[512], line[512] = "";
    fprintf(stderr, "emu:   %s by thread %d of block %u of the launch", who, a->thread,
            a->block - launch_first);
    if (dladdr(__ehdr_start, &in)) {
        snprintf(command, sizeof command, "addr2line -e '%s' %#x 2>/dev/null", in.dli_fname,
                 a->pc - 1);
        FILE *f = popen(command, "r");
        if (f && fgets(line, sizeof line, f)) fprintf(stderr, " at %s", line);
        if (f) pclose(f);
    }
    if (!line[0]) fprintf(stderr, "\n");
}
[[noreturn]] static void race(const char *what, const struct access *before,
                              const struct access *now, const char *p) {
    fprintf(stderr, "emu: race: %s at %p%s\n", what, (const void *)p, emu_where());
    say_place("this access", now);
    say_place("the other", before);
    abort();
}
static bool ordered(const struct access *before, const struct access *now) {
    if (before->block != now->block) return false;
    if (before->meeting < now->meeting || before->thread == now->thread) return true;
    int w = now->thread / 32;
    return before->thread / 32 == w &&
           known[w][now->thread % 32][before->thread % 32] >= before->own;
}
static bool lives(const struct access *a, bool shared) {
    return a->block && (shared ? a->block == block_now : a->block >= launch_first);
}
static bool reads_ordered(const struct cell *c, const struct access *now) {
    if (c->blocks || c->read.block != now->block) return false;
    if (c->read.meeting < now->meeting) return true;
    if (c->warps || c->read.thread / 32 != now->thread / 32) return false;
    for (int i = 0; i < 32; i++) {
        struct access one = c->read;
        one.thread = (uint16_t)(c->read.thread / 32 * 32 + i);
        if ((c->lanes >> i & 1) && !ordered(&one, now)) return false;
    }
    return true;
}
static void note_read(struct cell *c, const struct access *now, bool shared) {
    bool fresh = !lives(&c->read, shared);
    bool same_block = !fresh && c->read.block == now->block;
    if (fresh) c->blocks = false;
    else if (!same_block) c->blocks = true;
    if (fresh || !same_block || c->read.meeting < now->meeting) {
        c->lanes = 0;
        c->warps = false;
    } else if (c->read.thread / 32 != now->thread / 32) {
        c->warps = true;
        c->lanes = 0;
    }
    uint32_t own = same_block && c->lanes && c->read.own > now->own ? c->read.own : now->own;
    c->read = *now;
    c->read.own = own;
    c->lanes |= 1u << (now->thread % 32);
}
static void check(struct cell *c, const struct access *now, bool write, bool shared,
                  const char *p) {
    const struct access *w = &c->write;
    if (lives(w, shared) && !(w->atomic && now->atomic) && !ordered(w, now))
        race(write ? "two threads write one byte" : "a thread reads what another writes", w, now,
             p);
    if (!write) {
        note_read(c, now, shared);
        return;
    }
    if (lives(&c->read, shared) && !reads_ordered(c, now))
        race("a thread writes what another reads", &c->read, now, p);
    c->write = *now;
    if (!now->atomic) c->read = {};                   /* what comes after it comes after those */
}
/* The bytes [at, at + 4) of a word that was split; a write makes it whole again. */
static void check_word(struct region *r, size_t at, const struct access *now, bool write) {
    struct cell *c = &r->word[at / 4];
    for (size_t i = 0; i < 4 && c->split; i++)
        check(&r->byte[at + i], now, write, r->shared, r->first + at + i);
    if (!c->split) check(c, now, write, r->shared, r->first + at);
    else if (write) *c = r->byte[at];
}
static void check_byte(struct region *r, size_t at, const struct access *now, bool write) {
    struct cell *c = &r->word[at / 4];
    for (size_t i = 0; i < 4 && !c->split; i++) r->byte[at / 4 * 4 + i] = *c;
    c->split = true;
    check(&r->byte[at], now, write, r->shared, r->first + at);
}
static void touch(const void *to, size_t bytes, bool write, bool atomic, bool aligned,
                  const void *pc) {
    const char *p = (const char *)to;
    if (!emu_self || emu_private(p)) return;
    int id = emu_self->id;
    struct access now = { block_now, meeting, known[id / 32][id % 32][id % 32],
                          (uint32_t)((const char *)pc - __ehdr_start), (uint16_t)id, atomic };
    struct region *r = region_of(p);
    const char *why = nullptr;
    if (!r && in_image(p) && !write) return;
    if (!r) why = "touches what is neither device nor shared memory";
    else if (p + bytes > r->first + r->bytes) why = "goes past the end of a buffer";
    else if (!r->shared && r->device != launch_device) why = "touches another device's memory";
    else if (aligned && (uintptr_t)p % bytes) why = "is not aligned to its size";
    if (why) {
        fprintf(stderr, "emu: access to %zu bytes at %p %s%s\n", bytes, to, why, emu_where());
        say_place("access", &now);
        abort();
    }
    size_t at = (size_t)(p - r->first), end = at + bytes;
    while (at < end)
        if (at % 4 == 0 && end - at >= 4) {
            check_word(r, at, &now, write);
            at += 4;
        } else check_byte(r, at++, &now, write);
}
void emu_atomic(const void *at, size_t bytes) {
    touch(at, bytes, true, true, true, __builtin_return_address(0));
}

/* ---- the calls that the compiler makes ---- */

#define HERE __builtin_return_address(0)
#define HOOKS(n)                                                                               \
    extern "C" void __tsan_read##n(void *p) { touch(p, n, false, false, true, HERE); }         \
    extern "C" void __tsan_write##n(void *p) { touch(p, n, true, false, true, HERE); }         \
    extern "C" void __tsan_volatile_read##n(void *p) { touch(p, n, false, false, true, HERE); } \
    extern "C" void __tsan_volatile_write##n(void *p) { touch(p, n, true, false, true, HERE); }
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
#define HOOKS_LOOSE(n)                                                                             \
    extern "C" void __tsan_unaligned_read##n(void *p) { touch(p, n, false, false, false, HERE); }  \
    extern "C" void __tsan_unaligned_write##n(void *p) { touch(p, n, true, false, false, HERE); }
HOOKS_LOOSE(2) HOOKS_LOOSE(4) HOOKS_LOOSE(8) HOOKS_LOOSE(16)
extern "C" void __tsan_read_range(void *p, size_t n) { touch(p, n, false, false, false, HERE); }
extern "C" void __tsan_write_range(void *p, size_t n) { touch(p, n, true, false, false, HERE); }
extern "C" void __tsan_init(void) {}
extern "C" void __tsan_vptr_update(void **, void *) {}
extern "C" void __tsan_vptr_read(void **) {}
#endif
