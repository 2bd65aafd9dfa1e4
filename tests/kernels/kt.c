/* kt.c - see kt.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/kernels/kt.h"

#include <criterion/hooks.h>
#include <stdarg.h>

#include "tests/kernels/carry.h"

const int kt_dims[] = { 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 160, 0 };

/* run beside those that kern_paths lists */
#define EMULATED "amx-emulated"
#define DEVICE   "cuda:0"
static bool can_emulate(void) {
    struct kern k;
    struct err e = { 0 };
    return kern_open(&k, EMULATED, NULL, &e) == 0;
}
static bool wanted(const char *name) {
    const char *only = getenv("QERL_KERNELS");
    return !only || !*only || !strcmp(only, name);
}

ReportHook(PRE_ALL)(struct criterion_test_set *set) {
    static const char *const all[] = { "ref", "avx2", "avx512", "avx512bf16", "amx" };
    const char *have[8];
    int n = kern_paths(have);
    (void)set;
    for (size_t i = 0; i < COUNT_OF(all); i++) {
        bool found = false;
        for (int j = 0; j < n; j++) found |= !strcmp(have[j], all[i]);
        fprintf(stderr, "kernels: path %-10s %s\n", all[i],
                !found           ? "SKIPPED, this machine lacks it"
                : wanted(all[i]) ? "exercised"
                                 : "SKIPPED by QERL_KERNELS");
    }
    fprintf(stderr, "kernels: path %-6s %s\n", EMULATED,
            !can_emulate()     ? "SKIPPED, this machine lacks AVX-512 with VBMI"
            : wanted(EMULATED) ? "exercised: the text of amx, its tile instructions done in C"
                               : "SKIPPED by QERL_KERNELS");
    const char *plugin = carry_plugin(), *sched = getenv("EMU_SCHED");
    if (!plugin) fprintf(stderr, "kernels: path %-10s SKIPPED, no plugin was built\n", DEVICE);
    else if (!wanted(DEVICE)) fprintf(stderr, "kernels: path %-10s SKIPPED by QERL_KERNELS\n", DEVICE);
    else
        fprintf(stderr, "kernels: path %-10s exercised: %s, threads %s\n", DEVICE, plugin,
                sched ? sched : "as they come");
}

void kt_open(struct kt *t) {
    const char *names[8];
    struct err e = { 0 };
    memset(t, 0, sizeof *t);
    t->seed = 1;
    cr_assert(kern_open(&t->ref, "ref", NULL, &e) == 0, "%s", e.text);
    for (int i = 0; i < 3; i++) t->pool[i] = pool_create(i + 1);
    /* the last of all is the fastest of the CPU's */
    if (carry_plugin() && wanted(DEVICE)) {
        struct kern *k = &t->k[t->n++];
        *k = t->ref;
        k->pool = t->pool[0];
        carry_open(k, DEVICE);
    }
    int n = kern_paths(names);
    if (n < 8 && can_emulate()) names[n++] = EMULATED;
    for (int i = 0; i < n; i++)
        for (int j = 0; j < 3; j++)
            if (wanted(names[i]))
                cr_assert(kern_open(&t->k[t->n++], names[i], t->pool[j], &e) == 0, "%s", e.text);
    cr_assert(t->n, "QERL_KERNELS=%s names no path that is here", getenv("QERL_KERNELS"));
}

void kt_close(struct kt *t) {
    kt_drop(t);
    for (int i = 0; i < 3; i++) pool_destroy(&t->pool[i]);
}

void kt_drop(struct kt *t) {
    for (int i = 0; i < t->buffers; i++) free(t->buffer[i]);
    t->buffers = 0;
}

void *kt_new(struct kt *t, size_t bytes) {
    assert(t->buffers < KT_BUFFERS);
    void *p = malloc(bytes ? bytes : 1);
    assert(p);
    memset(p, 0xa5, bytes);
    return t->buffer[t->buffers++] = p;
}

double kt_unit(struct kt *t) {
    uint64_t x = t->seed += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return (double)((x ^ x >> 31) >> 11) * 0x1p-53;
}
double kt_normal(struct kt *t) {
    double u = kt_unit(t), v = kt_unit(t);
    return sqrt(-2.0 * log(1.0 - u)) * cos(6.283185307179586 * v);
}

float *kt_f32(struct kt *t, size_t n, double scale) {
    float *p = kt_new(t, n * sizeof *p);
    for (size_t i = 0; i < n; i++) p[i] = (float)(kt_normal(t) * scale);
    return p;
}
uint16_t *kt_bf16(struct kt *t, size_t n, double scale) {
    uint16_t *p = kt_new(t, n * sizeof *p);
    for (size_t i = 0; i < n; i++) p[i] = f32_to_bf16((float)(kt_normal(t) * scale));
    return p;
}
void *kt_typed(struct kt *t, enum kern_type type, size_t n, double scale) {
    return type == KERN_F32 ? (void *)kt_f32(t, n, scale) : (void *)kt_bf16(t, n, scale);
}
void *kt_copy(struct kt *t, const void *from, size_t bytes) {
    void *p = kt_new(t, bytes);
    if (bytes) memcpy(p, from, bytes);
    return p;
}
int32_t *kt_iota(struct kt *t, int n, int first) {
    int32_t *p = kt_new(t, (size_t)n * sizeof *p);
    for (int i = 0; i < n; i++) p[i] = first + i;
    return p;
}

