/* examiner.c - see examiner.h.
 *
 * Rank r of n asks the questions r, r + n, ...; what an answer says hangs on no other one. Order:
 * life, labels, one answer, the adapter, one exam, the other ranks.
 * SPDX-License-Identifier: Apache-2.0 */
#include "stages/eval/examiner.h"

#include "lib/base/fs.h"
#include "lib/base/log.h"
#include "lib/base/ranks.h"
#include "lib/base/rng.h"
#include "lib/stage/rank.h"
#include "stages/eval/crew.h"

struct examiner {
    struct stage *s;
    const struct eval_conf *c;
    struct policy policy;
    struct task_set test;
    struct noise_plan noisy;         /* the policy's, in force in phase eval */
    struct gen *gen;
    struct crew *crew;               /* rank 0's, of several; else NULL */
    struct noise_view aqn;           /* lent to gen */
    /* of the score in the making */
    const struct exam *exam;
    struct str noise;                /* its label */
    struct rec *answer;
    int64_t done, own_done;          /* of all ranks; of this one */
    char *evidence[RANKS_MAX];       /* of the other ranks, once each has it */
    bool over;                       /* rank 0 has left */
    char adapter_sha256[SHA256_HEX]; /* in force; "" = base */
};

static int64_t new_max(const struct eval_conf *c) {
    return c->new_max > 0 ? c->new_max : c->shared.sample.new_max;
}

static bool may_be_noisy(const struct eval_conf *c) {
    const struct shared *s = &c->shared;
    const bool asked = c->also_noisy || c->noise == EVAL_NOISE_TRAINED;
    return (s->ops.type && (asked || s->ops.eval)) ||
           (s->modules.type && (asked || s->modules.eval));
}

struct gen_opts examiner_gen_opts(const struct eval_conf *c, const struct lora_shape *shape) {
    return (struct gen_opts){ .rows = (int)c->rows,
                              .positions_max = (int)(c->shared.data.prompt_max + new_max(c)),
                              .lora = *shape,
                              .activations = (enum model_quant)c->shared.quant.activations,
                              .noise = may_be_noisy(c),
                              .graphs = c->shared.run.graphs };
}

static int open_ranks(struct examiner *x) {
    struct stage *s = x->s;
    const int ranks = (int)x->c->ranks;
    if (ranks < 2) return 0;
    if (s->rank == 0 && crew_open(&x->crew, s, ranks, &s->err) < 0) return -1;
    s->ranks = ranks;
    return rank_take_share(&x->c->shared, s->rank, ranks, &s->err);
}

/* What keeps another rank from starting is said before anything is asked. */
static int wait_for_ranks(struct examiner *x) {
    struct crew_frame f;
    for (int ready = 1; x->crew && ready < x->c->ranks;) {
        const int got = crew_hear(x->crew, &f, 200, &x->s->err);
        if (got < 0) return -1;
        if (stage_stopping(x->s)) return err_set(&x->s->err, "stopped at start");
        ready += got;
    }
    return 0;
}

struct examiner *examiner_create(struct stage *s) {
    struct examiner *x = mem_alloc(sizeof *x);
    x->s = s;
    x->c = s->conf;
    if (open_ranks(x) < 0 ||
        task_load(&x->test, x->c->shared.data.test, x->c->split, (int)x->c->questions, &s->err) < 0)
        goto failed;
    if (policy_open(&x->policy, &x->c->shared, &s->err) < 0 ||
        treatment_plan(&x->noisy, &x->c->shared, &x->policy.model->conf, true, &s->err) < 0)
        goto failed;
    s->device = x->policy.device;
    struct gen_opts o = examiner_gen_opts(x->c, &x->policy.shape);
    if (o.positions_max > x->policy.model->conf.positions_max)
        o.positions_max = x->policy.model->conf.positions_max;
    if (gen_create(&x->gen, x->policy.model, x->policy.tok, &o, &s->err) < 0 ||
        wait_for_ranks(x) < 0)
        goto failed;
    return x;
failed:
    examiner_destroy(&x);
    return NULL;
}

void examiner_destroy(struct examiner **xp) {
    struct examiner *x = *xp;
    if (!x) return;
    crew_close(&x->crew);
    for (int i = 0; i < RANKS_MAX; i++) free(x->evidence[i]);
    gen_destroy(&x->gen);
    noise_view_close(&x->aqn);
    str_release(&x->noise);
    policy_close(&x->policy);
    task_release(&x->test);
    free(x);
    *xp = NULL;
}

