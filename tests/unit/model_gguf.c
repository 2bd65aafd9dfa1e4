/* model_gguf.c - the reader refuses hostile files by name; block formats give the floats that
 * PyPI's gguf gives.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/gguf.h"
#include "tests/unit/model_files.h"

static void refused(struct str *file, const char *message) {
    struct gguf g;
    struct err e = { 0 };
    uint8_t *copy = mem_alloc(file->len + 1);               /* the sanitiser sees reads beyond it */
    memcpy(copy, file->s, file->len);
    cr_expect_eq(gguf_open_memory(&g, copy, file->len, "f", &e), -1, "accepted, wanted: %s",
                 message);
    expect_err(&e, message);
    free(copy);
    str_release(file);
}

/* One F32 tensor 'w' [2, 32] with its 256 bytes of data. */
static void good(struct str *b) {
    g_start(b, 1, 2);
    g_key_text(b, "general.architecture", "llama");
    g_key_u32(b, "general.alignment", 64);
    g_tensor(b, "w", 2, 32, 2, GGUF_TYPE_F32, 0);
    g_pad(b, 64);
    g_zeros(b, 256);
}

Test(model_gguf, header, .description = "magic, version and counts") {
    struct str b;
    str_init(&b);
    str_puts(&b, "GGML");
    g_u32(&b, 3);
    refused(&b, "'f' is not a GGUF file");
    g_start(&b, 0, 0);
    b.s[4] = 1;
    refused(&b, "'f': GGUF version 1 is not supported");
    g_start(&b, 0, 0);
    memcpy(b.s + 4, "\0\0\0\3", 4);
    refused(&b, "'f': GGUF version 50331648 is not supported (the file is big-endian)");
    g_start(&b, 1ull << 60, 0);
    refused(
        &b,
        "'f': the header claims 1152921504606846976 tensors (0 bytes follow, the most is 65536)");
    g_start(&b, 0, UINT64_MAX);
    refused(&b,
            "'f': the header claims 18446744073709551615 keys (0 bytes follow, the most is 65536)");
    g_start(&b, 5, 0);
    g_zeros(&b, 5 * 33 - 1);
    refused(&b, "'f': the header claims 5 tensors (164 bytes follow, the most is 65536)");
}

static void keyed(struct str *b, const char *key, uint32_t kind) {
    g_start(b, 0, 1);
    g_string(b, key);
    g_u32(b, kind);
}

Test(model_gguf, metadata, .description = "strings, arrays, kinds, alignment and doubled keys") {
    struct str b;
    g_start(&b, 0, 1);
    g_u64(&b, 1ull << 40);
    g_zeros(&b, 32);
    refused(
        &b,
        "'f': byte 24: a metadata key claims 1099511627776 bytes (32 are left, the most is 65535)");
    keyed(&b, "", GGUF_KIND_U8);
    g_zeros(&b, 8);
    refused(&b, "'f': byte 32: a metadata key is empty");
    keyed(&b, "k", 13);
    g_zeros(&b, 8);
    refused(&b, "'f': byte 37: unknown metadata type");
    keyed(&b, "k", GGUF_KIND_STRING);
    g_u64(&b, UINT64_MAX);
    refused(&b, "'f': byte 37: a metadata string claims 18446744073709551615 bytes (0 are left, "
                "the most is "
                "16777216)");
    keyed(&b, "k", GGUF_KIND_ARRAY);
    g_u32(&b, GGUF_KIND_ARRAY);
    g_u64(&b, 1);
    refused(&b, "'f': byte 49: arrays of arrays are not supported");
    keyed(&b, "k", GGUF_KIND_ARRAY);
    g_u32(&b, GGUF_KIND_F64);
    g_u64(&b, (1ull << 61) + 1);                            /* times 8 wraps to 8 */
    g_zeros(&b, 16);
    refused(&b, "'f': byte 49: a metadata value claims more elements than the file has bytes");
    keyed(&b, "k", GGUF_KIND_ARRAY);
    g_u32(&b, GGUF_KIND_STRING);
    g_u64(&b, 2);
    g_string(&b, "x");
    g_u64(&b, 1);
    refused(&b,
            "'f': byte 58: a metadata string claims 1 bytes (0 are left, the most is 16777216)");
    static const uint32_t align[] = { 0, 48, 1 << 21, 0x80000000u };
    for (size_t i = 0; i < COUNT_OF(align); i++) {
        char want[128];
        snprintf(want, sizeof want,
                 "'f': 'general.alignment' is %u; it must be a power of two up to 1048576",
                 align[i]);
        g_start(&b, 0, 1);
        g_key_u32(&b, "general.alignment", align[i]);
        refused(&b, want);
    }
    g_start(&b, 0, 1);
    g_key_text(&b, "general.alignment", "32");
    refused(&b, "'f': byte 63: 'general.alignment' must be a uint32");
    g_start(&b, 0, 2);
    g_key_u32(&b, "k", 1);
    g_key_u32(&b, "k", 1);
    refused(&b, "'f': metadata key 'k' comes twice");
}

