/* plugin.cu - the entry of bin/qerl-cuda.so: devices, the state behind a table, its memory, pack.
 *
 * Knows: CUDA's runtime. Does not know: what an operation computes (the other files of the folder).
 * Links nothing of the programs: it writes its own struct err.
 * Order: errors, stream, memory, host arrays, pack, devices, open, entry.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cuda/device.h"

#include <stdarg.h>

/* ---- errors ---- */

int cuda_fail(struct err *e, int code, const char *fmt, ...) {
    va_list ap;
    if (!e) return -1;
    va_start(ap, fmt);
    vsnprintf(e->text, sizeof e->text, fmt, ap);
    va_end(ap);
    e->code = code;
    return -1;
}
/* What a device refuses is the machine's. */
#define fail(e, ...) cuda_fail(e, EXIT_ENV, __VA_ARGS__)

/* QERL_CUDA_SYNC=1: a fault is met where it was made, at the price of a wait after each call. Read
 * when the plugin is loaded: a static of a function has a guard that is atomic. */
static const char *const sync_set = getenv("QERL_CUDA_SYNC");
static const bool sync_asked = sync_set && !strcmp(sync_set, "1");
static cudaError_t wait_if_asked(struct kern *k) {
    enum cudaStreamCaptureStatus kept = cudaStreamCaptureStatusNone;
    if (!sync_asked) return cudaSuccess;
    const cudaError_t rc = cudaStreamIsCapturing(cuda_of(k)->stream, &kept);
    if (rc != cudaSuccess || kept != cudaStreamCaptureStatusNone) return rc;
    return cudaStreamSynchronize(cuda_of(k)->stream);
}

bool cuda_ok(struct kern *k, const char *operation, cudaError_t rc) {
    if (rc == cudaSuccess) rc = wait_if_asked(k);
    if (rc == cudaSuccess) return true;
    (void)cudaGetLastError();                         /* or the next launch would be blamed */
    struct err *e = &k->latched;
    if (e->text[0]) return false;
    e->code = rc == cudaErrorMemoryAllocation ? EXIT_ENV : EXIT_FAILED;
    snprintf(e->text, sizeof e->text, "%s on %s: %s: %s", operation, k->name,
             cudaGetErrorName(rc), cudaGetErrorString(rc));
    return false;
}

/* ---- stream ---- */

static thread_local int current = -1;                 /* this thread's device */

static cudaError_t make_current(int device) {
    if (current == device) return cudaSuccess;
    cudaError_t rc = cudaSetDevice(device);
    if (rc == cudaSuccess) current = device;
    return rc;
}

cudaStream_t cuda_stream(struct kern *k) {
    CUDA_TRY(k, "cudaSetDevice", make_current(cuda_of(k)->device));
    return cuda_of(k)->stream;
}

/* ---- memory ---- */

static void out_of_memory(struct kern *k, struct err *e, size_t bytes) {
    size_t free_bytes = 0, all = 0;
    (void)cudaGetLastError();
    (void)cudaMemGetInfo(&free_bytes, &all);
    fail(e, "out of memory on %s: %zu bytes asked for, %zu of %zu free", k->name, bytes,
         free_bytes, all);
}

static int slot_alloc(struct kern *k, kptr *out, size_t bytes, struct err *e) {
    cudaStream_t stream = cuda_stream(k);
    out->p = NULL;
    cudaError_t rc = cudaMalloc(&out->p, bytes ? bytes : 1);
    if (rc == cudaErrorMemoryAllocation) {
        out_of_memory(k, e, bytes);
        return -1;
    }
    if (rc == cudaSuccess) rc = cudaMemsetAsync(out->p, 0, bytes, stream);
    if (rc == cudaSuccess) return 0;
    (void)cudaGetLastError();
    if (out->p) (void)cudaFree(out->p);
    out->p = NULL;
    return fail(e, "alloc on %s: %s: %s", k->name, cudaGetErrorName(rc), cudaGetErrorString(rc));
}

static void slot_free(struct kern *k, kptr *p) {
    if (!p->p) return;
    CUDA_TRY(k, "free", cudaStreamSynchronize(cuda_stream(k)));
    CUDA_TRY(k, "free", cudaFree(p->p));
    p->p = NULL;
}

