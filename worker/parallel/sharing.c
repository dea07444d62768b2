// sharing.c: ranks that share heads bring the rows of an attention's input together (struct input_sharing).
//
// A rank's own rows lie in their place among all rows, where the others fetch them. They are written again only after
// the attention's results have gone back to the ranks that have the rows: by then all have projected what they fetched.
#include "worker/parallel/sharing.h"

enum { ALIGNED = 256 };

static int64_t aligned(int64_t bytes)
{
    return (bytes + ALIGNED - 1) / ALIGNED * ALIGNED;
}

int64_t sharing_bytes(int64_t rows, int64_t k, enum dtype activation)
{
    return aligned(rows * k * (int64_t)dtype_size(activation)) + aligned(rows * (int64_t)sizeof(float));
}

void sharing_make_room(struct shared_room *room, struct exec *x, struct comm *c, int64_t bytes)
{
    room->bytes = arena_tensor(x->arena, DT_U8, 1, bytes, 1, 1, 1);
    room->direct = comm_memory_is_open(c);
    exec_tell_address(x, c, room->bytes.data, room->theirs);
}

struct tensor exec_attention_output(struct exec *x, int64_t rows, int64_t columns)
{
    return x->results ? tensor_2d(x->results->bytes.data, x->k->activation, rows, columns)
                      : exec_tensor(x, 2, rows, columns, 1, 1);
}

struct attention_input exec_attention_input(struct exec *x, const struct linear *w, int64_t heads, int64_t rows,
                                            const int64_t *of_rank)
{
    const struct input_sharing *s = x->sharing;
    const enum dtype type = w->w[0].dtype;
    struct attention_input in = {.heads = heads, .of_rank = of_rank};
    if (!s) {
        in.mine = in.rows = exec_input(x, rows, w);
        return in;
    }
    int64_t total = 0;
    for (int r = 0; r < comm_size(s->comm); r++) {
        in.first_row += r < comm_rank(s->comm) ? of_rank[s->first + r] : 0;
        total += of_rank[s->first + r];
    }
    in.rows = tensor_2d(s->room.bytes.data, dtype_quantised(type) ? type : x->k->activation, total, w->k);
    if (dtype_quantised(type))
        in.rows.scale = (float *)((char *)s->room.bytes.data + aligned(total * w->k));
    in.mine = tensor_rows(in.rows, in.first_row, rows);
    in.heads /= comm_size(s->comm);
    in.first_head = comm_rank(s->comm) * in.heads;
    return in;
}

// The rows of each rank, in this rank's room and in theirs: of what lies there at `at`, row_bytes a row.
static void fetch(const struct input_sharing *s, const struct attention_input *in, const void *at, int64_t row_bytes)
{
    struct comm_lot lots[COMM_MAX_RANKS];
    int64_t offset = (const char *)at - (const char *)s->room.bytes.data;
    for (int r = 0; r < comm_size(s->comm); r++) {
        const int64_t bytes = in->of_rank[s->first + r] * row_bytes;
        lots[r] =
            (struct comm_lot){(const char *)s->room.theirs[r] + offset, (char *)s->room.bytes.data + offset, bytes};
        offset += bytes;
    }
    comm_fetch(s->comm, lots, in->mine.n[0] * row_bytes * (comm_size(s->comm) - 1), true);
}

// Through the communicator: t (rows of all, ...) gets the others' rows.
static void put_all(const struct input_sharing *s, const struct attention_input *in, struct tensor t,
                    struct link_piece *out, struct link_piece *to, int *outs, int *tos)
{
    const int me = comm_rank(s->comm);
    int64_t at[COMM_MAX_RANKS + 1] = {0};
    for (int r = 0; r < comm_size(s->comm); r++)
        at[r + 1] = at[r] + in->of_rank[s->first + r];
    for (int r = 0; r < comm_size(s->comm); r++) {
        if (r == me)
            continue;
        if (at[me + 1] > at[me])
            out[(*outs)++] = (struct link_piece){r, tensor_rows(t, at[me], at[me + 1] - at[me])};
        if (at[r + 1] > at[r])
            to[(*tos)++] = (struct link_piece){r, tensor_rows(t, at[r], at[r + 1] - at[r])};
    }
}

static void exchange(const struct input_sharing *s, struct exec *x, const struct attention_input *in)
{
    struct link_piece out[2 * COMM_MAX_RANKS], to[2 * COMM_MAX_RANKS];
    int outs = 0, tos = 0;
    struct tensor codes = in->rows;
    codes.scale = NULL;
    put_all(s, in, codes, out, to, &outs, &tos);
    if (in->rows.scale)
        put_all(s, in, tensor_2d(in->rows.scale, DT_F32, in->rows.n[0], 1), out, to, &outs, &tos);
    exec_exchange(x, s->comm, outs, out, tos, to);
}

void exec_share_input(struct exec *x, const struct attention_input *in)
{
    const struct input_sharing *s = x->sharing;
    if (!s)
        return;
    if (!s->room.direct) {
        exchange(s, x, in);
        return;
    }
    comm_meet(s->comm, true);
    fetch(s, in, in->rows.data, in->rows.n[1] * (int64_t)dtype_size(in->rows.dtype));
    if (in->rows.scale)
        fetch(s, in, in->rows.scale, sizeof(float));
}

void exec_input_shared(struct exec *x)
{
    if (x->sharing && x->sharing->room.direct)
        comm_fetched(x->sharing->comm, true);
}
