/* amx_text.c - the path "amx" as the assembler made it, on a CPU without AMX: each tile instruction
 * raises SIGILL, and the handler reads its bytes and does what they say.
 *
 * So operands, strides, configuration and the order of instructions are tested where the
 * instructions are not; with AMX the other tests run them. Also here, as nothing in this file is
 * compiled for AVX-512: what this CPU's own instructions say to the known answer.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/kernels/kt.h"

#if defined(__x86_64__)
#include <signal.h>
#include <stdatomic.h>
#include <ucontext.h>
#include <unistd.h>

#include "kernels/amx/amx.h"

static _Thread_local struct {
    bool open;
    union { uint8_t bytes[1024]; uint16_t bf16[512]; float f32[256]; } tile[8];
} own;
static atomic_long opened, loaded, stored, multiplied;

static void refuse(const char *why) {
    static const char who[] = "amx_text: ";
    if (write(2, who, sizeof who - 1) < 0 || write(2, why, strlen(why)) < 0) _exit(2);
    _exit(1);
}

/* Registers in the order of their numbers. */
static const int reg_of[16] = { REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                REG_R12, REG_R13, REG_R14, REG_R15 };

/* Base address and stride of a memory operand at `at` (ModRM); returns the bytes it takes. */
static int memory_at(const uint8_t *at, const greg_t *g, int x, int b, uint64_t *base,
                     uint64_t *stride) {
    const int mod = at[0] >> 6, rm = at[0] & 7, has_sib = rm == 4;
    const int reg = (has_sib ? at[1] & 7 : rm) | b << 3, index = has_sib ? (at[1] >> 3 & 7) | x << 3 : 4;
    int n = 1 + has_sib;
    const bool by_rip = !has_sib && rm == 5 && !mod;
    int32_t far = 0;
    if (has_sib && (at[1] & 7) == 5 && !mod) refuse("an address without a base\n");
    if (mod == 1) far = (int8_t)at[n++];
    if (mod == 2 || by_rip) {
        memcpy(&far, at + n, 4);
        n += 4;
    }
    *base = (by_rip ? (uint64_t)(uintptr_t)(at + n) : (uint64_t)g[reg_of[reg]]) + (uint64_t)(int64_t)far;
    *stride = index == 4 ? 0 : (uint64_t)g[reg_of[index]] << (has_sib ? at[1] >> 6 : 0);
    return n;
}

static void on_ill(int sig, siginfo_t *info, void *context) {
    (void)sig, (void)info;
    greg_t *g = ((ucontext_t *)context)->uc_mcontext.gregs;
    const uint8_t *p = (const uint8_t *)(uintptr_t)g[REG_RIP];
    if (p[0] != 0xc4 || (p[1] & 31) != 2 || p[2] >> 7 || p[2] >> 2 & 1)
        refuse("not a tile instruction\n");
    const int r = !(p[1] & 0x80), x = !(p[1] & 0x40), b = !(p[1] & 0x20), pp = p[2] & 3,
              third = ~(p[2] >> 3) & 15, reg = (p[4] >> 3 & 7) | r << 3, rm = (p[4] & 7) | b << 3;
    const bool memory = p[4] >> 6 != 3;
    uint64_t base = 0, stride = 0;
    const int bytes = memory ? memory_at(p + 4, g, x, b, &base, &stride) : 1;
    if (p[3] == 0x49 && pp == 0 && memory) {
        uint8_t want[64] = { 1 };
        for (int i = 0; i < 8; i++) want[16 + 2 * i] = 64, want[48 + i] = 16;
        if (memcmp((const void *)(uintptr_t)base, want, 64)) refuse("another configuration\n");
        memset(&own, 0, sizeof own);
        own.open = true;
        atomic_fetch_add(&opened, 1);
    } else if (p[3] == 0x49 && pp == 0) {
        own.open = false;
        atomic_fetch_sub(&opened, 1);
    } else if (!own.open || reg > 7) {
        refuse("tiles are not configured, or there is no such tile\n");
    } else if (p[3] == 0x4b && memory && (pp == 3 || pp == 2)) {
        if ((p[4] & 7) != 4) refuse("a tile's rows without a stride\n");
        for (size_t i = 0; i < 16; i++) {
            uint8_t *row = (uint8_t *)(uintptr_t)(base + i * stride);
            if (pp == 3) memcpy(own.tile[reg].bytes + i * 64, row, 64);
            else memcpy(row, own.tile[reg].bytes + i * 64, 64);
        }
        atomic_fetch_add(pp == 3 ? &loaded : &stored, 1);
    } else if (p[3] == 0x5c && !memory && pp == 2) {
        if (rm > 7 || third > 7 || reg == rm || reg == third || rm == third)
            refuse("tiles of a product must be three\n");
        amx_emulated_product(own.tile[reg].f32, own.tile[rm].bf16, own.tile[third].bf16);
        atomic_fetch_add(&multiplied, 1);
    } else {
        refuse("an instruction nobody here knows\n");
    }
    g[REG_RIP] += 4 + bytes;
}

