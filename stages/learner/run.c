/* run.c - see run.h. In the order of a step: sigma, waves, filter, update, publish, metrics,
 * checkpoint.
 * SPDX-License-Identifier: Apache-2.0 */
#include "stages/learner/run.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <sys/file.h>
#include <unistd.h>
#include <time.h>

#include "lib/base/fs.h"
#include "lib/base/clock.h"
#include "lib/base/log.h"
#include "lib/stage/aqn.h"
#include "lib/stage/device.h"
#include "lib/stage/rank.h"
#include "lib/stage/effect.h"
#include "stages/learner/ahead.h"
#include "stages/learner/ckpt.h"
#include "stages/learner/metrics.h"
#include "stages/learner/intake.h"
#include "stages/learner/noise_sum.h"
#include "stages/learner/selftest.h"
#include "stages/learner/team.h"

enum { NONFINITE_IN_A_ROW_MAX = 3 };

struct run {
    struct stage *s;
    const struct learner_conf *c;
    struct policy policy;
    struct task_set train;
    struct updater *updater;
    struct team *team;               /* NULL = one rank */
    struct update_state state;
    struct progress done;
    struct intake *intake;
    struct metrics *metrics;
    struct ckpt_identity identity;
    struct str settings;
    int lock_fd;                     /* held while we live: one learner a folder */
    int64_t fence;
    char adapter[FS_PATH_MAX], adapter_sha256[SHA256_HEX];
    /* of the open step: kept ones first come first, sorted by id as waves are */
    const struct rec_group **group;
    struct step_counts counts;
    char *evidence[NOISE_PHASE_COUNT];       /* of the last step and its update */
    /* of all groups that were sampled as those of the open step; how many steps they are of */
    struct noise_evidence sampled;
    int64_t sampled_steps;
};

static int64_t wave_size(const struct learner_conf *c) { return c->wave > 0 ? c->wave : c->batch; }

/* Every prompt must fit before the first step is paid for. */
static int check_prompts(const struct run *r, struct err *e) {
    const struct shared *c = &r->c->shared;
    struct str text;
    struct tok_ids ids = { 0 };
    str_init(&text);
    int rc = 0, positions = r->policy.model->conf.positions_max;
    for (int i = 0; rc == 0 && i < r->train.n; i++) {
        rc = policy_prompt(&r->policy, c, r->train.q[i].question, &text, &ids, e);
        if (rc == 0 && ids.n > c->data.prompt_max)
            rc = err_code(e, EXIT_CONFIG,
                          "%s: question %d has a prompt of %d tokens, data.prompt_max is %lld",
                          c->data.train, i + 1, ids.n, (long long)c->data.prompt_max);
        if (rc == 0 && ids.n + c->sample.new_max > positions)
            rc = err_code(e, EXIT_CONFIG,
                          "%s: question %d has a prompt of %d tokens; with sample.new_max = %lld "
                          "it does not fit the model's context of %d",
                          c->data.train, i + 1, ids.n, (long long)c->sample.new_max, positions);
    }
    free(ids.id);
    str_release(&text);
    return rc;
}

/* What every later update rests on. */
static int test_gradient(const struct run *r, struct err *e) {
    struct selftest_window w[SELFTEST_WINDOWS];
    struct selftest t;
    if (selftest_windows(w, &r->policy, &r->c->shared, &r->train, e) < 0 ||
        selftest_run(&t, &r->policy, w, e) < 0)
        return -1;
    char rounded[80] = "", quotient[80] = "no difference quotient";
    if (t.layer >= 0)
        snprintf(rounded, sizeof rounded, "; straight through, cosine at least %.3f (layer %d)",
                 t.cosine, t.layer);
    if (t.right)
        snprintf(quotient, sizeof quotient, "difference quotient %.3f of the gradient",
                 t.difference);
    log_info("gradient self-test on %d tokens: %s%s, %.2f s", t.tokens, quotient, rounded,
             t.seconds);
    if (!t.right)
        log_warn("the gradient self-test could not judge its size: on none of %d windows were both "
                 "steps right, and on not all of them both wrong", t.windows);
    if (t.layer >= 0 && t.cosine < SELFTEST_COSINE_LOW)
        log_warn("4-bit inputs or adapters turn the gradient of layer %d far from the one that it "
                 "would have without (cosine at most %.3f on %d windows): quant.exclude can leave "
                 "layers out", t.layer, t.cosine, t.windows);
    return 0;
}

