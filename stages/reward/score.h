/* score.h - scores the samples of a group: GSM8K rule, optional format part, overlong shaping. A
 * pure function of the record.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_SCORE_H
#define QERL_SCORE_H
#include "lib/wire/rec.h"

struct score_conf {
    int rule;                        /* enum task_rule that decides acc */
    /* weight of the format part: 1 when "#### number" is there, whatever the number; 0 = off */
    double format;
    int64_t overlong_buffer;         /* tokens; 0 = off */
    double overlong_factor;
};
/* Fills acc, strict, flexible, format, overlong, extracted and score = acc + format weight * format
 * + overlong of every sample, and the group's rule; turns a traj into a group. */
void score_group(struct rec *r, const struct score_conf *c);
/* Scores an answer again under both rules. Returns whether it is right under c->rule. */
bool score_answer(struct rec_answer *a, const struct score_conf *c);
#endif
