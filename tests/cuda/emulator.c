/* emulator.c - that the emulated CUDA (tests/cuda/emu) runs right kernels under every order of
 * threads and notices each bug planted in tests/cuda/planted.cu, with the right words.
 * A bug is looked for in the builds that can see it: PLAIN and RACE belong to the ordinary build,
 * SAN (AddressSanitizer and UBSan) to SAN=1.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/cuda/child.h"

static struct ran planted(int build, const char *settings, const char *name) {
    return child("planted", build, settings, name);
}
static bool has(int builds, int build) { return builds & build & HERE; }

static const char *const orders[] = { "fwd", "rev", "rand:1", "rand:2" };

/* Ends well and prints `out`, in all of these builds, under every order and setting. */
static void right(int builds, const char *name, const char *out) {
    for (int build = PLAIN; build <= SAN; build *= 2)
        for (size_t i = 0; i < COUNT_OF(orders) * 2 && has(builds, build); i++) {
            char settings[128];
            snprintf(settings, sizeof settings, "EMU_SCHED=%s%s", orders[i / 2],
                     i % 2 ? " EMU_DEFER=1 EMU_PROTECT=1" : "");
            struct ran r = planted(build, settings, name);
            cr_assert(r.status == 0 && !strcmp(r.out, out), "%s: status %d, printed: %s", settings,
                      r.status, r.out);
        }
}
/* Ends badly under every order and says `words`. */
static void caught(int builds, const char *settings, const char *name, const char *words) {
    int looked = 0;
    for (int build = PLAIN; build <= SAN; build *= 2)
        for (size_t i = 0; i < COUNT_OF(orders) && has(builds, build); i++) {
            char all[128];
            snprintf(all, sizeof all, "EMU_SCHED=%s %s", orders[i], settings);
            struct ran r = planted(build, all, name);
            cr_assert(r.status != 0 && strstr(r.out, words), "%s: status %d, printed: %s", all,
                      r.status, r.out);
            looked++;
        }
    if (!looked) cr_skip_test("%s", HERE & SAN ? "seen by the builds without sanitizers"
                                                : "seen by AddressSanitizer or UBSan: SAN=1");
}
/* Goes unnoticed, but the result is not the right one under any order. */
static void spoils(int builds, const char *settings, const char *name, const char *right_out) {
    int looked = 0;
    for (int build = PLAIN; build <= SAN; build *= 2)
        for (size_t i = 0; i < COUNT_OF(orders) && has(builds, build); i++) {
            char all[128];
            snprintf(all, sizeof all, "EMU_SCHED=%s %s", orders[i], settings);
            struct ran r = planted(build, all, name);
            cr_assert(r.status == 0 && r.out[0] && strcmp(r.out, right_out),
                      "%s: status %d, printed: %s", all, r.status, r.out);
            looked++;
        }
    if (!looked) cr_skip_test("runs in the build without sanitizers");
}

