/* supervise.c - see supervise.h.
 *
 * One thread, one loop: poll on the ends of processes (pidfd), ready lines and signals, at most 100
 * ms; then beats; then what is due. Order: small things, start, death, beats, endings, hangs, the
 * loop.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/supervise.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lib/base/clock.h"
#include "lib/base/fs.h"
#include "lib/wire/link.h"
#include "pipe/curves.h"
#include "pipe/proc.h"
#include "pipe/view.h"

#define READY_SECONDS 600.0
#define READY_SAY_SECONDS 10.0
#define EARLY_SECONDS 4.0
#define SELF_END_SECONDS 5.0      /* rollout and reward after the learner's end, before SIGTERM */
#define GRACE_SECONDS 10.0        /* after SIGTERM, before SIGKILL */
#define BACKOFF_SECONDS 0.2
enum { MEMBERS_MAX = PIPELINE_STAGES_MAX * REPLICAS_MAX, STALLS_MAX = 3 };

enum phase { PHASE_STARTING, PHASE_READY, PHASE_RESTART, PHASE_ENDED, PHASE_DEAD };
enum mode { MODE_RUN, MODE_ENDING, MODE_STOP };
struct member {                              /* one process, over all its lives */
    const struct pipe_stage *s;
    char id[160], doing[16], waits_for[64];
    enum phase phase;
    pid_t pid;
    int part;                                /* of the stage's processes */
    int pidfd, ready_fd, deaths, stalls, rank;
    double started, said_at, beat_at, progress_at, restart_at, term_at, backoff;
    int64_t progress, step;
    bool was_ready, killed_for_stall;
};
struct super {
    struct pipeline *p;
    const struct folder *f;
    struct member *m; int members;
    struct link *beats; char beat_url[200];
    int signal_fd;
    enum mode mode;
    double mode_at;
    bool hurry;                              /* stop everybody at once */
    int64_t step;                            /* completed, by the learner's beats */
    struct view view;
    struct curves curves;
    struct outcome *o;
};

/* Stop order is against the flow of data; whoever commits comes after those who feed him. */
static int rank_of(const char *name) {
    static const char *const order[] = { "rollout", "reward", "learner", "eval" };
    for (int i = 0; i < (int)COUNT_OF(order); i++)
        if (strcmp(name, order[i]) == 0) return i;
    return (int)COUNT_OF(order);
}
enum { RANK_ROLLOUT = 0, RANK_REWARD = 1, RANK_LEARNER = 2 };

static bool lives(const struct member *m) {
    return m->phase == PHASE_STARTING || m->phase == PHASE_READY;
}

static void set_mode(struct super *s, enum mode mode) {
    s->mode = mode;
    s->mode_at = clock_seconds();
}

/* The first reason stays: what follows are its consequences. */
static void give_up(struct super *s, enum run_state state, int code, const char *fmt, ...)
    PRINTF_LIKE(4, 5);
static void give_up(struct super *s, enum run_state state, int code, const char *fmt, ...) {
    if (s->mode == MODE_STOP) return;
    /* trained, but not scored */
    if (s->mode == MODE_ENDING && state == RUN_STATE_FAILED) state = RUN_STATE_INCOMPLETE;
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(s->o->reason, sizeof s->o->reason, fmt, ap);
    va_end(ap);
    s->o->state = state;
    s->o->code = code;
    set_mode(s, MODE_STOP);
}

/* ---- start ---- */

static void log_path(char path[FS_PATH_MAX], const struct super *s, const struct member *m) {
    char name[200];
    snprintf(name, sizeof name, "log/%.150s.log", m->s->processes > 1 ? m->id : m->s->name);
    fs_join(path, FS_PATH_MAX, s->f->dir, name);
}

