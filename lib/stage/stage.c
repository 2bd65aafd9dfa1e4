/* stage.c - see stage.h.
 *
 * Knows: the command line, the order in which a stage starts and ends, beats, signals.
 * Does not know: how a setting is bound (conf.c), what --help and --describe print (describe.c).
 * One stage a process: signal handlers need a place to write to, so its private state is a static.
 * Order: command line, printing and leaving, ports, signals, start, ready and beats, end.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/stage/stage.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#include "lib/base/clock.h"
#include "lib/base/log.h"
#include "lib/stage/conf.h"
#include "lib/stage/describe.h"
#include "lib/stage/device.h"

#ifndef QERL_COMMIT
#define QERL_COMMIT "unknown"
#endif

enum { BEAT_MS = 500, PORTS_MAX = 16 };

static struct {
    struct stage *s;
    struct settings settings;        /* file, then --set */
    const char *url[PORTS_MAX];      /* from the command line, lent by argv */
    const char *conf_file, *beat_url;
    int ready_fd;                    /* -1 = nobody waits */
    bool describe, devices, plan, help, version;
    char state[8];                   /* last told */
    char *metrics;                   /* last told */
    int64_t beat_at_ms;
    volatile sig_atomic_t stopping;
} own;

/* ---- command line ---- */

struct args {
    int argc, at;
    char **argv;
    struct stage *s;
};

static int take_port(struct args *a, const char *value, bool output) {
    const struct stage_about *about = a->s->about;
    const char *option = output ? "--out" : "--in", *equals = strchr(value, '=');
    if (!equals || equals == value)
        return complain(&a->s->err, NULL, "%s '%s': must be PORT=URL", option, value);
    char name[64];
    snprintf(name, sizeof name, "%.*s", (int)(equals - value), value);
    const struct setting from = { .name = name, .from = option };
    const struct stage_port *p = port_find(about, name, output, &from, &a->s->err);
    if (!p) return -1;
    own.url[p - about->ports] = equals + 1;
    return 0;
}

static int take_fd(struct args *a, const char *value) {
    int64_t fd;
    if (!str_to_i64(value, &fd) || fd < 0 || fd > 1 << 20 || fcntl((int)fd, F_GETFD) < 0)
        return complain(&a->s->err, NULL,
                        "--ready-fd '%s': must be the number of an open descriptor", value);
    fcntl((int)fd, F_SETFD, FD_CLOEXEC);
    own.ready_fd = (int)fd;
    return 0;
}

