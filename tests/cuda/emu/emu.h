/* emu.h - what the parts of the emulator share; kernels do not see it.
 *   sched.cc     threads, barriers and warp operations of one launch
 *   cudacpu.cc   devices, memory, copies, errors
 *   stream.cc    streams, events, graphs: when work runs
 *   race.cc      who touched which byte; only in the build that looks for races
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef EMU_EMU_H
#define EMU_EMU_H
#include "tests/cuda/emu/cudacpu.h"

enum { EMU_THREADS_MAX = 1024, EMU_SHARED_MAX = 227 << 10, EMU_SHARED_PLAIN = 48 << 10 };

/* sched.cc: runs every thread of the launch on this OS thread; dies on what a GPU would hang on.
 * One launch at a time in a process: the caller holds the lock. */
void emu_run(const struct emu_launch *l, int device);
/* The running kernel, block and thread in words; "" outside kernels. */
const char *emu_where(void);
/* A thread's own: on its stack, or among the launch's arguments. */
bool emu_private(const void *p);
/* The running block's shared memory that p lies in: static or dynamic. */
bool emu_shared(const void *p, char **first, size_t *bytes);

/* stream.cc: hands work to a stream; it runs now or, with EMU_DEFER=1, when something waits. */
struct emu_work {
    struct emu_launch launch;                         /* no kernel: `run` alone, a copy */
    int device;
    /* Work that waits for other processes, or NULL: asked with launch.args until it says yes, then
     * it runs. Who only looks (a query, another launch) leaves it queued. */
    bool (*ready)(void *args);
};
cudaError_t emu_queue(cudaStream_t stream, const struct emu_work *w);
/* EMU_DEFER=1, or something is queued behind work that waits. */
bool emu_deferred(void);
/* An error when a stream of this process is being captured: `what` cannot be done then. */
cudaError_t emu_no_capture(const char *what);

/* cudacpu.cc */
/* One line to stderr, and the error that cudaGetLastError will give. */
cudaError_t emu_error(cudaError_t code, const char *text, ...)
    __attribute__((format(printf, 2, 3)));
int emu_setting(const char *name, int otherwise);     /* an integer of the environment */
int emu_devices(void);                                /* visible ones */
/* The device buffer around p: its device, first byte and size; false when there is none. */
bool emu_buffer(const void *p, int *device, char **first, size_t *bytes);
/* Around everything that may touch device memory; device -1 = all. EMU_PROTECT=1 acts on it. */
void emu_unlock(int device);
void emu_relock(void);
/* Dies when somebody wrote just before or behind a buffer. */
void emu_check_edges(void);

/* race.cc */
#ifdef EMU_RACE
void emu_race_launch(int device);
void emu_race_block(void);                            /* a block begins */
void emu_race_barrier(void);                          /* the whole block has met */
void emu_race_warp(int warp, unsigned mask);          /* these lanes have met */
void emu_race_forget(const void *buffer);             /* it is freed */
#else
inline void emu_race_launch(int) {}
inline void emu_race_block(void) {}
inline void emu_race_barrier(void) {}
inline void emu_race_warp(int, unsigned) {}
inline void emu_race_forget(const void *) {}
#endif
#endif