static void member_start(struct super *s, struct member *m) {
    char conf[FS_PATH_MAX], log[FS_PATH_MAX], name[200], ready[16], gpus[PLACE_VISIBLE_MAX];
    int fd[2];
    struct err e = { 0 };
    const struct place_choice *all = &m->s->place.choice[m->s->place.taken],
                              one = place_share(all, m->part),
                              *where = m->s->processes > 1 ? &one : all;
    snprintf(name, sizeof name, "conf/%.150s.conf", m->s->name);
    fs_join(conf, sizeof conf, s->f->dir, name);
    log_path(log, s, m);
    if (pipe2(fd, O_CLOEXEC | O_NONBLOCK) < 0) {
        give_up(s, RUN_STATE_FAILED, EXIT_ENV, "pipe: %s", strerror(errno));
        return;
    }
    snprintf(ready, sizeof ready, "%d", fd[1]);
    place_visible(gpus, sizeof gpus, where);
    const char *argv[] = { m->s->exec, "-c",        conf,         "--id", m->id,
                           "--beat",   s->beat_url, "--ready-fd", ready,  NULL };
    const struct proc_spec spec = { argv, log, &where->cores, gpus, fd[1], s->f->lock_fd };
    m->pid = proc_start(&spec, &m->pidfd, &e);
    close(fd[1]);
    if (m->pid < 0) {
        close(fd[0]);
        m->phase = PHASE_DEAD;
        give_up(s, RUN_STATE_FAILED, EXIT_ENV, "stage '%s': %s", m->s->name, e.text);
        return;
    }
    m->ready_fd = fd[0];
    m->phase = PHASE_STARTING;
    m->started = m->said_at = m->beat_at = m->progress_at = clock_seconds();
    m->was_ready = m->killed_for_stall = false;
    m->term_at = 0;
    m->progress = -1;
    m->doing[0] = m->waits_for[0] = 0;
}

static void member_look_ready(struct super *s, struct member *m) {
    char text[16];
    ssize_t n = m->ready_fd >= 0 ? read(m->ready_fd, text, sizeof text) : -1;
    if (n < 0) return;                                       /* nothing yet, or no descriptor */
    close(m->ready_fd);
    m->ready_fd = -1;
    /* it ended, or closed it without a word */
    if (n == 0) return;
    m->was_ready = true;
    m->phase = PHASE_READY;
    m->beat_at = m->progress_at = clock_seconds();
    view_event(&s->view, "%s ready after %.1f s", m->id, clock_seconds() - m->started);
}

/* ---- death ---- */

static void how_it_died(char *out, size_t size, int status) {
    if (status > 128 && status < 128 + 65)
        snprintf(out, size, "was killed by signal %d (%s)", status - 128, strsignal(status - 128));
    else snprintf(out, size, "ended with exit code %d", status);
}

/* The last thing it said, ": so and so": the reason behind an exit code. */
static void last_word(char *out, size_t size, const struct super *s, const struct member *m) {
    char path[FS_PATH_MAX];
    struct tail t;
    *out = 0;
    log_path(path, s, m);
    tail_open(&t, path, false);
    while (tail_next(&t))
        if (t.line.len && !strstr(t.line.s, ": not started; "))
            snprintf(out, size, ": %.300s", t.line.s);
    tail_close(&t);
}

static void show_log(struct super *s, const struct member *m) {
    char path[FS_PATH_MAX];
    log_path(path, s, m);
    view_event(&s->view, "last lines of %s:", path);
    tail_last(path, 12, "    ", stderr);
}

static void learner_ended(struct super *s, struct member *m) {
    view_event(&s->view, "%s finished; the others end now", m->id);
    set_mode(s, MODE_ENDING);
}

/* A learner that starts again may want groups from stages that had already ended. */
static void wake_feeders(struct super *s) {
    for (int i = 0; i < s->members; i++)
        if (s->m[i].phase == PHASE_ENDED && s->m[i].rank < RANK_LEARNER) {
            s->m[i].phase = PHASE_RESTART;
            s->m[i].restart_at = clock_seconds();
        }
}

