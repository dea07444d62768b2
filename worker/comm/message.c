#include "worker/comm/message.h"

static void message_out(struct message *m, int rank, const void *base, int64_t offset, int64_t bytes)
{
    m->out[rank].from = bytes > 0 ? (const uint8_t *)base + offset : NULL;
    m->out[rank].bytes = bytes;
}

static void message_in(struct message *m, int rank, void *base, int64_t offset, int64_t bytes)
{
    m->in[rank].to = bytes > 0 ? (uint8_t *)base + offset : NULL;
    m->in[rank].bytes = bytes;
}

static int move(struct comm *c, const struct message *m)
{
    return c->size == 1 ? 0 : c->ops->move(c, m);
}

void message_all_to_all(struct comm *c, const void *send, const int64_t *send_counts, const int64_t *send_offsets,
                        void *recv, const int64_t *recv_counts, const int64_t *recv_offsets)
{
    struct message m = {.op = COMM_ALL_TO_ALL, .counts = send_counts, .n_counts = c->size};
    const int me = c->rank;
    for (int r = 0; r < c->size; r++) {
        if (r == me)
            continue;
        message_out(&m, r, send, send_offsets[r], send_counts[r]);
        message_in(&m, r, recv, recv_offsets[r], recv_counts[r]);
    }
    if (move(c, &m) == 0)
        comm_copy(recv, recv_offsets[me], send, send_offsets[me], send_counts[me]);
}

void message_all_gather(struct comm *c, const void *send, void *recv, const int64_t *counts)
{
    struct message m = {.op = COMM_ALL_GATHER, .counts = counts, .n_counts = c->size};
    int64_t offset = 0, mine = 0;
    for (int r = 0; r < c->size; r++) {
        if (r == c->rank)
            mine = offset;
        else
            message_in(&m, r, recv, offset, counts[r]);
        offset += counts[r];
    }
    message_out(&m, c->rank, send, 0, counts[c->rank]);
    if (move(c, &m) == 0)
        comm_copy(recv, mine, send, 0, counts[c->rank]);
}

void message_broadcast(struct comm *c, void *buffer, int64_t bytes, int root)
{
    const int64_t counts[2] = {bytes, root};
    struct message m = {.op = COMM_BROADCAST, .counts = counts, .n_counts = 2};
    if (c->rank == root)
        message_out(&m, root, buffer, 0, bytes);
    else
        message_in(&m, root, buffer, 0, bytes);
    move(c, &m);
}

void message_barrier(struct comm *c)
{
    const int64_t none = 0;
    const struct message m = {.op = COMM_BARRIER, .counts = &none, .n_counts = 1};
    move(c, &m);
}
