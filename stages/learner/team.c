/* team.c - see team.h. Order: what is sent, rank 0, the other ranks.
 * SPDX-License-Identifier: Apache-2.0 */
#include "stages/learner/team.h"

#include "lib/base/hash.h"
#include "lib/base/log.h"
#include "lib/base/pool.h"
#include "lib/base/ranks.h"
#include "lib/stage/device.h"
#include "lib/stage/rank.h"
#include "lib/task/task.h"
#include "stages/learner/selftest.h"

/* Seconds without processor time after which a rank hangs: model files may be on a slow disk. */
#define PATIENCE_SECONDS 120.0

struct team {
    struct ranks *ranks;
    struct pool *pool;               /* lent */
    struct str order;                /* what was sent last */
    int64_t steps;
    char sha[SHA256_HEX];            /* state that all had last */
};

/* ---- what is sent ---- */

/* A step: this, as it lies in memory (no pointers), then `groups` times a length (uint64_t) and a
 * packed record. */
struct order {
    struct update_treatment how;
    char before[SHA256_HEX];         /* state */
    int32_t groups;
};
struct counters { int64_t adam_steps, rate_steps; };

/* Hashes of pieces, which threads share, and the hash of these: it takes a while else. */
enum { HASH_PIECE = 1 << 20 };
struct hashing {
    const char *array[3];
    size_t bytes, per;               /* of each array; pieces of each */
    char (*sum)[SHA256_HEX];
};

static void hash_part(void *arg, int part, int parts) {
    const struct hashing *h = arg;
    for (size_t i = (size_t)part; i < COUNT_OF(h->array) * h->per; i += (size_t)parts) {
        const size_t at = i % h->per * HASH_PIECE, left = h->bytes - at;
        sha256_of(h->array[i / h->per] + at, left < HASH_PIECE ? left : HASH_PIECE, h->sum[i]);
    }
}

static void state_sha(const struct update_state *s, struct pool *pool, char out[SHA256_HEX]) {
    const size_t bytes = s->lora->params * sizeof(float), per = (bytes - 1) / HASH_PIECE + 1;
    const struct counters n = { s->adam_steps, s->rate_steps };
    struct hashing h = { { (char *)s->lora->value, (char *)s->m, (char *)s->v }, bytes, per, NULL };
    struct sha256 sum;
    h.sum = mem_alloc(COUNT_OF(h.array) * per * sizeof *h.sum);
    if (pool) pool_run(pool, pool_threads(pool), hash_part, &h);
    else hash_part(&h, 0, 1);
    sha256_init(&sum);
    sha256_add(&sum, &n, sizeof n);
    sha256_add(&sum, h.sum, COUNT_OF(h.array) * per * sizeof *h.sum);
    sha256_hex(&sum, out);
    free(h.sum);
}

/* Rank 0's state, to all. */
static int share_state(struct ranks *r, struct update_state *s, struct err *e) {
    const size_t bytes = s->lora->params * sizeof(float);
    struct counters n = { s->adam_steps, s->rate_steps };
    if (ranks_send(r, "first counters", &n, sizeof n, e) < 0 ||
        ranks_send(r, "first adapter", s->lora->value, bytes, e) < 0 ||
        ranks_send(r, "first m", s->m, bytes, e) < 0 ||
        ranks_send(r, "first v", s->v, bytes, e) < 0)
        return -1;
    s->adam_steps = n.adam_steps;
    s->rate_steps = n.rate_steps;
    return 0;
}

/* Every rank has the same state, or -1. */
static int agree(struct ranks *r, const struct update_state *s, struct pool *pool,
                 char sha[SHA256_HEX], struct err *e) {
    char all[RANKS_MAX][SHA256_HEX];
    state_sha(s, pool, all[ranks_own(r)]);
    if (ranks_gather(r, "state", all, sizeof *all, e) < 0) return -1;
    for (int i = 1; i < ranks_count(r); i++)
        if (strcmp(all[0], all[i]) != 0)
            return err_code(e, EXIT_FAILED,
                            "rank %d came to the state %.16s, rank 0 to %.16s: the step is not "
                            "committed; do all run on the same kind of device?", i, all[i],
                            all[0]);
    memcpy(sha, all[0], SHA256_HEX);
    return 0;
}

