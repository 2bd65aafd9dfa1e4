/* intake.c - see intake.h. In the order of a group's life: leased, received, checked, journalled,
 * acknowledged, forgotten.
 * SPDX-License-Identifier: Apache-2.0 */
#include "stages/learner/intake.h"

#include <math.h>
#include <time.h>

#include "lib/base/fs.h"
#include "lib/base/clock.h"
#include "lib/base/log.h"

enum {
    PEERS_MAX = 64,
    LEASE_LOST_SECONDS = 5,
    PEER_LOST_SECONDS = 30,
    ACK_MAX = 64,
    QUESTION_ID_MAX = 48,
    REFUSALS_MAX = 32
};

struct peer {
    char name[LINK_PEER_MAX], incarnation[64];
    int64_t credit;
    double heard_at;
};
struct want {                        /* one group that was asked for and is not here */
    int64_t group;
    const struct intake_policy *policy;
    int peer;                        /* -1 = not leased */
    double leased_at;
    /* of what was made for us as we asked: it would come again the same */
    int refusals;
};

struct intake {
    struct stage *s;
    const struct learner_conf *c;
    const struct policy *policy;
    struct task_set *train;
    struct task_order order;
    struct tape *journal;            /* NULL when groups come from a file */
    int64_t fence;
    /* groups at hand, unordered; few: those of the open steps. Each stays where it is: lent */
    struct rec **held;
    int helds, held_cap;
    struct peer peer[PEERS_MAX];
    int peers;
    struct want *want;               /* by step, then as asked for */
    int wants;
    struct intake_policy policy_of[LAG_MAX + 1];     /* by step modulo their number */
    const struct intake_policy *now_wanted;          /* of the step that is waited for */
    int64_t floor;                   /* groups below it are of committed steps */
    double resumed_at;               /* before that nobody listened to rollouts */
    struct intake_counts counts;
};

static const struct rec_group *find(const struct intake *in, int64_t group) {
    for (int i = 0; i < in->helds; i++)
        if (in->held[i]->group.group == group) return &in->held[i]->group;
    return NULL;
}

static void hold(struct intake *in, struct rec *r) {
    if (in->helds == in->held_cap) {
        in->held_cap = in->held_cap ? 2 * in->held_cap : 64;
        in->held = mem_grow(in->held, (size_t)in->held_cap * sizeof *in->held);
    }
    in->held[in->helds] = mem_alloc(sizeof *r);
    *in->held[in->helds++] = *r;
}

static int read_all(struct intake *in, int64_t cursor, struct err *e) {
    struct rec r;
    int got;
    if (in->journal) {
        while ((got = tape_read(in->journal, &r, e)) == 1) {
            if (r.type == REC_GROUP && r.group.group >= cursor && !find(in, r.group.group))
                hold(in, &r);
            else rec_release(&r);
        }
        return got;
    }
    struct link *l = in->s->link[PORT_GROUP];
    while ((got = link_recv(l, &r, NULL, 1000, e)) != LINK_END) {
        if (got < 0) return -1;
        if (got == LINK_EMPTY) {
            if (stage_stopping(in->s)) return 0;
            continue;
        }
        if (r.group.group >= cursor && !find(in, r.group.group)) hold(in, &r);
        else rec_release(&r);
    }
    return 0;
}

int intake_open(struct intake **out, struct stage *s, const struct policy *p,
                struct task_set *train, int64_t fence, int64_t cursor, struct err *e) {
    struct intake *in = mem_alloc(sizeof *in);
    in->s = s;
    in->c = s->conf;
    in->policy = p;
    in->train = train;
    in->fence = fence;
    in->floor = cursor;
    task_order_init(&in->order, (uint64_t)in->c->shared.run.seed, train->n);
    if (!link_is_file(s->link[PORT_GROUP])) {
        char path[FS_PATH_MAX];
        fs_join(path, sizeof path, in->c->shared.run.dir, "tape");
        if (fs_mkdirs(path, e) < 0) goto failed;
        fs_join(path, sizeof path, in->c->shared.run.dir, "tape/groups.tape");
        if (tape_append_open(&in->journal, path, e) < 0) goto failed;
    }
    if (read_all(in, cursor, e) < 0) goto failed;
    if (in->helds)
        log_info("%d group(s) from %s", in->helds,
                 in->journal ? "the journal" : link_url(s->link[PORT_GROUP]));
    *out = in;
    return 0;
failed:
    intake_close(&in);
    return -1;
}

