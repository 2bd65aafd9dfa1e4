/* ckpt.c - see ckpt.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "stages/learner/ckpt.h"

#include <dirent.h>
#include <errno.h>
#include <unistd.h>

#include "lib/base/fs.h"
#include "lib/base/hash.h"
#include "lib/base/json.h"
#include "lib/base/log.h"

enum { CKPT_FORMAT = 2, CKPT_KEEP = 2, ENTRIES_MAX = 100000 };

#define PROGRESS_FIELDS(X)                                                                         \
    X(step)                                                                                        \
    X(version) X(cursor) X(groups_seen) X(groups_kept) X(groups_all_right) X(groups_all_wrong)     \
        X(groups_surplus) X(skipped_starved) X(skipped_nonfinite) X(nonfinite_in_a_row)            \
            X(updates_changed)

/* Numbers behind `prefix` in the folder, ascending; the caller frees. */
static int64_t *numbered(const char *dir, const char *prefix, const char *suffix, int *count) {
    int64_t *list = NULL;
    *count = 0;
    DIR *d = opendir(dir);
    if (!d) return NULL;
    for (struct dirent *entry; (entry = readdir(d)) && *count < ENTRIES_MAX;) {
        char digits[64];
        int64_t n;
        size_t len = strlen(entry->d_name), skip = strlen(prefix) + strlen(suffix);
        if (!str_starts(entry->d_name, prefix) || !str_ends(entry->d_name, suffix)) continue;
        if (len <= skip || len - skip >= sizeof digits) continue;
        memcpy(digits, entry->d_name + strlen(prefix), len - skip);
        digits[len - skip] = 0;
        if (!str_to_i64(digits, &n)) continue;
        list = mem_grow(list, (size_t)(*count + 1) * sizeof *list);
        int at = (*count)++;
        for (; at > 0 && list[at - 1] > n; at--) list[at] = list[at - 1];
        list[at] = n;
    }
    closedir(d);
    return list;
}

static void path_of(char *out, const char *dir, const char *what, int64_t n, const char *suffix) {
    int len = snprintf(out, FS_PATH_MAX, "%s/%s%06lld%s", dir, what, (long long)n, suffix);
    assert(len > 0 && len < FS_PATH_MAX);
    (void)len;
}

static json_t *leases_json(const struct progress *p) {
    json_t *all = json_array();
    for (int i = 0; i < p->leases; i++)
        json_array_append_new(all, json_pack("{s:I, s:I, s:s}", "first",
                                             (json_int_t)p->lease[i].first, "version",
                                             (json_int_t)p->lease[i].version, "sha256",
                                             p->lease[i].sha256));
    return all;
}

static int leases_read(struct progress *p, const json_t *all, const char *path, struct err *e) {
    p->leases = 0;
    if (json_array_size(all) > LAG_MAX) return err_set(e, "%s: too many 'leases'", path);
    for (size_t i = 0; i < json_array_size(all); i++) {
        struct lease *l = &p->lease[p->leases++];
        const json_t *o = json_array_get(all, i);
        const char *sha = "";
        if (json_need_int(o, "first", &l->first, 0, INT64_MAX, path, e) < 0 ||
            json_need_int(o, "version", &l->version, 0, INT64_MAX, path, e) < 0 ||
            json_need_str(o, "sha256", &sha, path, e) < 0)
            return -1;
        snprintf(l->sha256, sizeof l->sha256, "%s", sha);
    }
    return 0;
}

static json_t *changed_json(const struct progress *p) {
    const int64_t *v = p->noise_changed[0];
    json_t *all = json_array();
    for (int i = 0; i < 2 * NOISE_PHASE_EVAL; i++) json_array_append_new(all, json_integer(v[i]));
    return all;
}

static void changed_read(struct progress *p, const json_t *all) {
    int64_t *v = p->noise_changed[0];
    for (size_t i = 0; i < 2 * NOISE_PHASE_EVAL; i++)
        v[i] = json_integer_value(json_array_get(all, i));
}

