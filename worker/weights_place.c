// weights_place.c: where weights go: to the device of a model's home, all of them, or those that this rank has.
#include "worker/ownership.h"
#include "worker/weights_internal.h"

#include <stdlib.h>

void weights_displace(struct weights *w)
{
    for (size_t i = 0; i < w->n_placed; i++)
        w->home.k->displace(w->home.d, w->placed[i]);
    free(w->placed);
    if (w->pieces)
        w->home.k->free(w->home.d, w->pieces);
    if (w->buffers)
        w->home.k->free(w->home.d, w->buffers);
    for (int kind = 0; kind < WEIGHTS_KINDS; kind++)
        free(w->units[kind]);
    free(w->later);
}

void weights_offer_codes(struct weights *w, bool offered)
{
    w->codes = offered && dtype_quantised(w->home.codes);
}

// Makes room to remember one more placed tensor before it is placed.
static int make_room(struct weights *w, size_t more, struct err *err)
{
    if (w->n_placed + more <= w->room_placed)
        return 0;
    const size_t room = 2 * (w->n_placed + more);
    struct tensor *list = realloc(w->placed, room * sizeof *list);
    if (!list)
        return err_set(err, ERR_NO_MEMORY, "no memory for a list of %zu weights", room);
    w->placed = list;
    w->room_placed = room;
    return 0;
}

static void remember(struct weights *w, struct tensor t)
{
    if (!tensor_none(t))
        w->placed[w->n_placed++] = t;
}

static int place_tensor(struct weights *w, struct tensor *t, struct err *err)
{
    TRY(make_room(w, 1, err));
    TRY(w->home.k->place(w->home.d, *t, t, err));
    remember(w, *t);
    return 0;
}

static int place_linear(struct weights *w, struct linear *l, enum dtype type, struct err *err)
{
    TRY(make_room(w, 2 * LINEAR_MAX_PARTS + 1, err));
    TRY(w->home.k->place_linear(w->home.d, l, type, w->home.twice, err));
    if (l->second)
        remember(w, tensor_2d((char *)l->w[0].data + l->second, DT_U8, l->n, l->k));
    for (int i = 0; i < l->parts; i++) {
        remember(w, l->w[i]);
        remember(w, l->b[i]);
    }
    return 0;
}

static int place_fetched(struct weights *w, const struct fetched *f, struct err *err)
{
    return f->layer ? place_linear(w, f->linear, f->type, err) : place_tensor(w, f->tensor, err);
}

// The i-th tensor of what was fetched; NULL: there are no more. It may be none.
static struct tensor *tensor_at(const struct fetched *f, int i)
{
    if (!f->layer)
        return i == 0 ? f->tensor : NULL;
    if (i < f->linear->parts)
        return &f->linear->w[i];
    return i < 2 * f->linear->parts ? &f->linear->b[i - f->linear->parts] : NULL;
}

static int64_t grains(int64_t bytes)
{
    return (bytes + WEIGHTS_GRAIN - 1) / WEIGHTS_GRAIN * WEIGHTS_GRAIN;
}

// Bytes of a fetched tensor where it is to lie: as in its file, or as a device with memory of its own has it by the
// rules of kernels.h.
static int64_t stored_bytes(const struct weights *w, const struct fetched *f, const struct tensor *t)
{
    const bool device = w->home.k && (w->home.k->memory || w->home.plan);
    if (f->layer && t->dims == 2 && dtype_quantised(f->type))
        return grains(tensor_count(*t)) + grains(t->n[0] * (int64_t)sizeof *t->scale);
    if (device && (f->layer || t->dims > 1))
        return tensor_count(*t) * (int64_t)dtype_size(w->home.k->activation);
    return (int64_t)tensor_bytes(*t);
}

static void count(struct weights *w, const struct fetched *f)
{
    const struct tensor *t;
    for (int i = 0; w->n_units[f->kind] > f->index && (t = tensor_at(f, i)); i++) {
        const int64_t bytes = tensor_none(*t) ? 0 : stored_bytes(w, f, t);
        w->units[f->kind][f->index].bytes += f->kind == WEIGHTS_BLOCK ? grains(bytes) : bytes;
    }
}

