/* main.c - qerl-bench: how fast this machine is, how fast the product is on it, and the share.
 *
 * Knows: the command line, the first lines, the order of the parts. Does not know how anything is
 * measured.
 * SPDX-License-Identifier: Apache-2.0 */
#include "tools/bench/bench.h"

#include <time.h>
#include <unistd.h>

#include "lib/base/clock.h"
#include "lib/base/fs.h"
#include "lib/base/log.h"
#include "lib/stage/device.h"
#include "tools/bench/host.h"
#include "tools/bench/synth.h"

static const char help[] =
    "qerl-bench - the limits of the machine or of a GPU, and what the product reaches of them\n\n"
    "usage: qerl-bench [options]\n\n"
    "  --only NAME,...    figures or their beginnings: machine, kernels, decode, prefill, train,\n"
    "                     dapo, noisy, start, wire, turns, decode/135m/head-bf16/n16, ...\n"
    "  --model NAME,...   shapes: tiny, 135m, 0.5b, 1.5b, 7b (default 135m, 0.5b, 1.5b, with\n"
    "                     --quick 135m; on a GPU 0.5b, 1.5b, 7b, each where there is room)\n"
    "  --kernels PATH     auto, ref, avx2, avx512, ... (default auto: the best of this CPU);\n"
    "                     cuda, cuda-mma, ...: one GPU, its limits, nothing of the host\n"
    "  --threads N        default: the cores this process may use\n"
    "  --data FILE        GSM8K lines: with models/smollm2-135m-instruct there, the real pipeline\n"
    "  --json FILE        the report as JSON too\n"
    "  --quick            fewer and shorter repeats\n"
    "  --seconds N        begin no figure later than this; those left out are said\n\n"
    "Weights are synthetic (random, never zeros); 'dapo/pipeline', 'start' and 'turns' use real\n"
    "stages. A figure is the median of its repeats; share = figure / limit, the limit computed\n"
    "from this run's own probes (docs/benchmarks.md). The table goes to stdout, talk to stderr.\n\n"
    "examples:\n"
    "  qerl-bench --quick\n"
    "  qerl-bench --only machine\n"
    "  qerl-bench --only decode --model 0.5b --kernels avx2\n"
    "  qerl-bench --only train/135m --threads 1 --json train.json\n\n"
    "exit status: 0 done, 1 failed, 2 wrong command line, 4 the machine lacks something\n";

static int usage(const char *what, const char *word) {
    fprintf(stderr, "qerl-bench: %s '%s'; see 'qerl-bench --help'\n", what, word);
    return -1;
}

static int parse_models(struct bench *b, char *text) {
    for (char *word; (word = strsep(&text, ","));) {
        int i = 0;
        while (i < SHAPE_COUNT && strcmp(word, shape_name[i]) != 0) i++;
        if (i == SHAPE_COUNT) return usage("no such model: tiny, 135m, 0.5b, 1.5b, 7b, not", word);
        b->model[i] = true;
    }
    return 0;
}

static int parse_only(struct bench *b, char *text) {
    static const char *const part[] = { "machine", "kernels", "decode", "prefill", "train",
                                        "dapo",    "start",   "wire",   "turns", "noisy" };
    for (char *word; (word = strsep(&text, ","));) {
        size_t i = 0;
        while (i < COUNT_OF(part) && (!str_starts(word, part[i]) || (word[strlen(part[i])] != 0 &&
                                                                     word[strlen(part[i])] != '/')))
            i++;
        if (i == COUNT_OF(part)) return usage("no such figure:", word);
        if (b->onlys == BENCH_ONLY_MAX) return usage("too many figures at", word);
        b->only[b->onlys++] = word;
    }
    return 0;
}