static json_t *manifest_of(const struct progress *p, const struct update_state *s,
                           const struct ckpt_identity *id) {
    json_t *o = json_object();
    json_object_set_new(o, "format", json_integer(CKPT_FORMAT));
#define SET(field) json_object_set_new(o, #field, json_integer(p->field));
    PROGRESS_FIELDS(SET)
#undef SET
    json_object_set_new(o, "adam_steps", json_integer(s->adam_steps));
    json_object_set_new(o, "rate_steps", json_integer(s->rate_steps));
    json_object_set_new(o, "params", json_integer((json_int_t)s->lora->params));
    json_object_set_new(o, "model_sha256", json_string(id->model_sha256));
    json_object_set_new(o, "tokenizer_sha256", json_string(id->tokenizer_sha256));
    json_object_set_new(o, "data_sha256", json_string(id->data_sha256));
    json_object_set_new(o, "treatment", json_string(id->treatment));
    json_object_set_new(o, "bits", json_string(id->bits));
    json_object_set_new(o, "settings", json_string(id->settings));
    if (p->leases) json_object_set_new(o, "leases", leases_json(p));
    json_object_set_new(o, "noise_changed", changed_json(p));
    return o;
}

int ckpt_save(const char *dir, const struct progress *p, const struct update_state *s,
              const struct ckpt_identity *id, struct err *e) {
    char parent[FS_PATH_MAX], final[FS_PATH_MAX], tmp[FS_PATH_MAX], path[FS_PATH_MAX],
        sha[SHA256_HEX];
    fs_join(parent, sizeof parent, dir, "ckpt");
    path_of(final, parent, "step-", p->step, "");
    path_of(tmp, parent, "step-", p->step, ".tmp");
    if (fs_is_dir(final)) return 0;                  /* a replay arrives at the same state */
    size_t bytes = s->lora->params * sizeof(float);
    if (fs_remove_tree(tmp, e) < 0 || fs_mkdirs(tmp, e) < 0) return -1;
    struct str blob;
    str_init(&blob);
    str_add(&blob, s->lora->value, bytes);
    str_add(&blob, s->m, bytes);
    str_add(&blob, s->v, bytes);
    sha256_of(blob.s, blob.len, sha);
    fs_join(path, sizeof path, tmp, "state.bin");
    int rc = fs_replace(path, blob.s, blob.len, e);
    json_t *m = manifest_of(p, s, id);
    json_object_set_new(m, "state_bytes", json_integer((json_int_t)blob.len));
    json_object_set_new(m, "state_sha256", json_string(sha));
    char *text = json_dumps(m, JSON_INDENT(1));
    fs_join(path, sizeof path, tmp, "manifest.json");
    if (rc == 0) rc = fs_replace(path, text, strlen(text), e);
    if (rc == 0 && rename(tmp, final) < 0)
        rc = err_set(e, "cannot rename '%s': %s", tmp, strerror(errno));
    if (rc == 0) rc = fs_sync_dir(parent, e);
    if (rc < 0) {
        err_wrap(e, "cannot save checkpoint of step %lld", (long long)p->step);
        fs_remove_tree(tmp, NULL);
    }
    free(text);
    json_decref(m);
    str_release(&blob);
    return rc;
}

/* First lines in which two settings texts differ. */
static void first_difference(const char *a, const char *b, struct str *was, struct str *is) {
    while (*a && *b) {
        size_t n = strcspn(a, "\n"), m = strcspn(b, "\n");
        if (n != m || memcmp(a, b, n) != 0) break;
        a += n + (a[n] != 0);
        b += m + (b[m] != 0);
    }
    str_init(was);
    str_init(is);
    str_printf(was, *a ? "'%.*s'" : "the default", (int)strcspn(a, "\n"), a);
    str_printf(is, *b ? "'%.*s'" : "the default", (int)strcspn(b, "\n"), b);
}