static int take_id(struct args *a, const char *value) {
    size_t n = strlen(value);
    static const char good[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-";
    if (!n || n >= sizeof a->s->id || strspn(value, good) != n)
        return complain(&a->s->err, NULL,
                        "--id '%s': must be 1 to %zu letters, digits, '_', '.' or '-'", value,
                        sizeof a->s->id - 1);
    snprintf(a->s->id, sizeof a->s->id, "%s", value);
    return 0;
}

enum option {
    OPT_CONF,
    OPT_SET,
    OPT_IN,
    OPT_OUT,
    OPT_ID,
    OPT_READY,
    OPT_BEAT,
    OPT_RANK,                        /* between processes of one stage, not for people: rank.c */
    OPT_DESCRIBE,
    OPT_DEVICES,
    OPT_PLAN,
    OPT_HELP,
    OPT_VERSION,
    OPT_COUNT
};
static const char *const option_name[OPT_COUNT] = { "-c",     "--set",      "--in",
                                                    "--out",  "--id",       "--ready-fd",
                                                    "--beat", "--rank",     "--describe",
                                                    "--devices", "--plan",  "--help",
                                                    "--version" };

/* "1:5": rank 1, memory of the ranks on descriptor 5. */
static int take_rank(struct args *a, const char *value) {
    char *end = NULL;
    const long rank = strtol(value, &end, 10), fd = *end == ':' ? strtol(end + 1, &end, 10) : -1;
    if (*end || rank < 1 || fd < 0 || fcntl((int)fd, F_GETFD) < 0)
        return complain(&a->s->err, NULL, "--rank '%s' is for processes of one stage", value);
    a->s->rank = (int)rank;
    a->s->rank_fd = (int)fd;
    return 0;
}

static int take_option(struct args *a, enum option o, const char *value) {
    switch (o) {
    case OPT_CONF:
        if (own.conf_file) return complain(&a->s->err, NULL, "-c is given twice");
        own.conf_file = value;
        return 0;
    case OPT_SET: return settings_arg(&own.settings, value, &a->s->err);
    case OPT_IN: return take_port(a, value, false);
    case OPT_OUT: return take_port(a, value, true);
    case OPT_ID: return take_id(a, value);
    case OPT_READY: return a->s->rank ? 0 : take_fd(a, value);
    case OPT_RANK: return take_rank(a, value);
    case OPT_BEAT: own.beat_url = value; return 0;
    case OPT_DESCRIBE: own.describe = true; return 0;
    case OPT_DEVICES: own.devices = true; return 0;
    case OPT_PLAN: own.plan = true; return 0;
    case OPT_HELP: own.help = true; return 0;
    case OPT_VERSION: own.version = true; return 0;
    case OPT_COUNT: break;
    }
    return -1;
}

/* "--name VALUE" or "--name=VALUE"; -1 after a complaint. */
static int take_arg(struct args *a) {
    const char *arg = a->argv[a->at++];
    size_t n = str_starts(arg, "--") ? strcspn(arg, "=") : strlen(arg);
    enum option o = OPT_CONF;
    if (strcmp(arg, "-h") == 0) return take_option(a, OPT_HELP, NULL);
    while (o < OPT_COUNT && (strlen(option_name[o]) != n || memcmp(option_name[o], arg, n) != 0))
        o++;
    if (o == OPT_COUNT) {
        const char *near = str_nearest(arg, option_name, OPT_COUNT);
        return complain(&a->s->err, NULL, "unknown %s '%s'%s%s%s",
                        arg[0] == '-' ? "option" : "argument", arg, near ? ", did you mean '" : "",
                        near ? near : "", near ? "'?" : "");
    }
    bool takes = o < OPT_DESCRIBE;
    if (!takes && arg[n]) return complain(&a->s->err, NULL, "%s takes no value", option_name[o]);
    if (!takes) return take_option(a, o, NULL);
    if (arg[n]) return take_option(a, o, arg + n + 1);
    if (a->at == a->argc) return complain(&a->s->err, NULL, "%s needs a value", option_name[o]);
    return take_option(a, o, a->argv[a->at++]);
}

/* ---- printing and leaving ---- */

static void leave(int code) __attribute__((noreturn));
static void leave(int code) {
    fflush(stdout);
    settings_release(&own.settings);
    exit(code);
}

/* The key that decides how much a stage holds at once, NULL where there is none. */
static const char *memory_key(const struct stage_about *about) {
    static const char *const holds[] = { ".rows", ".micro_tokens" };
    for (const struct stage_key *const *t = about->keys; *t; t++)
        for (const struct stage_key *k = *t; k->name; k++)
            for (size_t i = 0; i < COUNT_OF(holds); i++)
                if (str_ends(k->name, holds[i])) return k->name;
    return NULL;
}

static void print_error(const struct stage *s) {
    if (s->err.text[0]) fprintf(stderr, "qerl-%s: %s\n", s->about->name, s->err.text);
}

/* Errors of command line and configuration: each on its own line, then where to read on. */
static void refuse(struct stage *s, int code) __attribute__((noreturn));
static void refuse(struct stage *s, int code) {
    fprintf(stderr, "%s\n", s->err.text);
    fprintf(stderr, "qerl-%s: not started; options, keys and ports: qerl-%s --help\n",
            s->about->name, s->about->name);
    conf_release(s->conf, s->about);
    free(s->conf);
    leave(code);
}

static void print_json(json_t *o) {
    char *text = json_dumps(o, JSON_INDENT(2) | JSON_PRESERVE_ORDER | JSON_REAL_PRECISION(15));
    puts(text);
    free(text);
    json_decref(o);
}

static void plan_and_leave(struct stage *s) __attribute__((noreturn));
static void plan_and_leave(struct stage *s) {
    json_t *o = json_object();
    json_object_set_new(o, "stage", json_string(s->about->name));
    struct err wrong = { 0 };
    if (s->about->plan && s->about->plan(s->conf, o, &wrong) < 0) {
        json_decref(o);
        conf_place(&s->err, s->about, &own.settings, wrong.text);
        refuse(s, wrong.code ? wrong.code : EXIT_CONFIG);
    }
    if (json_object_get(o, "devices") && memory_key(s->about))
        json_object_set_new(o, "memory_key", json_string(memory_key(s->about)));
    print_json(o);
    conf_release(s->conf, s->about);
    free(s->conf);
    leave(EXIT_DONE);
}

/* ---- ports ---- */

/* The URL of a port and who gave it: command line, --set, file. NULL = nobody, "" = closed on
 * purpose. Who gives any port on the command line runs the stage by hand: the sockets in a file
 * belong to a run, which is over or not his, and stay closed. */
static const char *port_url(int i, int *blame) {
    char key[80];
    const struct stage_port *p = &own.s->about->ports[i];
    *blame = EXIT_USAGE;
    if (own.url[i]) return own.url[i];
    snprintf(key, sizeof key, "%s.%s", p->output ? "out" : "in", p->name);
    const struct setting *v = settings_find(&own.settings, key);
    if (v && v->line) *blame = EXIT_CONFIG;
    for (int k = 0; v && v->line && str_starts(v->text, "zmq+") && k < PORTS_MAX; k++)
        if (own.url[k]) return "";
    return v ? v->text : NULL;
}

bool stage_linked(int port) {
    int blame;
    const char *url = port_url(port, &blame);
    return url && *url;
}

/* A stage with one required input reads stdin, one with one required output writes stdout, if
 * nothing else was said. */
static bool takes_dash(const struct stage_about *about, bool output) {
    int required = 0, open = 0, blame;
    for (int i = 0; about->ports[i].name; i++) {
        if (about->ports[i].output != output) continue;
        const char *url = port_url(i, &blame);
        required += about->ports[i].required;
        open += url && strcmp(url, "-") == 0;
    }
    return required == 1 && open == 0 && (output || !isatty(STDIN_FILENO));
}

static void port_missing(struct stage *s, const struct stage_port *p) {
    complain(&s->err, NULL,
             "port '%s' (%s, %s) is open: give --%s %s=URL, like --%s %s=file:%s.jsonl, or '%s.%s "
             "= URL' in "
             "the configuration",
             p->name, p->output ? "output" : "input", p->help ? p->help : "",
             p->output ? "out" : "in", p->name, p->output ? "out" : "in", p->name, p->name,
             p->output ? "out" : "in", p->name);
}

static const char *choose_urls(struct stage *s, const char *url[PORTS_MAX], int blame[PORTS_MAX]) {
    const struct stage_port *ports = s->about->ports;
    const char *dash[2] = { NULL, NULL };
    for (int i = 0; ports && ports[i].name; i++) {
        url[i] = port_url(i, &blame[i]);
        if (!url[i] && ports[i].required && takes_dash(s->about, ports[i].output)) url[i] = "-";
        if (url[i] && !*url[i]) url[i] = NULL;
        if (!url[i] && ports[i].required) port_missing(s, &ports[i]);
        if (!url[i] || strcmp(url[i], "-") != 0) continue;
        if (dash[ports[i].output])
            complain(&s->err, NULL, "ports '%s' and '%s' cannot both be %s", dash[ports[i].output],
                     ports[i].name, ports[i].output ? "stdout" : "stdin");
        dash[ports[i].output] = ports[i].name;
    }
    return s->err.text[0] ? NULL : "";
}

static void open_ports(struct stage *s) {
    const char *url[PORTS_MAX] = { NULL };
    int blame[PORTS_MAX] = { 0 };
    if (!choose_urls(s, url, blame)) refuse(s, EXIT_USAGE);
    for (int i = 0; s->about->ports && s->about->ports[i].name; i++) {
        const struct stage_port *p = &s->about->ports[i];
        struct link_opts o = { .name = p->name,
                               .kind = p->kind,
                               .bind = p->bind,
                               .output = p->output,
                               .expected = p->record,
                               .identity = p->kind == LINK_KIND_DEALER ? s->id : NULL };
        s->waits_for = p->name;          /* opening a FIFO waits for its other end */
        if (url[i] && link_open(&s->link[i], url[i], &o, &s->err) < 0) stage_die(s, blame[i]);
    }
    s->waits_for = "";
    struct link_opts o = {
        .name = "beat", .kind = LINK_KIND_DEALER, .output = true, .identity = s->id
    };
    if (own.beat_url && link_open(&s->beat, own.beat_url, &o, &s->err) < 0)
        stage_die(s, EXIT_USAGE);
}

/* ---- signals ---- */

static void on_stop(int signo) {
    (void)signo;
    own.stopping = 1;
}

/* Only write(2) and own digits: this may interrupt anything. */
static size_t put_text(char *to, size_t at, size_t size, const char *text) {
    while (*text && at < size) to[at++] = *text++;
    return at;
}

static size_t put_count(char *to, size_t at, size_t size, int64_t v) {
    char digits[24];
    int n = 0;
    if (v < 0) at = put_text(to, at, size, "-");
    for (uint64_t u = v < 0 ? 0 - (uint64_t)v : (uint64_t)v; u || !n; u /= 10)
        digits[n++] = (char)('0' + u % 10);
    while (n && at < size) to[at++] = digits[--n];
    return at;
}

static void on_usr1(int signo) {
    (void)signo;
    int kept = errno;
    const struct stage *s = own.s;
    char line[256];
    size_t at = 0, size = sizeof line - 1;
    const char *waits = s->waits_for;
    at = put_text(line, at, size, s->id);
    at = put_text(line, at, size, waits && *waits ? ": waits for " : ": working");
    at = put_text(line, at, size, waits ? waits : "");
    at = put_text(line, at, size, ", progress ");
    at = put_count(line, at, size, s->progress);
    at = put_text(line, at, size, ", step ");
    at = put_count(line, at, size, s->step);
    line[at++] = '\n';
    if (write(STDERR_FILENO, line, at) < 0) at = 0;
    errno = kept;
}

static void catch(int signo, void (*handler)(int), int flags) {
    struct sigaction a = { .sa_handler = handler, .sa_flags = flags };
    sigemptyset(&a.sa_mask);
    sigaction(signo, &a, NULL);
}

/* No SA_RESTART for the stopping ones: a stage asleep in a wait must wake. */
static void catch_signals(const struct stage *s) {
    catch(SIGTERM, s->rank ? SIG_IGN : on_stop, 0);
    /* the second one ends at once */
    catch(SIGINT, s->rank ? SIG_IGN : on_stop, s->rank ? 0 : (int)SA_RESETHAND);
    catch(SIGUSR1, on_usr1, SA_RESTART);
    catch(SIGPIPE, SIG_IGN, 0);
    /* who was started with it ignored would never hear how a rank ended */
    catch(SIGCHLD, SIG_DFL, 0);
    /* a full disk is an error of write, not a death */
    catch(SIGXFSZ, SIG_IGN, 0);
}

/* ---- start ---- */

static void read_command_line(struct stage *s, int argc, char **argv) {
    struct args a = { argc, 1, argv, s };
    while (a.at < argc) take_arg(&a);
    if (own.help) {
        describe_help(stdout, s->about);
        leave(EXIT_DONE);
    }
    if (own.version) {
        printf("qerl-%s %s\n", s->about->name, QERL_COMMIT);
        leave(EXIT_DONE);
    }
    if (s->err.text[0]) refuse(s, EXIT_USAGE);
    if (own.describe) {
        print_json(describe_json(s->about));
        leave(EXIT_DONE);
    }
    if (own.devices) {
        print_json(device_all());
        leave(EXIT_DONE);
    }
}

/* The file is read first and --set added behind it: the last value of a name wins. */
static void read_configuration(struct stage *s) {
    struct settings args = own.settings;
    own.settings = (struct settings){ 0 };
    if (own.conf_file) settings_read(&own.settings, own.conf_file, &s->err);
    for (int i = 0; i < args.n; i++)
        settings_add(&own.settings, args.v[i].name, args.v[i].text, args.v[i].from, 0);
    settings_release(&args);
    int rc = conf_bind(s->conf, s->about, &own.settings, &s->err);
    struct err wrong = { 0 };
    if (rc == 0 && s->about->check && s->about->check(s->conf, &wrong) < 0)
        conf_place(&s->err, s->about, &own.settings, wrong.text);
    if (s->err.text[0]) refuse(s, wrong.code ? wrong.code : EXIT_CONFIG);
}

/* "learner" -> "learner.1" in logs. */
static void become_rank(struct stage *s) {
    const size_t n = strlen(s->id);
    snprintf(s->id + n, sizeof s->id - n, ".%d", s->rank);
}

void stage_open(struct stage *s, int argc, char **argv, const struct stage_about *about) {
    *s = (struct stage){ .about = about, .waits_for = "", .argc = argc, .argv = argv };
    settings_release(&own.settings);
    memset(&own, 0, sizeof own);
    own.s = s;
    own.ready_fd = -1;
    snprintf(s->id, sizeof s->id, "%s", about->name);
    read_command_line(s, argc, argv);
    s->conf = mem_alloc(about->conf_bytes);
    read_configuration(s);
    if (own.plan) plan_and_leave(s);
    if (s->rank) become_rank(s);
    log_open(s->id, LOG_LEVEL_INFO);
    catch_signals(s);
    if (s->rank) return;
    open_ports(s);
    stage_beat(s, "start", NULL);
}

/* ---- ready and beats ---- */

static int64_t now_ms(void) { return (int64_t)(clock_seconds() * 1e3); }

/* The cores this process may use, "0-1,4". */
static void cpu_list(struct str *out) {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) < 0) return;
    for (int i = 0; i < CPU_SETSIZE; i++) {
        if (!CPU_ISSET(i, &set)) continue;
        int last = i;
        while (last + 1 < CPU_SETSIZE && CPU_ISSET(last + 1, &set)) last++;
        str_printf(out, last > i ? "%s%d-%d" : "%s%d", out->len ? "," : "", i, last);
        i = last;
    }
}

