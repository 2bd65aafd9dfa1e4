/* stream.cc - when work runs. SPDX-License-Identifier: Apache-2.0 */
#include "tests/cuda/emu/emu.h"

#include <mutex>

struct CUstream_st { int device; };
static std::mutex running;

bool emu_deferred(void) { return false; }
cudaError_t emu_queue(cudaStream_t, const struct emu_work *w) {
    std::lock_guard<std::mutex> hold(running);
    if (w->launch.kernel) emu_run(&w->launch);
    else w->launch.run(w->launch.args);
    w->launch.drop(w->launch.args);
    return cudaSuccess;
}
extern "C" cudaError_t cudaStreamCreate(cudaStream_t *s) {
    *s = new CUstream_st{ 0 };
    return cudaSuccess;
}
extern "C" cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned) {
    return cudaStreamCreate(s);
}
extern "C" cudaError_t cudaStreamDestroy(cudaStream_t s) {
    delete s;
    return cudaSuccess;
}
extern "C" cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
extern "C" cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
extern "C" cudaError_t cudaDeviceSynchronize(void) { return cudaSuccess; }
