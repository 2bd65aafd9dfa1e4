/* launch.h - the two places where the emulated build cannot read CUDA's own syntax.
 *
 * LAUNCH(kernel, grid, block, smem, stream, args...); a template goes in parentheses:
 * LAUNCH((k<float, 4>), ...). DYN_SHARED(type, name); declares the block's dynamic shared memory,
 * 16-byte aligned, as `type *name`. The emulated build (tests/cuda/emu/cudacpu.h) brings its own.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_CUDA_LAUNCH_H
#define QERL_CUDA_LAUNCH_H
#ifndef QERL_CUDA_EMU
#define LAUNCH(k, grid, block, smem, stream, ...) (k)<<<(grid), (block), (smem), (stream)>>>(__VA_ARGS__)
#define DYN_SHARED(type, name)                             \
    extern __shared__ __align__(16) unsigned char launch_shared[]; \
    type *name = reinterpret_cast<type *>(launch_shared)
#endif
#endif
