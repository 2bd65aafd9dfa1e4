/* main.c - qerl-pipe: one file describes an experiment, one command runs it.
 *
 * Knows: command names, their options and help. Order: help texts, options, dispatch.
 * SPDX-License-Identifier: Apache-2.0 */
#include "pipe/commands.h"

#include "lib/base/log.h"
#include <unistd.h>

#include "pipe/old_switches.h"

#ifndef QERL_COMMIT
#define QERL_COMMIT "unknown"
#endif

enum { TAKES_SET = 1, TAKES_RULE = 2, TAKES_FOLLOW = 4, TAKES_DIFFERENT = 8, NO_OLD_SWITCHES = 16,
       TAKES_COMPARE = 32, TAKES_MATRIX = 64, TAKES_SEEDS = 128, TAKES_GRID = 256 };
static const struct command {
    const char *name, *usage, *what, *help;
    int (*run)(const struct command_line *c);
    int least, most, takes;                      /* words after the name; options, duties */
} commands[] = {
    { "run", "run FILE.pipe [--set KEY=VALUE]...", "run an experiment in a new run folder",
      "Checks everything as `check` does, makes runs/NAME-0001 (a new number each time), starts "
      "the stages, "
      "shows how it\n"
      "goes on stderr and the scores on stdout. Ctrl-C stops cleanly; `resume` goes on. `qerl-pipe "
      "FILE.pipe` "
      "is the same.\n\n"
      "examples:\n"
      "  qerl-pipe pipelines/quickstart.pipe\n"
      "  qerl-pipe run pipelines/e6b_qerl.pipe --set model.path=models/tiny --set run.steps=20\n",
      command_run, 1, 1, TAKES_SET | NO_OLD_SWITCHES },
    { "check", "check FILE.pipe [--set KEY=VALUE]...", "print the plan of a run; start nothing",
      "Every error of the file in one pass, each with file and line; then steps, scored steps, the "
      "noise "
      "schedule, memory,\n"
      "disk, hours, and each file with its hash or the command that gets it.\n\n"
      "examples:\n"
      "  qerl-pipe check pipelines/e6b_qerl.pipe\n"
      "  qerl-pipe check pipelines/e6b_qerl.pipe --set noise.aqn.sigma_start=0.05\n",
      command_check, 1, 1, TAKES_SET | NO_OLD_SWITCHES },
    { "describe", "describe [STAGE]", "list stages, or all keys and ports of one",
      "examples:\n"
      "  qerl-pipe describe\n"
      "  qerl-pipe describe learner\n",
      command_describe, 0, 1, 0 },
    { "resume", "resume RUN [--force-different]",
      "go on with a run that was stopped, killed or failed",
      "RUN is a run folder, its id (NAME-0001) or a name (the newest of that name). Programs, "
      "model and data "
      "must be those\n"
      "the run started with; --force-different goes on all the same and says which differ.\n\n"
      "examples:\n"
      "  qerl-pipe resume runs/e6b_qerl-0001\n"
      "  qerl-pipe resume e6b_qerl\n",
      command_resume, 1, 1, TAKES_DIFFERENT | NO_OLD_SWITCHES },
    { "status", "status [RUN]", "say how one run or all runs stand, from their files",
      "examples:\n"
      "  qerl-pipe status\n"
      "  qerl-pipe status e6b_qerl\n",
      command_status, 0, 1, 0 },
    { "logs", "logs RUN [STAGE] [-f]", "print the logs of a run; -f follows",
      "examples:\n"
      "  qerl-pipe logs e6b_qerl\n"
      "  qerl-pipe logs e6b_qerl learner -f\n",
      command_logs, 1, 2, TAKES_FOLLOW },
    { "stop", "stop RUN", "stop a run cleanly; resume goes on",
      "examples:\n"
      "  qerl-pipe stop e6b_qerl\n",
      command_stop, 1, 1, 0 },
    { "rescore", "rescore RUN|FILE [--rule strict|flexible]",
      "score recorded answers again, without a model",
      "Reads RUN/tape/answers.tape, or a file of answers, and prints accuracy with n and its 95 % "
      "interval.\n\n"
      "examples:\n"
      "  qerl-pipe rescore e6b_qerl\n"
      "  qerl-pipe rescore runs/e6b_qerl-0001 --rule flexible\n",
      command_rescore, 1, 1, TAKES_RULE },
    { "compare", "compare RUN RUN... [OPTION]...",
      "set runs beside a baseline: what differs, and whether the scores do",
      "The first run is the baseline. Runs that differ only in the seed are one arm; `vs` parts "
      "arms by hand. One run per arm:\n"
      "a verdict about these two adapters, question by question (McNemar). Three seeds per arm: a "
      "verdict about the treatment.\n"
      "`ref:NAME` is a curve of the study (pipelines/reference/NAME.tsv). Runs that must not be "
      "compared are refused with the\n"
      "reason (exit code 2); --force prints it on top.\n\n"
      "options\n"
      "  --align step|prompts|tokens   default step, and prompts where batches differ\n"
      "  --markdown, --json            instead of text\n"
      "  --picture FILE.svg            the curves\n"
      "  --noisy                       the scores under noise (eval.also_noisy), and what the "
      "noise costs each adapter\n"
      "  --force                       compare all the same\n\n"
      "examples:\n"
      "  qerl-pipe compare e6a_qerl e6b_qerl\n"
      "  qerl-pipe compare e6a-s1 e6a-s2 e6a-s3 e6b-s1 e6b-s2 e6b-s3 --markdown\n"
      "  qerl-pipe compare a-s1 a-s2 a-s3 vs a-s4 a-s5 a-s6\n"
      "  qerl-pipe compare e6b_qerl ref:e6b_qerl\n",
      command_compare, 2, WORDS_MAX, TAKES_COMPARE },
    { "matrix", "matrix FILE.pipe... [OPTION]...",
      "run a set of files one after another, end with one table",
      "Runs are named NAME-sSEED (with a sweep NAME-KEY_VALUE-sSEED). What is done is skipped, "
      "what was stopped or killed goes\n"
      "on: the same command again finishes the set. All runs are checked before the "
      "first one starts:\n"
      "every problem is printed at once, and nothing starts where there is one. A file that does "
      "not train is skipped; a run that\n"
      "fails later is listed with its reason, the others go on, and the exit code is 1.\n\n"
      "options\n"
      "  --seeds K                  K runs of each: the file's run.seed and the next ones\n"
      "  --sweep KEY=V1,V2,...      each under every value; ends with a dose-response table\n"
      "  --tiny                     on the embedded model and its questions, a few steps: minutes "
      "for all\n"
      "  --set KEY=VALUE            for every run\n"
      "  --runs DIR                 where the run folders go (default as the file says)\n\n"
      "examples:\n"
      "  qerl-pipe matrix pipelines/*.pipe --tiny\n"
      "  qerl-pipe matrix e6a_qerl.pipe e6b_qerl.pipe --seeds 3\n"
      "  qerl-pipe matrix pipelines/quickstart.pipe --set noise.ops.type=relative_gaussian \\\n"
      "      --sweep noise.ops.scale=1e-4,1e-3,1e-2,5e-2 --seeds 3\n",
      command_matrix, 1, WORDS_MAX, TAKES_SET | TAKES_MATRIX | TAKES_SEEDS | NO_OLD_SWITCHES },
    { "eval", "eval RUN [OPTION]...",
      "score a run's adapter again: formats, operator noise, seeds",
      "One offline score for each format, size of noise and seed, kept with every answer in "
      "RUN/eval; a cell that has its score is\n"
      "not asked again. The noise is of the run's own type and on its operators; a run without "
      "gets relative_gaussian on matmul.\n\n"
      "options\n"
      "  --noise 0,0.05,0.1     sizes (default 0: clean)\n"
      "  --quant trained,bf16   also mxfp4, nvfp4, mxfp4-w4a4, nvfp4-w4a4 (default trained)\n"
      "  --n all|N              questions (default as the run)\n"
      "  --seeds K              of what is drawn\n"
      "  --step S               a scored step (default the last)\n\n"
      "examples:\n"
      "  qerl-pipe eval e6b_qerl --noise 0,0.05,0.1 --seeds 3\n"
      "  qerl-pipe eval e6b_qerl --quant trained,bf16 --n all\n",
      command_eval, 1, 1, TAKES_SEEDS | TAKES_GRID | NO_OLD_SWITCHES },
    { "doctor", "doctor", "ten checks of this machine and what to do about each",
      "examples:\n"
      "  qerl-pipe doctor\n",
      command_doctor, 0, 0, 0 },
};

