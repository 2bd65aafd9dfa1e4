/* language.c - the .pipe language through `qerl-pipe check`: what is refused, in which words, and
 * what is inherited.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/pipes/box.h"

TestSuite(language, .init = box_open, .fini = box_close, .timeout = 60);

#define GOOD "start; score 0 10; score 3 50"
#define WHOLE "start; sleep 0.1"

/* One row: lines added to a good file, the line number of the mistake among them, and what must be
 * said. */
static const struct mistake {
    const char *lines;
    int line;
    const char *message;
} mistakes[] = {
    { "[stage learner]\nlora.rnk = 8\n", 2,
      "unknown key 'lora.rnk' of stage 'learner'; did you mean "
      "'learner.lora.rank'?" },
    { "[run]\nnmae = x\n", 2,
      "unknown key 'nmae' in [run]: no stage of this file reads it; did you mean "
      "'run.name'?" },
    { "[noise.none]\nrelative = 5e-2\n", 2,
      "unknown section [noise.none] with key 'relative': no stage of this "
      "file reads it" },
    { "[run]\nid = mine\n", 2, "'run.id' is set by the launcher for each run: remove it" },
    { "[stage learner]\nlr = fast\n", 2, "'fast' for 'learner.lr' is not a number" },
    { "[stage learner]\nlr = 2\n", 2, "'2' for 'learner.lr' is outside 0 .. 1" },
    { "[stage learner]\nlora.rank = 8.5\n", 2,
      "'8.5' for 'learner.lora.rank' is not a whole number" },
    { "[stage learner]\nlora.rank = 8 MiB\n", 2,
      "unknown unit 'MiB' in '8 MiB' for 'learner.lora.rank': it "
      "takes a plain number" },
    { "[stage learner]\nwait_seconds = 2 fortnights\n", 2,
      "unknown unit 'fortnights' in '2 fortnights' for "
      "'learner.wait_seconds': it takes s, ms, min, h" },
    { "[stage learner]\nlr = 5 s\n", 2, "unknown unit 's' in '5 s' for 'learner.lr': it takes %" },
    { "[stage learner]\nflag = perhaps\n", 2,
      "'perhaps' for 'learner.flag' is neither true nor false" },
    { "[quant]\nweights = mxfp5\n", 2,
      "'mxfp5' for 'quant.weights' is not one of bf16|mxfp4; did you mean "
      "'mxfp4'?" },
    { "[run]\nsteps = 0\n", 2, "'0' for 'run.steps' is outside 1 .. 1000" },
    { "[run]\nname = a/b\n", 2, "'a/b' cannot name a run" },
    { "[stage learner]\nreplicas = 0\n", 2,
      "'0' for 'learner.replicas' is not a whole number from 1 to 16" },
    { "[stage reward]\nreplicas = 2\n", -1,
      "stage 'reward' waits for connections on 'traj', so it cannot have "
      "2 replicas" },
    { "[stage learner]\nplace = tpu:0\n", 2,
      "stage 'learner': place 'tpu:0' is neither gpu:N nor cpu:N" },
    { "[stage learner]\nplace = cpu:0-x\n", 2,
      "stage 'learner': place 'cpu:0-x': write numbers up to" },
    { "[stage learner]\nplace = gpu:a | cpu:*\n", 2,
      "stage 'learner': place 'gpu:a': write numbers up to 63 and ranges, as in 'gpu:0-1,3'" },
    { "[stage learner]\nplace = gpu:0,0 | cpu:*\n", 2,
      "stage 'learner': place 'gpu:0,0' names GPU 0 twice: write each once, as in 'gpu:0-1,3'" },
    { "[stage learner]\nplace = cpu:0-1,1\n", 2, "stage 'learner': place 'cpu:0-1,1' names core 1 twice" },
    { "[stage learner]\nplace = cpu:0 |\n", 2,
      "stage 'learner': place 'cpu:0 |' has an empty alternative: write one on each side" },
    { "[stage learner]\nplace = | cpu:0\n", 2, "stage 'learner': place '| cpu:0' has an empty alternative" },
    { "[stage learner]\nplace = gpu:0 || cpu:0\n", 2,
      "stage 'learner': place 'gpu:0 || cpu:0' has an empty alternative" },
    { "[stage learner]\nplace = gpu:1 | cpu:*\n[stage rollout]\nplace = gpu:0-1 | cpu:*\n", 4,
      "stages 'learner' and 'rollout' are both placed on GPU 1: one stage per GPU" },
    { "[stage rollout]\nplace = gpu:0-1 | cpu:*\nreplicas = 3\n", 2,
      "stage 'rollout' has 3 replicas on 2 GPUs: it gets one process for each GPU, remove "
      "replicas" },
    { "[stage rollout]\nplace = gpu:3 | cpu:*\nreplicas = 2\n", 2,
      "stage 'rollout' has 2 replicas on 1 GPU: it gets" },
    { "[stage lerner]\n", 1,
      "stage 'lerner': there is no program 'qerl-lerner': build it with 'make', or set exec" },
    { "lerner.ticket -> rollout.ticket : router/dealer\n", 1,
      "unknown stage 'lerner' in a link; did you mean 'learner'?" },
    { "learner.tiket -> rollout.ticket : router/dealer\n", 1,
      "stage 'learner' has no port 'tiket'; did you mean 'ticket'?" },
    { "rollout.traj -> learner.group : push/pull\n", 1,
      "'rollout.traj' carries traj, 'learner.group' reads "
      "group: these ports cannot be linked" },
    { "rollout.traj -> reward.traj : pub/sub\n", 1,
      "the link says pub/sub, but these ports are push/pull" },
    { "reward.traj -> reward.traj : push/pull\n", 1,
      "'reward.traj' is an input: a link goes from an output to "
      "an input" },
    { "rollout.traj -> reward.traj : push/pull hmw=3\n", 1,
      "unknown link option 'hmw=3'; a link has credit=N "
      "and hwm=N" },
    { "rollout.traj -> reward.traj : push/pull hwm=0\n", 1,
      "'hwm=0' is not a whole number from 1 to 4096" },
    { "rollout.traj -> reward.traj : push/pull hwm=8\n", 1,
      "'hwm=8' is read by neither 'rollout' nor 'reward': "
      "remove it" },
    { "rollout.traj -> reward.traj\n", 1, "link without socket kinds" },
    { "rollout.traj reward.traj\n", 1, "'rollout.traj reward.traj' is not a link" },
    { "unset reward.group -> learner.group\n", -1,
      "port 'reward.group' is open: link it in [links], or set "
      "out.group = URL" },
    { "[stage eval]\nin.adaptor = tape:x\n", 2,
      "stage 'eval' has no port 'adaptor'; did you mean 'adapter'?" },
    { "[stage eval]\nout.adapter = tape:x\n", 2,
      "port 'adapter' of stage 'eval' is an input: write in.adapter" },
    { "[stage learner]\nlr\n", 2,
      "'lr' is not a statement: write 'key = value', 'key += value' or 'unset key'" },
    { "[stage learner]\nlr = 0.1\nlr = 0.2\n", 3,
      "'learner.lr' is set twice in this file, first in line" },
    { "[stage learner]\nunset lrr\n", 2, "cannot unset 'learner.lrr': nothing before set it" },
    { "[run\nname = x\n", 1, "section '[run' does not end with ']'" },
    { "[stage]\n", 1, "'' cannot name a stage" },
    { "[run]\nbase other.pipe\n", 2, "'base' must stand before the first section" },
};

