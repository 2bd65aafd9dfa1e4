/* probe.h - loops that do nothing but one kind of work, as fast as this CPU can.
 *
 * Each file has the instruction set of its name and is called only on a CPU that has it.
 * A probe runs `turns` turns on the calling thread.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_BENCH_PROBE_H
#define QERL_BENCH_PROBE_H
#include "lib/base/sys.h"

enum {
    PROBE_FMA256_FLOPS = 12 * 8 * 2,         /* of one turn */
    PROBE_FMA512_FLOPS = 16 * 16 * 2,
    PROBE_BF16_FLOPS = 16 * 16 * 4,
    PROBE_AMX_FLOPS = 4 * 16 * 16 * 32 * 2,
};
void probe_fma256(long turns);
void probe_fma512(long turns);
void probe_bf16(long turns);                 /* VDPBF16PS */
/* Twelve VDPBF16PS, permutations of words or stores of 64 bytes a turn; twelve of each of two. */
void probe_dots(long turns);
void probe_permutes(long turns);
void probe_stores(long turns);
void probe_dots_permutes(long turns);
void probe_dots_stores(long turns);
/* TDPBF16PS: from registers only; with a 2x2 block's four tiles loaded from L1 each turn. The
 * thread must have called probe_amx_begin; probe_amx_allow is once a process, false = refused. */
bool probe_amx_allow(void);
void probe_amx_begin(void);
void probe_amx_end(void);
void probe_amx_registers(long turns);
void probe_amx_l1(long turns);
/* Reads `bytes` (a multiple of 512) at p, 64-byte aligned, once. */
void probe_read256(const void *p, size_t bytes);
void probe_read512(const void *p, size_t bytes);
/* A chain of `turns` * 64 additions, one cycle each. */
void probe_cycles(long turns);

struct probe_cpu { bool avx2, avx512, bf16, amx; };
struct probe_cpu probe_cpu(void);
#endif
