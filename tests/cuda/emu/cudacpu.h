/* cudacpu.h - what a .cu file sees when g++ compiles it: the CUDA language on a CPU.
 *
 * Force-included before the source (-include), as nvcc does with its own headers. NVIDIA's headers
 * give types and prototypes; here are the thread indices, barriers, warp operations, atomics and
 * the intrinsics that those headers leave out on a host. A kernel is an ordinary function; one
 * thread of it runs at a time (sched.cc), so an atomic is a plain operation.
 * Not modelled: weak memory order, spinning on a flag, the errors of approximate intrinsics.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef EMU_CUDACPU_H
#define EMU_CUDACPU_H
#include <cuda_runtime.h>

#include <math.h>
#include <stdint.h>
#include <string.h>

/* libstdc++ writes __attribute__((__noinline__)) */
#undef __noinline__
#include <tuple>
#include <type_traits>
#include <utility>

#define __launch_bounds__(...)
/* One copy is enough: blocks run one after another. Each file has its own section, so that the
 * runtime can refill what a kernel of that file may use. */
#define EMU_STR_(x) #x
#define EMU_STR(x) EMU_STR_(x)
#define EMU_CAT_(a, b) a##b
#define EMU_CAT(a, b) EMU_CAT_(a, b)
#ifndef EMU_FILE
#define EMU_FILE any
#endif
#define EMU_SECTION EMU_CAT(emu_shared_, EMU_FILE)
#undef __shared__
#define __shared__ static __attribute__((section(EMU_STR(EMU_SECTION))))
extern "C" __attribute__((weak, visibility("hidden"))) char EMU_CAT(__start_, EMU_SECTION)[];
extern "C" __attribute__((weak, visibility("hidden"))) char EMU_CAT(__stop_, EMU_SECTION)[];

/* ---- where a thread is ---- */

struct emu_thread {
    uint3 index;
    int id;                                           /* x fastest */
    unsigned char got[32 * 16];                       /* the last warp operation's values */
};
extern struct emu_thread *emu_self;                   /* NULL outside kernels */
extern uint3 emu_block_index;
extern dim3 emu_block_dim, emu_grid_dim;
#define threadIdx (emu_self->index)
#define blockIdx emu_block_index
#define blockDim emu_block_dim
#define gridDim emu_grid_dim
constexpr int warpSize = 32;

/* ---- launch ---- */

struct emu_launch {
    const char *name, *file;
    int line;
    const void *kernel;
    dim3 grid, block;
    size_t smem;
    char *shared, *shared_end;                        /* static shared memory of the kernel's file */
    void (*run)(void *args);
    void (*drop)(void *args);
    void *args;
    size_t args_bytes;
};
/* Takes args; an error is left for cudaGetLastError. */
void emu_submit(const struct emu_launch *l, cudaStream_t stream);
void *emu_dyn_shared(void);

template <class... P> struct emu_call {
    void (*kernel)(P...);
    std::tuple<std::decay_t<P>...> args;
    static void run(void *self) {
        emu_call *c = static_cast<emu_call *>(self);
        std::apply(c->kernel, c->args);
    }
    static void drop(void *self) { delete static_cast<emu_call *>(self); }
};
template <class... P, class... A>
void emu_launch_call(struct emu_launch l, cudaStream_t stream, void (*kernel)(P...), A &&...a) {
    static_assert(sizeof...(P) == sizeof...(A), "the kernel takes another number of arguments");
    l.kernel = reinterpret_cast<const void *>(kernel);
    l.run = emu_call<P...>::run;
    l.drop = emu_call<P...>::drop;
    l.args_bytes = sizeof(emu_call<P...>);
    l.args = new emu_call<P...>{ kernel, { static_cast<P>(a)... } };
    emu_submit(&l, stream);
}
#define LAUNCH(k, grid_, block_, smem_, stream_, ...)                                          \
    emu_launch_call({ #k, __FILE__, __LINE__, nullptr, dim3(grid_), dim3(block_), (size_t)(smem_), \
                      EMU_CAT(__start_, EMU_SECTION), EMU_CAT(__stop_, EMU_SECTION), nullptr,  \
                      nullptr, nullptr, 0 },                                                   \
                    (stream_), (k)__VA_OPT__(, ) __VA_ARGS__)
#define DYN_SHARED(type, name) type *name = static_cast<type *>(emu_dyn_shared())

/* those that NVIDIA's header has for nvcc only */
template <class T> cudaError_t cudaFuncSetAttribute(T *f, enum cudaFuncAttribute a, int v) {
    return cudaFuncSetAttribute(reinterpret_cast<const void *>(f), a, v);
}
template <class T> cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, T *f) {
    return cudaFuncGetAttributes(a, reinterpret_cast<const void *>(f));
}

