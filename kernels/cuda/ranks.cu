/* ranks.cu - arrays of several devices, one a process, added in rank order (plugin.h: ranks).
 *
 * Knows: NCCL, as far as a gather goes. It is loaded when first asked for: what runs on one device
 * needs none of it. Does not know: how ranks are started, who judges that one is lost.
 * The communicator is non-blocking and every wait polls: NCCL itself waits for a dead rank of its
 * own machine for ever, so that each look asks the caller's watch too, and a loss aborts what the
 * device still waits for. The sum is a kernel's and not NCCL's, whose order of adding is its own.
 * Order: the library, waiting, open, gather and add, close.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cuda/device.h"

#include <time.h>

#include "kernels/cuda/library.h"

#if __has_include(<nccl.h>)
#include <nccl.h>

/* ---- the library ---- */

#define NCCL_CALLS(X)                                                                              \
    X(ncclGetVersion) X(ncclGetUniqueId) X(ncclCommInitRankConfig) X(ncclAllGather)                \
        X(ncclCommGetAsyncError) X(ncclCommAbort) X(ncclGetErrorString) X(ncclGetLastError)
#define DECLARE(name) decltype(&::name) name;
static struct { NCCL_CALLS(DECLARE) } nccl;

#define ENTRY(name) { #name, (void **)&nccl.name },
static const struct cuda_function functions[] = { NCCL_CALLS(ENTRY) };

static int load(struct err *e) {
    const struct cuda_library l = { "libnccl.so.2", "QERL_NCCL", "libnccl2 (2.14 or newer)",
                                    functions, sizeof functions / sizeof *functions };
    return cuda_library_load(&l, e);
}

int cuda_ranks_version(char out[16], struct err *e) {
    int v = 0;
    if (load(e) < 0) return -1;
    (void)nccl.ncclGetVersion(&v);
    snprintf(out, 16, "%d.%d.%d", v / 10000, v / 100 % 100, v % 100);
    return 0;
}

int cuda_ranks_id(char id[CUDA_RANKS_ID_BYTES], struct err *e) {
    static_assert(sizeof(ncclUniqueId) == CUDA_RANKS_ID_BYTES, "the id's size is NCCL's");
    if (load(e) < 0) return -1;
    const ncclResult_t rc = nccl.ncclGetUniqueId((ncclUniqueId *)id);
    return rc == ncclSuccess ? 0
                             : cuda_fail(e, EXIT_ENV, "ncclGetUniqueId: %s (%s)",
                                         nccl.ncclGetErrorString(rc), nccl.ncclGetLastError(NULL));
}

struct cuda_ranks {
    struct cuda_ranks_opts o;
    ncclComm_t comm;                     /* NULL once aborted */
    float *all;                          /* [count, piece], on the device */
};

/* ---- waiting ---- */

enum { NAP_US = 20, NAP_US_MAX = 1000, WAIT_SECONDS = 300, NAMED_SECONDS = 3 };

static void give_up(struct cuda_ranks *r) {
    if (r->comm) (void)nccl.ncclCommAbort(r->comm);
    r->comm = NULL;
}

static void nap(int us) {
    const struct timespec t = { 0, us * 1000L };
    nanosleep(&t, NULL);
}

/* One look and a nap, longer from time to time. Naps are counted, not seconds: while we are stopped
 * ourselves, nobody else grows late. */
static int look(struct cuda_ranks *r, int64_t *waited_us, const char *what, struct err *e) {
    const int us = *waited_us / 64 < NAP_US ? NAP_US
                   : *waited_us / 64 > NAP_US_MAX ? NAP_US_MAX : (int)(*waited_us / 64);
    if (r->o.watch(r->o.ud, e) < 0) {
        give_up(r);
        return -1;
    }
    if (*waited_us > WAIT_SECONDS * 1000000ll) {
        give_up(r);
        return cuda_fail(e, EXIT_FAILED, "%s: not all of %d ranks came to an end in %d s", what,
                         r->o.count, WAIT_SECONDS);
    }
    nap(us);
    *waited_us += us;
    return 0;
}

/* Where a rank that died is the reason, the watch will soon say so, and which. */
static int broken(struct cuda_ranks *r, const char *what, ncclResult_t rc, struct err *e) {
    char last[160];
    snprintf(last, sizeof last, "%s", nccl.ncclGetLastError(r->comm));
    give_up(r);
    for (int64_t us = 0; us < NAMED_SECONDS * 1000000ll; us += NAP_US_MAX) {
        if (r->o.watch(r->o.ud, e) < 0) return -1;
        nap(NAP_US_MAX);
    }
    return cuda_fail(e, EXIT_FAILED, "%s on %s: %s (%s)", what, r->o.kern->name,
                     nccl.ncclGetErrorString(rc), last);
}

