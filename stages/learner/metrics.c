/* metrics.c - see metrics.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "stages/learner/metrics.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <time.h>
#include <unistd.h>

#include "lib/base/fs.h"
#include "lib/base/json.h"
#include "stages/learner/alarm.h"

struct metrics {
    char path[FS_PATH_MAX];
    const char *device;
    int fd;
    char *line;
    struct alarm alarm;
};

/* Lines of the learner with step <= kept stay; torn or later ones go. */
static int drop_later(struct metrics *m, int64_t kept, struct err *e) {
    const char *path = m->path;
    struct str old, new;
    str_init(&old);
    str_init(&new);
    if (!fs_exists(path)) return 0;
    int rc = fs_read(&old, path, (size_t)1 << 32, e);
    for (char *p = old.s; rc == 0 && p && *p;) {
        char *end = strchr(p, '\n');
        if (!end) break;
        json_t *o = json_loadb(p, (size_t)(end - p), 0, NULL);
        if (o && json_integer_value(json_object_get(o, "step")) <= kept) {
            str_add(&new, p, (size_t)(end - p) + 1);
            if (m->alarm.length_first <= 0)
                m->alarm.length_first =
                    json_number_value(json_object_get(o, "response_length/mean"));
        }
        json_decref(o);
        p = end + 1;
    }
    if (rc == 0 && new.len != old.len) rc = fs_replace(path, new.s ? new.s : "", new.len, e);
    str_release(&old);
    str_release(&new);
    return rc;
}

