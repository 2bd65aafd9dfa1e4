/* args.h - the command line of one qerl-model command: "--name VALUE", "--name=VALUE", "--flag" and
 * the model's path.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_ARGS_H
#define QERL_ARGS_H
#include "lib/model/model.h"

struct arg {
    const char *name;                                /* without the dashes */
    const char **value;                              /* where the text goes, or */
    bool *flag;                                      /* what is set */
};
/* 1: go on; 0: help was printed to stdout; -1: wrong, and said so on stderr (EXIT_USAGE). One path
 * is required. */
int args_parse(int argc, char **argv, const char *help, const struct arg *arg, size_t n,
               const char **path);
/* --quant and --rounding out of their texts; -1 with a message on stderr. */
int args_quant(const char *command, const char *quant, const char *rounding, enum model_quant *q,
               enum model_rounding *r);
#endif
