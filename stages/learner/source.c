/* source.c - see source.h. In the order of a group's life: leased, received, checked, journalled, acknowledged, forgotten.
 * SPDX-License-Identifier: Apache-2.0 */
#include "stages/learner/source.h"

#include <math.h>
#include <time.h>

#include "lib/base/fs.h"
#include "lib/base/log.h"

enum { PEERS_MAX = 64, LEASE_LOST_SECONDS = 5, PEER_LOST_SECONDS = 30, ACK_MAX = 64 };

struct peer {
    char name[LINK_PEER_MAX], incarnation[64];
    int64_t credit;
    double heard_at;
};
struct want {                        /* one group of the open wave */
    int64_t group;
    int peer;                        /* -1 = not leased */
    double leased_at;
};

struct source {
    struct stage *s;
    const struct learner_conf *c;
    const struct policy *policy;
    struct task_set *train;
    struct task_order order;
    struct tape *journal;            /* NULL when groups come from a file */
    int64_t fence;
    struct rec *held;                /* groups at hand, unordered; few: those of the open step */
    int helds, held_cap;
    struct peer peer[PEERS_MAX];
    int peers;
    struct want *want;
    int wants;
    const struct source_policy *now_wanted;
    struct source_counts counts;
};

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static const struct rec_group *find(const struct source *src, int64_t group) {
    for (int i = 0; i < src->helds; i++)
        if (src->held[i].group.group == group) return &src->held[i].group;
    return NULL;
}

static void hold(struct source *src, struct rec *r) {
    if (src->helds == src->held_cap) {
        src->held_cap = src->held_cap ? 2 * src->held_cap : 64;
        src->held = mem_grow(src->held, (size_t)src->held_cap * sizeof *src->held);
    }
    src->held[src->helds++] = *r;
}

static int read_all(struct source *src, int64_t cursor, struct err *e) {
    struct rec r;
    int got;
    if (src->journal) {
        while ((got = tape_read(src->journal, &r, e)) == 1) {
            if (r.type == REC_GROUP && r.group.group >= cursor && !find(src, r.group.group)) hold(src, &r);
            else rec_release(&r);
        }
        return got;
    }
    struct link *l = src->s->link[PORT_GROUP];
    while ((got = link_recv(l, &r, NULL, 1000, e)) != LINK_END) {
        if (got < 0) return -1;
        if (got == LINK_EMPTY) {
            if (stage_stopping(src->s)) return 0;
            continue;
        }
        if (r.group.group >= cursor && !find(src, r.group.group)) hold(src, &r);
        else rec_release(&r);
    }
    return 0;
}

int source_open(struct source **out, struct stage *s, const struct policy *p, struct task_set *train, int64_t fence,
                int64_t cursor, struct err *e) {
    struct source *src = mem_alloc(sizeof *src);
    src->s = s;
    src->c = s->conf;
    src->policy = p;
    src->train = train;
    src->fence = fence;
    task_order_init(&src->order, (uint64_t)src->c->shared.run.seed, train->n);
    if (!link_is_file(s->link[PORT_GROUP])) {
        char path[FS_PATH_MAX];
        fs_join(path, sizeof path, src->c->shared.run.dir, "tape");
        if (fs_mkdirs(path, e) < 0) goto failed;
        fs_join(path, sizeof path, src->c->shared.run.dir, "tape/groups.tape");
        if (tape_append_open(&src->journal, path, e) < 0) goto failed;
    }
    if (read_all(src, cursor, e) < 0) goto failed;
    if (src->helds) log_info("%d group(s) from %s", src->helds, src->journal ? "the journal" : link_url(s->link[PORT_GROUP]));
    *out = src;
    return 0;
failed:
    source_close(&src);
    return -1;
}

void source_close(struct source **sp) {
    struct source *src = *sp;
    if (!src) return;
    source_forget(src, INT64_MAX);
    tape_close(&src->journal);
    task_order_release(&src->order);
    free(src->held);
    free(src->want);
    free(src);
    *sp = NULL;
}

void source_forget(struct source *src, int64_t cursor) {
    int kept = 0;
    for (int i = 0; i < src->helds; i++) {
        if (src->held[i].group.group < cursor) rec_release(&src->held[i]);
        else src->held[kept++] = src->held[i];
    }
    src->helds = kept;
}

struct source_counts source_counts(const struct source *src) { return src->counts; }

/* ---- leasing ---- */

