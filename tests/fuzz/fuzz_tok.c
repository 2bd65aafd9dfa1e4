/* fuzz_tok.c - any bytes as tokenizer.json: refused with a message, or the same bytes as text
 * encode and decode; and as a chat template: refused or recognised. Built like fuzz_safetensors.c.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/tok_int.h"
#include "tests/fuzz/replay.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
    struct tok *t = mem_alloc(sizeof *t);
    struct err e = { 0 };
    struct chat_family f = { 0 };
    t->unk = -1;
    if (chat_recognise(&f, (const char *)data, bytes, &e) < 0 && !e.text[0]) abort();
    chat_family_release(&f);
    e.text[0] = 0;
    if (tok_read_json(t, (const char *)data, bytes, "fuzz", &e) == 0) {
        struct tok_ids ids = { 0 };
        struct str back;
        str_init(&back);
        tok_encode(t, (const char *)data, bytes, true, &ids);
        tok_decode(t, ids.id, ids.n, true, &back);
        for (int i = 0; i < ids.n; i++)
            if (ids.id[i] < 0 || ids.id[i] >= tok_vocab(t)) abort();
        str_release(&back);
        free(ids.id);
    } else if (!e.text[0]) {
        abort();
    }
    tok_close(&t);
    return 0;
}
