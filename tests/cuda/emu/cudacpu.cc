/* cudacpu.cc - devices and memory of the emulated CUDA runtime, and how it speaks of errors.
 *
 * Device memory is this process's memory, filled with 0xFF (a NaN in every float format) and ended
 * by an unmapped page; under AddressSanitizer it comes from malloc. Every copy is checked against
 * the list of buffers. EMU_DEVICES=n devices (default 2), of which CUDA_VISIBLE_DEVICES chooses.
 * EMU_PROTECT=1: device memory can be touched only by kernels and copies.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/cuda/emu/emu.h"

#include <map>
#include <mutex>
#include <new>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <vector>

static thread_local cudaError_t last_error;
static thread_local int current;

cudaError_t emu_error(cudaError_t code, const char *text, ...) {
    char line[1024];
    va_list ap;
    va_start(ap, text);
    vsnprintf(line, sizeof line, text, ap);
    va_end(ap);
    fprintf(stderr, "emu: %s (%s)\n", line, cudaGetErrorName(code));
    return last_error = code;
}
int emu_setting(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text && *text ? (int)strtol(text, nullptr, 10) : otherwise;
}

/* ---- devices ---- */

enum { DEVICE_BYTES = 1 << 30 };
static const std::vector<int> &visible(void) {
    static const std::vector<int> list = [] {
        std::vector<int> out;
        int n = emu_setting("EMU_DEVICES", 2);
        const char *wanted = getenv("CUDA_VISIBLE_DEVICES");
        if (!wanted)
            for (int i = 0; i < n; i++) out.push_back(i);
        for (const char *p = wanted; p && *p;) {
            char *end;
            long i = strtol(p, &end, 10);
            if (end == p || i < 0 || i >= n) break;   /* CUDA stops at the first that is none */
            out.push_back((int)i);
            p = *end == ',' ? end + 1 : end;
            if (*end && *end != ',') break;
        }
        return out;
    }();
    return list;
}

extern "C" cudaError_t cudaGetDeviceCount(int *n) {
    *n = (int)visible().size();
    return *n ? cudaSuccess : (last_error = cudaErrorNoDevice);
}
extern "C" cudaError_t cudaSetDevice(int i) {
    if (i < 0 || i >= (int)visible().size())
        return emu_error(cudaErrorInvalidDevice, "cudaSetDevice(%d): there are %zu", i,
                         visible().size());
    current = i;
    return cudaSuccess;
}
extern "C" cudaError_t cudaGetDevice(int *i) {
    *i = current;
    return visible().empty() ? (last_error = cudaErrorNoDevice) : cudaSuccess;
}
extern "C" cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int i) {
    if (i < 0 || i >= (int)visible().size())
        return emu_error(cudaErrorInvalidDevice, "cudaGetDeviceProperties of device %d", i);
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "emulated GPU %d", visible()[(size_t)i]);
    p->totalGlobalMem = DEVICE_BYTES;
    p->major = 9;
    p->multiProcessorCount = 2;
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->sharedMemPerBlock = 48 << 10;
    p->sharedMemPerBlockOptin = 227 << 10;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->unifiedAddressing = 1;
    p->pciBusID = visible()[(size_t)i] + 1;
    return cudaSuccess;
}
extern "C" cudaError_t cudaDeviceGetAttribute(int *out, enum cudaDeviceAttr a, int i) {
    if (i < 0 || i >= (int)visible().size()) return last_error = cudaErrorInvalidDevice;
    switch (a) {
    case cudaDevAttrComputeCapabilityMajor: *out = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *out = 0; break;
    case cudaDevAttrMultiProcessorCount: *out = 2; break;
    case cudaDevAttrWarpSize: *out = 32; break;
    case cudaDevAttrMaxThreadsPerBlock: *out = 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *out = 48 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *out = 227 << 10; break;
    case cudaDevAttrPciBusId: *out = visible()[(size_t)i] + 1; break;
    default: return emu_error(cudaErrorNotSupported, "cudaDeviceGetAttribute %d: not emulated", a);
    }
    return cudaSuccess;
}
extern "C" cudaError_t cudaDriverGetVersion(int *v) { *v = CUDART_VERSION; return cudaSuccess; }
extern "C" cudaError_t cudaRuntimeGetVersion(int *v) { *v = CUDART_VERSION; return cudaSuccess; }
extern "C" cudaError_t cudaDeviceCanAccessPeer(int *can, int, int) { *can = 1; return cudaSuccess; }
extern "C" cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
extern "C" cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *) {
    memset(a, 0, sizeof *a);                          /* every kernel is there */
    a->maxThreadsPerBlock = 1024;
    return cudaSuccess;
}

