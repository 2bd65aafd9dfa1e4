/* The plain and the hardware forms of both sums agree on every length and cut; the text of hash.c is
 * included to reach both.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/hash.c"

#include <criterion/criterion.h>

#if defined(__x86_64__)
Test(hash_paths, sha_instructions_give_the_plain_sum) {
    if (!have_sha()) cr_skip_test("SKIPPED: this CPU has no SHA instructions");
    uint8_t data[64 * 9];
    for (size_t i = 0; i < sizeof data; i++) data[i] = (uint8_t)(i * 167 + 13);
    for (size_t blocks = 0; blocks <= 9; blocks++) {
        uint32_t a[8] = { 1, 0xffffffffu, 3, 0x80000000u, 5, 6, 7, 8 }, b[8];
        memcpy(b, a, sizeof a);
        sha256_blocks_ni(a, data, blocks);
        for (size_t i = 0; i < blocks; i++) sha256_block_plain(b, data + 64 * i);
        cr_assert_arr_eq(a, b, sizeof a, "%zu blocks", blocks);
    }
}

Test(hash_paths, crc_instruction_gives_the_plain_sum) {
    if (!__builtin_cpu_supports("sse4.2")) cr_skip_test("SKIPPED: this CPU has no CRC instruction");
    uint8_t data[100];
    for (size_t i = 0; i < sizeof data; i++) data[i] = (uint8_t)(i * 31 + 7);
    for (size_t n = 0; n <= sizeof data; n++)
        cr_assert_eq(crc32c_sse(0x12345678u, data, n), crc32c_plain(0x12345678u, data, n),
                     "%zu bytes", n);
}
#endif
