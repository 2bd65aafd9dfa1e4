/* link_ends.c - links: sockets between two processes, files that end, ports in use, URLs that
 * cannot work.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/wire/link.h"

#include <criterion/criterion.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <zmq.h>

#include "lib/base/log.h"
#include "tests/unit/rec_any.h"
#include "tests/unit/wire_dir.h"

static struct wire_dir dir;
static void start(void) {
    wire_dir_init(&dir);
    log_open("test", LOG_LEVEL_ERROR);
}
static void stop(void) { wire_dir_release(&dir); }
TestSuite(links, .init = start, .fini = stop, .timeout = 60);

static struct link *open_or_fail(const char *url, struct link_opts o) {
    struct link *l;
    struct err e = { 0 };
    cr_assert(link_open(&l, url, &o, &e) == 0, "%s", e.text);
    return l;
}

static const char *ipc(const char *name) {
    static char url[2][300];
    static int turn;
    turn ^= 1;
    snprintf(url[turn], sizeof url[turn], "zmq+ipc://%s", wire_dir_file(&dir, name));
    return url[turn];
}

static struct rec end_rec(int64_t step) {
    return (struct rec){ .type = REC_END, .end = { .step = step } };
}

static int64_t recv_step(struct link *l, char *peer) {
    struct rec r;
    struct err e = { 0 };
    int rc = link_recv(l, &r, peer, 5000, &e);
    cr_assert(rc == LINK_RECORD && r.type == REC_END, "%d %s", rc, rc ? e.text : "nothing came");
    int64_t step = r.end.step;
    rec_release(&r);
    return step;
}

/* ---- sockets ---- */

static bool sleeps(const char *tid) {
    char path[64], stat[256] = "";
    snprintf(path, sizeof path, "/proc/self/task/%.20s/stat", tid);
    FILE *f = fopen(path, "r");
    if (!f) return true;                             /* it has ended */
    const char *end = fgets(stat, sizeof stat, f) ? strrchr(stat, ')') : NULL;
    fclose(f);
    return end && end[1] == ' ' && end[2] == 'S';
}

/* fork once the library's threads sleep. One of them may otherwise hold a lock of the sanitizer's
 * allocator, which gcc 12's libasan leaves locked in the child for good (glibc's malloc does not):
 * the child's own threads then hang at their first allocation of that size. */
static pid_t fork_quietly(void) {
    char self[24];
    snprintf(self, sizeof self, "%d", (int)getpid());
    for (int quiet = 0, looks = 0; quiet < 3 && looks < 2000; looks++) {
        DIR *d = opendir("/proc/self/task");
        bool all = true;
        for (const struct dirent *t; d && (t = readdir(d));)
            if (t->d_name[0] != '.' && strcmp(t->d_name, self) != 0) all &= sleeps(t->d_name);
        if (d) closedir(d);
        quiet = all ? quiet + 1 : 0;
        usleep(500);
    }
    return fork();
}

/* The other process: sends `n` ends and leaves in good order, not before the parent closes hold[1]
 * (NULL = at once). Exit code 0 if all were taken. */
static pid_t pusher(const char *url, int n, const int *hold) {
    pid_t child = fork_quietly();
    if (child) return child;
    struct link *l;
    struct err e = { 0 };
    struct link_opts o = { .name = "out", .kind = LINK_KIND_PUSH, .output = true, .hwm = 4 };
    if (link_open(&l, url, &o, &e) < 0) _exit(1);
    for (int i = 0; i < n; i++) {
        struct rec r = end_rec(i);
        if (link_send(l, &r, NULL, 5000, &e) != 0) _exit(2);
    }
    char c;
    if (hold) close(hold[1]);
    if (hold && read(hold[0], &c, 1) != 0) _exit(3);
    link_close(&l);
    _exit(0);
}

static void expect_exit(pid_t child, int code) {
    int status;
    cr_assert(waitpid(child, &status, 0) == child);
    cr_assert(WIFEXITED(status) && WEXITSTATUS(status) == code, "status %x", status);
}

