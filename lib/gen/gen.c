/* gen.c - continuous batching: admit groups, prefill each prompt once, decode all running samples
 * together.
 *
 * Knows: which rows run, when a sample ends, how its uniform numbers are keyed.
 * Does not know: what a prompt asks, who wants the samples, what the network computes.
 * A group's prompt runs in a base slot; all first tokens are drawn from its last row's logits; then
 * each sample forks the base slot when a row is free. At most one group is partly admitted, so rows
 * + 1 slots are enough, and with pages for all of them at full length nothing can run out on the
 * way. Order: plan and life, queue, admitting, one decode step.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/gen/gen.h"

#include "lib/base/rng.h"

const char *const gen_stop_name[] = { "eos", "stop_string", "length" };

enum { GEN_PREFILL_ROWS = 128, GEN_STOP_IDS_MAX = MODEL_EOS_MAX + 2 };

struct group {                                   /* submitted, not yet wholly admitted */
    struct group *next;
    struct gen_request r;                        /* r.prompt is ours */
    /* base slot, -1 before prefill; samples that have started */
    int slot, admitted;
    int32_t *token;                              /* [samples] first tokens, with their log-probs */
    float *lp, *lp_raw;
};

struct run {                                     /* one row: a sample being decoded */
    bool on;
    struct gen_request r;                        /* prompt NULL */
    int k, slot, n;
    int32_t *ids;                                /* [positions_max] */
    float *lp, *lp_raw;
    /* decoded so far; only kept when there are stop strings */
    struct str text;
};

struct gen {
    const struct model *model;
    const struct tok *tok;
    struct gen_opts o;
    char *stop[GEN_STOPS_MAX];
    size_t stop_len[GEN_STOPS_MAX], stop_longest;
    int32_t stop_id[GEN_STOP_IDS_MAX];
    int stop_ids;
    struct net *net;
    struct run *run;                             /* [rows] */
    struct group *first, *last;
    int64_t tokens_total;
    struct net_row *row;                         /* [rows of a call] */
    struct kern_sampler *sampler;                /* [rows or GEN_SAMPLES_MAX] */
    int32_t *want, *token;
    float *lp, *lp_raw;
    /* [running]: runs in the order they started, so that a group's rows are neighbours */
    int *order, running;
};

/* ---- plan and life ---- */

static int max_int(int a, int b) { return a > b ? a : b; }
static int min_int(int a, int b) { return a < b ? a : b; }

static struct net_opts net_opts_of(const struct gen_opts *o) {
    const int slot_pages = (o->positions_max + KERN_PAGE - 1) / KERN_PAGE;
    return (
        struct net_opts){ .rows_max = max_int(o->rows, min_int(GEN_PREFILL_ROWS, o->positions_max)),
                          .slots_max = o->rows + 1,
                          .positions_max = o->positions_max,
                          .pages_max = (o->rows + 1) * slot_pages,
                          .lora = o->lora,
                          .noise = o->noise,
                          .graphs = o->graphs,
                          .activations = o->activations };
}

size_t gen_plan(const struct model_conf *c, enum model_quant q, const struct gen_opts *o) {
    struct net_opts n = net_opts_of(o);
    return net_plan(c, q, &n) +
           (size_t)o->rows * (size_t)o->positions_max * (sizeof(int32_t) + 2 * sizeof(float));
}

size_t gen_plan_pages(const struct model_conf *c, enum model_quant q, const struct gen_opts *o) {
    struct net_opts n = net_opts_of(o);
    return net_plan_pages(c, q, &n);
}

static void add_stop_id(struct gen *g, int32_t id) {
    for (int i = 0; i < g->stop_ids; i++)
        if (g->stop_id[i] == id) return;
    if (id >= 0 && g->stop_ids < GEN_STOP_IDS_MAX) g->stop_id[g->stop_ids++] = id;
}

/* The model's EOS ids, and the end of a chat turn where the tokenizer has one: base models often
 * list only the former. */
