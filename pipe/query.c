/* query.c - commands that look: describe, status, logs; and stop.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/commands.h"

#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <signal.h>
#include <time.h>

#include "lib/base/fs.h"
#include "pipe/proc.h"
#include "pipe/report.h"
#include "pipe/tail.h"

/* ---- describe ---- */

static void print_key(const struct about_key *k) {
    printf("  %-28s %s\n  %-28s   ", k->name, k->help, "");
    if (k->type == ABOUT_CHOICE) printf("%s", k->choices);
    else printf("%s", about_type_name(k->type));
    if (isfinite(k->least) || isfinite(k->most)) printf(" %.15g..%.15g", k->least, k->most);
    if (!k->def) printf(", must be given\n");
    else printf(", default %s\n", *k->def ? k->def : "empty");
}

static void print_port(const struct about_port *p) {
    printf("  %-3s %-10s %-8s %s%s%s  %s\n", p->output ? "out" : "in", p->name, p->record, p->kind,
           p->bind ? ", binds" : "", p->required ? ", required" : "", p->help);
}

static int describe_stage(const char *name) {
    struct about a;
    struct err e = { 0 };
    char guess[300], path[FS_PATH_MAX];
    snprintf(guess, sizeof guess, strchr(name, '/') ? "%s" : "qerl-%s", name);
    if (proc_find(path, sizeof path, guess) < 0) {
        fprintf(
            stderr,
            "qerl-pipe: there is no stage program '%s': qerl-pipe describe lists those that are "
            "built\n",
            guess);
        return EXIT_ENV;
    }
    if (about_ask(&a, path, &e) < 0) return complain_once(&e, EXIT_FAILED);
    printf("%s: %s\n\nkeys\n", a.name, a.summary);
    for (int i = 0; i < a.keys; i++) print_key(&a.key[i]);
    printf("\nports\n");
    for (int i = 0; i < a.ports; i++) print_port(&a.port[i]);
    about_release(&a);
    return EXIT_DONE;
}

static void describe_launcher(void) {
    printf("\nkeys of the launcher\n"
           "  [run]         name (default: the file's), exp_id, tensorboard, question, hypothesis, "
           "source: text\n"
           "                runs_dir (default runs), stall_seconds (default 300: no progress that "
           "long means a "
           "hang)\n"
           "  [expect]      hypothesis: text; above: an accuracy (.73, 73 %% of 1319) or a run\n"
           "                at: final (default) or best\n"
           "  [stage NAME]  exec (default qerl-NAME beside this program)\n"
           "                place (default cpu:*): gpu:0,1 | cpu:0-1 | cpu:*, the first that the "
           "machine has\n"
           "                replicas (default 1), restarts (default 3 per completed step)\n"
           "                in.PORT, out.PORT: zmq+ipc://PATH, zmq+tcp://HOST:PORT, tape:FILE, "
           "file:FILE.jsonl\n"
           "\nall keys of a stage: qerl-pipe describe STAGE\n");
}

static int describe_all(void) {
    static const char *const known[] = { "rollout", "reward", "learner", "eval" };
    char path[FS_PATH_MAX], name[64];
    for (size_t i = 0; i < COUNT_OF(known); i++) {
        struct about a;
        struct err e = { 0 };
        snprintf(name, sizeof name, "qerl-%s", known[i]);
        if (proc_find(path, sizeof path, name) < 0) {
            printf("%-9s not built\n", known[i]);
        } else if (about_ask(&a, path, &e) < 0) {
            printf("%-9s %s\n", known[i], e.text);
        } else {
            printf("%-9s %s\n", a.name, a.summary);
            for (int j = 0; j < a.ports; j++) print_port(&a.port[j]);
            about_release(&a);
        }
    }
    describe_launcher();
    return EXIT_DONE;
}

int command_describe(const struct command_line *c) {
    return c->words ? describe_stage(c->word[0]) : describe_all();
}

/* ---- status ---- */

int command_status(const struct command_line *c) {
    struct folder f;
    struct err e = { 0 };
    if (c->words) {
        if (folder_find(&f, c->runs_dir, c->word[0], &e) < 0) return complain_once(&e, EXIT_USAGE);
        report_status(&f, true, stdout);
        return EXIT_DONE;
    }
    char **ids;
    int n = folder_list(c->runs_dir, &ids);
    for (int i = 0; i < n; i++) {
        if (folder_find(&f, c->runs_dir, ids[i], NULL) == 0) report_status(&f, false, stdout);
        free(ids[i]);
    }
    free(ids);
    if (!n)
        fprintf(stderr, "no runs in '%s'; start one: qerl-pipe pipelines/quickstart.pipe\n",
                c->runs_dir);
    return EXIT_DONE;
}