Test(links, push_and_pull_between_processes_over_ipc_and_tcp) {
    const char *urls[] = { ipc("p"), "zmq+tcp://127.0.0.1:*", "zmq+tcp://localhost:*" };
    for (size_t u = 0; u < COUNT_OF(urls); u++) {
        struct link *l = open_or_fail(
            urls[u],
            (struct link_opts){ .name = "in", .kind = LINK_KIND_PULL, .bind = true, .hwm = 4 });
        cr_assert(!strchr(link_url(l), '*') && !link_is_file(l));
        int hold[2];
        cr_assert(pipe(hold) == 0);
        pid_t child = pusher(link_url(l), 500, hold);
        close(hold[0]);
        for (int64_t i = 0; i < 500; i++) {
            int64_t step = recv_step(l, NULL);
            cr_assert(step == i, "%lld came where %lld was due", (long long)step, (long long)i);
        }
        close(hold[1]);
        expect_exit(child, 0);
        struct rec r;
        struct err e = { 0 };
        cr_assert(link_recv(l, &r, NULL, 0, &e) == LINK_EMPTY);
        link_close(&l);
    }
}

Test(links, the_last_words_of_a_stage_that_leaves_arrive) {
    const char *url = ipc("p");
    struct link *l = open_or_fail(
        url, (struct link_opts){ .name = "in", .kind = LINK_KIND_PULL, .bind = true });
    for (int i = 0; i < 20; i++) {
        pid_t child = pusher(url, 1, NULL);
        cr_assert(recv_step(l, NULL) == 0);
        expect_exit(child, 0);
    }
    link_close(&l);
}

/* Over tcp even those that the reader is behind with; over ipc libzmq takes the hang-up for an
 * error then (link.h). */
Test(links, a_slow_reader_over_tcp_gets_all_that_was_sent) {
    struct link *l = open_or_fail(
        "zmq+tcp://127.0.0.1:*",
        (struct link_opts){ .name = "in", .kind = LINK_KIND_PULL, .bind = true, .hwm = 4 });
    pid_t child = pusher(link_url(l), 100, NULL);
    expect_exit(child, 0);
    for (int i = 0; i < 100; i++) cr_assert(recv_step(l, NULL) == i);
    link_close(&l);
}

Test(links, router_knows_who_spoke_and_answers_him) {
    const char *url = ipc("r");
    struct link *r = open_or_fail(
        url, (struct link_opts){ .name = "ticket", .kind = LINK_KIND_ROUTER, .bind = true });
    pid_t child = fork_quietly();
    if (child == 0) {
        struct link *d;
        struct err e = { 0 };
        struct link_opts o = { .name = "ticket",
                               .kind = LINK_KIND_DEALER,
                               .identity = "rollout-0" };
        if (link_open(&d, url, &o, &e) < 0) _exit(1);
        struct rec x = end_rec(3), y;
        if (link_send(d, &x, NULL, 5000, &e) != 0 ||
            link_recv(d, &y, NULL, 5000, &e) != LINK_RECORD)
            _exit(2);
        _exit(y.end.step == 4 ? 0 : 3);
    }
    char peer[LINK_PEER_MAX];
    struct err e = { 0 };
    struct rec x = end_rec(4);
    cr_assert(recv_step(r, peer) == 3);
    cr_assert_str_eq(peer, "rollout-0");
    cr_assert(link_send(r, &x, "rollout-1", 0, &e) == 1,
              "nobody of that name: not now, and not dropped in silence");
    cr_assert(link_send(r, &x, peer, 1000, &e) == 0, "%s", e.text);
    expect_exit(child, 0);
    for (int i = 0; i < 100 && link_send(r, &x, peer, 0, &e) == 0; i++) usleep(20000);
    cr_assert(link_send(r, &x, peer, 0, &e) == 1, "the peer is gone");
    link_close(&r);
}

Test(links, a_peer_without_a_name_can_be_answered_too) {
    const char *url = ipc("r");
    struct link *r = open_or_fail(
        url, (struct link_opts){ .name = "r", .kind = LINK_KIND_ROUTER, .bind = true });
    struct link *d = open_or_fail(url, (struct link_opts){ .name = "d", .kind = LINK_KIND_DEALER });
    char peer[LINK_PEER_MAX];
    struct err e = { 0 };
    struct rec x = end_rec(1);
    cr_assert(link_send(d, &x, NULL, 5000, &e) == 0);
    recv_step(r, peer);
    cr_assert(peer[0] == '#' && strlen(peer) == 11, "%s", peer);
    cr_assert(link_send(r, &x, peer, 1000, &e) == 0);
    cr_assert(recv_step(d, NULL) == 1);
    link_close(&r);
    link_close(&d);
}

