/* noise.c - qerl-model noise: the noise that a run applied, made again from its key.
 *
 * Order: command line, tensors that AQN hits, what is printed and written of them. A token's noise:
 * noise_token.c.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tools/model/noise.h"

#include <math.h>

#include "kernels/pack.h"
#include "lib/base/str.h"
#include "lib/model/safetensors.h"
#include "lib/model/select.h"
#include "lib/stage/aqn.h"
#include "lib/stage/policy.h"
#include "tools/model/args.h"
#include "tools/model/cmd.h"

static const char HELP[] =
    "usage: qerl-model noise RUN --step N [options]\n"
    "       qerl-model noise MODEL --sigma S --seed K --version V [options]\n\n"
    "The exact noise on weights (AQN) of one step: a table of the tensors that it hit, checked\n"
    "against what the run's journal measured; with --site, the noise that one token met at one\n"
    "operation. Everything is drawn again from keys; a step is named by the steps completed\n"
    "before it.\n\n"
    "  --model PATH      the run's model, where it is not at its path any more\n"
    "  --targets T       MODEL only: as noise.aqn.targets (norms)\n"
    "  --tensor NAME     only these, by whole parts: layers.3.input_layernorm, down_proj\n"
    "  --element I       the values of one tensor, from I on (row-major)\n"
    "  --count N         how many of them (8)\n"
    "  --write FILE      all of them as f32 in a safetensors file\n\n"
    "  --site NAME       operations: q_proj k_proj v_proj o_proj gate_proj up_proj down_proj\n"
    "                    scores values probs silu input_layernorm post_attention_layernorm\n"
    "                    norm rope_q rope_k head; gradients: dx_qkv dx_o dx_mlp dx_down dq dk\n"
    "                    dv dprobs dscores dgate dnorm_in dnorm_post dnorm_final rope_dq\n"
    "                    rope_dk dhead; modules: input:NAME output:NAME weight:NAME;\n"
    "                    the adapter's gradient: lora_grad\n"
    "  --prompt U --sample K --position P --layer L --head H\n"
    "                    which token: group, sample (or 'prompt': tokens that all samples\n"
    "                    share), position in the sequence; layer; head (scores, probs, their\n"
    "                    gradients). weight: --layer and --position, the row of the matrix\n"
    "                    (0 of a norm); lora_grad: --layer and --update\n"
    "  --update U        updates of the adapter made before (lora_grad)\n"
    "  --of score        the noisy score of step N instead of what trained; --prompt is the\n"
    "                    question's number\n"
    "  --type T --scale S --rate R\n"
    "                    MODEL only: the noise (relative_gaussian 1)\n\n"
    "examples:\n"
    "  qerl-model noise runs/quickstart-0001 --step 5\n"
    "  qerl-model noise runs/quickstart-0001 --step 5 --tensor layers.3.q_proj --element 0\n"
    "  qerl-model noise models/tiny --sigma 0.01 --seed 7 --version 1 --write n.safetensors\n"
    "  qerl-model noise models/tiny --seed 7 --site q_proj --layer 0 --prompt 12 --sample 3 \\\n"
    "    --position 40 --scale 0.05\n";

/* ---- command line ---- */

static int read_int(const char *name, const char *text, int64_t most, int64_t *out) {
    if (!text) return 0;
    if (str_to_i64(text, out) && *out >= 0 && *out <= most) return 0;
    fprintf(stderr, "qerl-model noise: --%s '%s' must be a whole number from 0 to %lld\n", name,
            text, (long long)most);
    return -1;
}

static int read_num(const char *name, const char *text, double *out) {
    if (!text || (str_to_f64(text, out) && *out >= 0)) return 0;
    fprintf(stderr, "qerl-model noise: --%s '%s' must be a number, 0 or more\n", name, text);
    return -1;
}

static int read_seed(const char *text, struct ask *a) {
    char *end = NULL;
    if (!text) return 0;
    a->seeded = true;
    a->seed = strtoull(text, &end, 10);
    if (*text >= '0' && *text <= '9' && !*end) return 0;
    fprintf(stderr, "qerl-model noise: --seed '%s' must be a whole number\n", text);
    return -1;
}

static int read_of(const char *text, struct ask *a) {
    a->score = text && strcmp(text, "score") == 0;
    if (!text || a->score) return 0;
    fprintf(stderr, "qerl-model noise: --of '%s': it can be 'score'\n", text);
    return -1;
}