void intake_close(struct intake **sp) {
    struct intake *in = *sp;
    if (!in) return;
    intake_forget(in, INT64_MAX);
    tape_close(&in->journal);
    task_order_release(&in->order);
    free(in->held);
    free(in->want);
    free(in);
    *sp = NULL;
}

void intake_forget(struct intake *in, int64_t cursor) {
    int kept = 0;
    in->floor = cursor;
    for (int i = 0; i < in->helds; i++) {
        if (in->held[i]->group.group >= cursor) {
            in->held[kept++] = in->held[i];
            continue;
        }
        rec_release(in->held[i]);
        free(in->held[i]);
    }
    in->helds = kept;
}

struct intake_counts intake_counts(const struct intake *in) { return in->counts; }

/* ---- leasing ---- */

/* Index of the question that a group asks, and its id. */
static int question_id(struct intake *in, int64_t group, char id[QUESTION_ID_MAX]) {
    int index = task_order_at(&in->order, group);
    snprintf(id, QUESTION_ID_MAX, "%s:%d", in->train->split, index);
    return index;
}

static int send_ticket(struct intake *in, int w, int peer, struct err *e) {
    const struct learner_conf *c = in->c;
    const struct intake_policy *p = in->want[w].policy;
    int64_t group = in->want[w].group;
    char id[QUESTION_ID_MAX];
    const struct task_question *q = &in->train->q[question_id(in, group, id)];
    struct str text;
    struct tok_ids ids = { 0 };
    str_init(&text);
    if (policy_prompt(in->policy, &c->shared, q->question, &text, &ids, e) < 0) {
        str_release(&text);
        return -1;
    }
    struct rec r;
    rec_init(&r, REC_TICKET);
    r.ticket = (struct rec_ticket){ .run = c->shared.run.id,
                                    .fence = in->fence,
                                    .step = p->step,
                                    .group = group,
                                    .question_id = id,
                                    .prompt = text.s,
                                    .prompt_ids = { ids.id, ids.n },
                                    .question = q->question,
                                    .answer = q->gold,
                                    .samples = c->shared.sample.n,
                                    .new_max = c->shared.sample.new_max,
                                    .temperature = c->shared.sample.temperature,
                                    .top_p = c->shared.sample.top_p,
                                    .top_k = c->shared.sample.top_k,
                                    .seed = (uint64_t)c->shared.run.seed,
                                    .version = p->version,
                                    .adapter = (char *)(uintptr_t)p->adapter,
                                    .adapter_sha256 = (char *)(uintptr_t)p->adapter_sha256,
                                    .treatment = { (char *)(uintptr_t)in->policy->treatment,
                                                   p->sigma, p->noise_seed,
                                                   in->policy->ops.s } };
    int sent = link_send(in->s->link[PORT_TICKET], &r, in->peer[peer].name, 0, e);
    if (sent == 0) {
        in->want[w].peer = peer;
        in->want[w].leased_at = clock_seconds();
        in->peer[peer].credit--;
        in->counts.leased++;
    } else in->peer[peer].credit = 0;               /* unreachable: it will say when it is back */
    free(ids.id);
    str_release(&text);
    return sent < 0 ? -1 : 0;
}

static int lease(struct intake *in, struct err *e) {
    for (int w = 0; w < in->wants; w++) {
        if (in->want[w].peer >= 0) continue;
        int best = -1;
        for (int p = 0; p < in->peers; p++)
            if (in->peer[p].credit > 0 && (best < 0 || in->peer[p].credit > in->peer[best].credit))
                best = p;
        if (best < 0) return 0;
        if (send_ticket(in, w, best, e) < 0) return -1;
    }
    return 0;
}

static void unlease(struct intake *in, int peer, const char *why) {
    int n = 0;
    for (int w = 0; w < in->wants; w++)
        if (in->want[w].peer == peer) {
            in->want[w].peer = -1;
            n++;
        }
    if (n) log_info("%d group(s) of '%s' are asked for again: %s", n, in->peer[peer].name, why);
}