struct exam examiner_exam(const struct examiner *x, const struct rec_adapter *a, bool noisy) {
    const uint64_t seed = (uint64_t)x->c->shared.run.seed;
    return (struct exam){ .dir = a->path,
                          .sha256 = a->sha256,
                          .version = a->version,
                          .step = a->step,
                          .plan = noisy ? &x->noisy : &x->policy.plan,
                          .sigma = noisy ? a->treatment.sigma : 0,
                          .noise_seed = policy_noise_seed(seed, a->step) };
}

const char *examiner_ops(const struct examiner *x) { return x->policy.ops.s; }
const char *examiner_treatment(const struct examiner *x) { return x->policy.treatment; }

void examiner_warn(const struct examiner *x, const struct rec_adapter *a) {
    if (strcmp(a->treatment.hash, x->policy.treatment) == 0) return;
    log_warn("NOT AS TRAINED: the adapter of step %lld was trained under treatment %s; this score "
             "is under %s, %s (formats, excluded modules, adapter shape or noise settings differ)",
             (long long)a->step, a->treatment.hash, x->policy.treatment,
             policy_quant_label(&x->c->shared));
}

void exam_noise(struct str *out, const struct examiner *x, const struct exam *m) {
    treatment_text(out, m->plan, &x->c->shared, &x->policy.model->conf, NOISE_PHASE_EVAL, m->step,
                   m->sigma);
}

int64_t examiner_answers(const struct examiner *x) { return x->test.n * x->c->samples; }

void examiner_label(const struct examiner *x, struct rec_score *s) {
    s->samples_per_question = x->c->samples;
    s->temperature = x->c->temperature;
    s->model_sha256 = x->policy.model->sha256;
    s->data_sha256 = (char *)(uintptr_t)x->test.sha256;
    s->adapter_sha256 = (char *)(uintptr_t)x->adapter_sha256;
}

/* To rank 0: its number among all, then the record. */
static void tell_answer(struct examiner *x, int64_t index) {
    struct str out;
    str_init(&out);
    str_add(&out, &index, sizeof index);
    rec_pack(&out, &x->answer[index]);
    if (!x->over) x->over = crew_tell(x->s->rank_fd, CREW_ANSWER, out.s, out.len, NULL) != 1;
    str_release(&out);
}

static void take_answer(void *ud, const struct gen_sample *g) {
    struct examiner *x = ud;
    int q = (int)g->tag;
    char id[64];
    struct rec *r = &x->answer[(int64_t)q * x->c->samples + g->k];
    struct str text;
    str_init(&text);
    str_add(&text, "", 0);
    tok_decode(x->policy.tok, g->ids, g->n, false, &text);
    snprintf(id, sizeof id, "%s:%d", x->test.split, q);
    rec_init(r, REC_ANSWER);
    r->answer = (struct rec_answer){
        .run = mem_dup(x->c->shared.run.id),
        .version = x->exam->version,
        .step = x->exam->step,
        .split = mem_dup(x->test.split),
        .question_id = mem_dup(id),
        .question = mem_dup(x->test.q[q].question),
        .answer = mem_dup(x->test.q[q].gold),
        .k = g->k,
        .text = mem_dup(text.s),
        .stop = mem_dup(gen_stop_name[g->stop]),
        .tokens = g->n,
        .strict = task_right(TASK_RULE_STRICT, text.s, x->test.q[q].gold, NULL),
        .flexible = task_right(TASK_RULE_FLEXIBLE, text.s, x->test.q[q].gold, NULL),
        .quant = mem_dup(policy_quant_label(&x->c->shared)),
        .noise = mem_dup(x->noise.s)
    };
    str_release(&text);
    x->done++;
    x->own_done++;
    x->s->progress++;
    if (x->s->rank) tell_answer(x, (int64_t)q * x->c->samples + g->k);
}

static int load_adapter(struct examiner *x, const struct exam *m, struct lora **l) {
    struct err *e = &x->s->err;
    char *got = x->adapter_sha256;
    *got = 0;
    if (!*m->dir) return 0;
    if (lora_load(l, &x->policy.model->conf, m->dir, e) < 0) return -1;
    lora_sha256(*l, got);
    if ((*l)->shape.rank != x->policy.shape.rank)
        return err_code(e, EXIT_CONFIG,
                        "adapter '%s' has rank %d, this configuration says %d: --set lora.rank=%d",
                        m->dir, (*l)->shape.rank, x->policy.shape.rank, (*l)->shape.rank);
    if (*m->sha256 && strcmp(got, m->sha256) != 0)
        return err_set(e, "adapter '%s' hashes to %.12s, %.12s was announced", m->dir, got,
                       m->sha256);
    return 0;
}

