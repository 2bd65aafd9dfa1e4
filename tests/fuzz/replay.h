/* replay.h - a main for fuzz targets where no fuzzer drives them: replays the files named, each cut
 * and bent a little too.
 *
 *   fuzz_x FILE...        every file as it is
 *   fuzz_x -n N FILE...   and N changed copies of each: bytes flipped, replaced, removed, the end
 *                         cut
 * (Philox, always the same)
 * Define FUZZER to leave it out.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_REPLAY_H
#define QERL_REPLAY_H
#include "lib/base/fs.h"
#include "lib/base/rng.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

#ifndef FUZZER
/* its own allocation: reads beyond it are seen */
static void replay_exact(const char *from, size_t bytes) {
    uint8_t *copy = mem_alloc(bytes ? bytes : 1);
    memcpy(copy, from, bytes);
    LLVMFuzzerTestOneInput(copy, bytes);
    free(copy);
}

static void replay_bent(const struct str *file, uint32_t round) {
    static const uint8_t nasty[] = { 0, 1, 0x7f, 0x80, 0xff, '"', '{', '9' };
    uint32_t key[2];
    rng_key(key, round, RNG_PURPOSE_FAULT, file->len);
    struct str s;
    str_init(&s);
    str_add(&s, file->s, file->len);
    size_t near = s.len < 4096 ? s.len : 4096;                 /* headers are where the rules are */
    for (uint32_t i = 0; near && i < 1 + round % 4; i++) {
        struct rng4 r = rng_philox((uint32_t[4]){ i, 0, 0, 0 }, key);
        size_t at = r.v[0] % (r.v[1] & 1 ? near : s.len);
        switch (r.v[2] % 4) {
        case 0: s.s[at] ^= (char)(1 << r.v[3] % 8); break;
        case 1: s.s[at] = (char)nasty[r.v[3] % sizeof nasty]; break;
        case 2: memmove(s.s + at, s.s + at + 1, s.len - at - 1), s.len--; break;
        case 3: if (r.v[3] % 4 == 0) s.len = at; else s.s[at] = (char)r.v[3]; break;
        }
        if (s.len == 0) break;
        near = near < s.len ? near : s.len;
    }
    replay_exact(s.s, s.len);
    str_release(&s);
}

int main(int argc, char **argv) {
    int64_t rounds = 0, first = 1;
    if (argc > 2 && strcmp(argv[1], "-n") == 0 && str_to_i64(argv[2], &rounds)) first = 3;
    if (first >= argc) {
        fprintf(stderr, "usage: %s [-n N] FILE...\n", argv[0]);
        return EXIT_USAGE;
    }
    for (int64_t i = first; i < argc; i++) {
        struct str file;
        struct err e = { 0 };
        str_init(&file);
        if (fs_read(&file, argv[i], 1 << 24, &e) < 0) {
            fprintf(stderr, "%s\n", e.text);
            return EXIT_ENV;
        }
        replay_exact(file.s, file.len);
        for (uint32_t k = 0; k < rounds; k++) replay_bent(&file, k);
        str_release(&file);
    }
    return EXIT_DONE;
}
#endif
#endif
