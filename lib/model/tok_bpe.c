/* tok_bpe.c - merges one word; see tok_int.h.
 *
 * A linked list of symbols and a heap of candidate merges (lowest rank first, then leftmost): O(n
 * log n). A candidate is stale when its place no longer merges into the token it promised. The
 * order of events is that of `tokenizers` (models/bpe/word.rs), which matters where two merges make
 * the same token.
 * SPDX-License-Identifier: Apache-2.0 */
#include "lib/model/tok_int.h"

void tok_ids_add(struct tok_ids *out, int32_t id) {
    if (out->n == out->cap) {
        assert(out->cap <= INT32_MAX / 2);
        out->cap = out->cap ? 2 * out->cap : 64;
        out->id = mem_grow(out->id, (size_t)out->cap * sizeof *out->id);
    }
    out->id[out->n++] = id;
}

void tok_bpe_release(struct tok_bpe *b) {
    free(b->sym);
    free(b->heap);
    str_release(&b->word);
    *b = (struct tok_bpe){ 0 };
}

static bool before(struct tok_cand a, struct tok_cand b) {
    return a.rank != b.rank ? a.rank < b.rank : a.at < b.at;
}

static void heap_push(struct tok_bpe *b, struct tok_cand c) {
    if (b->heap_n == b->heap_cap) {
        b->heap_cap = b->heap_cap ? 2 * b->heap_cap : 64;
        b->heap = mem_grow(b->heap, b->heap_cap * sizeof *b->heap);
    }
    size_t i = b->heap_n++;
    for (; i && before(c, b->heap[(i - 1) / 2]); i = (i - 1) / 2) b->heap[i] = b->heap[(i - 1) / 2];
    b->heap[i] = c;
}

static struct tok_cand heap_pop(struct tok_bpe *b) {
    struct tok_cand top = b->heap[0], last = b->heap[--b->heap_n];
    size_t i = 0;
    for (size_t kid; (kid = 2 * i + 1) < b->heap_n; i = kid) {
        if (kid + 1 < b->heap_n && before(b->heap[kid + 1], b->heap[kid])) kid++;
        if (!before(b->heap[kid], last)) break;
        b->heap[i] = b->heap[kid];
    }
    b->heap[i] = last;
    return top;
}

static void propose(const struct tok *t, struct tok_bpe *b, int32_t left, int32_t right) {
    const struct tok_pair *p = tok_pair_find(t, b->sym[left].id, b->sym[right].id);
    if (p) heap_push(b, (struct tok_cand){ p->rank, left, p->id });
}

/* One symbol a byte; bytes without a token become `unk` (a run of them one, where fused) or
 * nothing. */
static int32_t symbols(const struct tok *t, struct tok_bpe *b, const char *s, size_t bytes) {
    if (b->sym_cap < bytes) {
        b->sym_cap = bytes < 64 ? 64 : bytes;
        b->sym = mem_grow(b->sym, b->sym_cap * sizeof *b->sym);
    }
    int32_t n = 0;
    bool unk_before = false;
    for (size_t i = 0; i < bytes; i++) {
        int32_t id = t->byte_id[(uint8_t)s[i]];
        bool unk = id < 0;
        if (unk) id = t->unk;
        if (id < 0 || (unk && unk_before && t->unk_fuse)) continue;
        unk_before = unk;
        b->sym[n] = (struct tok_sym){ id, n - 1, n + 1 };
        n++;
    }
    if (n) b->sym[n - 1].next = -1;
    return n;
}

static bool whole_word(const struct tok *t, struct tok_bpe *b, const char *s, size_t bytes,
                       struct tok_ids *out) {
    if (bytes > t->name_bytes_max) return false;
    str_clear(&b->word);
    for (size_t i = 0; i < bytes; i++) {
        char name[2];
        str_add(&b->word, name, (size_t)tok_alphabet((uint8_t)s[i], name));
    }
    int id = tok_find(t, b->word.s, b->word.len);
    if (id < 0 || !(t->flags[id] & TOK_FLAG_MODEL)) return false;
    tok_ids_add(out, id);
    return true;
}

void tok_bpe_word(const struct tok *t, struct tok_bpe *b, const char *s, size_t bytes,
                  struct tok_ids *out) {
    if (t->whole_words && whole_word(t, b, s, bytes, out)) return;
    int32_t n = symbols(t, b, s, bytes);
    b->heap_n = 0;
    for (int32_t i = 0; i + 1 < n; i++) propose(t, b, i, i + 1);
    while (b->heap_n) {
        struct tok_cand c = heap_pop(b);
        struct tok_sym *left = &b->sym[c.at];
        if (left->id < 0 || left->next < 0) continue;
        struct tok_sym *right = &b->sym[left->next];
        const struct tok_pair *p = tok_pair_find(t, left->id, right->id);
        if (!p || p->id != c.id) continue;
        left->id = c.id;
        left->next = right->next;
        right->id = -1;
        if (left->next >= 0) b->sym[left->next].prev = c.at;
        if (left->prev >= 0) propose(t, b, left->prev, c.at);
        if (left->next >= 0) propose(t, b, c.at, left->next);
    }
    for (int32_t i = n ? 0 : -1; i >= 0; i = b->sym[i].next) tok_ids_add(out, b->sym[i].id);
}