int metrics_open(struct metrics **out, const char *dir, const char *device, int64_t step,
                 struct err *e) {
    struct metrics *m = mem_alloc(sizeof *m);
    fs_join(m->path, sizeof m->path, dir, "metrics.jsonl");
    m->device = device;
    m->fd = -1;
    if (drop_later(m, step, e) == 0) {
        m->fd = open(m->path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
        if (m->fd < 0) err_set(e, "cannot open '%s': %s", m->path, strerror(errno));
    }
    if (m->fd < 0) {
        free(m);
        return -1;
    }
    *out = m;
    return 0;
}

void metrics_close(struct metrics **mp) {
    struct metrics *m = *mp;
    if (!m) return;
    close(m->fd);
    free(m->line);
    free(m);
    *mp = NULL;
}

int metrics_sync(struct metrics *m, struct err *e) {
    return fdatasync(m->fd) < 0
               ? err_set(e, "cannot make '%s' durable: %s", m->path, strerror(errno))
               : 0;
}

static void set(json_t *o, const char *name, double value) {
    if (isfinite(value)) json_object_set_new(o, name, json_real(value));
}
static void set_int(json_t *o, const char *name, int64_t value) {
    json_object_set_new(o, name, json_integer(value));
}

static void set_groups(json_t *o, const struct rec_group *const *group, int groups,
                       int64_t new_max) {
    double reward = 0, low = INFINITY, high = -INFINITY, length = 0, longest = 0,
           shortest = INFINITY, prompt = 0;
    int64_t n = 0, at_limit = 0;
    for (int g = 0; g < groups; g++)
        for (int k = 0; k < group[g]->samples; k++) {
            const struct rec_sample *s = &group[g]->sample[k];
            double tokens = s->ids.n;
            reward += s->score;
            low = s->score < low ? s->score : low;
            high = s->score > high ? s->score : high;
            length += tokens;
            longest = tokens > longest ? tokens : longest;
            shortest = tokens < shortest ? tokens : shortest;
            prompt += group[g]->prompt_ids.n;
            at_limit += s->ids.n >= new_max;
            n++;
        }
    if (!n) return;
    double m = (double)n;
    set(o, "critic/rewards/mean", reward / m);
    set(o, "critic/rewards/max", high);
    set(o, "critic/rewards/min", low);
    set(o, "response_length/mean", length / m);
    set(o, "response_length/max", longest);
    set(o, "response_length/min", shortest);
    set(o, "response_length/clip_ratio", (double)at_limit / m);
    set(o, "prompt_length/mean", prompt / m);
}

/* Updates between the adapter that sampled and the one that is trained; by samples. */
static void set_staleness(json_t *o, const struct step_counts *n,
                          const struct rec_group *const *group, int groups) {
    int64_t samples = 0, sum = 0, most = 0, count[LAG_MAX + 1] = { 0 };
    char name[40];
    for (int g = 0; g < groups; g++) {
        const int64_t stale = n->trained - group[g]->version;
        assert(stale >= 0 && stale <= LAG_MAX);
        count[stale] += group[g]->samples;
        samples += group[g]->samples;
        sum += stale * group[g]->samples;
        most = stale > most ? stale : most;
    }
    if (!samples) return;
    set(o, "train/staleness/mean", (double)sum / (double)samples);
    set_int(o, "train/staleness/max", most);
    for (int64_t k = 0; k <= n->lag; k++) {
        snprintf(name, sizeof name, "train/staleness/samples_%lld", (long long)k);
        set_int(o, name, count[k]);
    }
}

static void set_adapter(json_t *o, const struct update_metrics *u) {
    struct quant_stats all = u->adapter_a;
    quant_stats_add(&all, &u->adapter_b);
    if (!all.elements) return;
    set_int(o, "quant/adapter/elements", (int64_t)all.elements);
    set(o, "quant/adapter/sqnr_db", quant_sqnr_db(&all));
    set(o, "quant/adapter/a_zeroed", quant_zeroed(&u->adapter_a));
    set(o, "quant/adapter/b_zeroed", quant_zeroed(&u->adapter_b));
}

static void set_update(json_t *o, const struct update_metrics *u) {
    const struct dapo_gap *g = &u->gap;
    set(o, "actor/pg_loss", u->loss);
    set(o, "actor/kl_loss", u->kl_loss);
    set(o, "actor/kl_coef", u->kl_coef);
    set(o, "actor/pg_clipfrac", u->clipfrac);
    set(o, "actor/pg_clipfrac_lower", u->clipfrac_lower);
    set(o, "actor/ppo_kl", u->ppo_kl);
    set(o, "actor/entropy", u->entropy);
    set(o, "actor/grad_norm", u->grad_norm);
    set(o, "actor/lr", u->lr);
    set(o, "actor/first_ratio_deviation", u->old_cur_max);
    set(o, "critic/advantages/max", u->advantage_max);
    set(o, "critic/advantages/min", u->advantage_min);
    set_int(o, "actor/tokens", u->tokens);
    set_int(o, "actor/adapter_changed", u->changed);
    set_int(o, "training/rollout_logp_differ", g->tokens_differ);
    set(o, "training/rollout_logp_diff_mean", g->logp_diff_mean);
    set(o, "training/rollout_logp_diff_max", g->logp_diff_max);
    set(o, "training/rollout_probs_diff_mean", g->probs_diff_mean);
    set(o, "training/rollout_probs_diff_max", g->probs_diff_max);
    set(o, "training/rollout_probs_diff_std", g->probs_diff_std);
    set(o, "training/rollout_actor_probs_pearson_corr", g->probs_pearson);
    set(o, "rollout_corr/kl", g->kl);
    set(o, "rollout_corr/k3_kl", g->k3_kl);
    set(o, "rollout_corr/training_ppl", g->training_ppl);
    set(o, "rollout_corr/rollout_ppl", g->rollout_ppl);
    set(o, "rollout_corr/log_ppl_diff", g->log_ppl_diff);
    set(o, "rollout_corr/log_ppl_abs_diff", g->log_ppl_abs_diff);
    set(o, "rollout_corr/ppl_ratio", g->ppl_ratio);
    set(o, "rollout_corr/chi2_token", g->chi2_token);
    set(o, "rollout_corr/chi2_seq", g->chi2_seq);
    set(o, "rollout_corr/rollout_is_mean", g->is_mean);
    set(o, "rollout_corr/rollout_is_max", g->is_max);
    set(o, "rollout_corr/rollout_is_min", g->is_min);
    set(o, "rollout_corr/rollout_is_std", g->is_std);
    set(o, "rollout_corr/rollout_is_eff_sample_size", g->is_eff_sample_size);
    set(o, "rollout_corr/rollout_is_ratio_fraction_high", g->is_fraction_high);
    set(o, "rollout_corr/rollout_is_ratio_fraction_low", g->is_fraction_low);
    set(o, "rollout_corr/tis_mean", u->tis_mean);
    set_adapter(o, u);
}

/* "op/matmul/forward" -> "noise/rollout/op/matmul/forward/realised" and so on. */
static void set_evidence(json_t *o, enum noise_phase phase, const char *text) {
    json_t *all = text && *text ? json_loads(text, 0, NULL) : NULL, *hit, *value;
    const char *what, *field;
    char name[160];
    json_object_foreach(all, what, hit) json_object_foreach(hit, field, value) {
        snprintf(name, sizeof name, "noise/%s/%s/%s", noise_phase_name[phase], what, field);
        if (strcmp(field, "sums") != 0) json_object_set(o, name, value);
    }
    snprintf(name, sizeof name, "noise/%s/seed", noise_phase_name[phase]);
    if (json_object_get(all, "seed")) json_object_set(o, name, json_object_get(all, "seed"));
    json_decref(all);
}

static double number_at(const json_t *o, const char *name) {
    return json_number_value(json_object_get(o, name));
}

static void set_noise(json_t *o, const struct step_counts *n) {
    for (int phase = 0; phase < NOISE_PHASE_COUNT; phase++)
        set_evidence(o, (enum noise_phase)phase, n->evidence[phase]);
    set(o, "noise/sigma_intended", n->sigma);
    set(o, "noise/sigma_realised", n->sigma_realised);
    set_int(o, "noise/elements", n->noise_elements);
    set_int(o, "noise/elements_changed", n->noise_changed);
    set_int(o, "noise/elements_changed_bf16",
            llround(number_at(o, "noise/rollout/aqn/changed_bf16") * (double)n->noise_elements));
    set(o, "noise/sigma_over_weight_rms", number_at(o, "noise/rollout/aqn/strength"));
}

static void look_for_alarm(struct metrics *m, const json_t *o, int64_t step) {
    alarm_look(&m->alarm, &(struct alarm_signs){
                              .step = step,
                              .length = number_at(o, "response_length/mean"),
                              .entropy = number_at(o, "actor/entropy"),
                              .b_zeroed = number_at(o, "quant/adapter/b_zeroed"),
                              .sigma_share = number_at(o, "noise/sigma_over_weight_rms") });
}

const char *metrics_step(struct metrics *m, const struct progress *p, const struct step_counts *n,
                         const struct update_metrics *u, const struct rec_group *const *group,
                         int groups, const struct step_seconds *t, struct err *e) {
    json_t *o = json_object();
    json_object_set_new(o, "stage", json_string("learner"));
    set_int(o, "step", p->step);
    set_int(o, "version", n->version);
    set_int(o, "time", (int64_t)time(NULL));
    if (*m->device) json_object_set_new(o, "device", json_string(m->device));
    json_object_set_new(o, "updated", json_boolean(u && !u->nonfinite));
    if (u) {
        set_update(o, u);
        set_groups(o, group, groups, group[0]->new_max);
    }
    if (n->ranks > 1) set_int(o, "train/ranks", n->ranks);
    if (n->lag > 0) set_staleness(o, n, group, groups);
    set_int(o, "train/num_gen_batches", n->waves);
    set_int(o, "train/groups", n->groups);
    set_int(o, "train/groups_kept", n->kept);
    set_int(o, "train/groups_all_right", n->all_right);
    set_int(o, "train/groups_all_wrong", n->all_wrong);
    set_int(o, "train/groups_surplus", n->surplus);
    set_int(o, "train/prompts_consumed", p->cursor);
    set_int(o, "train/steps_skipped", p->skipped_starved);
    set_int(o, "train/updates_nonfinite", p->skipped_nonfinite);
    set_int(o, "train/updates_changed", p->updates_changed);
    set(o, "critic/acc/mean", n->samples ? (double)n->right / (double)n->samples : 0);
    set_noise(o, n);
    if (u) look_for_alarm(m, o, p->step);
    set(o, "timing_s/gen", t->gather);
    set(o, "timing_s/update_actor", t->update);
    set(o, "timing_s/step", t->step);
    set_int(o, "perf/total_num_tokens", n->tokens);
    set(o, "perf/throughput", t->step > 0 ? (double)n->tokens / t->step : 0);
    free(m->line);
    m->line = json_dumps(o, JSON_COMPACT | JSON_REAL_PRECISION(9));
    json_decref(o);
    struct str text;
    str_init(&text);
    str_printf(&text, "%s\n", m->line);
    ssize_t done = write(m->fd, text.s, text.len);
    bool whole = done == (ssize_t)text.len;
    str_release(&text);
    if (whole) return m->line;
    err_set(e, "cannot write '%s': %s", m->path, done < 0 ? strerror(errno) : "disk full");
    return NULL;
}
