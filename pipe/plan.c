/* plan.c - see plan.h.
 *
 * Order: one stage's answer, messages put back to their origin, joining, clean-up.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/plan.h"

#include <errno.h>
#include <unistd.h>

#include "lib/base/fs.h"
#include "pipe/proc.h"

/* A line that several stages say is printed once, with their names. */
enum { COMPLAINTS_MAX = 64 };
struct complaint { struct str text, stages; int n; bool placed; };
struct complaints { struct complaint v[COMPLAINTS_MAX]; int n; };

static void add_complaint(struct complaints *c, const char *text, bool placed, const char *stage) {
    int i = 0;
    while (i < c->n && strcmp(c->v[i].text.s, text) != 0) i++;
    if (i == COMPLAINTS_MAX) return;
    struct complaint *one = &c->v[i];
    if (i == c->n) {
        str_init(&one->text);
        str_init(&one->stages);
        str_printf(&one->text, "%s", text);
        one->placed = placed;
        one->n = 0;
        c->n++;
    }
    str_printf(&one->stages, "%s%s", one->n++ ? ", " : "", stage);
}

static void complaints_print(struct complaints *c, struct str *out) {
    for (int i = 0; i < c->n; i++) {
        struct complaint *one = &c->v[i];
        if (one->placed) str_printf(out, "%s\n", one->text.s);
        else str_printf(out, "stage%s %s: %s\n", one->n > 1 ? "s" : "", one->stages.s, one->text.s);
        str_release(&one->text);
        str_release(&one->stages);
    }
}

/* "CONF:7: text" of a stage becomes "e6b.pipe:41: text", because line 7 of the configuration came
 * from there. */
