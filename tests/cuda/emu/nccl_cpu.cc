/* nccl_cpu.cc - the collectives of NCCL between processes, over POSIX shared memory.
 *
 * One rank a process. Data goes through a slot of 1 MiB a rank in as many rounds as it takes; sums
 * are added in rank order. Ranks that do not make the same call are our bug: the process says so
 * and aborts. A rank that died is the world's failure, and where NCCL would wait for ever, the
 * receive buffer becomes NaN and ncclCommGetAsyncError says ncclRemoteError from then on. Every
 * rank holds a lock on its byte of the shared file; the kernel drops it with the process.
 * Not here: send and receive, several ranks in one process, groups of more than one communicator.
 * Order: shared state, meeting, life of a communicator, collectives.
 * SPDX-License-Identifier: Apache-2.0 */
#if __has_include(<nccl.h>)
#include "tests/cuda/emu/emu.h"

#include <algorithm>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <fcntl.h>
#include <nccl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

enum { RANKS_MAX = 64, SLOT_BYTES = 1 << 20, PATIENCE_S = 120, NAP_US = 50 };

/* ---- shared state ---- */

struct call { int op, type, reduce, root; uint64_t count, number; };
struct shared {
    uint32_t ranks, joined, arrived, generation;
    struct { struct call call; int gpu; } of[RANKS_MAX];
    alignas(4096) char slot[][SLOT_BYTES];
};
struct ncclComm {
    struct shared *s;
    size_t bytes;
    int fd, rank, ranks, device;
    uint64_t calls;
    ncclResult_t state;
};
static const char *const ops[] = { "ncclAllReduce", "ncclAllGather", "ncclReduceScatter",
                                   "ncclBroadcast" };
enum { ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, BROADCAST };

static ncclResult_t refuse(ncclResult_t r, const char *text, int a, int b) {
    char line[256];
    snprintf(line, sizeof line, text, a, b);
    fprintf(stderr, "emu: NCCL: %s (%s)\n", line, ncclGetErrorString(r));
    return r;
}
extern "C" const char *ncclGetErrorString(ncclResult_t r) {
    switch (r) {
    case ncclSuccess: return "no error";
    case ncclSystemError: return "unhandled system error";
    case ncclInvalidArgument: return "invalid argument";
    case ncclInvalidUsage: return "invalid usage";
    case ncclRemoteError: return "remote process exited or there was a network error";
    default: return "another NCCL error";
    }
}
extern "C" const char *ncclGetLastError(ncclComm_t c) {
    return c ? ncclGetErrorString(c->state) : "";
}

/* ---- meeting ---- */

static bool here(const struct ncclComm *c, int rank) {
    if (rank == c->rank) return true;
    struct flock f = {};
    f.l_type = F_WRLCK;
    f.l_start = rank;
    f.l_len = 1;
    return fcntl(c->fd, F_GETLK, &f) == 0 && f.l_type != F_UNLCK;
}
/* Waits for all ranks; false when one is lost, or does not come in PATIENCE_S. */
static bool meet(struct ncclComm *c) {
    struct shared *s = c->s;
    uint32_t generation = __atomic_load_n(&s->generation, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&s->arrived, 1, __ATOMIC_ACQ_REL) == (uint32_t)c->ranks) {
        __atomic_store_n(&s->arrived, 0, __ATOMIC_RELEASE);
        __atomic_add_fetch(&s->generation, 1, __ATOMIC_ACQ_REL);
        return true;
    }
    for (int nap = 1;; nap++) {
        if (__atomic_load_n(&s->generation, __ATOMIC_ACQUIRE) != generation) return true;
        usleep(NAP_US);
        if (nap % 20) continue;
        int lost = -1;
        for (int r = 0; r < c->ranks; r++)
            if (!here(c, r)) lost = r;
        /* the last to meet may have gone since */
        if (__atomic_load_n(&s->generation, __ATOMIC_ACQUIRE) != generation) return true;
        if (lost >= 0) {
            refuse(ncclRemoteError, "rank %d of %d is lost", lost, c->ranks);
            return false;
        }
        if (nap / (1000000 / NAP_US) >= PATIENCE_S) {
            refuse(ncclRemoteError, "rank %d waited %d s for a rank that did not come", c->rank,
                   PATIENCE_S);
            return false;
        }
    }
}

