/* resolve.c - see resolve.h.
 *
 * Order: which value belongs to whom, the launcher's own keys, the stages, the check of every
 * value, the whole.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/resolve.h"

#include <ctype.h>

#include "lib/base/fs.h"
#include "pipe/expect.h"
#include "pipe/proc.h"

/* the launcher's own */
static const char *const run_keys[] = { "run.name",     "run.exp_id",       "run.tensorboard",
                                        "run.question", "run.hypothesis",   "run.source",
                                        "run.runs_dir", "run.stall_seconds",
                                        "expect.hypothesis", "expect.above", "expect.at" };
/* by the launcher to stages that declare them */
static const char *const given_keys[] = { "run.dir", "run.id" };
static const char *const stage_keys[] = { "exec", "place", "replicas", "restarts" };

static bool among(const char *name, const char *const *list, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (strcmp(name, list[i]) == 0) return true;
    return false;
}

const char *pipeline_text(const struct pipeline *p, const char *name, const char *def) {
    const struct lang_value *v = lang_get(&p->lang, name);
    return v ? v->text : def;
}

struct pipe_stage *pipeline_stage(struct pipeline *p, const char *name) {
    for (int i = 0; i < p->stages; i++)
        if (strcmp(p->stage[i].name, name) == 0) return &p->stage[i];
    return NULL;
}

/* ---- which value belongs to whom ---- */

/* "learner.lr" of a stage that the file calls "second" is written "second.lr" there. */
static const struct lang_value *value_of(const struct pipeline *p, const struct pipe_stage *s,
                                         const char *key) {
    size_t n = strlen(s->about.name);
    if (strncmp(key, s->about.name, n) == 0 && key[n] == '.' &&
        strcmp(s->name, s->about.name) != 0) {
        char own[600];
        snprintf(own, sizeof own, "%s%s", s->name, key + n);
        const struct lang_value *v = lang_get(&p->lang, own);
        if (v) return v;
    }
    return lang_get(&p->lang, key);
}

const char *pipeline_value(const struct pipeline *p, const struct pipe_stage *s,
                           const struct about_key *k, struct origin *at) {
    const struct lang_value *v = value_of(p, s, k->name);
    *at = v ? v->at : (struct origin){ "default", 0 };
    if (v) return v->text;
    if (strcmp(k->name, "run.name") == 0) return p->name;
    return k->def;
}

/* The stage that a value's section names, and the rest of its name; NULL for shared sections. */
static struct pipe_stage *stage_of(struct pipeline *p, const char *name, const char **rest) {
    const char *dot = strchr(name, '.');
    for (int i = 0; i < p->stages; i++) {
        size_t n = strlen(p->stage[i].name);
        if ((size_t)(dot - name) == n && strncmp(name, p->stage[i].name, n) == 0) {
            *rest = dot + 1;
            return &p->stage[i];
        }
    }
    return NULL;
}

static bool port_key(const char *rest) {
    return str_starts(rest, "in.") || str_starts(rest, "out.");
}

static bool declared(struct pipeline *p, const struct lang_value *v) {
    for (int i = 0; i < p->stages; i++) {
        struct pipe_stage *s = &p->stage[i];
        for (int j = 0; j < s->about.keys; j++)
            if (value_of(p, s, s->about.key[j].name) == v) return true;
        /* [reward] beside [stage second]: still read */
        for (int j = 0; j < s->about.keys; j++)
            if (strcmp(s->about.key[j].name, v->name) == 0) return true;
    }
    return false;
}

/* All names a value may have, for "did you mean". Returned names lie in `keep`. */
static size_t all_names(struct pipeline *p, const char **names, size_t most) {
    size_t n = 0;
    for (size_t i = 0; i < COUNT_OF(run_keys) && n < most; i++) names[n++] = run_keys[i];
    for (int i = 0; i < p->stages; i++) {
        const struct pipe_stage *s = &p->stage[i];
        for (size_t j = 0; j < COUNT_OF(stage_keys) && n < most; j++) {
            char own[600];
            int len = snprintf(own, sizeof own, "%s.%s", s->name, stage_keys[j]);
            names[n++] = lang_keep(&p->lang, own, (size_t)len);
        }
        for (int j = 0; j < s->about.keys && n < most; j++) names[n++] = s->about.key[j].name;
    }
    return n;
}