/* The caller's memory is free on return. Small arrays pass the ring, and nothing waits; a big one
 * is waited for: a device that reads the host's pages by itself (Grace) need not copy it first. */
enum { RING_BYTES = 1 << 20, RING_ITEM_MAX = RING_BYTES / 4 };

static char *ring_take(struct kern *k, const char *operation, const void *from, size_t bytes);

static void slot_upload(struct kern *k, kptr to, const void *from, size_t bytes) {
    if (!bytes || cuda_spoils(k)) return;
    const bool small = bytes <= RING_ITEM_MAX;
    const void *source = small ? ring_take(k, "upload", from, bytes) : from;
    if (source &&
        CUDA_TRY(k, "upload", cudaMemcpyAsync(to.p, source, bytes, cudaMemcpyHostToDevice,
                                              cuda_stream(k))) && !small)
        CUDA_TRY(k, "upload", cudaStreamSynchronize(cuda_stream(k)));
}

bool cuda_fetch(struct kern *k, const char *operation, void *to, const void *from, size_t bytes) {
    cudaStream_t stream = cuda_stream(k);
    if (!bytes) return true;
    if (!cuda_spoils(k) &&
        CUDA_TRY(k, operation,
                 cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream)) &&
        CUDA_TRY(k, operation, cudaStreamSynchronize(stream)))
        return true;
    memset(to, 0, bytes);
    return false;
}
static void slot_download(struct kern *k, void *to, kptr from, size_t bytes) {
    cuda_fetch(k, "download", to, from.p, bytes);
}

static void slot_copy(struct kern *k, kptr to, kptr from, size_t bytes) {
    if (bytes)
        CUDA_TRY(k, "copy", cudaMemcpyAsync(to.p, from.p, bytes, cudaMemcpyDeviceToDevice,
                                            cuda_stream(k)));
}
static void slot_zero(struct kern *k, kptr p, size_t bytes) {
    if (bytes) CUDA_TRY(k, "zero", cudaMemsetAsync(p.p, 0, bytes, cuda_stream(k)));
}

static int slot_sync(struct kern *k, struct err *e) {
    CUDA_TRY(k, "sync", cudaStreamSynchronize(cuda_stream(k)));
    if (!k->latched.text[0]) return 0;
    if (e) *e = k->latched;
    memset(&k->latched, 0, sizeof k->latched);
    return -1;
}

void *cuda_scratch(struct kern *k, const char *operation, size_t bytes) {
    struct cuda_state *s = cuda_of(k);
    if (bytes <= s->scratch_bytes) return s->scratch;
    if (cuda_spoils(k)) return NULL;
    bytes = (bytes + (bytes >> 2) + 65535) / 65536 * 65536;
    if (!CUDA_TRY(k, operation, cudaStreamSynchronize(cuda_stream(k)))) return NULL;
    (void)cudaFree(s->scratch);
    s->scratch = NULL;
    s->scratch_bytes = 0;
    if (!CUDA_TRY(k, operation, cudaMalloc(&s->scratch, bytes))) return NULL;
    s->scratch_bytes = bytes;
    return s->scratch;
}

/* ---- host arrays ---- */

/* Room for `bytes` at ring_at. What lies there may still be read by queued copies and kernels: a
 * new round begins when they are done. */
static bool ring_reserve(struct kern *k, const char *operation, size_t bytes) {
    struct cuda_state *s = cuda_of(k);
    if (s->ring_at + bytes <= s->ring_bytes) return true;
    if (!CUDA_TRY(k, operation, cudaStreamSynchronize(cuda_stream(k)))) return false;
    s->ring_at = 0;
    if (bytes <= s->ring_bytes) return true;
    /* a smaller ring stays: earlier arrays of the same operation may lie there */
    s->ring_host = s->ring_device = NULL;
    s->ring_bytes = 0;
    size_t want = RING_BYTES;
    while (want < bytes) want *= 2;
    if (!CUDA_TRY(k, operation, cudaMallocHost((void **)&s->ring_host, want)) ||
        !CUDA_TRY(k, operation, cudaMalloc((void **)&s->ring_device, want)))
        return false;
    s->ring_bytes = want;
    return true;
}