/* As args_parse. */
static int parse(struct ask *a, int argc, char **argv) {
    const char *step = NULL, *version = NULL, *element = NULL, *count = NULL, *prompt = NULL,
               *sample = NULL, *position = NULL, *layer = NULL, *head = NULL, *seed = NULL,
               *sigma = NULL, *scale = NULL, *rate = NULL, *update = NULL, *of = NULL;
    *a = (struct ask){ .step = -1,
                       .version = -1,
                       .element = -1,
                       .count = 8,
                       .prompt = -1,
                       .sample = -1,
                       .position = -1,
                       .layer = -1,
                       .head = -1,
                       .update = -1,
                       .sigma = -1,
                       .scale = -1,
                       .rate = -1 };
    const struct arg arg[] = {
        { "step", &step, NULL },          { "version", &version, NULL },
        { "element", &element, NULL },    { "count", &count, NULL },
        { "prompt", &prompt, NULL },      { "sample", &sample, NULL },
        { "position", &position, NULL },  { "layer", &layer, NULL },
        { "head", &head, NULL },          { "seed", &seed, NULL },
        { "sigma", &sigma, NULL },        { "scale", &scale, NULL },
        { "rate", &rate, NULL },          { "model", &a->model, NULL },
        { "targets", &a->targets, NULL }, { "tensor", &a->tensor, NULL },
        { "write", &a->write, NULL },     { "site", &a->site, NULL },
        { "type", &a->type, NULL },       { "update", &update, NULL },
        { "of", &of, NULL },
    };
    int rc = args_parse(argc, argv, HELP, arg, COUNT_OF(arg), &a->path);
    if (rc != 1) return rc;
    const bool shared = sample && strcmp(sample, "prompt") == 0;
    if (read_int("step", step, INT64_MAX, &a->step) < 0 ||
        read_int("version", version, INT64_MAX, &a->version) < 0 ||
        read_int("element", element, UINT32_MAX, &a->element) < 0 ||
        read_int("count", count, 1 << 18, &a->count) < 0 ||
        read_int("prompt", prompt, INT64_MAX, &a->prompt) < 0 ||
        read_int("sample", shared ? NULL : sample, KERN_NOISE_NO_SAMPLE - 1, &a->sample) < 0 ||
        read_int("position", position, INT32_MAX, &a->position) < 0 ||
        read_int("layer", layer, MODEL_LAYERS_MAX - 1, &a->layer) < 0 ||
        read_int("head", head, 1023, &a->head) < 0 ||
        read_int("update", update, INT64_MAX, &a->update) < 0 || read_of(of, a) < 0 ||
        read_seed(seed, a) < 0 ||
        read_num("sigma", sigma, &a->sigma) < 0 || read_num("scale", scale, &a->scale) < 0 ||
        read_num("rate", rate, &a->rate) < 0)
        return -1;
    if (shared) a->sample = ASK_SAMPLE_PROMPT;
    return 1;
}

/* ---- tensors ---- */

struct tensor {
    char name[SELECT_NAME_MAX];
    double times;
    int rank;
    int64_t shape[2];
    int number; /* noise_draw's tensor */
};
struct tensors {
    struct tensor *v;
    int n;
};

static void add(struct tensors *t, enum noise_module m, int layer, double times,
                const struct ask *a, const struct model_conf *c) {
    struct tensor x = { .times = times, .rank = 1, .shape = { c->dim, 1 } };
    if (!(times > 0) || (a->tensor && !noise_module_hit(a->tensor, m, layer))) return;
    if (m <= NOISE_MODULE_DOWN) {
        int out, in;
        model_proj_shape(c, (enum proj)m, &out, &in);
        select_proj_name(x.name, layer, (enum proj)m);
        x.rank = 2, x.shape[0] = out, x.shape[1] = in;
        x.number = noise_tensor_linear(c, layer, (enum proj)m);
    } else {
        x.number = m == NOISE_MODULE_NORM_FINAL ? 2 * c->layers
                                                : 2 * layer + (m == NOISE_MODULE_NORM_POST);
        select_norm_name(x.name, x.number, c->layers);
    }
    t->v = mem_grow(t->v, (size_t)(t->n + 1) * sizeof *t->v);
    t->v[t->n++] = x;
}

