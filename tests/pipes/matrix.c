/* matrix.c - sets of runs of fake stages: what is run, skipped, resumed, listed as failed, and the
 * table of a sweep.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/pipes/box.h"

#include "lib/base/fs.h"

TestSuite(matrix, .init = box_open, .fini = box_close, .timeout = 120);

#define EVAL "start; sleep 0.1"
#define GOOD "start; score 0 10; metric 1; metric 3; score 3 50"
#define BAD "start; echo nothing works >&2; exit 1"

Test(matrix, a_run_that_fails_does_not_stop_the_set) {
    box_pipeline("good.pipe", GOOD, EVAL, "");
    box_pipeline("bad.pipe", BAD, EVAL, "[stage learner]\nrestarts = 0\n");
    box_file("still.pipe", "pipe 1\n[stage eval]\nexec = bin/qerl-eval\n");
    box_expect(EXIT_FAILED, "qerl-pipe matrix bad.pipe still.pipe good.pipe --seeds 2");
    box_has(box_out.s, "good-s1-0001  done");
    box_has(box_out.s, "good-s2-0001  done");
    box_has(box_out.s, "50.0 % (50/100)  [40.4, 59.6]");
    box_has(box_out.s, "FAILED");
    box_has(box_out.s,
            "failed: stage 'learner' ended with exit code 1 1 times in step 0: nothing works");
    box_has(box_out.s, "still.pipe    skipped");
    box_has(box_out.s, "does not train: no stage learner");
    box_has(box_read("runs/good-s2-0001/resolved.pipe"), "seed = 2");
}

Test(matrix, starts_nothing_where_one_run_of_the_set_cannot) {
    box_pipeline("a.pipe", GOOD, EVAL, "");
    box_pipeline("wrong.pipe", GOOD, EVAL, "[stage learner]\nlora.rnk = 3\n");
    box_pipeline("old.pipe", GOOD, EVAL, "[stage learner]\nlr = fast\n");
    box_file("still.pipe", "pipe 1\n[stage eval]\nexec = bin/qerl-eval\n");
    box_expect(EXIT_CONFIG,
               "qerl-pipe matrix a.pipe wrong.pipe old.pipe none.pipe still.pipe --seeds 2");
    box_has(box_talk.s, ": unknown key 'lora.rnk' of stage 'learner'");
    box_has(box_talk.s, "'fast' for 'learner.lr'");
    box_has(box_talk.s, "none.pipe");
    box_has(box_talk.s, "skipped: still.pipe: does not train: no stage learner");
    box_has(box_talk.s, "nothing was started");
    cr_assert(!fs_exists("runs"), "something was started");
    /* one value of a sweep, the last seed, and what only the stage knows */
    box_expect(EXIT_CONFIG, "qerl-pipe matrix a.pipe --sweep learner.lr=1e-5,quick,slow");
    box_has(box_talk.s, "'quick' for 'learner.lr'");
    box_has(box_talk.s, "in a-learner.lr_quick-s1");
    box_has(box_talk.s, "'slow' for 'learner.lr'");
    box_expect(EXIT_CONFIG,
               "qerl-pipe matrix a.pipe --seeds 2 --set run.seed=1000000");
    box_has(box_talk.s, "in a-s1000001\n");
    box_lacks(box_talk.s, "a-s1000000");
    box_expect(EXIT_CONFIG, "qerl-pipe matrix a.pipe --sweep learner.train=q.jsonl,refuse");
    box_has(box_talk.s, "--set: the training questions refuse\n  in a-learner.train_refuse-s1\n");
    cr_assert(!fs_exists("runs"), "something was started");
}

Test(matrix, starts_nothing_where_data_is_missing) {
    box_pipeline("a.pipe", GOOD, EVAL, "");
    box_pipeline("b.pipe", GOOD, EVAL, "");
    box_expect(EXIT_ENV, "rm q.jsonl; qerl-pipe matrix a.pipe b.pipe --seeds 2");
    box_has(box_talk.s, "missing: 'q.jsonl'\nget it:  ");
    box_has(box_talk.s, "in a-s1, b-s1");
    cr_assert(!fs_exists("runs"), "something was started");
}

Test(matrix, what_is_done_is_not_done_again) {
    box_pipeline("a.pipe", GOOD, EVAL, "");
    box_expect(EXIT_DONE, "qerl-pipe matrix a.pipe && qerl-pipe matrix a.pipe");
    box_has(box_out.s, "a-s1-0001  done before");
    cr_assert(!fs_exists("runs/a-s1-0002"));
    /* how a value is written does not matter, what it is does */
    box_expect(EXIT_DONE, "qerl-pipe matrix a.pipe --set learner.lr=0.00001");
    cr_assert(!fs_exists("runs/a-s1-0002"));
    box_expect(EXIT_DONE, "qerl-pipe matrix a.pipe --set learner.lr=2e-5");
    box_has(box_out.s, "a-s1-0002  done");
}

