/* rescore.c - scores recorded answers again: qerl-eval reads them, no model is needed.
 *
 * The evaluator's configuration comes from the run itself, so that nothing but the rule changes;
 * for a bare file only the evaluator's defaults hold.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/commands.h"

#include "lib/base/fs.h"
#include "pipe/folder.h"
#include "pipe/proc.h"

void eval_of_run(const struct folder *f, char *exec, size_t size) {
    char path[FS_PATH_MAX];
    struct lang l;
    fs_join(path, sizeof path, f->dir, "resolved.pipe");
    lang_read(&l, path, NULL, 0);
    const struct lang_value *v = lang_get(&l, "eval.exec");
    char found[FS_PATH_MAX];
    if (v && proc_find(found, sizeof found, v->text) == 0) snprintf(exec, size, "%s", found);
    lang_release(&l);
}

static int eval_answers(const char *exec, const char *answers, const char *rule) {
    struct str set, how;
    struct err e = { 0 };
    str_init(&set);
    str_init(&how);
    str_printf(&set, "eval.answers=%s", answers);
    if (rule) str_printf(&how, "eval.rule=%s", rule);
    const char *argv[] = { exec, "--set", set.s, rule ? "--set" : NULL, how.s, NULL };
    int status = proc_through(argv, &e);
    str_release(&set);
    str_release(&how);
    return status < 0 ? complain_once(&e, EXIT_ENV) : status;
}

int command_rescore(const struct command_line *c) {
    char exec[FS_PATH_MAX] = "", path[FS_PATH_MAX];
    struct folder f;
    struct err e = { 0 };
    static const char *const rule[] = { "strict", "flexible", "lm-strict", "lm-flexible" };
    bool known = !c->rule;
    for (size_t i = 0; i < COUNT_OF(rule); i++) known = known || strcmp(c->rule, rule[i]) == 0;
    if (!known) {
        fprintf(stderr,
                "qerl-pipe: unknown rule '%s': strict, flexible, lm-strict or lm-flexible\n",
                c->rule);
        return EXIT_USAGE;
    }
    if (proc_find(exec, sizeof exec, "qerl-eval") < 0) exec[0] = 0;
    bool file = fs_exists(c->word[0]) && !fs_is_dir(c->word[0]);
    if (!file) {
        if (folder_find(&f, c->runs_dir, c->word[0], &e) < 0) return complain_once(&e, EXIT_USAGE);
        eval_of_run(&f, exec, sizeof exec);
        fs_join(path, sizeof path, f.dir, "tape/answers.tape");
        if (!fs_exists(path)) {
            fprintf(stderr, "qerl-pipe: run '%s' has no answers in '%s': was anything scored?\n",
                    f.id, path);
            return EXIT_FAILED;
        }
    }
    if (!exec[0]) {
        fprintf(
            stderr,
            "qerl-pipe: there is no program 'qerl-eval' beside this one: build it with 'make'\n");
        return EXIT_ENV;
    }
    return eval_answers(exec, file ? c->word[0] : path, c->rule);
}
