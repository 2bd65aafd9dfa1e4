/* noise_schedule.c - see noise_schedule.h. Order: the kinds, the choice, the checks.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/noise_schedule.h"

#include <assert.h>
#include <math.h>

/* Value i of 0 .. last of a geometric series; its ends exactly, whatever pow makes of them. */
static double geometric(double start, double end, int64_t i, int64_t last) {
    if (i <= 0 || last == 0) return start;
    if (i >= last) return end;
    return start * pow(end / start, (double)i / (double)last);
}

/* Interval 0 is silent, interval j has value j - 1 of 0 .. last. */
static double staged(double start, double end, int64_t interval, int64_t last) {
    return interval == 0 ? 0
                         : geometric(start, end, interval - 1 < last ? interval - 1 : last, last);
}

static double step_at(const struct noise_schedule *s, int64_t done) {
    assert(s->stages >= 2);
    return staged(s->start, s->end, done * s->stages / s->steps, s->stages - 2);
}

/* epoch = done * epochs / steps as a fraction: whole part and rest, so nothing is rounded. */
static double epoch_at(const struct noise_schedule *s, int64_t done) {
    assert(s->stages >= 1 && s->epochs >= 1);
    int64_t epoch = done * s->epochs / s->steps;
    if (epoch == s->epochs) epoch--;
    const int64_t rest = done * s->epochs - epoch * s->steps;
    return staged(geometric(s->start, s->end, epoch, s->epochs),
                  geometric(s->start, s->end, epoch + 1, s->epochs),
                  rest * (s->stages + 1) / s->steps, s->stages - 1);
}

double noise_schedule_at(const struct noise_schedule *s, int64_t done) {
    if (!noise_schedule_on(s)) return 0;
    assert(s->steps > 0);
    done = done < 0 ? 0 : done < s->steps ? done : s->steps;
    const int64_t last = s->steps - 1, i = done < last ? done : last;
    switch (s->kind) {
    case NOISE_AQN_STEP: return step_at(s, done);
    case NOISE_AQN_EPOCH: return epoch_at(s, done);
    case NOISE_AQN_CONSTANT: return s->start;
    case NOISE_AQN_LINEAR:
        return i == last ? s->end : s->start + (s->end - s->start) * (double)i / (double)last;
    case NOISE_AQN_EXPONENTIAL: return geometric(s->start, s->end, i, last);
    }
    return 0;
}

/* ---- checks ---- */

static int check_values(const struct noise_schedule *s, struct err *e) {
    if (s->kind == NOISE_AQN_CONSTANT) {
        if (s->start > 0 && (s->end == 0 || s->end == s->start)) return 0;
        return err_more(
            e, EXIT_CONFIG,
            "noise.aqn.schedule = constant keeps sigma_start throughout, but sigma_start "
            "is %g and sigma_end %g: give sigma_start, and leave sigma_end out or equal",
            s->start, s->end);
    }
    if (s->kind == NOISE_AQN_LINEAR || (s->start > 0 && s->end > 0)) return 0;
    return err_more(
        e, EXIT_CONFIG,
        "noise.aqn.sigma_start is %g and noise.aqn.sigma_end %g: a geometric decay needs "
        "both above 0; set both to 0 for no noise, or noise.aqn.schedule = linear",
        s->start, s->end);
}

static int check_step(const struct noise_schedule *s, struct err *e) {
    if (s->stages < 2)
        return err_more(e, EXIT_CONFIG,
                        "noise.aqn.stages = %d: the first stage is silent, so there would be no "
                        "noise at all; for the same noise throughout set noise.aqn.schedule = "
                        "constant",
                        s->stages);
    if (s->stages == 2 && s->end != s->start)
        return err_more(
            e, EXIT_CONFIG,
            "noise.aqn.stages = 2: one silent stage and one of sigma_start, so sigma_end "
            "%g would never be reached; set sigma_end = %g or stages to 3 or more",
            s->end, s->start);
    if (s->steps >= s->stages) return 0;
    if (s->steps < (s->end == s->start ? 2 : 3))
        return err_more(e, EXIT_CONFIG,
                        "noise.aqn.stages = %d: a run of %lld steps has no room for a silent stage "
                        "and a decay; --set noise.aqn.schedule=constant or raise run.steps",
                        s->stages, (long long)s->steps);
    return err_more(
        e, EXIT_CONFIG,
        "noise.aqn.stages = %d is longer than the run of %lld steps, so sigma would never "
        "reach noise.aqn.sigma_end; --set noise.aqn.stages=%lld fits",
        s->stages, (long long)s->steps, (long long)s->steps);
}

static int check_epoch(const struct noise_schedule *s, struct err *e) {
    if (s->epochs < 1 || s->stages < 1)
        return err_more(e, EXIT_CONFIG,
                        "noise.aqn.epochs = %d, stages = %d: an epoch-wise schedule needs at least "
                        "one of each",
                        s->epochs, s->stages);
    if (s->stages == 1 && s->end != s->start)
        return err_more(
            e, EXIT_CONFIG,
            "noise.aqn.stages = 1 in each epoch: sigma_end %g would never be reached; set "
            "stages to 2 or more",
            s->end);
    const int64_t fit = s->steps / s->epochs;
    if (fit > s->stages) return 0;
    if (fit < 3)
        return err_more(e, EXIT_CONFIG,
                        "noise.aqn.epochs = %d: an epoch of %lld steps has no room for a silent "
                        "interval and a decay; fewer epochs, or raise run.steps",
                        s->epochs, (long long)fit);
    return err_more(e, EXIT_CONFIG,
                    "noise.aqn.stages = %d and a silent interval are longer than an epoch of %lld "
                    "steps; --set noise.aqn.stages=%lld fits",
                    s->stages, (long long)fit, (long long)fit - 1);
}

int noise_schedule_check(const struct noise_schedule *s, struct err *e) {
    if (!(isfinite(s->start) && isfinite(s->end) && s->start >= 0 && s->end >= 0))
        return err_more(e, EXIT_CONFIG,
                        "noise.aqn: sigma_start %g and sigma_end %g must be finite "
                        "numbers, 0 or more",
                        s->start, s->end);
    if (!noise_schedule_on(s)) return 0;
    if (check_values(s, e) < 0) return -1;
    if (s->kind == NOISE_AQN_STEP) return check_step(s, e);
    if (s->kind == NOISE_AQN_EPOCH) return check_epoch(s, e);
    if (s->kind == NOISE_AQN_CONSTANT || s->steps >= 2) return 0;
    return err_more(e, EXIT_CONFIG,
                    "noise.aqn.schedule: a run of one step cannot go from sigma_start "
                    "to sigma_end; --set noise.aqn.schedule=constant or raise run.steps");
}
