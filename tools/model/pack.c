/* pack.c - qerl-model pack: make the packed file ahead of a run and say what quantisation cost.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/clock.h"
#include "lib/base/sys.h"

#include <time.h>

#include "lib/base/fs.h"
#include "lib/model/packed.h"
#include "tools/model/args.h"
#include "tools/model/cmd.h"

static const char HELP[] =
    "usage: qerl-model pack MODEL [--quant mxfp4|nvfp4|bf16|f32] [--rounding ocp|seed]\n"
    "                       [--exclude PATTERNS] [--packed DIR] [--tensors]\n\n"
    "Makes DIR/SHA256-QUANT, the file that all stages map. Stages make it themselves when it is "
    "absent;\n"
    "this makes it ahead and reports the error: mean relative error |q-x|/(|x|+1e-10), signal to\n"
    "quantisation noise (SQNR), share of values that became zero, share cut off at the format's "
    "largest.\n\n"
    "  --quant       how the seven projections of each layer are stored (mxfp4); embeddings and "
    "head\n"
    "                stay bf16\n"
    "  --rounding    ocp: to nearest, ties to even (the default); seed: the earlier system's "
    "rounding\n"
    "  --exclude     projections that stay bf16: \"layers.0, down_proj, layers.14-17.q_proj\" "
    "(none)\n"
    "  --packed      where packed files live (models/.packed)\n"
    "  --tensors     one line per quantised tensor\n\n"
    "examples:\n"
    "  qerl-model pack models/tiny\n"
    "  qerl-model pack models/tiny --quant nvfp4\n"
    "  qerl-model pack models/tiny --exclude layers.0,layers.5\n"
    "  qerl-model pack models/tiny --rounding seed --tensors\n";

struct worst { struct quant_stats s; char name[SOURCE_NAME_BYTES]; };
struct report {
    struct quant_stats all;
    struct worst relative, sqnr;
    int tensors, kept;
    bool each;
};

static void print_stats(const char *what, const struct quant_stats *s) {
    printf("%-44s relative error %6.2f %%  SQNR %6.2f dB  zeroed %5.2f %%  cut off %5.2f %%\n",
           what, 100 * quant_relative_error(s), quant_sqnr_db(s), 100 * quant_zeroed(s),
           100 * quant_saturated(s));
}

static void keep(struct worst *w, const struct quant_stats *s, const char *name) {
    w->s = *s;
    snprintf(w->name, sizeof w->name, "%s", name);
}

static void see(void *ud, const struct source *s, int item, const struct quant_stats *stats) {
    struct report *r = ud;
    const char *name = source_name(s, item);
    if (source_at(s, item)->kind == SOURCE_KIND_PROJ && source_is_mxfp4(s, item)) r->kept++;
    if (!stats->elements) return;
    if (r->each) print_stats(name, stats);
    if (!r->tensors || quant_relative_error(stats) > quant_relative_error(&r->relative.s))
        keep(&r->relative, stats, name);
    if (!r->tensors || quant_sqnr_db(stats) < quant_sqnr_db(&r->sqnr.s))
        keep(&r->sqnr, stats, name);
    quant_stats_add(&r->all, stats);
    r->tensors++;
}

static int pack(const struct model_opts *o, struct report *r, struct err *e) {
    struct model_conf c;
    struct source *s;
    struct packed_plan plan;
    struct model_exclude exclude;
    char sha256[SHA256_HEX], path[FS_PATH_MAX];
    double start = clock_seconds();
    if (model_conf_load(&c, o->path, e) < 0 ||
        model_exclude_make(&exclude, o->exclude, &c, e) < 0 || fs_mkdirs(o->packed_dir, e) < 0 ||
        model_sha256(o->path, o->packed_dir, sha256, e) < 0 || source_open(&s, o->path, &c, e) < 0)
        return -1;
    struct pool *pool = pool_create(pool_cores());
    packed_plan_init(&plan, &c, o->quant, o->rounding, &exclude);
    packed_path(path, o->packed_dir, sha256, &plan);
    int rc = packed_make(&plan, s, sha256, path, pool, see, r, e);
    if (rc == 0)
        printf("%s: %.1f MB in %.1f s\n", path, (double)plan.file_bytes / 1e6,
               clock_seconds() - start);
    if (rc == 0 && *plan.exclude)
        printf("%d of %d projections stay bf16\n", exclude.count, c.layers * PROJ_COUNT);
    packed_plan_release(&plan);
    pool_destroy(&pool);
    source_close(&s);
    return rc;
}

int cmd_pack(int argc, char **argv) {
    const char *path, *quant = "mxfp4", *rounding = "ocp", *dir = "models/.packed";
    struct report r = { 0 };
    struct model_opts o = { 0 };
    const struct arg arg[] = { { "quant", &quant, NULL },
                               { "rounding", &rounding, NULL },
                               { "exclude", &o.exclude, NULL },
                               { "packed", &dir, NULL },
                               { "tensors", NULL, &r.each } };
    struct err e = { 0 };
    int go = args_parse(argc, argv, HELP, arg, COUNT_OF(arg), &path);
    if (go < 1) return go < 0 ? EXIT_USAGE : EXIT_DONE;
    if (args_quant(argv[0], quant, rounding, &o.quant, &o.rounding) < 0) return EXIT_USAGE;
    o.path = path;
    o.packed_dir = dir;
    if (pack(&o, &r, &e) < 0) {
        fprintf(stderr, "qerl-model pack: %s\n", e.text);
        return e.code ? e.code : EXIT_ENV;
    }
    if (r.tensors) {
        char name[64];
        snprintf(name, sizeof name, "all %d quantised tensors", r.tensors);
        print_stats(name, &r.all);
        printf("largest relative error:\n");
        print_stats(r.relative.name, &r.relative.s);
        printf("lowest SQNR:\n");
        print_stats(r.sqnr.name, &r.sqnr.s);
    }
    if (r.kept) printf("%d tensors were MXFP4 already and kept as they are\n", r.kept);
    return EXIT_DONE;
}
