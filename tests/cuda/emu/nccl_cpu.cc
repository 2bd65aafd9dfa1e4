/* nccl_cpu.cc - the collectives of NCCL between processes, over POSIX shared memory.
 *
 * One rank a process. Data goes through a slot of 1 MiB a rank in as many rounds as it takes; sums
 * are added in rank order. Ranks that do not make the same call are our bug: the process says so
 * and aborts. A rank that died is the world's failure: the receive buffer becomes NaN and
 * ncclCommGetAsyncError says ncclRemoteError from then on; with EMU_NCCL_HANG=1 nobody notices, as
 * with NCCL in one machine, until the communicator is aborted. Every rank holds a lock on its byte
 * of the shared file; the kernel drops it with the process.
 * A non-blocking communicator (blocking = 0) starts and calls in the background: ncclInProgress
 * until ncclCommGetAsyncError has been asked, and its work stays queued until all ranks came.
 * EMU_NCCL_DIE=RANK:N: that rank kills itself amid its call N, counted from 0.
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
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

enum { RANKS_MAX = 64, SLOT_BYTES = 1 << 20, PATIENCE_S = 120, NAP_US = 50 };

/* ---- shared state ---- */

struct call { int op, type, reduce, root; uint64_t count, number; };
struct shared {
    uint32_t ranks, arrived, generation;
    struct { struct call call; int gpu; } of[RANKS_MAX];
    alignas(4096) char slot[][SLOT_BYTES];
};
struct ncclComm {
    struct shared *s;
    size_t bytes;
    int fd, rank, ranks, device;
    uint64_t calls;
    ncclResult_t state;
    bool background;                                  /* non-blocking */
    bool aborted, starting;
    int jobs;                                         /* queued: they outlive an abort */
    unsigned naps;
    uint32_t generation;                              /* that we arrived in */
    char name[64];
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
enum came { NOT_YET, ALL, LOST };
static void arrive(struct ncclComm *c) {
    struct shared *s = c->s;
    c->generation = __atomic_load_n(&s->generation, __ATOMIC_ACQUIRE);
    c->naps = 0;
    if (__atomic_add_fetch(&s->arrived, 1, __ATOMIC_ACQ_REL) == (uint32_t)c->ranks) {
        __atomic_store_n(&s->arrived, 0, __ATOMIC_RELEASE);
        __atomic_add_fetch(&s->generation, 1, __ATOMIC_ACQ_REL);
    }
}
static bool passed(const struct ncclComm *c) {
    return __atomic_load_n(&c->s->generation, __ATOMIC_ACQUIRE) != c->generation;
}
/* Have all arrived? Asked about once in NAP_US. */
static enum came met(struct ncclComm *c) {
    if (passed(c)) return ALL;
    if (c->aborted) return LOST;
    if (++c->naps % 20) return NOT_YET;
    int lost = -1;
    for (int r = 0; r < c->ranks && !c->starting; r++)   /* then they may still be to come */
        if (!here(c, r)) lost = r;
    if (passed(c)) return ALL;                        /* the last to meet may have gone since */
    if (lost >= 0 && !emu_setting("EMU_NCCL_HANG", 0)) {
        refuse(ncclRemoteError, "rank %d of %d is lost", lost, c->ranks);
        return LOST;
    }
    if (c->naps / (1000000 / NAP_US) < PATIENCE_S) return NOT_YET;
    refuse(ncclRemoteError, "rank %d waited %d s for a rank that did not come", c->rank, PATIENCE_S);
    return LOST;
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
/* Takes its place. */
static ncclResult_t join(struct ncclComm *c) {
    struct flock f = {};
    cudaDeviceGetAttribute(&c->s->of[c->rank].gpu, cudaDevAttrPciBusId, c->device);
    f.l_type = F_WRLCK;
    f.l_start = c->rank;
    f.l_len = 1;
    if (fcntl(c->fd, F_SETLK, &f) != 0)
        return refuse(ncclInvalidUsage, "rank %d of %d is there twice", c->rank, c->ranks);
    arrive(c);
    return ncclInProgress;
}
/* Are all there, and on a GPU each? */
static ncclResult_t start(struct ncclComm *c) {
    const enum came all = met(c);
    if (all == NOT_YET) return ncclInProgress;
    shm_unlink(c->name);                              /* all have it open, or it failed */
    if (all == LOST) return ncclRemoteError;
    c->starting = false;
    for (int r = 0; r < c->ranks; r++)
        if (r != c->rank && c->s->of[r].gpu == c->s->of[c->rank].gpu)
            return refuse(ncclInvalidUsage, "ranks %d and %d are on one GPU", c->rank, r);
    return ncclSuccess;
}
static ncclResult_t open_comm(struct ncclComm *c, const char *name) {
    c->bytes = sizeof(struct shared) + (size_t)c->ranks * SLOT_BYTES;
    if (cudaGetDevice(&c->device) != cudaSuccess ||
        (c->fd = shm_open(name, O_RDWR | O_CREAT | O_CLOEXEC, 0600)) < 0 ||
        ftruncate(c->fd, (off_t)c->bytes) != 0)
        return ncclSystemError;
    void *map = mmap(nullptr, c->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, c->fd, 0);
    if (map == MAP_FAILED) return ncclSystemError;
    c->s = (struct shared *)map;
    c->starting = true;
    return join(c);
}
extern "C" ncclResult_t ncclCommInitRankConfig(ncclComm_t *out, int ranks, ncclUniqueId id, int rank,
                                               ncclConfig_t *config) {
    *out = nullptr;
    if (ranks < 1 || ranks > RANKS_MAX || rank < 0 || rank >= ranks)
        return refuse(ncclInvalidArgument, "rank %d of %d", rank, ranks);
    struct ncclComm *c = new ncclComm{};
    c->fd = -1;
    c->rank = rank;
    c->ranks = ranks;
    c->background = config && config->blocking == 0;
    snprintf(c->name, sizeof c->name, "%s", id.internal);
    ncclResult_t r = open_comm(c, id.internal);
    while (r == ncclInProgress && !c->background) {
        usleep(NAP_US);
        r = start(c);
    }
    c->state = r;
    if (r && r != ncclInProgress) ncclCommDestroy(c);
    else *out = c;
    return r;
}
extern "C" ncclResult_t ncclCommInitRank(ncclComm_t *out, int ranks, ncclUniqueId id, int rank) {
    return ncclCommInitRankConfig(out, ranks, id, rank, nullptr);
}
extern "C" ncclResult_t ncclCommDestroy(ncclComm_t c) {
    if (!c) return ncclSuccess;
    c->aborted = true;
    if (c->jobs) return ncclSuccess;                  /* the last of them comes here again */
    if (c->starting) shm_unlink(c->name);
    if (c->s) munmap(c->s, c->bytes);
    if (c->fd >= 0) close(c->fd);
    delete c;
    return ncclSuccess;
}
extern "C" ncclResult_t ncclCommFinalize(ncclComm_t) { return ncclSuccess; }
extern "C" ncclResult_t ncclCommAbort(ncclComm_t c) { return ncclCommDestroy(c); }
extern "C" ncclResult_t ncclCommGetAsyncError(ncclComm_t c, ncclResult_t *r) {
    if (c->state == ncclInProgress) c->state = c->starting ? start(c) : ncclSuccess;
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
    enum { BEGINS, COMES, FULL, TAKEN, ENDED } phase;
    size_t at;                                        /* bytes that went through the slots */
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
static void maybe_die(const struct job *j) {
    const char *who = getenv("EMU_NCCL_DIE");
    unsigned long long call;
    int rank;
    if (who && sscanf(who, "%d:%llu", &rank, &call) == 2 && rank == j->c->rank &&
        call == j->call.number)
        raise(SIGKILL);
}
/* What follows once all have met in this phase. */
static void go_on(struct job *j) {
    struct ncclComm *c = j->c;
    const size_t n = std::min(j->from_bytes - j->at, (size_t)SLOT_BYTES);
    switch (j->phase) {
    case job::BEGINS:
        c->s->of[c->rank].call = j->call;
        j->at = 0;
        j->phase = job::COMES;
        break;
    case job::FULL:
        receive(j, j->at, n);
        maybe_die(j);
        j->at += n;
        j->phase = job::TAKEN;                        /* before the slots are written again */
        break;
    default:
        if (j->phase == job::COMES) agree(c);
        j->phase = j->at < j->from_bytes ? job::FULL : job::ENDED;
        if (j->phase == job::FULL)
            memcpy(c->s->slot[c->rank], j->from + j->at,
                   std::min(j->from_bytes - j->at, (size_t)SLOT_BYTES));
    }
    if (j->phase != job::ENDED) arrive(c);
}
/* As far as it goes without waiting. */
static bool job_ready(void *arg) {
    struct job *j = (struct job *)arg;
    struct ncclComm *c = j->c;
    while (j->phase != job::ENDED) {
        enum came all = c->state != ncclSuccess && c->state != ncclInProgress ? LOST
                        : j->phase == job::BEGINS                             ? ALL
                                                                              : met(c);
        if (all == NOT_YET) return false;
        if (all == ALL) go_on(j);
        else {
            c->state = ncclRemoteError;
            memset(j->to, 0xff, j->to_bytes);
            j->phase = job::ENDED;
        }
    }
    return true;
}
static void job_run(void *arg) {
    while (!job_ready(arg)) usleep(NAP_US);
    ((struct job *)arg)->phase = job::BEGINS;         /* in a graph it may run again */
}
static void job_drop(void *arg) {
    struct ncclComm *c = ((struct job *)arg)->c;
    delete (struct job *)arg;
    c->jobs--;
    if (c->aborted) ncclCommDestroy(c);
}
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
    if (c->state == ncclInProgress)
        return refuse(ncclInvalidUsage, "rank %d: call %d while another is in progress", c->rank,
                      (int)c->calls);
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
                             to_count * element,
                             job::BEGINS,
                             0 };
    w.device = c->device;
    c->jobs++;
    if (c->background) {
        w.ready = job_ready;
        c->state = ncclInProgress;
    }
    if (emu_queue(stream, &w)) return ncclUnhandledCudaError;
    return c->background ? c->state : ncclSuccess;
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
