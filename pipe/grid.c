/* grid.c - the command eval: which cells, one evaluator for each that has no score yet.
 *
 * Order: lists, what the run says, one cell, the command.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/grid.h"

#include <ctype.h>
#include <float.h>
#include <math.h>

#include "lib/base/fs.h"
#include "pipe/proc.h"
#include "pipe/stop.h"

enum { CELL_SECONDS_MAX = 7 * 24 * 3600 };

struct asked {                               /* on the command line */
    char *noise[GRID_LIST_MAX], *quant[GRID_LIST_MAX];
    int noises, quants, seeds;
    const char *n;                           /* "all" or a number; NULL = as the run */
    char *kept[2];
};

/* ---- lists ---- */

static int read_list(char **kept, char **v, int *n, const char *text, struct err *e) {
    char *rest = *kept = mem_dup(text);
    for (char *one; (one = strsep(&rest, ","));) {
        if (!*one || *n == GRID_LIST_MAX)
            return err_code(e, EXIT_USAGE, "'%s' is not a list of 1 to %d values", text,
                            GRID_LIST_MAX);
        v[(*n)++] = one;
    }
    return 0;
}

static int read_asked(struct asked *a, const struct command_line *l, struct err *e) {
    static const char *const formats[] = { "trained", "bf16", "mxfp4", "nvfp4", "mxfp4-w4a4",
                                           "nvfp4-w4a4" };
    int64_t seeds = 1, n;
    if (read_list(&a->kept[0], a->noise, &a->noises, l->noise ? l->noise : "0", e) < 0 ||
        read_list(&a->kept[1], a->quant, &a->quants, l->quant ? l->quant : "trained", e) < 0)
        return -1;
    for (int i = 0; i < a->noises; i++) {
        double v, w;
        if (!str_to_f64(a->noise[i], &v) || v < 0 || v > 10)
            return err_code(e, EXIT_USAGE, "--noise takes sizes from 0 to 10, not '%s'",
                            a->noise[i]);
        if (v > 0 && v < FLT_EPSILON)
            return err_code(e, EXIT_USAGE, "--noise %s vanishes in f32: give 0, or %.3g and more",
                            a->noise[i], (double)FLT_EPSILON);
        for (int j = 0; j < i; j++)
            if (str_to_f64(a->noise[j], &w) && w == v)
                return err_code(e, EXIT_USAGE, "--noise has %s twice", a->noise[i]);
    }
    for (int i = 0; i < a->quants; i++) {
        bool known = false;
        for (size_t j = 0; j < COUNT_OF(formats); j++)
            known = known || !strcmp(a->quant[i], formats[j]);
        if (!known)
            return err_code(e, EXIT_USAGE, "--quant takes trained, bf16, mxfp4, nvfp4, mxfp4-w4a4, "
                                           "nvfp4-w4a4; not '%s'", a->quant[i]);
        for (int j = 0; j < i; j++)
            if (strcmp(a->quant[j], a->quant[i]) == 0)
                return err_code(e, EXIT_USAGE, "--quant has %s twice", a->quant[i]);
    }
    if (l->seeds && (!str_to_i64(l->seeds, &seeds) || seeds < 1 || seeds > GRID_SEEDS_MAX))
        return err_code(e, EXIT_USAGE, "--seeds takes 1 to %d, not '%s'", GRID_SEEDS_MAX, l->seeds);
    a->seeds = (int)seeds;
    a->n = l->n;
    if (a->n && strcmp(a->n, "all") != 0 && (!str_to_i64(a->n, &n) || n < 1))
        return err_code(e, EXIT_USAGE, "--n takes all or a number of questions, not '%s'", a->n);
    if (a->noises * a->quants > GRID_ROWS_MAX)
        return err_code(e, EXIT_USAGE, "more than %d rows", GRID_ROWS_MAX);
    return 0;
}

/* ---- what the run says ---- */

static int find_step(struct grid *g, const struct result *r, const char *asked, struct err *e) {
    struct str all;
    str_init(&all);
    g->step = r->score_n ? r->score[r->score_n - 1].step : -1;
    if (asked && !str_to_i64(asked, &g->step)) g->step = -1;
    for (int i = 0; i < r->score_n; i++)
        str_printf(&all, "%s%lld", i ? ", " : "", (long long)r->score[i].step);
    const bool there = g->step >= 0 && result_score(r, g->step);
    if (!there)
        err_code(e, EXIT_USAGE, "run '%s' has no scored step %s; scored were: %s", r->f.id,
                 asked ? asked : "at all", all.s ? all.s : "none");
    str_release(&all);
    return there ? 0 : -1;
}

