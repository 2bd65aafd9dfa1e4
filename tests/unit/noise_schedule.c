/* noise_schedule.c - AQN's schedules at their boundaries, by steps against the tables of spec dapo 17.7 and
 * experiments 5.1; settings that would do nothing are refused.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/noise_schedule.h"

#include <criterion/criterion.h>
#include <math.h>

static bool near(double got, double want) { return fabs(got - want) <= 1e-6 * fabs(want); }

static double noise_schedule(int64_t done, int64_t steps, int stages, double start, double end) {
    return noise_schedule_at(&(struct noise_schedule){ .start = start, .end = end, .stages = stages,
                                                       .steps = steps }, done);
}

static const struct { int64_t first, last; double small, large; } table[] = {
    { 0, 373, 0, 0 },
    { 374, 747, .01, .05 },
    { 748, 1120, .005623413252, .0281171 },
    { 1121, 1494, .00316227766, .0158114 },
    { 1495, 1867, .00177827941, .0088914 },
    { 1868, 2241, .001, .005 },
    { 2242, 2615, .0005623413252, .00281171 },
    { 2616, 2988, .000316227766, .00158114 },
    { 2989, 3362, .000177827941, .00088914 },
    { 3363, 3736, .0001, .0005 },
    { 3737, 9999, .0001, .0005 },
};

Test(noise_schedule, gives_both_tables_of_3736_steps_at_every_boundary) {
    for (size_t i = 0; i < COUNT_OF(table); i++) {
        const int64_t at[] = { table[i].first, (table[i].first + table[i].last) / 2,
                               table[i].last };
        for (int j = 0; j < 3; j++) {
            double small = noise_schedule(at[j], 3736, 10, .01, .0001),
                   large = noise_schedule(at[j], 3736, 10, .05, .0005);
            cr_expect(near(small, table[i].small), "step %lld: %.12g", (long long)at[j], small);
            cr_expect(fabs(large - table[i].large) <= 5e-6 * table[i].large, "step %lld: %.12g",
                      (long long)at[j], large);
        }
    }
}

Test(noise_schedule, short_runs_follow_the_integer_rule) {
    /* S = 200: changes at 20, 40, ..., 180 */
    for (int step = 0; step <= 220; step++) {
        const int j = step > 200 ? 10 : step / 20;
        const double want = j == 0 ? 0 : .01 * pow(.01, (j > 9 ? 8 : j - 1) / 8.);
        cr_expect(near(noise_schedule(step, 200, 10, .01, .0001), want), "step %d of 200", step);
    }
    static const int interval[] = { 0, 1, 2, 4, 5, 7, 8, 10 };        /* S = 7 */
    for (int step = 0; step <= 7; step++) {
        const int j = interval[step];
        const double want = j == 0 ? 0 : .01 * pow(.01, (j > 9 ? 8 : j - 1) / 8.);
        cr_expect(near(noise_schedule(step, 7, 10, .01, .0001), want), "step %d of 7", step);
    }
    /* j = 7, where dividing floats gives 6 */
    cr_expect(near(noise_schedule(9, 9, 7, .01, .0001), .0001));
    /* j = 6: trend[5], the last */
    cr_expect(near(noise_schedule(8, 9, 7, .01, .0001), .0001));
    cr_expect(near(noise_schedule(7, 9, 7, .01, .0001), .01 * pow(.01, .8)));
    cr_expect_eq(noise_schedule(4, 10, 2, .01, .0001), 0.);
    cr_expect_eq(noise_schedule(5, 10, 2, .01, .0001), .01);
    cr_expect_eq(noise_schedule(10, 10, 2, .01, .0001), .01);
    cr_expect_eq(noise_schedule(10, 10, 3, .01, .0001), .0001);
}