static int peer_of(struct intake *in, const char *name) {
    for (int i = 0; i < in->peers; i++)
        if (strcmp(in->peer[i].name, name) == 0) return i;
    if (in->peers == PEERS_MAX) return -1;
    snprintf(in->peer[in->peers].name, LINK_PEER_MAX, "%s", name);
    return in->peers++;
}

static void take_want(struct intake *in, const struct rec_want *want, const char *from) {
    int p = peer_of(in, from);
    if (p < 0) return;
    struct peer *peer = &in->peer[p];
    if (strcmp(peer->incarnation, want->incarnation) != 0) {
        if (*peer->incarnation) unlease(in, p, "it was started anew");
        snprintf(peer->incarnation, sizeof peer->incarnation, "%s", want->incarnation);
        log_info("rollout '%s' is here, takes %lld ticket(s)", peer->name, (long long)want->credit);
    }
    peer->heard_at = clock_seconds();
    int64_t in_flight = 0;
    for (int w = 0; w < in->wants; w++) {
        if (in->want[w].peer != p) continue;
        bool holds = false;
        for (int i = 0; i < want->groups; i++) holds |= want->group[i] == in->want[w].group;
        if (holds) continue;
        /* the ticket never arrived; what was said while nobody listened may be older than it */
        const double since = fmax(in->want[w].leased_at, in->resumed_at);
        if (clock_seconds() - since > LEASE_LOST_SECONDS) in->want[w].peer = -1;
        else in_flight++;
    }
    peer->credit = want->credit - in_flight;
}

/* ---- receiving ---- */

enum verdict { VERDICT_TAKE, VERDICT_REPEAT, VERDICT_REFUSE, VERDICT_FATAL };

/* AQN as applied against as planned. */
static int check_aqn(const struct intake_policy *p, const struct rec_group *g, struct err *e) {
    if (g->treatment.sigma != p->sigma ||
        (p->sigma > 0 && g->treatment.noise_seed != p->noise_seed))
        return err_set(e,
                       "group %lld was made with sigma %g, step %lld asked for %g: the treatment "
                       "was not applied as planned",
                       (long long)g->group, g->treatment.sigma, (long long)p->step, p->sigma);
    if (p->sigma <= 0) return 0;
    if (!(g->sigma_realised > 0) || g->noise_changed <= 0)
        return err_set(e,
                       "group %lld: noise of sigma %g was intended, but nothing changed (realised "
                       "%g on %lld of %lld weights)",
                       (long long)g->group, p->sigma, g->sigma_realised,
                       (long long)g->noise_changed, (long long)g->noise_elements);
    /* rms of n normal draws: relative standard error 1/sqrt(2n); 1e-6 covers the rounding of w + dw
     * near 1, and noise of which more than a quarter is rounding is not what was asked for. */
    double bound = 6 * p->sigma / sqrt(2 * (double)g->noise_elements) + fmin(1e-6, p->sigma / 4);
    if (fabs(g->sigma_realised - p->sigma) > bound)
        return err_set(e,
                       "group %lld: noise of sigma %g was intended, %g was realised (bound %g)",
                       (long long)g->group, p->sigma, g->sigma_realised, bound);
    return 0;
}

/* A treatment that differs from what was asked for is fatal: the same pipeline would send it again
 * for ever. */
static enum verdict check_treatment(const struct intake *in, const struct intake_policy *asked,
                                    const struct rec_group *g, struct err *e) {
    const struct policy *p = in->policy;
    const char *ops = g->treatment.ops;
    struct noise_evidence readable = { 0 };
    if (strcmp(g->treatment.hash, p->treatment) != 0)
        err_set(e, "group %lld was made under treatment %s, this learner's configuration gives %s",
                (long long)g->group, g->treatment.hash, p->treatment);
    else if (strcmp(ops, p->ops.s) != 0)
        err_set(e, "group %lld was made with ops '%s', this learner's configuration gives '%s'",
                (long long)g->group, ops, p->ops.s);
    else if (treatment_evidence_add(&readable, &p->plan, NOISE_PHASE_ROLLOUT, g->evidence, e) < 0)
        err_wrap(e, "group %lld", (long long)g->group);
    else if (check_aqn(asked, g, e) == 0) return VERDICT_TAKE;
    e->code = EXIT_CONFIG;
    return VERDICT_FATAL;
}

