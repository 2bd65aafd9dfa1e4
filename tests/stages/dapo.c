/* dapo.c - the numbers of an update against the algorithm specification's tables (double precision,
 * 1e-6). Left out by name: other systems' micro-batch denominators, Dr.GRPO, bypass and rejection
 * masks (not built here).
 * SPDX-License-Identifier: Apache-2.0 */
#include "stages/learner/dapo.h"

#include <criterion/criterion.h>
#include <math.h>

#include "lib/task/task.h"

#define NEAR(got, want, tol) cr_expect(fabs((got) - (want)) <= (tol), "got %.12g, want %.12g", (double)(got), (double)(want))

Test(dapo, advantages_are_the_tables) {
    static const struct {
        int n;
        double reward[8], a6[8], a4[8], a0[8];       /* eps 1e-6; eps 1e-4; ddof 0, eps 1e-6 */
    } t[] = {
        { 4,
          { 1, 0, 0, 0 },
          { 1.499997, -.499999, -.499999, -.499999 },
          { 1.499700, -.499900, -.499900, -.499900 },
          { 1.732047, -.577349, -.577349, -.577349 } },
        { 4,
          { 1, 1, 0, 0 },
          { .866024, .866024, -.866024, -.866024 },
          { .865875, .865875, -.865875, -.865875 },
          { .999998, .999998, -.999998, -.999998 } },
        { 8,
          { 1 },
          { 2.474867, -.353552, -.353552, -.353552, -.353552, -.353552, -.353552, -.353552 },
          { 2.474174, -.353453, -.353453, -.353453, -.353453, -.353453, -.353453, -.353453 },
          { 2.645743, -.377963, -.377963, -.377963, -.377963, -.377963, -.377963, -.377963 } },
        { 8,
          { 1, 1, 1, 1, 1, 1, 1, 0 },
          { .353552, .353552, .353552, .353552, .353552, .353552, .353552, -2.474867 },
          { .353453, .353453, .353453, .353453, .353453, .353453, .353453, -2.474174 },
          { .377963, .377963, .377963, .377963, .377963, .377963, .377963, -2.645743 } },
        { 4,
          { 2.2, .2, .2, 0 },
          { 1.493794, -.433682, -.433682, -.626430 },
          { 1.493651, -.433641, -.433641, -.626370 },
          { 1.724884, -.500773, -.500773, -.723339 } },
        { 4,
          { 1, -1, -1, -1 },
          { 1.4999985, -.4999995, -.4999995, -.4999995 },
          { 1.499850, -.499950, -.499950, -.499950 },
          { 1.732049, -.577350, -.577350, -.577350 } },
        { 2, { 1, 0 }, { .707106, -.707106 }, { .707007, -.707007 }, { .999998, -.999998 } },
        { 2, { 2.2, 0 }, { .707106, -.707106 }, { .707061, -.707061 }, { .999999, -.999999 } },
        { 4,
          { 1, .5, .25, .25 },
          { 1.414210, 0, -.707105, -.707105 },
          { 1.413814, 0, -.706907, -.706907 },
          { 1.632988, 0, -.816494, -.816494 } },
        { 3, { .1, .1, .1 }, { 0 }, { 0 }, { 0 } },
    };
    for (size_t i = 0; i < COUNT_OF(t); i++) {
        double a[8];
        dapo_advantage(t[i].reward, t[i].n, 1, 1e-6, a);
        for (int k = 0; k < t[i].n; k++) NEAR(a[k], t[i].a6[k], 1e-6);
        dapo_advantage(t[i].reward, t[i].n, 1, 1e-4, a);
        for (int k = 0; k < t[i].n; k++) NEAR(a[k], t[i].a4[k], 1e-6);
        dapo_advantage(t[i].reward, t[i].n, 0, 1e-6, a);
        for (int k = 0; k < t[i].n; k++) NEAR(a[k], t[i].a0[k], 1e-6);
    }
    double one = .7, a;
    dapo_advantage(&one, 1, 1, 1e-6, &a);
    NEAR(a, .7 / (1 + 1e-6), 1e-12);
}