static int lines_of(const char *name) {
    int n = 0;
    for (const char *c = box_read(name); *c; c++) n += *c == '\n';
    return n;
}

Test(language, each_mistake_is_named_with_its_line) {
    box_pipeline("good.pipe", GOOD, WHOLE, "");
    box_expect(0, "qerl-pipe check good.pipe");
    int before = lines_of("good.pipe");
    for (size_t i = 0; i < COUNT_OF(mistakes); i++) {
        const struct mistake *m = &mistakes[i];
        char where[300];
        box_pipeline("bad.pipe", GOOD, WHOLE, m->lines);
        int code = box_run("qerl-pipe run bad.pipe");
        cr_expect(code == 3 || (code == 4 && strstr(m->message, "no program")),
                  "row %zu: exit code %d\n%s", i, code, box_talk.s);
        snprintf(where, sizeof where, "bad.pipe:%d: %s", before + m->line, m->message);
        cr_expect(strstr(box_talk.s, m->line < 0 ? m->message : where), "row %zu: no '%s' in:\n%s",
                  i, where, box_talk.s);
        cr_expect_eq(box_run("test ! -e runs"), 0, "row %zu: a run folder was made", i);
    }
}

Test(language, all_errors_come_in_one_pass_sorted_by_line) {
    box_pipeline("bad.pipe", GOOD, WHOLE,
                 "[run]\nstepz = 1\nsteps = -1\n[stage learner]\nlr = x\nplace = cpu:900\n");
    box_expect(3, "qerl-pipe check bad.pipe --set quant.weights=fp3 --set learner.bogus=1");
    const char *order[] = { "'stepz'", "'-1'", "'x' for", "'cpu:900'", "--set: unknown key 'bogus'",
                            "--set: 'fp3'", "6 errors" };
    const char *at = box_talk.s;
    for (size_t i = 0; i < COUNT_OF(order); i++) {
        at = strstr(at, order[i]);
        cr_assert(at, "'%s' is missing or out of order in:\n%s", order[i], box_talk.s);
    }
}