/* Is the section itself unknown? Then say that, with the sections that exist. */
static bool section_known(const char *name, const char *const *names, size_t n) {
    const char *dot = strrchr(name, '.');
    for (size_t i = 0; i < n; i++) {
        if (strncmp(names[i], name, (size_t)(dot - name) + 1) == 0) return true;
    }
    return false;
}

static void unknown_key(struct pipeline *p, const struct lang_value *v) {
    enum { NAMES = 1024 };
    const char **names = mem_alloc(NAMES * sizeof *names);
    size_t n = all_names(p, names, NAMES);
    const char *near = str_nearest(v->name, names, n), *rest, *dot = strrchr(v->name, '.');
    struct pipe_stage *s = stage_of(p, v->name, &rest);
    char what[700];
    if (s) snprintf(what, sizeof what, "unknown key '%.200s' of stage '%s'", rest, s->name);
    else if (!section_known(v->name, names, n))
        snprintf(what, sizeof what,
                 "unknown section [%.*s] with key '%.200s': no stage of this file reads it",
                 (int)(dot - v->name), v->name, dot + 1);
    else
        snprintf(what, sizeof what,
                 "unknown key '%.200s' in [%.*s]: no stage of this file reads it", dot + 1,
                 (int)(dot - v->name), v->name);
    if (near) lang_error(&p->lang, v->at, "%s; did you mean '%s'?", what, near);
    else if (s)
        lang_error(&p->lang, v->at, "%s; all keys: qerl-pipe describe %s", what,
                   s->about.name ? s->about.name : s->name);
    else lang_error(&p->lang, v->at, "%s; all keys: qerl-pipe describe", what);
    free(names);
}

static void check_names(struct pipeline *p) {
    for (int i = 0; i < p->lang.values; i++) {
        const struct lang_value *v = &p->lang.value[i];
        const char *rest = "";
        struct pipe_stage *s = stage_of(p, v->name, &rest);
        if (among(v->name, given_keys, COUNT_OF(given_keys)))
            lang_error(&p->lang, v->at, "'%s' is set by the launcher for each run: remove it",
                       v->name);
        else if (among(v->name, run_keys, COUNT_OF(run_keys))) continue;
        else if (s && (among(rest, stage_keys, COUNT_OF(stage_keys)) || port_key(rest))) continue;
        else if (!declared(p, v)) unknown_key(p, v);
    }
}

/* ---- the launcher's own keys ---- */

static const char *base_name(struct lang *l, const char *path) {
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    size_t n = strlen(name);
    if (n > 5 && strcmp(name + n - 5, ".pipe") == 0) n -= 5;
    return lang_keep(l, name, n);
}

static struct origin at_of(const struct pipeline *p, const char *name) {
    const struct lang_value *v = lang_get(&p->lang, name);
    return v ? v->at : (struct origin){ p->lang.path, 1 };
}

static void read_run(struct pipeline *p) {
    p->name = pipeline_text(p, "run.name", NULL);
    if (!p->name) p->name = base_name(&p->lang, p->lang.path);
    p->runs_dir = pipeline_text(p, "run.runs_dir", "runs");
    for (const char *c = p->name; *c || c == p->name; c++)
        if (!isalnum((unsigned char)*c) && (c == p->name || !strchr("._-", *c))) {
            lang_error(
                &p->lang, at_of(p, "run.name"),
                "'%s' cannot name a run: letters, digits, '.', '_' and '-', as it names a folder",
                p->name);
            break;
        }
    if (strlen(p->name) > 100)
        lang_error(&p->lang, at_of(p, "run.name"), "run.name is longer than 100 bytes");
    const struct about_key stall = {
        .name = "run.stall_seconds", .type = ABOUT_NUM, .least = 1, .most = 86400
    };
    struct str plain;
    struct err e = { 0 };
    str_init(&plain);
    struct expectation expected;
    if (expect_read(&expected, &p->lang, &e) < 0)
        lang_error(&p->lang, at_of(p, strstr(e.text, "expect.at") ? "expect.at" : "expect.above"),
                   "%s", e.text);
    /* the settings that a run keeps may lie far from the pipelines that its author had by him */
    else if (expected.run && strcmp(base_name(&p->lang, p->lang.path), "resolved") != 0 &&
             expect_check_name(expected.run, p->name, p->runs_dir, &p->lang, &e) < 0)
        lang_error(&p->lang, at_of(p, "expect.above"), "%s", e.text);
    e = (struct err){ 0 };
    p->stall_seconds = 300;
    if (value_check(&stall, pipeline_text(p, stall.name, "300"), &plain, &e) < 0)
        lang_error(&p->lang, at_of(p, stall.name), "%s", e.text);
    else str_to_f64(plain.s, &p->stall_seconds);
    str_release(&plain);
}