/* 1 good, 0 damaged (e says how), -1 made under other conditions. */
static int load_one(const char *dir, struct progress *p, struct update_state *s,
                    const struct ckpt_identity *id, struct err *e) {
    char path[FS_PATH_MAX], sha[SHA256_HEX];
    fs_join(path, sizeof path, dir, "manifest.json");
    json_t *m = json_parse_file(path, 1 << 20, e);
    if (!m) return 0;
    int rc = 0;
    int64_t format = 0, params = 0, bytes = 0;
    const char *want = "", *model = "", *tokenizer = "", *data = "", *treatment = "", *bits = "",
               *settings = "";
    struct fs_map map = { 0 };
    if (json_need_int(m, "format", &format, 1, INT64_MAX, path, e) < 0) goto done;
    if (format != CKPT_FORMAT) {
        rc = err_set(e,
                     "checkpoint '%s' has format %lld, this program writes %d: start a new run, or "
                     "use the version that made it",
                     dir, (long long)format, CKPT_FORMAT);
        goto done;
    }
#define GET(field) if (json_need_int(m, #field, &p->field, 0, INT64_MAX, path, e) < 0) goto done;
    PROGRESS_FIELDS(GET)
#undef GET
    if (json_need_int(m, "adam_steps", &s->adam_steps, 0, INT64_MAX, path, e) < 0 ||
        json_need_int(m, "rate_steps", &s->rate_steps, 0, INT64_MAX, path, e) < 0 ||
        json_need_int(m, "params", &params, 0, INT64_MAX, path, e) < 0 ||
        json_need_int(m, "state_bytes", &bytes, 0, INT64_MAX, path, e) < 0 ||
        json_need_str(m, "state_sha256", &want, path, e) < 0 ||
        json_need_str(m, "model_sha256", &model, path, e) < 0 ||
        json_need_str(m, "tokenizer_sha256", &tokenizer, path, e) < 0 ||
        json_need_str(m, "data_sha256", &data, path, e) < 0 ||
        json_need_str(m, "treatment", &treatment, path, e) < 0 ||
        json_need_str(m, "bits", &bits, path, e) < 0 ||
        json_need_str(m, "settings", &settings, path, e) < 0 ||
        leases_read(p, json_object_get(m, "leases"), path, e) < 0)
        goto done;
    changed_read(p, json_object_get(m, "noise_changed"));
    const char *other = strcmp(model, id->model_sha256)           ? "another base model"
                        : strcmp(tokenizer, id->tokenizer_sha256) ? "another tokenizer"
                        : strcmp(data, id->data_sha256)           ? "other training questions"
                        : strcmp(treatment, id->treatment)
                            ? "another treatment (quantisation, adapter shape or noise)"
                        : strcmp(bits, id->bits) ? "kernels that give other bits (run.kernels)"
                        : (size_t)params != s->lora->params ? "another adapter shape"
                                                            : NULL;
    if (other) {
        rc = err_set(e, "checkpoint '%s' was made with %s: it cannot go on here", dir, other);
        goto done;
    }
    if (strcmp(settings, id->settings) != 0) {
        struct str was, is;
        first_difference(settings, id->settings, &was, &is);
        rc = err_set(e, "checkpoint '%s' was made with %s, now it is %s: it cannot go on here", dir,
                     was.s, is.s);
        str_release(&was);
        str_release(&is);
        goto done;
    }
    fs_join(path, sizeof path, dir, "state.bin");
    if (fs_map(&map, path, e) < 0) goto done;
    size_t each = s->lora->params * sizeof(float);
    sha256_of(map.data, map.bytes, sha);
    if ((int64_t)map.bytes != bytes || map.bytes != 3 * each || strcmp(sha, want) != 0) {
        err_set(e,
                "checkpoint '%s' is damaged: state.bin does not have the bytes its manifest names",
                dir);
        goto done;
    }
    memcpy(s->lora->value, map.data, each);
    memcpy(s->m, map.data + each, each);
    memcpy(s->v, map.data + 2 * each, each);
    rc = 1;
done:
    fs_unmap(&map);
    json_decref(m);
    return rc;
}

/* A damaged checkpoint that was passed over keeps its bytes under another name: its step will be
 * saved again. */
static int set_aside(const char *parent, int64_t step, struct err *e) {
    char from[FS_PATH_MAX], to[FS_PATH_MAX];
    path_of(from, parent, "step-", step, "");
    path_of(to, parent, "step-", step, ".damaged");
    if (fs_remove_tree(to, e) < 0) return -1;
    return rename(from, to) < 0 ? err_set(e, "cannot rename '%s': %s", from, strerror(errno)) : 0;
}

int ckpt_load(const char *dir, struct progress *p, struct update_state *s,
              const struct ckpt_identity *id, struct err *e) {
    char parent[FS_PATH_MAX], path[FS_PATH_MAX];
    int count, rc = 0;
    fs_join(parent, sizeof parent, dir, "ckpt");
    int64_t *list = numbered(parent, "step-", "", &count);
    int i = count;
    while (rc == 0 && i-- > 0) {
        path_of(path, parent, "step-", list[i], "");
        struct err why = { 0 };
        rc = load_one(path, p, s, id, &why);
        if (rc == 0) log_warn("%s; trying an older checkpoint", why.text);
        if (rc < 0) err_code(e, EXIT_CONFIG, "%s", why.text);
    }
    for (int bad = i + 1; rc == 1 && bad < count; bad++)
        if (set_aside(parent, list[bad], e) < 0) rc = -1;
    free(list);
    if (rc == 0 && count)
        return err_set(e,
                       "no checkpoint under '%s' is whole: remove that folder to train again from "
                       "the journal, or start a new run",
                       parent);
    return rc;
}

void ckpt_adapter_path(char out[FS_PATH_MAX], const char *dir, int64_t version) {
    char parent[FS_PATH_MAX];
    fs_join(parent, sizeof parent, dir, "adapters");
    path_of(out, parent, "v", version, "");
}

