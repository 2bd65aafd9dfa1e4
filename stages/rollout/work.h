/* work.h - the rollout's table of tickets: taken, in the making, finished and waiting for an
 * acknowledgement.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_WORK_H
#define QERL_WORK_H
#include "lib/gen/gen.h"
#include "lib/stage/policy.h"

enum { PORT_TICKET, PORT_TRAJ };
struct rollout_conf {
    struct shared shared;
    int64_t rows, credit;
    double resend_seconds, sigma;
    char *stop, *adapter;
};
struct work;
struct gen_opts work_gen_opts(const struct rollout_conf *c, const struct lora_shape *shape);
struct work *work_create(struct stage *s);           /* NULL with s->err */
void work_destroy(struct work **w);
/* One turn: look at the links, adopt the policy that the next ticket needs, decode one token for
 * all rows, send what is finished. 1 = go on, 0 = no more work will come (input ended, end
 * received, asked to stop), -1 = s->err. */
int work_turn(struct work *w);
#endif