struct kern_weight kt_weight(struct kt *t, enum kern_format format, int out, int in) {
    struct kern_weight w = { .format = format, .out = out, .in = in, .scale = 1.0f };
    size_t n = (size_t)out * (size_t)in;
    w.data.p = kt_new(t, kern_weight_bytes(format, out, in));
    if (format == KERN_FORMAT_F32 || format == KERN_FORMAT_BF16) {
        pack_f32(w.data.p, format, kt_f32(t, n, 0.5), out, in);
        return w;
    }
    bool mx = format == KERN_FORMAT_MXFP4;
    int groups = (in + (mx ? 31 : 15)) / (mx ? 32 : 16);
    uint8_t *codes = kt_new(t, n), *scales = kt_new(t, (size_t)out * (size_t)groups);
    for (size_t i = 0; i < n; i++) codes[i] = (uint8_t)(kt_unit(t) * 16);
    for (int i = 0; i < out * groups; i++)
        scales[i] = (uint8_t)(mx ? 118 + kt_unit(t) * 10 : 40 + kt_unit(t) * 30);
    if (!mx) w.scale = 0.37f;
    pack_codes(w.data.p, format, codes, scales, out, in);
    return w;
}
float kt_at(const struct kern_weight *w, int o, int i) {
    return pack_get(w->data.p, w->format, w->out, w->in, o, i) * w->scale;
}

void kt_one_nan(void *p, enum kern_type type, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (isnan(kt_get(p, type, i))) cpu_put(kt_p(p), type, i, NAN);
}

static int whole(struct kt *t, int most) { return (int)(kt_unit(t) * (2 * most + 1)) - most; }
void *kt_wholes(struct kt *t, enum kern_type type, size_t n, int most) {
    void *p = kt_new(t, kt_bytes(type, n));
    for (size_t i = 0; i < n; i++) cpu_put(kt_p(p), type, i, (float)whole(t, most));
    return p;
}
/* Multiples of 1/8 below 16. */
struct kern_weight kt_weight_whole(struct kt *t, enum kern_format f, int out, int in) {
    struct kern_weight w = { .format = f, .out = out, .in = in, .scale = 1.0f };
    const size_t n = (size_t)out * (size_t)in;
    w.data.p = kt_new(t, kern_weight_bytes(f, out, in));
    if (f == KERN_FORMAT_BF16) {
        pack_f32(w.data.p, f, kt_wholes(t, KERN_F32, n, 5), out, in);
        return w;
    }
    const int block = f == KERN_FORMAT_MXFP4 ? 32 : 16, groups = (in + block - 1) / block;
    uint8_t *codes = kt_new(t, n), *scales = kt_new(t, (size_t)out * (size_t)groups);
    for (size_t i = 0; i < n; i++) codes[i] = (uint8_t)(kt_unit(t) * 16);
    for (int i = 0; i < out * groups; i++)
        scales[i] = (uint8_t)(f == KERN_FORMAT_MXFP4 ? 126 + whole(t, 1) : 0x38 + 8 * whole(t, 1));
    pack_codes(w.data.p, f, codes, scales, out, in);
    return w;
}
const char *const kt_format_name[] = { "f32", "bf16", "mxfp4", "nvfp4" };
void kt_equal(const void *got, const void *want, enum kern_type type, size_t n, const char *what,
              enum kern_format f, int out, int in, int rows) {
    for (size_t i = 0; i < n; i++)
        cr_assert(kt_get(got, type, i) == kt_get(want, type, i),
                  "%s %s %dx%d rows %d, element %zu of %zu: %.9g, exactly %.9g", what,
                  kt_format_name[f], out, in, rows, i, n, (double)kt_get(got, type, i),
                  (double)kt_get(want, type, i));
}

void kt_same(const struct kern *k, const void *got, const void *want, size_t bytes, size_t element,
             const char *fmt, ...) {
    if (!memcmp(got, want, bytes)) return;
    const uint8_t *a = got, *b = want;
    size_t at = 0;
    while (a[at] == b[at]) at++;
    char text[256];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    float x = 0.0f, y = 0.0f;
    if (element == 4) {
        memcpy(&x, a + at / 4 * 4, 4);
        memcpy(&y, b + at / 4 * 4, 4);
    }
    cr_assert(false, "%s with %d threads differs from ref: %s, element %zu of %zu: %.9g, ref %.9g",
              k->name, k->pool ? pool_threads(k->pool) : 1, text, at / element, bytes / element,
              (double)x, (double)y);
}