Test(emulator, right_kernels_give_one_result_under_every_order) {
    right(PLAIN | RACE | SAN, "right", "12800 threads 2.7715168e+09\n");
    right(PLAIN | RACE | SAN, "warps", "102531956\n");
}
Test(emulator, missing_barrier) {
    spoils(PLAIN | SAN, "", "missing_barrier", "1405775\n");
    if (HERE & RACE) caught(RACE, "", "missing_barrier", "emu: race: ");
}
Test(emulator, divergent_barrier) {
    caught(PLAIN | RACE | SAN, "", "divergent_barrier", "divergent barrier: thread ");
}
Test(emulator, shared_memory_read_before_written) {
    spoils(PLAIN | RACE | SAN, "", "shared_unset", "2080\n");
    spoils(PLAIN | RACE | SAN, "", "shared_unset_template", "2080\n");
}
Test(emulator, shared_memory_past_its_end) {
    caught(SAN, "", "shared_past", "index 64 out of bounds");
    caught(SAN, "", "shared_hidden", "AddressSanitizer: global-buffer-overflow");
}
Test(emulator, lane_that_ends_without_coming) {
    caught(PLAIN | RACE | SAN, "", "lane_missing", "mask 0xffffffff names lane 31, which ");
}
Test(emulator, lane_that_waits_elsewhere_is_a_deadlock_with_lines) {
    caught(PLAIN | RACE | SAN, "", "lane_elsewhere", "emu: deadlock: ");
    caught(PLAIN | RACE | SAN, "", "lane_elsewhere", "threads 31 to 31 wait at tests/cuda/planted.cu:");
}
Test(emulator, mask_that_does_not_name_the_caller) {
    caught(PLAIN | RACE | SAN, "", "mask_without_caller", "mask 0x0000ffff does not name it");
}
Test(emulator, mask_that_does_not_name_the_source) {
    caught(PLAIN | RACE | SAN, "", "mask_without_source", "which mask 0x0000ffff does not name");
}
Test(emulator, two_operations_at_one_time_in_a_warp) {
    caught(PLAIN | RACE | SAN, "", "operations_differ", "with mask 0xffffffff, but lane ");
}
Test(emulator, read_past_a_buffer) {
    if (HERE & PLAIN) {
        caught(PLAIN, "", "read_past", "kernel touches byte 256 of a buffer of 256 bytes");
        caught(RACE, "", "read_past", "touches what is neither device nor shared memory");
    } else caught(SAN, "", "read_past", "AddressSanitizer: heap-buffer-overflow");
}
Test(emulator, write_past_a_buffer_that_does_not_end_at_a_page) {
    if (HERE & PLAIN) caught(PLAIN, "", "write_past", "0 bytes behind the 160 bytes");
    else caught(SAN, "", "write_past", "AddressSanitizer: heap-buffer-overflow");
}
Test(emulator, misaligned_vector) {
    if (HERE & PLAIN) {
        caught(PLAIN, "", "misaligned", "kernel touches an address not aligned to its type");
        caught(RACE, "", "misaligned", "is not aligned to its size");
    } else caught(SAN, "", "misaligned", "misaligned address");
}
Test(emulator, race_between_blocks) { caught(RACE, "", "block_race", "emu: race: "); }
Test(emulator, race_within_a_warp) { caught(RACE, "", "warp_race", "emu: race: "); }
Test(emulator, kernel_that_reads_host_memory) {
    caught(RACE, "", "kernel_reads_host", "touches what is neither device nor shared memory");
}
Test(emulator, host_that_reads_device_memory) {
    caught(PLAIN, "EMU_PROTECT=1", "host_reads_device", "host touches memory of device 0");
}
Test(emulator, kernel_that_reads_another_devices_memory) {
    if (HERE & PLAIN) caught(PLAIN, "EMU_PROTECT=1", "other_device", "kernel touches memory of device 0");
    caught(RACE, "", "other_device", "touches another device's memory");
}
Test(emulator, missing_wait_between_streams) {
    right(PLAIN | SAN, "right_wait", "64\n");
    spoils(PLAIN | SAN, "EMU_DEFER=1", "missing_wait", "64\n");
}
Test(emulator, missing_wait_of_the_host) {
    spoils(PLAIN | SAN, "EMU_DEFER=1", "no_wait_for_host", "64\n");
}

static void says(const char *settings, const char *name, int status, const char *words) {
    struct ran r = planted(HERE & PLAIN ? PLAIN : SAN, settings, name);
    cr_assert(r.status == status && strstr(r.out, words), "%s: status %d, printed: %s", name,
              r.status, r.out);
}
Test(emulator, limits_of_a_launch) {
    says("", "shared_limit", 0, "cudaErrorInvalidValue 1056");
    says("", "thread_limit", 1, "cudaErrorInvalidConfiguration");
    says("", "grid_limit", 1, "cudaErrorInvalidConfiguration");
}
Test(emulator, copies_are_checked) {
    says("", "copy_range", 1, "ends past its buffer");
    says("", "copy_direction", 1, "is device memory");
}
Test(emulator, memory_ends) {
    says("EMU_MEMORY_MB=1", "no_memory", 1, "cudaErrorMemoryAllocation");
    says("EMU_MEMORY_MB=2", "no_memory", 0, "");
}
Test(emulator, devices_are_those_made_visible) {
    says("EMU_DEVICES=3", "devices", 0, "emulated GPU 0\nemulated GPU 1\nemulated GPU 2\n");
    says("EMU_DEVICES=3 CUDA_VISIBLE_DEVICES=2,0", "devices", 0, "emulated GPU 2\nemulated GPU 0\n");
    says("EMU_DEVICES=3 CUDA_VISIBLE_DEVICES=", "devices", 1, "cudaErrorNoDevice");
    says("EMU_DEVICES=0", "devices", 1, "cudaErrorNoDevice");
}
Test(emulator, graphs_replay_what_was_captured) {
    right(PLAIN | RACE | SAN, "graph", "650\n");
    says("", "graph_allocates", 1, "cudaErrorStreamCaptureUnsupported");
    says("", "graph_spoilt", 0, "cudaErrorStreamCaptureInvalidated\n1");
}