/* ---- stages ---- */

static const char *stage_text(const struct pipeline *p, const struct pipe_stage *s, const char *key,
                              const char *def, struct origin *at) {
    char name[600];
    snprintf(name, sizeof name, "%s.%s", s->name, key);
    const struct lang_value *v = lang_get(&p->lang, name);
    *at = v ? v->at : s->at;
    return v ? v->text : def;
}

static int stage_count(struct pipeline *p, struct pipe_stage *s, const char *key, const char *def,
                       int least, int most) {
    struct origin at;
    int64_t n = least;
    const char *text = stage_text(p, s, key, def, &at);
    if (!str_to_i64(text, &n) || n < least || n > most) {
        lang_error(&p->lang, at, "'%s' for '%s.%s' is not a whole number from %d to %d", text,
                   s->name, key, least, most);
        return least;
    }
    return (int)n;
}

static void ask_stage(struct pipeline *p, struct pipe_stage *s) {
    struct origin at;
    char guess[200], path[FS_PATH_MAX];
    struct err e = { 0 };
    snprintf(guess, sizeof guess, "qerl-%.150s", s->name);
    s->exec_asked = lang_keep(&p->lang, guess, strlen(guess));
    s->exec_asked = stage_text(p, s, "exec", s->exec_asked, &at);
    if (proc_find(path, sizeof path, s->exec_asked) < 0) {
        lang_error(&p->lang, at,
                   "stage '%s': there is no program '%s': build it with 'make', or set exec",
                   s->name, s->exec_asked);
        p->env_errors++;
        return;
    }
    s->exec = mem_dup(path);
    if (about_ask(&s->about, s->exec, &e) < 0) {
        lang_error(&p->lang, at, "stage '%s': %s", s->name, e.text);
        p->env_errors++;
    }
    if (s->about.ports > PIPELINE_PORTS_MAX) {
        lang_error(&p->lang, at, "stage '%s' has more than %d ports", s->name, PIPELINE_PORTS_MAX);
        about_release(&s->about);
    }
}

/* Whether it divides its work among processes of its own. */
static bool has_ranks(const struct pipe_stage *s) {
    char key[600];
    snprintf(key, sizeof key, "%s.ranks", s->about.name ? s->about.name : "");
    return about_key(&s->about, key);
}

/* On GPUs the processes are as many as GPUs: by the first choice on every machine, and by the one
 * that is taken. */
static void count_processes(struct pipeline *p, struct pipe_stage *s, struct origin at) {
    const struct place_choice *taken = &s->place.choice[s->place.taken < 0 ? 0 : s->place.taken],
                              *wrong = NULL;
    s->processes = taken->gpu && !has_ranks(s) ? place_gpus(taken) : s->replicas;
    if (s->replicas > 1 && has_ranks(s)) {
        lang_error(&p->lang, at, "stage '%s' cannot have %d replicas: its work is divided by "
                   "%s.ranks", s->name, s->replicas, s->name);
        s->processes = 1;                /* what follows for its ports is not said again */
        return;
    }
    for (int i = 0; i < 2 && s->replicas > 1 && !wrong; i++) {
        const struct place_choice *c = i ? taken : &s->place.choice[0];
        if (c->gpu && place_gpus(c) != s->replicas) wrong = c;
    }
    if (wrong)
        lang_error(&p->lang, at,
                   "stage '%s' has %d replicas on %d GPU%s: it gets one process for each GPU, "
                   "remove replicas", s->name, s->replicas, place_gpus(wrong),
                   place_gpus(wrong) == 1 ? "" : "s");
    if (s->processes > REPLICAS_MAX)
        lang_error(&p->lang, at, "stage '%s' is placed on %d GPUs, a process for each: %d at most",
                   s->name, s->processes, REPLICAS_MAX);
}

