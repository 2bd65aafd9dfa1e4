/* tok_int.h - what the tokenizer's own files share; nobody outside lib/model/tok*.c and chat.c
 * includes it.
 *
 * A struct tok is filled once by a reader (tok_json.c, tok_gguf.c) through tok_reserve, tok_put,
 * tok_merge and tok_seal, and is read-only afterwards, so that any number of threads may encode
 * with it.
 *   name   a token as the file spells it: in the printable alphabet of GPT-2; added tokens as text
 *   raw    the bytes that it decodes to
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_TOK_INT_H
#define QERL_TOK_INT_H
#include "lib/base/hash.h"
#include "lib/model/tok.h"

enum {
    TOK_IDS_MAX = 1 << 20,            /* ids of one vocabulary */
    TOK_MERGES_MAX = 1 << 21,
    TOK_NAME_BYTES_MAX = 4096,        /* one token as spelled in the file */
    TOK_NAMES_BYTES_MAX = 1 << 28,    /* all of them */
    TOK_JSON_BYTES_MAX = 64 << 20,    /* tokenizer.json */
    TOK_CONFIG_BYTES_MAX = 4 << 20,   /* tokenizer_config.json */
    TOK_TEMPLATE_BYTES_MAX = 1 << 20,
    TOK_TEXT_BYTES_MAX = 1 << 30,     /* one call of tok_encode */
    TOK_ALPHABET = 256,
};

#define SHOWN(text, bytes) (int)((bytes) < 40 ? (bytes) : 40), (text)       /* for "%.*s" in a message */

enum tok_split { TOK_SPLIT_SMOLLM, TOK_SPLIT_LLAMA3, TOK_SPLIT_QWEN2 };

enum tok_flag {
    TOK_FLAG_PRESENT = 1,
    TOK_FLAG_MODEL = 2,        /* in the BPE vocabulary: merges may make it */
    TOK_FLAG_ADDED = 4,        /* recognised in the text before anything else */
    /* ... only where the caller wants specials; left out of decoded text */
    TOK_FLAG_SPECIAL = 8,
    TOK_FLAG_NORMALIZED = 16,  /* ... sought in the normalised text */
};

struct tok_span { uint32_t at, bytes; };
/* key = left << 32 | right; rank -1: an empty slot */
struct tok_pair { uint64_t key; int32_t rank, id; };

struct tok_node { int32_t child, sibling, id; uint8_t byte; };
struct tok_trie { /* texts of added tokens; node 0 is the root, 0 also means "none" */
    struct tok_node *node;
    int nodes, cap;
    bool first[256];                   /* bytes that some text begins with */
};

struct tok {
    enum tok_split split;
    /* whole_words: a word that is a token is not merged (ignore_merges) */
    bool nfc, whole_words;
    int ids;                           /* largest id + 1 */
    struct tok_span *name, *raw;       /* [ids] into names, raws */
    uint8_t *flags;                    /* [ids], enum tok_flag */
    struct str names, raws;
    uint32_t name_bytes_max;           /* longest name in the BPE vocabulary */
    uint32_t *slot;                    /* hash of names: id + 1, 0 = empty */
    uint32_t slots;                    /* power of two */
    struct tok_pair *pair;
    uint32_t pairs;                    /* power of two */
    int merges, merges_cap;
    int32_t byte_id[TOK_ALPHABET];     /* -1: the vocabulary lacks this byte */
    int32_t unk; /* token for lacking bytes, -1 = they are dropped, as `tokenizers` does */
    bool unk_fuse;
    struct tok_trie added[2];          /* sought in the text as given; in the normalised text */
    char sha256[SHA256_HEX];
    struct str template;               /* the file's chat template, empty = none */
    char *bos;                         /* text of the bos token, NULL = none */
};

/* Filling, in this order. `ids` and `merges` are upper bounds known from the file. */
void tok_reserve(struct tok *t, size_t ids, size_t merges);
int tok_put(struct tok *t, int64_t id, const char *name, size_t bytes, unsigned flags,
            struct err *e);
int tok_add_flags(struct tok *t, int64_t id, const char *name, size_t bytes, unsigned flags,
                  struct err *e);
int tok_merge(struct tok *t, const char *left, size_t left_bytes, const char *right,
              size_t right_bytes, struct err *e);
int tok_merge_text(struct tok *t, const char *text, size_t bytes, struct err *e); /* "left right" */
int tok_seal(struct tok *t, struct err *e); /* last checks, byte ids, tries */

int tok_find(const struct tok *t, const char *name, size_t bytes);                    /* id or -1 */
const struct tok_pair *tok_pair_find(const struct tok *t, int32_t left, int32_t right);
/* GPT-2's printable character for a byte, UTF-8; its length */
int tok_alphabet(unsigned byte, char out[2]);
int tok_alphabet_byte(int32_t codepoint);              /* the way back; -1 if not of the alphabet */

int tok_open_json(struct tok *t, const char *dir, struct err *e);
int tok_read_json(struct tok *t, const char *text, size_t bytes, const char *where, struct err *e);
int tok_open_gguf(struct tok *t, const char *path, struct err *e);

/* One code point at s[0..bytes), bytes > 0: its length; *cp = -1 and 1 for a byte that is not
 * UTF-8. */
size_t tok_utf8(const char *s, size_t bytes, int32_t *cp);
/* Length of the first piece of s[0..bytes), bytes > 0, as the pre-tokenizer cuts it. s is a whole
 * stretch between added tokens: its end counts as the end of the text. */
size_t tok_split_next(enum tok_split split, const char *s, size_t bytes);
/* Appends the NFC form (that of the `tokenizers` library) of s; bytes that are not UTF-8 stay and
 * block composition. */
void tok_nfc(struct str *out, const char *s, size_t bytes);

/* Scratch memory of one tok_encode call. */
/* id -1: merged into its left neighbour */
struct tok_sym { int32_t id, prev, next; };
struct tok_cand { int32_t rank, at, id; };
struct tok_bpe {
    struct tok_sym *sym;
    struct tok_cand *heap;
    size_t sym_cap, heap_cap, heap_n;
    struct str word;
};
void tok_bpe_word(const struct tok *t, struct tok_bpe *b, const char *s, size_t bytes,
                  struct tok_ids *out);
void tok_bpe_release(struct tok_bpe *b);
void tok_ids_add(struct tok_ids *out, int32_t id);

/* The chat families, and the recogniser (tok_template.c). */
enum chat_kind { CHAT_KIND_CHATML, CHAT_KIND_LLAMA3, CHAT_KIND_LLAMA31 };
struct chat_family {
    enum chat_kind kind;
    char *system;              /* default system text; NULL = none is added */
    char *date;                /* llama3.1: "26 Jul 2024" */
    char *knowledge;           /* llama3.1: "December 2023" */
};
int chat_recognise(struct chat_family *f, const char *text, size_t bytes, struct err *e);
void chat_family_release(struct chat_family *f);
#endif
