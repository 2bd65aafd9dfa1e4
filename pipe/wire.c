/* wire.c - links between ports, and what each stage is told: its configuration file and the URL of
 * each port.
 *
 * Order: which port a link means, whether both ends fit, open ports, conf files, the resolved file.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/resolve.h"

static int port_index(const struct pipe_stage *s, const char *name) {
    for (int i = 0; i < s->about.ports; i++)
        if (strcmp(s->about.port[i].name, name) == 0) return i;
    return -1;
}

static struct pipe_stage *find_stage(struct pipeline *p, const struct lang_link *k,
                                     const char *name) {
    struct pipe_stage *s = pipeline_stage(p, name);
    if (s) return s;
    const char *names[PIPELINE_STAGES_MAX];
    for (int i = 0; i < p->stages; i++) names[i] = p->stage[i].name;
    const char *near = str_nearest(name, names, (size_t)p->stages);
    if (near)
        lang_error(&p->lang, k->at, "unknown stage '%s' in a link; did you mean '%s'?", name, near);
    else
        lang_error(&p->lang, k->at, "unknown stage '%s' in a link: there is no [stage %s]", name,
                   name);
    return NULL;
}

static void unknown_port(struct pipeline *p, struct origin at, const struct pipe_stage *s,
                         const char *port) {
    const char *names[PIPELINE_PORTS_MAX];
    struct str all;
    str_init(&all);
    for (int i = 0; i < s->about.ports; i++) {
        names[i] = s->about.port[i].name;
        str_printf(&all, "%s%s", i ? ", " : "", names[i]);
    }
    const char *near = str_nearest(port, names, (size_t)s->about.ports);
    if (near)
        lang_error(&p->lang, at, "stage '%s' has no port '%s'; did you mean '%s'?", s->name, port,
                   near);
    else
        lang_error(&p->lang, at, "stage '%s' has no port '%s'; it has %s", s->name, port,
                   all.len ? all.s : "none");
    str_release(&all);
}

static int find_port(struct pipeline *p, const struct lang_link *k, const struct pipe_stage *s,
                     const char *port) {
    int i = port_index(s, port);
    if (i < 0) unknown_port(p, k->at, s, port);
    return i;
}

static bool kinds_fit(const char *a, const char *b) {
    static const char *const pair[][2] = { { "push", "pull" },
                                           { "router", "dealer" },
                                           { "pub", "sub" } };
    for (size_t i = 0; i < COUNT_OF(pair); i++)
        if ((!strcmp(a, pair[i][0]) && !strcmp(b, pair[i][1])) ||
            (!strcmp(a, pair[i][1]) && !strcmp(b, pair[i][0])))
            return true;
    return false;
}

/* Both ends are known: do direction, record, socket kinds and binding fit each other and what the
 * file says? */
static void check_ends(struct pipeline *p, const struct lang_link *k, const struct pipe_stage *a,
                       const struct about_port *out,
                       const struct pipe_stage *b, const struct about_port *in) {
    struct lang *l = &p->lang;
    if (!out->output)
        lang_error(l, k->at, "'%s.%s' is an input: a link goes from an output to an input", a->name,
                   out->name);
    if (in->output)
        lang_error(l, k->at, "'%s.%s' is an output: a link goes from an output to an input",
                   b->name, in->name);
    bool any = strcmp(out->record, "any") == 0 || strcmp(in->record, "any") == 0;
    if (!any && strcmp(out->record, in->record) != 0)
        lang_error(l, k->at, "'%s.%s' carries %s, '%s.%s' reads %s: these ports cannot be linked",
                   a->name, out->name, out->record, b->name, in->name, in->record);
    else if (!kinds_fit(out->kind, in->kind) || out->bind == in->bind)
        lang_error(l, k->at, "'%s.%s' (%s) and '%s.%s' (%s) cannot talk to each other", a->name,
                   out->name, out->kind, b->name, in->name, in->kind);
    else if (strcmp(k->from_kind, out->kind) != 0 || strcmp(k->to_kind, in->kind) != 0)
        lang_error(l, k->at, "the link says %s/%s, but these ports are %s/%s", k->from_kind,
                   k->to_kind, out->kind, in->kind);
    const struct pipe_stage *binder = out->bind ? a : b;
    if (binder->processes > 1)
        lang_error(l, k->at,
                   "stage '%s' waits for connections on '%s', so it cannot have %d replicas",
                   binder->name, out->bind ? out->name : in->name, binder->processes);
}