static int adopt(struct examiner *x, const struct exam *m) {
    struct err *e = &x->s->err;
    const struct shared *c = &x->c->shared;
    struct lora *l = NULL;
    int rc = load_adapter(x, m, &l);
    if (rc == 0)
        rc = treatment_view(&x->aqn, x->policy.model, c, m->step, m->sigma, m->noise_seed,
                            m->version, e);
    if (rc == 0) rc = gen_adopt(x->gen, l, &x->aqn, e);
    gen_set_noise(x->gen, m->plan, NOISE_PHASE_EVAL, m->noise_seed, eval_device(x->c));
    lora_destroy(&l);
    return rc;
}

static int submit(struct examiner *x, int q) {
    const struct eval_conf *c = x->c;
    struct str text;
    struct tok_ids ids = { 0 };
    str_init(&text);
    int rc = policy_prompt(&x->policy, &c->shared, x->test.q[q].question, &text, &ids, &x->s->err);
    if (rc == 0) {
        struct gen_request r = { .tag = (uint64_t)q,
                                 .prompt = ids.id,
                                 .prompt_n = ids.n,
                                 .samples = (int)c->samples,
                                 .new_max = (int)new_max(c),
                                 .temperature = (float)c->temperature,
                                 .top_k = (int)c->top_k,
                                 .top_p = (float)c->top_p,
                                 .prompt_uid = (uint64_t)q };
        rng_key(r.key, (uint64_t)c->shared.run.seed, RNG_PURPOSE_EVAL,
                (uint64_t)x->exam->step);
        rc = gen_submit(x->gen, &r, &x->s->err);
        if (rc < 0) err_wrap(&x->s->err, "%s: question %d", c->shared.data.test, q + 1);
    }
    free(ids.id);
    str_release(&text);
    return rc;
}

void answers_release(struct answers *a) {
    for (int64_t i = 0; a->v && i < a->n; i++) rec_release(&a->v[i]);
    free(a->v);
    free(a->evidence);
    *a = (struct answers){ 0 };
}

/* Answers and evidence of other ranks, as far as they are here: 0, -1. */
static int hear_others(struct examiner *x, int timeout_ms) {
    struct err *e = &x->s->err;
    struct crew_frame f;
    int got = 0, heard = 0;
    while (x->crew && (got = crew_hear(x->crew, &f, heard++ ? 0 : timeout_ms, e)) == 1) {
        if (f.kind == CREW_EVIDENCE) {
            char **text = &x->evidence[f.rank];
            free(*text);
            *text = mem_alloc(f.bytes + 1);
            memcpy(*text, f.data, f.bytes);
            continue;
        }
        int64_t index;
        assert(f.bytes > sizeof index);
        memcpy(&index, f.data, sizeof index);
        assert(index >= 0 && index < examiner_answers(x));
        struct rec *r = &x->answer[index];
        if (rec_unpack(r, f.data + sizeof index, f.bytes - sizeof index, e) < 0)
            return err_wrap(e, "answer of rank %d", f.rank);
        if (strcmp(r->answer.noise, x->noise.s) != 0)
            return err_set(e, "rank %d answers under noise %s, asked was %s", f.rank,
                           r->answer.noise, x->noise.s);
        x->done++;
        x->s->progress++;
    }
    return got;
}

static int ask_all(struct examiner *x, int64_t count) {
    const int ahead = (int)(2 * x->c->rows / x->c->samples) + 1, ranks = (int)x->c->ranks;
    int rc = 0, asked = 0;
    while (rc == 0 && x->done < count) {
        if (stage_stopping(x->s) || x->over) rc = 1;
        for (int q; rc == 0 && (q = x->s->rank + asked * ranks) < x->test.n &&
                    asked - x->own_done / x->c->samples < ahead;
             asked++)
            rc = submit(x, q);
        if (rc == 0 && !gen_idle(x->gen)) rc = gen_step(x->gen, take_answer, x, &x->s->err);
        if (rc == 0) rc = hear_others(x, gen_idle(x->gen) ? 200 : 0);
        char metrics[96];
        snprintf(metrics, sizeof metrics,
                 "{\"scoring_step\":%lld,\"answered\":%lld,\"questions\":%lld}",
                 (long long)x->exam->step, (long long)x->done, (long long)count);
        stage_beat(x->s, "work", metrics);
    }
    return rc;
}