static struct want *want_of(const struct intake *in, int64_t group) {
    for (int w = 0; w < in->wants; w++)
        if (in->want[w].group == group) return &in->want[w];
    return NULL;
}

static const char *prompt_fault(const struct intake *in, const struct rec_group *g) {
    const struct shared *c = &in->c->shared;
    if (g->prompt_ids.n < 1 || g->prompt_ids.n > c->data.prompt_max)
        return "its prompt is empty or longer than data.prompt_max";
    if (g->prompt_ids.n + c->sample.new_max > in->policy->model->conf.positions_max)
        return "its prompt leaves no room for sample.new_max tokens in the model's context";
    for (int t = 0; t < g->prompt_ids.n; t++)
        if (g->prompt_ids.v[t] < 0 || g->prompt_ids.v[t] >= in->policy->model->conf.vocab)
            return "a token id of its prompt lies outside the vocabulary";
    return NULL;
}

/* What the group was made from and how, against what this run asks at its place; numbers that would
 * hurt the update. */
static const char *group_fault(struct intake *in, const struct rec_group *g) {
    const struct shared *c = &in->c->shared;
    int vocab = in->policy->model->conf.vocab;
    char id[QUESTION_ID_MAX];
    question_id(in, g->group, id);
    if (strcmp(g->question_id, id) != 0)
        return "it answers another question than this run asks there";
    if (g->samples != c->sample.n) return "its number of samples is not sample.n";
    if (g->temperature != c->sample.temperature || g->top_k != c->sample.top_k ||
        g->top_p != c->sample.top_p || g->new_max != c->sample.new_max)
        return "its temperature, top_k, top_p or new_max is not what was asked for";
    const char *prompt = prompt_fault(in, g);
    if (prompt) return prompt;
    for (int i = 0; i < g->samples; i++) {
        const struct rec_sample *s = &g->sample[i];
        if (s->k != i) return "samples are not numbered 0, 1, ...";
        if (s->ids.n < 1 || s->ids.n > g->new_max)
            return "a sample is empty or longer than sample.new_max";
        if (s->lp.n != s->ids.n) return "a sample has another number of log-probs than tokens";
        for (int t = 0; t < s->ids.n; t++) {
            if (s->ids.v[t] < 0 || s->ids.v[t] >= vocab)
                return "a token id lies outside the vocabulary";
            if (!(s->lp.v[t] <= 0) || !isfinite((double)s->lp.v[t]))
                return "a log-prob is not a finite number at most 0";
        }
        if (!isfinite(s->score)) return "a score is not finite";
    }
    return NULL;
}

static enum verdict check(struct intake *in, const struct rec_group *g, const char **why,
                          struct err *e) {
    const struct learner_conf *c = in->c;
    const bool offline = !in->journal;
    const struct want *wanted = want_of(in, g->group);
    if (!offline && strcmp(g->run, c->shared.run.id) != 0) {
        *why = "it belongs to another run";
        return VERDICT_REFUSE;
    }
    if (!offline && find(in, g->group)) return VERDICT_REPEAT;
    if (!wanted) {
        const bool over = g->step < in->now_wanted->step || g->group < in->floor;
        *why = over ? "its step is committed" : "nobody asked for it";
        return over ? VERDICT_REPEAT : VERDICT_REFUSE;
    }
    const struct intake_policy *p = wanted->policy;
    if (g->version != p->version || strcmp(g->adapter_sha256, p->adapter_sha256) != 0) {
        *why = "it was made with another adapter";
        return VERDICT_REFUSE;
    }
    if ((*why = group_fault(in, g))) return VERDICT_REFUSE;
    return check_treatment(in, p, g, e);
}

