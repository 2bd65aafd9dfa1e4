/* noise_token.c - the noise that one token met at one site: drawn again from its key and counter,
 * which is all that the draw ever depended on.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/noise_math.h"
#include "lib/base/rng.h"
#include "lib/base/str.h"
#include "lib/stage/policy.h"
#include "tools/model/noise.h"

/* LAST: behind the layers; HEADS: of each attention head; ROWS: of rows of weights, not of tokens;
 * GRAD: of the adapter's gradient. what: enum noise_op, of "input:NAME" and so on enum
 * noise_module. */
enum { LAST = 1, HEADS = 2, ROWS = 4, GRAD = 8 };
static const struct site { const char *name; int number, what, flags; } sites[] = {
    { "q_proj", PROJ_Q, NOISE_OP_MATMUL, 0 },
    { "k_proj", PROJ_K, NOISE_OP_MATMUL, 0 },
    { "v_proj", PROJ_V, NOISE_OP_MATMUL, 0 },
    { "o_proj", PROJ_O, NOISE_OP_MATMUL, 0 },
    { "gate_proj", PROJ_GATE, NOISE_OP_MATMUL, 0 },
    { "up_proj", PROJ_UP, NOISE_OP_MATMUL, 0 },
    { "down_proj", PROJ_DOWN, NOISE_OP_MATMUL, 0 },
    { "scores", NOISE_SITE_SCORES, NOISE_OP_BMM, HEADS },
    { "values", NOISE_SITE_VALUES, NOISE_OP_BMM, 0 },
    { "probs", NOISE_SITE_PROBS, NOISE_OP_SOFTMAX, HEADS },
    { "silu", NOISE_SITE_SILU, NOISE_OP_SILU, 0 },
    { "input_layernorm", NOISE_SITE_NORM_IN, NOISE_OP_NORM, 0 },
    { "post_attention_layernorm", NOISE_SITE_NORM_POST, NOISE_OP_NORM, 0 },
    { "norm", NOISE_SITE_NORM_FINAL, NOISE_OP_NORM, LAST },
    { "rope_q", NOISE_SITE_ROPE_Q, NOISE_OP_ROPE, 0 },
    { "rope_k", NOISE_SITE_ROPE_K, NOISE_OP_ROPE, 0 },
    { "head", NOISE_SITE_HEAD, NOISE_OP_HEAD, LAST },
    { "dx_qkv", NOISE_SITE_DX_QKV, NOISE_OP_MATMUL, 0 },
    { "dx_o", NOISE_SITE_DX_O, NOISE_OP_MATMUL, 0 },
    { "dx_mlp", NOISE_SITE_DX_MLP, NOISE_OP_MATMUL, 0 },
    { "dx_down", NOISE_SITE_DX_DOWN, NOISE_OP_MATMUL, 0 },
    { "dq", NOISE_SITE_DQ, NOISE_OP_BMM, 0 },
    { "dk", NOISE_SITE_DK, NOISE_OP_BMM, 0 },
    { "dv", NOISE_SITE_DV, NOISE_OP_BMM, 0 },
    { "dprobs", NOISE_SITE_DPROBS, NOISE_OP_BMM, HEADS },
    { "dscores", NOISE_SITE_DSCORES, NOISE_OP_SOFTMAX, HEADS },
    { "dgate", NOISE_SITE_DGATE, NOISE_OP_SILU, 0 },
    { "dnorm_in", NOISE_SITE_DNORM_IN, NOISE_OP_NORM, 0 },
    { "dnorm_post", NOISE_SITE_DNORM_POST, NOISE_OP_NORM, 0 },
    { "dnorm_final", NOISE_SITE_DNORM_FINAL, NOISE_OP_NORM, LAST },
    { "rope_dq", NOISE_SITE_ROPE_DQ, NOISE_OP_ROPE, 0 },
    { "rope_dk", NOISE_SITE_ROPE_DK, NOISE_OP_ROPE, 0 },
    { "dhead", NOISE_SITE_DHEAD, NOISE_OP_HEAD, LAST },
    { "lora_grad", NOISE_SITE_GRAD, NOISE_OP_MATMUL, GRAD },
};
static const struct { const char *name; enum noise_point at; int number; } points[] = {
    { "input:", NOISE_POINT_INPUT, NOISE_SITE_MODULE_INPUT },
    { "output:", NOISE_POINT_OUTPUT, NOISE_SITE_MODULE_OUTPUT },
    { "weight:", NOISE_POINT_WEIGHT, NOISE_SITE_MODULE_WEIGHT },
};