/* One learner a folder; and a replay does not go into the folder of the run that it replays. */
static int own_folder(struct run *r, struct err *e) {
    const char *dir = r->c->shared.run.dir;
    char path[FS_PATH_MAX];
    fs_join(path, sizeof path, dir, "tape/groups.tape");
    if (link_is_file(r->s->link[PORT_GROUP]) && fs_exists(path))
        return err_code(
            e, EXIT_USAGE,
            "'%s' is the folder of a live run: replay into one of its own, --set run.dir=FOLDER",
            dir);
    if (!fs_is_dir(dir)) return 0;
    fs_join(path, sizeof path, dir, "learner.lock");
    r->lock_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (r->lock_fd < 0) return err_set(e, "cannot open '%s': %s", path, strerror(errno));
    if (flock(r->lock_fd, LOCK_EX | LOCK_NB) < 0)
        return err_code(e, EXIT_ENV, "another learner works in '%s'", dir);
    return 0;
}

/* A checkpoint's steps to come need adapters that it does not hold itself. */
static int check_leases(const struct run *r, struct err *e) {
    char path[FS_PATH_MAX];
    if (!ahead_whole(&r->done, r->c))
        return err_code(e, EXIT_CONFIG,
                        "the checkpoint of step %lld does not say which adapters sample the next "
                        "%lld steps: start a new run",
                        (long long)r->done.step, (long long)r->c->lag_max);
    for (int i = 0; i < r->done.leases; i++) {
        ckpt_adapter_path(path, r->c->shared.run.dir, r->done.lease[i].version);
        if (!fs_is_dir(path))
            return err_code(e, EXIT_ENV,
                            "'%s' is missing: with learner.lag_max = %lld step %lld is sampled by "
                            "it; remove ckpt/ to train again from the journal",
                            path, (long long)r->c->lag_max, (long long)r->done.step + i + 1);
    }
    return 0;
}

static int open_state(struct run *r, struct err *e) {
    const struct shared *c = &r->c->shared;
    struct update_state *s = &r->state;
    s->lora = lora_create(&r->policy.model->conf, &r->policy.shape, (uint64_t)c->run.seed);
    s->m = mem_alloc(s->lora->params * sizeof(float));
    s->v = mem_alloc(s->lora->params * sizeof(float));
    /* Where it runs and how it is cut into pieces changes no bit; what is hashed above is left out
     * too. */
    static const char *const but[] = { "run.dir",
                                       "run.id",
                                       "run.threads",
                                       "run.kernels",
                                       "run.score_every",
                                       "model.path",
                                       "model.packed_dir",
                                       "data.train",
                                       "data.test",
                                       "data.prompt_max",
                                       "learner.micro_tokens",
                                       "learner.save_every",
                                       "learner.ranks",
                                       "learner.lag_max",
                                       NULL };
    stage_settings(r->s, but, &r->settings);
    /* checkpoints from before there were ranks and lag do without the lines */
    if (r->c->ranks > 1)
        str_printf(&r->settings, "learner.ranks = %lld\n", (long long)r->c->ranks);
    if (r->c->lag_max > 0)
        str_printf(&r->settings, "learner.lag_max = %lld\n", (long long)r->c->lag_max);
    r->identity = (struct ckpt_identity){ r->policy.model->sha256, tok_sha256(r->policy.tok),
                                          r->train.sha256, r->policy.treatment,
                                          r->policy.kern.bits, r->settings.s };
    int got = ckpt_load(c->run.dir, &r->done, s, &r->identity, e);
    if (got < 0) return -1;
    if (got && check_leases(r, e) < 0) return -1;
    if (got) log_info("going on after step %lld", (long long)r->done.step);
    log_info("%zu trainable parameters", s->lora->params);
    /* Only from here on the run folder is written to: what was refused above left it as it was. */
    if (fs_mkdirs(c->run.dir, e) < 0 || (r->lock_fd < 0 && own_folder(r, e) < 0) ||
        ckpt_next_fence(c->run.dir, &r->fence, e) < 0) return -1;
    return ckpt_publish(c->run.dir, s->lora, r->done.version, c->model.path, r->adapter,
                        e);
}

