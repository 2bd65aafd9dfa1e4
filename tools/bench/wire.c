/* wire.c - what moving a step's records costs: as bytes, through a socket, into the journal.
 *
 * The record is a group of 8 answers of 200 tokens to a prompt of 100, as rollout, reward and
 * learner hand it on. A step of 2 groups moves each over two sockets and journals it once.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tools/bench/bench.h"

#include <pthread.h>

#include "lib/base/fs.h"
#include "lib/base/rng.h"
#include "lib/wire/link.h"
#include "lib/wire/tape.h"

enum { SAMPLES = 8, PROMPT = 100, TOKENS = 200, STEP_GROUPS = 2, HOPS = 2, TIMEOUT_MS = 5000 };

struct wire {
    struct rec group;
    struct str bytes;
    char dir[64];
    struct tape *tape;
    struct link *to, *from, *back_to, *back_from;    /* ours, the echo's, and back */
    bool stop;
    struct err err;                                  /* first failure inside a timed call */
};

static void group_fill(struct rec *r) {
    uint32_t key[2];
    rng_key(key, 1, RNG_PURPOSE_FAULT, 0);
    rec_init(r, REC_TRAJ);
    struct rec_group *g = &r->group;
    char text[5 * TOKENS + 1];
    for (int i = 0; i < TOKENS; i++) memcpy(text + (size_t)i * 5, "word ", 6);
    g->run = mem_dup("bench-0001");
    g->question = mem_dup("Tom has 3 pens and buys 4 more. How many pens does Tom have?");
    g->prompt = mem_dup(text);
    g->answer = mem_dup("7");
    g->rollout = mem_dup("rollout-0");
    g->prompt_ids = (struct rec_i32){ mem_alloc(PROMPT * sizeof(int32_t)), PROMPT };
    g->samples = SAMPLES;
    g->temperature = g->top_p = 1;
    g->new_max = TOKENS;
    g->sample = mem_alloc(SAMPLES * sizeof *g->sample);
    for (int k = 0; k < SAMPLES; k++) {
        struct rec_sample *s = &g->sample[k];
        s->k = k;
        s->ids = (struct rec_i32){ mem_alloc(TOKENS * sizeof(int32_t)), TOKENS };
        s->lp = (struct rec_f32){ mem_alloc(TOKENS * sizeof(float)), TOKENS };
        s->stop = mem_dup("length");
        s->text = mem_dup(text);
        for (int i = 0; i < TOKENS; i++) {
            struct rng4 x = rng_philox((uint32_t[4]){ (uint32_t)i, (uint32_t)k }, key);
            s->ids.v[i] = (int32_t)(x.v[0] % 49152);
            s->lp.v[i] = -8.f * rng_unit(x.v[1]);
        }
    }
}

/* Timed calls keep their first failure in w->err. */
static void pack(void *arg) {
    struct wire *w = arg;
    str_clear(&w->bytes);
    rec_pack(&w->bytes, &w->group);
}

static void unpack(void *arg) {
    struct wire *w = arg;
    struct rec r;
    if (rec_unpack(&r, w->bytes.s, w->bytes.len, &w->err) == 0) rec_release(&r);
}

static void append(void *arg) {
    struct wire *w = arg;
    if (tape_append(w->tape, &w->group, &w->err) == 0) tape_sync(w->tape, &w->err);
}

static void there_and_back(void *arg) {
    struct wire *w = arg;
    struct rec r;
    if (link_send(w->to, &w->group, NULL, TIMEOUT_MS, &w->err) != 0) return;
    int rc = link_recv(w->back_from, &r, NULL, TIMEOUT_MS, &w->err);
    if (rc == LINK_RECORD) rec_release(&r);
    else if (rc == LINK_EMPTY) err_set(&w->err, "no record came back within 5 s");
}

static void *echo_main(void *arg) {
    struct wire *w = arg;
    for (;;) {
        struct rec r;
        struct err e = { 0 };
        int rc = link_recv(w->from, &r, NULL, 200, &e);
        if (rc < 0 || __atomic_load_n(&w->stop, __ATOMIC_ACQUIRE)) return NULL;
        if (rc != LINK_RECORD) continue;
        link_send(w->back_to, &r, NULL, TIMEOUT_MS, &e);
        rec_release(&r);
    }
}

