// Ring attention (Liu et al. 2023): queries stay, keys and values go round the ranks, and each rank merges what its
// queries made of every slice.
//
// The slices lie in x->comm's order; a rank sees its own first, then those of the ranks before it. Parts are kept under
// the rank they came from and merged in that order, so a query's result depends on how the keys were cut, and not on
// which rank has the query. Slices may be uneven and empty: all sizes follow from call->rows, which every rank knows.
//
// Where ranks reach each other's memory nothing goes round: each fetches the slices, in the same order, from the ranks
// whose they are, beside the attention to the one before. A rank's slice stays until the next layer but one, whose
// keys and values take its place: by then all have met for the next.
#include "worker/exec.h"

// Keys and values of one rank, keys first.
struct slice {
    struct tensor room; // (2 * rows of the largest slice, heads * dim)
    struct tensor k, v; // (rows, heads, dim) within
};

static void slice_use(struct slice *s, int64_t rows, int64_t heads, int64_t dim)
{
    s->k = tensor_reshape(tensor_rows(s->room, 0, rows), 3, rows, heads, dim, 1);
    s->v = tensor_reshape(tensor_rows(s->room, rows, rows), 3, rows, heads, dim, 1);
}

static int64_t slice_bytes(const struct slice *s)
{
    return (int64_t)(tensor_bytes(s->k) + tensor_bytes(s->v));
}

static void attend_part(struct exec *x, const struct attention_call *call, struct tensor parts, struct tensor lse,
                        int owner, const struct slice *s)
{
    const struct tensor q = call->q, part = tensor_rows(parts, owner, 1), sums = tensor_rows(lse, owner, 1);
    x->k->attention_part(x->d, tensor_reshape(part, 3, q.n[0], q.n[1], q.n[2], 1),
                         tensor_reshape(sums, 2, q.n[0], q.n[1], 1, 1), q, s->k, s->v, &call->opts);
}

// Sets out to bring the slice of a rank, which the one before has in hand. mine: this rank's, in its room.
static void bring(const struct ring *ring, struct exec *x, int owner, const struct slice *mine,
                  const struct slice *here, const struct slice *coming)
{
    struct comm_lot lots[COMM_MAX_RANKS] = {{0}};
    if (!ring->room.direct) {
        comm_shift(x->comm, here->room.data, slice_bytes(here), coming->room.data, slice_bytes(coming));
        return;
    }
    const int64_t bytes = slice_bytes(coming), at = ring->layer % 2 * bytes; // its half of a room is as large as it
    lots[owner] = (struct comm_lot){(const char *)ring->room.theirs[owner] + at, coming->room.data, bytes};
    comm_fetch(x->comm, lots, slice_bytes(mine), true);
}

// parts (ranks, rows, heads, dim) and lse (ranks, rows, heads) of every slice
static void go_round(const struct ring *ring, struct exec *x, const struct attention_call *call,
                     const struct slice *mine, struct slice coming[2], struct tensor parts, struct tensor lse)
{
    const int ranks = comm_size(x->comm), me = comm_rank(x->comm);
    const struct slice *here = mine;
    for (int hop = 0; hop < ranks; hop++) {
        const int owner = (me - hop + ranks) % ranks, next = (owner + ranks - 1) % ranks;
        struct slice *to = &coming[hop % 2];
        slice_use(to, call->rows[next], call->k.n[1], call->k.n[2]);
        if (hop + 1 < ranks)
            bring(ring, x, next, mine, here, to);
        attend_part(x, call, parts, lse, owner, here);
        if (hop + 1 < ranks && ring->room.direct)
            comm_fetched(x->comm, true);
        here = to;
    }
}

// A layer's keys and values lie where those of the one before do not. Where another follows than the next one, what it
// is to take the place of may still be fetched.
static struct tensor place_of(struct ring *ring, struct exec *x, int layer, int64_t rows, int64_t width)
{
    const int64_t bytes = tensor_count(ring->room.bytes) / 2;
    if (ring->room.direct && layer != ring->layer + 1)
        comm_meet(x->comm, false);
    ring->layer = layer;
    return tensor_2d((char *)ring->room.bytes.data + layer % 2 * bytes, x->k->activation, rows, width);
}

static void attend(const struct attention_link *self, struct exec *x, const struct attention_call *call)
{
    struct ring *ring = self->state;
    const int ranks = comm_size(x->comm), me = comm_rank(x->comm);
    const int64_t rows = call->q.n[0], heads = call->q.n[1], dim = call->q.n[2];
    const size_t mark = arena_mark(x->arena);
    int64_t largest = 0;
    for (int r = 0; r < ranks; r++)
        largest = call->rows[r] > largest ? call->rows[r] : largest;
    struct slice mine = {.room = place_of(ring, x, call->layer, 2 * call->rows[me], heads * dim)}, coming[2];
    for (int i = 0; i < 2; i++)
        coming[i].room = exec_tensor(x, 2, 2 * largest, heads * dim, 1, 1);
    struct tensor parts = exec_tensor(x, 4, ranks, rows, heads, dim);
    struct tensor lse = arena_tensor(x->arena, DT_F32, 3, ranks, rows, heads, 1);
    slice_use(&mine, call->rows[me], heads, dim);
    x->k->copy(x->d, mine.k, call->k);
    x->k->copy(x->d, mine.v, call->v);
    if (ring->room.direct)
        comm_meet(x->comm, false);
    go_round(ring, x, call, &mine, coming, parts, lse);
    x->k->attention_merge(x->d, call->out, parts, lse);
    arena_release(x->arena, mark);
}

const struct attention_link attention_ring = {.attend = attend};
