/* gpus.c - see gpus.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/gpus.h"

/* Bytes of the word that begins here; 0: CUDA reads no further. */
static size_t word(const char *at) { return *at == '-' ? 0 : strcspn(at, ","); }
static const char *next(const char *at) { return at + word(at) + (at[word(at)] == ','); }

int gpus_count(const char *list) {
    int n = 0;
    for (; word(list); list = next(list)) n++;
    return n;
}

int gpus_word(char out[GPUS_WORD_MAX], const char *list, int n) {
    for (int i = 0; i < n && word(list); i++) list = next(list);
    if (!word(list) || word(list) >= GPUS_WORD_MAX) return -1;
    snprintf(out, GPUS_WORD_MAX, "%.*s", (int)word(list), list);
    return 0;
}
