/* tok.h - text to token ids and back, and chat templates.
 *
 * Byte-level BPE as in SmolLM2, Llama 3 and Qwen2. The pre-tokeniser is one of three splitters
 * written here and chosen by recognising the file's pattern byte for byte; a pattern out of a file
 * is never executed. Reads tokenizer.json (+ tokenizer_config.json for the chat template) or GGUF
 * metadata.
 * SPDX-License-Identifier: Apache-2.0 */
#ifndef QERL_TOK_H
#define QERL_TOK_H
#include "lib/base/err.h"
#include "lib/base/str.h"

struct tok;
/* HF folder or .gguf; else EXIT_ENV */
int tok_open(struct tok **out, const char *model_path, struct err *e);
void tok_close(struct tok **t);
int tok_vocab(const struct tok *t);                  /* largest id + 1 */
/* of tokenizer.json (GGUF: of its tokenizer metadata) */
const char *tok_sha256(const struct tok *t);

struct tok_ids { int32_t *id; int n, cap; };         /* init with {0}; free(id) by the caller */
/* Appends the ids of text (UTF-8; invalid bytes are encoded bytewise). specials: special tokens'
 * texts are recognised. No bos is put in front: chat templates write their own. A byte without a
 * token is dropped, as `tokenizers` does; vocabularies that lack more than control characters and
 * unused bytes are refused. */
void tok_encode(const struct tok *t, const char *text, size_t bytes, bool specials,
                struct tok_ids *out);
/* Appends the bytes of ids to out; special tokens are left out unless `specials`. Out-of-range ids
 * add nothing. */
void tok_decode(const struct tok *t, const int32_t *ids, int n, bool specials, struct str *out);
int32_t tok_id(const struct tok *t, const char *special_text);           /* -1 if not a token */
bool tok_is_special(const struct tok *t, int32_t id);

struct chat_message { const char *role, *content; };
/* Renders messages as the model's own template does (transformers' apply_chat_template, text).
 * `chat` names a family (chatml, qwen2, qwen2.5, smollm2, llama3, llama3.1) or is NULL to recognise
 * the file's template; an unknown template is an error (EXIT_CONFIG) that says to set `chat`. Roles
 * are system, user and assistant. add_prompt appends the opening of the assistant's turn. Dates are
 * the template's own, never today's. */
int tok_chat(const struct tok *t, const char *chat, const struct chat_message *m, int n,
             bool add_prompt, struct str *out, struct err *e);
#endif
