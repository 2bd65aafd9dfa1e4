/* likeness.c - see contrast.h: what differs between runs, and what forbids to compare them.
 *
 * What ran is compared, not where: names, places, folders and everything that changes no bit is
 * left out, and files count by their hash.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/fs.h"
#include "pipe/matrix.h"

/* Whole keys, or ".suffix" of any stage's key, or "section." */
static const char *const bookkeeping[] = {
    "run.name", "run.exp_id", "run.tensorboard", "run.question", "run.hypothesis", "run.source",
    "run.runs_dir", "run.stall_seconds", "run.seed", "run.kernels", "run.graphs", "run.threads",
    "run.score_every", "expect.", "model.path", "model.packed_dir", "data.train", "data.test",
    ".exec", ".place", ".replicas", ".restarts", ".rows", ".credit", ".resend_seconds", ".shown",
    ".save_every", ".micro_tokens", "eval.adapter", "eval.answers", "eval.keep",
    "eval.device_seed", "eval.ranks"
};
/* What moves last bits where products go to cuBLAS, and nothing elsewhere: kernels and shapes. */
static const char *const of_cublas[] = { "run.kernels", ".rows", ".micro_tokens" };
/* One treatment each, however many keys it takes to say it. */
static const char *const treatment_sections[] = { "noise.ops.", "noise.modules.", "noise.aqn.",
                                                  "quant.", "lora.", "reward.", "filter." };

static bool listed(const char *key, const char *const *list, size_t n) {
    for (size_t i = 0; i < n; i++) {
        const char *b = list[i];
        if (*b == '.' ? str_ends(key, b) : str_ends(b, ".") ? str_starts(key, b) : !strcmp(key, b))
            return true;
    }
    return false;
}

static bool by_cublas(const char *kernels) { return kernels && !strcmp(kernels, "cuda-blas"); }

/* `cublas`: one of the runs computes by it. */
static bool is_bookkeeping(const char *key, bool cublas) {
    if (cublas && listed(key, of_cublas, COUNT_OF(of_cublas))) return false;
    if (listed(key, bookkeeping, COUNT_OF(bookkeeping))) return true;
    return strstr(key, ".in.") || strstr(key, ".out.");
}

static const char *factor_of(const char *key) {
    if (str_starts(key, "eval.")) return "";
    for (size_t i = 0; i < COUNT_OF(treatment_sections); i++)
        if (str_starts(key, treatment_sections[i])) return treatment_sections[i];
    return key;
}

static int truth(const char *text) {
    if (!strcmp(text, "true") || !strcmp(text, "yes") || !strcmp(text, "on")) return 1;
    return !strcmp(text, "false") || !strcmp(text, "no") || !strcmp(text, "off") ? 0 : -1;
}

/* "5e-2" is "0.05", "yes" is "true". */
static bool same_value(const char *a, const char *b) {
    if (!a || !b) return a == b;
    if (strcmp(a, b) == 0) return true;
    char *rest_a, *rest_b;
    const double x = strtod(a, &rest_a), y = strtod(b, &rest_b);
    if (rest_a != a && rest_b != b && strcmp(rest_a, rest_b) == 0) return x == y;
    return truth(a) >= 0 && truth(a) == truth(b);
}

static int by_key(const void *a, const void *b) {
    const struct difference *x = a, *y = b;
    return strcmp(x->key, y->key);
}

int differences_find(struct difference **out, const struct arm *arm, int arms) {
    int n = 0;
    bool cublas = false;
    *out = NULL;
    for (int i = 0; i < arms; i++)
        cublas = cublas || by_cublas(result_value(arm[i].run[0], "run.kernels"));
    for (int i = 0; i < arms; i++) {
        const struct lang *l = &arm[i].run[0]->conf;
        for (int j = 0; j < l->values; j++) {
            struct difference d = { l->value[j].name, "", { NULL } };
            bool told = is_bookkeeping(d.key, cublas), differs = false;
            for (int k = 0; k < n && !told; k++) told = strcmp((*out)[k].key, d.key) == 0;
            for (int k = 0; k < arms && !told; k++) {
                d.value[k] = result_value(arm[k].run[0], d.key);
                differs = differs || (!arm[k].run[0]->reference &&
                                      !same_value(d.value[k], l->value[j].text));
            }
            if (!differs) continue;
            d.factor = factor_of(d.key);
            *out = mem_grow(*out, (size_t)(n + 1) * sizeof **out);
            (*out)[n++] = d;
        }
    }
    if (n) qsort(*out, (size_t)n, sizeof **out, by_key);
    return n;
}