Test(matrix, what_was_killed_goes_on) {
    box_pipeline("a.pipe",
                 "start; if test -e begun; then score 3 50; else score 0 10; touch begun; "
                 "while :; do sleep 0.05; done; fi", EVAL, "");
    box_expect(EXIT_FAILED,
               "qerl-pipe matrix a.pipe --seeds 2 & p=$!; i=0; while ! test -e begun; do sleep 0.05; "
               "i=$((i+1)); test $i -lt 400 || exit 99; done; kill -TERM $p; wait $p");
    box_has(box_talk.s, "stopped; 0 of 2 runs are done, 2 wait; the run folders are kept: the same "
                        "command goes on");
    box_has(box_out.s, "not run");
    box_has(box_read("runs/a-s1-0001/state"), "stopped");
    cr_assert(!fs_exists("runs/a-s2-0001"));
    box_expect(EXIT_DONE, "qerl-pipe matrix a.pipe --seeds 2");
    cr_assert(!fs_exists("runs/a-s1-0002"), "the stopped run was not resumed");
    box_has(box_out.s, "a-s1-0001  done");
    box_has(box_out.s, "a-s2-0001  done");
}

Test(matrix, a_sweep_ends_with_the_first_value_that_is_worse) {
    box_pipeline("a.pipe",
                 "start; score 0 90; case $(value noise.aqn.sigma_start) in 0) score 3 90;; "
                 "1e-4) score 3 88;; *) score 3 30;; esac", EVAL, "");
    box_expect(EXIT_DONE, "qerl-pipe matrix a.pipe --sweep noise.aqn.sigma_start=0,1e-4,5e-2,0.5");
    box_has(box_out.s, "a-noise.aqn.sigma_start_1e-4-s1-0001");
    box_has(box_out.s, "88.0 %  [80.2, 93.0]        -2.0   [-13.2, +9.1]  not distinguishable");
    box_has(box_out.s, "(Bonferroni: 98.33 % each)");
    box_has(box_out.s, "the first value that is worse than 0: 5e-2\n");
    box_expect(EXIT_DONE, "qerl-pipe matrix a.pipe --sweep noise.aqn.sigma_start=0,1e-4");
    box_has(box_out.s, "no value is worse than 0, within these intervals");
}

Test(matrix, a_sweep_of_seeds_is_refused) {
    static const char *const key[] = { "seed", "name" };
    box_pipeline("a.pipe", "start; score 0 90; score 3 90", EVAL, "");
    for (size_t i = 0; i < COUNT_OF(key); i++) {
        box_expect(EXIT_USAGE, "qerl-pipe matrix a.pipe --sweep run.%s=1,2 --seeds 2", key[i]);
        box_has(box_talk.s, "a matrix names its runs and gives them their seeds; --seeds K");
    }
    cr_assert(!fs_exists("runs"));
}

#define DOSES "start; score 0 90; case $(value noise.ops.type)-$(value noise.ops.scale) in " \
              "off-*) score 3 90 aa;; *-1e-4) score 3 89 bb;; *) score 3 30 cc;; esac"

Test(matrix, a_sweep_holds_its_control) {
    box_pipeline("a.pipe", DOSES, EVAL, "[noise.ops]\ntype = relative_gaussian\n");
    box_expect(EXIT_DONE, "qerl-pipe matrix a.pipe --sweep noise.ops.scale=0,1e-4,0.5");
    box_has(box_out.s, "the first value that is worse than 0: 0.5\n");
    box_lacks(box_out.s, "NO NOISE");
    box_lacks(box_out.s, "the same adapter");
    box_has(box_read("runs/a-noise.ops.scale_0-s1-0001/resolved.pipe"), "type = off");
    box_has(box_read("runs/a-noise.ops.scale_0.5-s1-0001/resolved.pipe"), "type = relative_gaussian");
}

Test(matrix, a_sweep_of_noise_that_never_was_says_so) {
    box_pipeline("a.pipe", DOSES, EVAL, "");
    box_expect(EXIT_DONE, "qerl-pipe matrix a.pipe --sweep noise.ops.scale=0,1e-4,0.5");
    box_has(box_out.s, "noise.ops.scale = 1e-4: NO NOISE was in force");
    box_has(box_out.s, "noise.ops.scale = 0.5: NO NOISE was in force");
    box_lacks(box_out.s, "noise.ops.scale = 0: NO NOISE");
    box_has(box_out.s, "a-noise.ops.scale_0-s1-0001 and a-noise.ops.scale_1e-4-s1-0001 ended with the same adapter");
    box_has(box_out.s, "a-noise.ops.scale_0-s1-0001 and a-noise.ops.scale_0.5-s1-0001 ended with the same adapter");
}

