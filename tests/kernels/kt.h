/* kt.h - what the kernel tests share: every path times 1, 2 and 3 threads, a device once (carry.h),
 * exact-size buffers, awkward sizes.
 *
 * QERL_KERNELS in the environment restricts the tests to one path. Buffers come from malloc with no
 * slack, so that a sanitizer sees every access beyond an array.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_KT_H
#define QERL_KT_H
#include "kernels/cpu.h"

#include <criterion/criterion.h>

enum { KT_BUFFERS = 256, KT_KERNS = 24 };
struct kt {
    struct kern ref;                     /* one thread: the truth */
    struct kern k[KT_KERNS];             /* every path on every pool */
    int n;
    struct pool *pool[3];
    void *buffer[KT_BUFFERS];
    int buffers;
    uint64_t seed;
};
extern const int kt_dims[];              /* awkward lengths; 0 ends */

void kt_open(struct kt *t);
void kt_close(struct kt *t);
void kt_drop(struct kt *t);              /* frees the buffers */
void *kt_new(struct kt *t, size_t bytes);
double kt_unit(struct kt *t);            /* [0, 1) */
double kt_normal(struct kt *t);
float *kt_f32(struct kt *t, size_t n, double scale);          /* normal numbers */
uint16_t *kt_bf16(struct kt *t, size_t n, double scale);
void *kt_typed(struct kt *t, enum kern_type type, size_t n, double scale);
void *kt_copy(struct kt *t, const void *from, size_t bytes);
int32_t *kt_iota(struct kt *t, int n, int first);
struct kern_weight kt_weight(struct kt *t, enum kern_format format, int out, int in);
float kt_at(const struct kern_weight *w, int o, int i);       /* with the tensor scale */
/* Where every sum is exact its order does not matter: whole numbers of at most `most`, which bf16
 * holds, and weights whose products with them sum up without rounding. */
void *kt_wholes(struct kt *t, enum kern_type type, size_t n, int most);
struct kern_weight kt_weight_whole(struct kt *t, enum kern_format format, int out, int in);
extern const char *const kt_format_name[];
/* The same values (zeros of either sign), or a message. */
void kt_equal(const void *got, const void *want, enum kern_type type, size_t n, const char *what,
              enum kern_format format, int out, int in, int rows);

static inline size_t kt_bytes(enum kern_type type, size_t n) {
    return n * (type == KERN_F32 ? 4 : 2);
}
static inline float kt_get(const void *p, enum kern_type type, size_t i) {
    return cpu_get((kptr){ (void *)(uintptr_t)p }, type, i);
}
static inline kptr kt_p(const void *p) { return (kptr){ (void *)(uintptr_t)p }; }

/* Every NaN of p becomes the same one: for what has no promised sign and payload (kern.h). */
void kt_one_nan(void *p, enum kern_type type, size_t n);

/* A launch on an emulated device takes some 100 us: a test that would need too many takes fewer. */
static inline bool kt_slow(const struct kern *k) { return !strncmp(k->name, "cuda", 4); }

#define KT_EACH(t, k) for (struct kern *k = (t)->k; k < (t)->k + (t)->n; k++)
/* The same bits, or a message that says who, what and where. */
#define KT_SAME(k, got, want, bytes, ...) kt_same(k, got, want, bytes, sizeof *(got), __VA_ARGS__)
void kt_same(const struct kern *k, const void *got, const void *want, size_t bytes, size_t element,
             const char *fmt, ...) PRINTF_LIKE(6, 7);
#define KT_NEAR(got, want, bound, ...)                                                             \
    do {                                                                                           \
        double g_ = (got), w_ = (want), b_ = (bound);                                              \
        if (!(fabs(g_ - w_) <= b_)) {                                                              \
            char text_[160];                                                                       \
            snprintf(text_, sizeof text_, __VA_ARGS__);                                            \
            cr_assert(false, "%s: %.9g, wanted %.9g within %.2g", text_, g_, w_, b_);              \
        }                                                                                          \
    } while (0)
#endif
