// Ring attention (Liu et al. 2023): queries stay, keys and values go round the ranks, and each rank merges what its
// queries made of every slice.
//
// The slices lie in x->comm's order; a rank sees its own first, then those of the ranks before it. Parts are kept under
// the rank they came from and merged in that order, so a query's result depends on how the keys were cut, and not on
// which rank has the query. Slices may be uneven and empty: all sizes follow from call->rows, which every rank knows.
#include "worker/exec.h"

// Keys and values of one rank, keys first: what a hop moves.
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

// parts (ranks, rows, heads, dim) and lse (ranks, rows, heads) of every slice; mine is in here
static void go_round(struct exec *x, const struct attention_call *call, struct slice *here, struct slice *coming,
                     struct tensor parts, struct tensor lse)
{
    const int ranks = comm_size(x->comm), me = comm_rank(x->comm);
    for (int hop = 0; hop < ranks; hop++) {
        const int owner = (me - hop + ranks) % ranks, next = (owner + ranks - 1) % ranks;
        slice_use(coming, call->rows[next], call->k.n[1], call->k.n[2]);
        // Before the slice is computed with: a communicator that works beside the device overlaps the two.
        if (hop + 1 < ranks)
            comm_shift(x->comm, here->room.data, slice_bytes(here), coming->room.data, slice_bytes(coming));
        attend_part(x, call, parts, lse, owner, here);
        const struct slice done = *here;
        *here = *coming;
        *coming = done;
    }
}

static void ring(const struct attention_link *self, struct exec *x, const struct attention_call *call)
{
    (void)self;
    const int ranks = comm_size(x->comm);
    const int64_t mine = call->q.n[0], heads = call->q.n[1], dim = call->q.n[2];
    const size_t mark = arena_mark(x->arena);
    int64_t largest = 0;
    for (int r = 0; r < ranks; r++)
        largest = call->rows[r] > largest ? call->rows[r] : largest;
    struct slice here = {.room = exec_tensor(x, 2, 2 * largest, heads * dim, 1, 1)};
    struct slice coming = {.room = exec_tensor(x, 2, 2 * largest, heads * dim, 1, 1)};
    struct tensor parts = exec_tensor(x, 4, ranks, mine, heads, dim);
    struct tensor lse = arena_tensor(x->arena, DT_F32, 3, ranks, mine, heads, 1);
    slice_use(&here, mine, heads, dim);
    x->k->copy(x->d, here.k, call->k);
    x->k->copy(x->d, here.v, call->v);
    go_round(x, call, &here, &coming, parts, lse);
    x->k->attention_merge(x->d, call->out, parts, lse);
    arena_release(x->arena, mark);
}

const struct attention_link attention_ring = {.attend = ring};
