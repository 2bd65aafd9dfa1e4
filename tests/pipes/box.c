/* box.c - see box.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/pipes/box.h"

#include <stdarg.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lib/base/fs.h"

struct str box_out, box_talk;
static char dir[64], programs[FS_PATH_MAX], root[FS_PATH_MAX];
static struct str text;

/* This program is ROOT/obj[-san]/tests/pipes/run; the launcher is ROOT/bin[-san]/qerl-pipe. */
static void find_programs(void) {
    ssize_t n = readlink("/proc/self/exe", root, sizeof root - 1);
    cr_assert(n > 0);
    root[n] = 0;
    char *obj = strstr(root, "/obj");
    for (char *next; obj && (next = strstr(obj + 1, "/obj"));) obj = next;
    cr_assert(obj, "'%s' does not lie in ROOT/obj", root);
    bool san = str_starts(obj, "/obj-san/");
    *obj = 0;
    fs_join(programs, sizeof programs, root, san ? "bin-san" : "bin");
}

void box_open(void) {
    static const char *const stage[] = { "rollout", "reward", "learner", "eval" };
    find_programs();
    snprintf(dir, sizeof dir, "/tmp/qerl-box-XXXXXX");
    cr_assert(mkdtemp(dir) && chdir(dir) == 0 && mkdir("bin", 0755) == 0);
    for (size_t i = 0; i < COUNT_OF(stage); i++) {
        char from[FS_PATH_MAX], to[64];
        fs_join(from, sizeof from, root, "tests/pipes/fake-stage");
        snprintf(to, sizeof to, "bin/qerl-%s", stage[i]);
        cr_assert_eq(symlink(from, to), 0);
    }
    box_file("q.jsonl", "{}\n{}\n");
}

void box_close(void) {
    str_release(&box_out);
    str_release(&box_talk);
    str_release(&text);
    if (*dir && chdir("/") == 0) fs_remove_tree(dir, NULL);
}

void box_file(const char *name, const char *content) {
    FILE *f = fopen(name, "w");
    cr_assert(f);
    fputs(content, f);
    fclose(f);
}

int box_run(const char *fmt, ...) {
    char words[2048], command[4096];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(words, sizeof words, fmt, ap);
    va_end(ap);
    snprintf(command, sizeof command, "PATH='%s':$PATH; { %s\n} >.out 2>.talk", programs, words);
    int w = system(command);
    cr_assert(fs_read(&box_out, ".out", 1 << 22, NULL) == 0 &&
              fs_read(&box_talk, ".talk", 1 << 22, NULL) == 0);
    return WIFEXITED(w) ? WEXITSTATUS(w) : 255;
}

char *box_read(const char *name) {
    str_clear(&text);
    str_add(&text, "", 0);
    fs_read(&text, name, 1 << 22, NULL);
    return text.s;
}

void box_pipeline(const char *name, const char *learner_do, const char *eval_do,
                  const char *extra) {
    struct str s;
    str_init(&s);
    str_printf(&s,
               "pipe 1\n"
               "[stage learner]\nexec = bin/qerl-learner\ntrain = q.jsonl\ndo = %s\n"
               "[stage rollout]\nexec = bin/qerl-rollout\ndo = start; trap 'exit 0' TERM; while :; "
               "do sleep "
               "0.05; done\n"
               "[stage reward]\nexec = bin/qerl-reward\ndo = start; trap 'exit 0' TERM; while :; "
               "do sleep 0.05; "
               "done\n"
               "[stage eval]\nexec = bin/qerl-eval\ndo = %s\n"
               "[links]\n"
               "learner.ticket -> rollout.ticket : router/dealer\n"
               "rollout.traj -> reward.traj : push/pull hwm=64\n"
               "reward.group -> learner.group : push/pull\n"
               "learner.adapter -> rollout.adapter : pub/sub\n"
               "learner.adapter -> eval.adapter : pub/sub\n%s",
               learner_do, eval_do, extra);
    box_file(name, s.s);
    str_release(&s);
}
