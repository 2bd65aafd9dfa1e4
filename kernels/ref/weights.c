/* weights.c - the reference for whole packed weights: rows out of them and into them, AQN's noise.
 *
 * unpack and pack_rows serve all CPU paths: they wait for memory. Parts are panels, whose elements
 * do not meet.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cpu.h"
#include "kernels/normal.h"

static int panels_of(int rows) { return (rows + KERN_OUT_BLOCK - 1) / KERN_OUT_BLOCK; }
static int blocks_of(int in) { return (in + KERN_IN_BLOCK - 1) / KERN_IN_BLOCK; }
static int least(int a, int b) { return a < b ? a : b; }

/* One where waking a thread costs more than it brings. */
static int parts_for(const struct kern *k, const struct kern_weight_rows *a) {
    return (size_t)a->rows * (size_t)a->w.in < (size_t)1 << 16 ? 1 : cpu_threads(k);
}

/* ---- rows ---- */

/* Output `lane` of a record at its first n inputs, without the tensor scale: pack_get's bits. */
static inline void record_row(float *to, const uint8_t *record, enum kern_format format, int lane,
                              int n) {
    const uint8_t *scale = record + KERN_IN_BLOCK * KERN_OUT_BLOCK / 2;
    if (format == KERN_FORMAT_F32)
        for (int k = 0; k < n; k++) to[k] = ((const float *)record)[k * KERN_OUT_BLOCK + lane];
    else if (format == KERN_FORMAT_BF16)
        for (int k = 0; k < n; k++)
            to[k] = bf16_to_f32(((const uint16_t *)record)[k * KERN_OUT_BLOCK + lane]);
    else
        for (int k = 0; k < n; k++) {
            const float v = pack_e2m1[record[k * 8 + lane / 2] >> (lane & 1 ? 4 : 0) & 15];
            to[k] = v * (format == KERN_FORMAT_MXFP4
                             ? pack_e8m0(scale[lane])
                             : pack_e4m3(scale[k / 16 * KERN_OUT_BLOCK + lane]));
        }
}

static void unpack_row(float *to, const struct kern_weight *w, int o) {
    const size_t bytes = kern_record_bytes(w->format);
    const uint8_t *record = (const uint8_t *)w->data.p + (size_t)(o / KERN_OUT_BLOCK) *
                                                             (size_t)blocks_of(w->in) * bytes;
    for (int i = 0; i < w->in; i += KERN_IN_BLOCK, record += bytes) {
        const int n = least(KERN_IN_BLOCK, w->in - i);
        record_row(to + i, record, w->format, o % KERN_OUT_BLOCK, n);
        for (int k = 0; k < n; k++) to[i + k] = w->scale * to[i + k];
    }
}

static void unpack_part(void *arg, int part, int parts) {
    const struct kern_weight_rows *a = arg;
    for (int r = part; r < a->rows; r += parts)
        unpack_row((float *)a->values.p + (size_t)r * (size_t)a->w.in, &a->w, a->first + r);
}

void ref_unpack(struct kern *k, const struct kern_weight_rows *a) {
    cpu_run(k, parts_for(k, a), unpack_part, (void *)(uintptr_t)a);
}

/* Panel `panel` of the rows given, all of it. */
static void pack_panel(const struct kern_weight_rows *a, int panel) {
    const int at = panel * KERN_OUT_BLOCK, lanes = least(KERN_OUT_BLOCK, a->rows - at);
    const size_t in = (size_t)a->w.in, width = (size_t)blocks_of(a->w.in) * KERN_IN_BLOCK;
    const float *from = (const float *)a->values.p + (size_t)at * in;
    const enum kern_type type = a->w.format == KERN_FORMAT_F32 ? KERN_F32 : KERN_BF16;
    const size_t to = (size_t)(a->first + at) * width;
    for (size_t i = 0; i < width; i++)
        for (int lane = 0; lane < KERN_OUT_BLOCK; lane++)
            cpu_put(a->w.data, type, to + i * KERN_OUT_BLOCK + (size_t)lane,
                    i < in && lane < lanes ? from[(size_t)lane * in + i] : 0.0f);
}

static void pack_part(void *arg, int part, int parts) {
    const struct kern_weight_rows *a = arg;
    for (int p = part; p < panels_of(a->rows); p += parts) pack_panel(a, p);
}

void ref_pack_rows(struct kern *k, const struct kern_weight_rows *a) {
    assert(a->w.format == KERN_FORMAT_F32 || a->w.format == KERN_FORMAT_BF16);
    assert(a->first % KERN_OUT_BLOCK == 0);
    assert(a->rows % KERN_OUT_BLOCK == 0 || a->first + a->rows == a->w.out);
    cpu_run(k, parts_for(k, a), pack_part, (void *)(uintptr_t)a);
}

void ref_pack(struct kern *k, const struct kern_weight *w, const float *values) {
    ref_pack_rows(k, &(struct kern_weight_rows){ .w = *w,
                                                 .values = { (void *)(uintptr_t)values },
                                                 .rows = w->out });
}

/* ---- AQN ---- */

/* w: the row's values; becomes its noise. */
static void noise_row(const struct kern_weight_noise *a, int o, float *w, double *square,
                      int64_t count[KERN_WEIGHT_COUNTS]) {
    const size_t first = (size_t)o * (size_t)a->w.in;
    double z[4] = { 0 };
    memset(square, 0, KERN_WEIGHT_SQUARES * sizeof *square);
    for (int i = 0; i < a->w.in; i++) {
        const size_t at = first + (size_t)i;
        if (i == 0 || at % 4 == 0) kern_weight_draw4(z, a->key, a->tensor, at / 4);
        const float dw = kern_weight_dw(a->sd, z[at % 4]), noisy = w[i] + dw;
        const double d = (double)dw, scaled = d / a->times;
        square[KERN_WEIGHT_NOISE] += d * d;
        square[KERN_WEIGHT_SCALED] += scaled * scaled;
        square[KERN_WEIGHT_VALUE] += (double)w[i] * (double)w[i];
        count[KERN_WEIGHT_CHANGED] += noisy < w[i] || noisy > w[i];
        count[KERN_WEIGHT_CHANGED_BF16] += f32_to_bf16(noisy) != f32_to_bf16(w[i]);
        w[i] = dw;
    }
}

static void noise_part(void *arg, int part, int parts) {
    const struct kern_weight_noise *a = arg;
    const size_t in = (size_t)a->w.in;
    int64_t count[KERN_WEIGHT_COUNTS] = { 0 };
    float *values = cpu_scratch(KERN_OUT_BLOCK * in * sizeof *values);
    for (int first = part * KERN_OUT_BLOCK; first < a->w.out; first += parts * KERN_OUT_BLOCK) {
        const int rows = least(KERN_OUT_BLOCK, a->w.out - first);
        for (int r = 0; r < rows; r++) {
            unpack_row(values + (size_t)r * in, &a->w, first + r);
            noise_row(a, first + r, values + (size_t)r * in,
                      (double *)a->squares.p + (size_t)(first + r) * KERN_WEIGHT_SQUARES, count);
        }
        const struct kern_weight_rows done = { .w = a->to, .values = { values }, .first = first,
                                               .rows = rows };
        pack_panel(&done, 0);
    }
    cpu_weight_take(a, count);
}

void ref_weight_noise(struct kern *k, const struct kern_weight_noise *a) {
    assert(a->to.format == KERN_FORMAT_F32 || a->to.format == KERN_FORMAT_BF16);
    assert(a->to.out == a->w.out && a->to.in == a->w.in);
    cpu_run(k, cpu_threads(k), noise_part, (void *)(uintptr_t)a);
}
