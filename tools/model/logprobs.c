/* logprobs.c - qerl-model logprobs: log-probabilities of given tokens, for comparing with other
 * programs.
 *
 * Reads all lines, then makes a net just long enough. The numbers are those of rollout and learner:
 * the same forward.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/net.h"

#include <errno.h>
#include <getopt.h>
#include <math.h>

#include "lib/base/json.h"
#include "tools/model/cmd.h"

enum { TOP_K_MAX = 1000, ROWS = 256, LINES_MAX = 1 << 20 };

static const char HELP[] =
    "usage: qerl-model logprobs MODEL [options] < ids.jsonl\n"
    "\n"
    "Prints, for each line of token ids, the log-probability of every token given those before it\n"
    "(temperature 1, null for the first). A line is a JSON array of ids, or an object {\"ids\": "
    "[...]}.\n"
    "\n"
    "  --adapter DIR       with this LoRA adapter (PEFT folder)\n"
    "  --quant Q           bf16 (default), mxfp4, nvfp4, or f32 for comparisons in full precision\n"
    "  --kernels PATH      auto (default), or one that 'qerl-pipe doctor' lists\n"
    "  --top-k K           also the K most likely tokens at each place, as [id, log-prob]\n"
    "  --threads N         default: the cores this process may use\n"
    "  --packed DIR        where packed weights are kept; default models/.packed\n"
    "\n"
    "example:\n"
    "  echo '[1, 4, 2, 7]' | qerl-model logprobs models/tiny --top-k 2\n"
    "  "
    "{\"logprobs\":[null,-23.2667923,...],\"top\":[null,[[342,-0.91995741],[20,-1.39469935]],...]}"
    "\n";

struct args {
    const char *model, *adapter, *kernels, *packed;
    enum model_quant quant;
    int top_k, threads;
};

struct lines { int32_t **ids; int *n; int count, longest; };

static int parse_int(const char *option, const char *text, int least, int most, int *out) {
    int64_t v;
    if (str_to_i64(text, &v) && v >= least && v <= most) {
        *out = (int)v;
        return 0;
    }
    fprintf(stderr, "qerl-model logprobs: %s '%s' must be a number from %d to %d\n", option, text,
            least, most);
    return -1;
}

/* 0 = go on, 1 = help was printed, -1 = wrong usage. */
static int parse_args(struct args *a, int argc, char **argv) {
    enum { HELP_OPT = 1, ADAPTER, QUANT, KERNELS, TOP_K, THREADS, PACKED };
    static const struct option options[] = {
        { "help", no_argument, NULL, HELP_OPT },
        { "adapter", required_argument, NULL, ADAPTER },
        { "quant", required_argument, NULL, QUANT },
        { "kernels", required_argument, NULL, KERNELS },
        { "top-k", required_argument, NULL, TOP_K },
        { "threads", required_argument, NULL, THREADS },
        { "packed", required_argument, NULL, PACKED },
        { NULL, 0, NULL, 0 },
    };
    *a = (struct args){ .packed = "models/.packed", .threads = pool_cores() };
    int quant, opt;
    optind = 0;
    while ((opt = getopt_long(argc, argv, "", options, NULL)) != -1) switch (opt) {
        case HELP_OPT: fputs(HELP, stdout); return 1;
        case ADAPTER: a->adapter = optarg; break;
        case KERNELS: a->kernels = optarg; break;
        case PACKED: a->packed = optarg; break;
        case QUANT:
            if ((quant = model_quant_parse(optarg)) < 0) {
                fprintf(stderr,
                        "qerl-model logprobs: --quant '%s' is not bf16, mxfp4, nvfp4 or f32\n",
                        optarg);
                return -1;
            }
            a->quant = (enum model_quant)quant;
            break;
        case TOP_K: if (parse_int("--top-k", optarg, 1, TOP_K_MAX, &a->top_k) < 0) return -1; break;
        case THREADS:
            if (parse_int("--threads", optarg, 1, POOL_THREADS_MAX, &a->threads) < 0) return -1;
            break;
        default: return -1;
        }
    if (optind != argc - 1) {
        fprintf(stderr,
                "qerl-model logprobs: one MODEL is needed; see qerl-model logprobs --help\n");
        return -1;
    }
    a->model = argv[optind];
    return 0;
}