static void answer(struct intake *in, enum rec_type type, const char *peer, int64_t *group, int n,
                   const char *why) {
    if (!n || !in->s->link[PORT_TICKET]) return;
    struct rec r = { .type = type,
                     .ack = { .run = in->c->shared.run.id,
                              .fence = in->fence,
                              .group = group,
                              .groups = n,
                              .why = (char *)(uintptr_t)why } };
    struct err ignored = { 0 };
    /* lost? the rollout sends its group again */
    link_send(in->s->link[PORT_TICKET], &r, peer, 0, &ignored);
}

static void more_credit(struct intake *in, const char *rollout) {
    for (int p = 0; p < in->peers; p++)
        if (strcmp(in->peer[p].name, rollout) == 0) in->peer[p].credit++;
}

/* Takes what has arrived, journals it with one sync, then acknowledges. */
static int receive(struct intake *in, int timeout_ms, struct err *e) {
    struct { int64_t group; char peer[LINK_PEER_MAX]; } done[ACK_MAX];
    int dones = 0, taken = 0;
    struct rec r;
    while (dones < ACK_MAX) {
        int got = link_recv(in->s->link[PORT_GROUP], &r, NULL, dones ? 0 : timeout_ms, e);
        if (got < 0) return -1;
        if (got != LINK_RECORD) break;
        const char *why = NULL;
        enum verdict v = check(in, &r.group, &why, e);
        if (r.group.fence != in->fence && v == VERDICT_TAKE) {
            v = VERDICT_REFUSE;
            why = "it was asked for by a learner that is no more";
        }
        if (v == VERDICT_FATAL) {
            rec_release(&r);
            return -1;
        }
        if (v == VERDICT_REFUSE) {
            log_warn("group %lld from '%s' refused: %s", (long long)r.group.group, r.group.rollout,
                     why);
            answer(in, REC_NACK, r.group.rollout, &r.group.group, 1, why);
            bool hopeless = false;
            struct want *asked = want_of(in, r.group.group);
            if (asked) {
                asked->peer = -1;
                hopeless = r.group.fence == in->fence && ++asked->refusals == REFUSALS_MAX;
            }
            in->counts.refused++;
            if (hopeless)
                err_set(e, "group %lld was refused %d times, and would come again the same: %s",
                        (long long)r.group.group, REFUSALS_MAX, why);
            rec_release(&r);
            if (hopeless) return -1;
            continue;
        }
        done[dones].group = r.group.group;
        snprintf(done[dones++].peer, LINK_PEER_MAX, "%s", r.group.rollout);
        if (v == VERDICT_REPEAT) {
            in->counts.repeated++;
            rec_release(&r);
            continue;
        }
        if (tape_append(in->journal, &r, e) < 0) {
            rec_release(&r);
            return -1;
        }
        taken++;
        in->counts.journalled++;
        in->s->progress++;
        /* Acknowledged it is forgotten there. To be told so may take an update too long. */
        if (in->c->lag_max > 0) more_credit(in, r.group.rollout);
        hold(in, &r);
    }
    if (taken && tape_sync(in->journal, e) < 0) return -1;
    for (int i = 0; i < dones; i++) answer(in, REC_ACK, done[i].peer, &done[i].group, 1, "");
    return 0;
}

static int listen_to_rollouts(struct intake *in, struct err *e) {
    struct rec r;
    char peer[LINK_PEER_MAX];
    int got;
    while ((got = link_recv(in->s->link[PORT_TICKET], &r, peer, 0, e)) == LINK_RECORD) {
        if (r.type == REC_WANT) take_want(in, &r.want, peer);
        rec_release(&r);
    }
    for (int p = 0; p < in->peers; p++)
        if (clock_seconds() - in->peer[p].heard_at > PEER_LOST_SECONDS) {
            unlease(in, p, "it has been silent for 30 seconds");
            in->peer[p].credit = 0;
        }
    return got < 0 ? -1 : 0;
}

/* What arrived is wanted no more. */
static void drop_arrived(struct intake *in) {
    int left = 0;
    for (int w = 0; w < in->wants; w++)
        if (!find(in, in->want[w].group)) in->want[left++] = in->want[w];
    in->wants = left;
}

static int missing(const struct intake *in, int64_t first, int count) {
    int n = 0;
    for (int i = 0; i < count; i++) n += !find(in, first + i);
    return n;
}