void stage_ready(struct stage *s) {
    /* what the launcher gave, only reported */
    const char *gpus = getenv("CUDA_VISIBLE_DEVICES");
    struct str cpus = { 0 }, metrics = { 0 };
    cpu_list(&cpus);
    str_puts(&metrics, "{\"cpus\":");
    json_quote(&metrics, cpus.s ? cpus.s : "", cpus.len);
    str_puts(&metrics, ",\"gpus\":");
    json_quote(&metrics, gpus ? gpus : "", gpus ? strlen(gpus) : 0);
    if (s->device && *s->device) {
        str_puts(&metrics, ",\"device\":");
        json_quote(&metrics, s->device, strlen(s->device));
    }
    if (s->ranks) str_printf(&metrics, ",\"ranks\":%d", s->ranks);
    str_puts(&metrics, "}");
    if (own.ready_fd >= 0) {
        if (write(own.ready_fd, "ready\n", 6) != 6)
            log_warn("nobody reads --ready-fd: %s", strerror(errno));
        close(own.ready_fd);
        own.ready_fd = -1;
    }
    stage_beat(s, "ready", metrics.s);
    log_info("ready: cores %s, GPUs %s", cpus.s ? cpus.s : "unknown",
             gpus && *gpus ? gpus : "none given");
    str_release(&cpus);
    str_release(&metrics);
}

