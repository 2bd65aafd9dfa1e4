/* libraries.c - that the stand-ins for cuBLAS and NCCL compute what those libraries promise and refuse
 * what they would refuse, or wait on for ever (tests/cuda/libraries.cu).
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/cuda/child.h"

/* more: settings of the environment besides those */
static void says_with(const char *more, const char *name, int status, const char *words) {
    static const char *const settings[] = { "EMU_DEVICES=4",
                                            "EMU_DEVICES=4 EMU_DEFER=1 EMU_PROTECT=1" };
    for (size_t i = 0; i < COUNT_OF(settings); i++) {
        char all[200];
        snprintf(all, sizeof all, "%s %s", settings[i], more);
        struct ran r = child("libraries", HERE & PLAIN ? PLAIN : SAN, all, name);
        cr_assert(r.status == status && strstr(r.out, words), "%s %s: status %d, printed: %s", all,
                  name, r.status, r.out);
    }
}
static void says(const char *name, int status, const char *words) {
    says_with("", name, status, words);
}

Test(cublas, products_of_every_type_and_transposition) {
    says("gemm", 0, "close\nclose\nclose\nclose\n");
}
Test(cublas, batches) { says("gemm_batched", 0, "0 1 4 6 4 5 12 14 8 9 20 22 \n"); }
Test(cublas, matrix_that_is_not_in_its_buffer) {
    says("gemm_outside", 1, "A does not lie in one buffer");
}
Test(cublas, repeats_with_a_workspace_and_no_atomics) {
    says("gemm_repeats", 0, "same\nother\nother\n");
}
Test(cublas, in_a_captured_graph) { says("gemm_graph", 0, "17\n"); }

Test(nccl, all_reduce_in_place) {
    says("all_reduce 1", 0, "0:1.71665712e+10 no error\n");
    says("all_reduce 3", 0,
         "0:1.02999427e+11 no error\n1:1.02999427e+11 no error\n2:1.02999427e+11 no error\n");
}
Test(nccl, sums_are_added_in_rank_order_and_rounded_once) {
    says("rank_order 3", 0,
         "258 0:16777216 no error\n258 1:16777216 no error\n258 2:16777216 no error\n");
}
Test(nccl, all_gather) {
    says("all_gather 3", 0,
         "0:4.41436316e+10 no error\n1:4.41436316e+10 no error\n2:4.41436316e+10 no error\n");
}
Test(nccl, reduce_scatter_in_place) {
    says("reduce_scatter 3", 0,
         "0:2.94274974e+10 no error\n1:2.94267896e+10 no error\n2:2.94264057e+10 no error\n");
}
Test(nccl, broadcast) {
    says("broadcast 3", 0, "0:72890400 no error\n1:72890400 no error\n2:72890400 no error\n");
}
Test(nccl, ranks_that_make_different_calls_abort) {
    says("different_calls 3", 1, "ncclAllReduce of 100 elements");
    says("different_calls 3", 1, "ncclBroadcast of 100");
    says("different_counts 3", 1, "ncclAllReduce of 99 elements");
}
Test(nccl, a_lost_rank_is_an_error_of_all_others, .timeout = 60) {
    says("lost_rank 3", 1, "0:-nan remote process exited");
    says("lost_rank 3", 1, "2:-nan remote process exited");
}
Test(nccl, calls_in_the_background_keep_the_stream_s_order) {
    says("background 3", 0,
         "0:3.68162642e+10 no error\n1:3.68162642e+10 no error\n2:3.68162642e+10 no error\n");
}
Test(nccl, a_call_while_another_is_in_progress_is_refused) {
    says("call_in_progress 2", 1, "call 1 while another is in progress (invalid usage)");
}
Test(nccl, a_rank_lost_amid_a_gather_is_noticed_or_waited_for_until_the_abort, .timeout = 60) {
    says_with("EMU_NCCL_DIE=1:0", "lost_in_background 3", 1,
              "0: done, remote process exited or there was a network error; aborted: done -nan");
    says_with("EMU_NCCL_DIE=1:0 EMU_NCCL_HANG=1", "lost_in_background 3", 1,
              "0: waits, no error; aborted: done -nan\n2: waits, no error; aborted: done -nan");
}
Test(nccl, a_start_that_waits_for_a_rank_can_be_aborted) {
    says("start_of_too_few 3", 0, "0: 7, 0\n2: 7, 0\n");
}
Test(nccl, two_ranks_on_one_gpu) { says("one_gpu 3", 1, "are on one GPU (invalid usage)"); }
Test(nccl, buffer_of_the_host) { says("host_buffer 3", 1, "a buffer is not whole on device 1"); }