int differences_factors(const struct difference *d, int n, struct str *names) {
    int factors = 0;
    for (int i = 0; i < n; i++) {
        bool told = !*d[i].factor;
        for (int j = 0; j < i && !told; j++) told = strcmp(d[j].factor, d[i].factor) == 0;
        if (told) continue;
        const size_t bytes = strlen(d[i].factor) - str_ends(d[i].factor, ".");
        str_printf(names, "%s%.*s", factors++ ? ", " : "", (int)bytes, d[i].factor);
    }
    return factors;
}

static bool same_file(const struct result *a, const struct result *b, const char *role) {
    const char *x = result_file_sha256(a, role), *y = result_file_sha256(b, role);
    return !*x || !*y || strcmp(x, y) == 0;
}

bool result_same_settings(const struct result *a, const struct result *b) {
    if (a->reference || b->reference) return false;
    if (!same_file(a, b, "train") || !same_file(a, b, "test")) return false;
    const struct arm pair[2] = { { .run = { (struct result *)(uintptr_t)a }, .n = 1 },
                                 { .run = { (struct result *)(uintptr_t)b }, .n = 1 } };
    struct difference *d;
    const int n = differences_find(&d, pair, 2);
    free(d);
    return n == 0;
}

/* ---- reasons ---- */

static void differ(struct str *out, const struct result *a, const struct result *b,
                   const char *what, const char *x, const char *y) {
    if (!*x || !*y || strcmp(x, y) == 0) return;
    str_printf(out, "%s differs: %s has %.300s, %s has %.300s\n", what, a->f.id, x, b->f.id, y);
}

/* AQN's words may be cut, or two for one thing; the hash of its multipliers is neither. */
static bool same_noise(const char *x, const char *y) {
    const char *hash_x = strrchr(x, '#'), *hash_y = strrchr(y, '#'), *on_x = strstr(x, " on "),
               *on_y = strstr(y, " on ");
    if (!hash_x || !hash_y || !on_x || !on_y) return strcmp(x, y) == 0;
    return on_x - x == on_y - y && !strncmp(x, y, (size_t)(on_x - x)) && !strcmp(hash_x, hash_y);
}

static void noise_differs(struct str *out, const struct result *a, const struct result *b) {
    const char *x = score_noise(a->score), *y = score_noise(b->score);
    if (!same_noise(x, y)) differ(out, a, b, "the noise during evaluation", x, y);
}

static const char *value_or(const struct result *r, const char *key, const char *other) {
    const char *v = result_value(r, key);
    return v && *v && strcmp(v, "0") != 0 ? v : other ? value_or(r, other, NULL) : v ? v : "";
}

/* Hashes of the files that make the prompt and its tokens, in the order of the manifest. */
static void tokenizer_hashes(struct str *out, const struct result *r) {
    const json_t *files = json_object_get(r->manifest, "files");
    str_add(out, "", 0);
    for (size_t i = 0; i < json_array_size(files); i++) {
        const json_t *f = json_array_get(files, i);
        const char *path = json_string_value(json_object_get(f, "path")),
                   *sha = json_string_value(json_object_get(f, "sha256"));
        if (path && sha && strstr(path, "tokenizer")) str_printf(out, "%.12s ", sha);
    }
}

static void prompts_differ(struct str *out, const struct result *a, const struct result *b) {
    struct str x, y;
    str_init(&x);
    str_init(&y);
    tokenizer_hashes(&x, a);
    tokenizer_hashes(&y, b);
    differ(out, a, b, "the tokenizer or the prompt template (by its files' sha256)", x.s, y.s);
    str_release(&x);
    str_release(&y);
    const char *chat_a = result_value(a, "model.chat"), *chat_b = result_value(b, "model.chat");
    if (chat_a && chat_b && strcmp(chat_a, chat_b) != 0)
        str_printf(out, "the prompt template differs: model.chat is '%s' in %s, '%s' in %s\n",
                   chat_a, a->f.id, chat_b, b->f.id);
}

/* Where the formats of the runs differ, that of their scores is part of the treatment. */
bool formats_differ(const struct result *a, const struct result *b) {
    static const char *const key[] = { "quant.weights", "quant.activations", "quant.exclude" };
    for (size_t i = 0; i < COUNT_OF(key); i++)
        if (!same_value(result_value(a, key[i]), result_value(b, key[i]))) return true;
    /* younger than some runs, which had its default's effect */
    const char *x = result_value(a, "quant.adapter"), *y = result_value(b, "quant.adapter");
    return !same_value(x ? x : "none", y ? y : "none");
}

