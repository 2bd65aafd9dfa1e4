/* rec_hostile.c - MessagePack that was not written by us, or not to the end.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/wire/rec.h"

#include <criterion/criterion.h>
#include <malloc.h>
#include <msgpack.h>
#include <sys/resource.h>

#include "tests/unit/rec_any.h"

#define BYTES(text) text, sizeof text - 1
#define HEAD "\xA3rec\xA3" "end\xA1v\x02"
#define END_REST "\xA3run\xA0\xA5" "fence\x01\xA4step\x02"
static const struct { const char *bytes; size_t n; const char *says;
} hostile[] = {
    { BYTES(""), "ends inside a value" },
    { BYTES("\xDD\x7F\xFF\xFF\xFF"), "a count that does not fit at byte 0" },
    { BYTES("\xDF\x7F\xFF\xFF\xFF"), "a count that does not fit at byte 0" },
    { BYTES("\xC6\xFF\xFF\xFF\xFF"), "a count that does not fit at byte 0" },
    { BYTES("\xDB\xFF\xFF\xFF\xFF"), "a count that does not fit at byte 0" },
    { BYTES("\xDF\xFF\xFF\xFF\xFF\xA3rec"), "a count that does not fit at byte 0" },
    { BYTES("\xDC\xFF"), "ends inside a header" },
    { BYTES("\x91\x91\x91\x91\x91\x91\x91\x91\x91\x01"), "nested deeper than 8" },
    { BYTES("\x81\x01\x81\x01\x81\x01\x81\x01\x81\x01\x81\x01\x81\x01\x81\x01\x81\x01\x01"),
      "nested deeper than 8" },
    { BYTES("\xC0"), "a type that records do not use" },
    { BYTES("\xC1"), "a type that records do not use" },
    { BYTES("\xC7\x00\x01"), "a type that records do not use" },
    { BYTES("\xCA\x00\x00\x00\x00"), "a type that records do not use" },
    { BYTES("\xD4\x01\x01"), "a type that records do not use" },
    { BYTES("\x01"), "is a number, must be a map" },
    { BYTES("\x80"), "does not start with 'rec' and 'v'" },
    { BYTES("\x82\x01\x01\x01\x01"), "must be a string" },
    { BYTES("\x82\xA1v\x02\xA3rec\xA3"
            "end"),
      "the first field must be 'rec'" },
    { BYTES("\x82\xA3rec\xA3"
            "abc\xA1v\x02"),
      "unknown kind 'abc'" },
    { BYTES("\x82\xA3rec\xA4"
            "none\xA1v\x02"),
      "unknown kind 'none'" },
    { BYTES("\x82\xA3rec\xA3"
            "end\xA1w\x02"),
      "the second field must be 'v'" },
    { BYTES("\x82\xA3rec\xA3"
            "end\xA1v\x03"),
      "end: version 3, this program speaks 2" },
    { BYTES("\x82\xA3rec\xA3"
            "end\xA1v\x00"),
      "end: version 0, this program speaks 2" },
    { BYTES("\x82\xA3rec\xA3"
            "end\xA1v\x01"),
      "end: field 'run' is missing" },
    { BYTES("\x82" HEAD), "end: field 'run' is missing" },
    { BYTES("\x85" HEAD END_REST "\x00"), "bytes after the record at byte" },
    { BYTES("\x85" HEAD "\xA3run\xA0\xA5"
            "fence\x01\xA5"
            "fence\x02"),
      "end: field 'fence' is there twice" },
    { BYTES("\x85" HEAD "\xA3run\xA0\xA5"
            "fence\x01\xA5"
            "stepp\x02"),
      "end: unknown field 'stepp'" },
    { BYTES("\x85" HEAD "\xA3run\x01\xA5"
            "fence\x01\xA4step\x02"),
      "end: field 'run' is a number, must be a string" },
    { BYTES("\x85" HEAD "\xA3run\xA0\xA5"
            "fence\xFF\xA4step\x02"),
      "end: field 'fence' is outside 0 .." },
    { BYTES("\x85" HEAD "\xA3run\xA0\xA5"
            "fence\xCF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xA4step\x02"),
      "'fence' is outside" },
    { BYTES("\x85" HEAD "\xA3run\xA0\xA5"
            "fence\xC3\xA4step\x02"),
      "'fence' is a flag, must be a whole number" },
    { BYTES("\x85" HEAD "\xA3run\xA1\xFF\xA5"
            "fence\x01\xA4step\x02"),
      "not text (UTF-8 without NUL)" },
    { BYTES("\x85" HEAD "\xA3run\xA3\xED\xA0\x80\xA5"
            "fence\x01\xA4step\x02"),
      "not text (UTF-8 without NUL)" },
    { BYTES("\x85" HEAD "\xA3run\xA1\x00\xA5"
            "fence\x01\xA4step\x02"),
      "not text (UTF-8 without NUL)" },
    { BYTES("\x85" HEAD "\xA3run\x90\xA5"
            "fence\x01\xA4step\x02"),
      "'run' is an array, must be a string" },
};

Test(rec_hostile, each_is_refused_with_its_reason) {
    for (size_t i = 0; i < COUNT_OF(hostile); i++) {
        /* the sanitizer sees a read beyond the end */
        char *exact = mem_alloc(hostile[i].n);
        memcpy(exact, hostile[i].bytes, hostile[i].n);
        struct rec r;
        struct err e = { 0 };
        cr_expect(rec_unpack(&r, exact, hostile[i].n, &e) < 0, "case %zu was accepted", i);
        cr_expect(strstr(e.text, hostile[i].says), "case %zu\n  said: %s\n  want: %s", i, e.text,
                  hostile[i].says);
        free(exact);
    }
    struct rec r;
    struct err e = { 0 };
    cr_assert(rec_unpack(&r, BYTES("\x85" HEAD END_REST), &e) == 0, "the same without a fault: %s",
              e.text);
    cr_assert(r.end.fence == 1 && r.end.step == 2);
    rec_release(&r);
}

