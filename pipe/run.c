/* run.c - the commands check, run and resume: from a file to a finished run folder.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/commands.h"

#include <dirent.h>
#include <errno.h>
#include <unistd.h>

#include "lib/base/fs.h"
#include "pipe/report.h"
#include "pipe/supervise.h"

/* Reads and checks; prints every error. 0, or the exit code. */
static int load(struct pipeline *p, const char *path, const char *const *sets, int n) {
    pipeline_load(p, path, sets, n);
    if (!p->code) return 0;
    struct str text;
    str_init(&text);
    lang_print_errors(&p->lang, &text);
    fputs(text.s, stderr);
    fprintf(stderr, "qerl-pipe: %d error%s in '%s'; nothing was started\n", p->lang.errors,
            p->lang.errors == 1 ? "" : "s", path);
    str_release(&text);
    return p->code;
}

static int ask(struct plan *pl, struct pipeline *p, const struct folder *f) {
    struct str talk;
    struct err e = { 0 };
    int code = 0;
    str_init(&talk);
    if (plan_ask(pl, p, f->dir, f->id, &talk, &e) < 0) {
        if (talk.s) fputs(talk.s, stderr);
        code = complain_once(&e, EXIT_FAILED);
    }
    str_release(&talk);
    return code;
}

int command_check(const struct command_line *c) {
    struct pipeline p;
    struct plan pl = { 0 };
    struct folder f;
    struct err e = { 0 };
    int code = load(&p, c->word[0], c->set, c->sets);
    if (!code) {
        folder_next(&f, p.runs_dir, p.name);
        code = ask(&pl, &p, &f);
        if (!code) plan_print(&pl, &p, stdout);
        if (!code && plan_room(&pl, &p, &e) < 0) code = complain_once(&e, EXIT_ENV);
    }
    plan_release(&pl);
    pipeline_release(&p);
    return code;
}

static void tell_state(const struct folder *f, const struct outcome *o) {
    fprintf(stderr, "run %s is %s%s%s\n", f->dir, run_state_name[o->state], *o->reason ? ": " : "",
            o->reason);
    if (o->state != RUN_STATE_DONE) fprintf(stderr, "go on with: qerl-pipe resume %s\n", f->dir);
}

/* The part that run and resume share: sockets, processes, state, report. f is locked. */
static int work(const struct folder *f, struct pipeline *p, const struct plan *pl,
                const char *runs_dir) {
    char ipc[] = "/tmp/qerl-XXXXXX";
    struct outcome o = { RUN_STATE_FAILED, EXIT_ENV, "" };
    struct err e = { 0 };
    /* mode 0700: nobody else reaches the sockets */
    if (!mkdtemp(ipc)) {
        err_code(&e, EXIT_ENV, "cannot make a folder in /tmp: %s", strerror(errno));
        return complain_once(&e, EXIT_ENV);
    }
    folder_note_sockets(f, ipc);
    pipeline_conf(p, f->dir, f->id, ipc);
    if (folder_write_conf(f, p, &e) == 0 && folder_set_state(f, RUN_STATE_RUNNING, "", &e) == 0)
        supervise(&o, p, pl, f, ipc);
    else snprintf(o.reason, sizeof o.reason, "%.500s", e.text);
    fs_remove_tree(ipc, NULL);
    e = (struct err){ 0 };
    if (folder_set_state(f, o.state, o.reason, &e) < 0) complain_once(&e, 0);
    tell_state(f, &o);
    if (report_summary(runs_dir, &e) < 0) complain_once(&e, 0);
    if (o.state == RUN_STATE_DONE || o.state == RUN_STATE_INCOMPLETE) report_results(f, stdout);
    return o.code;
}

int command_run(const struct command_line *c) {
    struct pipeline p;
    struct plan pl = { 0 };
    struct folder f = { .lock_fd = -1 };
    struct err e = { 0 };
    int code = load(&p, c->word[0], c->set, c->sets);
    if (!code) {
        folder_next(&f, p.runs_dir, p.name);
        code = ask(&pl, &p, &f);
    }
    if (!code && plan_absent(&pl)) {
        plan_print_absent(&pl, stderr);
        code = EXIT_ENV;
    }
    if (!code && (plan_room(&pl, &p, &e) < 0 || plan_disk(&pl, &p, &e) < 0))
        code = complain_once(&e, EXIT_ENV);
    if (!code && folder_create(&f, p.runs_dir, p.name, &e) < 0) code = complain_once(&e, EXIT_ENV);
    if (!code) {
        fprintf(stderr, "run %s: %lld steps, %d stages; stop with Ctrl-C or: qerl-pipe stop %s\n",
                f.dir, (long long)(pl.steps < 0 ? 0 : pl.steps), p.stages, f.dir);
        if (folder_write(&f, &p, &pl, c->argv, &e) < 0) {
            code = complain_once(&e, EXIT_ENV);
            folder_set_state(&f, RUN_STATE_FAILED, e.text, NULL);
        } else {
            code = work(&f, &p, &pl, p.runs_dir);
        }
    }
    folder_unlock(&f);
    plan_release(&pl);
    pipeline_release(&p);
    return code;
}

