// message.h: a collective as what it sends each member and expects of each, for backends that move bytes of the host.
// These fill comm_ops' collectives with the functions below and have `move` alone to write.
#ifndef DITFLEET_COMM_MESSAGE_H
#define DITFLEET_COMM_MESSAGE_H

#include "worker/comm/comm_internal.h"

struct message {
    enum comm_op op;
    // What members compare before they take a byte; of an all-to-all the bytes to each, else the same for all.
    const int64_t *counts; // (n_counts)
    int n_counts;
    struct piece {
        const uint8_t *from;
        int64_t bytes;
    } out[COMM_MAX_RANKS]; // by member; of oneself: what everybody gets, in place of the others'
    struct {
        uint8_t *to;
        int64_t bytes;
    } in[COMM_MAX_RANKS];
};

static inline struct piece message_piece_for(const struct message *m, const struct comm *c, int rank)
{
    return m->op == COMM_ALL_TO_ALL ? m->out[rank] : m->out[c->rank];
}

void message_all_to_all(struct comm *c, const void *send, const int64_t *send_counts, const int64_t *send_offsets,
                        void *recv, const int64_t *recv_counts, const int64_t *recv_offsets);
void message_all_gather(struct comm *c, const void *send, void *recv, const int64_t *counts);
void message_broadcast(struct comm *c, void *buffer, int64_t bytes, int root);
void message_barrier(struct comm *c);

#endif
