/* planted.cu - small kernels, right ones and ones with one planted bug each, for the tests of the
 * emulator (tests/cuda/emulator.c). `planted NAME` runs one and prints what it computed.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cuda/launch.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void must(cudaError_t e) {
    if (!e) return;
    printf("%s\n", cudaGetErrorName(e));
    exit(1);
}
static float *device(int n) {
    void *p;
    must(cudaMalloc(&p, (size_t)n * sizeof(float)));
    return (float *)p;
}
static float *ramp(int n) {                           /* 1, 2, 3, ... on the device */
    float *host = (float *)malloc((size_t)n * sizeof *host), *p = device(n);
    for (int i = 0; i < n; i++) host[i] = (float)(i + 1);
    must(cudaMemcpy(p, host, (size_t)n * sizeof *host, cudaMemcpyHostToDevice));
    free(host);
    return p;
}
static void show(const float *p, int n) {             /* a number that the order of values enters */
    float *host = (float *)malloc((size_t)n * sizeof *host);
    double sum = 0;
    must(cudaGetLastError());
    must(cudaMemcpy(host, p, (size_t)n * sizeof *host, cudaMemcpyDeviceToHost));
    for (int i = 0; i < n; i++) sum += (double)host[i] * (i % 97 + 1);
    free(host);
    printf("%.9g\n", sum);
}

/* ---- right ---- */

__device__ float warp_sum(float v) {
    for (int by = 16; by; by /= 2) v += __shfl_xor_sync(0xffffffffu, v, by);
    return v;
}
template <int THREADS> __global__ void block_sum(float *y, unsigned *count, const float *x) {
    __shared__ float part[THREADS / 32];
    DYN_SHARED(float, kept);
    int t = (int)threadIdx.x;
    kept[t] = x[blockIdx.x * THREADS + threadIdx.x];
    __syncthreads();
    float v = warp_sum(kept[THREADS - 1 - t]);
    if (t % 32 == 0) part[t / 32] = v;
    __syncthreads();
    if (t < 32) {
        v = warp_sum(t < THREADS / 32 ? part[t] : 0.0f);
        if (t == 0) y[blockIdx.x] = v;
    }
    if (__syncthreads_count(t % 3 == 0) != (THREADS + 2) / 3) y[blockIdx.x] = -1;
    atomicAdd(count, 1u);
    if (__ballot_sync(0xffffffffu, t & 1) != 0xaaaaaaaau) y[blockIdx.x] = -2;
    if (__reduce_max_sync(0xffffffffu, t) != t / 32 * 32 + 31) y[blockIdx.x] = -3;
    if (__shfl_up_sync(0xffffffffu, t, 1, 8) != (t % 8 ? t - 1 : t)) y[blockIdx.x] = -4;
    if (__shfl_down_sync(0xffffffffu, (double)t, 3) != (t % 32 < 29 ? t + 3 : t)) y[blockIdx.x] = -5;
    if (t % 32 < 16 && __shfl_sync(0xffffu, t, 5) != t / 32 * 32 + 5) y[blockIdx.x] = -6;
}
static void right(void) {
    unsigned *count, n;
    float *y = device(50);
    must(cudaMalloc(&count, sizeof *count));
    must(cudaMemset(count, 0, sizeof *count));
    LAUNCH((block_sum<256>), 50, 256, 256 * sizeof(float), nullptr, y, count, ramp(50 * 256));
    must(cudaMemcpy(&n, count, sizeof n, cudaMemcpyDeviceToHost));
    printf("%u threads ", n);
    show(y, 50);
}
/* Rows by one warp each, values handed over through shared memory with __syncwarp. */
__global__ void transpose(float *y, const float *x) {
    __shared__ float tile[2][32][33];
    int lane = (int)threadIdx.x, w = (int)threadIdx.y;
    for (int i = 0; i < 32; i++) tile[w][i][lane] = x[(w * 32 + i) * 32 + lane];
    __syncwarp();
    for (int i = 0; i < 32; i++) y[(w * 32 + i) * 32 + lane] = tile[w][lane][i];
}
static void warps(void) {
    float *y = device(2048);
    LAUNCH(transpose, 1, dim3(32, 2), 0, nullptr, y, ramp(2048));
    show(y, 2048);
}

/* ---- within a block ---- */

