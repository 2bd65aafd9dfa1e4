/* alarm.c - the learner's warnings: said when a bound is crossed, once, and again after it was kept.
 * SPDX-License-Identifier: Apache-2.0 */
#include "stages/learner/alarm.h"

#include <criterion/criterion.h>
#include <unistd.h>

#include "lib/base/log.h"

/* What a step looks like, and what must be said of it: "" = nothing. */
struct look { double length, entropy, sigma; const char *says; double zeroed; };

/* Looks at them in turn, steps 1, 2, ...; each line on stderr is the warning of its step. */
static void expect_warnings(const struct look *look, int n) {
    char said[8000];
    int pipe_ends[2], warnings = 0;
    struct alarm a = { 0 };
    cr_assert(pipe(pipe_ends) == 0);
    const int saved = dup(STDERR_FILENO);
    dup2(pipe_ends[1], STDERR_FILENO);
    log_open("learner", LOG_LEVEL_INFO);
    for (int i = 0; i < n; i++) {
        alarm_look(&a, &(struct alarm_signs){ i + 1, look[i].length, look[i].entropy,
                                              look[i].sigma, look[i].zeroed });
        warnings += *look[i].says != 0;
    }
    dup2(saved, STDERR_FILENO);
    close(pipe_ends[1]);
    const ssize_t bytes = read(pipe_ends[0], said, sizeof said - 1);
    said[bytes > 0 ? bytes : 0] = 0;
    char *rest = said, *line;
    for (int i = 0; i < n; i++) {
        char step[32];
        if (!*look[i].says) continue;
        line = strsep(&rest, "\n");
        snprintf(step, sizeof step, "step %d: ", i + 1);
        cr_expect(line && strstr(line, step) && strstr(line, look[i].says), "step %d: '%s'", i + 1,
                  line ? line : "nothing");
    }
    cr_expect(!rest || !*rest, "%d warnings were due; more: '%s'", warnings, rest);
}
#define EXPECT(...)                                                                                \
    do {                                                                                           \
        const struct look look_[] = { __VA_ARGS__ };                                               \
        expect_warnings(look_, (int)(sizeof look_ / sizeof *look_));                               \
    } while (0)

Test(alarm, answers_that_grow_by_half) {
    EXPECT({ 215, 1, 0, "", 0 }, { 300, 1, 0, "", 0 }, { 322, 1, 0, "", 0 }, { 323, 1, 0, "from 215 to 323", 0 },
           { 410, 1, 0, "", 0 }, { 200, 1, 0, "", 0 }, { 410, 1, 0, "from 215 to 410", 0 });
}

Test(alarm, entropy_that_vanishes_or_explodes) {
    EXPECT({ 100, .27, 0, "", 0 }, { 100, .15, 0, "", 0 }, { 100, .11, 0, "stopped exploring", 0 },
           { 100, .1, 0, "", 0 }, { 100, 1, 0, "", 0 }, { 100, 2.56, 0, "close to guessing", 0 });
}

Test(alarm, noise_that_is_large_beside_its_weights) {
    EXPECT({ 100, 1, .05, "", 0 }, { 100, 1, .11, "0.11 of the weights", 0 }, { 100, 1, .2, "", 0 });
}

Test(alarm, adapters_that_are_read_as_nothing) {
    EXPECT({ 100, 1, 0, "", .4 }, { 100, 1, 0, "reads 60 % of B as 0", .6 }, { 100, 1, 0, "", .7 });
}
