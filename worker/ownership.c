#include "worker/ownership.h"

#include "worker/weights.h"

int64_t ownership_piece(int64_t block_bytes, int ranks)
{
    const int64_t unit = (int64_t)WEIGHTS_GRAIN * ranks;
    return (block_bytes + unit - 1) / unit * WEIGHTS_GRAIN;
}

static struct span blocks_of(const struct weights *w, const struct plan *p, int rank)
{
    const int part = p->ranks / p->data;
    return plan_stage(p, weights_count(w, WEIGHTS_BLOCK), rank % part / (part / p->pipe));
}

static int64_t sum(const struct weights *w, enum weights_kind kind, struct span units)
{
    int64_t bytes = 0;
    for (int64_t i = units.start; i < units.start + units.count && i < weights_count(w, kind); i++)
        bytes += weights_unit_bytes(w, kind, (int)i);
    return bytes;
}

// ends[r]: bytes of modulations that ranks 0 to r are to have, so that all of them are filled to one level over the
// blocks they have.
static void fill_up(const struct weights *w, const struct plan *p, int64_t modulations, double ends[COMM_MAX_RANKS])
{
    double have[COMM_MAX_RANKS], level = 0, before = 0;
    for (int r = 0; r < p->ranks; r++)
        have[r] = p->weights == PLAN_BY_STAGE ? (double)sum(w, WEIGHTS_BLOCK, blocks_of(w, p, r)) : 0;
    for (int n = 0, last = p->ranks; n != last;) { // those that are above the level of the rest get nothing
        double bytes = (double)modulations;
        const double above = level;
        last = n;
        n = 0;
        for (int r = 0; r < p->ranks; r++)
            if (above == 0 || have[r] <= above) {
                bytes += have[r];
                n++;
            }
        level = bytes / n;
    }
    for (int r = 0; r < p->ranks; r++)
        ends[r] = before += have[r] < level ? level - have[r] : 0;
}

void ownership_make(const struct weights *w, const struct plan *p, int rank, struct ownership *out)
{
    const int n = weights_count(w, WEIGHTS_ONCE);
    double ends[COMM_MAX_RANKS], at = 0;
    *out = (struct ownership){.rank = rank, .ranks = p->ranks, .sharded = p->weights == PLAN_SHARDED, .coming = -1};
    if (!out->sharded)
        out->blocks = blocks_of(w, p, rank);
    fill_up(w, p, sum(w, WEIGHTS_ONCE, (struct span){0, n}), ends);
    for (int i = 0, r = 0; i < n; i++) { // whose the middle is has it
        const double bytes = (double)weights_unit_bytes(w, WEIGHTS_ONCE, i);
        while (r + 1 < p->ranks && at + bytes / 2 > ends[r])
            out->once[++r] = i;
        at += bytes;
        for (int next = r + 1; next <= p->ranks; next++)
            out->once[next] = i + 1;
    }
}

int64_t ownership_shard_bytes(const struct weights *w, const struct plan *p)
{
    int64_t bytes = 0, buffers[WEIGHTS_BUFFERS] = {0};
    for (int i = 0; p->weights == PLAN_SHARDED && i < weights_count(w, WEIGHTS_BLOCK); i++) {
        const int64_t piece = ownership_piece(weights_unit_bytes(w, WEIGHTS_BLOCK, i), p->ranks);
        int64_t *buffer = &buffers[i % WEIGHTS_BUFFERS];
        bytes += piece;
        *buffer = piece * p->ranks > *buffer ? piece * p->ranks : *buffer;
    }
    return bytes + buffers[0] + buffers[1];
}

int64_t ownership_bytes(const struct weights *w, const struct plan *p, int rank)
{
    const int blocks = weights_count(w, WEIGHTS_BLOCK), once = weights_count(w, WEIGHTS_ONCE);
    const int64_t common = sum(w, WEIGHTS_COMMON, (struct span){0, 1});
    struct ownership o;
    if (p->weights == PLAN_REPLICATED)
        return common + sum(w, WEIGHTS_BLOCK, (struct span){0, blocks}) + sum(w, WEIGHTS_ONCE, (struct span){0, once});
    ownership_make(w, p, rank, &o);
    return common + sum(w, WEIGHTS_BLOCK, o.blocks) + ownership_shard_bytes(w, p) +
           sum(w, WEIGHTS_ONCE, (struct span){o.once[rank], o.once[rank + 1] - o.once[rank]});
}

// ---- in a run

int ownership_show(struct ownership *o, struct exec *x, const struct weights *w, struct err *err)
{
    if (!o->sharded)
        return 0;
    TRY(comm_open_memory(o->comm, true, err));
    exec_tell_address(x, o->comm, weights_sharded(w, 0).piece, o->theirs);
    return 0;
}

int ownership_hide(struct ownership *o, struct err *err)
{
    return o->sharded ? comm_close_memory(o->comm, err) : 0;
}

bool ownership_computes(const struct ownership *o, int modulation)
{
    return !o || (modulation >= o->once[o->rank] && modulation < o->once[o->rank + 1]);
}

void ownership_share(struct exec *x, struct tensor whole, const int64_t *start)
{
    const struct ownership *o = x->ownership;
    struct link_piece mine[COMM_MAX_RANKS], theirs[COMM_MAX_RANKS];
    int sends = 0, recvs = 0;
    for (int r = 0; o && r < o->ranks; r++) {
        const int64_t columns = start[r + 1] - start[r], my_columns = start[o->rank + 1] - start[o->rank];
        if (r != o->rank && my_columns > 0)
            mine[sends++] = (struct link_piece){r, tensor_cols(whole, start[o->rank], my_columns)};
        if (r != o->rank && columns > 0)
            theirs[recvs++] = (struct link_piece){r, tensor_cols(whole, start[r], columns)};
    }
    if (o)
        exec_exchange(x, o->comm, sends, mine, recvs, theirs);
}

// Sets out to bring a block's bytes together in its buffer, after the block that last computed from it. Nothing else
// waits for them before need: the device may compute meanwhile.
static void gather(struct ownership *o, const struct weights *w, int block)
{
    int64_t counts[COMM_MAX_RANKS];
    const struct weights_sharded s = weights_sharded(w, block);
    const int64_t piece = ownership_piece(weights_unit_bytes(w, WEIGHTS_BLOCK, block), o->ranks);
    if (comm_memory_is_open(o->comm)) {
        struct comm_lot lots[COMM_MAX_RANKS];
        const int64_t offset = (char *)s.piece - (char *)weights_sharded(w, 0).piece;
        for (int r = 0; r < o->ranks; r++)
            lots[r] = (struct comm_lot){(const char *)o->theirs[r] + offset, (char *)s.buffer + r * piece, piece};
        comm_fetch(o->comm, lots, piece * (o->ranks - 1), false);
        return;
    }
    for (int r = 0; r < o->ranks; r++)
        counts[r] = piece;
    comm_all_gather(o->comm, s.piece, s.buffer, counts);
}

// What is queued from here on finds the block's weights in their place; the next block's set out for theirs.
static void need(struct ownership *o, const struct weights *w, int block)
{
    const bool last = block + 1 == weights_count(w, WEIGHTS_BLOCK);
    if (o->coming != block)
        gather(o, w, block);
    comm_fetched(o->comm, false);
    o->coming = last ? -1 : block + 1;
    if (!last)
        gather(o, w, block + 1);
}

void dit_block(const struct dit *m, struct exec *x, struct dit_pass *p, int i)
{
    if (x->ownership && x->ownership->sharded)
        need(x->ownership, m->weights, i);
    m->ops->block(m, x, p, i);
}
