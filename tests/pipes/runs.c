/* runs.c - runs of fake stages: run folders, endings, restarts, stop and resume, places, what is
 * printed.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/pipes/box.h"

#include "lib/base/fs.h"

TestSuite(runs, .init = box_open, .fini = box_close, .timeout = 120);

#define GOOD "start; score 0 10; metric 1; sleep 0.2; metric 2; metric 3; score 3 50"
#define EVAL "start; sleep 0.1"
#define FOREVER "start; while :; do sleep 0.05; done"
/* Waits until a file is there. */
#define AWAIT "i=0; while ! test -e %s; do sleep 0.05; i=$((i+1)); test $i -lt 200 || exit 99; done; "

Test(runs, a_run_ends_done_and_leaves_its_records) {
    static const char *const file[] = {
        "resolved.pipe",     "manifest.json",     "state",
        "run.lock",          "scores.jsonl",      "metrics.jsonl",
        "conf/learner.conf", "conf/rollout.conf", "conf/reward.conf",
        "conf/eval.conf",    "log/learner.log",   "log/launcher.log"
    };
    box_pipeline("a.pipe", "mkdir -p $dir/adapters/v000003; " GOOD, EVAL,
                 "[run]\nexp_id = E1\n[noise.aqn]\nsigma_start = 5e-2\n");
    box_expect(0, "qerl-pipe a.pipe");
    box_has(box_out.s, "adapter  runs/a-0001/adapters/v000003");
    box_has(box_out.s, "50      100    50.0 %   [40.4, 59.6]");
    box_has(box_out.s, "step 0 to 3: +40.0 points; the 95 % intervals are apart");
    box_has(box_out.s, "qerl-pipe rescore runs/a-0001 --rule flexible");
    box_has(box_talk.s, "score step 3: 50/100 = 50.0 % [40.4, 59.6] strict, mxfp4, clean");
    box_has(box_talk.s, "step 3/3");
    box_lacks(box_talk.s, "\r");
    box_lacks(box_talk.s, "\033");
    for (size_t i = 0; i < COUNT_OF(file); i++) {
        char path[200];
        snprintf(path, sizeof path, "runs/a-0001/%s", file[i]);
        cr_expect(fs_exists(path), "no '%s'", path);
    }
    cr_assert_str_eq(box_read("runs/a-0001/state"), "done\n");
    box_has(box_read("runs/SUMMARY.md"),
            "| a-0001 | E1 | done | noise.aqn.sigma_start=5e-2 | 3 | 0 | 10.0 % (10/100) |");
    box_has(box_read("runs/a-0001/manifest.json"), "\"commit\"");
    box_expect(0, "qerl-pipe status");
    box_has(box_out.s, "a-0001  done; step 3 of 3; 50/100");
    box_expect(0, "qerl-pipe logs a learner");
    box_has(box_out.s, "started learner-0");
    box_expect(0, "qerl-pipe resume a");
    box_has(box_talk.s, "done already");
    box_expect(0, "ls -d /tmp/qerl-?????? 2>/dev/null | while read d; do test -e $d/learner.ticket "
                  "&& exit 1; "
                  "done; true");
}

Test(runs, noise_is_shown_as_intended_and_as_measured) {
    box_pipeline("a.pipe",
                 "start; score 0 10; echo '{\"step\":1,"
                 "\"noise/rollout/op/matmul/forward/realised\":0.0499,"
                 "\"noise/rollout/op/matmul/forward/sites\":84}' >> $dir/metrics.jsonl; score 3 50",
                 EVAL, "[stage learner]\nnoisy = yes\n");
    box_expect(0, "qerl-pipe check a.pipe");
    box_has(box_out.s, "  rollout  operator forward   relative_gaussian 0.05: matmul x 42, head x 1, "
                       "gelu (not in this model)\n");
    box_has(box_out.s, "  update   operator backward  relative_gaussian 0.05: matmul x 42\n");
    box_lacks(box_out.s, "noise        none");
    box_expect(0, "qerl-pipe a.pipe && qerl-pipe status a");
    box_has(box_out.s, "relative_gaussian 0.05: matmul realised 0.0499, 84 sites; head x 1; gelu");
}