Test(links, a_restarted_peer_takes_its_name_over) {
    const char *url = ipc("r");
    struct link *r = open_or_fail(
        url, (struct link_opts){ .name = "r", .kind = LINK_KIND_ROUTER, .bind = true });
    struct err e = { 0 };
    for (int life = 0; life < 5; life++) {
        char peer[LINK_PEER_MAX];
        pid_t child = fork_quietly();
        if (child == 0) {
            struct link *d;
            struct link_opts o = { .name = "d", .kind = LINK_KIND_DEALER, .identity = "same" };
            struct rec x = end_rec(life), y;
            if (link_open(&d, url, &o, &e) < 0 || link_send(d, &x, NULL, 5000, &e) != 0) _exit(1);
            if (link_recv(d, &y, NULL, 5000, &e) != LINK_RECORD || y.end.step != 100 + life)
                _exit(2);
            kill(getpid(), SIGKILL);
        }
        cr_assert(recv_step(r, peer) == life);
        cr_assert_str_eq(peer, "same");
        struct rec x = end_rec(100 + life);
        cr_assert(link_send(r, &x, peer, 1000, &e) == 0);
        int status;
        waitpid(child, &status, 0);
        cr_assert(WIFSIGNALED(status), "life %d: exit %d", life, WEXITSTATUS(status));
    }
    link_close(&r);
}

Test(links, pub_and_sub) {
    const char *url = ipc("a");
    struct link *p = open_or_fail(
        url,
        (struct link_opts){ .name = "p", .kind = LINK_KIND_PUB, .bind = true, .output = true });
    struct link *s = open_or_fail(url, (struct link_opts){ .name = "s", .kind = LINK_KIND_SUB });
    struct rec x = end_rec(7), y;
    struct err e = { 0 };
    int rc = LINK_EMPTY;
    /* a subscription takes a moment to arrive */
    for (int i = 0; i < 200 && rc == LINK_EMPTY; i++) {
        cr_assert(link_send(p, &x, NULL, 0, &e) == 0);
        rc = link_recv(s, &y, NULL, 20, &e);
    }
    cr_assert(rc == LINK_RECORD && y.end.step == 7, "%s", e.text);
    rec_release(&y);
    link_close(&p);
    link_close(&s);
}

Test(links, push_without_a_reader_blocks_for_its_time_and_says_not_now) {
    struct link *l = open_or_fail(
        ipc("n"), (struct link_opts){ .name = "out", .kind = LINK_KIND_PUSH, .output = true });
    struct rec r = end_rec(0);
    struct err e = { 0 };
    struct timespec a, b;
    clock_gettime(CLOCK_MONOTONIC, &a);
    cr_assert(link_send(l, &r, NULL, 100, &e) == 1 && !e.text[0]);
    clock_gettime(CLOCK_MONOTONIC, &b);
    double ms = (double)(b.tv_sec - a.tv_sec) * 1e3 + (double)(b.tv_nsec - a.tv_nsec) * 1e-6;
    cr_assert(ms > 90 && ms < 2000, "%g ms", ms);
    link_close(&l);
}

Test(links, a_port_in_use_is_refused) {
    struct link_opts o = { .name = "in", .kind = LINK_KIND_PULL, .bind = true };
    struct link *l = open_or_fail(ipc("p"), o), *t = open_or_fail("zmq+tcp://127.0.0.1:*", o),
                *other;
    struct err e = { 0 };
    cr_assert(link_open(&other, ipc("p"), &o, &e) < 0 && e.code == EXIT_ENV &&
                  strstr(e.text, "is in use"),
              "%s", e.text);
    cr_assert(link_open(&other, link_url(t), &o, &e) < 0 && e.code == EXIT_ENV &&
                  strstr(e.text, "is in use"),
              "%s", e.text);
    pid_t child = pusher(link_url(l), 1, NULL);
    cr_assert(recv_step(l, NULL) == 0, "the refused one did not steal the path");
    expect_exit(child, 0);
    link_close(&l);
    link_close(&t);
    l = open_or_fail(ipc("p"), o);
    link_close(&l);
}