/* 1 go on, 0 help was printed, -1 wrong. */
static int parse(struct bench *b, int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        char *name = argv[i], *value = strchr(name, '=');
        int64_t n = 0;
        if (!strcmp(name, "--help") || !strcmp(name, "-h")) return printf("%s", help), 0;
        if (!strcmp(name, "--quick")) {
            b->quick = true;
            continue;
        }
        if (value) *value++ = 0;
        else if (i + 1 < argc) value = argv[++i];
        else return usage("unknown option, or one without its value:", name);
        if (!strcmp(name, "--only")) {
            if (parse_only(b, value) < 0) return -1;
        } else if (!strcmp(name, "--model")) {
            if (parse_models(b, value) < 0) return -1;
        } else if (!strcmp(name, "--threads")) {
            if (!str_to_i64(value, &n) || n < 1 || n > POOL_THREADS_MAX)
                return usage("--threads takes 1 to 256, not", value);
            b->threads = (int)n;
        } else if (!strcmp(name, "--seconds")) {
            if (!str_to_i64(value, &n) || n < 1 || n > 86400)
                return usage("--seconds takes 1 to 86400, not", value);
            b->seconds = (double)n;
        } else if (!strcmp(name, "--kernels")) b->kernels = value;
        else if (!strcmp(name, "--data")) b->data = value;
        else if (!strcmp(name, "--json")) b->json = value;
        else return usage("unknown option", name);
    }
    return 1;
}

/* Those that nobody named, and those that a named figure asks for. */
static void choose_models(struct bench *b) {
    bool any = false;
    for (int i = 0; i < SHAPE_COUNT; i++) any |= b->model[i];
    for (int i = SHAPE_135M; i < SHAPE_COUNT && !any; i++)
        b->model[i] = b->plugin ? i >= SHAPE_05B : b->quick ? i == SHAPE_135M : i <= SHAPE_15B;
    for (int i = 0; i < b->onlys; i++) {
        const char *slash = strchr(b->only[i], '/');
        for (int m = 0; slash && m < SHAPE_COUNT; m++) {
            size_t n = strlen(shape_name[m]);
            if (!strncmp(slash + 1, shape_name[m], n) && (!slash[n + 1] || slash[n + 1] == '/'))
                b->model[m] = true;
        }
    }
}

static void find_root(struct bench *b) {
    ssize_t n = readlink("/proc/self/exe", b->bin, sizeof b->bin - 1);
    b->bin[n < 0 ? 0 : n] = 0;
    char *slash = strrchr(b->bin, '/');
    if (slash) *slash = 0;
    memcpy(b->root, b->bin, sizeof b->root);
    slash = strrchr(b->root, '/');
    if (slash) *slash = 0;
}

static void first_lines(struct bench *b, const struct host_load *begun) {
    struct str name, flags;
    char gpu[DEVICE_TEXT_MAX] = "";
    char date[32];
    str_init(&name);
    str_init(&flags);
    host_cpu(&name, &flags);
    host_date(date);
    struct host_load now = host_load();
    double others = host_others(begun, &now);
    printf("cpu      %s, %d cores for this process, %d threads used, %.0f GB\n", name.s,
           pool_cores(), b->threads, host_memory_bytes() / 1e9);
    printf("flags    %s\n", flags.s);
    printf("kernels  %s\n", b->kern.name);
    if (b->plugin && device_text(gpu, &b->kern, NULL) == 0) printf("device   %s\n", gpu);
    printf("date     %s\n", date);
    printf("load     others use %.0f %% of the CPUs\n\n", 100 * others);
    fflush(stdout);
    if (others > .05)
        fprintf(stderr, "qerl-bench: the machine is not idle: figures will be too low\n");
    json_object_update_new(b->machine,
                           json_pack("{ss ss si si ss ss sf sb}", "cpu", name.s, "flags", flags.s,
                                     "cores", pool_cores(), "threads", b->threads, "kernels",
                                     b->kern.name, "date", date, "others_before", others, "quick",
                                     b->quick));
    str_release(&name);
    str_release(&flags);
}

