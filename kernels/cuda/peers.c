// peers.c: see peers.h; the kernel is in peers.cu.
#include "kernels/cuda/peers.h"

#include <stdlib.h>
#include <string.h>

enum { BOARD = DEVICE_BLOCKS, EXPORTED = DEVICE_BLOCKS + 1 }; // the blocks of a device, and its board behind them

// What a rank tells the others of its memory.
struct exported {
    char host[LINK_HOST]; // "": nothing is exported
    struct {
        cudaIpcMemHandle_t handle;
        uint64_t base, bytes; // bytes 0: none
    } block[EXPORTED];
};
_Static_assert(sizeof(struct exported) <= LINK_EXPORT_BYTES, "what is exported fits its room");

struct peers {
    struct device *d;
    int rank, ranks;
    char host[LINK_HOST];
    bool ready;
    struct peer_exchange fixed; // what all exchanges have in common
    void *opened[PEERS][EXPORTED];
    struct peer_map seen[PEERS][DEVICE_BLOCKS], *map; // map: the same on the device
    // Where copies go on, beside the device's stream, by its copy engines: those that have time, and those at once.
    // What these wait for goes before all other work.
    struct lane {
        cudaStream_t stream;
        cudaEvent_t join;
        bool used; // since it was joined
    } lanes[2];
    cudaEvent_t fork;
    // What has time is still to be fetched:
    struct fetch {
        char *to;
        const char *from;
        int64_t left, part;
    } fetch[PEERS];
    int fetches;
    unsigned exchanges, expected; // since the first fetch in hand; so many were there the last time
};

static bool make_lanes(struct peers *p)
{
    int least = 0, most = 0;
    bool fine = cudaEventCreateWithFlags(&p->fork, cudaEventDisableTiming) == cudaSuccess &&
                cudaDeviceGetStreamPriorityRange(&least, &most) == cudaSuccess;
    for (int i = 0; i < 2; i++)
        fine =
            fine &&
            cudaStreamCreateWithPriority(&p->lanes[i].stream, cudaStreamNonBlocking, i ? most : least) == cudaSuccess &&
            cudaEventCreateWithFlags(&p->lanes[i].join, cudaEventDisableTiming) == cudaSuccess;
    return fine;
}

struct peers *peers_new(struct device *d, int rank, int ranks, struct link_clock *clock, struct link_mark *mark)
{
    struct peers *p = ranks <= PEERS ? calloc(1, sizeof *p) : NULL;
    if (!p)
        return NULL;
    *p = (struct peers){.d = d, .rank = rank, .ranks = ranks};
    cuda_host_of(p->host);
    struct peer_exchange *x = &p->fixed;
    *x = (struct peer_exchange){.rank = rank, .ranks = ranks, .clock = clock, .mark = mark};
    // A board has the allocation's whole granule: it is exported.
    if (!*p->host || cudaMalloc((void **)&x->mine, DEVICE_GRANULE) != cudaSuccess ||
        cudaMalloc((void **)&x->counts, sizeof *x->counts) != cudaSuccess ||
        cudaMalloc((void **)&p->map, PEERS * DEVICE_BLOCKS * sizeof *p->map) != cudaSuccess || !make_lanes(p) ||
        cudaMemsetAsync(x->mine, 0, sizeof *x->mine, d->stream) != cudaSuccess ||
        cudaMemsetAsync(x->counts, 0, sizeof *x->counts, d->stream) != cudaSuccess ||
        cudaStreamSynchronize(d->stream) != cudaSuccess) {
        cudaGetLastError();
        peers_free(p);
        return NULL;
    }
    x->map = p->map;
    return p;
}

void peers_free(struct peers *p)
{
    if (!p)
        return;
    peers_forget(p);
    cudaFree(p->fixed.mine);
    cudaFree(p->fixed.counts);
    cudaFree(p->map);
    if (p->fork)
        cudaEventDestroy(p->fork);
    for (int i = 0; i < 2; i++) {
        if (p->lanes[i].join)
            cudaEventDestroy(p->lanes[i].join);
        if (p->lanes[i].stream)
            cudaStreamDestroy(p->lanes[i].stream);
    }
    free(p);
}

// ---- whose memory is where

void peers_export(struct peers *p, void *to)
{
    struct exported all = {.host = ""};
    const struct device *d = p->d;
    bool fine = d->untracked == 0;
    cuda_enter(p->d);
    for (int i = 0; i < EXPORTED && fine; i++) {
        void *base = i == BOARD ? (void *)p->fixed.mine : d->blocks[i].base;
        const size_t bytes = i == BOARD ? DEVICE_GRANULE : d->blocks[i].bytes;
        if (!base)
            continue;
        fine = cudaIpcGetMemHandle(&all.block[i].handle, base) == cudaSuccess;
        all.block[i].base = (uint64_t)(uintptr_t)base;
        all.block[i].bytes = bytes;
    }
    if (fine)
        memcpy(all.host, p->host, sizeof all.host);
    cudaGetLastError();
    memset(to, 0, LINK_EXPORT_BYTES);
    memcpy(to, &all, sizeof all);
}

