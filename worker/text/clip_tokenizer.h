// clip_tokenizer.h: text to CLIP token ids, as transformers' CLIPTokenizer makes them.
//
// Reads a diffusers tokenizer folder: vocab.json and merges.txt, and where they are there tokenizer_config.json and
// special_tokens_map.json. A loaded tokenizer never changes: any number of threads may encode with it.
#ifndef DITFLEET_CLIP_TOKENIZER_H
#define DITFLEET_CLIP_TOKENIZER_H

#include "proto/err.h"

#include <stddef.h>
#include <stdint.h>

struct clip_tokenizer;

// On success *out is the caller's, to be freed with clip_tokenizer_free. Errors name the file: ERR_NOT_FOUND,
// ERR_CORRUPT (a malformed vocabulary or merge), ERR_UNSUPPORTED (added tokens that strip or match whole words only).
int clip_tokenizer_load(const char *dir, struct clip_tokenizer **out, struct err *e);
void clip_tokenizer_free(struct clip_tokenizer *t); // NULL is fine

// text: length bytes of UTF-8, NUL bytes allowed. ids: (max_length), begin of text, tokens, end of text, then padding;
// what is too long is cut off before the end of text. *count: tokens before the cut, begin and end included; the text
// was truncated if *count > max_length. ERR_INVALID: not UTF-8, over 16 MiB, max_length < 2. No error holds the text.
// Time is O(length log length) whatever the text.
int clip_tokenizer_encode(const struct clip_tokenizer *t, const char *text, size_t length, int max_length, int32_t *ids,
                          int64_t *count, struct err *e);

// The length that the tokenizer's own config asks for (model_max_length), 77 if it names none.
int clip_tokenizer_max_length(const struct clip_tokenizer *t);
// All ids are below this; the encoder's vocab_size must be no smaller.
int32_t clip_tokenizer_id_limit(const struct clip_tokenizer *t);

#endif
