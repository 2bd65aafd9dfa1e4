/* noise_token.c - the noise that one token met at one site: drawn again from its key and counter,
 * which is all that the draw ever depended on.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/noise_math.h"
#include "lib/base/rng.h"
#include "lib/base/str.h"
#include "tools/model/noise.h"

static const struct site { const char *name; int number; bool last, heads; } sites[] = {
    { "q_proj", PROJ_Q, false, false },
    { "k_proj", PROJ_K, false, false },
    { "v_proj", PROJ_V, false, false },
    { "o_proj", PROJ_O, false, false },
    { "gate_proj", PROJ_GATE, false, false },
    { "up_proj", PROJ_UP, false, false },
    { "down_proj", PROJ_DOWN, false, false },
    { "scores", NOISE_SITE_SCORES, false, true },
    { "values", NOISE_SITE_VALUES, false, false },
    { "probs", NOISE_SITE_PROBS, false, true },
    { "silu", NOISE_SITE_SILU, false, false },
    { "input_layernorm", NOISE_SITE_NORM_IN, false, false },
    { "post_attention_layernorm", NOISE_SITE_NORM_POST, false, false },
    { "norm", NOISE_SITE_NORM_FINAL, true, false },
    { "rope_q", NOISE_SITE_ROPE_Q, false, false },
    { "rope_k", NOISE_SITE_ROPE_K, false, false },
    { "head", NOISE_SITE_HEAD, true, false },
    { "dx_qkv", NOISE_SITE_DX_QKV, false, false },
    { "dx_o", NOISE_SITE_DX_O, false, false },
    { "dx_mlp", NOISE_SITE_DX_MLP, false, false },
    { "dx_down", NOISE_SITE_DX_DOWN, false, false },
    { "dq", NOISE_SITE_DQ, false, false },
    { "dk", NOISE_SITE_DK, false, false },
    { "dv", NOISE_SITE_DV, false, false },
    { "dprobs", NOISE_SITE_DPROBS, false, true },
    { "dscores", NOISE_SITE_DSCORES, false, true },
    { "dgate", NOISE_SITE_DGATE, false, false },
    { "dnorm_in", NOISE_SITE_DNORM_IN, false, false },
    { "dnorm_post", NOISE_SITE_DNORM_POST, false, false },
    { "dnorm_final", NOISE_SITE_DNORM_FINAL, true, false },
    { "rope_dq", NOISE_SITE_ROPE_DQ, false, false },
    { "rope_dk", NOISE_SITE_ROPE_DK, false, false },
    { "dhead", NOISE_SITE_DHEAD, true, false },
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
        *out = (struct site){ name, (input ? NOISE_SITE_MODULE_INPUT : NOISE_SITE_MODULE_OUTPUT) + m,
                              m >= NOISE_MODULE_NORM_FINAL, false };
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

/* Type, scale, rate: of the run's plan, or of the command line. */
static int noise_kind(struct kern_noise *n, const struct origin *s, const struct ask *a, bool module,
                      struct err *e) {
    if (s->run) {
        struct noise_plan p;
        struct model_conf c;
        if (model_conf_load(&c, a->model ? a->model : s->shared.model.path, e) < 0 ||
            treatment_plan(&p, &s->shared, &c, false, e) < 0)
            return -1;
        const struct noise_text *t = module ? &p.module_text : &p.op_text;
        n->type = (enum kern_noise_type)t->type;
        n->scale = (float)t->scale;
        n->rate = (float)t->rate;
        n->bf16 = t->bf16;
        if (n->type == KERN_NOISE_OFF)
            return err_code(e, EXIT_USAGE, "the run has no noise on %s: noise.%s.type is off",
                            module ? "modules" : "operations", module ? "modules" : "ops");
    } else {
        if (!a->seeded)
            return err_code(e, EXIT_USAGE, "'%s' is no run folder: a key is needed, --seed K",
                            a->path);
        const char *type = a->type ? a->type : "relative_gaussian";
        int i = 1;
        while (i < KERN_NOISE_TYPE_COUNT && strcmp(type, noise_type_name[i])) i++;
        if (i == KERN_NOISE_TYPE_COUNT)
            return err_code(e, EXIT_USAGE, "--type '%s' is no type of noise; see --help", type);
        n->type = (enum kern_noise_type)i;
        n->scale = a->scale < 0 ? 1 : (float)a->scale;
        n->rate = a->rate < 0 ? 0 : (float)a->rate;
        if (n->type == KERN_NOISE_SPARSE && a->rate < 0)
            return err_code(e, EXIT_USAGE, "--type sparse needs --rate");
    }
    if (n->type != KERN_NOISE_DEADZONE && n->type != KERN_NOISE_BIAS) return 0;
    return err_code(e, EXIT_USAGE, "%s draws nothing: its effect follows from the values alone",
                    noise_type_name[n->type]);
}

