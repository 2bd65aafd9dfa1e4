/* stop.h - Ctrl-C and SIGTERM in commands that work through a list: remembered, and passed on to
 * the program that is waited for, so that the command can say what is kept and how to go on.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_STOP_H
#define QERL_STOP_H
#include "lib/base/sys.h"
#include <sys/types.h>

/* From now on both signals are caught; `run` and `resume` have their own way (supervise.c). */
void stop_catch(void);
bool stop_came(void);
/* The program that gets SIGTERM when a signal comes, or now if one came; 0 = none. Does nothing
 * where nobody catches. */
void stop_pass_to(pid_t pid);
#endif