static int add_others(struct examiner *x, const struct exam *m, struct noise_evidence *to) {
    struct err *e = &x->s->err;
    for (int i = 1; i < x->c->ranks;) {
        if (!x->evidence[i] && hear_others(x, 200) < 0) return -1;
        if (!x->evidence[i]) continue;
        if (*x->evidence[i] &&
            treatment_evidence_add(to, m->plan, NOISE_PHASE_EVAL, x->evidence[i], e) < 0)
            return err_wrap(e, "rank %d", i);
        i++;
    }
    return treatment_check(m->plan, NOISE_PHASE_EVAL, to, e);
}

/* A noisy score without noise, or a clean one with, is no score. */
static int take_evidence(struct examiner *x, const struct exam *m, char **text) {
    struct err *e = &x->s->err;
    struct noise_evidence got = { 0 };
    int rc = gen_take_noise(x->gen, &got, e);
    /* each rank by itself, then the whole; one without a question has nothing to show */
    if (rc == 0 && x->own_done) rc = treatment_check(m->plan, NOISE_PHASE_EVAL, &got, e);
    if (rc == 0 && x->crew) rc = add_others(x, m, &got);
    if (rc < 0)
        return err_wrap(e, "score of step %lld, noise %s", (long long)m->step, x->noise.s);
    if (!x->own_done) *text = mem_dup("");
    else *text = treatment_evidence(m->plan, NOISE_PHASE_EVAL, &got, &x->aqn,
                               (struct treatment_seeds){ m->noise_seed, eval_device(x->c) });
    return 0;
}

/* An exam as it goes to the other ranks. */
struct order {
    int64_t version, step;
    double sigma;
    uint64_t noise_seed;
    int64_t noisy;
    char sha256[SHA256_HEX], dir[FS_PATH_MAX];
};

static int order_others(struct examiner *x, const struct exam *m) {
    struct order o = { m->version, m->step, m->sigma, m->noise_seed, m->plan == &x->noisy, "", "" };
    if (!x->crew) return 0;
    for (int i = 1; i < x->c->ranks; i++) {
        free(x->evidence[i]);
        x->evidence[i] = NULL;
    }
    snprintf(o.sha256, sizeof o.sha256, "%s", m->sha256);
    snprintf(o.dir, sizeof o.dir, "%s", m->dir);
    return crew_order(x->crew, &o, sizeof o, &x->s->err);
}

/* Answers of this rank, or in rank 0 of all. */
static int64_t to_come(const struct examiner *x) {
    const int ranks = (int)x->c->ranks, rank = x->s->rank;
    return rank == 0 ? examiner_answers(x)
                     : (x->test.n - rank + ranks - 1) / ranks * x->c->samples;
}

int examiner_ask(struct examiner *x, const struct exam *m, struct answers *out) {
    x->exam = m;
    x->done = x->own_done = 0;
    str_clear(&x->noise);
    exam_noise(&x->noise, x, m);
    *out = (struct answers){ .n = examiner_answers(x) };
    out->v = x->answer = mem_alloc((size_t)out->n * sizeof *x->answer);
    int rc = order_others(x, m);
    if (rc == 0) rc = adopt(x, m);
    if (rc == 0) rc = ask_all(x, to_come(x));
    if (rc == 0 && x->c->ranks > 1)
        log_info("step %lld, noise %s: %lld of %lld answers made here", (long long)m->step,
                 x->noise.s, (long long)x->own_done, (long long)out->n);
    if (rc == 0) rc = take_evidence(x, m, &out->evidence);
    if (rc != 0) answers_release(out);
    x->answer = NULL;
    x->exam = NULL;
    return rc;
}

int examiner_serve(struct examiner *x) {
    struct err *e = &x->s->err;
    const int fd = x->s->rank_fd;
    struct order o;
    int rc = crew_tell(fd, CREW_READY, "", 0, e);
    while (rc == 1 && (rc = crew_take(fd, &o, sizeof o, e)) == 1) {
        const struct exam m = { .dir = o.dir,
                                .sha256 = o.sha256,
                                .version = o.version,
                                .step = o.step,
                                .plan = o.noisy ? &x->noisy : &x->policy.plan,
                                .sigma = o.sigma,
                                .noise_seed = o.noise_seed };
        struct answers got;
        rc = examiner_ask(x, &m, &got);
        if (rc != 0) return rc < 0 ? -1 : 0;
        rc = crew_tell(fd, CREW_EVIDENCE, got.evidence, strlen(got.evidence), e);
        answers_release(&got);
    }
    return rc;
}