static void same_as_ref(struct kt *t, struct kern *k, enum kern_format f, int rows) {
    enum { OUT = 101, IN = 300 };
    const size_t bytes = (size_t)rows * OUT * 4, back = (size_t)rows * IN * 4;
    float *want = kt_new(t, bytes), *got = kt_new(t, bytes), *dx0 = kt_new(t, back),
          *dx = kt_new(t, back), *g0 = kt_f32(t, OUT * IN, 1.0), *g1 = kt_copy(t, g0, OUT * IN * 4);
    struct kern_linear a = { .x = kt_p(kt_bf16(t, (size_t)rows * IN, 1.0)), .x_type = KERN_BF16,
                             .x_ld = IN, .w = kt_weight(t, f, OUT, IN), .scale = 0.7f,
                             .y = kt_p(want), .y_type = KERN_F32, .y_ld = OUT, .rows = rows };
    struct kern_linear_t b = { .dy = kt_p(want), .dy_ld = OUT, .w = a.w, .scale = 1.0f,
                               .round = true, .dx = kt_p(dx0), .dx_ld = IN, .rows = rows };
    const int32_t start[] = { 0, rows / 2, rows };
    struct kern_outer o = { .a = kt_p(want), .a_ld = OUT, .b = a.x, .b_type = KERN_BF16, .b_ld = IN,
                            .scale = 1.0f, .round = true, .g = kt_p(g0), .m = OUT, .n = IN,
                            .seq_start = start, .seqs = 2 };
    t->ref.linear(&t->ref, &a, 1);
    t->ref.linear_t(&t->ref, &b);
    t->ref.outer(&t->ref, &o);
    a.y = kt_p(got), b.dx = kt_p(dx), o.g = kt_p(g1);
    k->linear(k, &a, 1);
    k->linear_t(k, &b);
    k->outer(k, &o);
    KT_SAME(k, got, want, bytes, "linear, format %d, %d rows", (int)f, rows);
    KT_SAME(k, dx, dx0, back, "linear_t, format %d, %d rows", (int)f, rows);
    KT_SAME(k, g1, g0, OUT * IN * 4, "outer, %d rows", rows);
}

Test(amx, instruction_of_this_cpu) {
    enum amx_use use = amx_use();
    if (use == AMX_USE_ABSENT) cr_skip_test("this machine lacks AMX");
    if (use == AMX_USE_REFUSED) cr_skip_test("the kernel refuses this process the tiles' state");
    cr_assert_eq(use, AMX_USE_READY);
}

Test(amx, bf16_instruction_of_this_cpu) {
    __builtin_cpu_init();
    if (!amx_emulates() || !__builtin_cpu_supports("avx512bf16"))
        cr_skip_test("this machine lacks AVX512-BF16");
    cr_assert(amx_agrees(avx512bf16_product));
}

Test(amx, opened_by_name_only) {
    struct kern k;
    struct err e = { 0 };
    const char *names[8];
    for (int i = 0, n = kern_paths(names); i < n; i++) cr_assert_str_neq(names[i], "amx-emulated");
    cr_assert_eq(kern_open(&k, "amx-emulated", NULL, &e), amx_emulates() ? 0 : -1);
    if (amx_emulates()) cr_assert_str_eq(k.name, "amx-emulated");
    if (amx_use() == AMX_USE_READY) return;
    cr_assert_eq(kern_open(&k, "amx", NULL, &e), -1);
    cr_assert_eq(e.code, EXIT_ENV);
    cr_assert(strstr(e.text, "'amx'"), "%s", e.text);
}

Test(amx, text_of_the_path_instruction_by_instruction) {
    if (!amx_emulates()) cr_skip_test("this machine lacks AVX-512 with VBMI");
    if (amx_use() != AMX_USE_ABSENT) cr_skip_test("this machine has AMX: instruction_of_this_cpu says what of it");
    struct sigaction ill = { .sa_sigaction = on_ill, .sa_flags = SA_SIGINFO | SA_NODEFER }, before;
    struct kt t;
    kt_open(&t);
    cr_assert_eq(sigaction(SIGILL, &ill, &before), 0);
    cr_assert(amx_agrees(amx_tile_product));
    struct kern k = t.ref;
    k.name = "amx";
    k.pool = t.pool[1];
    kern_amx_fill(&k);
    static const int rows[] = { 1, 16, 23, 48, 64, 97 };
    for (size_t i = 0; i < COUNT_OF(rows); i++)
        for (enum kern_format f = KERN_FORMAT_BF16; f <= KERN_FORMAT_NVFP4; f++) {
            same_as_ref(&t, &k, f, rows[i]);
            kt_drop(&t);
        }
    sigaction(SIGILL, &before, NULL);
    cr_assert_eq(atomic_load(&opened), 0, "every thread releases what it configured");
    cr_assert(atomic_load(&multiplied) > 1000 && atomic_load(&loaded) > atomic_load(&stored));
    kt_close(&t);
}
#endif
