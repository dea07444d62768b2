#include "worker/prompt_cache.h"

#include <stdlib.h>
#include <string.h>

enum { ENTRIES = 8, ALIGNMENT = 256 };

enum state { EMPTY, CLAIMED, KEPT };

struct entry {
    enum state state;
    struct prompt_key key;
    uint64_t used;
};

struct prompt_cache {
    const struct kernels *k;
    struct device *d;
    char *block;   // ENTRIES pieces
    int64_t piece; // bytes of an entry: embeds, then pooled, each aligned
    uint64_t clock;
    struct entry entries[ENTRIES];
};

int prompt_cache_new(const struct kernels *k, struct device *d, struct prompt_cache **out, struct err *err)
{
    *out = calloc(1, sizeof **out);
    if (!*out)
        return err_set(err, ERR_NO_MEMORY, "no memory for a prompt cache");
    (*out)->k = k;
    (*out)->d = d;
    return 0;
}

static void release(struct prompt_cache *c)
{
    if (c->block)
        c->k->free(c->d, c->block);
    c->block = NULL;
    c->piece = 0;
    memset(c->entries, 0, sizeof c->entries);
}

void prompt_cache_free(struct prompt_cache *c)
{
    if (!c)
        return;
    release(c);
    free(c);
}

static int64_t aligned(int64_t count, const struct prompt_cache *c)
{
    const int64_t bytes = count * (int64_t)dtype_size(c->k->activation);
    return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

static int64_t piece_of(const struct prompt_cache *c, const struct prompt_shape *s)
{
    return aligned(s->tokens * s->text_dim, c) + aligned(s->pooled_dim, c);
}

int64_t prompt_cache_bytes(const struct prompt_cache *c, const struct prompt_shape *shape)
{
    const int64_t piece = piece_of(c, shape);
    return ENTRIES * (piece > c->piece ? piece : c->piece);
}

int prompt_cache_reserve(struct prompt_cache *c, const struct prompt_shape *shape, struct err *err)
{
    const int64_t piece = piece_of(c, shape);
    void *block = NULL;
    if (piece <= c->piece)
        return 0;
    release(c);
    TRY(c->k->alloc(c->d, (size_t)(ENTRIES * piece), &block, err));
    c->block = block;
    c->piece = piece;
    return 0;
}

static struct prompt view(const struct prompt_cache *c, const struct entry *e, const struct prompt_shape *s)
{
    char *at = c->block + (e - c->entries) * c->piece;
    const enum dtype type = c->k->activation;
    return (struct prompt){.embeds = tensor_2d(at, type, s->tokens, s->text_dim),
                           .pooled = tensor_2d(at + aligned(s->tokens * s->text_dim, c), type, 1, s->pooled_dim)};
}

bool prompt_cache_find(struct prompt_cache *c, const struct prompt_key *key, const struct prompt_shape *shape,
                       struct prompt *out)
{
    for (struct entry *e = c->entries; e < c->entries + ENTRIES; e++)
        if (e->state == KEPT && memcmp(&e->key, key, sizeof *key) == 0) {
            e->used = ++c->clock;
            *out = view(c, e, shape);
            return true;
        }
    return false;
}

void prompt_cache_claim(struct prompt_cache *c, const struct prompt_key *key, const struct prompt_shape *shape,
                        struct prompt *out)
{
    struct entry *oldest = c->entries;
    for (struct entry *e = c->entries + 1; e < c->entries + ENTRIES; e++)
        if (e->used < oldest->used)
            oldest = e;
    *oldest = (struct entry){.state = CLAIMED, .key = *key, .used = ++c->clock};
    *out = view(c, oldest, shape);
}

static void settle(struct prompt_cache *c, enum state state)
{
    for (struct entry *e = c->entries; e < c->entries + ENTRIES; e++)
        if (e->state == CLAIMED)
            e->state = state;
}

void prompt_cache_keep(struct prompt_cache *c)
{
    settle(c, KEPT);
}

void prompt_cache_drop(struct prompt_cache *c)
{
    settle(c, EMPTY);
}