Test(rec_hostile, truncated_at_every_byte_is_refused) {
    struct any a = { 4 };
    for (int t = REC_NONE + 1; t < REC_TYPE_COUNT; t++) {
        struct rec x, y;
        struct str b = { 0 };
        any_fill(&x, (enum rec_type)t, &a);
        rec_pack(&b, &x);
        for (size_t n = 0; n < b.len; n++) {
            char *exact = mem_alloc(n);
            memcpy(exact, b.s, n);
            struct err e = { 0 };
            cr_assert(rec_unpack(&y, exact, n, &e) < 0 && *e.text, "%s cut to %zu of %zu bytes",
                      rec_name[t], n, b.len);
            free(exact);
        }
        str_release(&b);
        rec_release(&x);
    }
}

/* Whatever is accepted must be a record that can be written again. */
Test(rec_hostile, a_changed_byte_is_refused_or_gives_a_lawful_record) {
    struct any a = { 5 };
    int accepted = 0;
    for (int t = REC_NONE + 1; t < REC_TYPE_COUNT; t++) {
        struct rec x, y;
        struct str b = { 0 };
        any_fill(&x, (enum rec_type)t, &a);
        rec_pack(&b, &x);
        for (size_t i = 0; i < b.len; i++)
            for (int k = 0; k < 4; k++) {
                char kept = b.s[i];
                b.s[i] = (char)any_bits(&a);
                struct err e = { 0 };
                if (rec_unpack(&y, b.s, b.len, &e) == 0) {
                    accepted++;
                    cr_assert(rec_check(&y, &e) == 0, "%s, byte %zu: %s", rec_name[t], i, e.text);
                    rec_release(&y);
                } else cr_assert(*e.text);
                b.s[i] = kept;
            }
        str_release(&b);
        rec_release(&x);
    }
    cr_assert(accepted > 0);
}

static void put_name(msgpack_packer *p, const char *name) {
    msgpack_pack_str(p, strlen(name));
    msgpack_pack_str_body(p, name, strlen(name));
}

static int write_str(void *to, const char *p, size_t n) {
    str_add(to, p, n);
    return 0;
}

/* Finds a field's value in a packed record and puts another there. */
static void replace_after(struct str *b, const char *name, const void *value, size_t n,
                          size_t old) {
    char *at = memmem(b->s, b->len, name, strlen(name));
    cr_assert(at);
    size_t head = (size_t)(at - b->s) + strlen(name);
    struct str out = { 0 };
    str_add(&out, b->s, head);
    str_add(&out, value, n);
    str_add(&out, b->s + head + old, b->len - head - old);
    str_release(b);
    *b = out;
}

