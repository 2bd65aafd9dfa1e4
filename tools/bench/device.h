/* device.h - one GPU: what its maker says of it, and what it has room for.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_BENCH_DEVICE_H
#define QERL_BENCH_DEVICE_H
#include "lib/base/err.h"
#include "lib/base/json.h"

/* Bytes of memory and FLOPs (bf16 on tensor cores, f32 sums, dense) a second, from NVIDIA's data
 * sheets. */
struct datasheet { const char *name; double bytes, flops; };

struct bench;
/* Where b->kern is a device's: its plugin and data sheet into b, and "device", "versions" and
 * "datasheet" into the report. */
int device_open(struct bench *b, struct err *e);
#endif