/* ---- barriers and warp operations ---- */

#define EMU_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()
/* Waits for the block; all threads must come to the same call. Gets the number of those whose
 * `vote` is true. */
int emu_barrier(bool vote, const char *file, int line);
/* All lanes that mask names hand in bytes <= 16 and get everyone's, lane i's from i * bytes; lent
 * until the thread's next call. `what` tells operations apart. */
const unsigned char *emu_exchange(unsigned mask, const char *what, const void *data, size_t bytes,
                                  const char *file, int line);
/* __syncwarp: the one warp operation that orders memory */
void emu_syncwarp(unsigned mask, const char *file, int line);
[[noreturn]] void emu_die(const char *file, int line, const char *text, ...)
    __attribute__((format(printf, 3, 4)));

inline void __syncthreads(EMU_SITE) { emu_barrier(false, file, line); }
inline int __syncthreads_count(int p, EMU_SITE) { return emu_barrier(p != 0, file, line); }
inline int __syncthreads_or(int p, EMU_SITE) { return emu_barrier(p != 0, file, line) != 0; }
inline int __syncthreads_and(int p, EMU_SITE) { return emu_barrier(p == 0, file, line) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu, EMU_SITE) { emu_syncwarp(mask, file, line); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

inline int emu_lane() { return emu_self->id % 32; }
/* Value of lane `from` of this lane's part of `width` lanes. */
template <class T>
T emu_shfl(unsigned mask, const char *what, T v, int from, const char *file, int line) {
    static_assert(sizeof(T) <= 16, "a shuffle moves at most 16 bytes");
    const unsigned char *all = emu_exchange(mask, what, &v, sizeof v, file, line);
    if (!(mask >> from & 1))
        emu_die(file, line, "%s: lane %d reads lane %d, which mask 0x%08x does not name", what,
                emu_lane(), from, mask);
    T out;
    memcpy(&out, all + (size_t)from * sizeof out, sizeof out);
    return out;
}
template <class T> T __shfl_sync(unsigned mask, T v, int src, int width = 32, EMU_SITE) {
    int base = emu_lane() & ~(width - 1);
    return emu_shfl(mask, "__shfl_sync", v, base + (src & (width - 1)), file, line);
}
template <class T> T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32, EMU_SITE) {
    int lane = emu_lane(), from = lane - (int)by, base = lane & ~(width - 1);
    return emu_shfl(mask, "__shfl_up_sync", v, from < base ? lane : from, file, line);
}
template <class T> T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32, EMU_SITE) {
    int lane = emu_lane(), from = lane + (int)by, end = (lane & ~(width - 1)) + width;
    return emu_shfl(mask, "__shfl_down_sync", v, from >= end ? lane : from, file, line);
}
template <class T> T __shfl_xor_sync(unsigned mask, T v, int by, int width = 32, EMU_SITE) {
    int lane = emu_lane(), from = lane ^ by, end = (lane & ~(width - 1)) + width;
    return emu_shfl(mask, "__shfl_xor_sync", v, from >= end ? lane : from, file, line);
}
/* Calls f(value) for every lane that the mask names, ascending. */
template <class T, class F>
void emu_fold(unsigned mask, const char *what, T v, F f, const char *file, int line) {
    const unsigned char *all = emu_exchange(mask, what, &v, sizeof v, file, line);
    for (int i = 0; i < 32; i++) {
        T other;
        if (!(mask >> i & 1)) continue;
        memcpy(&other, all + (size_t)i * sizeof other, sizeof other);
        f(i, other);
    }
}
inline unsigned __ballot_sync(unsigned mask, int p, EMU_SITE) {
    unsigned out = 0;
    emu_fold(mask, "__ballot_sync", p != 0, [&](int i, bool v) { out |= (unsigned)v << i; }, file,
             line);
    return out;
}
inline int __any_sync(unsigned mask, int p, EMU_SITE) {
    bool out = false;
    emu_fold(mask, "__any_sync", p != 0, [&](int, bool v) { out = out || v; }, file, line);
    return out;
}
inline int __all_sync(unsigned mask, int p, EMU_SITE) {
    bool out = true;
    emu_fold(mask, "__all_sync", p != 0, [&](int, bool v) { out = out && v; }, file, line);
    return out;
}
template <class T> unsigned __match_any_sync(unsigned mask, T v, EMU_SITE) {
    unsigned out = 0;
    emu_fold(mask, "__match_any_sync", v, [&](int i, T w) { out |= (unsigned)(w == v) << i; },
             file, line);
    return out;
}
#define EMU_REDUCE(T, name, start, step)                               \
    inline T name(unsigned mask, T v, EMU_SITE) {                      \
        T out = start;                                                 \
        emu_fold(mask, #name, v, [&](int, T w) { step; }, file, line); \
        return out;                                                    \
    }
EMU_REDUCE(unsigned, __reduce_add_sync, 0, out += w)
EMU_REDUCE(int, __reduce_add_sync, 0, out = (int)((unsigned)out + (unsigned)w))
EMU_REDUCE(unsigned, __reduce_min_sync, v, out = w < out ? w : out)
EMU_REDUCE(int, __reduce_min_sync, v, out = w < out ? w : out)
EMU_REDUCE(unsigned, __reduce_max_sync, v, out = w > out ? w : out)
EMU_REDUCE(int, __reduce_max_sync, v, out = w > out ? w : out)
EMU_REDUCE(unsigned, __reduce_and_sync, ~0u, out &= w)
EMU_REDUCE(unsigned, __reduce_or_sync, 0, out |= w)
EMU_REDUCE(unsigned, __reduce_xor_sync, 0, out ^= w)

/* ---- atomics: only one thread runs at a time ---- */

/* The race detector hears of it here, and must not look at the access itself. */
void emu_atomic(const void *at, size_t bytes);
#define EMU_ATOMIC(name, expr)                                                        \
    template <class T>                                                                \
    __attribute__((no_sanitize("thread"))) T name(T *at, std::common_type_t<T> v) {   \
        emu_atomic(at, sizeof *at);                                                   \
        T old = *at;                                                                  \
        *at = expr;                                                                   \
        return old;                                                                   \
    }
EMU_ATOMIC(atomicAdd, static_cast<T>(old + v))
EMU_ATOMIC(atomicSub, static_cast<T>(old - v))
EMU_ATOMIC(atomicExch, v)
EMU_ATOMIC(atomicMin, v < old ? v : old)
EMU_ATOMIC(atomicMax, v > old ? v : old)
EMU_ATOMIC(atomicAnd, old & v)
EMU_ATOMIC(atomicOr, old | v)
EMU_ATOMIC(atomicXor, old ^ v)
template <class T>
__attribute__((no_sanitize("thread"))) T atomicCAS(T *at, std::common_type_t<T> want,
                                                   std::common_type_t<T> v) {
    emu_atomic(at, sizeof *at);
    T old = *at;
    if (old == want) *at = v;
    return old;
}

/* ---- intrinsics ---- */

template <class T> T __ldg(const T *p) { return *p; }
template <class T> T __ldcs(const T *p) { return *p; }
template <class T> T __ldcg(const T *p) { return *p; }
template <class T> void __stcs(T *p, T v) { *p = v; }
template <class T> void __stcg(T *p, T v) { *p = v; }
template <class To, class From> To emu_bits(From v) {
    To out;
    static_assert(sizeof out == sizeof v, "the same size");
    memcpy(&out, &v, sizeof out);
    return out;
}
inline float __uint_as_float(unsigned v) { return emu_bits<float>(v); }
inline unsigned __float_as_uint(float v) { return emu_bits<unsigned>(v); }
inline float __int_as_float(int v) { return emu_bits<float>(v); }
inline int __float_as_int(float v) { return emu_bits<int>(v); }
inline double __longlong_as_double(long long v) { return emu_bits<double>(v); }
inline long long __double_as_longlong(double v) { return emu_bits<long long>(v); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }
inline float __saturatef(float a) { return a > 0 ? a < 1 ? a : 1.0f : 0.0f; }
inline int __float2int_rn(float a) { return (int)lrintf(a); }
inline int __float2int_rz(float a) { return (int)a; }
inline float __int2float_rn(int a) { return (float)a; }
inline float __uint2float_rn(unsigned a) { return (float)a; }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
inline int __clzll(long long v) { return v ? __builtin_clzll((unsigned long long)v) : 64; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline unsigned __brev(unsigned v) {
    unsigned out = 0;
    for (int i = 0; i < 32; i++) out |= (v >> i & 1) << (31 - i);
    return out;
}
inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned by) {
    return (unsigned)((((uint64_t)hi << 32 | lo) << (by & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned by) {
    return (unsigned)(((uint64_t)hi << 32 | lo) >> (by & 31));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
    uint64_t all = (uint64_t)b << 32 | a;
    unsigned out = 0;
    for (int i = 0; i < 4; i++) {
        unsigned pick = s >> (4 * i), byte = (unsigned)(all >> (8 * (pick & 7))) & 255;
        if (pick & 8) byte = byte & 128 ? 255 : 0;
        out |= byte << (8 * i);
    }
    return out;
}
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline size_t min(size_t a, size_t b) { return a < b ? a : b; }
inline size_t max(size_t a, size_t b) { return a > b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
/* glibc declares functions of these names */
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __powf(x, y) powf(x, y)
#define __fdividef(a, b) ((a) / (b))
#endif
