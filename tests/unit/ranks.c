/* ranks.c - processes that call together: who gets what, who is lost, who does something else.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/ranks.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lib/base/clock.h"

TestSuite(ranks, .timeout = 60);

/* What a rank does; its return is the exit code of rank 1, 2, ... */
typedef int body(struct ranks *r, struct err *e);
struct team {
    body *does;
    pid_t pid[4];
};

static pid_t start_fork(void *ud, int rank, int fd, struct err *e) {
    struct team *t = ud;
    (void)e;
    const pid_t parent = getpid(), pid = fork();
    t->pid[rank] = pid;
    if (pid) return pid;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(9);
    struct ranks *r;
    struct err own = { 0 };
    if (ranks_join(&r, rank, fd, &own) < 0) _exit(8);
    _exit(t->does(r, &own));
}

static struct ranks *open_team(struct team *t, int count, double patience) {
    struct ranks *r;
    struct err e = { 0 };
    cr_assert(ranks_open(&r, count, patience, start_fork, t, &e) == 0, "%s", e.text);
    return r;
}

/* ---- what everybody has afterwards ---- */

enum { MOST = 3 * RANKS_WINDOW_BYTES + 77 };
static unsigned char value(int rank, size_t i) { return (unsigned char)(rank * 101 + i % 251); }

/* Sizes about the window's edge, and ranks with nothing at all. */
static const size_t sizes[][3] = {
    { 0, 0, 0 }, { 1, 0, 0 }, { 0, 0, 5 }, { 8, 8, 8 }, { 1, RANKS_WINDOW_BYTES, 3 },
    { RANKS_WINDOW_BYTES + 1, 0, RANKS_WINDOW_BYTES - 1 }, { 7, MOST, 2 * RANKS_WINDOW_BYTES }
};

static int share_all(struct ranks *r, struct err *e) {
    const int count = ranks_count(r);
    unsigned char *data = mem_alloc(3 * MOST);
    size_t from[4] = { 0 };
    for (size_t c = 0; c < COUNT_OF(sizes); c++) {
        for (int i = 0; i < count; i++) from[i + 1] = from[i] + sizes[c][i];
        memset(data, 0xee, 3 * MOST);
        const int own = ranks_own(r);
        for (size_t i = from[own]; i < from[own + 1]; i++) data[i] = value(own, i);
        if (ranks_share(r, "shared", data, from, e) < 0) return 2;
        for (int k = 0; k < count; k++)
            for (size_t i = from[k]; i < from[k + 1]; i++)
                if (data[i] != value(k, i)) return 3;
        if (data[from[count]] != 0xee) return 4;
    }
    free(data);
    return 0;
}

static int broadcast_all(struct ranks *r, struct err *e) {
    struct str s = { 0 };
    for (size_t n = 0; n < MOST; n = 3 * n + 1) {
        str_clear(&s);
        for (size_t i = 0; i < n && ranks_own(r) == 0; i++) str_add(&s, "x", 1);
        if (ranks_broadcast(r, "text", &s, e) < 0) return 5;
        if (s.len != n || strspn(n ? s.s : "", "x") != n) return 6;
    }
    str_release(&s);
    return 0;
}

static int share_and_broadcast(struct ranks *r, struct err *e) {
    const int rc = share_all(r, e);
    return rc ? rc : broadcast_all(r, e);
}

Test(ranks, everybody_gets_what_each_has) {
    for (int count = 2; count <= 3; count++) {
        struct team t = { .does = share_and_broadcast };
        struct err e = { 0 };
        struct ranks *r = open_team(&t, count, 30);
        cr_assert_eq(ranks_own(r), 0);
        cr_expect_eq(share_and_broadcast(r, &e), 0, "%s", e.text);
        for (int i = 1; i < count; i++) {
            int status;
            cr_expect_eq(waitpid(t.pid[i], &status, 0), t.pid[i]);
            cr_expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "rank %d: %x", i, status);
        }
        ranks_close(&r);
        cr_expect_null(r);
    }
}

/* ---- lost ranks ---- */

static int gather_for_ever(struct ranks *r, struct err *e) {
    int all[4];
    for (;;) {
        all[ranks_own(r)] = 1;
        if (ranks_gather(r, "number", all, sizeof *all, e) < 0) return ranks_over(r) ? 0 : 7;
    }
}

static int hangs_in_the_middle(struct ranks *r, struct err *e) {
    int all[4] = { 0 };
    if (ranks_gather(r, "number", all, sizeof *all, e) < 0) return 7;
    if (ranks_own(r) == ranks_count(r) - 1)
        for (;;) pause();
    return gather_for_ever(r, e);
}

static int leaves_in_the_middle(struct ranks *r, struct err *e) {
    int all[4] = { 0 };
    if (ranks_gather(r, "number", all, sizeof *all, e) < 0) return 7;
    return ranks_own(r) == ranks_count(r) - 1 ? EXIT_ENV : gather_for_ever(r, e);
}

