/* main.c - qerl-learner: decides which questions a step asks, journals what comes back, updates the
 * adapter, commits.
 * SPDX-License-Identifier: Apache-2.0 */
#include "stages/learner/check.h"
#include "lib/base/ranks.h"
#include "lib/stage/rank.h"
#include "stages/learner/run.h"
#include "stages/learner/team.h"

#define AT(field) offsetof(struct learner_conf, field)
static const struct stage_key keys[] = {
    { "learner.batch", KEY_INT, AT(batch), "2", 1, 4096, NULL,
      "questions (groups) trained on in a step" },
    { "learner.wave", KEY_INT, AT(wave), "0", 0, 4096, NULL,
      "questions asked for at once; 0 = learner.batch" },
    { "learner.minibatch", KEY_INT, AT(minibatch), "0", 0, 4096, NULL,
      "questions per optimiser update; 0 = all (one update a step)" },
    { "learner.micro_tokens", KEY_INT, AT(micro_tokens), "1280", 32, 1 << 20, NULL,
      "tokens of a micro-batch: bounds memory, changes no bit" },
    { "learner.save_every", KEY_INT, AT(save_every), "50", 1, 1e9, NULL,
      "steps between checkpoints" },
    { "learner.lr", KEY_NUM, AT(lr), "1e-5", 0, 1, NULL, "peak learning rate" },
    { "learner.warmup", KEY_INT, AT(warmup), "10", 0, 1e9, NULL, "steps of linear warm-up from 0" },
    { "learner.lr_schedule", KEY_CHOICE, AT(schedule), "constant", 0, 0, "constant|cosine|wsd",
      "after the warm-up" },
    { "learner.lr_floor", KEY_NUM, AT(lr_floor), "0", 0, 1, NULL,
      "cosine, wsd: lowest rate as a share of the peak" },
    { "learner.lr_stable", KEY_NUM, AT(lr_stable), "0.9", 0, 1, NULL,
      "wsd: share of the steps at the peak" },
    { "learner.beta1", KEY_NUM, AT(beta1), "0.9", 0, .999999, NULL, "AdamW" },
    { "learner.beta2", KEY_NUM, AT(beta2), "0.999", 0, .9999999, NULL, "AdamW" },
    { "learner.adam_eps", KEY_NUM, AT(adam_eps), "1e-8", 1e-15, 1, NULL, "AdamW" },
    { "learner.weight_decay", KEY_NUM, AT(weight_decay), "0.01", 0, 10, NULL, "AdamW, decoupled" },
    { "learner.grad_clip", KEY_NUM, AT(grad_clip), "1", 1e-9, 1e9, NULL,
      "bound on the gradient's global norm" },
    { "learner.clip_low", KEY_NUM, AT(clip_low), "0.2", 0, 1, NULL,
      "ratio is clipped below at 1 - this" },
    { "learner.clip_high", KEY_NUM, AT(clip_high), "0.28", 0, 100, NULL,
      "ratio is clipped above at 1 + this (clip-higher)" },
    { "learner.clip_dual", KEY_NUM, AT(clip_dual), "10", 0, 1e6, NULL,
      "dual clip for negative advantages; 0 = off" },
    { "learner.adv_eps", KEY_NUM, AT(adv_eps), "1e-6", 0, 1, NULL,
      "added to a group's standard deviation" },
    { "learner.adv_ddof", KEY_INT, AT(adv_ddof), "1", 0, 1, NULL,
      "1 = sample, 0 = population standard deviation" },
    { "learner.tis_cap", KEY_NUM, AT(tis_cap), "0", 0, 1e6, NULL,
      "truncated importance sampling: cap on the weight learner / rollout of a token; 0 = no "
      "correction" },
    { "learner.old_logprob", KEY_CHOICE, AT(old_logprob), "clean", 0, 0, "clean|noisy",
      "policy of the old log-probs: without AQN, or under the AQN that sampled" },
    { "learner.loss", KEY_CHOICE, AT(loss), "token_mean", 0, 0, "token_mean|seq_mean",
      "mean over all tokens (DAPO), or over a sequence's tokens, then over sequences (GRPO)" },
    { "learner.advantage", KEY_CHOICE, AT(advantage), "group_std", 0, 0, "group_std|group_mean",
      "reward minus the group's mean, divided by its standard deviation or not" },
    { "learner.kl_coef", KEY_NUM, AT(kl_coef), "0", 0, 1000, NULL,
      "weight of the KL term (k3) against the base model without adapter; 0 = none" },
    { "filter.metric", KEY_CHOICE, AT(filter), "acc", 0, 0, "acc|score|off",
      "dynamic sampling drops groups without spread in: acc = right or wrong; "
      "score = all that is trained on (with format and length)" },
    { "filter.waves_max", KEY_INT, AT(waves_max), "5", 1, 1000, NULL,
      "waves of questions a step may ask for" },
    { "learner.ranks", KEY_INT, AT(ranks), "0", 0, RANKS_MAX, NULL,
      "processes that make each update together, each its share of sequences, cores or GPUs; 0 = "
      "one for each GPU of the stage, on cores 1" },
    { "learner.lag_max", KEY_INT, AT(lag_max), "0", 0, LAG_MAX, NULL,
      "steps whose groups are asked for ahead: a step's answers come from the adapter of so many "
      "steps before, and rollouts work while the learner does; 0 = in turn" },
    { 0 },
};
static const struct stage_key *const tables[] = { SHARED_POLICY_KEYS, keys, NULL };
static const struct stage_port ports[] = {
    { "ticket", true, REC_TICKET, LINK_KIND_ROUTER, true, false,
      "groups asked for; left open when groups come from a file" },
    { "group", false, REC_GROUP, LINK_KIND_PULL, true, true,
      "scored groups: live, or a recorded tape" },
    { "adapter", true, REC_ADAPTER, LINK_KIND_PUB, true, false,
      "doorbell: a new adapter lies on disk" },
    { "score", false, REC_SCORE, LINK_KIND_PULL, true, false,
      "if linked, the learner waits for the score of a scored step: stages that share cores take "
      "turns" },
    { 0 },
};

static int check(void *conf, struct err *e) {
    struct learner_conf *c = conf;
    if (c->ranks == 0) c->ranks = rank_default(&c->shared);
    const int rc = learner_check(conf, tables, e);
    return rank_check(&c->shared, "learner.ranks", c->ranks, e) < 0 ? -1 : rc;
}

static int plan(const void *conf, json_t *out, struct err *e) { return run_plan(conf, out, e); }

static const struct stage_about about = {
    .name = "learner",
    .summary = "trains the LoRA adapter with DAPO; the only stage that commits anything",
    .examples =
        "  qerl-learner -c runs/quickstart-0001/conf/learner.conf \\\n"
        "      --in group=tape:runs/quickstart-0001/tape/groups.tape \\\n"
        "      --set run.dir=/tmp/again          replays a recorded run: same adapter, same hash\n",
    .keys = tables,
    .ports = ports,
    .conf_bytes = sizeof(struct learner_conf),
    .check = check,
    .plan = plan,
};

int main(int argc, char **argv) {
    struct stage s;
    stage_open(&s, argc, argv, &about);
    if (s.rank) team_work(&s);
    struct run *r = run_create(&s);
    if (!r) stage_die(&s, EXIT_ENV);
    stage_ready(&s);
    int rc;
    while ((rc = run_step(r)) == 1) {}
    if (rc < 0 || run_finish(r) < 0) stage_die(&s, EXIT_FAILED);
    bool all = rc == 0;
    run_destroy(&r);
    return stage_close(&s, all ? EXIT_DONE : EXIT_FAILED);
}