static bool learner_lives(const struct super *s) {
    for (int i = 0; i < s->members; i++)
        if (s->m[i].rank == RANK_LEARNER && (lives(&s->m[i]) || s->m[i].phase == PHASE_RESTART))
            return true;
    return false;
}

/* A feeder that ended well although the learner goes on: somebody stopped it. The wait is longer
 * than the learner needs to end after it told the rollouts that all is done. */
static void left_early(struct super *s, struct member *m) {
    if (m->deaths >= m->s->restarts) {
        give_up(s, RUN_STATE_FAILED, EXIT_FAILED,
                "stage '%s' ended %d times before the learner in step %lld", m->s->name,
                m->deaths + 1, (long long)s->step);
        return;
    }
    m->deaths++;
    m->restart_at = clock_seconds() + EARLY_SECONDS;
    m->phase = PHASE_RESTART;
}

static void died_badly(struct super *s, struct member *m, int status) {
    char how[120], why[320];
    how_it_died(how, sizeof how, status);
    bool says_why = status == EXIT_USAGE || status == EXIT_CONFIG || status == EXIT_ENV;
    if (!m->was_ready && says_why) {
        view_event(&s->view, "%s %s before it was ready", m->id, how);
        show_log(s, m);
        last_word(why, sizeof why, s, m);
        give_up(s, RUN_STATE_FAILED, status, "stage '%s' %s at start%s", m->s->name, how, why);
        s->hurry = true;
        return;
    }
    if (status == EXIT_CONFIG) {                     /* it would say so again after every restart */
        view_event(&s->view, "%s %s", m->id, how);
        show_log(s, m);
        last_word(why, sizeof why, s, m);
        give_up(s, RUN_STATE_FAILED, status, "stage '%s' %s in step %lld%s", m->s->name, how,
                (long long)s->step, why);
        return;
    }
    if (m->deaths >= m->s->restarts || m->stalls >= STALLS_MAX) {
        bool stalled = m->stalls >= STALLS_MAX;
        view_event(&s->view, "%s %s; it was restarted %d times in this step already", m->id, how,
                   m->deaths);
        show_log(s, m);
        last_word(why, sizeof why, s, m);
        give_up(s, RUN_STATE_FAILED, stalled ? EXIT_STALLED : EXIT_FAILED,
                "stage '%s' %s %d times in step %lld%s", m->s->name,
                stalled ? "made no progress" : how, m->deaths + 1, (long long)s->step,
                stalled ? "" : why);
        return;
    }
    m->deaths++;
    m->restart_at = clock_seconds() + m->backoff;
    m->phase = PHASE_RESTART;
    view_event(&s->view, "%s %s; restart %d of %d in %.1f s", m->id, how, m->deaths, m->s->restarts,
               m->backoff);
    m->backoff = m->backoff < 15 ? m->backoff * 2 : 30;
    if (m->rank == RANK_LEARNER) wake_feeders(s);
}

static void member_reap(struct super *s, struct member *m) {
    int w = 0;
    if (waitpid(m->pid, &w, WNOHANG) != m->pid) return;
    member_look_ready(s, m);
    if (m->ready_fd >= 0) close(m->ready_fd);
    close(m->pidfd);
    m->ready_fd = m->pidfd = -1;
    m->pid = -1;
    int status = proc_status(w);
    m->phase = status == 0 ? PHASE_ENDED : PHASE_DEAD;
    bool asked = m->term_at > 0;
    if (s->mode == MODE_STOP) {
        view_event(&s->view, "%s stopped", m->id);
    } else if (s->mode == MODE_ENDING && m->rank < RANK_LEARNER) {
        if (!asked && status != 0) m->phase = PHASE_ENDED;   /* nobody needs it any more */
    } else if (status != 0) {
        died_badly(s, m, status);
    } else if (m->rank == RANK_LEARNER) {
        learner_ended(s, m);
    } else if (m->rank < RANK_LEARNER && learner_lives(s)) {
        left_early(s, m);
    }
}

/* ---- beats ---- */

