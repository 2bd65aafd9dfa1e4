/* aqn.c - see aqn.h.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/stage/aqn.h"

#include <math.h>

#include "lib/base/hash.h"
#include "lib/base/log.h"
#include "lib/base/str.h"

struct noise_schedule aqn_schedule(const struct shared *c) {
    return (struct noise_schedule){ (enum noise_aqn_kind)c->aqn.schedule,
                                    c->aqn.sigma_start,
                                    c->aqn.sigma_end,
                                    (int)c->aqn.stages,
                                    (int)c->aqn.epochs,
                                    c->run.steps };
}

static struct noise_target_text target_text(const struct shared *c) {
    return (struct noise_target_text){ .targets = c->aqn.targets,
                                       .exclude = c->aqn.exclude,
                                       .layers = c->aqn.layers,
                                       .others = c->aqn.others,
                                       .zone_edge = c->aqn.zone_edge,
                                       .zone_middle = c->aqn.zone_middle,
                                       .zone_switch = c->aqn.zone_switch,
                                       .zone_early = c->aqn.zone_early,
                                       .zone_late = c->aqn.zone_late };
}

int aqn_check(const struct shared *c, struct err *e) {
    const struct noise_schedule s = aqn_schedule(c);
    return noise_schedule_check(&s, e);
}

int aqn_target(struct noise_target *t, const struct shared *c, int64_t done,
               const struct model_conf *m, struct err *e) {
    const struct noise_target_text x = target_text(c);
    return noise_target_make(t, &x, done, c->run.steps, m, e);
}

int aqn_try(const struct shared *c, const struct model *m, struct err *e) {
    const struct noise_schedule s = aqn_schedule(c);
    struct noise_target t;
    struct noise_view v;
    if (!noise_schedule_on(&s)) return 0;
    if (aqn_target(&t, c, 0, &m->conf, e) < 0 ||
        noise_view_open(&v, m, &t, fmax(s.start, s.end), (uint64_t)c->run.seed, 0, e) < 0)
        return -1;
    if (v.strength > NOISE_STRONG)
        log_warn("noise.aqn: at its largest, sigma %g, the noise is %.2g times the weights it hits",
                 v.sigma, v.strength);
    noise_view_close(&v);
    return 0;
}

/* Largest and smallest sigma above 0 of the run, looked for at no more than SEEN steps. */
static void extremes(const struct noise_schedule *s, double *least, double *most) {
    enum { SEEN = 10000 };
    *least = INFINITY;
    *most = 0;
    for (int64_t i = 0, parts = s->steps < SEEN ? s->steps : SEEN; i < parts; i++) {
        const double sigma = noise_schedule_at(s, parts > 1 ? i * (s->steps - 1) / (parts - 1) : 0);
        *most = fmax(*most, sigma);
        if (sigma > 0) *least = fmin(*least, sigma);
    }
}

int aqn_try_source(const struct shared *c, const struct model_conf *m, struct err *e) {
    const struct noise_schedule s = aqn_schedule(c);
    const struct noise_target_text x = target_text(c);
    const int64_t at[] = { 0, noise_target_switch(&x, s.steps) };
    double sigma[2];
    struct noise_target t[COUNT_OF(at)];
    int targets = 0, k;
    if (!noise_schedule_on(&s)) return 0;
    extremes(&s, &sigma[0], &sigma[1]);
    for (size_t i = 0; i < COUNT_OF(at); i++)
        if (at[i] >= 0 && aqn_target(&t[targets++], c, at[i], m, e) < 0) return -1;
    if (noise_try(c->model.path, m, t, targets, sigma, 2, (uint64_t)c->run.seed, &k, e) == 0)
        return 0;
    const bool start = fabs(log(sigma[k] / fmax(s.start, 1e-300))) <=
                       fabs(log(sigma[k] / fmax(s.end, 1e-300)));
    return err_wrap(e, "noise.aqn.sigma_%s = %g", start ? "start" : "end", start ? s.start : s.end);
}