static void one(struct str *b, const char *name, uint32_t rank, uint64_t ne0, uint64_t ne1,
                uint32_t type, uint64_t offset, size_t data) {
    g_start(b, 1, 0);
    g_tensor(b, name, rank, ne0, ne1, type, offset);
    g_pad(b, 32);
    g_zeros(b, data);
}

Test(model_gguf, tensors, .description = "ranks, shapes, types and offsets") {
    struct str b;
    one(&b, "", 1, 32, 0, 0, 0, 128);
    refused(&b, "'f': byte 32: a tensor's name is empty or holds a NUL");
    one(&b, "w", 0, 0, 0, 0, 0, 128);
    refused(&b, "'f': tensor 'w': its rank must be 1 to 4");
    one(&b, "w", 5, 1, 1, 0, 0, 128);
    refused(&b, "'f': tensor 'w': its rank must be 1 to 4");
    one(&b, "w", 0x80000001u, 1, 1, 0, 0, 128);
    refused(&b, "'f': tensor 'w': its rank must be 1 to 4");
    one(&b, "w", 2, 0, 4, 0, 0, 128);
    refused(&b, "'f': tensor 'w': a dimension is 0");
    one(&b, "w", 2, 1ull << 32, 1ull << 31, 0, 0, 128);
    refused(&b, "'f': tensor 'w': its shape overflows");
    one(&b, "w", 1, UINT64_MAX, 0, 0, 0, 128);
    refused(&b, "'f': tensor 'w': its shape overflows");
    one(&b, "w", 1, 1ull << 62, 0, GGUF_TYPE_F32, 0, 128);
    refused(&b, "'f': tensor 'w': its shape overflows");
    one(&b, "w", 1, 33, 0, GGUF_TYPE_Q4_1, 0, 128);
    refused(&b, "'f': tensor 'w': its rows are no whole number of blocks");
    one(&b, "w", 2, 128, 2, GGUF_TYPE_Q6_K, 0, 512);
    refused(&b, "'f': tensor 'w': its rows are no whole number of blocks");
    one(&b, "w", 1, 256, 0, 10, 0, 128);
    refused(&b, "'f': tensor 'w': type 10 (Q2_K) is not supported");
    one(&b, "w", 1, 32, 0, 4, 0, 128);
    refused(&b, "'f': tensor 'w': type 4 (unknown) is not supported");
    one(&b, "w", 1, 32, 0, UINT32_MAX, 0, 128);
    refused(&b, "'f': tensor 'w': type 4294967295 (unknown) is not supported");
    one(&b, "w", 1, 32, 0, 0, 4, 256);
    refused(&b, "'f': tensor 'w': its offset is not aligned");
    one(&b, "w", 1, 32, 0, 0, 64, 128);
    refused(&b, "'f': tensor 'w': its data ends after the file (is the download complete?)");
    one(&b, "w", 1, 32, 0, 0, UINT64_MAX - 31, 128);
    refused(&b, "'f': byte 57: a tensor's offset overflows");
    g_start(&b, 2, 0);
    g_tensor(&b, "a", 1, 16, 0, 0, 0);
    g_tensor(&b, "b", 1, 16, 0, 0, 32);
    g_pad(&b, 32);
    g_zeros(&b, 128);
    refused(&b, "'f': tensor 'b': its data overlaps another tensor's");
    g_start(&b, 2, 0);
    g_tensor(&b, "a", 1, 8, 0, 0, 0);
    g_tensor(&b, "a", 1, 8, 0, 0, 32);
    g_pad(&b, 32);
    g_zeros(&b, 64);
    refused(&b, "'f': tensor 'a' comes twice");
}