Test(dapo, advantages_without_the_spread_are_the_tables) {
    static const double reward[] = { 1, 0, 0, 0 }, want[] = { .75, -.25, -.25, -.25 };
    double a[4], same[3] = { .1, .1, .1 }, one = .7;
    dapo_advantage_mean(reward, 4, a);
    for (int k = 0; k < 4; k++) NEAR(a[k], want[k], 1e-12);
    dapo_advantage_mean(same, 3, a);
    for (int k = 0; k < 3; k++) NEAR(a[k], 0, 0);
    dapo_advantage_mean(&one, 1, a);
    NEAR(a[0], .7, 0);
}

Test(dapo, the_kl_estimate_is_the_tables_and_its_slope_its_derivative) {
    static const struct { double d, k3; } t[] = {
        { .1, .005170918 }, { -.1, .004837418 }, { 1, .718281828 }, { -1, .367879441 }, { 0, 0 } };
    const double h = 1e-5;
    for (size_t i = 0; i < COUNT_OF(t); i++) {
        struct dapo_token x = dapo_kl(t[i].d - 2, -2);
        NEAR(x.loss, t[i].k3, 1e-9);
        double up = dapo_kl(t[i].d - 2, -2 + h).loss, down = dapo_kl(t[i].d - 2, -2 - h).loss;
        NEAR(x.slope, (up - down) / (2 * h), 1e-8);
    }
    NEAR(dapo_kl(-3, -3).slope, 0, 0);
    NEAR(dapo_kl(0, -5).loss, 10, 0);                  /* exp(5) - 6 is more than the bound */
    NEAR(dapo_kl(0, -5).slope, 0, 0);
    NEAR(dapo_kl(-30, 0).loss, 10, 0);
    NEAR(dapo_kl(-30, 0).slope, 0, 0);
}

Test(dapo, shaped_rewards_give_the_tables_advantages) {
    static const struct { double score[4]; int64_t length[4]; double reward[4], a[4];
    } t[] = {
        { { 1, 1, 0, 0 },
          { 100, 1800, 2048, 300 },
          { 1, .484375, -1, 0 },
          { 1.031993, .426557, -1.316364, -.142186 } },
        { { 1, 1, 1, 1 },
          { 100, 1600, 1700, 200 },
          { 1, .875, .6796875, 1 },
          { .735944, -.090379, -1.381508, .735944 } },
    };
    for (size_t i = 0; i < COUNT_OF(t); i++) {
        double r[4], a[4];
        for (int k = 0; k < 4; k++) {
            r[k] = t[i].score[k] + task_overlong(t[i].length[k], 2048, 512, 1);
            NEAR(r[k], t[i].reward[k], 1e-12);
        }
        dapo_advantage(r, 4, 1, 1e-6, a);
        for (int k = 0; k < 4; k++) NEAR(a[k], t[i].a[k], 1e-6);
    }
    cr_expect_not(dapo_teaches(t[1].score, 4), "filtering on accuracy drops the all-right group");
    cr_expect(dapo_teaches(t[1].reward, 4), "filtering on the shaped reward keeps it");
}

Test(dapo, filter_compares_values) {
    static const struct { int n; double m[6]; bool keep;
    } t[] = {
        { 4, { 1, 1, 1, 1 }, false },
        { 4, { 1, 0, 0, 0 }, true },
        { 4, { 0 }, false },
        { 1, { 1 }, true },
        { 3, { .1, .1, .1 }, false },
        { 6, { 2.2, 2.2, 2.2, 2.2, 2.2, 2.2 }, false },
        { 4, { .5, .5, .5, .5000001 }, true },
    };
    for (size_t i = 0; i < COUNT_OF(t); i++)
        cr_expect_eq(dapo_teaches(t[i].m, t[i].n), t[i].keep, "row %zu", i);
}

