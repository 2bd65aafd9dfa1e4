/* args.c - see args.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tools/model/args.h"

#include "lib/base/str.h"

static int wrong(const char *command, const char *text, const char *what) {
    fprintf(stderr, "qerl-model %s: %s '%s'; see 'qerl-model %s --help'\n", command, what, text,
            command);
    return -1;
}

static const struct arg *find(const struct arg *arg, size_t n, const char *text, size_t bytes) {
    for (size_t i = 0; i < n; i++)
        if (strlen(arg[i].name) == bytes && memcmp(arg[i].name, text, bytes) == 0) return &arg[i];
    return NULL;
}

static int unknown(const char *command, const char *text, const struct arg *arg, size_t n) {
    const char *name[32];
    for (size_t i = 0; i < n && i < COUNT_OF(name); i++) name[i] = arg[i].name;
    const char *near = str_nearest(text + 2, name, n < COUNT_OF(name) ? n : COUNT_OF(name));
    if (!near) return wrong(command, text, "unknown option");
    fprintf(stderr, "qerl-model %s: unknown option '%s'; did you mean '--%s'?\n", command, text,
            near);
    return -1;
}

int args_parse(int argc, char **argv, const char *help, const struct arg *arg, size_t n,
               const char **path) {
    *path = NULL;
    for (int i = 1; i < argc; i++) {
        const char *text = argv[i];
        if (strcmp(text, "--help") == 0 || strcmp(text, "-h") == 0) {
            fputs(help, stdout);
            return 0;
        }
        if (text[0] != '-') {
            if (*path) return wrong(argv[0], text, "one model at a time, not also");
            *path = text;
            continue;
        }
        const char *equal = strchr(text, '=');
        size_t bytes = equal ? (size_t)(equal - text) : strlen(text);
        const struct arg *a = str_starts(text, "--") ? find(arg, n, text + 2, bytes - 2) : NULL;
        if (!a) return unknown(argv[0], text, arg, str_starts(text, "--") ? n : 0);
        if (a->flag) {
            if (equal) return wrong(argv[0], text, "this option takes no value:");
            *a->flag = true;
        } else if (equal) *a->value = equal + 1;
        else if (i + 1 < argc) *a->value = argv[++i];
        else return wrong(argv[0], text, "a value must follow");
    }
    if (*path) return 1;
    fprintf(stderr, "qerl-model %s: give the path of a model; see 'qerl-model %s --help'\n",
            argv[0], argv[0]);
    return -1;
}

int args_quant(const char *command, const char *quant, const char *rounding, enum model_quant *q,
               enum model_rounding *r) {
    int found = model_quant_parse(quant);
    if (found < 0) return wrong(command, quant, "--quant is bf16, mxfp4, nvfp4 or f32, not");
    *q = (enum model_quant)found;
    *r = strcmp(rounding, "seed") == 0 ? MODEL_ROUNDING_SEED : MODEL_ROUNDING_OCP;
    if (*r == MODEL_ROUNDING_OCP && strcmp(rounding, "ocp") != 0)
        return wrong(command, rounding, "--rounding is ocp or seed, not");
    return 0;
}
