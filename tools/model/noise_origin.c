/* noise_origin.c - what a run applied at a step: its settings, and the journal's word for the key.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/fs.h"
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
    return err_code(e, EXIT_USAGE, "'%s' holds no group of step %lld: its steps are 0 to %lld",
                    path, (long long)a->step, (long long)last);
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
    if (shared_load(&s->shared, conf, e) < 0 || read_journal(s, a, tape, e) < 0) {
        origin_close(s);
        return -1;
    }
    const struct rec_group *g = &s->group.group;
    s->sigma = g->treatment.sigma;
    s->noise_seed = g->treatment.noise_seed;
    s->seed = (uint64_t)s->shared.run.seed;
    s->version = g->version;
    return 0;
}

void origin_close(struct origin *s) {
    if (s->groups) rec_release(&s->group);
    if (s->run) shared_release(&s->shared);
    *s = (struct origin){ 0 };
}