static void read_stage(struct pipeline *p, const struct lang_stage *from) {
    struct pipe_stage *s = &p->stage[p->stages++];
    struct origin at;
    struct err e = { 0 };
    *s = (struct pipe_stage){ .name = from->name, .at = from->at };
    ask_stage(p, s);
    s->replicas = stage_count(p, s, "replicas", "1", 1, REPLICAS_MAX);
    s->restarts = stage_count(p, s, "restarts", "3", 0, 1000);
    s->place_asked = stage_text(p, s, "place", "cpu:*", &at);
    if (place_read(&s->place, s->place_asked, &p->machine, &e) < 0)
        lang_error(&p->lang, at, "stage '%s': %s", s->name, e.text);
    else if (place_take(&s->place, s->place_asked, &p->machine, &e) < 0) {
        lang_error(&p->lang, at, "stage '%s': %s", s->name, e.text);
        p->env_errors++;
    }
    count_processes(p, s, at);
}

static uint64_t gpus_taken(const struct place *p) {
    return p->taken >= 0 ? p->choice[p->taken].gpus : 0;
}

/* The first GPU alternative of each stage must be its own, on every machine: falling back would
 * hide the mistake here. So must the one that is taken. */
static void check_gpus(struct pipeline *p) {
    for (int i = 0; i < p->stages; i++)
        for (int j = i + 1; j < p->stages; j++) {
            const struct place *a = &p->stage[i].place, *b = &p->stage[j].place;
            if (!a->choices || !b->choices) continue;
            const uint64_t shared = (a->choice[0].gpus & b->choice[0].gpus) |
                                    (gpus_taken(a) & gpus_taken(b));
            if (!shared) continue;
            struct origin at;
            char ids[200];
            stage_text(p, &p->stage[j], "place", "", &at);
            place_gpus_text(ids, sizeof ids, shared);
            lang_error(&p->lang, at,
                       "stages '%s' and '%s' are both placed on GPU %s: one stage per GPU",
                       p->stage[i].name, p->stage[j].name, ids);
        }
}

static bool is_valid(const struct about_key *k, const char *text) {
    struct str plain;
    struct err e = { 0 };
    str_init(&plain);
    const bool valid = value_check(k, text, &plain, &e) == 0;
    str_release(&plain);
    return valid;
}

/* A stage computes where it is placed: kernels of the other kind would take its place without a
 * word. A name that is misspelt is no kind: check_values says so. */
static void check_kernels(struct pipeline *p) {
    for (int i = 0; i < p->stages; i++) {
        const struct pipe_stage *s = &p->stage[i];
        const struct about_key *k = about_key(&s->about, "run.kernels");
        if (!k || s->place.taken < 0) continue;
        const struct place_choice *c = &s->place.choice[s->place.taken];
        struct origin at;
        const char *text = pipeline_value(p, s, k, &at);
        if (!text || !is_valid(k, text)) continue;
        char where[500];
        place_text(where, sizeof where, c);
        const bool cuda = str_starts(text, "cuda");
        if (cuda && !c->gpu)
            lang_error(&p->lang, at,
                       "run.kernels = %s, but stage '%s' is placed on %s: write place = gpu:0 in "
                       "[stage %s], or run.kernels = auto",
                       text, s->name, where, s->name);
        else if (c->gpu && !cuda && strcmp(text, "auto") != 0)
            lang_error(&p->lang, at,
                       "run.kernels = %s is a path of the CPU, but stage '%s' is placed on %s: "
                       "write run.kernels = auto, or place = cpu:* in [stage %s]",
                       text, s->name, where, s->name);
    }
}

/* On cores there are no graphs to be left out. */
static void check_graphs(struct pipeline *p) {
    const struct lang_value *v = lang_get(&p->lang, "run.graphs");
    bool idle = false;
    for (int i = 0; i < p->stages && v; i++) {
        const struct pipe_stage *s = &p->stage[i];
        const struct about_key *k = about_key(&s->about, "run.graphs");
        struct str plain;
        struct err e = { 0 };
        if (!k || s->place.taken < 0) continue;
        if (s->place.choice[s->place.taken].gpu) return;
        str_init(&plain);
        idle |= value_check(k, v->text, &plain, &e) == 0 && strcmp(plain.s, "false") == 0;
        str_release(&plain);
    }
    if (idle)
        lang_error(&p->lang, v->at,
                   "run.graphs = %s would do nothing: no stage that decodes is placed on a GPU",
                   v->text);
}

/* ---- values ---- */

static bool checked_before(const struct pipeline *p, int stage, const struct lang_value *v) {
    for (int i = 0; i < stage; i++)
        for (int j = 0; j < p->stage[i].about.keys; j++)
            if (value_of(p, &p->stage[i], p->stage[i].about.key[j].name) == v) return true;
    return false;
}