/* First steps of the stages that the study's runs had, in exact arithmetic. */
Test(noise_schedule, changes_where_the_studys_tables_change) {
    static const struct { int steps, at[9]; } run[] = {
        { 29, { 3, 6, 9, 12, 15, 18, 21, 24, 27 } },
        { 58, { 6, 12, 18, 24, 29, 35, 41, 47, 53 } },
        { 116, { 12, 24, 35, 47, 58, 70, 82, 93, 105 } },
        { 233, { 24, 47, 70, 94, 117, 140, 164, 187, 210 } },
    };
    static const double sigma[] = { 0, .05, .02812, .01581, .008891, .005, .002812, .001581, .000889, .0005 };
    for (size_t r = 0; r < COUNT_OF(run); r++)
        for (int step = 0, stage = 0; step < run[r].steps; step++) {
            while (stage < 9 && run[r].at[stage] <= step) stage++;
            const double got = noise_schedule(step, run[r].steps, 10, .05, .0005);
            cr_expect(fabs(got - sigma[stage]) <= 2e-4 * sigma[stage], "step %d of %d: %g instead of %g", step,
                      run[r].steps, got, sigma[stage]);
        }
}

/* Experiments 5.3: two epochs of 30 steps, five stages behind a silent interval in each. */
Test(noise_schedule, each_epoch_begins_silent_and_has_its_own_range) {
    const struct noise_schedule s = { NOISE_AQN_EPOCH, .05, .0005, 5, 2, 60 };
    cr_assert_eq(noise_schedule_check(&s, NULL), 0);
    for (int64_t step = 0; step < 60; step++) {
        const int64_t interval = step % 30 / 5;
        const double start = step < 30 ? .05 : .005;
        const double want = interval == 0 ? 0 : start * pow(.1, (double)(interval - 1) / 4);
        cr_expect(fabs(noise_schedule_at(&s, step) - want) <= 1e-12, "step %lld: %g", (long long)step,
                  noise_schedule_at(&s, step));
    }
    cr_expect(fabs(noise_schedule_at(&s, 60) - .0005) < 1e-15);
    cr_expect_eq(noise_schedule_at(&s, 1000), noise_schedule_at(&s, 60));
    /* an odd number of steps: the second epoch begins in the middle of step 14, so step 15 is its first */
    const struct noise_schedule odd = { NOISE_AQN_EPOCH, .05, .0005, 5, 2, 29 };
    cr_expect(noise_schedule_at(&odd, 14) > 0 && noise_schedule_at(&odd, 15) == 0);
    int silent = 0;
    for (int64_t step = 0; step < 29; step++) silent += noise_schedule_at(&odd, step) == 0;
    cr_expect_eq(silent, 5, "%d of 29 steps are silent", silent);
}

Test(noise_schedule, constant_linear_and_exponential_have_no_silent_start) {
    const struct noise_schedule constant = { .kind = NOISE_AQN_CONSTANT, .start = .02, .steps = 5 };
    const struct noise_schedule linear = { NOISE_AQN_LINEAR, .01, 0, 10, 1, 101 };
    const struct noise_schedule rising = { NOISE_AQN_LINEAR, 0, .01, 10, 1, 101 };
    const struct noise_schedule decay = { NOISE_AQN_EXPONENTIAL, .01, .0001, 10, 1, 101 };
    const struct noise_schedule *all[] = { &constant, &linear, &rising, &decay };
    for (size_t i = 0; i < COUNT_OF(all); i++) cr_expect_eq(noise_schedule_check(all[i], NULL), 0);
    for (int64_t step = 0; step < 9; step++) cr_expect_eq(noise_schedule_at(&constant, step), .02);
    for (int64_t step = 0; step <= 101; step++) {
        const double share = (double)(step < 100 ? step : 100) / 100;
        cr_expect(fabs(noise_schedule_at(&linear, step) - .01 * (1 - share)) < 1e-15, "%lld", (long long)step);
        cr_expect(fabs(noise_schedule_at(&rising, step) - .01 * share) < 1e-15, "%lld", (long long)step);
        cr_expect(near(noise_schedule_at(&decay, step), .01 * pow(.01, share)), "%lld", (long long)step);
    }
    cr_expect_eq(noise_schedule_at(&linear, 100), 0.);
    cr_expect_eq(noise_schedule_at(&decay, 100), .0001);
}