static void find_stops(struct gen *g) {
    for (int i = 0; i < g->model->conf.eos_count; i++) add_stop_id(g, g->model->conf.eos[i]);
    if (g->tok) {
        add_stop_id(g, tok_id(g->tok, "<|im_end|>"));
        add_stop_id(g, tok_id(g->tok, "<|eot_id|>"));
    }
    for (int i = 0; i < g->o.stops; i++) {
        g->stop[i] = mem_dup(g->o.stop[i]);
        g->stop_len[i] = strlen(g->stop[i]);
        if (g->stop_len[i] > g->stop_longest) g->stop_longest = g->stop_len[i];
    }
}

int gen_create(struct gen **out, const struct model *m, const struct tok *t,
               const struct gen_opts *o, struct err *e) {
    assert(o->rows > 0 && o->positions_max > 1 && o->stops >= 0 && o->stops <= GEN_STOPS_MAX &&
           (t || !o->stops));
    *out = NULL;
    for (int i = 0; i < o->stops; i++)
        if (!o->stop[i] || !o->stop[i][0])
            return err_code(e, EXIT_CONFIG, "a stop string is empty");
    struct net_opts no = net_opts_of(o);
    struct net *net;
    if (net_create(&net, m, &no, e) < 0)
        return err_wrap(e, "cannot make a generator of %d rows", o->rows);
    struct gen *g = mem_alloc(sizeof *g);
    *g = (struct gen){ .model = m, .tok = t, .o = *o, .net = net };
    find_stops(g);
    const size_t rows = (size_t)o->rows, calls = (size_t)max_int(no.rows_max, GEN_SAMPLES_MAX),
                 length = (size_t)o->positions_max;
    g->run = mem_alloc(rows * sizeof *g->run);
    for (int i = 0; i < o->rows; i++) {
        g->run[i].ids = mem_alloc(length * sizeof(int32_t));
        g->run[i].lp = mem_alloc(2 * length * sizeof(float));
        g->run[i].lp_raw = g->run[i].lp + length;
        str_init(&g->run[i].text);
    }
    g->row = mem_alloc(calls * sizeof *g->row);
    g->sampler = mem_alloc(calls * sizeof *g->sampler);
    g->want = mem_alloc(2 * calls * sizeof(int32_t));
    g->token = g->want + calls;
    g->lp = mem_alloc(2 * calls * sizeof(float));
    g->lp_raw = g->lp + calls;
    g->order = mem_alloc(rows * sizeof(int));
    *out = g;
    return 0;
}

static void group_destroy(struct group *b) {
    free((void *)(uintptr_t)b->r.prompt);
    free(b->token);
    free(b->lp);
    free(b);
}

void gen_destroy(struct gen **gp) {
    struct gen *g = *gp;
    if (!g) return;
    while (g->first) {
        struct group *b = g->first;
        g->first = b->next;
        group_destroy(b);
    }
    for (int i = 0; i < g->o.rows; i++) {
        free(g->run[i].ids);
        free(g->run[i].lp);
        str_release(&g->run[i].text);
    }
    for (int i = 0; i < g->o.stops; i++) free(g->stop[i]);
    net_destroy(&g->net);
    free(g->run);
    free(g->row);
    free(g->sampler);
    free(g->want);
    free(g->lp);
    free(g->order);
    free(g);
    *gp = NULL;
}

/* ---- queue ---- */

bool gen_idle(const struct gen *g) { return !g->first && !g->running; }
int64_t gen_tokens_total(const struct gen *g) { return g->tokens_total; }

int gen_adopt(struct gen *g, const struct lora *l, const struct noise_view *v, struct err *e) {
    if (!gen_idle(g)) return err_set(e, "cannot change the adapter while samples are being made");
    return net_adopt(g->net, l, v, e);
}

void gen_set_noise(struct gen *g, const struct noise_plan *plan, enum noise_phase phase,
                   uint64_t seed, uint64_t fixed_seed) {
    assert(gen_idle(g));
    net_set_noise(g->net, plan, phase, seed, fixed_seed);
}

