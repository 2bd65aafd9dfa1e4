/* sched.cc - one thread after another. SPDX-License-Identifier: Apache-2.0 */
#include "tests/cuda/emu/emu.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

struct emu_thread *emu_self;
uint3 emu_block_index;
dim3 emu_block_dim, emu_grid_dim;
static struct emu_thread threads[1024];
alignas(128) static char dyn[228 << 10];

void *emu_dyn_shared(void) { return dyn; }
void emu_die(const char *file, int line, const char *text, ...) {
    va_list ap;
    va_start(ap, text);
    fprintf(stderr, "emu: %s:%d: ", file, line);
    vfprintf(stderr, text, ap);
    fputc('\n', stderr);
    va_end(ap);
    abort();
}
int emu_barrier(bool, const char *file, int line) { emu_die(file, line, "no barriers yet"); }
const struct emu_slot *emu_exchange(unsigned, const char *what, const void *, size_t,
                                    const char *file, int line) {
    emu_die(file, line, "no %s yet", what);
}
void emu_syncwarp(unsigned, const char *, int) {}
void emu_atomic(const void *, size_t) {}

void emu_run(const struct emu_launch *l) {
    dim3 g = l->grid, b = l->block;
    emu_grid_dim = g;
    emu_block_dim = b;
    int n = (int)(b.x * b.y * b.z);
    for (unsigned z = 0; z < g.z; z++)
        for (unsigned y = 0; y < g.y; y++)
            for (unsigned x = 0; x < g.x; x++) {
                emu_block_index = { x, y, z };
                memset(l->shared, 0xff, (size_t)(l->shared_end - l->shared));
                memset(dyn, 0xff, l->smem);
                for (int i = 0; i < n; i++) {
                    unsigned u = (unsigned)i;
                    emu_self = &threads[i];
                    emu_self->id = i;
                    emu_self->index = { u % b.x, u / b.x % b.y, u / b.x / b.y };
                    l->run(l->args);
                }
                emu_self = nullptr;
            }
}