static bool open_blocks(struct peers *p, int rank, const struct exported *e)
{
    for (int i = 0; i < EXPORTED; i++) {
        if (e->block[i].bytes == 0)
            continue;
        if (cudaIpcOpenMemHandle(&p->opened[rank][i], e->block[i].handle, cudaIpcMemLazyEnablePeerAccess) !=
            cudaSuccess) {
            cudaGetLastError();
            p->opened[rank][i] = NULL;
            return false;
        }
        if (i == BOARD)
            p->fixed.theirs[rank] = p->opened[rank][i];
        else
            p->seen[rank][i] = (struct peer_map){e->block[i].base, e->block[i].bytes, p->opened[rank][i]};
    }
    return p->fixed.theirs[rank] != NULL;
}

bool peers_import(struct peers *p, const void *all)
{
    bool fine = true;
    peers_forget(p);
    cuda_enter(p->d);
    for (int r = 0; r < p->ranks && fine; r++) {
        struct exported e;
        memcpy(&e, (const char *)all + r * LINK_EXPORT_BYTES, sizeof e);
        fine = strcmp(e.host, p->host) == 0 && (r == p->rank || open_blocks(p, r, &e));
    }
    if (fine)
        fine = cudaMemcpyAsync(p->map, p->seen, sizeof p->seen, cudaMemcpyDefault, p->d->stream) == cudaSuccess &&
               cudaStreamSynchronize(p->d->stream) == cudaSuccess;
    p->ready = fine;
    if (!fine)
        peers_forget(p);
    return fine;
}

void peers_forget(struct peers *p)
{
    cuda_enter(p->d);
    if (p->ready) {
        cudaStreamSynchronize(p->d->stream);
        for (int i = 0; i < 2; i++)
            cudaStreamSynchronize(p->lanes[i].stream);
    }
    for (int r = 0; r < PEERS; r++) {
        for (int i = 0; i < EXPORTED; i++) {
            if (p->opened[r][i])
                cudaIpcCloseMemHandle(p->opened[r][i]);
            p->opened[r][i] = NULL;
        }
        p->fixed.theirs[r] = NULL;
    }
    memset(p->seen, 0, sizeof p->seen);
    p->fetches = 0;
    p->ready = false;
}

bool peers_ready(const struct peers *p)
{
    return p && p->ready;
}

// ---- fetching
// Copies and exchanges share the way between GPUs, and who waits for an exchange computes nothing. So a copy that has
// time is made in parts: one at once, one after each exchange but the last, of as many as there were the last time, and
// the rest, half of it, after that.

static const char fetching[] = "fetching from another rank's memory";

// What is queued in the lane from here on is done after what the device was given so far.
static bool fork_to(struct peers *p, struct lane *l)
{
    l->used = true;
    return cuda_ok(p->d, cudaEventRecord(p->fork, p->d->stream), fetching) &&
           cuda_ok(p->d, cudaStreamWaitEvent(l->stream, p->fork, 0), fetching);
}

static bool copy_beside(struct peers *p, struct lane *l, void *to, const void *from, int64_t bytes)
{
    return fork_to(p, l) &&
           cuda_ok(p->d, cudaMemcpyAsync(to, from, (size_t)bytes, cudaMemcpyDeviceToDevice, l->stream), fetching);
}

static void fetch_more(struct peers *p, int first, bool all)
{
    for (int i = first; i < p->fetches; i++) {
        struct fetch *f = &p->fetch[i];
        const int64_t bytes = all || f->left < f->part ? f->left : f->part;
        if (bytes == 0)
            continue;
        if (!copy_beside(p, &p->lanes[false], f->to, f->from, bytes))
            return;
        f->to += bytes;
        f->from += bytes;
        f->left -= bytes;
    }
}

void *peers_at(const struct peers *p, int rank, void *address)
{
    char *found = rank == p->rank ? address : NULL;
    for (int i = 0; i < DEVICE_BLOCKS && p->ready && !found; i++) {
        const uint64_t at = (uint64_t)(uintptr_t)address - p->seen[rank][i].base; // beyond it, where it is not in it
        if (at < p->seen[rank][i].bytes)
            found = (char *)p->seen[rank][i].mapped + at;
    }
    return found;
}

void peers_fetch(struct peers *p, int rank, const void *from, void *to, int64_t bytes, bool at_once)
{
    enum { GRAIN = 4096 };
    const char *seen = peers_at(p, rank, (void *)from); // it is only read
    if (seen == to)
        return; // one's own, in its place
    if (!seen || (!at_once && p->fetches == PEERS)) {
        check_fail(&p->d->check, ERR_INTERNAL, "rank %d has nothing there, or more is fetched than there are ranks",
                   rank);
        return;
    }
    if (at_once) {
        copy_beside(p, &p->lanes[true], to, seen, bytes);
        return;
    }
    if (p->fetches == 0) {
        p->expected = p->exchanges;
        p->exchanges = 0;
    }
    const int64_t part = p->expected ? bytes / (2 * p->expected) / GRAIN * GRAIN : bytes;
    p->fetch[p->fetches++] = (struct fetch){to, seen, bytes, part};
    fetch_more(p, p->fetches - 1, false);
}