/* ---- logs ---- */

enum { LOGS_MAX = 64 };

static int compare_names(const void *a, const void *b) { return strcmp(a, b); }

/* Names of the log files, "learner.log"; of one stage only if asked ("rollout" also means
 * "rollout-1"). */
static int list_logs(const char *dir, const char *stage, char name[LOGS_MAX][200]) {
    DIR *d = opendir(dir);
    int n = 0;
    for (struct dirent *entry; d && n < LOGS_MAX && (entry = readdir(d));) {
        size_t len = strlen(entry->d_name), want = stage ? strlen(stage) : 0;
        if (!str_ends(entry->d_name, ".log") || len >= 200) continue;
        if (stage &&
            (strncmp(entry->d_name, stage, want) != 0 || !strchr(".-", entry->d_name[want])))
            continue;
        memcpy(name[n++], entry->d_name, len + 1);
    }
    if (d) closedir(d);
    qsort(name, (size_t)n, sizeof name[0], compare_names);
    return n;
}

int command_logs(const struct command_line *c) {
    static char name[LOGS_MAX][200];
    static struct tail tail[LOGS_MAX];
    struct folder f;
    struct err e = { 0 };
    char dir[FS_PATH_MAX], path[FS_PATH_MAX];
    if (folder_find(&f, c->runs_dir, c->word[0], &e) < 0) return complain_once(&e, EXIT_USAGE);
    fs_join(dir, sizeof dir, f.dir, "log");
    int n = list_logs(dir, c->words > 1 ? c->word[1] : NULL, name);
    if (!n) {
        fprintf(stderr, "qerl-pipe: no log%s%s in '%s'\n", c->words > 1 ? " of stage " : "",
                c->words > 1 ? c->word[1] : "", dir);
        return EXIT_USAGE;
    }
    for (int i = 0; i < n; i++) {
        fs_join(path, sizeof path, dir, name[i]);
        tail_open(&tail[i], path, false);
        name[i][strlen(name[i]) - 4] = 0;
    }
    for (bool more = true; more;) {
        /* asked before reading: nothing is missed at the end */
        bool held = folder_holder(&f) != 0;
        for (int i = 0; i < n; i++)
            while (tail_next(&tail[i]))
                printf("%s%s%s\n", n > 1 ? name[i] : "", n > 1 ? ": " : "",
                       tail[i].line.s ? tail[i].line.s : "");
        fflush(stdout);
        more = c->follow && held;
        if (more) nanosleep(&(struct timespec){ .tv_nsec = 200000000 }, NULL);
    }
    for (int i = 0; i < n; i++) tail_close(&tail[i]);
    return EXIT_DONE;
}

/* ---- stop ---- */

int command_stop(const struct command_line *c) {
    struct folder f;
    struct err e = { 0 };
    char reason[600];
    if (folder_find(&f, c->runs_dir, c->word[0], &e) < 0) return complain_once(&e, EXIT_USAGE);
    int64_t pid = folder_holder(&f);
    if (pid <= 1) {
        fprintf(stderr, "qerl-pipe: no process works on '%s'\n", f.dir);
        return EXIT_FAILED;
    }
    if (kill((pid_t)pid, SIGTERM) < 0) {
        fprintf(stderr, "qerl-pipe: cannot stop process %lld: %s\n", (long long)pid,
                strerror(errno));
        return EXIT_FAILED;
    }
    for (int i = 0; i < 600 && folder_holder(&f); i++)
        nanosleep(&(struct timespec){ .tv_nsec = 100000000 }, NULL);
    if (folder_holder(&f)) {
        fprintf(stderr, "qerl-pipe: '%s' is still worked on after 60 s; see: qerl-pipe logs %s\n",
                f.dir, f.dir);
        return EXIT_FAILED;
    }
    enum run_state s = folder_state(&f, reason, sizeof reason);
    fprintf(stderr, "run %s is %s%s%s\n", f.dir, run_state_name[s], *reason ? ": " : "", reason);
    return EXIT_DONE;
}