bool stage_stopping(const struct stage *s) {
    (void)s;
    return own.stopping;
}

/* Metrics that say something new go out at once: a step's numbers must not fall between two
 * beats. */
void stage_beat(struct stage *s, const char *state, const char *metrics) {
    int64_t now = now_ms();
    bool news = strncmp(state, own.state, sizeof own.state - 1) != 0;
    bool numbers = metrics && (!own.metrics || strcmp(metrics, own.metrics) != 0);
    if (!s->beat || (!news && !numbers && now - own.beat_at_ms < BEAT_MS)) return;
    struct rec r = { .type = REC_BEAT };
    r.beat = (struct rec_beat){
        .stage = s->id,
        .pid = getpid(),
        .state = (char *)(uintptr_t)state,
        .waits_for = (char *)(uintptr_t)s->waits_for,
        .progress = s->progress,
        .step = s->step,
        .metrics = (char *)(uintptr_t)(metrics ? metrics : ""),
    };
    struct err e = { 0 };
    /* a launcher that is gone is no news */
    if (link_send(s->beat, &r, NULL, 0, &e) < 0) log_debug("beat: %s", e.text);
    own.beat_at_ms = now;
    snprintf(own.state, sizeof own.state, "%s", state);
    if (numbers) {
        free(own.metrics);
        own.metrics = mem_dup(metrics);
    }
}

