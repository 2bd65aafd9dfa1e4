/* old_switches.c - environment variables of the earlier system stop every command that would start
 * something, with the options that mean the same.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/pipes/box.h"

#include "lib/base/fs.h"

TestSuite(old_switches, .init = box_open, .fini = box_close, .timeout = 60);

static const struct {
    const char *environment, *said, *not_said;
} cases[] = {
    { "VERL_NOISY_OPS_ENABLED=1",
      "--set noise.ops.type=relative_gaussian --set noise.ops.scale=1e-4 --set "
      "noise.ops.ops=matmul,bmm,head --set eval.also_noisy=yes\n",
      "direction" },
    { "VERL_NOISY_OPS_ENABLED=yes VERL_NOISY_OPS_SCALE=5e-2 VERL_NOISY_OPS_ALL_OPS=TRUE",
      "--set noise.ops.scale=5e-2 --set noise.ops.ops=matmul,bmm,softmax,silu,gelu,norm,head",
      "noise.ops.rollout" },
    { "VERL_NOISY_OPS_ENABLED=1 VERL_NOISY_OPS_FORWARD_ONLY=1", "noise.ops.direction=forward",
      "backward" },
    { "VERL_NOISY_OPS_ENABLED=1 VERL_NOISY_OPS_BACKWARD_ONLY=1", "noise.ops.direction=backward",
      "forward" },
    { "VERL_NOISY_OPS_ENABLED=1 VERL_NOISY_OPS_BACKWARD_ONLY=1 VERL_NOISY_OPS_FORWARD_ONLY=1",
      "meant both directions", "noise.ops.direction" },
    { "VERL_NOISY_OPS_TRAINING_ONLY=1", "noise.ops.rollout=no", "also_noisy" },
    { "VERL_NOISY_OPS_ENABLED=1 VERL_NOISY_OPS_TYPE=absolute_gaussian VERL_NOISY_OPS_SCALE=2e-3",
      "noise.modules.type=absolute_gaussian --set noise.modules.scale=2e-3", "noise.ops" },
    { "VERL_NOISY_OPS_ENABLED=0", "these switches meant no noise", "--set" },
    { "VERL_HW_ERROR_INJECTION=1", "VERL_HW_ERROR_INJECTION has no counterpart", "--set" },
    { "VERL_AQN_SIGMA=1", "VERL_AQN_SIGMA has no counterpart", "--set" },
};

Test(old_switches, are_refused_with_the_options_that_mean_the_same) {
    box_pipeline("a.pipe", "start; score 0 10; score 3 50", "start", "");
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        box_expect(EXIT_USAGE, "%s qerl-pipe check a.pipe", cases[i].environment);
        box_has(box_talk.s, "switches of the earlier system");
        box_has(box_talk.s, cases[i].said);
        box_has(box_talk.s, "docs/old-switches.md");
        box_lacks(strchr(box_talk.s, '\n'), cases[i].not_said);
    }
}

Test(old_switches, stop_what_starts_something_and_nothing_else) {
    box_pipeline("a.pipe", "start; score 0 10; score 3 50", "start", "");
    box_expect(EXIT_USAGE, "VERL_NOISY_OPS_SCALE=1 qerl-pipe a.pipe");
    box_expect(EXIT_USAGE, "VERL_NOISY_OPS_SCALE=1 qerl-pipe resume a");
    cr_assert(!fs_exists("runs"), "a run folder was made");
    box_expect(EXIT_DONE, "VERL_NOISY_OPS_SCALE=1 qerl-pipe status");
    box_expect(EXIT_DONE, "VERL_NOISY=1 qerl-pipe check a.pipe");
}
