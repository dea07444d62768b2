// The attention links that are exact whatever the number of ranks: local, gathered, Ulysses.
#include "worker/exec.h"

static void local(const struct attention_link *self, struct exec *x, const struct attention_call *call)
{
    (void)self;
    x->k->attention(x->d, call->out, call->q, call->k, call->v, &call->opts);
}

const struct attention_link attention_local = {.attend = local};

static int64_t sum_rows(const struct exec *x, const int64_t *rows)
{
    int64_t total = 0;
    for (int r = 0; r < comm_size(x->comm); r++)
        total += rows[r];
    return total;
}

// t (rows here, heads, dim) -> contiguous (rows of all ranks, heads, dim)
static struct tensor gather_rows(struct exec *x, struct tensor t, const int64_t *rows)
{
    int64_t counts[COMM_MAX_RANKS], row_bytes = t.n[1] * t.n[2] * (int64_t)dtype_size(t.dtype);
    for (int r = 0; r < comm_size(x->comm); r++)
        counts[r] = rows[r] * row_bytes;
    struct tensor whole = arena_tensor(x->arena, t.dtype, 3, sum_rows(x, rows), t.n[1], t.n[2], 1);
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

// Byte counts and offsets of the all-to-all: to rank r go my rows of its heads; from rank r come its rows of my heads.
struct ulysses_plan {
    int64_t out_bytes[COMM_MAX_RANKS], out_at[COMM_MAX_RANKS];
    int64_t in_bytes[COMM_MAX_RANKS], in_at[COMM_MAX_RANKS];
};

static void plan_exchange(struct ulysses_plan *p, int ranks, int64_t my_rows, const int64_t *rows, int64_t row_bytes)
{
    for (int64_t r = 0, in = 0; r < ranks; r++) {
        p->out_bytes[r] = my_rows * row_bytes;
        p->out_at[r] = r * my_rows * row_bytes;
        p->in_bytes[r] = rows[r] * row_bytes;
        p->in_at[r] = in;
        in += p->in_bytes[r];
    }
}

// q, k and v travel together: one message a pair of ranks, (3, rows, heads / ranks, dim) each.
static void ulysses(const struct attention_link *self, struct exec *x, const struct attention_call *call)
{
    const int ranks = comm_size(x->comm);
    const int64_t mine = call->q.n[0], heads = call->q.n[1] / ranks, dim = call->q.n[2], width = heads * dim;
    const int64_t total = sum_rows(x, call->rows);
    const enum dtype type = call->q.dtype;
    const size_t mark = arena_mark(x->arena);
    struct ulysses_plan p;

    struct tensor send = arena_tensor(x->arena, type, 2, 3 * mine * ranks, width, 1, 1);
    struct tensor recv = arena_tensor(x->arena, type, 2, 3 * total, width, 1, 1);
    const struct tensor parts[3] = {call->q, call->k, call->v};
    for (int r = 0; r < ranks; r++)
        for (int i = 0; i < 3; i++) {
            struct tensor flat = tensor_reshape(parts[i], 2, mine, call->q.n[1] * dim, 1, 1);
            x->k->copy(x->d, tensor_rows(send, (3 * r + i) * mine, mine), tensor_cols(flat, r * width, width));
        }
    plan_exchange(&p, ranks, 3 * mine, call->rows, width * (int64_t)dtype_size(type));
    for (int64_t r = 0, at = 0; r < ranks; at += p.in_bytes[r++]) {
        p.in_bytes[r] *= 3;
        p.in_at[r] = at;
    }
    comm_all_to_all(x->comm, send.data, p.out_bytes, p.out_at, recv.data, p.in_bytes, p.in_at);

    // (rank, 3, rows) -> (3, rank, rows)
    struct tensor full[3], out = arena_tensor(x->arena, type, 3, total, heads, dim, 1);
    for (int i = 0; i < 3; i++) {
        full[i] = arena_tensor(x->arena, type, 3, total, heads, dim, 1);
        struct tensor flat = tensor_reshape(full[i], 2, total, width, 1, 1);
        for (int64_t r = 0, at = 0; r < ranks; at += call->rows[r++])
            x->k->copy(x->d, tensor_rows(flat, at, call->rows[r]),
                       tensor_rows(recv, 3 * at + i * call->rows[r], call->rows[r]));
    }
    struct attention_call inner = *call;
    inner.q = full[0], inner.k = full[1], inner.v = full[2], inner.out = out;
    self->next->attend(self->next, x, &inner);

    // back: to rank r go its rows of my heads
    plan_exchange(&p, ranks, mine, call->rows, width * (int64_t)dtype_size(type));
    comm_all_to_all(x->comm, out.data, p.in_bytes, p.in_at, send.data, p.out_bytes, p.out_at);
    struct tensor flat = tensor_reshape(call->out, 2, mine, call->q.n[1] * dim, 1, 1);
    for (int r = 0; r < ranks; r++)
        x->k->copy(x->d, tensor_cols(flat, r * width, width), tensor_rows(send, r * mine, mine));
    arena_release(x->arena, mark);
}

const struct attention_link attention_ulysses = {.attend = ulysses, .next = &attention_local};