void aqn_text(const struct shared *c, struct str *out) {
    static const char *const name[] = { "step", "epoch", "constant", "linear", "exponential" };
    const struct noise_schedule s = aqn_schedule(c);
    if (!noise_schedule_on(&s)) {
        str_puts(out, "none");
        return;
    }
    str_printf(out, "%s %.17g %.17g of %lld", name[s.kind], s.start, s.end, (long long)s.steps);
    if (s.kind == NOISE_AQN_STEP || s.kind == NOISE_AQN_EPOCH)
        str_printf(out, " stages %d", s.stages);
    if (s.kind == NOISE_AQN_EPOCH) str_printf(out, " epochs %d", s.epochs);
    str_printf(out, " on '%s' but '%s' layers '%s' others %.17g", c->aqn.targets, c->aqn.exclude,
               c->aqn.layers, c->aqn.others);
    if (*c->aqn.zone_edge || *c->aqn.zone_middle)
        str_printf(out, " edge '%s' middle '%s' %.17g then %.17g at %.17g", c->aqn.zone_edge,
                   c->aqn.zone_middle, c->aqn.zone_early, c->aqn.zone_late, c->aqn.zone_switch);
}

enum { LIST_BYTES_MAX = 48 };

/* A list without blanks, cut where it is longer than a label has room for. */
static void short_list(struct str *out, const char *before, const char *list) {
    int n = 0;
    if (!*list) return;
    str_puts(out, before);
    for (; *list && n < LIST_BYTES_MAX; list++)
        if (*list != ' ') str_add(out, list, 1), n++;
    if (*list) str_puts(out, "...");
}

/* What the middle zone has in that step. */
static double middle_times(const struct shared *c, int64_t step) {
    const struct noise_target_text x = target_text(c);
    const int64_t change = noise_target_switch(&x, c->run.steps);
    return change >= 0 && step >= change ? c->aqn.zone_late : c->aqn.zone_early;
}

/* Whether the label must say more than the names of the targets: they alone make no multiplier. */
static bool needs_hash(const struct shared *c) {
    return *c->aqn.exclude || *c->aqn.layers || *c->aqn.zone_edge || *c->aqn.zone_middle ||
           strlen(c->aqn.targets) > LIST_BYTES_MAX;
}

static void hash_target(struct str *out, const struct noise_target *t, const struct model_conf *m) {
    char hex[SHA256_HEX];
    struct sha256 sum;
    sha256_init(&sum);
    sha256_add(&sum, t->norm, (size_t)(2 * m->layers + 1) * sizeof *t->norm);
    sha256_add(&sum, t->linear, (size_t)m->layers * sizeof *t->linear);
    sha256_hex(&sum, hex);
    str_printf(out, " #%.12s", hex);
}

void aqn_target_text(const struct shared *c, const struct model_conf *m, int64_t step,
                     struct str *out) {
    struct noise_target t;
    short_list(out, "", c->aqn.targets);
    short_list(out, " but ", c->aqn.exclude);
    short_list(out, " in layers ", c->aqn.layers);
    short_list(out, " in zones ", c->aqn.zone_edge);
    short_list(out, *c->aqn.zone_edge ? " and " : " in zones ", c->aqn.zone_middle);
    if (*c->aqn.zone_middle) str_printf(out, " x%.9g", middle_times(c, step));
    if (c->aqn.others != 1) str_printf(out, " others %.9g", c->aqn.others);
    if (needs_hash(c) && aqn_target(&t, c, step, m, NULL) == 0) hash_target(out, &t, m);
}

/* ---- plan ---- */

