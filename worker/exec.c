#include "worker/exec.h"

#include <stdint.h>
#include <string.h>

static int64_t row_bytes(struct tensor t)
{
    int64_t n = 1;
    for (int i = 1; i < t.dims; i++)
        n *= t.n[i];
    return n * (int64_t)dtype_size(t.dtype);
}

void exec_gather(struct exec *x, struct tensor whole, struct tensor mine, const struct spread *rows)
{
    if (rows->ranks == 1) {
        if (mine.data != whole.data)
            x->k->copy(x->d, whole, mine);
        return;
    }
    int64_t counts[COMM_MAX_RANKS];
    for (int r = 0; r < rows->ranks; r++)
        counts[r] = spread_of(rows, r).count * row_bytes(whole);
    comm_all_gather(x->comm, mine.data, whole.data, counts);
}

void exec_tell_address(struct exec *x, struct comm *c, const void *mine, const void *all[COMM_MAX_RANKS])
{
    uint64_t own = (uint64_t)(uintptr_t)mine, told[COMM_MAX_RANKS] = {0};
    int64_t counts[COMM_MAX_RANKS];
    if (!comm_memory_is_open(c))
        return;
    for (int r = 0; r < comm_size(c); r++)
        counts[r] = sizeof own;
    const size_t mark = arena_mark(x->arena);
    const struct tensor there = arena_tensor(x->arena, DT_U8, 2, comm_size(c), sizeof own, 1, 1);
    const struct tensor here = tensor_rows(there, comm_rank(c), 1);
    x->k->upload(x->d, here, &own);
    comm_all_gather(c, here.data, there.data, counts);
    x->k->download(x->d, told, there);
    for (int r = 0; r < comm_size(c); r++)
        all[r] = (const void *)(uintptr_t)told[r];
    arena_release(x->arena, mark);
}

// Where the pieces for each rank, or from it, lie side by side in the room.
struct dealing {
    int64_t bytes[COMM_MAX_RANKS], at[COMM_MAX_RANKS], total;
};

static struct dealing deal(int ranks, int n, const struct link_piece *pieces)
{
    struct dealing d = {.total = 0};
    for (int i = 0; i < n; i++)
        d.bytes[pieces[i].rank] += (int64_t)tensor_bytes(pieces[i].t);
    for (int r = 0; r < ranks; d.total += d.bytes[r++])
        d.at[r] = d.total;
    return d;
}

static void move_pieces(struct exec *x, int n, const struct link_piece *pieces, char *room, const struct dealing *d,
                        bool in)
{
    int64_t at[COMM_MAX_RANKS];
    memcpy(at, d->at, sizeof at);
    for (int i = 0; i < n; i++) {
        const struct tensor t = pieces[i].t;
        const struct tensor there =
            tensor_of(room + at[pieces[i].rank], t.dtype, t.dims, t.n[0], t.n[1], t.n[2], t.n[3]);
        at[pieces[i].rank] += (int64_t)tensor_bytes(t);
        x->k->copy(x->d, in ? t : there, in ? there : t);
    }
}

void exec_exchange(struct exec *x, struct comm *c, int sends, const struct link_piece *send, int recvs,
                   const struct link_piece *recv)
{
    if (comm_on_device(c)) {
        comm_exchange(c, sends, send, recvs, recv);
        return;
    }
    const size_t mark = arena_mark(x->arena);
    const struct dealing out = deal(comm_size(c), sends, send), in = deal(comm_size(c), recvs, recv);
    char *from = arena_tensor(x->arena, DT_U8, 1, out.total, 1, 1, 1).data;
    char *to = arena_tensor(x->arena, DT_U8, 1, in.total, 1, 1, 1).data;
    move_pieces(x, sends, send, from, &out, false);
    comm_all_to_all(c, from, out.bytes, out.at, to, in.bytes, in.at);
    move_pieces(x, recvs, recv, to, &in, true);
    arena_release(x->arena, mark);
}

struct tensor exec_input(struct exec *x, int64_t rows, const struct linear *w)
{
    const enum dtype type = w->w[0].dtype;
    if (!dtype_quantised(type))
        return exec_tensor(x, 2, rows, w->k, 1, 1);
    struct tensor t = arena_tensor(x->arena, type, 2, rows, w->k, 1, 1);
    t.scale = arena_tensor(x->arena, DT_F32, 1, rows, 1, 1, 1).data;
    return t;
}