__global__ void reverse_unsafe(float *y, const float *x) {
    __shared__ float s[256];
    s[threadIdx.x] = x[threadIdx.x];
    y[threadIdx.x] = s[255 - threadIdx.x];            /* bug: no barrier */
}
static void missing_barrier(void) {
    float *y = device(256);
    LAUNCH(reverse_unsafe, 1, 256, 0, nullptr, y, ramp(256));
    show(y, 256);
}
__global__ void barrier_in_branch(float *y) {
    if (threadIdx.x < 32) {
        __syncthreads();
        y[threadIdx.x] = 1;
    } else {
        __syncthreads();
        y[threadIdx.x] = 2;
    }
}
static void divergent_barrier(void) {
    LAUNCH(barrier_in_branch, 1, 64, 0, nullptr, device(64));
}
__global__ void unset_shared(float *y) {
    __shared__ float s[64];
    if (threadIdx.x < 63) s[threadIdx.x] = 1;         /* bug: one is left */
    __syncthreads();
    y[threadIdx.x] = s[63 - threadIdx.x];
}
static void shared_unset(void) {
    float *y = device(64);
    LAUNCH(unset_shared, 1, 64, 0, nullptr, y);
    show(y, 64);
}
/* the same in a template, whose variables the compiler does not put where it is told */
template <int N> static __global__ void unset_template(float *y) {
    __shared__ float s[N];
    if (threadIdx.x < N - 1) s[threadIdx.x] = 1;
    __syncthreads();
    y[threadIdx.x] = s[N - 1 - threadIdx.x];
}
static void shared_unset_template(void) {
    float *y = device(64);
    LAUNCH((unset_template<64>), 1, 64, 0, nullptr, y);
    show(y, 64);
}
__global__ void past_shared(float *y) {
    __shared__ float s[64];
    volatile int past = 64;
    s[threadIdx.x] = 1;
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x == 0 ? past : 0];
}
/* the same through a pointer, where the type does not tell */
__device__ __attribute__((noinline)) float nth(const float *p, int i) { return p[i]; }
__global__ void past_hidden(float *y) {
    __shared__ float s[64];
    s[threadIdx.x] = 1;
    __syncthreads();
    y[threadIdx.x] = nth(s, threadIdx.x == 0 ? 64 : 0);
}
static void shared_hidden(void) { LAUNCH(past_hidden, 1, 64, 0, nullptr, device(64)); }
static void shared_past(void) { LAUNCH(past_shared, 1, 64, 0, nullptr, device(64)); }

/* ---- within a warp ---- */

__global__ void lane_ends(float *y) {
    if (threadIdx.x == 31) return;
    y[threadIdx.x] = warp_sum(1);
}
static void lane_missing(void) { LAUNCH(lane_ends, 1, 32, 0, nullptr, device(32)); }
__global__ void lane_waits(float *y) {
    float v = 0;
    if (threadIdx.x != 31) v = warp_sum(1);
    __syncthreads();
    y[threadIdx.x] = v;
}
static void lane_elsewhere(void) { LAUNCH(lane_waits, 1, 32, 0, nullptr, device(32)); }
__global__ void half_mask(float *y) {
    y[threadIdx.x] = __shfl_sync(0x0000ffffu, (float)threadIdx.x, 0);
}
static void mask_without_caller(void) { LAUNCH(half_mask, 1, 32, 0, nullptr, device(32)); }
__global__ void beyond_mask(float *y) {
    if (threadIdx.x < 16) y[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1.0f, 16);
}
static void mask_without_source(void) { LAUNCH(beyond_mask, 1, 32, 0, nullptr, device(32)); }
__global__ void two_operations(int *y) {
    y[threadIdx.x] = threadIdx.x < 16 ? __any_sync(0xffffffffu, 1)
                                      : (int)__ballot_sync(0xffffffffu, 1);
}
static void operations_differ(void) { LAUNCH(two_operations, 1, 32, 0, nullptr, (int *)device(32)); }

/* A shuffle does not order memory: only __syncwarp does. */
__global__ void shuffle_for_sync(float *y) {
    __shared__ float s[32];
    s[threadIdx.x] = 1;
    warp_sum(1);
    y[threadIdx.x] = s[31 - threadIdx.x];
}
static void warp_race(void) { LAUNCH(shuffle_for_sync, 1, 32, 0, nullptr, device(32)); }

/* ---- memory ---- */