void peers_fetched(struct peers *p, bool at_once)
{
    static const char what[] = "what was fetched";
    struct lane *l = &p->lanes[at_once];
    if (!at_once) {
        fetch_more(p, 0, true);
        p->fetches = 0;
    }
    if (l->used && cuda_ok(p->d, cudaEventRecord(l->join, l->stream), what))
        cuda_ok(p->d, cudaStreamWaitEvent(p->d->stream, l->join, 0), what);
    l->used = false;
}

// ---- an exchange

// t as rows of bytes.
static struct peer_rows rows_in(struct tensor t)
{
    const int64_t size = (int64_t)dtype_size(t.dtype), rows = t.dims == 1 ? 1 : t.n[0], row = tensor_count(t) / rows;
    return (struct peer_rows){t.data, (t.dims == 1 ? row : t.ld) * size, rows, row * size};
}

static bool is_exported(const struct device *d, struct tensor t)
{
    const char *at = t.data;
    for (int i = 0; i < DEVICE_BLOCKS; i++) {
        const char *base = d->blocks[i].base;
        if (base && at >= base && at < base + d->blocks[i].bytes)
            return true;
    }
    return false;
}

// The i-th piece to a peer meets the i-th from here there. False: more than there is room for.
static bool add_recvs(struct peers *p, struct peer_exchange *x, int n, const struct link_piece *recv, const char *what)
{
    int slots[PEERS] = {0};
    for (int i = 0; i < n; i++) {
        const int peer = recv[i].rank;
        if (tensor_count(recv[i].t) == 0 || peer == p->rank)
            continue;
        if (!is_exported(p->d, recv[i].t))
            return check_fail(&p->d->check, ERR_INTERNAL, "%s: rows come to memory that was not exported", what);
        if (slots[peer] == PEER_SLOTS || x->recvs == PEER_PIECES)
            return check_fail(&p->d->check, ERR_INTERNAL, "%s: more than %d pieces from a rank", what, PEER_SLOTS);
        x->recv[x->recvs++] = (struct peer_recv){rows_in(recv[i].t), (short)peer, (short)slots[peer]++};
        x->from |= 1U << peer;
    }
    return true;
}

// The next piece to oneself.
static const struct link_piece *own(int rank, int n, const struct link_piece *recv, int *at)
{
    while (*at < n && (recv[*at].rank != rank || tensor_count(recv[*at].t) == 0))
        ++*at;
    return *at < n ? &recv[(*at)++] : NULL;
}

static bool add_sends(struct peers *p, struct peer_exchange *x, int n, const struct link_piece *send, int recvs,
                      const struct link_piece *recv, const char *what)
{
    int slots[PEERS] = {0}, at = 0;
    for (int i = 0; i < n; i++) {
        const int peer = send[i].rank;
        struct peer_send s = {.from = rows_in(send[i].t), .peer = (short)peer};
        if (tensor_count(send[i].t) == 0)
            continue;
        if (peer == p->rank) {
            const struct link_piece *to = own(peer, recvs, recv, &at);
            if (!to || to->t.data == send[i].t.data)
                continue;
            s.to = rows_in(to->t);
        } else {
            s.slot = (short)slots[peer]++;
            x->to |= 1U << peer;
        }
        if (s.slot == PEER_SLOTS || x->sends == PEER_PIECES)
            return check_fail(&p->d->check, ERR_INTERNAL, "%s: more than %d pieces to a rank", what, PEER_SLOTS);
        x->chunks += (unsigned)((s.from.rows * s.from.bytes + PEER_CHUNK - 1) / PEER_CHUNK);
        s.end = x->chunks;
        x->send[x->sends++] = s;
    }
    return true;
}

void peers_exchange(struct peers *p, const char *what, int sends, const struct link_piece *send, int recvs,
                    const struct link_piece *recv)
{
    struct peer_exchange x = p->fixed;
    if (!add_recvs(p, &x, recvs, recv, what) || !add_sends(p, &x, sends, send, recvs, recv, what))
        return;
    launch_peer_exchange(p->d->stream, &x, p->d->processors);
    p->exchanges++;
    fetch_more(p, 0, p->exchanges >= p->expected);
}

void peers_meet(struct peers *p, int n, const int *ranks, bool beside)
{
    const struct peer_exchange *x = &p->fixed;
    struct peer_meeting m = {
        .rank = p->rank, .beside = beside, .mine = x->mine, .counts = x->counts, .clock = x->clock, .mark = x->mark};
    memcpy(m.theirs, x->theirs, sizeof m.theirs);
    for (int i = 0; i < n; i++)
        m.with |= ranks[i] == p->rank ? 0 : 1U << ranks[i];
    if (!beside || fork_to(p, &p->lanes[true]))
        launch_peer_meeting(beside ? p->lanes[true].stream : p->d->stream, &m);
}