/* ---- end ---- */

static void end(struct stage *s) {
    for (int i = 0; i < PORTS_MAX; i++) link_close(&s->link[i]);
    link_close(&s->beat);
    conf_release(s->conf, s->about);
    free(s->conf);
    s->conf = NULL;
    free(own.metrics);
    own.metrics = NULL;
    settings_release(&own.settings);
}

/* A device that is full: which it is, and what of this stage to turn. */
static void say_what_to_turn(struct stage *s) {
    const char *gpus = getenv("CUDA_VISIBLE_DEVICES"), *key = memory_key(s->about);
    if (!strstr(s->err.text, "out of memory on ")) return;
    const size_t used = strlen(s->err.text);
    snprintf(s->err.text + used, sizeof s->err.text - used, "%s%s%s%s%s%s",
             gpus ? " (CUDA_VISIBLE_DEVICES is '" : "", gpus ? gpus : "", gpus ? "')" : "",
             key ? "; less is needed with a smaller " : "", key ? key : "",
             ", or place the stage on a GPU with more memory");
}

void stage_die(struct stage *s, int code) {
    say_what_to_turn(s);
    print_error(s);
    struct str why = { 0 };
    str_puts(&why, "{\"error\":");
    json_quote(&why, s->err.text, strlen(s->err.text));
    str_puts(&why, "}");
    s->waits_for = "";
    stage_beat(s, "done", why.s);
    str_release(&why);
    if (s->err.code) code = s->err.code;
    end(s);
    leave(code);
}

int stage_close(struct stage *s, int code) {
    s->waits_for = "";
    stage_beat(s, "done", NULL);
    end(s);
    return code;
}
