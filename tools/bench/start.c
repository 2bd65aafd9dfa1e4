/* start.c - from the launch of a rollout stage with a packed model to its first token.
 *
 * One question, one answer of one token; the time is from before the program is started until its
 * record can be read.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tools/bench/bench.h"

#include <unistd.h>

#include "lib/base/clock.h"
#include "lib/base/fs.h"
#include "tools/bench/child.h"

enum { STARTS = 7 };

static int start_once(struct bench *b, const char *model, const char *dir, double *seconds,
                      struct err *e) {
    char program[1100], path[1200], packed[1200], ticket[128], log[128], threads[32], kernels[64];
    struct child_args a = { 0 };
    int out, pid;
    char byte;
    snprintf(program, sizeof program, "%s/qerl-rollout", b->bin);
    snprintf(path, sizeof path, "model.path=%s", model);
    snprintf(packed, sizeof packed, "model.packed_dir=%s/models/.packed", b->root);
    snprintf(ticket, sizeof ticket, "ticket=file:%s/q.jsonl", dir);
    snprintf(log, sizeof log, "%s/log", dir);
    snprintf(threads, sizeof threads, "run.threads=%d", b->threads);
    snprintf(kernels, sizeof kernels, "run.kernels=%s", b->kern.name);
    const char *const set[] = { path, packed, threads, kernels, "sample.n=1", "sample.new_max=1" };
    child_arg(&a, program);
    for (size_t i = 0; i < COUNT_OF(set); i++) child_arg(&a, "--set"), child_arg(&a, set[i]);
    const char *const io[] = { "--in", ticket, "--out", "traj=-" };
    for (size_t i = 0; i < COUNT_OF(io); i++) child_arg(&a, io[i]);
    double begun = clock_seconds();
    if (child_start(&a, log, &out, &pid, e) < 0) return -1;
    ssize_t got = read(out, &byte, 1);
    *seconds = clock_seconds() - begun;
    char rest[4096];
    while (got > 0 && read(out, rest, sizeof rest) > 0) {}
    close(out);
    if (child_wait(pid, "qerl-rollout", log, e) < 0) return -1;
    return got == 1 ? 0 : err_set(e, "qerl-rollout made nothing");
}

static int start(struct bench *b, const char *name, const char *folder, const char *dir,
                 struct err *e) {
    char key[BENCH_KEY_MAX], model[1100];
    double v[STARTS];
    int n = b->quick ? 3 : STARTS;
    snprintf(key, sizeof key, "start/%s", name);
    if (!bench_wants(b, key)) return 0;
    snprintf(model, sizeof model, "%s/models/%s", b->root, folder);
    if (!fs_exists(model)) {
        bench_absent(b, key, "not fetched: tools/fetch smollm2-135m-instruct");
        return 0;
    }
    if (start_once(b, model, dir, v, e) < 0) return -1;      /* packs it where nobody did */
    for (int i = 0; i < n; i++)
        if (start_once(b, model, dir, &v[i], e) < 0) return -1;
    bench_report(b, key, &(struct figure){ .unit = "s", .what = "launch to first token",
                                           .s = spread_of(v, n) });
    return 0;
}

int part_start(struct bench *b, struct err *e) {
    static const char q[] = "{\"question\":\"Tom has 3 pens and buys 4 more. How many pens?\","
                            "\"answer\":\"7\"}\n";
    char dir[] = "/tmp/qerl-bench.XXXXXX", path[64];
    if (!bench_enters(b, "start")) return 0;
    if (!mkdtemp(dir)) return err_code(e, EXIT_ENV, "cannot make a folder in /tmp");
    snprintf(path, sizeof path, "%s/q.jsonl", dir);
    int rc = fs_replace(path, q, sizeof q - 1, e);
    if (rc == 0) rc = start(b, "tiny", "tiny", dir, e);
    if (rc == 0) rc = start(b, "smollm2-135m", "smollm2-135m-instruct", dir, e);
    fs_remove_tree(dir, NULL);
    return rc;
}
