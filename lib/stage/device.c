/* device.c - see device.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/stage/device.h"

#include "kernels/cuda/plugin.h"
#include "lib/base/str.h"

/* 1 with d filled, 0 for a CPU path, -1. */
static int device_of(struct cuda_device *d, const struct kern *k, struct err *e) {
    const char *colon = strchr(k->name, ':');
    int64_t index;
    if (!colon || !str_to_i64(colon + 1, &index)) return 0;
    const struct cuda_plugin *p = cuda_load(e);
    if (!p) return -1;
    return p->describe(d, (int)index, e) < 0 ? -1 : 1;
}

int device_text(char out[DEVICE_TEXT_MAX], const struct kern *k, struct err *e) {
    struct cuda_device d;
    const int rc = device_of(&d, k, e);
    out[0] = 0;
    if (rc < 1) return rc;
    snprintf(out, DEVICE_TEXT_MAX, "%s, %s, %.1f GiB%s", d.name, d.arch,
             (double)d.memory_bytes / 0x1p30,
             strcmp(d.arch, "emulated") ? "" : ": EMULATED, for tests only");
    return 0;
}

static json_t *device_json(const struct cuda_device *d) {
    json_t *o = json_object();
    json_object_set_new(o, "name", json_string(d->name));
    json_object_set_new(o, "arch", json_string(d->arch));
    json_object_set_new(o, "memory_bytes", json_integer((json_int_t)d->memory_bytes));
    json_object_set_new(o, "free_bytes", json_integer((json_int_t)d->free_bytes));
    return o;
}

int device_plan(json_t *out, const struct kern *k, struct err *e) {
    struct cuda_device d;
    int rc = device_of(&d, k, e);
    if (rc < 1) return rc;
    const struct cuda_plugin *p = cuda_load(e);
    const int n = p->count(e);
    json_t *list = json_array();
    for (int i = 0; i < n && rc >= 0; i++) {
        rc = p->describe(&d, i, e);
        if (rc >= 0) json_array_append_new(list, device_json(&d));
    }
    json_object_set_new(out, "devices", list);
    return n < 0 || rc < 0 ? -1 : 0;
}

json_t *device_all(void) {
    struct err e = { 0 };
    json_t *o = json_object(), *list = json_array();
    const struct cuda_plugin *p = cuda_load(&e);
    const int n = p ? p->count(&e) : -1;
    for (int i = 0; i < n; i++) {
        struct cuda_device d;
        if (p->describe(&d, i, &e) < 0) break;
        json_t *one = device_json(&d), *peers = json_array();
        json_object_set_new(one, "pci", json_string(d.pci));
        for (int k = 0; k < n; k++)
            if (d.peers >> k & 1) json_array_append_new(peers, json_integer(k));
        json_object_set_new(one, "peers", peers);
        json_array_append_new(list, one);
    }
    if (p) json_object_set_new(o, "versions", json_string(p->versions));
    json_object_set_new(o, "devices", list);
    if (e.text[0]) json_object_set_new(o, "error", json_string(e.text));
    return o;
}