Test(links, a_path_left_behind_by_a_killed_process_is_taken) {
    const char *url = ipc("p");
    struct link_opts o = { .name = "in", .kind = LINK_KIND_PULL, .bind = true };
    pid_t child = fork_quietly();
    if (child == 0) {
        struct link *l;
        if (link_open(&l, url, &o, NULL) < 0) _exit(1);
        kill(getpid(), SIGKILL);
    }
    int status;
    waitpid(child, &status, 0);
    cr_assert(WIFSIGNALED(status) && fs_exists(wire_dir_file(&dir, "p")));
    struct link *l = open_or_fail(url, o);
    link_close(&l);
}

Test(links, wait_finds_the_one_that_can_be_read) {
    struct link *a = open_or_fail(
        ipc("a"), (struct link_opts){ .name = "a", .kind = LINK_KIND_PULL, .bind = true });
    struct link *b = open_or_fail(
        ipc("b"), (struct link_opts){ .name = "b", .kind = LINK_KIND_PULL, .bind = true });
    struct link *all[] = { NULL, a, b };
    cr_assert(link_wait(all, 3, 20) == -1);
    pid_t child = pusher(link_url(b), 1, NULL);
    cr_assert(link_wait(all, 3, 5000) == 2);
    cr_assert(recv_step(b, NULL) == 0);
    cr_assert(link_wait(all, 3, 0) == -1);
    expect_exit(child, 0);
    const char *path = wire_dir_file(&dir, "f.jsonl");
    wire_dir_write(path, "{\"rec\":\"end\"}\n", 14);
    char url[300];
    snprintf(url, sizeof url, "file:%s", path);
    all[0] = open_or_fail(url, (struct link_opts){ .name = "f", .expected = REC_END });
    cr_assert(link_wait(all, 3, 5000) == 0);
    recv_step(all[0], NULL);
    cr_assert(link_wait(all, 3, 5000) == 0, "its end can be read");
    struct rec r;
    cr_assert(link_recv(all[0], &r, NULL, 1000, NULL) == LINK_END);
    cr_assert(link_wait(all, 3, 20) == -1, "an ended link does not wake anybody again");
    for (int i = 0; i < 3; i++) link_close(&all[i]);
}

static void nothing(int signo) { (void)signo; }

Test(links, a_signal_ends_a_wait) {
    struct link *a = open_or_fail(
        ipc("a"), (struct link_opts){ .name = "a", .kind = LINK_KIND_PULL, .bind = true });
    struct sigaction act = { .sa_handler = nothing };
    sigaction(SIGTERM, &act, NULL);
    pid_t parent = getpid(), child = fork_quietly();
    if (child == 0) {
        usleep(100000);
        kill(parent, SIGTERM);
        _exit(0);
    }
    cr_assert(link_wait(&a, 1, 20000) == -1);
    struct rec r;
    expect_exit(child, 0);
    cr_assert(link_recv(a, &r, NULL, 0, NULL) == LINK_EMPTY);
    link_close(&a);
}
Test(links, garbage_on_a_socket_is_an_error_that_names_port_and_peer) {
    const char *url = ipc("r");
    struct link *r = open_or_fail(
        url, (struct link_opts){ .name = "ticket", .kind = LINK_KIND_ROUTER, .bind = true });
    void *ctx = zmq_ctx_new(), *raw = zmq_socket(ctx, ZMQ_DEALER);
    zmq_setsockopt(raw, ZMQ_ROUTING_ID, "evil", 4);
    cr_assert(zmq_connect(raw, url + 4) == 0);
    zmq_send(raw, "\xDD\x7F\xFF\xFF\xFF", 5, 0);
    zmq_send(raw, "a", 1, ZMQ_SNDMORE);
    zmq_send(raw, "b", 1, 0);
    struct str good = { 0 };
    struct rec x = end_rec(9), y;
    rec_pack(&good, &x);
    zmq_send(raw, good.s, good.len, 0);
    struct err e = { 0 };
    cr_assert(link_recv(r, &y, NULL, 5000, &e) == -1 && e.code == EXIT_FAILED);
    cr_assert(strstr(e.text, "port 'ticket' from evil: MessagePack: a count that does not fit"),
              "%s", e.text);
    cr_assert(link_recv(r, &y, NULL, 5000, &e) == -1 && strstr(e.text, "several parts"), "%s",
              e.text);
    cr_assert(recv_step(r, NULL) == 9, "the link goes on with the next message");
    str_release(&good);
    zmq_close(raw);
    zmq_ctx_term(ctx);
    link_close(&r);
}

