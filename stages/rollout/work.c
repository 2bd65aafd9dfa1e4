/* work.c - see work.h. In the order in which a ticket lives: taken, adopted for, generated, sent,
 * acknowledged.
 *
 * Tickets are made in the order they came (a learner's: of earlier steps first), and only tickets
 * of one policy (version, sigma, noise seed) are in the generator at a time: the next policy is
 * adopted when the generator is idle. Finished groups leave in that order too.
 * SPDX-License-Identifier: Apache-2.0 */
#include "stages/rollout/work.h"

#include <math.h>
#include <time.h>
#include <unistd.h>

#include "lib/base/clock.h"
#include "lib/base/fs.h"
#include "lib/base/log.h"
#include "lib/stage/aqn.h"
#include "lib/task/task.h"

enum { JOBS_MAX = 2048 };
enum job_state { JOB_STATE_WAITING, JOB_STATE_MAKING, JOB_STATE_MADE, JOB_STATE_SENT };

struct job {
    enum job_state state;
    struct rec ticket, traj;
    int left;                        /* samples still in the making */
    double sent_at;
};

struct work {
    struct stage *s;
    const struct rollout_conf *c;
    struct policy policy;
    struct gen *gen;
    struct noise_view noise;
    /* since the policy in force was adopted; what of it finished groups took along */
    struct noise_evidence evidence, told;
    bool adopted;
    char adapter[SHA256_HEX]; /* hash in force, as computed from what was loaded; "" = base */
    char adapter_path[FS_PATH_MAX];
    int64_t version;
    double sigma;
    uint64_t noise_seed, seed;
    struct job *job[JOBS_MAX];       /* in order of arrival */
    int jobs;
    bool live;                       /* a learner is at the other end: acknowledgements will come */
    bool input_ended, want_due, said_clean;
    double want_at;
    char incarnation[32];
    int64_t tokens_seen;
    double tokens_at;
};

struct gen_opts work_gen_opts(const struct rollout_conf *c, const struct lora_shape *shape) {
    struct gen_opts o = { .rows = (int)c->rows,
                          .positions_max = (int)(c->shared.data.prompt_max +
                                                 c->shared.sample.new_max),
                          .lora = *shape,
                          .activations = (enum model_quant)c->shared.quant.activations,
                          .noise = c->shared.ops.type || c->shared.modules.type,
                          .graphs = c->shared.run.graphs };
    if (*c->stop) o.stop[o.stops++] = c->stop;
    return o;
}

struct work *work_create(struct stage *s) {
    struct work *w = mem_alloc(sizeof *w);
    w->s = s;
    w->c = s->conf;
    w->live = !link_is_file(s->link[PORT_TICKET]);
    w->want_due = true;
    snprintf(w->incarnation, sizeof w->incarnation, "%ld.%ld", (long)time(NULL), (long)getpid());
    if (policy_open(&w->policy, &w->c->shared, &s->err) < 0 ||
        aqn_try(&w->c->shared, w->policy.model, &s->err) < 0)
        goto failed;
    s->device = w->policy.device;
    struct gen_opts o = work_gen_opts(w->c, &w->policy.shape);
    if (o.positions_max > w->policy.model->conf.positions_max)
        o.positions_max = w->policy.model->conf.positions_max;
    if (gen_create(&w->gen, w->policy.model, w->policy.tok, &o, &s->err) < 0) goto failed;
    return w;
failed:
    work_destroy(&w);
    return NULL;
}

static void job_drop(struct work *w, int i) {
    rec_release(&w->job[i]->ticket);
    rec_release(&w->job[i]->traj);
    free(w->job[i]);
    w->jobs--;
    memmove(w->job + i, w->job + i + 1, (size_t)(w->jobs - i) * sizeof *w->job);
}

void work_destroy(struct work **wp) {
    struct work *w = *wp;
    if (!w) return;
    while (w->jobs) job_drop(w, w->jobs - 1);
    gen_destroy(&w->gen);
    noise_view_close(&w->noise);
    policy_close(&w->policy);
    free(w);
    *wp = NULL;
}

static int job_of_group(const struct work *w, int64_t group) {
    for (int i = 0; i < w->jobs; i++)
        if (w->job[i]->ticket.ticket.group == group) return i;
    return -1;
}

/* A hand-written ticket carries no treatment: it is made as this configuration says, with AQN only
 * where rollout.sigma asks for it. */
