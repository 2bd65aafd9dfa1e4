/* stage_life.c - a stage seen from outside: exit codes, messages, precedence, readiness, beats,
 * signals, stdin and stdout.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/stage/stage.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "lib/base/log.h"
#include "tests/unit/wire_dir.h"

enum { ARGS_MAX = 32 };

static struct wire_dir dir;
static void start(void) {
    wire_dir_init(&dir);
    log_open("test", LOG_LEVEL_ERROR);
}
static void stop(void) { wire_dir_release(&dir); }
TestSuite(stages, .init = start, .fini = stop, .timeout = 60);

struct run {
    pid_t pid;
    int in, out, err;          /* our ends */
    int code;                  /* exit code, or -signal */
    struct str said, shown;    /* stderr, stdout */
};

/* Starts the echo stage with the words of `line` (no quoting) as its arguments. extra_fd is kept
 * open, -1 = none. */
static struct run spawn(const char *line, int extra_fd) {
    struct run r = { 0 };
    int in[2], out[2], err[2];
    cr_assert(pipe2(in, O_CLOEXEC) == 0 && pipe2(out, O_CLOEXEC) == 0 &&
              pipe2(err, O_CLOEXEC) == 0);
    r.pid = fork();
    if (r.pid == 0) {
        char *words = strdup(line), *argv[ARGS_MAX] = { (char[]){ "echo-stage" } };
        int n = 1;
        for (char *w = strtok(words, " "); w; w = strtok(NULL, " ")) argv[n++] = w;
        dup2(in[0], 0);
        dup2(out[1], 1);
        dup2(err[1], 2);
        if (extra_fd >= 0) fcntl(extra_fd, F_SETFD, 0);
        /* the test runner's own; it would take the child for a test */
        unsetenv("BXFI_MAP");
        setenv("CUDA_VISIBLE_DEVICES", "3", 1);
        execv("/proc/self/exe", argv);
        _exit(99);
    }
    close(in[0]);
    close(out[1]);
    close(err[1]);
    r.in = in[1];
    r.out = out[0];
    r.err = err[0];
    return r;
}

static void drain(int fd, struct str *to) {
    char buf[4096];
    ssize_t n;
    while ((n = read(fd, buf, sizeof buf)) > 0) str_add(to, buf, (size_t)n);
    str_add(to, "", 0);
    close(fd);
}

