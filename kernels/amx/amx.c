/* amx.c - the products of this folder's multiplier on AMX; the rest is AVX-512's. Empty where the
 * compiler has no such machine.
 *
 * A thread's tiles are configured when it enters a part and released when it leaves: some 200
 * cycles, which out-of-order execution hides behind the filling of the first blocks, in parts of
 * tens of thousands. An idle worker then carries no 8 KiB of state through the scheduler, and
 * nobody has to know whether his thread was here before.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cpu.h"

#if defined(__AVX512VBMI__)
#define QERL_MUL_AMX
#include "kernels/amx/tiles.h"

struct amx_job { void (*fn)(void *, int, int); void *arg; };

static void amx_part(void *arg, int part, int parts) {
    const struct amx_job *job = arg;
    tiles_open();
    job->fn(job->arg, part, parts);
    tiles_close();
}
static void amx_run(struct kern *k, int parts, void (*fn)(void *, int, int), void *arg) {
    struct amx_job job = { fn, arg };
    cpu_run(k, parts, amx_part, &job);
}
#define cpu_run amx_run              /* the drivers' parts run with tiles */
#include "kernels/simd/attn.h"
#include "kernels/simd/gemm.h"
#undef cpu_run

#if defined(QERL_AMX_EMULATED)
void kern_amx_emulated_fill(struct kern *k) {
#else
void amx_tile_product(float *c, const uint16_t *a, const uint16_t *b) {
    tiles_open();
    TILE_LOAD(0, c, 64);
    TILE_LOAD(4, a, 64);
    TILE_LOAD(6, b, 64);
    TILE_PRODUCT(0, 4, 6);
    TILE_STORE(0, c, 64);
    tiles_close();
}

void kern_amx_fill(struct kern *k) {
#endif
    kern_avx512_fill(k);
#include "kernels/simd/products.inc"
}
#endif