static int treatment_complete(struct work *w, struct rec_ticket *t) {
    const struct shared *c = &w->c->shared;
    const char *ops = t->treatment.ops ? t->treatment.ops : "";
    const char *ours = w->policy.ops.s;
    if (t->treatment.sigma < 0 || (*ops && strcmp(ops, "none") && strcmp(ops, ours)))
        return err_set(&w->s->err,
                       "ticket of group %lld: treatment sigma %g, ops '%s': sigma is at least 0, "
                       "ops 'none' or what this rollout is set to, '%s'",
                       (long long)t->group, t->treatment.sigma, ops, ours);
    free(t->treatment.hash);
    t->treatment.hash = mem_dup(w->policy.treatment);
    if (!t->seed) t->seed = (uint64_t)c->run.seed;
    if (t->treatment.sigma == 0) t->treatment.sigma = w->c->sigma;
    if (t->treatment.sigma == 0 && c->aqn.sigma_start > 0 && !w->said_clean) {
        log_warn("noise.aqn is the learner's schedule: a ticket without a treatment is made "
                 "without it; set rollout.sigma");
        w->said_clean = true;
    }
    t->treatment.noise_seed = policy_noise_seed(t->seed, t->step);
    if ((!t->adapter || !*t->adapter) && *w->c->adapter) {
        free(t->adapter);
        t->adapter = mem_dup(w->c->adapter);
    }
    return 0;
}

static int prompt_complete(struct work *w, struct rec_ticket *t) {
    struct str text;
    struct tok_ids ids = { 0 };
    str_init(&text);
    int rc = 0;
    if (t->prompt && *t->prompt)
        tok_encode(w->policy.tok, t->prompt, strlen(t->prompt), true, &ids);
    else if (!t->question || !*t->question)
        rc = err_set(&w->s->err, "ticket of group %lld has neither 'prompt' nor 'question'",
                     (long long)t->group);
    else if ((rc = policy_prompt(&w->policy, &w->c->shared, t->question, &text, &ids,
                                 &w->s->err)) == 0) {
        free(t->prompt);
        t->prompt = mem_dup(text.s);
    }
    t->prompt_ids = (struct rec_i32){ ids.id, ids.n };
    str_release(&text);
    return rc;
}

/* Defaults of a hand-written ticket; the prompt where only the question is given. */
static int ticket_complete(struct work *w, struct rec_ticket *t) {
    const struct shared *c = &w->c->shared;
    if (!t->samples) t->samples = c->sample.n;
    if (!t->new_max) t->new_max = c->sample.new_max;
    if (t->temperature < 0) {
        t->temperature = c->sample.temperature;
        t->top_k = c->sample.top_k;
        t->top_p = c->sample.top_p;
    }
    if ((!t->treatment.hash || !*t->treatment.hash) && treatment_complete(w, t) < 0) return -1;
    return t->prompt_ids.n ? 0 : prompt_complete(w, t);
}

/* Learner and rollout must mean the same noise. */
static int check_treatment(struct work *w, const struct rec_ticket *t) {
    const struct rec_treatment *asked = &t->treatment;
    if (!asked->hash || !*asked->hash) return 0;
    const char *ours = w->policy.ops.s;
    if (strcmp(asked->hash, w->policy.treatment) == 0 && strcmp(asked->ops, ours) == 0) return 0;
    return err_code(&w->s->err, EXIT_CONFIG,
                    "ticket of group %lld asks for treatment %s with ops '%s', this rollout's "
                    "configuration gives %s with ops '%s': learner and rollout were not started "
                    "from the same pipeline file",
                    (long long)t->group, asked->hash, asked->ops, w->policy.treatment, ours);
}

/* A learner asks ahead: what its earlier steps want is made first. */
static void job_insert(struct work *w, struct job *j) {
    int at = w->jobs++;
    while (w->live && at > 0 && w->job[at - 1]->state == JOB_STATE_WAITING &&
           w->job[at - 1]->ticket.ticket.step > j->ticket.ticket.step) {
        w->job[at] = w->job[at - 1];
        at--;
    }
    w->job[at] = j;
}