Test(links, urls_that_cannot_work_say_why) {
    static const struct { const char *url, *says;
    } cases[] = {
        { "", "it must be zmq+ipc://PATH" },
        { "foo:bar", "cannot use 'foo:bar' as a link" },
        { "zmq+ipc://", "it must be" },
        { "ipc:///tmp/x", "it must be" },
        { "zmq+tcp://127.0.0.1", "is not HOST:PORT" },
        { "zmq+tcp://127.0.0.1:0", "is not HOST:PORT" },
        { "zmq+tcp://127.0.0.1:65536", "is not HOST:PORT" },
        { "zmq+tcp://:5", "is not HOST:PORT" },
        { "zmq+tcp://10.1.2.3:5555", "leaves this machine" },
        { "zmq+tcp://0.0.0.0:5555", "leaves this machine" },
        { "zmq+tcp://*:5555", "leaves this machine" },
        { "zmq+tcp://127.evil.example:5555", "leaves this machine" },
        { "zmq+tcp://localhost.evil:5555", "leaves this machine" },
        { "zmq+ipc:///tmp/"
          "0123456789012345678901234567890123456789012345678901234567890123456789012345678901234567"
          "890"
          "12345678901234567",
          "has at most 107 bytes" },
        { "zmq+ipc:///tmp/no/such/folder/s", "cannot listen at" },
        { "tape:/tmp/no/such/folder/t.tape", "cannot open tape" },
        { "file:/tmp/no/such/folder/t.jsonl", "cannot open '/tmp/no" },
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        struct link *l;
        struct err e = { 0 };
        struct link_opts o = { .name = "traj", .kind = LINK_KIND_PULL, .bind = true };
        cr_assert(link_open(&l, cases[i].url, &o, &e) < 0, "%s was accepted", cases[i].url);
        cr_expect(strstr(e.text, cases[i].says) && strstr(e.text, "port 'traj'"), "%s\n  said: %s",
                  cases[i].url, e.text);
        cr_assert(!l);
    }
}

/* ---- files and pipes ---- */

static char *file_url(const char *name, const char *scheme) {
    static char url[300];
    snprintf(url, sizeof url, "%s:%s", scheme, wire_dir_file(&dir, name));
    return url;
}

Test(links, lines_with_bom_crlf_and_blanks_are_read_and_numbered) {
    static const char text[] =
        "\xEF\xBB\xBF{\"question\":\"a\"}\r\n\r\n  \t\n{\"question\":\"b\"}\n"
        "{\"question\":\"c\",\"group\":70}";
    wire_dir_write(wire_dir_file(&dir, "q.jsonl"), text, sizeof text - 1);
    struct link *l = open_or_fail(file_url("q.jsonl", "file"),
                                  (struct link_opts){ .name = "ticket", .expected = REC_TICKET });
    static const struct {
        const char *question;
        int64_t group;
    } want[] = { { "a", 0 }, { "b", 3 }, { "c", 70 } };
    struct rec r;
    struct err e = { 0 };
    for (size_t i = 0; i < COUNT_OF(want); i++) {
        cr_assert(link_recv(l, &r, NULL, 0, &e) == LINK_RECORD, "%s", e.text);
        cr_assert_str_eq(r.ticket.question, want[i].question);
        cr_assert(r.ticket.group == want[i].group, "group %lld", (long long)r.ticket.group);
        rec_release(&r);
    }
    cr_assert(link_recv(l, &r, NULL, 0, &e) == LINK_END &&
              link_recv(l, &r, NULL, 0, &e) == LINK_END);
    cr_assert(link_is_file(l));
    link_close(&l);
}