Test(language, first_line_and_odd_files) {
    box_file("a.pipe", "[run]\nname = x\n");
    box_expect(3, "qerl-pipe check a.pipe");
    box_has(box_talk.s, "a.pipe:1: a .pipe file starts with the line 'pipe 1', not with '[run]'");
    box_file("a.pipe", "pipe 2\n");
    box_expect(3, "qerl-pipe check a.pipe");
    box_has(box_talk.s, "a.pipe:1: 'pipe 2': this program reads 'pipe 1'");
    box_file("a.pipe", "# nothing\n");
    box_expect(3, "qerl-pipe check a.pipe");
    box_has(box_talk.s, "empty file");
    box_expect(3, "printf 'pipe 1\\n[run]\\nname = \\377\\n' > a.pipe; qerl-pipe check a.pipe");
    box_has(box_talk.s, "a.pipe:3: not UTF-8 text");
    box_expect(3, "qerl-pipe check absent.pipe");
    box_has(box_talk.s, "cannot read 'absent.pipe': No such file");
    box_expect(2, "qerl-pipe chek a.pipe");
    box_has(box_talk.s, "did you mean 'check'?");
    box_expect(2, "qerl-pipe check");
    box_expect(2, "qerl-pipe status --set a.b=c");
}

Test(language, base_files_override_append_and_unset) {
    box_pipeline("parts.pipe", GOOD, WHOLE,
                 "[stage learner]\nlr = 0.25\nlora.rank = 8\n[run]\nquestion = "
                 "one\nsteps = 7\n");
    box_file("child.pipe",
             "pipe 1\nbase parts.pipe   # inherit\n[stage learner]\nlr = 50 %   # replaces one "
             "value\nunset lora.rank\n[run]\nquestion += two\n");
    box_expect(0, "qerl-pipe run child.pipe --set run.steps=3");
    const char *s = box_read("runs/child-0001/resolved.pipe");
    box_has(s, "lr = 50 %                                    # child.pipe:4");
    box_has(s, "lora.rank = 32                               # default");
    box_has(s, "question = one two                           # child.pipe:7");
    box_has(s, "steps = 3                                    # --set");
    box_has(box_read("runs/child-0001/conf/learner.conf"), "learner.lr = 0.5\n");
}