Test(runs, clean_and_noisy_scores_are_never_one_series) {
    box_pipeline("a.pipe",
                 "start; noisy() { score $1 $2; sed -i '$s/\"none\"/\"ops sparse 0.05; aqn '$3'\"/' "
                 "$dir/scores.jsonl; }; score 0 10; noisy 0 5 0.01; noisy 3 20 0.002; score 3 50",
                 EVAL, "");
    box_expect(0, "qerl-pipe a.pipe");
    box_has(box_out.s, "step 0 to 3: +40.0 points");
    box_has(box_out.s, "step 0 to 3: +15.0 points");
    box_has(box_out.s, "aqn 0.01, at the end ops sparse 0.05; aqn 0.002\n");
    box_has(box_read("runs/SUMMARY.md"), "| test, strict, mxfp4 | clean |\n| a-0001 |");
    box_has(box_read("runs/SUMMARY.md"), "| test, strict, mxfp4 | ops sparse 0.05; aqn 0.002 |");
    box_expect(0, "qerl-pipe status");
    box_has(box_out.s, "50/100");
}

Test(runs, what_was_expected_is_met_or_not_or_cannot_be_told) {
    static const struct { const char *lines, *said; } cases[] = {
        { "above = 30 %\n", "expected   above 30 % at the final score: met by this run, one seed: 50.0 % [40.4, 59.6]" },
        { "above = 0.7\nat = final\n", "above 70 % at the final score: not met by this run, one seed: 50.0 %" },
        { "above = 0.4\n", ": met by this run" },
        /* 40 % of 100 questions is itself uncertain */
        { "above = 40 % of 100\n", "above 40 % of 100 at the final score: not distinguishable, one seed: 50.0 %" },
        { "above = 0.2 of 1319\n", ": met by this run" },
        { "above = 0.45\n", "not distinguishable, one seed: 50.0 % [40.4, 59.6] at step 3, clean" },
        /* the same, but the best of two: a wider interval */
        { "above = 0.49\nat = best\n", "at the best score: not distinguishable, one seed: 60.0 %" },
        { "above = other\n", "above run other at the final score: met by this run, one seed: +45.0 points" },
        { "above = other\nhypothesis = it helps\n", "hypothesis it helps\n" },
        { "above = later\n", "cannot be said: there is no run 'later' or 'later-s1' in 'runs'; run it, then: qerl-pipe status runs/a-0010" },
    };
    box_pipeline("other.pipe", "start; score 0 10; score 3 5", EVAL, "");
    box_expect(0, "qerl-pipe other.pipe");
    box_file("later.pipe", "pipe 1\nbase other.pipe\n");
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        char extra[200];
        snprintf(extra, sizeof extra, "[expect]\n%s", cases[i].lines);
        box_pipeline("a.pipe", strstr(extra, "best")
                     ? "start; score 0 90; score 1 52; score 2 60; score 3 50"
                     : GOOD, EVAL, extra);
        box_expect(0, "qerl-pipe a.pipe");
        box_has(box_out.s, cases[i].said);
        box_expect(0, "qerl-pipe status a");
        box_has(box_out.s, cases[i].said);
    }
    box_has(box_read("runs/a-0010/resolved.pipe"), "above = later");
    box_file("later.pipe", "pipe 1\nbase other.pipe\n[run]\nname = called\n");
    static const char *const unknown[] = { "nobody", "othr", "a", "other-s", "later-x1" };
    for (size_t i = 0; i < COUNT_OF(unknown); i++) {
        box_expect(EXIT_CONFIG, "qerl-pipe check a.pipe --set expect.above=%s", unknown[i]);
        box_has(box_talk.s, strcmp(unknown[i], "a") ? "is no run in 'runs' and no pipeline beside this one"
                                                    : "is this pipeline itself");
    }
    box_expect(EXIT_CONFIG, "qerl-pipe check a.pipe --set expect.above=othr");
    box_has(box_talk.s, "did you mean 'other'?; there are: a, called, other\n");
    box_expect(0, "qerl-pipe check a.pipe --set expect.above=called");
    box_expect(0, "qerl-pipe check a.pipe --set expect.above=called-tiny-s7");
    box_expect(EXIT_CONFIG, "qerl-pipe check a.pipe --set expect.above=later");
    /* of a file elsewhere: beside it, or beside the base that names it */
    box_expect(0, "mkdir far; printf 'pipe 1\\nbase ../a.pipe\\n[expect]\\nabove = 0.5\\n' > "
                  "far/b.pipe; qerl-pipe check far/b.pipe");
    box_expect(EXIT_CONFIG, "qerl-pipe check far/b.pipe --set expect.above=called");
    box_expect(0, "sed -i 's/^above = .*/above = called/' a.pipe; sed -i /above/d far/b.pipe; "
                  "qerl-pipe check far/b.pipe");
    /* a matrix names its runs by their seeds */
    box_pipeline("a.pipe", GOOD, EVAL, "[expect]\nabove = other\n");
    box_expect(0, "rm -r runs/other-0001; qerl-pipe matrix other.pipe a.pipe --seeds 2 && "
                  "qerl-pipe status a-s2");
    box_has(box_out.s, "met by this run, one seed: +45.0 points");
    box_has(box_out.s, "to other-s2-0001; at step 3");
    box_pipeline("a.pipe", GOOD, EVAL, "[expect]\nabove = 73.24\n");
    box_expect(EXIT_CONFIG, "qerl-pipe check a.pipe");
    box_has(box_talk.s, "'73.24' for 'expect.above' is outside 0 .. 1: is '73.24 %' meant?");
    box_pipeline("a.pipe", GOOD, EVAL, "[expect]\nat = once\n");
    box_expect(EXIT_CONFIG, "qerl-pipe check a.pipe");
    box_has(box_talk.s, "'once' for 'expect.at' is not one of final|best");
}