/* ---- rank 0 ---- */

int team_open(struct team **out, struct stage *s, struct err *e) {
    const struct learner_conf *c = s->conf;
    if (c->ranks < 2) return 0;
    struct team *t = *out = mem_alloc(sizeof *t);
    const int cores = pool_cores();
    if (ranks_open(&t->ranks, (int)c->ranks, PATIENCE_SECONDS, rank_start, s, e) < 0 ||
        rank_take_share(&c->shared, 0, (int)c->ranks, e) < 0 ||
        (rank_on_gpus(&c->shared) && device_ranks_check(e) < 0))
        return -1;
    s->ranks = (int)c->ranks;
    if (pool_cores() * s->ranks > cores)
        log_warn("%d ranks with %d core%s each share %d", s->ranks, pool_cores(),
                 pool_cores() == 1 ? "" : "s", cores);
    return 0;
}

void team_close(struct team **tp) {
    struct team *t = *tp;
    if (!t) return;
    if (t->steps)
        log_info("all ranks had the same state after each of %lld steps, the last %.16s",
                 (long long)t->steps, t->sha);
    ranks_close(&t->ranks);
    str_release(&t->order);
    free(t);
    *tp = NULL;
}

int team_begin(struct team *t, struct updater *u, struct update_state *s, struct pool *pool,
               struct err *e) {
    updater_load(u, s);
    if (!t) return 0;
    t->pool = pool;
    if (share_state(t->ranks, s, e) < 0 || agree(t->ranks, s, pool, t->sha, e) < 0 ||
        updater_join(u, t->ranks, e) < 0)
        return -1;
    log_info("%d ranks, state %.16s", ranks_count(t->ranks), t->sha);
    return 0;
}

static void write_order(struct str *to, const char *before, const struct rec_group *const *group,
                        int groups, const struct update_treatment *how) {
    struct order o;
    struct str one = { 0 };
    memset(&o, 0, sizeof o);
    o.how = *how;
    o.groups = groups;
    memcpy(o.before, before, sizeof o.before);
    str_clear(to);
    str_add(to, &o, sizeof o);
    for (int i = 0; i < groups; i++) {
        const struct rec r = { .type = REC_GROUP, .group = *group[i] };
        str_clear(&one);
        rec_pack(&one, &r);
        const uint64_t bytes = one.len;
        str_add(to, &bytes, sizeof bytes);
        str_add(to, one.s, one.len);
    }
    str_release(&one);
}

int team_step(struct team *t, struct updater *u, struct update_state *s,
              const struct rec_group *const *group, int groups, const struct update_treatment *how,
              struct update_metrics *metrics, struct err *e) {
    if (!t) return updater_step(u, s, group, groups, how, metrics, e);
    write_order(&t->order, t->sha, group, groups, how);
    if (ranks_broadcast(t->ranks, "groups", &t->order, e) < 0)
        return err_wrap(e, "groups to all ranks");
    if (updater_step(u, s, group, groups, how, metrics, e) < 0 || updater_store(u, s, e) < 0 ||
        agree(t->ranks, s, t->pool, t->sha, e) < 0)
        return -1;
    t->steps++;
    return 0;
}

/* ---- the other ranks ---- */

struct worker {
    struct ranks *ranks;
    struct policy policy;
    struct updater *updater;
    struct update_state state;
    struct str order;
    char sha[SHA256_HEX];
    struct rec *group;               /* of the order */
    const struct rec_group **list;
    int groups;
};