Test(links, a_bad_line_names_file_and_line) {
    const char *path = wire_dir_file(&dir, "q.jsonl");
    static const char text[] =
        "{\"question\":\"a\"}\n\n{\"qestion\":\"b\"}\n{\"question\":\"c\"}\n";
    wire_dir_write(path, text, sizeof text - 1);
    struct link *l = open_or_fail(file_url("q.jsonl", "file"),
                                  (struct link_opts){ .name = "ticket", .expected = REC_TICKET });
    struct rec r;
    struct err e = { 0 };
    char where[300];
    snprintf(where, sizeof where, "%s:3: ticket: unknown field 'qestion'",
             wire_dir_file(&dir, "q.jsonl"));
    cr_assert(link_recv(l, &r, NULL, 0, &e) == LINK_RECORD);
    rec_release(&r);
    cr_assert(link_recv(l, &r, NULL, 0, &e) == -1 && e.code == EXIT_FAILED &&
                  str_starts(e.text, where),
              "%s", e.text);
    cr_assert(link_recv(l, &r, NULL, 0, &e) == LINK_RECORD, "reading goes on behind it");
    rec_release(&r);
    link_close(&l);
}

static void through(const char *url) {
    struct any a = { 11 };
    struct rec x[20], y;
    struct err e = { 0 };
    for (int pass = 0; pass < 2; pass++) {              /* opened twice: the second pass appends */
        struct link *l = open_or_fail(url, (struct link_opts){ .name = "out", .output = true });
        for (int i = 10 * pass; i < 10 * pass + 10; i++) {
            any_fill(&x[i], (enum rec_type)(1 + i % (REC_TYPE_COUNT - 1)), &a);
            cr_assert(link_send(l, &x[i], NULL, 0, &e) == 0, "%s", e.text);
        }
        cr_assert(link_recv(l, &y, NULL, 0, &e) < 0 && strstr(e.text, "is an output"));
        link_close(&l);
    }
    struct link *l = open_or_fail(url, (struct link_opts){ .name = "in" });
    for (int i = 0; i < 20; i++) {
        cr_assert(link_recv(l, &y, NULL, 0, &e) == LINK_RECORD, "%s", e.text);
        cr_assert(!any_differs(&x[i], &y), "record %d differs in %s", i, any_differs(&x[i], &y));
        rec_release(&x[i]);
        rec_release(&y);
    }
    cr_assert(link_send(l, &(struct rec){ .type = REC_END }, NULL, 0, &e) < 0 &&
              strstr(e.text, "is an input"));
    cr_assert(link_recv(l, &y, NULL, 0, &e) == LINK_END);
    link_close(&l);
}

Test(links, every_record_goes_through_a_file_and_a_tape) {
    char url[300];
    snprintf(url, sizeof url, "%s", file_url("x.jsonl", "file"));
    through(url);
    snprintf(url, sizeof url, "%s", file_url("x.tape", "tape"));
    through(url);
}

Test(links, another_record_than_expected_is_refused) {
    char url[300];
    struct rec r = end_rec(1), y;
    struct err e = { 0 };
    for (int tape = 0; tape < 2; tape++) {
        snprintf(url, sizeof url, "%s", file_url("x", tape ? "tape" : "file"));
        struct link *l = open_or_fail(url, (struct link_opts){ .name = "out", .output = true });
        cr_assert(link_send(l, &r, NULL, 0, &e) == 0, "%s", e.text);
        link_close(&l);
        l = open_or_fail(url, (struct link_opts){ .name = "in", .expected = REC_TRAJ });
        cr_assert(link_recv(l, &y, NULL, 0, &e) < 0);
        cr_assert(strstr(e.text, "a record 'end' where 'traj' is expected"), "%s", e.text);
        link_close(&l);
        unlink(wire_dir_file(&dir, "x"));
    }
}

