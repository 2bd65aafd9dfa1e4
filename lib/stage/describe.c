/* describe.c - see describe.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/stage/describe.h"

#include "kernels/kern.h"

static const char *const type_name[] = { [KEY_INT] = "int", [KEY_NUM] = "num", [KEY_BOOL] = "bool",
                                         [KEY_TEXT] = "text", [KEY_CHOICE] = "choice" };
static const char *const socket_name[] = {
    [LINK_KIND_PUSH] = "push",     [LINK_KIND_PULL] = "pull", [LINK_KIND_ROUTER] = "router",
    [LINK_KIND_DEALER] = "dealer", [LINK_KIND_PUB] = "pub",   [LINK_KIND_SUB] = "sub",
};

static bool ranged(const struct stage_key *k) {
    return (k->type == KEY_INT || k->type == KEY_NUM) && k->least < k->most;
}

static const char *record_name(const struct stage_port *p) {
    return p->record == REC_NONE ? "any" : rec_name[p->record];
}

/* ---- for programs ---- */

static json_t *bound(const struct stage_key *k, double v) {
    if (!ranged(k)) return json_null();
    return k->type == KEY_INT && v > -9.2e18 && v < 9.2e18 ? json_integer((json_int_t)v)
                                                           : json_real(v);
}

static json_t *choices_json(const struct stage_key *k) {
    json_t *a = json_array();
    for (const char *p = k->type == KEY_CHOICE ? k->choices : NULL; p;) {
        json_array_append_new(a, json_stringn(p, strcspn(p, "|")));
        p = strchr(p, '|');
        if (p) p++;
    }
    return a;
}

static json_t *key_json(const struct stage_key *k) {
    json_t *o = json_object();
    json_object_set_new(o, "key", json_string(k->name));
    json_object_set_new(o, "type", json_string(type_name[k->type]));
    json_object_set_new(o, "default", k->def ? json_string(k->def) : json_null());
    json_object_set_new(o, "least", bound(k, k->least));
    json_object_set_new(o, "most", bound(k, k->most));
    json_object_set_new(o, "choices", choices_json(k));
    json_object_set_new(o, "help", json_string(k->help ? k->help : ""));
    return o;
}

static json_t *port_json(const struct stage_port *p) {
    json_t *o = json_object();
    json_object_set_new(o, "name", json_string(p->name));
    json_object_set_new(o, "direction", json_string(p->output ? "out" : "in"));
    json_object_set_new(o, "record", json_string(record_name(p)));
    json_object_set_new(o, "socket", json_string(socket_name[p->kind]));
    json_object_set_new(o, "bind", json_boolean(p->bind));
    json_object_set_new(o, "required", json_boolean(p->required));
    json_object_set_new(o, "help", json_string(p->help ? p->help : ""));
    return o;
}

/* Kernel paths of this machine, the one that `auto` takes first. */
static json_t *kernels_json(void) {
    const char *names[8];
    struct kern k;
    struct err e = { 0 };
    json_t *all = json_array();
    if (kern_open(&k, "auto", NULL, &e) < 0) return all;
    json_array_append_new(all, json_string(k.name));
    for (int i = 0, n = kern_paths(names); i < n; i++)
        if (strcmp(names[i], k.name) != 0) json_array_append_new(all, json_string(names[i]));
    return all;
}

json_t *describe_json(const struct stage_about *about) {
    json_t *o = json_object(), *keys = json_array(), *ports = json_array();
    json_object_set_new(o, "stage", json_string(about->name));
    json_object_set_new(o, "summary", json_string(about->summary));
    for (int t = 0; about->keys && about->keys[t]; t++)
        for (const struct stage_key *k = about->keys[t]; k->name; k++)
            json_array_append_new(keys, key_json(k));
    for (const struct stage_port *p = about->ports; p && p->name; p++)
        json_array_append_new(ports, port_json(p));
    json_object_set_new(o, "keys", keys);
    json_object_set_new(o, "ports", ports);
    json_object_set_new(o, "kernels", kernels_json());
    return o;
}

/* ---- for people ---- */

static void help_key(FILE *to, const struct stage_key *k) {
    fprintf(to, "  %-28s %s\n", k->name, k->help ? k->help : "");
    fprintf(to, "  %-28s   ", "");
    if (k->type == KEY_CHOICE) fprintf(to, "%s", k->choices);
    else fprintf(to, "%s", type_name[k->type]);
    if (ranged(k)) fprintf(to, " %.15g..%.15g", k->least, k->most);
    if (!k->def) fprintf(to, ", must be given\n");
    else fprintf(to, ", default %s\n", *k->def ? k->def : "empty");
}

static void help_port(FILE *to, const struct stage_port *p) {
    fprintf(to, "  --%-3s %-22s %s (%s, %s%s%s)\n", p->output ? "out" : "in", p->name,
            p->help ? p->help : "", record_name(p), socket_name[p->kind],
            p->bind ? " that binds" : "", p->required ? ", required" : "");
}

void describe_help(FILE *to, const struct stage_about *about) {
    fprintf(to,
            "qerl-%s: %s\n\nusage: qerl-%s [-c FILE] [--set KEY=VALUE]... [--in PORT=URL]... "
            "[--out PORT=URL]...\n\n",
            about->name, about->summary, about->name);
    fputs("options:\n"
          "  -c FILE           configuration: lines 'section.name = value'\n"
          "  --set KEY=VALUE   wins over the file; may be repeated\n"
          "  --in, --out PORT=URL\n"
          "                    zmq+ipc://PATH, zmq+tcp://HOST:PORT, tape:FILE, file:FILE.jsonl, or "
          "- (stdin, stdout);\n"
          "                    wins over 'in.PORT = URL' and 'out.PORT = URL' in the file; empty = "
          "leave open\n"
          "  --id NAME         name in logs and records (default: the stage's name)\n"
          "  --ready-fd N      write \"ready\" and a newline to this descriptor when ready\n"
          "  --beat URL        tell a launcher how it goes\n"
          "  --describe        print keys and ports as JSON, and end\n"
          "  --devices         print the GPUs that this process may use as JSON, and end\n"
          "  --plan            print what a run would do as JSON, and end; starts nothing\n"
          "  --help, --version\n\n"
          "signals: TERM and INT stop cleanly (a second INT at once); USR1 prints what it waits "
          "for\n",
          to);
    if (about->keys && about->keys[0]) fputs("\nkeys:\n", to);
    for (int t = 0; about->keys && about->keys[t]; t++)
        for (const struct stage_key *k = about->keys[t]; k->name; k++) help_key(to, k);
    if (about->ports && about->ports[0].name)
        fputs("\nports (one required input may be stdin, one required output is stdout, unless "
              "given):\n",
              to);
    for (const struct stage_port *p = about->ports; p && p->name; p++) help_port(to, p);
    if (about->examples) fprintf(to, "\nexamples:\n%s", about->examples);
    fputs("\nexit codes: 0 done, 1 failed, 2 command line, 3 configuration, 4 the machine lacks "
          "something\n",
          to);
}