static void help(FILE *to) {
    fprintf(
        to,
        "qerl-pipe runs an experiment that one .pipe file describes.\n\nusage: qerl-pipe FILE.pipe "
        "[--set KEY=VALUE]...\n");
    for (size_t i = 0; i < COUNT_OF(commands); i++)
        fprintf(to, "       qerl-pipe %-44s %s\n", commands[i].usage, commands[i].what);
    fprintf(to, "\noptions\n"
                "  --set KEY=VALUE   wins over the file: --set learner.lr=1e-5\n"
                "  --runs DIR        where named runs are looked for (default runs)\n"
                "  --help            after a command: about that command, with examples\n"
                "  --version\n"
                "\nexamples\n"
                "  qerl-pipe pipelines/quickstart.pipe\n"
                "  qerl-pipe check pipelines/e6b_qerl.pipe --set model.path=models/tiny\n"
                "\nexit codes: 0 done, 1 failed or incomplete, 2 command line, 3 wrong .pipe file, "
                "4 the machine "
                "lacks something,\n"
                "5 no progress. Results go to stdout, talk to stderr. The language: "
                "docs/pipe-language.md\n");
}

int complain_once(const struct err *e, int code) {
    fprintf(stderr, "qerl-pipe: %s\n", e->text);
    return e->code ? e->code : code;
}

