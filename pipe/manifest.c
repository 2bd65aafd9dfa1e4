/* manifest.c - what is written into a new run folder, and whether a later start still has the same
 * things.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/folder.h"

#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#include "lib/base/fs.h"
#include "lib/base/hash.h"
#include "pipe/treatment.h"

#ifndef QERL_COMMIT
#define QERL_COMMIT "unknown"
#endif

const char *cpu_flags(void) {
    static char out[200];
    size_t used = 0;
    static const char *const wanted[] = { "sse4_2",   "avx2",        "fma",         "f16c",
                                          "avx512f",  "avx512dq",    "avx512bw",    "avx512vl",
                                          "avx512vbmi", "avx512_bf16", "avx512_vnni", "amx_tile",
                                          "amx_bf16", "amx_int8",    "asimd",       "sve" };
    FILE *f = fopen("/proc/cpuinfo", "re");
    char *line = NULL;
    size_t cap = 0;
    out[0] = 0;
    while (f && getline(&line, &cap, f) > 0) {
        if (!str_starts(line, "flags") && !str_starts(line, "Features")) continue;
        char *save = NULL;
        for (char *w = strtok_r(line, " \t\n:", &save); w; w = strtok_r(NULL, " \t\n:", &save))
            for (size_t i = 0; i < COUNT_OF(wanted); i++)
                if (strcmp(w, wanted[i]) == 0 && used + strlen(w) + 2 < sizeof out)
                    used += (size_t)snprintf(out + used, sizeof out - used, "%s%s", used ? " " : "",
                                             w);
        break;
    }
    free(line);
    if (f) fclose(f);
    return out;
}

static json_t *now_text(void) {
    char text[40];
    struct tm tm;
    time_t now = time(NULL);
    gmtime_r(&now, &tm);
    strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &tm);
    return json_string(text);
}

/* The kernel module's version, where there is one; the plugin knows only which CUDA it can do. */
static void add_driver(json_t *o) {
    struct str text;
    str_init(&text);
    if (fs_read(&text, "/sys/module/nvidia/version", 200, NULL) == 0 && text.len)
        json_object_set_new(o, "nvidia_driver",
                            json_stringn(text.s, strcspn(text.s, "\n")));
    str_release(&text);
}

static json_t *programs(const struct pipeline *p, const struct plan *pl) {
    json_t *list = json_object();
    for (int i = 0; i < p->stages; i++) {
        const struct pipe_stage *s = &p->stage[i];
        char sha[SHA256_HEX] = "", place[500];
        json_t *o = json_object();
        place_text(place, sizeof place, &s->place.choice[s->place.taken]);
        if (sha256_file(s->exec, sha, NULL) < 0) sha[0] = 0;
        json_object_set_new(o, "exec", json_string(s->exec));
        json_object_set_new(o, "sha256", json_string(sha));
        json_object_set_new(o, "place", json_string(place));
        if (*s->place.why)
            json_object_set_new(o, "passed_over", json_pack("{s:s, s:s}", "place", s->place.passed,
                                                            "why", s->place.why));
        json_t *devices = json_object_get(pl->of[i], "devices");
        json_t *cuda = json_object_get(pl->of[i], "cuda");
        if (devices) json_object_set(o, "devices", devices);
        if (cuda) json_object_set(o, "cuda", cuda);
        json_object_set_new(o, "replicas", json_integer(s->processes));
        json_object_set_new(list, s->name, o);
    }
    return list;
}

static json_t *files(const struct plan *pl) {
    json_t *list = json_array();
    for (int i = 0; i < pl->files; i++) {
        const struct plan_file *f = &pl->file[i];
        json_t *o = json_object();
        json_object_set_new(o, "path", json_string(f->path));
        json_object_set_new(o, "role", json_string(f->role));
        json_object_set_new(o, "sha256", f->sha256 ? json_string(f->sha256) : json_null());
        if (f->bytes >= 0) json_object_set_new(o, "bytes", json_integer(f->bytes));
        json_array_append_new(list, o);
    }
    return list;
}