static int read_adapter(const struct grid *g, char path[FS_PATH_MAX], struct err *e) {
    char mark[FS_PATH_MAX], name[40];
    const char *folder;
    snprintf(name, sizeof name, "adapters/at-%06lld.json", (long long)g->step);
    fs_join(mark, sizeof mark, g->f.dir, name);
    json_t *o = json_parse_file(mark, 1 << 20, e);
    int rc = o ? json_need_str(o, "path", &folder, mark, e) : -1;
    if (rc == 0) {
        /* the run's folder may have been moved since */
        const char *slash = strrchr(folder, '/');
        snprintf(path, FS_PATH_MAX, "%.600s/adapters/%.200s", g->f.dir, slash ? slash + 1 : folder);
    }
    json_decref(o);
    return rc;
}

static void read_noise(struct grid *g, const struct result *r) {
    const char *type = result_value(r, "noise.ops.type"), *ops = result_value(r, "noise.ops.ops");
    g->own = type && strcmp(type, "off") != 0;
    const char *direction = result_value(r, "noise.ops.direction");
    g->backward = g->own && direction && strcmp(direction, "backward") == 0;
    g->type = g->own ? type : "relative_gaussian";
    g->ops = g->own && ops ? ops : "matmul";
    g->layers = g->own ? result_value(r, "noise.ops.layers") : NULL;
    g->dtype = g->own ? result_value(r, "noise.ops.dtype") : NULL;
    const char *modules = result_value(r, "noise.modules.type");
    g->modules = modules && strcmp(modules, "off") != 0 ? modules : NULL;
    g->device = r->seed;
}

/* ---- one cell ---- */

static void cell_dir(char path[FS_PATH_MAX], const struct grid *g, const struct asked *a,
                     const struct grid_row *row, int seed) {
    char name[200];
    snprintf(name, sizeof name, "eval/step%06lld-noise_%.20s-%.20s-n_%.12s-s%d", (long long)g->step,
             row->noise, row->quant, a->n ? a->n : "run", seed);
    fs_join(path, FS_PATH_MAX, g->f.dir, name);
}

struct options { struct str text[20]; const char *argv[64]; int n, texts; };

static void option(struct options *o, const char *key, const char *value) {
    struct str *s = &o->text[o->texts++];
    str_init(s);
    str_printf(s, "%s=%s", key, value);
    o->argv[o->n++] = "--set";
    o->argv[o->n++] = s->s;
}

static void format_options(struct options *o, const char *quant) {
    char weights[20];
    if (strcmp(quant, "trained") == 0) return;
    snprintf(weights, sizeof weights, "%.*s", (int)strcspn(quant, "-"), quant);
    option(o, "quant.weights", weights);
    option(o, "quant.activations", strchr(quant, '-') ? weights : "none");
    option(o, "quant.adapter", "none");
    if (strcmp(quant, "bf16") != 0) return;
    /* nothing is quantised that could be left out, or rounded */
    option(o, "quant.exclude", "");
    option(o, "quant.parity", "ocp");
}

static void noise_options(struct options *o, const struct grid *g, const char *size) {
    const bool noisy = strtod(size, NULL) > 0;
    option(o, "eval.also_noisy", "no");
    option(o, "eval.noise", "clean");
    option(o, "noise.modules.eval", "no");
    option(o, "noise.ops.eval", noisy ? "yes" : "no");
    if (!noisy) return;
    option(o, "noise.ops.scale", size);
    /* a run that noised gradients only is asked here how it bears noise on its answers */
    option(o, "noise.ops.direction", "forward");
    if (g->own) return;
    option(o, "noise.ops.type", g->type);
    option(o, "noise.ops.ops", g->ops);
}

