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

// To every rank my rows of its heads; from every rank its rows of mine. Keys and values are put in the order of the
// whole sequence, all text before all image, whatever the number of ranks: so a query's sums are added in the same
// order, and its result has the same bits, on one rank and on many. Queries stay in the order in which their results go
// back.
static void share_heads(const struct party *p, int me, const struct tensor mine[3], const struct tensor whole[3],
                        struct parcel *parcel)
{
    const int64_t width = whole[0].n[1], text = p->text ? p->text[me] : 0;
    int64_t at = 0, text_at = 0, image_at = p->text ? sum_rows(p->text, p->ranks) : 0;
    parcel->outs = parcel->ins = 0;
    for (int r = 0; r < p->ranks; at += p->rows[r++]) {
        const int64_t rows = p->rows[r], theirs = p->text ? p->text[r] : 0;
        put(parcel->out, &parcel->outs, r, tensor_cols(mine[0], r * width, width));
        put(parcel->in, &parcel->ins, r, tensor_rows(whole[0], at, rows));
        for (int i = 1; i < 3; i++) {
            const struct tensor t = tensor_cols(mine[i], r * width, width);
            put(parcel->out, &parcel->outs, r, tensor_rows(t, 0, text));
            put(parcel->out, &parcel->outs, r, tensor_rows(t, text, t.n[0] - text));
            put(parcel->in, &parcel->ins, r, tensor_rows(whole[i], text_at, theirs));
            put(parcel->in, &parcel->ins, r, tensor_rows(whole[i], image_at, rows - theirs));
        }
        text_at += theirs;
        image_at += rows - theirs;
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

// q, k and v travel together: one exchange there, one back.
static void ulysses(const struct attention_link *self, struct exec *x, const struct attention_call *call)
{
    const struct ulysses_groups *g = self->state;
    const int ranks = comm_size(g->inside), first = comm_rank(g->across) * ranks;
    const struct party party = {g->inside, ranks, call->rows + first, call->text ? call->text + first : NULL};
    const int64_t rows = call->q.n[0], dim = call->q.n[2], all = call->q.n[1] * dim, heads = call->q.n[1] / ranks;
    const int64_t total = sum_rows(party.rows, ranks);
    const size_t mark = arena_mark(x->arena);
    const struct tensor mine[3] = {tensor_reshape(call->q, 2, rows, all, 1, 1),
                                   tensor_reshape(call->k, 2, rows, all, 1, 1),
                                   tensor_reshape(call->v, 2, rows, all, 1, 1)};
    struct tensor flat[4], whole[4]; // q, k, v and the result, of my heads
    struct parcel parcel;
    for (int i = 0; i < 4; i++) {
        whole[i] = arena_tensor(x->arena, call->q.dtype, 3, total, heads, dim, 1);
        flat[i] = tensor_reshape(whole[i], 2, total, heads * dim, 1, 1);
    }
    share_heads(&party, comm_rank(g->inside), mine, flat, &parcel);
    exec_exchange(x, g->inside, parcel.outs, parcel.out, parcel.ins, parcel.in);
    attend_across(self, x, call, whole, whole[3]);
    share_rows(&party, flat[3], tensor_reshape(call->out, 2, rows, all, 1, 1), &parcel);
    exec_exchange(x, g->inside, parcel.outs, parcel.out, parcel.ins, parcel.in);
    arena_release(x->arena, mark);
}

const struct attention_link attention_ulysses = {.attend = ulysses, .next = &attention_local};