/* "q_proj" of the operations; "input:q_proj", "output:q_proj", "weight:q_proj" of the modules. */
static int find_site(struct site *out, bool *module, const char *name, struct err *e) {
    const char *names[COUNT_OF(sites)], *part = strchr(name, ':');
    *module = part != NULL;
    for (size_t i = 0; i < COUNT_OF(sites); i++) names[i] = sites[i].name;
    for (int m = 0; part && m < NOISE_MODULE_COUNT; m++)
        for (size_t i = 0; i < COUNT_OF(points); i++) {
            if (strcmp(part + 1, noise_module_name[m]) || !str_starts(name, points[i].name))
                continue;
            *out = (struct site){ name, points[i].number + m, m,
                                  (noise_module_in_layer((enum noise_module)m) ? 0 : LAST) |
                                      (points[i].at == NOISE_POINT_WEIGHT ? ROWS : 0) };
            return 0;
        }
    for (size_t i = 0; !part && i < COUNT_OF(sites); i++)
        if (strcmp(name, sites[i].name) == 0) {
            *out = sites[i];
            return 0;
        }
    const char *near = part ? NULL : str_nearest(name, names, COUNT_OF(sites));
    return err_code(e, EXIT_USAGE, "--site '%s' is no site%s%s%s; see --help", name,
                    near ? ", did you mean '" : "", near ? near : "", near ? "'?" : "");
}

/* Whether the run's plan has noise at this site at all. */
static bool hits(const struct noise_plan *p, const struct site *site, bool module, int64_t layer) {
    const bool last = site->flags & LAST;
    if (!last && layer >= p->layers) return false;
    if (module)
        return p->module_text.type && p->module[last ? 0 : layer][site->what] &&
               points[p->module_text.point].number == site->number - site->what;
    const bool backward = site->number >= NOISE_SITE_DX_QKV;
    return p->op_text.type && p->op[site->what] &&
           (backward ? p->op_text.backward : p->op_text.forward) &&
           (last ? p->op_whole : p->op_layer[layer]);
}

static int kind_of_run(struct kern_noise *n, const struct origin *s, const struct ask *a,
                       const struct site *site, bool module, struct err *e) {
    struct noise_plan p;
    struct model_conf c;
    if (model_conf_load(&c, a->model ? a->model : s->shared.model.path, e) < 0 ||
        treatment_plan(&p, &s->shared, &c, a->score, e) < 0)
        return -1;
    if (a->score) p.op_text.backward = false;
    const struct noise_text *t = module ? &p.module_text : &p.op_text;
    *n = (struct kern_noise){ .type = (enum kern_noise_type)t->type,
                              .scale = (float)t->scale,
                              .rate = (float)t->rate,
                              .bf16 = t->bf16 };
    if (hits(&p, site, module, a->layer)) return 0;
    struct str text = { 0 };
    noise_plan_text(&p, &text);
    err_code(e, EXIT_USAGE, "the run had no noise on %s of layer %lld; it had: %s", site->name,
             (long long)a->layer, text.s);
    str_release(&text);
    return -1;
}

static int kind_asked(struct kern_noise *n, const struct ask *a, struct err *e) {
    const char *type = a->type ? a->type : "relative_gaussian";
    int i = 1;
    while (i < KERN_NOISE_TYPE_COUNT && strcmp(type, noise_type_name[i])) i++;
    if (i == KERN_NOISE_TYPE_COUNT)
        return err_code(e, EXIT_USAGE, "--type '%s' is no type of noise; see --help", type);
    if (!a->seeded)
        return err_code(e, EXIT_USAGE, "'%s' is no run folder: a key is needed, --seed K", a->path);
    *n = (struct kern_noise){ .type = (enum kern_noise_type)i,
                              .scale = a->scale < 0 ? 1 : (float)a->scale,
                              .rate = (float)a->rate };
    if (n->type == KERN_NOISE_SPARSE && a->rate < 0)
        return err_code(e, EXIT_USAGE, "--type sparse needs --rate");
    return 0;
}

