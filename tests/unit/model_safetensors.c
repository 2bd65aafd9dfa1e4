/* model_safetensors.c - the reader refuses every broken header by name, and reads back what the
 * writer wrote.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/safetensors.h"
#include "tests/unit/model_files.h"

#define GOOD "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}"

struct bad { const char *header; size_t data; const char *message; };
static const struct bad bad[] = {
    { "[]", 0, "'f': byte 0 of the header: the header must start with '{'" },
    { " {}", 0, "'f': byte 0 of the header: the header must start with '{'" },
    { "{", 0, "'f': byte 1 of the header: expected a string" },
    { "{} x", 0, "'f': byte 3 of the header: bytes after the end of the JSON" },
    { "{\"a\":[]}", 0, "'f': tensor 'a': must be an object" },
    { "{\"a\":{\"dtype\":\"F32\",\"shape\":[2]}}", 8,
      "'f': tensor 'a': field 'data_offsets' is missing" },
    { "{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,8]}}", 8,
      "'f': tensor 'a': field 'shape' is missing" },
    { "{\"a\":{\"shape\":[2],\"data_offsets\":[0,8]}}", 8,
      "'f': tensor 'a': field 'dtype' is missing" },
    { "{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8,
      "'f': tensor 'a': field 'dtype' comes twice" },
    { "{\"a\":{\"dtype\":\"F4\",\"shape\":[2],\"data_offsets\":[0,1]}}", 1,
      "'f': tensor 'a': field 'dtype' is 'F4', which is not supported" },
    { "{\"a\":{\"type\":\"F32\"}}", 0, "'f': tensor 'a': unknown field 'type'" },
    { "{\"a\":{\"dtype\":\"F32\",\"shape\":[2.5],\"data_offsets\":[0,8]}}", 8,
      "'f': byte 30 of the header: expected ',' or ']'" },
    { "{\"a\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,8]}}", 8,
      "'f': byte 29 of the header: expected a whole number of at least 0" },
    { "{\"a\":{\"dtype\":\"F32\",\"shape\":[02],\"data_offsets\":[0,8]}}", 8,
      "'f': byte 31 of the header: number starts with 0" },
    { "{\"a\":{\"dtype\":\"F32\",\"shape\":[99999999999999999999],\"data_offsets\":[0,8]}}", 8,
      "'f': byte 47 of the header: number is too large" },
    { "{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,8]}}", 8,
      "'f': tensor 'a': field 'shape' overflows" },
    { "{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904],\"data_offsets\":[0,8]}}", 8,
      "'f': tensor 'a': field 'shape' overflows" },
    { "{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,4]}}", 4,
      "'f': byte 45 of the header: list is too long" },
    { "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8]}}", 8,
      "'f': tensor 'a': field 'data_offsets' must hold two numbers" },
    { "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,0]}}", 8,
      "'f': tensor 'a': field 'data_offsets' ends before it begins" },
    { "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}}", 4,
      "'f': tensor 'a': field 'data_offsets' spans 4 bytes, its shape needs 8" },
    { GOOD, 4,
      "'f': tensor 'a': field 'data_offsets' ends at 8, the file has 4 bytes of data (is the "
      "download complete?)" },
    { GOOD, 12, "'f': the tensors end at byte 8 of the data, the file at byte 12" },
    { "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[4,12]}}", 12,
      "'f': tensor 'a': field 'data_offsets' begins at 4, expected 0 (there is a hole)" },
    { "{\"a\":{\"dtype\":\"U8\",\"shape\":[8],\"data_offsets\":[0,8]},"
      "\"b\":{\"dtype\":\"U8\",\"shape\":[8],\"data_offsets\":[4,12]}}",
      12, "'f': tensor 'b': field 'data_offsets' begins at 4, expected 8 (tensors overlap)" },
    { "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},"
      "\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[4,8]}}",
      8, "'f': tensor 'a' comes twice" },
    { "{\"\\u0061\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},"
      "\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[4,8]}}",
      8, "'f': tensor 'a' comes twice" },
    { "{\"\\u0000\":{}}", 0, "'f': byte 8 of the header: string holds a NUL" },
    { "{\"\\ud800\":{}}", 0, "'f': byte 8 of the header: lone surrogate" },
    { "{\"\\q\":{}}", 0, "'f': byte 4 of the header: unknown escape" },
    { "{\"\xff\":{}}", 0, "'f': the header is not valid UTF-8" },
    { "{\"__metadata__\":{\"a\":1}}", 0, "'f': byte 21 of the header: expected a string" },
    { "{\"__metadata__\":{},\"__metadata__\":{}}", 0,
      "'f': byte 34 of the header: '__metadata__' comes twice" },
};

Test(model_safetensors, refuses,
     .description = "every broken rule is refused, naming the tensor and the field") {
    for (size_t i = 0; i < COUNT_OF(bad); i++) {
        struct str file;
        struct st_file f;
        struct err e = { 0 };
        st_build(&file, bad[i].header, bad[i].data);
        cr_expect_eq(st_open_memory(&f, file.s, file.len, "f", &e), -1, "accepted: %s",
                     bad[i].header);
        expect_err(&e, bad[i].message);
        str_release(&file);
    }
}

Test(model_safetensors, lengths,
     .description = "a header length beyond the file or the limit is refused") {
    static const uint64_t length[] = { 3, 100000001, UINT64_MAX, UINT64_MAX - 7, 1ull << 63 };
    for (size_t i = 0; i < COUNT_OF(length); i++) {
        struct st_file f;
        struct err e = { 0 };
        uint8_t file[10] = { 0, 0, 0, 0, 0, 0, 0, 0, '{', '}' };
        memcpy(file, &length[i], 8);
        cr_expect_eq(st_open_memory(&f, file, sizeof file, "f", &e), -1);
        cr_expect(strstr(e.text, "the header's length"), "%s", e.text);
    }
}

Test(model_safetensors, truncated, .description = "a file cut off at any byte is refused") {
    struct str file;
    st_build(&file,
             "{\"__metadata__\":{\"k\":\"v\"},\"w\":{\"dtype\":\"F16\",\"shape\":[2,3],\"data_"
             "offsets\":[0,"
             "12]}}",
             12);
    for (size_t n = 0; n <= file.len; n++) {
        struct st_file f;
        struct err e = { 0 };
        /* exact size: the sanitiser sees one byte too far */
        uint8_t *copy = mem_alloc(n + 1);
        memcpy(copy, file.s, n);
        int rc = st_open_memory(&f, copy, n, "f", &e);
        cr_expect_eq(rc, n == file.len ? 0 : -1, "%zu bytes of %zu", n, file.len);
        if (rc == 0) st_close(&f);
        free(copy);
    }
    str_release(&file);
}