void intake_ask(struct intake *in, const struct intake_policy *p, int64_t first, int count) {
    struct intake_policy *own = &in->policy_of[p->for_step % (LAG_MAX + 1)];
    *own = *p;
    in->want = mem_grow(in->want, (size_t)(in->wants + count) * sizeof *in->want);
    for (int i = 0; i < count; i++) {
        if (find(in, first + i) || want_of(in, first + i)) continue;
        int at = in->wants++;
        for (; at > 0 && in->want[at - 1].policy->for_step > p->for_step; at--)
            in->want[at] = in->want[at - 1];
        in->want[at] = (struct want){ .group = first + i, .policy = own, .peer = -1 };
    }
}

static int wait_for(struct intake *in, int64_t first, int count, struct err *e) {
    in->resumed_at = clock_seconds();
    while (missing(in, first, count)) {
        if (stage_stopping(in->s)) return 1;
        in->s->waits_for = "group";
        stage_beat(in->s, "wait", NULL);
        if (listen_to_rollouts(in, e) < 0 || lease(in, e) < 0) return -1;
        struct link *l[2] = { in->s->link[PORT_GROUP], in->s->link[PORT_TICKET] };
        link_wait(l, 2, 100);
        if (receive(in, 0, e) < 0) return -1;
        drop_arrived(in);
    }
    in->s->waits_for = "";
    if (!in->wants) return 0;
    if (listen_to_rollouts(in, e) < 0 || receive(in, 0, e) < 0) return -1;
    drop_arrived(in);
    return lease(in, e);
}

/* What is at hand may come from a journal or a recording. */
static int check_held(struct intake *in, const struct intake_policy *p, const struct rec_group *g,
                      struct err *e) {
    const char *fault = group_fault(in, g);
    if (fault)
        return err_set(e, "group %lld for step %lld: %s", (long long)g->group,
                       (long long)p->for_step, fault);
    if (g->version != p->version || strcmp(g->adapter_sha256, p->adapter_sha256) != 0)
        return err_set(e,
                       "recorded group %lld was made with adapter version %lld %.12s, this "
                       "configuration arrives at version "
                       "%lld %.12s: settings, model or program differ from the recorded run's",
                       (long long)g->group, (long long)g->version, g->adapter_sha256,
                       (long long)p->version, p->adapter_sha256);
    return check_treatment(in, p, g, e) == VERDICT_TAKE ? 0 : -1;
}

int intake_wave(struct intake *in, const struct intake_policy *p, int64_t first, int count,
                const struct rec_group **group, struct err *e) {
    if (stage_stopping(in->s)) return 1;             /* with a file nothing below ever waits */
    intake_ask(in, p, first, count);
    in->now_wanted = &in->policy_of[p->for_step % (LAG_MAX + 1)];
    for (int i = 0; i < count && !in->journal; i++)
        if (!find(in, first + i))
            return err_set(e, "port 'group': '%s' does not hold group %lld, which step %lld needs",
                           link_url(in->s->link[PORT_GROUP]), (long long)(first + i),
                           (long long)p->for_step);
    const int rc = in->journal ? wait_for(in, first, count, e) : 0;
    if (rc != 0) return rc;
    for (int i = 0; i < count; i++)
        if (check_held(in, p, group[i] = find(in, first + i), e) < 0) return -1;
    return 0;
}

void intake_end(struct intake *in) {
    struct link *l = in->s->link[PORT_TICKET];
    if (!l) return;
    struct err ignored = { 0 };
    struct rec end = { .type = REC_END,
                       .end = {
                           .run = in->c->shared.run.id, .fence = in->fence, .step = in->s->step } };
    bool gone[PEERS_MAX] = { false };
    for (double until = clock_seconds() + 2; clock_seconds() < until;) {
        int left = 0;
        for (int p = 0; p < in->peers; p++)
            if (!gone[p]) {
                left++;
                /* it closed its socket */
                if (link_send(l, &end, in->peer[p].name, 0, &ignored) != 0) gone[p] = true;
            }
        if (!left) return;
        struct rec r;
        char peer[LINK_PEER_MAX];
        while (link_recv(l, &r, peer, 50, &ignored) == LINK_RECORD) rec_release(&r);
    }
}
