/* cudacpu.cc - devices and memory of the emulated CUDA runtime, and how it speaks of errors.
 *
 * Device memory is this process's memory, filled with 0xFF (a NaN in every float format) and ended
 * by an unmapped page; under AddressSanitizer it comes from malloc. Every copy is checked against
 * the list of buffers. EMU_DEVICES=n devices (default 2), of which CUDA_VISIBLE_DEVICES chooses.
 * EMU_MEMORY_MB=n on each (default 2048).
 * EMU_PROTECT=1: device memory can be touched only by kernels of its device and by copies.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/cuda/emu/emu.h"

#include <map>
#include <mutex>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
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

enum { CUDA_DEVICES = 64 };
static size_t device_bytes(void) { return (size_t)emu_setting("EMU_MEMORY_MB", 2048) << 20; }
static const std::vector<int> &visible(void) {
    static const std::vector<int> list = [] {
        std::vector<int> out;
        int n = emu_setting("EMU_DEVICES", 2);
        if (n > CUDA_DEVICES) n = CUDA_DEVICES;
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

int emu_devices(void) { return (int)visible().size(); }
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
    p->totalGlobalMem = device_bytes();
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
    { cudaErrorIllegalAddress, "cudaErrorIllegalAddress",
      "an illegal memory access was encountered" },
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
    char *map;                                        /* up to the unmapped page */
    size_t map_bytes;
};
static std::mutex lock;
static std::map<char *, buffer> buffers;              /* by first byte */
static size_t used[CUDA_DEVICES];
static bool protecting;
enum { PAGE = 4096, EDGE = 0xff };

static const std::pair<char *const, buffer> *find(const void *p) {
    auto it = buffers.upper_bound((char *)p);
    if (it == buffers.begin()) return nullptr;
    --it;
    return (char *)p < it->first + it->second.bytes ? &*it : nullptr;
}
bool emu_buffer(const void *p, int *device, char **first, size_t *bytes) {
    std::unique_lock<std::mutex> hold(lock, std::try_to_lock);
    const auto *b = hold ? find(p) : nullptr;
    if (!b || b->second.kind != DEVICE) return false;
    *device = b->second.device;
    *first = b->first;
    *bytes = b->second.bytes;
    return true;
}

#ifdef EMU_ASAN
/* malloc, whose ends AddressSanitizer guards to the byte. */
static char *map_new(struct buffer *b) {
    void *p = nullptr;
    if (posix_memalign(&p, 256, b->bytes)) return nullptr;
    memset(p, 0xff, b->bytes);
    b->map = (char *)p;
    return b->map;
}
static void map_drop(const struct buffer *b) { free(b->map); }
static void map_guard(const struct buffer *, int) {}
static void edge_check(const char *, const struct buffer *) {}
static void watch_faults(void) {}
#else
static char *map_new(struct buffer *b) {
    size_t body = (b->bytes + 255) / 256 * 256, map = (body + PAGE - 1) / PAGE * PAGE;
    char *at = (char *)mmap(nullptr, map + PAGE, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) return nullptr;
    mprotect(at + map, PAGE, PROT_NONE);
    memset(at, EDGE, map);
    b->map = at;
    b->map_bytes = map;
    return at + map - body;
}
static void map_drop(const struct buffer *b) { munmap(b->map, b->map_bytes + PAGE); }
static void map_guard(const struct buffer *b, int how) { mprotect(b->map, b->map_bytes, how); }
static void edge_check(const char *p, const struct buffer *b) {
    const char *end = b->map + b->map_bytes, *first = p - b->map > 256 ? p - 256 : b->map;
    for (const char *c = first; c < end; c++) {
        if (c == p) c += b->bytes;
        if (c < end && *c != (char)EDGE)
            emu_die(__FILE__, __LINE__, "something wrote %zu bytes %s the %zu bytes at %p",
                    c < p ? (size_t)(p - c) : (size_t)(c - p) - b->bytes,
                    c < p ? "before" : "behind", b->bytes, (const void *)p);
    }
}
/* Says what the bad address belongs to, then lets the fault happen again. */
static struct sigaction fault_before;
static void fault(int, siginfo_t *info, void *) {
    char line[512], *first, *at = (char *)info->si_addr;
    int device;
    size_t bytes;
    const char *who = emu_self ? "kernel" : "host";
    if (info->si_code == SI_KERNEL && emu_self)
        snprintf(line, sizeof line, "emu: kernel touches an address not aligned to its type%s\n",
                 emu_where());
    else if (emu_buffer(at, &device, &first, &bytes))
        snprintf(line, sizeof line, "emu: %s touches memory of device %d, which it may not%s\n",
                 who, device, emu_where());
    else if (emu_buffer(at - PAGE, &device, &first, &bytes) ||
             emu_buffer(at - 256, &device, &first, &bytes))
        snprintf(line, sizeof line, "emu: %s touches byte %zu of a buffer of %zu bytes%s\n", who,
                 (size_t)(at - first), bytes, emu_where());
    else if (emu_self)
        snprintf(line, sizeof line, "emu: kernel touches %p, which is no buffer%s\n", (void *)at,
                 emu_where());
    else line[0] = 0;
    if (write(2, line, strlen(line)) < 0) abort();
    sigaction(SIGSEGV, &fault_before, nullptr);
}
static void watch_faults(void) {
    static bool done;
    if (done) return;
    done = true;
    struct sigaction a = {};
    a.sa_sigaction = fault;
    a.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &a, &fault_before);
}
#endif

