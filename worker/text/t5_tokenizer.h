// t5_tokenizer.h: text to T5 token ids, by sentencepiece behind a C interface.
//
// Reads spiece.model from a diffusers tokenizer folder. Text that spells a control token ("</s>", "<pad>",
// "<extra_id_0>") is ordinary text here. A loaded tokenizer never changes: any number of threads may encode with it.
#ifndef DITFLEET_T5_TOKENIZER_H
#define DITFLEET_T5_TOKENIZER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#include "proto/err.h"

struct t5_tokenizer;

// On success *out is the caller's, to be freed with t5_tokenizer_free. Errors name the file: ERR_NOT_FOUND, ERR_IO,
// ERR_CORRUPT.
int t5_tokenizer_load(const char *dir, struct t5_tokenizer **out, struct err *e);
void t5_tokenizer_free(struct t5_tokenizer *t); // NULL is fine

// text: length bytes of UTF-8, NUL bytes allowed. ids: (max_length), tokens, end of text, then padding (1 and 0 in T5's
// own vocabulary); what is too long is cut off before the end of text. *count: tokens before the cut, the end included;
// the text was truncated if *count > max_length. ERR_INVALID: not UTF-8, over 128 KiB, max_length < 1. No error holds
// the text.
int t5_tokenizer_encode(const struct t5_tokenizer *t, const char *text, size_t length, int max_length, int32_t *ids,
                        int64_t *count, struct err *e);

// All ids are below this; the encoder's vocab_size must be no smaller.
int32_t t5_tokenizer_id_limit(const struct t5_tokenizer *t);

#ifdef __cplusplus
}
#endif

#endif
