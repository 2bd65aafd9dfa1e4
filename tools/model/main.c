/* main.c - qerl-model: look at a model, pack it, check it, try it. A table of commands and nothing
 * else.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/log.h"
#include "lib/base/str.h"
#include "tools/model/cmd.h"

static const struct command {
    const char *name;
    int (*run)(int argc, char **argv);
    const char *what;
} commands[] = {
    { "inspect", cmd_inspect, "shape, parameters, tensors and files of a model" },
    { "pack", cmd_pack, "quantise a model into its packed file and say what was lost" },
    { "verify", cmd_verify, "read every weight and compare the packed file with a fresh one" },
    { "tokens", cmd_tokens, "text to token ids and back" },
    { "chat", cmd_chat, "messages rendered by a model's chat template, and their tokens" },
    { "logprobs", cmd_logprobs, "log-probability of every token of given ids" },
    { "noise", cmd_noise, "the exact noise that a run applied, or that a key gives" },
};

static int help(void) {
    printf("qerl-model - look at a model, pack it, check it, try it\n\n"
           "usage: qerl-model COMMAND MODEL [options]\n\n"
           "MODEL is a Hugging Face folder (config.json and safetensors) or a .gguf file, Llama or "
           "Qwen2.\n\n");
    for (size_t i = 0; i < COUNT_OF(commands); i++)
        printf("  %-10s %s\n", commands[i].name, commands[i].what);
    printf("\nexamples:\n"
           "  qerl-model inspect models/tiny\n"
           "  qerl-model pack models/tiny --quant mxfp4\n"
           "  qerl-model verify models/tiny --quant mxfp4\n"
           "\n'qerl-model COMMAND --help' says more about a command.\n"
           "exit status: 0 done, 1 failed, 2 wrong command line, 4 the model is absent, "
           "unsupported or damaged\n");
    return EXIT_DONE;
}

static int unknown(const char *text) {
    const char *name[COUNT_OF(commands)];
    for (size_t i = 0; i < COUNT_OF(commands); i++) name[i] = commands[i].name;
    const char *near = str_nearest(text, name, COUNT_OF(commands));
    fprintf(stderr, "qerl-model: unknown command '%s'", text);
    if (near) fprintf(stderr, "; did you mean '%s'?\n", near);
    else fprintf(stderr, "; see 'qerl-model --help'\n");
    return EXIT_USAGE;
}

int main(int argc, char **argv) {
    log_open("qerl-model", LOG_LEVEL_INFO);
    if (argc < 2) {
        fprintf(stderr, "qerl-model: give a command; see 'qerl-model --help'\n");
        return EXIT_USAGE;
    }
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 ||
        (strcmp(argv[1], "help") == 0 && argc == 2))
        return help();
    for (size_t i = 0; i < COUNT_OF(commands); i++)
        if (strcmp(argv[1], commands[i].name) == 0) {
            int code = commands[i].run(argc - 1, argv + 1);
            if (fflush(stdout) == 0 && !ferror(stdout)) return code;
            fprintf(stderr, "qerl-model: cannot write the result to stdout\n");
            return EXIT_FAILED;
        }
    return unknown(argv[1]);
}
