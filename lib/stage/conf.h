/* conf.h - inside lib/stage only: settings as text, from a file and the command line, bound to a
 * stage's struct.
 *
 * Every value remembers where it came from, so that each error names a file and line or the option;
 * all errors are collected, and the caller prints them together.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_CONF_H
#define QERL_CONF_H
#include "lib/stage/stage.h"

struct setting {
    char *name, *text;
    const char *from;            /* file name or "--set", lent */
    int line;                    /* 0 = not from a file */
};
struct settings {
    struct setting *v;
    int n, cap;
};
void settings_release(struct settings *s);
void settings_add(struct settings *s, const char *name, const char *text, const char *from,
                  int line);
/* The last value given under that name, or NULL. */
const struct setting *settings_find(const struct settings *s, const char *name);
/* Lines "name = value" of a file. Appends one line of error for each bad line; -1 if there was
 * one. */
int settings_read(struct settings *s, const char *path, struct err *e);
/* "name=value" of --set. */
int settings_arg(struct settings *s, const char *arg, struct err *e);

/* Appends a line to e->text: "FILE:12: ...", "--set run.steps: ...", or plain text where `at` is
 * NULL. Returns -1. */
int complain(struct err *e, const struct setting *at, const char *fmt, ...) PRINTF_LIKE(3, 4);

/* Fills conf (about->conf_bytes, zeroed) from defaults and settings; names no key and no port are
 * errors. */
int conf_bind(void *conf, const struct stage_about *about, const struct settings *s, struct err *e);
void conf_release(void *conf, const struct stage_about *about);
/* Whether a value is the default's; its text as a file would say it, appended. */
bool conf_at_default(const void *conf, const struct stage_key *k);
void conf_value(const void *conf, const struct stage_key *k, struct str *out);
/* Lines that name keys of the stage, each put behind the place that set the first such key to
 * something else than its default; appended to e. */
void conf_place(struct err *e, const struct stage_about *about, const struct settings *s,
                const char *lines);
/* Port called `name` (without "in." or "out."), or NULL with a complaint that knows the nearest
 * one. */
const struct stage_port *port_find(const struct stage_about *about, const char *name, bool output,
                                   const struct setting *at, struct err *e);
#endif
