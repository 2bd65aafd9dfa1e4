/* fuzz_safetensors.c - any bytes as a safetensors file: refused with a message, or every tensor
 * readable.
 *
 * With clang: -fsanitize=fuzzer,address,undefined. Without: tests/fuzz/replay.h gives a main that
 * replays files.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/safetensors.h"
#include "tests/fuzz/replay.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
    struct st_file f;
    struct err e = { 0 };
    if (st_open_memory(&f, data, bytes, "fuzz", &e) < 0) {
        if (!e.text[0]) abort();
        return 0;
    }
    for (int i = 0; i < f.count; i++) {
        const struct st_tensor *t = &f.tensor[i];
        if (st_find(&f, t->name) != t) abort();
        float last;
        if (t->elements > 0 && st_to_f32_part(t, t->elements - 1, 1, &last, &e) < 0 && !e.text[0])
            abort();
    }
    st_close(&f);
    return 0;
}