static void list(struct tensors *t, const struct noise_target *target, const struct ask *a,
                 const struct model_conf *c) {
    for (int l = 0; l < c->layers; l++) {
        add(t, NOISE_MODULE_NORM_IN, l, (double)target->norm[2 * l], a, c);
        add(t, NOISE_MODULE_NORM_POST, l, (double)target->norm[2 * l + 1], a, c);
        for (enum proj p = 0; p < PROJ_COUNT; p++)
            add(t, (enum noise_module)p, l, (double)target->linear[l][p], a, c);
    }
    add(t, NOISE_MODULE_NORM_FINAL, 0, (double)target->norm[2 * c->layers], a, c);
}

static size_t values(const struct tensor *x) { return (size_t)(x->shape[0] * x->shape[1]); }

/* What is added to the weights: of linears the bf16 that their noise is rounded to. */
static float *draw(const struct tensor *x, const struct origin *s) {
    float *v = mem_alloc(values(x) * sizeof *v);
    (x->rank == 2 ? noise_draw_linear : noise_draw)(v, 0, values(x), x->times * s->sigma,
                                                    s->noise_seed, (uint64_t)s->version,
                                                    x->number);
    return v;
}

/* ---- output ---- */

static void print_values(const struct tensor *x, const struct origin *s, const struct ask *a) {
    float *v = draw(x, s);
    printf("%s\n", x->name);
    for (int64_t i = a->element; i < a->element + a->count && i < (int64_t)values(x); i++)
        printf("%-10lld %.9g\n", (long long)i, (double)v[i]);
    free(v);
}

static void print_table(const struct tensors *t, const struct origin *s) {
    printf("%-48s %10s %9s  %s\n", "tensor", "multiplier", "values", "rms of the noise");
    for (int k = 0; k < t->n; k++) {
        double sum = 0;
        float *v = draw(&t->v[k], s);
        for (size_t i = 0; i < values(&t->v[k]); i++) sum += (double)v[i] * (double)v[i];
        free(v);
        printf("%-48s %10.6g %9zu  %.6g\n", t->v[k].name, t->v[k].times, values(&t->v[k]),
               sqrt(sum / (double)values(&t->v[k])));
    }
}

static int write_file(const struct tensors *t, const struct origin *s, const char *path,
                      struct err *e) {
    struct st_out *out = mem_alloc((size_t)t->n * sizeof *out);
    for (int k = 0; k < t->n; k++)
        out[k] = (struct st_out){ .name = t->v[k].name,
                                  .rank = t->v[k].rank,
                                  .shape = { t->v[k].shape[0], t->v[k].shape[1] },
                                  .data = draw(&t->v[k], s) };
    int rc = st_write(path, out, t->n, NULL, e);
    for (int k = 0; k < t->n; k++) free((void *)(uintptr_t)out[k].data);
    free(out);
    if (rc == 0) printf("written    %s: %d tensors\n", path, t->n);
    return rc;
}

/* The whole view once more, measured as the rollout measured it. */
static int print_proof(const struct origin *s, const struct noise_target *target,
                       const struct model *m, struct err *e) {
    struct noise_view v;
    const struct rec_group *g = &s->group.group;
    if (noise_view_open(&v, m, target, s->sigma, s->noise_seed, (uint64_t)s->version, e) < 0)
        return -1;
    const bool same = s->run && s->same && v.realised == g->sigma_realised &&
                      v.elements == g->noise_elements && v.changed == g->noise_changed;
    printf("key        seed %llu, version %lld\n", (unsigned long long)s->noise_seed,
           (long long)s->version);
    printf("sigma      %.9g intended, %.9g realised on %lld values, %.3g of the weights' size\n",
           v.sigma, v.realised, (long long)v.elements, v.strength);
    printf("changed    %lld in f32, %lld had they been stored as bf16\n", (long long)v.changed,
           (long long)v.changed_bf16);
    noise_view_close(&v);
    if (!s->run) return 0;
    printf("journal    %s with %d group%s of the step: %.9g realised\n",
           same ? "agrees" : "DISAGREES", s->groups, s->groups == 1 ? "" : "s", g->sigma_realised);
    if (same) return 0;
    return err_set(e, "what the journal measured is not what this key and these settings give: "
                      "another model, other settings or a damaged run");
}