static int complete(const struct origin *s, const struct ask *a, const struct site *site,
                    struct err *e) {
    const bool layer = !(site->flags & LAST), head = site->flags & HEADS;
    const bool token = a->prompt >= 0 && a->sample != -1;
    if (site->flags & GRAD)
        return s->run && a->update >= 0 && a->layer >= 0
                   ? 0
                   : err_code(e, EXIT_USAGE, "--site lora_grad needs a run, --layer and --update");
    if (site->flags & ROWS && a->position >= 0 && (!layer || a->layer >= 0)) return 0;
    if (site->flags & ROWS)
        return err_code(e, EXIT_USAGE, "--site %s needs --position, a row of the matrix (0 of a "
                        "norm)%s", site->name, layer ? ", and --layer" : "");
    if (token && a->position >= 0 && (!layer || a->layer >= 0) && (!head || a->head >= 0))
        return 0;
    return err_code(e, EXIT_USAGE, "--site %s needs --prompt, --sample, --position%s%s", site->name,
                    layer ? " and --layer" : "", head ? " and --head" : "");
}

/* The counter's first three words, as the forward pass makes them. */
static int place(uint32_t counter[3], const struct origin *s, const struct ask *a,
                 const struct site *site, bool fixed, struct err *e) {
    const struct rec_group *g = &s->group.group;
    const int64_t k = a->sample;
    if (site->flags & ROWS) {
        counter[0] = ~0u;
        counter[1] = KERN_NOISE_NO_SAMPLE;
        counter[2] = (uint32_t)a->position;
        return 0;
    }
    const bool known = s->run && !a->score;          /* the journal has the token */
    if (known && g->group != a->prompt)
        return err_code(e, EXIT_USAGE, "no group %lld was made in step %lld; one that was: %lld",
                        (long long)a->prompt, (long long)a->step, (long long)g->group);
    if (known && k >= g->samples)
        return err_code(e, EXIT_USAGE, "group %lld has samples 0 to %d", (long long)g->group,
                        g->samples - 1);
    /* the last token of an answer is never an input */
    const int last = known ? g->prompt_ids.n - 2 + (k >= 0 ? g->sample[k].ids.n : 1) : INT32_MAX;
    if (a->position > last)
        return err_code(e, EXIT_USAGE, "the positions computed there were 0 to %d", last);
    const bool shared = k == ASK_SAMPLE_PROMPT || (known && a->position < g->prompt_ids.n);
    counter[0] = fixed ? ~0u : (uint32_t)((uint64_t)a->prompt ^ (uint64_t)a->prompt >> 32);
    counter[1] = (fixed || shared ? (uint32_t)KERN_NOISE_NO_SAMPLE : (uint32_t)k) |
                 (site->flags & HEADS ? (uint32_t)a->head << 16 : 0);
    counter[2] = fixed ? ~0u : (uint32_t)a->position;
    return 0;
}

/* The adapter's gradient: where net_noise_grad places element i of a layer's part of `params`. */
static void place_in_grad(struct kern_noise *n, uint32_t counter[4], int64_t *i,
                          const struct origin *s, const struct ask *a, int64_t params) {
    const bool fixed = n->type == KERN_NOISE_SYSTEMATIC;
    const int64_t wide = fixed ? KERN_NOISE_DIM_MAX : NOISE_GRAD_ROW, row = *i / wide;
    const bool rest = !fixed && row == params / wide;
    *i %= wide;
    n->site = KERN_NOISE_SITE(a->layer, rest ? NOISE_SITE_GRAD_REST : NOISE_SITE_GRAD);
    rng_key(n->key, fixed ? s->seed : s->noise_seed, RNG_PURPOSE_OP_NOISE,
            fixed ? 1 + ((uint64_t)row << 32) : 2 + (uint64_t)a->update);
    counter[0] = ~0u;
    counter[1] = KERN_NOISE_NO_SAMPLE;
    counter[2] = fixed ? ~0u : rest ? 0 : (uint32_t)row;
}