Test(noise_schedule, settings_that_would_do_nothing_are_refused_with_a_way_out) {
    static const struct { struct noise_schedule s; const char *says; } cases[] = {
        { { NOISE_AQN_STEP, .01, .0001, 1, 1, 100 }, "noise.aqn.schedule = constant" },
        { { NOISE_AQN_STEP, .01, .0001, 2, 1, 100 }, "sigma_end 0.0001 would never be reached" },
        { { NOISE_AQN_STEP, .01, 0, 10, 1, 100 }, "a geometric decay needs both above 0" },
        { { NOISE_AQN_STEP, 0, .01, 10, 1, 100 }, "a geometric decay needs both above 0" },
        { { NOISE_AQN_STEP, .01, .0001, 10, 1, 8 }, "--set noise.aqn.stages=8 fits" },
        { { NOISE_AQN_STEP, .01, .0001, 10, 1, 2 }, "--set noise.aqn.schedule=constant" },
        { { NOISE_AQN_EPOCH, .01, .0001, 5, 2, 11 }, "--set noise.aqn.stages=4 fits" },
        { { NOISE_AQN_EPOCH, .01, .0001, 1, 2, 100 }, "sigma_end 0.0001 would never be reached" },
        { { NOISE_AQN_EPOCH, .01, .0001, 5, 60, 100 }, "fewer epochs" },
        { { NOISE_AQN_EPOCH, .01, 0, 5, 2, 100 }, "a geometric decay needs both above 0" },
        { { NOISE_AQN_CONSTANT, .01, .0001, 10, 1, 100 }, "leave sigma_end out or equal" },
        { { NOISE_AQN_CONSTANT, 0, .0001, 10, 1, 100 }, "give sigma_start" },
        { { NOISE_AQN_LINEAR, .01, 0, 10, 1, 1 }, "a run of one step" },
        { { NOISE_AQN_EXPONENTIAL, .01, 0, 10, 1, 100 }, "a geometric decay needs both above 0" },
        { { NOISE_AQN_LINEAR, -.01, 0, 10, 1, 100 }, "0 or more" },
        { { NOISE_AQN_LINEAR, (double)NAN, 0, 10, 1, 100 }, "0 or more" },
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        struct err e = { 0 };
        cr_expect_eq(noise_schedule_check(&cases[i].s, &e), -1, "case %zu", i);
        cr_expect_eq(e.code, EXIT_CONFIG, "case %zu", i);
        cr_expect(strstr(e.text, cases[i].says), "case %zu says: %s", i, e.text);
    }
    /* what each message offers is taken; off is off whatever the rest */
    static const struct noise_schedule fine[] = {
        { NOISE_AQN_STEP, .01, .0001, 8, 1, 8 },    { NOISE_AQN_STEP, .01, .01, 2, 1, 2 },
        { NOISE_AQN_STEP, .01, .0001, 3, 1, 100 },  { NOISE_AQN_EPOCH, .01, .0001, 4, 2, 11 },
        { NOISE_AQN_CONSTANT, .01, .01, 1, 1, 1 },  { NOISE_AQN_STEP, 0, 0, 1, 1, 1 },
    };
    for (size_t i = 0; i < COUNT_OF(fine); i++) {
        struct err e = { 0 };
        cr_expect_eq(noise_schedule_check(&fine[i], &e), 0, "fine %zu: %s", i, e.text);
        if (fine[i].start > 0)
            cr_expect_eq(noise_schedule_at(&fine[i], fine[i].steps - 1), fine[i].end, "fine %zu ends elsewhere", i);
        else cr_expect_eq(noise_schedule_at(&fine[i], 0), 0.);
    }
}