static void measured_differ(struct str *out, const struct result *a, const struct result *b) {
    static const struct { const char *what, *key, *other; } limits[] = {
        { "the temperature of scored answers (eval.temperature)", "eval.temperature", NULL },
        { "eval.top_k", "eval.top_k", NULL },
        { "eval.top_p", "eval.top_p", NULL },
        { "the length of an answer at most (eval.new_max, sample.new_max)", "eval.new_max",
          "sample.new_max" },
    };
    const struct score *x = a->score, *y = b->score;
    differ(out, a, b, "the rule of the score", x->rule, y->rule);
    differ(out, a, b, "the split", x->split, y->split);
    differ(out, a, b, "the test data (sha256)", x->data_sha256, y->data_sha256);
    differ(out, a, b, "the model (sha256)", x->model_sha256, y->model_sha256);
    noise_differs(out, a, b);
    if (!formats_differ(a, b))
        differ(out, a, b, "the format during evaluation", x->quant, y->quant);
    for (size_t i = 0; i < COUNT_OF(limits); i++) {
        const char *of_a = value_or(a, limits[i].key, limits[i].other),
                   *of_b = value_or(b, limits[i].key, limits[i].other);
        if (!same_value(of_a, of_b)) differ(out, a, b, limits[i].what, of_a, of_b);
    }
}

static void unfinished(struct str *out, const struct result *r) {
    if (r->state == RUN_STATE_UNKNOWN)
        str_printf(out, "whether %s came to its end is not known: its file 'state' is missing or "
                        "damaged\n", r->f.id);
    else if (r->state != RUN_STATE_DONE)
        str_printf(out, "%s is %s: its final score is missing\n", r->f.id,
                   run_state_name[r->state]);
    if (!r->score_n) str_printf(out, "%s has no scores\n", r->f.id);
}

/* The last `parts` names of a path: where a file lies does not matter. */
static const char *tail_of(const char *path, int parts) {
    const char *p = path + strlen(path);
    while (p > path && (p[-1] != '/' || --parts > 0)) p--;
    return p;
}

/* A curve of the study is about the model and the questions of the pipeline of its name. */
static void study_differs(struct str *out, const struct result *run, const struct result *study) {
    static const struct { const char *what, *key; int parts; } file[] = {
        { "the model", "model.path", 1 }, { "the test data", "data.test", 2 },
    };
    const char *name = study->f.id + strlen("ref:");
    char path[FS_PATH_MAX];
    struct lang l;
    snprintf(path, sizeof path, "pipelines/%.200s.pipe", name);
    if (str_ends(name, ".tsv") || !fs_exists(path)) return;
    lang_read(&l, path, NULL, 0);
    for (size_t i = 0; i < COUNT_OF(file) && !l.errors; i++) {
        const struct lang_value *v = lang_get(&l, file[i].key);
        const char *own = result_value(run, file[i].key);
        if (!v || !own || !strcmp(tail_of(v->text, file[i].parts), tail_of(own, file[i].parts)))
            continue;
        str_printf(out, "%s is not the study's: %s has %.300s, %s %.300s\n", file[i].what,
                   run->f.id, own, study->f.id, v->text);
    }
    lang_release(&l);
}

void result_reasons(const struct result *a, const struct result *b, struct str *out) {
    unfinished(out, a);
    unfinished(out, b);
    if (a->reference != b->reference)
        study_differs(out, a->reference ? b : a, a->reference ? a : b);
    if (a->reference || b->reference || !a->score_n || !b->score_n) return;
    differ(out, a, b, "the training data (sha256)", result_file_sha256(a, "train"),
           result_file_sha256(b, "train"));
    prompts_differ(out, a, b);
    measured_differ(out, a, b);
}

/* ---- the same run again? ---- */

/* The run's own files and seed count here, its name and where it runs do not. */
static bool of_no_weight(const char *key, bool cublas) {
    static const char *const counts[] = { "run.seed", "model.path", "data.train", "data.test",
                                          "run.score_every" };
    for (size_t i = 0; i < COUNT_OF(counts); i++)
        if (strcmp(key, counts[i]) == 0) return false;
    return is_bookkeeping(key, cublas);
}

bool settings_are(const struct lang *old, struct pipeline *p) {
    const struct lang_value *kernels = lang_get(old, "run.kernels");
    const bool cublas = by_cublas(kernels ? kernels->text : NULL) ||
                        by_cublas(pipeline_text(p, "run.kernels", NULL));
    for (int i = 0; i < p->stages; i++)
        for (int j = 0; j < p->stage[i].about.keys; j++) {
            const struct about_key *k = &p->stage[i].about.key[j];
            struct origin at;
            const char *now = pipeline_value(p, &p->stage[i], k, &at);
            const struct lang_value *was = lang_get(old, k->name);
            if (of_no_weight(k->name, cublas) || !strcmp(k->name, "run.dir") ||
                !strcmp(k->name, "run.id"))
                continue;
            /* a key that is younger than the run had its default's effect */
            if (!was && strcmp(at.file, "default") == 0) continue;
            if (!was || !now || !same_value(was->text, now)) return false;
        }
    return true;
}