/* Until a call that may go on in the background is through. */
static int through(struct cuda_ranks *r, const char *what, ncclResult_t rc, struct err *e) {
    int64_t waited_us = 0;
    while (rc == ncclInProgress) {
        if (look(r, &waited_us, what, e) < 0) return -1;
        const ncclResult_t asked = nccl.ncclCommGetAsyncError(r->comm, &rc);
        if (asked != ncclSuccess) rc = asked;
    }
    return rc == ncclSuccess ? 0 : broken(r, what, rc, e);
}

int cuda_ranks_wait(struct cuda_ranks *r, struct err *e) {
    static const char what[] = "gather of ranks";
    cudaStream_t stream = cuda_stream(r->o.kern);
    int64_t waited_us = 0;
    cudaError_t done;
    while ((done = cudaStreamQuery(stream)) == cudaErrorNotReady) {
        ncclResult_t rc = ncclSuccess;
        (void)cudaGetLastError();                     /* "not ready" is none */
        const ncclResult_t asked = nccl.ncclCommGetAsyncError(r->comm, &rc);
        if (asked != ncclSuccess) rc = asked;
        if (rc != ncclSuccess && rc != ncclInProgress) return broken(r, what, rc, e);
        if (look(r, &waited_us, what, e) < 0) return -1;
    }
    CUDA_TRY(r->o.kern, what, done);
    ncclResult_t rc = ncclSuccess;
    const ncclResult_t asked = nccl.ncclCommGetAsyncError(r->comm, &rc);
    return through(r, what, asked != ncclSuccess ? asked : rc, e);
}

/* ---- open ---- */

int cuda_ranks_open(struct cuda_ranks **out, const struct cuda_ranks_opts *o, struct err *e) {
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    ncclUniqueId id;
    if (load(e) < 0) return -1;
    struct cuda_ranks *r = (struct cuda_ranks *)calloc(1, sizeof *r);
    if (!r) return cuda_fail(e, EXIT_ENV, "out of memory");
    r->o = *o;
    *out = r;
    const size_t bytes = (size_t)o->count * o->piece * sizeof(float);
    (void)cuda_stream(o->kern);                       /* its device is this thread's */
    const cudaError_t rc = cudaMalloc((void **)&r->all, bytes);
    if (rc != cudaSuccess)
        return cuda_fail(e, EXIT_ENV, "%zu bytes for the gradients of %d ranks on %s: %s", bytes,
                         o->count, o->kern->name, cudaGetErrorString(rc));
    config.blocking = 0;
    memcpy(&id, o->id, sizeof id);
    return through(r, "NCCL's start",
                   nccl.ncclCommInitRankConfig(&r->comm, o->count, id, o->rank, &config), e);
}

/* ---- gather and add ---- */

int cuda_ranks_gather(struct cuda_ranks *r, kptr x, size_t n, struct err *e) {
    assert(n <= r->o.piece);
    return through(r, "gather of ranks",
                   nccl.ncclAllGather(x.p, r->all, n, ncclFloat32, r->comm,
                                      cuda_stream(r->o.kern)), e);
}

__global__ void ranks_add_kernel(const float *all, float *x, size_t n, int count) {
    const size_t i = cuda_index();
    if (i >= n) return;
    float sum = all[i];
    for (int r = 1; r < count; r++) sum += all[(size_t)r * n + i];
    x[i] = sum;
}

void cuda_ranks_add(struct cuda_ranks *r, kptr x, size_t n) {
    struct kern *k = r->o.kern;
    LAUNCH(ranks_add_kernel, cuda_blocks(n, 256), 256, 0, cuda_stream(k), r->all, (float *)x.p, n,
           r->o.count);
    CUDA_TRY(k, "ranks_add", cudaGetLastError());
}

/* ---- close ---- */

/* Aborts: nothing is under way, and NCCL's own farewell would wait for ranks that have gone. */
void cuda_ranks_close(struct cuda_ranks **rp) {
    struct cuda_ranks *r = *rp;
    if (!r) return;
    give_up(r);
    if (r->all) (void)cudaFree(r->all);
    free(r);
    *rp = NULL;
}

#else

/* Built on a machine without NCCL's header: one device only. */
static int absent(struct err *e) {
    return cuda_fail(e, EXIT_ENV, "qerl-cuda.so was built without NCCL, which GPUs of one stage "
                                  "need: install libnccl-dev and build it again with make CUDA=1");
}
int cuda_ranks_version(char out[16], struct err *e) {
    out[0] = 0;
    return absent(e);
}
int cuda_ranks_id(char id[CUDA_RANKS_ID_BYTES], struct err *e) {
    id[0] = 0;
    return absent(e);
}
int cuda_ranks_open(struct cuda_ranks **, const struct cuda_ranks_opts *, struct err *e) {
    return absent(e);
}
int cuda_ranks_gather(struct cuda_ranks *, kptr, size_t, struct err *e) { return absent(e); }
void cuda_ranks_add(struct cuda_ranks *, kptr, size_t) {}
int cuda_ranks_wait(struct cuda_ranks *, struct err *e) { return absent(e); }
void cuda_ranks_close(struct cuda_ranks **) {}
#endif