static void take_beat(struct super *s, const struct rec_beat *b, const char *peer) {
    for (int i = 0; i < s->members; i++) {
        struct member *m = &s->m[i];
        if (m->pid != (pid_t)b->pid && strcmp(m->id, peer) != 0) continue;
        if (m->pid != (pid_t)b->pid) return;                 /* an earlier life */
        m->beat_at = clock_seconds();
        if (b->progress != m->progress) m->progress_at = m->beat_at;
        m->progress = b->progress;
        m->step = b->step;
        snprintf(m->doing, sizeof m->doing, "%s", b->state ? b->state : "");
        snprintf(m->waits_for, sizeof m->waits_for, "%s", b->waits_for ? b->waits_for : "");
        if (m->rank == RANK_LEARNER && b->step > s->step) {
            s->step = b->step;
            for (int j = 0; j < s->members; j++) {
                s->m[j].deaths = s->m[j].stalls = 0;
                s->m[j].backoff = BACKOFF_SECONDS;
            }
        }
        return;
    }
}

static void take_beats(struct super *s) {
    char peer[LINK_PEER_MAX];
    struct rec r;
    struct err e = { 0 };
    for (int i = 0; i < 1000; i++) {
        int rc = link_recv(s->beats, &r, peer, 0, &e);
        if (rc < 0) view_event(&s->view, "unreadable beat: %s", e.text);
        if (rc != LINK_RECORD) return;
        if (r.type == REC_BEAT) take_beat(s, &r.beat, peer);
        rec_release(&r);
    }
}

/* ---- endings ---- */

static void terminate(struct member *m) {
    if (!lives(m)) return;
    if (m->term_at <= 0) {
        m->term_at = clock_seconds();
        kill(m->pid, SIGTERM);
        /* a stopped process cannot hear the first one */
        kill(m->pid, SIGCONT);
    } else if (clock_seconds() - m->term_at > GRACE_SECONDS) {
        kill(-m->pid, SIGKILL);
        kill(m->pid, SIGKILL);
    }
}

static void end_feeders(struct super *s) {
    bool rollouts = false;
    for (int i = 0; i < s->members; i++)
        rollouts = rollouts || (lives(&s->m[i]) && s->m[i].rank == RANK_ROLLOUT);
    bool late = clock_seconds() - s->mode_at > SELF_END_SECONDS;
    for (int i = 0; i < s->members; i++) {
        struct member *m = &s->m[i];
        if (m->phase == PHASE_RESTART && m->rank < RANK_LEARNER) m->phase = PHASE_ENDED;
        if ((m->rank == RANK_ROLLOUT && late) || (m->rank == RANK_REWARD && (late || !rollouts)))
            terminate(m);
    }
}

static void stop_members(struct super *s) {
    int first = 99;
    for (int i = 0; i < s->members; i++) {
        if (s->m[i].phase == PHASE_RESTART) s->m[i].phase = PHASE_DEAD;
        if (lives(&s->m[i]) && s->m[i].rank < first) first = s->m[i].rank;
    }
    for (int i = 0; i < s->members; i++)
        if (s->hurry || s->m[i].rank == first) terminate(&s->m[i]);
}

static void take_signal(struct super *s) {
    struct signalfd_siginfo info;
    if (read(s->signal_fd, &info, sizeof info) != sizeof info) return;
    if (info.ssi_signo == SIGCHLD) return;
    if (s->mode != MODE_STOP) {
        view_event(&s->view, "stopping (%s); once more to stop at once",
                   strsignal((int)info.ssi_signo));
        give_up(s, RUN_STATE_STOPPED, EXIT_FAILED, "by signal %s",
                sigabbrev_np((int)info.ssi_signo));
        return;
    }
    s->hurry = true;
    for (int i = 0; i < s->members; i++)
        if (lives(&s->m[i])) kill(s->m[i].pid, SIGKILL);
}

/* ---- hangs ---- */

static bool working(const struct member *m) {
    return !*m->waits_for && strcmp(m->doing, "wait") != 0;
}