/* As rank 0 does: a sum of gradients is as right as the worst of them, on whichever device. */
static int work_test(const struct worker *w, const struct shared *c, struct err *e) {
    struct task_set train;
    struct selftest_window windows[SELFTEST_WINDOWS];
    struct selftest t;
    if (task_load(&train, c->data.train, "train", 0, e) < 0) return -1;
    int rc = selftest_windows(windows, &w->policy, c, &train, e);
    if (rc == 0) rc = selftest_run(&t, &w->policy, windows, e);
    task_release(&train);
    return rc;
}

static int work_open(struct worker *w, struct stage *s, struct err *e) {
    const struct learner_conf *c = s->conf;
    if (ranks_join(&w->ranks, s->rank, s->rank_fd, e) < 0 ||
        rank_take_share(&c->shared, s->rank, ranks_count(w->ranks), e) < 0 ||
        policy_open(&w->policy, &c->shared, e) < 0 || work_test(w, &c->shared, e) < 0 ||
        updater_create(&w->updater, &w->policy, c, e) < 0)
        return -1;
    w->state.lora = lora_create(&w->policy.model->conf, &w->policy.shape,
                                (uint64_t)c->shared.run.seed);
    w->state.m = mem_alloc(w->state.lora->params * sizeof(float));
    w->state.v = mem_alloc(w->state.lora->params * sizeof(float));
    return 0;
}

static int work_begin(struct worker *w, struct err *e) {
    if (share_state(w->ranks, &w->state, e) < 0) return -1;
    updater_load(w->updater, &w->state);
    if (agree(w->ranks, &w->state, w->policy.kern.pool, w->sha, e) < 0) return -1;
    return updater_join(w->updater, w->ranks, e);
}

static void forget_groups(struct worker *w) {
    for (int i = 0; i < w->groups; i++) rec_release(&w->group[i]);
    free(w->group);
    free(w->list);
    w->group = NULL;
    w->list = NULL;
    w->groups = 0;
}

static int read_order(struct worker *w, struct order *o, struct err *e) {
    size_t at = sizeof *o;
    forget_groups(w);
    assert(w->order.len >= at);
    memcpy(o, w->order.s, sizeof *o);
    w->group = mem_alloc((size_t)o->groups * sizeof *w->group);
    w->list = mem_alloc((size_t)o->groups * sizeof *w->list);
    for (int i = 0; i < o->groups; i++) {
        uint64_t bytes;
        memcpy(&bytes, w->order.s + at, sizeof bytes);
        at += sizeof bytes;
        if (rec_unpack(&w->group[i], w->order.s + at, bytes, e) < 0)
            return err_wrap(e, "group %d of rank 0", i);
        at += bytes;
        w->list[i] = &w->group[i].group;
        w->groups++;
    }
    if (strcmp(o->before, w->sha) != 0)
        return err_set(e, "rank 0 goes on from the state %.16s, we have %.16s", o->before, w->sha);
    return 0;
}

static int work_step(struct worker *w, struct err *e) {
    struct order o;
    struct update_metrics m;
    if (ranks_broadcast(w->ranks, "groups", &w->order, e) < 0 || read_order(w, &o, e) < 0)
        return -1;
    if (updater_step(w->updater, &w->state, w->list, w->groups, &o.how, &m, e) < 0 ||
        updater_store(w->updater, &w->state, e) < 0)
        return -1;
    return agree(w->ranks, &w->state, w->policy.kern.pool, w->sha, e);
}

static void work_close(struct worker *w) {
    forget_groups(w);
    updater_destroy(&w->updater);
    lora_destroy(&w->state.lora);
    free(w->state.m);
    free(w->state.v);
    policy_close(&w->policy);
    str_release(&w->order);
    ranks_close(&w->ranks);
}

void team_work(struct stage *s) {
    struct worker w = { 0 };
    int rc = work_open(&w, s, &s->err);
    if (rc == 0) rc = work_begin(&w, &s->err);
    while (rc == 0) rc = work_step(&w, &s->err);
    if (!w.ranks || !ranks_over(w.ranks)) stage_die(s, EXIT_FAILED);
    log_info("ended with state %.16s", w.sha);
    work_close(&w);
    exit(stage_close(s, EXIT_DONE));
}