Test(runs, a_run_that_never_learned_and_noise_that_never_was_are_said) {
    box_pipeline("a.pipe",
                 "start; score 0 10; echo '{\"step\":3,\"updated\":false,\"train/steps_skipped\":2,"
                 "\"train/updates_nonfinite\":1,\"noise/update/op/matmul/forward/warning\":"
                 "\"bf16 realises 0\"}' >> $dir/metrics.jsonl; score 3 10",
                 EVAL, "");
    box_expect(0, "qerl-pipe a.pipe");
    box_has(box_out.s, "NO UPDATE  3 of 3 steps skipped (2: no group could teach, 1: not finite)");
    box_has(box_out.s, "WARNING    noise/update/op/matmul/forward: bf16 realises 0");
    box_has(box_read("runs/SUMMARY.md"), "| a-0001 |  | done, NO UPDATE | ");
    box_expect(0, "qerl-pipe status a");
    box_has(box_out.s, "NO UPDATE  3 of 3 steps skipped");
    box_has(box_out.s, "WARNING    noise/update/op/matmul/forward: bf16 realises 0");
    box_pipeline("b.pipe", GOOD, EVAL, "");
    box_expect(0, "qerl-pipe b.pipe");
    box_lacks(box_out.s, "NO UPDATE");
    box_expect(0, "qerl-pipe compare b a --force");
    box_has(box_out.s, "a-0001 made no update: 1 of 1 steps skipped");
    box_lacks(box_out.s, "b-0001 made no update");
}

Test(runs, the_headline_of_a_run_names_the_step_of_an_older_score) {
    box_pipeline("a.pipe", "start; score 0 10; metric 1; metric 2; metric 3; exit 1", EVAL, "");
    box_run("qerl-pipe a.pipe");
    box_expect(0, "qerl-pipe status");
    box_has(box_out.s, "step 3 of 3; 10/100 = 10.0 %");
    box_has(box_out.s, ", clean at step 0\n");
    box_pipeline("b.pipe", GOOD, EVAL, "");
    box_expect(0, "qerl-pipe b.pipe; qerl-pipe status b");
    box_has(box_out.s, "clean\n");
}