Test(rec_hostile, arrays_and_numbers_are_checked) {
    static const struct {
        const char *name;
        const char *value;
        size_t n, old;
        const char *says;
    } cases[] = {
        { "prompt_ids", "\xC4\x03\x00\x00\x00", 5, 2, "'prompt_ids' has 3 bytes, not" },
        { "prompt_ids", "\xC4\x04\xFF\xFF\xFF\xFF", 6, 2, "'prompt_ids'[0] is negative" },
        { "prompt_ids", "\x90", 1, 2, "'prompt_ids' is an array, must be binary" },
        { "temperature", "\xCB\x7F\xF8\x00\x00\x00\x00\x00\x00", 9, 9,
          "'temperature' is not finite" },
        { "temperature", "\xCB\xFF\xF0\x00\x00\x00\x00\x00\x00", 9, 9,
          "'temperature' is not finite" },
        { "temperature", "\x01", 1, 9, "'temperature' is a number, must be a float" },
        { "samples", "\xDC\x01\x01", 3, 1, "a count that does not fit" },
        { "samples", "\x80", 1, 1, "'samples' is a map, must be an array" },
        { "samples", "\x91\x80", 2, 1, "sample 0: traj: field 'k' is missing" },
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        struct rec x = { .type = REC_TRAJ }, y;
        struct str b = { 0 };
        struct err e = { 0 };
        rec_pack(&b, &x);
        replace_after(&b, cases[i].name, cases[i].value, cases[i].n, cases[i].old);
        cr_expect(rec_unpack(&y, b.s, b.len, &e) < 0, "case %zu was accepted", i);
        cr_expect(strstr(e.text, cases[i].says), "case %zu\n  said: %s\n  want: %s", i, e.text,
                  cases[i].says);
        str_release(&b);
    }
}

Test(rec_hostile, too_many_samples_are_refused) {
    struct rec x = { .type = REC_TRAJ }, y;
    struct str b = { 0 }, bomb = { 0 };
    struct err e = { 0 };
    msgpack_packer p;
    msgpack_packer_init(&p, &bomb, write_str);
    msgpack_pack_array(&p, REC_SAMPLES_MAX + 1);
    for (int i = 0; i <= REC_SAMPLES_MAX; i++) {
        msgpack_pack_map(&p, 1);
        put_name(&p, "k");
        msgpack_pack_int(&p, i);
    }
    rec_pack(&b, &x);
    replace_after(&b, "samples", bomb.s, bomb.len, 1);
    cr_assert(rec_unpack(&y, b.s, b.len, &e) < 0);
    cr_assert(strstr(e.text, "traj: 257 samples, at most 256"), "%s", e.text);
    str_release(&b);
    str_release(&bomb);
}

Test(rec_hostile, a_frame_above_the_limit_is_refused_unread) {
    struct err e = { 0 };
    cr_assert(rec_validate("", (size_t)REC_BYTES_MAX + 1, &e) < 0);
    cr_assert(strstr(e.text, "a record has at most"), "%s", e.text);
}

/* What a record holds is at most 4 x its frame + 64 KiB, even for the frame that is worst: many
 * empty samples. */
Test(rec_hostile, memory_is_bounded_by_the_bytes_present) {
#ifdef __SANITIZE_ADDRESS__
    cr_skip_test("skipped: the sanitizer's allocator does not count (mallinfo2)");
#else
    static struct rec_sample sample[REC_SAMPLES_MAX];
    static char stop[] = "eos";
    for (int i = 0; i < REC_SAMPLES_MAX; i++) sample[i].stop = stop;
    for (int samples = 0; samples <= REC_SAMPLES_MAX; samples += 64)
        for (int t = REC_TRAJ; t <= REC_GROUP; t++) {
            struct rec x = { .type = (enum rec_type)t,
                             .group = { .sample = sample, .samples = samples } },
                       y;
            struct str b = { 0 };
            struct err e = { 0 };
            rec_pack(&b, &x);
            size_t before = mallinfo2().uordblks + mallinfo2().hblkhd;
            cr_assert(rec_unpack(&y, b.s, b.len, &e) == 0, "%s", e.text);
            size_t taken = mallinfo2().uordblks + mallinfo2().hblkhd - before;
            cr_assert(taken <= 4 * b.len + 65536, "%zu bytes taken for a frame of %zu", taken,
                      b.len);
            rec_release(&y);
            str_release(&b);
        }
#endif
}

/* With hardly any memory left to take, bombs are still refused in good order. */
Test(rec_hostile, bombs_take_no_memory) {
#ifdef __SANITIZE_ADDRESS__
    cr_skip_test("skipped: the sanitizer needs its address space");
#else
    FILE *f = fopen("/proc/self/statm", "r");
    unsigned long pages = 0;
    cr_assert(f && fscanf(f, "%lu", &pages) == 1);
    fclose(f);
    struct rlimit l = { 0, RLIM_INFINITY };
    l.rlim_cur = pages * 4096 + (1 << 20);
    cr_assert(setrlimit(RLIMIT_AS, &l) == 0);
    for (int round = 0; round < 1000; round++)
        for (size_t i = 0; i < COUNT_OF(hostile); i++) {
            struct rec r;
            struct err e = { 0 };
            cr_assert(rec_unpack(&r, hostile[i].bytes, hostile[i].n, &e) < 0);
        }
#endif
}
