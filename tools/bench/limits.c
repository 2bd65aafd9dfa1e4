/* limits.c - see limits.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tools/bench/limits.h"

#include <math.h>

const double limits_mxfp4_bytes = 272. / 512.;

static double larger(double a, double b) { return a > b ? a : b; }

double limits_read(const struct limits *l, double bytes) {
    if (bytes <= l->read[0].bytes) return l->read[0].per_second;
    for (int i = 1; i < LIMITS_READ_COUNT; i++) {
        if (bytes > l->read[i].bytes) continue;
        double at = log(bytes / l->read[i - 1].bytes) /
                    log(l->read[i].bytes / l->read[i - 1].bytes);
        return l->read[i - 1].per_second +
               at * (l->read[i].per_second - l->read[i - 1].per_second);
    }
    return l->read[LIMITS_READ_COUNT - 1].per_second;
}

double limits_unpack(const struct limits *l) {
    return l->hertz > 0 ? l->hertz * l->threads * 512. / 60. : INFINITY;
}

double limits_roof(const struct limits *l, double bytes, double flops) {
    return larger(bytes / limits_read(l, bytes), flops / l->flops);
}

double limits_seconds(const struct limits *l, const struct work *w) {
    return larger(limits_roof(l, w->bytes, w->flops), w->coded / limits_unpack(l));
}

struct work limits_decode(const struct limits *l, const struct shape_size *s, int n, int prompt,
                          int own, double head_bytes) {
    int groups = (n + 7) / 8, tiles = (n + l->tile_rows - 1) / l->tile_rows;
    const double bytes = s->body * limits_mxfp4_bytes + s->head * head_bytes + 2 * s->lora +
                         ((double)groups * prompt + (double)n * own) * s->kv_bytes;
    const double flops = 2 * (s->body + s->head + s->lora) * tiles * l->tile_rows +
                         4 * s->layers * s->q_dim * (prompt + own) * n;
    return (struct work){ bytes, flops, s->body + (head_bytes < 1 ? s->head : 0) };
}

double limits_train_flops(const struct shape_size *s, double tokens, double scored) {
    return 4 * s->body + 4 * s->head * scored / tokens + 6 * s->lora +
           6 * s->layers * s->q_dim * tokens;
}

struct work limits_prefill(const struct shape_size *s, int rows, int position, int wants) {
    const double flops = 2 * (s->body + s->lora) * rows + 2 * s->head * wants +
                         4 * s->layers * s->q_dim * position * rows;
    return (struct work){ s->body * limits_mxfp4_bytes + 2 * s->head + 2 * s->lora, flops, 0 };
}
