/* tok.c - opens a tokenizer, encodes and decodes; see tok.h.
 *
 * Encoding: added tokens are cut out of the text as given, the stretches between are normalised,
 * added tokens that live in normalised text are cut out of those, the pre-tokenizer cuts the rest
 * into words, and BPE merges each word.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/tok_int.h"

#include "lib/base/fs.h"
#include "lib/model/model.h"

int tok_open(struct tok **out, const char *model_path, struct err *e) {
    struct tok *t = mem_alloc(sizeof *t);
    char file[FS_PATH_MAX];
    model_path = model_path_resolve(model_path, file);
    t->unk = -1;
    int rc = str_ends(model_path, ".gguf") ? tok_open_gguf(t, model_path, e)
                                           : tok_open_json(t, model_path, e);
    if (rc < 0) {
        tok_close(&t);
        if (e) e->code = EXIT_ENV;
        return err_wrap(e, "cannot open the tokenizer of '%s'", model_path);
    }
    *out = t;
    return 0;
}

void tok_close(struct tok **tp) {
    struct tok *t = *tp;
    if (!t) return;
    free(t->name);
    free(t->raw);
    free(t->flags);
    free(t->slot);
    free(t->pair);
    free(t->bos);
    for (int i = 0; i < 2; i++) free(t->added[i].node);
    str_release(&t->names);
    str_release(&t->raws);
    str_release(&t->template);
    free(t);
    *tp = NULL;
}

int tok_vocab(const struct tok *t) { return t->ids; }
const char *tok_sha256(const struct tok *t) { return t->sha256; }
int32_t tok_id(const struct tok *t, const char *special_text) {
    return tok_find(t, special_text, strlen(special_text));
}

bool tok_is_special(const struct tok *t, int32_t id) {
    return id >= 0 && id < t->ids && t->flags[id] & TOK_FLAG_SPECIAL;
}

struct encoder {
    const struct tok *t;
    struct tok_ids *out;
    bool specials;
    struct tok_bpe bpe;
};

/* Longest text of the trie at s[0]: its length and id, or 0. */
static size_t added_at(const struct tok_trie *r, const char *s, size_t bytes, int32_t *id) {
    size_t best = 0;
    int at = 0;
    for (size_t i = 0; i < bytes; i++) {
        int child = r->node[at].child;
        while (child && r->node[child].byte != (uint8_t)s[i]) child = r->node[child].sibling;
        if (!child) break;
        at = child;
        if (r->node[at].id >= 0) {
            best = i + 1;
            *id = r->node[at].id;
        }
    }
    return best;
}

static void encode_words(struct encoder *c, const char *s, size_t bytes) {
    for (size_t n; bytes; s += n, bytes -= n) {
        n = tok_split_next(c->t->split, s, bytes);
        assert(n > 0 && n <= bytes);
        tok_bpe_word(c->t, &c->bpe, s, n, c->out);
    }
}

static void encode_part(struct encoder *c, int pass, const char *s, size_t bytes);

static void encode_gap(struct encoder *c, int pass, const char *s, size_t bytes) {
    if (!bytes) return;
    if (pass == 1) {
        encode_words(c, s, bytes);
        return;
    }
    if (!c->t->nfc) {
        encode_part(c, 1, s, bytes);
        return;
    }
    struct str text;
    str_init(&text);
    tok_nfc(&text, s, bytes);
    encode_part(c, 1, text.s, text.len);
    str_release(&text);
}

/* Pass 0: the text as given; pass 1: normalised. A special token that the caller does not want is
 * stepped over whole, as `tokenizers` does. */
static void encode_part(struct encoder *c, int pass, const char *s, size_t bytes) {
    const struct tok_trie *r = &c->t->added[pass];
    size_t from = 0, n;
    int32_t id = -1;
    for (size_t i = 0; r->nodes && i < bytes; i += n ? n : 1) {
        n = r->first[(uint8_t)s[i]] ? added_at(r, s + i, bytes - i, &id) : 0;
        if (!n || (!c->specials && tok_is_special(c->t, id))) continue;
        encode_gap(c, pass, s + from, i - from);
        tok_ids_add(c->out, id);
        from = i + n;
    }
    encode_gap(c, pass, s + from, bytes - from);
}

void tok_encode(const struct tok *t, const char *text, size_t bytes, bool specials,
                struct tok_ids *out) {
    assert(bytes <= TOK_TEXT_BYTES_MAX);
    struct encoder c = { t, out, specials, { 0 } };
    encode_part(&c, 0, text, bytes);
    tok_bpe_release(&c.bpe);
}

void tok_decode(const struct tok *t, const int32_t *ids, int n, bool specials, struct str *out) {
    for (int i = 0; i < n; i++) {
        if (ids[i] < 0 || ids[i] >= t->ids || (!specials && tok_is_special(t, ids[i]))) continue;
        str_add(out, t->raws.s + t->raw[ids[i]].at, t->raw[ids[i]].bytes);
    }
}
