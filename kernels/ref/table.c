/* table.c - memory of the CPU, this thread's scratch, and the complete reference table.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cpu.h"

#include <pthread.h>

static int cpu_alloc(struct kern *k, kptr *out, size_t bytes, struct err *e) {
    (void)k;
    /* calloc gives pages that are zero without being touched: memory planned for the worst case
     * costs nothing until it is used. The block's own address lies just before the aligned one. */
    char *block = calloc(1, bytes + 128);
    if (!block) return err_code(e, EXIT_ENV, "out of memory: %zu bytes for tensors", bytes);
    char *aligned = (char *)(((uintptr_t)block + 127) & ~(uintptr_t)63);
    memcpy(aligned - sizeof block, &block, sizeof block);
    out->p = aligned;
    return 0;
}
static void cpu_free(struct kern *k, kptr *p) {
    (void)k;
    char *block = NULL;
    if (p->p) memcpy(&block, (char *)p->p - sizeof block, sizeof block);
    free(block);
    p->p = NULL;
}
static void cpu_upload(struct kern *k, kptr to, const void *from, size_t bytes) {
    (void)k;
    if (bytes) memcpy(to.p, from, bytes);
}
static void cpu_download(struct kern *k, void *to, kptr from, size_t bytes) {
    (void)k;
    if (bytes) memcpy(to, from.p, bytes);
}
static void cpu_copy(struct kern *k, kptr to, kptr from, size_t bytes) {
    (void)k;
    if (bytes) memmove(to.p, from.p, bytes);
}
static void cpu_zero(struct kern *k, kptr p, size_t bytes) {
    (void)k;
    if (bytes) memset(p.p, 0, bytes);
}
static int cpu_sync(struct kern *k, struct err *e) {
    if (!k->latched.text[0]) return 0;
    struct err first = k->latched;
    k->latched = (struct err){ 0 };
    return err_code(e, first.code, "%s", first.text);
}

/* One buffer a thread, freed when the thread ends. The header keeps its size; data follow 64 bytes
 * later. */
static pthread_key_t scratch_key;
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;

static void scratch_init(void) {
    if (pthread_key_create(&scratch_key, free)) abort();
}

void *cpu_scratch(size_t bytes) {
    pthread_once(&scratch_once, scratch_init);
    size_t *head = pthread_getspecific(scratch_key);
    if (!head || *head < bytes) {
        free(head);
        bytes = (bytes + (bytes >> 2) + 65535) / 65536 * 65536;
        head = aligned_alloc(64, bytes + 64);
        if (!head) {
            fprintf(stderr, "out of memory: %zu bytes of kernel scratch\n", bytes);
            exit(EXIT_ENV);
        }
        *head = bytes;
        pthread_setspecific(scratch_key, head);
    }
    return head + 64 / sizeof *head;
}

const struct kern kern_ref_table = {
    .name = "ref",
    .abi = KERN_ABI,
    .alloc = cpu_alloc,
    .free = cpu_free,
    .upload = cpu_upload,
    .download = cpu_download,
    .copy = cpu_copy,
    .zero = cpu_zero,
    .sync = cpu_sync,
    .embed = ref_embed,
    .rmsnorm = ref_rmsnorm,
    .rmsnorm_bwd = ref_rmsnorm_bwd,
    .linear = ref_linear,
    .linear_t = ref_linear_t,
    .outer = ref_outer,
    .rope = ref_rope,
    .kv_put = ref_kv_put,
    .attn = ref_attn,
    .attn_bwd = ref_attn_bwd,
    .swiglu = ref_swiglu,
    .swiglu_bwd = ref_swiglu_bwd,
    .add = ref_add,
    .gather = ref_gather,
    .scatter_add = ref_scatter_add,
    .logprob = ref_logprob,
    .logprob_bwd = ref_logprob_bwd,
    .sample = ref_sample,
    .adamw = ref_adamw,
    .sum_squares = ref_sum_squares,
    .pack = ref_pack,
};
