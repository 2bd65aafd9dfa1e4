/* stage_echo.c - a small real stage inside the test program: run under the name "echo-stage" it is
 * the stage, not the tests. It copies tickets from port in to port out, so that stage_life.c can
 * drive a stage from outside, as a user would.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/stage/stage.h"

#include <unistd.h>

struct conf {
    int64_t steps;
    double rate;
    bool loud;
    char *path, *must;
    int rule;
};
#define AT(field) offsetof(struct conf, field)
static const struct stage_key run_keys[] = {
    { "run.steps", KEY_INT, AT(steps), "10", 1, 1000, NULL, "completed steps" },
    { "run.must", KEY_TEXT, AT(must), NULL, 0, 0, NULL, "has no default" },
    { 0 },
};
static const struct stage_key echo_keys[] = {
    { "echo.rate", KEY_NUM, AT(rate), "5e-2", 0, 1, NULL, "per step" },
    { "echo.loud", KEY_BOOL, AT(loud), "false", 0, 0, NULL, "say the configuration on stderr" },
    { "echo.path", KEY_TEXT, AT(path), "", 0, 0, NULL, "any text" },
    { "echo.rule", KEY_CHOICE, AT(rule), "strict", 0, 0, "strict|flexible", "which rule" },
    { 0 },
};
static const struct stage_key *const tables[] = { run_keys, echo_keys, NULL };
enum { PORT_IN, PORT_OUT, PORT_EXTRA };
static const struct stage_port ports[] = {
    { "ticket", false, REC_TICKET, LINK_KIND_PULL, true, true, "what is echoed" },
    { "copy", true, REC_TICKET, LINK_KIND_PUSH, false, true, "the echo" },
    { "extra", false, REC_END, LINK_KIND_SUB, false, false, "ends it" },
    { 0 },
};

static int check(void *conf, struct err *e) {
    const struct conf *c = conf;
    if (c->loud && c->rate > .5) return err_set(e, "echo.rate above 0.5 cannot be loud");
    return 0;
}

static int plan(const void *conf, json_t *out, struct err *e) {
    const struct conf *c = conf;
    (void)e;
    json_object_set_new(out, "steps", json_integer(c->steps));
    return 0;
}

static const struct stage_about about = {
    .name = "echo",
    .summary = "copies tickets",
    .examples = "  qerl-echo --set run.must=x < a.jsonl\n",
    .keys = tables,
    .ports = ports,
    .conf_bytes = sizeof(struct conf),
    .check = check,
    .plan = plan,
};

static int echo_main(int argc, char **argv) {
    struct stage s;
    stage_open(&s, argc, argv, &about);
    const struct conf *c = s.conf;
    if (c->loud)
        fprintf(stderr, "steps %lld must %s rate %g path '%s' rule %d extra %d id %s\n",
                (long long)c->steps, c->must, c->rate, c->path, c->rule, s.link[PORT_EXTRA] != NULL,
                s.id);
    stage_ready(&s);
    while (!stage_stopping(&s)) {
        struct rec r;
        s.waits_for = "ticket";
        stage_beat(&s, "wait", NULL);
        int rc = link_recv(s.link[PORT_IN], &r, NULL, 100, &s.err);
        if (rc < 0) stage_die(&s, EXIT_FAILED);
        if (rc == LINK_END) break;
        if (rc == LINK_EMPTY) continue;
        s.waits_for = "";
        s.progress++;
        if (link_send(s.link[PORT_OUT], &r, NULL, 1000, &s.err) < 0) {
            rec_release(&r);
            stage_die(&s, EXIT_FAILED);
        }
        rec_release(&r);
    }
    return stage_close(&s, EXIT_DONE);
}

/* glibc hands a constructor what main gets. */
__attribute__((constructor)) static void take_over(int argc, char **argv, char **env) {
    (void)env;
    if (argc > 0 && strcmp(argv[0], "echo-stage") == 0) exit(echo_main(argc, argv));
}
