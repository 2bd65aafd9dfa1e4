/* about.h - what a stage program says about itself with --describe: its keys and ports.
 * Ownership: strings are lent by the JSON and live until about_release.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_ABOUT_H
#define QERL_ABOUT_H
#include "lib/base/err.h"    /* before jansson.h: says which system we compile for */
#include "lib/base/json.h"

enum about_type { ABOUT_INT, ABOUT_NUM, ABOUT_BOOL, ABOUT_TEXT, ABOUT_CHOICE };
struct about_key {
    const char *name, *def, *help;           /* def NULL = must be given */
    enum about_type type;
    double least, most;
    char *choices;                           /* "strict|flexible", "" for other types */
};
struct about_port {
    const char *name, *record, *kind,
        *help; /* kind: "push", "pull", "router", "dealer", "pub", "sub" */
    bool output, bind, required;
};
struct about {
    json_t *json;
    const char *name, *summary;
    struct about_key *key; int keys;
    struct about_port *port; int ports;
};
/* Runs `exec --describe`. EXIT_ENV if the program is absent, EXIT_FAILED if what it says cannot be
 * read. */
int about_ask(struct about *a, const char *exec, struct err *e);
void about_release(struct about *a);
const struct about_key *about_key(const struct about *a, const char *name);
const struct about_port *about_port(const struct about *a, const char *name);
const char *about_type_name(enum about_type t);
#endif