static int ticket_take(struct work *w, struct rec *r) {
    struct rec_ticket *t = &r->ticket;
    if (check_treatment(w, t) < 0) {
        rec_release(r);
        return -1;
    }
    int known = job_of_group(w, t->group);
    if (known >= 0 && w->live) {
        if (w->job[known]->ticket.ticket.fence == t->fence ||
            w->job[known]->state == JOB_STATE_MAKING) {
            /* a repeated lease; what is being made will be nacked if its fence is old */
            rec_release(r);
            return 0;
        }
        job_drop(w, known);
    }
    if (w->jobs == JOBS_MAX) {
        rec_release(r);
        return 0;                    /* beyond any credit given: the learner leases it again */
    }
    struct job *j = mem_alloc(sizeof *j);
    j->ticket = *r;
    rec_init(&j->traj, REC_TRAJ);
    job_insert(w, j);
    return ticket_complete(w, &j->ticket.ticket);
}

static int look_at_tickets(struct work *w) {
    struct stage *s = w->s;
    while (!w->input_ended && (w->live || w->jobs < w->c->credit)) {
        struct rec r;
        bool busy = !gen_idle(w->gen);
        int got = link_recv(s->link[PORT_TICKET], &r, NULL, busy || w->jobs ? 0 : 200, &s->err);
        if (got < 0) return -1;
        if (got == LINK_EMPTY) break;
        if (got == LINK_END) {
            w->input_ended = true;
            break;
        }
        if (r.type == REC_TICKET) {
            if (ticket_take(w, &r) < 0) return -1;
            continue;
        }
        if (r.type == REC_ACK || r.type == REC_NACK) {
            if (r.type == REC_NACK)
                log_info("learner does not want %d group(s): %s", r.ack.groups,
                         r.ack.why ? r.ack.why : "");
            for (int i = 0; i < r.ack.groups; i++) {
                int k = job_of_group(w, r.ack.group[i]);
                if (k >= 0 && w->job[k]->state == JOB_STATE_SENT) job_drop(w, k);
            }
            w->want_due = true;
        }
        if (r.type == REC_END) w->input_ended = true;
        rec_release(&r);
    }
    return 0;
}

/* Tells the learner who is here, what it holds and how much more it takes; repeated every
 * second. */
static int say_want(struct work *w) {
    if (!w->live || (!w->want_due && clock_seconds() - w->want_at < 1)) return 0;
    int64_t held[JOBS_MAX];
    for (int i = 0; i < w->jobs; i++) held[i] = w->job[i]->ticket.ticket.group;
    int64_t credit = w->c->credit - w->jobs;
    struct rec r = { .type = REC_WANT, .want = { .rollout = w->s->id, .incarnation = w->incarnation,
                     .credit = credit > 0 ? credit : 0, .group = held, .groups = w->jobs } };
    int sent = link_send(w->s->link[PORT_TICKET], &r, NULL, 0, &w->s->err);
    if (sent == 0) {
        w->want_at = clock_seconds();
        w->want_due = false;
    }
    return sent < 0 ? -1 : 0;
}

/* What the net counted so far, added up and held against the intention. */
static int take_evidence(struct work *w) {
    struct err *e = &w->s->err;
    if (gen_take_noise(w->gen, &w->evidence, e) < 0 ||
        treatment_check(&w->policy.plan, NOISE_PHASE_ROLLOUT, &w->evidence, e) < 0)
        return err_wrap(e, "version %lld", (long long)w->version);
    return 0;
}

static int adopt(struct work *w, const struct rec_ticket *t) {
    struct err *e = &w->s->err;
    if (w->adopted && take_evidence(w) < 0) return -1;
    const char *sha = t->adapter_sha256 ? t->adapter_sha256 : "";
    bool base = !t->adapter || !*t->adapter;
    char got[SHA256_HEX] = "";
    if (base && *sha)
        return err_set(e,
                       "ticket of group %lld names an adapter's hash but no folder to load it from",
                       (long long)t->group);
    struct lora *l = NULL;
    if (!base) {
        if (lora_load(&l, &w->policy.model->conf, t->adapter, e) < 0) return -1;
        lora_sha256(l, got);
        if (*sha && strcmp(sha, got) != 0) {
            lora_destroy(&l);
            return err_set(e, "adapter '%s' hashes to %.12s, the ticket names %.12s", t->adapter,
                           got, sha);
        }
    }
    int rc = treatment_view(&w->noise, w->policy.model, &w->c->shared, t->step, t->treatment.sigma,
                            t->treatment.noise_seed, t->version, e);
    if (rc == 0) rc = gen_adopt(w->gen, l, &w->noise, e);
    gen_set_noise(w->gen, &w->policy.plan, NOISE_PHASE_ROLLOUT, t->treatment.noise_seed, t->seed);
    w->evidence = w->told = (struct noise_evidence){ 0 };
    lora_destroy(&l);
    /* what was loaded, not what was asked */
    snprintf(w->adapter, sizeof w->adapter, "%s", got);
    snprintf(w->adapter_path, sizeof w->adapter_path, "%s", base ? "" : t->adapter);
    w->version = t->version;
    w->sigma = t->treatment.sigma;
    w->noise_seed = t->treatment.noise_seed;
    w->seed = t->seed;
    w->adopted = rc == 0;
    return rc;
}

