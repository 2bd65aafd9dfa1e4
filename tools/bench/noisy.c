/* noisy.c - what noise on one element costs, by type; whole steps are in decode.c and train.c.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/noise_ops.h"
#include "tools/bench/bench.h"

enum { ROWS = 256, DIM = 8960 };             /* a gate of the 1.5B shape */

struct room {
    struct kern *k;
    struct kern_perturb a;
    kptr x, y, sums;
};

static void perturb_call(void *arg) {
    struct room *r = arg;
    r->k->perturb(r->k, &r->a);
}

static int room_open(struct room *r, struct bench *b, struct err *e) {
    const size_t bytes = (size_t)ROWS * DIM * sizeof(float);
    r->k = &b->kern;
    if (r->k->alloc(r->k, &r->x, bytes, e) < 0 || r->k->alloc(r->k, &r->y, bytes, e) < 0 ||
        r->k->alloc(r->k, &r->sums, KERN_NOISE_SUMS * sizeof(int64_t), e) < 0)
        return -1;
    float *x = mem_alloc(bytes);
    for (int i = 0; i < ROWS * DIM; i++) x[i] = (float)(i % 977) * .01f - 4.f;
    r->k->upload(r->k, r->x, x, bytes);
    free(x);
    r->a = (struct kern_perturb){ .noise = { .scale = .05f, .rate = .01f, .key = { 1, 2 },
                                             .sums = r->sums },
                                  .x = r->x, .x_ld = DIM, .y = r->y, .y_ld = DIM, .rows = ROWS,
                                  .dim = DIM };
    return 0;
}

int part_noise(struct bench *b, struct err *e) {
    struct room r = { 0 };
    char key[BENCH_KEY_MAX];
    if (!bench_enters(b, "noisy/perturb")) return 0;
    int rc = room_open(&r, b, e);
    for (int bf16 = 0; bf16 < 2 && rc == 0; bf16++)
        for (int type = 0; type < KERN_NOISE_TYPE_COUNT; type++) {
            snprintf(key, sizeof key, "noisy/perturb/%s%s", noise_type_name[type],
                     bf16 ? "/bf16" : "");
            if ((bf16 && !type) || !bench_begins(b, key)) continue;
            r.a.noise.type = (enum kern_noise_type)type;
            r.a.noise.bf16 = bf16;
            struct spread s = timing_on(r.k, perturb_call, &r, b->quick ? .03 : .2, e);
            if (s.n == 0) rc = -1;
            if (rc < 0) break;
            s = spread_times(s, 1e9 * b->threads / ((double)ROWS * DIM));
            bench_report(b, key, &(struct figure){ .unit = "ns", .s = s,
                                                   .what = "an element and thread, counted" });
        }
    r.k->free(r.k, &r.x);
    r.k->free(r.k, &r.y);
    r.k->free(r.k, &r.sums);
    return rc < 0 ? err_wrap(e, "noisy/perturb") : 0;
}