/* The values of [quant] and [noise...] that somebody wrote: what SUMMARY.md calls the treatment. */
static json_t *treatment(const struct pipeline *p) {
    struct str out;
    str_init(&out);
    str_add(&out, "", 0);
    for (int i = 0; i < p->lang.values; i++) {
        const struct lang_value *v = &p->lang.value[i];
        const char *key = v->name;
        bool treats = str_starts(key, "quant.") || str_starts(key, "noise.");
        if (treats && (v->at.line > 0 || strcmp(v->at.file, "--set") == 0))
            str_printf(&out, "%s%s=%s", out.len ? ", " : "", key, v->text);
    }
    json_t *text = json_string(out.len ? out.s : "as by default");
    str_release(&out);
    return text;
}

static json_t *manifest(const struct folder *f, const struct pipeline *p, const struct plan *pl,
                        char **argv) {
    json_t *o = json_object(), *words = json_array();
    char host[200] = "", cores[400], cwd[FS_PATH_MAX] = "";
    struct utsname u;
    gethostname(host, sizeof host - 1);
    if (!getcwd(cwd, sizeof cwd)) cwd[0] = 0;
    place_cores_text(cores, sizeof cores, &p->machine.cores);
    for (int i = 0; argv[i]; i++) json_array_append_new(words, json_string(argv[i]));
    json_object_set_new(o, "id", json_string(f->id));
    json_object_set_new(o, "name", json_string(p->name));
    json_object_set_new(o, "exp_id", json_string(pipeline_text(p, "run.exp_id", "")));
    json_object_set_new(o, "question", json_string(pipeline_text(p, "run.question", "")));
    json_object_set_new(o, "treatment", treatment(p));
    json_object_set_new(o, "noise", treatment_rows(pl, p->stages));
    json_object_set_new(o, "commit", json_string(QERL_COMMIT));
    json_object_set_new(o, "started", now_text());
    json_object_set_new(o, "argv", words);
    json_object_set_new(o, "cwd", json_string(cwd));
    json_object_set_new(o, "host", json_string(host));
    json_object_set_new(o, "system", uname(&u) == 0 ? json_sprintf("%s %s %s", u.sysname, u.release,
                                                                   u.machine) : json_null());
    json_object_set_new(o, "cores", json_string(cores));
    json_object_set_new(o, "cpu_flags", json_string(cpu_flags()));
    json_object_set_new(o, "steps", json_integer(pl->steps));
    json_object_set_new(o, "scored_last", json_integer(pl->scored_last));
    add_driver(o);
    json_object_set_new(o, "stages", programs(p, pl));
    json_object_set_new(o, "files", files(pl));
    return o;
}

static int write_json(const char *path, const json_t *o, struct err *e) {
    char *text = json_dumps(o, JSON_INDENT(2));
    int rc = text ? fs_replace(path, text, strlen(text), e) : err_set(e, "cannot write '%s'", path);
    free(text);
    return rc;
}

int folder_write_conf(const struct folder *f, struct pipeline *p, struct err *e) {
    for (int i = 0; i < p->stages; i++) {
        char path[FS_PATH_MAX], name[200];
        snprintf(name, sizeof name, "conf/%.150s.conf", p->stage[i].name);
        fs_join(path, sizeof path, f->dir, name);
        if (fs_replace(path, p->stage[i].conf.s ? p->stage[i].conf.s : "", p->stage[i].conf.len,
                       e) < 0)
            return -1;
    }
    return 0;
}

/* The settings without where they run: kernels and threads may differ when a run goes on, its bits
 * do not. */
static void settings_sha256(const char *text, char out[SHA256_HEX]) {
    struct sha256 s;
    sha256_init(&s);
    for (const char *line = text; *line;) {
        const size_t n = strcspn(line, "\n") + (strchr(line, '\n') != NULL);
        if (!str_starts(line, "kernels =") && !str_starts(line, "threads ="))
            sha256_add(&s, line, n);
        line += n;
    }
    sha256_hex(&s, out);
}