static void look_for_hangs(struct super *s) {
    double now = clock_seconds(), most = s->p->stall_seconds;
    bool all_wait = s->mode == MODE_RUN;
    int alive = 0;
    for (int i = 0; i < s->members; i++) {
        struct member *m = &s->m[i];
        if (m->phase == PHASE_STARTING) {
            if (now - m->said_at > READY_SAY_SECONDS) {
                view_event(&s->view, "%s is not ready yet after %.0f s%s%s", m->id,
                           now - m->started, *m->waits_for ? ": waits for " : "", m->waits_for);
                m->said_at = now;
            }
            if (now - m->started > READY_SECONDS && !m->killed_for_stall) {
                view_event(&s->view, "%s was not ready within %.0f s", m->id, READY_SECONDS);
                m->killed_for_stall = true;
                kill(m->pid, SIGKILL);
            }
        }
        /* one that never beat gets the time of a slow start */
        bool beats = m->progress >= 0;
        bool silent = now - m->beat_at > (beats || most > READY_SECONDS ? most : READY_SECONDS);
        bool stuck = beats && working(m) && now - m->progress_at > most;
        if (m->phase == PHASE_READY && (silent || stuck) && !m->killed_for_stall) {
            view_event(&s->view, "%s made no progress for %.0f s; it is restarted", m->id,
                       now - (silent ? m->beat_at : m->progress_at));
            m->killed_for_stall = true;
            m->stalls++;
            kill(m->pid, SIGKILL);
        }
        if (m->phase == PHASE_ENDED) continue;
        alive++;
        all_wait = all_wait && m->phase == PHASE_READY && !working(m) &&
                   now - m->progress_at > most;
    }
    if (!all_wait || !alive) return;
    for (int i = 0; i < s->members; i++)
        if (lives(&s->m[i])) view_event(&s->view, "%s waits for %s", s->m[i].id, s->m[i].waits_for);
    give_up(s, RUN_STATE_FAILED, EXIT_STALLED,
            "every stage waits for another since %.0f s, in step %lld", most, (long long)s->step);
}

/* ---- the loop ---- */

static void sleep_until_news(struct super *s) {
    struct pollfd p[2 * MEMBERS_MAX + 1] = { { s->signal_fd, POLLIN, 0 } };
    nfds_t n = 1;
    for (int i = 0; i < s->members; i++) {
        if (!lives(&s->m[i])) continue;
        p[n++] = (struct pollfd){ s->m[i].pidfd, POLLIN, 0 };
        if (s->m[i].ready_fd >= 0) p[n++] = (struct pollfd){ s->m[i].ready_fd, POLLIN, 0 };
    }
    if (poll(p, n, 100) > 0 && p[0].revents) take_signal(s);
}

static void show(struct super *s) {
    static const char *const phase[] = { "starts", "works", "restarts", "has ended", "is dead" };
    struct view_stage v[MEMBERS_MAX];
    for (int i = 0; i < s->members; i++) {
        const struct member *m = &s->m[i];
        bool waits = m->phase == PHASE_READY && !working(m);
        v[i] = (struct view_stage){ m->id, waits ? "idle" : phase[m->phase],
                                    lives(m) ? m->waits_for : "" };
    }
    view_tick(&s->view, v, s->members);
    curves_tick(&s->curves);
}

static bool over(const struct super *s) {
    for (int i = 0; i < s->members; i++)
        if (lives(&s->m[i]) || s->m[i].phase == PHASE_RESTART) return false;
    return true;
}

static void turn(struct super *s) {
    sleep_until_news(s);
    take_beats(s);
    for (int i = 0; i < s->members; i++) {
        struct member *m = &s->m[i];
        if (lives(m)) member_look_ready(s, m);
        if (lives(m)) member_reap(s, m);
        if (m->phase == PHASE_RESTART && s->mode != MODE_STOP && clock_seconds() >= m->restart_at)
            member_start(s, m);
    }
    if (s->mode == MODE_ENDING) end_feeders(s);
    if (s->mode == MODE_STOP) stop_members(s);
    else look_for_hangs(s);
    show(s);
}

