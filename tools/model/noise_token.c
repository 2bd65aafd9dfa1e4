/* noise_token.c - the noise that one token met at one site: drawn again from its key and counter,
 * which is all that the draw ever depended on.
 * SPDX-License-Identifier: Apache-2.0 */
#include "kernels/noise_math.h"
#include "lib/base/rng.h"
#include "lib/base/str.h"
#include "lib/stage/policy.h"
#include "tools/model/noise.h"

/* What --site names: of an operation (what: enum noise_op) or of a module (enum noise_module);
 * flags as noise_site.h has them; rows: of weights, not of tokens. */
struct site { const char *name; int number, what, flags; bool module, rows; };

/* "input:q_proj", "output:q_proj", "weight:q_proj" */
static bool find_module(struct site *out, const char *name) {
    const char *part = strchr(name, ':') + 1;
    for (int at = 0; at < NOISE_POINT_COUNT; at++)
        for (int m = 0; m < NOISE_MODULE_COUNT; m++) {
            const size_t point = strlen(noise_point_name[at]);
            if (strcmp(part, noise_module_name[m]) || part != name + point + 1 ||
                !str_starts(name, noise_point_name[at]))
                continue;
            *out = (struct site){ .name = name,
                                  .number = noise_site_module((enum noise_point)at,
                                                              (enum noise_module)m),
                                  .what = m,
                                  .flags = noise_module_in_layer((enum noise_module)m)
                                               ? 0 : NOISE_SITE_LAST,
                                  .module = true,
                                  .rows = at == NOISE_POINT_WEIGHT };
            return true;
        }
    return false;
}

static int find_site(struct site *out, const char *name, struct err *e) {
    const char *names[NOISE_SITE_COUNT], *near = NULL;
    int count = 0;
    if (strchr(name, ':') && find_module(out, name)) return 0;
    for (int i = 0; i < NOISE_SITE_COUNT; i++) {
        const struct noise_site_about *about = &noise_site_about[i];
        if (!about->name) continue;
        names[count++] = about->name;
        *out = (struct site){ about->name, i, (int)about->op, about->flags, false, false };
        if (strcmp(name, about->name) == 0) return 0;
    }
    if (!strchr(name, ':')) near = str_nearest(name, names, (size_t)count);
    return err_code(e, EXIT_USAGE, "--site '%s' is no site%s%s%s; see --help", name,
                    near ? ", did you mean '" : "", near ? near : "", near ? "'?" : "");
}

/* Whether the run's plan has noise at this site at all. */
static bool hits(const struct noise_plan *p, const struct site *site, int64_t layer) {
    const bool last = site->flags & NOISE_SITE_LAST;
    if (!last && layer >= p->layers) return false;
    if (site->module)
        return p->module_text.type && p->module[last ? 0 : layer][site->what] &&
               noise_site_module(p->module_text.point, (enum noise_module)site->what) ==
                   site->number;
    const bool backward = noise_site_direction(site->number) == NOISE_BACKWARD;
    return p->op_text.type && p->op[site->what] &&
           (backward ? p->op_text.backward : p->op_text.forward) &&
           (last ? p->op_whole : p->op_layer[layer]);
}

static int kind_of_run(struct kern_noise *n, const struct origin *s, const struct ask *a,
                       const struct site *site, struct err *e) {
    struct noise_plan p;
    struct model_conf c;
    if (model_conf_load(&c, a->model ? a->model : s->shared.model.path, e) < 0 ||
        treatment_plan(&p, &s->shared, &c, a->score, e) < 0)
        return -1;
    if (a->score) p.op_text.backward = false;
    const struct noise_text *t = site->module ? &p.module_text : &p.op_text;
    *n = (struct kern_noise){ .type = (enum kern_noise_type)t->type,
                              .scale = (float)t->scale,
                              .rate = (float)t->rate,
                              .bf16 = t->bf16 };
    if (hits(&p, site, a->layer)) return 0;
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
    const bool layer = !(site->flags & NOISE_SITE_LAST), head = site->flags & NOISE_SITE_HEADS;
    const bool token = a->prompt >= 0 && a->sample != -1;
    if (site->flags & NOISE_SITE_OF_GRAD)
        return s->run && a->update >= 0 && a->layer >= 0
                   ? 0
                   : err_code(e, EXIT_USAGE, "--site lora_grad needs a run, --layer and --update");
    if (site->rows && a->position >= 0 && (!layer || a->layer >= 0)) return 0;
    if (site->rows)
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
    if (site->rows) {
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
                 (site->flags & NOISE_SITE_HEADS ? (uint32_t)a->head << 16 : 0);
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
    if (!(site->flags & NOISE_SITE_OF_GRAD)) return 0;
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
    if (!(site->flags & NOISE_SITE_LAST)) printf(" of layer %lld", (long long)a->layer);
    if (!(site->flags & NOISE_SITE_OF_GRAD))
        printf("\nkey        %08x %08x, counter %08x %08x %08x, then %08x + element / 4", n->key[0],
               n->key[1], counter[0], counter[1], counter[2], n->site);
    printf("\nelement    z              %s\n", n->type == KERN_NOISE_ABSOLUTE_GAUSSIAN ? "e"
                                               : n->type == KERN_NOISE_SYSTEMATIC      ? "e / t"
                                                                                       : "e / |t|");
}

int noise_of_token(const struct origin *s, const struct ask *a, struct err *e) {
    struct kern_noise n = { 0 };
    struct site site = { 0 };
    uint32_t counter[4] = { 0 };
    int64_t params;
    if (find_site(&site, a->site, e) < 0 || complete(s, a, &site, e) < 0 ||
        (s->run ? kind_of_run(&n, s, a, &site, e) : kind_asked(&n, a, e)) < 0 ||
        grad_params(&params, s, a, &site, e) < 0)
        return -1;
    if (!kern_noise_draws(n.type) && site.rows) {
        printf("noise      %s %.7g, site %s\n", noise_type_name[n.type], (double)n.scale,
               site.name);
        return noise_of_row(&n, s, a, (enum noise_module)site.what, e);
    }
    if (!kern_noise_draws(n.type))
        return err_code(e, EXIT_USAGE, "%s draws nothing: its effect follows from the values alone",
                        noise_type_name[n.type]);
    const bool fixed = n.type == KERN_NOISE_SYSTEMATIC;
    if (!params && place(counter, s, a, &site, fixed, e) < 0) return -1;
    n.site = KERN_NOISE_SITE(site.flags & NOISE_SITE_LAST ? 0 : a->layer, site.number);
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