int weights_place(struct weights *w, struct fetched f, struct err *err)
{
    f.kind = w->kind;
    f.index = w->index;
    if (w->home.k && f.layer)
        f.type = linear_placed(f.linear, w->codes ? w->home.codes : w->home.k->activation, w->home.k->activation);
    count(w, &f);
    if (!w->home.k)
        return 0;
    if (w->home.held.weights == PLAN_REPLICATED || w->kind == WEIGHTS_COMMON)
        return place_fetched(w, &f, err);
    if (w->n_later == w->room_later) {
        const size_t room = 2 * w->room_later + 64;
        struct fetched *list = realloc(w->later, room * sizeof *list);
        if (!list)
            return err_set(err, ERR_NO_MEMORY, "no memory for a list of %zu weights", room);
        w->later = list;
        w->room_later = room;
    }
    w->later[w->n_later++] = f;
    return 0;
}

int64_t weights_placed_bytes(const struct weights *w)
{
    enum { GRAIN = 512 }; // of a device's allocations
    int64_t sum = w->piece_bytes + w->buffer_bytes;
    for (size_t i = 0; i < w->n_placed; i++) {
        const struct tensor t = w->placed[i];
        const size_t scales = dtype_quantised(t.dtype) ? (size_t)t.n[0] * sizeof *t.scale : 0;
        sum += (int64_t)((tensor_bytes(t) + scales + GRAIN - 1) & ~(size_t)(GRAIN - 1));
    }
    return sum;
}

// ---- weights that not every rank has

int weights_divide(struct weights *w, int blocks, int once, struct err *err)
{
    const int n[WEIGHTS_KINDS] = {[WEIGHTS_COMMON] = 1, [WEIGHTS_BLOCK] = blocks, [WEIGHTS_ONCE] = once};
    for (int kind = 0; kind < WEIGHTS_KINDS; kind++) {
        w->units[kind] = calloc((size_t)n[kind] + 1, sizeof *w->units[kind]);
        if (!w->units[kind])
            return err_set(err, ERR_NO_MEMORY, "no memory for a list of %d weights", n[kind]);
        w->n_units[kind] = n[kind];
    }
    return 0;
}

void weights_belong(struct weights *w, enum weights_kind kind, int index)
{
    w->kind = kind;
    w->index = index;
}

int weights_count(const struct weights *w, enum weights_kind kind)
{
    return w->n_units[kind];
}

int64_t weights_unit_bytes(const struct weights *w, enum weights_kind kind, int index)
{
    return w->units[kind][index].bytes;
}

struct weights_sharded weights_sharded(const struct weights *w, int block)
{
    if (!w->buffers)
        return (struct weights_sharded){NULL, NULL};
    return (struct weights_sharded){(char *)w->pieces + w->units[WEIGHTS_BLOCK][block].at,
                                    (char *)w->buffers + (block % WEIGHTS_BUFFERS ? w->second_at : 0)};
}

// Shapes and types as the device would have it.
static void forgo(const struct weights *w, const struct fetched *f)
{
    struct linear one = {.parts = 1};
    if (!f->layer) {
        f->tensor->data = NULL;
        return;
    }
    one.n = f->linear->n;
    one.k = f->linear->k;
    one.w[0] = tensor_2d(NULL, f->type, one.n, one.k);
    if (!tensor_none(f->linear->b[0]))
        one.b[0] = tensor_1d(NULL, w->home.k->activation, one.n);
    *f->linear = one;
}

// A block as it is gathered: its tensors one after the other, the factors of 8 bits behind the numbers.
struct layout {
    char *piece; // not NULL: it gets some of the layout's bytes, mine
    struct span mine;
    char *buffer; // not NULL: its tensors are to point into it
    int64_t at;
};

static void copy_mine(const struct weights *w, const struct layout *l, const void *data, int64_t bytes)
{
    const int64_t end = l->mine.start + l->mine.count;
    const int64_t from = l->at > l->mine.start ? l->at : l->mine.start, to = l->at + bytes < end ? l->at + bytes : end;
    if (data && to > from) // a plan has no factors
        w->home.k->copy(w->home.d, tensor_2d(l->piece + (from - l->mine.start), DT_U8, 1, to - from),
                        tensor_2d((char *)data + (from - l->at), DT_U8, 1, to - from));
}

// Returns where the data will be found.
static void *lay(const struct weights *w, struct layout *l, void *data, int64_t bytes)
{
    if (l->piece)
        copy_mine(w, l, data, bytes);
    if (l->buffer)
        data = l->buffer + l->at;
    l->at += grains(bytes);
    return data;
}