int ckpt_publish(const char *dir, const struct lora *l, int64_t version, const char *model_path,
                 char path[FS_PATH_MAX], struct err *e) {
    char parent[FS_PATH_MAX];
    fs_join(parent, sizeof parent, dir, "adapters");
    ckpt_adapter_path(path, dir, version);
    return fs_mkdirs(parent, e) < 0 ? -1 : lora_save(l, path, model_path, e);
}

int ckpt_mark_scored(const char *dir, const struct rec *adapter, struct err *e) {
    char parent[FS_PATH_MAX], path[FS_PATH_MAX];
    fs_join(parent, sizeof parent, dir, "adapters");
    path_of(path, parent, "at-", adapter->adapter.step, ".json");
    struct str line;
    str_init(&line);
    rec_to_json(&line, adapter);
    int rc = fs_replace(path, line.s, line.len, e);
    str_release(&line);
    return rc;
}

/* Versions that scored steps or checkpoints point at, or steps to come of a checkpoint; the caller
 * frees. */
static int64_t *versions_in_use(const char *dir, int *count) {
    char parent[FS_PATH_MAX], path[FS_PATH_MAX], folder[FS_PATH_MAX];
    int marks, ckpts;
    fs_join(parent, sizeof parent, dir, "adapters");
    int64_t *mark = numbered(parent, "at-", ".json", &marks);
    fs_join(folder, sizeof folder, dir, "ckpt");
    int64_t *ckpt = numbered(folder, "step-", "", &ckpts);
    int64_t *used = mem_alloc((size_t)(marks + ckpts * (LAG_MAX + 1) + 1) * sizeof *used);
    *count = 0;
    for (int i = 0; i < marks + ckpts; i++) {
        if (i < marks) path_of(path, parent, "at-", mark[i], ".json");
        else {
            char step[FS_PATH_MAX];
            path_of(step, folder, "step-", ckpt[i - marks], "");
            fs_join(path, sizeof path, step, "manifest.json");
        }
        json_t *o = json_parse_file(path, 1 << 20, NULL);
        if (json_is_integer(json_object_get(o, "version")))
            used[(*count)++] = json_integer_value(json_object_get(o, "version"));
        struct progress p;
        if (i >= marks && leases_read(&p, json_object_get(o, "leases"), path, NULL) == 0)
            for (int k = 0; k < p.leases; k++) used[(*count)++] = p.lease[k].version;
        json_decref(o);
    }
    free(mark);
    free(ckpt);
    return used;
}

static bool among(const int64_t *list, int count, int64_t x) {
    for (int i = 0; i < count; i++)
        if (list[i] == x) return true;
    return false;
}

int ckpt_prune(const char *dir, const struct progress *p, struct err *e) {
    char parent[FS_PATH_MAX], path[FS_PATH_MAX];
    const int64_t oldest = p->leases ? p->lease[0].version : p->version;
    int count, used, rc = 0;
    fs_join(parent, sizeof parent, dir, "ckpt");
    int64_t *list = numbered(parent, "step-", "", &count);
    for (int i = 0; rc == 0 && i < count - CKPT_KEEP; i++) {
        path_of(path, parent, "step-", list[i], "");
        rc = fs_remove_tree(path, e);
    }
    free(list);
    fs_join(parent, sizeof parent, dir, "adapters");
    int64_t *in_use = versions_in_use(dir, &used);
    list = numbered(parent, "v", "", &count);
    for (int i = 0; rc == 0 && i < count; i++) {
        if (list[i] > oldest - 2 || among(in_use, used, list[i])) continue;
        path_of(path, parent, "v", list[i], "");
        rc = fs_remove_tree(path, e);
    }
    free(list);
    free(in_use);
    return rc;
}

int ckpt_next_fence(const char *dir, int64_t *fence, struct err *e) {
    char path[FS_PATH_MAX], text[32];
    struct str old;
    str_init(&old);
    fs_join(path, sizeof path, dir, "fence");
    *fence = 0;
    bool there = fs_exists(path), good = !there;
    if (there && fs_read(&old, path, 64, e) == 0) {
        old.s[strcspn(old.s, "\n")] = 0;
        good = str_to_i64(old.s, fence) && *fence >= 0;
    }
    str_release(&old);
    if (!good)
        return err_set(e, "'%s' does not hold the number of the learner's last start", path);
    ++*fence;
    int n = snprintf(text, sizeof text, "%lld\n", (long long)*fence);
    return fs_replace(path, text, (size_t)n, e);
}
