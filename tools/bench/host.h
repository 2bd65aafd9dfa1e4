/* host.h - which machine this is, and whether others use it.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_BENCH_HOST_H
#define QERL_BENCH_HOST_H
#include "lib/base/str.h"

/* The CPU's name; those of its flags that matter here, separated by blanks. */
void host_cpu(struct str *name, struct str *flags);
void host_date(char out[32]);                    /* "2026-11-22 08:15 UTC" */
double host_memory_bytes(void);
int64_t host_peak_bytes(void);                   /* most this process ever had in memory */
size_t host_l2_bytes(void);                      /* of one core; 1 MiB where the system won't say */

/* CPU time of all cores since boot and of this process and its children, in seconds. */
struct host_load { double busy, total, own; };
struct host_load host_load(void);
/* Share of the CPUs (0 .. 1) that others used between two looks. */
double host_others(const struct host_load *from, const struct host_load *to);
#endif