Test(model_safetensors, reads,
     .description = "types, scalars, empty tensors, escapes and names out of order") {
    struct str file;
    struct st_file f;
    struct err e = { 0 };
    st_build(
        &file,
        "{\"z\" : {\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]},\n"
        "\"e\":{\"shape\":[0,7],\"dtype\":\"F32\",\"data_offsets\":[4,4]},"
        "\"t\\u00e9\\/\\ud83d\\ude00\":{\"dtype\":\"BF16\",\"shape\":[2,1],\"data_offsets\":[4,8]},"
        "\"h\":{\"dtype\":\"F16\",\"shape\":[4],\"data_offsets\":[8,16]}}  ",
        0);
    str_add(
        &file,
        (uint8_t[]){ 0, 0, 0x80, 0x3f, 0xc0, 0x3f, 0x40, 0xc0, 0, 0x3c, 1, 0, 0, 0x80, 0xff, 0x7b },
        16);
    cr_assert(st_open_memory(&f, file.s, file.len, "f", &e) == 0, "%s", e.text);
    float v[4];
    cr_assert_eq(f.count, 4);
    const struct st_tensor *z = st_find(&f, "z"), *t = st_find(&f, "t\xc3\xa9/\xf0\x9f\x98\x80"),
                           *h = st_find(&f, "h");
    cr_assert(z && t && h && st_find(&f, "e") && !st_find(&f, "nope"));
    cr_expect_eq(st_find(&f, "e")->elements, 0);
    cr_expect(z->rank == 0 && z->elements == 1 && st_to_f32(z, v, &e) == 0 && v[0] == 1);
    cr_expect(st_to_f32(t, v, &e) == 0 && v[0] == 1.5f && v[1] == -3);
    cr_expect(st_to_f32(h, v, &e) == 0 && v[0] == 1 && v[1] == 0x1p-24f && v[2] == 0 &&
              v[3] == 65504);
    cr_expect(st_to_f32_part(h, 3, 1, v, &e) == 0 && v[0] == 65504);
    st_close(&f);
    str_release(&file);
}

Test(model_safetensors, writes,
     .description = "what st_write wrote is read back bit for bit; integers are no weights") {
    char dir[64], path[FS_PATH_MAX];
    test_dir(dir);
    fs_join(path, sizeof path, dir, "x.safetensors");
    float a[6] = { 1, -2, 3e-40f, 4, -0.f, 6 }, b[1] = { 7 };
    struct st_out out[] = { { "b.w", 1, { 1 }, b }, { "a \"q\"", 2, { 2, 3 }, a } };
    struct st_file f;
    struct err e = { 0 };
    float got[6];
    cr_assert(st_write(path, out, 2, "{\"format\":\"pt\"}", &e) == 0, "%s", e.text);
    cr_assert(st_open(&f, path, &e) == 0, "%s", e.text);
    const struct st_tensor *t = st_find(&f, "a \"q\"");
    cr_assert(t && t->rank == 2 && t->shape[0] == 2 && t->shape[1] == 3 &&
              t->dtype == ST_DTYPE_F32);
    cr_assert(st_to_f32(t, got, &e) == 0);
    cr_expect_arr_eq(got, a, sizeof a);
    cr_expect_eq((size_t)(st_find(&f, "b.w")->data - f.map.data) % 8, 0);
    st_close(&f);
    cr_assert(st_write(path, out, 0, NULL, &e) == 0 && st_open(&f, path, &e) == 0, "%s", e.text);
    cr_expect_eq(f.count, 0);
    st_close(&f);
    struct st_tensor ints = {
        .name = "i", .dtype = ST_DTYPE_I64, .rank = 1, .shape = { 1 }, .elements = 1
    };
    cr_expect_eq(st_to_f32(&ints, got, &e), -1);
    expect_err(&e, "tensor 'i' is I64; only F32, F16 and BF16 weights are read");
    cr_assert(fs_remove_tree(dir, &e) == 0);
}