/* ---- input ---- */

static int line_take(struct lines *l, const char *text, size_t bytes, int number,
                     const struct model_conf *c, struct err *e) {
    char where[32];
    snprintf(where, sizeof where, "line %d", number);
    json_t *root = json_parse(text, bytes, where, e);
    if (!root) return -1;
    const json_t *array = json_is_object(root) ? json_object_get(root, "ids") : root;
    int rc = 0;
    if (!json_is_array(array))
        rc = err_set(e, "%s: neither an array of ids nor an object with 'ids'", where);
    const size_t n = rc == 0 ? json_array_size(array) : 0;
    if (rc == 0 && n == 0) rc = err_set(e, "%s: no ids", where);
    if (rc == 0 && n > (size_t)c->positions_max)
        rc = err_set(e, "%s: %zu ids, but the model ends at %d positions", where, n,
                     c->positions_max);
    int32_t *ids = mem_alloc((n + 1) * sizeof *ids);
    for (size_t i = 0; rc == 0 && i < n; i++) {
        const json_t *v = json_array_get(array, i);
        if (!json_is_integer(v)) rc = err_set(e, "%s: element %zu is not an integer", where, i);
        else if (json_integer_value(v) < 0 || json_integer_value(v) >= c->vocab)
            rc = err_set(e, "%s: id %lld is outside the vocabulary of %d", where,
                         (long long)json_integer_value(v), c->vocab);
        else ids[i] = (int32_t)json_integer_value(v);
    }
    json_decref(root);
    if (rc < 0) {
        free(ids);
        return -1;
    }
    l->ids = mem_grow(l->ids, (size_t)(l->count + 1) * sizeof *l->ids);
    l->n = mem_grow(l->n, (size_t)(l->count + 1) * sizeof *l->n);
    l->ids[l->count] = ids;
    l->n[l->count++] = (int)n;
    if ((int)n > l->longest) l->longest = (int)n;
    return 0;
}

static int lines_read(struct lines *l, const struct model_conf *c, struct err *e) {
    char *text = NULL;
    size_t cap = 0;
    ssize_t got;
    int rc = 0;
    for (int number = 1; rc == 0 && (got = getline(&text, &cap, stdin)) > 0; number++) {
        size_t bytes = (size_t)got;
        while (bytes && strchr("\r\n \t", text[bytes - 1])) bytes--;
        if (number > LINES_MAX) rc = err_set(e, "more than %d lines", LINES_MAX);
        else if (bytes) rc = line_take(l, text, bytes, number, c, e);
    }
    if (rc == 0 && ferror(stdin)) rc = err_set(e, "cannot read stdin: %s", strerror(errno));
    free(text);
    return rc;
}

static void lines_release(struct lines *l) {
    for (int i = 0; i < l->count; i++) free(l->ids[i]);
    free(l->ids);
    free(l->n);
}

/* ---- output ---- */

/* The k largest of z as [[id, log-prob], ...], largest first, lower id first among equals. Log-sum
 * in double. */
static void print_top(const float *z, int vocab, int k) {
    int best[TOP_K_MAX], n = 0;
    double most = (double)z[0], sum = 0;
    for (int i = 0; i < vocab; i++) {
        most = fmax(most, (double)z[i]);
        if (n == k && z[i] <= z[best[n - 1]]) continue;
        int at = n < k ? n++ : n - 1;
        for (; at > 0 && z[best[at - 1]] < z[i]; at--) best[at] = best[at - 1];
        best[at] = i;
    }
    for (int i = 0; i < vocab; i++) sum += exp((double)z[i] - most);
    for (int i = 0; i < n; i++)
        printf("%s[%d,%.9g]", i ? "," : "[", best[i], (double)z[best[i]] - most - log(sum));
    putchar(']');
}

