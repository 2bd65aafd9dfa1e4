/* libraries.cu - calls of cuBLAS and NCCL as the plugin makes them, right and wrong, for the tests
 * of their stand-ins (tests/cuda/libraries.c). `libraries NAME [RANKS]` runs one; with RANKS, in as
 * many processes, whose lines come out in rank order.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cuda/launch.h"

#include <algorithm>
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <math.h>
#include <nccl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

static void must(cudaError_t e) {
    if (!e) return;
    printf("%s\n", cudaGetErrorName(e));
    exit(1);
}
static void must(cublasStatus_t e) {
    if (!e) return;
    printf("%s\n", cublasGetStatusName(e));
    exit(1);
}
static void must(ncclResult_t e) {
    if (!e) return;
    printf("%s\n", ncclGetErrorString(e));
    exit(1);
}
template <class T> T *device(size_t n) {
    void *p;
    must(cudaMalloc(&p, n * sizeof(T)));
    return (T *)p;
}
template <class T> T *upload(const std::vector<T> &v) {
    T *p = device<T>(v.size());
    must(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice));
    return p;
}
template <class T> std::vector<T> download(const T *p, size_t n) {
    std::vector<T> v(n);
    must(cudaMemcpy(v.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
    return v;
}
static float number(unsigned i) { return (float)(int)(i * 2654435761u >> 20) / 2048.0f - 1.0f; }

/* ---- cuBLAS ---- */