// Returns the layout's bytes.
static int64_t lay_block(const struct weights *w, int block, struct layout l)
{
    struct tensor *t;
    for (size_t f = 0; f < w->n_later; f++)
        for (int i = 0;
             w->later[f].kind == WEIGHTS_BLOCK && w->later[f].index == block && (t = tensor_at(&w->later[f], i)); i++) {
            if (tensor_none(*t))
                continue;
            t->data = lay(w, &l, t->data, (int64_t)tensor_bytes(*t));
            if (dtype_quantised(t->dtype))
                t->scale = lay(w, &l, t->scale, t->n[0] * (int64_t)sizeof *t->scale);
        }
    return l.at;
}

// Places the block whole, keeps this rank's piece of it.
static int shard_block(struct weights *w, int block, struct err *err)
{
    const struct kernels *k = w->home.k;
    const struct unit *u = &w->units[WEIGHTS_BLOCK][block];
    const int64_t piece = ownership_piece(u->bytes, w->home.held.ranks);
    const size_t before = w->n_placed;
    for (size_t f = 0; f < w->n_later; f++)
        if (w->later[f].kind == WEIGHTS_BLOCK && w->later[f].index == block)
            TRY(place_fetched(w, &w->later[f], err));
    if (lay_block(w, block, (struct layout){.piece = NULL}) > u->bytes)
        return err_set(err, ERR_INTERNAL, "block %d is larger on the device than was reckoned", block);
    TRY(k->sync(w->home.d, err));
    lay_block(w, block, (struct layout){.piece = (char *)w->pieces + u->at, .mine = {piece * w->home.rank, piece}});
    TRY(k->sync(w->home.d, err));
    while (w->n_placed > before)
        k->displace(w->home.d, w->placed[--w->n_placed]);
    return 0;
}

static int check_room(const struct weights *w, struct err *err)
{
    const int64_t bytes = ownership_shard_bytes(w, &w->home.held);
    if (!w->home.room || bytes <= w->home.room)
        return 0;
    return err_set(err, ERR_NO_MEMORY,
                   "weights sharded among %d ranks take %.2f GiB of each one's memory, but %.2f GiB are free",
                   w->home.held.ranks, (double)bytes / (1 << 30), (double)w->home.room / (1 << 30));
}

// The buffers come last: until then there is room in their place for a block that is placed whole.
static int shard_blocks(struct weights *w, struct err *err)
{
    const int ranks = w->home.held.ranks, blocks = w->n_units[WEIGHTS_BLOCK];
    int64_t largest[WEIGHTS_BUFFERS] = {0};
    for (int i = 0; i < blocks; i++) {
        struct unit *u = &w->units[WEIGHTS_BLOCK][i];
        const int64_t piece = ownership_piece(u->bytes, ranks);
        int64_t *buffer = &largest[i % WEIGHTS_BUFFERS];
        u->at = w->piece_bytes;
        w->piece_bytes += piece;
        *buffer = piece * ranks > *buffer ? piece * ranks : *buffer;
    }
    w->second_at = largest[0];
    w->buffer_bytes = largest[0] + largest[1];
    TRY(check_room(w, err));
    TRY(w->home.k->alloc(w->home.d, (size_t)w->piece_bytes, &w->pieces, err));
    for (int i = 0; i < blocks; i++)
        TRY(shard_block(w, i, err));
    TRY(w->home.k->alloc(w->home.d, (size_t)w->buffer_bytes, &w->buffers, err));
    for (int i = 0; i < blocks; i++)
        lay_block(w, i, (struct layout){.buffer = weights_sharded(w, i).buffer});
    return 0;
}

int weights_settle(struct weights *w, struct err *err)
{
    struct ownership o;
    if (w->n_later == 0)
        return 0;
    ownership_make(w, &w->home.held, w->home.rank, &o);
    if (o.sharded)
        TRY(shard_blocks(w, err));
    for (size_t i = 0; i < w->n_later; i++) {
        const struct fetched *f = &w->later[i];
        const bool block = f->kind == WEIGHTS_BLOCK;
        if (block && o.sharded)
            continue;
        if (block ? f->index >= o.blocks.start && f->index < o.blocks.start + o.blocks.count
                  : ownership_computes(&o, f->index))
            TRY(place_fetched(w, f, err));
        else
            forgo(w, f);
    }
    w->n_later = 0;
    return 0;
}