/* Values of a layer's part of the gradient; 0 = it is another site. */
static int grad_params(int64_t *params, const struct origin *s, const struct ask *a,
                       const struct site *site, struct err *e) {
    struct lora_shape shape;
    struct model_conf c;
    *params = 0;
    if (!(site->flags & GRAD)) return 0;
    if (model_conf_load(&c, a->model ? a->model : s->shared.model.path, e) < 0 ||
        policy_lora_shape(&shape, &s->shared, e) < 0)
        return -1;
    *params = (int64_t)(lora_params(&c, &shape) / (size_t)c.layers);
    if (a->element + a->count <= *params) return 0;
    return err_code(e, EXIT_USAGE, "the adapter has elements 0 to %lld in a layer",
                    (long long)*params - 1);
}

static void print_head(const struct kern_noise *n, const uint32_t counter[4], const struct ask *a,
                       const struct site *site) {
    printf("noise      %s %.7g", noise_type_name[n->type], (double)n->scale);
    if (n->type == KERN_NOISE_SPARSE) printf(" at rate %.7g", (double)n->rate);
    printf("%s, site %s", n->bf16 ? " in bf16" : "", site->name);
    if (!(site->flags & LAST)) printf(" of layer %lld", (long long)a->layer);
    if (!(site->flags & GRAD))
        printf("\nkey        %08x %08x, counter %08x %08x %08x, then %08x + element / 4", n->key[0],
               n->key[1], counter[0], counter[1], counter[2], n->site);
    printf("\nelement    z              %s\n", n->type == KERN_NOISE_ABSOLUTE_GAUSSIAN ? "e"
                                               : n->type == KERN_NOISE_SYSTEMATIC      ? "e / t"
                                                                                       : "e / |t|");
}

int noise_of_token(const struct origin *s, const struct ask *a, struct err *e) {
    struct kern_noise n = { 0 };
    struct site site = { 0 };
    bool module = false;
    uint32_t counter[4] = { 0 };
    int64_t params;
    if (find_site(&site, &module, a->site, e) < 0 || complete(s, a, &site, e) < 0 ||
        (s->run ? kind_of_run(&n, s, a, &site, module, e) : kind_asked(&n, a, e)) < 0 ||
        grad_params(&params, s, a, &site, e) < 0)
        return -1;
    if (!kern_noise_draws(n.type) && site.flags & ROWS) {
        printf("noise      %s %.7g, site %s\n", noise_type_name[n.type], (double)n.scale,
               site.name);
        return noise_of_row(&n, s, a, (enum noise_module)site.what, e);
    }
    if (!kern_noise_draws(n.type))
        return err_code(e, EXIT_USAGE, "%s draws nothing: its effect follows from the values alone",
                        noise_type_name[n.type]);
    const bool fixed = n.type == KERN_NOISE_SYSTEMATIC;
    if (!params && place(counter, s, a, &site, fixed, e) < 0) return -1;
    n.site = KERN_NOISE_SITE(site.flags & LAST ? 0 : a->layer, site.number);
    rng_key(n.key, fixed ? s->seed : s->noise_seed, RNG_PURPOSE_OP_NOISE, fixed);
    print_head(&n, counter, a, &site);
    const int64_t first = a->element < 0 ? 0 : a->element;
    for (int64_t i = first; i < first + a->count; i++) {
        float z[4];
        int64_t at = i;
        if (params) place_in_grad(&n, counter, &at, s, a, params);
        counter[3] = n.site | (uint32_t)(at / 4);
        kern_noise_draw4(z, &n, counter);
        const float drawn = kern_noise_round(z[at % 4], n.bf16);
        printf("%-10lld %-14.9g %.9g\n", (long long)i, (double)drawn, (double)(drawn * n.scale));
    }
    return 0;
}