static int usage_error(const struct command *k, const char *fmt, const char *what)
    PRINTF_LIKE(2, 0);
static int usage_error(const struct command *k, const char *fmt, const char *what) {
    fprintf(stderr, "qerl-pipe: ");
    fprintf(stderr, fmt, what);
    if (k) fprintf(stderr, "\nusage: qerl-pipe %s\n", k->usage);
    else fprintf(stderr, "\nsee: qerl-pipe --help\n");
    return EXIT_USAGE;
}

static const struct command *find(const char *name) {
    for (size_t i = 0; i < COUNT_OF(commands); i++)
        if (strcmp(commands[i].name, name) == 0) return &commands[i];
    return NULL;
}

/* The value of an option, from "--set x" or "--set=x"; NULL if it is missing. */
static const char *value_of(char **argv, int argc, int *i, const char *name) {
    size_t n = strlen(name);
    if (argv[*i][n] == '=') return argv[*i] + n + 1;
    return *i + 1 < argc ? argv[++*i] : NULL;
}

static bool is_option(const char *arg, const char *name) {
    size_t n = strlen(name);
    return strncmp(arg, name, n) == 0 && (!arg[n] || arg[n] == '=');
}

/* Options with a value; without one they are flags. `needs`: commands that take it, 0 = all. */
static const struct option {
    const char *name; int needs; size_t at; bool flag;
} options[] = {
#define AT(field) offsetof(struct command_line, field)
    { "--set", TAKES_SET, 0, false },
    { "--rule", TAKES_RULE, AT(rule), false },
    { "--runs", 0, AT(runs_dir), false },
    { "--align", TAKES_COMPARE, AT(align), false },
    { "--picture", TAKES_COMPARE, AT(picture), false },
    { "--seeds", TAKES_SEEDS, AT(seeds), false },
    { "--sweep", TAKES_MATRIX, AT(sweep), false },
    { "--noise", TAKES_GRID, AT(noise), false },
    { "--quant", TAKES_GRID, AT(quant), false },
    { "--n", TAKES_GRID, AT(n), false },
    { "--step", TAKES_GRID, AT(step), false },
    { "--tiny", TAKES_MATRIX, AT(tiny), true },
    { "--json", TAKES_COMPARE, AT(json), true },
    { "--markdown", TAKES_COMPARE, AT(markdown), true },
    { "--noisy", TAKES_COMPARE, AT(noisy), true },
    { "--force", TAKES_COMPARE, AT(force), true },
    { "--force-different", TAKES_DIFFERENT, AT(force), true },
    { "-f", TAKES_FOLLOW, AT(follow), true },
    { "--follow", TAKES_FOLLOW, AT(follow), true },
#undef AT
};