static bool same_policy(const struct work *w, const struct rec_ticket *t) {
    return w->adopted && t->version == w->version && t->seed == w->seed &&
           t->treatment.sigma == w->sigma && t->treatment.noise_seed == w->noise_seed &&
           strcmp(t->adapter ? t->adapter : "", w->adapter_path) == 0 &&
           (!t->adapter_sha256 || !*t->adapter_sha256 ||
            strcmp(t->adapter_sha256, w->adapter) == 0);
}

static char *text_or_empty(const char *text) { return mem_dup(text ? text : ""); }

/* The group record takes what the ticket said and what was really applied. */
static void group_open(const struct work *w, struct rec_group *g, const struct rec_ticket *t) {
    g->run = text_or_empty(t->run);
    g->fence = t->fence;
    g->step = t->step;
    g->group = t->group;
    g->question_id = text_or_empty(t->question_id);
    g->question = text_or_empty(t->question);
    g->prompt = text_or_empty(t->prompt);
    g->answer = text_or_empty(t->answer);
    size_t bytes = (size_t)t->prompt_ids.n * sizeof(int32_t);
    g->prompt_ids = (struct rec_i32){ memcpy(mem_alloc(bytes), t->prompt_ids.v, bytes),
                                      t->prompt_ids.n };
    g->temperature = t->temperature;
    g->top_p = t->top_p;
    g->top_k = t->top_k;
    g->new_max = t->new_max;
    g->seed = t->seed;
    g->version = w->version;
    g->adapter_sha256 = mem_dup(w->adapter);
    g->treatment = (struct rec_treatment){ mem_dup(w->policy.treatment), w->noise.sigma,
                                           w->noise_seed, mem_dup(w->policy.ops.s) };
    g->sigma_realised = w->noise.realised;
    g->noise_elements = w->noise.elements;
    g->noise_changed = w->noise.changed;
    g->rollout = mem_dup(w->s->id);
    g->rule = mem_dup("");
    g->samples = (int)t->samples;
    g->sample = mem_alloc((size_t)t->samples * sizeof *g->sample);
}

static int start_jobs(struct work *w) {
    for (int i = 0; i < w->jobs; i++) {
        struct job *j = w->job[i];
        if (j->state != JOB_STATE_WAITING) continue;
        const struct rec_ticket *t = &j->ticket.ticket;
        if (!same_policy(w, t)) {
            /* the next policy waits for the present one's samples */
            if (!gen_idle(w->gen)) return 0;
            if (adopt(w, t) < 0) return -1;
        }
        struct gen_request r = { .tag = (uint64_t)(uintptr_t)j,
                                 .prompt = t->prompt_ids.v,
                                 .prompt_n = t->prompt_ids.n,
                                 .samples = (int)t->samples,
                                 .new_max = (int)t->new_max,
                                 .temperature = (float)t->temperature,
                                 .top_k = (int)t->top_k,
                                 .top_p = (float)t->top_p,
                                 .prompt_uid = (uint64_t)t->group };
        policy_sample_key(r.key, t->seed, t->step);
        if (gen_submit(w->gen, &r, &w->s->err) < 0)
            return err_wrap(&w->s->err, "group %lld (%s)", (long long)t->group,
                            t->question_id ? t->question_id : "");
        group_open(w, &j->traj.group, t);
        j->left = r.samples;
        j->state = JOB_STATE_MAKING;
    }
    return 0;
}

static float *copy_f32(const float *v, int n) {
    size_t bytes = (size_t)n * sizeof *v;
    return memcpy(mem_alloc(bytes), v, bytes);
}

