/* device.c - a GPU's limits by probes of its own: reading, multiply-adds, a large product of the
 * form that is measured, what crosses to the host, a launch.
 *
 * Knows: the plugin's probes, the data sheets. Does not know CUDA. As in machine.c the report shows
 * how repeats spread, and a limit is their best. On an emulated device everything is tiny: what
 * runs is the code, not a measurement.
 * Order: who it is, probes, the large product, crossing, what follows, room.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tools/bench/device.h"

#include "kernels/cuda/plugin.h"
#include "lib/base/str.h"
#include "tools/bench/bench.h"
#include "tools/bench/synth.h"

/* ---- who it is ---- */

static const struct datasheet sheets[] = {            /* a longer name before its beginning */
    { "NVIDIA A100-SXM4-80GB", 2039e9, 312e12 },
    { "NVIDIA A100-SXM4-40GB", 1555e9, 312e12 },
    { "NVIDIA A100 80GB PCIe", 1935e9, 312e12 },
    { "NVIDIA A100-PCIE-40GB", 1555e9, 312e12 },
    { "NVIDIA H100 80GB HBM3", 3352e9, 989e12 },
    { "NVIDIA H100 PCIe", 2039e9, 756e12 },
    { "NVIDIA H100 NVL", 3938e9, 835e12 },
    { "NVIDIA H200 NVL", 4800e9, 835e12 },
    { "NVIDIA H200", 4800e9, 989e12 },
    { "NVIDIA B200", 8000e9, 2250e12 },
    { "NVIDIA GeForce RTX 5090", 1792e9, 209.5e12 },
};

static bool emulated(const struct bench *b) { return strstr(b->plugin->versions, "emulated"); }

/* The device of b->kern, as it is now. */
static int describe(const struct bench *b, struct cuda_device *d, struct err *e) {
    int64_t index = 0;
    str_to_i64(strchr(b->kern.name, ':') + 1, &index);
    return b->plugin->describe(d, (int)index, e);
}

int device_open(struct bench *b, struct err *e) {
    struct cuda_device d;
    if (!strchr(b->kern.name, ':')) return 0;         /* a path of the CPU */
    b->plugin = cuda_load(e);
    if (!b->plugin || describe(b, &d, e) < 0) return -1;
    for (size_t i = 0; i < COUNT_OF(sheets) && !b->sheet.name; i++)
        if (str_starts(d.name, sheets[i].name)) b->sheet = sheets[i];
    json_object_set_new(b->machine, "device",
                        json_pack("{ss ss sf sf}", "name", d.name, "arch", d.arch, "memory_bytes",
                                  (double)d.memory_bytes, "free_bytes", (double)d.free_bytes));
    json_object_set_new(b->machine, "versions", json_string(b->plugin->versions));
    if (b->sheet.name)
        json_object_set_new(b->machine, "datasheet",
                            json_pack("{ss sf sf}", "name", b->sheet.name, "bytes_per_second",
                                      b->sheet.bytes, "flops_per_second", b->sheet.flops));
    return 0;
}

/* ---- probes ---- */

struct probing {
    struct bench *b;
    enum cuda_probe what;
    kptr at;
    size_t bytes;
    int turns;
    double done;                         /* bytes or FLOPs of a call */
};

static void probe_call(void *arg) {
    struct probing *p = arg;
    p->done = p->b->plugin->probe(&p->b->kern, p->what, p->at, p->bytes, p->turns);
}

/* Reports bytes or FLOPs a second in 1e9; the best repeat's, 0 after an error. */
static double rate_of(struct bench *b, struct kern *k, const char *key, void (*call)(void *),
                      void *arg, const double *amount, const char *what, const char *unit,
                      struct err *e) {
    struct spread s = timing_on(k, call, arg, b->quick ? .05 : .3, e);
    if (s.n == 0) return 0;
    s = spread_rate(s, *amount);
    if (bench_wants(b, key))
        bench_report(b, key, &(struct figure){ .unit = unit, .what = what,
                                               .s = spread_times(s, 1e-9) });
    return s.max;
}

