/* libraries.c - that the stand-ins for cuBLAS and NCCL compute what those libraries promise and refuse
 * what they would refuse, or wait on for ever (tests/cuda/libraries.cu).
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/cuda/child.h"

static void says(const char *name, int status, const char *words) {
    static const char *const settings[] = { "EMU_DEVICES=4",
                                            "EMU_DEVICES=4 EMU_DEFER=1 EMU_PROTECT=1" };
    for (size_t i = 0; i < COUNT_OF(settings); i++) {
        struct ran r = child("libraries", HERE & PLAIN ? PLAIN : SAN, settings[i], name);
        cr_assert(r.status == status && strstr(r.out, words), "%s %s: status %d, printed: %s",
                  settings[i], name, r.status, r.out);
    }
}

Test(cublas, products_of_every_type_and_transposition) {
    says("gemm", 0, "close\nclose\nclose\nclose\n");
}
Test(cublas, batches) { says("gemm_batched", 0, "0 1 4 6 4 5 12 14 8 9 20 22 \n"); }
Test(cublas, matrix_that_is_not_in_its_buffer) {
    says("gemm_outside", 1, "A does not lie in one buffer");
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
Test(nccl, two_ranks_on_one_gpu) { says("one_gpu 3", 1, "are on one GPU (invalid usage)"); }
Test(nccl, buffer_of_the_host) { says("host_buffer 3", 1, "a buffer is not whole on device 1"); }
