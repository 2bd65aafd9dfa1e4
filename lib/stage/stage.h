/* stage.h - the life of a stage: command line, configuration, links, readiness, beats, signals,
 * end.
 *
 * A stage declares its keys and ports in one `struct stage_about`; everything else (--help,
 * --describe, --plan, -c FILE,
 * --set k=v, --in/--out PORT=URL, the ready line, beats, SIGTERM, SIGUSR1) is done here, the same
 * for all. Keys are bound to a configuration struct by offset, so an option cannot be read under a
 * misspelt name or forgotten: a key in the file that no table names is an error with the nearest
 * valid name. No setting comes from the environment.
 *
 * Configuration file: lines "section.name = value", '#' comments, and "in.PORT = URL" / "out.PORT =
 * URL". Values: text to the end of the line, trimmed. --set wins over the file; command-line
 * --in/--out win over both, and where any is given the file's sockets stay closed. All errors in
 * one pass.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_STAGE_H
#define QERL_STAGE_H
#include "lib/base/sys.h"

#include "lib/base/json.h"
#include "lib/wire/link.h"

/* int64_t, double, bool, char *, int (index of the choice) */
enum key_type { KEY_INT, KEY_NUM, KEY_BOOL, KEY_TEXT, KEY_CHOICE };
struct stage_key {
    const char *name;            /* "run.steps": section and key */
    enum key_type type;
    size_t offset;               /* in the configuration struct */
    const char *def;             /* default as text; NULL = must be given */
    double least, most;          /* KEY_INT, KEY_NUM; no range where least >= most */
    const char *choices;         /* KEY_CHOICE: "strict|flexible" */
    const char *help;            /* one line, unit included */
};
struct stage_port {
    const char *name;
    bool output;
    enum rec_type record;
    enum link_kind kind;
    bool bind;
    bool required;               /* without it the stage refuses to start */
    const char *help;
};

struct stage;
struct stage_about {
    const char *name;            /* "rollout" */
    const char *summary;         /* first line of --help */
    const char *examples;        /* lines of --help */
    /* NULL-terminated list of tables, each ended by a NULL name */
    const struct stage_key *const *keys;
    const struct stage_port *ports;          /* ended by a NULL name */
    size_t conf_bytes;           /* of the configuration struct */
    /* Combinations that no range can say, asked when every key is right by itself; one line of e
     * each. May be NULL. */
    int (*check)(void *conf, struct err *e);
    /* --plan: adds what this stage can say before the run to the JSON object (steps, tables,
     * memory, files). Opens no socket, starts no thread. Absent files are listed, not fatal. May be
     * NULL. */
    int (*plan)(const void *conf, json_t *out, struct err *e);
};

struct stage {
    const struct stage_about *about;
    void *conf;                  /* about->conf_bytes, filled */
    struct link *link[16];       /* by index of about->ports; NULL = left open */
    struct link *beat;           /* to the launcher; NULL when run alone */
    struct err err;
    char id[64];                 /* "rollout-0": --id, default the stage's name */
    int64_t progress, step;      /* for beats; the work loop counts */
    const char *waits_for;       /* shown by beats and SIGUSR1; "" = working */
    int ranks;                   /* processes it computes in, told when ready; 0 = this one */
    const char *device;          /* the GPU it computes on, told when ready; NULL or "" = none */
    /* Started by another process of the same stage (rank.h): above 0, without links, beats and
     * ready line; stopped by that process alone. */
    int rank, rank_fd;
    int argc;
    char **argv;                 /* lent by main */
};

/* Parses and acts on the command line. --help, --describe, --devices and --plan print and exit
 * here, errors too (2 usage, 3 configuration, 4 environment). On return the configuration is
 * complete and the links are open. */
void stage_open(struct stage *s, int argc, char **argv, const struct stage_about *about);
/* Whether a port (index of about->ports) is given a URL: for about->check and plan. */
bool stage_linked(int port);
/* One line "ready\n" on the descriptor of --ready-fd (if given), a beat, a log line. */
void stage_ready(struct stage *s);
/* True once SIGTERM or SIGINT came: finish or abandon cleanly. */
bool stage_stopping(const struct stage *s);
/* Sends a beat when one is due (every 500 ms), when state changed, or when metrics (JSON object
 * text or NULL) differ from the last ones sent. Never waits. Cheap: call it in loops. */
void stage_beat(struct stage *s, const char *state, const char *metrics);
/* Prints s->err, sends a last beat, exits with err.code or `code`. */
void stage_die(struct stage *s, int code) __attribute__((noreturn));
/* Appends "key = value" lines of all keys but those in `but` (NULL-terminated): what a run was made
 * of. */
void stage_settings(const struct stage *s, const char *const *but, struct str *out);
/* Closes links; returns code. */
int stage_close(struct stage *s, int code);
#endif