Test(links, a_line_that_a_kill_left_half_written_is_cut) {
    const char *path = wire_dir_file(&dir, "x.jsonl");
    wire_dir_write(path, "{\"rec\":\"end\"}\n{\"rec\":\"en", 24);
    struct link *l = open_or_fail(file_url("x.jsonl", "file"),
                                  (struct link_opts){ .name = "out", .output = true });
    struct rec r = end_rec(5);
    cr_assert(link_send(l, &r, NULL, 0, NULL) == 0);
    link_close(&l);
    l = open_or_fail(file_url("x.jsonl", "file"), (struct link_opts){ .name = "in" });
    cr_assert(recv_step(l, NULL) == 0 && recv_step(l, NULL) == 5);
    link_close(&l);
}

Test(links, a_record_that_is_not_lawful_is_not_written) {
    struct link *l = open_or_fail(file_url("x.jsonl", "file"),
                                  (struct link_opts){ .name = "out", .output = true });
    struct rec r = end_rec(-1);
    struct err e = { 0 };
    cr_assert(link_send(l, &r, NULL, 0, &e) < 0 &&
                  strstr(e.text, "port 'out': end: field 'step' is -1"),
              "%s", e.text);
    link_close(&l);
    struct stat st;
    cr_assert(stat(wire_dir_file(&dir, "x.jsonl"), &st) == 0 && st.st_size == 0);
}

Test(links, a_pipe_waits_for_the_rest_of_a_line) {
    int p[2];
    cr_assert(pipe(p) == 0 && dup2(p[0], STDIN_FILENO) == STDIN_FILENO);
    struct link *l = open_or_fail("-", (struct link_opts){ .name = "in", .expected = REC_END });
    struct rec r;
    struct err e = { 0 };
    cr_assert(link_wait(&l, 1, 20) == -1 && link_recv(l, &r, NULL, 20, &e) == LINK_EMPTY);
    cr_assert(write(p[1], "{\"rec\":\"end\",", 13) == 13);
    cr_assert(link_recv(l, &r, NULL, 20, &e) == LINK_EMPTY, "half a line is no record");
    cr_assert(write(p[1], "\"step\":8}\n{\"rec\":\"end\",\"step\":9}", 32) == 32);
    cr_assert(recv_step(l, NULL) == 8);
    close(p[1]);
    cr_assert(recv_step(l, NULL) == 9, "a last line may lack its end");
    cr_assert(link_recv(l, &r, NULL, 1000, &e) == LINK_END);
    link_close(&l);
}

Test(links, a_reader_that_has_gone_is_an_error_not_a_death) {
    int p[2];
    cr_assert(pipe(p) == 0 && dup2(p[1], STDOUT_FILENO) == STDOUT_FILENO);
    close(p[0]);
    close(p[1]);
    struct link *l = open_or_fail("-", (struct link_opts){ .name = "group", .output = true });
    struct rec r = end_rec(0);
    struct err e = { 0 };
    cr_assert(link_send(l, &r, NULL, 0, &e) < 0 && e.code == EXIT_FAILED);
    cr_assert(strstr(e.text, "port 'group': the reader of <stdout> has gone"), "%s", e.text);
    link_close(&l);
}

Test(links, a_full_device_is_an_error) {
    struct link *l = open_or_fail("file:/dev/full",
                                  (struct link_opts){ .name = "out", .output = true });
    struct rec r = end_rec(0);
    struct err e = { 0 };
    cr_assert(link_send(l, &r, NULL, 0, &e) < 0 && strstr(e.text, strerror(ENOSPC)), "%s", e.text);
    link_close(&l);
}

Test(links, a_line_without_end_is_refused_before_it_takes_the_memory) {
    const char *path = wire_dir_file(&dir, "x.jsonl");
    int fd = open(path, O_WRONLY | O_CREAT, 0600);
    cr_assert(fd >= 0 && ftruncate(fd, (off_t)REC_BYTES_MAX * 4) == 0);       /* NULs, sparse */
    close(fd);
    struct link *l = open_or_fail(file_url("x.jsonl", "file"), (struct link_opts){ .name = "in" });
    struct rec r;
    struct err e = { 0 };
    cr_assert(link_recv(l, &r, NULL, 5000, &e) == -1 && strstr(e.text, ":1: a line of more than"),
              "%s", e.text);
    link_close(&l);
}