static int send_ticket(struct source *src, int w, int peer, struct err *e) {
    const struct learner_conf *c = src->c;
    const struct source_policy *p = src->now_wanted;
    int64_t group = src->want[w].group;
    int index = task_order_at(&src->order, group);
    const struct task_question *q = &src->train->q[index];
    char id[48];
    snprintf(id, sizeof id, "%s:%d", src->train->split, index);
    struct str text;
    struct tok_ids ids = { 0 };
    str_init(&text);
    if (policy_prompt(src->policy, &c->shared, q->question, &text, &ids, e) < 0) {
        str_release(&text);
        return -1;
    }
    struct rec r;
    rec_init(&r, REC_TICKET);
    r.ticket = (struct rec_ticket){
        .run = c->shared.run.id, .fence = src->fence, .step = p->step, .group = group, .question_id = id, .prompt = text.s,
        .prompt_ids = { ids.id, ids.n }, .question = q->question, .answer = q->gold, .samples = c->shared.sample.n,
        .new_max = c->shared.sample.new_max, .temperature = c->shared.sample.temperature, .top_p = c->shared.sample.top_p,
        .top_k = c->shared.sample.top_k, .seed = (uint64_t)c->shared.run.seed, .version = p->version,
        .adapter = (char *)(uintptr_t)p->adapter, .adapter_sha256 = (char *)(uintptr_t)p->adapter_sha256,
        .treatment = { (char *)(uintptr_t)src->policy->treatment, p->sigma, p->noise_seed, "none" } };
    int sent = link_send(src->s->link[PORT_TICKET], &r, src->peer[peer].name, 0, e);
    if (sent == 0) {
        src->want[w].peer = peer;
        src->want[w].leased_at = now();
        src->peer[peer].credit--;
        src->counts.leased++;
    } else src->peer[peer].credit = 0;               /* unreachable: it will say when it is back */
    free(ids.id);
    str_release(&text);
    return sent < 0 ? -1 : 0;
}

static int lease(struct source *src, struct err *e) {
    for (int w = 0; w < src->wants; w++) {
        if (src->want[w].peer >= 0) continue;
        int best = -1;
        for (int p = 0; p < src->peers; p++)
            if (src->peer[p].credit > 0 && (best < 0 || src->peer[p].credit > src->peer[best].credit)) best = p;
        if (best < 0) return 0;
        if (send_ticket(src, w, best, e) < 0) return -1;
    }
    return 0;
}

static void unlease(struct source *src, int peer, const char *why) {
    int n = 0;
    for (int w = 0; w < src->wants; w++)
        if (src->want[w].peer == peer) {
            src->want[w].peer = -1;
            n++;
        }
    if (n) log_info("%d group(s) of '%s' are asked for again: %s", n, src->peer[peer].name, why);
}

static int peer_of(struct source *src, const char *name) {
    for (int i = 0; i < src->peers; i++)
        if (strcmp(src->peer[i].name, name) == 0) return i;
    if (src->peers == PEERS_MAX) return -1;
    snprintf(src->peer[src->peers].name, LINK_PEER_MAX, "%s", name);
    return src->peers++;
}

static void take_want(struct source *src, const struct rec_want *want, const char *from) {
    int p = peer_of(src, from);
    if (p < 0) return;
    struct peer *peer = &src->peer[p];
    if (strcmp(peer->incarnation, want->incarnation) != 0) {
        if (*peer->incarnation) unlease(src, p, "it was started anew");
        snprintf(peer->incarnation, sizeof peer->incarnation, "%s", want->incarnation);
        log_info("rollout '%s' is here, takes %lld ticket(s)", peer->name, (long long)want->credit);
    }
    peer->heard_at = now();
    int64_t in_flight = 0;
    for (int w = 0; w < src->wants; w++) {
        if (src->want[w].peer != p) continue;
        bool holds = false;
        for (int i = 0; i < want->groups; i++) holds |= want->group[i] == src->want[w].group;
        if (holds) continue;
        if (now() - src->want[w].leased_at > LEASE_LOST_SECONDS) src->want[w].peer = -1;    /* the ticket never arrived */
        else in_flight++;
    }
    peer->credit = want->credit - in_flight;
}

/* ---- receiving ---- */

enum verdict { VERDICT_TAKE, VERDICT_REPEAT, VERDICT_REFUSE, VERDICT_FATAL };