Test(runs, an_adapter_that_its_format_reads_as_0_is_said) {
    static const struct { const char *share; bool said; } cases[] = { { "1", true }, { "0.51", true },
                                                                      { "0.5", false }, { "0", false } };
    box_pipeline("b.pipe", GOOD, EVAL, "");
    box_expect(0, "qerl-pipe b.pipe");
    box_lacks(box_out.s, "ADAPTER UNSEEN");
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        char does[300];
        snprintf(does, sizeof does, "start; score 0 10; echo '{\"step\":1,\"quant/adapter/b_zeroed\":0.9}' "
                 ">> $dir/metrics.jsonl; echo '{\"step\":3,\"quant/adapter/b_zeroed\":%s}' >> $dir/metrics.jsonl; score 3 10",
                 cases[i].share);
        box_pipeline("a.pipe", does, EVAL, "");
        box_expect(0, "qerl-pipe a.pipe");
        if (i == 0) box_has(box_out.s, "ADAPTER UNSEEN  in step 3 quant.adapter read 100 % of B as 0");
        cr_expect_eq(strstr(box_out.s, "ADAPTER UNSEEN") != NULL, cases[i].said);
        char row[60];
        snprintf(row, sizeof row, "| a-000%zu |  | done%s | ", i + 1, cases[i].said ? ", ADAPTER UNSEEN" : "");
        box_has(box_read("runs/SUMMARY.md"), row);
        box_expect(0, "qerl-pipe status a");
        cr_expect_eq(strstr(box_out.s, "ADAPTER UNSEEN") != NULL, cases[i].said);
        box_expect(0, "qerl-pipe compare b a --force");
        cr_expect_eq(strstr(box_out.s, "in its last step quant.adapter read") != NULL, cases[i].said);
    }
}

Test(runs, an_expectation_is_about_the_model_and_the_data_of_its_file) {
    box_pipeline("a.pipe", GOOD, EVAL, "[expect]\nabove = 30 %\n");
    box_expect(0, "qerl-pipe a.pipe --set data.test=other.jsonl");
    box_has(box_out.s, "cannot be said: other model or data (data.test was set to 'other.jsonl')");
    box_expect(0, "qerl-pipe a.pipe --set data.test=other.jsonl --set expect.above=0.3");
    box_has(box_out.s, ": met by this run, one seed: 50.0 %");
}

Test(runs, a_run_folder_is_never_used_twice) {
    box_pipeline("a.pipe", GOOD, EVAL, "");
    box_expect(
        0, "mkdir -p runs/a-0007; touch runs/a-0007/mine; qerl-pipe a.pipe && qerl-pipe a.pipe");
    cr_assert(fs_exists("runs/a-0008/state") && fs_exists("runs/a-0009/state"));
    box_expect(0, "test \"$(ls runs/a-0007)\" = mine");
    box_expect(0, "qerl-pipe a.pipe & qerl-pipe a.pipe; r=$?; wait; exit $r");
    cr_assert(fs_exists("runs/a-0010/state") && fs_exists("runs/a-0011/state"));
}

Test(runs, without_data_two_lines_exit_4_and_nothing_made) {
    box_pipeline("a.pipe", GOOD, EVAL, "");
    box_expect(4, "rm q.jsonl; qerl-pipe run a.pipe");
    cr_assert_str_eq(box_talk.s, "missing: 'q.jsonl'\nget it:  tools/fetch has no 'q.jsonl'; set "
                                 "data.train to what you have (paths are relative to the current folder)\n");
    cr_assert(!fs_exists("runs"));
    box_expect(0, "qerl-pipe check a.pipe");
    box_has(box_out.s, "absent: tools/fetch has no 'q.jsonl'");
}

