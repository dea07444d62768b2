// self.c: the communicator of one rank: every collective is a copy.
#include <stdlib.h>

#include "worker/comm/comm_internal.h"

struct self_comm {
    struct comm base;
    struct abort_note note; // of the root
};

static void self_all_to_all(struct comm *c, const void *send, const int64_t *send_counts, const int64_t *send_offsets,
                            void *recv, const int64_t *recv_counts, const int64_t *recv_offsets)
{
    (void)c;
    (void)recv_counts;
    comm_copy(recv, recv_offsets[0], send, send_offsets[0], send_counts[0]);
}

static void self_all_gather(struct comm *c, const void *send, void *recv, const int64_t *counts)
{
    (void)c;
    comm_copy(recv, 0, send, 0, counts[0]);
}

static void self_broadcast(struct comm *c, void *buffer, int64_t bytes, int root)
{
    (void)c;
    (void)buffer;
    (void)bytes;
    (void)root;
}

static void self_barrier(struct comm *c)
{
    (void)c;
}

static int self_group(struct comm *c, int first, int stride, int count, struct comm **out, struct err *err)
{
    (void)c;
    (void)first;
    (void)stride;
    (void)count;
    return comm_self_new(out, err);
}

static void self_free(struct comm *c)
{
    free(c);
}

static const struct comm_ops self_ops = {
    .all_to_all = self_all_to_all,
    .all_gather = self_all_gather,
    .broadcast = self_broadcast,
    .barrier = self_barrier,
    .group = self_group,
    .free = self_free,
};

int comm_self_new(struct comm **out, struct err *err)
{
    struct self_comm *self = calloc(1, sizeof *self);
    if (self == NULL)
        return err_set(err, ERR_NO_MEMORY, "no memory for a communicator");
    comm_init(&self->base, &self_ops, 0, 1, &self->note);
    *out = &self->base;
    return 0;
}