static int announce(struct run *r, struct err *e) {
    const struct shared *c = &r->c->shared;
    lora_sha256(r->state.lora, r->adapter_sha256);
    struct rec a = { .type = REC_ADAPTER,
                     .adapter = {
                         .run = c->run.id,
                         .version = r->done.version,
                         .step = r->done.step,
                         .path = r->adapter,
                         .sha256 = r->adapter_sha256,
                         .final = r->done.step == c->run.steps,
                         .treatment = { r->policy.treatment, treatment_sigma(c, r->done.step),
                                        policy_noise_seed((uint64_t)c->run.seed, r->done.step),
                                        r->policy.ops.s } } };
    if (shared_is_scored(c, r->done.step) && ckpt_mark_scored(c->run.dir, &a, e) < 0) return -1;
    struct link *l = r->s->link[PORT_ADAPTER];
    return l && link_send(l, &a, NULL, 0, e) < 0 ? -1 : 0;
}

static bool is_scored_yet(const struct run *r) {
    char path[FS_PATH_MAX], want[40];
    struct str text;
    str_init(&text);
    fs_join(path, sizeof path, r->c->shared.run.dir, "scores.jsonl");
    snprintf(want, sizeof want, "\"step\":%lld,", (long long)r->done.step);
    bool found = fs_exists(path) && fs_read(&text, path, 1 << 30, NULL) == 0 &&
                 strstr(text.s, want);
    str_release(&text);
    return found;
}

/* Stages that share cores take turns: the evaluator's is now. scores.jsonl is the truth, the record
 * only wakes us. */
static int let_score(struct run *r, struct err *e) {
    struct link *l = r->s->link[PORT_SCORE];
    if (!l || !shared_is_scored(&r->c->shared, r->done.step) ||
        r->done.step == r->c->shared.run.steps)
        return 0;
    int got = 0;
    while (got >= 0 && !stage_stopping(r->s) && !is_scored_yet(r)) {
        struct rec score;
        r->s->waits_for = "score";
        stage_beat(r->s, "wait", NULL);
        got = link_recv(l, &score, NULL, 200, e);
        if (got == LINK_RECORD) rec_release(&score);
    }
    r->s->waits_for = "";
    return got < 0 ? -1 : 0;
}

struct run *run_create(struct stage *s) {
    struct run *r = mem_alloc(sizeof *r);
    struct err *e = &s->err;
    r->s = s;
    r->c = s->conf;
    r->lock_fd = -1;
    const struct shared *c = &r->c->shared;
    if (!*c->run.dir) {
        err_code(e, EXIT_USAGE, "the learner needs a folder to write to: --set run.dir=FOLDER");
        goto failed;
    }
    if (own_folder(r, e) < 0 || team_open(&r->team, s, e) < 0) goto failed;
    if (task_load(&r->train, c->data.train, "train", 0, e) < 0 || policy_open(&r->policy, c, e) < 0)
        goto failed;
    s->device = r->policy.device;
    if (check_prompts(r, e) < 0 || test_gradient(r, e) < 0 ||
        updater_create(&r->updater, &r->policy, r->c, e) < 0 || open_state(r, e) < 0 ||
        team_begin(r->team, r->updater, &r->state, r->policy.kern.pool, e) < 0)
        goto failed;
    if (intake_open(&r->intake, s, &r->policy, &r->train, r->fence, ahead_floor(&r->done), e) < 0)
        goto failed;
    if (metrics_open(&r->metrics, c->run.dir, s->device, r->done.step, e) < 0 || announce(r, e) < 0)
        goto failed;
    r->group = mem_alloc((size_t)(wave_size(r->c) * r->c->waves_max + 1) * sizeof *r->group);
    s->step = r->done.step;
    return r;
failed:
    run_destroy(&r);
    return NULL;
}

void run_destroy(struct run **rp) {
    struct run *r = *rp;
    if (!r) return;
    team_close(&r->team);
    metrics_close(&r->metrics);
    intake_close(&r->intake);
    updater_destroy(&r->updater);
    lora_destroy(&r->state.lora);
    free(r->state.m);
    free(r->state.v);
    policy_close(&r->policy);
    task_release(&r->train);
    str_release(&r->settings);
    if (r->lock_fd >= 0) close(r->lock_fd);
    for (int i = 0; i < NOISE_PHASE_COUNT; i++) free(r->evidence[i]);
    free(r->group);
    free(r);
    *rp = NULL;
}

