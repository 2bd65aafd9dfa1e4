/* noise_origin.c - what a run applied at a step: its settings, and the journal's word for the key.
 * SPDX-License-Identifier: Apache-2.0 */
#include <stdlib.h>

#include "lib/base/fs.h"
#include "lib/base/json.h"
#include "lib/base/str.h"
#include "lib/stage/policy.h"
#include "lib/wire/tape.h"
#include "tools/model/noise.h"

/* Keeps the asked-for group of the step, or its first, and compares all of them. */
static void take(struct origin *s, const struct ask *a, struct rec *r) {
    const struct rec_group *g = &r->group;
    const bool first = s->groups == 0;
    if (!first)
        s->same &= g->sigma_realised == s->group.group.sigma_realised &&
                   g->version == s->group.group.version &&
                   g->treatment.noise_seed == s->group.group.treatment.noise_seed;
    s->groups++;
    if (!first && g->group != a->prompt) {
        rec_release(r);
        return;
    }
    if (!first) rec_release(&s->group);
    s->group = *r;
}

static int read_journal(struct origin *s, const struct ask *a, const char *path, struct err *e) {
    struct tape *t;
    struct rec r;
    int got;
    int64_t last = -1;
    if (tape_read_open(&t, path, e) < 0) return -1;
    s->same = true;
    while ((got = tape_read(t, &r, e)) > 0) {
        const bool group = r.type == REC_GROUP;
        if (group && r.group.step > last) last = r.group.step;
        if (group && r.group.step == a->step) take(s, a, &r);
        else rec_release(&r);
    }
    tape_close(&t);
    if (got < 0) return -1;
    if (s->groups) return 0;
    if (last < 0)
        return err_code(e, EXIT_USAGE, "'%s' holds no groups: the run ended before its first step "
                                       "was sampled", path);
    return err_code(e, EXIT_USAGE, "'%s' holds no group of step %lld: its steps are 0 to %lld",
                    path, (long long)a->step, (long long)last);
}

/* The seed that the noisy score of the step names. */
static int read_score(struct origin *s, const struct ask *a, struct err *e) {
    char path[FS_PATH_MAX];
    struct str text;
    bool found = false;
    str_init(&text);
    fs_join(path, sizeof path, a->path, "scores.jsonl");
    const int rc = fs_read(&text, path, 1 << 30, e);
    char *end;
    for (char *line = text.s; rc == 0 && !found && (end = strchr(line, '\n')); line = end + 1) {
        struct rec r;
        if (rec_from_json(&r, line, (size_t)(end - line), REC_SCORE, path, NULL) < 0) continue;
        json_t *o = *r.score.evidence ? json_loads(r.score.evidence, 0, NULL) : NULL;
        const char *seed = json_string_value(json_object_get(o, "seed"));
        found = r.score.step == a->step && seed;
        if (found) s->noise_seed = strtoull(seed, NULL, 10);
        json_decref(o);
        rec_release(&r);
    }
    str_release(&text);
    if (rc < 0 || found) return rc;
    return err_code(e, EXIT_USAGE, "'%s' holds no noisy score of step %lld that names its seed",
                    path, (long long)a->step);
}

int origin_open(struct origin *s, const struct ask *a, struct err *e) {
    char conf[FS_PATH_MAX], tape[FS_PATH_MAX];
    *s = (struct origin){
        .sigma = a->sigma, .noise_seed = a->seed, .seed = a->seed, .version = a->version
    };
    if (strlen(a->path) + 32 > sizeof conf) return err_code(e, EXIT_USAGE, "the path is too long");
    fs_join(conf, sizeof conf, a->path, "conf/rollout.conf");
    fs_join(tape, sizeof tape, a->path, "tape/groups.tape");
    s->run = fs_exists(conf);
    const bool own = a->sigma >= 0 || a->version >= 0 || a->seeded || a->type || a->scale >= 0 ||
                     a->rate >= 0 || a->targets;
    if (!s->run && a->step >= 0)
        return err_code(e, EXIT_USAGE, "--step: '%s' is no run folder", a->path);
    if (!s->run) return 0;
    if (own)
        return err_code(e, EXIT_USAGE,
                        "--sigma, --seed, --version, --targets, --type, --scale and --rate are the "
                        "run's own: leave them out, or name a model instead of '%s'",
                        a->path);
    if (a->step < 0)
        return err_code(e, EXIT_USAGE,
                        "'%s' is a run: say of which step, --step N (completed steps before it)",
                        a->path);
    if (shared_load(&s->shared, conf, e) < 0 ||
        (a->score ? read_score(s, a, e) : read_journal(s, a, tape, e)) < 0) {
        origin_close(s);
        return -1;
    }
    s->seed = (uint64_t)s->shared.run.seed;
    if (a->score) return 0;
    const struct rec_group *g = &s->group.group;
    s->sigma = g->treatment.sigma;
    s->noise_seed = g->treatment.noise_seed;
    s->version = g->version;
    return 0;
}

void origin_close(struct origin *s) {
    if (s->groups) rec_release(&s->group);
    if (s->run) shared_release(&s->shared);
    *s = (struct origin){ 0 };
}
