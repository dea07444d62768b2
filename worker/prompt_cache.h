// prompt_cache.h: the last few encoded prompts, in a device's memory, so that the same prompt is not encoded twice.
//
// An entry is found by a digest of what was encoded: no text is kept. Every rank of a group keeps the same entries,
// because it finds, claims and keeps by the same jobs in the same order; so all ranks hit or miss alike, and nobody
// waits for a broadcast that is not sent. Whoever changes it on one rank alone breaks that.
#ifndef DITFLEET_PROMPT_CACHE_H
#define DITFLEET_PROMPT_CACHE_H

#include "kernels/kernels.h"

// A prompt, encoded, on every rank.
struct prompt {
    struct tensor embeds; // (text_tokens, text_dim)
    struct tensor pooled; // (1, pooled_dim)
};

struct prompt_key {
    uint8_t sha256[32];
};

struct prompt_shape {
    int64_t tokens, text_dim, pooled_dim;
};

struct prompt_cache;

int prompt_cache_new(const struct kernels *k, struct device *d, struct prompt_cache **out, struct err *err);
void prompt_cache_free(struct prompt_cache *c);
// Bytes that it holds, and that it would hold after prompt_cache_reserve.
int64_t prompt_cache_bytes(const struct prompt_cache *c, const struct prompt_shape *shape);
// Makes every entry large enough for the shape; where that takes new memory, all are dropped. ERR_NO_MEMORY: nothing is
// kept any more.
int prompt_cache_reserve(struct prompt_cache *c, const struct prompt_shape *shape, struct err *err);

// True: *out is the prompt. It stays for this job, which claims no more than the entries that are left.
bool prompt_cache_find(struct prompt_cache *c, const struct prompt_key *key, const struct prompt_shape *shape,
                       struct prompt *out);
// *out: room for the prompt, in place of the one used longest ago. Not found before prompt_cache_keep.
void prompt_cache_claim(struct prompt_cache *c, const struct prompt_key *key, const struct prompt_shape *shape,
                        struct prompt *out);
// What was claimed has been encoded.
void prompt_cache_keep(struct prompt_cache *c);
// What was claimed and not kept is not to be.
void prompt_cache_drop(struct prompt_cache *c);

#endif
