/* clock.h - the time that timers use.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_CLOCK_H
#define QERL_CLOCK_H
/* Seconds of CLOCK_MONOTONIC: never jumps, means nothing across machines or restarts. */
double clock_seconds(void);
#endif