static int ask_cell(const struct grid *g, const struct asked *a, const struct grid_row *row,
                    const char *exec, const char *adapter, int64_t seed, const char *dir,
                    struct err *e) {
    struct options o = { 0 };
    struct str out, talk;
    char conf[FS_PATH_MAX], score[FS_PATH_MAX], number[32];
    int status = 0;
    fs_join(conf, sizeof conf, g->f.dir, "conf/eval.conf");
    snprintf(number, sizeof number, "%lld", (long long)seed);
    const char *const head[] = { exec, "-c", conf, "--in", "adapter=", "--out", "score=" };
    for (size_t i = 0; i < COUNT_OF(head); i++) o.argv[o.n++] = head[i];
    option(&o, "run.dir", "");
    option(&o, "run.seed", number);
    /* a systematic bias is the device's: seeds move what is drawn, not the device */
    snprintf(number, sizeof number, "%lld", (long long)g->device);
    option(&o, "eval.device_seed", number);
    option(&o, "eval.adapter", adapter);
    option(&o, "eval.keep", dir);
    if (a->n) option(&o, "eval.questions", strcmp(a->n, "all") ? a->n : "0");
    format_options(&o, row->quant);
    noise_options(&o, g, row->noise);
    str_init(&out);
    str_init(&talk);
    int rc = proc_capture(o.argv, &out, &talk, CELL_SECONDS_MAX, &status, e);
    fs_join(score, sizeof score, dir, "score.json");
    /* asked to stop the evaluator ends well, without a score */
    if (stop_came() && !fs_exists(score)) rc = err_code(e, EXIT_FAILED, "stopped");
    if (rc == 0 && status != 0)
        rc = err_code(e, status == EXIT_CONFIG || status == EXIT_ENV ? status : EXIT_FAILED,
                      "the evaluator says:\n%s", talk.s);
    for (int i = 0; i < o.texts; i++) str_release(&o.text[i]);
    str_release(&out);
    str_release(&talk);
    return rc;
}

/* "0.0499 .. 0.0501 (84 sites)" of all operators and modules; false: not one value was hit. */
static bool read_realised(char *out, size_t size, const json_t *score) {
    const char *text = json_string_value(json_object_get(score, "evidence")), *name;
    json_t *o = text && *text ? json_parse(text, strlen(text), "evidence", NULL) : NULL, *v;
    double low = INFINITY, high = -INFINITY, sites = 0;
    json_object_foreach(o, name, v) {
        if (!strchr(name, '/')) continue;
        const double realised = json_number_value(json_object_get(v, "realised"));
        low = fmin(low, realised);
        high = fmax(high, realised);
        sites += json_number_value(json_object_get(v, "sites"));
    }
    if (!(low <= high)) snprintf(out, size, "none");
    else if (high - low < 5e-4 * high) snprintf(out, size, "%#.4g (%.0f sites)", high, sites);
    else snprintf(out, size, "%#.4g .. %#.4g (%.0f sites)", low, high, sites);
    json_decref(o);
    return high > 0;
}

/* Which device a noisy score was made on; one that programs before eval.device_seed kept may be of
 * another. */
static int check_device(const struct grid *g, const json_t *score, const char *path,
                        struct err *e) {
    const char *text = json_string_value(json_object_get(score, "evidence"));
    json_t *o = text && *text ? json_parse(text, strlen(text), "evidence", NULL) : NULL;
    const char *is = json_string_value(json_object_get(o, "fixed_seed"));
    const bool other = is && strtoll(is, NULL, 10) != g->device;
    if (other)
        err_set(e, "'%s' was scored on the device of seed %s, the run trained on that of seed "
                   "%lld: remove the folder", path, is, (long long)g->device);
    json_decref(o);
    return other ? -1 : 0;
}

static int read_cell(const struct grid *g, struct grid_row *row, const char *dir, struct err *e) {
    char path[FS_PATH_MAX];
    const int i = row->cells;
    struct str text;
    str_init(&text);
    fs_join(path, sizeof path, dir, "score.json");
    int rc = fs_read(&text, path, 1 << 20, e);
    if (rc == 0 && score_from_json(&row->score[i], text.s, text.len) < 0)
        rc = err_set(e, "'%s' is not a score", path);
    json_t *o = rc == 0 ? json_parse(text.s, text.len, path, e) : NULL;
    char realised[sizeof row->realised];
    const bool hit = o && read_realised(realised, sizeof realised, o);
    if (o && hit != (strtod(row->noise, NULL) > 0))
        rc = err_set(e, "'%s' was asked for noise %s, and its evidence says that %s; remove the "
                        "folder if other programs made it", path, row->noise,
                     hit ? "there was some" : "none was there");
    if (rc == 0) rc = check_device(g, o, path, e);
    if (i == 0 && rc == 0) snprintf(row->realised, sizeof row->realised, "%s", realised);
    json_decref(o);
    str_release(&text);
    fs_join(path, sizeof path, dir, "answers.tape");
    if (rc == 0) rc = marks_read(&row->mark[i], &row->marks[i], path, &row->score[i], e);
    if (rc == 0) row->cells++;
    return rc;
}

/* Sampling draws, and noise that is no fixed function of what it hits. */
static bool draws(const struct grid *g, const struct grid_row *row, const struct result *r) {
    const char *temperature = result_value(r, "eval.temperature");
    return (temperature && strtod(temperature, NULL) > 0) ||
           (strtod(row->noise, NULL) > 0 && strcmp(g->type, "systematic") != 0 &&
            strcmp(g->type, "deadzone") != 0);
}