/* A treatment that differs from what was asked for is fatal: the same pipeline would send it again for ever. */
static enum verdict check_treatment(const struct source *src, const struct rec_group *g, struct err *e) {
    const struct source_policy *p = src->now_wanted;
    if (strcmp(g->treatment.hash, src->policy->treatment) != 0) {
        err_set(e, "group %lld was made under treatment %s, this learner's configuration gives %s", (long long)g->group,
                g->treatment.hash, src->policy->treatment);
        return VERDICT_FATAL;
    }
    if (g->treatment.sigma != p->sigma || (p->sigma > 0 && g->treatment.noise_seed != p->noise_seed)) {
        err_set(e, "group %lld was made with sigma %g, step %lld asked for %g: the treatment was not applied as planned",
                (long long)g->group, g->treatment.sigma, (long long)p->step, p->sigma);
        return VERDICT_FATAL;
    }
    if (p->sigma <= 0) return VERDICT_TAKE;
    if (!(g->sigma_realised > 0) || g->noise_changed <= 0) {
        err_set(e, "group %lld: noise of sigma %g was intended, but nothing changed (realised %g on %lld of %lld weights)",
                (long long)g->group, p->sigma, g->sigma_realised, (long long)g->noise_changed, (long long)g->noise_elements);
        return VERDICT_FATAL;
    }
    /* rms of n normal draws: relative standard error 1/sqrt(2n); 1e-6 covers the rounding of w + dw near 1. */
    double bound = 6 * p->sigma / sqrt(2 * (double)g->noise_elements) + 1e-6;
    if (fabs(g->sigma_realised - p->sigma) > bound) {
        err_set(e, "group %lld: noise of sigma %g was intended, %g was realised (bound %g)", (long long)g->group, p->sigma,
                g->sigma_realised, bound);
        return VERDICT_FATAL;
    }
    return VERDICT_TAKE;
}

static const char *sample_fault(const struct source *src, const struct rec_group *g) {
    int vocab = src->policy->model->conf.vocab;
    for (int i = 0; i < g->samples; i++) {
        const struct rec_sample *s = &g->sample[i];
        if (s->k != i) return "samples are not numbered 0, 1, ...";
        if (s->ids.n < 1 || s->ids.n > g->new_max) return "a sample is empty or longer than sample.new_max";
        if (s->lp.n != s->ids.n) return "a sample has another number of log-probs than tokens";
        for (int t = 0; t < s->ids.n; t++) {
            if (s->ids.v[t] < 0 || s->ids.v[t] >= vocab) return "a token id lies outside the vocabulary";
            if (!(s->lp.v[t] <= 0) || !isfinite((double)s->lp.v[t])) return "a log-prob is not a finite number at most 0";
        }
        if (!isfinite(s->score)) return "a score is not finite";
    }
    return NULL;
}

static enum verdict check(const struct source *src, const struct rec_group *g, const char **why, struct err *e) {
    const struct learner_conf *c = src->c;
    const struct source_policy *p = src->now_wanted;
    bool wanted = false, offline = !src->journal;
    for (int w = 0; w < src->wants; w++) wanted |= src->want[w].group == g->group;
    if (!offline && strcmp(g->run, c->shared.run.id) != 0) {
        *why = "it belongs to another run";
        return VERDICT_REFUSE;
    }
    if (!offline && find(src, g->group)) return VERDICT_REPEAT;
    if (!wanted) {
        *why = g->step < p->step ? "its step is committed" : "nobody asked for it";
        return g->step < p->step ? VERDICT_REPEAT : VERDICT_REFUSE;
    }
    if (g->version != p->version || strcmp(g->adapter_sha256, p->adapter_sha256) != 0) {
        *why = "it was made with another adapter";
        return VERDICT_REFUSE;
    }
    if (g->samples != c->shared.sample.n || g->temperature != c->shared.sample.temperature || g->prompt_ids.n < 1) {
        *why = "its number of samples, temperature or prompt is not what was asked for";
        return VERDICT_REFUSE;
    }
    if ((*why = sample_fault(src, g))) return VERDICT_REFUSE;
    return check_treatment(src, g, e);
}

static void answer(struct source *src, enum rec_type type, const char *peer, int64_t *group, int n, const char *why) {
    if (!n || !src->s->link[PORT_TICKET]) return;
    struct rec r = { .type = type, .ack = { .run = src->c->shared.run.id, .fence = src->fence, .group = group, .groups = n,
                                            .why = (char *)(uintptr_t)why } };
    struct err ignored = { 0 };
    link_send(src->s->link[PORT_TICKET], &r, peer, 0, &ignored);    /* lost? the rollout sends its group again */
}

