/* intake_peer.c - what the learner takes from a rollout and a reward that lie: the real program at
 * one end, a played peer at the other. Refused groups are named with a reason, a lying treatment
 * stops the run, the journal holds each group once.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tests/stages/peer.h"

#include <math.h>
#include <sys/resource.h>
#include <unistd.h>
#include <zmq.h>

TestSuite(intake, .timeout = 250);

static const double mixed[4] = { 1, 0, 0, 1 }, wrong[4] = { 0, 0, 0, 0 }, right[4] = { 1, 1, 1, 1 };
#define has(text, part) cr_assert(strstr((text), (part)), "no '%s' in:\n%s", (part), (text))

static void replace(char **field, const char *value) {
    free(*field);
    *field = mem_dup(value);
}

static void bend_run(struct rec_group *g) { replace(&g->run, "r2"); }
static void bend_fence(struct rec_group *g) { g->fence++; }
static void bend_group(struct rec_group *g) { g->group = 9999; }
static void bend_question(struct rec_group *g) { replace(&g->question_id, "train:39999"); }
static void bend_adapter(struct rec_group *g) { replace(&g->adapter_sha256, "0123"); }
static void bend_version(struct rec_group *g) { g->version = 3; }
static void bend_samples(struct rec_group *g) {
    struct rec last = { .type = REC_GROUP,
                        .group = { .sample = mem_alloc(sizeof(struct rec_sample)), .samples = 1 } };
    last.group.sample[0] = g->sample[--g->samples];
    rec_release(&last);
}
static void bend_number(struct rec_group *g) { g->sample[1].k = 2; }
static void bend_temperature(struct rec_group *g) { g->temperature = .5; }
static void bend_new_max(struct rec_group *g) { g->new_max = 100000; }
static void bend_id(struct rec_group *g) { g->sample[2].ids.v[0] = 624; }
static void bend_prompt_id(struct rec_group *g) { g->prompt_ids.v[3] = 624; }
static void bend_prompt(struct rec_group *g) { g->prompt_ids.n = 0; }
static void bend_lp(struct rec_group *g) { g->sample[0].lp.v[1] = .25f; }
static void bend_lp_count(struct rec_group *g) { g->sample[3].lp.n--; }

static const struct { void (*bend)(struct rec_group *g); const char *why; } lies[] = {
    { bend_run, "it belongs to another run" },
    { bend_fence, "it was asked for by a learner that is no more" },
    { bend_group, "nobody asked for it" },
    { bend_question, "it answers another question" },
    { bend_adapter, "it was made with another adapter" },
    { bend_version, "it was made with another adapter" },
    { bend_samples, "its number of samples is not sample.n" },
    { bend_number, "samples are not numbered" },
    { bend_temperature, "its temperature" },
    { bend_new_max, "its temperature, top_k, top_p or new_max" },
    { bend_id, "a token id lies outside the vocabulary" },
    { bend_prompt_id, "a token id of its prompt lies outside the vocabulary" },
    { bend_prompt, "its prompt is empty" },
    { bend_lp, "a log-prob is not a finite number at most 0" },
};

Test(intake, a_group_that_lies_is_refused_with_its_reason_and_never_journalled) {
    struct peer p;
    char why[256];
    int64_t group;
    peer_open(&p, "");
    struct rec_ticket *t = peer_ticket(&p, 0);
    for (size_t i = 0; i < COUNT_OF(lies); i++) {
        struct rec r = peer_group(t, mixed);
        lies[i].bend(&r.group);
        int64_t named = r.group.group;
        peer_send(&p, &r);
        cr_assert(peer_answer(&p, &group, why, sizeof why) == REC_NACK, "lie %zu (%s) was taken", i,
                  lies[i].why);
        cr_expect(group == named);
        has(why, lies[i].why);
    }
    for (int i = 0; i < 2; i++) {                    /* and the truth still counts */
        struct rec r = peer_group(peer_ticket(&p, i), mixed);
        peer_send(&p, &r);
        cr_expect(peer_answer(&p, &group, why, sizeof why) == REC_ACK && group == i);
    }
    cr_expect(peer_end(&p) == EXIT_DONE, "%s", p.said.s);
    has(p.said.s, "group 0 from 'rollout-0' refused: it belongs to another run");
    has(p.said.s, "2 journalled");
    cr_expect(peer_journalled(&p, 0) == 1 && peer_journalled(&p, 1) == 1 &&
              peer_journalled(&p, 9999) == 0);
    peer_close(&p);
}

