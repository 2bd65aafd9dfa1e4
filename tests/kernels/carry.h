/* carry.h - a table of kernels whose memory is a device's, behind one that takes host memory: what
 * lets every test of the suite run on it unchanged.
 *
 * Each operation's arrays go to device buffers of exactly the size that kern.h gives them, and
 * what it may write comes back; what it may not write must not have changed. Nothing outside of
 * carry.c touches device memory.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_CARRY_H
#define QERL_CARRY_H
#include "kernels/kern.h"

/* Where the plugin is that cuda:0 would be opened with: QERL_CUDA, or the emulated one that was
 * built beside this program, which QERL_CUDA then names. NULL: there is none. */
const char *carry_plugin(void);
/* Fills the table, which takes host memory, for the device's kernels of this name. One name a
 * process; aborts the test on failure. */
void carry_open(struct kern *k, const char *name);
#endif