/* One call, then, with the last rank lost, one that fails within a few seconds. */
static struct err lose(body *does, int count, double patience, int killed) {
    struct team t = { .does = does };
    struct err e = { 0 };
    struct ranks *r = open_team(&t, count, patience);
    int all[4] = { 0 };
    cr_assert(ranks_gather(r, "number", all, sizeof *all, &e) == 0, "%s", e.text);
    if (killed) kill(t.pid[count - 1], killed);
    const double begun = clock_seconds();
    int calls = 0;
    while (ranks_gather(r, "number", all, sizeof *all, &e) == 0 && ++calls < 100000) {}
    cr_expect(clock_seconds() - begun < 20, "noticed after %.1f s", clock_seconds() - begun);
    struct err again = { 0 };
    cr_expect(ranks_gather(r, "number", all, sizeof *all, &again) < 0);
    cr_expect_str_eq(again.text, e.text, "the reason was forgotten");
    if (count > 2) {                                 /* the one between leaves by itself */
        int status = -1;
        cr_expect_eq(waitpid(t.pid[1], &status, 0), t.pid[1]);
        cr_expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "status %x", status);
    }
    ranks_close(&r);
    for (int i = 1; i < count; i++)
        cr_expect(kill(t.pid[i], 0) < 0 && errno == ESRCH, "rank %d outlived the ranks", i);
    return e;
}

Test(ranks, a_killed_rank_ends_the_call_of_all) {
    for (int count = 2; count <= 3; count++) {
        char want[40];
        struct err e = lose(gather_for_ever, count, 30, SIGKILL);
        snprintf(want, sizeof want, "rank %d is lost: it was killed", count - 1);
        cr_expect(str_starts(e.text, want) && strstr(e.text, "signal 9"), "%s", e.text);
        cr_expect_eq(e.code, EXIT_FAILED);
    }
}

Test(ranks, a_rank_that_is_killed_while_it_does_not_call) {
    struct err e = lose(hangs_in_the_middle, 3, 30, SIGKILL);
    cr_expect(str_starts(e.text, "rank 2 is lost: it was killed by signal 9"), "%s", e.text);
}

Test(ranks, a_rank_that_ends_says_why_by_its_code) {
    struct err e = lose(leaves_in_the_middle, 3, 30, 0);
    cr_expect(str_starts(e.text, "rank 2 is lost: it ended with exit code 4"), "%s", e.text);
    cr_expect_eq(e.code, EXIT_ENV);
}

/* As under `trap '' CHLD`: the system keeps no exit codes, and gives their numbers away. */
Test(ranks, a_rank_is_missed_where_sigchld_is_ignored) {
    signal(SIGCHLD, SIG_IGN);
    struct err e = lose(gather_for_ever, 2, 30, SIGKILL);
    signal(SIGCHLD, SIG_DFL);
    cr_expect(str_starts(e.text, "rank 1 is lost: it ended, nobody knows how"), "%s", e.text);
    cr_expect_eq(e.code, EXIT_FAILED);
}

Test(ranks, nobody_waits_for_ever_for_a_rank_that_does_nothing) {
    struct err e = lose(hangs_in_the_middle, 3, 2, 0);
    cr_expect(str_starts(e.text, "rank 2 is lost: it used no processor time"), "%s", e.text);
    e = lose(gather_for_ever, 2, 2, SIGSTOP);
    cr_expect(str_starts(e.text, "rank 1 is lost: it used no processor time"), "%s", e.text);
}

static int works_for_long(struct ranks *r, struct err *e) {
    const double until = clock_seconds() + 3;
    int all[4] = { 0 };
    while (clock_seconds() < until) {}
    return ranks_gather(r, "number", all, sizeof *all, e) < 0 ? 7 : 0;
}

Test(ranks, a_rank_that_works_is_waited_for) {
    struct team t = { .does = works_for_long };
    struct err e = { 0 };
    int all[4] = { 0 };
    struct ranks *r = open_team(&t, 2, 1);
    cr_expect(ranks_gather(r, "number", all, sizeof *all, &e) == 0, "%s", e.text);
    ranks_close(&r);
}

/* ---- ranks that are not alike ---- */

static int calls_other(struct ranks *r, struct err *e) {
    long all[4] = { 0 };
    const int rc = ranks_gather(r, "other", all, sizeof *all, e);
    return rc < 0 && strstr(e->text, "'other'") && strstr(e->text, "'number'") ? 0 : 7;
}
static int calls_longer(struct ranks *r, struct err *e) {
    char all[4 * 1000] = { 0 };
    return ranks_gather(r, "number", all, 1000, e) < 0 ? 0 : 7;
}
static int parts_otherwise(struct ranks *r, struct err *e) {
    int all[2] = { 0 };
    const size_t from[3] = { 0, 0, sizeof all };
    return ranks_share(r, "number", all, from, e) < 0 ? 0 : 7;
}

Test(ranks, different_calls_are_told_to_all) {
    static const struct { body *does; const char *says; } t[] = {
        { calls_other, "rank 0 calls 'number' with 8 bytes where rank 1 calls 'other' with 16" },
        { calls_longer, "where rank 1 calls 'number' with 2000" },
        { parts_otherwise, "where rank 1 calls 'number' with 8 parted otherwise" },
    };
    for (size_t i = 0; i < COUNT_OF(t); i++) {
        struct team team = { .does = t[i].does };
        struct err e = { 0 };
        int all[2] = { 0 }, status = -1;
        struct ranks *r = open_team(&team, 2, 30);
        cr_expect(ranks_gather(r, "number", all, sizeof *all, &e) < 0);
        cr_expect(strstr(e.text, t[i].says), "%s", e.text);
        cr_expect_eq(waitpid(team.pid[1], &status, 0), team.pid[1]);
        cr_expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "rank 1: %x", status);
        ranks_close(&r);
    }
}

Test(ranks, what_is_no_memory_of_ranks_is_refused) {
    struct ranks *r;
    struct err e = { 0 };
    const int fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    cr_expect(ranks_join(&r, 1, fd, &e) < 0 && e.code != 0, "%s", e.text);
    cr_expect_null(r);
    close(fd);
}