/* What the filter looks at: spread in it is what a group can teach. */
static bool group_teaches(const struct learner_conf *c, const struct rec_group *g) {
    double metric[REC_SAMPLES_MAX];
    for (int k = 0; k < g->samples; k++) {
        const struct rec_sample *s = &g->sample[k];
        metric[k] = c->filter == FILTER_METRIC_ACC ? s->acc : s->score;
    }
    return c->filter == FILTER_METRIC_OFF || dapo_teaches(metric, g->samples);
}

static void count_group(struct step_counts *n, struct progress *p, const struct rec_group *g) {
    int right = 0;
    for (int k = 0; k < g->samples; k++) {
        right += g->sample[k].acc > 0;
        n->samples++;
        n->tokens += g->sample[k].ids.n;
    }
    n->right += right;
    n->groups++;
    n->all_right += right == g->samples;
    n->all_wrong += right == 0;
    p->groups_seen++;
    p->groups_all_right += right == g->samples;
    p->groups_all_wrong += right == 0;
    n->sigma_realised = g->sigma_realised;
    n->noise_elements = g->noise_elements;
    n->noise_changed = g->noise_changed;
}

static void keep_evidence(struct run *r, enum noise_phase phase, char *text) {
    free(r->evidence[phase]);
    r->counts.evidence[phase] = r->evidence[phase] = text;
}

/* What the rollouts applied in this step: the sum over all of its groups, the filtered ones too,
 * whoever made them. */
static int sum_rollouts(struct run *r, const struct intake_policy *made_with,
                        const struct noise_evidence *sum, const char *part, struct err *e) {
    const struct noise_plan *p = &r->policy.plan;
    if (ahead_sampled_alike(made_with, r->c) == r->sampled_steps &&
        treatment_check(p, NOISE_PHASE_ROLLOUT, &r->sampled, e) < 0)
        return err_wrap(e, "groups of step %lld", (long long)r->done.step + 1);
    keep_evidence(r, NOISE_PHASE_ROLLOUT,
                  treatment_evidence_sum(p, NOISE_PHASE_ROLLOUT, sum, part));
    return 0;
}

static int add_evidence(struct run *r, struct noise_evidence *step, const char *text,
                        struct err *e) {
    const struct noise_plan *p = &r->policy.plan;
    if (treatment_evidence_add(step, p, NOISE_PHASE_ROLLOUT, text, e) < 0) return -1;
    return treatment_evidence_add(&r->sampled, p, NOISE_PHASE_ROLLOUT, text, e);
}

/* Waves until `batch` groups teach or the waves are used up. 0, 1 asked to stop, -1. Kept groups
 * are r->group[0 .. *kept). */
static int collect(struct run *r, const struct intake_policy *p, struct progress *next, int *kept,
                   struct err *e) {
    const struct learner_conf *c = r->c;
    int wave = (int)wave_size(c), most = c->filter == FILTER_METRIC_OFF ? 1 : (int)c->waves_max;
    const struct rec_group **arrived = mem_alloc((size_t)wave * sizeof *arrived);
    struct noise_evidence applied = { 0 };
    const char *part = "";
    int rc = 0;
    *kept = 0;
    if (p->step > 0 || p->for_step == 0) {
        r->sampled = applied;
        r->sampled_steps = 0;
    }
    r->sampled_steps++;
    for (int w = 0; rc == 0 && w < most && *kept < c->batch; w++) {
        const int64_t first = w ? next->cursor : next->lease[0].first;
        rc = intake_wave(r->intake, p, first, wave, arrived, e);
        if (rc != 0) break;
        r->counts.waves++;
        if (w) next->cursor += wave;
        for (int i = 0; rc == 0 && i < wave; i++) {
            part = arrived[i]->evidence;
            rc = add_evidence(r, &applied, part, e);
            bool teaches = group_teaches(c, arrived[i]), keep = teaches && *kept < c->batch;
            count_group(&r->counts, next, arrived[i]);
            if (keep) r->group[(*kept)++] = arrived[i];
            else if (teaches) {
                next->groups_surplus++;
                r->counts.surplus++;
            }
        }
    }
    next->groups_kept += *kept;
    r->counts.kept = *kept;
    if (rc == 0) rc = sum_rollouts(r, p, &applied, part, e);
    noise_sum_add(next, &r->policy.plan, NOISE_PHASE_ROLLOUT, &applied);
    free(arrived);
    return rc;
}