/* The counter's first three words, as the forward pass makes them. */
static int place(uint32_t counter[3], const struct origin *s, const struct ask *a,
                 const struct site *site, bool fixed, struct err *e) {
    const struct rec_group *g = &s->group.group;
    int64_t sample = a->sample;
    if (a->prompt < 0 || a->position < 0 || sample == -1 || (!site->last && a->layer < 0) ||
        (site->heads && a->head < 0))
        return err_code(e, EXIT_USAGE, "--site %s needs --prompt, --sample, --position%s%s",
                        site->name, site->last ? "" : " and --layer", site->heads ? " and --head" : "");
    if (s->run && g->group != a->prompt)
        return err_code(e, EXIT_USAGE, "no group %lld was made in step %lld; one that was: %lld",
                        (long long)a->prompt, (long long)a->step, (long long)g->group);
    if (s->run && sample >= g->samples)
        return err_code(e, EXIT_USAGE, "group %lld has samples 0 to %d", (long long)g->group,
                        g->samples - 1);
    if (s->run && sample >= 0 && a->position >= g->prompt_ids.n + g->sample[sample].ids.n)
        return err_code(e, EXIT_USAGE, "sample %lld of group %lld has positions 0 to %d",
                        (long long)sample, (long long)g->group,
                        g->prompt_ids.n + g->sample[sample].ids.n - 1);
    const bool shared = sample == ASK_SAMPLE_PROMPT || (s->run && a->position < g->prompt_ids.n);
    counter[0] = fixed ? ~0u : (uint32_t)((uint64_t)a->prompt ^ (uint64_t)a->prompt >> 32);
    counter[1] = (fixed || shared ? (uint32_t)KERN_NOISE_NO_SAMPLE : (uint32_t)sample) |
                 (site->heads ? (uint32_t)a->head << 16 : 0);
    counter[2] = fixed ? ~0u : (uint32_t)a->position;
    return 0;
}

int noise_of_token(const struct origin *s, const struct ask *a, struct err *e) {
    struct kern_noise n = { 0 };
    struct site site = { 0 };
    bool module = false;
    uint32_t counter[4];
    if (find_site(&site, &module, a->site, e) < 0 || noise_kind(&n, s, a, module, e) < 0) return -1;
    const bool fixed = n.type == KERN_NOISE_SYSTEMATIC;
    if (place(counter, s, a, &site, fixed, e) < 0) return -1;
    n.site = KERN_NOISE_SITE(site.last ? 0 : a->layer, site.number);
    rng_key(n.key, fixed ? s->seed : s->noise_seed, RNG_PURPOSE_OP_NOISE, fixed);
    printf("noise      %s %.9g", noise_type_name[n.type], (double)n.scale);
    if (n.type == KERN_NOISE_SPARSE) printf(" at rate %.9g", (double)n.rate);
    printf("%s, site %s", n.bf16 ? " in bf16" : "", site.name);
    if (!site.last) printf(" of layer %lld", (long long)a->layer);
    printf("\nkey        %08x %08x, counter %08x %08x %08x, then %08x + element / 4\n", n.key[0],
           n.key[1], counter[0], counter[1], counter[2], n.site);
    printf("element    z              %s\n",
           n.type == KERN_NOISE_ABSOLUTE_GAUSSIAN ? "e" : fixed ? "e / t" : "e / |t|");
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