Test(intake, a_repeated_group_is_acknowledged_again_and_stands_in_the_journal_once) {
    struct peer p;
    char why[256];
    int64_t group;
    peer_open(&p, "");
    for (int i = 0; i < 3; i++) {
        struct rec r = peer_group(peer_ticket(&p, 0), i ? wrong : mixed);
        peer_send(&p, &r);
        cr_expect(peer_answer(&p, &group, why, sizeof why) == REC_ACK && group == 0);
    }
    struct rec r = peer_group(peer_ticket(&p, 1), mixed);
    peer_send(&p, &r);
    cr_expect(peer_end(&p) == EXIT_DONE, "%s", p.said.s);
    cr_expect(peer_journalled(&p, 0) == 1 && peer_journalled(&p, 1) == 1);
    has(p.said.s, "2 journalled, 2 repeated");
    peer_close(&p);
}

Test(intake, the_order_of_arrival_changes_no_bit) {
    char sha[2][65];
    for (int turn = 0; turn < 2; turn++) {
        struct peer p;
        peer_open(&p, "--set learner.batch=4");
        peer_ticket(&p, 3);
        for (int i = 0; i < 4; i++) {
            struct rec r = peer_group(peer_ticket(&p, turn ? 3 - i : i), mixed);
            peer_send(&p, &r);
        }
        cr_expect(peer_end(&p) == EXIT_DONE, "%s", p.said.s);
        snprintf(sha[turn], sizeof sha[turn], "%s", peer_adapter(&p, 1));
        peer_close(&p);
    }
    cr_expect_str_eq(sha[0], sha[1]);
}

Test(intake, a_group_made_under_another_treatment_stops_the_learner) {
    struct peer p;
    peer_open(&p, "");
    struct rec r = peer_group(peer_ticket(&p, 0), mixed);
    replace(&r.group.treatment.hash, "0123456789abcdef");
    peer_send(&p, &r);
    cr_expect(peer_end(&p) == EXIT_CONFIG, "%s", p.said.s);
    has(p.said.s,
        "group 0 was made under treatment 0123456789abcdef, this learner's configuration gives ");
    cr_expect(peer_journalled(&p, 0) == 0 && !peer_has(&p, "ckpt"));
    peer_close(&p);
}

Test(intake, a_group_made_with_other_operator_noise_stops_the_learner) {
    struct peer p;
    peer_open(&p, "");
    cr_expect_str_eq(peer_ticket(&p, 0)->treatment.ops, "none");
    struct rec r = peer_group(peer_ticket(&p, 0), mixed);
    replace(&r.group.treatment.ops, "ops relative_gaussian 0.05");
    peer_send(&p, &r);
    cr_expect(peer_end(&p) == EXIT_CONFIG, "%s", p.said.s);
    has(p.said.s, "group 0 was made with ops 'ops relative_gaussian 0.05', this learner's");
    cr_expect(peer_journalled(&p, 0) == 0);
    peer_close(&p);
}

static void noise_nothing(struct rec_group *g) {
    g->sigma_realised = 0;
    g->noise_changed = 0;
}
static void noise_far_off(struct rec_group *g) { g->sigma_realised *= 2; }
static void noise_other(struct rec_group *g) { g->treatment.sigma *= 2; }
static void noise_seed(struct rec_group *g) { g->treatment.noise_seed++; }

