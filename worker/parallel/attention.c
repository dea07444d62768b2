// The attention links that are exact whatever the number of ranks: local, gathered, Ulysses, by heads.
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
    const int64_t *rows; // (ranks), as in the call
};

static struct party party_of(const struct ulysses_groups *g, const struct attention_call *call)
{
    const int ranks = comm_size(g->inside);
    return (struct party){g->inside, ranks, call->rows + comm_rank(g->across) * ranks};
}

// Pieces that go out, and pieces that come in.
struct parcel {
    struct link_piece out[COMM_MAX_PIECES], in[COMM_MAX_PIECES];
    int outs, ins;
};

static void put(struct link_piece *list, int *n, int rank, struct tensor t)
{
    if (t.n[0] > 0)
        list[(*n)++] = (struct link_piece){rank, t};
}

// To every rank my rows of its heads; from every rank its rows of mine. They come in the order of the whole sequence:
// so a query's sums are added in the same order, and its result has the same bits, on one rank and on many.
static void share_heads(const struct party *p, const struct tensor mine[3], const struct tensor whole[3],
                        struct parcel *parcel)
{
    const int64_t width = whole[0].n[1];
    int64_t at = 0;
    parcel->outs = parcel->ins = 0;
    for (int r = 0; r < p->ranks; at += p->rows[r++])
        for (int i = 0; i < 3; i++) {
            put(parcel->out, &parcel->outs, r, tensor_cols(mine[i], r * width, width));
            put(parcel->in, &parcel->ins, r, tensor_rows(whole[i], at, p->rows[r]));
        }
}

// Results of my heads to the ranks that have the rows; of my rows from the ranks that have the heads.
static void share_rows(const struct party *p, struct tensor heads, struct tensor mine, struct parcel *parcel)
{
    const int64_t width = heads.n[1];
    int64_t at = 0;
    parcel->outs = parcel->ins = 0;
    for (int r = 0; r < p->ranks; at += p->rows[r++]) {
        put(parcel->out, &parcel->outs, r, tensor_rows(heads, at, p->rows[r]));
        put(parcel->in, &parcel->ins, r, tensor_cols(mine, r * width, width));
    }
}

// The next link sees each party as one rank, which holds the rows of all its members.
static void attend_across(const struct attention_link *self, struct exec *x, const struct attention_call *call,
                          struct tensor out)
{
    const struct ulysses_groups *g = self->state;
    const int members = comm_size(g->inside);
    int64_t rows[COMM_MAX_RANKS];
    for (int i = 0; i < comm_size(g->across); i++)
        rows[i] = sum_rows(call->rows + i * members, members);
    struct exec across = *x;
    across.comm = g->across;
    struct attention_call inner = *call;
    inner.out = out;
    inner.rows = rows;
    self->next->attend(self->next, &across, &inner);
}

// Straight to where the ranks have their rows. False: that is not to be had, and nothing was done.
static bool attend_to_all(const struct attention_link *self, struct exec *x, const struct attention_call *call,
                          const struct party *p)
{
    const struct shared_room *results = &((const struct ulysses_groups *)self->state)->results;
    const int64_t heads = call->q.n[1], dim = call->q.n[2], size = (int64_t)dtype_size(call->out.dtype);
    const int64_t at = (char *)call->out.data - (char *)results->bytes.data + comm_rank(p->comm) * heads * dim * size;
    struct link_piece to[COMM_MAX_RANKS];
    int n = 0;
    if (!results->direct || x->results != results || self->next != &attention_local)
        return false;
    for (int r = 0; r < p->ranks; r++) {
        struct tensor t = call->out;
        t.data = (char *)results->theirs[r] + at;
        t.n[0] = p->rows[r];
        t.n[1] = heads;
        put(to, &n, r, t);
    }
    if (!comm_attention(p->comm, n, to, call->q, call->k, call->v, &call->opts))
        return false;
    comm_meet(p->comm, false);
    return true;
}

// q, k and v have all rows of the party and my heads; out has my rows and all heads.
static void by_heads(const struct attention_link *self, struct exec *x, const struct attention_call *call)
{
    const struct party party = party_of(self->state, call);
    const int64_t rows = call->q.n[0], heads = call->q.n[1], dim = call->q.n[2];
    if (attend_to_all(self, x, call, &party))
        return;
    const size_t mark = arena_mark(x->arena);
    struct tensor out = arena_tensor(x->arena, call->q.dtype, 3, rows, heads, dim, 1);
    struct tensor mine = tensor_reshape(call->out, 2, call->out.n[0], call->out.n[1] * dim, 1, 1);
    struct parcel parcel;
    attend_across(self, x, call, out);
    share_rows(&party, tensor_reshape(out, 2, rows, heads * dim, 1, 1), mine, &parcel);
    exec_exchange(x, party.comm, parcel.outs, parcel.out, parcel.ins, parcel.in);
    arena_release(x->arena, mark);
}

const struct attention_link attention_by_heads = {.attend = by_heads, .next = &attention_local};

// q, k and v travel together: one exchange there, one back.
static void ulysses(const struct attention_link *self, struct exec *x, const struct attention_call *call)
{
    const struct party party = party_of(self->state, call);
    const int64_t rows = call->q.n[0], dim = call->q.n[2], all = call->q.n[1] * dim, heads = call->q.n[1] / party.ranks;
    const int64_t total = sum_rows(party.rows, party.ranks);
    const size_t mark = arena_mark(x->arena);
    const struct tensor mine[3] = {tensor_reshape(call->q, 2, rows, all, 1, 1),
                                   tensor_reshape(call->k, 2, rows, all, 1, 1),
                                   tensor_reshape(call->v, 2, rows, all, 1, 1)};
    struct tensor flat[3], whole[3]; // q, k and v, of my heads
    struct parcel parcel;
    for (int i = 0; i < 3; i++) {
        whole[i] = arena_tensor(x->arena, call->q.dtype, 3, total, heads, dim, 1);
        flat[i] = tensor_reshape(whole[i], 2, total, heads * dim, 1, 1);
    }
    share_heads(&party, mine, flat, &parcel);
    exec_exchange(x, party.comm, parcel.outs, parcel.out, parcel.ins, parcel.in);
    struct attention_call inner = *call;
    inner.q = whole[0], inner.k = whole[1], inner.v = whole[2];
    by_heads(self, x, &inner);
    arena_release(x->arena, mark);
}

const struct attention_link attention_ulysses = {.attend = ulysses, .next = &attention_local};