static char *ring_take(struct kern *k, const char *operation, const void *from, size_t bytes) {
    struct cuda_state *s = cuda_of(k);
    if (!ring_reserve(k, operation, bytes)) return NULL;
    char *host = s->ring_host + s->ring_at;
    memcpy(host, from, bytes);
    s->ring_at += (bytes + 15) / 16 * 16;
    return host;
}

const void *cuda_small(struct kern *k, const char *operation, const void *from, size_t bytes) {
    const char *host = cuda_spoils(k) ? NULL : ring_take(k, operation, from, bytes);
    if (!host) return NULL;
    char *to = cuda_of(k)->ring_device + (host - cuda_of(k)->ring_host);
    if (!CUDA_TRY(k, operation,
                  cudaMemcpyAsync(to, host, bytes, cudaMemcpyHostToDevice, cuda_stream(k))))
        return NULL;
    return to;
}

/* ---- pack ---- */

/* One thread an element of the rows' records (pack.h); zeros where the weight ends. */
__global__ void pack_kernel(struct kern_weight_rows a, size_t n) {
    const size_t at = cuda_index(), block = (size_t)KERN_IN_BLOCK * KERN_OUT_BLOCK;
    if (at >= n) return;
    const size_t in = (size_t)a.w.in, records = (in + KERN_IN_BLOCK - 1) / KERN_IN_BLOCK,
                 record = at / block, o = record / records * KERN_OUT_BLOCK + at % KERN_OUT_BLOCK,
                 i = record % records * KERN_IN_BLOCK + at % block / KERN_OUT_BLOCK,
                 to = (size_t)a.first / KERN_OUT_BLOCK * records * block;
    const bool inside = o < (size_t)a.rows && i < in;
    cuda_put(a.w.data, a.w.format == KERN_FORMAT_F32 ? KERN_F32 : KERN_BF16, to + at,
             inside ? ((const float *)a.values.p)[o * in + i] : 0.0f);
}

void cuda_pack_rows(struct kern *k, const struct kern_weight_rows *a) {
    assert(a->w.format == KERN_FORMAT_F32 || a->w.format == KERN_FORMAT_BF16);
    assert(a->first % KERN_OUT_BLOCK == 0);
    assert(a->rows % KERN_OUT_BLOCK == 0 || a->first + a->rows == a->w.out);
    const size_t n = ((size_t)a->rows + KERN_OUT_BLOCK - 1) / KERN_OUT_BLOCK * KERN_OUT_BLOCK *
                     (((size_t)a->w.in + KERN_IN_BLOCK - 1) / KERN_IN_BLOCK * KERN_IN_BLOCK);
    if (!n) return;
    LAUNCH(pack_kernel, cuda_blocks(n, 256), 256, 0, cuda_stream(k), *a, n);
    CUDA_TRY(k, "pack", cudaGetLastError());
}

/* By so many rows that their plain values take this much: what packing needs on the device does not
 * grow with the weight. */
enum { PACK_BYTES = 16 << 20 };

void cuda_pack(struct kern *k, const struct kern_weight *w, const float *values) {
    const size_t row = (size_t)w->in * sizeof *values;
    size_t most = PACK_BYTES / row / KERN_OUT_BLOCK * KERN_OUT_BLOCK;
    if (most < KERN_OUT_BLOCK) most = KERN_OUT_BLOCK;
    if (most > (size_t)w->out) most = (size_t)w->out;
    struct kern_weight_rows a = { *w, { cuda_scratch(k, "pack", most * row) }, 0, 0 };
    if (!a.values.p) return;
    for (; a.first < w->out; a.first += a.rows) {
        a.rows = w->out - a.first < (int)most ? w->out - a.first : (int)most;
        slot_upload(k, a.values, values + (size_t)a.first * (size_t)w->in, (size_t)a.rows * row);
        cuda_pack_rows(k, &a);
    }
}

/* ---- devices ---- */

static const char *visible(void) {
    const char *s = getenv("CUDA_VISIBLE_DEVICES");
    return !s ? "not set" : *s ? s : "empty";
}