/* Noise has the keys and the size that it had where the groups were sampled. */
static int update(struct run *r, const struct intake_policy *sampled, int kept,
                  struct update_metrics *m, struct err *e) {
    const struct update_treatment t = { .seed = sampled->noise_seed,
                                        .fixed_seed = (uint64_t)r->c->shared.run.seed,
                                        .sigma = sampled->sigma,
                                        .step = sampled->step,
                                        .version = r->done.version };
    if (team_step(r->team, r->updater, &r->state, r->group, kept, &t, m, e) < 0)
        return err_wrap(e, "step %lld", (long long)r->done.step + 1);
    const struct noise_plan *p = &r->policy.plan;
    const struct treatment_seeds seeds = { t.seed, t.fixed_seed };
    keep_evidence(r, NOISE_PHASE_LOGPROB,
                  treatment_evidence(p, NOISE_PHASE_LOGPROB, &m->logprob, &m->aqn, seeds));
    keep_evidence(r, NOISE_PHASE_UPDATE,
                  treatment_evidence(p, NOISE_PHASE_UPDATE, &m->update, NULL, seeds));
    return 0;
}

static int train(struct run *r, const struct intake_policy *sampled, struct progress *next,
                 int kept, struct update_metrics *m, struct err *e) {
    if (!kept) {
        next->skipped_starved++;
        log_warn("step %lld skipped: no group of %d could teach (%d all right, %d all wrong)",
                 (long long)next->step, r->counts.groups,
                 r->counts.all_right, r->counts.all_wrong);
        return 0;
    }
    if (update(r, sampled, kept, m, e) < 0) return -1;
    noise_sum_add(next, &r->policy.plan, NOISE_PHASE_LOGPROB, &m->logprob);
    noise_sum_add(next, &r->policy.plan, NOISE_PHASE_UPDATE, &m->update);
    if (m->nonfinite) {
        next->skipped_nonfinite++;
        next->nonfinite_in_a_row++;
        log_warn("step %lld: gradient norm is not finite, update skipped", (long long)next->step);
        if (next->nonfinite_in_a_row >= NONFINITE_IN_A_ROW_MAX)
            return err_set(e,
                           "gradient norm not finite in %d steps in a row: look at the last groups "
                           "and lower learner.lr",
                           NONFINITE_IN_A_ROW_MAX);
        return 0;
    }
    next->nonfinite_in_a_row = 0;
    next->version++;
    next->updates_changed += m->changed;
    return 0;
}

/* Leases of the open step and of those after it; the policy of the open one. */
static struct intake_policy ask_ahead(struct run *r, struct progress *next) {
    ahead_open(next, r->c, wave_size(r->c), r->adapter_sha256);
    for (int i = 0; i < next->leases; i++) {
        const struct intake_policy p = ahead_policy(next, r->c, i);
        intake_ask(r->intake, &p, next->lease[i].first, (int)wave_size(r->c));
    }
    return ahead_policy(next, r->c, 0);
}

static int save(struct run *r, struct err *e) {
    if (metrics_sync(r->metrics, e) < 0 || updater_store(r->updater, &r->state, e) < 0) return -1;
    return ckpt_save(r->c->shared.run.dir, &r->done, &r->state, &r->identity, e);
}

