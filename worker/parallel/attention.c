// The attention links that are exact whatever the number of ranks: local, gathered, Ulysses.
#include "worker/exec.h"

static void local(const struct attention_link *self, struct exec *x, const struct attention_call *call)
{
    (void)self;
    x->k->attention(x->d, call->out, call->q, call->k, call->v, &call->opts);
}

const struct attention_link attention_local = {.attend = local};

static int64_t sum_rows(const int64_t *rows, int ranks)
{
    int64_t total = 0;
    for (int r = 0; r < ranks; r++)
        total += rows[r];
    return total;
}

// t (rows here, heads, dim) -> contiguous (rows of all ranks, heads, dim)
static struct tensor gather_rows(struct exec *x, struct tensor t, const int64_t *rows)
{
    int64_t counts[COMM_MAX_RANKS], row_bytes = t.n[1] * t.n[2] * (int64_t)dtype_size(t.dtype);
    for (int r = 0; r < comm_size(x->comm); r++)
        counts[r] = rows[r] * row_bytes;
    struct tensor whole = arena_tensor(x->arena, t.dtype, 3, sum_rows(rows, comm_size(x->comm)), t.n[1], t.n[2], 1);
    struct tensor mine = arena_tensor(x->arena, t.dtype, 3, t.n[0], t.n[1], t.n[2], 1);
    x->k->copy(x->d, mine, t);
    comm_all_gather(x->comm, mine.data, whole.data, counts);
    return whole;
}

static void gathered(const struct attention_link *self, struct exec *x, const struct attention_call *call)
{
    (void)self;
    size_t mark = arena_mark(x->arena);
    struct attention_call whole = *call;
    if (comm_size(x->comm) > 1) {
        whole.k = gather_rows(x, call->k, call->rows);
        whole.v = gather_rows(x, call->v, call->rows);
    }
    local(NULL, x, &whole);
    arena_release(x->arena, mark);
}

const struct attention_link attention_gathered = {.attend = gathered};

// The ranks that exchange heads, and the rows of each.
struct party {
    struct comm *comm;
    int ranks;
    const int64_t *rows, *text; // (ranks), as in the call; text may be NULL
};

// One all-to-all of the Ulysses exchange: to rank r go `send_rows` rows of its heads, from it come recv_rows[r] of
// mine. All pieces lie one after the other.
static void exchange(const struct party *p, struct tensor send, const int64_t *send_rows, struct tensor recv,
                     const int64_t *recv_rows, int64_t times)
{
    int64_t out_bytes[COMM_MAX_RANKS], out_at[COMM_MAX_RANKS], in_bytes[COMM_MAX_RANKS], in_at[COMM_MAX_RANKS];
    const int64_t row_bytes = send.n[1] * (int64_t)dtype_size(send.dtype) * times;
    int64_t out = 0, in = 0;
    for (int r = 0; r < p->ranks; r++) {
        out_bytes[r] = send_rows[r] * row_bytes, out_at[r] = out, out += out_bytes[r];
        in_bytes[r] = recv_rows[r] * row_bytes, in_at[r] = in, in += in_bytes[r];
    }
    comm_all_to_all(p->comm, send.data, out_bytes, out_at, recv.data, in_bytes, in_at);
}

// recv holds (rank, q k v, its rows); pulls part i out of it. Keys and values are put in the order of the whole
// sequence, all text before all image, whatever the number of ranks: so a query's sums are added in the same order, and
// its result has the same bits, on one rank and on many.
static void unpack(struct exec *x, const struct party *p, struct tensor recv, int i, struct tensor whole)
{
    int64_t at = 0, text_at = 0, image_at = p->text ? sum_rows(p->text, p->ranks) : 0;
    for (int r = 0; r < p->ranks; at += p->rows[r++]) {
        const int64_t rows = p->rows[r], text = p->text ? p->text[r] : 0;
        struct tensor from = tensor_rows(recv, 3 * at + i * rows, rows);
        if (i == 0) { // queries stay in the order in which their results go back
            x->k->copy(x->d, tensor_rows(whole, at, rows), from);
            continue;
        }
        x->k->copy(x->d, tensor_rows(whole, text_at, text), tensor_rows(from, 0, text));
        x->k->copy(x->d, tensor_rows(whole, image_at, rows - text), tensor_rows(from, text, rows - text));
        text_at += text;
        image_at += rows - text;
    }
}

// The next link sees each party as one rank, which holds the rows of all its members.
static void attend_across(const struct attention_link *self, struct exec *x, const struct attention_call *call,
                          const struct tensor whole[3], struct tensor out)
{
    const struct ulysses_groups *g = self->state;
    const int members = comm_size(g->inside);
    int64_t rows[COMM_MAX_RANKS], text[COMM_MAX_RANKS];
    for (int i = 0; i < comm_size(g->across); i++) {
        rows[i] = sum_rows(call->rows + i * members, members);
        text[i] = call->text ? sum_rows(call->text + i * members, members) : 0;
    }
    struct exec across = *x;
    across.comm = g->across;
    struct attention_call inner = *call;
    inner.q = whole[0], inner.k = whole[1], inner.v = whole[2], inner.out = out;
    inner.rows = rows;
    inner.text = call->text ? text : NULL;
    self->next->attend(self->next, &across, &inner);
}

// q, k and v travel together: one message a pair of ranks.
static void ulysses(const struct attention_link *self, struct exec *x, const struct attention_call *call)
{
    const struct ulysses_groups *g = self->state;
    const int ranks = comm_size(g->inside), first = comm_rank(g->across) * ranks;
    const struct party party = {g->inside, ranks, call->rows + first, call->text ? call->text + first : NULL};
    const int64_t mine = call->q.n[0], all_heads = call->q.n[1] * call->q.n[2], total = sum_rows(party.rows, ranks);
    const int64_t heads = call->q.n[1] / ranks, dim = call->q.n[2], width = heads * dim;
    const enum dtype type = call->q.dtype;
    const size_t mark = arena_mark(x->arena);
    int64_t my_rows[COMM_MAX_RANKS];
    for (int r = 0; r < ranks; r++)
        my_rows[r] = mine;

    struct tensor send = arena_tensor(x->arena, type, 2, 3 * mine * ranks, width, 1, 1);
    struct tensor recv = arena_tensor(x->arena, type, 2, 3 * total, width, 1, 1);
    const struct tensor parts[3] = {call->q, call->k, call->v};
    for (int r = 0; r < ranks; r++)
        for (int i = 0; i < 3; i++)
            x->k->copy(x->d, tensor_rows(send, (3 * r + i) * mine, mine),
                       tensor_cols(tensor_reshape(parts[i], 2, mine, all_heads, 1, 1), r * width, width));
    exchange(&party, send, my_rows, recv, party.rows, 3);

    struct tensor whole[3], out = arena_tensor(x->arena, type, 3, total, heads, dim, 1);
    for (int i = 0; i < 3; i++) {
        struct tensor t = arena_tensor(x->arena, type, 2, total, width, 1, 1);
        unpack(x, &party, recv, i, t);
        whole[i] = tensor_reshape(t, 3, total, heads, dim, 1);
    }
    attend_across(self, x, call, whole, out);

    exchange(&party, tensor_reshape(out, 2, total, width, 1, 1), party.rows, send, my_rows, 1);
    for (int r = 0; r < ranks; r++)
        x->k->copy(x->d, tensor_cols(tensor_reshape(call->out, 2, mine, all_heads, 1, 1), r * width, width),
                   tensor_rows(send, r * mine, mine));
    arena_release(x->arena, mark);
}

const struct attention_link attention_ulysses = {.attend = ulysses, .next = &attention_local};
