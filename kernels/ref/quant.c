/* quant.c - rows as a 4-bit unit would read them: the arithmetic of kernels/quant.h on each block.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/quant.h"

#include "kernels/cpu.h"

static void quant_row(const struct kern_quant_rows *a, size_t at) {
    const int size = a->format == KERN_FORMAT_MXFP4 ? QUANT_BLOCK : QUANT_BLOCK_NVFP4;
    float most = 0, tensor = 1;
    bool finite = true;
    for (int i = 0; i < a->dim; i++) {
        const float x = cpu_get(a->x, a->type, at + (size_t)i);
        finite &= x - x == 0;
        most = fabsf(x) > most ? fabsf(x) : most;
    }
    if (a->format == KERN_FORMAT_NVFP4) tensor = quant_tensor_scale(most, a->seed);
    for (int first = 0; first < a->dim; first += size) {
        const int end = first + size < a->dim ? first + size : a->dim;
        struct quant_block b;
        most = 0;
        for (int i = first; i < end; i++)
            most = fmaxf(most, fabsf(cpu_get(a->x, a->type, at + (size_t)i)));
        quant_block_fill(&b, a->format, a->seed, finite ? most : 0, tensor);
        for (int i = first; i < end; i++) {
            const float x = cpu_get(a->x, a->type, at + (size_t)i);
            cpu_put(a->y, a->type, at + (size_t)i,
                    finite ? pack_e2m1[quant_code(&b, x)] * b.unit * tensor : NAN);
        }
    }
}

void ref_quant_rows(struct kern *k, const struct kern_quant_rows *a) {
    assert(a->format == KERN_FORMAT_MXFP4 || a->format == KERN_FORMAT_NVFP4);
    (void)k;
    for (int r = 0; r < a->rows; r++) quant_row(a, (size_t)r * (size_t)a->dim);
}