/* Two stages that declare a key nobody sets must mean the same by its absence. */
static void check_defaults(struct pipeline *p, int stage, const struct about_key *k) {
    for (int i = 0; i < stage; i++) {
        const struct about_key *o = about_key(&p->stage[i].about, k->name);
        if (!o || (!o->def && !k->def) || (o->def && k->def && strcmp(o->def, k->def) == 0))
            continue;
        lang_error(&p->lang, p->stage[stage].at,
                   "stages '%s' and '%s' have different defaults for '%s' (%s, "
                   "%s): set it",
                   p->stage[i].name, p->stage[stage].name, k->name, o->def ? o->def : "none",
                   k->def ? k->def : "none");
        return;
    }
}

static void check_values(struct pipeline *p) {
    for (int i = 0; i < p->stages; i++) {
        struct pipe_stage *s = &p->stage[i];
        for (int j = 0; j < s->about.keys; j++) {
            const struct about_key *k = &s->about.key[j];
            const struct lang_value *v = value_of(p, s, k->name);
            struct origin at;
            struct str plain;
            struct err e = { 0 };
            if (among(k->name, given_keys, COUNT_OF(given_keys))) continue;
            if (!v && !among(k->name, run_keys, COUNT_OF(run_keys))) check_defaults(p, i, k);
            if (!v && !pipeline_value(p, s, k, &at)) {
                bool again = false;
                for (int o = 0; o < i; o++) again = again || about_key(&p->stage[o].about, k->name);
                if (!again)
                    lang_error(&p->lang, s->at, "stage '%s' needs '%s' (%s): set it", s->name,
                               k->name, k->help);
                continue;
            }
            if (!v || checked_before(p, i, v)) continue;
            str_init(&plain);
            if (value_check(k, v->text, &plain, &e) < 0) lang_error(&p->lang, v->at, "%s", e.text);
            str_release(&plain);
        }
    }
}

void pipeline_load(struct pipeline *p, const char *path, const char *const *sets, int n) {
    *p = (struct pipeline){ 0 };
    place_machine(&p->machine);
    lang_read(&p->lang, path, sets, n);
    if (p->lang.files) {
        read_run(p);
        if (!p->lang.stages)
            lang_error(&p->lang, (struct origin){ path, 1 },
                       "no [stage NAME] section: nothing to run");
        if (p->lang.stages > PIPELINE_STAGES_MAX)
            lang_error(&p->lang, (struct origin){ path, 1 }, "more than %d stages",
                       PIPELINE_STAGES_MAX);
        bool all = true;
        for (int i = 0; i < p->lang.stages && i < PIPELINE_STAGES_MAX; i++)
            read_stage(p, &p->lang.stage[i]);
        for (int i = 0; i < p->stages; i++) all = all && p->stage[i].about.json;
        check_gpus(p);
        /* else every key of the silent stage would look unknown */
        if (all) {
            check_names(p);
            check_values(p);
            check_kernels(p);
            check_graphs(p);
            pipeline_wire(p);
        }
    }
    p->code = !p->lang.errors ? 0 : p->env_errors == p->lang.errors ? EXIT_ENV : EXIT_CONFIG;
}

void pipeline_passed(const struct pipeline *p, struct str *out) {
    for (int i = 0; i < p->stages; i++) {
        const char *why = p->stage[i].place.why;
        bool told = !*why;
        for (int j = 0; j < i && !told; j++) told = strcmp(p->stage[j].place.why, why) == 0;
        if (told) continue;
        for (int j = i; j < p->stages; j++) {
            const struct place *o = &p->stage[j].place;
            char taken[500];
            if (strcmp(o->why, why) != 0) continue;
            place_text(taken, sizeof taken, &o->choice[o->taken]);
            str_printf(out, "%s%s on %s, not %s", j > i ? "; " : "", p->stage[j].name, taken,
                       o->passed);
        }
        str_printf(out, ": %s\n", why);
    }
}

void pipeline_release(struct pipeline *p) {
    for (int i = 0; i < p->stages; i++) {
        about_release(&p->stage[i].about);
        str_release(&p->stage[i].conf);
        free(p->stage[i].conf_at);
        free(p->stage[i].exec);
    }
    lang_release(&p->lang);
    p->stages = 0;
}
