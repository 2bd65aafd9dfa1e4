/* tb_file.c - TensorBoard event files: framing, checksums, and the bytes of one known event.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/tb.h"

#include <criterion/criterion.h>
#include <math.h>
#include <sys/resource.h>
#include <signal.h>

#include "lib/base/hash.h"
#include "lib/base/str.h"
#include "lib/base/tb.pb-c.h"
#include "tests/unit/wire_dir.h"

static struct wire_dir dir;
static void start(void) { wire_dir_init(&dir); }
static void stop(void) { wire_dir_release(&dir); }
TestSuite(tb, .init = start, .fini = stop);

static uint32_t unmasked(uint32_t masked) {
    uint32_t rot = masked - 0xa282ead8u;
    return (rot >> 17) | (rot << 15);
}

/* Takes one record off *at, checking both sums. */
static Tb__Event *next_event(const struct str *b, size_t *at) {
    uint64_t bytes;
    uint32_t crc;
    cr_assert(*at + 12 <= b->len);
    memcpy(&bytes, b->s + *at, 8);
    memcpy(&crc, b->s + *at + 8, 4);
    cr_assert(unmasked(crc) == crc32c(0, b->s + *at, 8) && *at + 16 + bytes <= b->len);
    memcpy(&crc, b->s + *at + 12 + bytes, 4);
    cr_assert(unmasked(crc) == crc32c(0, b->s + *at + 12, bytes));
    Tb__Event *e = tb__event__unpack(NULL, bytes, (const uint8_t *)b->s + *at + 12);
    cr_assert(e);
    *at += 16 + bytes;
    return e;
}

Test(tb, scalars_come_back_with_tag_step_time_and_value) {
    struct tb *t;
    struct err e = { 0 };
    char path[FS_PATH_MAX];
    static const struct { const char *tag; int64_t step; double time; float value;
    } want[] = {
        { "actor/pg_loss", 0, 1.5, 0.f },
        { "critic/rewards/mean", 1, 2.5, -3.25f },
        { "val-core/openai/gsm8k/acc/mean@1", 1000000000000, 1764000000.125, 0x1p-149f },
        { "a", 7, 0, INFINITY },
    };
    cr_assert(tb_open(&t, dir.path, &e) == 0, "%s", e.text);
    snprintf(path, sizeof path, "%s", tb_path(t));
    cr_assert(strstr(path, "/events.out.tfevents."));
    for (size_t i = 0; i < COUNT_OF(want); i++)
        tb_scalar(t, want[i].tag, want[i].step, want[i].time, want[i].value);
    cr_assert(tb_close(&t, &e) == 0 && !t, "%s", e.text);
    struct str b = { 0 };
    size_t at = 0;
    cr_assert(fs_read(&b, path, 1 << 20, &e) == 0, "%s", e.text);
    Tb__Event *v = next_event(&b, &at);
    cr_assert(v->what_case == TB__EVENT__WHAT_FILE_VERSION);
    cr_assert_str_eq(v->file_version, "brain.Event:2");
    tb__event__free_unpacked(v, NULL);
    for (size_t i = 0; i < COUNT_OF(want); i++) {
        v = next_event(&b, &at);
        cr_assert(v->what_case == TB__EVENT__WHAT_SUMMARY && v->summary->n_value == 1);
        const Tb__Value *s = v->summary->value[0];
        cr_assert_str_eq(s->tag, want[i].tag);
        cr_assert(s->value_case == TB__VALUE__VALUE_SIMPLE_VALUE &&
                      s->simple_value == want[i].value,
                  "a zero is there, too");
        cr_assert(v->step == want[i].step && v->wall_time == want[i].time);
        tb__event__free_unpacked(v, NULL);
    }
    cr_assert(at == b.len);
    str_release(&b);
}

Test(tb, one_event_is_the_bytes_that_tensorboard_reads) {
    /* Event{wall_time 1.0, step 2, summary{value{tag "a", simple_value 0.5}}}, read back by
     * TensorBoard's own reader */
    static const uint8_t payload[] = { 0x09, 0,    0,    0,    0,    0,    0,    0xf0,
                                       0x3f, 0x10, 0x02, 0x2a, 0x0a, 0x0a, 0x08, 0x0a,
                                       0x01, 'a',  0x15, 0,    0,    0,    0x3f };
    struct tb *t;
    struct err e = { 0 };
    char path[FS_PATH_MAX];
    cr_assert(tb_open(&t, dir.path, &e) == 0, "%s", e.text);
    snprintf(path, sizeof path, "%s", tb_path(t));
    tb_scalar(t, "a", 2, 1.0, 0.5);
    cr_assert(tb_close(&t, &e) == 0);
    struct str b = { 0 };
    cr_assert(fs_read(&b, path, 1 << 20, &e) == 0);
    /* TensorBoard's own files */
    static const uint8_t version_head[] = { 0x18, 0, 0, 0, 0, 0, 0, 0, 0xa3, 0x7f, 0x4b, 0x22 };
    cr_assert(memcmp(b.s, version_head, sizeof version_head) == 0);
    cr_assert(b.len == 16 + 24 + 16 + sizeof payload);
    cr_assert(memcmp(b.s + 16 + 24 + 12, payload, sizeof payload) == 0);
    str_release(&b);
}

Test(tb, two_files_of_one_second_have_two_names) {
    struct tb *a, *b;
    struct err e = { 0 };
    cr_assert(tb_open(&a, dir.path, &e) == 0 && tb_open(&b, dir.path, &e) == 0, "%s", e.text);
    cr_assert_str_neq(tb_path(a), tb_path(b));
    tb_close(&a, NULL);
    tb_close(&b, NULL);
}

Test(tb, what_cannot_be_written_is_said_at_flush) {
    struct tb *t;
    struct err e = { 0 };
    cr_assert(tb_open(&t, "/nonexistent", &e) < 0 && e.code == EXIT_ENV &&
                  strstr(e.text, "/nonexistent/events"),
              "%s", e.text);
    cr_assert(tb_open(&t, dir.path, &e) == 0);
    struct rlimit l = { 100, 100 };
    signal(SIGXFSZ, SIG_IGN);
    cr_assert(setrlimit(RLIMIT_FSIZE, &l) == 0);
    for (int i = 0; i < 100; i++) tb_scalar(t, "x", i, 1, 2);
    cr_assert(tb_flush(t, &e) < 0 && strstr(e.text, "cannot write"), "%s", e.text);
    cr_assert(tb_close(&t, &e) < 0, "it stays failed");
}
