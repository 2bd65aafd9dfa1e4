/* curves.c - see curves.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/curves.h"

#include <dirent.h>
#include <sys/stat.h>
#include <unistd.h>

#include "lib/base/clock.h"
#include "lib/base/json.h"
#include "lib/base/log.h"
#include "pipe/view.h"

enum { METRICS, SCORES };

static void fail(struct curves *c, const struct err *e) {
    log_warn("no more TensorBoard events: %s", e->text);
    c->broken = true;
}

/* Removes the event files and begins a new one. */
static void begin(struct curves *c) {
    struct err e = { 0 };
    tb_close(&c->tb, NULL);
    for (int i = 0; i < 2; i++) c->source[i].read_bytes = 0;
    DIR *d = opendir(c->dir);
    for (struct dirent *entry; d && (entry = readdir(d));) {
        char path[FS_PATH_MAX];
        if (!str_starts(entry->d_name, "events.out.tfevents.")) continue;
        fs_join(path, sizeof path, c->dir, entry->d_name);
        unlink(path);
    }
    if (d) closedir(d);
    if (fs_mkdirs(c->dir, &e) < 0 || tb_open(&c->tb, c->dir, &e) < 0) fail(c, &e);
}

void curves_open(struct curves *c, const char *run_dir, const char *name) {
    *c = (struct curves){ 0 };
    snprintf(c->dir, sizeof c->dir, "%.400s/tensorboard/%.200s", run_dir, name);
    snprintf(c->source[METRICS].path, FS_PATH_MAX, "%.900s/metrics.jsonl", run_dir);
    snprintf(c->source[SCORES].path, FS_PATH_MAX, "%.900s/scores.jsonl", run_dir);
    begin(c);
}

static void add_metrics(struct curves *c, const json_t *o, int64_t step) {
    const char *key;
    json_t *value;
    double time = json_number_value(json_object_get(o, "time"));
    json_object_foreach((json_t *)(uintptr_t)o, key,
                        value) if (strchr(key, '/') && json_is_number(value))
        tb_scalar(c->tb, key, step, time, json_number_value(value));
}

static void add_score(struct curves *c, const json_t *o, int64_t step, double time) {
    double n = json_number_value(json_object_get(o, "n"));
    int64_t each = json_integer_value(json_object_get(o, "samples_per_question"));
    char tag[80];
    const char *noise = json_string_value(json_object_get(o, "noise"));
    /* a noisy score is another quantity, not a point of the same curve */
    const bool clean = !noise || !*noise || strcmp(noise, "none") == 0;
    if (n <= 0) return;
    snprintf(tag, sizeof tag, "%s/openai/gsm8k/acc/mean@%lld", clean ? "val-core" : "val-noisy",
             (long long)(each > 0 ? each : 1));
    tb_scalar(c->tb, tag, step, time, json_number_value(json_object_get(o, "right")) / n);
    if (!clean) return;
    static const struct { const char *tag, *key;
    } part[] = {
        { "val-aux/openai/gsm8k/strict", "right_strict" },
        { "val-aux/openai/gsm8k/flexible", "right_flexible" },
        { "val-aux/openai/gsm8k/parsed", "parsed" },
    };
    for (size_t i = 0; i < COUNT_OF(part); i++)
        tb_scalar(c->tb, part[i].tag, step, time,
                  json_number_value(json_object_get(o, part[i].key)) / n);
    tb_scalar(c->tb, "val-aux/openai/gsm8k/length", step, time,
              json_number_value(json_object_get(o, "length_mean")));
}

static bool replaced(const struct curves_source *s) {
    struct stat st;
    return stat(s->path, &st) == 0 && s->read_bytes > 0 &&
           (st.st_ino != s->inode || st.st_size < s->read_bytes);
}

static void follow(struct curves *c, int which) {
    struct curves_source *s = &c->source[which];
    struct stat st;
    FILE *f = fopen(s->path, "re");
    if (!f) return;
    if (fstat(fileno(f), &st) == 0) s->inode = st.st_ino;
    char *line = NULL;
    size_t cap = 0;
    ssize_t n;
    if (fseeko(f, s->read_bytes, SEEK_SET) == 0)
        while ((n = getline(&line, &cap, f)) > 0 && line[n - 1] == '\n') {
            json_t *o = json_loadb(line, (size_t)n, 0, NULL);
            int64_t step = json_integer_value(json_object_get(o, "step"));
            if (o && which == METRICS) add_metrics(c, o, step);
            if (o && which == SCORES) add_score(c, o, step, (double)st.st_mtime);
            json_decref(o);
            s->read_bytes += n;
        }
    free(line);
    fclose(f);
}

static void look(struct curves *c) {
    struct err e = { 0 };
    if (c->broken) return;
    if (replaced(&c->source[METRICS]) || replaced(&c->source[SCORES])) begin(c);
    for (int i = 0; i < 2 && !c->broken; i++) follow(c, i);
    if (!c->broken && tb_flush(c->tb, &e) < 0) fail(c, &e);
}

void curves_tick(struct curves *c) {
    double now = clock_seconds();
    if (now - c->looked_at < 1) return;
    c->looked_at = now;
    look(c);
}

void curves_close(struct curves *c) {
    look(c);
    tb_close(&c->tb, NULL);
}
