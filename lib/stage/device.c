/* device.c - see device.h.
 * Order: in words, ranks.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/stage/device.h"

#include "kernels/cuda/plugin.h"
#include "lib/base/hash.h"
#include "lib/base/log.h"
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

bool device_is(const struct kern *k) { return str_starts(k->name, "cuda"); }

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
    json_object_set_new(o, "pci", json_string(d->pci));
    json_object_set_new(o, "memory_bytes", json_integer((json_int_t)d->memory_bytes));
    json_object_set_new(o, "free_bytes", json_integer((json_int_t)d->free_bytes));
    return o;
}

/* What computes, beside the program: the plugin, and the libraries that it found. */
static json_t *plugin_json(const struct cuda_plugin *p, int devices) {
    json_t *o = json_object();
    char sha[SHA256_HEX], nccl[16];
    json_object_set_new(o, "plugin", json_string(cuda_plugin_path()));
    if (sha256_file(cuda_plugin_path(), sha, NULL) == 0)
        json_object_set_new(o, "sha256", json_string(sha));
    json_object_set_new(o, "versions", json_string(p->versions));
    if (devices > 1 && p->ranks_version(nccl, NULL) == 0)
        json_object_set_new(o, "nccl", json_string(nccl));
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
    json_object_set_new(out, "cuda", plugin_json(p, n));
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
        for (int k = 0; k < n; k++)
            if (d.peers >> k & 1) json_array_append_new(peers, json_integer(k));
        json_object_set_new(one, "peers", peers);
        json_array_append_new(list, one);
    }
    if (p) json_object_set_new(o, "versions", json_string(p->versions));
    char nccl[16];
    if (n > 1 && p->ranks_version(nccl, NULL) == 0)
        json_object_set_new(o, "nccl", json_string(nccl));
    json_object_set_new(o, "devices", list);
    if (e.text[0]) json_object_set_new(o, "error", json_string(e.text));
    return o;
}

/* ---- ranks ---- */

struct device_ranks {
    const struct cuda_plugin *plugin;
    struct ranks *ranks;
    struct cuda_ranks *own;
};

int device_ranks_check(struct err *e) {
    char version[16];
    const struct cuda_plugin *p = cuda_load(e);
    if (!p) return -1;
    return p->ranks_version(version, e) < 0 ? err_wrap(e, "GPUs of one stage") : 0;
}

static int watch(void *ud, struct err *e) { return ranks_watch(ud, e); }

int device_ranks_open(struct device_ranks **out, struct ranks *ranks, struct kern *k, size_t piece,
                      struct err *e) {
    char id[CUDA_RANKS_ID_BYTES] = "", version[16];
    const struct cuda_plugin *p = cuda_load(e);
    if (device_ranks_check(e) < 0 || p->ranks_version(version, e) < 0 ||
        (ranks_own(ranks) == 0 && p->ranks_id(id, e) < 0))
        return -1;
    if (ranks_send(ranks, "NCCL's id", id, sizeof id, e) < 0) return -1;
    struct device_ranks *d = *out = mem_alloc(sizeof *d);
    *d = (struct device_ranks){ p, ranks, NULL };
    if (ranks_own(ranks) == 0)
        log_info("%d devices meet by NCCL %s", ranks_count(ranks), version);
    return p->ranks_open(&d->own,
                         &(struct cuda_ranks_opts){ .kern = k,
                                                    .id = id,
                                                    .rank = ranks_own(ranks),
                                                    .count = ranks_count(ranks),
                                                    .piece = piece,
                                                    .watch = watch,
                                                    .ud = ranks },
                         e);
}

void device_ranks_close(struct device_ranks **dp) {
    struct device_ranks *d = *dp;
    if (!d) return;
    d->plugin->ranks_close(&d->own);
    free(d);
    *dp = NULL;
}

int device_ranks_gather(struct device_ranks *d, kptr x, size_t n, struct err *e) {
    return d->plugin->ranks_gather(d->own, x, n, e);
}
void device_ranks_add(struct device_ranks *d, kptr x, size_t n) {
    d->plugin->ranks_add(d->own, x, n);
}
int device_ranks_wait(struct device_ranks *d, struct err *e) {
    return d->plugin->ranks_wait(d->own, e);
}
