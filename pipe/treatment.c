/* treatment.c - see treatment.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/treatment.h"

#include "lib/base/fs.h"
#include "pipe/tail.h"

json_t *treatment_rows(const struct plan *pl, int stages) {
    json_t *rows = json_array();
    for (int i = 0; i < stages; i++) {
        const json_t *said = json_object_get(pl->of[i], "treatment");
        for (size_t j = 0; j < json_array_size(said); j++) {
            json_t *row = json_array_get(said, j);
            bool told = false;
            for (size_t k = 0; k < json_array_size(rows) && !told; k++)
                told = json_equal(row, json_array_get(rows, k));
            if (!told) json_array_append(rows, row);
        }
    }
    return rows;
}

static const char *text_of(const json_t *row, const char *key) {
    const char *text = json_string_value(json_object_get(row, key));
    return text ? text : "";
}

static double number_of(const json_t *row, const char *key) {
    return json_number_value(json_object_get(row, key));
}

static bool same(const json_t *a, const json_t *b, const char *key) {
    return strcmp(text_of(a, key), text_of(b, key)) == 0;
}

/* Of one line: the same phase, kind, direction, type, layers and size. */
static bool one_line(const json_t *a, const json_t *b) {
    return same(a, b, "phase") && same(a, b, "kind") && same(a, b, "direction") &&
           same(a, b, "type") && same(a, b, "layers") &&
           number_of(a, "intended") == number_of(b, "intended") &&
           number_of(a, "threshold") == number_of(b, "threshold");
}

/* "noise/rollout/op/matmul/forward/realised": of a phase and a row's key. */
enum { METRIC_NAME_MAX = 300 };
static void metric_name(char name[METRIC_NAME_MAX], const char *phase, const char *key,
                        const char *what) {
    snprintf(name, METRIC_NAME_MAX, "noise/%.50s/%.150s/%.50s", phase, key, what);
}

static const json_t *measured(const json_t *metrics, const json_t *row, const char *what) {
    char name[METRIC_NAME_MAX];
    metric_name(name, text_of(row, "phase"), text_of(row, "key"), what);
    return json_object_get(metrics, name);
}

static void print_name(const json_t *row, const json_t *metrics, FILE *to) {
    const json_t *note = json_object_get(row, "note"),
                 *realised = measured(metrics, row, "realised"),
                 *left = measured(metrics, row, "changed_bf16");
    fprintf(to, "%s", text_of(row, "name"));
    if (json_is_string(note)) fprintf(to, " (%s)", json_string_value(note));
    else if (json_is_number(realised)) {
        fprintf(to, " realised %.4g, %.0f sites", json_number_value(realised),
                json_number_value(measured(metrics, row, "sites")));
        if (json_is_number(left))
            fprintf(to, ", %.3g %% changed after bf16", 100 * json_number_value(left));
    } else fprintf(to, " x %.0f", number_of(row, "sites"));
}

/* What was asked for: a size that should be measured, a threshold, or neither. */
static void print_size(const json_t *row, FILE *to) {
    fprintf(to, "%s", text_of(row, "type"));
    if (json_object_get(row, "intended")) fprintf(to, " %.4g", number_of(row, "intended"));
    else if (json_object_get(row, "threshold"))
        fprintf(to, ", threshold %.4g, no intended size", number_of(row, "threshold"));
    else fprintf(to, ", no intended size");
}

void treatment_print(const json_t *rows, const json_t *metrics, const char *indent, FILE *to) {
    const size_t n = json_array_size(rows);
    for (size_t i = 0; i < n; i++) {
        const json_t *row = json_array_get(rows, i);
        bool begun = false;
        for (size_t j = 0; j < i && !begun; j++) begun = one_line(json_array_get(rows, j), row);
        if (begun) continue;
        const bool op = strcmp(text_of(row, "kind"), "op") == 0;
        const char *layers = text_of(row, "layers");
        fprintf(to, "%s%-8s %-8s %-8s  ", indent, text_of(row, "phase"),
                op ? "operator" : text_of(row, "kind"), text_of(row, "direction"));
        print_size(row, to);
        fprintf(to, "%s%s: ", *layers ? " in layers " : "", layers);
        for (size_t j = i, k = 0; j < n; j++) {
            const json_t *other = json_array_get(rows, j);
            if (!one_line(row, other)) continue;
            if (k++) fprintf(to, "%s", json_is_object(metrics) ? "; " : ", ");
            print_name(other, metrics, to);
        }
        fprintf(to, "\n");
    }
}

void treatment_warnings(const json_t *metrics, const char *indent, FILE *to) {
    const char *key;
    json_t *v;
    json_object_foreach((json_t *)(uintptr_t)metrics, key, v) {
        const char *end = strrchr(key, '/');
        if (!end || strcmp(end, "/warning") != 0 || !json_is_string(v)) continue;
        fprintf(to, "%sWARNING    %.*s: %s\n", indent, (int)(end - key), key,
                json_string_value(v));
    }
}

/* The evidence of the last line of scores.jsonl that has some; the caller owns it. */
static json_t *newest_evidence(const char *run_dir) {
    char path[FS_PATH_MAX];
    struct tail t;
    json_t *newest = NULL;
    fs_join(path, sizeof path, run_dir, "scores.jsonl");
    tail_open(&t, path, false);
    while (tail_next(&t)) {
        json_t *score = json_loadb(t.line.s, t.line.len, 0, NULL);
        const char *text = json_string_value(json_object_get(score, "evidence"));
        json_t *evidence = text && *text ? json_loads(text, 0, NULL) : NULL;
        if (evidence) {
            json_decref(newest);
            newest = evidence;
        }
        json_decref(score);
    }
    tail_close(&t);
    return newest;
}

void treatment_add_score(json_t *metrics, const char *run_dir) {
    json_t *evidence = newest_evidence(run_dir), *measured_there, *v;
    const char *name, *what;
    json_object_foreach(evidence, name, measured_there) {
        json_object_foreach(measured_there, what, v) {
            char metric[METRIC_NAME_MAX];
            metric_name(metric, "eval", name, what);
            json_object_set(metrics, metric, v);
        }
    }
    json_decref(evidence);
}