int run_step(struct run *r) {
    const struct shared *c = &r->c->shared;
    struct err *e = &r->s->err;
    if (r->done.step >= c->run.steps) return 0;
    if (let_score(r, e) < 0) return -1;
    if (stage_stopping(r->s)) return 2;
    double begun = clock_seconds();
    struct progress next = r->done;
    struct update_metrics m = { 0 };
    const struct intake_policy p = ask_ahead(r, &next);
    r->counts = (struct step_counts){ .sigma = p.sigma,
                                      .ranks = (int)r->c->ranks,
                                      .lag = r->c->lag_max,
                                      .trained = r->done.version };
    int kept, rc = collect(r, &p, &next, &kept, e);
    if (rc != 0) return rc < 0 ? -1 : 2;
    double collected = clock_seconds();
    ahead_close(&next);
    next.step++;
    stage_beat(r->s, "work", NULL);
    if (train(r, &p, &next, kept, &m, e) < 0) return -1;
    double trained = clock_seconds();
    r->counts.version = next.version;
    if (next.version != r->done.version &&
        ckpt_publish(c->run.dir, r->state.lora, next.version, c->model.path, r->adapter, e) < 0)
        return -1;
    r->done = next;
    r->s->step = next.step;
    r->s->progress++;
    if (announce(r, e) < 0) return -1;
    struct step_seconds seconds = { .gather = collected - begun,
                                    .update = trained - collected,
                                    .step = clock_seconds() - begun };
    const char *line = metrics_step(r->metrics, &next, &r->counts, kept ? &m : NULL, r->group, kept,
                                    &seconds, e);
    if (!line) return -1;
    stage_beat(r->s, "work", line);
    intake_forget(r->intake, ahead_floor(&next));
    if (next.step % r->c->save_every == 0 || next.step == c->run.steps) {
        if (save(r, e) < 0) return -1;
    }
    return ckpt_prune(c->run.dir, &next, e) < 0 ? -1 : 1;
}

int run_finish(struct run *r) {
    const struct shared *c = &r->c->shared;
    struct err *e = &r->s->err;
    if (r->done.step > 0 && save(r, e) < 0) return -1;
    struct intake_counts n = intake_counts(r->intake);
    log_info("%lld of %lld steps, version %lld, adapter %.16s; groups: %lld leased, %lld "
             "journalled, %lld repeated, %lld refused",
             (long long)r->done.step, (long long)c->run.steps, (long long)r->done.version,
             r->adapter_sha256, (long long)n.leased, (long long)n.journalled, (long long)n.repeated,
             (long long)n.refused);
    if (r->done.step < c->run.steps) return 0;
    if (noise_sum_check(&r->done, &r->policy.plan, e) < 0) return -1;
    intake_end(r->intake);
    return 0;
}

/* ---- plan ---- */

static void lag_notes(const struct learner_conf *c, json_t *notes) {
    char text[400];
    snprintf(text, sizeof text,
             "learner.lag_max = %lld: the answers of a step come from the adapter of %lld step%s "
             "before; rollouts work while the learner does, as far ahead as rollout.credit reaches",
             (long long)c->lag_max, (long long)c->lag_max, c->lag_max == 1 ? "" : "s");
    json_array_append_new(notes, json_string(text));
    if (c->tis_cap <= 0)
        json_array_append_new(notes, json_string("nothing corrects for the older adapter that "
                                                 "sampled: learner.tis_cap = 2 would"));
    if (stage_linked(PORT_SCORE))
        json_array_append_new(notes, json_string("the learner waits for scores: rollouts that "
                                                 "share cores with it do not take turns now"));
}

static void plan_notes(const struct learner_conf *c, json_t *out) {
    json_t *notes = json_array();
    if (c->minibatch <= 0 || c->minibatch >= c->batch)
        json_array_append_new(notes, json_string("one update per batch: the ratio is 1 for every "
                                                 "token, so learner.clip_low, clip_high and "
                                                 "clip_dual never act"));
    if (c->shared.aqn.sigma_start > 0 && c->shared.aqn.schedule == NOISE_AQN_STEP)
        json_array_append_new(
            notes,
            json_string(
                "sigma decays geometrically, by a constant factor from stage to stage (the study's "
                "page calls it linear); the first stage is silent"));
    if (c->warmup > 0)
        json_array_append_new(
            notes,
            json_string("warm-up starts from 0: the first update leaves the adapter as it is"));
    if (c->filter == FILTER_METRIC_OFF)
        json_array_append_new(notes,
                              json_string("filter.metric = off: groups that are all right or all "
                                          "wrong stay in the batch and dilute it"));
    if (c->warmup >= c->shared.run.steps)
        json_array_append_new(notes, json_string("the warm-up is as long as the run: the full "
                                                 "learning rate is never reached"));
    if (c->lag_max > 0) lag_notes(c, notes);
    effect_notes(&c->shared, notes);
    const char *note = policy_kernels_note(&c->shared);
    if (note) json_array_append_new(notes, json_string(note));
    rank_note(notes, &c->shared, "learner.ranks", c->ranks);
    json_object_set_new(out, "notes", notes);
}