Test(runs, check_prints_the_plan_and_starts_nothing) {
    box_pipeline("a.pipe", GOOD, EVAL,
                 "[run]\nexp_id = E1\nquestion = does it work?\n[stage eval]\nplace = "
                 "gpu:5 | cpu:0\n");
    box_expect(0, "qerl-pipe check a.pipe");
    static const char *const said[] = { "exp_id       E1",
                                        "question     does it work?",
                                        "place cpu:0      (of: gpu:5 | cpu:0)",
                                        "steps        3",
                                        "scored steps 2: 0, 3",
                                        "1 .. 2       0.05",
                                        "at least 6, at most 30",
                                        "memory 1.0 MiB, 512 KiB of it keys and values",
                                        "weights      3.0 MiB as mxfp4, mapped once for all stages",
                                        "memory       5.0 MiB",
                                        "disk         4.0 KiB",
                                        "1.50 s a step): a rough guess, counted on fingers\n",
                                        "train    q.jsonl",
                                        "2 lines",
                                        "sha256 ",
                                        "learner: clipping never acts" };
    for (size_t i = 0; i < COUNT_OF(said); i++) box_has(box_out.s, said[i]);
    cr_assert(!fs_exists("runs"));
    /* beside the guess what the newest run of that name took */
    box_expect(0, "qerl-pipe run a.pipe && echo '{\"step\":3,\"timing_s/step\":2.25}' >> "
                  "runs/a-0001/metrics.jsonl && qerl-pipe check a.pipe");
    box_has(box_out.s, "measured in a-0001, maybe under other settings: 2.25 s for step 3\n");
}

Test(runs, no_final_score_is_incomplete) {
    box_pipeline("a.pipe", "start; score 0 10", EVAL, "");
    box_expect(1, "qerl-pipe a.pipe");
    cr_assert_str_eq(box_read("runs/a-0001/state"), "incomplete: no score of the last step 3\n");
    box_has(box_talk.s, "qerl-pipe resume runs/a-0001");
    box_has(box_read("runs/SUMMARY.md"), "| incomplete |");
}

Test(runs, a_stage_that_dies_at_start_shows_its_message_and_is_not_restarted) {
    for (int code = 2; code <= 4; code++) {
        char order[200], file[64], state[200];
        snprintf(order, sizeof order,
                 "echo once >> lives.%d; echo 'no such tokenizer family' >&2; exit %d", code, code);
        box_pipeline("a.pipe", order, FOREVER, "");
        box_expect(code, "qerl-pipe a.pipe");
        box_has(box_talk.s, "no such tokenizer family");
        snprintf(state, sizeof state, "failed: stage 'learner' ended with exit code %d at start: no such tokenizer family\n",
                 code);
        snprintf(file, sizeof file, "runs/a-%04d/state", code - 1);
        cr_assert_str_eq(box_read(file), state);
        snprintf(file, sizeof file, "lives.%d", code);
        cr_assert_str_eq(box_read(file), "once\n");
    }
}

Test(runs, a_killed_stage_is_restarted_and_too_many_deaths_fail_the_run) {
    box_pipeline("a.pipe", GOOD "; sleep 1.5", EVAL, "[stage reward]\ndo += \n");
    box_expect(0, "sed -i '/qerl-reward/,/do =/s/^do =.*/do = start; if ! test -e died; then touch "
                  "died; kill "
                  "-9 $$; fi; trap \"exit 0\" TERM; while :; do sleep 0.05; done/; "
                  "/^do += $/d' a.pipe; qerl-pipe a.pipe");
    box_has(box_talk.s, "reward-0 was killed by signal 9 (Killed); restart 1 of 3 in 0.2 s");
    box_pipeline("b.pipe", "start; echo once >> lives; exit 1", FOREVER, "");
    box_expect(1, "qerl-pipe b.pipe");
    cr_assert_str_eq(box_read("lives"), "once\nonce\nonce\nonce\n");
    cr_assert_str_eq(box_read("runs/b-0001/state"),
                     "failed: stage 'learner' ended with exit code 1 4 times in "
                     "step 0: started learner-0\n");
}