static void add_talk(struct complaints *to, const struct pipe_stage *s, const char *conf,
                     const struct str *talk) {
    char copy[4096], own[100], from[FS_PATH_MAX + 4096];
    const size_t n = strlen(conf);
    snprintf(copy, sizeof copy, "%s", talk->s ? talk->s : "");
    snprintf(own, sizeof own, "qerl-%.80s: ", s->about.name ? s->about.name : s->name);
    char *save = NULL;
    for (char *line = strtok_r(copy, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        char *at = strstr(line, conf), *end = at ? at + n : NULL;
        long number = at && *end == ':' ? strtol(end + 1, &end, 10) : 0;
        if (str_starts(line, own)) line += strlen(own);
        if (number >= 1 && number <= s->conf_lines) {
            origin_text(from, FS_PATH_MAX, s->conf_at[number - 1]);
            snprintf(from + strlen(from), sizeof copy, "%s", end);
            add_complaint(to, from, true, s->name);
        } else if (!str_starts(line, "not started; ")) { /* whose --help is no matter here */
            add_complaint(to, line, false, s->name);
        }
    }
}

static int ask_one(struct plan *pl, struct pipeline *p, int i, const char *dir,
                   struct complaints *talk, struct err *e) {
    struct pipe_stage *s = &p->stage[i];
    char conf[FS_PATH_MAX], name[200], gpus[PLACE_VISIBLE_MAX];
    struct str out, said;
    int status = 0;
    snprintf(name, sizeof name, "%.150s.conf", s->name);
    fs_join(conf, sizeof conf, dir, name);
    if (fs_replace(conf, s->conf.s ? s->conf.s : "", s->conf.len, e) < 0) return -1;
    const char *argv[] = { s->exec, "--plan", "-c", conf, NULL };
    str_init(&out);
    str_init(&said);
    place_visible(gpus, sizeof gpus, &s->place.choice[s->place.taken]);
    int rc = proc_capture_on(gpus, argv, &out, &said, 600, &status, e);
    if (rc == 0 && status != 0) {
        add_talk(talk, s, conf, &said);
        rc = err_code(e, status == EXIT_CONFIG || status == EXIT_ENV ? status : EXIT_FAILED,
                      "stage '%s' refuses this configuration", s->name);
    }
    if (rc == 0) {
        char where[600];
        snprintf(where, sizeof where, "%.500s --plan", s->exec);
        pl->of[i] = json_parse(out.s, out.len, where, e);
        if (!pl->of[i] || !json_is_object(pl->of[i])) rc = err_wrap(e, "stage '%s'", s->name);
    }
    str_release(&out);
    str_release(&said);
    return rc;
}

static void add_file(struct plan *pl, json_t *o, const char *stage) {
    struct plan_file f = { .role = "", .bytes = -1, .lines = -1, .stage = stage };
    struct err e = { 0 };
    int64_t big = INT64_MAX;
    if (json_need_str(o, "path", &f.path, "plan", &e) < 0) return;
    json_may_str(o, "role", &f.role, "plan", &e);
    json_may_str(o, "sha256", &f.sha256, "plan", &e);
    json_may_str(o, "absent", &f.absent, "plan", &e);
    json_may_int(o, "bytes", &f.bytes, 0, big, "plan", &e);
    json_may_int(o, "lines", &f.lines, 0, big, "plan", &e);
    for (int i = 0; i < pl->files; i++)
        if (strcmp(pl->file[i].path, f.path) == 0) {
            if (!pl->file[i].sha256) pl->file[i].sha256 = f.sha256;
            if (pl->file[i].lines < 0) pl->file[i].lines = f.lines;
            return;
        }
    pl->file = mem_grow(pl->file, (size_t)(pl->files + 1) * sizeof *pl->file);
    pl->file[pl->files++] = f;
}

static void join(struct plan *pl, json_t *o, const struct pipe_stage *s) {
    struct err e = { 0 };
    const int64_t big = INT64_MAX;
    int64_t memory = 0, disk = 0, ranks = 1;
    double seconds = 0;
    json_may_int(o, "steps", &pl->steps, 0, big, s->name, &e);
    json_may_int(o, "prompts_least", &pl->prompts_least, 0, big, s->name, &e);
    json_may_int(o, "prompts_most", &pl->prompts_most, 0, big, s->name, &e);
    json_may_int(o, "memory_bytes", &memory, 0, big, s->name, &e);
    json_may_int(o, "ranks", &ranks, 1, 1024, s->name, &e);
    json_may_int(o, "disk_bytes", &disk, 0, big, s->name, &e);
    json_may_num(o, "seconds_per_step", &seconds, s->name, &e);
    json_may_str(o, "seconds_how", &pl->seconds_how, s->name, &e);
    if (!json_object_get(o, "devices")) pl->memory_bytes += memory * s->processes * ranks;
    pl->disk_bytes += disk;
    pl->seconds_per_step += seconds;
    json_t *scored = json_object_get(o, "scored"), *sigma = json_object_get(o, "sigma"),
        *files = json_object_get(o, "files");
    if (json_is_array(scored) &&
        (!pl->scored || json_array_size(scored) > json_array_size(pl->scored)))
        pl->scored = scored;
    if (json_is_array(sigma) && !pl->sigma) pl->sigma = sigma;
    for (size_t i = 0; i < json_array_size(files); i++)
        add_file(pl, json_array_get(files, i), s->name);
}

int plan_ask(struct plan *pl, struct pipeline *p, const char *run_dir, const char *run_id,
             struct str *talk, struct err *e) {
    char dir[] = "/tmp/qerl-plan-XXXXXX";
    *pl = (struct plan){ .steps = -1, .prompts_least = -1, .prompts_most = -1, .scored_last = -1 };
    if (!mkdtemp(dir))
        return err_code(e, EXIT_ENV, "cannot make a folder in /tmp: %s", strerror(errno));
    pipeline_conf(p, run_dir, run_id, dir);
    struct complaints *all = mem_alloc(sizeof *all);
    int rc = 0;
    /* all stages are asked, so that all errors come at once */
    for (int i = 0; i < p->stages; i++) {
        struct err one = { 0 };
        if (ask_one(pl, p, i, dir, all, &one) == 0) continue;
        if (rc == 0) *e = one;
        rc = -1;
    }
    complaints_print(all, talk);
    free(all);
    for (int i = 0; i < p->stages; i++)
        if (pl->of[i]) join(pl, pl->of[i], &p->stage[i]);
    size_t n = json_array_size(pl->scored);
    if (n) pl->scored_last = json_integer_value(json_array_get(pl->scored, n - 1));
    fs_remove_tree(dir, NULL);
    return rc;
}

void plan_release(struct plan *pl) {
    for (int i = 0; i < PIPELINE_STAGES_MAX; i++) json_decref(pl->of[i]);
    free(pl->file);
    *pl = (struct plan){ 0 };
}

int plan_disk(const struct plan *pl, const struct pipeline *p, struct err *e) {
    const int64_t have = fs_free_bytes(fs_is_dir(p->runs_dir) ? p->runs_dir : ".");
    char need[32], is[32];
    if (have < 0 || pl->disk_bytes <= have) return 0;
    bytes_text(need, sizeof need, (double)pl->disk_bytes);
    bytes_text(is, sizeof is, (double)have);
    return err_code(e, EXIT_ENV, "the disk of '%s' has %s free, the run needs about %s: make room, "
                    "or set run.runs_dir", p->runs_dir, is, need);
}

bool plan_absent(const struct plan *pl) {
    for (int i = 0; i < pl->files; i++)
        if (pl->file[i].absent) return true;
    return false;
}
