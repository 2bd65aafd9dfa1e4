/* hash.h - SHA-256 (FIPS 180-4) names things, CRC-32C (Castagnoli) finds torn or flipped bytes.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_HASH_H
#define QERL_HASH_H
#include "lib/base/err.h"

enum { SHA256_BYTES = 32, SHA256_HEX = 65 };   /* hex form includes the final NUL */

struct sha256 {
    uint32_t h[8];
    uint64_t bytes_total;
    uint8_t block[64];
};
void sha256_init(struct sha256 *s);
void sha256_add(struct sha256 *s, const void *data, size_t bytes);
void sha256_hex(struct sha256 *s, char out[SHA256_HEX]);                    /* ends the sum */
void sha256_of(const void *data, size_t bytes, char out[SHA256_HEX]);
int sha256_file(const char *path, char out[SHA256_HEX], struct err *e);     /* streams; any size */

/* crc = 0 to start; feed the last result to go on. "123456789" gives e3069283. */
uint32_t crc32c(uint32_t crc, const void *data, size_t bytes);
#endif