/* Why there is no device, in one line. */
static int no_device(struct err *e, cudaError_t rc) {
    int driver = 0;
    (void)cudaGetLastError();
    (void)cudaDriverGetVersion(&driver);
    if (driver == 0)
        return fail(e, "no NVIDIA driver here (%s): install it, or give the container the GPUs",
                    cudaGetErrorName(rc));
    if (rc == cudaErrorInsufficientDriver)
        return fail(e, "the NVIDIA driver is too old: it runs CUDA %d.%d, qerl-cuda.so needs %d.%d",
                    driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000,
                    CUDART_VERSION % 1000 / 10);
    if (rc == cudaSuccess || rc == cudaErrorNoDevice)
        return fail(e, "no GPU is visible: CUDA_VISIBLE_DEVICES is %s", visible());
    return fail(e, "cannot use the GPUs: cudaGetDeviceCount: %s: %s", cudaGetErrorName(rc),
                cudaGetErrorString(rc));
}

static int count(struct err *e) {
    int n = 0;
    cudaError_t rc = cudaGetDeviceCount(&n);
    if (rc != cudaSuccess || n == 0) return no_device(e, rc);
    return n < CUDA_DEVICES_MAX ? n : (int)CUDA_DEVICES_MAX;
}

static void arch_of(char out[16], const struct cudaDeviceProp *p) {
#ifdef QERL_CUDA_EMU
    (void)p;
    snprintf(out, 16, "emulated");
#else
    snprintf(out, 16, "sm_%d%d", p->major, p->minor);
#endif
}

static int describe(struct cuda_device *d, int index, struct err *e) {
    static struct cudaDeviceProp p;
    const int n = count(e);
    if (n < 0) return -1;
    cudaError_t rc = cudaGetDeviceProperties(&p, index);
    if (rc == cudaSuccess) rc = make_current(index);
    memset(d, 0, sizeof *d);
    if (rc == cudaSuccess) rc = cudaMemGetInfo(&d->free_bytes, &d->memory_bytes);
    for (int i = 0, can = 0; i < n && rc == cudaSuccess; i++, can = 0)
        if (i != index && (rc = cudaDeviceCanAccessPeer(&can, index, i)) == cudaSuccess && can)
            d->peers |= 1ull << i;
    if (rc != cudaSuccess)
        return fail(e, "device cuda:%d: %s: %s", index, cudaGetErrorName(rc),
                    cudaGetErrorString(rc));
    snprintf(d->name, sizeof d->name, "%.255s", p.name);
    arch_of(d->arch, &p);
    snprintf(d->pci, sizeof d->pci, "%04x:%02x:%02x.0", p.pciDomainID & 0xffff, p.pciBusID & 0xff,
             p.pciDeviceID & 0xff);
    return 0;
}

/* ---- open ---- */

static void fill(struct kern *k) {
    k->alloc = slot_alloc;
    k->free = slot_free;
    k->upload = slot_upload;
    k->download = slot_download;
    k->copy = slot_copy;
    k->zero = slot_zero;
    k->sync = slot_sync;
    k->embed = cuda_embed;
    k->rmsnorm = cuda_rmsnorm;
    k->rmsnorm_bwd = cuda_rmsnorm_bwd;
    k->linear = cuda_linear;
    k->linear_t = cuda_linear_t;
    k->outer = cuda_outer;
    k->rope = cuda_rope;
    k->kv_put = cuda_kv_put;
    k->attn = cuda_attn;
    k->attn_bwd = cuda_attn_bwd;
    k->swiglu = cuda_swiglu;
    k->swiglu_bwd = cuda_swiglu_bwd;
    k->silu = cuda_silu;
    k->perturb = cuda_perturb;
    k->quant_rows = cuda_quant_rows;
    k->add = cuda_add;
    k->gather = cuda_gather;
    k->scatter_add = cuda_scatter_add;
    k->logprob = cuda_logprob;
    k->logprob_bwd = cuda_logprob_bwd;
    k->sample = cuda_sample;
    k->adamw = cuda_adamw;
    k->sum_squares = cuda_sum_squares;
    k->pack = cuda_pack;
    k->unpack = cuda_unpack;
    k->pack_rows = cuda_pack_rows;
    k->weight_noise = cuda_weight_noise;
    k->record = cuda_record;
    k->keep = cuda_keep;
    k->replay = cuda_replay;
    k->forget = cuda_forget;
}