/* Operations of a step by the usual count (2 a weight forward, 4 more for a LoRA backward), answers
 * of half their length, at a rate that a core of today has in such products: a guess, and labelled
 * as one. Of a GPU's rate nothing is known. */
static void plan_seconds(const struct learner_conf *c, const struct model_conf *m, json_t *out) {
    const double core_rate = 5e10, head = (double)m->vocab * m->dim;
    double body = 0;
    for (int p = 0; p < PROJ_COUNT; p++) {
        int proj_out, proj_in;
        model_proj_shape(m, (enum proj)p, &proj_out, &proj_in);
        body += (double)proj_out * proj_in * m->layers;
    }
    const double samples = (double)(c->batch * c->shared.sample.n),
                 tokens = samples * (double)c->shared.sample.new_max / 2,
                 operations = tokens * 2 * (body + head) +
                              (tokens + samples * 100) * 4 * body + tokens * 4 * head;
    char how[200];
    snprintf(how, sizeof how,
             "a rough guess, %d core%s at %.0e operations a second, answers of half of "
             "sample.new_max", pool_cores(), pool_cores() == 1 ? "" : "s", core_rate);
    json_object_set_new(out, "seconds_per_step", json_real(operations / core_rate / pool_cores()));
    json_object_set_new(out, "seconds_how", json_string(how));
}

int run_plan(const struct learner_conf *c, json_t *out, struct err *e) {
    const struct shared *s = &c->shared;
    json_t *scored = json_array(), *files = json_array();
    for (int64_t step = 0; step <= s->run.steps; step++)
        if (shared_is_scored(s, step)) json_array_append_new(scored, json_integer(step));
    json_object_set_new(out, "steps", json_integer(s->run.steps));
    json_object_set_new(out, "scored", scored);
    json_object_set_new(out, "prompts_least", json_integer(s->run.steps * wave_size(c)));
    json_object_set_new(out, "prompts_most",
                        json_integer(s->run.steps * wave_size(c) *
                                     (c->filter == FILTER_METRIC_OFF ? 1 : c->waves_max)));
    plan_notes(c, out);
    json_object_set_new(out, "files", files);
    json_object_set_new(out, "ranks", json_integer((json_int_t)c->ranks));
    json_object_set_new(out, "rank_cores", json_integer(rank_cores(s, (int)c->ranks)));
    struct lora_shape shape;
    struct model_conf m;
    const int known = policy_plan(out, s, false, &shape, &m, e);
    shared_plan_file(files, s->data.train, "train", "tools/fetch gsm8k");
    if (known < 0 || aqn_plan(out, s, known ? &m : NULL, e) < 0) return -1;
    if (!known) return 0;
    json_int_t adapter = (json_int_t)(lora_params(&m, &shape) * sizeof(float));
    json_int_t kept = (json_int_t)json_array_size(scored) + 4 + 3 * c->lag_max;
    json_int_t record = (json_int_t)(s->sample.n * (s->sample.new_max * 12 + 1000));
    const size_t aqn = c->old_logprob == LEARNER_POLICY_NOISY ? aqn_bytes(s, &m) : 0,
                 modules = treatment_bytes(s, &m, false, NOISE_PHASE_LOGPROB, NOISE_PHASE_UPDATE);
    if (policy_plan_memory(out, s, &m, updater_plan(c, &m, &shape) + aqn + modules,
                           updater_plan_pages(c, &m, &shape), e) < 0 ||
        (c->ranks > 1 && rank_on_gpus(s) && device_ranks_check(e) < 0))
        return -1;
    json_object_set_new(
        out, "disk_bytes",
        json_integer(adapter * kept + 2 * 3 * adapter + s->run.steps * wave_size(c) * record));
    if (c->lag_max > 0) json_object_set_new(out, "lag", json_integer((json_int_t)c->lag_max));
    json_object_set_new(out, "trainable_parameters",
                        json_integer((json_int_t)lora_params(&m, &shape)));
    if (!rank_on_gpus(s)) plan_seconds(c, &m, out);
    return 0;
}
