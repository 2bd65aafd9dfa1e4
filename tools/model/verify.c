/* verify.c - qerl-model verify: read every weight, pack it again, compare.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/fs.h"
#include "lib/model/packed.h"
#include "tools/model/args.h"
#include "tools/model/cmd.h"

static const char HELP[] =
    "usage: qerl-model verify MODEL [--quant mxfp4|nvfp4|bf16|f32] [--rounding ocp|seed]\n"
    "                         [--exclude PATTERNS] [--packed DIR]\n\n"
    "Reads every weight of the model and checks names, shapes, types and that all values are "
    "finite;\n"
    "where DIR holds the packed file, checks its header and checksums and that its bits equal a "
    "fresh\n"
    "packing. Changes nothing.\n\n"
    "exit status: 0 all is well, 1 something differs or is damaged, 4 the model cannot be read\n\n"
    "examples:\n"
    "  qerl-model verify models/tiny\n"
    "  qerl-model verify models/tiny --quant bf16\n";

static int bad(const char *fmt, const char *a, const char *b) {
    fprintf(stderr, "qerl-model verify: ");
    fprintf(stderr, fmt, a, b);
    fputc('\n', stderr);
    return EXIT_FAILED;
}

/* Packs tensor by tensor; all of them are visited, so that one run names everything wrong. */
static int compare(struct packed_plan *p, const struct source *s, const struct fs_map *m,
                   struct pool *pool, struct err *e) {
    size_t most = 0;
    int code = EXIT_DONE;
    for (int i = 0; i < p->items; i++) most = p->entry[i].bytes > most ? p->entry[i].bytes : most;
    uint8_t *fresh = mem_alloc(most);
    for (int i = 0; i < p->items; i++) {
        struct packed_entry *x = &p->entry[i], kept;
        if (packed_tensor(p, s, i, fresh, NULL, pool, e) < 0) {
            code = bad("%s%s", e->text, "");
            continue;
        }
        if (!m->data) continue;
        size_t at = sizeof(struct packed_header) + (size_t)i * sizeof kept;
        memcpy(&kept, m->data + at, sizeof kept);
        if (kept.scale != x->scale || memcmp(fresh, m->data + x->offset, x->bytes) != 0)
            code = bad("tensor '%s' of the packed file differs from the model%s", source_name(s, i),
                       "");
    }
    free(fresh);
    return code;
}

static int verify(const struct model_opts *o, const struct model_conf *c, const struct source *s,
                  const char *sha256) {
    struct packed_plan plan;
    struct model_exclude exclude;
    struct fs_map map = { 0 };
    struct err e = { 0 };
    char path[FS_PATH_MAX];
    int code = EXIT_DONE;
    if (model_exclude_make(&exclude, o->exclude, c, &e) < 0) {
        fprintf(stderr, "qerl-model verify: %s\n", e.text);
        return e.code;
    }
    packed_plan_init(&plan, c, o->quant, o->rounding, &exclude);
    packed_path(path, o->packed_dir, sha256, &plan);
    bool there = fs_exists(path);
    if (there && (fs_map(&map, path, &e) < 0 || packed_check(&plan, sha256, &map, true, &e) < 0)) {
        code = bad("packed file '%s': %s", path, e.text);
        if (map.bytes != plan.file_bytes) fs_unmap(&map);
    }
    struct pool *pool = pool_create(pool_cores());
    int compared = compare(&plan, s, &map, pool, &e);
    if (code == EXIT_DONE) code = compared;
    pool_destroy(&pool);
    if (code == EXIT_DONE) {
        printf("%d tensors are finite and have the right shapes\n", plan.items);
        if (there) printf("'%s' equals a fresh packing\n", path);
        else printf("there is no '%s' yet\n", path);
    }
    fs_unmap(&map);
    packed_plan_release(&plan);
    return code;
}

int cmd_verify(int argc, char **argv) {
    const char *path, *quant = "mxfp4", *rounding = "ocp", *dir = "models/.packed";
    struct model_opts o = { 0 };
    const struct arg arg[] = { { "quant", &quant, NULL },
                               { "rounding", &rounding, NULL },
                               { "exclude", &o.exclude, NULL },
                               { "packed", &dir, NULL } };
    struct model_conf c;
    struct source *s;
    struct err e = { 0 };
    char sha256[SHA256_HEX];
    int go = args_parse(argc, argv, HELP, arg, COUNT_OF(arg), &path);
    if (go < 1) return go < 0 ? EXIT_USAGE : EXIT_DONE;
    if (args_quant(argv[0], quant, rounding, &o.quant, &o.rounding) < 0) return EXIT_USAGE;
    o.path = path;
    o.packed_dir = dir;
    /* no packed_dir here: a cached sum is what is to be checked */
    if (model_conf_load(&c, path, &e) < 0 || model_sha256(path, NULL, sha256, &e) < 0 ||
        source_open(&s, path, &c, &e) < 0) {
        fprintf(stderr, "qerl-model verify: %s\n", e.text);
        return e.code ? e.code : EXIT_ENV;
    }
    printf("%s  %s\n", sha256, path);
    int code = verify(&o, &c, s, sha256);
    source_close(&s);
    return code;
}
