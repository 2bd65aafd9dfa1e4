/* table.c - memory of the CPU, this thread's scratch, and the complete reference table.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/cpu.h"

#include <pthread.h>
#include <sys/mman.h>

/* Big blocks are mapped by themselves and ask for huge pages: first touches of 4 KiB cost seconds a
 * gigabyte on a virtual machine. Small ones come from calloc. Either way pages that are never
 * touched cost nothing. */
enum { HUGE_PAGE = 2 << 20, HEADER = 64 };
struct block { void *start; size_t mapped_bytes; };         /* lies HEADER before the data */

static int cpu_alloc(struct kern *k, kptr *out, size_t bytes, struct err *e) {
    (void)k;
    struct block b = { NULL, 0 };
    uintptr_t align = HEADER;
    if (bytes >= 2 * HUGE_PAGE) {
        align = HUGE_PAGE;
        b.mapped_bytes = bytes + HEADER + HUGE_PAGE;
        b.start = mmap(NULL, b.mapped_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                       -1, 0);
        if (b.start == MAP_FAILED) b.start = NULL;
        else madvise(b.start, b.mapped_bytes, MADV_HUGEPAGE);         /* a wish: may be refused */
    } else b.start = calloc(1, bytes + 2 * HEADER);
    if (!b.start) return err_code(e, EXIT_ENV, "out of memory: %zu bytes for tensors", bytes);
    uintptr_t aligned = ((uintptr_t)b.start + align - 1) & ~(align - 1);
    char *data = (char *)aligned + HEADER;
    memcpy(data - HEADER, &b, sizeof b);
    out->p = data;
    return 0;
}
static void cpu_free(struct kern *k, kptr *p) {
    (void)k;
    if (!p->p) return;
    struct block b;
    memcpy(&b, (char *)p->p - HEADER, sizeof b);
    if (b.mapped_bytes) munmap(b.start, b.mapped_bytes);
    else free(b.start);
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
    .bits = "cpu-tiles",
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
    .silu = ref_silu,
    .perturb = ref_perturb,
    .quant_rows = ref_quant_rows,
    .add = ref_add,
    .gather = ref_gather,
    .scatter_add = ref_scatter_add,
    .logprob = ref_logprob,
    .logprob_bwd = ref_logprob_bwd,
    .sample = ref_sample,
    .adamw = ref_adamw,
    .sum_squares = ref_sum_squares,
    .pack = ref_pack,
    .unpack = ref_unpack,
    .pack_rows = ref_pack_rows,
    .weight_noise = ref_weight_noise,
};