static int show(const struct origin *s, const struct ask *a, const struct model *m, struct err *e) {
    struct noise_target target;
    struct tensors t = { 0 };
    const struct noise_target_text text = {
        a->targets ? a->targets : "norms", "", "", 1, "", "", 0, 1, 1
    };
    int rc = s->run ? aqn_target(&target, &s->shared, a->step, &m->conf, e)
                    : noise_target_make(&target, &text, 0, 1, &m->conf, e);
    if (rc == 0) list(&t, &target, a, &m->conf);
    if (rc == 0 && !t.n)
        rc = err_code(e, EXIT_USAGE, "--tensor '%s' names nothing that the noise hits", a->tensor);
    if (rc == 0 && a->element >= 0 && t.n > 1)
        rc = err_code(e, EXIT_USAGE,
                      "--element needs one tensor, %d are hit: name it with --tensor", t.n);
    if (rc == 0 && a->element >= (int64_t)(t.n ? values(&t.v[0]) : 0))
        rc = err_code(e, EXIT_USAGE, "--element %lld: '%s' has elements 0 to %zu",
                      (long long)a->element, t.v[0].name, values(&t.v[0]) - 1);
    if (rc == 0) rc = print_proof(s, &target, m, e);
    if (rc == 0 && a->element >= 0) print_values(&t.v[0], s, a);
    else if (rc == 0 && !a->write) print_table(&t, s);
    if (rc == 0 && a->write) rc = write_file(&t, s, a->write, e);
    free(t.v);
    return rc;
}

/* The other noise that weights can have. */
static int print_modules(const struct origin *s, const char *path, struct err *e) {
    struct noise_plan p;
    struct model_conf c;
    if (model_conf_load(&c, path, e) < 0 || treatment_plan(&p, &s->shared, &c, false, e) < 0)
        return -1;
    if (!p.module_text.type || p.module_text.point != NOISE_POINT_WEIGHT) return 0;
    printf("modules    %s %.9g on weights of %s, layers %s, key seed %llu: --site weight:NAME\n",
           noise_type_name[p.module_text.type], p.module_text.scale, p.module_text.names,
           p.module_text.layers, (unsigned long long)s->noise_seed);
    return 0;
}

static int weights(const struct origin *s, const struct ask *a, struct err *e) {
    struct kern k;
    struct model *m = NULL;
    struct model_opts o = { .path = a->path, .quant = MODEL_QUANT_BF16 };
    if (!s->run && (a->sigma < 0 || a->version < 0 || !a->seeded))
        return err_code(e, EXIT_USAGE,
                        "'%s' is no run folder: a key is needed, --sigma S --seed K "
                        "--version V",
                        a->path);
    if (s->run) {
        o = policy_model_opts(&s->shared);
        if (a->model) o.path = a->model;
    }
    if (s->run && print_modules(s, o.path, e) < 0) return -1;
    if (s->sigma == 0) {
        printf("sigma      0: AQN added nothing to the weights\n");
        if (s->run && (s->shared.ops.type || s->shared.modules.type))
            printf("           the run's noise on %s is shown by --site\n",
                   !s->shared.modules.type ? "operators"
                   : !s->shared.ops.type   ? "modules"
                                           : "operators and modules");
        return 0;
    }
    struct pool *pool = pool_create(pool_cores());
    int rc = kern_open(&k, NULL, pool, e);
    if (rc == 0) rc = model_open(&m, &k, &o, e);
    if (rc == 0) rc = show(s, a, m, e);
    if (m) model_close(&m);
    pool_destroy(&pool);
    return rc;
}

int cmd_noise(int argc, char **argv) {
    struct ask a;
    struct origin s;
    struct err e = { 0 };
    const int parsed = parse(&a, argc, argv);
    if (parsed != 1) return parsed == 0 ? EXIT_DONE : EXIT_USAGE;
    int rc = 0;
    if (a.score && !a.site)
        rc = err_code(&e, EXIT_USAGE, "--of score is for --site: AQN of a noisy score is that of "
                                      "the rollouts after it");
    if (rc == 0 && (rc = origin_open(&s, &a, &e)) == 0) {
        if (s.run)
            printf("run        %s, %sstep %lld of %lld\n", s.shared.run.id,
                   a.score ? "score of " : "", (long long)a.step, (long long)s.shared.run.steps);
        rc = a.site ? noise_of_token(&s, &a, &e) : weights(&s, &a, &e);
        origin_close(&s);
    }
    if (rc == 0) return EXIT_DONE;
    fprintf(stderr, "qerl-model noise: %s\n", e.text);
    return e.code ? e.code : EXIT_FAILED;
}