__global__ void shift(float *y, const float *x, int by) {
    y[threadIdx.x] = x[(int)threadIdx.x + by];
}
static void read_past(void) { LAUNCH(shift, 1, 64, 0, nullptr, device(64), ramp(64), 1); }
static void write_past(void) {
    float *y = device(40);                            /* 160 bytes, then 96 that are nobody's */
    LAUNCH(shift, 1, 41, 0, nullptr, y, ramp(64), 0);
    must(cudaDeviceSynchronize());
}
__global__ void vectors(float4 *y, const float *x) {
    y[threadIdx.x] = *reinterpret_cast<const float4 *>(x + 4 * threadIdx.x + 1);
}
static void misaligned(void) { LAUNCH(vectors, 1, 4, 0, nullptr, (float4 *)device(16), ramp(64)); }
__global__ void add_to_one(float *sum, const float *x) { *sum += x[blockIdx.x]; }
static void block_race(void) {
    float *sum = device(1);
    must(cudaMemset(sum, 0, sizeof *sum));
    LAUNCH(add_to_one, 64, 1, 0, nullptr, sum, ramp(64));
    show(sum, 1);
}
static void kernel_reads_host(void) {
    static float host[64];
    float *heap = (float *)calloc(64, sizeof *heap);
    LAUNCH(shift, 1, 64, 0, nullptr, device(64), heap ? heap : host, 0);
    printf("unnoticed\n");
}
static void host_reads_device(void) { printf("%g unnoticed\n", (double)ramp(64)[3]); }
static void other_device(void) {
    float *x = ramp(64);
    must(cudaSetDevice(1));
    LAUNCH(shift, 1, 64, 0, nullptr, device(64), x, 0);
    printf("unnoticed\n");
}

/* ---- calls of the host ---- */

static void missing_wait(void) {
    cudaStream_t a, b;
    float *x = ramp(64), *y = device(64), *host;
    must(cudaStreamCreateWithFlags(&a, cudaStreamNonBlocking));
    must(cudaStreamCreateWithFlags(&b, cudaStreamNonBlocking));
    must(cudaMallocHost((void **)&host, 256));
    memset(host, 0, 256);
    LAUNCH(shift, 1, 64, 0, a, y, x, 0);
    must(cudaMemcpyAsync(host, y, 256, cudaMemcpyDeviceToHost, b));   /* bug: b does not wait for a */
    must(cudaStreamSynchronize(b));
    printf("%g\n", (double)host[63]);
}
static void right_wait(void) {
    cudaStream_t a, b;
    cudaEvent_t done;
    float *x = ramp(64), *y = device(64), *host;
    must(cudaStreamCreateWithFlags(&a, cudaStreamNonBlocking));
    must(cudaStreamCreateWithFlags(&b, cudaStreamNonBlocking));
    must(cudaEventCreate(&done));
    must(cudaMallocHost((void **)&host, 256));
    LAUNCH(shift, 1, 64, 0, a, y, x, 0);
    must(cudaEventRecord(done, a));
    must(cudaStreamWaitEvent(b, done, 0));
    must(cudaMemcpyAsync(host, y, 256, cudaMemcpyDeviceToHost, b));
    must(cudaStreamSynchronize(b));
    printf("%g\n", (double)host[63]);
}
static void no_wait_for_host(void) {
    cudaStream_t a;
    float *x = ramp(64), *host;
    must(cudaStreamCreateWithFlags(&a, cudaStreamNonBlocking));
    must(cudaMallocHost((void **)&host, 256));
    memset(host, 0, 256);
    must(cudaMemcpyAsync(host, x, 256, cudaMemcpyDeviceToHost, a));
    printf("%g\n", (double)host[63]);                 /* bug: read before the copy is waited for */
}
__global__ void use_dynamic(float *y, int n) {
    DYN_SHARED(float, s);
    s[n - 1 - (int)threadIdx.x] = 2;
    y[threadIdx.x] = s[n - 1 - (int)threadIdx.x];
}
static void shared_limit(void) {
    enum { BYTES = 64 << 10 };
    float *y = device(32);
    LAUNCH(use_dynamic, 1, 32, BYTES, nullptr, y, BYTES / 4);
    printf("%s ", cudaGetErrorName(cudaGetLastError()));
    must(cudaFuncSetAttribute(use_dynamic, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES));
    LAUNCH(use_dynamic, 1, 32, BYTES, nullptr, y, BYTES / 4);
    show(y, 32);
}
static void thread_limit(void) {
    LAUNCH(shift, 1, 1025, 0, nullptr, device(2000), ramp(2000), 0);
    must(cudaGetLastError());
}
static void grid_limit(void) {
    LAUNCH(shift, dim3(1, 65536), 1, 0, nullptr, device(1), ramp(1), 0);
    must(cudaGetLastError());
}
static void copy_range(void) {
    float host[65];
    must(cudaMemcpy(host, ramp(64), sizeof host, cudaMemcpyDeviceToHost));
}
static void copy_direction(void) {
    float host[64] = { 0 };
    must(cudaMemcpy(ramp(64), host, sizeof host, cudaMemcpyDeviceToHost));
}
static void no_memory(void) { device(200000), device(200000); }
static void devices(void) {
    int n;
    struct cudaDeviceProp p;
    must(cudaGetDeviceCount(&n));
    for (int i = 0; i < n; i++) {
        must(cudaGetDeviceProperties(&p, i));
        printf("%s\n", p.name);
    }
}