static void members_make(struct super *s) {
    for (int i = 0; i < s->p->stages; i++)
        for (int k = 0; k < s->p->stage[i].processes; k++) {
            struct member *m = &s->m[s->members++];
            m->s = &s->p->stage[i];
            m->part = k;
            m->rank = rank_of(m->s->about.name);
            m->pidfd = m->ready_fd = -1;
            m->pid = -1;
            m->backoff = BACKOFF_SECONDS;
            snprintf(m->id, sizeof m->id, "%.140s-%d", m->s->name, k);
        }
}

static int open_beats(struct super *s, const char *ipc_dir, struct err *e) {
    const struct link_opts o = {
        .name = "beat", .kind = LINK_KIND_ROUTER, .bind = true, .expected = REC_BEAT, .hwm = 1000
    };
    snprintf(s->beat_url, sizeof s->beat_url, "zmq+ipc://%s/beat", ipc_dir);
    return link_open(&s->beats, s->beat_url, &o, e);
}

static int open_signals(sigset_t *before) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGHUP);
    sigaddset(&set, SIGCHLD);
    sigprocmask(SIG_BLOCK, &set, before);
    signal(SIGPIPE, SIG_IGN);
    return signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
}

/* Done means scored: a run whose stages all ended well but whose last step has no score is
 * incomplete. */
static void judge(struct super *s, const struct plan *pl) {
    struct outcome *o = s->o;
    struct scores scores;
    if (s->mode == MODE_STOP) return;
    scores_read(&scores, s->f->dir);
    bool scored = pl->scored_last < 0 || scores_has_step(&scores, pl->scored_last);
    o->state = scored ? RUN_STATE_DONE : RUN_STATE_INCOMPLETE;
    o->code = scored ? EXIT_DONE : EXIT_FAILED;
    if (!scored)
        snprintf(o->reason, sizeof o->reason, "no score of the last step %lld",
                 (long long)pl->scored_last);
    scores_release(&scores);
}

/* A run that is not where it was meant to be says so first. */
static void tell_passed(struct super *s) {
    struct str text;
    str_init(&text);
    pipeline_passed(s->p, &text);
    char *rest = text.s;
    for (char *line; (line = strsep(&rest, "\n")) && *line;) view_event(&s->view, "%s", line);
    str_release(&text);
}

void supervise(struct outcome *o, struct pipeline *p, const struct plan *pl, const struct folder *f,
               const char *ipc_dir) {
    struct super s = { .p = p, .f = f, .o = o, .mode = MODE_RUN };
    struct err e = { 0 };
    sigset_t before;
    *o = (struct outcome){ RUN_STATE_FAILED, EXIT_FAILED, "" };
    s.signal_fd = open_signals(&before);
    s.m = mem_alloc(MEMBERS_MAX * sizeof *s.m);
    view_open(&s.view, f, pl->steps);
    tell_passed(&s);
    curves_open(&s.curves, f->dir, pipeline_text(p, "run.tensorboard", p->name));
    members_make(&s);
    if (open_beats(&s, ipc_dir, &e) < 0)
        give_up(&s, RUN_STATE_FAILED, e.code ? e.code : EXIT_ENV, "%s", e.text);
    for (int i = 0; i < s.members && s.mode == MODE_RUN; i++) member_start(&s, &s.m[i]);
    for (int i = 0; i < s.members; i++)
        /* not started: an earlier one could not be */
        if (s.m[i].pid < 0) s.m[i].phase = PHASE_DEAD;
    while (!over(&s)) turn(&s);
    show(&s);
    judge(&s, pl);
    curves_close(&s.curves);
    view_close(&s.view);
    link_close(&s.beats);
    free(s.m);
    close(s.signal_fd);
    sigprocmask(SIG_SETMASK, &before, NULL);
}