/* ---- errors ---- */

extern "C" cudaError_t cudaGetLastError(void) {
    cudaError_t e = last_error;
    last_error = cudaSuccess;
    return e;
}
extern "C" cudaError_t cudaPeekAtLastError(void) { return last_error; }
static const struct { cudaError_t code; const char *name, *text; } errors[] = {
    { cudaSuccess, "cudaSuccess", "no error" },
    { cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument" },
    { cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory" },
    { cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration",
      "invalid configuration argument" },
    { cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected" },
    { cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal" },
    { cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle",
      "invalid resource handle" },
    { cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction",
      "invalid device function" },
    { cudaErrorInvalidMemcpyDirection, "cudaErrorInvalidMemcpyDirection",
      "invalid copy direction for memcpy" },
    { cudaErrorNotReady, "cudaErrorNotReady", "device not ready" },
    { cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported" },
    { cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
      "operation not permitted when stream is capturing" },
    { cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated",
      "operation failed due to a previous error during capture" },
    { cudaErrorIllegalState, "cudaErrorIllegalState",
      "the operation cannot be performed in the present state" },
};
extern "C" const char *cudaGetErrorName(cudaError_t code) {
    for (const auto &e : errors)
        if (e.code == code) return e.name;
    return "cudaErrorOfAnotherKind";
}
extern "C" const char *cudaGetErrorString(cudaError_t code) {
    for (const auto &e : errors)
        if (e.code == code) return e.text;
    return "an error that the emulator has no text for";
}

/* ---- memory ---- */

enum kind { DEVICE, PINNED };
struct buffer {
    size_t bytes;
    enum kind kind;
    int device;
    char *map;
    size_t map_bytes;
};
static std::mutex lock;
static std::map<char *, buffer> buffers;              /* by first byte */
static size_t used[64];

static const std::pair<char *const, buffer> *find(const void *p) {
    auto it = buffers.upper_bound((char *)p);
    if (it == buffers.begin()) return nullptr;
    --it;
    return (char *)p < it->first + it->second.bytes ? &*it : nullptr;
}
static cudaError_t memory(void **out, size_t bytes, enum kind kind) {
    std::lock_guard<std::mutex> hold(lock);
    if (visible().empty()) return last_error = cudaErrorNoDevice;
    *out = nullptr;
    if (!bytes) return cudaSuccess;
    if (kind == DEVICE && used[current] + bytes > DEVICE_BYTES)
        return last_error = cudaErrorMemoryAllocation;
    size_t page = 4096, body = (bytes + 255) / 256 * 256, map = (body + page - 1) / page * page;
    char *at = (char *)mmap(nullptr, map + page, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) return last_error = cudaErrorMemoryAllocation;
    mprotect(at + map, page, PROT_NONE);
    char *p = at + map - body;
    memset(p, 0xff, body);
    buffers[p] = { bytes, kind, current, at, map + page };
    if (kind == DEVICE) used[current] += bytes;
    *out = p;
    return cudaSuccess;
}
static cudaError_t drop(void *p, enum kind kind) {
    std::lock_guard<std::mutex> hold(lock);
    auto it = buffers.find((char *)p);
    if (!p) return cudaSuccess;
    if (it == buffers.end() || it->second.kind != kind)
        return emu_error(cudaErrorInvalidValue, "free of %p, which is no such buffer", p);
    if (kind == DEVICE) used[it->second.device] -= it->second.bytes;
    munmap(it->second.map, it->second.map_bytes);
    buffers.erase(it);
    return cudaSuccess;
}
extern "C" cudaError_t cudaMalloc(void **out, size_t bytes) { return memory(out, bytes, DEVICE); }
extern "C" cudaError_t cudaFree(void *p) {
    cudaDeviceSynchronize();
    return drop(p, DEVICE);
}
extern "C" cudaError_t cudaMallocHost(void **out, size_t bytes) {
    return memory(out, bytes, PINNED);
}
extern "C" cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned) {
    return memory(out, bytes, PINNED);
}
extern "C" cudaError_t cudaFreeHost(void *p) {
    cudaDeviceSynchronize();
    return drop(p, PINNED);
}
extern "C" cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    std::lock_guard<std::mutex> hold(lock);
    *total = DEVICE_BYTES;
    *free_bytes = DEVICE_BYTES - used[current];
    return cudaSuccess;
}

/* ---- copies ---- */

/* Why [p, p + bytes) is not what the copy needs there; NULL when it is. */
static const char *unfit(const void *p, size_t bytes, bool on_device) {
    std::lock_guard<std::mutex> hold(lock);
    const auto *b = find(p);
    if (on_device && !(b && b->second.kind == DEVICE)) return "is no device memory";
    if (!on_device && b && b->second.kind == DEVICE) return "is device memory";
    if (b && (char *)p + bytes > b->first + b->second.bytes) return "ends past its buffer";
    return nullptr;
}
static cudaError_t check(const char *what, const void *p, size_t bytes, bool on_device) {
    const char *why = unfit(p, bytes, on_device);
    return why ? emu_error(cudaErrorInvalidValue, "copy of %zu bytes: the %s, %p, %s", bytes, what,
                           p, why)
               : cudaSuccess;
}
struct copy { void *to; const void *from; size_t bytes; int value; char *staged; };
static void copy_run(void *a) {
    struct copy *c = (struct copy *)a;
    if (c->from) memmove(c->to, c->from, c->bytes);
    else memset(c->to, c->value, c->bytes);
}
static void copy_drop(void *a) {
    struct copy *c = (struct copy *)a;
    delete[] c->staged;
    delete c;
}
static cudaError_t queue(struct copy *c, cudaStream_t stream) {
    struct emu_work w = {};
    w.launch.name = c->from ? "copy" : "fill";
    w.launch.run = copy_run;
    w.launch.drop = copy_drop;
    w.launch.args = c;
    w.device = current;
    return emu_queue(stream, &w);
}
static bool is(const void *p, enum kind kind) {
    std::lock_guard<std::mutex> hold(lock);
    const auto *b = find(p);
    return b && b->second.kind == kind;
}
extern "C" cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes,
                                       enum cudaMemcpyKind kind, cudaStream_t stream) {
    if (!bytes) return cudaSuccess;
    if (kind == cudaMemcpyDefault) {
        static const cudaMemcpyKind kinds[2][2] = { { cudaMemcpyHostToHost, cudaMemcpyHostToDevice },
                                                    { cudaMemcpyDeviceToHost,
                                                      cudaMemcpyDeviceToDevice } };
        kind = kinds[is(from, DEVICE)][is(to, DEVICE)];
    }
    bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    cudaError_t e = check("target", to, bytes, to_device);
    if (!e) e = check("source", from, bytes, from_device);
    if (e) return e;
    struct copy *c = new copy{ to, from, bytes, 0, nullptr };
    /* As CUDA: the bytes of pageable memory are taken at the call, and given before it returns. */
    if (!from_device && !is(from, PINNED) && emu_deferred()) {
        c->staged = new char[bytes];
        memcpy(c->staged, from, bytes);
        c->from = c->staged;
    }
    e = queue(c, stream);
    if (!e && !to_device && !is(to, PINNED)) e = cudaStreamSynchronize(stream);
    return e;
}
extern "C" cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes,
                                  enum cudaMemcpyKind kind) {
    cudaError_t e = cudaMemcpyAsync(to, from, bytes, kind, nullptr);
    return e ? e : cudaStreamSynchronize(nullptr);
}
extern "C" cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
    if (!bytes) return cudaSuccess;
    cudaError_t e = check("target", to, bytes, true);
    return e ? e : queue(new copy{ to, nullptr, bytes, value, nullptr }, stream);
}
extern "C" cudaError_t cudaMemset(void *to, int value, size_t bytes) {
    return cudaMemsetAsync(to, value, bytes, nullptr);
}

/* ---- launches ---- */

void emu_submit(const struct emu_launch *l, cudaStream_t stream) {
    struct emu_work w = { *l, current };
    emu_queue(stream, &w);
}
