/* cmd.h - the commands of qerl-model: one file each, called with argv[0] = the command's name. They
 * print results to stdout and return an exit code (enum exit_code). Each answers --help.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_CMD_H
#define QERL_CMD_H

int cmd_inspect(int argc, char **argv);
int cmd_pack(int argc, char **argv);
int cmd_verify(int argc, char **argv);
int cmd_tokens(int argc, char **argv);
int cmd_chat(int argc, char **argv);
int cmd_logprobs(int argc, char **argv);
int cmd_noise(int argc, char **argv);
#endif
