/* conf.h - settings of the evaluator.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_EVAL_CONF_H
#define QERL_EVAL_CONF_H
#include "lib/gen/gen.h"
#include "lib/stage/policy.h"
#include "lib/task/task.h"

enum { PORT_ADAPTER, PORT_SCORE };
enum eval_noise { EVAL_NOISE_CLEAN, EVAL_NOISE_TRAINED };
struct eval_conf {
    struct shared shared;
    char *adapter, *answers, *split, *keep;
    int rule;                        /* enum task_rule */
    int noise;                       /* enum eval_noise */
    bool also_noisy;
    int64_t questions, samples, rows, new_max, top_k, shown, ranks;
    int64_t device_seed;             /* < 0: run.seed; see eval_device */
    double temperature, top_p;
};
/* Key of type systematic: the device that the run trained on, whatever run.seed draws the rest. */
static inline uint64_t eval_device(const struct eval_conf *c) {
    return (uint64_t)(c->device_seed < 0 ? c->shared.run.seed : c->device_seed);
}
#endif
