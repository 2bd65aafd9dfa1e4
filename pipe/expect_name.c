/* expect_name.c - [expect] above = NAME: is there, or can there be, a run of that name?
 *
 * Knows: the run folders, the .pipe files beside those that were read, how a matrix names its runs.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/expect.h"

#include <ctype.h>
#include <dirent.h>

#include "lib/base/fs.h"

enum { NAMES_MAX = 1024, SHOWN_MAX = 12 };
struct names { char *v[NAMES_MAX]; int n; };

static void add(struct names *s, const char *name, size_t bytes) {
    for (int i = 0; i < s->n; i++)
        if (strlen(s->v[i]) == bytes && memcmp(s->v[i], name, bytes) == 0) return;
    if (s->n == NAMES_MAX) return;
    s->v[s->n] = mem_alloc(bytes + 1);
    memcpy(s->v[s->n++], name, bytes);
}

/* Without what a matrix adds: NAME[-tiny]-sSEED. */
static size_t stem(const char *name) {
    const char *dash = strrchr(name, '-');
    if (!dash || dash[1] != 's' || !isdigit((unsigned char)dash[2]) ||
        dash[2 + strspn(dash + 2, "0123456789")])
        return strlen(name);
    const size_t n = (size_t)(dash - name);
    return n > 5 && memcmp(dash - 5, "-tiny", 5) == 0 ? n - 5 : n;
}

/* What the .pipe files of the folder that holds `file` call their runs. */
static void add_pipelines(struct names *s, const char *file) {
    char dir[FS_PATH_MAX], path[FS_PATH_MAX];
    const char *slash = strrchr(file, '/');
    snprintf(dir, sizeof dir, "%.*s", slash ? (int)(slash - file) : 1, slash ? file : ".");
    DIR *d = opendir(dir);
    for (struct dirent *entry; d && (entry = readdir(d));) {
        struct lang l;
        const size_t n = strlen(entry->d_name);
        if (!str_ends(entry->d_name, ".pipe")) continue;
        fs_join(path, sizeof path, dir, entry->d_name);
        lang_read(&l, path, NULL, 0);
        const struct lang_value *own = lang_get(&l, "run.name");
        if (l.stages) add(s, own ? own->text : entry->d_name, own ? strlen(own->text) : n - 5);
        lang_release(&l);
    }
    if (d) closedir(d);
}

static void add_runs(struct names *s, const char *runs_dir) {
    char **ids;
    const int n = folder_list(runs_dir, &ids);
    for (int i = 0; i < n; i++) {
        const char *dash = strrchr(ids[i], '-');
        add(s, ids[i], dash ? (size_t)(dash - ids[i]) : strlen(ids[i]));
        free(ids[i]);
    }
    free(ids);
}

static int by_name(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static int refuse(const struct names *s, const char *name, const char *runs_dir, struct err *e) {
    struct str all;
    str_init(&all);
    const char *near = str_nearest(name, (const char *const *)s->v, (size_t)s->n);
    for (int i = 0; i < s->n && i < SHOWN_MAX; i++)
        str_printf(&all, "%s%s", i ? ", " : "", s->v[i]);
    err_set(e, "'%s' for 'expect.above' is no run in '%s' and no pipeline beside this one%s%s%s; "
               "there are: %s%s", name, runs_dir, near ? "; did you mean '" : "", near ? near : "",
            near ? "'?" : "", all.s ? all.s : "none", s->n > SHOWN_MAX ? ", ..." : "");
    str_release(&all);
    return -1;
}

int expect_check_name(const char *name, const char *own, const char *runs_dir,
                      const struct lang *l, struct err *e) {
    struct folder f = { .lock_fd = -1 };
    if (strcmp(name, own) == 0)
        return err_set(e, "'%s' for 'expect.above' is this pipeline itself", name);
    if (folder_find(&f, runs_dir, name, NULL) == 0) return 0;
    struct names *s = mem_alloc(sizeof *s);
    /* a base may have said it: then the names beside the base count too */
    const struct lang_value *said = lang_get(l, "expect.above");
    add_pipelines(s, l->path);
    if (said && fs_exists(said->at.file)) add_pipelines(s, said->at.file);
    add_runs(s, runs_dir);
    qsort(s->v, (size_t)s->n, sizeof *s->v, by_name);
    bool known = false;
    for (int i = 0; i < s->n && !known; i++)
        known = strcmp(s->v[i], name) == 0 ||
                (strlen(s->v[i]) == stem(name) && !memcmp(s->v[i], name, stem(name)));
    const int rc = known ? 0 : refuse(s, name, runs_dir, e);
    for (int i = 0; i < s->n; i++) free(s->v[i]);
    free(s);
    return rc;
}