#define BOTH "start; noisy() { score $1 $2 $3; sed -i '$s/\"none\"/\"ops x\"/' $dir/scores.jsonl; }; " \
             "score 0 90; case $(value noise.ops.type)-$(value noise.ops.scale) in " \
             "off-*) score 3 90 aa;; *-1e-2) score 3 89 bb; noisy 3 85 bb;; " \
             "*) score 3 88 cc; noisy 3 30 cc;; esac"

Test(matrix, a_sweep_shows_clean_and_noisy_scores_beside_each_other) {
    box_pipeline("a.pipe", BOTH, EVAL,
                 "[noise.ops]\ntype = relative_gaussian\n[stage eval]\nalso_noisy = yes\n");
    box_expect(EXIT_DONE, "qerl-pipe matrix a.pipe --sweep noise.ops.scale=0,1e-2,0.5 --seeds 2");
    /* the control has no noise that a second score could have */
    box_has(box_read("runs/a-noise.ops.scale_0-s1-0001/resolved.pipe"), "also_noisy = no");
    box_has(box_read("runs/a-noise.ops.scale_0.5-s1-0001/resolved.pipe"), "also_noisy = yes");
    box_has(box_out.s, "   clean          95 %  difference        interval  reading");
    box_has(box_out.s, "   noisy          95 %  difference        interval  reading");
    box_has(box_out.s, "  0.5                  2     3  100  88.0 %  [80.2, 93.0]        -2.0   "
                       "[-13.7, +9.6]  not distinguishable (two adapters)  30.0 %  [21.9, 39.6]"
                       "       -60.0  [-71.3, -44.1]  worse (two adapters)\n");
    box_has(box_out.s, "fewer than 3 seeds of a value; the difference is that of seed 1, not of");
    box_has(box_out.s, "clean score: no value is worse than 0, within these intervals");
    box_has(box_out.s, "noisy score: the first value that is worse than 0: 0.5\n");
    box_has(box_out.s, "(Bonferroni: 98.75 % each)");
}

Test(matrix, a_sweep_takes_noisy_scores_that_eval_kept) {
    box_pipeline("a.pipe", DOSES, EVAL, "[noise.ops]\ntype = relative_gaussian\n");
    box_expect(EXIT_DONE, "qerl-pipe matrix a.pipe --sweep noise.ops.scale=0,1e-4");
    box_lacks(box_out.s, "noisy");
    /* one of this value, step and seed; others beside it are of other questions */
    box_expect(EXIT_DONE,
               "r=runs/a-noise.ops.scale_1e-4-s1-0001; keep() { mkdir -p $r/eval/$1; "
               "sed -n '$s/\"n\":100,\"right\":[0-9]*/\"n\":100,\"right\":'$2'/; "
               "$s/\"none\"/\"ops x\"/p' $r/scores.jsonl > $r/eval/$1/score.json; }; "
               "keep step000003-noise_0.5-trained-n_run-s1 1; keep step000003-noise_1e-4-trained-n_run-s2 2; "
               "keep step000003-noise_1e-4-bf16-n_run-s1 3; keep step000000-noise_1e-4-trained-n_run-s1 4; "
               "keep step000003-noise_0.0001-trained-n_run-s1 33; "
               "qerl-pipe matrix a.pipe --sweep noise.ops.scale=0,1e-4");
    box_has(box_out.s, "33.0 %");
    box_has(box_out.s, "noisy score: the first value that is worse than 0: 1e-4\n");
}

Test(matrix, wrong_words_start_nothing) {
    box_pipeline("a.pipe", GOOD, EVAL, "");
    box_expect(EXIT_USAGE, "qerl-pipe matrix a.pipe --sweep learner.lr=1");
    box_has(box_talk.s, "--sweep needs two values");
    box_expect(EXIT_USAGE, "qerl-pipe matrix a.pipe --sweep learner.lr=1e-5,1e-6,1e-5");
    box_has(box_talk.s, "--sweep has the value 1e-5 twice");
    box_expect(EXIT_USAGE, "qerl-pipe matrix a.pipe --sweep lr=1,2");
    box_expect(EXIT_USAGE, "qerl-pipe matrix a.pipe --seeds 0");
    box_expect(EXIT_USAGE, "VERL_NOISY_OPS_ENABLED=1 qerl-pipe matrix a.pipe");
    box_expect(EXIT_USAGE, "qerl-pipe matrix a.pipe a.pipe");
    box_has(box_talk.s, "another run of this matrix has the same name");
    cr_assert(!fs_exists("runs"), "something was started");
}