int bench_synth(struct bench *b, enum shape m, struct err *e) {
    if (b->synth && b->synth->shape == m) return 0;
    synth_close(&b->synth);
    bench_limits(b);                                 /* before memory gets tight */
    return synth_open(&b->synth, m, &b->kern, b->plugin, e);
}

static int run_parts(struct bench *b, struct err *e) {
    if (b->plugin ? part_device(b, e) < 0 : part_machine(b, e) < 0) return -1;
    if (part_pool(b, e) < 0 || part_noise(b, e) < 0) return -1;
    for (int m = 0; m < SHAPE_COUNT; m++) {
        if (!b->model[m]) continue;
        if (!b->plugin) part_kernels(b, (enum shape)m);
        part_decode(b, (enum shape)m);
        part_train(b, (enum shape)m);
        part_dapo(b, (enum shape)m);
        synth_close(&b->synth);
    }
    /* On a borrowed GPU whole steps come first, of all models; the rest is the host's. */
    for (int m = 0; m < SHAPE_COUNT && b->plugin; m++)
        if (b->model[m]) part_kernels(b, (enum shape)m);
    if (b->plugin) return 0;
    return part_wire(b, e) < 0 || part_start(b, e) < 0 || part_turns(b, e) < 0 ||
                   part_pipeline(b, e) < 0 ? -1 : 0;
}

int main(int argc, char **argv) {
    struct bench b = { .threads = pool_cores() };
    struct err e = { 0 };
    log_open("qerl-bench", LOG_LEVEL_WARN);
    int go = parse(&b, argc, argv);
    if (go <= 0) return go < 0 ? EXIT_USAGE : EXIT_DONE;
    if (b.json && fs_replace(b.json, "", 0, &e) < 0) {           /* before minutes of measuring */
        fprintf(stderr, "qerl-bench: %s\n", e.text);
        return EXIT_FAILED;
    }
    if (b.threads > pool_cores())
        fprintf(stderr, "qerl-bench: %d threads on %d cores\n", b.threads, pool_cores());
    find_root(&b);
    struct host_load begun = host_load();
    nanosleep(&(struct timespec){ 0, 500000000 }, NULL);
    b.pool = pool_create(b.threads);
    b.figures = json_array();
    b.machine = json_object();
    int rc = kern_open(&b.kern, b.kernels, b.pool, &e);
    if (rc < 0 && e.code == EXIT_CONFIG) e.code = EXIT_USAGE;        /* it came as an option */
    if (rc == 0) rc = device_open(&b, &e);
    choose_models(&b);
    if (rc == 0) {
        first_lines(&b, &begun);
        if (b.seconds > 0) b.deadline = clock_seconds() + b.seconds;
        begun = host_load();
        rc = run_parts(&b, &e);
        struct host_load ended = host_load();
        double others = host_others(&begun, &ended);
        printf("\nothers used %.0f %% of the CPUs meanwhile\n", 100 * others);
        json_object_set_new(b.machine, "others_meanwhile", json_real(others));
    }
    if (rc == 0 && b.limits.shared_core)
        fputs("qerl-bench: two threads multiplied hardly faster than one: they shared a core, or "
              "others held it; limits are too low and shares too high\n",
              stderr);
    if (rc == 0 && json_array_size(b.figures) == 0)
        rc = err_code(&e, EXIT_USAGE, "no figure has that name; see 'qerl-bench --help'");
    if (b.json && bench_keep(&b, rc == 0 ? &e : &(struct err){ 0 }) < 0) rc = -1;
    if (rc == 0 && b.failed)
        rc = err_set(&e, b.failed > 1 ? "%d figures failed" : "%d figure failed", b.failed);
    if (rc < 0) fprintf(stderr, "qerl-bench: %s\n", e.text);
    if (rc == 0 && (fflush(stdout) != 0 || ferror(stdout))) rc = -1;
    synth_close(&b.synth);
    json_decref(b.machine);
    json_decref(b.figures);
    pool_destroy(&b.pool);
    return rc == 0 ? EXIT_DONE : e.code ? e.code : EXIT_FAILED;
}
