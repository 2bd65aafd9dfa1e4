/* about.c - see about.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/about.h"

#include <math.h>

#include "pipe/proc.h"

static const char *const type_name[] = { "int", "num", "bool", "text", "choice" };

const char *about_type_name(enum about_type t) { return type_name[t]; }

/* ["strict", "flexible"] -> "strict|flexible" */
static char *join_choices(const json_t *list) {
    struct str out;
    str_init(&out);
    str_add(&out, "", 0);
    for (size_t i = 0; i < json_array_size(list); i++) {
        const char *one = json_string_value(json_array_get(list, i));
        str_printf(&out, "%s%s", i ? "|" : "", one ? one : "");
    }
    return out.s;
}

static int read_key(struct about_key *k, json_t *o, const char *where, struct err *e) {
    const char *type = NULL;
    *k = (struct about_key){ .least = -INFINITY, .most = INFINITY, .help = "" };
    k->choices = join_choices(json_object_get(o, "choices"));
    if (json_need_str(o, "key", &k->name, where, e) < 0 ||
        json_need_str(o, "type", &type, where, e) < 0 ||
        json_may_str(o, "default", &k->def, where, e) < 0 ||
        json_may_str(o, "help", &k->help, where, e) < 0 ||
        json_may_num(o, "least", &k->least, where, e) < 0 ||
        json_may_num(o, "most", &k->most, where, e) < 0)
        return -1;
    if (!strchr(k->name, '.')) return err_set(e, "%s: key '%s' has no section", where, k->name);
    for (size_t i = 0; i < COUNT_OF(type_name); i++)
        if (strcmp(type, type_name[i]) == 0) {
            k->type = (enum about_type)i;
            return 0;
        }
    return err_set(e, "%s: key '%s' has the unknown type '%s'", where, k->name, type);
}

static int read_port(struct about_port *p, json_t *o, const char *where, struct err *e) {
    const char *direction = NULL;
    *p = (struct about_port){ .help = "" };
    if (json_need_str(o, "name", &p->name, where, e) < 0 ||
        json_need_str(o, "record", &p->record, where, e) < 0 ||
        json_need_str(o, "direction", &direction, where, e) < 0 ||
        json_need_str(o, "socket", &p->kind, where, e) < 0 ||
        json_may_str(o, "help", &p->help, where, e) < 0 ||
        json_may_bool(o, "bind", &p->bind, where, e) < 0 ||
        json_may_bool(o, "required", &p->required, where, e) < 0)
        return -1;
    p->output = strcmp(direction, "out") == 0;
    return 0;
}

static int read_about(struct about *a, const char *where, struct err *e) {
    json_t *keys = json_object_get(a->json, "keys"), *ports = json_object_get(a->json, "ports");
    a->summary = "";
    if (json_need_str(a->json, "stage", &a->name, where, e) < 0 ||
        json_may_str(a->json, "summary", &a->summary, where, e) < 0)
        return -1;
    if (!json_is_array(keys) || !json_is_array(ports))
        return err_set(e, "%s: needs 'keys' and 'ports'", where);
    a->key = mem_alloc((json_array_size(keys) + 1) * sizeof *a->key);
    a->port = mem_alloc((json_array_size(ports) + 1) * sizeof *a->port);
    for (size_t i = 0; i < json_array_size(keys); i++)
        if (read_key(&a->key[a->keys++], json_array_get(keys, i), where, e) < 0) return -1;
    for (size_t i = 0; i < json_array_size(ports); i++)
        if (read_port(&a->port[a->ports++], json_array_get(ports, i), where, e) < 0) return -1;
    return 0;
}

int about_ask(struct about *a, const char *exec, struct err *e) {
    const char *argv[] = { exec, "--describe", NULL };
    struct str out, talk;
    int status = 0;
    str_init(&out);
    str_init(&talk);
    *a = (struct about){ 0 };
    int rc = proc_capture(argv, &out, &talk, 60, &status, e);
    if (rc == 0 && status != 0)
        rc = err_set(e, "'%s --describe' ended with %d: %.400s", exec, status, talk.s);
    if (rc == 0) {
        char where[600];
        snprintf(where, sizeof where, "%.500s --describe", exec);
        a->json = json_parse(out.s, out.len, where, e);
        rc = a->json ? read_about(a, where, e) : -1;
    }
    str_release(&out);
    str_release(&talk);
    if (rc < 0) about_release(a);
    return rc;
}

void about_release(struct about *a) {
    json_decref(a->json);
    for (int i = 0; i < a->keys; i++) free(a->key[i].choices);
    free(a->key);
    free(a->port);
    *a = (struct about){ 0 };
}

const struct about_key *about_key(const struct about *a, const char *name) {
    for (int i = 0; i < a->keys; i++)
        if (strcmp(a->key[i].name, name) == 0) return &a->key[i];
    return NULL;
}

const struct about_port *about_port(const struct about *a, const char *name) {
    for (int i = 0; i < a->ports; i++)
        if (strcmp(a->port[i].name, name) == 0) return &a->port[i];
    return NULL;
}
