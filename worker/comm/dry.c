// dry.c: one rank of many with nobody there: nothing moves, no buffer is touched; comm.c counts the bytes.
#include <stdlib.h>

#include "worker/comm/comm_internal.h"

struct dry_comm {
    struct comm base;
    struct abort_note note; // of the root
};

static void dry_all_to_all(struct comm *c, const void *send, const int64_t *send_counts, const int64_t *send_offsets,
                           void *recv, const int64_t *recv_counts, const int64_t *recv_offsets)
{
    (void)c;
    (void)send;
    (void)send_counts;
    (void)send_offsets;
    (void)recv;
    (void)recv_counts;
    (void)recv_offsets;
}

static void dry_all_gather(struct comm *c, const void *send, void *recv, const int64_t *counts)
{
    (void)c;
    (void)send;
    (void)recv;
    (void)counts;
}

static void dry_broadcast(struct comm *c, void *buffer, int64_t bytes, int root)
{
    (void)c;
    (void)buffer;
    (void)bytes;
    (void)root;
}

static void dry_barrier(struct comm *c)
{
    (void)c;
}

static void dry_exchange(struct comm *c, int sends, const struct link_piece *send, int recvs,
                         const struct link_piece *recv)
{
    (void)c;
    (void)sends;
    (void)send;
    (void)recvs;
    (void)recv;
}

static int dry_group(struct comm *c, int first, int stride, int count, struct comm **out, struct err *err)
{
    return comm_dry_new((c->rank - first) / stride, count, comm_on_device(c), out, err);
}

static void dry_free(struct comm *c)
{
    free(c);
}

#define DRY_OPS                                                                                                        \
    .all_to_all = dry_all_to_all, .all_gather = dry_all_gather, .broadcast = dry_broadcast, .barrier = dry_barrier,    \
    .group = dry_group, .free = dry_free

static const struct comm_ops dry_ops = {DRY_OPS}, linked_ops = {DRY_OPS, .exchange = dry_exchange};

int comm_dry_new(int rank, int size, bool linked, struct comm **out, struct err *err)
{
    if (size < 1 || size > COMM_MAX_RANKS || rank < 0 || rank >= size)
        return err_set(err, ERR_INVALID, "rank %d of %d: there are 1 to %d ranks, counted from 0", rank, size,
                       COMM_MAX_RANKS);
    struct dry_comm *dry = calloc(1, sizeof *dry);
    if (dry == NULL)
        return err_set(err, ERR_NO_MEMORY, "no memory for a communicator");
    comm_init(&dry->base, linked ? &linked_ops : &dry_ops, rank, size, &dry->note);
    *out = &dry->base;
    return 0;
}