/* ---- life of a communicator ---- */

extern "C" ncclResult_t ncclGetVersion(int *v) {
    *v = NCCL_VERSION_CODE;
    return ncclSuccess;
}
extern "C" ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    static int made;
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "/qerl-emu-nccl-%d-%d", (int)getpid(), made++);
    return ncclSuccess;
}
static ncclResult_t join(struct ncclComm *c) {
    struct flock f = {};
    int gpu;
    cudaDeviceGetAttribute(&gpu, cudaDevAttrPciBusId, c->device);
    f.l_type = F_WRLCK;
    f.l_start = c->rank;
    f.l_len = 1;
    if (fcntl(c->fd, F_SETLK, &f) != 0)
        return refuse(ncclInvalidUsage, "rank %d of %d is there twice", c->rank, c->ranks);
    c->s->of[c->rank].gpu = gpu;
    __atomic_add_fetch(&c->s->joined, 1, __ATOMIC_ACQ_REL);
    for (int nap = 0; __atomic_load_n(&c->s->joined, __ATOMIC_ACQUIRE) < (uint32_t)c->ranks; nap++) {
        if (nap / (1000000 / NAP_US) >= PATIENCE_S)
            return refuse(ncclSystemError, "only %d of %d ranks came", (int)c->s->joined, c->ranks);
        usleep(NAP_US);
    }
    for (int r = 0; r < c->ranks; r++)
        if (r != c->rank && c->s->of[r].gpu == gpu)
            return refuse(ncclInvalidUsage, "ranks %d and %d are on one GPU", c->rank, r);
    return meet(c) ? ncclSuccess : ncclRemoteError;
}
extern "C" ncclResult_t ncclCommInitRank(ncclComm_t *out, int ranks, ncclUniqueId id, int rank) {
    *out = nullptr;
    if (ranks < 1 || ranks > RANKS_MAX || rank < 0 || rank >= ranks)
        return refuse(ncclInvalidArgument, "rank %d of %d", rank, ranks);
    struct ncclComm *c = new ncclComm{ nullptr, 0, -1, rank, ranks, 0, 0, ncclSuccess };
    c->bytes = sizeof(struct shared) + (size_t)ranks * SLOT_BYTES;
    ncclResult_t r = ncclSystemError;
    if (cudaGetDevice(&c->device) == cudaSuccess &&
        (c->fd = shm_open(id.internal, O_RDWR | O_CREAT | O_CLOEXEC, 0600)) >= 0 &&
        ftruncate(c->fd, (off_t)c->bytes) == 0) {
        void *map = mmap(nullptr, c->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, c->fd, 0);
        if (map != MAP_FAILED) {
            c->s = (struct shared *)map;
            r = join(c);
        }
    }
    shm_unlink(id.internal);                          /* all have it open, or it failed */
    if (r) ncclCommDestroy(c);
    else *out = c;
    return r;
}
extern "C" ncclResult_t ncclCommDestroy(ncclComm_t c) {
    if (!c) return ncclSuccess;
    if (c->s) munmap(c->s, c->bytes);
    if (c->fd >= 0) close(c->fd);
    delete c;
    return ncclSuccess;
}
extern "C" ncclResult_t ncclCommFinalize(ncclComm_t) { return ncclSuccess; }
extern "C" ncclResult_t ncclCommAbort(ncclComm_t c) { return ncclCommDestroy(c); }
extern "C" ncclResult_t ncclCommGetAsyncError(ncclComm_t c, ncclResult_t *r) {
    *r = c->state;
    return ncclSuccess;
}
extern "C" ncclResult_t ncclCommCount(const ncclComm_t c, int *n) {
    *n = c->ranks;
    return ncclSuccess;
}
extern "C" ncclResult_t ncclCommUserRank(const ncclComm_t c, int *rank) {
    *rank = c->rank;
    return ncclSuccess;
}
extern "C" ncclResult_t ncclGroupStart(void) { return ncclSuccess; }
extern "C" ncclResult_t ncclGroupEnd(void) { return ncclSuccess; }