static int64_t overlap(struct span a, struct span b, int64_t *start)
{
    int64_t end = a.start + a.count < b.start + b.count ? a.start + a.count : b.start + b.count;
    *start = a.start > b.start ? a.start : b.start;
    return end > *start ? end - *start : 0;
}

struct tensor exec_conv_input(struct exec *x, int64_t h, int64_t w, int64_t c)
{
    return tensor_rows(exec_tensor(x, 3, h + 2 * EXEC_HALO, w, c, 1), EXEC_HALO, h);
}

// Fills the rows around in (count, w, c) from their owners, who may be any ranks when slices are thin or empty.
static void fetch_halo(struct exec *x, struct tensor in, const struct spread *rows)
{
    const struct span mine = spread_mine(rows);
    const int64_t bytes = row_bytes(in);
    char *padded = (char *)in.data - EXEC_HALO * bytes;
    int64_t out_bytes[COMM_MAX_RANKS], out_at[COMM_MAX_RANKS], in_bytes[COMM_MAX_RANKS], in_at[COMM_MAX_RANKS];

    for (int below = 0; below < 2; below++) {
        for (int r = 0; r < rows->ranks; r++) {
            const struct span theirs = spread_of(rows, r);
            const struct span want = {below ? mine.start + mine.count : mine.start - EXEC_HALO,
                                      mine.count ? EXEC_HALO : 0};
            const struct span wanted = {below ? theirs.start + theirs.count : theirs.start - EXEC_HALO,
                                        theirs.count ? EXEC_HALO : 0};
            int64_t at;
            in_bytes[r] = overlap(want, theirs, &at) * bytes;
            in_at[r] = in_bytes[r] ? (at - mine.start + EXEC_HALO) * bytes : 0;
            out_bytes[r] = overlap(wanted, mine, &at) * bytes;
            out_at[r] = out_bytes[r] ? (at - mine.start) * bytes : 0;
        }
        comm_all_to_all(x->comm, in.data, out_bytes, out_at, padded, in_bytes, in_at);
    }
}

void exec_conv(struct exec *x, struct tensor y, struct tensor in, const struct conv *conv, const struct spread *rows)
{
    if (conv->w.n[1] == 1) {
        x->k->conv2d(x->d, y, in, conv);
        return;
    }
    const struct span mine = spread_mine(rows);
    struct tensor padded = in;
    padded.data = (char *)in.data - EXEC_HALO * row_bytes(in);
    padded.n[0] = mine.count ? mine.count + 2 * EXEC_HALO : 0;
    if (mine.count && mine.start == 0)
        x->k->zero(x->d, tensor_rows(padded, 0, EXEC_HALO));
    if (mine.count && mine.start + mine.count == spread_total(rows))
        x->k->zero(x->d, tensor_rows(padded, EXEC_HALO + mine.count, EXEC_HALO));
    if (rows->ranks > 1)
        fetch_halo(x, in, rows);
    if (mine.count)
        x->k->conv2d(x->d, y, padded, conv);
}

void exec_group_norm(struct exec *x, struct tensor y, struct tensor in, struct tensor gamma, struct tensor beta,
                     int64_t groups, float eps, enum act act, const struct spread *rows)
{
    const size_t mark = arena_mark(x->arena);
    struct tensor sums = arena_tensor(x->arena, DT_F64, 3, spread_total(rows), groups, 2, 1);
    struct tensor mine = arena_tensor(x->arena, DT_F64, 3, in.n[0], groups, 2, 1);
    x->k->group_sums(x->d, mine, in);
    exec_gather(x, sums, mine, rows);
    x->k->group_norm(x->d, y, in, sums, gamma, beta, eps, act);
    arena_release(x->arena, mark);
}

int exec_check(struct exec *x, struct err *err)
{
    TRY(arena_check(x->arena, err));
    TRY(x->k->sync(x->d, err));
    return comm_check(x->comm, err);
}

int exec_pace(struct exec *x, struct err *err)
{
    TRY(arena_check(x->arena, err));
    TRY(x->k->pace(x->d, err));
    return comm_check(x->comm, err);
}
