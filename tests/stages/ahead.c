/* ahead.c - learner.lag_max: which groups a step begins with and who samples them, as a plan and as
 * the real learner's tickets.
 * SPDX-License-Identifier: Apache-2.0 */
#include "stages/learner/ahead.h"

#include "tests/stages/peer.h"

TestSuite(ahead, .timeout = 250);

enum { STEPS = 7, WAVE = 4 };
/* waves that the steps need: known only once a step is collected */
static const int waves[STEPS] = { 1, 3, 1, 2, 1, 1, 2 };

/* One run; every third update is skipped, so that versions and steps part. */
static void play(int lag) {
    struct learner_conf c = { .lag_max = lag,
                              .shared = { .run = { .dir = "d", .steps = STEPS, .seed = 1 } } };
    struct progress p = { 0 };
    int64_t taken[STEPS * 4 * WAVE] = { 0 }, version_after[STEPS + 1] = { 0 };
    char sha[SHA256_HEX];
    for (int s = 0; s < STEPS; s++) {
        snprintf(sha, sizeof sha, "sha%lld", (long long)p.version);
        ahead_open(&p, &c, WAVE, sha);
        const struct progress again = p;
        ahead_open(&p, &c, WAVE, "other");
        cr_expect(memcmp(&again, &p, sizeof p) == 0, "opened twice");
        cr_expect(p.leases == (STEPS - s < lag + 1 ? STEPS - s : lag + 1), "lag %d step %d: %d",
                  lag, s, p.leases);
        const int made = s < lag ? 0 : s - lag;
        const struct intake_policy q = ahead_policy(&p, &c, 0);
        cr_expect(q.for_step == s && q.step == made && q.version == version_after[made],
                  "lag %d step %d: version %lld of step %lld", lag, s, (long long)q.version,
                  (long long)q.step);
        snprintf(sha, sizeof sha, "sha%lld", (long long)version_after[made]);
        cr_expect_str_eq(q.adapter_sha256, sha);
        cr_expect(strstr(q.adapter, "d/adapters/v00000"), "%s", q.adapter);
        for (int w = 0; w < waves[s]; w++) {
            const int64_t first = w ? p.cursor : p.lease[0].first;
            if (w) p.cursor += WAVE;
            cr_assert(first + WAVE <= (int64_t)COUNT_OF(taken));
            for (int i = 0; i < WAVE; i++) cr_expect(taken[first + i]++ == 0, "group asked twice");
        }
        ahead_close(&p);
        p.step++;
        p.version += s % 3 != 2;
        version_after[p.step] = p.version;
        cr_expect(ahead_whole(&p, &c), "lag %d after step %d", lag, s);
        for (int64_t g = ahead_floor(&p); g < p.cursor && lag == 0; g++) cr_expect(false);
        for (int i = 0; i < p.leases; i++) cr_expect(p.lease[i].first >= ahead_floor(&p));
    }
    int64_t asked = 0;
    for (size_t g = 0; g < COUNT_OF(taken); g++) asked += taken[g];
    cr_expect(p.leases == 0 && p.cursor == asked, "groups asked for and not used");
}

Test(ahead, a_step_is_sampled_by_the_adapter_of_lag_steps_before_whatever_waves_were_needed) {
    for (int lag = 0; lag <= LAG_MAX; lag++) play(lag);
}

Test(ahead, a_checkpoint_that_lacks_a_lease_is_told_from_a_whole_one) {
    struct learner_conf c = { .lag_max = 2, .shared = { .run = { .dir = "d", .steps = 5 } } };
    struct progress p = { .step = 2, .leases = 2 };
    cr_expect(ahead_whole(&p, &c));
    p.leases = 1;
    cr_expect(!ahead_whole(&p, &c));
    p.step = 4;
    cr_expect(ahead_whole(&p, &c), "the run has one step more");
}

static const double mixed[4] = { 1, 0, 0, 1 }, wrong[4] = { 0, 0, 0, 0 };

static void expect_ticket(struct peer *p, int group, int64_t version, int64_t step) {
    const struct rec_ticket *t = peer_ticket(p, group);
    char folder[40];
    snprintf(folder, sizeof folder, "/adapters/v%06lld", (long long)version);
    cr_expect(t->version == version && t->step == step && strstr(t->adapter, folder),
              "group %d: version %lld of step %lld in %s", group, (long long)t->version,
              (long long)t->step, t->adapter);
}

static void hand_in(struct peer *p, int group, const double *score) {
    char why[256];
    int64_t named;
    struct rec r = peer_group(peer_ticket(p, group), score);
    peer_send(p, &r);
    cr_expect(peer_answer(p, &named, why, sizeof why) == REC_ACK && named == group, "%s", why);
}

/* Steps 0, 1, 2 begin with groups 0, 2, 4; step 1 needs a second wave: 6, 7. */
Test(ahead, the_next_steps_groups_are_asked_for_before_this_ones_are_there) {
    struct peer p;
    char why[256];
    int64_t named;
    peer_open(&p, "--set learner.lag_max=1 --set run.steps=3");
    for (int g = 0; g < 4; g++) expect_ticket(&p, g, 0, 0);
    cr_expect(p.tickets == 4, "%d tickets before the first update", p.tickets);
    hand_in(&p, 0, mixed);
    hand_in(&p, 1, mixed);
    expect_ticket(&p, 4, 1, 1);
    struct rec lie = peer_group(peer_ticket(&p, 2), mixed);
    lie.group.version = 1;
    free(lie.group.adapter_sha256);
    lie.group.adapter_sha256 = mem_dup(peer_ticket(&p, 4)->adapter_sha256);
    peer_send(&p, &lie);
    cr_expect(peer_answer(&p, &named, why, sizeof why) == REC_NACK, "the newer adapter was taken");
    hand_in(&p, 5, mixed);                           /* before the groups of step 1 */
    hand_in(&p, 2, mixed);
    hand_in(&p, 3, wrong);
    expect_ticket(&p, 6, 0, 0);
    hand_in(&p, 7, mixed);
    hand_in(&p, 6, mixed);
    hand_in(&p, 4, mixed);
    cr_expect(peer_end(&p) == EXIT_DONE, "%s", p.said.s);
    cr_expect(p.tickets == 8, "%d tickets: none beyond the last step", p.tickets);
    cr_expect(strstr(p.said.s, "8 journalled") && strstr(p.said.s, "version 3"), "%s", p.said.s);
    peer_close(&p);
}
