/* main.c - qerl-rollout: makes the groups that tickets ask for.
 *
 * Stateless: a sample is a pure function of its ticket, so a lost or repeated ticket costs only
 * time. A finished group is kept and sent again until the learner acknowledges it (or says it is
 * not wanted).
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/log.h"
#include "lib/stage/aqn.h"
#include "lib/stage/effect.h"
#include "stages/rollout/work.h"

#define AT(field) offsetof(struct rollout_conf, field)
static const struct stage_key keys[] = {
    { "rollout.rows", KEY_INT, AT(rows), "16", 1, 4096, NULL, "answers decoded together" },
    { "rollout.credit", KEY_INT, AT(credit), "4", 1, 1024, NULL, "tickets taken ahead" },
    { "rollout.resend_seconds", KEY_NUM, AT(resend_seconds), "3", .1, 3600, NULL,
      "a group not acknowledged is sent again after this" },
    { "rollout.stop", KEY_TEXT, AT(stop), "", 0, 0, NULL,
      "stop string besides the model's own end tokens; empty = none" },
    { "rollout.adapter", KEY_TEXT, AT(adapter), "", 0, 0, NULL,
      "adapter for tickets that name none (hand-written ones); empty = base" },
    { "rollout.sigma", KEY_NUM, AT(sigma), "0", 0, 10, NULL,
      "noise for tickets that carry no treatment (hand-written ones)" },
    { 0 },
};
static const struct stage_key *const tables[] = { SHARED_POLICY_KEYS, shared_graphs_keys, keys,
                                                 NULL };
static const struct stage_port ports[] = {
    { "ticket", false, REC_TICKET, LINK_KIND_DEALER, false, true,
      "groups to make; acknowledgements come back on it" },
    { "traj", true, REC_TRAJ, LINK_KIND_PUSH, false, true, "finished groups" },
    { 0 },
};

static int check(void *conf, struct err *e) {
    const int rc = effect_check_shared(conf, e);
    return aqn_check(conf, e) < 0 ? -1 : rc;
}

static int plan(const void *conf, json_t *out, struct err *e) {
    const struct rollout_conf *c = conf;
    struct model_conf m;
    struct lora_shape shape;
    const int known = policy_plan(out, &c->shared, false, &shape, &m, e);
    if (known <= 0) return known;
    struct noise_plan noise_of;
    if (aqn_try_source(&c->shared, &m, e) < 0 ||
        treatment_plan(&noise_of, &c->shared, &m, false, e) < 0 ||
        noise_try_zone(c->shared.model.path, &m, &noise_of, e) < 0)
        return -1;
    struct gen_opts o = work_gen_opts(c, &shape);
    const enum model_quant q = (enum model_quant)c->shared.quant.weights;
    const size_t noise = aqn_bytes(&c->shared, &m) +
                         treatment_bytes(&c->shared, &m, false, NOISE_PHASE_ROLLOUT,
                                         NOISE_PHASE_ROLLOUT);
    return policy_plan_memory(out, &c->shared, &m, gen_plan(&m, q, &o) + noise,
                              gen_plan_pages(&m, q, &o), e);
}

static const struct stage_about about = {
    .name = "rollout",
    .summary = "generates answers with the quantised base, the adapter and the noise that each "
               "ticket names",
    .examples =
        "  qerl-rollout --set model.path=models/tiny --in ticket=file:q.jsonl --out traj=-\n"
        "  (q.jsonl holds lines like {\"question\": \"What is 2 + 2?\", \"answer\": \"4\"})\n",
    .keys = tables,
    .ports = ports,
    .conf_bytes = sizeof(struct rollout_conf),
    .check = check,
    .plan = plan,
};

int main(int argc, char **argv) {
    struct stage s;
    stage_open(&s, argc, argv, &about);
    struct work *w = work_create(&s);
    if (!w) stage_die(&s, EXIT_ENV);
    stage_ready(&s);
    int rc;
    while ((rc = work_turn(w)) > 0) {}
    if (rc < 0) stage_die(&s, EXIT_FAILED);
    work_destroy(&w);
    return stage_close(&s, EXIT_DONE);
}