Test(dapo, loss_takes_the_tables_branches) {
    static const struct { double a, r, loss3, slope3, loss10, slope10; int clipped, lower;
    } t[] = {
        { 1, .5, -.5, -.5, -.5, -.5, 0, 0 },   { 1, .8, -.8, -.8, -.8, -.8, 0, 0 },
        { 1, 1, -1, -1, -1, -1, 0, 0 },        { 1, 1.27, -1.27, -1.27, -1.27, -1.27, 0, 0 },
        { 1, 1.30, -1.28, 0, -1.28, 0, 1, 0 }, { 1, 12, -1.28, 0, -1.28, 0, 1, 0 },
        { -1, .5, .8, 0, .8, 0, 1, 0 },        { -1, .79, .8, 0, .8, 0, 1, 0 },
        { -1, 1.1, 1.1, 1.1, 1.1, 1.1, 0, 0 }, { -1, 1.30, 1.3, 1.3, 1.3, 1.3, 0, 0 },
        { -1, 2.9, 2.9, 2.9, 2.9, 2.9, 0, 0 }, { -1, 3.5, 3, 0, 3.5, 3.5, 0, 1 },
        { -1, 9, 3, 0, 9, 9, 0, 1 },           { -1, 12, 3, 0, 10, 0, 0, 1 },
    };
    struct dapo_clip c3 = { .2, .28, 3 }, c10 = { .2, .28, 10 };
    for (size_t i = 0; i < COUNT_OF(t); i++) {
        struct dapo_token x = dapo_loss(&c3, t[i].a, 1, log(t[i].r), 0),
                          y = dapo_loss(&c10, t[i].a, 1, log(t[i].r), 0);
        NEAR(x.loss, t[i].loss3, 1e-9);
        NEAR(x.slope, t[i].slope3, 1e-9);
        NEAR(y.loss, t[i].loss10, 1e-9);
        NEAR(y.slope, t[i].slope10, 1e-9);
        cr_expect_eq(x.clipped, t[i].clipped, "row %zu", i);
        cr_expect_eq(x.clipped_lower, t[i].lower, "row %zu", i);
    }
    /* bounds exact in binary: at equality the slope is the unclipped one */
    struct dapo_clip exact = { .25, .25, 3 };
    struct dapo_token edge = dapo_loss(&exact, 1, 1, log(1.25), 0);
    NEAR(edge.loss, -1.25, 1e-12);
    NEAR(dapo_loss(&c10, -1, 1, 25, 0).slope, 0, 0);   /* beyond the safety clamp nothing pulls */
    NEAR(dapo_loss(&(struct dapo_clip){ 1, 1e30, 0 }, 1, 1, 25, 0).loss, -485165195.41, 1);
    NEAR(dapo_loss(&c10, 1, 1, -25, 0).loss, -2.0611536e-9, 1e-15);
}

static float lg(double p) { return (float)log(p); }

Test(dapo, gap_metrics_are_the_tables) {
    const float mu[] = { lg(.5), lg(.25), lg(.8), lg(.1), lg(.9) },
                old[] = { lg(.45), lg(.3), lg(.8), lg(.3), lg(.85) };
    const int32_t start[] = { 0, 3, 5 };
    struct dapo_gap g;
    dapo_gap(&g, old, mu, start, 2, 2);
    const double tol = 2e-6;                           /* log-probs are float32 */
    NEAR(g.kl, -.223683, tol);
    NEAR(g.k2, .125456, tol);
    NEAR(g.k3_kl, .185206, tol);
    NEAR(g.chi2_token, 1.628395, 1e-5);
    NEAR(g.chi2_seq, 3.597089, 1e-5);
    NEAR(g.probs_diff_max, .2, tol);
    NEAR(g.probs_diff_mean, .07, tol);
    NEAR(g.probs_diff_std, .0758288, tol);
    NEAR(g.logp_diff_mean, .288691, tol);
    NEAR(g.logp_diff_max, 1.098612, tol);
    NEAR(g.training_ppl, 2.040082, tol);
    NEAR(g.rollout_ppl, 2.743884, tol);
    NEAR(g.log_ppl_diff, -.273190, tol);
    NEAR(g.log_ppl_abs_diff, .273190, tol);
    NEAR(g.ppl_ratio, .784381, tol);
    NEAR(g.is_mean, 1.408889, tol);
    NEAR(g.is_std, .408635, tol);
    NEAR(g.is_eff_sample_size, .897456, tol);
    NEAR(g.is_fraction_high, .2, 1e-12);
    NEAR(g.is_fraction_low, 0, 0);
    cr_expect_eq(g.tokens_differ, 4);
    static const double w[] = { .9, 1.2, 1, 2, .944444 };
    double mean = 0;
    for (int i = 0; i < 5; i++) {
        NEAR(dapo_tis((double)old[i], (double)mu[i], 2), w[i], tol);
        mean += dapo_tis((double)old[i], (double)mu[i], 2) / 5;
    }
    NEAR(mean, 1.208889, tol);
    dapo_gap(&g, mu, mu, start, 2, 2);
    cr_expect(g.tokens_differ == 0 && g.kl == 0 && g.k3_kl == 0 && g.logp_diff_max == 0,
              "the same bits give exactly 0");
    NEAR(g.is_eff_sample_size, 1, 1e-12);
}