Test(model_gguf, truncated, .description = "a file cut off at any byte is refused") {
    struct str file;
    good(&file);
    for (size_t n = 0; n <= file.len; n++) {
        struct gguf g;
        struct err e = { 0 };
        uint8_t *copy = mem_alloc(n + 1);
        memcpy(copy, file.s, n);
        int rc = gguf_open_memory(&g, copy, n, "f", &e);
        cr_expect_eq(rc, n == file.len ? 0 : -1, "%zu bytes of %zu", n, file.len);
        cr_expect(rc == 0 || (e.text[0] && e.code == EXIT_ENV));
        if (rc == 0) gguf_close(&g);
        free(copy);
    }
    str_release(&file);
}

Test(model_gguf, reads, .description = "keys of every kind, arrays of strings, tensors by name") {
    struct str b;
    struct gguf g;
    struct err e = { 0 };
    g_start(&b, 1, 5);
    g_key_text(&b, "z", "text");
    g_string(&b, "i8");
    g_u32(&b, GGUF_KIND_I8);
    str_add(&b, "\xfe", 1);
    g_key_f32(&b, "f", 1.5f);
    g_string(&b, "u64");
    g_u32(&b, GGUF_KIND_U64);
    g_u64(&b, UINT64_MAX);
    g_string(&b, "list");
    g_u32(&b, GGUF_KIND_ARRAY);
    g_u32(&b, GGUF_KIND_STRING);
    g_u64(&b, 2);
    g_string(&b, "");
    g_string(&b, "two");
    g_tensor(&b, "w", 1, 8, 0, GGUF_TYPE_F32, 0);
    g_pad(&b, 32);
    g_zeros(&b, 32);
    cr_assert(gguf_open_memory(&g, b.s, b.len, "f", &e) == 0, "%s", e.text);
    int64_t v = 0;
    double d = 0;
    struct gguf_string s;
    cr_expect(gguf_int(&g, "i8", &v) && v == -2);
    cr_expect(gguf_num(&g, "f", &d) && d == 1.5);
    cr_expect(gguf_text(&g, "z", &s) && s.bytes == 4 && memcmp(s.s, "text", 4) == 0);
    cr_expect(!gguf_int(&g, "u64", &v) && !gguf_int(&g, "list", &v) && !gguf_int(&g, "f", &v) &&
              !gguf_num(&g, "i8", &d));
    cr_expect(!gguf_text(&g, "list", &s) && !gguf_find(&g, "absent"));
    const struct gguf_kv *list = gguf_find(&g, "list");
    const uint8_t *at = gguf_string_next(list->data, &s);
    cr_expect_eq(s.bytes, 0);
    gguf_string_next(at, &s);
    cr_expect(list->count == 2 && s.bytes == 3 && memcmp(s.s, "two", 3) == 0);
    const struct gguf_tensor *w = gguf_tensor_find(&g, "w");
    cr_expect(w && w->elements == 8 && w->bytes == 32 &&
              w->data == (const uint8_t *)b.s + b.len - 32);
    gguf_close(&g);
    str_release(&b);
}

/* blocks.bin: "GGBV", count; per type: type, elements, bytes, the blocks, the floats
 * (tests/vectors/make_gguf.py). All formats compare exactly: same operations, same order, no fused
 * multiply-add. */
Test(model_gguf, blocks, .description = "dequantised blocks have the bits of the gguf package's") {
    struct str file;
    struct err e = { 0 };
    str_init(&file);
    cr_assert(fs_read(&file, "tests/vectors/gguf/blocks.bin", 1 << 20, &e) == 0, "%s", e.text);
    uint32_t count, head[3];
    memcpy(&count, file.s + 4, 4);
    cr_assert_eq(count, 12);
    const uint8_t *p = (const uint8_t *)file.s + 8;
    for (uint32_t t = 0; t < count; t++) {
        memcpy(head, p, sizeof head);
        float *want = mem_alloc(head[1] * sizeof *want), *got = mem_alloc(head[1] * sizeof *got);
        memcpy(want, p + sizeof head + head[2], head[1] * sizeof *want);
        gguf_dequant((enum gguf_type)head[0], p + sizeof head, head[1], got);
        int wrong = 0;
        for (uint32_t i = 0; i < head[1]; i++) wrong += got[i] != want[i];
        cr_expect_eq(wrong, 0, "%s: %d of %u differ", gguf_type_name((int)head[0]), wrong, head[1]);
        p += sizeof head + head[2] + head[1] * sizeof *want;
        free(want);
        free(got);
    }
    cr_expect(p == (const uint8_t *)file.s + file.len);
    str_release(&file);
}
