/* emu.h - what the parts of the emulator share; kernels do not see it.
 *   sched.cc     threads, barriers, warp operations of one launch
 *   cudacpu.cc   devices, memory, copies, errors
 *   stream.cc    streams, events, graphs: when work runs
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef EMU_EMU_H
#define EMU_EMU_H
#include "tests/cuda/emu/cudacpu.h"

/* sched.cc: runs every thread of the launch; dies on what a GPU would hang on. */
void emu_run(const struct emu_launch *l);

/* stream.cc: hands work to a stream; it runs now or, with EMU_DEFER=1, when something waits. */
struct emu_work {
    struct emu_launch launch;                         /* kernel, or run alone when kernel is NULL */
    int device;
};
cudaError_t emu_queue(cudaStream_t stream, const struct emu_work *w);
bool emu_deferred(void);

/* cudacpu.cc: one line to stderr, and the error that cudaGetLastError will give. */
cudaError_t emu_error(cudaError_t code, const char *text, ...)
    __attribute__((format(printf, 2, 3)));
int emu_setting(const char *name, int otherwise);     /* an integer of the environment */
#endif