/* Step 0 is silent, step 1 has noise. */
Test(intake, noise_that_was_intended_but_not_realised_stops_the_learner) {
    static const struct { void (*bend)(struct rec_group *g); const char *says, *sigma;
    } t[] = {
        { noise_nothing, "noise of sigma 0.01 was intended, but nothing changed (realised 0 on 0 "
                         "of 1000 weights)", NULL },
        { noise_far_off, "noise of sigma 0.01 was intended, 0.02 was realised", NULL },
        { noise_far_off, "noise of sigma 1e-06 was intended, 2e-06 was realised", "1e-6" },
        { noise_other, "was made with sigma 0.02, step 1 asked for 0.01", NULL },
        { noise_seed, "the treatment was not applied as planned", NULL },
    };
    for (size_t i = 0; i < COUNT_OF(t); i++) {
        struct peer p;
        const char *sigma = t[i].sigma ? t[i].sigma : "0.01";
        char sets[256];
        snprintf(sets, sizeof sets, "--set run.steps=2 --set learner.save_every=1 --set noise.aqn.stages=2 "
                 "--set noise.aqn.sigma_start=%s --set noise.aqn.sigma_end=%s", sigma, sigma);
        peer_open(&p, sets);
        for (int g = 0; g < 2; g++) {
            struct rec r = peer_group(peer_ticket(&p, g), mixed);
            cr_expect(r.group.treatment.sigma == 0);
            peer_send(&p, &r);
        }
        struct rec r = peer_group(peer_ticket(&p, 2), mixed);
        cr_assert(r.group.treatment.sigma == strtod(sigma, NULL));
        t[i].bend(&r.group);
        peer_send(&p, &r);
        cr_expect(peer_end(&p) == EXIT_CONFIG, "%s", p.said.s);
        has(p.said.s, t[i].says);
        cr_expect(peer_journalled(&p, 1) == 1 && peer_journalled(&p, 2) == 0,
                  "what was refused is not journalled");
        cr_expect(peer_has(&p, "ckpt/step-000001/manifest.json"), "the last checkpoint stays");
        peer_close(&p);
    }
}

static void bend_lp_nan(struct rec_group *g) { g->sample[0].lp.v[0] = NAN; }

/* Our own writer refuses such a record, so its bytes are sent as they are. */
Test(intake, a_record_that_cannot_be_read_is_named_by_port_and_field) {
    static const struct { void (*bend)(struct rec_group *g); const char *says; } t[] = {
        { bend_lp_nan, "lp" }, { bend_lp_count, "samples[3] has 4 log-probs for 5 tokens" } };
    for (size_t i = 0; i < COUNT_OF(t); i++) {
        struct peer p;
        char url[128];
        struct str bytes = { 0 };
        struct err e = { 0 };
        peer_open(&p, "");
        struct rec r = peer_group(peer_ticket(&p, 0), mixed);
        t[i].bend(&r.group);
        cr_expect(rec_check(&r, &e) < 0, "the writer refuses it too");
        rec_pack(&bytes, &r);
        rec_release(&r);
        void *context = zmq_ctx_new(), *socket = zmq_socket(context, ZMQ_PUSH);
        snprintf(url, sizeof url, "ipc://%s/g", p.dir);
        cr_assert(zmq_connect(socket, url) == 0 && zmq_send(socket, bytes.s, bytes.len, 0) > 0);
        cr_expect(peer_end(&p) == EXIT_FAILED, "%s", p.said.s);
        has(p.said.s, "port 'group'");
        has(p.said.s, t[i].says);
        cr_expect(peer_journalled(&p, 0) == 0);
        zmq_close(socket);
        zmq_ctx_term(context);
        str_release(&bytes);
        peer_close(&p);
    }
}

/* A limit on the size of files stands for a full disk: the third group does not fit the journal. */
Test(intake, a_journal_that_cannot_grow_stops_the_learner_and_loses_nothing) {
    struct peer p;
    char why[256];
    int64_t group;
    const char *settings = "--set run.steps=2 --set learner.save_every=1";
    peer_open(&p, settings);
    for (int i = 0; i < 2; i++) {
        struct rec r = peer_group(peer_ticket(&p, i), mixed);
        peer_send(&p, &r);
        cr_expect(peer_answer(&p, &group, why, sizeof why) == REC_ACK);
    }
    /* step 1 is committed, its checkpoint is whole */
    peer_ticket(&p, 2);
    const struct rlimit small = { 5000, 5000 };
    cr_assert(prlimit(p.pid, RLIMIT_FSIZE, &small, NULL) == 0);
    for (int i = 2; i < 4; i++) {
        struct rec r = peer_group(peer_ticket(&p, i), mixed);
        for (int k = 0; k < 4; k++) replace(&r.group.sample[k].text, p.kept[0].ticket.prompt);
        peer_send(&p, &r);
    }
    cr_expect(peer_end(&p) == EXIT_FAILED, "%s", p.said.s);
    has(p.said.s, "tape/groups.tape': File too large");
    cr_expect(peer_has(&p, "ckpt/step-000001/manifest.json"));
    peer_again(&p, settings);                        /* the disk has room again */
    for (int i = 2; i < 4; i++) {
        struct rec r = peer_group(peer_ticket(&p, i), mixed);
        peer_send(&p, &r);
    }
    cr_expect(peer_end(&p) == EXIT_DONE, "%s", p.said.s);
    has(p.said.s, "going on after step 1");
    for (int i = 0; i < 4; i++) cr_expect(peer_journalled(&p, i) == 1, "group %d", i);
    peer_close(&p);
}