void emu_check_edges(void) {
    std::lock_guard<std::mutex> hold(lock);
    if (!protecting)
        for (const auto &b : buffers) edge_check(b.first, &b.second);
}
void emu_unlock(int device) {
    std::lock_guard<std::mutex> hold(lock);
    if (protecting)
        for (const auto &b : buffers)
            if (b.second.kind == DEVICE && (device < 0 || b.second.device == device))
                map_guard(&b.second, PROT_READ | PROT_WRITE);
}
void emu_relock(void) {
    std::lock_guard<std::mutex> hold(lock);
    if (protecting)
        for (const auto &b : buffers)
            if (b.second.kind == DEVICE) map_guard(&b.second, PROT_NONE);
}

static cudaError_t memory(void **out, size_t bytes, enum kind kind) {
    cudaError_t e = emu_no_capture("an allocation");
    if (e) return e;
    if (!emu_devices()) return last_error = cudaErrorNoDevice;
    std::lock_guard<std::mutex> hold(lock);
    *out = nullptr;
    watch_faults();
    protecting = emu_setting("EMU_PROTECT", 0) != 0;
    if (!bytes) return cudaSuccess;
    if (kind == DEVICE && used[current] + bytes > device_bytes())
        return last_error = cudaErrorMemoryAllocation;
    struct buffer b = { bytes, kind, current, nullptr, 0 };
    char *p = map_new(&b);
    if (!p) return last_error = cudaErrorMemoryAllocation;
    buffers[p] = b;
    if (kind == DEVICE) used[current] += bytes;
    if (kind == DEVICE && protecting) map_guard(&b, PROT_NONE);
    *out = p;
    return cudaSuccess;
}
static cudaError_t drop(void *p, enum kind kind) {
    if (!p) return cudaSuccess;
    cudaError_t e = emu_no_capture("a free");
    if (!e) e = cudaDeviceSynchronize();
    if (e) return e;
    std::lock_guard<std::mutex> hold(lock);
    auto it = buffers.find((char *)p);
    if (it == buffers.end() || it->second.kind != kind)
        return emu_error(cudaErrorInvalidValue, "free of %p, which is no such buffer", p);
    if (kind == DEVICE) used[it->second.device] -= it->second.bytes;
    emu_race_forget(p);
    map_drop(&it->second);
    buffers.erase(it);
    return cudaSuccess;
}
extern "C" cudaError_t cudaMalloc(void **out, size_t bytes) { return memory(out, bytes, DEVICE); }
extern "C" cudaError_t cudaFree(void *p) { return drop(p, DEVICE); }
extern "C" cudaError_t cudaMallocHost(void **out, size_t bytes) {
    return memory(out, bytes, PINNED);
}
extern "C" cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned) {
    return memory(out, bytes, PINNED);
}
extern "C" cudaError_t cudaFreeHost(void *p) { return drop(p, PINNED); }
extern "C" cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    std::lock_guard<std::mutex> hold(lock);
    *total = device_bytes();
    *free_bytes = device_bytes() - used[current];
    return cudaSuccess;
}
extern "C" cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
    std::lock_guard<std::mutex> hold(lock);
    const auto *b = find(p);
    memset(a, 0, sizeof *a);
    a->type = !b ? cudaMemoryTypeUnregistered
                 : b->second.kind == DEVICE ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
    a->device = b ? b->second.device : -2;
    a->devicePointer = b ? (void *)p : nullptr;
    a->hostPointer = b && b->second.kind == DEVICE ? nullptr : (void *)p;
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
    enum cudaStreamCaptureStatus captured;
    cudaStreamIsCapturing(stream, &captured);
    if (captured && ((!to_device && !is(to, PINNED)) || (!from_device && !is(from, PINNED))))
        return emu_error(cudaErrorStreamCaptureUnsupported, "capture of a copy of pageable memory");
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
    cudaError_t e = emu_no_capture("cudaMemcpy");
    if (!e) e = cudaMemcpyAsync(to, from, bytes, kind, nullptr);
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