Test(dapo, decoupled_loss_with_and_without_weights) {
    static const double a[] = { .866025, .866025, .866025, -.866025, -.866025 },
                        ratio[] = { 1, 1.35, .7, 1, 1.4 };
    static const double mu[] = { .5, .25, .8, .1, .9 }, old[] = { .45, .3, .8, .3, .85 };
    static const double plain[] = { -.866025, -1.108512, -.606217, .866025, 1.212435 };
    static const double weighted[] = { -.779423, -1.330214, -.606217, 1.732050, 1.145077 };
    struct dapo_clip c = { .2, .28, 10 };
    double sum = 0, sum_w = 0;
    for (int i = 0; i < 5; i++) {
        double w = dapo_tis(log(old[i]), log(mu[i]), 2);
        struct dapo_token x = dapo_loss(&c, a[i], 1, log(old[i] * ratio[i]), log(old[i]));
        struct dapo_token y = dapo_loss(&c, a[i], w, log(old[i] * ratio[i]), log(old[i]));
        NEAR(x.loss, plain[i], 1e-6);
        NEAR(y.loss, weighted[i], 1e-6);
        NEAR(y.slope, w * x.slope, 1e-9);
        sum += x.loss / 5;
        sum_w += y.loss / 5;
    }
    NEAR(sum, -.100459, 1e-6);
    NEAR(sum_w, .032255, 1e-6);
}

Test(dapo, learning_rate_is_the_tables) {
    struct dapo_rate constant = { DAPO_SCHEDULE_CONSTANT, 1e-6, 0, 10, 3736, 0 };
    NEAR(dapo_rate_at(&constant, 0), 0, 0);
    NEAR(dapo_rate_at(&constant, 1), 1e-7, 1e-18);
    NEAR(dapo_rate_at(&constant, 9), 9e-7, 1e-18);
    NEAR(dapo_rate_at(&constant, 10), 1e-6, 0);
    NEAR(dapo_rate_at(&constant, 3736), 1e-6, 0);
    struct dapo_rate cosine = { DAPO_SCHEDULE_COSINE, 1e-5, 0, 374, 3736, 0 };
    static const struct {
        int64_t s;
        double want;
    } c[] = { { 1, 2.67379679e-8 }, { 187, 5e-6 },           { 373, 9.97326203e-6 },
              { 374, 1e-5 },        { 375, 9.99999782e-6 },  { 1000, 9.16866965e-6 },
              { 2055, 5e-6 },       { 3000, 1.13661553e-6 }, { 3735, 2.18295259e-12 },
              { 3736, 0 } };
    for (size_t i = 0; i < COUNT_OF(c); i++) NEAR(dapo_rate_at(&cosine, c[i].s), c[i].want, 1e-14);
    struct dapo_rate floored = { DAPO_SCHEDULE_COSINE, 1e-6, .1, 10, 200, 0 };
    NEAR(dapo_rate_at(&floored, 55), 8.8107576e-7, 1e-13);
    NEAR(dapo_rate_at(&floored, 150), 2.45223293e-7, 1e-13);
    NEAR(dapo_rate_at(&floored, 200), 1e-7, 1e-13);
    struct dapo_rate wsd = { DAPO_SCHEDULE_WSD, 1, .1, 10, 200, .9 };
    static const struct {
        int64_t s;
        double want;
    } w[] = { { 5, .5 },           { 10, 1 },   { 181, 1 }, { 190, .587160705 },
              { 199, .106137413 }, { 200, .1 }, { 300, .1 } };
    for (size_t i = 0; i < COUNT_OF(w); i++) NEAR(dapo_rate_at(&wsd, w[i].s), w[i].want, 1e-8);
}

Test(dapo, gradient_norm_is_bounded) {
    NEAR(3 * dapo_grad_scale(5, 1), .59999988, 1e-8);
    NEAR(4 * dapo_grad_scale(5, 1), .79999984, 1e-8);
    NEAR(3 * dapo_grad_scale(5, .2), .119999976, 1e-9);
    NEAR(dapo_grad_scale(5, 10), 1, 0);
}
