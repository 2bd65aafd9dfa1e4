/* model_files.h - small model files for tests, written by hand so that each rule can be broken on
 * its own.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_TEST_MODEL_FILES_H
#define QERL_TEST_MODEL_FILES_H
#include "lib/base/fs.h"
#include "lib/base/str.h"
#include "lib/model/gguf.h"

#include <criterion/criterion.h>
#include <unistd.h>

static inline void test_dir(char out[64]) {
    snprintf(out, 64, "/tmp/qerl-test-XXXXXX");
    cr_assert(mkdtemp(out));
}

static inline void test_write(const char *dir, const char *name, const void *data, size_t bytes) {
    char path[FS_PATH_MAX];
    struct err e = { 0 };
    fs_join(path, sizeof path, dir, name);
    cr_assert(fs_replace(path, data, bytes, &e) == 0, "%s", e.text);
}

static inline void test_text(const char *dir, const char *name, const char *text) {
    test_write(dir, name, text, strlen(text));
}

/* The whole message, and the exit code of a machine that lacks something. */
static inline void expect_err(const struct err *e, const char *want) {
    cr_expect_str_eq(e->text, want);
    cr_expect_eq(e->code, EXIT_ENV, "exit code %d for '%s'", e->code, e->text);
}

/* --- safetensors: a header text and so many data bytes (0, 1, 2, ...) --- */

static inline void st_build(struct str *out, const char *header, size_t data_bytes) {
    uint64_t n = strlen(header);
    str_init(out);
    str_add(out, &n, 8);
    str_puts(out, header);
    for (size_t i = 0; i < data_bytes; i++) str_add(out, &(char){ (char)i }, 1);
}

/* --- GGUF --- */

static inline void g_u32(struct str *b, uint32_t v) { str_add(b, &v, 4); }
static inline void g_u64(struct str *b, uint64_t v) { str_add(b, &v, 8); }
static inline void g_string(struct str *b, const char *text) {
    g_u64(b, strlen(text));
    str_puts(b, text);
}
static inline void g_start(struct str *b, uint64_t tensors, uint64_t keys) {
    str_init(b);
    str_puts(b, "GGUF");
    g_u32(b, 3);
    g_u64(b, tensors);
    g_u64(b, keys);
}
static inline void g_key_u32(struct str *b, const char *key, uint32_t v) {
    g_string(b, key);
    g_u32(b, GGUF_KIND_U32);
    g_u32(b, v);
}
static inline void g_key_f32(struct str *b, const char *key, float v) {
    g_string(b, key);
    g_u32(b, GGUF_KIND_F32);
    str_add(b, &v, 4);
}
static inline void g_key_text(struct str *b, const char *key, const char *v) {
    g_string(b, key);
    g_u32(b, GGUF_KIND_STRING);
    g_string(b, v);
}
static inline void g_tensor(struct str *b, const char *name, uint32_t rank, uint64_t ne0,
                            uint64_t ne1, uint32_t type, uint64_t offset) {
    g_string(b, name);
    g_u32(b, rank);
    if (rank > 0) g_u64(b, ne0);
    for (uint32_t i = 1; i < rank && i < 64; i++) g_u64(b, i == 1 ? ne1 : 1);
    g_u32(b, type);
    g_u64(b, offset);
}
static inline void g_pad(struct str *b, size_t align) {
    while (b->len % align) str_add(b, "", 1);
}
static inline void g_zeros(struct str *b, size_t n) {
    for (size_t i = 0; i < n; i++) str_add(b, "", 1);
}
#endif