enum { M = 37, N = 21, K = 65, LDA = 70, LDB = 72, LDC = 40 };
/* The largest difference to sums in double, for all four transpositions. */
template <class T, class C>
void products(cudaDataType type, cudaDataType c_type, float beta) {
    cublasHandle_t h;
    double worst = 0;
    must(cublasCreate(&h));
    std::vector<T> a(LDA * LDA), b(LDB * LDB);
    for (size_t i = 0; i < a.size(); i++) a[i] = (T)number((unsigned)i);
    for (size_t i = 0; i < b.size(); i++) b[i] = (T)number((unsigned)i + 77777);
    T *da = upload(a), *db = upload(b);
    C *dc = device<C>(LDC * N);
    for (int t = 0; t < 4; t++) {
        bool ta = t & 1, tb = t & 2;
        float alpha = 0.5f;
        std::vector<C> c(LDC * N, (C)(beta != 0 ? 3.0f : NAN));
        must(cudaMemcpy(dc, c.data(), c.size() * sizeof(C), cudaMemcpyHostToDevice));
        must(cublasGemmEx(h, ta ? CUBLAS_OP_T : CUBLAS_OP_N, tb ? CUBLAS_OP_T : CUBLAS_OP_N, M, N, K,
                          &alpha, da, type, LDA, db, type, LDB, &beta, dc, c_type, LDC,
                          CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
        c = download(dc, LDC * N);
        for (int j = 0; j < N; j++)
            for (int i = 0; i < M; i++) {
                double sum = 0;
                for (int l = 0; l < K; l++)
                    sum += (double)(float)a[(size_t)(ta ? i * LDA + l : l * LDA + i)] *
                           (double)(float)b[(size_t)(tb ? l * LDB + j : j * LDB + l)];
                double off = fabs((double)(float)c[(size_t)(j * LDC + i)] - 0.5 * sum -
                                  (beta != 0 ? beta * 3.0 : 0));
                if (!(off <= worst)) worst = off;     /* a NaN too */
            }
    }
    must(cublasDestroy(h));
    printf("%s\n", worst < (sizeof(C) == 2 ? 0.05 : 1e-5) ? "close" : "far");
}
static void gemm(void) {
    products<float, float>(CUDA_R_32F, CUDA_R_32F, 0);
    products<__nv_bfloat16, float>(CUDA_R_16BF, CUDA_R_32F, 0);
    products<__nv_bfloat16, float>(CUDA_R_16BF, CUDA_R_32F, 1);
    products<__nv_bfloat16, __nv_bfloat16>(CUDA_R_16BF, CUDA_R_16BF, -2);
}
static void gemm_batched(void) {
    cublasHandle_t h;
    float one = 1, zero = 0, *c = device<float>(3 * 4);
    must(cublasCreate(&h));
    std::vector<float> a(3 * 4), b(4);
    for (size_t i = 0; i < a.size(); i++) a[i] = (float)i;
    b = { 1, 0, 0, 2 };
    must(cublasGemmStridedBatchedEx(h, CUBLAS_OP_N, CUBLAS_OP_N, 2, 2, 2, &one, upload(a), CUDA_R_32F,
                                    2, 4, upload(b), CUDA_R_32F, 2, 0, &zero, c, CUDA_R_32F, 2, 4, 3,
                                    CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
    for (float v : download(c, 12)) printf("%g ", (double)v);
    printf("\n");
}
static void gemm_outside(void) {
    cublasHandle_t h;
    float one = 1, zero = 0, *p = device<float>(64);
    must(cublasCreate(&h));
    must(cublasSgemm(h, CUBLAS_OP_N, CUBLAS_OP_N, 8, 8, 9, &one, p, 8, p, 9, &zero, p, 8));
}
/* One product twice: the same bits only where a workspace of ours, set after the stream, and no
 * atomics make it so. */
static void gemm_again(bool workspace_first, bool atomics) {
    enum { SIDE = 64, WORKSPACE = 1 << 20 };
    cublasHandle_t h;
    cudaStream_t s;
    float one = 1, zero = 0, *c[2];
    std::vector<float> a(SIDE * SIDE);
    for (size_t i = 0; i < a.size(); i++) a[i] = number((unsigned)i);
    float *x = upload(a);
    char *workspace = device<char>(WORKSPACE);
    must(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
    must(cudaDeviceSynchronize());
    must(cublasCreate(&h));
    if (workspace_first) must(cublasSetWorkspace(h, workspace, WORKSPACE));
    must(cublasSetStream(h, s));
    if (!workspace_first) must(cublasSetWorkspace(h, workspace, WORKSPACE));
    must(cublasSetAtomicsMode(h, atomics ? CUBLAS_ATOMICS_ALLOWED : CUBLAS_ATOMICS_NOT_ALLOWED));
    for (int i = 0; i < 2; i++) {
        c[i] = device<float>(SIDE * SIDE);
        must(cublasSgemm(h, CUBLAS_OP_N, CUBLAS_OP_N, SIDE, SIDE, SIDE, &one, x, SIDE, x, SIDE,
                         &zero, c[i], SIDE));
    }
    must(cudaStreamSynchronize(s));
    printf("%s\n", download(c[0], SIDE * SIDE) == download(c[1], SIDE * SIDE) ? "same" : "other");
}
static void gemm_repeats(void) {
    gemm_again(false, false);
    gemm_again(true, false);
    gemm_again(false, true);
}
/* Work of a library stands in its stream's order and in a captured graph. */
static void gemm_graph(void) {
    cublasHandle_t h;
    cudaStream_t s;
    cudaGraph_t g;
    cudaGraphExec_t x;
    float one = 1, *c = upload(std::vector<float>{ 5 }), *two = upload(std::vector<float>{ 2 });
    must(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
    must(cudaDeviceSynchronize());
    must(cublasCreate(&h));
    must(cublasSetStream(h, s));
    must(cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal));
    must(cublasSgemm(h, CUBLAS_OP_N, CUBLAS_OP_N, 1, 1, 1, &one, two, 1, two, 1, &one, c, 1));
    must(cudaStreamEndCapture(s, &g));
    must(cudaGraphInstantiate(&x, g, 0));
    for (int i = 0; i < 3; i++) must(cudaGraphLaunch(x, s));
    must(cudaStreamSynchronize(s));
    printf("%g\n", (double)download(c, 1)[0]);
}

/* ---- NCCL ---- */

struct group { ncclUniqueId id; ncclComm_t comm; cudaStream_t stream; int rank, ranks; };

static void enter(struct group *g) {
    must(cudaSetDevice(g->rank));
    must(cudaStreamCreateWithFlags(&g->stream, cudaStreamNonBlocking));
    must(ncclCommInitRank(&g->comm, g->ranks, g->id, g->rank));
}
static ncclResult_t leave(struct group *g) {
    ncclResult_t r;
    must(cudaStreamSynchronize(g->stream));
    must(ncclCommGetAsyncError(g->comm, &r));
    return r;
}
template <class T> void report(struct group *g, const T *p, size_t n) {
    double sum = 0;
    ncclResult_t r = leave(g);
    std::vector<T> v = download(p, n);
    for (size_t i = 0; i < n; i++) sum += (double)(float)v[i] * (double)(i % 97 + 1);
    printf("%d:%.9g %s\n", g->rank, sum, ncclGetErrorString(r));
    ncclCommDestroy(g->comm);
}
static float *ramp(const struct group *g, size_t n) { /* rank r: (r + 1) * 1, 2, 3, ... */
    std::vector<float> v(n);
    for (size_t i = 0; i < n; i++) v[i] = (float)((size_t)(g->rank + 1) * (i % 1000 + 1));
    return upload(v);
}
static void all_reduce(struct group *g) {
    enum { COUNT = 700000 };                              /* three rounds */
    enter(g);
    float *p = ramp(g, COUNT);
    must(ncclAllReduce(p, p, COUNT, ncclFloat32, ncclSum, g->comm, g->stream));
    report(g, p, COUNT);
}
/* 2^24, 1, 1 and so on: only rank order gives 2^24, and bf16 must not be rounded on the way. */
static void rank_order(struct group *g) {
    enter(g);
    float *p = upload(std::vector<float>{ g->rank ? 1.0f : 16777216.0f });
    __nv_bfloat16 *q = upload(std::vector<__nv_bfloat16>{ (__nv_bfloat16)(g->rank ? 1.0f : 256.0f) });
    must(ncclAllReduce(p, p, 1, ncclFloat32, ncclSum, g->comm, g->stream));
    must(ncclAllReduce(q, q, 1, ncclBfloat16, ncclSum, g->comm, g->stream));
    must(cudaStreamSynchronize(g->stream));
    printf("%.9g ", (double)(float)download(q, 1)[0]);
    report(g, p, 1);
}
static void all_gather(struct group *g) {
    enum { COUNT = 300001 };
    enter(g);
    float *to = device<float>((size_t)COUNT * (size_t)g->ranks);
    must(ncclAllGather(ramp(g, COUNT), to, COUNT, ncclFloat32, g->comm, g->stream));
    report(g, to, (size_t)COUNT * (size_t)g->ranks);
}
static void reduce_scatter(struct group *g) {
    enum { COUNT = 200003 };
    enter(g);
    float *p = ramp(g, (size_t)COUNT * (size_t)g->ranks), *own = p + (size_t)g->rank * COUNT;
    must(ncclReduceScatter(p, own, COUNT, ncclFloat32, ncclSum, g->comm, g->stream));
    report(g, own, COUNT);
}
static void broadcast(struct group *g) {
    enum { COUNT = 1000 };
    enter(g);
    float *p = ramp(g, COUNT);
    must(ncclBroadcast(p, p, COUNT, ncclFloat32, g->ranks - 1, g->comm, g->stream));
    report(g, p, COUNT);
}
static void different_calls(struct group *g) {
    enter(g);
    float *p = ramp(g, 100);
    if (g->rank == 1) must(ncclBroadcast(p, p, 100, ncclFloat32, 0, g->comm, g->stream));
    else must(ncclAllReduce(p, p, 100, ncclFloat32, ncclSum, g->comm, g->stream));
    report(g, p, 100);
}
static void different_counts(struct group *g) {
    enter(g);
    float *p = ramp(g, 100);
    must(ncclAllReduce(p, p, g->rank ? 100 : 99, ncclFloat32, ncclSum, g->comm, g->stream));
    report(g, p, 100);
}
static void lost_rank(struct group *g) {
    enter(g);
    float *p = ramp(g, 100);
    must(ncclAllReduce(p, p, 100, ncclFloat32, ncclSum, g->comm, g->stream));
    must(cudaStreamSynchronize(g->stream));
    if (g->rank == 1) kill(getpid(), SIGKILL);
    must(ncclAllReduce(p, p, 100, ncclFloat32, ncclSum, g->comm, g->stream));
    report(g, p, 100);
}
/* ---- NCCL in the background ---- */

/* Until a call is through, as who must not wait for ever asks. */
static ncclResult_t through(struct group *g, ncclResult_t r) {
    while (r == ncclInProgress) {
        usleep(50);
        must(ncclCommGetAsyncError(g->comm, &r));
    }
    return r;
}
static ncclResult_t start_in_background(struct group *g) {
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    must(cudaSetDevice(g->rank));
    must(cudaStreamCreateWithFlags(&g->stream, cudaStreamNonBlocking));
    return ncclCommInitRankConfig(&g->comm, g->ranks, g->id, g->rank, &config);
}
static void enter_in_background(struct group *g) {
    ncclResult_t r = start_in_background(g);
    if (r != ncclInProgress) printf("%d started at once: %s\n", g->rank, ncclGetErrorString(r));
    must(through(g, r));
}
/* 1: the stream's work is done; 0: not in `seconds`. */
static int done_within(struct group *g, double seconds) {
    for (double s = 0; s < seconds; s += 1e-4) {
        if (cudaStreamQuery(g->stream) == cudaSuccess) return 1;
        usleep(100);
    }
    return 0;
}
/* Three gathers, what lies behind them in the stream, and a copy whose source changes at once. */
static void background(struct group *g) {
    enum { COUNT = 300001 };
    enter_in_background(g);
    float *own = ramp(g, COUNT), *to = device<float>((size_t)COUNT * (size_t)g->ranks);
    std::vector<float> host(COUNT, 2.0f);
    for (int i = 0; i < 3; i++) {
        ncclResult_t r = ncclAllGather(own, to, COUNT, ncclFloat32, g->comm, g->stream);
        if (r != ncclInProgress) printf("%d\n", r);
        must(through(g, r));
    }
    must(cudaMemcpyAsync(to, host.data(), COUNT * sizeof(float), cudaMemcpyHostToDevice, g->stream));
    std::fill(host.begin(), host.end(), 5.0f);
    if (!done_within(g, 30)) printf("not done\n");
    report(g, to, (size_t)COUNT * (size_t)g->ranks);
}
static void call_in_progress(struct group *g) {
    enter_in_background(g);
    float *own = ramp(g, 100), *to = device<float>(100 * (size_t)g->ranks);
    if (ncclAllGather(own, to, 100, ncclFloat32, g->comm, g->stream) != ncclInProgress) printf("?");
    must(ncclAllGather(own, to, 100, ncclFloat32, g->comm, g->stream));
}
/* The others wait until they abort; then their streams are free, and hold no result. */
static void lost_in_background(struct group *g) {
    enter_in_background(g);
    float *own = ramp(g, 100), *to = device<float>(100 * (size_t)g->ranks);
    must(through(g, ncclAllGather(own, to, 100, ncclFloat32, g->comm, g->stream)));
    const int done = done_within(g, 2);
    ncclResult_t r;
    must(ncclCommGetAsyncError(g->comm, &r));
    printf("%d: %s, %s; ", g->rank, done ? "done" : "waits", ncclGetErrorString(r));
    must(ncclCommAbort(g->comm));
    printf("aborted: %s", done_within(g, 5) ? "done" : "waits");
    printf(" %g\n", (double)download(to, 1)[0]);
}
static void start_of_too_few(struct group *g) {
    if (g->rank == 1) return;
    ncclResult_t r = start_in_background(g);
    for (int i = 0; i < 1000 && r == ncclInProgress; i++) {
        usleep(100);
        must(ncclCommGetAsyncError(g->comm, &r));
    }
    printf("%d: %d, %d\n", g->rank, r, ncclCommAbort(g->comm));
}
static void one_gpu(struct group *g) {
    must(cudaSetDevice(0));
    must(ncclCommInitRank(&g->comm, g->ranks, g->id, g->rank));
}
static void host_buffer(struct group *g) {
    float host[4] = { 0 };
    enter(g);
    must(ncclAllReduce(host, host, 4, ncclFloat32, ncclSum, g->comm, g->stream));
}

static const struct { const char *name; void (*run)(void); void (*ranks)(struct group *g); } all[] = {
    { "gemm", gemm, nullptr },
    { "gemm_batched", gemm_batched, nullptr },
    { "gemm_outside", gemm_outside, nullptr },
    { "gemm_repeats", gemm_repeats, nullptr },
    { "gemm_graph", gemm_graph, nullptr },
    { "all_reduce", nullptr, all_reduce },
    { "rank_order", nullptr, rank_order },
    { "all_gather", nullptr, all_gather },
    { "reduce_scatter", nullptr, reduce_scatter },
    { "broadcast", nullptr, broadcast },
    { "different_calls", nullptr, different_calls },
    { "different_counts", nullptr, different_counts },
    { "lost_rank", nullptr, lost_rank },
    { "background", nullptr, background },
    { "call_in_progress", nullptr, call_in_progress },
    { "lost_in_background", nullptr, lost_in_background },
    { "start_of_too_few", nullptr, start_of_too_few },
    { "one_gpu", nullptr, one_gpu },
    { "host_buffer", nullptr, host_buffer },
};
/* One process a rank; the exit status is 0 when all ended well. */
static int in_ranks(void (*run)(struct group *g), int ranks) {
    struct group g = {};
    int out[16][2], failed = 0;
    char line[512];
    must(ncclGetUniqueId(&g.id));
    for (g.ranks = ranks, g.rank = 0; g.rank < ranks; g.rank++) {
        if (pipe(out[g.rank]) != 0) return 1;
        if (fork() != 0) continue;
        dup2(out[g.rank][1], 1);
        run(&g);
        exit(0);
    }
    for (int r = 0; r < ranks; r++) {
        close(out[r][1]);
        for (ssize_t n; (n = read(out[r][0], line, sizeof line)) > 0;)
            if (write(1, line, (size_t)n) < 0) return 1;
    }
    for (int status; wait(&status) > 0;) failed |= status != 0;
    return failed;
}
int main(int argc, char **argv) {
    int ranks = argc == 3 ? (int)strtol(argv[2], nullptr, 10) : 0;
    for (const auto &one : all) {
        if (argc < 2 || strcmp(argv[1], one.name) || (one.ranks && (ranks < 1 || ranks > 16))) continue;
        if (one.ranks) return in_ranks(one.ranks, ranks);
        one.run();
        return 0;
    }
    fprintf(stderr, "libraries: one name of the table at the end of tests/cuda/libraries.cu\n");
    return 2;
}