/* ---- resume ---- */

void folder_enter(struct folder *f) {
    char path[FS_PATH_MAX], *real = realpath(f->dir, NULL);
    fs_join(path, sizeof path, f->dir, "manifest.json");
    json_t *o = json_parse_file(path, 1 << 22, NULL);
    const char *cwd = json_string_value(json_object_get(o, "cwd"));
    char here[FS_PATH_MAX] = "";
    if (real && strlen(real) < sizeof f->dir && cwd && getcwd(here, sizeof here) &&
        strcmp(here, cwd) != 0 && chdir(cwd) == 0) {
        fprintf(stderr, "qerl-pipe: working in '%s', where the run was started\n", cwd);
        snprintf(f->dir, sizeof f->dir, "%s", real);
    }
    json_decref(o);
    free(real);
}

static int same_things(const struct command_line *c, const struct folder *f,
                       const struct pipeline *p, const struct plan *pl) {
    struct str differences;
    struct err e = { 0 };
    int code = 0;
    str_init(&differences);
    if (folder_compare(f, p, pl, &differences, &e) < 0) code = complain_once(&e, EXIT_FAILED);
    if (!code && differences.len) {
        fputs(differences.s, stderr);
        if (!c->force) {
            fprintf(
                stderr,
                "qerl-pipe: going on would mix two experiments; --force-different does it all the "
                "same\n");
            code = EXIT_FAILED;
        }
    }
    str_release(&differences);
    return code;
}

/* Step of the newest checkpoint; 0 = none. */
static int64_t newest_checkpoint(const struct folder *f) {
    char path[FS_PATH_MAX];
    int64_t newest = 0;
    fs_join(path, sizeof path, f->dir, "ckpt");
    DIR *d = opendir(path);
    for (struct dirent *entry; d && (entry = readdir(d));) {
        const char *digits = entry->d_name + strlen("step-");
        int64_t step;
        if (str_starts(entry->d_name, "step-") && str_to_i64(digits + strspn(digits, "0"), &step) &&
            step > newest)
            newest = step;
    }
    if (d) closedir(d);
    return newest;
}

/* Steps that the checkpoint does not hold were made, and are made again. */
static void tell_going_on(const struct folder *f, const struct plan *pl, int stages) {
    const int64_t steps = pl->steps < 0 ? 0 : pl->steps, kept = newest_checkpoint(f);
    int64_t made = 0;
    json_t *last = report_last_metrics(f);
    json_may_int(last, "step", &made, 0, INT64_MAX, "metrics", NULL);
    json_decref(last);
    fprintf(stderr, "run %s goes on after step %lld of %lld (its newest checkpoint), %d stages\n",
            f->dir, (long long)kept, (long long)steps, stages);
    if (made > kept)
        fprintf(stderr, "%lld step%s made again: %lld to %lld came after the checkpoint "
                        "(learner.save_every); the results are the same\n",
                (long long)(made - kept), made == kept + 1 ? " is" : "s are", (long long)(kept + 1),
                (long long)made);
}

static int resume_locked(const struct command_line *c, struct folder *f) {
    char path[FS_PATH_MAX], runs[600];
    struct pipeline p;
    struct plan pl = { 0 };
    struct err e = { 0 };
    fs_join(path, sizeof path, f->dir, "resolved.pipe");
    int code = load(&p, path, NULL, 0);
    if (!code) code = ask(&pl, &p, f);
    if (!code && plan_absent(&pl)) {
        plan_print_absent(&pl, stderr);
        code = EXIT_ENV;
    }
    if (!code) code = same_things(c, f, &p, &pl);
    if (!code && (plan_room(&pl, &p, &e) < 0 || plan_disk(&pl, &p, &e) < 0))
        code = complain_once(&e, EXIT_ENV);
    snprintf(runs, sizeof runs, "%s", f->dir);
    char *slash = strrchr(runs, '/');
    if (slash) *slash = 0;
    else snprintf(runs, sizeof runs, ".");
    if (!code) {
        tell_going_on(f, &pl, p.stages);
        code = work(f, &p, &pl, runs);
    }
    plan_release(&pl);
    pipeline_release(&p);
    return code;
}

int command_resume(const struct command_line *c) {
    struct folder f;
    struct err e = { 0 };
    if (folder_find(&f, c->runs_dir, c->word[0], &e) < 0) return complain_once(&e, EXIT_USAGE);
    folder_enter(&f);
    if (folder_lock(&f, &e) < 0) return complain_once(&e, EXIT_FAILED);
    int code = 0;
    if (folder_state(&f, NULL, 0) == RUN_STATE_DONE) {
        fprintf(stderr, "run %s is done already; nothing to go on with\n", f.dir);
        report_results(&f, stdout);
    } else {
        code = resume_locked(c, &f);
    }
    folder_unlock(&f);
    return code;
}
