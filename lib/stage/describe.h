/* describe.h - inside lib/stage only: what a stage says about itself, for people and for programs.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_DESCRIBE_H
#define QERL_DESCRIBE_H
#include "lib/stage/stage.h"

/* Summary, options, keys with default, range and help, ports, examples. */
void describe_help(FILE *to, const struct stage_about *about);
/* {"stage","summary","keys":[{"key","type","default","least","most","choices","help"}],
 *  "ports":[{"name","direction","record","socket","bind","required","help"}],
 *  "kernels":[paths that this machine can run, the one that `auto` takes first]}
 * default is text as it would stand in a file, null = must be given; least and most are null
 * without a range; choices is [] but for a choice; record is "any" where a port takes several. The
 * caller owns the result. */
json_t *describe_json(const struct stage_about *about);
#endif