static int reads(struct bench *b, struct err *e) {
    static const struct { const char *key; size_t bytes; } size[LIMITS_READ_COUNT] = {
        { "machine/read/4mb", 4000000 },
        { "machine/read/16mb", 16000000 },
        { "machine/read/64mb", 64000000 },
        { "machine/read/256mb", 256000000 },
        { "machine/read/1gb", 1000000000 },
    };
    const size_t part = emulated(b) ? 1000 : 1, most = size[LIMITS_READ_COUNT - 1].bytes / part;
    struct probing p = { .b = b, .what = CUDA_PROBE_READ };
    int rc = b->kern.alloc(&b->kern, &p.at, most, e);
    for (int i = 0; i < LIMITS_READ_COUNT && rc == 0; i++) {
        p.bytes = size[i].bytes / part;
        p.turns = (int)(most / p.bytes);
        b->limits.read[i].bytes = (double)size[i].bytes;
        b->limits.read[i].per_second = rate_of(b, &b->kern, size[i].key, probe_call, &p, &p.done,
                                               i ? NULL : "the same again and again: of the cache",
                                               "GB/s", e);
        if (b->limits.read[i].per_second <= 0) rc = -1;
    }
    b->kern.free(&b->kern, &p.at);
    return rc;
}

/* FLOPs a second of one instruction on all SMs; a call takes 2 ms, less on an emulated device. */
static double multiplies(struct bench *b, const char *key, enum cuda_probe what, const char *name,
                         struct err *e) {
    struct probing p = { .b = b, .what = what, .turns = 1 };
    for (double took = 0; took < 2e-3 && p.turns < 1 << 20; p.turns *= 4) {
        struct spread s = timing_on(&b->kern, probe_call, &p, 0, e);
        if (s.n == 0) return 0;
        took = s.median;
    }
    return rate_of(b, &b->kern, key, probe_call, &p, &p.done, name, "GFLOP/s", e);
}

/* ---- the large product ---- */

struct product { struct kern *k; struct kern_linear a; double flops; };

static void product_call(void *arg) {
    struct product *p = arg;
    p->k->linear(p->k, &p->a, 1);
}

static double product(struct bench *b, struct kern *k, const char *key, const char *what,
                      struct err *e) {
    const int n = emulated(b) ? 128 : 8192;           /* of 64 rows no form makes cuBLAS's */
    const size_t square = (size_t)n * (size_t)n;
    struct product p = { .k = k, .flops = 2. * n * n * n };
    struct kern_weight w = { .format = KERN_FORMAT_BF16, .out = n, .in = n, .scale = 1 };
    kptr x = { NULL }, y = { NULL };
    double best = 0;
    if (k->alloc(k, &x, square * 2, e) == 0 && k->alloc(k, &w.data, square * 2, e) == 0 &&
        k->alloc(k, &y, square * 4, e) == 0) {
        synth_fill(k, x, square * 2);
        synth_fill(k, w.data, square * 2);
        p.a = (struct kern_linear){ .x = x, .x_type = KERN_BF16, .x_ld = n, .w = w, .scale = 1,
                                    .y = y, .y_type = KERN_F32, .y_ld = n, .rows = n };
        best = rate_of(b, k, key, product_call, &p, &p.flops, what, "GFLOP/s", e);
    }
    k->free(k, &x);
    k->free(k, &w.data);
    k->free(k, &y);
    return best;
}

/* ---- crossing ---- */

struct crossing { struct kern *k; kptr at; char *host; size_t bytes; };
static void copy_call(void *arg) {
    struct crossing *c = arg;
    c->k->copy(c->k, kptr_at(c->at, c->bytes), c->at, c->bytes);
}
static void up_call(void *arg) {
    struct crossing *c = arg;
    c->k->upload(c->k, c->at, c->host, c->bytes);
}
static void down_call(void *arg) {
    struct crossing *c = arg;
    c->k->download(c->k, c->host, c->at, c->bytes);
}
static void launch_call(void *arg) {
    struct crossing *c = arg;
    c->k->add(c->k, &(struct kern_add){ .x = c->at, .y = kptr_at(c->at, 64), .n = 1 });
}