Test(runs, stop_and_resume_work_in_the_same_folder) {
    box_pipeline(
        "a.pipe",
        "start; score 0 10; if test -e $dir/second; then score 3 50; else touch $dir/second; "
        "while :; do sleep 0.05; done; fi",
        EVAL, "");
    box_expect(1,
               "qerl-pipe a.pipe & " AWAIT
               "qerl-pipe resume a; echo \"resume: $?\"; qerl-pipe stop a || "
               "exit 98; wait $!",
               "runs/a-0001/second");
    box_has(box_out.s, "resume: 1");
    box_has(box_talk.s, "is being worked on by process");
    box_has(box_read("runs/a-0001/state"), "stopped: by signal TERM");
    box_expect(0, "cd / && qerl-pipe resume $OLDPWD/runs/a-0001");
    box_has(box_talk.s, "goes on after step 0 of 3");
    box_lacks(box_talk.s, "made again");
    cr_assert_str_eq(box_read("runs/a-0001/state"), "done\n");
    cr_assert(!fs_exists("runs/a-0002"));
}

Test(runs, a_killed_launcher_leaves_no_stage_and_resume_goes_on) {
    box_pipeline(
        "a.pipe",
        "start; echo $$ > $dir/pid; if test -e $dir/second; then score 0 1; score 3 50; else "
        "mkdir -p $dir/ckpt/step-000001; metric 1; metric 2; metric 3; touch $dir/second; while :; do sleep 0.05; done; fi",
        EVAL, "");
    box_expect(0,
               "qerl-pipe a.pipe & " AWAIT
               "kill -9 $!; wait $!; sleep 0.3; ! grep -q '^State:.[RSDT]' "
               "/proc/$(cat runs/a-0001/pid)/status",
               "runs/a-0001/second");
    cr_assert_str_eq(box_read("runs/a-0001/state"), "running\n");
    box_expect(0, "qerl-pipe status");
    box_has(box_out.s, "but no process works on it: qerl-pipe resume runs/a-0001");
    box_expect(0, "qerl-pipe doctor | grep 'a-0001 say'");
    box_expect(0, "test -d $(sed -n 2p runs/a-0001/run.lock); cp runs/a-0001/run.lock old");
    box_expect(0, "qerl-pipe resume a");
    box_has(box_talk.s, "run runs/a-0001 goes on after step 1 of 3 (its newest checkpoint), 4 stages\n"
                        "2 steps are made again: 2 to 3 came after the checkpoint");
    cr_assert_str_eq(box_read("runs/a-0001/state"), "done\n");
    box_expect(0, "test ! -e $(sed -n 2p old)");
}

Test(runs, resume_refuses_other_data_unless_forced) {
    box_pipeline("a.pipe",
                 "start; score 0 10; test ! -e $dir/second || score 3 50; touch $dir/second", EVAL,
                 "");
    box_expect(1, "qerl-pipe a.pipe");
    box_expect(1, "echo '{}' >> q.jsonl; qerl-pipe resume a");
    box_has(box_talk.s, "train file 'q.jsonl' has changed since this run started");
    box_has(box_talk.s, "--force-different");
    box_expect(0, "qerl-pipe resume a --force-different");
    box_has(box_talk.s, "has changed");
}

