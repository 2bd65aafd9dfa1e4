/* reference.c - a curve of the study: pipelines/reference/NAME.tsv.
 *
 * Lines that begin with '#' are remarks (source, caveats) and are shown with the comparison; the
 * others are "step TAB accuracy in % TAB reward TAB n", where all but the step may be empty. A
 * first line that begins with "step" names the columns.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/result.h"

#include <dirent.h>
#include <math.h>

#include "lib/base/fs.h"
#include "lib/base/stat.h"

static const char folder[] = "pipelines/reference";

static int number(const char *path, int line, const char *text, const char *what, double *v,
                  struct err *e) {
    *v = NAN;
    if (!*text || str_to_f64(text, v)) return 0;
    return err_code(e, EXIT_CONFIG, "%s:%d: '%s' is not a number (%s)", path, line, text, what);
}

static int take_row(struct result *r, const char *path, int line, char *row, struct err *e) {
    static const char *const column[] = { "step", "accuracy in %", "reward", "n" };
    double v[COUNT_OF(column)];
    for (size_t i = 0; i < COUNT_OF(column); i++) {
        char *cell = strsep(&row, "\t");
        if (number(path, line, cell ? cell : "", column[i], &v[i], e) < 0) return -1;
    }
    if (row || !(v[0] >= 0 && v[0] == floor(v[0])) || v[1] < 0 || v[1] > 100 || v[3] < 0)
        return err_code(e, EXIT_CONFIG, "%s:%d: not 'step TAB accuracy in %% TAB reward TAB n'",
                        path, line);
    r->point = mem_grow(r->point, (size_t)(r->points + 1) * sizeof *r->point);
    r->point[r->points++] = (struct point){ (int64_t)v[0], v[2], NAN, NAN };
    if (isnan(v[1])) return 0;
    struct score s = { .step = (int64_t)v[0], .n = isnan(v[3]) ? 0 : (int64_t)v[3],
                       .samples_per_question = 1, .split = "test", .rule = "strict",
                       .quant = "see remarks", .noise = "" };
    s.right = llround(v[1] / 100 * (double)s.n);
    stat_interval(s.right, s.n, &s.low, &s.high);
    /* without n there is a value to show and nothing to test */
    if (!s.n) s.low = s.high = v[1] / 100;
    r->scores.v = mem_grow(r->scores.v, (size_t)(r->scores.n + 1) * sizeof *r->scores.v);
    r->scores.v[r->scores.n++] = s;
    return 0;
}

/* A name that is no curve: the nearest one, and how to see all. */
static int unknown_name(const char *name, struct err *e) {
    enum { NAMES_MAX = 256 };
    char *names[NAMES_MAX];
    size_t n = 0;
    DIR *d = opendir(folder);
    for (struct dirent *entry; d && n < NAMES_MAX && (entry = readdir(d));) {
        if (!str_ends(entry->d_name, ".tsv")) continue;
        names[n] = mem_dup(entry->d_name);
        names[n][strlen(names[n]) - 4] = 0;
        n++;
    }
    if (d) closedir(d);
    const char *near = str_nearest(name, (const char *const *)names, n);
    err_code(e, EXIT_USAGE, "'ref:%.100s' names no curve of the study%s%s%s; the names are those "
                            "of the files in '%s', which is looked for in this folder; "
                            "'ref:FILE.tsv' reads a file of your own",
             name, near ? ": did you mean 'ref:" : "", near ? near : "", near ? "'?" : "", folder);
    for (size_t i = 0; i < n; i++) free(names[i]);
    return -1;
}

int reference_read(struct result *r, const char *name, struct err *e) {
    char path[FS_PATH_MAX];
    struct str text;
    int rc, line = 0;
    if (str_ends(name, ".tsv")) snprintf(path, sizeof path, "%s", name);
    else snprintf(path, sizeof path, "%s/%.200s.tsv", folder, name);
    r->reference = true;
    r->state = RUN_STATE_DONE;
    snprintf(r->f.id, sizeof r->f.id, "ref:%.100s", name);
    if (!str_ends(name, ".tsv") && (strchr(name, '/') || !fs_exists(path)))
        return unknown_name(name, e);
    str_init(&text);
    rc = fs_read(&text, path, 1 << 20, e);
    if (rc < 0) e->code = EXIT_USAGE;
    char *rest = rc == 0 ? text.s : NULL;
    for (char *row; rc == 0 && (row = strsep(&rest, "\n"));) {
        line++;
        row[strcspn(row, "\r")] = 0;
        if (*row == '#') str_printf(&r->remarks, "%s\n", row + 1 + strspn(row + 1, " "));
        else if (*row && !(r->points == 0 && str_starts(row, "step")))
            rc = take_row(r, path, line, row, e);
    }
    str_release(&text);
    r->score = r->scores.v;
    r->score_n = r->scores.n;
    if (rc == 0 && !r->points) rc = err_code(e, EXIT_CONFIG, "'%s' holds no rows", path);
    return rc;
}