extern "C" cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from,
                                           int from_device, size_t bytes, cudaStream_t stream) {
    int device[2] = { -1, -1 };
    char *first;
    size_t size;
    emu_buffer(to, &device[0], &first, &size);
    emu_buffer(from, &device[1], &first, &size);
    if (bytes && (device[0] != to_device || device[1] != from_device))
        return emu_error(cudaErrorInvalidValue, "peer copy from device %d to %d of memory of %d and %d",
                         from_device, to_device, device[1], device[0]);
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
}

/* ---- launches ---- */

static std::map<const void *, int> shared_allowed;    /* raised by cudaFuncSetAttribute */
extern "C" cudaError_t cudaFuncSetAttribute(const void *kernel, enum cudaFuncAttribute a, int v) {
    if (a == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
    if (a != cudaFuncAttributeMaxDynamicSharedMemorySize)
        return emu_error(cudaErrorNotSupported, "cudaFuncSetAttribute %d: not emulated", a);
    if (v < 0 || v > EMU_SHARED_MAX)
        return emu_error(cudaErrorInvalidValue, "%d bytes of shared memory: a block has %d", v,
                         EMU_SHARED_MAX);
    std::lock_guard<std::mutex> hold(lock);
    shared_allowed[kernel] = v;
    return cudaSuccess;
}
extern "C" cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *kernel) {
    std::lock_guard<std::mutex> hold(lock);
    auto it = shared_allowed.find(kernel);
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = EMU_THREADS_MAX;
    a->maxDynamicSharedSizeBytes = it == shared_allowed.end() ? (int)EMU_SHARED_PLAIN : it->second;
    return cudaSuccess;
}
static cudaError_t fits(const struct emu_launch *l) {
    dim3 g = l->grid, b = l->block;
    int allowed = EMU_SHARED_PLAIN;
    {
        std::lock_guard<std::mutex> hold(lock);
        auto it = shared_allowed.find(l->kernel);
        if (it != shared_allowed.end()) allowed = it->second;
    }
    uint64_t threads = (uint64_t)b.x * b.y * b.z;
    if (!threads || threads > EMU_THREADS_MAX || b.z > 64)
        return emu_error(cudaErrorInvalidConfiguration,
                         "%s:%d: launch of '%s' with blocks of %u x %u x %u threads: 1 to 1024, z to 64",
                         l->file, l->line, l->name, b.x, b.y, b.z);
    if (!g.x || !g.y || !g.z || g.x > 2147483647u || g.y > 65535 || g.z > 65535)
        return emu_error(cudaErrorInvalidConfiguration,
                         "%s:%d: launch of '%s' with a grid of %u x %u x %u blocks", l->file,
                         l->line, l->name, g.x, g.y, g.z);
    if (l->smem > (size_t)allowed)
        return emu_error(cudaErrorInvalidValue,
                         "%s:%d: launch of '%s' with %zu bytes of shared memory: %d allowed; "
                         "cudaFuncSetAttribute raises it up to %d",
                         l->file, l->line, l->name, l->smem, allowed, EMU_SHARED_MAX);
    return cudaSuccess;
}
void emu_submit(const struct emu_launch *l, cudaStream_t stream) {
    struct emu_work w = { *l, current, nullptr };
    if (!emu_devices()) last_error = cudaErrorNoDevice;
    else if (fits(l) == cudaSuccess) {
        cudaError_t e = emu_queue(stream, &w);
        if (e) last_error = e;
        return;
    }
    l->drop(l->args);
}
