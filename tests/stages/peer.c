/* peer.c - see peer.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/stages/peer.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lib/base/fs.h"
#include "lib/base/hash.h"
#include "lib/base/log.h"
#include "lib/wire/tape.h"

/* two minutes: patience, not a measurement */
enum { WAIT_TURNS = 1200, TURN_MS = 100, ARGS_MAX = 96 };

static struct str text;

/* This program is ROOT/obj[-san]/tests/stages/run. */
static const char *learner_program(void) {
    static char self[FS_PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    cr_assert(n > 0);
    self[n] = 0;
    return strstr(self, "/obj-san/") ? "bin-san/qerl-learner" : "bin/qerl-learner";
}

static void write_questions(const char *path) {
    FILE *from = fopen("models/tiny/train.jsonl", "re"), *to = fopen(path, "we");
    char *line = NULL;
    size_t cap = 0;
    cr_assert(from && to, "run the tests from the root of the tree");
    for (int i = 0; i < PEER_QUESTIONS && getline(&line, &cap, from) > 0; i++) fputs(line, to);
    free(line);
    fclose(from);
    fclose(to);
}

static void start_learner(struct peer *p, const char *settings) {
    char words[4096], err[FS_PATH_MAX];
    int len = snprintf(words, sizeof words,
                       "%s --set run.dir=%s/run --set run.id=r1 --set model.path=models/tiny --set "
                       "data.train=%s/q.jsonl "
                       "--set data.prompt_max=256 --set sample.n=4 --set sample.new_max=8 --set "
                       "learner.batch=2 --set run.steps=1 "
                       "--set learner.lr=1e-3 --set learner.warmup=0 --set run.threads=1 "
                       "--out ticket=zmq+ipc://%s/t --in group=zmq+ipc://%s/g %s",
                       learner_program(), p->dir, p->dir, p->dir, p->dir, settings);
    cr_assert(len > 0 && len < (int)sizeof words);
    fs_join(err, sizeof err, p->dir, "err");
    fflush(NULL);
    p->pid = fork();
    if (p->pid) return;
    char *argv[ARGS_MAX] = { NULL };
    int n = 0, fd = open(err, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    for (char *w = strtok(words, " "); w && n < ARGS_MAX - 1; w = strtok(NULL, " ")) argv[n++] = w;
    dup2(fd, 2);
    dup2(fd, 1);
    unsetenv("BXFI_MAP");            /* the test runner's own */
    execv(argv[0], argv);
    _exit(99);
}

static struct link *connect_to(struct peer *p, const char *socket, enum link_kind kind) {
    char url[FS_PATH_MAX];
    struct link *l;
    struct err e = { 0 };
    snprintf(url, sizeof url, "zmq+ipc://%s/%s", p->dir, socket);
    struct link_opts o = {
        .name = socket, .kind = kind, .output = kind == LINK_KIND_PUSH, .identity = "rollout-0"
    };
    cr_assert(link_open(&l, url, &o, &e) == 0, "%s", e.text);
    return l;
}

void peer_open(struct peer *p, const char *settings) {
    char path[FS_PATH_MAX];
    *p = (struct peer){ 0 };
    log_open("test", LOG_LEVEL_ERROR);
    snprintf(p->dir, sizeof p->dir, "/tmp/qerl.XXXXXX");
    cr_assert(mkdtemp(p->dir));
    fs_join(path, sizeof path, p->dir, "q.jsonl");
    write_questions(path);
    start_learner(p, settings);
    p->ticket = connect_to(p, "t", LINK_KIND_DEALER);
    p->group = connect_to(p, "g", LINK_KIND_PUSH);
}

void peer_again(struct peer *p, const char *settings) {
    cr_assert(p->pid == 0);
    for (int i = 0; i < p->tickets; i++) rec_release(&p->kept[i]);
    p->tickets = 0;
    start_learner(p, settings);
}

void peer_close(struct peer *p) {
    if (p->pid > 0) {
        kill(p->pid, SIGKILL);
        waitpid(p->pid, NULL, 0);
    }
    link_close(&p->ticket);
    link_close(&p->group);
    for (int i = 0; i < p->tickets; i++) rec_release(&p->kept[i]);
    str_release(&p->said);
    str_release(&text);
    fs_remove_tree(p->dir, NULL);
}

static const char *said(struct peer *p) {
    char path[FS_PATH_MAX];
    fs_join(path, sizeof path, p->dir, "err");
    str_clear(&p->said);
    fs_read(&p->said, path, 1 << 20, NULL);
    return p->said.s ? p->said.s : "";
}

static void keep_ticket(struct peer *p, struct rec *r) {
    for (int i = 0; i < p->tickets; i++)
        if (p->kept[i].ticket.group == r->ticket.group) {
            rec_release(r);
            return;
        }
    cr_assert(p->tickets < PEER_TICKETS_MAX);
    int at = p->tickets++;
    for (; at > 0 && p->kept[at - 1].ticket.group > r->ticket.group; at--)
        p->kept[at] = p->kept[at - 1];
    p->kept[at] = *r;
}

struct rec_ticket *peer_ticket(struct peer *p, int n) {
    struct err e = { 0 };
    struct rec want = { .type = REC_WANT,
                        .want = { .rollout = "rollout-0", .incarnation = "1", .credit = 16 } };
    for (int turn = 0; turn < WAIT_TURNS; turn++) {
        for (int i = 0; i < p->tickets; i++)
            if (p->kept[i].ticket.group == n) return &p->kept[i].ticket;
        int status;
        cr_assert(waitpid(p->pid, &status, WNOHANG) == 0, "the learner ended:\n%s", said(p));
        if (turn % 5 == 0) link_send(p->ticket, &want, NULL, 0, &e);
        struct rec r;
        while (link_recv(p->ticket, &r, NULL, TURN_MS, &e) == LINK_RECORD) {
            if (r.type == REC_TICKET) keep_ticket(p, &r);
            else rec_release(&r);
        }
    }
    cr_assert(false, "ticket %d never came:\n%s", n, said(p));
    return NULL;
}

static char *copy(const char *t) { return mem_dup(t ? t : ""); }

struct rec peer_group(const struct rec_ticket *t, const double *score) {
    struct rec r;
    rec_init(&r, REC_GROUP);
    struct rec_group *g = &r.group;
    size_t bytes = (size_t)t->prompt_ids.n * sizeof(int32_t);
    *g = (struct rec_group){ .run = copy(t->run),
                             .fence = t->fence,
                             .step = t->step,
                             .group = t->group,
                             .question_id = copy(t->question_id),
                             .question = copy(t->question),
                             .prompt = copy(t->prompt),
                             .answer = copy(t->answer),
                             .temperature = t->temperature,
                             .top_p = t->top_p,
                             .top_k = t->top_k,
                             .new_max = t->new_max,
                             .seed = t->seed,
                             .version = t->version,
                             .adapter_sha256 = copy(t->adapter_sha256),
                             .sigma_realised = t->treatment.sigma,
                             .noise_elements = 1000,
                             .noise_changed = t->treatment.sigma > 0 ? 1000 : 0,
                             .rollout = mem_dup("rollout-0"),
                             .rule = mem_dup("strict"),
                             .samples = (int)t->samples,
                             .sample = mem_alloc((size_t)t->samples * sizeof *g->sample) };
    g->treatment = (struct rec_treatment){ copy(t->treatment.hash), t->treatment.sigma,
                                           t->treatment.noise_seed, mem_dup("none") };
    g->prompt_ids = (struct rec_i32){ memcpy(mem_alloc(bytes), t->prompt_ids.v, bytes),
                                      t->prompt_ids.n };
    for (int k = 0; k < g->samples; k++) {
        struct rec_sample *s = &g->sample[k];
        *s = (struct rec_sample){ .k = k, .stop = mem_dup("eos"), .text = mem_dup(""), .extracted = mem_dup(""), .score = score[k],
                                  .acc = score[k] > 0 };
        s->ids = (struct rec_i32){ mem_alloc(sizeof(int32_t) * (size_t)(2 + k)), 2 + k };
        s->lp = (struct rec_f32){ mem_alloc(sizeof(float) * (size_t)(2 + k)), 2 + k };
        for (int i = 0; i < s->ids.n; i++) {
            s->ids.v[i] = (int32_t)(10 + 7 * t->group + 3 * k + i) % 600;
            s->lp.v[i] = -1;
        }
    }
    return r;
}

void peer_send(struct peer *p, struct rec *group) {
    struct err e = { 0 };
    int rc = 1;
    for (int turn = 0; rc == 1 && turn < WAIT_TURNS; turn++)
        rc = link_send(p->group, group, NULL, TURN_MS, &e);
    cr_assert(rc == 0, "%s", e.text);
    rec_release(group);
}

enum rec_type peer_answer(struct peer *p, int64_t *group, char *why, size_t size) {
    struct err e = { 0 };
    for (int turn = 0; turn < WAIT_TURNS; turn++) {
        struct rec r;
        int status;
        if (link_recv(p->ticket, &r, NULL, TURN_MS, &e) != LINK_RECORD) {
            cr_assert(waitpid(p->pid, &status, WNOHANG) == 0, "the learner ended:\n%s", said(p));
            continue;
        }
        if (r.type == REC_TICKET) {
            keep_ticket(p, &r);
            continue;
        }
        enum rec_type type = r.type;
        if (type == REC_ACK || type == REC_NACK) {
            *group = r.ack.groups ? r.ack.group[0] : -1;
            snprintf(why, size, "%s", r.ack.why ? r.ack.why : "");
        }
        rec_release(&r);
        if (type == REC_ACK || type == REC_NACK) return type;
    }
    cr_assert(false, "no answer came:\n%s", said(p));
    return REC_NONE;
}

int peer_end(struct peer *p) {
    int status = 0;
    struct rec r;
    struct err e = { 0 };
    for (int turn = 0; turn < WAIT_TURNS; turn++) {
        if (waitpid(p->pid, &status, WNOHANG) == p->pid) {
            p->pid = 0;
            said(p);
            return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
        }
        if (link_recv(p->ticket, &r, NULL, TURN_MS, &e) != LINK_RECORD) continue;
        if (r.type == REC_END) {                     /* as a rollout does: goodbye by closing */
            link_close(&p->ticket);
            p->ticket = connect_to(p, "none", LINK_KIND_DEALER);
        }
        rec_release(&r);
    }
    cr_assert(false, "the learner does not end:\n%s", said(p));
    return -1;
}

static void path_of(struct peer *p, char path[FS_PATH_MAX], const char *name) {
    snprintf(path, FS_PATH_MAX, "%s/run/%s", p->dir, name);
}

const char *peer_read(struct peer *p, const char *name) {
    char path[FS_PATH_MAX];
    path_of(p, path, name);
    str_clear(&text);
    str_add(&text, "", 0);
    fs_read(&text, path, 1 << 22, NULL);
    return text.s;
}

bool peer_has(struct peer *p, const char *name) {
    char path[FS_PATH_MAX];
    path_of(p, path, name);
    return fs_exists(path);
}

int peer_journalled(struct peer *p, int64_t group) {
    char path[FS_PATH_MAX];
    struct tape *t;
    struct rec r;
    struct err e = { 0 };
    int n = 0, got;
    path_of(p, path, "tape/groups.tape");
    cr_assert(tape_read_open(&t, path, &e) == 0, "%s", e.text);
    while ((got = tape_read(t, &r, &e)) == 1) {
        n += r.group.group == group;
        rec_release(&r);
    }
    cr_assert(got == 0, "%s", e.text);
    tape_close(&t);
    return n;
}

const char *peer_adapter(struct peer *p, int64_t version) {
    static char sha[SHA256_HEX];
    char path[FS_PATH_MAX], name[64];
    struct err e = { 0 };
    snprintf(name, sizeof name, "adapters/v%06lld/adapter_model.safetensors", (long long)version);
    path_of(p, path, name);
    cr_assert(sha256_file(path, sha, &e) == 0, "%s", e.text);
    return sha;
}