static int crossings(struct bench *b, struct err *e) {
    const size_t part = emulated(b) ? 1000 : 1;
    struct crossing c = { .k = &b->kern, .bytes = 256000000 / part };
    if (!bench_enters(b, "machine")) return 0;
    int rc = c.k->alloc(c.k, &c.at, 2 * c.bytes, e);
    c.host = mem_alloc(c.bytes);
    const double once = (double)c.bytes, twice = 2 * once;
    const struct { const char *key, *what; void (*call)(void *); const double *moved; } way[] = {
        { "machine/copy", "read and written", copy_call, &twice },
        { "machine/upload", "from pageable memory", up_call, &once },
        { "machine/download", "into pageable memory", down_call, &once },
    };
    for (size_t i = 0; i < COUNT_OF(way) && rc == 0; i++)
        if (rate_of(b, c.k, way[i].key, way[i].call, &c, way[i].moved, way[i].what, "GB/s", e) <= 0)
            rc = -1;
    struct spread s = { 0 };
    if (rc == 0) s = timing_on(c.k, launch_call, &c, .05, e);
    if (s.n == 0) rc = -1;
    else if (bench_wants(b, "machine/launch"))
        bench_report(b, "machine/launch",
                     &(struct figure){ .unit = "us", .what = "an operation of one element, queued",
                                       .s = spread_times(s, 1e6) });
    free(c.host);
    c.k->free(c.k, &c.at);
    return rc;
}

/* ---- what follows ---- */

/* cuBLAS's product, whatever form is measured: since Hopper its instructions are faster than those
 * of every kernel here. 0 where it is not there. */
static double cublas(struct bench *b) {
    static const char key[] = "machine/product/8192/cublas";
    struct err e = { 0 };
    struct kern k;
    char name[32];
    snprintf(name, sizeof name, "cuda-blas%s", strchr(b->kern.name, ':'));
    if (kern_open(&k, name, b->pool, &e) < 0) {
        if (bench_wants(b, key)) bench_absent(b, key, e.text);
        return 0;
    }
    const double best = product(b, &k, key, "the same by cuBLAS", &e);
    if (best <= 0) bench_failed(b, key, &e);
    return best;
}

static void peak(struct bench *b, const char *key, double flops, const char *by) {
    if (bench_wants(b, key))
        bench_report(b, key, &(struct figure){ .unit = "GFLOP/s", .what = by,
                                               .s = spread_of(&(double){ flops * 1e-9 }, 1) });
}

/* A target is a share of what the chip does, the same for all forms. */
static void chip(struct bench *b, double mma, double by_blas) {
    const char *by = "mma.sync of bf16";
    b->limits.chip = mma;
    if (by_blas > b->limits.chip) b->limits.chip = by_blas, by = "cuBLAS's product of 8192";
    if (b->sheet.flops > b->limits.chip) b->limits.chip = b->sheet.flops, by = "the data sheet";
    peak(b, "machine/chip", b->limits.chip, by);
}

int part_device(struct bench *b, struct err *e) {
    static const char key[] = "machine/product/8192";
    struct limits *l = &b->limits;
    const bool strict = str_starts(b->kern.name, "cuda:");
    l->threads = b->threads;
    l->tile_rows = strict ? 1 : 8;
    if (crossings(b, e) < 0) bench_failed(b, "machine/copy", e);
    if (reads(b, e) < 0) return err_wrap(e, "probing the device");
    const double fma = multiplies(b, "machine/fma", CUDA_PROBE_FMA, "f32, fma.rn", e);
    const double mma = fma > 0 ? multiplies(b, "machine/mma", CUDA_PROBE_MMA,
                                            "bf16, mma.sync m16n8k16", e) : 0;
    if (mma <= 0) return err_wrap(e, "probing the device");
    const double by_form = product(b, &b->kern, key, "bf16, each side 8192, by the form measured",
                                   e);
    if (by_form <= 0) bench_failed(b, key, e);
    l->flops = strict ? fma : mma;
    l->by = strict ? "fma.rn of f32" : "mma.sync of bf16";
    if (by_form > l->flops) l->flops = by_form, l->by = "its own product of 8192";
    b->limits_known = true;
    peak(b, "machine/peak", l->flops, l->by);
    chip(b, mma, str_starts(b->kern.name, "cuda-blas") ? by_form : cublas(b));
    return 0;
}

/* ---- room ---- */

bool bench_room(struct bench *b, enum shape m, const char *key, double bytes) {
    struct err e = { 0 };
    char why[96];
    if (!b->plugin) return true;
    struct cuda_device d;
    const double free_bytes = describe(b, &d, &e) == 0 ? (double)d.free_bytes : 0;
    bytes += .02 * bytes + 300e6;                     /* scratch, and what allocations waste */
    if (!b->synth || b->synth->shape != m) bytes += (double)synth_bytes(m);
    if (bytes <= free_bytes) return true;
    snprintf(why, sizeof why, "needs %.1f GB, the device has %.1f GB free", bytes / 1e9,
             free_bytes / 1e9);
    bench_absent(b, key, why);
    return false;
}