/* ---- collectives ---- */

struct job {
    struct ncclComm *c;
    struct call call;
    const char *from;
    char *to;
    size_t element, from_bytes, to_bytes;
};
static size_t size_of(int type) {
    switch (type) {
    case ncclInt8: case ncclUint8: return 1;
    case ncclFloat16: case ncclBfloat16: return 2;
    case ncclInt32: case ncclUint32: case ncclFloat32: return 4;
    case ncclInt64: case ncclUint64: case ncclFloat64: return 8;
    default: return 0;
    }
}
static float wide(__half v) { return __half2float(v); }
static float wide(__nv_bfloat16 v) { return __bfloat162float(v); }
template <class T> T wide(T v) { return v; }
template <class T, class W> void fold(char *to, const struct shared *s, int ranks, size_t at,
                                      size_t n, int how) {
    for (size_t i = 0; i < n; i++) {
        W sum = wide(((const T *)(s->slot[0] + at))[i]);
        for (int r = 1; r < ranks; r++) {
            W v = wide(((const T *)(s->slot[r] + at))[i]);
            sum = how == ncclMax ? (v > sum ? v : sum) : how == ncclMin ? (v < sum ? v : sum)
                                                       : (W)(sum + v);
        }
        ((T *)to)[i] = (T)sum;
    }
}
/* to[0, n) = the ranks' slots from byte `at`, in rank order */
static void reduce(const struct job *j, char *to, size_t at, size_t n) {
    const struct shared *s = j->c->s;
    int ranks = j->c->ranks, how = j->call.reduce;
    switch (j->call.type) {
    case ncclFloat32: return fold<float, float>(to, s, ranks, at, n, how);
    case ncclFloat64: return fold<double, double>(to, s, ranks, at, n, how);
    case ncclBfloat16: return fold<__nv_bfloat16, float>(to, s, ranks, at, n, how);
    case ncclFloat16: return fold<__half, float>(to, s, ranks, at, n, how);
    case ncclInt32: return fold<int32_t, int32_t>(to, s, ranks, at, n, how);
    case ncclUint32: return fold<uint32_t, uint32_t>(to, s, ranks, at, n, how);
    case ncclInt64: return fold<int64_t, int64_t>(to, s, ranks, at, n, how);
    case ncclUint64: return fold<uint64_t, uint64_t>(to, s, ranks, at, n, how);
    default: return fold<uint8_t, uint8_t>(to, s, ranks, at, n, how);
    }
}
static void agree(const struct ncclComm *c) {
    for (int r = 0; r < c->ranks; r++) {
        const struct call *a = &c->s->of[c->rank].call, *b = &c->s->of[r].call;
        if (a->op != b->op || a->type != b->type || a->reduce != b->reduce || a->root != b->root ||
            a->count != b->count || a->number != b->number)
            emu_die(__FILE__, __LINE__,
                    "NCCL: rank %d makes call %llu, %s of %llu elements (type %d, operation %d, root "
                    "%d), rank %d call %llu, %s of %llu (type %d, operation %d, root %d)",
                    c->rank, (unsigned long long)a->number, ops[a->op], (unsigned long long)a->count,
                    a->type, a->reduce, a->root, r, (unsigned long long)b->number, ops[b->op],
                    (unsigned long long)b->count, b->type, b->reduce, b->root);
    }
}
/* Bytes [at, at + n) of what every rank sends lie in the slots. */
static void receive(const struct job *j, size_t at, size_t n) {
    const struct ncclComm *c = j->c;
    switch (j->call.op) {
    case ALL_REDUCE: reduce(j, j->to + at, 0, n / j->element); break;
    case BROADCAST: memcpy(j->to + at, c->s->slot[j->call.root], n); break;
    case ALL_GATHER:
        for (int r = 0; r < c->ranks; r++)
            memcpy(j->to + (size_t)r * j->from_bytes + at, c->s->slot[r], n);
        break;
    case REDUCE_SCATTER: {
        size_t first = (size_t)c->rank * j->to_bytes, last = first + j->to_bytes;
        size_t low = at > first ? at : first, high = at + n < last ? at + n : last;
        if (low < high) reduce(j, j->to + (low - first), low - at, (high - low) / j->element);
    }
    }
}
static void job_run(void *arg) {
    const struct job *j = (const struct job *)arg;
    struct ncclComm *c = j->c;
    bool whole = c->state == ncclSuccess;
    c->s->of[c->rank].call = j->call;
    whole = whole && meet(c);
    if (whole) agree(c);
    for (size_t at = 0; whole && at < j->from_bytes; at += SLOT_BYTES) {
        size_t n = std::min(j->from_bytes - at, (size_t)SLOT_BYTES);
        memcpy(c->s->slot[c->rank], j->from + at, n);
        whole = meet(c);
        if (whole) receive(j, at, n);
        whole = whole && meet(c);                     /* before the slots are written again */
    }
    if (whole) return;
    c->state = ncclRemoteError;
    memset(j->to, 0xff, j->to_bytes);
}
static void job_drop(void *arg) { delete (struct job *)arg; }
static bool holds(const void *p, size_t bytes, int device) {
    int its;
    char *first;
    size_t size;
    return !bytes || (emu_buffer(p, &its, &first, &size) && its == device &&
                      (const char *)p + bytes <= first + size);
}
static ncclResult_t collective(struct ncclComm *c, cudaStream_t stream, int op, const void *from,
                               size_t from_count, void *to, size_t to_count, int type, int how,
                               int root) {
    size_t element = size_of(type);
    if (!element || how > ncclMin || how == ncclProd || root < 0 || root >= c->ranks)
        return refuse(ncclInvalidArgument, "type %d, operation %d or the root is not emulated", type,
                      how);
    if (c->state) return c->state;
    if (!holds(from, from_count * element, c->device) || !holds(to, to_count * element, c->device))
        return refuse(ncclInvalidArgument, "rank %d: a buffer is not whole on device %d", c->rank,
                      c->device);
    struct emu_work w = {};
    w.launch.name = ops[op];
    w.launch.run = job_run;
    w.launch.drop = job_drop;
    w.launch.args = new job{ c,
                             { op, type, how, root, from_count, c->calls++ },
                             (const char *)from,
                             (char *)to,
                             element,
                             from_count * element,
                             to_count * element };
    w.device = c->device;
    return emu_queue(stream, &w) ? ncclUnhandledCudaError : ncclSuccess;
}
extern "C" ncclResult_t ncclAllReduce(const void *from, void *to, size_t n, ncclDataType_t type,
                                      ncclRedOp_t how, ncclComm_t c, cudaStream_t s) {
    return collective(c, s, ALL_REDUCE, from, n, to, n, type, how, 0);
}
extern "C" ncclResult_t ncclAllGather(const void *from, void *to, size_t n, ncclDataType_t type,
                                      ncclComm_t c, cudaStream_t s) {
    return collective(c, s, ALL_GATHER, from, n, to, n * (size_t)c->ranks, type, 0, 0);
}
extern "C" ncclResult_t ncclReduceScatter(const void *from, void *to, size_t n, ncclDataType_t type,
                                          ncclRedOp_t how, ncclComm_t c, cudaStream_t s) {
    return collective(c, s, REDUCE_SCATTER, from, n * (size_t)c->ranks, to, n, type, how, 0);
}
extern "C" ncclResult_t ncclBroadcast(const void *from, void *to, size_t n, ncclDataType_t type,
                                      int root, ncclComm_t c, cudaStream_t s) {
    return collective(c, s, BROADCAST, c->rank == root ? from : to, n, to, n, type, 0, root);
}
#endif
