/* tok_vocab.c - the tables of a tokenizer: names to ids, pairs to merges, texts of added tokens;
 * see tok_int.h.
 *
 * Everything that a hostile file could get wrong is refused here, so that the readers only walk
 * their formats.
 * Order: alphabet, names, merges, added tokens, the last checks.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/tok_int.h"

#include "lib/base/log.h"
#include "lib/base/rng.h"

/* GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the 68 others are U+0100 and up,
 * in order. */
static bool printable(unsigned b) {
    return (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
}

static int32_t alphabet_codepoint(unsigned byte) {
    if (printable(byte)) return (int32_t)byte;
    int32_t cp = 0x100;
    for (unsigned b = 0; b < byte; b++) cp += !printable(b);
    return cp;
}

int tok_alphabet(unsigned byte, char out[2]) {
    int32_t cp = alphabet_codepoint(byte);
    if (cp < 0x80) return out[0] = (char)cp, 1;
    out[0] = (char)(0xc0 | cp >> 6);
    out[1] = (char)(0x80 | (cp & 0x3f));
    return 2;
}

int tok_alphabet_byte(int32_t cp) {
    if (cp < 0) return -1;
    if (cp < 0x100) return printable((unsigned)cp) ? (int)cp : -1;
    if (cp < 0x121) return cp - 0x100;                        /* 00 .. 20 */
    if (cp < 0x143) return cp - 0x121 + 0x7f;                 /* 7f .. a0 */
    return cp == 0x143 ? 0xad : -1;
}

static uint64_t hash(const char *s, size_t bytes) {
    uint64_t h = bytes;
    for (; bytes >= 8; s += 8, bytes -= 8) {
        uint64_t w;
        memcpy(&w, s, 8);
        h = rng_mix64(h ^ w);
    }
    uint64_t w = 0;
    memcpy(&w, s, bytes);
    return rng_mix64(h ^ w);
}

void tok_reserve(struct tok *t, size_t ids, size_t merges) {
    assert(ids <= TOK_IDS_MAX && merges <= TOK_MERGES_MAX);
    t->slots = t->pairs = 16;
    while (t->slots < 2 * ids) t->slots *= 2;
    while (t->pairs < 2 * merges) t->pairs *= 2;
    t->slot = mem_alloc(t->slots * sizeof *t->slot);
    t->pair = mem_alloc(t->pairs * sizeof *t->pair);
    for (uint32_t i = 0; i < t->pairs; i++) t->pair[i].rank = -1;
    t->name = mem_alloc((ids + 1) * sizeof *t->name);
    t->raw = mem_alloc((ids + 1) * sizeof *t->raw);
    t->flags = mem_alloc(ids + 1);
    t->ids = (int)ids;
    t->merges_cap = (int)merges;
}

/* Slot where the name stands or would stand. */
static uint32_t slot_of(const struct tok *t, const char *name, size_t bytes) {
    uint32_t i = (uint32_t)hash(name, bytes) & (t->slots - 1);
    for (; t->slot[i]; i = (i + 1) & (t->slots - 1)) {
        struct tok_span n = t->name[t->slot[i] - 1];
        if (n.bytes == bytes && memcmp(t->names.s + n.at, name, bytes) == 0) break;
    }
    return i;
}

int tok_find(const struct tok *t, const char *name, size_t bytes) {
    return (int)t->slot[slot_of(t, name, bytes)] - 1;
}

/* What a token decodes to: bytes if it is spelled in the alphabet throughout, else its own text (as
 * ByteLevel does). */
static struct tok_span decoded(struct tok *t, const char *name, size_t bytes) {
    struct tok_span at = { (uint32_t)t->raws.len, 0 };
    for (size_t i = 0; i < bytes;) {
        int32_t cp;
        i += tok_utf8(name + i, bytes - i, &cp);
        int b = tok_alphabet_byte(cp);
        if (b < 0) {
            t->raws.len = at.at;
            str_add(&t->raws, name, bytes);
            break;
        }
        str_add(&t->raws, &(uint8_t){ (uint8_t)b }, 1);
    }
    at.bytes = (uint32_t)t->raws.len - at.at;
    return at;
}

int tok_put(struct tok *t, int64_t id, const char *name, size_t bytes, unsigned flags,
            struct err *e) {
    if (id < 0 || id >= t->ids)
        return err_set(
            e, "token '%.*s' has id %lld, but the file has only %d tokens (ids must be dense)",
            SHOWN(name, bytes), (long long)id, t->ids);
    if (bytes == 0 || bytes > TOK_NAME_BYTES_MAX)
        return err_set(e, "token %lld has %zu bytes (1 to %d are allowed)", (long long)id, bytes,
                       TOK_NAME_BYTES_MAX);
    if (t->flags[id])
        return err_set(e, "id %lld is given to two tokens, '%.*s' is one", (long long)id,
                       SHOWN(name, bytes));
    if (t->names.len + bytes > TOK_NAMES_BYTES_MAX)
        return err_set(e, "the tokens have more than %d bytes together", TOK_NAMES_BYTES_MAX);
    uint32_t slot = slot_of(t, name, bytes);
    if (t->slot[slot])
        return err_set(e, "token '%.*s' occurs twice, as ids %u and %lld", SHOWN(name, bytes),
                       t->slot[slot] - 1, (long long)id);
    t->slot[slot] = (uint32_t)id + 1;
    t->name[id] = (struct tok_span){ (uint32_t)t->names.len, (uint32_t)bytes };
    str_add(&t->names, name, bytes);
    t->raw[id] = decoded(t, name, bytes);
    t->flags[id] = (uint8_t)(flags | TOK_FLAG_PRESENT);
    if (flags & TOK_FLAG_MODEL && bytes > t->name_bytes_max) t->name_bytes_max = (uint32_t)bytes;
    return 0;
}

int tok_add_flags(struct tok *t, int64_t id, const char *name, size_t bytes, unsigned flags,
                  struct err *e) {
    int old = tok_find(t, name, bytes);
    if (old < 0) return tok_put(t, id, name, bytes, flags, e);
    if (old != id)
        return err_set(e, "added token '%.*s' has id %lld, but the vocabulary gives it id %d",
                       SHOWN(name, bytes), (long long)id, old);
    if (t->flags[old] & TOK_FLAG_ADDED)
        return err_set(e, "added token '%.*s' is listed twice", SHOWN(name, bytes));
    t->flags[old] |= (uint8_t)flags;
    return 0;
}

/* ---- merges ---- */

static uint32_t pair_slot(const struct tok *t, uint64_t key) {
    uint32_t i = (uint32_t)rng_mix64(key) & (t->pairs - 1);
    while (t->pair[i].rank >= 0 && t->pair[i].key != key) i = (i + 1) & (t->pairs - 1);
    return i;
}

const struct tok_pair *tok_pair_find(const struct tok *t, int32_t left, int32_t right) {
    const struct tok_pair
        *p = &t->pair[pair_slot(t, (uint64_t)(uint32_t)left << 32 | (uint32_t)right)];
    return p->rank < 0 ? NULL : p;
}

static int model_id(const struct tok *t, const char *name, size_t bytes) {
    int id = tok_find(t, name, bytes);
    return id >= 0 && t->flags[id] & TOK_FLAG_MODEL ? id : -1;
}

int tok_merge(struct tok *t, const char *left, size_t left_bytes, const char *right,
              size_t right_bytes, struct err *e) {
    char both[2 * TOK_NAME_BYTES_MAX];
    const int at = t->merges;
    if (at >= t->merges_cap) return err_set(e, "more merges than announced");
    if (left_bytes > TOK_NAME_BYTES_MAX || right_bytes > TOK_NAME_BYTES_MAX)
        return err_set(e, "merge %d has a part longer than %d bytes", at, TOK_NAME_BYTES_MAX);
    int l = model_id(t, left, left_bytes), r = model_id(t, right, right_bytes);
    if (l < 0 || r < 0)
        return err_set(e, "merge %d: part '%.*s' is not in the vocabulary", at,
                       SHOWN(l < 0 ? left : right, l < 0 ? left_bytes : right_bytes));
    memcpy(both, left, left_bytes);
    memcpy(both + left_bytes, right, right_bytes);
    int id = model_id(t, both, left_bytes + right_bytes);
    if (id < 0)
        return err_set(e, "merge %d: its result '%.*s' is not in the vocabulary", at,
                       SHOWN(both, left_bytes + right_bytes));
    uint64_t key = (uint64_t)(uint32_t)l << 32 | (uint32_t)r;
    struct tok_pair *p = &t->pair[pair_slot(t, key)];
    if (p->rank >= 0) return err_set(e, "merges %d and %d are the same", p->rank, at);
    *p = (struct tok_pair){ key, at, id };
    t->merges++;
    return 0;
}

int tok_merge_text(struct tok *t, const char *text, size_t bytes, struct err *e) {
    const char *space = memchr(text, ' ', bytes);
    size_t left = space ? (size_t)(space - text) : 0;
    if (!space || memchr(space + 1, ' ', bytes - left - 1))
        return err_set(e, "merge %d ('%.*s') is not two parts with a space between", t->merges,
                       SHOWN(text, bytes));
    return tok_merge(t, text, left, space + 1, bytes - left - 1, e);
}

/* ---- added tokens ---- */

static int node_new(struct tok_trie *r, uint8_t byte) {
    if (r->nodes == r->cap) {
        r->cap = r->cap ? 2 * r->cap : 64;
        r->node = mem_grow(r->node, (size_t)r->cap * sizeof *r->node);
    }
    r->node[r->nodes] = (struct tok_node){ 0, 0, -1, byte };
    return r->nodes++;
}

static void trie_put(struct tok_trie *r, const char *text, size_t bytes, int id) {
    if (!r->nodes) node_new(r, 0);
    int at = 0;
    for (size_t i = 0; i < bytes; i++) {
        uint8_t b = (uint8_t)text[i];
        int child = r->node[at].child;
        while (child && r->node[child].byte != b) child = r->node[child].sibling;
        if (!child) {
            child = node_new(r, b);
            r->node[child].sibling = r->node[at].child;
            r->node[at].child = child;
        }
        at = child;
    }
    if (r->node[at].id < 0) r->node[at].id = id;
    r->first[(uint8_t)text[0]] = true;
}

static void tries_fill(struct tok *t) {
    struct str text;
    str_init(&text);
    for (int id = 0; id < t->ids; id++) {
        if (!(t->flags[id] & TOK_FLAG_ADDED)) continue;
        const char *name = t->names.s + t->name[id].at;
        size_t bytes = t->name[id].bytes;
        bool normalized = t->flags[id] & TOK_FLAG_NORMALIZED;
        str_clear(&text);
        if (normalized && t->nfc) tok_nfc(&text, name, bytes);
        else str_add(&text, name, bytes);
        trie_put(&t->added[normalized], text.s, text.len, id);
    }
    str_release(&text);
}

/* ---- the last checks ---- */

/* A vocabulary may lack a byte only if no character but a control character needs it: SmolLM2 lacks
 * some of these, and `tokenizers` drops them without a word. A vocabulary that lacks others would
 * lose text. */
static bool byte_may_lack(unsigned b) {
    return (b < 0x20 && b != '\t' && b != '\n' && b != '\r') || b == 0x7f || b == 0xc0 ||
           b == 0xc1 || b >= 0xf1;
}

int tok_seal(struct tok *t, struct err *e) {
    int lacking = 0;
    for (int id = 0; id < t->ids; id++)
        if (!t->flags[id]) return err_set(e, "id %d has no token (ids must be dense)", id);
    for (unsigned b = 0; b < TOK_ALPHABET; b++) {
        char name[2];
        t->byte_id[b] = model_id(t, name, (size_t)tok_alphabet(b, name));
        if (t->byte_id[b] >= 0) continue;
        if (!byte_may_lack(b))
            return err_set(e, "the vocabulary has no token for the byte 0x%02x", b);
        lacking++;
    }
    if (lacking)
        log_debug("tokenizer: %d of 256 byte tokens are absent; text cannot hold those bytes",
                  lacking);
    tries_fill(t);
    return 0;
}