/* ---- waves and the filter ---- */

/* Sends groups 0, 1, ... with these scores; the run of one step ends. */
static void play(struct peer *p, const char *settings, const double *const *score, int groups) {
    peer_open(p, settings);
    for (int g = 0; g < groups; g++) {
        struct rec r = peer_group(peer_ticket(p, g), score[g]);
        peer_send(p, &r);
    }
    cr_expect(peer_end(p) == EXIT_DONE, "%s", p->said.s);
}

Test(waves, a_second_wave_fills_the_batch_and_what_is_too_much_is_counted) {
    struct peer p;
    play(&p, "", (const double *const[]){ mixed, right, mixed, mixed }, 4);
    const char *m = peer_read(&p, "metrics.jsonl");
    has(m, "\"train/num_gen_batches\":2,");
    has(m, "\"train/groups\":4,");
    has(m, "\"train/groups_kept\":2,");
    has(m, "\"train/groups_all_right\":1,");
    has(m, "\"train/groups_surplus\":1,");
    has(m, "\"train/prompts_consumed\":4,");
    has(m, "\"updated\":true,");
    peer_close(&p);
}

Test(waves, a_wave_larger_than_the_batch_drops_the_surplus) {
    struct peer p;
    play(&p, "--set learner.wave=4", (const double *const[]){ mixed, mixed, mixed, mixed }, 4);
    const char *m = peer_read(&p, "metrics.jsonl");
    has(m, "\"train/num_gen_batches\":1,");
    has(m, "\"train/groups_kept\":2,");
    has(m, "\"train/groups_surplus\":2,");
    peer_close(&p);
}

Test(waves, a_step_without_a_group_that_teaches_is_skipped_and_recorded) {
    struct peer p;
    play(&p, "--set filter.waves_max=2", (const double *const[]){ wrong, wrong, wrong, wrong }, 4);
    const char *m = peer_read(&p, "metrics.jsonl");
    has(m, "\"updated\":false,");
    has(m, "\"step\":1,");
    has(m, "\"version\":0,");
    has(m, "\"train/num_gen_batches\":2,");
    has(m, "\"train/groups_all_wrong\":4,");
    has(m, "\"train/steps_skipped\":1,");
    has(p.said.s, "step 1 skipped: no group of 4 could teach (0 all right, 4 all wrong)");
    cr_expect(peer_has(&p, "adapters/v000000") && !peer_has(&p, "adapters/v000001"),
              "the adapter stays as it was");
    has(peer_read(&p, "adapters/at-000001.json"), "\"version\":0,");
    peer_close(&p);
}

/* Rewards that differ only in the format part, or only in the length penalty. */
static void send_shaped(struct peer *p, int n, double format, double overlong) {
    struct rec r = peer_group(peer_ticket(p, n), right);
    r.group.sample[1].format = format;
    r.group.sample[1].overlong = overlong;
    r.group.sample[1].score += format + overlong;
    peer_send(p, &r);
}

Test(waves, the_filter_looks_at_what_its_metric_names) {
    static const struct { const char *metric; double format, overlong; bool keeps;
    } t[] = {
        { "acc", .5, 0, false },   { "acc", 0, -.5, false }, { "score", .5, 0, true },
        { "score", 0, -.5, true }, { "score", 0, 0, false }, { "off", 0, 0, true },
    };
    for (size_t i = 0; i < COUNT_OF(t); i++) {
        struct peer p;
        char settings[128];
        snprintf(settings, sizeof settings,
                 "--set learner.batch=1 --set filter.waves_max=1 --set filter.metric=%s",
                 t[i].metric);
        peer_open(&p, settings);
        send_shaped(&p, 0, t[i].format, t[i].overlong);
        cr_expect(peer_end(&p) == EXIT_DONE, "%s", p.said.s);
        cr_expect(strstr(peer_read(&p, "metrics.jsonl"), "\"train/groups_kept\":1,") ? t[i].keeps
                                                                                     : !t[i].keeps,
                  "%s, row %zu", t[i].metric, i);
        peer_close(&p);
    }
}