static void plan_staged(const struct noise_schedule *s, json_t *table) {
    for (int64_t from = 0, to; from < s->steps; from = to + 1) {
        const double sigma = noise_schedule_at(s, from);
        for (to = from; to + 1 < s->steps && noise_schedule_at(s, to + 1) == sigma;) to++;
        json_array_append_new(table, json_pack("{s:I, s:I, s:f}", "from", (json_int_t)from, "to",
                                               (json_int_t)to, "sigma", sigma));
    }
}

/* In ten parts, or fewer in a short run. */
static void plan_continuous(const struct noise_schedule *s, json_t *table) {
    const int64_t steps = s->steps, parts = steps < 10 ? steps : 10;
    for (int64_t i = 0; i < parts; i++) {
        const int64_t from = i * steps / parts, to = (i + 1) * steps / parts - 1;
        json_array_append_new(table,
                              json_pack("{s:I, s:I, s:f, s:f}", "from", (json_int_t)from, "to",
                                        (json_int_t)to, "sigma", noise_schedule_at(s, from),
                                        "sigma_to", noise_schedule_at(s, to)));
    }
}

/* "0-5 x1, 6-22 x0.5, 23-27 x1"; "" where all layers have 1. */
static void layers_text(struct str *out, const struct noise_target *t, int layers) {
    float times[MODEL_LAYERS_MAX];
    bool all_one = true;
    for (int l = 0; l < layers; l++) {
        times[l] = fmaxf(t->norm[2 * l], t->norm[2 * l + 1]);
        for (int p = 0; p < PROJ_COUNT; p++) times[l] = fmaxf(times[l], t->linear[l][p]);
        all_one &= times[l] == 1;
    }
    str_add(out, "", 0);
    for (int first = 0, l = 0; !all_one && l < layers; first = ++l) {
        while (l + 1 < layers && times[l + 1] == times[first]) l++;
        str_printf(out, first < l ? "%s%d-%d" : "%s%d", first ? ", " : "", first, l);
        str_printf(out, " x%.6g", (double)times[first]);
    }
}

static int plan_target(json_t *out, const struct shared *c, const struct model_conf *m,
                       struct err *e) {
    const struct noise_target_text x = target_text(c);
    const int64_t at[] = { 0, noise_target_switch(&x, c->run.steps) };
    struct noise_target t;
    struct str text;
    json_t *aqn = json_object(), *zones = json_array();
    json_object_set_new(out, "aqn", aqn);
    json_object_set_new(aqn, "zones", zones);
    str_init(&text);
    for (size_t i = 0; i < COUNT_OF(at); i++) {
        if (at[i] < 0) continue;
        if (aqn_target(&t, c, at[i], m, e) < 0) break;
        str_clear(&text);
        layers_text(&text, &t, m->layers);
        json_array_append_new(zones, json_pack("{s:I, s:s}", "from", (json_int_t)at[i], "layers",
                                               text.s));
        if (i) continue;
        json_object_set_new(aqn, "norms", json_integer(t.norms));
        json_object_set_new(aqn, "linears", json_integer(t.linears));
        json_object_set_new(aqn, "elements", json_integer(t.elements));
    }
    str_release(&text);
    return json_array_size(zones) ? 0 : -1;
}

size_t aqn_bytes(const struct shared *c, const struct model_conf *m) {
    const struct noise_schedule s = aqn_schedule(c);
    struct noise_target t;
    if (!noise_schedule_on(&s) || aqn_target(&t, c, 0, m, NULL) < 0) return 0;
    return noise_view_plan(m, (enum model_quant)c->quant.weights, &t);
}

int aqn_plan(json_t *out, const struct shared *c, const struct model_conf *m, struct err *e) {
    const struct noise_schedule s = aqn_schedule(c);
    json_t *table = json_array();
    json_object_set_new(out, "sigma", table);
    if (!noise_schedule_on(&s)) return 0;
    if (s.kind == NOISE_AQN_LINEAR || s.kind == NOISE_AQN_EXPONENTIAL) plan_continuous(&s, table);
    else plan_staged(&s, table);
    return m ? plan_target(out, c, m, e) : 0;
}