/* Feeds text, closes stdin, waits. Texts here fit a pipe, so no deadlock. */
static void finish(struct run *r, const char *text) {
    if (text && *text) cr_assert(write(r->in, text, strlen(text)) == (ssize_t)strlen(text));
    close(r->in);
    drain(r->out, &r->shown);
    drain(r->err, &r->said);
    int status;
    cr_assert(waitpid(r->pid, &status, 0) == r->pid);
    r->code = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

static struct run run(const char *line, const char *text) {
    struct run r = spawn(line, -1);
    finish(&r, text);
    return r;
}

static void release(struct run *r) {
    str_release(&r->said);
    str_release(&r->shown);
}

/* Lines of stderr come until one holds `word`. */
static void await(struct run *r, const char *word) {
    char c;
    while (!r->said.s || !strstr(r->said.s, word)) {
        struct pollfd p = { r->err, POLLIN, 0 };
        cr_assert(poll(&p, 1, 10000) == 1 && read(r->err, &c, 1) == 1,
                  "'%s' did not come; so far: %s", word, r->said.s);
        str_add(&r->said, &c, 1);
    }
}

static const struct { const char *args; int code; const char *says[4];
} wrong[] = {
    { "--st run.must=x", EXIT_USAGE, { "unknown option '--st', did you mean '--set'?" } },
    { "--set run.must=x surplus", EXIT_USAGE, { "unknown argument 'surplus'" } },
    { "--set", EXIT_USAGE, { "--set needs a value" } },
    { "--set foo", EXIT_USAGE, { "--set 'foo': must be NAME=VALUE" } },
    { "--describe=yes", EXIT_USAGE, { "--describe takes no value" } },
    { "--in foo --id a/b --ready-fd 77 --in tickt=-",
      EXIT_USAGE,
      { "--in 'foo': must be PORT=URL", "--id 'a/b'", "--ready-fd '77'",
        "--in tickt: there is no port 'tickt', did you mean 'ticket'?" } },
    { "--in copy=-", EXIT_USAGE, { "port 'copy' is an output: give it as --out copy=URL" } },
    { "--set run.stepz=5 --set echo.rate=7 --set echo.rule=lax",
      EXIT_CONFIG,
      { "--set run.stepz: unknown key 'run.stepz', did you mean 'run.steps'?",
        "--set echo.rate: echo.rate must be from 0 to 1, not 7",
        "--set echo.rule: echo.rule must be one of strict|flexible, not 'lax'",
        "key 'run.must' is missing: has no default" } },
    { "--set run.must=x --set run.steps=1.5 --set echo.loud=maybe",
      EXIT_CONFIG,
      { "run.steps must be a whole number, not '1.5'",
        "echo.loud must be true or false, not 'maybe'" } },
    { "--set run.must=x --set echo.rate=0.7 --set echo.loud=yes",
      EXIT_CONFIG,
      { "echo.rate above 0.5 cannot be loud" } },
    { "--set run.must=x --set in.copy=-",
      EXIT_CONFIG,
      { "--set in.copy: port 'copy' is an output" } },
    { "-c /nonexistent/x.conf --set run.must=x",
      EXIT_CONFIG,
      { "cannot open '/nonexistent/x.conf'" } },
    { "--set run.must=x --in ticket=foo:bar",
      EXIT_USAGE,
      { "port 'ticket': cannot use 'foo:bar' as a link" } },
    { "--set run.must=x --in ticket=file:/nonexistent",
      EXIT_ENV,
      { "port 'ticket': cannot open '/nonexistent'" } },
    { "--set run.must=x --in ticket= --out copy=-",
      EXIT_USAGE,
      { "port 'ticket' (input, what is echoed) is open: give --in ticket=URL" } },
    { "--set run.must=x --in ticket=- --in extra=-",
      EXIT_USAGE,
      { "ports 'ticket' and 'extra' cannot both be stdin" } },
};

Test(stages, what_is_wrong_is_said_and_has_its_exit_code) {
    for (size_t i = 0; i < COUNT_OF(wrong); i++) {
        struct run r = run(wrong[i].args, "");
        cr_expect(r.code == wrong[i].code, "%s: exit code %d, not %d\n%s", wrong[i].args, r.code,
                  wrong[i].code, r.said.s);
        for (int k = 0; k < 4 && wrong[i].says[k]; k++)
            cr_expect(strstr(r.said.s, wrong[i].says[k]), "%s\n  said: %s\n  want: %s",
                      wrong[i].args, r.said.s, wrong[i].says[k]);
        cr_expect(r.shown.len == 0, "talk goes to stderr");
        release(&r);
    }
}

static char *conf_file(const char *text) {
    static char path[300];
    snprintf(path, sizeof path, "%s", wire_dir_file(&dir, "echo.conf"));
    wire_dir_write(path, text, strlen(text));
    return path;
}

Test(stages, a_file_reports_all_its_errors_with_their_lines) {
    char args[400], want[400];
    static const char text[] = "# comment\nrun.steps = many\n\nno equals sign\n  echo.rat = "
                               "1\nrun.steps = 3\nbad name! = 1\r\n"
                               "out.ticket = -\necho.loud = true # not a comment\n";
    static const struct { int line; const char *says;
    } errors[] = {
        { 2, "run.steps must be a whole number, not 'many'" },
        { 4, "not a line 'section.name = value': 'no equals sign'" },
        { 5, "unknown key 'echo.rat', did you mean 'echo.rate'?" },
        { 6, "'run.steps' is given twice, first on line 2" },
        { 7, "'bad name!' is not a name" },
        { 8, "port 'ticket' is an input: give it as --in ticket=URL" },
        { 9, "echo.loud must be true or false, not 'true # not a comment'" },
    };
    snprintf(args, sizeof args, "-c %s", conf_file(text));
    struct run r = run(args, "");
    cr_assert(r.code == EXIT_CONFIG, "%d %s", r.code, r.said.s);
    for (size_t i = 0; i < COUNT_OF(errors); i++) {
        snprintf(want, sizeof want, "echo.conf:%d: %s", errors[i].line, errors[i].says);
        cr_expect(strstr(r.said.s, want), "said: %s\nwant: %s", r.said.s, want);
    }
    cr_expect(strstr(r.said.s, "key 'run.must' is missing"));
    release(&r);
}

Test(stages, set_wins_over_the_file_and_ports_of_the_command_line_over_both) {
    char args[1200], out[300];
    snprintf(out, sizeof out, "%s", wire_dir_file(&dir, "out.jsonl"));
    char *file = conf_file("\xEF\xBB\xBFrun.steps = 7\r\nrun.must = from file\necho.loud = "
                           "true\necho.path =  a b # c  \n"
                           "out.copy = file:/nonexistent/x\necho.rule=flexible\n");
    snprintf(args, sizeof args,
             "-c %s --set run.steps=8 --set=run.steps=9 --set out.copy=file:/nonexistent/y --out "
             "copy=file:%s --id e-1",
             file, out);
    struct run r = run(args, "{\"question\":\"q\"}\n");
    cr_assert(r.code == 0, "%d %s", r.code, r.said.s);
    cr_assert(
        strstr(r.said.s, "steps 9 must from file rate 0.05 path 'a b # c' rule 1 extra 0 id e-1"),
        "%s", r.said.s);
    cr_assert(r.shown.len == 0);
    struct str b = { 0 };
    cr_assert(fs_read(&b, out, 1 << 20, NULL) == 0 && strstr(b.s, "\"question\":\"q\""));
    str_release(&b);
    release(&r);
}

Test(stages, stdin_and_stdout_are_the_sole_required_ports) {
    struct run r = run("--set run.must=x", "{\"question\":\"a\"}\n{\"question\":\"b\"}\n");
    cr_assert(r.code == 0, "%d %s", r.code, r.said.s);
    cr_assert(strstr(r.shown.s, "\"question\":\"a\"") && strstr(r.shown.s, "\"question\":\"b\""));
    cr_assert(strstr(r.said.s, "ready: cores ") && strstr(r.said.s, "GPUs 3"), "%s", r.said.s);
    release(&r);
    r = run("--set run.must=x", "{\"question\":\"a\"}\n{\"qestion\":\"b\"}\n");
    cr_assert(r.code == EXIT_FAILED);
    cr_assert(strstr(r.said.s, "qerl-echo: <stdin>:2: ticket: unknown field 'qestion'"), "%s",
              r.said.s);
    release(&r);
}

Test(stages, a_terminal_is_not_taken_for_an_input) {
    int terminal = posix_openpt(O_RDWR | O_NOCTTY);
    if (terminal < 0 || grantpt(terminal) < 0 || unlockpt(terminal) < 0)
        cr_skip_test("skipped: no pseudo terminals here");
    pid_t child = fork();
    if (child == 0) {
        int end = open(ptsname(terminal), O_RDWR | O_NOCTTY), null = open("/dev/null", O_WRONLY);
        dup2(end, 0);
        dup2(null, 1);
        dup2(null, 2);
        unsetenv("BXFI_MAP");
        execl("/proc/self/exe", "echo-stage", "--set", "run.must=x", (char *)NULL);
        _exit(99);
    }
    int status;
    waitpid(child, &status, 0);
    cr_assert(WIFEXITED(status) && WEXITSTATUS(status) == EXIT_USAGE, "%x", status);
    close(terminal);
}

Test(stages, describe_is_json_that_names_every_key_and_port) {
    struct run r = run("--describe", "");
    struct err e = { 0 };
    cr_assert(r.code == 0);
    json_t *o = json_parse(r.shown.s, r.shown.len, "describe", &e);
    cr_assert(o, "%s", e.text);
    cr_assert_str_eq(json_string_value(json_object_get(o, "stage")), "echo");
    json_t *keys = json_object_get(o, "keys"), *ports = json_object_get(o, "ports");
    cr_assert(json_array_size(keys) == 6 && json_array_size(ports) == 3);
    json_t *steps = json_array_get(keys, 0), *must = json_array_get(keys, 1),
           *rule = json_array_get(keys, 5);
    cr_assert_str_eq(json_string_value(json_object_get(steps, "key")), "run.steps");
    cr_assert_str_eq(json_string_value(json_object_get(steps, "type")), "int");
    cr_assert_str_eq(json_string_value(json_object_get(steps, "default")), "10");
    cr_assert(json_integer_value(json_object_get(steps, "least")) == 1);
    cr_assert(json_integer_value(json_object_get(steps, "most")) == 1000);
    cr_assert(json_is_null(json_object_get(must, "default")) &&
              json_is_null(json_object_get(must, "least")));
    cr_assert(json_array_size(json_object_get(rule, "choices")) == 2);
    json_t *in = json_array_get(ports, 0);
    cr_assert_str_eq(json_string_value(json_object_get(in, "direction")), "in");
    cr_assert_str_eq(json_string_value(json_object_get(in, "record")), "ticket");
    cr_assert_str_eq(json_string_value(json_object_get(in, "socket")), "pull");
    cr_assert(json_is_true(json_object_get(in, "bind")) &&
              json_is_true(json_object_get(in, "required")));
    json_decref(o);
    release(&r);
}

Test(stages, help_version_and_plan_print_and_end) {
    static const char *const shows[] = {
        "usage: qerl-echo",    "--set KEY=VALUE",
        "run.steps",           "int 1..1000, default 10",
        "text, must be given", "strict|flexible, default strict",
        "--in  ticket",        "qerl-echo --set run.must=x < a.jsonl"
    };
    struct run r = run("--help", "");
    cr_assert(r.code == 0 && r.said.len == 0);
    for (size_t i = 0; i < COUNT_OF(shows); i++)
        cr_expect(strstr(r.shown.s, shows[i]), "--help lacks '%s'", shows[i]);
    release(&r);
    r = run("--version", "");
    cr_assert(r.code == 0 && str_starts(r.shown.s, "qerl-echo "));
    release(&r);
    r = run("--plan --set run.must=x --set run.steps=4", "");
    json_t *o = json_parse(r.shown.s, r.shown.len, "plan", NULL);
    cr_assert(r.code == 0 && o && json_integer_value(json_object_get(o, "steps")) == 4,
              "needs no port: %s", r.said.s);
    cr_assert_str_eq(json_string_value(json_object_get(o, "stage")), "echo");
    json_decref(o);
    release(&r);
    r = run("--plan --set run.steps=4", "");
    cr_assert(r.code == EXIT_CONFIG && strstr(r.said.s, "'run.must' is missing"));
    release(&r);
}

Test(stages, ready_is_one_line_on_its_descriptor) {
    int p[2];
    char args[64], line[16] = "";
    cr_assert(pipe2(p, O_CLOEXEC) == 0);
    snprintf(args, sizeof args, "--set run.must=x --ready-fd %d", p[1]);
    struct run r = spawn(args, p[1]);
    close(p[1]);
    cr_assert(read(p[0], line, sizeof line) == 6 && strcmp(line, "ready\n") == 0, "'%s'", line);
    cr_assert(read(p[0], line, sizeof line) == 0, "and it is closed");
    close(p[0]);
    finish(&r, "");
    cr_assert(r.code == 0);
    release(&r);
}

Test(stages, signals_stop_it_cleanly_or_make_it_talk) {
    for (int i = 0; i < 2; i++) {
        struct run r = spawn("--set run.must=x", -1);
        await(&r, "GPUs 3\n");
        for (int k = 0; k < 100 && !strstr(r.said.s, "waits for ticket");
             k++) { /* "working" until it gets there */
            str_clear(&r.said);
            kill(r.pid, SIGUSR1);
            await(&r, ", progress 0, step 0\n");
        }
        cr_assert_str_eq(r.said.s, "echo: waits for ticket, progress 0, step 0\n");
        kill(r.pid, i ? SIGINT : SIGTERM);
        /* its input does not end: the signal does it */
        int keep = dup(r.in);
        fcntl(keep, F_SETFD, FD_CLOEXEC);
        finish(&r, "");
        close(keep);
        cr_assert(r.code == 0, "%d %s", r.code, r.said.s);
        release(&r);
    }
}

static void expect_beat(struct link *l, const char *state, const char *metrics) {
    for (int i = 0; i < 100; i++) {
        struct rec r;
        char peer[LINK_PEER_MAX];
        struct err e = { 0 };
        int rc = link_recv(l, &r, peer, 5000, &e);
        cr_assert(rc == LINK_RECORD && r.type == REC_BEAT, "waiting for '%s': %d %s", state, rc,
                  e.text);
        cr_assert_str_eq(peer, "echo-7");
        cr_assert_str_eq(r.beat.stage, "echo-7");
        bool found = strcmp(r.beat.state, state) == 0 && strstr(r.beat.metrics, metrics);
        rec_release(&r);
        if (found) return;
    }
    cr_assert(false, "no beat '%s' came", state);
}

Test(stages, beats_tell_a_launcher) {
    char args[400], url[300];
    snprintf(url, sizeof url, "zmq+ipc://%s", wire_dir_file(&dir, "beat"));
    struct link *l;
    struct err e = { 0 };
    struct link_opts o = { .name = "beat", .kind = LINK_KIND_ROUTER, .bind = true };
    cr_assert(link_open(&l, url, &o, &e) == 0, "%s", e.text);
    snprintf(args, sizeof args, "--set run.must=x --id echo-7 --beat %s", url);
    struct run r = spawn(args, -1);
    expect_beat(l, "wait", "");
    expect_beat(l, "wait", "");
    finish(&r, "{\"qestion\":1}\n");
    expect_beat(l, "done", "{\"error\":\"<stdin>:1: ticket: unknown field 'qestion'");
    cr_assert(r.code == EXIT_FAILED);
    release(&r);
    link_close(&l);
}

/* Works as a stage between two others, over sockets. */
Test(stages, two_of_them_in_a_row) {
    char a[600], b[600], url[300];
    snprintf(url, sizeof url, "zmq+ipc://%s", wire_dir_file(&dir, "mid"));
    snprintf(a, sizeof a, "--set run.must=x --out copy=%s --id first", url);
    snprintf(b, sizeof b, "--set run.must=x --in ticket=%s --id second", url);
    struct run second = spawn(b, -1), first = spawn(a, -1);
    finish(&first, "{\"question\":\"1\"}\n{\"question\":\"2\"}\n{\"question\":\"3\"}\n");
    cr_assert(first.code == 0, "%s", first.said.s);
    char c;
    while (!second.shown.s || !strstr(second.shown.s, "\"question\":\"3\"")) {
        struct pollfd p = { second.out, POLLIN, 0 };
        cr_assert(poll(&p, 1, 10000) == 1 && read(second.out, &c, 1) == 1, "%s", second.shown.s);
        str_add(&second.shown, &c, 1);
    }
    kill(second.pid, SIGTERM);
    finish(&second, "");
    cr_assert(second.code == 0, "%s", second.said.s);
    release(&first);
    release(&second);
}