/* ---- graphs ---- */

__global__ void count_up(int *step, float *y) {
    y[*step] += (float)(*step + 1);
    ++*step;
}
static void graph(void) {
    cudaStream_t s;
    cudaGraph_t g;
    cudaGraphExec_t x;
    int *step;
    float *y = device(12);
    must(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
    must(cudaMalloc(&step, sizeof *step));
    must(cudaMemsetAsync(step, 0, sizeof *step, s));
    must(cudaMemsetAsync(y, 0, 12 * sizeof *y, s));
    must(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < 3; i++) LAUNCH(count_up, 1, 1, 0, s, step, y);
    must(cudaStreamEndCapture(s, &g));
    must(cudaGraphInstantiate(&x, g, 0));
    must(cudaGraphDestroy(g));
    for (int i = 0; i < 4; i++) must(cudaGraphLaunch(x, s));
    must(cudaStreamSynchronize(s));
    must(cudaGraphExecDestroy(x));
    must(cudaStreamDestroy(s));
    show(y, 12);
}
static void graph_allocates(void) {
    cudaStream_t s;
    must(cudaStreamCreate(&s));
    must(cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal));
    device(1);
}

/* What cannot be captured spoils the capture around it; the stream goes on. */
static void graph_spoilt(void) {
    cudaStream_t s;
    cudaGraph_t g;
    int *step;
    float *y = device(1);
    must(cudaMalloc(&step, sizeof *step));
    must(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
    must(cudaMemsetAsync(step, 0, sizeof *step, s));
    must(cudaMemsetAsync(y, 0, sizeof *y, s));
    must(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
    LAUNCH(count_up, 1, 1, 0, s, step, y);
    if (!cudaFree(y)) return;
    puts(cudaGetErrorName(cudaStreamEndCapture(s, &g)));
    LAUNCH(count_up, 1, 1, 0, s, step, y);
    must(cudaStreamSynchronize(s));
    must(cudaGetLastError() == cudaErrorStreamCaptureInvalidated ? cudaSuccess : cudaErrorUnknown);
    show(y, 1);
}

static const struct { const char *name; void (*run)(void); } all[] = {
    { "right", right },
    { "warps", warps },
    { "missing_barrier", missing_barrier },
    { "divergent_barrier", divergent_barrier },
    { "shared_unset", shared_unset },
    { "shared_unset_template", shared_unset_template },
    { "shared_past", shared_past },
    { "shared_hidden", shared_hidden },
    { "lane_missing", lane_missing },
    { "lane_elsewhere", lane_elsewhere },
    { "mask_without_caller", mask_without_caller },
    { "mask_without_source", mask_without_source },
    { "operations_differ", operations_differ },
    { "read_past", read_past },
    { "write_past", write_past },
    { "misaligned", misaligned },
    { "block_race", block_race },
    { "warp_race", warp_race },
    { "kernel_reads_host", kernel_reads_host },
    { "host_reads_device", host_reads_device },
    { "other_device", other_device },
    { "missing_wait", missing_wait },
    { "right_wait", right_wait },
    { "no_wait_for_host", no_wait_for_host },
    { "shared_limit", shared_limit },
    { "thread_limit", thread_limit },
    { "grid_limit", grid_limit },
    { "copy_range", copy_range },
    { "copy_direction", copy_direction },
    { "no_memory", no_memory },
    { "devices", devices },
    { "graph", graph },
    { "graph_allocates", graph_allocates },
    { "graph_spoilt", graph_spoilt },
};
int main(int argc, char **argv) {
    for (const auto &one : all)
        if (argc == 2 && !strcmp(argv[1], one.name)) {
            one.run();
            return 0;
        }
    fprintf(stderr, "planted: one name of the table at the end of tests/cuda/planted.cu\n");
    return 2;
}
