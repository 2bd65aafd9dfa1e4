/* device.h - the GPU of a stage in words: for logs, for --plan and --devices, for metrics.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_DEVICE_H
#define QERL_DEVICE_H
#include "kernels/kern.h"
#include "lib/base/json.h"

enum { DEVICE_TEXT_MAX = 400 };

/* "NVIDIA H100, sm_90, 79.2 GiB", with a warning where the device is emulated; "" for a CPU path.
 * EXIT_ENV where the plugin cannot say. */
int device_text(char out[DEVICE_TEXT_MAX], const struct kern *k, struct err *e);
/* For the table of a GPU, adds to out "devices" [{"name","arch","memory_bytes","free_bytes"}] of
 * all that this process is shown: those of a stage, one for each of its processes. */
int device_plan(json_t *out, const struct kern *k, struct err *e);
/* {"versions", "devices":[{"name","arch","pci","memory_bytes","free_bytes","peers":[numbers]}]} of
 * all that this process may use, or {"error"}. Loads the plugin. */
json_t *device_all(void);
#endif
