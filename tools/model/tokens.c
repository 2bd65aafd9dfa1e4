/* tokens.c - qerl-model tokens: text to ids and back, on stdin and stdout.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/base/json.h"
#include "lib/model/tok.h"
#include "tools/model/args.h"
#include "tools/model/cmd.h"

static const char HELP[] =
    "usage: qerl-model tokens MODEL [--lines] [--decode] [--plain] < input\n\n"
    "Turns the text on stdin into one line of JSON, the array of its token ids.\n\n"
    "  --decode   the other way: each line of stdin is an array of ids, stdout gets their text\n"
    "  --lines    each line of stdin is a JSON string, answered by a line with its ids\n"
    "             (with --decode: each answer is a line with a JSON string)\n"
    "  --plain    texts of special tokens are text like any other; --decode leaves special tokens "
    "out\n\n"
    "examples:\n"
    "  printf 'What is 2+2?' | qerl-model tokens models/tiny\n"
    "  printf 'What is 2+2?' | qerl-model tokens models/tiny | qerl-model tokens models/tiny "
    "--decode\n";

enum { READ_BYTES = 1 << 16 };

static void print_ids(const struct tok_ids *ids) {
    putchar('[');
    for (int i = 0; i < ids->n; i++) printf(i ? ",%d" : "%d", ids->id[i]);
    puts("]");
}

static void encode(const struct tok *t, const char *text, size_t bytes, bool plain) {
    struct tok_ids ids = { 0 };
    tok_encode(t, text, bytes, !plain, &ids);
    print_ids(&ids);
    free(ids.id);
}

static int encode_line(const struct tok *t, const char *line, size_t bytes, const char *where,
                       bool plain, struct err *e) {
    json_t *v = json_parse(line, bytes, where, e);
    if (!v) return -1;
    int rc = json_is_string(v) ? 0 : err_set(e, "%s: not a JSON string", where);
    if (rc == 0) encode(t, json_string_value(v), json_string_length(v), plain);
    json_decref(v);
    return rc;
}

static int decode_line(const struct tok *t, const char *line, size_t bytes, const char *where,
                       bool quoted, bool plain, struct err *e) {
    struct str text, quote;
    json_t *v = json_parse(line, bytes, where, e), *id;
    if (!v) return -1;
    int rc = json_is_array(v) ? 0 : err_set(e, "%s: not a JSON array of ids", where);
    size_t i;
    str_init(&text);
    str_init(&quote);
    json_array_foreach(v, i, id) {
        json_int_t n = json_integer_value(id);
        if (!json_is_integer(id) || n < 0 || n >= tok_vocab(t)) {
            rc = err_set(e, "%s: element %zu is not an id (0 to %d)", where, i, tok_vocab(t) - 1);
            break;
        }
        tok_decode(t, &(int32_t){ (int32_t)n }, 1, !plain, &text);
    }
    if (quoted) json_quote(&quote, text.s ? text.s : "", text.len);
    if (rc == 0 && quoted) puts(quote.s);
    if (rc == 0 && !quoted && text.len) fwrite(text.s, 1, text.len, stdout);
    str_release(&quote);
    str_release(&text);
    json_decref(v);
    return rc;
}

static int each_line(const struct tok *t, struct str *input, bool lines, bool decode, bool plain,
                     struct err *e) {
    size_t from = 0;
    for (int n = 1; from < input->len; n++) {
        const char *line = input->s + from, *end = memchr(line, '\n', input->len - from);
        size_t bytes = end ? (size_t)(end - line) : input->len - from;
        char where[32];
        snprintf(where, sizeof where, "stdin line %d", n);
        int rc = bytes == 0 ? 0
                 : decode   ? decode_line(t, line, bytes, where, lines, plain, e)
                            : encode_line(t, line, bytes, where, plain, e);
        if (rc < 0) return -1;
        from += bytes + 1;
    }
    return 0;
}

static void read_stdin(struct str *input) {
    char buf[READ_BYTES];
    for (size_t n; (n = fread(buf, 1, sizeof buf, stdin)) > 0;) str_add(input, buf, n);
}

int cmd_tokens(int argc, char **argv) {
    bool lines = false, decode = false, plain = false;
    const struct arg arg[] = { { "lines", NULL, &lines },
                               { "decode", NULL, &decode },
                               { "plain", NULL, &plain } };
    const char *path;
    struct err e = { 0 };
    struct tok *t = NULL;
    struct str input;
    int rc = args_parse(argc, argv, HELP, arg, COUNT_OF(arg), &path);
    if (rc <= 0) return rc < 0 ? EXIT_USAGE : EXIT_DONE;
    str_init(&input);
    rc = tok_open(&t, path, &e);
    if (rc == 0) {
        read_stdin(&input);
        if (lines || decode) rc = each_line(t, &input, lines, decode, plain, &e);
        else encode(t, input.s ? input.s : "", input.len, plain);
    }
    if (rc < 0) fprintf(stderr, "qerl-model tokens: %s\n", e.text);
    str_release(&input);
    tok_close(&t);
    return rc == 0 ? EXIT_DONE : e.code ? e.code : EXIT_FAILED;
}