Test(language, base_is_relative_to_its_file_and_has_no_circles) {
    box_expect(0, "mkdir -p deep/parts");
    box_pipeline("deep/parts/all.pipe", GOOD, WHOLE, "");
    box_file("deep/x.pipe", "pipe 1\nbase parts/all.pipe\n");
    box_expect(0, "qerl-pipe check deep/x.pipe");
    box_file("deep/y.pipe", "pipe 1\nbase z.pipe\n");
    box_file("deep/z.pipe", "pipe 1\nbase y.pipe\n");
    box_expect(3, "qerl-pipe check deep/y.pipe");
    box_has(box_talk.s,
            "deep/z.pipe:2: 'base deep/y.pipe' leads back to a file that is being read");
    box_file("deep/y.pipe", "pipe 1\nbase nowhere.pipe\n");
    box_expect(3, "qerl-pipe check deep/y.pipe");
    box_has(box_talk.s, "deep/y.pipe:2: cannot read base file 'deep/nowhere.pipe'");
    box_expect(
        3, "for i in 1 2 3 4 5 6 7 8 9 10 11; do printf 'pipe 1\\nbase n%%d.pipe\\n' $((i+1)) > "
           "n$i.pipe; done; qerl-pipe check n1.pipe");
    box_has(box_talk.s, "nested more than 8 deep");
}

Test(language, a_value_may_hold_hashes_and_units_become_plain_numbers) {
    box_pipeline("a.pipe", GOOD, WHOLE,
                 "[run]\nquestion = after \"####\" comes#the number # and this is a "
                 "comment\n[stage eval]\nwait_seconds = 1.5 min\nflag = off\n");
    box_expect(0, "qerl-pipe run a.pipe");
    box_has(box_read("runs/a-0001/resolved.pipe"), "question = after \"####\" comes#the number ");
    box_has(box_read("runs/a-0001/conf/eval.conf"), "eval.wait_seconds = 90\n");
    box_has(box_read("runs/a-0001/conf/eval.conf"), "eval.flag = false\n");
}

/* The resolved file, read again, gives the same resolved file but for the origins. */
Test(language, the_resolved_file_reproduces_itself) {
    box_pipeline("a.pipe", GOOD, WHOLE,
                 "[run]\nname = first\nexp_id = E1\n[noise.aqn]\nsigma_start = "
                 "5e-2\n[stage rollout]\nlr = 1e-3\n");
    box_expect(0, "qerl-pipe run a.pipe --set run.steps=3 --set quant.weights=bf16");
    box_expect(0, "cp runs/first-0001/resolved.pipe again.pipe && qerl-pipe run again.pipe");
    box_expect(
        0,
        "for n in 1 2; do sed 's/  *# .*$//' runs/first-000$n/resolved.pipe > $n; done; diff 1 2");
    box_expect(
        0,
        "for s in learner rollout reward eval; do for n in 1 2; do grep -v -e '^in' -e '^out' -e "
        "'^run.[di]' "
        "runs/first-000$n/conf/$s.conf > $n; done; diff 1 2 || exit 1; done");
}

Test(language, a_stage_under_another_name_takes_its_own_keys) {
    box_pipeline("a.pipe", GOOD, WHOLE,
                 "learner.adapter -> second.adapter : pub/sub\n"
                 "[stage second]\nexec = bin/qerl-eval\nlr = 0.75\ndo = start; sleep 0.1\n[stage "
                 "eval]\nlr = 0.5\n");
    box_expect(0, "qerl-pipe run a.pipe");
    box_has(box_read("runs/a-0001/conf/second.conf"), "eval.lr = 0.75\n");
    box_has(box_read("runs/a-0001/conf/eval.conf"), "eval.lr = 0.5\n");
}

Test(language, a_stage_refusal_is_shown_at_the_line_that_caused_it) {
    box_pipeline("a.pipe", GOOD, WHOLE, "");
    box_expect(3, "sed -i 's/^train = .*/train = refuse/' a.pipe; qerl-pipe check a.pipe");
    box_has(box_talk.s, "a.pipe:4: the training questions refuse");
    box_has(box_talk.s, "stage 'learner' refuses this configuration");
}