int gen_take_noise(struct gen *g, struct noise_evidence *to, struct err *e) {
    return net_take_noise(g->net, to, e);
}

int gen_submit(struct gen *g, const struct gen_request *r, struct err *e) {
    if (r->prompt_n < 1) return err_set(e, "the prompt is empty");
    if (r->samples < 1 || r->samples > GEN_SAMPLES_MAX)
        return err_set(e, "%d samples were asked for; 1 to %d are possible", r->samples,
                       GEN_SAMPLES_MAX);
    if (r->new_max < 1 || r->prompt_n > g->o.positions_max - r->new_max)
        return err_set(e, "a prompt of %d tokens and %d new ones do not fit %d positions",
                       r->prompt_n, r->new_max, g->o.positions_max);
    if (!(r->temperature >= 0) || r->top_k < 0 || !(r->top_p > 0 && r->top_p <= 1))
        return err_set(e, "sampler out of range: temperature %g, top-k %d, top-p %g",
                       (double)r->temperature, r->top_k, (double)r->top_p);
    for (int i = 0; i < r->prompt_n; i++)
        if (r->prompt[i] < 0 || r->prompt[i] >= g->model->conf.vocab)
            return err_set(e, "token id %d of the prompt is outside the vocabulary of %d",
                           r->prompt[i], g->model->conf.vocab);
    struct group *b = mem_alloc(sizeof *b);
    *b = (struct group){ .r = *r, .slot = -1 };
    int32_t *prompt = mem_alloc((size_t)r->prompt_n * sizeof *prompt);
    memcpy(prompt, r->prompt, (size_t)r->prompt_n * sizeof *prompt);
    b->r.prompt = prompt;
    if (g->last && g->first) g->last->next = b;
    else g->first = b;
    g->last = b;
    return 0;
}

/* ---- admitting ---- */

static struct kern_sampler sampler_of(const struct gen_request *r, int k, int position) {
    const uint32_t counter[4] = { (uint32_t)r->prompt_uid, (uint32_t)(r->prompt_uid >> 32),
                                  (uint32_t)k, (uint32_t)position };
    return (struct kern_sampler){ .temperature = r->temperature,
                                  .top_k = r->top_k,
                                  .top_p = r->top_p,
                                  .u = rng_unit(rng_philox(counter, r->key).v[0]) };
}

/* Runs the prompt in its base slot and draws the first token of every sample. */
static int prefill(struct gen *g, struct group *b, struct err *e) {
    const struct gen_request *r = &b->r;
    const int rows_max = net_opts_of(&g->o).rows_max;
    b->slot = net_slot_open(g->net);
    assert(b->slot >= 0);
    for (int at = 0; at < r->prompt_n; at += rows_max) {
        const int count = min_int(rows_max, r->prompt_n - at), last = at + count == r->prompt_n;
        for (int i = 0; i < count; i++)
            g->row[i] = (struct net_row){ .token = r->prompt[at + i],
                                          .slot = b->slot,
                                          .pos = at + i,
                                          .prompt = net_prompt_id(r->prompt_uid),
                                          .sample = KERN_NOISE_NO_SAMPLE };
        g->want[0] = count - 1;
        if (net_forward(g->net, g->row, count, g->want, last, e) < 0) return -1;
    }
    b->token = mem_alloc((size_t)r->samples * sizeof *b->token);
    b->lp = mem_alloc(2 * (size_t)r->samples * sizeof *b->lp);
    b->lp_raw = b->lp + r->samples;
    for (int k = 0; k < r->samples; k++) g->sampler[k] = sampler_of(r, k, 0);
    if (net_sample_row(g->net, 0, g->sampler, r->samples, b->token, b->lp, b->lp_raw, e) < 0)
        return -1;
    g->tokens_total += r->samples;
    return 0;
}

static bool text_has_stop(struct gen *g, struct run *s) {
    const size_t old = s->text.len;
    tok_decode(g->tok, s->ids + s->n - 1, 1, false, &s->text);
    const size_t from = old > g->stop_longest ? old - g->stop_longest : 0;
    for (int i = 0; i < g->o.stops && s->text.len > from; i++)
        if (memmem(s->text.s + from, s->text.len - from, g->stop[i], g->stop_len[i])) return true;
    return false;
}