static void take_port(struct pipeline *p, const struct lang_link *k, struct pipe_stage *s,
                      int port) {
    const struct about_port *q = &s->about.port[port];
    if (s->url[port])
        lang_error(&p->lang, k->at, "port '%s.%s' has a link and an %s.%s", s->name, q->name,
                   q->output ? "out" : "in", q->name);
    else if (s->link[port] && !q->bind)
        lang_error(&p->lang, k->at, "port '%s.%s' is linked twice, first in line %d", s->name,
                   q->name, s->link[port]->at.line);
    s->link[port] = k;
}

static void read_ports(struct pipeline *p, struct pipe_stage *s) {
    size_t n = strlen(s->name);
    for (int i = 0; i < p->lang.values; i++) {
        const struct lang_value *v = &p->lang.value[i];
        if (strncmp(v->name, s->name, n) != 0 || v->name[n] != '.') continue;
        const char *rest = v->name + n + 1;
        bool out = str_starts(rest, "out.");
        if (!out && !str_starts(rest, "in.")) continue;
        const char *port = strchr(rest, '.') + 1;
        int at = port_index(s, port);
        if (at < 0) unknown_port(p, v->at, s, port);
        else if (s->about.port[at].output != out)
            lang_error(&p->lang, v->at, "port '%s' of stage '%s' is an %s: write %s.%s", port,
                       s->name, out ? "input" : "output", out ? "in" : "out", port);
        else s->url[at] = v->text;
    }
}

/* credit and hwm are keys of one of the two stages, if one declares them; an option that nobody
 * reads is an error. */
static void link_option(struct pipeline *p, const struct lang_link *k, const char *option, int n,
                        struct pipe_stage *a, struct pipe_stage *b) {
    struct pipe_stage *both[2] = { a, b };
    char name[600], text[32];
    if (n < 0) return;
    for (int i = 0; i < 2; i++) {
        snprintf(name, sizeof name, "%s.%s", both[i]->about.name, option);
        if (!about_key(&both[i]->about, name)) continue;
        snprintf(name, sizeof name, "%s.%s", both[i]->name, option);
        const struct lang_value *v = lang_get(&p->lang, name);
        snprintf(text, sizeof text, "%d", n);
        if (v && strcmp(v->text, text) != 0)
            lang_error(&p->lang, k->at, "'%s=%d' differs from '%s = %s': keep one", option, n, name,
                       v->text);
        if (v) return;
        if (p->lang.values % 32 == 0)
            p->lang.value = mem_grow(p->lang.value,
                                     (size_t)(p->lang.values + 32) * sizeof *p->lang.value);
        p->lang.value[p->lang.values++] = (struct lang_value){
            lang_keep(&p->lang, name, strlen(name)), lang_keep(&p->lang, text, strlen(text)), k->at
        };
        return;
    }
    if (strcmp(option, "hwm") == 0 && n == 64) return;       /* what every socket has */
    lang_error(&p->lang, k->at, "'%s=%d' is read by neither '%s' nor '%s': remove it", option, n,
               a->name, b->name);
}

void pipeline_wire(struct pipeline *p) {
    for (int i = 0; i < p->stages; i++) read_ports(p, &p->stage[i]);
    for (int i = 0; i < p->lang.links; i++) {
        const struct lang_link *k = &p->lang.link[i];
        struct pipe_stage *a = find_stage(p, k, k->from), *b = find_stage(p, k, k->to);
        if (!a || !b) continue;
        int out = find_port(p, k, a, k->from_port), in = find_port(p, k, b, k->to_port);
        if (out < 0 || in < 0) continue;
        check_ends(p, k, a, &a->about.port[out], b, &b->about.port[in]);
        take_port(p, k, a, out);
        take_port(p, k, b, in);
        link_option(p, k, "credit", k->credit, a, b);
        link_option(p, k, "hwm", k->hwm, a, b);
    }
    for (int i = 0; i < p->stages; i++)
        for (int j = 0; j < p->stage[i].about.ports; j++) {
            const struct pipe_stage *s = &p->stage[i];
            const struct about_port *q = &s->about.port[j];
            if (q->required && !s->url[j] && !s->link[j])
                lang_error(&p->lang, s->at,
                           "port '%s.%s' is open: link it in [links], or set %s.%s = URL", s->name,
                           q->name, q->output ? "out" : "in", q->name);
        }
}

/* ---- what a stage is told ---- */