static int open_link(struct link **l, const struct wire *w, const char *name, bool push,
                     struct err *e) {
    char url[128];
    snprintf(url, sizeof url, "zmq+ipc://%s/%s", w->dir, name);
    return link_open(l, url, &(struct link_opts){ .name = name,
                                                  .kind = push ? LINK_KIND_PUSH : LINK_KIND_PULL,
                                                  .bind = !push,
                                                  .output = push }, e);
}

static int open_all(struct wire *w, struct err *e) {
    char path[128];
    snprintf(path, sizeof path, "%s/groups.tape", w->dir);
    return tape_append_open(&w->tape, path, e) < 0 || open_link(&w->from, w, "out", false, e) < 0 ||
                   open_link(&w->back_from, w, "back", false, e) < 0 ||
                   open_link(&w->to, w, "out", true, e) < 0 ||
                   open_link(&w->back_to, w, "back", true, e) < 0 ? -1 : 0;
}

static void close_all(struct wire *w) {
    struct link **all[] = { &w->to, &w->back_to, &w->from, &w->back_from };
    for (size_t i = 0; i < COUNT_OF(all); i++) link_close(all[i]);
    tape_close(&w->tape);
    fs_remove_tree(w->dir, NULL);
    str_release(&w->bytes);
    rec_release(&w->group);
}

static void show(struct bench *b, const char *key, struct spread s, const char *what) {
    if (bench_wants(b, key))
        bench_report(b, key, &(struct figure){ .unit = "us", .what = what,
                                               .s = spread_times(s, 1e6) });
}

static int measure(struct bench *b, struct wire *w, struct err *e) {
    const double seconds = b->quick ? .05 : .5;
    char what[96];
    pthread_t echo;
    struct spread packed = timing_of(pack, w, seconds), unpacked = timing_of(unpack, w, seconds);
    struct spread journal = timing_of(append, w, 2 * seconds);
    if (pthread_create(&echo, NULL, echo_main, w) != 0)
        return err_code(e, EXIT_ENV, "cannot start a thread");
    struct spread way = spread_times(timing_of(there_and_back, w, seconds), .5);
    __atomic_store_n(&w->stop, true, __ATOMIC_RELEASE);
    pthread_join(echo, NULL);
    if (*w->err.text) return err_set(e, "wire: %s", w->err.text);
    snprintf(what, sizeof what, "8 answers of 200 tokens, %zu bytes", w->bytes.len);
    show(b, "wire/record/pack", packed, what);
    show(b, "wire/record/unpack", unpacked, "checked and copied");
    show(b, "wire/ipc/way", way, "packed, sent, received, unpacked");
    show(b, "wire/journal/append", journal, "append + fdatasync");
    double step = STEP_GROUPS * (HOPS * way.median + journal.median);
    double least = STEP_GROUPS * (HOPS * way.min + journal.min);
    double most = STEP_GROUPS * (HOPS * way.max + journal.max);
    if (b->step_seconds > 0)
        snprintf(what, sizeof what, "%.3f %% of the first DAPO step above",
                 100 * step / b->step_seconds);
    else snprintf(what, sizeof what, "2 groups, 2 sockets each, journalled once");
    show(b, "wire/step", (struct spread){ step, least, most, way.n }, what);
    return 0;
}

int part_wire(struct bench *b, struct err *e) {
    struct wire w = { .dir = "./qerl-bench.XXXXXX" };
    if (!bench_enters(b, "wire")) return 0;
    /* beside the runs, because the journal's disk is what counts */
    if (!mkdtemp(w.dir)) return err_code(e, EXIT_ENV, "cannot make a folder here");
    str_init(&w.bytes);
    group_fill(&w.group);
    int rc = open_all(&w, e);
    if (rc == 0) rc = measure(b, &w, e);
    close_all(&w);
    return rc;
}
