/* alarm.h - what a person would want to be told of while a run goes on: warnings in the log, said
 * when a bound is crossed, not at every step. They change nothing.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_ALARM_H
#define QERL_ALARM_H
#include "lib/base/sys.h"

struct alarm {
    double length_first;             /* mean tokens of an answer in the first update; 0 = none */
    bool longer, entropy, sigma, zeroed;    /* outside its bound at the last look */
};
struct alarm_signs {
    int64_t step;
    double length, entropy;          /* mean tokens of an answer; mean entropy of a token */
    double sigma_share;              /* rms of AQN over that of the weights it hits */
    double b_zeroed;                 /* share of B that quant.adapter reads as 0 */
};
void alarm_look(struct alarm *a, const struct alarm_signs *s);
#endif
