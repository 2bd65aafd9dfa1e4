/* device.h - the GPU of a stage in words: for logs, for --plan and --devices, for metrics; and the
 * ranks of a stage that have one each.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_DEVICE_H
#define QERL_DEVICE_H
#include "kernels/kern.h"
#include "lib/base/json.h"
#include "lib/base/ranks.h"

enum { DEVICE_TEXT_MAX = 400 };

/* "NVIDIA H100, sm_90, 79.2 GiB", with a warning where the device is emulated; "" for a CPU path.
 * EXIT_ENV where the plugin cannot say. */
int device_text(char out[DEVICE_TEXT_MAX], const struct kern *k, struct err *e);
/* For the table of a GPU, adds to out "devices" [{"name","arch","pci","memory_bytes",
 * "free_bytes"}] of all that this process is shown: those of a stage, one for each of its
 * processes; and "cuda" {"plugin","sha256","versions","nccl"}. */
int device_plan(json_t *out, const struct kern *k, struct err *e);
/* Whether the table is a device's. */
bool device_is(const struct kern *k);

/* Arrays of ranks that compute on GPUs, summed on these: NCCL brings them together. A rank that
 * `ranks` knows to be lost ends every wait, and the message names it. */
struct device_ranks;
/* What that needs is here: the plugin and NCCL, or EXIT_ENV with what to install. */
int device_ranks_check(struct err *e);
/* All ranks call it. ranks and k are lent; piece: floats of the largest gather. */
int device_ranks_open(struct device_ranks **out, struct ranks *ranks, struct kern *k, size_t piece,
                      struct err *e);
void device_ranks_close(struct device_ranks **d);
/* Queued: x[0, n) of every rank comes to every rank; then x becomes their sum, in rank order. */
int device_ranks_gather(struct device_ranks *d, kptr x, size_t n, struct err *e);
void device_ranks_add(struct device_ranks *d, kptr x, size_t n);
int device_ranks_wait(struct device_ranks *d, struct err *e);

/* {"versions", "devices":[{"name","arch","pci","memory_bytes","free_bytes","peers":[numbers]}],
 * "nccl"} of all that this process may use, or {"error"}. Loads the plugin. */
json_t *device_all(void);
#endif