static int take_option(struct command_line *c, const struct command *k, int argc, char **argv,
                       int *i) {
    const char *arg = argv[*i];
    for (size_t t = 0; t < COUNT_OF(options); t++) {
        const struct option *o = &options[t];
        char *field = (char *)c + o->at;
        if (o->flag ? strcmp(arg, o->name) != 0 : !is_option(arg, o->name)) continue;
        if (o->needs && !(k->takes & o->needs))
            return usage_error(k, "this command does not take '%s'", o->name);
        if (o->flag) {
            *(bool *)field = true;
            return 0;
        }
        const char *value = value_of(argv, argc, i, o->name);
        if (!value) return usage_error(k, "option '%s' needs a value", o->name);
        if (t > 0) {
            *(const char **)(void *)field = value;
            return 0;
        }
        if (c->sets == SETS_MAX) return usage_error(k, "too many options '%s'", "--set");
        c->set[c->sets++] = value;
        return 0;
    }
    return usage_error(k, "unknown option '%s'", arg);
}

static int command_help(const struct command *k) {
    printf("qerl-pipe %s: %s\n\nusage: qerl-pipe %s\n\n%s", k->name, k->what, k->usage, k->help);
    return EXIT_DONE;
}

/* Where the command's name stands: behind options that came before it, as in "--runs DIR
 * status". */
static int command_at(int argc, char **argv) {
    int i = 1;
    for (; i < argc && argv[i][0] == '-'; i++)
        for (size_t t = 0; t < COUNT_OF(options); t++)
            if (!options[t].flag && !strcmp(argv[i], options[t].name)) {
                i++;
                break;
            }
    return i < argc && find(argv[i]) ? i : 1;
}

static const struct command *choose(int argc, char **argv, int *named, int *code) {
    *named = 1;
    *code = EXIT_DONE;
    if (argc < 2) {
        help(stderr);
        *code = EXIT_USAGE;
        return NULL;
    }
    if (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h") || !strcmp(argv[1], "help")) {
        const struct command *k = argc > 2 ? find(argv[2]) : NULL;
        if (k) command_help(k);
        else help(stdout);
        return NULL;
    }
    if (!strcmp(argv[1], "--version")) {
        printf("qerl-pipe %s\n", QERL_COMMIT);
        return NULL;
    }
    *named = command_at(argc, argv);
    const struct command *k = find(argv[*named]);
    if (k) return k;
    *named = 0;
    if (str_ends(argv[1], ".pipe") || argv[1][0] == '-') return &commands[0];
    const char *names[COUNT_OF(commands)], *near;
    for (size_t i = 0; i < COUNT_OF(commands); i++) names[i] = commands[i].name;
    near = str_nearest(argv[1], names, COUNT_OF(commands));
    fprintf(stderr,
            "qerl-pipe: '%s' is neither a command nor a .pipe file%s%s%s\nsee: qerl-pipe --help\n",
            argv[1], near ? "; did you mean '" : "", near ? near : "", near ? "'?" : "");
    *code = EXIT_USAGE;
    return NULL;
}

static int refuse_old_switches(void) {
    struct str said;
    str_init(&said);
    const int code = old_switches_refuse(environ, &said);
    if (code) fputs(said.s, stderr);
    str_release(&said);
    return code;
}

int main(int argc, char **argv) {
    struct command_line c = { .runs_dir = "runs", .argv = argv };
    int named, code;
    log_open("qerl-pipe", LOG_LEVEL_INFO);
    const struct command *k = choose(argc, argv, &named, &code);
    if (!k) return code;
    for (int i = 1; i < argc; i++) {
        if (i == named) continue;
        if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) return command_help(k);
        if (argv[i][0] == '-' && argv[i][1]) {
            if ((code = take_option(&c, k, argc, argv, &i))) return code;
        } else if (c.words == k->most) {
            return usage_error(k, "one word too many: '%s'", argv[i]);
        } else {
            c.word[c.words++] = argv[i];
        }
    }
    if (c.words < k->least) return usage_error(k, "%s", "something is missing");
    if (k->takes & NO_OLD_SWITCHES && (code = refuse_old_switches())) return code;
    return k->run(&c);
}