/* Rows 0 .. n-2 again, for their whole distributions. */
static int print_tops(struct net *net, const int32_t *ids, int n, int vocab, int k, struct err *e) {
    const int slot = net_slot_open(net);
    float *z = mem_alloc((size_t)ROWS * (size_t)vocab * sizeof *z);
    struct net_row row[ROWS];
    int32_t want[ROWS];
    int rc = 0;
    fputs(",\"top\":[null", stdout);
    for (int at = 0; rc == 0 && at < n - 1; at += ROWS) {
        const int count = n - 1 - at < ROWS ? n - 1 - at : ROWS;
        for (int i = 0; i < count; i++) {
            row[i] = (struct net_row){ .token = ids[at + i], .slot = slot, .pos = at + i };
            want[i] = i;
        }
        rc = net_forward(net, row, count, want, count, e);
        if (rc == 0) rc = net_logits(net, z, e);
        for (int i = 0; rc == 0 && i < count; i++) {
            putchar(',');
            print_top(z + (size_t)i * (size_t)vocab, vocab, k);
        }
    }
    putchar(']');
    free(z);
    net_slot_close(net, slot);
    return rc;
}

static int print_line(struct net *net, const int32_t *ids, int n, int vocab, int top_k,
                      struct err *e) {
    float *lp = mem_alloc((size_t)n * sizeof *lp);
    const struct net_seq s = { .ids = ids, .n = n, .prompt_n = 1 };
    int rc = net_logprobs(net, &s, 1, 1.f, lp, NULL, e);
    if (rc == 0) {
        fputs("{\"logprobs\":[null", stdout);
        for (int i = 0; i < n - 1; i++) printf(",%.9g", (double)lp[i]);
        putchar(']');
        if (top_k) rc = print_tops(net, ids, n, vocab, top_k, e);
        puts("}");
    }
    free(lp);
    return rc;
}

static int score(const struct args *a, struct model *m, struct err *e) {
    struct lines l = { 0 };
    struct lora *lora = NULL;
    struct net *net = NULL;
    int rc = lines_read(&l, &m->conf, e);
    if (rc == 0 && l.count && a->adapter) rc = lora_load(&lora, &m->conf, a->adapter, e);
    if (rc == 0 && l.count) {
        struct net_opts o = { .rows_max = ROWS, .slots_max = 1, .positions_max = l.longest };
        if (lora) o.lora = lora->shape;
        rc = net_create(&net, m, &o, e);
    }
    if (rc == 0 && lora) rc = net_adopt(net, lora, NULL, e);
    const int top_k = a->top_k < m->conf.vocab ? a->top_k : m->conf.vocab;
    for (int i = 0; rc == 0 && i < l.count; i++)
        rc = print_line(net, l.ids[i], l.n[i], m->conf.vocab, top_k, e);
    net_destroy(&net);
    lora_destroy(&lora);
    lines_release(&l);
    return rc;
}

int cmd_logprobs(int argc, char **argv) {
    struct args a;
    const int parsed = parse_args(&a, argc, argv);
    if (parsed) return parsed > 0 ? EXIT_DONE : EXIT_USAGE;
    struct err e = { 0 };
    struct kern k;
    struct model *m = NULL;
    struct pool *pool = pool_create(a.threads);
    const struct model_opts o = { .path = a.model, .quant = a.quant, .packed_dir = a.packed };
    int rc = kern_open(&k, a.kernels, pool, &e);
    if (rc == 0) rc = model_open(&m, &k, &o, &e);
    if (rc == 0) rc = score(&a, m, &e);
    if (m) model_close(&m);
    pool_destroy(&pool);
    if (rc == 0) return fflush(stdout) ? EXIT_FAILED : EXIT_DONE;
    fprintf(stderr, "qerl-model logprobs: %s\n", e.text);
    return e.code ? e.code : EXIT_FAILED;
}