/* The form on tensor cores. Its bits are this architecture's. */
static cudaError_t fill_mma(struct kern *k, int index) {
    static char name[CUDA_DEVICES_MAX][24], bits[CUDA_DEVICES_MAX][32];
    static struct cudaDeviceProp p;
    char arch[16];
    const cudaError_t rc = cudaGetDeviceProperties(&p, index);
    if (rc != cudaSuccess) return rc;
    arch_of(arch, &p);
    snprintf(name[index], sizeof name[index], "cuda-mma:%d", index);
    snprintf(bits[index], sizeof bits[index], "cuda-mma %s", arch);
    k->name = name[index];
    k->bits = bits[index];
    k->linear = cuda_mma_linear;
    k->linear_t = cuda_mma_linear_t;
    k->outer = cuda_mma_outer;
    return cudaSuccess;
}

/* The form by cuBLAS, whose bits are those of the architecture, too. */
static int open_blas(struct kern *k, int index, struct err *e) {
    static struct cudaDeviceProp p;
    char arch[16];
    const cudaError_t rc = cudaGetDeviceProperties(&p, index);
    if (rc != cudaSuccess) return fail(e, "device cuda:%d: %s", index, cudaGetErrorName(rc));
    arch_of(arch, &p);
    if (cuda_blas_open(k, arch, p.multiProcessorCount, e) == 0) return 0;
    (void)cudaStreamDestroy(cuda_of(k)->stream);
    return -1;
}

static int start(struct kern *k, struct cuda_state *s, int index, enum cuda_form form,
                 struct err *e) {
    static char name[CUDA_DEVICES_MAX][16];
    cudaFuncAttributes has;
    cudaError_t rc = make_current(index);
    if (rc == cudaSuccess && cudaFuncGetAttributes(&has, (const void *)pack_kernel) != cudaSuccess)
        return fail(e, "qerl-cuda.so has no code for the architecture of cuda:%d: %s", index,
                    cudaGetErrorName(cudaGetLastError()));
    s->device = index;
    memset(k, 0, sizeof *k);
    snprintf(name[index], sizeof name[index], "cuda:%d", index);
    k->name = name[index];
    k->bits = "cpu-tiles";
    k->abi = KERN_ABI;
    k->self = s;
    fill(k);
    if (rc == cudaSuccess && form == CUDA_FORM_MMA) rc = fill_mma(k, index);
    if (rc == cudaSuccess) rc = cudaStreamCreateWithFlags(&s->stream, cudaStreamNonBlocking);
    if (rc == cudaSuccess && form == CUDA_FORM_BLAS) return open_blas(k, index, e);
    if (rc == cudaSuccess) return 0;
    return fail(e, "cannot open cuda:%d: %s: %s", index, cudaGetErrorName(rc),
                cudaGetErrorString(rc));
}

static int open_device(struct kern *k, int index, enum cuda_form form, struct err *e) {
    int n = count(e);
    if (n < 0) return -1;
    if (index < 0 || index >= n)
        return fail(e, "no device cuda:%d: %d visible, cuda:0 to cuda:%d (CUDA_VISIBLE_DEVICES is "
                    "%s)", index, n, n - 1, visible());
    struct cuda_state *s = (struct cuda_state *)calloc(1, sizeof *s);
    if (!s) return fail(e, "out of memory");
    if (start(k, s, index, form, e) == 0) return 0;
    free(s);
    return -1;
}

/* ---- entry ---- */

#ifdef QERL_CUDA_EMU
#define KIND "emulated devices, CUDA headers"
#else
#define KIND "CUDA"
#endif

extern "C" __attribute__((visibility("default"))) const struct cuda_plugin *qerl_cuda_plugin(void) {
    static char versions[80];
    int driver = 0;
    static const struct cuda_plugin plugin = { CUDA_PLUGIN_ABI, KERN_ABI, sizeof(struct kern),
                                               versions, count, describe, open_device,
                                               cuda_probe,
                                               cuda_ranks_version, cuda_ranks_id, cuda_ranks_open,
                                               cuda_ranks_gather, cuda_ranks_add, cuda_ranks_wait,
                                               cuda_ranks_close };
    (void)cudaDriverGetVersion(&driver);
    snprintf(versions, sizeof versions, KIND " %d.%d, driver up to %d.%d", CUDART_VERSION / 1000,
             CUDART_VERSION % 1000 / 10, driver / 1000, driver % 1000 / 10);
    return &plugin;
}