static void conf_line(struct pipe_stage *s, struct origin at, const char *name, const char *text) {
    s->conf_at = mem_grow(s->conf_at, (size_t)(s->conf_lines + 1) * sizeof *s->conf_at);
    s->conf_at[s->conf_lines++] = at;
    str_printf(&s->conf, "%s = %s\n", name, text);
}

/* The binding end names the socket, so that several connecting ports can share it. */
static void socket_url(char *out, size_t size, const struct pipeline *p, const struct lang_link *k,
                       const char *ipc_dir) {
    const char *stage = k->from, *port = k->from_port;
    for (int i = 0; i < p->stages; i++) {
        bool here = strcmp(p->stage[i].name, k->to) == 0;
        const struct about_port *q = here ? about_port(&p->stage[i].about, k->to_port) : NULL;
        if (q && q->bind) stage = k->to, port = k->to_port;
    }
    snprintf(out, size, "zmq+ipc://%s/%s.%s", ipc_dir, stage, port);
}

/* On a GPU auto means its kernels; check_kernels has refused what does not fit. */
static const char *place_kernels(const struct pipe_stage *s, const char *text) {
    return s->place.choice[s->place.taken].gpu && strcmp(text, "auto") == 0 ? "cuda" : text;
}

static void stage_conf(struct pipeline *p, struct pipe_stage *s, const char *run_dir,
                       const char *run_id, const char *ipc_dir) {
    const struct origin given = { "launcher", 0 };
    str_clear(&s->conf);
    s->conf_lines = 0;
    for (int i = 0; i < s->about.keys; i++) {
        const struct about_key *k = &s->about.key[i];
        struct origin at;
        if (strcmp(k->name, "run.dir") == 0) conf_line(s, given, k->name, run_dir);
        else if (strcmp(k->name, "run.id") == 0) conf_line(s, given, k->name, run_id);
        else {
            struct str plain;
            struct err e = { 0 };
            const char *text = pipeline_value(p, s, k, &at);
            if (text && strcmp(k->name, "run.kernels") == 0) text = place_kernels(s, text);
            str_init(&plain);
            if (text && value_check(k, text, &plain, &e) == 0)
                conf_line(s, at, k->name, plain.s ? plain.s : "");
            str_release(&plain);
        }
    }
    for (int i = 0; i < s->about.ports; i++) {
        const struct about_port *q = &s->about.port[i];
        char name[300], url[600];
        snprintf(name, sizeof name, "%s.%s", q->output ? "out" : "in", q->name);
        if (s->link[i]) socket_url(url, sizeof url, p, s->link[i], ipc_dir);
        if (s->url[i]) conf_line(s, s->at, name, s->url[i]);
        else if (s->link[i]) conf_line(s, s->link[i]->at, name, url);
    }
}

void pipeline_conf(struct pipeline *p, const char *run_dir, const char *run_id,
                   const char *ipc_dir) {
    for (int i = 0; i < p->stages; i++) stage_conf(p, &p->stage[i], run_dir, run_id, ipc_dir);
}

/* ---- the resolved file ---- */

static void resolved_line(struct str *out, const char *key, const char *text, struct origin at) {
    char from[700], line[LANG_LINE_MAX];
    /* a default that the language cannot write */
    if (*text == '#' || strstr(text, " #") || strchr(text, '\n')) return;
    origin_text(from, sizeof from, at);
    snprintf(line, sizeof line, "%s = %s", key, text);
    str_printf(out, "%-44s # %s\n", line, from);
}

/* Values of one section as the language writes it; `done` marks names already written. */
static void resolved_section(const struct pipeline *p, struct str *out, const char *section,
                             const char *title) {
    size_t n = strlen(section);
    str_printf(out, "\n[%s]\n", title);
    for (int i = 0; i < p->lang.values; i++) {
        const struct lang_value *v = &p->lang.value[i];
        if (strncmp(v->name, section, n) == 0 && v->name[n] == '.' && !strchr(v->name + n + 1, '.'))
            resolved_line(out, v->name + n + 1, v->text, v->at);
    }
    for (int i = 0; i < p->stages; i++)
        for (int j = 0; j < p->stage[i].about.keys; j++) {
            const struct about_key *k = &p->stage[i].about.key[j];
            struct origin at;
            bool before = false;
            if (strncmp(k->name, section, n) != 0 || k->name[n] != '.' ||
                strchr(k->name + n + 1, '.'))
                continue;
            if (!strcmp(k->name, "run.dir") || !strcmp(k->name, "run.id") ||
                lang_get(&p->lang, k->name))
                continue;
            for (int o = 0; o < i; o++) before = before || about_key(&p->stage[o].about, k->name);
            const char *text = before ? NULL : pipeline_value(p, &p->stage[i], k, &at);
            if (text) resolved_line(out, k->name + n + 1, text, at);
        }
}