Test(runs, pinning_is_done_by_the_kernel) {
    box_pipeline("a.pipe",
                 "start; echo $$ > $dir/pid; while ! test -e go; do sleep 0.05; done; score 0 1; "
                 "score 3 5",
                 EVAL, "[stage learner]\nplace = gpu:0 | cpu:1\n[stage eval]\nplace = cpu:0\n");
    if (box_run("grep -q '^Cpus_allowed_list:.*0-' /proc/self/status") != 0)
        cr_skip_test("needs cores 0 and 1");
    box_expect(0, "CUDA_VISIBLE_DEVICES=7 qerl-pipe a.pipe & " AWAIT "sleep 0.2; p=/proc/$(cat "
               "runs/a-0001/pid); grep Cpus_allowed_list $p/status > seen; "
               "tr '\\0' '\\n' < $p/environ | grep CUDA_VISIBLE_DEVICES >> seen; touch go; wait $!", "runs/a-0001/pid");
    box_has(box_read("seen"), "\t1\n");
    box_has(box_read("seen"), "CUDA_VISIBLE_DEVICES=\n");   /* a stage on cores sees no GPU, whatever the launcher's own */
    box_has(box_read("runs/a-0001/cores.eval-0"), "\t0\n");
    box_has(box_read("runs/a-0001/manifest.json"), "\"place\": \"cpu:1\"");
}

Test(runs, places_that_the_machine_lacks_end_with_4) {
    box_pipeline("a.pipe", GOOD, EVAL, "[stage learner]\nplace = cpu:0,700\n");
    box_expect(4, "qerl-pipe run a.pipe");
    box_has(box_talk.s, "stage 'learner': place 'cpu:0,700': this machine has cores 0");
    box_pipeline("a.pipe", GOOD, EVAL, "[stage learner]\nplace = gpu:60\n");
    box_expect(4, "qerl-pipe run a.pipe");
    box_has(box_talk.s, "a.pipe:22: stage 'learner': place 'gpu:60': this machine has cores 0");
    cr_assert(!fs_exists("runs"));
}

Test(runs, help_names_every_command_with_an_example) {
    static const char *const command[] = { "run",  "check", "describe", "resume", "status",
                                           "logs", "stop",  "rescore",  "doctor" };
    box_expect(0, "qerl-pipe --help");
    for (size_t i = 0; i < COUNT_OF(command); i++) box_has(box_out.s, command[i]);
    for (size_t i = 0; i < COUNT_OF(command); i++) {
        box_expect(0, "qerl-pipe %s --help", command[i]);
        box_has(box_out.s, "examples:\n  qerl-pipe ");
    }
    box_expect(0, "qerl-pipe --version");
    box_expect(0, "qerl-pipe --runs elsewhere status");
    box_has(box_talk.s, "no runs in 'elsewhere'");
    box_expect(2, "qerl-pipe status nothing");
    box_has(box_talk.s, "there is no run 'nothing'");
}

/* The real reward stage sends beats; frozen, it falls silent and is replaced. */
Test(runs, a_stage_that_falls_silent_is_restarted) {
    box_pipeline("a.pipe", "start; while ! test -e go; do sleep 0.05; done; score 0 1; score 3 5",
                 EVAL, "[run]\nstall_seconds = 1.5\n");
    if (box_run("rm bin/qerl-reward; ln -s \"$(command -v qerl-reward)\" bin/qerl-reward") != 0 ||
        !fs_exists("bin/qerl-reward"))
        cr_skip_test("needs bin/qerl-reward");
    box_file("freeze",
             "for p in /proc/[0-9]*; do case $(readlink $p/exe) in */qerl-reward)\n"
             "test \"$(readlink $p/cwd)\" = \"$PWD\" && kill -STOP ${p#/proc/} ;; esac; done\n");
    box_file(
        "await",
        "i=0; while ! grep -q \"$1\" talk; do sleep 0.05; i=$((i+1)); test $i -lt 400 || exit 1; "
        "done\n");
    box_expect(
        0, "sed -i '/qerl-reward/{n;d}' a.pipe; qerl-pipe a.pipe 2> talk & sleep 0.2; sh ./await "
           "'reward-0 ready'; sleep 1; sh ./freeze; "
           "sh ./await 'restart 1 of 3'; sleep 1; touch go; sh ./await 'is done'");
    box_has(box_read("talk"), "reward-0 made no progress for");
    box_has(box_read("talk"), "reward-0 was killed by signal 9 (Killed); restart 1 of 3");
}
