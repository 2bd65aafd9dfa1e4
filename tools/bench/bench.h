/* bench.h - what the parts of qerl-bench share: settings, the limits of the machine or of one of
 * its devices, one figure.
 *
 * A figure is named by a path, "decode/135m/head-bf16/n16", and its name is also how to repeat it:
 * qerl-bench --only NAME. Times are of CLOCK_MONOTONIC; every figure is a median over repeats.
 * Ownership: parts borrow the bench; nothing they open outlives their run.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_BENCH_H
#define QERL_BENCH_H
#include "kernels/kern.h"
#include "lib/base/json.h"
#include "tools/bench/device.h"
#include "tools/bench/limits.h"
#include "tools/bench/shapes.h"
#include "tools/bench/timing.h"

enum { BENCH_ONLY_MAX = 64, BENCH_KEY_MAX = 96 };

struct cuda_plugin;
struct bench {
    bool quick;
    double seconds, deadline;            /* --seconds and when they are over; 0 = no end */
    int threads;
    const char *kernels;                 /* as asked for; NULL = auto */
    const char *data;                    /* GSM8K lines for the real pipeline, or NULL */
    bool model[SHAPE_COUNT];
    const char *only[BENCH_ONLY_MAX];    /* paths or their beginnings; none = everything */
    int onlys;
    char root[1024], bin[1024];          /* the checkout; where the programs are */
    struct pool *pool;
    struct kern kern;
    const struct cuda_plugin *plugin;    /* kern's, where it is a device's; else NULL */
    struct datasheet sheet;              /* of that device; zeros where it is not known */
    struct limits limits;                /* asked for through bench_limits */
    bool limits_known;
    struct synth *synth;                 /* the model in hand, or NULL */
    double step_seconds;                 /* of a DAPO step on the smallest model measured, or 0 */
    const char *json;                    /* the report's file, or NULL */
    json_t *machine, *figures;           /* its two parts */
    int failed;                          /* figures that ended in an error */
};

/* Is this figure asked for? Is anything below this path? */
bool bench_wants(const struct bench *b, const char *key);
/* Wanted, and there is time left for it; where there is none, the report says so. */
bool bench_begins(struct bench *b, const char *key);
bool bench_enters(const struct bench *b, const char *path);
/* Probes the machine on first use: every figure is a share of limits of its own run. On a device
 * part_device has done it. */
const struct limits *bench_limits(struct bench *b);

/* Does a device have room for the weights of this shape and `bytes`? If not, the report says so
 * under `key`. A machine is not asked. */
bool bench_room(struct bench *b, enum shape m, const char *key, double bytes);
/* Makes b->synth the model of this shape. */
int bench_synth(struct bench *b, enum shape m, struct err *e);

/* What the issue of devices asks of a figure: a share of the memory's speed, or of the peak. */
enum target { TARGET_NONE, TARGET_MEMORY, TARGET_PEAK };

/* What one figure says. limit 0 = none; a figure in seconds (unit "s", "ms", "us", "ns") is at best
 * its limit and everything else at most. what: one line for the report's reader, or NULL. */
struct figure {
    const char *unit, *what;
    struct spread s;                     /* in `unit` */
    double limit;
    /* What is done in `seconds` (of the median), bytes at the speed of `set`; 0 = not told. On a
     * device the shares of memory and of peak are shown each by itself. */
    struct work work;
    double set, seconds;
    enum target target;
};
void bench_report(struct bench *b, const char *key, const struct figure *f);
/* A figure that this machine cannot give, and why. */
void bench_absent(struct bench *b, const char *key, const char *why);
/* One that ended in an error, which is told and cleared: the next may begin. */
void bench_failed(struct bench *b, const char *key, struct err *e);
/* The report as it is now, into its file. It happens after every figure: who is ended amid one
 * leaves those before it. */
int bench_keep(const struct bench *b, struct err *e);

/* The parts, in the order they run. -1 = nothing can run any more. */
int part_machine(struct bench *b, struct err *e);
int part_device(struct bench *b, struct err *e);       /* in part_machine's place on a device */
int part_pool(struct bench *b, struct err *e);
void part_kernels(struct bench *b, enum shape m);
void part_decode(struct bench *b, enum shape m);
void part_train(struct bench *b, enum shape m);
void part_dapo(struct bench *b, enum shape m);
int part_noise(struct bench *b, struct err *e);
int part_wire(struct bench *b, struct err *e);
int part_start(struct bench *b, struct err *e);
int part_turns(struct bench *b, struct err *e);
int part_pipeline(struct bench *b, struct err *e);
#endif
