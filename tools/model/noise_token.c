/* noise_token.c - the noise that one token met at one site: drawn again from its key and counter,
 * which is all that the draw ever depended on.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/noise_math.h"
#include "lib/base/rng.h"
#include "lib/base/str.h"
#include "tools/model/noise.h"

/* LAST: behind the layers; HEADS: of each attention head. what: enum noise_op, of "input:NAME" and
 * "output:NAME" enum noise_module. */
enum { LAST = 1, HEADS = 2 };
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
};

/* "q_proj" of the operations; "input:q_proj", "output:q_proj" of the modules. */
static int find_site(struct site *out, bool *module, const char *name, struct err *e) {
    const char *names[COUNT_OF(sites)], *part = strchr(name, ':');
    *module = part != NULL;
    for (size_t i = 0; i < COUNT_OF(sites); i++) names[i] = sites[i].name;
    for (int m = 0; part && m < NOISE_MODULE_COUNT; m++) {
        const bool input = str_starts(name, "input:");
        if (strcmp(part + 1, noise_module_name[m]) || !(input || str_starts(name, "output:")))
            continue;
        *out = (struct site){ name,
                              (input ? NOISE_SITE_MODULE_INPUT : NOISE_SITE_MODULE_OUTPUT) + m,
                              m, noise_module_in_layer((enum noise_module)m) ? 0 : LAST };
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
               (p->module_text.point == NOISE_POINT_INPUT) ==
                   (site->number < NOISE_SITE_MODULE_OUTPUT) &&
               p->module_text.point != NOISE_POINT_WEIGHT;
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
        treatment_plan(&p, &s->shared, &c, false, e) < 0)
        return -1;
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

static int complete(const struct ask *a, const struct site *site, struct err *e) {
    const bool layer = !(site->flags & LAST), head = site->flags & HEADS;
    if (a->prompt >= 0 && a->position >= 0 && a->sample != -1 && (!layer || a->layer >= 0) &&
        (!head || a->head >= 0))
        return 0;
    return err_code(e, EXIT_USAGE, "--site %s needs --prompt, --sample, --position%s%s", site->name,
                    layer ? " and --layer" : "", head ? " and --head" : "");
}

/* The counter's first three words, as the forward pass makes them. */
static int place(uint32_t counter[3], const struct origin *s, const struct ask *a,
                 const struct site *site, bool fixed, struct err *e) {
    const struct rec_group *g = &s->group.group;
    const int64_t k = a->sample;
    if (s->run && g->group != a->prompt)
        return err_code(e, EXIT_USAGE, "no group %lld was made in step %lld; one that was: %lld",
                        (long long)a->prompt, (long long)a->step, (long long)g->group);
    if (s->run && k >= g->samples)
        return err_code(e, EXIT_USAGE, "group %lld has samples 0 to %d", (long long)g->group,
                        g->samples - 1);
    /* the last token of an answer is never an input */
    const int last = s->run ? g->prompt_ids.n - 2 + (k >= 0 ? g->sample[k].ids.n : 1) : INT32_MAX;
    if (a->position > last)
        return err_code(e, EXIT_USAGE, "the positions computed there were 0 to %d", last);
    const bool shared = k == ASK_SAMPLE_PROMPT || (s->run && a->position < g->prompt_ids.n);
    counter[0] = fixed ? ~0u : (uint32_t)((uint64_t)a->prompt ^ (uint64_t)a->prompt >> 32);
    counter[1] = (fixed || shared ? (uint32_t)KERN_NOISE_NO_SAMPLE : (uint32_t)k) |
                 (site->flags & HEADS ? (uint32_t)a->head << 16 : 0);
    counter[2] = fixed ? ~0u : (uint32_t)a->position;
    return 0;
}

int noise_of_token(const struct origin *s, const struct ask *a, struct err *e) {
    struct kern_noise n = { 0 };
    struct site site = { 0 };
    bool module = false;
    uint32_t counter[4];
    if (find_site(&site, &module, a->site, e) < 0 || complete(a, &site, e) < 0 ||
        (s->run ? kind_of_run(&n, s, a, &site, module, e) : kind_asked(&n, a, e)) < 0)
        return -1;
    if (n.type == KERN_NOISE_DEADZONE || n.type == KERN_NOISE_BIAS)
        return err_code(e, EXIT_USAGE, "%s draws nothing: its effect follows from the values alone",
                        noise_type_name[n.type]);
    const bool fixed = n.type == KERN_NOISE_SYSTEMATIC, last = site.flags & LAST;
    if (place(counter, s, a, &site, fixed, e) < 0) return -1;
    n.site = KERN_NOISE_SITE(last ? 0 : a->layer, site.number);
    rng_key(n.key, fixed ? s->seed : s->noise_seed, RNG_PURPOSE_OP_NOISE, fixed);
    printf("noise      %s %.7g", noise_type_name[n.type], (double)n.scale);
    if (n.type == KERN_NOISE_SPARSE) printf(" at rate %.7g", (double)n.rate);
    printf("%s, site %s", n.bf16 ? " in bf16" : "", site.name);
    if (!last) printf(" of layer %lld", (long long)a->layer);
    printf("\nkey        %08x %08x, counter %08x %08x %08x, then %08x + element / 4\n", n.key[0],
           n.key[1], counter[0], counter[1], counter[2], n.site);
    printf("element    z              %s\n", n.type == KERN_NOISE_ABSOLUTE_GAUSSIAN ? "e"
                                             : fixed                                ? "e / t"
                                                                                    : "e / |t|");
    const int64_t first = a->element < 0 ? 0 : a->element;
    for (int64_t i = first; i < first + a->count; i++) {
        float z[4];
        counter[3] = n.site | (uint32_t)(i / 4);
        kern_noise_draw4(z, &n, counter);
        const float drawn = kern_noise_round(z[i % 4], n.bf16);
        printf("%-10lld %-14.9g %.9g\n", (long long)i, (double)drawn, (double)(drawn * n.scale));
    }
    return 0;
}
