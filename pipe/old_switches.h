/* old_switches.h - environment variables of the earlier system: refused, with what to write.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_OLD_SWITCHES_H
#define QERL_OLD_SWITCHES_H
#include "lib/base/str.h"

/* EXIT_USAGE and the equivalent --set options in *said when `environment` ("NAME=value" texts, NULL
 * at the end) holds a switch of the earlier system; else 0. Such a variable changes nothing here:
 * going on would run another experiment than its user thinks. */
int old_switches_refuse(char *const *environment, struct str *said);
#endif