static void take_sample(void *ud, const struct gen_sample *g) {
    struct work *w = ud;
    struct job *j = (struct job *)(uintptr_t)g->tag;
    struct rec_sample *s = &j->traj.group.sample[g->k];
    s->k = g->k;
    s->ids = (struct rec_i32){ memcpy(mem_alloc((size_t)g->n * sizeof(int32_t)), g->ids,
                                      (size_t)g->n * sizeof(int32_t)),
                               g->n };
    s->lp = (struct rec_f32){ copy_f32(g->lp, g->n), g->n };
    if (memcmp(g->lp, g->lp_raw, (size_t)g->n * sizeof(float)) != 0)
        s->lp_raw = (struct rec_f32){ copy_f32(g->lp_raw, g->n), g->n };
    s->stop = mem_dup(gen_stop_name[g->stop]);
    s->extracted = mem_dup("");
    struct str text;
    str_init(&text);
    str_add(&text, "", 0);
    tok_decode(w->policy.tok, g->ids, g->n, false, &text);
    s->text = mem_dup(text.s);
    str_release(&text);
    if (--j->left == 0) j->state = JOB_STATE_MADE;
    w->s->progress++;
}

/* Groups that this step finished take along what was measured since the last one that was finished;
 * of several the first does. */
static int seal_jobs(struct work *w) {
    for (int i = 0; i < w->jobs; i++) {
        struct job *j = w->job[i];
        if (j->state != JOB_STATE_MADE || j->traj.group.evidence) continue;
        if (take_evidence(w) < 0) return -1;
        const struct noise_evidence new = noise_evidence_since(&w->evidence, &w->told);
        j->traj.group.evidence = treatment_evidence(&w->policy.plan, NOISE_PHASE_ROLLOUT, &new,
                                                    &w->noise,
                                                    (struct treatment_seeds){ w->noise_seed,
                                                                              w->seed });
        w->told = w->evidence;
    }
    return 0;
}

static int send_jobs(struct work *w) {
    for (int i = 0; i < w->jobs; i++) {
        struct job *j = w->job[i];
        if (j->state == JOB_STATE_WAITING || j->state == JOB_STATE_MAKING) {
            if (!w->live) break;                     /* files keep the order of the tickets */
            continue;
        }
        if (j->state == JOB_STATE_SENT &&
            clock_seconds() - j->sent_at < w->c->resend_seconds) continue;
        if (j->state == JOB_STATE_SENT) j->traj.group.sample[0].attempt++;
        int sent = link_send(w->s->link[PORT_TRAJ], &j->traj, NULL, w->live ? 0 : 1000, &w->s->err);
        if (sent < 0) return -1;
        if (sent == 1) break;
        j->state = JOB_STATE_SENT;
        j->sent_at = clock_seconds();
        if (!w->live) job_drop(w, i--);
    }
    return 0;
}

static void beat(struct work *w) {
    char metrics[160];
    double t = clock_seconds();
    int64_t tokens = gen_tokens_total(w->gen);
    bool busy = !gen_idle(w->gen);
    w->s->waits_for = busy ? "" : w->jobs ? "ack" : "ticket";
    if (t - w->tokens_at >= 1) {
        snprintf(metrics, sizeof metrics, "{\"tokens_per_second\":%.1f,\"groups_held\":%d}",
                 (double)(tokens - w->tokens_seen) / (t - w->tokens_at), w->jobs);
        w->tokens_seen = tokens;
        w->tokens_at = t;
        stage_beat(w->s, busy ? "work" : "wait", metrics);
    } else stage_beat(w->s, busy ? "work" : "wait", NULL);
}

int work_turn(struct work *w) {
    if (stage_stopping(w->s)) return 0;
    if (look_at_tickets(w) < 0 || start_jobs(w) < 0) return -1;
    if (!gen_idle(w->gen) &&
        (gen_step(w->gen, take_sample, w, &w->s->err) < 0 || seal_jobs(w) < 0))
        return -1;
    if (send_jobs(w) < 0 || say_want(w) < 0) return -1;
    beat(w);
    if (w->live && w->input_ended) return 0;         /* the learner has all it wants */
    if (w->input_ended && !w->jobs) return 0;
    /* all sent: sleep until an answer comes or a resend is due */
    if (w->live && w->jobs && gen_idle(w->gen)) {
        struct link *l = w->s->link[PORT_TICKET];
        link_wait(&l, 1, 100);
    }
    return 1;
}