/* A stage's own section: every value "NAME.anything", launcher keys first, then defaults. */
static void resolved_stage(const struct pipeline *p, struct str *out, const struct pipe_stage *s) {
    size_t n = strlen(s->name), m = strlen(s->about.name);
    char number[32];
    static const struct origin by_default = { "default", 0 };
    const char *const own[] = { "exec", "place", "replicas", "restarts" };
    str_printf(out, "\n[stage %s]\n", s->name);
    for (size_t i = 0; i < COUNT_OF(own); i++) {
        char name[600];
        snprintf(name, sizeof name, "%s.%s", s->name, own[i]);
        if (lang_get(&p->lang, name)) continue;
        snprintf(number, sizeof number, "%d", i == 2 ? s->replicas : s->restarts);
        resolved_line(out, own[i],
                      i == 0   ? s->exec_asked
                      : i == 1 ? s->place_asked
                               : number,
                      by_default);
    }
    for (int i = 0; i < p->lang.values; i++) {
        const struct lang_value *v = &p->lang.value[i];
        if (strncmp(v->name, s->name, n) == 0 && v->name[n] == '.')
            resolved_line(out, v->name + n + 1, v->text, v->at);
    }
    for (int i = 0; i < s->about.keys; i++) {
        const struct about_key *k = &s->about.key[i];
        struct origin at;
        if (strncmp(k->name, s->about.name, m) != 0 || k->name[m] != '.') continue;
        const char *text = pipeline_value(p, s, k, &at);
        if (text && at.line == 0 && strcmp(at.file, "default") == 0)
            resolved_line(out, k->name + m + 1, text, at);
    }
}

static bool is_stage(const struct pipeline *p, const char *name, size_t n) {
    for (int i = 0; i < p->stages; i++)
        if (strlen(p->stage[i].name) == n && strncmp(p->stage[i].name, name, n) == 0) return true;
    return false;
}

/* Adds the section of a full name to the list unless it is there or belongs to a stage. */
static int add_section(const struct pipeline *p, char section[][200], int n, int most,
                       const char *name) {
    const char *dot = strrchr(name, '.'), *first = strchr(name, '.');
    if (n == most || is_stage(p, name, (size_t)(first - name))) return n;
    char text[200];
    snprintf(text, sizeof text, "%.*s", (int)(dot - name), name);
    for (int i = 0; i < n; i++)
        if (strcmp(section[i], text) == 0) return n;
    memcpy(section[n], text, sizeof text);
    return n + 1;
}

void pipeline_resolved(const struct pipeline *p, struct str *out) {
    enum { SECTIONS = 64 };
    char section[SECTIONS][200] = { "run" };
    int n = 1;
    str_puts(out, "pipe 1\n# what this run was told: every value with the file and line, option or "
                  "default that "
                  "said so\n");
    for (int i = 0; i < p->lang.values; i++)
        n = add_section(p, section, n, SECTIONS, p->lang.value[i].name);
    for (int i = 0; i < p->stages; i++)
        for (int j = 0; j < p->stage[i].about.keys; j++)
            n = add_section(p, section, n, SECTIONS, p->stage[i].about.key[j].name);
    for (int i = 0; i < n; i++) {
        resolved_section(p, out, section[i], section[i]);
        if (i == 0 && !lang_get(&p->lang, "run.name")) {
            bool read = false;
            for (int j = 0; j < p->stages; j++)
                read = read || about_key(&p->stage[j].about, "run.name");
            if (!read) resolved_line(out, "name", p->name, (struct origin){ "file name", 0 });
        }
    }
    for (int i = 0; i < p->stages; i++) resolved_stage(p, out, &p->stage[i]);
    if (p->lang.links) str_puts(out, "\n[links]\n");
    for (int i = 0; i < p->lang.links; i++) {
        const struct lang_link *k = &p->lang.link[i];
        char from[700];
        origin_text(from, sizeof from, k->at);
        str_printf(out, "%s.%s -> %s.%s : %s/%s", k->from, k->from_port, k->to, k->to_port,
                   k->from_kind, k->to_kind);
        if (k->credit > 0) str_printf(out, " credit=%d", k->credit);
        if (k->hwm > 0) str_printf(out, " hwm=%d", k->hwm);
        str_printf(out, "   # %s\n", from);
    }
}
