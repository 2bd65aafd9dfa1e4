/* fuzz_rec.c - any bytes as a record: refused, or read, written and read again to the same bytes,
 * in both forms.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/wire/rec.h"

#include "tests/fuzz/replay.h"

static void must(bool ok, const char *what, const struct err *e) {
    if (ok) return;
    fprintf(stderr, "%s: %s\n", what, e->text);
    abort();
}

/* What was accepted can be written, and what is written is accepted and stays the same. */
static void round_trip(const struct rec *r) {
    struct rec packed, lined;
    struct str a = { 0 }, b = { 0 }, line = { 0 };
    struct err e = { 0 };
    must(rec_check(r, &e) == 0, "accepted, but cannot be written", &e);
    rec_pack(&a, r);
    must(rec_unpack(&packed, a.s, a.len, &e) == 0, "own MessagePack refused", &e);
    rec_to_json(&line, r);
    must(rec_from_json(&lined, line.s, line.len, REC_NONE, "fuzz:1", &e) == 0, "own JSON refused",
         &e);
    rec_pack(&b, &lined);
    must(a.len == b.len && memcmp(a.s, b.s, a.len) == 0, "JSON changed the record", &e);
    rec_release(&packed);
    rec_release(&lined);
    str_release(&a);
    str_release(&b);
    str_release(&line);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes) {
    struct rec r;
    struct err e = { 0 };
    if (rec_unpack(&r, data, bytes, &e) == 0) {
        round_trip(&r);
        rec_release(&r);
    } else must(e.text[0], "refused without a word", &e);
    for (int t = REC_NONE; t < REC_TYPE_COUNT; t++) {
        e = (struct err){ 0 };
        if (rec_from_json(&r, (const char *)data, bytes, (enum rec_type)t, "fuzz:1", &e) == 0) {
            round_trip(&r);
            rec_release(&r);
        } else must(e.text[0], "refused without a word", &e);
    }
    return 0;
}