/* Takes what has arrived, journals it with one sync, then acknowledges. */
static int receive(struct source *src, int timeout_ms, struct err *e) {
    struct { int64_t group; char peer[LINK_PEER_MAX]; } done[ACK_MAX];
    int dones = 0, taken = 0;
    struct rec r;
    while (dones < ACK_MAX) {
        int got = link_recv(src->s->link[PORT_GROUP], &r, NULL, dones ? 0 : timeout_ms, e);
        if (got < 0) return -1;
        if (got != LINK_RECORD) break;
        const char *why = NULL;
        enum verdict v = check(src, &r.group, &why, e);
        if (r.group.fence != src->fence && v == VERDICT_TAKE) {
            v = VERDICT_REFUSE;
            why = "it was asked for by a learner that is no more";
        }
        if (v == VERDICT_FATAL) {
            rec_release(&r);
            return -1;
        }
        if (v == VERDICT_REFUSE) {
            log_warn("group %lld from '%s' refused: %s", (long long)r.group.group, r.group.rollout, why);
            answer(src, REC_NACK, r.group.rollout, &r.group.group, 1, why);
            for (int w = 0; w < src->wants; w++)
                if (src->want[w].group == r.group.group) src->want[w].peer = -1;
            src->counts.refused++;
            rec_release(&r);
            continue;
        }
        done[dones].group = r.group.group;
        snprintf(done[dones++].peer, LINK_PEER_MAX, "%s", r.group.rollout);
        if (v == VERDICT_REPEAT) {
            src->counts.repeated++;
            rec_release(&r);
            continue;
        }
        if (tape_append(src->journal, &r, e) < 0) {
            rec_release(&r);
            return -1;
        }
        taken++;
        src->counts.journalled++;
        src->s->progress++;
        hold(src, &r);
    }
    if (taken && tape_sync(src->journal, e) < 0) return -1;
    for (int i = 0; i < dones; i++) answer(src, REC_ACK, done[i].peer, &done[i].group, 1, "");
    return 0;
}

static int listen_to_rollouts(struct source *src, struct err *e) {
    struct rec r;
    char peer[LINK_PEER_MAX];
    int got;
    while ((got = link_recv(src->s->link[PORT_TICKET], &r, peer, 0, e)) == LINK_RECORD) {
        if (r.type == REC_WANT) take_want(src, &r.want, peer);
        rec_release(&r);
    }
    for (int p = 0; p < src->peers; p++)
        if (now() - src->peer[p].heard_at > PEER_LOST_SECONDS) {
            unlease(src, p, "it has been silent for 30 seconds");
            src->peer[p].credit = 0;
        }
    return got < 0 ? -1 : 0;
}

static int missing(const struct source *src) {
    int n = 0;
    for (int w = 0; w < src->wants; w++) n += !find(src, src->want[w].group);
    return n;
}

int source_wave(struct source *src, const struct source_policy *p, int64_t first, int count, const struct rec_group **group,
                struct err *e) {
    src->now_wanted = p;
    src->want = mem_grow(src->want, (size_t)count * sizeof *src->want);
    src->wants = 0;
    for (int i = 0; i < count; i++)
        if (!find(src, first + i)) src->want[src->wants++] = (struct want){ first + i, -1, 0 };
    if (src->wants && !src->journal)
        return err_set(e, "port 'group': '%s' does not hold group %lld, which step %lld needs", link_url(src->s->link[PORT_GROUP]),
                       (long long)src->want[0].group, (long long)p->step);
    while (missing(src)) {
        if (stage_stopping(src->s)) return 1;
        src->s->waits_for = "group";
        stage_beat(src->s, "wait", NULL);
        if (listen_to_rollouts(src, e) < 0 || lease(src, e) < 0) return -1;
        struct link *l[2] = { src->s->link[PORT_GROUP], src->s->link[PORT_TICKET] };
        link_wait(l, 2, 100);
        if (receive(src, 0, e) < 0) return -1;
        int left = 0;                                /* arrived groups are wanted no more */
        for (int w = 0; w < src->wants; w++)
            if (!find(src, src->want[w].group)) src->want[left++] = src->want[w];
        src->wants = left;
    }
    src->s->waits_for = "";
    for (int i = 0; i < count; i++) {
        const struct rec_group *g = group[i] = find(src, first + i);
        const char *fault = sample_fault(src, g);
        if (fault) return err_set(e, "group %lld: %s", (long long)g->group, fault);
        if (g->version != p->version || strcmp(g->adapter_sha256, p->adapter_sha256) != 0)
            return err_set(e, "recorded group %lld was made with adapter version %lld %.12s, this configuration arrives at version "
                           "%lld %.12s: settings, model or program differ from the recorded run's", (long long)g->group,
                           (long long)g->version, g->adapter_sha256, (long long)p->version, p->adapter_sha256);
        if (check_treatment(src, g, e) != VERDICT_TAKE) return -1;
    }
    return 0;
}

void source_end(struct source *src) {
    struct link *l = src->s->link[PORT_TICKET];
    if (!l) return;
    struct err ignored = { 0 };
    struct rec end = { .type = REC_END, .end = { .run = src->c->shared.run.id, .fence = src->fence, .step = src->s->step } };
    bool gone[PEERS_MAX] = { false };
    for (double until = now() + 2; now() < until;) {
        int left = 0;
        for (int p = 0; p < src->peers; p++)
            if (!gone[p]) {
                left++;
                if (link_send(l, &end, src->peer[p].name, 0, &ignored) != 0) gone[p] = true;    /* it closed its socket */
            }
        if (!left) return;
        struct rec r;
        char peer[LINK_PEER_MAX];
        while (link_recv(l, &r, peer, 50, &ignored) == LINK_RECORD) rec_release(&r);
    }
}