/* Takes the new token into the sample; true when that ended it (the callback has seen it). */
static bool take_token(struct gen *g, struct run *s, int32_t token, float lp, float lp_raw,
                       gen_take *take, void *ud) {
    s->ids[s->n] = token;
    s->lp[s->n] = lp;
    s->lp_raw[s->n++] = lp_raw;
    enum gen_stop why = GEN_STOP_LENGTH;
    bool ended = s->n == s->r.new_max;
    if (g->o.stops && text_has_stop(g, s)) ended = true, why = GEN_STOP_STRING;
    for (int i = 0; i < g->stop_ids; i++)
        if (g->stop_id[i] == token) ended = true, why = GEN_STOP_EOS;
    if (!ended) return false;
    take(ud, &(struct gen_sample){ .tag = s->r.tag,
                                   .k = s->k,
                                   .ids = s->ids,
                                   .n = s->n,
                                   .lp = s->lp,
                                   .lp_raw = s->lp_raw,
                                   .stop = why });
    return true;
}

static struct run *free_run(struct gen *g) {
    for (int i = 0; i < g->o.rows; i++)
        if (!g->run[i].on) return &g->run[i];
    return NULL;
}

/* Starts sample k of the group in row s; a sample that its first token ends never takes the row. */
static void start(struct gen *g, struct group *b, struct run *s, gen_take *take, void *ud) {
    const int k = b->admitted++;
    s->r = b->r;
    s->r.prompt = NULL;
    s->k = k;
    s->n = 0;
    str_clear(&s->text);
    if (take_token(g, s, b->token[k], b->lp[k], b->lp_raw[k], take, ud)) return;
    s->slot = net_slot_fork(g->net, b->slot, b->r.prompt_n);
    assert(s->slot >= 0);
    s->on = true;
    g->order[g->running++] = (int)(s - g->run);
}

static int admit(struct gen *g, gen_take *take, void *ud, struct err *e) {
    struct run *s;
    while (g->first && (s = free_run(g))) {
        struct group *b = g->first;
        if (b->slot < 0 && prefill(g, b, e) < 0)
            return err_wrap(e, "prompt of %d tokens", b->r.prompt_n);
        while (s && b->admitted < b->r.samples) {
            start(g, b, s, take, ud);
            s = free_run(g);
        }
        if (b->admitted < b->r.samples) break;
        net_slot_close(g->net, b->slot);
        g->first = b->next;
        group_destroy(b);
    }
    return 0;
}

/* ---- decode ---- */

static int decode(struct gen *g, gen_take *take, void *ud, struct err *e) {
    const int rows = g->running;
    if (!rows) return 0;
    for (int i = 0; i < rows; i++) {
        const struct run *s = &g->run[g->order[i]];
        g->row[i] = (struct net_row){ .token = s->ids[s->n - 1],
                                      .slot = s->slot,
                                      .pos = s->r.prompt_n + s->n - 1,
                                      .prompt = net_prompt_id(s->r.prompt_uid),
                                      .sample = (uint32_t)s->k };
        g->sampler[i] = sampler_of(&s->r, s->k, s->n);
    }
    if (net_step(g->net, g->row, rows, g->sampler, g->token, g->lp, g->lp_raw, e) < 0) return -1;
    g->tokens_total += rows;
    g->running = 0;
    for (int i = 0; i < rows; i++) {
        struct run *s = &g->run[g->order[i]];
        if (take_token(g, s, g->token[i], g->lp[i], g->lp_raw[i], take, ud)) {
            net_slot_close(g->net, s->slot);
            s->on = false;
        } else g->order[g->running++] = g->order[i];
    }
    return 0;
}

int gen_step(struct gen *g, gen_take *take, void *ud, struct err *e) {
    return admit(g, take, ud, e) < 0 || decode(g, take, ud, e) < 0 ? -1 : 0;
}