static int work_row(struct grid *g, const struct asked *a, struct grid_row *row,
                    const struct result *r, const char *exec, const char *adapter, struct err *e) {
    for (int k = 0; k < (draws(g, row, r) ? a->seeds : 1); k++) {
        char dir[FS_PATH_MAX], score[FS_PATH_MAX];
        const int64_t seed = r->seed + k;
        cell_dir(dir, g, a, row, (int)seed);
        fs_join(score, sizeof score, dir, "score.json");
        const bool kept = fs_exists(score);
        if (stop_came()) return err_code(e, EXIT_FAILED, "stopped");
        if (!kept && ask_cell(g, a, row, exec, adapter, seed, dir, e) < 0) return -1;
        if (read_cell(g, row, dir, e) < 0) return -1;
        char text[600];
        score_text(text, sizeof text, &row->score[row->cells - 1]);
        fprintf(stderr, "%s: %s%s\n", dir, text, kept ? " (scored before)" : "");
    }
    return 0;
}

/* ---- the command ---- */

/* "trained" and its name are one condition. */
static int check_formats(const struct grid *g, const struct asked *a, struct err *e) {
    bool trained = false;
    for (int i = 0; i < a->quants; i++) trained = trained || !strcmp(a->quant[i], "trained");
    for (int i = 0; i < a->quants && trained; i++)
        if (strcmp(a->quant[i], g->trained) == 0)
            return err_code(e, EXIT_USAGE, "--quant has %s twice: the run was trained in it",
                            g->trained);
    return 0;
}

static int work(struct grid *g, const struct asked *a, const struct result *r, struct err *e) {
    char exec[FS_PATH_MAX] = "", adapter[FS_PATH_MAX];
    if (proc_find(exec, sizeof exec, "qerl-eval") < 0) exec[0] = 0;
    eval_of_run(&g->f, exec, sizeof exec);
    if (!exec[0])
        return err_code(e, EXIT_ENV, "there is no program 'qerl-eval' beside this one: make");
    if (read_adapter(g, adapter, e) < 0) return -1;
    for (int q = 0; q < a->quants; q++)
        for (int i = 0; i < a->noises; i++) {
            struct grid_row *row = &g->row[g->rows++];
            row->noise = a->noise[i];
            row->quant = a->quant[q];
            if (work_row(g, a, row, r, exec, adapter, e) < 0)
                return err_wrap(e, "noise %s, format %s", row->noise, row->quant);
        }
    return 0;
}

static int say_stopped(const struct grid *g) {
    int kept = 0;
    for (int i = 0; i < g->rows; i++) kept += g->row[i].cells;
    fprintf(stderr, "qerl-pipe: stopped; scores kept in %s/eval: %d, each with its answers; the "
                    "one in the making is not. The same command goes on\n", g->f.dir, kept);
    return EXIT_FAILED;
}

int command_eval(const struct command_line *l) {
    struct asked a = { 0 };
    struct grid g = { 0 };
    struct result r = { .f.lock_fd = -1 };
    struct err e = { 0 };
    int rc = read_asked(&a, l, &e);
    if (rc == 0) rc = result_read(&r, l->runs_dir, l->word[0], &e);
    if (rc == 0 && r.reference)
        rc = err_code(&e, EXIT_USAGE, "'%s' is a curve of the study: it has no adapter that could "
                                      "be scored; give a run", l->word[0]);
    if (rc == 0) rc = find_step(&g, &r, l->step, &e);
    if (rc == 0) {
        g.f = r.f;
        folder_enter(&g.f);
        read_noise(&g, &r);
        snprintf(g.trained, sizeof g.trained, "%s", r.score->quant);
        g.seeds = a.seeds;
        g.row = mem_alloc(GRID_ROWS_MAX * sizeof *g.row);
        g.state = r.state;
        stop_catch();
        rc = check_formats(&g, &a, &e);
        if (rc == 0) rc = work(&g, &a, &r, &e);
        if (g.rows && g.row[0].cells) grid_print(&g, stdout);
    }
    int code = EXIT_DONE;
    if (rc < 0 && stop_came()) code = say_stopped(&g);
    else if (rc < 0) code = complain_once(&e, EXIT_FAILED);
    for (int i = 0; i < g.rows; i++)
        for (int k = 0; k < g.row[i].cells; k++) free(g.row[i].mark[k]);
    free(g.row);
    free(a.kept[0]);
    free(a.kept[1]);
    result_release(&r);
    return code;
}