int folder_write(const struct folder *f, struct pipeline *p, const struct plan *pl, char **argv,
                 struct err *e) {
    char path[FS_PATH_MAX];
    struct str text;
    str_init(&text);
    pipeline_resolved(p, &text);
    fs_join(path, sizeof path, f->dir, "manifest.json");
    json_t *o = manifest(f, p, pl, argv);
    char sha[SHA256_HEX];
    settings_sha256(text.s, sha);
    json_object_set_new(o, "settings_sha256", json_string(sha));
    int rc = write_json(path, o, e);
    json_decref(o);
    fs_join(path, sizeof path, f->dir, "resolved.pipe");
    if (rc == 0) rc = fs_replace(path, text.s, text.len, e);
    str_release(&text);
    return rc;
}

static void compare_programs(const json_t *old, const struct pipeline *p, struct str *out) {
    for (int i = 0; i < p->stages; i++) {
        const struct pipe_stage *s = &p->stage[i];
        const char *was = json_string_value(
            json_object_get(json_object_get(old, s->name), "sha256"));
        char sha[SHA256_HEX];
        if (sha256_file(s->exec, sha, NULL) < 0 || (was && strcmp(was, sha) == 0)) continue;
        str_printf(out, "program '%s' of stage '%s' is not the one this run started with\n",
                   s->exec, s->name);
    }
}

/* Both on GPUs: a run may go on elsewhere, but not with other kernels unsaid. */
static void compare_plugins(const json_t *old, const struct pipeline *p, const struct plan *pl,
                            struct str *out) {
    for (int i = 0; i < p->stages; i++) {
        const json_t *cuda = json_object_get(pl->of[i], "cuda");
        const json_t *before = json_object_get(json_object_get(old, p->stage[i].name), "cuda");
        const char *is = json_string_value(json_object_get(cuda, "sha256")),
                   *was = json_string_value(json_object_get(before, "sha256"));
        if (is && was && strcmp(is, was) != 0)
            str_printf(out, "CUDA plugin '%s' of stage '%s' is not the one this run started with\n",
                       json_string_value(json_object_get(cuda, "plugin")), p->stage[i].name);
    }
}

static void compare_files(const json_t *old, const struct plan *pl, struct str *out) {
    for (int i = 0; i < pl->files; i++) {
        const struct plan_file *f = &pl->file[i];
        for (size_t j = 0; j < json_array_size(old); j++) {
            const json_t *o = json_array_get(old, j);
            const char *path = json_string_value(json_object_get(o, "path")),
                *was = json_string_value(json_object_get(o, "sha256"));
            if (!path || strcmp(path, f->path) != 0 || !was) continue;
            if (!f->sha256) str_printf(out, "%s file '%s' is absent now\n", f->role, f->path);
            else if (strcmp(was, f->sha256) != 0)
                str_printf(out, "%s file '%s' has changed since this run started\n", f->role,
                           f->path);
        }
    }
}

int folder_compare(const struct folder *f, const struct pipeline *p, const struct plan *pl,
                   struct str *differences, struct err *e) {
    char path[FS_PATH_MAX];
    fs_join(path, sizeof path, f->dir, "manifest.json");
    json_t *o = json_parse_file(path, 1 << 22, e);
    if (!o) return -1;
    char resolved[FS_PATH_MAX], sha[SHA256_HEX];
    const char *was = json_string_value(json_object_get(o, "settings_sha256"));
    fs_join(resolved, sizeof resolved, f->dir, "resolved.pipe");
    struct str text;
    str_init(&text);
    if (fs_read(&text, resolved, 1 << 20, NULL) < 0) str_clear(&text);
    settings_sha256(text.s ? text.s : "", sha);
    str_release(&text);
    if (was && strcmp(was, sha) != 0)
        str_printf(differences, "settings: '%s' was edited since this run started\n", resolved);
    compare_programs(json_object_get(o, "stages"), p, differences);
    compare_plugins(json_object_get(o, "stages"), p, pl, differences);
    compare_files(json_object_get(o, "files"), pl, differences);
    json_decref(o);
    return 0;
}
